"""Estimate: the least time that a denoising step, a causal token and a prompt can take on a machine, by arithmetic alone.

Nothing is measured, and no weights are read: the bytes and the products follow from the checkpoint's headers and config.json.
Each pass must read its weights and the KV cache from memory once, and must do its products. A machine that reads at its full
bandwidth while it multiplies at its full rate takes the longer of the two times: the floor. Everything that a real program does
beside this makes it slower: launches, activations that leave the chip, unpacking, norms, softmax, sampling.

The rules, for a pass over N tokens in bfloat16:

- A packed weight counts as stored, any other as two bytes. A product counts two operations per weight and token.
- A token chooses K of E experts. If all are equally likely, N tokens touch E * (1 - (1 - K / E) ** N) experts of a layer. Real
  routing is less even, so it touches fewer.
- The embedding is read whole twice in a step: as the output head, and for the mean embeddings of the self-conditioning.
- A prompt is read in the pieces of :data:`~mlx_diffgemma.prompts.CHUNK` tokens, and each piece reads the weights again.
- Activations are counted apart and are not part of the floor, because a program may keep them on the chip.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

from mlx_diffgemma.backends.memory import ITEMSIZE, memory
from mlx_diffgemma.checkpoint import NORMS, PARTS, Checkpoint, part_of
from mlx_diffgemma.config import LayerConfig, ModelConfig
from mlx_diffgemma.errors import CheckpointError, InputError
from mlx_diffgemma.fields import shown
from mlx_diffgemma.prompts import CHUNK
from mlx_diffgemma.reports.speed import CanvasSpeed, Spread

DTYPE = "bfloat16"
_SIZE = ITEMSIZE[DTYPE]


@dataclass(frozen=True)
class Hardware:
    """A machine as its maker describes it. Nothing here is measured.

    Attributes:
        memory: GiB, of the largest configuration. A Mac's memory is that of the whole system.
        bandwidth: GB/s (10^9 bytes) of that memory, in the fastest configuration.
        tflops: 10^12 operations a second in bfloat16 without sparsity, summed in float32. None if the maker has not published it.
        source: where the figures are published.
        system: the name by which the system reports it, if it reports one.
    """

    name: str
    memory: int
    bandwidth: float
    tflops: float | None
    source: str
    system: str | None = None


_APPLE = "Apple, announcement and technical specifications"
_APPLE_FLOAT32 = "Apple, announcement and presentation; the rate is that of float32, Apple published none of 16 bits"
_M1 = f"{_APPLE_FLOAT32}; bandwidth of LPDDR4X-4266 on 128 bits, as Apple says that M2's 100 GB/s is 50 percent more"
_H100, _H200 = (f"NVIDIA, {name} data sheet; half of the rate with sparsity" for name in ("H100", "H200"))

#: The figures that the makers have published, as known in 2026-11; not measured. For Macs, those of each chip's fastest
#: configuration, so that the floor holds for the others too: an M3 Max with 30 GPU cores has 300 GB/s, an M4 Max with 32 has 410.
HARDWARE = (
    Hardware("M1", 16, 68.25, 2.6, _M1),
    Hardware("M1 Pro", 32, 200, 5.2, _APPLE_FLOAT32),
    Hardware("M1 Max", 64, 400, 10.4, _APPLE_FLOAT32),
    Hardware("M1 Ultra", 128, 800, 21, _APPLE_FLOAT32),
    Hardware("M2", 24, 100, 3.6, _APPLE_FLOAT32),
    Hardware("M2 Pro", 32, 200, None, _APPLE),
    Hardware("M2 Max", 96, 400, None, _APPLE),
    Hardware("M2 Ultra", 192, 800, None, _APPLE),
    Hardware("M3", 24, 100, None, _APPLE),
    Hardware("M3 Pro", 36, 150, None, _APPLE),
    Hardware("M3 Max", 128, 400, None, _APPLE),
    Hardware("M3 Ultra", 512, 819, None, _APPLE),
    Hardware("M4", 32, 120, None, _APPLE),
    Hardware("M4 Pro", 64, 273, None, _APPLE),
    Hardware("M4 Max", 128, 546, None, _APPLE),
    Hardware("M5", 32, 153, None, _APPLE),
    Hardware("M5 Pro", 64, 307, None, _APPLE),
    Hardware("M5 Max", 128, 614, None, _APPLE),
    Hardware("RTX 3090", 24, 936, 71, "NVIDIA, Ampere GA102 white paper", "NVIDIA GeForce RTX 3090"),
    Hardware("RTX 4090", 24, 1008, 165.2, "NVIDIA, Ada white paper", "NVIDIA GeForce RTX 4090"),
    Hardware("RTX 5090", 32, 1792, 209.5, "NVIDIA, RTX Blackwell white paper", "NVIDIA GeForce RTX 5090"),
    Hardware("H100 SXM", 80, 3350, 989.4, _H100, "NVIDIA H100 80GB HBM3"),
    Hardware("H200", 141, 4800, 989.4, _H200, "NVIDIA H200"),
    Hardware("DGX Spark", 128, 273, None, "NVIDIA, DGX Spark data sheet, which has no bfloat16 rate", "NVIDIA GB10"),
)


def find_hardware(name: str) -> Hardware:
    """The machine with this name, in any spelling: "m3-pro", "H100", "4090". Raises InputError if none or several fit."""
    by_key = {_key(each.name): each for each in HARDWARE}
    wanted = _key(name)
    if wanted in by_key:
        return by_key[wanted]
    within = [each for key, each in by_key.items() if wanted and wanted in key]
    if len(within) == 1:
        return within[0]
    nearest = within or [by_key[key] for key in difflib.get_close_matches(wanted, by_key, n=3, cutoff=0.5)]
    names = ", ".join(each.name for each in nearest or HARDWARE)
    raise InputError(f"unknown machine {shown(name)}; {'the nearest are' if nearest else 'known are'} {names}")


def recognize(cpu: str, gpu: str | None) -> Hardware | None:
    """The machine whose processor or GPU reports these names, as in :class:`~mlx_diffgemma.reports.speed.Machine`."""
    return next((each for each in HARDWARE if cpu == f"Apple {each.name}" or (gpu and gpu == each.system)), None)


def _key(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower())


@dataclass(frozen=True)
class Share:
    """What one part of the model adds to a pass: bytes that must come from memory, floating-point operations, and the reason."""

    name: str
    nbytes: int
    flops: int
    reason: str


@dataclass(frozen=True)
class Work:
    """The least that one kind of pass must do.

    Attributes:
        what: the pass in words.
        shares: the parts.
        activations: bytes that move besides, if every product writes its result to memory and the next one reads it there.
    """

    what: str
    shares: tuple[Share, ...]
    activations: int

    @property
    def nbytes(self) -> int:
        return sum(share.nbytes for share in self.shares)

    @property
    def flops(self) -> int:
        return sum(share.flops for share in self.shares)

    def reading(self, hardware: Hardware) -> float:
        """Seconds to read the bytes at the full bandwidth."""
        return self.nbytes / (hardware.bandwidth * 1e9)

    def computing(self, hardware: Hardware) -> float | None:
        """Seconds to do the operations at the full rate; None if the rate is not known."""
        return None if hardware.tflops is None else self.flops / (hardware.tflops * 1e12)

    def floor(self, hardware: Hardware) -> float:
        """Seconds that the pass takes at least. Where the rate of arithmetic is not known, this is the time to read alone."""
        return max(self.reading(hardware), self.computing(hardware) or 0.0)

    def bound(self, hardware: Hardware) -> Literal["memory", "arithmetic"]:
        """Which of the two takes longer."""
        return "memory" if self.floor(hardware) == self.reading(hardware) else "arithmetic"


@dataclass(frozen=True)
class Estimate:
    """The passes of one checkpoint.

    Attributes:
        prompt_length, canvas_length: tokens.
        step: a denoising step of a canvas after the prompt, with self-conditioning. A block's first step has none.
        commit: the causal pass that puts a finished canvas into the cache.
        token: one token of the causal mode after the prompt, with its logits.
        prompt: the causal pass over the prompt.
        needed: bytes of memory to run it, as ``info`` counts them.
    """

    prompt_length: int
    canvas_length: int
    step: Work
    commit: Work
    token: Work
    prompt: Work
    needed: int

    @property
    def works(self) -> tuple[Work, ...]:
        return self.step, self.commit, self.token, self.prompt

    def fits(self, hardware: Hardware) -> bool:
        """Whether the largest memory of that machine holds it."""
        return self.needed <= hardware.memory * 2**30

    def tokens_per_second(self, hardware: Hardware, tokens_per_forward: float) -> float:
        """The most that diffusion can write, if a step settles this many tokens."""
        step, commit = (Spread.of([work.floor(hardware)]) for work in (self.step, self.commit))
        return CanvasSpeed(self.canvas_length, step, commit).tokens_per_second(tokens_per_forward)


def estimate(checkpoint: Checkpoint, prompt_length: int, canvas_length: int | None = None) -> Estimate:
    """Count the passes of a checkpoint after a prompt of ``prompt_length`` tokens. Reads headers only.

    ``canvas_length`` is the model's own if None. Raises CheckpointError if a part of the model has no weights.
    """
    config = checkpoint.config
    canvas = canvas_length or config.canvas_length
    weights = _weights(checkpoint)
    pieces = [(start, min(CHUNK, prompt_length - start)) for start in range(0, prompt_length, CHUNK)]
    count = _Count(config, weights)
    return Estimate(
        prompt_length=prompt_length,
        canvas_length=canvas,
        step=count.work(f"a denoising step of {canvas:,} tokens after {prompt_length:,}", [(prompt_length, canvas)], "denoise"),
        commit=count.work(f"the commit of {canvas:,} tokens after {prompt_length:,}", [(prompt_length, canvas)], "encode"),
        token=count.work(f"a causal token after {prompt_length:,}", [(prompt_length, 1)], "next"),
        prompt=count.work(f"a prompt of {prompt_length:,} tokens", pieces, "encode"),
        needed=memory(checkpoint, DTYPE, min(prompt_length + canvas, config.max_position_embeddings)).total,
    )


@dataclass(frozen=True)
class _Weights:
    """The weights of one part: their number, without the scales and biases of groups, and the bytes of everything."""

    parameters: int = 0
    nbytes: int = 0


def _weights(checkpoint: Checkpoint) -> dict[str, _Weights]:
    """The text model's weights by part, as they lie in memory."""
    found = dict.fromkeys((*PARTS, NORMS), _Weights())
    for name, tensor in checkpoint.tensors.items():
        module, _, attribute = name.rpartition(".")
        packed, size = checkpoint.quantization.get(module), prod(tensor.shape)
        parameters = size if packed is None else size * 32 // packed.bits if attribute == "weight" else 0
        part = found[part_of(name)]
        nbytes = size * _SIZE if packed is None else tensor.nbytes
        found[part_of(name)] = _Weights(part.parameters + parameters, part.nbytes + nbytes)
    missing = [name for name, part in found.items() if not part.parameters and name != "vision"]
    if missing:
        raise CheckpointError(f"{checkpoint.name}: the weights of {', '.join(missing)} are missing; fetch them again")
    return found


@dataclass(frozen=True)
class _Count:
    config: ModelConfig
    weights: Mapping[str, _Weights]

    def work(self, what: str, passes: Sequence[tuple[int, int]], kind: Literal["denoise", "encode", "next"]) -> Work:
        """Count passes over (positions in the cache, new tokens). ``next`` is ``encode`` and the logits of the last token."""
        tokens, times = sum(new for _, new in passes), len(passes)
        shares = [self._experts(passes)]
        parts = ["attention", "mlp", "router", NORMS, *(["self_conditioning"] if kind == "denoise" else [])]
        for name in parts:
            part = self.weights[name]
            flops = 0 if name == NORMS else 2 * tokens * part.parameters
            shares.append(Share(name, times * part.nbytes, flops, f"{part.parameters:,} weights{_times(times)}"))
        table = self.weights["embedding"]
        vocabulary = self.config.vocab_size
        found = min(tokens, vocabulary)
        shares.append(Share("embedding, rows", found * table.nbytes // vocabulary, 0, f"{found:,} of {vocabulary:,} rows"))
        rows = {"denoise": tokens, "encode": 0, "next": 1}[kind]
        if rows:
            shares.append(
                Share("embedding, output head", table.nbytes, 2 * rows * table.parameters, f"logits, {rows:,} x {vocabulary:,}")
            )
        if kind == "denoise":
            reason = "the whole table, weighted by the probabilities of the step before"
            shares.append(Share("embedding, self-conditioning", table.nbytes, 2 * tokens * table.parameters, reason))
        shares.append(self._keys(passes, causal=kind != "denoise"))
        return Work(what, tuple(shares), self._activations(tokens, rows, denoise=kind == "denoise"))

    def _experts(self, passes: Sequence[tuple[int, int]]) -> Share:
        every, chosen, part = self.config.num_experts, self.config.top_k_experts, self.weights["experts"]
        touched = [every * (1 - (1 - chosen / every) ** new) for _, new in passes]
        tokens = sum(new for _, new in passes)
        return Share(
            "experts",
            round(part.nbytes * sum(touched) / every),
            2 * tokens * part.parameters * chosen // every,
            f"{sum(touched) / len(passes):,.1f} of {every} in each layer, {chosen} for each token{_times(len(passes))}",
        )

    def _keys(self, passes: Sequence[tuple[int, int]], *, causal: bool) -> Share:
        """Keys and values: those of the committed positions are read, those of a causal pass's own tokens are written."""
        nbytes = flops = 0
        for layer in self.config.layers:
            position = 2 * layer.num_key_value_heads * layer.head_dim * _SIZE
            for before, new in passes:
                kept = self.config.sliding_window - 1 if layer.is_sliding else before + new
                nbytes += position * (min(before, kept) + (min(new, kept) if causal else 0))
                pairs = self._causal_pairs(layer, before, new) if causal else new * (min(before, kept) + new)
                flops += 4 * pairs * self.config.num_attention_heads * layer.head_dim
        what = (
            "those before are read, the new ones written" if causal else f"of {passes[0][0]:,} positions, less on sliding layers"
        )
        return Share("keys and values", nbytes, flops, what)

    def _causal_pairs(self, layer: LayerConfig, before: int, new: int) -> int:
        """How many (query, key) pairs ``new`` queries after ``before`` positions have, each seeing itself and those before."""
        reach = self.config.sliding_window if layer.is_sliding else before + new

        def pairs(end: int) -> int:
            ramp = min(end, reach)
            return ramp * (ramp + 1) // 2 + (end - ramp) * reach

        return pairs(before + new) - pairs(before)

    def _activations(self, tokens: int, rows: int, *, denoise: bool) -> int:
        """Bytes of the inputs and results of products, in bfloat16, where everything else is fused into them.

        The logits of a step move three times: written, read for the statistics, and read for the self-conditioning.
        """
        config = self.config
        hidden, inner, moe = config.hidden_size, config.intermediate_size, config.moe_intermediate_size
        dense = 2 * (hidden + inner)
        each = dense + 2 * config.top_k_experts * (hidden + moe) + hidden + config.num_experts
        sizes = sum(
            each + 2 * hidden + layer.head_dim * (4 * config.num_attention_heads + 4 * layer.num_key_value_heads)
            for layer in config.layers
        )
        total = tokens * sizes + rows * (hidden + config.vocab_size)
        if denoise:
            total += tokens * (2 * config.vocab_size + hidden + dense)
        return total * _SIZE


def _times(count: int) -> str:
    return f", read {count} times" if count > 1 else ""

"""What the scripts that measure a machine share: the sizes, spreads of repeated runs, and errors in one line. No framework.

``mac.py`` and ``gpu.py`` say how to run them.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from mlx_diffgemma import noise
from mlx_diffgemma.backends import KEY_TILE, QUERY_TILE, Backend, Cache, Piece, Row
from mlx_diffgemma.checkpoint import Quantization
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.prompts import chunks
from mlx_diffgemma.reports.speed import Spread
from support.real_layout import config as released_config

#: Runs before the measured ones.
WARMUP = 2
#: The group size of the released 4-bit checkpoint, and its parts that have 8 bits.
GROUP = 64
BITS_8 = ("embed_tokens", "self_attn", "mlp", "router")
TEMPERATURE = 0.8


def released_format(path: str) -> Quantization:
    """How the released 4-bit checkpoint packs the matrix at a module's path."""
    return Quantization(GROUP, 8 if any(part in path for part in BITS_8) else 4)


@dataclass(frozen=True)
class Sizes:
    """Sizes of everything measured; the defaults are the released model's.

    Attributes:
        sliding, full: key-value heads and head size of each kind of layer.
        keys: over how many keys a canvas attends.
        pass_length, pass_keys: queries of a causal pass, and over how many keys.
        prefixes: positions before a denoising step.
        prompt: tokens that are encoded at once, and the positions before a causal token.
        puzzles: how many the boxed models solve.
        repeats: measured rounds.
        round_seconds: a round takes about as long.
        model_prompt: prompt tokens of the checkpoint that is given.
    """

    canvas: int = 256
    hidden: int = 2816
    inner: int = 2112
    expert_inner: int = 704
    experts: int = 128
    top_k: int = 8
    heads: int = 16
    sliding: tuple[int, int] = (8, 256)
    full: tuple[int, int] = (2, 512)
    window: int = 1024
    vocabulary: int = 262_144
    keys: tuple[int, ...] = (1_280, 8_192)
    pass_length: int = 1_024
    pass_keys: tuple[int, ...] = (1_024, 4_096)
    prefixes: tuple[int, ...] = (0, 1_024, 8_192)
    prompt: int = 1_024
    puzzles: int = 20
    repeats: int = 7
    round_seconds: float = 0.05
    model_prompt: int = 512

    def config(self, layers: int) -> ModelConfig:
        """The released configuration with these sizes and the first ``layers`` layers."""
        return ModelConfig.from_dict(self.raw_config(layers))

    def raw_config(self, layers: int) -> dict[str, Any]:
        """The same as ``config.json`` has it."""
        raw: dict[str, Any] = released_config()
        raw["canvas_length"] = self.canvas
        raw["text_config"] |= {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "moe_intermediate_size": self.expert_inner,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.sliding[0],
            "head_dim": self.sliding[1],
            "num_global_key_value_heads": self.full[0],
            "global_head_dim": self.full[1],
            "num_experts": self.experts,
            "top_k_experts": self.top_k,
            "sliding_window": self.window,
            "num_hidden_layers": layers,
            "layer_types": raw["text_config"]["layer_types"][:layers],
        }
        return raw


REAL = Sizes()
TOY = Sizes(
    canvas=16,
    hidden=128,
    inner=64,
    expert_inner=64,
    experts=8,
    top_k=2,
    heads=4,
    sliding=(2, 32),
    full=(1, 64),
    window=32,
    vocabulary=1_024,
    keys=(24, KEY_TILE + 32),
    pass_length=QUERY_TILE + 16,
    pass_keys=(QUERY_TILE + 16, QUERY_TILE + 64),
    prefixes=(0, 24, 96),
    prompt=24,
    puzzles=2,
    repeats=2,
    round_seconds=0.001,
    model_prompt=8,
)


def text_before(backend: Backend, length: int, seed: int = 0) -> Cache:
    """A cache with ``length`` random tokens."""
    text = backend.new_cache()
    for piece in chunks(noise.canvas_tokens(seed, 0, 0, length, backend.config.vocab_size)) if length else ():
        backend.encode([Piece(piece, text)])
    return text


def random_row(backend: Backend, text: Cache, seed: int = 0) -> Row:
    """A canvas of random tokens after ``text``."""
    config = backend.config
    canvas = noise.canvas_tokens(seed, 1, 0, config.canvas_length, config.vocab_size)
    return Row(canvas, text, TEMPERATURE, noise.sampling_key(seed, 1, 1))


def causal_token(backend: Backend, text: Cache) -> None:
    """A token of the causal mode, with the logits of the next one."""
    backend.encode([Piece(np.array([5], np.int32), text)])
    backend.next_logits([text])


def spread(values: Sequence[float]) -> dict[str, float]:
    return asdict(Spread.of(values))


def error_line(error: BaseException) -> str:
    """An error in one line, without the user's folder."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text.replace(str(Path.home()), "~")[:500]


def tried(compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A measurement that this machine or this MLX may not have, or its error."""
    try:
        return compute()
    except Exception as error:  # noqa: BLE001 (the error is what we want to know)
        return {"error": error_line(error)}


class Skipped(Exception):
    """Why this machine does not run a section."""

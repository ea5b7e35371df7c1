"""Hugging Face `transformers`' own DiffusionGemma behind the :class:`~mlx_diffgemma.backends.Backend` protocol, on the CPU.

It defines what is right, and is written for nothing else: it holds whole logits and the encoder's cache as they come. Its
graph is theirs, and its statistics share no code with the other backends.
"""

import copy
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlx_diffgemma.backends import Denoised, check_tokens
from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.errors import BackendError, CheckpointError
from mlx_diffgemma.noise import gumbel

#: Tensors that no text passes through.
_UNUSED = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")


def load(checkpoint: Checkpoint, *, dtype: str | None = None) -> "ReferenceBackend":
    """Load ``checkpoint`` in `transformers`, in ``float32`` (the default) or ``bfloat16``.

    Raises:
        BackendError: `transformers` is not installed or knows no DiffusionGemma, or the checkpoint is quantized.
        CheckpointError: the weights do not fit the configuration.
    """
    if checkpoint.quantization:
        raise BackendError(f"{checkpoint.folder} is quantized, and the reference reads unquantized weights only")
    try:
        from transformers import DiffusionGemmaForBlockDiffusion
    except ImportError:
        raise BackendError('the reference needs transformers 5.23 or newer; try: pip install "transformers>=5.23,<6"') from None
    dtype = dtype or "float32"
    loaded: Any = DiffusionGemmaForBlockDiffusion.from_pretrained(
        checkpoint.folder,
        dtype=getattr(torch, dtype),
        attn_implementation="eager",  # the plainest attention and experts that there are
        experts_implementation="eager",
        local_files_only=True,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # what does not fit is named below
        output_loading_info=True,
    )
    model, info = loaded
    random = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
    unfit = sorted(name for name in random if not name.startswith(_UNUSED))
    if unfit:
        raise CheckpointError(f"{checkpoint.folder}: tensors missing or of the wrong shape: {', '.join(unfit)}")
    return ReferenceBackend(model.eval().requires_grad_(False), checkpoint, dtype)


class ReferenceCache:
    """The encoder's cache, which the decoder reads."""

    def __init__(self, config: Any) -> None:
        from transformers import DynamicCache

        self.past_key_values = DynamicCache(config=config)
        self.last: Tensor | None = None  # the final hidden state [B, 1, H] of the last position

    def __len__(self) -> int:
        return int(self.past_key_values.get_seq_length())

    def repeated(self, rows: int) -> "ReferenceCache":
        other = copy.deepcopy(self)
        other.past_key_values.batch_repeat_interleave(rows)
        other.last = None if self.last is None else self.last.expand(rows, -1, -1)
        return other


class ReferenceBackend:
    name, device = "reference", "cpu"

    def __init__(self, model: Any, checkpoint: Checkpoint, dtype: str) -> None:
        self.model, self.config, self.dtype, self.exact_rows = model, checkpoint.config, dtype, False

    def new_cache(self, batch_size: int = 1) -> ReferenceCache:
        return ReferenceCache(self.model.config.get_text_config(decoder=True))

    def peak_memory(self) -> None:
        return None  # on a CPU PyTorch keeps no count

    @torch.inference_mode()
    def encode(self, tokens: NDArray[np.int32], cache: ReferenceCache, *, logits: bool = False) -> NDArray[np.float32] | None:
        hidden = self._encode(tokens, cache)
        return self._head(hidden[:, -1]).numpy() if logits else None

    @torch.inference_mode()
    def score(self, tokens: NDArray[np.int32], cache: ReferenceCache) -> NDArray[np.float32]:
        before = cache.last
        hidden = self._encode(tokens, cache)
        before = torch.full_like(hidden[:, :1], torch.nan) if before is None else before
        logits = self._head(torch.cat([before, hidden[:, :-1]], dim=1))
        return _logprobs(logits, tokens)

    @torch.inference_mode()
    def score_canvas(self, canvas: NDArray[np.int32], cache: ReferenceCache) -> NDArray[np.float32]:
        return _logprobs(self._decode(canvas, cache, None), canvas)

    @torch.inference_mode()
    def denoise(
        self,
        canvas: NDArray[np.int32],
        cache: ReferenceCache,
        *,
        temperature: float,
        noise_keys: NDArray[np.uint32] | None = None,
        self_conditioning: Any = None,
        frozen: NDArray[np.int32] | None = None,
    ) -> Denoised:
        scores = self._decode(canvas, cache, self_conditioning) / temperature  # [B, L, V]
        if frozen is not None:
            template = np.broadcast_to(frozen, canvas.shape)
            row, position = np.nonzero(template >= 0)
            scores[row, position] = -torch.inf
            scores[row, position, template[row, position]] = 0.0
        sampled = scores.argmax(dim=-1).numpy()
        if noise_keys is not None:
            tokens = np.arange(self.config.vocab_size, dtype=np.uint32)
            drawn = [  # a position at a time bounds the memory
                (scores[:, position].numpy() + gumbel(noise_keys[:, None], np.array(position, np.uint32), tokens)).argmax(axis=-1)
                for position in range(canvas.shape[1])
            ]
            sampled = np.stack(drawn, axis=1)
        return Denoised(
            argmax=scores.argmax(dim=-1).int().numpy(),
            sampled=sampled.astype(np.int32),
            entropy=torch.distributions.Categorical(logits=scores.double()).entropy().float().numpy(),
            self_conditioning=scores.to(self.model.lm_head.weight.dtype),
        )

    @torch.inference_mode()
    def logits(
        self,
        tokens: NDArray[np.int32],
        cache: ReferenceCache,
        *,
        causal: bool = False,
        self_conditioning: Any = None,
        trace: list[NDArray[np.float32]] | None = None,
    ) -> NDArray[np.float32]:
        model = self.model.model.encoder.language_model if causal else self.model.model.decoder
        states: list[NDArray[np.float32]] = []
        with ExitStack() as hooks:
            if trace is not None:
                hooks.enter_context(model.layers[0].register_forward_pre_hook(lambda _, inputs: states.append(_copy(inputs[0]))))
                for module in (*model.layers, model.norm):
                    hooks.enter_context(module.register_forward_hook(lambda _, __, output: states.append(_copy(output))))
            logits = self._head(self._encode(tokens, cache)) if causal else self._decode(tokens, cache, self_conditioning)
        if trace is not None:
            trace.extend(states)
        answer: NDArray[np.float32] = logits.numpy()
        return answer

    def _encode(self, tokens: NDArray[np.int32], cache: ReferenceCache) -> Tensor:
        check_tokens(tokens, self.config)
        hidden: Tensor = self.model.model.encoder(input_ids=_ids(tokens), past_key_values=cache.past_key_values).last_hidden_state
        cache.last = hidden[:, -1:]
        return hidden

    def _head(self, hidden: Tensor) -> Tensor:
        """`transformers` has no causal head of its own; this is what it does to a canvas."""
        cap = self.model.final_logit_softcapping
        return cap * torch.tanh(self.model.lm_head(hidden).float() / cap)

    def _decode(self, canvas: NDArray[np.int32], cache: ReferenceCache, self_conditioning: Tensor | None) -> Tensor:
        check_tokens(canvas, self.config)
        if not len(cache):
            raise BackendError("the reference has no canvas without a prompt; encode one first")
        logits: Tensor = self.model(
            decoder_input_ids=_ids(canvas),
            past_key_values=cache.past_key_values,
            self_conditioning_logits=self_conditioning,
        ).logits
        return logits


def _ids(tokens: NDArray[np.int32]) -> Tensor:
    return torch.from_numpy(tokens.astype(np.int64))


def _logprobs(logits: Tensor, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    """Log-probability [B, N] of tokens [B, N] under logits [B, N, V]."""
    logprobs: NDArray[np.float32] = logits.log_softmax(dim=-1).gather(2, _ids(tokens)[..., None])[..., 0].numpy()
    return logprobs


def _copy(state: Tensor) -> NDArray[np.float32]:
    copied: NDArray[np.float32] = state.float().numpy().copy()
    return copied

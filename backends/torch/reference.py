"""The reference backend: DiffusionGemma from Hugging Face `transformers`, on the CPU.

It implements the :class:`~mlx_diffgemma.backends.Backend` protocol and defines the correct results. It is not optimized: it
holds whole logits and the encoder's cache. The graph is that of `transformers`, and the statistics share no code with the other
backends.
"""

import copy
import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlx_diffgemma.backends import Denoised, Features, Pending, Piece, Row, check_images, check_patches, check_tokens
from mlx_diffgemma.checkpoint import Checkpoint, graph_name, is_vision
from mlx_diffgemma.config import FULL, SLIDING
from mlx_diffgemma.errors import BackendError, CheckpointError
from mlx_diffgemma.noise import gumbel
from mlx_diffgemma.vision.patches import Patches


def load(checkpoint: Checkpoint, *, dtype: str | None = None) -> "ReferenceBackend":
    """Load ``checkpoint`` in `transformers`, in ``float32`` (the default) or ``bfloat16``.

    Raises:
        BackendError: `transformers` is not installed or too old for DiffusionGemma, or the checkpoint is quantized.
        CheckpointError: the weights do not fit the configuration.
    """
    if checkpoint.quantization:
        raise BackendError(f"{checkpoint.folder} is quantized, but the reference reads only unquantized weights")
    try:
        from transformers import DiffusionGemmaForBlockDiffusion
    except ImportError:
        raise BackendError('the reference needs transformers 5.23 or newer; try: pip install "transformers>=5.23,<6"') from None
    checkpoint.fetch_weights()
    dtype = dtype or "float32"
    loaded: Any = DiffusionGemmaForBlockDiffusion.from_pretrained(
        checkpoint.folder,
        dtype=getattr(torch, dtype),
        attn_implementation="eager",  # the simplest implementations of attention and experts
        experts_implementation="eager",
        local_files_only=True,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # the error below names them
        output_loading_info=True,
    )
    model, info = loaded
    random = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
    if checkpoint.config.vision is None:  # transformers always builds a tower, and this one is never used
        random = {name for name in random if not is_vision(graph_name(name))}
    unfit = sorted(random)
    if unfit:
        raise CheckpointError(f"{checkpoint.folder}: tensors missing or of the wrong shape: {', '.join(unfit)}")
    return ReferenceBackend(model.eval().requires_grad_(False), checkpoint, dtype)


class ReferenceCache:
    """The encoder's cache, which the decoder reads."""

    def __init__(self, config: Any) -> None:
        from transformers import DynamicCache

        self.kept = DynamicCache(config=config)
        self.last: Tensor | None = None  # the final hidden state [1, H] of the last position

    def __len__(self) -> int:
        return int(self.kept.get_seq_length())

    def fork(self) -> "ReferenceCache":
        return copy.deepcopy(self)

    def buffers(self) -> dict[int, int]:
        layers: list[Any] = self.kept.layers
        arrays = [each for layer in layers for each in (layer.keys, layer.values) if each is not None]
        return {id(array): array.nbytes for array in arrays}

    @property
    def nbytes(self) -> int:
        return sum(self.buffers().values())


class ReferenceBackend:
    """Processes pieces and rows one at a time."""

    name, device, exact_rows = "reference", "cpu", True

    def __init__(self, model: Any, checkpoint: Checkpoint, dtype: str) -> None:
        self.model, self.config, self.dtype = model, checkpoint.config, dtype
        # transformers 5.24 renamed the argument, and accepts the old name until 5.40.
        self._cache_name = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
        if self.config.vision is not None:
            model.model.encoder.vision_tower.pooler.register_forward_hook(_keep_all)

    def new_cache(self) -> ReferenceCache:
        return ReferenceCache(self.model.config.get_text_config(decoder=True))

    def peak_memory(self) -> None:
        return None  # PyTorch does not count memory on a CPU

    @torch.inference_mode()
    def see(self, images: Sequence[Patches]) -> list[Features]:
        for image in images:
            check_patches(image, self.config.vision)
        return [self._see(image) for image in images]

    def _see(self, image: Patches) -> Tensor:
        pixels, places = torch.from_numpy(image.values)[None], torch.from_numpy(image.positions).long()[None]
        seen = self.model.model.encoder.get_image_features(pixels.to(self.model.dtype), places, return_dict=True)
        features: Tensor = seen.pooler_output
        return features

    @torch.inference_mode()
    def vision_states(self, image: Patches) -> tuple[Features, list[NDArray[np.float32]]]:
        check_patches(image, self.config.vision)
        tower, embedder = self.model.model.encoder.vision_tower, self.model.model.encoder.embed_vision
        states: list[NDArray[np.float32]] = []
        with ExitStack() as hooks:
            for module in (*tower.encoder.layers[:1], embedder.embedding_pre_projection_norm):
                hooks.enter_context(module.register_forward_pre_hook(lambda _, given: states.append(_copy(given[0]))))
            for layer in tower.encoder.layers:
                hooks.enter_context(layer.register_forward_hook(lambda _, __, output: states.append(_copy(output))))
            features = self._see(image)
        return features, [*states, features.float().numpy()]

    @torch.inference_mode()
    def encode(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            self._encode(piece)

    @torch.inference_mode()
    def next_logits(self, caches: Sequence[ReferenceCache]) -> NDArray[np.float32]:
        return np.concatenate([self._head(cache.last).numpy() for cache in caches if cache.last is not None])

    @torch.inference_mode()
    def score(self, pieces: Sequence[Piece]) -> list[NDArray[np.float32]]:
        scores = []
        for piece in pieces:
            before = cast(ReferenceCache, piece.cache).last
            hidden = self._encode(piece)
            before = torch.full_like(hidden[:1], torch.nan) if before is None else before
            scores.append(_logprobs(self._head(torch.cat([before, hidden[:-1]])), piece.tokens))
        return scores

    @torch.inference_mode()
    def score_canvas(self, rows: Sequence[Row]) -> list[NDArray[np.float32]]:
        return [_logprobs(self._decode(row) / row.temperature, row.canvas) for row in rows]

    def launch(self, rows: Sequence[Row]) -> Pending:
        return partial(self.denoise, rows)

    @torch.inference_mode()
    def denoise(self, rows: Sequence[Row]) -> list[Denoised]:
        return [self._denoise(row) for row in rows]

    def _denoise(self, row: Row) -> Denoised:
        scores = self._decode(row) / row.temperature  # [L, V]
        if row.frozen is not None:
            [positions] = np.nonzero(row.frozen >= 0)
            scores[positions] = -torch.inf
            scores[positions, row.frozen[positions]] = 0.0
        sampled = scores.argmax(dim=-1).numpy()
        if row.noise_key is not None:
            tokens, key = np.arange(self.config.vocab_size, dtype=np.uint32), np.asarray(row.noise_key, np.uint32)
            sampled = np.array(  # one position at a time, to bound the memory
                [
                    (each.numpy() + gumbel(key, np.asarray(position, np.uint32), tokens)).argmax()
                    for position, each in enumerate(scores)
                ]
            )
        return Denoised(
            argmax=scores.argmax(dim=-1).int().numpy(),
            sampled=sampled.astype(np.int32),
            entropy=torch.distributions.Categorical(logits=scores.double()).entropy().float().numpy(),
            self_conditioning=scores.to(self.model.lm_head.weight.dtype),
        )

    @torch.inference_mode()
    def logits(
        self, parts: Sequence[Piece | Row], trace: list[list[NDArray[np.float32]]] | None = None
    ) -> list[NDArray[np.float32]]:
        answers = []
        for part in parts:
            model = self.model.model.encoder.language_model if isinstance(part, Piece) else self.model.model.decoder
            states: list[NDArray[np.float32]] = []
            with ExitStack() as hooks:
                if trace is not None:
                    first = model.layers[0].register_forward_pre_hook(lambda _, given, kept=states: kept.append(_copy(given[0])))
                    hooks.enter_context(first)
                    for module in (*model.layers, model.norm):
                        hook = module.register_forward_hook(lambda _, __, output, kept=states: kept.append(_copy(output)))
                        hooks.enter_context(hook)
                logits = self._head(self._encode(part)) if isinstance(part, Piece) else self._decode(part)
            if trace is not None:
                trace.append(states)
            answers.append(logits.numpy())
        return answers

    def _encode(self, piece: Piece) -> Tensor:
        """Final hidden states [N, H]."""
        check_tokens(piece.tokens, self.config)
        check_images(piece)
        cache, encoder = cast(ReferenceCache, piece.cache), self.model.model.encoder
        embeddings = encoder.get_input_embeddings()(_ids(piece.tokens)[None])
        for image in piece.images:
            embeddings[0, image.start : image.start + len(image.features)] = cast(Tensor, image.features)
        masks = self._masks(piece) if piece.images else None
        encoded = encoder(inputs_embeds=embeddings, attention_mask=masks, **{self._cache_name: cache.kept})
        hidden: Tensor = encoded.last_hidden_state[0]
        cache.last = hidden[-1:]
        return hidden

    def _masks(self, piece: Piece) -> dict[str, Tensor]:
        """What is added to the scores [1, 1, N, S] of a piece with images, on each kind of layer, by ``config.image_mask``."""
        kept, count = cast(ReferenceCache, piece.cache).kept, len(piece.tokens)
        own = torch.arange(count) + len(piece.cache)
        image = torch.full((len(piece.cache) + count,), -1)
        for index, span in enumerate(piece.images):
            image[own[span.start : span.start + len(span.features)]] = index
        kinds, masks = [layer.layer_type for layer in self.config.layers], {}
        for kind in set(kinds):
            total, first = kept.get_mask_sizes(count, kinds.index(kind))
            keys = torch.arange(first, first + total)
            after = own[:, None] - keys
            within = (image[own][:, None] == image[keys]) & (image[keys] >= 0)
            near = after.abs() < (self.config.sliding_window if kind == SLIDING else len(image))
            seen = (after >= 0) & near
            if self.config.image_mask == "transformers":
                seen |= within
            elif self.config.image_mask == "makers" and kind != FULL:
                seen |= within & near
            masks[kind] = torch.where(seen, 0.0, torch.finfo(self.model.dtype).min).to(self.model.dtype)[None, None]
        return masks

    def _head(self, hidden: Tensor) -> Tensor:
        """Logits of final hidden states. `transformers` has no causal head, so this repeats what it does for a canvas."""
        cap = self.model.final_logit_softcapping
        return cap * torch.tanh(self.model.lm_head(hidden).float() / cap)

    def _decode(self, row: Row) -> Tensor:
        """Logits [L, V] of a canvas."""
        check_tokens(row.canvas, self.config)
        if not len(row.cache):
            raise BackendError("the reference cannot denoise a canvas without a prompt; encode one first")
        signal = row.self_conditioning
        logits: Tensor = self.model(
            decoder_input_ids=_ids(row.canvas)[None],
            self_conditioning_logits=None if signal is None else signal[None],
            **{self._cache_name: cast(ReferenceCache, row.cache).kept},
        ).logits
        return logits[0]


def _keep_all(pooler: Any, given: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """No soft token is padding here. `transformers` 5.24 drops all of them if each patch becomes one (pooling_kernel_size 1)."""
    pooled, mask = output
    return pooled, torch.ones_like(mask)


def _ids(tokens: NDArray[np.int32]) -> Tensor:
    return torch.from_numpy(tokens.astype(np.int64))


def _logprobs(logits: Tensor, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    """Log-probability [N] of tokens [N] under logits [N, V]."""
    logprobs: NDArray[np.float32] = logits.log_softmax(dim=-1).gather(1, _ids(tokens)[:, None])[:, 0].numpy()
    return logprobs


def _copy(state: Tensor) -> NDArray[np.float32]:
    rows = state[0] if state.ndim == 3 else state  # the vision tower drops the axis of images when it pools
    copied: NDArray[np.float32] = rows.float().numpy().copy()
    return copied

"""The reference for tests: small random checkpoints, and Hugging Face `transformers` on them, on the CPU in float32.

`transformers` defines the correct results: its graph gives the logits, and its own ``generate`` gives the tokens. Only the noise
is ours: :class:`_SeededModel` replaces each random draw with :mod:`mlx_diffgemma.noise`, so that the tokens of one seed can be
compared one by one.
"""

import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion, DynamicCache, LogitsProcessor, LogitsProcessorList
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    DiffusionGemmaGenerationConfig,
    EntropyBoundSampler,
    EntropyBoundSamplerConfig,
)

from mlx_diffgemma import noise
from mlx_diffgemma.config import FULL, SLIDING, GenerationConfig
from mlx_diffgemma.vision.patches import Patches
from support.pictures import Placed, explicit_masks, with_images


def tower(
    size: int = 16, layers: int = 1, *, heads: tuple[int, int, int] = (2, 2, 8), pooling: int = 1, patch: int = 4, **other: Any
) -> dict[str, Any]:
    """The configuration of a vision tower. ``heads`` are attention heads, key-value heads and head size."""
    return {
        "model_type": "gemma4_vision",
        "hidden_size": size,
        "intermediate_size": 2 * size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": heads[2],
        "global_head_dim": heads[2],
        "position_embedding_size": 32,
        "pooling_kernel_size": pooling,
        "patch_size": patch,
        **other,
    }


def _shape(
    layers: str, *, canvas: int, heads: tuple[int, int, int], full: tuple[int, int], experts: tuple[int, int, int], **text: Any
) -> dict[str, Any]:
    """One configuration.

    Args:
        layers: one letter per layer, S for sliding and F for full attention; `transformers` forces the last to be full.
        heads: attention heads, key-value heads and head size of the sliding layers.
        full: key-value heads and head size of the full layers.
        experts: number of experts, experts per token, and their intermediate size.
    """
    return {
        "canvas_length": canvas,
        "text_config": {
            "layer_types": [SLIDING if letter == "S" else FULL for letter in layers],
            "num_hidden_layers": len(layers),
            "num_attention_heads": heads[0],
            "num_key_value_heads": heads[1],
            "head_dim": heads[2],
            "num_global_key_value_heads": full[0],
            "global_head_dim": full[1],
            "num_experts": experts[0],
            "top_k_experts": experts[1],
            "moe_intermediate_size": experts[2],
            "max_position_embeddings": 512,
            **text,
        },
    }


def _rope(full_theta: float, full_partial: float, sliding_theta: float) -> dict[str, dict[str, Any]]:
    return {
        FULL: {"rope_type": "proportional", "partial_rotary_factor": full_partial, "rope_theta": full_theta},
        SLIDING: {"rope_type": "default", "rope_theta": sliding_theta},
    }


#: Small text configurations, each odd in its own way.
SHAPES: dict[str, dict[str, Any]] = {
    "base": _shape(
        "SSF", canvas=8, heads=(4, 2, 16), full=(1, 32), experts=(8, 2, 32),
        vocab_size=128, hidden_size=64, intermediate_size=96, sliding_window=8,
    ),
    "one_layer": _shape(
        "F", canvas=4, heads=(2, 1, 8), full=(1, 16), experts=(4, 1, 16),
        vocab_size=96, hidden_size=32, intermediate_size=48, sliding_window=4,
    ),
    "odd_sizes": _shape(
        "SFSF", canvas=7, heads=(3, 3, 10), full=(3, 18), experts=(5, 3, 9),
        vocab_size=331, hidden_size=52, intermediate_size=39, sliding_window=5,
    ),
    "window_below_canvas": _shape(
        "SSSF", canvas=24, heads=(4, 1, 8), full=(2, 16), experts=(16, 4, 8),
        vocab_size=256, hidden_size=48, intermediate_size=64, sliding_window=4,
    ),
    "wide_window": _shape(
        "SF", canvas=16, heads=(8, 4, 8), full=(4, 24), experts=(6, 4, 24),
        vocab_size=600, hidden_size=96, intermediate_size=64, sliding_window=32,
    ),
    "all_full": _shape(
        "FF", canvas=6, heads=(6, 2, 4), full=(1, 12), experts=(4, 4, 12),
        vocab_size=128, hidden_size=40, intermediate_size=40, sliding_window=16,
    ),
    "six_layers": _shape(
        "SSSFSF", canvas=12, heads=(4, 4, 12), full=(2, 8), experts=(12, 2, 16),
        vocab_size=160, hidden_size=64, intermediate_size=32, sliding_window=12,
    ),
    "other_constants": _shape(
        "FSSF", canvas=9, heads=(2, 2, 32), full=(1, 64), experts=(7, 2, 20),
        vocab_size=200, hidden_size=72, intermediate_size=56, sliding_window=6,
        rms_norm_eps=1e-3, final_logit_softcapping=7.0, rope_parameters=_rope(3000.0, 0.5, 50.0),
    ),
}  # fmt: skip


def _picture_shape(shape: Mapping[str, Any], tower: Mapping[str, Any], **text: Any) -> dict[str, Any]:
    """A shape with another vision tower. The last token of its vocabulary is the soft token of images."""
    text = {**shape["text_config"], "use_bidirectional_attention": "vision", "max_position_embeddings": 4096, **text}
    return {**shape, "text_config": text, "vision_config": tower, "image_token_id": text["vocab_size"] - 1}


#: Configurations that see images, with vision towers that differ in everything.
PICTURE_SHAPES: dict[str, dict[str, Any]] = {
    "pictures": _picture_shape(
        SHAPES["base"],
        tower(48, 2, heads=(4, 4, 12), pooling=3, patch=4, position_embedding_size=200, standardize=True),
    ),
    "large_patches": _picture_shape(
        SHAPES["odd_sizes"],
        tower(
            40, 3, heads=(4, 2, 8), pooling=3, patch=16, rms_norm_eps=1e-3,
            rope_parameters={"rope_type": "axial", "rope_theta": 9.0},
        ),
    ),
    "small_squares": _picture_shape(
        SHAPES["wide_window"],
        tower(32, 2, heads=(1, 1, 16), pooling=2, patch=6, position_embedding_size=80, standardize=True),
    ),
    "all_full_pictures": _picture_shape(
        SHAPES["all_full"], tower(24, 1, heads=(6, 3, 4), pooling=4, position_embedding_size=40)
    ),
}  # fmt: skip

#: The vocabulary size of the released checkpoint. The rest of the model is tiny.
REAL_VOCABULARY = _shape(
    "F", canvas=4, heads=(2, 1, 8), full=(1, 16), experts=(4, 1, 16),
    vocab_size=262_144, hidden_size=32, intermediate_size=48, sliding_window=4,
)  # fmt: skip


def make_checkpoint(
    folder: Path,
    shape: Mapping[str, Any],
    seed: int = 0,
    *,
    logit_std: float = 3.0,
    layer_scalars: tuple[float, float] = (0.7, 1.1),
    bfloat16: bool = False,
    hub_layout: bool = False,
) -> Path:
    """Save a model of random weights as `transformers` does, and return ``folder``. Every weight has an effect.

    Scales are chosen so that a changed token or self-conditioning signal moves logits by several units, but float32 rounding
    moves them by less than 5e-5. With a scale of 1 for self-conditioning, queries and keys, `transformers` itself differs by
    2e-4 between float32 and float64.

    Args:
        shape: one of :data:`SHAPES` or :data:`PICTURE_SHAPES`.
        logit_std: approximate standard deviation of the logits, before the softcap.
        layer_scalars: range of the encoder's and the decoder's own scalars. Low ones let later layers outweigh earlier ones.
        bfloat16: store the weights as BF16, as the hub does, instead of F32.
        hub_layout: write the sizes of the full-attention heads once in config.json, as the hub does, instead of per layer.
    """
    config = DiffusionGemmaConfig(
        text_config=dict(shape["text_config"]),
        vision_config=dict(shape.get("vision_config", tower())),
        canvas_length=shape["canvas_length"],
        image_token_id=shape.get("image_token_id", 258_880),
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = DiffusionGemmaForBlockDiffusion(config)
        decoder = model.model.decoder
        for name, weight in decoder.named_parameters():
            if name == "embed_tokens.weight":
                weight.normal_(std=logit_std * config.text_config.hidden_size**-0.5)
            elif name.endswith(("q_norm.weight", "k_norm.weight")):
                weight.uniform_(0.2, 0.7)  # attention has no other scale
            elif "norm" in name or name.endswith("scale"):
                weight.uniform_(0.4, 1.6)
            elif name.endswith("router.proj.weight"):
                weight.normal_(std=1.0)  # the router divides its input by the square root of the hidden size
            else:
                gain = 0.25 if name == "self_conditioning.down_proj.weight" else 1.0
                weight.normal_(std=gain * weight.shape[-1] ** -0.5)
        for layer in (*decoder.layers, *model.model.encoder.language_model.layers):
            layer.layer_scalar.uniform_(*layer_scalars)
        _randomize_tower(model.model.encoder, logit_std)
    model.generation_config = DiffusionGemmaGenerationConfig(
        **DiffusionGemmaGenerationConfig._get_default_generation_params(), eos_token_id=[1, 5], pad_token_id=0
    )
    model.to(torch.bfloat16 if bfloat16 else torch.float32).save_pretrained(folder)
    if hub_layout:
        file = folder / "config.json"
        saved = json.loads(file.read_text())
        del saved["text_config"]["per_layer_config"]
        for name in ("global_head_dim", "num_global_key_value_heads"):
            saved["text_config"][name] = shape["text_config"][name]
        file.write_text(json.dumps(saved))
    return folder


def _randomize_tower(encoder: torch.nn.Module, std: float) -> None:
    """Random weights for the vision tower, of scales like the text's. Soft tokens are as large as the embeddings of tokens."""
    for name, weight in encoder.state_dict().items():
        if not name.startswith(("vision_tower.", "embed_vision.")):
            continue
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            weight.uniform_(0.2, 0.7)
        elif "norm" in name or name.endswith("std_scale"):
            weight.uniform_(0.4, 1.6)
        elif name.endswith(("std_bias", "position_embedding_table")):
            weight.normal_()
        else:
            weight.normal_(std=(std if name.startswith("embed_vision") else 1.0) * weight.shape[-1] ** -0.5)


class GenerateResult(NamedTuple):
    """The result of `generate`.

    Attributes:
        tokens: int32 [B, blocks * canvas_length], without the prompt.
        steps: int32 [blocks, B], the denoising steps that each row took before it stopped; 0 in blocks after a row's end.
    """

    tokens: NDArray[np.int32]
    steps: NDArray[np.int32]


class Reference:
    """A checkpoint in `transformers`. Tokens go in as int [B, N] arrays; logits come out as float32 [B, N, V]."""

    def __init__(self, folder: Path) -> None:
        self.model = _SeededModel.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        ).eval()
        # transformers 5.24 renamed the argument, and accepts the old name until 5.40.
        parameters = inspect.signature(DiffusionGemmaForBlockDiffusion.forward).parameters
        self.cache_name = "cache" if "cache" in parameters else "past_key_values"

    def encode(self, chunks: Iterable[NDArray[Any]]) -> tuple[DynamicCache, torch.Tensor]:
        """Run the encoder over the chunks in order. Returns the cache and the last chunk's final hidden states [B, N, H]."""
        cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        for chunk in chunks:
            encoded = self.model.model.encoder(input_ids=_ids(chunk), **{self.cache_name: cache})
        return cache, encoded.last_hidden_state

    @torch.no_grad()
    def causal_logits(self, chunks: Sequence[NDArray[Any]]) -> NDArray[np.float32]:
        """Causal logits at every position of the last chunk."""
        _, hidden = self.encode(chunks)
        cap = self.model.final_logit_softcapping
        return (cap * torch.tanh(self.model.lm_head(hidden) / cap)).numpy()

    @torch.no_grad()
    def canvas_logits(
        self, chunks: Sequence[NDArray[Any]], canvas: NDArray[Any], self_conditioning_logits: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """Logits of a canvas after ``chunks``.

        ``self_conditioning_logits`` [B, L, V] are the previous step's logits, divided by its temperature.
        """
        cache, _ = self.encode(chunks)
        before = None if self_conditioning_logits is None else torch.tensor(self_conditioning_logits)
        logits: torch.Tensor = self.model(
            decoder_input_ids=_ids(canvas), self_conditioning_logits=before, **{self.cache_name: cache}
        ).logits
        return logits.numpy()

    @torch.no_grad()
    def features(self, patches: Patches) -> NDArray[np.float32]:
        """The soft tokens [n, H] of an image."""
        pixels, positions = torch.tensor(patches.values)[None], torch.tensor(patches.positions).long()[None]
        features: torch.Tensor = self.model.model.encoder.get_image_features(
            pixels.to(self.model.dtype), positions, return_dict=True
        ).pooler_output
        return features.numpy()

    @torch.no_grad()
    def picture_logits(
        self, tokens: NDArray[Any], images: Placed, image_mask: str, canvas: NDArray[Any] | None = None
    ) -> NDArray[np.float32]:
        """Logits at every position of a text [N] with images, or of a canvas [L] after it.

        ``image_mask`` is one of ``config.IMAGE_MASKS``. `transformers` makes its own, and is given the other two.
        """
        encoder, config = self.model.model.encoder, self.model.config
        cache, given = DynamicCache(config=config.get_text_config(decoder=True)), with_images(tokens[None], images)
        kinds = given.pop("mm_token_type_ids")
        if image_mask == "transformers":
            masks = encoder.create_masks_for_generate(
                config=config,
                inputs_embeds=torch.empty(1, len(tokens), 0, dtype=self.model.dtype),
                attention_mask=None,
                position_ids=torch.arange(len(tokens))[None],
                mm_token_type_ids=kinds,
                **{self.cache_name: cache},
            )
        else:
            masks = explicit_masks(len(tokens), config.text_config.sliding_window, images, both_ways=image_mask == "makers")
        given["pixel_values"] = given["pixel_values"].to(self.model.dtype)
        encoded = encoder(input_ids=_ids(tokens[None]), attention_mask=masks, **{self.cache_name: cache}, **given)
        if canvas is not None:
            logits: torch.Tensor = self.model(decoder_input_ids=_ids(canvas[None]), **{self.cache_name: cache}).logits
            return logits[0].numpy()
        cap = self.model.final_logit_softcapping
        return (cap * torch.tanh(self.model.lm_head(encoded.last_hidden_state[0]) / cap)).numpy()

    def hidden_states(self, chunks: Sequence[NDArray[Any]], canvas: NDArray[Any] | None = None) -> list[NDArray[np.float32]]:
        """Hidden states [B, N, H] of the last chunk, or of a canvas after the chunks.

        They are taken after the embedding (for a canvas, with the self-conditioning), after each layer and after the final norm.
        """
        model = self.model.model.encoder.language_model if canvas is None else self.model.model.decoder
        states: list[NDArray[np.float32]] = []
        hooks = [model.layers[0].register_forward_pre_hook(lambda _, inputs: states.append(inputs[0].numpy().copy()))]
        hooks += [
            module.register_forward_hook(lambda _, __, output: states.append(output.numpy().copy()))
            for module in (*model.layers, model.norm)
        ]
        if canvas is None:
            self.causal_logits(chunks)
        else:
            self.canvas_logits(chunks, canvas)
        for hook in hooks:
            hook.remove()
        return states[-len(hooks) :]

    def generate(
        self,
        prompts: NDArray[Any],
        seeds: Sequence[int],
        config: GenerationConfig,
        *,
        frozen: NDArray[np.int32] | None = None,
        images: Placed = (),
    ) -> GenerateResult:
        """Run ``generate`` of `transformers` with the noise of ``seeds``, one per row of ``prompts`` [B, N].

        `transformers` limits ``config``: thresholds and bounds must be above 0 and ``t_max`` above ``t_min``, and neither greedy
        mode nor a shorter canvas is possible. ``frozen`` [P] pins the positions of the new text where it is not -1. Pinned tokens
        are in every canvas, and their logits leave no choice. They count in the mean entropy of the stop, with 0. All rows have
        the same ``images``, in the same places.
        """
        self.model.seed(seeds, frozen)
        output = self.model.generate(
            _ids(prompts),
            **(with_images(prompts, images) if images else {}),
            generation_config=DiffusionGemmaGenerationConfig(
                max_new_tokens=config.max_new_tokens,
                max_denoising_steps=config.max_denoising_steps,
                sampler_config=EntropyBoundSamplerConfig(entropy_bound=config.entropy_bound),
                t_min=config.t_min,
                t_max=config.t_max,
                stability_threshold=config.stability_threshold,
                confidence_threshold=config.confidence_threshold,
                eos_token_id=list(config.eos_token_ids),
                pad_token_id=config.pad_token_id,
            ),
        )
        tokens = output.sequences[:, prompts.shape[1] :].numpy().astype(np.int32)
        steps = np.array(self.model.steps, np.int32)
        # transformers counts the steps independently; both counts must agree
        written = (tokens != config.pad_token_id).sum(axis=1)
        np.testing.assert_allclose(output.tokens_per_forward.numpy(), written / steps.sum(axis=0), rtol=1e-6)
        return GenerateResult(tokens, steps)


def _ids(tokens: NDArray[Any]) -> torch.Tensor:
    return torch.tensor(np.asarray(tokens, np.int64))


class _SeededModel(DiffusionGemmaForBlockDiffusion):
    """The model of `transformers`, with :mod:`mlx_diffgemma.noise` in place of each random draw in ``generate``.

    The methods overridden here are called by ``generate``. Each does what it did before, and also counts blocks and steps.
    """

    def seed(self, seeds: Sequence[int], frozen: NDArray[np.int32] | None) -> None:
        self.seeds, self.frozen = seeds, frozen
        self.block, self.step = -1, 0
        self.steps: list[NDArray[np.int32]] = []
        self.ended = np.zeros(len(seeds), bool)

    def pinned(self) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """The frozen positions in this block's canvas, and their tokens."""
        length = self.config.canvas_length
        template = np.empty(0, np.int32) if self.frozen is None else self.frozen[self.block * length :][:length]
        positions = np.flatnonzero(template >= 0)
        return positions, template[positions]

    def canvas_tokens(self, length: int) -> torch.Tensor:
        size = self.config.text_config.vocab_size
        canvas = np.stack([noise.canvas_tokens(seed, self.block, self.step, length, size) for seed in self.seeds])
        positions, tokens = self.pinned()
        canvas[:, positions] = tokens
        return _ids(canvas)

    def multinomial(self, probabilities: torch.Tensor, num_samples: int) -> torch.Tensor:
        """Replaces ``torch.multinomial``: for each row [B * L], the most likely token under the Gumbel noise of this step."""
        logits = self.processed_logits.numpy()
        keys = np.array([noise.sampling_key(seed, self.block, self.step) for seed in self.seeds], np.uint32)
        positions = np.arange(logits.shape[1], dtype=np.uint32)
        tokens = np.arange(logits.shape[2], dtype=np.uint32)
        drawn = (logits + noise.gumbel(keys[:, None, None], positions[:, None], tokens)).argmax(axis=-1)
        assert (probabilities.shape[0], num_samples) == (drawn.size, 1)
        return _ids(drawn.reshape(-1, 1))

    def _prepare_sampler(self, generation_config: DiffusionGemmaGenerationConfig) -> EntropyBoundSampler:
        sampler = super()._prepare_sampler(generation_config)
        sampler.initialize_canvas = lambda batch_size, device: self.canvas_tokens(sampler.canvas_length)
        return sampler

    def _prepare_logits_processor(
        self, generation_config: DiffusionGemmaGenerationConfig, logits_processor: LogitsProcessorList | None = None
    ) -> LogitsProcessorList:
        pin = LogitsProcessorList([_Pin(self)])
        processors = super()._prepare_logits_processor(generation_config, pin)
        processors.append(_Keep(self))
        return processors

    def _prepare_denoiser_inputs(self, **inputs: Any) -> tuple[Any, ...]:
        self.block, self.step = self.block + 1, 0
        self.steps.append(np.zeros(len(self.seeds), np.int32))
        return super()._prepare_denoiser_inputs(**inputs)

    def _denoising_step(self, *, finished_denoising: torch.Tensor, **inputs: Any) -> tuple[Any, ...]:
        self.step += 1
        self.steps[-1] += ~(finished_denoising.numpy() | self.ended)
        with mock.patch.object(torch, "multinomial", self.multinomial):
            return super()._denoising_step(finished_denoising=finished_denoising, **inputs)

    def _finalize_canvas(self, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, ended = super()._finalize_canvas(**inputs)
        self.ended = ended.numpy()
        return tokens, ended


class _Pin(LogitsProcessor):
    """Changes the logits of frozen positions so that only their own token is possible."""

    def __init__(self, model: _SeededModel) -> None:
        self.model = model

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, cur_step: torch.Tensor) -> torch.Tensor:
        positions, tokens = self.model.pinned()
        scores = scores.clone()
        scores[:, positions] = -1e9
        scores[:, positions, tokens] = 0.0
        return scores


class _Keep(LogitsProcessor):
    """Records the logits that the step draws from."""

    def __init__(self, model: _SeededModel) -> None:
        self.model = model

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, cur_step: torch.Tensor) -> torch.Tensor:
        self.model.processed_logits = scores
        return scores

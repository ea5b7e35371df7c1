"""Configurations: the shape of the model and the sampler's options, as read from a checkpoint's JSON files.

Two layouts of ``config.json`` exist. The hub's layout gives the size of the full-attention heads once (``global_head_dim``,
``num_global_key_value_heads``). The layout of `transformers` gives it per layer (``per_layer_config``). This module reads both.
No other module needs to know that there are two.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from mlx_diffgemma.errors import CheckpointError, InputError
from mlx_diffgemma.options import unknown_option

SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding of one kind of layer.

    ``default`` rotates the whole head. ``proportional`` rotates only the first ``partial_rotary_factor`` of the pairs. Its
    exponents still run over the full head, and the other pairs have frequency zero.
    """

    rope_type: str
    rope_theta: float
    partial_rotary_factor: float = 1.0

    def inverse_frequencies(self, head_dim: int) -> list[float]:
        """Radians per position of the head_dim / 2 split-half pairs.

        Exponent, power and reciprocal are each rounded to float32, as in `transformers`. At position 1,000, a frequency that is
        wrong by one rounding moves an angle by 1e-4 and logits by 3e-4.
        """
        rotated = int(self.partial_rotary_factor * head_dim // 2)
        exponents = np.arange(0, 2 * rotated, 2, dtype=np.float32) / np.float32(head_dim)
        powers = (self.rope_theta ** exponents.astype(np.float64)).astype(np.float32)
        frequencies: list[float] = (np.float32(1) / powers).tolist()
        return frequencies + [0.0] * (head_dim // 2 - rotated)


@dataclass(frozen=True)
class LayerConfig:
    """The part of the configuration that differs between the layers of one model."""

    layer_type: str
    head_dim: int
    num_key_value_heads: int
    rope: RopeConfig

    @property
    def is_sliding(self) -> bool:
        return self.layer_type == SLIDING


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the text model, checked on construction. Attribute names are those of the checkpoint's ``text_config``."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_attention_heads: int
    num_experts: int
    top_k_experts: int
    rms_norm_eps: float
    final_logit_softcapping: float
    sliding_window: int
    max_position_embeddings: int
    canvas_length: int
    layers: tuple[LayerConfig, ...]
    image_token_id: int | None = None

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in ("layers", "image_token_id") and not value > 0:
                raise CheckpointError(f"config.json: {field.name} must be positive, got {value}")
        if not self.layers:
            raise CheckpointError("config.json: the model has no layers")
        if self.top_k_experts > self.num_experts:
            raise CheckpointError(f"config.json: top_k_experts {self.top_k_experts} exceeds num_experts {self.num_experts}")
        for layer in self.layers:
            if layer.num_key_value_heads <= 0 or self.num_attention_heads % layer.num_key_value_heads:
                raise CheckpointError(
                    f"config.json: {self.num_attention_heads} attention heads cannot share "
                    f"{layer.num_key_value_heads} key-value heads evenly"
                )
            if layer.head_dim <= 0 or layer.head_dim % 2:
                raise CheckpointError(f"config.json: head_dim must be positive and even, got {layer.head_dim}")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read the parsed ``config.json`` of either layout. Raises CheckpointError if it is not that of a DiffusionGemma."""
        if config.get("model_type") != "diffusion_gemma":
            raise CheckpointError(
                f"config.json: model_type is {config.get('model_type')!r}, not 'diffusion_gemma': this is not a DiffusionGemma"
            )
        text = config.get("text_config")
        if not isinstance(text, Mapping):
            raise CheckpointError("config.json: text_config is missing")
        _refuse_unsupported(text)
        try:
            return cls(
                **{name: text[name] for name in _TEXT_FIELDS},
                # transformers leaves this field out if it has the default value
                final_logit_softcapping=text.get("final_logit_softcapping", 30.0),
                canvas_length=config["canvas_length"],
                layers=_layers(text),
                image_token_id=config.get("image_token_id"),
            )
        except KeyError as missing:
            raise CheckpointError(f"config.json: {missing.args[0]} is missing") from None
        except (TypeError, AttributeError, ValueError) as wrong:
            raise CheckpointError(f"config.json: a value has the wrong type ({wrong})") from None


_OTHER_FIELDS = ("canvas_length", "layers", "image_token_id", "final_logit_softcapping")
_TEXT_FIELDS = [field.name for field in dataclasses.fields(ModelConfig) if field.name not in _OTHER_FIELDS]


def _refuse_unsupported(text: Mapping[str, Any]) -> None:
    """Raise CheckpointError for options of the architecture that are not built here; no published checkpoint uses them."""
    if text.get("hidden_activation", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
        raise CheckpointError(f"config.json: hidden_activation {text['hidden_activation']!r} is not supported")
    if text.get("attention_bias"):
        raise CheckpointError("config.json: attention_bias is not supported")
    if text.get("use_bidirectional_attention") not in (None, "vision"):
        raise CheckpointError("config.json: use_bidirectional_attention 'all' is not supported")
    if text.get("tie_word_embeddings") is False:
        raise CheckpointError("config.json: an untied output head is not supported")


def _layers(text: Mapping[str, Any]) -> tuple[LayerConfig, ...]:
    ropes = {layer_type: _rope(text["rope_parameters"][layer_type]) for layer_type in set(text["layer_types"])}
    per_layer: Mapping[str, Any] = text.get("per_layer_config") or {}
    layers = []
    for index, layer_type in enumerate(text["layer_types"]):
        if layer_type not in (SLIDING, FULL):
            raise CheckpointError(f"config.json: layer type {layer_type!r} is not supported")
        overrides: Mapping[str, Any] = per_layer.get(str(index), {})
        if not per_layer and layer_type == FULL:
            overrides = {
                "head_dim": text.get("global_head_dim"),
                "num_key_value_heads": text.get("num_global_key_value_heads"),
            }
        layers.append(
            LayerConfig(
                layer_type,
                overrides.get("head_dim") or text["head_dim"],
                overrides.get("num_key_value_heads") or text["num_key_value_heads"],
                ropes[layer_type],
            )
        )
    if len(layers) != text["num_hidden_layers"]:
        raise CheckpointError(f"config.json: {len(layers)} layer_types for {text['num_hidden_layers']} layers")
    return tuple(layers)


def _rope(parameters: Mapping[str, Any]) -> RopeConfig:
    rope_type, factor = parameters["rope_type"], parameters.get("partial_rotary_factor", 1.0)
    if rope_type not in ("default", "proportional") or (rope_type == "default" and factor != 1.0):
        raise CheckpointError(f"config.json: rope_type {rope_type!r} with partial_rotary_factor {factor} is not supported")
    return RopeConfig(rope_type, parameters["rope_theta"], factor)


@dataclass(frozen=True)
class _Options:
    """Base of the options of both modes."""

    def _require_integer(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"{name} must be an integer of at least {least}, got {value!r}")

    def replace(self, **options: Any) -> Self:
        """A copy with other options; None leaves an option as it is. Raises InputError for an unknown name or a bad value."""
        for name in options:
            if name not in self.option_names():
                raise unknown_option(name, self.option_names())
        given = {name: value for name, value in options.items() if value is not None}
        return dataclasses.replace(self, **given)

    @classmethod
    def option_names(cls) -> list[str]:
        return [field.name for field in dataclasses.fields(cls)]


@dataclass(frozen=True)
class GenerationConfig(_Options):
    """How to sample in the diffusion mode; see :func:`mlx_diffgemma.sampler.block_diffusion`.

    The defaults are those of the released checkpoint.

    Attributes:
        max_new_tokens: the most tokens to write. The sampler writes whole canvases, and the last one is cut.
        max_denoising_steps: the most denoising steps per canvas.
        t_min, t_max: the temperature falls linearly from ``t_max`` (first step) towards ``t_min``.
        entropy_bound: nats. Positions are accepted in order of rising entropy, while the entropies before each one sum to at most
            this.
        stability_threshold: for a canvas to be done, its argmax must equal the argmax of each of this many steps before.
        confidence_threshold: nats. For a canvas to be done, its mean entropy must also be below this.
        eos_token_ids: any of these ends the text.
        pad_token_id: fills a canvas after the end token.
        greedy: accepted positions take the most likely token instead of a sampled one. The reference has no such option.
        canvas_length: tokens per canvas, if fewer than the model's own. Short canvases suit short texts.
    """

    max_new_tokens: int = 256
    max_denoising_steps: int = 48
    t_min: float = 0.4
    t_max: float = 0.8
    entropy_bound: float = 0.1
    stability_threshold: int = 1
    confidence_threshold: float = 0.005
    eos_token_ids: tuple[int, ...] = (1,)
    pad_token_id: int = 0
    greedy: bool = False
    canvas_length: int | None = None

    def __post_init__(self) -> None:
        self._require_integer("max_new_tokens", least=1)
        self._require_integer("max_denoising_steps", least=1)
        self._require_integer("stability_threshold", least=0)
        if self.canvas_length is not None:
            self._require_integer("canvas_length", least=1)
        for name in ("t_min", "t_max", "entropy_bound", "confidence_threshold"):
            value = getattr(self, name)
            if not _is_number(value) or not math.isfinite(value) or value < 0:
                raise InputError(f"{name} must be a finite number of at least 0, got {value!r}")
        if self.t_max < self.t_min or self.t_max == 0:
            raise InputError(f"t_max must be above 0 and not below t_min, got t_max {self.t_max} and t_min {self.t_min}")

    def temperature(self, steps_left: int) -> float:
        """The temperature with ``steps_left`` steps to go, including the current one (N, N-1, ..., 1 of N)."""
        return self.t_min + (self.t_max - self.t_min) * steps_left / self.max_denoising_steps

    @classmethod
    def from_dict(cls, generation: Mapping[str, Any]) -> Self:
        """Read the parsed ``generation_config.json``. Options that are absent or null take their defaults."""
        options = {name: generation.get(name) for name in cls.option_names()}
        sampler = generation.get("sampler_config") or {}
        options["entropy_bound"] = sampler.get("entropy_bound")
        end = generation.get("eos_token_id")
        options["eos_token_ids"] = None if end is None else tuple(end) if isinstance(end, list) else (end,)
        try:
            return cls().replace(**options)
        except InputError as wrong:
            raise CheckpointError(f"generation_config.json: {wrong}") from None


@dataclass(frozen=True)
class CausalConfig(_Options):
    """How to sample in the causal mode, one token at a time; see :func:`mlx_diffgemma.causal.causal`.

    A checkpoint has no values for ``temperature``, ``top_k`` and ``top_p``.

    Attributes:
        max_new_tokens: the most tokens to write.
        temperature: above 0. Divides the logits before ``top_k`` and ``top_p`` are applied.
        top_k: draw from the k most likely tokens; None draws from all.
        top_p: draw from the smallest set of most likely tokens (among those that ``top_k`` leaves) whose probabilities sum to at
            least this, above 0 and at most 1; None draws from all.
        greedy: take the most likely token. ``temperature``, ``top_k`` and ``top_p`` then have no effect.
        eos_token_ids: any of these ends the text.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    greedy: bool = False
    eos_token_ids: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        self._require_integer("max_new_tokens", least=1)
        if self.top_k is not None:
            self._require_integer("top_k", least=1)
        if not _is_number(self.temperature) or not 0 < self.temperature < math.inf:
            raise InputError(
                f"temperature must be a finite number above 0 (for the most likely token, use greedy), got {self.temperature!r}"
            )
        if self.top_p is not None and (not _is_number(self.top_p) or not 0 < self.top_p <= 1):
            raise InputError(f"top_p must be above 0 and at most 1, got {self.top_p!r}")

    @classmethod
    def from_generation(cls, generation: GenerationConfig) -> Self:
        """Make a configuration with the options that both modes share: ``max_new_tokens``, ``greedy`` and ``eos_token_ids``."""
        return cls(
            max_new_tokens=generation.max_new_tokens,
            greedy=generation.greedy,
            eos_token_ids=generation.eos_token_ids,
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

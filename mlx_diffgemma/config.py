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

from mlx_diffgemma import fields
from mlx_diffgemma.errors import CheckpointError, InputError
from mlx_diffgemma.options import unknown_option
from mlx_diffgemma.vision_config import VisionConfig

SLIDING, FULL = "sliding_attention", "full_attention"

#: Which soft tokens of an image see each other in both directions, in the causal pass. ``makers``: on sliding layers, within the
#: window, as the model was trained. ``transformers``: on all layers and at any distance, as in the ``generate`` of
#: `transformers`. ``causal``: none do.
IMAGE_MASKS = ("makers", "transformers", "causal")

#: The largest sizes that a configuration may name, each at least 16 times that of the released model. They are checked before
#: anything of such a size is made. Together they keep the number of a tensor's elements below 2^63.
_SIZES = {
    "vocab_size": 2**22,
    "hidden_size": 2**16,
    "intermediate_size": 2**20,
    "moe_intermediate_size": 2**20,
    "num_attention_heads": 2**12,
    "num_experts": 2**16,
    "top_k_experts": 2**16,
    "sliding_window": 2**24,
    "max_position_embeddings": 2**24,
    "canvas_length": 2**12,
}
_MAX_LAYERS, _MAX_HEAD_DIM = 2**10, 2**14
_NUMBERS = {"rms_norm_eps": (1e-12, 1.0), "final_logit_softcapping": (1e-3, 1e6)}

#: The lowest ``t_max``, and the highest temperature. Logits divided by any temperature between them stay far within float32.
COLDEST, HOTTEST = 1e-6, 1e3
#: The most tokens that can be asked for; the model's context is the limit in practice.
MAX_NEW_TOKENS = _SIZES["max_position_embeddings"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding of one kind of layer.

    ``default`` rotates the whole head. ``proportional`` rotates only the first ``partial_rotary_factor`` of the pairs. Its
    exponents still run over the full head, and the other pairs have frequency zero.
    """

    rope_type: str
    rope_theta: float
    partial_rotary_factor: float = 1.0

    def __post_init__(self) -> None:
        fields.number("config.json: rope_theta", self.rope_theta, 1.0, 1e12, CheckpointError)
        factor = fields.number("config.json: partial_rotary_factor", self.partial_rotary_factor, 0.0, 1.0, CheckpointError)
        if self.rope_type != "proportional" and (self.rope_type != "default" or factor != 1.0):
            raise CheckpointError(
                f"config.json: rope_type {fields.shown(self.rope_type)} with partial_rotary_factor {factor} is not supported"
            )

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

    def __post_init__(self) -> None:
        head_dim = fields.integer("config.json: head_dim", self.head_dim, 2, _MAX_HEAD_DIM, CheckpointError)
        if head_dim % 2:
            raise CheckpointError(f"config.json: head_dim must be even, got {head_dim}")
        heads = _SIZES["num_attention_heads"]
        fields.integer("config.json: num_key_value_heads", self.num_key_value_heads, 1, heads, CheckpointError)

    @property
    def is_sliding(self) -> bool:
        return self.layer_type == SLIDING


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the model, checked on construction. Attribute names are those of the checkpoint's ``text_config``.

    Attributes:
        image_token_id, video_token_id: the soft tokens of images and of the frames of a video. None if the checkpoint does not
            say; the tokenizer then knows them.
        image_mask: one of :data:`IMAGE_MASKS`.
        vision: the vision tower; None if the checkpoint has none.
    """

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
    video_token_id: int | None = None
    image_mask: str = "causal"
    vision: VisionConfig | None = None

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers)

    def image_reach(self, layer: LayerConfig) -> int:
        """How far the soft tokens of one image see each other in both directions: those less than this many positions apart."""
        if self.image_mask == "transformers":
            return _SIZES["max_position_embeddings"]  # longer than any image
        return self.sliding_window if self.image_mask == "makers" and layer.is_sliding else 1

    def __post_init__(self) -> None:
        for name, most in _SIZES.items():
            fields.integer(f"config.json: {name}", getattr(self, name), 1, most, CheckpointError)
        for name, (least, largest) in _NUMBERS.items():
            fields.number(f"config.json: {name}", getattr(self, name), least, largest, CheckpointError)
        for name in ("image_token_id", "video_token_id"):
            if getattr(self, name) is not None:
                fields.integer(f"config.json: {name}", getattr(self, name), 0, 2**31 - 1, CheckpointError)
        if self.image_mask not in IMAGE_MASKS:
            raise InputError(f"unknown image_mask {fields.shown(self.image_mask)}; known are {', '.join(IMAGE_MASKS)}")
        if not self.layers:
            raise CheckpointError("config.json: the model has no layers")
        if self.top_k_experts > self.num_experts:
            raise CheckpointError(f"config.json: top_k_experts {self.top_k_experts} exceeds num_experts {self.num_experts}")
        if self.canvas_length > self.max_position_embeddings:
            raise CheckpointError(
                f"config.json: canvas_length {self.canvas_length} exceeds max_position_embeddings {self.max_position_embeddings}"
            )
        for layer in self.layers:
            if self.num_attention_heads % layer.num_key_value_heads:
                raise CheckpointError(
                    f"config.json: {self.num_attention_heads} attention heads cannot share "
                    f"{layer.num_key_value_heads} key-value heads evenly"
                )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read the parsed ``config.json`` of either layout. Raises CheckpointError if it is not that of a DiffusionGemma."""
        if config.get("model_type") != "diffusion_gemma":
            raise CheckpointError(
                f"config.json: model_type is {fields.shown(config.get('model_type'))}, not 'diffusion_gemma': "
                f"this is not a DiffusionGemma"
            )
        text = _required(config, "text_config")
        fields.table("config.json: text_config", text, CheckpointError)
        _refuse_unsupported(text)
        return cls(
            **{name: _required(text, name) for name in _TEXT_FIELDS},
            # transformers leaves this field out if it has the default value
            final_logit_softcapping=text.get("final_logit_softcapping", 30.0),
            canvas_length=_required(config, "canvas_length"),
            layers=_layers(text),
            image_token_id=config.get("image_token_id"),
            video_token_id=config.get("video_token_id"),
            image_mask="makers" if text.get("use_bidirectional_attention") == "vision" else "causal",
            vision=None if config.get("vision_config") is None else VisionConfig.from_dict(config),
        )


def _required(table: Mapping[str, Any], name: str) -> Any:
    if name not in table:
        raise CheckpointError(f"config.json: {name} is missing")
    return table[name]


_OTHER_FIELDS = (
    *("canvas_length", "layers", "final_logit_softcapping"),
    *("image_token_id", "video_token_id", "image_mask", "vision"),
)
_TEXT_FIELDS = [field.name for field in dataclasses.fields(ModelConfig) if field.name not in _OTHER_FIELDS]


def _refuse_unsupported(text: Mapping[str, Any]) -> None:
    """Raise CheckpointError for options of the architecture that are not built here; no published checkpoint uses them."""
    for name, supported in (
        ("hidden_activation", ("gelu_pytorch_tanh",)),
        ("attention_bias", (False, None)),
        ("use_bidirectional_attention", ("vision", None)),
        ("tie_word_embeddings", (True, None)),
    ):
        value = text.get(name, supported[0])
        if not any(value is known or (isinstance(value, str) and value == known) for known in supported):
            raise CheckpointError(f"config.json: {name} {fields.shown(value)} is not supported")


def _layers(text: Mapping[str, Any]) -> tuple[LayerConfig, ...]:
    count = fields.integer(
        "config.json: num_hidden_layers", _required(text, "num_hidden_layers"), 1, _MAX_LAYERS, CheckpointError
    )
    types = _required(text, "layer_types")
    if not isinstance(types, list | tuple):
        raise CheckpointError(f"config.json: layer_types must be a list, got {fields.shown(types)}")
    if len(types) != count:
        raise CheckpointError(f"config.json: {len(types)} layer_types for {count} layers")
    for layer_type in types:
        if layer_type not in (SLIDING, FULL):
            raise CheckpointError(f"config.json: layer type {fields.shown(layer_type)} is not supported")
    ropes = _table(text, "rope_parameters")
    rope_of = {layer_type: _rope(_table(ropes, layer_type)) for layer_type in set(types)}
    per_layer = {} if text.get("per_layer_config") is None else _table(text, "per_layer_config")
    layers = []
    for index, layer_type in enumerate(types):
        own: Mapping[str, Any] = {}
        if per_layer:
            own = fields.table(f"config.json: per_layer_config[{index}]", per_layer.get(str(index), {}), CheckpointError)
        elif layer_type == FULL:
            own = {"head_dim": text.get("global_head_dim"), "num_key_value_heads": text.get("num_global_key_value_heads")}
        sizes: list[Any] = [
            text.get(name) if own.get(name) is None else own[name] for name in ("head_dim", "num_key_value_heads")
        ]
        layers.append(LayerConfig(layer_type, sizes[0], sizes[1], rope_of[layer_type]))
    return tuple(layers)


def _table(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return fields.table(f"config.json: {name}", _required(content, name), CheckpointError)


def _rope(parameters: Mapping[str, Any]) -> RopeConfig:
    return RopeConfig(
        _required(parameters, "rope_type"), _required(parameters, "rope_theta"), parameters.get("partial_rotary_factor", 1.0)
    )


@dataclass(frozen=True)
class _Options:
    """Base of the options of both modes."""

    def _require_integer(self, name: str, least: int, most: int) -> None:
        fields.integer(name, getattr(self, name), least, most, InputError)

    def _require_ends(self) -> None:
        fields.token_ids("eos_token_ids", getattr(self, "eos_token_ids"), _SIZES["vocab_size"], InputError)  # noqa: B009

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
        self._require_integer("max_new_tokens", 1, MAX_NEW_TOKENS)
        self._require_integer("max_denoising_steps", 1, 1024)
        self._require_integer("stability_threshold", 0, 1024)
        self._require_integer("pad_token_id", 0, _SIZES["vocab_size"] - 1)
        if self.canvas_length is not None:
            self._require_integer("canvas_length", 1, _SIZES["canvas_length"])
        for name, most in (("t_min", HOTTEST), ("t_max", HOTTEST), ("entropy_bound", 1e6), ("confidence_threshold", 1e6)):
            fields.number(name, getattr(self, name), 0.0, most, InputError)
        if self.t_max < self.t_min or self.t_max < COLDEST:
            raise InputError(
                f"t_max must be at least {COLDEST} and not below t_min, got t_max {self.t_max} and t_min {self.t_min}"
            )
        fields.flag("greedy", self.greedy, InputError)
        self._require_ends()

    def temperature(self, steps_left: int) -> float:
        """The temperature with ``steps_left`` steps to go, including the current one (N, N-1, ..., 1 of N)."""
        return self.t_min + (self.t_max - self.t_min) * steps_left / self.max_denoising_steps

    @classmethod
    def from_dict(cls, generation: Mapping[str, Any], vocab_size: int = _SIZES["vocab_size"]) -> Self:
        """Read the parsed ``generation_config.json``. Options that are absent or null take their defaults.

        Raises CheckpointError for a value that is wrong, or a token id that is not below ``vocab_size``.
        """
        where = "generation_config.json: "
        options = {name: generation.get(name) for name in cls.option_names()}
        sampler = generation.get("sampler_config")
        if sampler is not None:
            options["entropy_bound"] = fields.table(f"{where}sampler_config", sampler, CheckpointError).get("entropy_bound")
        end = generation.get("eos_token_id")
        if end is not None:
            ends = end if isinstance(end, list) else [end]
            end = fields.token_ids(f"{where}eos_token_id", ends, vocab_size, CheckpointError)
        options["eos_token_ids"] = end
        if options["pad_token_id"] is not None:
            fields.integer(f"{where}pad_token_id", options["pad_token_id"], 0, vocab_size - 1, CheckpointError)
        try:
            return cls().replace(**options)
        except InputError as wrong:
            raise CheckpointError(f"{where}{wrong}") from None


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
        self._require_integer("max_new_tokens", 1, MAX_NEW_TOKENS)
        if self.top_k is not None:
            self._require_integer("top_k", 1, _SIZES["vocab_size"])
        if not fields.is_number(self.temperature) or not 0 < self.temperature < math.inf:
            raise InputError(
                f"temperature must be a finite number above 0 (for the most likely token, use greedy), "
                f"got {fields.shown(self.temperature)}"
            )
        if self.top_p is not None and (not fields.is_number(self.top_p) or not 0 < self.top_p <= 1):
            raise InputError(f"top_p must be above 0 and at most 1, got {fields.shown(self.top_p)}")
        fields.flag("greedy", self.greedy, InputError)
        self._require_ends()

    @classmethod
    def from_generation(cls, generation: GenerationConfig) -> Self:
        """Make a configuration with the options that both modes share: ``max_new_tokens``, ``greedy`` and ``eos_token_ids``."""
        return cls(
            max_new_tokens=generation.max_new_tokens,
            greedy=generation.greedy,
            eos_token_ids=generation.eos_token_ids,
        )

"""The configuration of the vision tower, as read from ``vision_config`` in a checkpoint's ``config.json``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from mlx_diffgemma import fields
from mlx_diffgemma.errors import CheckpointError

#: The largest sizes that a configuration may name, each at least 16 times that of the released model.
_SIZES = {
    "hidden_size": 2**16,
    "intermediate_size": 2**20,
    "num_hidden_layers": 2**10,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "head_dim": 2**14,
    "patch_size": 2**8,
    "pooling_kernel_size": 2**4,
    "position_embedding_size": 2**20,
}

#: The most soft tokens that an image can take: the budgets of the released model's image processor.
BUDGETS = (70, 140, 280, 560, 1120)


@dataclass(frozen=True)
class VisionConfig:
    """The shape of the vision tower, checked on construction. Attribute names are those of the checkpoint.

    Attributes:
        patch_size: pixels along one side of a patch.
        pooling_kernel_size: patches along one side of the square that becomes one soft token.
        position_embedding_size: the most patches along one side of an image.
        rope_theta: the base of the two-dimensional RoPE.
        standardize: whether the pooled features are shifted and scaled by ``std_bias`` and ``std_scale``.
        soft_tokens: the most soft tokens of an image, unless the caller says otherwise; one of :data:`BUDGETS`.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    patch_size: int
    pooling_kernel_size: int
    position_embedding_size: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 100.0
    standardize: bool = False
    soft_tokens: int = 280

    def __post_init__(self) -> None:
        where = "config.json: vision_config."
        for name, most in _SIZES.items():
            fields.integer(where + name, getattr(self, name), 1, most, CheckpointError)
        fields.number(f"{where}rms_norm_eps", self.rms_norm_eps, 1e-12, 1.0, CheckpointError)
        fields.number(f"{where}rope_theta", self.rope_theta, 1.0, 1e12, CheckpointError)
        fields.flag(f"{where}standardize", self.standardize, CheckpointError)
        if self.head_dim % 4:
            raise CheckpointError(f"{where}head_dim must be a multiple of 4, got {self.head_dim}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(
                f"{where}num_attention_heads {self.num_attention_heads} cannot share "
                f"{self.num_key_value_heads} key-value heads evenly"
            )
        if self.soft_tokens not in BUDGETS:
            raise CheckpointError(
                f"config.json: vision_soft_tokens_per_image must be one of {', '.join(map(str, BUDGETS))}, "
                f"got {fields.shown(self.soft_tokens)}"
            )

    @property
    def side(self) -> int:
        """Pixels along one side of a soft token's square. The sides of a resized image are multiples of it."""
        return self.patch_size * self.pooling_kernel_size

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read the parsed ``config.json``. Raises CheckpointError if its ``vision_config`` is wrong or not supported."""
        where = "config.json: vision_config"
        vision = fields.table(where, config["vision_config"], CheckpointError)
        if vision.get("model_type") != "gemma4_vision":
            raise CheckpointError(f"{where}: model_type {fields.shown(vision.get('model_type'))} is not supported")
        for name, supported in (
            ("hidden_activation", ("gelu_pytorch_tanh", None)),
            ("attention_bias", (False, None)),
            ("use_clipped_linears", (False, None)),
        ):
            value = vision.get(name)
            if not any(value is known or (isinstance(value, str) and value == known) for known in supported):
                raise CheckpointError(f"{where}: {name} {fields.shown(value)} is not supported")
        rope = fields.table(f"{where}.rope_parameters", vision.get("rope_parameters") or {}, CheckpointError)
        # "axial" is the newer name in `transformers`. Both mean two-dimensional RoPE here.
        if rope.get("rope_type", "axial") not in ("default", "axial"):
            raise CheckpointError(f"{where}: rope_type {fields.shown(rope['rope_type'])} is not supported")
        values: dict[str, Any] = {}
        for name in _SIZES:
            if name not in vision:
                raise CheckpointError(f"{where}.{name} is missing")
            values[name] = vision[name]
        optional = {name: vision[name] for name in ("rms_norm_eps", "standardize") if vision.get(name) is not None}
        if rope.get("rope_theta") is not None:
            optional["rope_theta"] = rope["rope_theta"]
        if config.get("vision_soft_tokens_per_image") is not None:
            optional["soft_tokens"] = config["vision_soft_tokens_per_image"]
        return cls(**values, **optional)

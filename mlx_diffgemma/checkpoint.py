"""Checkpoints: the files of a folder or hub id, the tensors in them, and which modules are quantized and how.

This module reads no weights. It reads the headers with `safetensors`, which also refuses truncated files. The backends then read
each tensor from the file that :class:`Tensor` names.

**Names.** The models use the checkpoint's own attribute names, with few exceptions, all in :func:`graph_name`: the prefix
``model.decoder.`` is removed, the encoder's only text tensors become ``layers.N.encoder_layer_scalar``, and the experts' stacked
weights, which have no ``.weight`` at their end on the hub, get one (as in MLX's quantized checkpoints).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Self

from mlx_diffgemma.config import GenerationConfig, ModelConfig
from mlx_diffgemma.errors import CheckpointError
from mlx_diffgemma.files import fetch, first_line, read_json

_VISION = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")
_LAYER = re.compile(r"layers\.\d+\.")
_ENCODER_SCALAR = re.compile(r"model\.encoder\.language_model\.(layers\.\d+)\.layer_scalar")
_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


@dataclass(frozen=True)
class Tensor:
    """One stored tensor: its file, name and shape. ``dtype`` is the safetensors name, such as BF16."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * _BYTES.get(self.dtype, 1)


#: The part of the model that each module with weights belongs to, by the module's path in the model without ``layers.N.``.
PART_OF = {
    "experts.gate_up_proj": "experts",
    "experts.down_proj": "experts",
    "embed_tokens": "embedding",
    "self_attn.q_proj": "attention",
    "self_attn.k_proj": "attention",
    "self_attn.v_proj": "attention",
    "self_attn.o_proj": "attention",
    "mlp.gate_proj": "mlp",
    "mlp.up_proj": "mlp",
    "mlp.down_proj": "mlp",
    "router.proj": "router",
    "self_conditioning.gate_proj": "self_conditioning",
    "self_conditioning.up_proj": "self_conditioning",
    "self_conditioning.down_proj": "self_conditioning",
}
PARTS = (*dict.fromkeys(PART_OF.values()), "vision")
#: The name for tensors that belong to no part and are never quantized.
NORMS = "norms and scales"

#: The group sizes and bits that each mode of ``mx.quantize`` supports.
FORMATS = {
    "affine": ((32, 64, 128), (2, 3, 4, 5, 6, 8)),
    "mxfp4": ((32,), (4,)),
    "mxfp8": ((32,), (8,)),
    "nvfp4": ((16,), (4,)),
}


@dataclass(frozen=True)
class Quantization:
    """How one module's weight is packed, with the parameters of ``mx.quantize``. Must be one of :data:`FORMATS`.

    ``mode`` is affine (w = scale * q + bias, with a scale and a bias per group), or mxfp4, mxfp8 or nvfp4 (a scale per group and
    no bias).
    """

    group_size: int
    bits: int
    mode: str = "affine"

    def __post_init__(self) -> None:
        groups, bits = FORMATS.get(self.mode, ((), ()))
        if self.group_size not in groups or self.bits not in bits:
            raise CheckpointError(f"{self.mode} with {self.bits} bits in groups of {self.group_size} is not a known format")

    def __str__(self) -> str:
        return f"{self.mode} {self.bits}-bit, groups of {self.group_size}" if self.mode == "affine" else self.mode


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Attributes:
        folder: the folder of its files.
        config, generation: the content of its JSON files.
        tensors: the text model's tensors, by their names in the model.
        vision: the tensors of the vision tower, by their stored names. Their weights are never read.
        quantization: the quantized modules, by their paths in the model.
    """

    folder: Path
    config: ModelConfig
    generation: GenerationConfig
    tensors: Mapping[str, Tensor]
    vision: Mapping[str, Tensor]
    quantization: Mapping[str, Quantization]

    @classmethod
    def open(cls, source: str | Path, revision: str | None = None) -> Self:
        """Open a folder or a hub id such as ``google/diffusiongemma-26B-A4B-it``. Downloads what is not in the hub's cache.

        Raises CheckpointError if files are missing or incomplete, or if the model is not a DiffusionGemma.
        """
        folder = fetch(source, revision)
        raw = read_json(folder / "config.json")
        config = ModelConfig.from_dict(raw)
        has_generation = (folder / "generation_config.json").exists()
        generation = read_json(folder / "generation_config.json") if has_generation else raw.get("generation_config") or {}
        stored = _read_headers(_weight_files(folder))
        text = {graph_name(name): tensor for name, tensor in stored.items() if not name.startswith(_VISION)}
        return cls(
            folder=folder,
            config=config,
            generation=GenerationConfig.from_dict(generation),
            tensors=text,
            vision={name: tensor for name, tensor in stored.items() if name.startswith(_VISION)},
            quantization=quantized_modules(raw, text),
        )

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Raise CheckpointError if tensors are missing, unexpected or not of the shape in ``expected``; it names all of them."""
        missing = sorted(expected.keys() - self.tensors.keys())
        unexpected = sorted(self.tensors[name].name for name in self.tensors.keys() - expected.keys())
        misshaped = sorted(
            f"{self.tensors[name].name} is {list(self.tensors[name].shape)}, not {list(expected[name])}"
            for name in expected.keys() & self.tensors.keys()
            if self.tensors[name].shape != expected[name]
        )
        problems = [
            f"{what} {', '.join(names)}"
            for what, names in (("missing:", missing), ("unexpected:", unexpected), ("of the wrong shape:", misshaped))
            if names
        ]
        if problems:
            raise CheckpointError(f"{self.folder}: the weights do not fit config.json; tensors {'; '.join(problems)}")


def graph_name(stored: str) -> str:
    """The name in the model of a stored text tensor. The module docstring lists the renames."""
    if scalar := _ENCODER_SCALAR.fullmatch(stored):
        return f"{scalar[1]}.encoder_layer_scalar"
    name = stored.removeprefix("model.decoder.")
    return f"{name}.weight" if name.endswith((".experts.gate_up_proj", ".experts.down_proj")) else name


def part_of(name: str) -> str:
    """The part of the text model that a tensor belongs to, by its name in the model: one of :data:`PARTS`, or :data:`NORMS`."""
    return PART_OF.get(_LAYER.sub("", name.rpartition(".")[0]), NORMS)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index}: weight_map is missing")
        files = sorted({folder / Path(name).name for name in weight_map.values()})
        absent = [file.name for file in files if not file.exists()]
        if absent:
            raise CheckpointError(f"{folder}: missing shards: {', '.join(absent)}; fetch them again")
        return files
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: neither model.safetensors nor an index of shards is there; is this a model folder?")
    return files


def _read_headers(files: Iterable[Path]) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="numpy") as shard:
                for name in shard.keys():  # noqa: SIM118 (safe_open is no mapping)
                    part = shard.get_slice(name)
                    if name in tensors:
                        raise CheckpointError(f"{file}: tensor {name} is also in {tensors[name].file.name}")
                    tensors[name] = Tensor(file, name, tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError) as broken:
            raise CheckpointError(f"{file}: truncated or not safetensors ({first_line(broken)}); fetch it again") from None
    return tensors


def quantized_modules(raw: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Quantization]:
    """How each quantized module among ``tensors`` is packed, by module path. ``raw`` is the parsed ``config.json``.

    A module is quantized if and only if its ``.scales`` exist. Its format is its own entry in the table, or else the global one.
    """
    table = raw.get("quantization") or raw.get("quantization_config") or {}
    if "quant_method" in table:
        raise CheckpointError(
            f"config.json: quantized by {table['quant_method']}, which is not supported; convert the BF16 checkpoint instead"
        )
    quantized = {}
    for name, scales in tensors.items():
        if not name.endswith(".scales"):
            continue
        override = table.get(scales.name.removesuffix(".scales"))
        # An override without a mode is affine, even if the global mode is another one.
        entry = {"mode": "affine", **override} if isinstance(override, dict) else table
        try:
            quantized[name.removesuffix(".scales")] = Quantization(
                entry["group_size"], entry["bits"], entry.get("mode", "affine")
            )
        except KeyError as missing:
            raise CheckpointError(f"config.json: {scales.name} exists, but quantization has no {missing.args[0]}") from None
    return quantized

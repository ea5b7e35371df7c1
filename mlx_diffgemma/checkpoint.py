"""Checkpoints: the files of a folder or hub id, the tensors in them, and which modules are quantized and how.

Opening a checkpoint reads no weights, and downloads none: only the headers of their files (weights.py). The backends call
:meth:`Checkpoint.fetch_weights`, and then read each tensor from the file that :class:`Tensor` names.

**Names.** The models use the checkpoint's own attribute names, with few exceptions, all in :func:`graph_name`: the prefix
``model.decoder.`` is removed, and ``model.encoder.`` from the vision tower's; the encoder's own text tensors become
``layers.N.encoder_layer_scalar``; and the experts' stacked weights, which have no ``.weight`` at their end on the hub, get one
(as in MLX's quantized checkpoints). The output head and the encoder's other text tensors are tied: if they are stored, they are
copies of the decoder's, and must be equal to them.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

from mlx_diffgemma import fields
from mlx_diffgemma.config import GenerationConfig, ModelConfig
from mlx_diffgemma.errors import CheckpointError
from mlx_diffgemma.files import read_json
from mlx_diffgemma.hub import SIDE_FILES, Snapshot, local_folder
from mlx_diffgemma.weights import Header, Tensor, indexed_files, read_header, same_bytes, tensors_of, weight_files

_VISION = ("vision_tower.", "embed_vision.")
_LAYER = re.compile(r"layers\.\d+\.")
_ENCODER_SCALAR = re.compile(r"model\.encoder\.language_model\.(layers\.\d+)\.layer_scalar")
#: Stored names of copies, and the names of what they are copies of. `transformers` ties these weights, and may store both.
_TIED = {"model.encoder.language_model.": "", "lm_head.": "embed_tokens."}

#: The largest magnitude of a weight. Larger ones are damage: their products overflow in float32.
LARGEST = 1e9
#: The largest scale of the modes with E8M0 scales, which are powers of two: 2^29.
E8M0_LARGEST = 127 + 29

#: What the numbers of a tensor are: floats, or codes. ``words`` are packed codes, ``e4m3 words`` are packed float8 codes, and
#: ``e8m0`` and ``e4m3`` are scales in one byte. Each with the safetensors dtypes in which they may be stored.
Numbers = Literal["float", "words", "e4m3 words", "e8m0", "e4m3"]
STORED: Mapping[Numbers, tuple[str, ...]] = {
    "float": ("F32", "BF16", "F16"),
    "words": ("U32",),
    "e4m3 words": ("U32",),
    "e8m0": ("U8",),
    "e4m3": ("U8",),
}


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
        groups, bits = FORMATS.get(self.mode, ((), ())) if isinstance(self.mode, str) else ((), ())
        whole = type(self.group_size) is int and type(self.bits) is int  # 4.0 == 4, but no shape can be 4.0
        if not whole or self.group_size not in groups or self.bits not in bits:
            mode = self.mode if isinstance(self.mode, str) else fields.shown(self.mode)
            raise CheckpointError(
                f"{mode} with {fields.shown(self.bits)} bits in groups of {fields.shown(self.group_size)} is not a known format"
            )

    def __str__(self) -> str:
        return f"{self.mode} {self.bits}-bit, groups of {self.group_size}" if self.mode == "affine" else self.mode


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Attributes:
        folder: the folder of its files.
        config, generation: the content of its JSON files.
        tensors: the text model's tensors, by their names in the model.
        vision: the vision tower's tensors, by their names in the model. Without them, ``config.vision`` is None.
        quantization: the quantized modules of both, by their paths in the model.
        twins: further copies of tied tensors, by the names in the model of the tensors that they copy.
        snapshot: where the files come from, if they come from the hub. The weights may not be downloaded yet.
    """

    folder: Path
    config: ModelConfig
    generation: GenerationConfig
    tensors: Mapping[str, Tensor]
    vision: Mapping[str, Tensor]
    quantization: Mapping[str, Quantization]
    twins: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    snapshot: Snapshot | None = None

    @classmethod
    def open(cls, source: str | Path, revision: str | None = None) -> Self:
        """Open a folder or a hub id such as ``google/diffusiongemma-26B-A4B-it``.

        From the hub, it downloads ``config.json``, then the other small files, then the headers of the weights, and no weights:
        :meth:`fetch_weights` does that.

        Raises CheckpointError if files are missing or incomplete, or if the model is not a DiffusionGemma.
        """
        folder, snapshot = local_folder(source), None
        if folder is None:
            snapshot = Snapshot.open(str(source), revision)
            folder = snapshot.folder
        raw = read_json(folder / "config.json")
        config = ModelConfig.from_dict(raw)
        if snapshot is not None:
            snapshot.fetch(SIDE_FILES)
        has_generation = os.path.lexists(folder / "generation_config.json")
        generation = read_json(folder / "generation_config.json") if has_generation else raw.get("generation_config", {})
        fields.table("config.json: generation_config", generation, CheckpointError)
        tensors, twins = _without_twins(tensors_of(_headers(folder, snapshot)))
        vision = {name: tensor for name, tensor in tensors.items() if is_vision(name)}
        if not vision:
            config = replace(config, vision=None)
        return cls(
            folder=folder,
            config=config,
            generation=GenerationConfig.from_dict(generation, config.vocab_size),
            tensors={name: tensor for name, tensor in tensors.items() if not is_vision(name)},
            vision=vision,
            quantization=quantized_modules(raw, tensors),
            twins=twins,
            snapshot=snapshot,
        )

    def with_image_mask(self, image_mask: str | None) -> Self:
        """The checkpoint with another ``config.image_mask``; unchanged if it is None. Raises InputError for an unknown one."""
        return self if image_mask is None else replace(self, config=replace(self.config, image_mask=image_mask))

    @property
    def name(self) -> str:
        """The hub id or the folder, for messages."""
        return self.snapshot.repository if self.snapshot else str(self.folder)

    @property
    def stored(self) -> Mapping[str, Tensor]:
        """All tensors to load, the text model's and the vision tower's, by their names in the model."""
        return {**self.tensors, **self.vision}

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Raise CheckpointError if tensors are missing, unexpected, or not of the right shape and type; it names all of them.

        ``expected`` has the shape of each tensor of the model, vision tower included. No weights are read.
        """
        stored = self.stored
        known = sorted(expected.keys() & stored.keys())
        copies = [(stored[name], twin) for name in known for twin in self.twins.get(name, ())]
        problems = {
            "missing:": expected.keys() - stored.keys(),
            "unexpected:": {stored[name].name for name in stored.keys() - expected.keys()},
            "of the wrong shape:": {
                f"{stored[name].name} is {list(stored[name].shape)}, not {list(expected[name])}"
                for name in known
                if stored[name].shape != expected[name]
            },
            "of the wrong type:": {
                f"{stored[name].name} is {stored[name].dtype}, not {' or '.join(STORED[self.numbers(name)])}"
                for name in known
                if stored[name].dtype not in STORED[self.numbers(name)]
            },
            "tied but different:": {
                f"{twin.name} is {twin.dtype} {list(twin.shape)}, {one.name} is {one.dtype} {list(one.shape)}"
                for one, twin in copies
                if (twin.dtype, twin.shape) != (one.dtype, one.shape)
            },
        }
        named = [f"{what} {_listed(sorted(names))}" for what, names in problems.items() if names]
        if named:
            raise CheckpointError(f"{self.folder}: the weights do not fit config.json; tensors {'; '.join(named)}")

    def fetch_weights(self) -> None:
        """Download weights that are not in the hub's cache, and compare copies of tied tensors. Call this before reading weights.

        Raises CheckpointError if the disk is full, the download fails, or a copy differs.
        """
        stored = self.stored
        tensors = [*stored.values(), *(twin for twins in self.twins.values() for twin in twins)]
        absent = sorted({tensor.file for tensor in tensors if not tensor.file.exists()})
        if self.snapshot is not None and absent:
            self.snapshot.fetch_weights([file.name for file in absent])
            found = tensors_of({file: read_header(file) for file in absent})
            if found != {tensor.name: tensor for tensor in tensors if tensor.file in absent}:
                raise CheckpointError(f"{self.folder}: the weights changed on the hub during the download; run again")
        for name, twins in self.twins.items():
            for twin in twins:
                if not same_bytes(stored[name], twin):
                    raise CheckpointError(
                        f"{self.folder}: {twin.name} and {stored[name].name} are tied, but their values differ; "
                        f"fetch the weights again, or remove one of the two"
                    )

    def numbers(self, name: str) -> Numbers:
        """What the numbers of the tensor ``name`` of the model are."""
        module, _, part = name.rpartition(".")
        packed = self.quantization.get(module)
        if packed is None or (part != "weight" and packed.mode == "affine"):
            return "float"
        if part == "weight":
            return "e4m3 words" if packed.mode == "mxfp8" else "words"
        return "e4m3" if packed.mode == "nvfp4" else "e8m0"

    @property
    def nbytes(self) -> int:
        """Stored bytes of all tensors to load."""
        return sum(tensor.nbytes for tensor in self.stored.values())

    def refuse_numbers(self, name: str, count: int) -> None:
        """Raise CheckpointError if ``count`` values of a tensor of the model are unusable, as a backend found on loading it."""
        if count:
            tensor = self.stored[name]
            raise CheckpointError(
                f"{tensor.file}: {count:,} values of {tensor.name} are NaN, infinite or beyond {LARGEST:.0e}; the weights are "
                f"damaged, fetch them again"
            )


def _listed(names: Sequence[str], most: int = 100) -> str:
    return ", ".join([*names[:most], *([f"and {len(names) - most} more"] if len(names) > most else [])])


def _headers(folder: Path, snapshot: Snapshot | None) -> dict[Path, Header]:
    """The headers of all weight files. Those that are not in the hub's cache are read on the hub."""
    if snapshot is not None:
        names = indexed_files(folder) or [file.name for file in folder.glob("model*.safetensors")]
        names = names or sorted(snapshot.missing(["model*.safetensors"]))
        if names:
            files = [folder / name for name in names]
            return {file: read_header(file) if file.exists() else snapshot.header(file.name) for file in files}
    return {file: read_header(file) for file in weight_files(folder)}


def _without_twins(stored: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
    """The tensors by their names in the model, and the other copies of those that are stored more than once."""
    groups: dict[str, list[Tensor]] = {}
    for name, tensor in stored.items():
        groups.setdefault(graph_name(name), []).append(tensor)
    for group in groups.values():  # the original first, whatever the order in the file
        group.sort(key=lambda tensor: (tensor.name.startswith(tuple(_TIED)), tensor.name))
    return {name: group[0] for name, group in groups.items()}, {name: group[1:] for name, group in groups.items() if group[1:]}


def graph_name(stored: str) -> str:
    """The name in the model of a stored tensor. The module docstring lists the renames."""
    if is_vision(name := stored.removeprefix("model.encoder.")):
        return name
    if scalar := _ENCODER_SCALAR.fullmatch(stored):
        return f"{scalar[1]}.encoder_layer_scalar"
    for copy, original in _TIED.items():
        if stored.startswith(copy):
            stored = original + stored.removeprefix(copy)
    name = stored.removeprefix("model.decoder.")
    return f"{name}.weight" if name.endswith((".experts.gate_up_proj", ".experts.down_proj")) else name


def is_vision(name: str) -> bool:
    """Whether a name in the model is in the vision tower, which includes the projection of what it sees."""
    return name.startswith(_VISION)


def part_of(name: str) -> str:
    """The part of the model that a tensor belongs to, by its name in the model: one of :data:`PARTS`, or :data:`NORMS`.

    The whole vision tower, with its norms, is one part.
    """
    return "vision" if is_vision(name) else PART_OF.get(_LAYER.sub("", name.rpartition(".")[0]), NORMS)


def quantized_modules(raw: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Quantization]:
    """How each quantized module among ``tensors`` is packed, by module path. ``raw`` is the parsed ``config.json``.

    A module is quantized if and only if its ``.scales`` exist. Its format is its own entry in the table, or else the global one.
    """
    table = raw.get("quantization") or raw.get("quantization_config") or {}
    fields.table("config.json: quantization", table, CheckpointError)
    if "quant_method" in table:
        raise CheckpointError(
            f"config.json: quantized by {table['quant_method']}, which is not supported; convert the BF16 checkpoint instead"
        )
    quantized = {}
    for name, scales in tensors.items():
        if not name.endswith(".scales"):
            continue
        override = table.get(scales.name.removesuffix(".scales"))
        if override not in (None, True) and not isinstance(override, Mapping):
            raise CheckpointError(
                f"config.json: {scales.name} exists, but quantization has {fields.shown(override)} for its module"
            )
        # An override without a mode is affine, even if the global mode is another one.
        entry = {"mode": "affine", **override} if isinstance(override, Mapping) else table
        try:
            quantized[name.removesuffix(".scales")] = Quantization(
                entry["group_size"], entry["bits"], entry.get("mode", "affine")
            )
        except KeyError as missing:
            raise CheckpointError(f"config.json: {scales.name} exists, but quantization has no {missing.args[0]}") from None
    return quantized

"""Chooses the format of each tensor: parts, recipes, and the plan of a conversion. Reads no weights.

A checkpoint has these **parts**: the experts (nine tenths of all weights), the embedding (also the output head), the attention,
dense MLP, router and self-conditioning projections, and the vision tower. A :data:`Recipe` gives each part one format. Norms,
scales and the layers' scalars belong to no part and are always BF16.

The plan's output has the layout of MLX's converted checkpoints on the hub. Stored names are kept. A quantized module has
``.weight`` (uint32 words), ``.scales`` and, if affine, ``.biases``. ``config.json`` says how each module is packed.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Self

from mlx_diffgemma.checkpoint import FORMATS, NORMS, PART_OF, PARTS, Checkpoint, Quantization, graph_name, part_of
from mlx_diffgemma.errors import CheckpointError, InputError
from mlx_diffgemma.weights import Tensor

#: A part's format: packed by ``mx.quantize``, or None for BF16.
Format = Quantization | None
#: Part -> format, for every part of :data:`PARTS`.
Recipe = Mapping[str, Format]

AFFINE_GROUPS, AFFINE_BITS = FORMATS["affine"]
#: Formats with a fixed group size and number of bits.
NAMED_FORMATS = {
    "mxfp4": Quantization(32, 4, "mxfp4"),
    "mxfp8": Quantization(32, 8, "mxfp8"),
    "nvfp4": Quantization(16, 4, "nvfp4"),
}

_ITEMSIZE = {"U32": 4, "BF16": 2, "U8": 1}
_SOURCE_DTYPES = ("BF16", "F16", "F32")


def _recipe(experts: Format, others: Format) -> Recipe:
    return {part: others for part in PARTS} | {"experts": experts, "vision": None}


_EIGHT = Quantization(64, 8)
#: The experts make up the size. The other parts are more sensitive to errors, so they have 8 bits (16 in ``bf16``).
RECIPES: Mapping[str, Recipe] = {
    "4bit": _recipe(Quantization(64, 4), _EIGHT),
    "6bit": _recipe(Quantization(64, 6), _EIGHT),
    "8bit": _recipe(_EIGHT, _EIGHT),
    "mxfp4": _recipe(NAMED_FORMATS["mxfp4"], _EIGHT),
    "nvfp4": _recipe(NAMED_FORMATS["nvfp4"], _EIGHT),
    "bf16": _recipe(None, None),
}


def parse_format(text: str) -> Format:
    """Parse a format: ``BITS[:GROUP]`` (affine, by default in groups of 64), mxfp4, mxfp8, nvfp4 or bf16."""
    if text == "bf16":
        return None
    if text in NAMED_FORMATS:
        return NAMED_FORMATS[text]
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    if match is None:
        raise InputError(f"unknown format {text!r}; known are BITS[:GROUP], {', '.join(NAMED_FORMATS)} and bf16")
    bits, group_size = int(match[1]), int(match[2] or 64)
    if bits not in AFFINE_BITS:
        raise InputError(f"format {text!r}: {bits} bits are not possible; use {', '.join(map(str, AFFINE_BITS))}")
    if group_size not in AFFINE_GROUPS:
        raise InputError(f"format {text!r}: groups of {group_size} are not possible; use {', '.join(map(str, AFFINE_GROUPS))}")
    return Quantization(group_size, bits)


def make_recipe(name: str = "4bit", settings: Iterable[str] = ()) -> Recipe:
    """The recipe ``name`` of :data:`RECIPES`, changed by ``settings`` such as ``experts=4:32`` or ``embedding=bf16``.

    Raises InputError for an unknown recipe or part, and for an impossible format.
    """
    if name not in RECIPES:
        raise InputError(f"unknown recipe {name!r}; known are {', '.join(RECIPES)}")
    recipe = dict(RECIPES[name])
    for setting in settings:
        part, equals, text = setting.partition("=")
        if not equals:
            raise InputError(f"{setting!r} is not of the form PART=FORMAT, such as experts=4:32")
        if part not in PARTS:
            raise InputError(f"unknown part {part!r}; known are {', '.join(PARTS)}")
        recipe[part] = parse_format(text)
    if recipe["vision"] is not None:
        raise InputError(
            "the vision tower stays in BF16, because no group of 32 or more divides its rows of 4,304 weights; "
            "use vision=bf16 or leave it out"
        )
    return recipe


@dataclass(frozen=True)
class Output:
    """One tensor to write; ``dtype`` is its name in safetensors."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def itemsize(self) -> int:
        return _ITEMSIZE[self.dtype]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.itemsize


@dataclass(frozen=True)
class Entry:
    """One source tensor and its outputs: the tensor in BF16, or its words, scales and (if affine) biases, in this order."""

    part: str
    source: Tensor
    format: Format
    outputs: tuple[Output, ...]

    @property
    def nbytes(self) -> int:
        return sum(output.nbytes for output in self.outputs)


@dataclass(frozen=True)
class Shard:
    """One file to write."""

    name: str
    entries: tuple[Entry, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors, without the header."""
        return sum(entry.nbytes for entry in self.entries)


@dataclass(frozen=True)
class Row:
    """One part in the plan's table: ``weights`` counts the numbers in the source, ``nbytes`` the bytes to write."""

    part: str
    format: str
    tensors: int
    weights: int
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.weights


@dataclass(frozen=True)
class Plan:
    """Everything that a conversion writes, known before any weight is read."""

    recipe: Recipe
    shards: tuple[Shard, ...]

    @classmethod
    def make(cls, checkpoint: Checkpoint, recipe: Recipe, shard_bytes: int = 5_000_000_000) -> Self:
        """Plan the conversion of an unquantized checkpoint into shards of at most ``shard_bytes``.

        A module's tensors stay in one shard. A module larger than ``shard_bytes`` gets its own shard.

        Raises:
            CheckpointError: the source is already quantized, or weights are missing.
            InputError: the groups of a format do not divide a tensor's last axis.
        """
        _check_source(checkpoint)
        entries = [_entry(part_of(name), tensor, recipe) for name, tensor in checkpoint.stored.items()]
        return cls(recipe, tuple(_shards(entries, shard_bytes)))

    @property
    def entries(self) -> list[Entry]:
        return [entry for shard in self.shards for entry in shard.entries]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors to write."""
        return sum(shard.nbytes for shard in self.shards)

    def rows(self) -> list[Row]:
        """One row per part in the order of :data:`PARTS`, then the norms, then the total."""
        by_part = {part: [entry for entry in self.entries if entry.part == part] for part in (*PARTS, NORMS)}
        rows = [_row(part, str(self.recipe.get(part) or "BF16"), entries) for part, entries in by_part.items() if entries]
        return [*rows, _row("total", "", self.entries)]

    def quantization(self) -> dict[str, Any] | None:
        """The ``quantization`` of ``config.json``: a global format, and by stored module path the formats that differ from it.

        The global format is the experts' or, if they are BF16, that of the first quantized part. An entry without ``mode`` is
        affine, whatever the global mode. None if nothing is quantized.
        """
        base = next(filter(None, (self.recipe[part] for part in PARTS)), None)
        if base is None:
            return None
        table: dict[str, Any] = {"group_size": base.group_size, "bits": base.bits, "mode": base.mode}
        for entry in self.entries:
            if entry.format is not None and entry.format != base:
                override: dict[str, Any] = {"group_size": entry.format.group_size, "bits": entry.format.bits}
                if entry.format.mode != "affine":
                    override["mode"] = entry.format.mode
                table[_module(entry.source.name)] = override
        return table


def _check_source(checkpoint: Checkpoint) -> None:
    for tensor in checkpoint.stored.values():
        if tensor.dtype == "U32" or tensor.name.endswith(".scales"):
            raise CheckpointError(
                f"{checkpoint.folder}: already quantized ({tensor.name} is {tensor.dtype}); convert the BF16 checkpoint instead"
            )
        if tensor.dtype not in _SOURCE_DTYPES:
            raise CheckpointError(
                f"{checkpoint.folder}: {tensor.name} is {tensor.dtype}, but convert reads only BF16, F16 and F32; "
                "convert the BF16 checkpoint instead"
            )
        if not prod(tensor.shape) or (not tensor.shape and part_of(graph_name(tensor.name)) in PARTS):
            raise CheckpointError(
                f"{checkpoint.folder}: {tensor.name} has the shape {list(tensor.shape)}, so it holds no matrix; fetch it again"
            )
    per_layer = [module for module, part in PART_OF.items() if part not in ("embedding", "self_conditioning")]
    expected = [f"{module}.weight" for module in PART_OF if module not in per_layer]
    for index, layer in enumerate(checkpoint.config.layers):
        # Full-attention layers have no v_proj: they use the keys as values.
        modules = [module for module in per_layer if layer.is_sliding or module != "self_attn.v_proj"]
        expected += [f"layers.{index}.{module}.weight" for module in modules]
    if missing := [name for name in expected if name not in checkpoint.tensors]:
        raise CheckpointError(f"{checkpoint.folder}: incomplete; missing: {', '.join(missing)}; fetch it again")


def _module(stored: str) -> str:
    """The stored path of a tensor's module. The hub's expert tensors have no ``.weight`` suffix."""
    return stored.removesuffix(".weight")


def _entry(part: str, tensor: Tensor, recipe: Recipe) -> Entry:
    form = recipe.get(part)
    if form is None:
        return Entry(part, tensor, None, (Output(tensor.name, tensor.shape, "BF16"),))
    *outer, width = tensor.shape
    if width % form.group_size:
        raise InputError(
            f"{tensor.name}: groups of {form.group_size} do not divide its rows of {width}; set another format for {part}"
        )
    module = _module(tensor.name)
    outputs = [Output(f"{module}.weight", (*outer, width * form.bits // 32), "U32")]
    groups = (*outer, width // form.group_size)
    if form.mode == "affine":
        outputs += [Output(f"{module}.scales", groups, "BF16"), Output(f"{module}.biases", groups, "BF16")]
    else:
        outputs += [Output(f"{module}.scales", groups, "U8")]
    return Entry(part, tensor, form, tuple(outputs))


def _shards(entries: Iterable[Entry], limit: int) -> list[Shard]:
    groups: list[list[Entry]] = []
    room = 0
    for entry in entries:
        if not groups or entry.nbytes > room:
            groups.append([])
            room = limit
        groups[-1].append(entry)
        room -= entry.nbytes
    if len(groups) == 1:
        return [Shard("model.safetensors", tuple(groups[0]))]
    return [Shard(f"model-{index:05}-of-{len(groups):05}.safetensors", tuple(group)) for index, group in enumerate(groups, 1)]


def _row(part: str, form: str, entries: list[Entry]) -> Row:
    weights = sum(prod(entry.source.shape) for entry in entries)
    return Row(part, form, len(entries), weights, sum(entry.nbytes for entry in entries))

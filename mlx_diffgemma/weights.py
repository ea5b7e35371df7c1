"""Weight files: which files of a folder hold the weights, what their headers say, and whether two tensors have the same bytes.

No tensor framework is needed. `safetensors` reads the headers. It refuses truncated files and tensors that overlap.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

from mlx_diffgemma.errors import CheckpointError
from mlx_diffgemma.fields import shown
from mlx_diffgemma.files import first_line, read_json

INDEX = "model.safetensors.index.json"

#: Bytes of the common types of numbers, by their names in safetensors.
ITEMSIZE = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL"), 1),
}

# Bytes that are compared at a time.
_PIECE = 8 << 20


@dataclass(frozen=True)
class Tensor:
    """One stored tensor: its file, name and shape. ``dtype`` is the safetensors name, such as BF16."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEMSIZE.get(self.dtype, 1)


#: The header of a file: dtype and shape of each tensor, by name.
Header = Mapping[str, tuple[str, tuple[int, ...]]]


def indexed_files(folder: Path) -> list[str] | None:
    """The names of the weight files in the index of shards, sorted; None if the folder has no index.

    Raises CheckpointError if the index is damaged, or if a name in it is not that of a safetensors file in the same folder.
    """
    index = folder / INDEX
    if not os.path.lexists(index):
        return None
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is missing or not a table of file names; fetch it again")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name.endswith(".safetensors") or any(mark in name for mark in "/\\\0"):
            raise CheckpointError(
                f"{index}: weight_map has {shown(name)} for {tensor[:80]}, which is not the name of a safetensors file in "
                f"this folder; fetch it again"
            )
    return sorted(set(weight_map.values()))


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder: those in its index, or else ``model*.safetensors``.

    Raises CheckpointError if there are none, or if one is missing or not a regular file.
    """
    names = indexed_files(folder)
    files = sorted(folder.glob("model*.safetensors")) if names is None else [folder / name for name in names]
    if not files:
        raise CheckpointError(f"{folder}: neither model.safetensors nor an index of shards is there; is this a model folder?")
    absent = [file.name for file in files if not os.path.lexists(file)]
    if absent:
        raise CheckpointError(f"{folder}: missing shards: {', '.join(absent)}; fetch them again")
    return files


def read_header(file: Path) -> Header:
    """The header of a weight file. Raises CheckpointError if it is damaged, or if the file is shorter or longer than it says."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():  # opening a pipe would wait for its writer
        raise CheckpointError(f"{file}: not a regular file, or a broken link; fetch it again")
    try:
        with safe_open(file, framework="numpy") as shard:
            parts = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118 (safe_open is no mapping)
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
    except (SafetensorError, OSError, ValueError) as broken:
        raise CheckpointError(f"{file}: truncated or not safetensors ({first_line(broken)}); fetch it again") from None


def tensors_of(headers: Mapping[Path, Header]) -> dict[str, Tensor]:
    """All tensors of some files, by name. Raises CheckpointError if a name is in two files."""
    tensors: dict[str, Tensor] = {}
    for file, header in headers.items():
        for name, (dtype, shape) in header.items():
            if name in tensors:
                raise CheckpointError(f"{file}: tensor {name} is also in {tensors[name].file.name}; remove one of the files")
            tensors[name] = Tensor(file, name, shape, dtype)
    return tensors


@contextmanager
def reading(tensor: Tensor) -> Iterator[None]:
    """Turn any error of a framework that reads ``tensor`` into a CheckpointError."""
    try:
        yield
    except Exception as failed:  # MLX raises RuntimeError, and safetensors an error of its own
        raise CheckpointError(f"{tensor.file}: {tensor.name} cannot be read: {first_line(failed)}") from failed


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Whether two stored tensors are equal, byte for byte. Holds two pieces of them in memory."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(left == right for left, right in zip(_pieces(one), _pieces(other), strict=True))


def _pieces(tensor: Tensor) -> Iterator[bytes]:
    start, end = _places(tensor.file)[tensor.name]
    with tensor.file.open("rb") as file:
        file.seek(start)
        for place in range(start, end, _PIECE):
            piece = file.read(min(_PIECE, end - place))
            if len(piece) < min(_PIECE, end - place):
                raise CheckpointError(f"{tensor.file}: ends within {tensor.name}; fetch it again")
            yield piece


def _places(file: Path) -> dict[str, tuple[int, int]]:
    """Where each tensor of a file begins and ends. The header was checked when the checkpoint was opened."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    return {
        name: (8 + size + entry["data_offsets"][0], 8 + size + entry["data_offsets"][1])
        for name, entry in header.items()
        if name != "__metadata__"
    }

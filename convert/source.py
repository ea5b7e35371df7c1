"""Reads the source: its tensors, in pieces that are checked, and the facts by which a change of its files is noticed."""

import hashlib
import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mlx_diffgemma.checkpoint import LARGEST
from mlx_diffgemma.convert.quantize import mlx_version
from mlx_diffgemma.convert.recipe import Plan
from mlx_diffgemma.errors import CheckpointError
from mlx_diffgemma.weights import Tensor

#: Files copied from the source unchanged. config.json and README.md are written new.
CARRIED_OVER = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "processor*",
    "preprocessor*",
    "video_preprocessor*",
)

#: For each number type its words, and the largest one that holds a magnitude of at most LARGEST. NaN and infinity are larger.
_LARGEST = int(np.float32(LARGEST).view(np.uint32))
_WORDS = {"BF16": ("<u2", _LARGEST >> 16), "F16": ("<u2", 0x7BFF), "F32": ("<u4", _LARGEST)}


def carried_over(folder: Path) -> list[Path]:
    """The files of a checkpoint's folder that are copied."""
    return sorted({file for pattern in CARRIED_OVER for file in folder.glob(pattern) if file.is_file()})


def fingerprint(plan: Plan) -> str:
    """A hash of everything that decides the output: the source's files, the formats, and mlx's version.

    Each file counts with its name, size and modification time, and a file of weights also with its header.
    """
    weights = {entry.source.file for entry in plan.entries}
    folders = {file.parent for file in weights}
    others = {file for folder in folders for file in (folder / "config.json", *carried_over(folder)) if file.exists()}
    facts = {
        "mlx": mlx_version(),
        "files": sorted((file.name, *_state(file)) for file in weights | others),
        "headers": sorted((file.name, _header_hash(file)) for file in weights),
        "shards": [
            (shard.name, [(entry.source.file.name, entry.source.name, str(entry.format)) for entry in shard.entries])
            for shard in plan.shards
        ],
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def check_unchanged(plan: Plan, before: str) -> None:
    """Raise CheckpointError unless the plan's fingerprint is still ``before``."""
    if fingerprint(plan) != before:
        raise CheckpointError(
            f"{plan.entries[0].source.file.parent}: the source changed while it was converted, so nothing was written to the "
            "target; wait until it is complete, and run again with --restart"
        )


def read_rows(tensor: Tensor, piece_bytes: int) -> Iterator[NDArray[Any]]:
    """Yield a stored tensor as raw words [R, last axis] (uint16 or uint32), in pieces of about ``piece_bytes``.

    The file is read, not mapped, so resident memory holds only one piece.

    Raises CheckpointError if the file ends too early or is not what it was when the checkpoint was opened, and if the tensor
    holds values that no weight has.
    """
    word, largest = _WORDS[tensor.dtype]
    words = np.dtype(word)
    width = tensor.shape[-1] if tensor.shape else 1
    rows, at_once = prod(tensor.shape) // width, max(1, piece_bytes // (width * words.itemsize))
    with open(tensor.file, "rb") as file:
        file.seek(_begin(file, tensor))
        for first in range(0, rows, at_once):
            count = min(at_once, rows - first) * width
            piece = np.fromfile(file, words, count)
            if piece.size != count:
                raise CheckpointError(f"{tensor.file}: ends within {tensor.name}; fetch it again")
            if (piece & words.type(np.iinfo(words).max >> 1)).max() > largest:  # without the sign
                raise CheckpointError(
                    f"{tensor.file}: {tensor.name} holds values that are NaN, infinite or beyond {LARGEST:.0e}; the weights are "
                    "damaged, fetch them again"
                )
            yield piece.reshape(-1, width)


def _begin(file: BinaryIO, tensor: Tensor) -> int:
    """The place of a tensor's first byte in its file."""
    size = _header_bytes(file)
    try:
        entry = json.loads(file.read(size))[tensor.name]
        begin, end = entry["data_offsets"]
        known = entry["dtype"], tuple(entry["shape"]), end - begin
        if known != (tensor.dtype, tensor.shape, tensor.nbytes) or begin < 0:
            raise ValueError("another tensor has this name now")
    except (ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError(f"{tensor.file}: changed while it was read; run again when it is complete") from None
    return 8 + size + int(begin)


def _header_bytes(file: BinaryIO) -> int:
    """The length of a safetensors header, as its file says at its start, but at most what the library accepts."""
    return min(int.from_bytes(file.read(8), "little"), 100_000_000)


def _header_hash(weights: Path) -> str:
    with open(weights, "rb") as file:
        return hashlib.sha256(file.read(_header_bytes(file))).hexdigest()


def _state(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns

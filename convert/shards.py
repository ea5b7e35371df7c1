"""Streams the weights from the source to the target with bounded memory. An interrupted run can continue.

A conversion works in ``TARGET.partial``, which lies beside the target and therefore on the same file system::

    TARGET.partial/plan       fingerprint of the source and the settings
    TARGET.partial/model/     renamed to TARGET when everything is written

A shard gets its final name when all of it is on the disk. A later run with the same fingerprint keeps these shards and writes the
others. Nothing depends on where the earlier run stopped, so the result has the same bytes.

This module writes safetensors files itself, because the library's writer needs all tensors in memory. The plan knows every name,
dtype and shape, so the header is written first and each piece goes to its place. The layout equals the library's, byte for byte.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.filesize import decimal

from mlx_diffgemma.checkpoint import Tensor
from mlx_diffgemma.convert.quantize import PIECE_BYTES, mlx_version, pack
from mlx_diffgemma.convert.recipe import Output, Plan, Shard
from mlx_diffgemma.errors import CheckpointError, InputError


@dataclass(frozen=True)
class Progress:
    """Progress of a conversion: finished shards, and bytes of tensors written, including those of an earlier run."""

    shards_done: int
    shards: int
    bytes_done: int
    nbytes: int


Report = Callable[[Progress], None]


def read_rows(tensor: Tensor, piece_bytes: int) -> Iterator[NDArray[Any]]:
    """Yield a stored tensor as raw words [R, last axis] (uint16 or uint32), in pieces of about ``piece_bytes``.

    The file is read, not mapped, so resident memory holds only one piece.
    """
    words = np.dtype("<u4" if tensor.dtype == "F32" else "<u2")
    width = tensor.shape[-1] if tensor.shape else 1
    rows, at_once = prod(tensor.shape) // width, max(1, piece_bytes // (width * words.itemsize))
    with open(tensor.file, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        begin, _ = json.loads(file.read(header_bytes))[tensor.name]["data_offsets"]
        file.seek(8 + header_bytes + begin)
        for first in range(0, rows, at_once):
            count = min(at_once, rows - first) * width
            piece = np.fromfile(file, words, count)
            if piece.size != count:
                raise CheckpointError(f"{tensor.file}: ends within {tensor.name}; fetch it again")
            yield piece.reshape(-1, width)


def write(
    plan: Plan,
    target: Path,
    files: Mapping[str, bytes],
    *,
    restart: bool = False,
    report: Report = lambda progress: None,
) -> None:
    """Carry out a plan: write the shards, their index and the other ``files`` (name -> content) as the folder ``target``.

    Args:
        target: a path that does not exist, or an empty folder.
        restart: discard the work of an unfinished run instead of continuing it.
        report: called with the progress after each piece.

    Raises:
        InputError: the target exists, or an unfinished run has another source or other settings.
        CheckpointError: the disk is full or fails. Finished shards are kept for the next run.
        BackendError: mlx cannot be imported.
    """
    target = Path(os.path.abspath(target.expanduser()))
    if os.path.lexists(target) and (target.is_symlink() or not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} already exists; choose another target, or remove it")
    partial, identity = target.with_name(f"{target.name}.partial"), fingerprint(plan)
    with _disk_errors(partial):
        partial.mkdir(parents=True, exist_ok=True)
        with _lock(partial):
            model = _claim(partial, identity, restart)
            finished = [shard for shard in plan.shards if (model / shard.name).exists()]
            done = sum(shard.nbytes for shard in finished)
            needed, free = plan.nbytes - done + sum(map(len, files.values())), shutil.disk_usage(partial).free
            if needed > free:
                raise CheckpointError(
                    f"{target}: needs {decimal(needed)} of disk, but only {decimal(free)} are free; free some space"
                )
            report(Progress(len(finished), len(plan.shards), done, plan.nbytes))
            for number, shard in enumerate((shard for shard in plan.shards if shard not in finished), len(finished)):
                for nbytes in _write_shard(shard, model):
                    done += nbytes
                    report(Progress(number, len(plan.shards), done, plan.nbytes))
                report(Progress(number + 1, len(plan.shards), done, plan.nbytes))
            for name, content in {"model.safetensors.index.json": _index(plan), **files}.items():
                with _durable(model / name) as file:
                    file.write(content)
            _sync(model)
            model.rename(target)
            _sync(target.parent)
            shutil.rmtree(partial)


def fingerprint(plan: Plan) -> str:
    """A hash of everything that decides the output: source files (name, size, modification time), formats, mlx's version."""
    sources = {entry.source.file for entry in plan.entries}
    facts = {
        "mlx": mlx_version(),
        "files": sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sources),
        "shards": [
            (shard.name, [(entry.source.file.name, entry.source.name, str(entry.format)) for entry in shard.entries])
            for shard in plan.shards
        ],
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _claim(partial: Path, fingerprint: str, restart: bool) -> Path:
    """The folder to write into. It holds the finished shards of an earlier run of the same plan, and nothing else."""
    plan, model = partial / "plan", partial / "model"
    if not plan.exists() and {entry.name for entry in partial.iterdir()} - {"plan.unfinished"}:
        raise InputError(f"{partial} is needed for the conversion, but holds other files; move it away")
    if restart:
        shutil.rmtree(model, ignore_errors=True)
        plan.unlink(missing_ok=True)
    if model.exists():
        if plan.read_text() != fingerprint:
            raise InputError(
                f"{partial} holds an unfinished conversion of another source or with other settings; "
                "finish that one, or discard it with --restart"
            )
        for file in model.iterdir():
            if file.suffix != ".safetensors":
                file.unlink()
        return model
    with _durable(plan) as file:
        file.write(fingerprint.encode())
    model.mkdir()
    _sync(partial)
    return model


def _write_shard(shard: Shard, folder: Path) -> Iterator[int]:
    """Write one shard. Yields the size of each piece in bytes."""
    header, places = _header([output for entry in shard.entries for output in entry.outputs])
    with _durable(folder / shard.name) as file:
        file.write(header)
        for entry in shard.entries:
            place = [places[output.name] for output in entry.outputs]
            for rows in read_rows(entry.source, PIECE_BYTES):
                pieces = pack(rows, entry.source.dtype, entry.format)
                for output, piece in enumerate(pieces):
                    file.seek(place[output])
                    file.write(piece.data)
                    place[output] += piece.nbytes
                yield sum(piece.nbytes for piece in pieces)


def _header(outputs: list[Output]) -> tuple[bytes, dict[str, int]]:
    """A safetensors header, and the offset of each tensor in the file.

    Tensors are sorted by decreasing item size, so that each is aligned to its dtype in a mapped file, then by name.
    """
    table: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    places, end = {}, 0
    for output in sorted(outputs, key=lambda output: (-output.itemsize, output.name)):
        places[output.name], end = end, end + output.nbytes
        table[output.name] = {
            "dtype": output.dtype,
            "shape": output.shape,
            "data_offsets": (places[output.name], end),
        }
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + place for name, place in places.items()}


def _index(plan: Plan) -> bytes:
    """``model.safetensors.index.json``: the shard of every tensor."""
    weight_map = {output.name: shard.name for shard in plan.shards for entry in shard.entries for output in entry.outputs}
    index = {"metadata": {"total_size": plan.nbytes}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()


@contextmanager
def _durable(path: Path) -> Iterator[Any]:
    """A new file that gets its name when its whole content is on the disk."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    with open(unfinished, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def _sync(folder: Path) -> None:
    """Write a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _lock(partial: Path) -> Iterator[None]:
    """Keep a second conversion out of the folder. A killed run leaves no lock."""
    import fcntl  # imported here because Windows has no fcntl, but can import this module

    descriptor = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{partial}: another conversion to this target is running; wait until it ends") from None
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _disk_errors(partial: Path) -> Iterator[None]:
    try:
        yield
    except OSError as failed:
        if failed.errno in (errno.ENOSPC, errno.EDQUOT):
            problem = "the disk is full; free some space"
        else:
            problem = f"{failed.filename or partial}: {failed.strerror}; fix this"
        raise CheckpointError(f"{problem} and run again: finished shards are kept in {partial}") from failed

"""Streams the weights from the source to the target with bounded memory. An interrupted run can continue.

Nothing depends on where an earlier run stopped, so the result has the same bytes. The module :mod:`mlx_diffgemma.convert.work`
says where the unfinished work lies, and what a later run keeps of it.

This module writes safetensors files itself, because the library's writer needs all tensors in memory. The plan knows every name,
dtype and shape, so the header is written first and each piece goes to its place. The layout equals the library's, byte for byte.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

from rich.filesize import decimal

from mlx_diffgemma.convert.quantize import PIECE_BYTES, pack
from mlx_diffgemma.convert.recipe import Plan, Shard
from mlx_diffgemma.convert.source import check_unchanged, fingerprint, read_rows
from mlx_diffgemma.convert.work import Record, absolute, check_target, claim, disk_errors, durable, locked, partial_of, sync
from mlx_diffgemma.errors import CheckpointError


@dataclass(frozen=True)
class Progress:
    """Progress of a conversion: finished shards, and bytes of tensors written, including those of an earlier run."""

    shards_done: int
    shards: int
    bytes_done: int
    nbytes: int


Report = Callable[[Progress], None]


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
        InputError: the target exists or overlaps the source, or an unfinished run has another source or other settings.
        CheckpointError: the source holds NaN or infinity, or changed meanwhile; or the disk is full or fails. Finished
            shards are kept for the next run.
        BackendError: mlx cannot be imported.
    """
    target = absolute(target)
    check_target(target, plan)
    partial = partial_of(target)
    with disk_errors(partial):
        before = fingerprint(plan)
        with locked(partial):
            check_target(target, plan)  # another conversion may have finished meanwhile
            model, record = claim(partial, before, restart)
            finished = [shard for shard in plan.shards if _is_kept(model / shard.name, Layout.of(shard), record)]
            done = sum(shard.nbytes for shard in finished)
            needed, free = plan.nbytes - done + sum(map(len, files.values())), shutil.disk_usage(partial).free
            if needed > free:
                raise CheckpointError(
                    f"{target}: needs {decimal(needed)} of disk, but only {decimal(free)} are free; free some space"
                )
            report(Progress(len(finished), len(plan.shards), done, plan.nbytes))
            for number, shard in enumerate((shard for shard in plan.shards if shard not in finished), len(finished)):
                with durable(model / shard.name) as file:
                    writer = _Writer(Layout.of(shard), file)
                    for nbytes in writer.write(shard):
                        done += nbytes
                        report(Progress(number, len(plan.shards), done, plan.nbytes))
                    check_unchanged(plan, before)
                    record.add(shard.name, writer.layout.size, writer.digest())
                report(Progress(number + 1, len(plan.shards), done, plan.nbytes))
            for name, content in {"model.safetensors.index.json": _index(plan), **files}.items():
                with durable(model / name) as file:
                    file.write(content)
            sync(model)
            check_unchanged(plan, before)
            model.rename(target)
            sync(target.parent)
            shutil.rmtree(partial, ignore_errors=True)  # the target is complete


@dataclass(frozen=True)
class Layout:
    """The file of a shard: its safetensors header, and after it the bytes of each tensor in this order."""

    header: bytes
    sizes: Mapping[str, int]

    @classmethod
    def of(cls, shard: Shard) -> Self:
        """The layout of a shard.

        Tensors are sorted by decreasing item size, so that each is aligned to its dtype in a mapped file, then by name.
        """
        table: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
        sizes, end = {}, 0
        outputs = [output for entry in shard.entries for output in entry.outputs]
        for output in sorted(outputs, key=lambda output: (-output.itemsize, output.name)):
            start, end = end, end + output.nbytes
            table[output.name] = {"dtype": output.dtype, "shape": output.shape, "data_offsets": (start, end)}
            sizes[output.name] = output.nbytes
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return cls(len(text).to_bytes(8, "little") + text, sizes)

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(self.sizes.values())

    def digest(self, hashes: Mapping[str, bytes]) -> str:
        """The digest of a file whose tensors have these hashes. It can be computed while the tensors are written side by side."""
        return sha256(self.header + b"".join(hashes[name] for name in self.sizes)).hexdigest()


class _Writer:
    """Writes a shard's tensors piece by piece to their places in the file, and hashes each."""

    def __init__(self, layout: Layout, file: Any) -> None:
        self.layout, self.file = layout, file
        self.hashes = {name: sha256() for name in layout.sizes}
        self.places, place = {}, len(layout.header)
        for name, nbytes in layout.sizes.items():
            self.places[name] = place
            place += nbytes
        file.write(layout.header)

    def write(self, shard: Shard) -> Iterator[int]:
        """Write the shard. Yields the size of each piece in bytes."""
        for entry in shard.entries:
            for rows in read_rows(entry.source, PIECE_BYTES):
                pieces = pack(rows, entry.source.dtype, entry.format)
                for output, piece in zip(entry.outputs, pieces, strict=True):
                    self._append(output.name, piece.data)
                yield sum(piece.nbytes for piece in pieces)

    def _append(self, name: str, data: memoryview) -> None:
        self.file.seek(self.places[name])
        self.file.write(data)
        self.hashes[name].update(data)
        self.places[name] += data.nbytes

    def digest(self) -> str:
        """The digest of the shard as it was written."""
        return self.layout.digest({name: each.digest() for name, each in self.hashes.items()})


def _is_kept(file: Path, layout: Layout, record: Record) -> bool:
    """Whether a shard is finished and unchanged since it was written. A damaged file is removed."""
    if not file.exists():
        return False
    kept = file.stat().st_size == layout.size and record.shards.get(file.name) == (layout.size, _digest_of(file, layout))
    if not kept:
        file.unlink()
    return kept


def _digest_of(file: Path, layout: Layout) -> str | None:
    """The digest of a file, or None if it has another header."""
    hashes = {}
    with open(file, "rb") as content:
        if content.read(len(layout.header)) != layout.header:
            return None
        for name, nbytes in layout.sizes.items():
            hashed = sha256()
            for start in range(0, nbytes, PIECE_BYTES):
                hashed.update(content.read(min(PIECE_BYTES, nbytes - start)))
            hashes[name] = hashed.digest()
    return layout.digest(hashes)


def _index(plan: Plan) -> bytes:
    """``model.safetensors.index.json``: the shard of every tensor."""
    weight_map = {output.name: shard.name for shard in plan.shards for entry in shard.entries for output in entry.outputs}
    index = {"metadata": {"total_size": plan.nbytes}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()

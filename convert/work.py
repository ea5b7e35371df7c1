"""The folder of an unfinished conversion: who may use it, what is finished in it, and files that appear whole or not at all.

A conversion works in ``TARGET.partial``, which lies beside the target and therefore on the same file system::

    TARGET.partial/record.json   the fingerprint of source and settings; the size and digest of each finished shard
    TARGET.partial/model/        renamed to TARGET when everything is written

A shard is recorded when all of it is on the disk, and then gets its final name. A later run with the same fingerprint reads the
recorded shards again, keeps those that have their size and digest, and writes the others.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_diffgemma.convert.recipe import Plan
from mlx_diffgemma.errors import CheckpointError, InputError

RECORD = "record.json"


@dataclass
class Record:
    """What a conversion has finished, in a file that is replaced after each shard.

    Attributes:
        fingerprint: of the source and the settings.
        shards: for each finished shard, the bytes of its file and the digest of what was written.
    """

    file: Path
    fingerprint: str
    shards: dict[str, tuple[int, str]] = field(default_factory=dict)

    @classmethod
    def load(cls, file: Path) -> "Record":
        """Read a record. Raises InputError if the file is not one."""
        try:
            content = json.loads(file.read_bytes())
            shards = {name: (int(size), str(digest)) for name, (size, digest) in content["shards"].items()}
            return cls(file, str(content["fingerprint"]), shards)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise InputError(f"{file}: damaged, so the unfinished conversion cannot go on; discard it with --restart") from None

    def save(self) -> None:
        with durable(self.file) as file:
            file.write(json.dumps({"fingerprint": self.fingerprint, "shards": self.shards}).encode())

    def add(self, name: str, size: int, digest: str) -> None:
        """Record a shard."""
        self.shards[name] = (size, digest)
        self.save()


def check_target(target: Path, plan: Plan) -> None:
    """Raise InputError if the target exists, overlaps the source, or has no place for the unfinished work."""
    target = absolute(target)
    if os.path.lexists(target) and (target.is_symlink() or not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} already exists; choose another target, or remove it")
    partial, sources = partial_of(target), {entry.source.file.parent for entry in plan.entries}
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        raise InputError(f"{partial} is needed for the conversion, but is not a folder; move it away")
    for source in sources:
        inner, outer = partial.resolve(), source.resolve()
        if inner.is_relative_to(outer) or outer.is_relative_to(inner):
            raise InputError(f"the target {target} and the source {source} overlap; choose a target outside the source")


def absolute(target: Path) -> Path:
    """The path, without ``~`` and ``..``."""
    return Path(os.path.abspath(os.path.expanduser(target)))


def partial_of(target: Path) -> Path:
    """The folder of an unfinished conversion to a target."""
    return target.with_name(f"{target.name}.partial")


def claim(partial: Path, fingerprint: str, restart: bool) -> tuple[Path, Record]:
    """The folder to write into, which holds only recorded shards of the same source and settings, and the record."""
    file, model = partial / RECORD, partial / "model"
    if not file.exists() and {entry.name for entry in partial.iterdir()} - {unfinished(file).name}:
        raise InputError(f"{partial} is needed for the conversion, but holds other files; move it away")
    if restart:
        if model.exists():
            shutil.rmtree(model)
        file.unlink(missing_ok=True)
    if not model.exists():
        record = Record(file, fingerprint)
        record.save()
        model.mkdir()
        sync(partial)
        return model, record
    record = Record.load(file)
    if record.fingerprint != fingerprint:
        raise InputError(
            f"{partial} holds an unfinished conversion of another source or with other settings; "
            "finish that one, or discard it with --restart"
        )
    for entry in model.iterdir():
        if entry.name in record.shards and entry.is_file() and not entry.is_symlink():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    return model, record


@contextmanager
def locked(partial: Path) -> Iterator[None]:
    """Make the folder, and keep a second conversion out of it. A killed run leaves no lock."""
    import fcntl  # imported here because Windows has no fcntl, but can import this module

    partial.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{partial}: another conversion to this target is running; wait until it ends") from None
        if not (partial.exists() and os.path.samestat(os.fstat(descriptor), partial.stat())):
            raise InputError(f"{partial}: another conversion to this target has just ended; run again if it failed")
        yield
    finally:
        os.close(descriptor)


@contextmanager
def durable(path: Path) -> Iterator[Any]:
    """A new file that gets its name when its whole content is on the disk."""
    temporary = unfinished(path)
    temporary.unlink(missing_ok=True)
    with open(temporary, "xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def unfinished(path: Path) -> Path:
    """The name of a file until its content is on the disk."""
    return path.with_name(f"{path.name}.unfinished")


def sync(folder: Path) -> None:
    """Write a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(partial: Path) -> Iterator[None]:
    """Turn errors of the operating system into a CheckpointError that says how to go on."""
    try:
        yield
    except OSError as failed:
        if failed.errno in (errno.ENOSPC, errno.EDQUOT):
            problem = "the disk is full; free some space"
        else:
            problem = f"{failed.filename or partial}: {failed.strerror}; fix this"
        raise CheckpointError(f"{problem} and run again: finished shards are kept in {partial}") from failed

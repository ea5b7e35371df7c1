"""Files: read and check JSON, and replace a text file atomically."""

import json
import os
import stat
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from mlx_diffgemma.errors import CheckpointError

#: The most bytes of a JSON file. The largest in use, the index of a checkpoint of many shards, has 0.1 MB.
MAX_JSON = 16 << 20


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file, in UTF-8 with or without a byte order mark.

    Raises CheckpointError if the file is missing, is not a regular file of at most :data:`MAX_JSON` bytes, or holds something
    else than a JSON object, a name twice, or values that are nested too deep. ``NaN`` and ``Infinity`` are read as numbers:
    whoever uses a number checks its range.
    """
    check_file(path, MAX_JSON)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_without_twins)
    except RecursionError:
        raise CheckpointError(f"{path}: cannot be read: the values are nested too deep; fetch it again") from None
    except (OSError, ValueError) as broken:
        raise CheckpointError(f"{path}: cannot be read: {first_line(broken)}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return content


def check_file(path: Path, most: int) -> None:
    """Raise CheckpointError unless ``path`` is a regular file of at most ``most`` bytes, or a link to one.

    Nothing else may be opened: a pipe, for example, would wait for its writer.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        what = "is a broken link; fetch it again" if path.is_symlink() else "is missing; is this a model folder?"
        raise CheckpointError(f"{path.parent}: {path.name} {what}") from None
    except (OSError, ValueError) as broken:
        raise CheckpointError(f"{path}: cannot be read: {first_line(broken)}") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: not a regular file")
    if status.st_size > most:
        raise CheckpointError(f"{path}: has {status.st_size:,} bytes, more than the {most:,} that such a file may have")


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. A name that stands twice would mean one thing to one reader and another to the next."""
    table = dict(pairs)
    if len(table) < len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the name {name!r} stands twice in an object")
    return table


def replace_text(file: Path, text: str) -> None:
    """Write a text to a file, and replace an existing file atomically. If this raises OSError, an existing file is unchanged."""
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with open(handle, "w", encoding="utf-8") as written:
            written.write(text)
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class if the message is empty."""
    return str(error).strip().partition("\n")[0] or type(error).__name__

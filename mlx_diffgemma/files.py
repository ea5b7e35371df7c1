"""Files: find or download a checkpoint's folder, read JSON, and replace a text file atomically."""

import errno
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from mlx_diffgemma.errors import CheckpointError

#: The files of a hub repository that a checkpoint needs. Weights in other formats are not downloaded.
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]

#: Models that come with the package.
BOXED = ("sudoku",)
_MODELS = Path(__file__).parent / "models"


def fetch(source: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint: ``source`` itself, or its snapshot from the hub, downloaded if it is not in the cache.

    A model that comes with the package (``sudoku``) takes precedence over a folder of that name. Write ``./sudoku`` for the
    folder.
    """
    if source in BOXED:
        return _MODELS / source
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    text = str(source)
    if isinstance(source, Path) or not re.fullmatch(r"[\w.-]+/[\w.-]+", text) or text.startswith("."):
        raise CheckpointError(f"{text}: no such folder, and not a hub id of the form OWNER/NAME")

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(text, revision=revision, allow_patterns=HUB_FILES))
    except RepositoryNotFoundError:
        raise CheckpointError(f"{text}: no such folder here, and no such repository on the hub (or it needs a login)") from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{text}: the hub has no revision {revision!r}; name a branch, tag or commit of it") from None
    except LocalEntryNotFoundError:
        raise CheckpointError(f"{text}: not in the local cache, and the hub cannot be reached; check the network") from None
    except HfHubHTTPError as refused:
        raise CheckpointError(f"{text}: the hub refused the download: {first_line(refused)}") from None
    except OSError as failed:
        if failed.errno == errno.ENOSPC:
            raise CheckpointError(f"{text}: the disk is full; free some space and run again, the download resumes") from None
        raise CheckpointError(f"{text}: the download failed: {first_line(failed)}") from None
    except HFValidationError:
        raise CheckpointError(f"{text}: no such folder, and not a hub id of the form OWNER/NAME") from None
    # When a connection breaks, the hub library's HTTP client and its Rust downloader raise many kinds of exceptions.
    except Exception as failed:
        raise CheckpointError(f"{text}: the download failed: {first_line(failed)}; run again, the download resumes") from failed


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file. Raises CheckpointError if the file is missing or is not a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: {path.name} is missing; is this a model folder?") from None
    except (OSError, ValueError) as broken:
        raise CheckpointError(f"{path}: cannot be read: {first_line(broken)}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return content


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

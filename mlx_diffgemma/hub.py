"""Where checkpoints come from: a folder, or the hub.

The headers of weights on the hub are read without downloading the weights. Everything goes through `huggingface_hub` and its
cache, and is pinned to one commit. The small files come first, and the weights last, when everything else is known to be right.
"""

import errno
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from rich.filesize import decimal

from mlx_diffgemma.errors import CheckpointError
from mlx_diffgemma.files import first_line
from mlx_diffgemma.weights import Header

#: Models that come with the package.
BOXED = ("sudoku", "pictures")
_MODELS = Path(__file__).parent / "models"

#: The files of a repository beside its weights that a checkpoint needs.
SIDE_FILES = ("*.json", "*.jinja", "tokenizer.model")


def local_folder(source: str | Path) -> Path | None:
    """The folder that ``source`` names, or None if it has the form of a hub id.

    A model that comes with the package (:data:`BOXED`) takes precedence over a folder of that name. Write ``./sudoku`` for the
    folder. Raises CheckpointError if there is no such folder and ``source`` cannot be a hub id.
    """
    if source in BOXED:
        return _MODELS / source
    text = str(source)
    try:
        folder = Path(source).expanduser()
        if folder.is_dir():
            return folder
    except (OSError, RuntimeError, ValueError):  # a name that is too long, has a NUL, or begins with an unknown ~user
        pass
    if isinstance(source, Path) or not re.fullmatch(r"[\w.-]+/[\w.-]+", text, re.ASCII) or text.startswith("."):
        raise CheckpointError(f"{text}: no such folder, and not a hub id of the form OWNER/NAME")
    return None


@dataclass(frozen=True)
class Snapshot:
    """One commit of a repository in the hub's cache.

    Attributes:
        repository: OWNER/NAME.
        folder: where its files are, or will be. The folder's name is the commit.
    """

    repository: str
    folder: Path

    @classmethod
    def open(cls, repository: str, revision: str | None = None) -> Self:
        """Find the commit of a branch or tag, and download ``config.json``. Without a network, the cached commit is used."""
        return cls(repository, _download(repository, revision, ["config.json"], quiet=True))

    @property
    def commit(self) -> str:
        return self.folder.name

    def fetch(self, patterns: Sequence[str]) -> None:
        """Download the small files that match one of the patterns, where they are not in the cache."""
        _download(self.repository, self.commit, patterns, quiet=True)

    def missing(self, patterns: Sequence[str]) -> dict[str, int]:
        """The files of the repository that match and are not in the cache, each with its bytes."""
        from huggingface_hub import snapshot_download

        with _errors(self.repository, self.commit):
            listed: Any = snapshot_download(
                self.repository, revision=self.commit, allow_patterns=list(patterns), dry_run=True, tqdm_class=_bars(quiet=True)
            )
        return {file.filename: file.file_size or 0 for file in listed if file.will_download and "/" not in file.filename}

    def header(self, name: str) -> Header:
        """The header of a weight file on the hub. Takes one or two requests of about 100 kB each."""
        from huggingface_hub import HfApi

        with _errors(self.repository, self.commit):
            found = HfApi().parse_safetensors_file_metadata(self.repository, name, revision=self.commit)
            return {name: (str(tensor.dtype), tuple(map(int, tensor.shape))) for name, tensor in found.tensors.items()}

    def fetch_weights(self, names: Sequence[str]) -> None:
        """Download weight files, where they are not in the cache. Raises CheckpointError if the disk has no room for them."""
        missing = self.missing(names)
        if not missing:
            return
        # What an interrupted run has downloaded is on the disk already.
        begun = sum(file.stat().st_size for file in (self.folder.parents[1] / "blobs").glob("*.incomplete"))
        needed, free = sum(missing.values()) - begun, shutil.disk_usage(self.folder).free
        if needed > free:
            raise CheckpointError(
                f"{self.repository}: the weights need {decimal(needed)} more on the disk of the hub's cache, but only "
                f"{decimal(free)} are free; free some space, or set HF_HOME to a folder on a larger disk"
            )
        _download(self.repository, self.commit, names)


def _download(repository: str, revision: str | None, patterns: Sequence[str], *, quiet: bool = False) -> Path:
    from huggingface_hub import snapshot_download

    with _errors(repository, revision):
        folder = snapshot_download(repository, revision=revision, allow_patterns=list(patterns), tqdm_class=_bars(quiet=quiet))
        return Path(folder)


def _bars(*, quiet: bool) -> Any:
    """The hub library's progress bars: shown for weights, and only on a terminal."""
    from huggingface_hub import utils

    shown: Any = utils.tqdm  # type: ignore[attr-defined]

    class Hidden(shown):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "disable": True})

    return Hidden if quiet or not (sys.stderr and sys.stderr.isatty()) else shown


@contextmanager
def _errors(repository: str, revision: str | None) -> Iterator[None]:
    """Turn the hub library's errors into one line each."""
    try:
        yield
    # When a connection breaks, the hub library's HTTP client and its Rust downloader raise many kinds of exceptions.
    except Exception as failed:
        raise CheckpointError(f"{repository}: {_problem(failed, revision)}") from failed


def _problem(failed: Exception, revision: str | None) -> str:
    from huggingface_hub import errors
    from huggingface_hub.constants import is_offline_mode

    match failed:
        case errors.RepositoryNotFoundError():
            problem = "no such folder here, and no such repository on the hub (or it needs a login)"
        case errors.RevisionNotFoundError():
            problem = f"the hub has no revision {revision!r}; name a branch, tag or commit of it"
        case errors.LocalEntryNotFoundError() | errors.OfflineModeIsEnabled() | errors.DryRunError() if is_offline_mode():
            problem = (
                "offline mode is set, and the local cache does not have all of it; to download it, unset HF_HUB_OFFLINE and "
                "TRANSFORMERS_OFFLINE"
            )
        case errors.LocalEntryNotFoundError() | errors.DryRunError():
            problem = "not in the local cache, and the hub cannot be reached; check the network"
        case errors.SafetensorsParsingError():
            problem = f"the weights on the hub are not safetensors ({first_line(failed)})"
        case errors.HfHubHTTPError():
            problem = f"the hub refused the download: {first_line(failed)}"
        case errors.HFValidationError():
            problem = "no such folder, and not a hub id of the form OWNER/NAME"
        case OSError(errno=errno.ENOSPC):
            problem = "the disk is full; free some space and run again, the download resumes"
        case _:
            problem = f"the download failed: {first_line(failed)}; run again, the download resumes"
    return problem

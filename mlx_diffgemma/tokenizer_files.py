"""The files of a tokenizer: checked before transformers reads them, and the vocabulary that came out checked afterwards."""

import tempfile
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from mlx_diffgemma.errors import CheckpointError
from mlx_diffgemma.files import MAX_JSON, check_file, read_json

#: The files that transformers reads, and the most bytes of each. The released tokenizer.json has 32 MB.
_BYTES = {
    "tokenizer.json": 64 << 20,
    "tokenizer.model": 64 << 20,
    "tokenizer_config.json": MAX_JSON,
    "special_tokens_map.json": MAX_JSON,
    "added_tokens.json": MAX_JSON,
    "chat_template.jinja": 1 << 20,
}
_MORE_TEMPLATES = "additional_chat_templates"


@contextmanager
def readable(folder: Path) -> Iterator[Path]:
    """A folder from which transformers can read the tokenizer of ``folder``: itself, or a copy without byte order marks.

    Raises CheckpointError if one of the files is not a regular one, is too large, or is damaged JSON.
    """
    sizes = _BYTES | {
        f"{_MORE_TEMPLATES}/{file.name}": _BYTES["chat_template.jinja"] for file in (folder / _MORE_TEMPLATES).glob("*.jinja")
    }
    files = [name for name in sizes if (folder / name).is_symlink() or (folder / name).exists()]
    for name in files:
        check_file(folder / name, sizes[name])
        if sizes[name] == MAX_JSON and "fast_tokenizer_files" in read_json(folder / name):
            raise CheckpointError(f"{folder / name}: fast_tokenizer_files is not supported; name the file tokenizer.json")
    if not any(_is_marked(folder / name) for name in files):
        yield folder
        return
    with tempfile.TemporaryDirectory() as copy:
        for name in files:
            target = Path(copy, name)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes((folder / name).read_bytes().removeprefix(BOM_UTF8))
        yield Path(copy)


def _is_marked(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(BOM_UTF8)) == BOM_UTF8


def check_vocabulary(folder: Path, vocabulary: Mapping[str, int], size: int) -> None:
    """Raise CheckpointError unless each id below ``size`` has one token, and no other id has any."""
    ids, counts = np.unique(np.fromiter(vocabulary.values(), np.int64, len(vocabulary)), return_counts=True)
    outside, twice = ids[(ids < 0) | (ids >= size)], ids[counts > 1]
    without = np.setdiff1d(np.arange(size), ids)
    for problem, example in (
        (f"{len(outside)} tokens have an id outside the model's vocabulary of {size}, such as", outside),
        (f"{len(without)} of the {size} ids have no token, such as", without),
        (f"{len(twice)} ids have two tokens, such as", twice),
    ):
        if len(example):
            raise CheckpointError(f"{folder}: the tokenizer is damaged, or another model's: {problem} {example[0]}")

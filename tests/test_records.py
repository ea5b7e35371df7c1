"""The language of records, and infill by a model trained on it, on all backends.

``python examples/records/train.py OUT`` wrote ``tests/data/records``, with its default options. The model has not learned to
read a name from the tag after it (``examples/records/results.json``), so only :data:`LEARNED` is tested.
"""

import importlib
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_diffgemma.backends import load_backend
from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.editing.infilling import Hole
from mlx_diffgemma.tokenizer import Tokenizer
from support.comparing import BACKENDS

for example in ("sudoku", "records"):
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / example))
language = importlib.import_module("records")
filling = importlib.import_module("filling")

FOLDER = Path(__file__).parent / "data" / "records"
LEARNED = (("age",), ("born",), ("tag",), ("born", "tag"))
COUNT, LEAST_KNOWN = 20, 18
#: Records with one hole of unknown length. Few, because every possible length is a separate row.
TRIED, LEAST_FOUND = 6, 5


def records(count: int, *, held_out: bool, seed: int = 0) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [language.random_record(rng, held_out=held_out) for _ in range(count)]


def test_a_record() -> None:
    record = language.Record("ann", 37)
    assert record.text == "name=ann;age=37;born=1989;tag=ann37;"
    assert [record.text[record.span(field)] for field in language.FIELDS] == ["ann", "37", "1989", "ann37"]
    assert record.cut(("name", "born")) == (["name=", ";age=37;born=", ";tag=ann37;"], ["ann", "1989"])
    assert record.cut(("tag",)) == (["name=ann;age=37;born=1989;tag=", ";"], ["ann37"])


def test_every_length_comes_and_fits() -> None:
    made = records(600, held_out=False)
    lengths = Counter(len(record.name) for record in made)
    print(f"names by length: {sorted(lengths.items())}")
    assert set(lengths) == set(range(2, 9))
    assert {len(str(record.age)) for record in made} == {1, 2}
    longest = language.Record("abcdefgh", 99)
    _, canvas = language.prompt_and_canvas([longest], len("name="))
    written = len(longest.text) - len("name=")
    assert canvas[0, written:].tolist() == [language.END_OF_TURN, *[language.PAD] * (language.CANVAS_LENGTH - written - 1)]
    assert written + 1 + (8 - len("99")) == language.CANVAS_LENGTH, "room for 8 tokens as the age"
    for record in made:
        for cut in language.CUTS:
            known, values = record.cut(cut)
            pieces = [piece for pair in zip(known, [*values, ""], strict=True) for piece in pair]
            assert "".join(pieces) == record.text


def test_what_is_cut_out_follows_from_the_rest() -> None:
    """In an exhaustive set, no two records differ only in the part that was cut out."""
    names = ["ab", "ba", "abc", "abcd"]
    every = [language.Record(name, age) for name in names for age in range(1, 100)]
    for cut in language.CUTS:
        left = Counter("?".join(record.cut(cut)[0]) for record in every)
        assert max(left.values()) == 1, f"{cut}: {left.most_common(1)}"
    ambiguous = Counter("?".join(record.cut(("name", "tag"))[0]) for record in every)
    assert max(ambiguous.values()) == len(names), "without name and tag, nothing tells the name"


def test_held_out_names_are_no_training_names() -> None:
    trained, kept = ({record.name for record in records(1500, held_out=held_out)} for held_out in (False, True))
    print(f"{len(trained)} names to train on, {len(kept)} held out")
    assert not trained & kept
    rng = np.random.default_rng(1)
    drawn = ["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), 6)) for _ in range(4000)]
    share = np.mean([language.is_held_out(name) for name in drawn])
    assert abs(share - 1 / 8) < 0.02, f"{share:.3f} of all names are held out"


def test_the_tokenizer_of_the_checkpoint() -> None:
    tokenizer = Tokenizer.from_folder(FOLDER)
    assert tokenizer.vocab_size == len(language.VOCABULARY) <= 64
    for record in records(20, held_out=True):
        tokens = language.to_tokens(record.text)
        assert tokenizer.encode(record.text) == tokens
        assert tokenizer.decode(tokens) == record.text == language.from_tokens(tokens)


@cache
def filled(backend_name: str) -> tuple[Any, ...]:
    """Results for 20 held-out records with the true lengths, and for the first with one hole also with lengths of 1 to 10."""
    checkpoint = Checkpoint.open(FOLDER)
    backend = load_backend(checkpoint, backend_name, device="cpu", dtype="float32")
    known, tried = [], []
    for record, cut in cases():
        known.append(filling.fill(backend, record, cut, checkpoint.generation)[0])
        if len(cut) == 1 and len(tried) < TRIED:
            tried.append(filling.fill(backend, record, cut, checkpoint.generation, lengths=Hole(1, 10)))
    return known, tried


def cases() -> list[tuple[Any, tuple[str, ...]]]:
    return [(record, LEARNED[index % len(LEARNED)]) for index, record in enumerate(records(COUNT, held_out=True, seed=7))]


def test_it_fills_holes_of_known_length(backend_name: str) -> None:
    known, _ = filled(backend_name)
    right = sum(filling.is_right(candidate, *case) for candidate, case in zip(known, cases(), strict=True))
    print(f"{backend_name}: {right} of {COUNT} records filled")
    assert right >= LEAST_KNOWN


def test_it_finds_unknown_lengths(backend_name: str) -> None:
    _, tried = filled(backend_name)
    single = [case for case in cases() if len(case[1]) == 1][:TRIED]
    right = sum(filling.is_right(candidates[0], *case) for candidates, case in zip(tried, single, strict=True))
    print(f"{backend_name}: {right} of {len(single)} records with one hole of unknown length filled")
    assert right >= LEAST_FOUND


@pytest.mark.skipif(len(BACKENDS) < 2, reason="one backend alone agrees with nothing")
def test_the_same_tokens_on_all_backends() -> None:
    first, *others = (filled(name) for name in BACKENDS)
    for other in others:
        for index in (0, 1):
            ours, theirs = ([_tokens(entry) for entry in result[index]] for result in (first, other))
            assert ours == theirs


def _tokens(written: Any) -> Any:
    if isinstance(written, list):
        return sorted((candidate.lengths, candidate.holes) for candidate in written)
    return written.holes

"""The language of records. Every field follows from the others, so each cut has one right answer.

    name=ann;age=37;born=1989;tag=ann37;

``born`` is :data:`YEAR` - age, and ``tag`` is name and age. A name is 2 to 8 random letters: only the record itself tells the
name and its length. One token is one character. A cut is any field, or any two fields except name and tag together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from string import ascii_lowercase, digits
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from vocabulary import BOS, END_OF_TURN, PAD, SPECIAL

VOCABULARY = (*SPECIAL, "=", ";", *digits, *ascii_lowercase)
#: Tokens of a canvas: the longest record without ``name=``, and its end, if 8 tokens are tried for each of name and age.
CANVAS_LENGTH = 48
#: Year of birth for age 0.
YEAR = 2026
#: Lengths of the shortest and the longest name.
NAME_LENGTHS = (2, 8)
#: Lowest and highest age, by number of digits.
AGES = {1: (1, 9), 2: (10, 99)}
#: Fields in order.
FIELDS = ("name", "age", "born", "tag")
#: The possible cuts: fields that follow from the others.
CUTS = tuple(cut for count in (1, 2) for cut in combinations(FIELDS, count) if cut != ("name", "tag"))

_HELD_OUT_SHARE = 8
_IDS = {character: index for index, character in enumerate(VOCABULARY)}


@dataclass(frozen=True)
class Record:
    """A record: its name and age. All other fields follow."""

    name: str
    age: int

    @property
    def values(self) -> tuple[str, ...]:
        """The values of the fields, in order."""
        return self.name, str(self.age), str(YEAR - self.age), f"{self.name}{self.age}"

    @property
    def text(self) -> str:
        return "".join(f"{field}={value};" for field, value in zip(FIELDS, self.values, strict=True))

    def span(self, field: str) -> slice:
        """The position of a field's value in the text."""
        index = FIELDS.index(field)
        start = sum(len(f"{before}={value};") for before, value in zip(FIELDS[:index], self.values, strict=False))
        start += len(f"{field}=")
        return slice(start, start + len(self.values[index]))

    def cut(self, fields: Sequence[str]) -> tuple[list[str], list[str]]:
        """The text around the values of ``fields`` (given in order), and these values. The text has one part more than values."""
        known, values, end = [], [], 0
        for field in fields:
            span = self.span(field)
            known.append(self.text[end : span.start])
            values.append(self.text[span])
            end = span.stop
        return [*known, self.text[end:]], values


def is_held_out(name: str) -> bool:
    """Whether a name is held out from training: one in eight, chosen by its hash, so every generator agrees."""
    return crc32(name.encode()) % _HELD_OUT_SHARE == 0


def random_record(
    rng: np.random.Generator, *, held_out: bool, name_length: int | None = None, age_digits: int | None = None
) -> Record:
    """A random record. Lengths that are None are random too."""
    name_length = name_length or int(rng.integers(*NAME_LENGTHS, endpoint=True))
    age_digits = age_digits or int(rng.integers(1, len(AGES), endpoint=True))
    while True:
        name = "".join(rng.choice(list(ascii_lowercase), name_length))
        if is_held_out(name) == held_out:
            return Record(name, int(rng.integers(*AGES[age_digits], endpoint=True)))


def to_tokens(text: str) -> list[int]:
    return [_IDS[character] for character in text]


def from_tokens(tokens: Sequence[int]) -> str:
    """The text of tokens. Special tokens are written as their names."""
    return "".join(VOCABULARY[token] for token in tokens)


def prompt_and_canvas(records: Sequence[Record], start: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Prompts int32 [n, 1 + start] and canvases int32 [n, L] of records whose canvas begins at character ``start``."""
    prompts = np.array([[BOS, *to_tokens(record.text[:start])] for record in records], np.int32)
    canvases = np.full((len(records), CANVAS_LENGTH), PAD, np.int32)
    for canvas, record in zip(canvases, records, strict=True):
        tokens = [*to_tokens(record.text[start:]), END_OF_TURN]
        canvas[: len(tokens)] = tokens
    return prompts, canvases

"""The language of records: every field follows from the others, so that whatever is cut out has one right answer.

    name=ann;age=37;born=1989;tag=ann37;

``born`` is :data:`YEAR` - age, and ``tag`` is name and age. A name is 2 to 8 random letters: nothing but the record itself
tells it, nor how long it is. One token is one character. Cut out may be any field, or any two but name and tag.
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
#: Tokens of a canvas: the longest record but ``name=``, and its end, with 8 tokens tried for each of name and age.
CANVAS_LENGTH = 48
#: Age 0 is born in this year.
YEAR = 2026
#: Shortest and longest name.
NAME_LENGTHS = (2, 8)
#: Ages, by the number of their digits.
AGES = {1: (1, 9), 2: (10, 99)}
#: Fields in their order.
FIELDS = ("name", "age", "born", "tag")
#: What may be cut out: fields that follow from the others.
CUTS = tuple(cut for count in (1, 2) for cut in combinations(FIELDS, count) if cut != ("name", "tag"))

_HELD_OUT_SHARE = 8
_IDS = {character: index for index, character in enumerate(VOCABULARY)}


@dataclass(frozen=True)
class Record:
    """A record is its name and its age; all else follows."""

    name: str
    age: int

    @property
    def values(self) -> tuple[str, ...]:
        """What the fields hold, in their order."""
        return self.name, str(self.age), str(YEAR - self.age), f"{self.name}{self.age}"

    @property
    def text(self) -> str:
        return "".join(f"{field}={value};" for field, value in zip(FIELDS, self.values, strict=True))

    def span(self, field: str) -> slice:
        """Where a field's value lies in the text."""
        index = FIELDS.index(field)
        start = sum(len(f"{before}={value};") for before, value in zip(FIELDS[:index], self.values, strict=False))
        start += len(f"{field}=")
        return slice(start, start + len(self.values[index]))

    def cut(self, fields: Sequence[str]) -> tuple[list[str], list[str]]:
        """What is left around the values of ``fields``, which are in their order, and these values: one less."""
        known, values, end = [], [], 0
        for field in fields:
            span = self.span(field)
            known.append(self.text[end : span.start])
            values.append(self.text[span])
            end = span.stop
        return [*known, self.text[end:]], values


def is_held_out(name: str) -> bool:
    """Whether a name is kept from training: one in eight, by its hash, so that every generator agrees."""
    return crc32(name.encode()) % _HELD_OUT_SHARE == 0


def random_record(
    rng: np.random.Generator, *, held_out: bool, name_length: int | None = None, age_digits: int | None = None
) -> Record:
    """A record, of the given lengths or of random ones."""
    name_length = name_length or int(rng.integers(*NAME_LENGTHS, endpoint=True))
    age_digits = age_digits or int(rng.integers(1, len(AGES), endpoint=True))
    while True:
        name = "".join(rng.choice(list(ascii_lowercase), name_length))
        if is_held_out(name) == held_out:
            return Record(name, int(rng.integers(*AGES[age_digits], endpoint=True)))


def to_tokens(text: str) -> list[int]:
    return [_IDS[character] for character in text]


def from_tokens(tokens: Sequence[int]) -> str:
    """The text of tokens, special ones by their names."""
    return "".join(VOCABULARY[token] for token in tokens)


def prompt_and_canvas(records: Sequence[Record], start: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """What comes before a canvas that begins at character ``start``, int32 [n, 1 + start], and that canvas, [n, L]."""
    prompts = np.array([[BOS, *to_tokens(record.text[:start])] for record in records], np.int32)
    canvases = np.full((len(records), CANVAS_LENGTH), PAD, np.int32)
    for canvas, record in zip(canvases, records, strict=True):
        tokens = [*to_tokens(record.text[start:]), END_OF_TURN]
        canvas[: len(tokens)] = tokens
    return prompts, canvases

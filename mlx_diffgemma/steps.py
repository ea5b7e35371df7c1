"""Work in steps: a generator that yields between steps, so that a server can take turns, and returns the result."""

from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")

#: Work that yields None after each step and returns a T. Whoever runs it may stop, or let others go first, between two steps.
Steps = Generator[None, None, T]


def run(steps: Steps[T]) -> T:
    """Run all steps, and return the result."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result

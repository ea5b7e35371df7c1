"""The capacity of the buffers for a layer's keys and values, and the position at which a sliding layer's buffer begins."""

from dataclasses import dataclass

#: A full layer's buffer grows by a quarter, and by at most this many positions.
MOST_GROWTH = 4096

#: Capacities are multiples of this. Each head then begins at a multiple of 64 bytes, whatever the head size and the type.
ALIGNMENT = 32


@dataclass(frozen=True)
class Room:
    """The rule for one layer.

    A sliding layer's buffer holds the last window - 1 positions, which later positions can see, and slides in steps. Its start
    depends only on the text's length. Memory is then always aligned in the same way, which keeps the bits the same, whatever
    the history of the text.

    Attributes:
        window: positions that a position sees, including itself; None on a full layer.
        step: the canvas's length.
    """

    window: int | None
    step: int

    def visible(self, length: int) -> int:
        """The first position that position ``length`` sees."""
        return max(0, length - (self.window - 1)) if self.window else 0

    def first(self, length: int) -> int:
        """The first position in the buffer of a text of this length."""
        return self.visible(length) // self.step * self.step

    def capacity(self, length: int, end: int) -> int:
        """Positions in a new buffer for a text of this length that needs room up to position ``end`` now."""
        needed = end - self.first(length)
        needed += self.step if self.window else min(needed // 4, MOST_GROWTH)
        return -(-needed // ALIGNMENT) * ALIGNMENT

"""How much room the buffers of a layer's keys and values have, and where a sliding layer's begins."""

from dataclasses import dataclass

#: A full layer's buffer grows by a quarter, and by at most this many positions.
MOST_GROWTH = 4096

#: Capacities are multiples of this: each head then begins at a multiple of 64 bytes, whatever the head's size and the type.
ALIGNMENT = 32


@dataclass(frozen=True)
class Room:
    """The rule of one layer.

    A sliding layer's buffer holds the last window - 1 positions, which later ones can see, and slides in steps. Where it begins
    depends on the text's length alone: memory that is aligned alike gives the same bits, whatever the text went through.

    Attributes:
        window: positions that one sees, itself included; None on a full layer.
        step: the canvas's length.
    """

    window: int | None
    step: int

    def visible(self, length: int) -> int:
        """The first position that one at ``length`` sees."""
        return max(0, length - (self.window - 1)) if self.window else 0

    def first(self, length: int) -> int:
        """The first position in the buffer of a text of this length."""
        return self.visible(length) // self.step * self.step

    def capacity(self, length: int, end: int) -> int:
        """Positions in a buffer that is made for a text of this length, where up to ``end`` are needed now."""
        needed = end - self.first(length)
        needed += self.step if self.window else min(needed // 4, MOST_GROWTH)
        return -(-needed // ALIGNMENT) * ALIGNMENT

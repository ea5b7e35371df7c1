"""Whose turn it is, and what goes into one pass: decisions without a clock, a thread or a device.

Turns go round the clients: the one that was served least recently is next, where arriving counts as being served. No client thus
waits for more turns than there are others. Calls of the same method that other requests wait for are performed in the same pass,
as far as there is room: rows and pieces of different texts need not be alike in anything.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from mlx_diffgemma.prompts import CHUNK
from mlx_diffgemma.scheduler.device import Call


class Waiting(Protocol):
    """What waits: of a client, and perhaps to be done only when nothing else is."""

    @property
    def client(self) -> str: ...

    @property
    def idle(self) -> bool: ...


def next_admitted(waiting: Sequence[Waiting], running: Iterable[Waiting], served: Mapping[str, int]) -> int:
    """Which of the requests that wait begins next: of the client with the fewest in progress that was served least recently."""
    share = Counter(each.client for each in running)
    order = [(share[each.client], served[each.client], index) for index, each in enumerate(waiting)]
    return min(order)[-1]


def next_pass(
    calls: Sequence[tuple[Waiting, Call]], served: Mapping[str, int], *, max_batch: int, max_tokens: int = CHUNK
) -> list[int]:
    """Which of the calls that wait are performed next, in one pass; those of one client in the order in which they came.

    Args:
        calls: at least one, and of which request each is.
        served: the turn in which each client was served last.
        max_batch: rows, or pieces, in a pass; a call of more is performed alone.
        max_tokens: of all pieces in a pass, unless one alone has more.
    """
    order = sorted(range(len(calls)), key=lambda index: (calls[index][0].idle, served[calls[index][0].client]))
    first, *others = order
    request, call = calls[first]
    chosen, parts, tokens = [first], len(call.parts), call.tokens
    for index in others:
        other, joining = calls[index]
        fits = parts + len(joining.parts) <= max_batch and tokens + joining.tokens <= max_tokens
        if other.idle == request.idle and joining.method == call.method and fits:
            chosen.append(index)
            parts, tokens = parts + len(joining.parts), tokens + joining.tokens
    return chosen

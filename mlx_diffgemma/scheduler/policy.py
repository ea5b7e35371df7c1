"""Decides whose turn it is and what goes into one pass, without a clock, a thread or a device.

Turns go round the clients: the client that was served least recently is next, and arriving counts as being served. So no client
waits for more turns than there are other clients. If other requests wait for calls of the same method, these calls go into the
same pass, as far as there is room. Rows and pieces of different texts need not be alike in anything.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from mlx_diffgemma.prompts import CHUNK
from mlx_diffgemma.scheduler.device import Call


class Waiting(Protocol):
    """A request that waits. An idle one runs only when no other waits."""

    @property
    def client(self) -> str: ...

    @property
    def idle(self) -> bool: ...


def next_admitted(waiting: Sequence[Waiting], running: Iterable[Waiting], served: Mapping[str, int]) -> int:
    """The index of the waiting request that begins next.

    It is one of the client with the fewest requests in progress; among such clients, of the one that was served least recently.
    """
    share = Counter(each.client for each in running)
    order = [(share[each.client], served[each.client], index) for index, each in enumerate(waiting)]
    return min(order)[-1]


def displaced(waiting: Sequence[Waiting], running: Iterable[Waiting], client: str) -> int | None:
    """The index of the waiting request that gives its place in a full queue to a new request of ``client``.

    It is the last one of the client with the most requests, if that client would still have as many as the new one's. None if
    there is no such request, and the new one must be refused.
    """
    counts = Counter(each.client for each in (*waiting, *running))
    order = [(counts[each.client], index) for index, each in enumerate(waiting)]
    most, index = max(order, default=(0, 0))
    return index if most > counts[client] + 1 else None


def next_pass(
    calls: Sequence[tuple[Waiting, Call]], served: Mapping[str, int], *, max_batch: int, max_tokens: int = CHUNK
) -> list[int]:
    """The indices of the waiting calls that go into the next pass. Calls of one client keep their order of arrival.

    Args:
        calls: the waiting calls, at least one, each with its request.
        served: the turn in which each client was last served.
        max_batch: rows, or pieces, in a pass at most; a call with more is performed alone.
        max_tokens: tokens of all pieces in a pass at most; a call with more is performed alone.
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

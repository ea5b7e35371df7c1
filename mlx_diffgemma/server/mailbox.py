"""From the engine's thread to the event loop: the events of one request, in order, in bounded memory."""

import asyncio
import threading
from collections import deque
from contextlib import suppress
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """What has been delivered and not been taken yet. Made within the event loop that takes.

    Text must all arrive, and its length is bounded by what a request may write. Drafts may be left out: of a client that reads
    more slowly than the canvas changes, the oldest ones are dropped.

    Args:
        max_drafts: drafts that wait at most.
    """

    def __init__(self, max_drafts: int = 64) -> None:
        self._loop, self._arrived = asyncio.get_running_loop(), asyncio.Event()
        self._lock, self._count, self._max_drafts = threading.Lock(), 0, max_drafts
        self._items: deque[tuple[int, T]] = deque()  # numbered
        self._drafts: deque[int] = deque()  # the numbers of those that may be dropped

    def deliver(self, item: T, *, draft: bool = False) -> None:
        """Put something in. For any thread."""
        with self._lock:
            if draft:
                if len(self._drafts) == self._max_drafts:
                    oldest = self._drafts.popleft()
                    self._items = deque(entry for entry in self._items if entry[0] != oldest)
                self._drafts.append(self._count)
            self._items.append((self._count, item))
            self._count += 1
        with suppress(RuntimeError):  # the loop is closed: nobody is there to take
            self._loop.call_soon_threadsafe(self._arrived.set)

    async def take(self, seconds: float | None = None) -> T:
        """The oldest item, as soon as there is one; raises TimeoutError after ``seconds``. For one taker."""
        while True:
            with self._lock:
                if self._items:
                    number, item = self._items.popleft()
                    if self._drafts and self._drafts[0] == number:
                        self._drafts.popleft()
                    return item
                self._arrived.clear()
            async with asyncio.timeout(seconds):
                await self._arrived.wait()

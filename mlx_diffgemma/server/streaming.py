"""Carries the events of one request from the engine's thread to the client's connection, in order and in bounded memory."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mlx_diffgemma.chat.reply import ReplyEvent
from mlx_diffgemma.errors import ComputationError, InputError
from mlx_diffgemma.sampler import Draft
from mlx_diffgemma.scheduler.engine import Engine
from mlx_diffgemma.scheduler.jobs import Busy, Finished, Prepared, Stopping, TimedOut
from mlx_diffgemma.server.answers import Answer, server_sent
from mlx_diffgemma.server.errors import ApiError
from mlx_diffgemma.server.middleware import LEFT, unexpected
from mlx_diffgemma.steps import Steps

P = TypeVar("P")
T = TypeVar("T")

#: A client that takes nothing of a stream for this many seconds counts as gone.
SEND_SECONDS = 60.0
#: A stream without an event for this many seconds sends a comment, so that no proxy closes the silent connection.
KEEP_ALIVE_SECONDS = 10.0


class Left(Exception):
    """The client has left."""


async def gone(receive: Receive) -> None:
    """Wait until the client has closed its connection. Its whole request has arrived."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do ``work``, and cancel it when the client leaves. Raises :class:`Left` then."""
    working, leaving = asyncio.create_task(work), asyncio.create_task(gone(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Left
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


class Running(Generic[P, T]):
    """Work that was submitted to the engine. Inside ``async with``, await :meth:`prepared`, then read events with ``async for``.

    An iteration gives None when nothing has happened for :data:`KEEP_ALIVE_SECONDS`. Both raise :class:`Left` when the client has
    closed its connection, and ApiError when the work fails. The work ends when the ``async with`` ends.

    Args:
        prepare, work: see :class:`~mlx_diffgemma.scheduler.jobs.Request`.
        client: the client's name for the engine, which shares its turns among clients.
        seconds: seconds that the work may take, from now on; None for no limit.

    Raises:
        ApiError: the engine takes no more work, because its queue is full (429) or because it is stopping (503).
    """

    def __init__(
        self,
        engine: Engine,
        prepare: Steps[P],
        work: Callable[[P], Iterator[T]],
        receive: Receive,
        *,
        client: str,
        seconds: float | None,
    ) -> None:
        self._mailbox: Mailbox[T | Prepared | Finished | Left] = Mailbox()
        self._receive = receive
        try:
            self._job = engine.submit(work, self._deliver, client=client, prepare=prepare, seconds=seconds)
        except (Busy, Stopping) as refused:
            raise api_error(refused) from None

    def _deliver(self, item: T | Prepared | Finished) -> None:
        self._mailbox.deliver(item, draft=isinstance(item, tuple) and isinstance(item[1], Draft))

    async def __aenter__(self) -> Self:
        self._watcher = asyncio.create_task(self._watch())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._watcher.cancel()
        self._job.cancel()  # does nothing if it has finished

    async def _watch(self) -> None:
        await gone(self._receive)
        self._mailbox.deliver(Left())

    async def prepared(self) -> P:
        """Wait until the request is prepared."""
        item = await self._take()
        assert isinstance(item, Prepared)
        value: P = item.value
        return value

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T | None:
        try:
            item = await self._take(KEEP_ALIVE_SECONDS)
        except TimeoutError:
            return None
        if isinstance(item, Finished):
            raise StopAsyncIteration
        assert not isinstance(item, Prepared)
        return item

    async def _take(self, seconds: float | None = None) -> T | Prepared | Finished:
        item = await self._mailbox.take(seconds)
        if isinstance(item, Left):
            raise item
        if isinstance(item, Finished) and item.error is not None:
            raise api_error(item.error)
        return item


def api_error(error: BaseException) -> ApiError:
    """The error for the client when the engine or the work raised ``error``."""
    answers: dict[type[BaseException], Callable[[Any], ApiError]] = {
        ApiError: lambda error: error,
        InputError: lambda error: ApiError(400, str(error)),
        Busy: lambda error: ApiError(
            429,
            str(error),
            kind="rate_limit_error",
            code="rate_limit_exceeded",
            headers={"Retry-After": str(error.retry_after)},
        ),
        Stopping: lambda error: ApiError(503, str(error), kind="server_error", code="stopping"),
        ComputationError: lambda error: ApiError(500, str(error), kind="server_error", code="computation_failed"),
        TimedOut: lambda error: ApiError(504, str(error), kind="server_error", code="time_limit_exceeded"),
    }
    return next((answer(error) for kind, answer in answers.items() if isinstance(error, kind)), None) or unexpected(error)


class Mailbox(Generic[T]):
    """Items that were delivered and not taken yet. Create it in the event loop that takes them.

    All text must arrive; its length is bounded by what a request may write. Drafts may be lost: when a client reads more slowly
    than the canvas changes, the oldest drafts are dropped.

    Args:
        max_drafts: drafts that the mailbox holds at most.
    """

    def __init__(self, max_drafts: int = 64) -> None:
        self._loop, self._arrived = asyncio.get_running_loop(), asyncio.Event()
        self._lock, self._count, self._max_drafts = threading.Lock(), 0, max_drafts
        self._items: deque[tuple[int, T]] = deque()  # each with its number
        self._drafts: deque[int] = deque()  # the numbers of the drafts, which may be dropped

    def deliver(self, item: T, *, draft: bool = False) -> None:
        """Put an item in. Any thread may call this."""
        with self._lock:
            if draft:
                if len(self._drafts) == self._max_drafts:
                    oldest = self._drafts.popleft()
                    self._items = deque(entry for entry in self._items if entry[0] != oldest)
                self._drafts.append(self._count)
            self._items.append((self._count, item))
            self._count += 1
        with suppress(RuntimeError):  # the loop is closed, so nobody will take the item
            self._loop.call_soon_threadsafe(self._arrived.set)

    async def take(self, seconds: float | None = None) -> T:
        """Take the oldest item; wait if there is none. Raises TimeoutError after ``seconds``. Only one task may take items."""
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


class EventStream(Response):
    """A response that is sent while it is written, as server-sent events."""

    media_type = "text/event-stream"

    def __init__(
        self,
        running: Running[P, tuple[int, ReplyEvent]],
        begin: Callable[[P], Answer],
        heard: Callable[[ReplyEvent], None],
        left: Callable[[], Any],
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["Content-Length"]  # the length is not known in advance
        self.running, self.begin, self.heard, self.left = running, begin, heard, left

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response. An error before its beginning is raised; a later one is the stream's last event."""
        begun = False

        async def put(body: bytes, more: bool = True) -> None:
            async with asyncio.timeout(SEND_SECONDS):
                await send({"type": "http.response.body", "body": body, "more_body": more})

        def told(chunks: list[dict[str, Any]]) -> bytes:
            return b"".join(map(server_sent, chunks))

        try:
            async with self.running:
                answer = self.begin(await self.running.prepared())
                begun = True
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                await put(told(answer.opening()))
                async for item in self.running:
                    if item is None:
                        await put(b": keep-alive\n\n")
                        continue
                    self.heard(item[1])
                    if chunks := answer.chunks(*item):
                        await put(told(chunks))
            await put(told(answer.closing()) + b"data: [DONE]\n\n")
        except (Left, TimeoutError):
            scope["state"]["status"] = LEFT
            self.left()
            return
        except Exception as failure:
            if not begun:
                raise
            error = failure if isinstance(failure, ApiError) else unexpected(failure)
            scope["state"]["status"] = error.status
            await put(server_sent(error.body()))
        await put(b"", more=False)

"""A request's work in the engine, as the event loop sees it: given up as soon as the client leaves."""

import asyncio
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from starlette.types import Receive

from mlx_diffgemma.errors import InputError
from mlx_diffgemma.sampler import Draft
from mlx_diffgemma.scheduler.engine import Busy, Engine, Finished, Stopping, TimedOut
from mlx_diffgemma.server.errors import ApiError
from mlx_diffgemma.server.mailbox import Mailbox
from mlx_diffgemma.server.middleware import unexpected

T = TypeVar("T")

#: A stream in which nothing has happened for this long says so, for what closes silent connections on the way.
KEEP_ALIVE_SECONDS = 10.0


class Left(Exception):
    """The client is not there any more."""


class Running(Generic[T]):
    """Work that has been handed to the engine; its results, by ``async for`` within ``async with``.

    An iteration gives None where nothing has happened for :data:`KEEP_ALIVE_SECONDS`, and raises :class:`Left` once the client
    has closed its connection, or ApiError where the work fails. Whatever ends the ``async with`` ends the work.

    Args:
        client: whom the engine's turns are shared by.
        seconds: that the work may take, from now on.

    Raises:
        ApiError: the engine takes no more work, for now (429) or for good (503).
    """

    def __init__(
        self, engine: Engine, work: Callable[[], Iterator[T]], receive: Receive, *, client: str, seconds: float | None
    ) -> None:
        self._mailbox: Mailbox[T | Finished | Left] = Mailbox()
        self._receive = receive
        try:
            self._job = engine.submit(work, self._deliver, client=client, seconds=seconds)
        except (Busy, Stopping) as refused:
            raise told(refused) from None

    def _deliver(self, item: T | Finished) -> None:
        self._mailbox.deliver(item, draft=isinstance(item, tuple) and isinstance(item[1], Draft))

    async def __aenter__(self) -> Self:
        self._watcher = asyncio.create_task(self._watch())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._watcher.cancel()
        self._job.cancel()  # does nothing where it has finished

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._mailbox.deliver(Left())

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T | None:
        try:
            item = await self._mailbox.take(KEEP_ALIVE_SECONDS)
        except TimeoutError:
            return None
        if isinstance(item, Left):
            raise item
        if not isinstance(item, Finished):
            return item
        if item.error is None:
            raise StopAsyncIteration
        raise told(item.error)


def told(error: BaseException) -> ApiError:
    """What the client is told of an error in the engine."""
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
        TimedOut: lambda error: ApiError(504, str(error), kind="server_error", code="time_limit_exceeded"),
    }
    return next((answer(error) for kind, answer in answers.items() if isinstance(error, kind)), None) or unexpected(error)

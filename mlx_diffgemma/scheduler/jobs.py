"""Requests in the engine's hands: how they are told of it, how they end, and the greenlets that run them."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from greenlet import greenlet

from mlx_diffgemma.errors import DiffGemmaError
from mlx_diffgemma.scheduler.device import Call


class Busy(DiffGemmaError):
    """As many requests as may wait are waiting.

    Attributes:
        retry_after: whole seconds, at least 1, in which about all that are in progress now will have made room.
    """

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"too many requests are waiting; try again in {retry_after} s")
        self.retry_after = retry_after


class Stopping(DiffGemmaError):
    """The engine takes no more requests, or was stopped under this one."""

    def __init__(self) -> None:
        super().__init__("the server is stopping; try again when it is back")


class TimedOut(DiffGemmaError):
    """A request has taken longer than it may."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the request took longer than {seconds:g} s; ask for less, or try again when there are fewer requests")


class Cancelled(BaseException):
    """A request has been cancelled. As no Exception, so that no work takes it for a failure that can be handled."""


@dataclass(frozen=True)
class Finished:
    """The last that is delivered of a job.

    Attributes:
        error: what ended it, if it was not its work: Cancelled, TimedOut, Stopping, or what the work or ``deliver`` raised.
    """

    error: BaseException | None = None


@dataclass(frozen=True)
class Request:
    """What an engine is asked to do.

    Attributes:
        work: makes the request's events, with the engine's model.
        deliver: takes them one by one, and then exactly one :class:`Finished`; called in the engine's thread, where it must not
            block. What it raises ends the job.
        client: whose turn the request takes.
        seconds: after which it ends, with TimedOut, before its next call; the time in the queue counts. None for any time.
        idle: whether it is done only when no other request waits for anything.
    """

    work: Callable[[], Iterator[Any]]
    deliver: Callable[[Any], None]
    client: str
    seconds: float | None = None
    idle: bool = False


class Ending(Protocol):
    """What a job's end is told: the engine."""

    def end(self, job: "Job", error: BaseException) -> None: ...


class Job:
    """A request in the engine's hands. Made by :meth:`~mlx_diffgemma.scheduler.engine.Engine.submit`."""

    def __init__(self, engine: Ending, request: Request) -> None:
        self.engine, self.request = engine, request
        self.submitted = self.admitted = time.monotonic()
        self.ended: BaseException | None = None  # why it must end; its tasks may have to be told yet
        self.outcome = Finished()  # once its first task is dead
        self.tasks: list[Task] = []  # that live; the first is that of its work

    @property
    def client(self) -> str:
        """Whose turn it takes."""
        return self.request.client

    @property
    def idle(self) -> bool:
        """Whether it is done only when no other job waits for anything."""
        return self.request.idle

    def cancel(self) -> None:
        """End the job before its next call of the backend. For any thread, and at any time."""
        self.engine.end(self, Cancelled())


class Task(greenlet):
    """A strand of a job: its work, or one of the iterators that this gathers. Suspended, it waits for a call, or sleeps."""

    def __init__(self, run: Callable[[], Any], hub: greenlet, job: Job, owner: "Task | None" = None) -> None:
        super().__init__(run, hub)
        self.job, self.owner = job, owner
        self.call: Call | None = None
        self.asleep = False
        self.ended: BaseException | None = None

    def check(self) -> None:
        """Raise what the task or its job must end by."""
        if self.ended is not None:  # raised from no local name, which the traceback would lead back to
            raise self.ended
        if self.job.ended is not None:
            raise self.job.ended

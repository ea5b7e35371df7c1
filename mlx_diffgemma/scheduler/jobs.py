"""Jobs: requests that were submitted to the engine, how they end, and the greenlets that run them."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from greenlet import greenlet

from mlx_diffgemma.errors import DiffGemmaError
from mlx_diffgemma.scheduler.device import Call
from mlx_diffgemma.steps import Steps


class Busy(DiffGemmaError):
    """The queue is full.

    Attributes:
        retry_after: whole seconds, at least 1, after which about all requests that are now in progress will have ended.
    """

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"too many requests are waiting; try again in {retry_after} s")
        self.retry_after = retry_after


class Stopping(DiffGemmaError):
    """The engine is stopping: it takes no more requests, and ended this one."""

    def __init__(self) -> None:
        super().__init__("the server is stopping; try again when it runs again")


class TimedOut(DiffGemmaError):
    """A request has taken longer than its time limit."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the request took longer than {seconds:g} s; ask for less, or try again when the server is less busy")


class Cancelled(BaseException):
    """A request was cancelled. Not an Exception, so that no work handles it like a failure."""


@dataclass(frozen=True)
class Finished:
    """The last item that a job delivers.

    Attributes:
        error: the error that ended the job: Cancelled, TimedOut, Stopping, or what the work or ``deliver`` raised. None if the
            work came to its end.
    """

    error: BaseException | None = None


@dataclass(frozen=True)
class Prepared:
    """The first item that a job delivers if it was prepared: the result of the preparation, which its work receives too."""

    value: Any


@dataclass(frozen=True)
class Request:
    """A request to an engine.

    Attributes:
        work: returns an iterator of the request's events, which uses the engine's model.
        deliver: receives the events one by one, and then exactly one :class:`Finished`. The engine calls it in its own threads,
            where it must not block. An error that it raises ends the job.
        client: the client whose turns the request takes.
        prepare: what to do without the model before the request can begin, in steps, such as reading its texts. It runs in a
            thread of its own, beside the model. ``work`` is then called with the result.
        seconds: time limit, including preparation and the time in the queue. TimedOut then ends the request before its next
            step or call. None for no limit.
        idle: whether the request runs only when no other request waits for the device.
    """

    work: Callable[..., Iterator[Any]]
    deliver: Callable[[Any], None]
    client: str
    prepare: Steps[Any] | None = None
    seconds: float | None = None
    idle: bool = False


class Ending(Protocol):
    """The part of the engine that a job uses."""

    def end(self, job: "Job", error: BaseException) -> None: ...


class Job:
    """A request that was submitted to the engine. :meth:`~mlx_diffgemma.scheduler.engine.Engine.submit` creates it."""

    def __init__(self, engine: Ending, request: Request) -> None:
        self.engine, self.request = engine, request
        self.submitted = self.admitted = time.monotonic()
        self.ended: BaseException | None = None  # why it must end; its tasks may not know yet
        self.prepared: tuple[Any, ...] = ()  # the arguments of its work
        self.outcome = Finished()  # set when its first task is dead
        self.tasks: list[Task] = []  # live tasks; the first one runs the work

    @property
    def client(self) -> str:
        """The client whose turns it takes."""
        return self.request.client

    @property
    def idle(self) -> bool:
        """Whether it runs only when no other job waits for the device."""
        return self.request.idle

    def is_late(self, now: float) -> bool:
        """Whether the time limit has passed, at the time ``now`` of the monotonic clock."""
        return self.request.seconds is not None and now - self.submitted >= self.request.seconds

    def cancel(self) -> None:
        """End the job before its next call of the backend. Any thread may call this, at any time."""
        self.engine.end(self, Cancelled())


class Task(greenlet):
    """A greenlet of a job: its work, or an iterator that the work gathers. When suspended, it waits for a call or sleeps."""

    def __init__(self, run: Callable[[], Any], hub: greenlet, job: Job, owner: "Task | None" = None) -> None:
        super().__init__(run, hub)
        self.job, self.owner = job, owner
        self.call: Call | None = None
        self.asleep = False
        self.ended: BaseException | None = None

    def check(self) -> None:
        """Raise the error that must end the task or its job, if there is one."""
        if self.ended is not None:  # not through a local name: the traceback would refer to it
            raise self.ended
        if self.job.ended is not None:
            raise self.job.ended

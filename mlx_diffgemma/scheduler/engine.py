"""One device, many requests.

A request is plain library code, a loop over events of :meth:`~mlx_diffgemma.pipeline.DiffusionGemma.stream` or the like. The
engine runs each in a greenlet, over a backend whose calls suspend it: with every request stopped at its next call, the engine
decides which to perform. All of that happens in one thread, because a framework's arrays and streams belong to the thread that
made them; the engine's own methods, but for :meth:`Engine.gather`, may be called from any.

Turns go round the clients: the one that was served least recently is next, where arriving counts as being served, and of its
calls the one that has waited longest. No client thus waits for more turns than there are others. When a denoising step has its
turn, those of the same shape that other requests wait for are performed with it, in one pass, as far as ``max_batch`` allows.

Greenlets switch to the engine's loop (the hub) and nowhere else; it resumes one after the other until each waits for a call or
has ended, and only then picks the next turn. So what is batched depends on the order of arrival alone, and on no clock.
"""

import itertools
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any, TypeVar

from greenlet import getcurrent, greenlet

from mlx_diffgemma.errors import DiffGemmaError
from mlx_diffgemma.pipeline import DiffusionGemma
from mlx_diffgemma.scheduler.device import Call, Counters, Denoise, Device, SharedBackend

T = TypeVar("T")

#: Requests whose durations are averaged to say when to come back.
RECENT = 16

_log = logging.getLogger(__name__)


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


class Job:
    """A request in the engine's hands. Made by :meth:`Engine.submit`."""

    def __init__(
        self,
        engine: "Engine",
        work: Callable[[], Iterator[Any]],
        deliver: Callable[[Any], None],
        client: str,
        seconds: float | None,
    ) -> None:
        self.engine, self.work, self.deliver, self.client, self.seconds = engine, work, deliver, client, seconds
        self.submitted = self.admitted = time.monotonic()
        self.ended: BaseException | None = None  # why it must end; its tasks may have to be told yet
        self.outcome = Finished()  # once its first task is dead
        self.tasks: list[_Task] = []  # that live; the first is that of its work

    def cancel(self) -> None:
        """End the job before its next call of the backend. For any thread, and at any time."""
        self.engine.end(self, Cancelled())


class _Task(greenlet):
    """A strand of a job: its work, or one of the iterators that this gathers. Suspended, it waits for a call, or sleeps."""

    def __init__(self, run: Callable[[], Any], hub: greenlet, job: Job, owner: "_Task | None" = None) -> None:
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


class Engine:
    """Runs requests on a model.

    Args:
        parallel: requests in progress at a time; each holds its keys and values.
        queue: requests that wait besides.
        max_batch: rows in a pass of several requests. By default 8 where a batch is exact
            (:class:`~mlx_diffgemma.backends.Backend`), and 1 elsewhere: a request's tokens must not depend on its neighbours.

    Attributes:
        model: the same model over the shared backend, for the work that is submitted; elsewhere its calls raise RuntimeError.
        stopping: no new requests are taken, and those in progress may end themselves where they can.
        counters: see there.
    """

    def __init__(self, model: DiffusionGemma, *, parallel: int = 8, queue: int = 64, max_batch: int | None = None) -> None:
        self.parallel, self.queue = parallel, queue
        self.max_batch = max_batch or (8 if model.backend.exact_rows else 1)
        self.model = DiffusionGemma(model.checkpoint, SharedBackend(model.backend, self._ask))
        self.model.tokenizer = model.tokenizer
        self.stopping = False
        self.counters = Counters()
        self._device = Device(model.backend, self.counters)
        self._thread: threading.Thread | None = None
        self._hub: greenlet | None = None
        # Under the lock, whose owner may notify: the jobs, what ends them, and `stopping`.
        self._changed = threading.Condition()
        self._waiting: list[Job] = []
        self._running: list[Job] = []
        # The engine's thread alone:
        self._ready: deque[tuple[_Task, tuple[Any, ...], BaseException | None]] = (
            deque()
        )  # to be resumed, with an answer or an error
        self._pending: list[_Task] = []  # that wait for a call
        self._served: dict[str, int] = {}  # of each client that has jobs, the turn in which it was served last
        self._turns = itertools.count()
        self._durations: deque[float] = deque(maxlen=RECENT)

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests in progress."""
        return len(self._running)

    def start(self) -> None:
        """Begin with the requests; once."""
        with self._changed:
            if self._thread is not None or self.stopping:
                raise RuntimeError("an engine starts once")
            self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
            self._thread.start()

    def stop(self, timeout: float | None = None) -> None:
        """Take no more requests, drop those that wait, and return when those in progress have ended.

        After ``timeout`` seconds what is left is ended before its next call, by Stopping; None waits for as long as it takes. May
        be called again, as with a shorter time, and before the start.
        """
        with self._changed:
            self.stopping = True
            self._changed.notify_all()
        if self._thread is None:
            self._sweep()
            return
        self._thread.join(timeout)
        for job in list(self._running):
            self.end(job, Stopping())
        self._thread.join()

    def submit(
        self,
        work: Callable[[], Iterator[T]],
        deliver: Callable[[T | Finished], None],
        *,
        client: str,
        seconds: float | None = None,
    ) -> Job:
        """Put a request into the queue.

        Args:
            work: makes the request's events, with :attr:`model`.
            deliver: takes them one by one, and then exactly one :class:`Finished`; called in the engine's thread, where it must
                not block. What it raises ends the job.
            client: whose turn the request takes.
            seconds: after which it ends, with TimedOut, before its next call; the time in the queue counts.

        Raises:
            Busy, Stopping.
        """
        with self._changed:
            if self.stopping:
                raise Stopping
            if len(self._waiting) + len(self._running) >= self.parallel + self.queue:
                self.counters.refused += 1
                recent = list(self._durations)
                raise Busy(max(1, ceil(sum(recent) / max(1, len(recent)))))
            job = Job(self, work, deliver, client, seconds)
            self._waiting.append(job)
            self._changed.notify_all()
        return job

    def end(self, job: Job, error: BaseException) -> None:
        """Have a job end before its next call, by ``error``, unless it has to already. For any thread."""
        with self._changed:
            job.ended = job.ended or error

    def gather(self, iterators: Sequence[Iterator[T]]) -> Iterator[tuple[int, T]]:
        """Run iterators side by side, so that their calls wait together; inside work.

        Each runs on when its event has been taken. An error of one closes the others, and is raised; closing this closes all.

        Yields:
            The index of an iterator, and its event, in order of arrival.
        """
        owner = self._current()
        events: deque[tuple[int, T]] = deque()
        errors: list[BaseException] = []

        def run(index: int, iterator: Iterator[T]) -> None:
            task = self._current()
            try:
                task.check()
                with _closed(iterator):
                    for event in iterator:
                        events.append((index, event))
                        self._wake(owner)
                        self._sleep(task)
                        task.check()
            except BaseException as error:  # noqa: BLE001 (raised again where the events are read)
                errors.append(error)

        tasks = [self._begin(partial(run, *numbered), owner.job, owner) for numbered in enumerate(iterators)]
        try:
            while True:
                if events:
                    index, event = events.popleft()
                    yield index, event
                    self._wake(tasks[index])
                elif errors:
                    raise errors.pop()
                elif all(task.dead for task in tasks):
                    return
                else:
                    self._sleep(owner)
                    owner.check()
        finally:
            for task in tasks:
                self._interrupt(task, Cancelled())
            # Nobody else can wait for them: the garbage collector may close this wherever it pleases.
            while getcurrent() is owner and not all(task.dead for task in tasks):
                self._sleep(owner)
            errors.clear()  # their tracebacks lead back to here, and to what the tasks held

    # In a task:

    def _current(self) -> _Task:
        task = getcurrent()
        if not isinstance(task, _Task) or task.job.engine is not self:
            raise RuntimeError("an engine's model computes inside work that was submitted to it")
        return task

    def _ask(self, call: Call) -> Any:
        """The answer to a call, when it has been performed."""
        task = self._current()
        task.check()
        task.call = call
        self._pending.append(task)
        answer = self._switch()
        task.check()
        return answer

    def _sleep(self, task: _Task) -> None:
        """Until somebody wakes the task, which is the current one."""
        task.asleep = True
        self._switch()

    def _switch(self) -> Any:
        assert self._hub is not None
        return self._hub.switch()

    def _work(self, job: Job) -> Finished:
        """What the first task of a job runs."""
        try:
            self._current().check()
            events = job.work()
            with _closed(events):
                for event in events:
                    self._deliver(job, event)
        except BaseException as error:  # noqa: BLE001 (whatever it is, it ends this job and no other)
            return Finished(error)
        return Finished()

    def _deliver(self, job: Job, event: Any) -> None:
        try:
            job.deliver(event)
        except BaseException as error:
            _log.exception("an event could not be delivered, and its request is cancelled")
            self.end(job, error)  # so that its work computes nothing while it is closed
            raise

    # In a task or in the hub:

    def _begin(self, run: Callable[[], Any], job: Job, owner: _Task | None = None) -> _Task:
        assert self._hub is not None
        task = _Task(run, self._hub, job, owner)
        job.tasks.append(task)
        self._ready.append((task, (), None))
        return task

    def _wake(self, task: _Task) -> None:
        if task.asleep:
            task.asleep = False
            self._ready.append((task, (), None))

    def _interrupt(self, task: _Task, error: BaseException) -> None:
        """Have ``error`` raised where the task is suspended, and whenever it calls the backend again."""
        if task.ended is not None or task.dead:
            return
        task.ended = error
        if task.call is not None:
            task.call = None
            self._pending.remove(task)
            self._ready.append((task, (), None))
        else:
            self._wake(task)

    # In the hub:

    def _run(self) -> None:
        self._hub = getcurrent()
        try:
            while self._wait():
                self._sweep()
                if self._ready:
                    self._resume_all()  # and look again for jobs that must end, so that no call of theirs is performed
                elif self._pending:
                    self._perform(self._picked())
        except BaseException as error:  # noqa: BLE001 (a mistake of ours must not leave clients waiting for ever)
            _log.exception("the engine has failed")
            self._abandon(error)
        self._device.forget()

    def _wait(self) -> bool:
        """Wait for something to do; False if nothing will come."""
        with self._changed:
            while not (self._running or self._waiting or self.stopping):
                self._changed.wait()
            return bool(self._running or self._waiting)

    def _sweep(self) -> None:
        """Begin jobs for which there is room, and end those that must end."""
        now = time.monotonic()
        with self._changed:
            for job in (*self._waiting, *self._running):
                if job.seconds is not None and now - job.submitted >= job.seconds:
                    self.end(job, TimedOut(job.seconds))
                if job.client not in self._served:
                    self._served[job.client] = next(self._turns)
            if self.stopping:
                for job in self._waiting:
                    self.end(job, Stopping())
            dropped = [job for job in self._waiting if job.ended is not None]
            self._waiting = [job for job in self._waiting if job.ended is None]
            begun = []
            while self._waiting and len(self._running) < self.parallel:
                share = Counter(job.client for job in self._running)
                job = min(self._waiting, key=lambda job: (share[job.client], self._served[job.client]))
                self._waiting.remove(job)
                self._running.append(job)
                begun.append(job)
        for job in begun:
            self.counters.admitted += 1
            job.admitted = now
            self._begin(partial(self._work, job), job)
        for job in dropped:
            self._finish(job, Finished(job.ended))
        for job in self._running:
            if job.ended is not None:
                self._interrupt(job.tasks[0], job.ended)

    def _picked(self) -> list[_Task]:
        """Whose calls are performed next, in one pass."""
        first, *others = sorted(self._pending, key=lambda task: self._served[task.job.client])
        batch = [first]
        if isinstance(first.call, Denoise):
            rows = len(first.call.canvas)
            for task in others:
                call = task.call
                if isinstance(call, Denoise) and call.shape == first.call.shape and rows + len(call.canvas) <= self.max_batch:
                    batch.append(task)
                    rows += len(call.canvas)
        return batch

    def _perform(self, batch: list[_Task]) -> None:
        turn = next(self._turns)
        calls = [task.call for task in batch if task.call is not None]
        for task in batch:
            task.call = None
            self._pending.remove(task)
            self._served[task.job.client] = turn
        try:
            answers = self._device.perform(calls)
        except Exception as error:  # noqa: BLE001 (of a framework, as for lack of memory: the requests tell it)
            self._ready.extend((task, (), error) for task in batch)
        else:
            self._ready.extend((task, (answer,), None) for task, answer in zip(batch, answers, strict=True))

    def _resume_all(self) -> None:
        while self._ready:
            self._resume(*self._ready.popleft())

    def _resume(self, task: _Task, answer: tuple[Any, ...], error: BaseException | None) -> None:
        outcome = task.switch(*answer) if error is None else task.throw(error)
        if not task.dead:
            return
        job = task.job
        job.tasks.remove(task)
        task.ended = None  # its traceback leads to the task
        if task.owner is None:
            job.outcome = outcome
            for left in job.tasks:  # gathered by an iterator that nobody has closed
                self._interrupt(left, Cancelled())
        else:
            self._wake(task.owner)
        if not job.tasks:
            self._finish(job, Finished(job.ended) if job.ended is not None else job.outcome)

    def _finish(self, job: Job, finished: Finished) -> None:
        with self._changed:
            if job in self._running:
                self._running.remove(job)
                self._durations.append(time.monotonic() - job.admitted)
            if all(other.client != job.client for other in (*self._running, *self._waiting)):
                self._served.pop(job.client, None)
        self._device.forget()
        job.outcome = Finished()  # an error's traceback leads to the job, and to the keys and values that it held
        if job.ended is not None:
            job.ended.__traceback__ = None
        match finished.error:
            case None:
                self.counters.finished += 1
            case TimedOut():
                self.counters.timed_out += 1
            case Cancelled() | Stopping():
                self.counters.cancelled += 1
            case _:
                self.counters.failed += 1
        try:
            job.deliver(finished)
        except Exception:  # noqa: BLE001 (the job is over, and the others are not concerned)
            _log.exception("the end of a request could not be delivered")

    def _abandon(self, error: BaseException) -> None:
        """End everything by ``error``, whatever state it is in."""
        with self._changed:
            self.stopping = True
            jobs = [*self._waiting, *self._running]
            self._waiting = []
        for job in jobs:
            self.end(job, error)
        while tasks := [task for job in jobs for task in job.tasks if not task.dead]:
            for task in tasks:  # raises the error where it is suspended; one that gathers dies after those it waits for
                task.switch()
        for job in jobs:
            self._finish(job, Finished(error))


@contextmanager
def _closed(iterator: Iterator[Any]) -> Iterator[None]:
    """Close an iterator in the end, if it is of a kind that can be."""
    try:
        yield
    finally:
        close = getattr(iterator, "close", None)
        if close is not None:
            close()

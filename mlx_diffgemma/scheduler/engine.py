"""The engine: runs many requests on one device.

A request is plain library code: a loop over the events of :meth:`~mlx_diffgemma.pipeline.DiffusionGemma.stream`, for example. The
engine runs each request in a greenlet. The request's backend suspends the greenlet at every call. When every request has stopped
at its next call, the policy (policy.py) decides which calls to perform. All of this happens in one thread, because a framework's
arrays and streams belong to the thread that made them. A second thread prepares requests (preparing.py). The engine's own methods
may be called from any thread, except for :meth:`Engine.gather` and :meth:`Engine.later`.

Greenlets switch to the engine's loop (the hub) and nowhere else. The hub resumes one greenlet after the other, until each waits
for a call or has ended, and only then chooses the next turn. What is batched therefore depends on the order of arrival alone, not
on a clock.
"""

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import ceil
from typing import Any, TypeVar

from greenlet import getcurrent, greenlet

from mlx_diffgemma.backends import rows_in_pass
from mlx_diffgemma.pipeline import DiffusionGemma
from mlx_diffgemma.scheduler.device import Call, Counters, Device, SharedBackend
from mlx_diffgemma.scheduler.jobs import Busy, Cancelled, Finished, Job, Prepared, Request, Stopping, Task, TimedOut
from mlx_diffgemma.scheduler.limits import Limits
from mlx_diffgemma.scheduler.policy import displaced, next_admitted, next_pass
from mlx_diffgemma.scheduler.preparing import Preparation
from mlx_diffgemma.steps import Steps

T = TypeVar("T")

#: How many recent requests are averaged to estimate when a refused client should try again.
RECENT = 16

_log = logging.getLogger(__name__)


class Engine:
    """Runs requests on a model.

    Args:
        limits: how many requests there may be, and what goes into one pass.

    Attributes:
        model: the same model over the shared backend, for use inside submitted work. Outside of it, its calls raise RuntimeError.
        stopping: the engine takes no new requests, and requests in progress should end where they can.
        counters: what the engine has done so far.
    """

    def __init__(self, model: DiffusionGemma, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.max_batch = rows_in_pass(model.backend, self.limits.batch, self.limits.max_batch)
        self.model = DiffusionGemma(model.checkpoint, SharedBackend(model.backend, self._ask))
        self.model.tokenizer = model.tokenizer
        self.stopping = False
        self.counters = Counters()
        self._device = Device(model.backend, self.counters)
        self._thread: threading.Thread | None = None
        self._hub: greenlet | None = None
        # This lock guards the jobs, the errors that end them, and `stopping`.
        self._changed = threading.Condition()
        self._preparation = Preparation(self, self._changed)
        self._waiting: list[Job] = []  # prepared, and not begun
        self._running: list[Job] = []  # including idle jobs
        # Only the engine's thread uses what follows.
        # Tasks to resume, each with a result or an error:
        self._ready: deque[tuple[Task, tuple[Any, ...], BaseException | None]] = deque()
        self._pending: list[Task] = []  # tasks that wait for a call
        self._served: dict[str, int] = {}  # for each client with jobs, the turn in which it was last served
        self._turns = itertools.count()
        self._durations: deque[float] = deque(maxlen=RECENT)

    @property
    def waiting(self) -> int:
        """How many requests have not begun."""
        return len(self._waiting) + len(self._preparation.jobs)

    @property
    def running(self) -> int:
        """How many requests are in progress. Idle jobs do not count."""
        return sum(not job.idle for job in self._running)

    def start(self) -> None:
        """Start the engine's threads. Raises RuntimeError if it was started or stopped before."""
        with self._changed:
            if self._thread is not None or self.stopping:
                raise RuntimeError("an engine starts once")
            self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
            self._thread.start()
            self._preparation.start()

    def stop(self, timeout: float | None = None) -> None:
        """Take no more requests, drop those in the queue, and return when those in progress have ended.

        After ``timeout`` seconds, Stopping ends the remaining requests before their next call; None waits without a limit. May be
        called again, for example with a shorter timeout, and before the start.
        """
        with self._changed:
            self.stopping = True
            self._changed.notify_all()
        if self._thread is None:
            self._preparation.drain()
            self._sweep()
            return
        self._thread.join(timeout)
        for job in list(self._running):
            self.end(job, Stopping())
        self._thread.join()

    def submit(
        self,
        work: Callable[..., Iterator[T]],
        deliver: Callable[[T | Prepared | Finished], None],
        *,
        client: str,
        prepare: Steps[Any] | None = None,
        seconds: float | None = None,
    ) -> Job:
        """Put a request into the queue. Arguments as in :class:`~mlx_diffgemma.scheduler.jobs.Request`.

        If the queue is full, the request of a client with few requests takes the place of one of the client with the most, which
        then ends with Busy.

        Raises Busy, Stopping.
        """
        with self._changed:
            if self.stopping:
                raise Stopping
            waiting = [job for job in (*self._waiting, *self._preparation.jobs) if job.ended is None]
            running = [job for job in self._running if not job.idle]
            if len(waiting) + len(running) >= self.limits.parallel + self.limits.queue:
                place = displaced(waiting, running, client)
                self.counters.refused += 1
                if place is None:
                    raise self._busy()
                self.end(waiting[place], self._busy())
            job = Job(self, Request(work, deliver, client, prepare, seconds))
            if prepare is None:
                self._waiting.append(job)
            else:
                self._preparation.add(job)
            self._changed.notify_all()
        return job

    def _busy(self) -> Busy:
        recent = list(self._durations)
        return Busy(max(1, ceil(sum(recent) / max(1, len(recent)))))

    def end(self, job: Job, error: BaseException) -> None:
        """Make ``error`` end a job before its next step or call, unless another error already does. Any thread may call this."""
        with self._changed:
            job.ended = job.ended or error
            self._changed.notify_all()

    def prepared(self, job: Job, value: Any, error: BaseException | None) -> None:
        """Put a prepared job into the queue, or finish it if its preparation failed. The preparation's thread calls this."""
        if error is None:
            try:
                job.request.deliver(Prepared(value))
            except Exception as broken:  # noqa: BLE001 (the job ends, and other jobs are not affected)
                _log.exception("an event could not be delivered, and its request is cancelled")
                error = broken
        with self._changed:
            if error is None and not self.stopping:
                job.prepared = (value,)
                self._waiting.append(job)
                self._changed.notify_all()
                return
        self._finish(job, Finished(job.ended or error or Stopping()))

    def gather(self, iterators: Sequence[Iterator[T]]) -> Iterator[tuple[int, T]]:
        """Run iterators side by side, so that their calls can share a pass. Only for use inside work.

        Each iterator continues when its event has been taken. If one raises, the others are closed and its error is raised.
        Closing this iterator closes all of them.

        Yields:
            The index of an iterator and its event, in order of arrival.
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
            # Only the owner can wait for the tasks, and the garbage collector may run this in any other greenlet.
            while getcurrent() is owner and not all(task.dead for task in tasks):
                self._sleep(owner)
            errors.clear()  # their tracebacks keep this frame alive, and what the tasks held

    def later(self, work: Callable[[], object]) -> None:
        """Run ``work`` when no request waits for the device. Only for use inside work. It may use the model.

        At most ``parallel`` of these idle jobs wait, the newest ones. They are dropped when the engine stops.
        """
        if self.stopping:
            return
        idle = [job for job in self._running if job.idle and job.ended is None]
        if len(idle) >= self.limits.parallel:
            self.end(idle[0], Cancelled())
        request = Request(partial(_done, work), _drop, client=self._current().job.client, idle=True)
        self._start_job(Job(self, request))

    # In a task:

    def _current(self) -> Task:
        task = getcurrent()
        if not isinstance(task, Task) or task.job.engine is not self:
            raise RuntimeError("an engine's model works only inside work that was submitted to that engine")
        return task

    def _ask(self, call: Call) -> Sequence[Any]:
        """Suspend the task until a call has been performed. Returns its results."""
        task = self._current()
        task.check()
        task.call = call
        self._pending.append(task)
        answers: Sequence[Any] = self._switch()
        task.check()
        return answers

    def _sleep(self, task: Task) -> None:
        """Suspend the task, which is the current one, until another wakes it."""
        task.asleep = True
        self._switch()

    def _switch(self) -> Any:
        assert self._hub is not None
        return self._hub.switch()

    def _work(self, job: Job) -> Finished:
        """Runs in the first task of a job."""
        try:
            self._current().check()
            events = job.request.work(*job.prepared)
            with _closed(events):
                for event in events:
                    self._deliver(job, event)
        except BaseException as error:  # noqa: BLE001 (any error ends this job and no other)
            return Finished(error)
        return Finished()

    def _deliver(self, job: Job, event: Any) -> None:
        try:
            job.request.deliver(event)
        except BaseException as error:
            _log.exception("an event could not be delivered, and its request is cancelled")
            self.end(job, error)  # so that closing its work computes nothing
            raise

    # In a task or in the hub:

    def _begin(self, run: Callable[[], Any], job: Job, owner: Task | None = None) -> Task:
        assert self._hub is not None
        task = Task(run, self._hub, job, owner)
        job.tasks.append(task)
        self._ready.append((task, (), None))
        return task

    def _wake(self, task: Task) -> None:
        if task.asleep:
            task.asleep = False
            self._ready.append((task, (), None))

    def _interrupt(self, task: Task, error: BaseException) -> None:
        """Raise ``error`` where the task is suspended, and again at every later call of the backend."""
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
                    self._resume_all()  # then sweep again, so that no call of a job that must end is performed
                elif self._pending:
                    self._perform()
        except BaseException as error:  # noqa: BLE001 (a bug of ours must not leave clients waiting forever)
            _log.exception("the engine has failed")
            self._abandon(error)

    def _wait(self) -> bool:
        """Wait until there are jobs. Returns False if there are none and the engine is stopping."""
        with self._changed:
            while not (self._running or self._waiting or self.stopping):
                self._changed.wait()
            return bool(self._running or self._waiting)

    def _sweep(self) -> None:
        """Begin the jobs for which there is room, and end the jobs that must end."""
        now = time.monotonic()
        with self._changed:
            for job in (*self._waiting, *self._running):
                if job.is_late(now) and job.request.seconds is not None:
                    self.end(job, TimedOut(job.request.seconds))
                if job.client not in self._served:
                    self._served[job.client] = next(self._turns)
            if self.stopping:
                for job in (*self._waiting, *(job for job in self._running if job.idle)):
                    self.end(job, Stopping())
            dropped = [job for job in self._waiting if job.ended is not None]
            self._waiting = [job for job in self._waiting if job.ended is None]
            while self._waiting and self.running < self.limits.parallel:
                requests = [job for job in self._running if not job.idle]
                self._start_job(self._waiting.pop(next_admitted(self._waiting, requests, self._served)), now)
        for job in dropped:
            self._finish(job, Finished(job.ended))
        for job in self._running:
            if job.ended is not None:
                self._interrupt(job.tasks[0], job.ended)

    def _start_job(self, job: Job, now: float | None = None) -> None:
        with self._changed:
            self._running.append(job)
        if not job.idle:
            self.counters.admitted += 1
        job.admitted = time.monotonic() if now is None else now
        self._begin(partial(self._work, job), job)

    def _perform(self) -> None:
        """Perform one pass of the model, for the tasks whose turn it is."""
        calls = [(task.job, task.call) for task in self._pending if task.call is not None]
        tasks = [self._pending[index] for index in next_pass(calls, self._served, max_batch=self.max_batch)]
        performed, turn = [task.call for task in tasks if task.call is not None], next(self._turns)
        for task in tasks:
            task.call = None
            self._pending.remove(task)
            if not task.job.idle:
                self._served[task.job.client] = turn
        try:
            answers = self._device.perform(performed)
        except Exception as error:  # noqa: BLE001 (from the framework, such as out of memory: the requests report it)
            self._ready.extend((task, (), error) for task in tasks)
        else:
            self._ready.extend((task, (answer,), None) for task, answer in zip(tasks, answers, strict=True))

    def _resume_all(self) -> None:
        while self._ready:
            self._resume(*self._ready.popleft())

    def _resume(self, task: Task, answer: tuple[Any, ...], error: BaseException | None) -> None:
        outcome = task.switch(*answer) if error is None else task.throw(error)
        if not task.dead:
            return
        job = task.job
        job.tasks.remove(task)
        task.ended = None  # its traceback refers to the task
        if task.owner is None:
            job.outcome = outcome
            for left in job.tasks:  # from a gather that was never closed
                self._interrupt(left, Cancelled())
        else:
            self._wake(task.owner)
        if not job.tasks:
            self._finish(job, Finished(job.ended) if job.ended is not None else job.outcome)

    def _finish(self, job: Job, finished: Finished) -> None:
        with self._changed:
            if job in self._running:
                self._running.remove(job)
                if not job.idle:
                    self._durations.append(time.monotonic() - job.admitted)
            if all(other.client != job.client for other in (*self._running, *self._waiting)):
                self._served.pop(job.client, None)
            if not job.idle:
                self._count(finished.error)
        job.outcome = Finished()  # an error's traceback refers to the job, and to the keys and values that it held
        if job.ended is not None:
            job.ended.__traceback__ = None
        try:
            job.request.deliver(finished)
        except Exception:  # noqa: BLE001 (the job has ended, and other jobs are not affected)
            _log.exception("the end of a request could not be delivered")

    def _count(self, error: BaseException | None) -> None:
        match error:
            case None:
                self.counters.finished += 1
            case TimedOut():
                self.counters.timed_out += 1
            case Cancelled() | Stopping():
                self.counters.cancelled += 1
            case Busy():  # counted as refused when it lost its place
                pass
            case _:
                self.counters.failed += 1

    def _abandon(self, error: BaseException) -> None:
        """End all jobs with ``error``, whatever their state."""
        with self._changed:
            self.stopping = True
            self._changed.notify_all()
            jobs = [*self._waiting, *self._running]
            self._waiting = []
        for job in jobs:
            self.end(job, error)
        while tasks := [task for job in jobs for task in job.tasks if not task.dead]:
            for task in tasks:  # raises the error where the task is suspended; a gathering task dies after its tasks
                task.switch()
        for job in jobs:
            self._finish(job, Finished(error))


@contextmanager
def _closed(iterator: Iterator[Any]) -> Iterator[None]:
    """Close an iterator at the end, if it has a close method."""
    try:
        yield
    finally:
        close = getattr(iterator, "close", None)
        if close is not None:
            close()


def _done(work: Callable[[], object]) -> Iterator[None]:
    """Run work without events, in the form of a request's work."""
    work()
    return iter(())


def _drop(event: Finished) -> None:
    """Receives the end of idle work, which no client waits for."""
    if event.error is not None and not isinstance(event.error, (Cancelled, Stopping)):
        _log.error("idle work has failed", exc_info=event.error)

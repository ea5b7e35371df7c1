"""One device, many requests.

A request is plain library code, a loop over events of :meth:`~mlx_diffgemma.pipeline.DiffusionGemma.stream` or the like. The
engine runs each in a greenlet, over a backend whose calls suspend it: with every request stopped at its next call, the policy
(policy.py) decides which to perform. All of that happens in one thread, because a framework's arrays and streams belong to the
thread that made them; the engine's own methods, but for :meth:`Engine.gather` and :meth:`Engine.later`, may be called from any.

Greenlets switch to the engine's loop (the hub) and nowhere else; it resumes one after the other until each waits for a call or
has ended, and only then picks the next turn. So what is batched depends on the order of arrival alone, and on no clock.
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
from mlx_diffgemma.scheduler.jobs import Busy, Cancelled, Finished, Job, Request, Stopping, Task, TimedOut
from mlx_diffgemma.scheduler.limits import Limits
from mlx_diffgemma.scheduler.policy import next_admitted, next_pass

T = TypeVar("T")

#: Requests whose durations are averaged to say when to come back.
RECENT = 16

_log = logging.getLogger(__name__)


class Engine:
    """Runs requests on a model.

    Args:
        limits: how many requests there may be, and what goes into one pass.

    Attributes:
        model: the same model over the shared backend, for the work that is submitted; elsewhere its calls raise RuntimeError.
        stopping: no new requests are taken, and those in progress may end themselves where they can.
        counters: see there.
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
        # Under the lock, whose owner may notify: the jobs, what ends them, and `stopping`.
        self._changed = threading.Condition()
        self._waiting: list[Job] = []
        self._running: list[Job] = []  # idle ones too
        # The engine's thread alone:
        self._ready: deque[tuple[Task, tuple[Any, ...], BaseException | None]] = (
            deque()
        )  # to be resumed, with an answer or an error
        self._pending: list[Task] = []  # that wait for a call
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
        return sum(not job.idle for job in self._running)

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
        """Put a request into the queue; arguments as in :class:`~mlx_diffgemma.scheduler.jobs.Request`. Raises Busy, Stopping."""
        with self._changed:
            if self.stopping:
                raise Stopping
            if len(self._waiting) + self.running >= self.limits.parallel + self.limits.queue:
                self.counters.refused += 1
                recent = list(self._durations)
                raise Busy(max(1, ceil(sum(recent) / max(1, len(recent)))))
            job = Job(self, Request(work, deliver, client, seconds))
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

    def later(self, work: Callable[[], object]) -> None:
        """Do something when no request waits for anything; inside work. It may use the model.

        No more than ``parallel`` of these wait, the newest ones; at the stop they are dropped.
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
            raise RuntimeError("an engine's model computes inside work that was submitted to it")
        return task

    def _ask(self, call: Call) -> Sequence[Any]:
        """The answers to a call, when it has been performed."""
        task = self._current()
        task.check()
        task.call = call
        self._pending.append(task)
        answers: Sequence[Any] = self._switch()
        task.check()
        return answers

    def _sleep(self, task: Task) -> None:
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
            events = job.request.work()
            with _closed(events):
                for event in events:
                    self._deliver(job, event)
        except BaseException as error:  # noqa: BLE001 (whatever it is, it ends this job and no other)
            return Finished(error)
        return Finished()

    def _deliver(self, job: Job, event: Any) -> None:
        try:
            job.request.deliver(event)
        except BaseException as error:
            _log.exception("an event could not be delivered, and its request is cancelled")
            self.end(job, error)  # so that its work computes nothing while it is closed
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
                    self._perform()
        except BaseException as error:  # noqa: BLE001 (a mistake of ours must not leave clients waiting for ever)
            _log.exception("the engine has failed")
            self._abandon(error)

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
                if job.request.seconds is not None and now - job.submitted >= job.request.seconds:
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
        """One pass over the model, for those whose turn it is."""
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
        except Exception as error:  # noqa: BLE001 (of a framework, as for lack of memory: the requests tell it)
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
                if not job.idle:
                    self._durations.append(time.monotonic() - job.admitted)
            if all(other.client != job.client for other in (*self._running, *self._waiting)):
                self._served.pop(job.client, None)
        job.outcome = Finished()  # an error's traceback leads to the job, and to the keys and values that it held
        if job.ended is not None:
            job.ended.__traceback__ = None
        if not job.idle:
            self._count(finished.error)
        try:
            job.request.deliver(finished)
        except Exception:  # noqa: BLE001 (the job is over, and the others are not concerned)
            _log.exception("the end of a request could not be delivered")

    def _count(self, error: BaseException | None) -> None:
        match error:
            case None:
                self.counters.finished += 1
            case TimedOut():
                self.counters.timed_out += 1
            case Cancelled() | Stopping():
                self.counters.cancelled += 1
            case _:
                self.counters.failed += 1

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


def _done(work: Callable[[], object]) -> Iterator[None]:
    """A request's work that has no events."""
    work()
    return iter(())


def _drop(event: Finished) -> None:
    """Takes the end of idle work, which nobody waits for."""
    if event.error is not None and not isinstance(event.error, (Cancelled, Stopping)):
        _log.error("idle work has failed", exc_info=event.error)

"""Prepares requests in a thread of its own, beside the model: a step of one client's request after a step of another's.

A client's text may be long, and reading it takes time: a chat template is rendered, and tokenizing a megabyte takes about a
second. No request waits for more steps than there are other clients. A step that takes long, such as decoding a large image,
counts as several: other clients then take several steps before the next one. A request that was cancelled or is late takes no
further step.
"""

import itertools
import threading
import time
from time import thread_time
from typing import Any, Protocol

from mlx_diffgemma.scheduler.jobs import Job, Stopping, TimedOut

#: Seconds of this thread's work that count as one step more.
STEP_SECONDS = 0.05


class Owner(Protocol):
    """The part of the engine that the preparation uses."""

    @property
    def stopping(self) -> bool: ...

    def prepared(self, job: Job, value: Any, error: BaseException | None) -> None: ...


class Preparation:
    """The requests that are being prepared, and the thread that prepares them.

    Args:
        changed: the engine's lock, notified when a job is added or must end.
    """

    def __init__(self, owner: Owner, changed: threading.Condition) -> None:
        self.jobs: list[Job] = []  # guarded by the lock
        self._owner, self._changed = owner, changed
        self._served: dict[str, int] = {}  # for each client with jobs here, the turn in which it was last served
        self._turns = itertools.count()

    def add(self, job: Job) -> None:
        """Add a job. The caller holds the lock."""
        self.jobs.append(job)
        self._served.setdefault(job.client, next(self._turns))

    def start(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._run, name="preparation", daemon=True).start()

    def drain(self) -> None:
        """End all jobs, if the thread was never started."""
        while job := self._next():
            self._step(job)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self.jobs:
                    if self._owner.stopping:
                        return
                    self._changed.wait()
            if job := self._next():
                self._step(job)

    def _next(self) -> Job | None:
        """The job whose turn it is. A job that must end comes first."""
        now = time.monotonic()
        with self._changed:
            for job in self.jobs:
                if job.is_late(now) and job.request.seconds is not None:
                    job.ended = job.ended or TimedOut(job.request.seconds)
                if self._owner.stopping:
                    job.ended = job.ended or Stopping()
            return min(self.jobs, key=lambda job: (job.ended is None, self._served[job.client]), default=None)

    def _step(self, job: Job) -> None:
        steps = job.request.prepare
        assert steps is not None
        value, error, started = None, job.ended, thread_time()
        if error is None:
            try:
                next(steps)
            except StopIteration as end:
                value = end.value
            except BaseException as failure:  # noqa: BLE001 (any error ends this job and no other)
                error = failure
            else:
                with self._changed:
                    self._count(job, started)
                return
        steps.close()
        with self._changed:
            self.jobs.remove(job)
            self._count(job, started)
            if all(other.client != job.client for other in self.jobs):
                del self._served[job.client]
        self._owner.prepared(job, value, error)

    def _count(self, job: Job, started: float) -> None:
        """Count a step of a job's client, which began at this time of the thread."""
        self._served[job.client] = next(self._turns) + int((thread_time() - started) / STEP_SECONDS)

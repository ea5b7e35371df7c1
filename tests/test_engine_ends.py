"""How requests end: normally, cancelled, out of time, by an error, by a stop; and how choices are gathered."""

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlx_diffgemma import InputError
from mlx_diffgemma.backends import Piece, Row
from mlx_diffgemma.scheduler import engine as engine_module
from mlx_diffgemma.scheduler.jobs import Cancelled, Finished, Stopping, TimedOut
from support.fake import FakeCache, V
from support.scheduling import SECONDS, WIDTH, Bench, Inbox

ONE = np.ones(1, np.int32)


def test_a_cancelled_job_takes_no_further_step(bench: Callable[..., Bench]) -> None:
    it = bench()
    asked, cancelled = threading.Event(), threading.Event()

    def wait(call: int) -> None:
        if call == 4:
            asked.set()
            assert cancelled.wait(SECONDS)

    it.during = wait
    refused: list[str] = []

    def work() -> Iterator[int]:
        try:
            yield from it.steps(1, count=100)
        finally:
            backend = it.engine.model.backend
            for call in (lambda: backend.encode([Piece(ONE, backend.new_cache())]), lambda: next(it.steps(5))):
                try:
                    call()
                except Cancelled:
                    refused.append(threading.current_thread().name)

    inbox = Inbox()
    job = it.engine.submit(work, inbox, client="a")
    it.engine.start()
    assert asked.wait(SECONDS)
    job.cancel()
    cancelled.set()
    assert isinstance(inbox.error, Cancelled)
    assert it.calls == [("encode", [1]), *[("denoise", [1])] * 3], "calls after the job was cancelled"
    assert refused == ["engine"] * 2, "calls of the backend while the work was closed"
    assert inbox.events[:-1] == [0, 1], "an event of a step that nobody waits for"
    assert it.closed == [1, 5]
    assert (it.engine.counters.cancelled, it.engine.running) == (1, 0)


def test_a_cancelled_job_falls_out_of_its_batch(bench: Callable[..., Bench]) -> None:
    it = bench()
    jobs = [it.submit(k) for k in (1, 2, 3)]
    it.during = lambda call: jobs[1][0].cancel() if call == 3 else None  # in the second step
    it.engine.start()
    errors = [inbox.error for _, inbox in jobs]
    assert it.passes == [[1, 2, 3], [1, 2, 3], [1, 3], [1, 3]]
    assert (errors[0], type(errors[1]), errors[2]) == (None, Cancelled, None)


def test_a_job_may_be_cancelled_while_others_are_told(bench: Callable[..., Bench]) -> None:
    """The receiver of the second job's events cancels the first, which is already waiting for its next step."""
    it, inbox = bench(), Inbox()
    job, first = it.submit(1)

    def deliver(event: Any) -> None:
        inbox(event)
        if event == 1:
            job.cancel()

    it.engine.submit(lambda: it.steps(2), deliver, client="a")
    it.engine.start()
    assert (type(first.error), inbox.error) == (Cancelled, None)
    assert it.passes == [[1, 2], [1, 2], [2], [2]]


@pytest.mark.parametrize("ending", ["cancel", "error"])
def test_a_job_gives_its_caches_back_as_it_ends(bench: Callable[..., Bench], ending: str) -> None:
    """Keys and values are large, so neither the garbage collector nor a kept job object may delay their release."""
    it, inboxes = bench(), [Inbox(), Inbox()]

    def failing(token: int) -> Iterator[int]:
        own = it.engine.model.backend.new_cache()
        assert isinstance(own, FakeCache)
        it.caches.append(weakref.ref(own))
        yield from it.steps(token, count=2)
        if ending == "error":
            raise InputError("no more")
        yield from it.steps(token, count=50)

    def gathering() -> Iterator[tuple[int, int]]:
        return it.engine.gather([it.steps(2, count=50), failing(3)])

    gc.collect()
    gc.disable()
    try:
        jobs = [
            it.engine.submit(work, inbox, client="a")
            for work, inbox in zip((lambda: failing(1), gathering), inboxes, strict=True)
        ]
        if ending == "cancel":
            it.during = lambda call: [job.cancel() for job in jobs] if call == 3 else None
        it.engine.start()
        assert [type(inbox.error) for inbox in inboxes] == [{"cancel": Cancelled, "error": InputError}[ending]] * 2
        assert it.submit(5)[1].error is None  # the engine has finished the other jobs
        for inbox in inboxes:
            inbox.events.clear()  # the receiver owns the error's traceback, which holds references
        it.backend.asked.clear()
        assert len(it.caches) == 6
        assert [cache() for cache in it.caches[:5]] == [None] * 5
    finally:
        gc.enable()


def test_jobs_cancelled_before_they_begin_never_do(bench: Callable[..., Bench]) -> None:
    it = bench(parallel=1)
    jobs = [it.submit(k) for k in (1, 2)]
    for job, _ in jobs:
        job.cancel()
    it.engine.start()
    assert all(isinstance(inbox.error, Cancelled) for _, inbox in jobs)
    assert (it.calls, it.closed, it.engine.counters.admitted) == ([], [], 0)


def test_time_limits(bench: Callable[..., Bench], clock: SimpleNamespace) -> None:
    it = bench(parallel=2, max_batch=1)

    def pass_time(_: int) -> None:
        clock.now += 1.0

    it.during = pass_time
    _, first = it.submit(1, "a", count=9)
    _, running = it.submit(2, "b", count=9, seconds=4.5)
    _, waiting = it.submit(3, "c", count=9, seconds=2.5)
    _, patient = it.submit(4, "d", count=1, seconds=60.0)
    it.engine.start()
    assert (first.error, patient.error) == (None, None)
    assert isinstance(running.error, TimedOut)
    assert isinstance(waiting.error, TimedOut)
    assert "longer than 2.5 s" in str(waiting.error)
    asked = [tokens[0] for _, tokens in it.calls]
    assert asked[:5] == [1, 2, 1, 2, 1], "5 s have passed when the limit of 4.5 is seen"
    assert (asked.count(2), asked.count(3)) == (2, 0)
    assert (it.engine.counters.timed_out, it.engine.counters.admitted) == (2, 3)
    assert 2 in it.closed


def test_errors_end_their_own_job(bench: Callable[..., Bench]) -> None:
    it, inboxes = bench(), [Inbox() for _ in range(4)]

    def no_iterator() -> Iterator[int]:
        raise InputError("no events")

    def broken() -> Iterator[int]:
        yield from it.steps(1, count=1)
        raise SystemExit("not this process")

    def foreign_tokens() -> Iterator[int]:
        yield from it.steps(2, count=1)
        it.engine.model.backend.denoise([Row(np.full(WIDTH, V, np.int32), FakeCache([2]), 1.0)])

    def swallowing() -> Iterator[int]:
        for _ in range(2):
            try:
                yield from it.steps(3, count=100)
            except Cancelled:
                yield -1

    for work, inbox in zip((no_iterator, broken, foreign_tokens, swallowing), inboxes, strict=True):
        job = it.engine.submit(work, inbox, client="a")
    _, good = it.submit(4)
    it.during = lambda call: job.cancel() if call == 12 else None
    it.engine.start()
    assert [type(inbox.error) for inbox in inboxes] == [InputError, SystemExit, InputError, Cancelled]
    assert "vocabulary" in str(inboxes[2].error)
    assert good.error is None
    assert it.engine.counters.failed == 3


def test_an_error_of_a_pass_goes_to_all_in_it(bench: Callable[..., Bench]) -> None:
    it = bench(max_batch=2)

    def fail(_: int) -> None:
        if it.passes[2:] and it.calls[-1][1] == [1, 2]:
            raise MemoryError("no more memory")

    it.during = fail
    inboxes = [it.submit(k)[1] for k in (1, 2, 3, 4)]
    it.engine.start()
    assert [type(inbox.error) for inbox in inboxes] == [MemoryError, MemoryError, type(None), type(None)]
    assert it.submit(5)[1].error is None, "the engine goes on"


def test_broken_delivery(bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture) -> None:
    it, seen = bench(), []

    def deliver(event: Any) -> None:
        seen.append(event)
        raise ConnectionError("the client has left")

    def work() -> Iterator[int]:
        try:
            yield from it.steps(1)
        finally:
            next(it.steps(5))

    it.engine.submit(work, deliver, client="a")
    _, other = it.submit(2)
    it.engine.start()
    assert other.error is None
    it.engine.stop()
    assert seen[0] == 0
    assert isinstance(seen[1].error, ConnectionError)
    assert len(seen) == 2
    assert it.passes == [[1, 2], [2], [2], [2]]
    assert it.closed == [1, 5, 2]
    assert [record.getMessage() for record in caplog.records] == [
        "an event could not be delivered, and its request is cancelled",
        "the end of a request could not be delivered",
    ]


def test_a_stop_lets_what_is_running_end(bench: Callable[..., Bench]) -> None:
    it, inbox = bench(parallel=1), Inbox()
    asked, stopping = threading.Event(), threading.Event()

    def work() -> Iterator[int]:
        for step in it.steps(1, count=100):
            yield step
            if it.engine.stopping:
                yield -1
                return

    def wait(call: int) -> None:
        if call == 3:
            asked.set()
            assert stopping.wait(SECONDS)

    it.during = wait
    it.engine.submit(work, inbox, client="a")
    _, waiting = it.submit(2)
    it.engine.start()
    assert asked.wait(SECONDS)
    stopper = threading.Thread(target=it.engine.stop)
    stopper.start()
    while not it.engine.stopping:
        stopper.join(0.001)
    with pytest.raises(Stopping):
        it.submit(3)
    stopping.set()
    stopper.join(SECONDS)
    assert not stopper.is_alive()
    assert inbox.events == [0, 1, -1, Finished()]
    assert isinstance(waiting.error, Stopping)
    it.engine.stop()


def test_a_stop_ends_what_is_left_after_its_time(bench: Callable[..., Bench]) -> None:
    it, asked = bench(), threading.Event()
    it.during = lambda call: asked.set() if call == 5 else None
    _, inbox = it.submit(1, count=10**9)
    it.engine.start()
    assert asked.wait(SECONDS)
    it.engine.stop(0.01)
    assert isinstance(inbox.events[-1].error, Stopping)
    assert it.closed == [1]
    assert not [thread for thread in threading.enumerate() if thread.name == "engine"]


def test_a_stop_before_the_start(bench: Callable[..., Bench]) -> None:
    it = bench()
    _, inbox = it.submit(1)
    it.engine.stop(0)
    it.engine.stop()
    assert isinstance(inbox.events[-1].error, Stopping)
    with pytest.raises(RuntimeError, match="starts once"):
        it.engine.start()


@pytest.mark.parametrize("failing", ["policy", "backend"])
def test_a_failing_engine_leaves_nobody_waiting(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """A bug in our choice of a pass, and an error that ends the thread in the middle of a pass."""
    it, gathered = bench(parallel=2), Inbox()
    error: BaseException = ZeroDivisionError() if failing == "policy" else SystemExit()
    next_pass = engine_module.next_pass

    def fail(*arguments: Any, **options: Any) -> list[int]:
        if len(it.calls) == 3:
            raise error
        return next_pass(*arguments, **options)

    def exit(call: int) -> None:
        if call == 3:
            raise error

    if failing == "policy":
        monkeypatch.setattr(engine_module, "next_pass", fail)
    else:
        it.during = exit

    def work() -> Iterator[Any]:
        it.engine.later(it.idle(9))
        return it.engine.gather([it.steps(1), it.steps(2)])

    it.engine.submit(work, gathered, client="a")
    inboxes = [gathered, it.submit(3)[1], it.submit(4)[1]]
    it.engine.start()
    assert [inbox.error for inbox in inboxes] == [error] * 3
    it.engine.stop()
    assert sorted(it.closed) == [1, 2, 3, 9]
    with pytest.raises(Stopping):
        it.submit(5)


def test_gathered_choices_are_one_batch(bench: Callable[..., Bench]) -> None:
    it, inbox = bench(), Inbox()
    it.engine.submit(lambda: it.engine.gather([it.steps(k, count=4 + (k == 2)) for k in (1, 2, 3)]), inbox, client="a")
    it.engine.start()
    assert inbox.error is None
    assert inbox.events[:-1] == [(index, step) for step in range(4) for index in range(3)] + [(1, 4)]
    assert it.passes == [[1, 2, 3]] * 4 + [[2]]


def test_gather_within_gather_and_calls_between(bench: Callable[..., Bench]) -> None:
    it, inbox = bench(), Inbox()

    def work() -> Iterator[Any]:
        inner = it.engine.gather([it.steps(1, count=2), it.steps(2, count=2)])
        for event in it.engine.gather([inner, iter("xy")]):
            it.engine.model.backend.encode([Piece(9 * ONE, FakeCache())])
            yield event

    it.engine.submit(work, inbox, client="a")
    it.engine.start()
    assert inbox.error is None
    assert [event for index, event in inbox.events[:-1] if index == 0] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert [event for index, event in inbox.events[:-1] if index == 1] == ["x", "y"]


@pytest.mark.parametrize("ending", ["error", "break", "kept", "cancel"])
def test_gather_closes_what_it_leaves(bench: Callable[..., Bench], ending: str) -> None:
    it, inbox, kept = bench(), Inbox(), []

    def failing() -> Iterator[int]:
        yield from it.steps(3, count=2)
        if ending == "error":
            raise InputError("one of them")
        yield from it.steps(4, count=50)

    def work() -> Iterator[Any]:
        events = it.engine.gather([it.steps(1, count=50), it.steps(2, count=50), failing()])
        kept.append(events if ending == "kept" else None)
        for count, event in enumerate(events):
            yield event
            if count == 5:
                if ending == "cancel":
                    job.cancel()
                elif ending != "error":
                    break
        del events
        yield it.closed.copy()

    job = it.engine.submit(work, inbox, client="a")
    it.engine.start()
    error = inbox.error
    assert type(error) is {"error": InputError, "cancel": Cancelled}.get(ending, type(None))
    assert it.passes == [[1, 2, 3]] * 2, "steps after the gathering was closed"
    assert {1, 2, 3} <= set(it.closed)
    if ending == "break":
        assert {1, 2} <= set(inbox.events[-2]), "closed before the work went on"
    assert it.engine.running == 0

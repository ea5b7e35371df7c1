"""How requests are prepared: beside the model, in turns, and not for a client that left; and who gives way in a full queue."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from time import thread_time
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_diffgemma import InputError
from mlx_diffgemma.scheduler import preparing
from mlx_diffgemma.scheduler.jobs import Busy, Cancelled, Finished, Job, Prepared, Stopping, TimedOut
from mlx_diffgemma.scheduler.policy import displaced
from mlx_diffgemma.steps import Steps, run
from support.scheduling import SECONDS, Bench, Inbox


class Prompts:
    """Requests whose preparation takes steps, and what was done in which order."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.done = bench, []  # type: ignore[var-annotated]
        self.during: Callable[[int], object] = lambda token: None

    def steps(self, token: int, count: int) -> Steps[int]:
        for _ in range(count):
            self.done.append(token)
            self.during(token)
            yield
        return 10 * token

    def submit(self, token: int, client: str, count: int, **options: Any) -> tuple[Job, Inbox]:
        inbox = Inbox()

        def work(prepared: int) -> Iterator[int]:
            assert prepared == 10 * token
            return self.bench.steps(token, count=2)

        return self.bench.engine.submit(work, inbox, client=client, prepare=self.steps(token, count), **options), inbox


def test_work_receives_what_was_prepared(bench: Callable[..., Bench]) -> None:
    it = bench()
    prompts, threads = Prompts(it), []
    prompts.during = lambda _: threads.append(threading.current_thread().name)
    _, inbox = prompts.submit(1, "a", 3)
    it.engine.start()
    assert inbox.error is None
    assert inbox.events == [Prepared(10), 0, 1, Finished()]
    assert threads == ["preparation"] * 3
    assert run(prompts.steps(2, 4)) == 20
    assert it.engine.counters.finished == 1


def test_preparation_goes_round_the_clients(bench: Callable[..., Bench]) -> None:
    """A client with long prompts delays another's prompt by one step, not by a prompt."""
    it = bench(parallel=8)
    prompts = Prompts(it)
    inboxes = [prompts.submit(token, "crowd", 20)[1] for token in (1, 2, 3)] + [prompts.submit(4, "other", 3)[1]]
    it.engine.start()
    assert [inbox.error for inbox in inboxes] == [None] * 4
    assert prompts.done[:6] == [1, 4, 1, 4, 1, 4]
    assert Counter(prompts.done) == {1: 20, 2: 20, 3: 20, 4: 3}


def test_a_step_that_takes_long_counts_as_several(bench: Callable[..., Bench]) -> None:
    """A client whose steps decode large images delays all steps of another's text by one of its own."""
    it = bench(parallel=8)
    prompts = Prompts(it)

    def work(token: int) -> None:
        until = thread_time() + (0.5 if token == 1 else 0)
        while thread_time() < until:
            pass

    prompts.during = work
    inboxes = [prompts.submit(1, "a", 3)[1], prompts.submit(2, "b", 4)[1]]
    it.engine.start()
    assert [inbox.error for inbox in inboxes] == [None] * 2
    assert prompts.done == [1, 2, 2, 2, 2, 1, 1]


def test_the_model_goes_on_meanwhile(bench: Callable[..., Bench]) -> None:
    """A step of a preparation that takes long holds up no pass of the model."""
    it = bench()
    prompts, entered, finished = Prompts(it), threading.Event(), threading.Event()
    prompts.during = lambda _: (entered.set(), finished.wait(SECONDS))
    it.engine.start()
    _, slow = prompts.submit(1, "a", 1)
    assert entered.wait(SECONDS)
    _, other = it.submit(2, "b", count=5)
    assert other.error is None
    assert slow.events == []
    finished.set()
    assert slow.error is None


def test_who_has_left_is_not_prepared_further(bench: Callable[..., Bench]) -> None:
    it = bench()
    prompts, third, cancelled = Prompts(it), threading.Event(), threading.Event()
    prompts.during = lambda _: len(prompts.done) == 3 and (third.set(), cancelled.wait(SECONDS))
    job, inbox = prompts.submit(1, "a", 100)
    it.engine.start()
    assert third.wait(SECONDS)
    job.cancel()
    cancelled.set()
    assert isinstance(inbox.error, Cancelled)
    assert prompts.done == [1] * 3
    assert inbox.events[:-1] == []
    assert (it.calls, it.engine.waiting, it.engine.counters.cancelled) == ([], 0, 1)


def test_a_preparation_has_the_request_s_time_limit(
    bench: Callable[..., Bench], clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "time", SimpleNamespace(monotonic=lambda: clock.now))
    it = bench()
    prompts = Prompts(it)

    def pass_time(_: int) -> None:
        clock.now += 1.0

    prompts.during = pass_time
    _, late = prompts.submit(1, "a", 100, seconds=5.0)
    it.engine.start()
    assert isinstance(late.error, TimedOut)
    assert len(prompts.done) == 5
    assert it.engine.counters.timed_out == 1


def test_an_error_ends_its_own_request(bench: Callable[..., Bench]) -> None:
    it = bench()
    prompts = Prompts(it)

    def refuse(token: int) -> None:
        if token == 1:
            raise InputError("no")

    prompts.during = refuse
    _, wrong = prompts.submit(1, "a", 5)
    _, right = prompts.submit(2, "a", 5)
    it.engine.start()
    assert isinstance(wrong.error, InputError)
    assert right.error is None


@pytest.mark.parametrize("started", [False, True])
def test_a_stop_ends_preparations(bench: Callable[..., Bench], started: bool) -> None:
    it = bench()
    prompts, entered, stopping = Prompts(it), threading.Event(), threading.Event()
    prompts.during = lambda _: (entered.set(), stopping.wait(SECONDS))
    inboxes = [prompts.submit(token, "a", 3)[1] for token in (1, 2)]
    if started:
        it.engine.start()
        assert entered.wait(SECONDS)
    stop = threading.Thread(target=it.engine.stop, args=(0,))
    stop.start()
    while not it.engine.stopping:
        pass
    stopping.set()
    assert [type(inbox.error) for inbox in inboxes] == [Stopping] * 2
    stop.join(SECONDS)
    assert it.calls == []


def test_a_full_queue_has_room_for_a_client_with_few(bench: Callable[..., Bench]) -> None:
    """One client with many requests cannot keep another out: its newest waiting one gives way."""
    it = bench(parallel=1, queue=4)
    crowd = [it.submit(token, "crowd", count=1)[1] for token in range(1, 6)]
    _, other = it.submit(9, "other", count=1)
    with pytest.raises(Busy):
        it.submit(6, "crowd")
    it.engine.start()
    assert isinstance(crowd[4].error, Busy)
    assert [inbox.error for inbox in (*crowd[:4], other)] == [None] * 5
    assert (it.engine.counters.refused, it.engine.counters.failed, it.engine.counters.finished) == (2, 0, 5)


CLIENT = st.sampled_from("abc")


@given(st.lists(CLIENT, max_size=8), st.lists(CLIENT, max_size=4), CLIENT)
def test_who_gives_way(waiting: list[str], running: list[str], client: str) -> None:
    made = lambda names: [SimpleNamespace(client=name, idle=False) for name in names]  # noqa: E731
    place = displaced(made(waiting), made(running), client)
    counts = Counter(waiting + running)
    if place is None:
        assert all(counts[name] <= counts[client] + 1 for name in waiting)
    else:
        loser = waiting[place]
        assert counts[loser] > counts[client] + 1
        assert counts[loser] == max(counts[name] for name in waiting)
        assert loser not in waiting[place + 1 :]

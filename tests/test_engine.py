"""The engine: whose turn it is, what goes into one pass, and how requests end. All but the last part needs no framework.

Jobs that are submitted before the start arrive in that order. What must happen at a certain call is done by the backend in that
call; no test depends on how fast anything is.
"""

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from checkpoints import make_chat_checkpoint
from conftest import assert_close
from fake import MODEL
from numpy.typing import NDArray

from mlx_diffgemma import DiffusionGemma, Generation, InputError, load, noise
from mlx_diffgemma.backends import PREFILL_CHUNK, Backend, Denoised
from mlx_diffgemma.sampler import Draft
from mlx_diffgemma.server import engine as engine_module
from mlx_diffgemma.server.engine import Busy, Cancelled, Engine, Finished, Job, Stopping, TimedOut
from mlx_diffgemma.sudoku import fresh_puzzle

WIDTH, SECONDS = 4, 20.0  # of a canvas; to wait for what must come


class Rows:
    """A cache: the positions of each row."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows[0])

    def joined(self, others: list["Rows"]) -> "Rows":
        return Rows([list(row) for part in (self, *others) for row in part.rows])


@dataclass
class Scripted:
    """Answers each row of a canvas with the row itself, and keeps the first token of each row that it was asked about.

    Attributes:
        calls: the kind of each call, and those tokens.
        joined: the caches of passes of several.
        during: called with the number of the call, from 1, within it.
    """

    during: Callable[[int], None] = lambda _: None
    calls: list[tuple[str, list[int]]] = field(default_factory=list)
    joined: list[Rows] = field(default_factory=list)
    config = MODEL
    name, device, dtype = "scripted", "none", "float32"
    logits = peak_memory = None

    def new_cache(self, batch_size: int = 1) -> Rows:
        return Rows([[] for _ in range(batch_size)])

    def encode(self, tokens: NDArray[np.int32], cache: Rows, *, logits: bool = False) -> NDArray[np.float32] | None:
        self._note("encode", tokens)
        for row, new in zip(cache.rows, tokens.tolist(), strict=True):
            row.extend(new)
        return np.full((1, 1), len(cache), np.float32) if logits else None

    def score(self, tokens: NDArray[np.int32], cache: Rows) -> NDArray[np.float32]:
        self.encode(tokens, cache)
        return tokens.astype(np.float32)

    def denoise(self, canvas: NDArray[np.int32], cache: Rows, **given: Any) -> Denoised:
        self._note("denoise", canvas)
        assert [row[0] for row in cache.rows] == canvas[:, 0].tolist(), "rows of a canvas with rows of another cache"
        if len(canvas) > 1 and all(cache is not known for known in self.joined):
            self.joined.append(cache)
        before = given["self_conditioning"]
        if before is not None:
            before = np.concatenate(before) if isinstance(before, list) else before
            assert before.tolist() == canvas.tolist(), "self-conditioning of other rows"
        return Denoised(canvas, canvas, np.zeros(canvas.shape, np.float32), canvas.copy())

    def _note(self, kind: str, tokens: NDArray[np.int32]) -> None:
        self.calls.append((kind, tokens[:, 0].tolist()))
        self.during(len(self.calls))

    @property
    def steps(self) -> list[list[int]]:
        return [tokens for kind, tokens in self.calls if kind == "denoise"]


@dataclass
class Inbox:
    """Takes what is delivered."""

    events: list[Any] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def __call__(self, event: Any) -> None:
        assert not self.ended.is_set(), "delivered after the end"
        self.events.append(event)
        if isinstance(event, Finished):
            self.ended.set()

    @property
    def error(self) -> BaseException | None:
        assert self.ended.wait(SECONDS), "no end was delivered"
        return self.events[-1].error


class Bench:
    """An engine on a scripted backend, and jobs that take steps on it."""

    def __init__(self, **options: Any) -> None:
        self.backend = Scripted()
        model = DiffusionGemma(None, self.backend)  # type: ignore[arg-type]
        model.tokenizer = None  # type: ignore[assignment]
        self.engine = Engine(model, **options)
        self.closed: list[int] = []  # the requests whose `finally` ran, in the engine's thread
        self.caches: list[weakref.ref[Rows]] = []

    def steps(self, token: int, count: int = 4, length: int = 3, cooling: float = 0.0) -> Iterator[int]:
        """One encode of ``length`` tokens, and ``count`` steps; ``token`` tells the request."""
        backend = self.engine.model.backend
        cache, canvas = backend.new_cache(1), np.full((1, WIDTH), token, np.int32)
        self.caches.append(weakref.ref(cache))
        conditioning = None
        try:
            backend.encode(np.full((1, length), token, np.int32), cache)
            for step in range(count):
                result = backend.denoise(canvas, cache, temperature=1 - cooling * step, self_conditioning=conditioning)
                assert result.argmax.tolist() == canvas.tolist()
                conditioning = result.self_conditioning
                yield step
        finally:
            if threading.current_thread().name == "engine":
                self.closed.append(token)

    def submit(self, token: int, client: str = "a", *, seconds: float | None = None, **options: Any) -> tuple[Job, Inbox]:
        inbox = Inbox()
        return self.engine.submit(lambda: self.steps(token, **options), inbox, client=client, seconds=seconds), inbox


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    made = []

    def make(**options: Any) -> Bench:
        made.append(Bench(**options))
        return made[-1]

    yield make
    for each in made:
        each.engine.stop(0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The engine's clock, which stands still but for ``clock.now``."""
    made = SimpleNamespace(now=100.0)
    monkeypatch.setattr(engine_module, "time", SimpleNamespace(monotonic=lambda: made.now))
    return made


def test_events_in_order_and_one_end(bench: Callable[..., Bench]) -> None:
    it = bench()
    _, inbox = it.submit(7, count=3)
    it.engine.start()
    assert inbox.error is None
    assert inbox.events == [0, 1, 2, Finished()]
    assert it.backend.calls == [("encode", [7]), *[("denoise", [7])] * 3]
    counters = it.engine.counters
    assert (counters.admitted, counters.finished, counters.encode_calls, counters.encoded_tokens) == (1, 1, 1, 3)
    assert (counters.denoising_passes, counters.denoising_rows) == (3, 3)
    assert counters.device_seconds > 0


@pytest.mark.parametrize("others", [1, 3])
def test_no_client_waits_for_more_turns_than_there_are_others(bench: Callable[..., Bench], others: int) -> None:
    it = bench(parallel=8)
    crowd = [
        it.submit(10 * client + k, f"crowd{client}", length=10 * client + k) for client in range(1, 1 + others) for k in range(9)
    ]
    _, inbox = it.submit(1, "single", count=8, length=1)
    it.engine.start()
    assert inbox.error is None
    assert [job.error for _, job in crowd] == [None] * len(crowd)
    turns = [turn for turn, (_, tokens) in enumerate(it.backend.calls) if tokens == [1]]
    waits = np.diff([-1, *turns]) - 1
    print(f"one request among {len(crowd)}: waits of {waits.tolist()} turns before its calls")
    assert len(turns) == 9
    assert waits.max() == others


def test_admission_is_fair(bench: Callable[..., Bench]) -> None:
    it = bench(parallel=1)
    inboxes = [it.submit(10 + k, "crowd", count=1)[1] for k in range(5)] + [it.submit(1, "late", count=1)[1]]
    it.engine.start()
    assert [inbox.error for inbox in inboxes] == [None] * 6
    assert [tokens for kind, tokens in it.backend.calls if kind == "encode"] == [[10], [1], [11], [12], [13], [14]]


def test_a_full_queue_refuses(bench: Callable[..., Bench], clock: SimpleNamespace) -> None:
    it = bench(parallel=2, queue=3)
    inboxes = [it.submit(k, length=k)[1] for k in range(1, 6)]
    with pytest.raises(Busy, match="try again in 1 s") as refused:
        it.submit(6)
    assert (refused.value.retry_after, it.engine.counters.refused, it.engine.waiting) == (1, 1, 5)

    def pass_time(_: int) -> None:
        clock.now += 1.0

    it.backend.during = pass_time
    it.engine.start()
    assert [inbox.error for inbox in inboxes] == [None] * 5
    assert it.engine.counters.admitted == 5
    gate, entered = threading.Event(), threading.Event()
    it.backend.during = lambda _: (entered.set(), gate.wait(SECONDS))  # type: ignore[assignment, func-returns-value]
    more = [it.submit(k, length=k)[1] for k in range(1, 6)]
    assert entered.wait(SECONDS)
    with pytest.raises(Busy) as refused:
        it.submit(6)
    gate.set()
    assert [inbox.error for inbox in more] == [None] * 5
    # Requests took 5 calls of 1 s, most of them in turn with those of another.
    assert 5 <= refused.value.retry_after <= 10, refused.value.retry_after


def test_equal_steps_are_one_pass(bench: Callable[..., Bench]) -> None:
    it = bench(max_batch=3)
    inboxes = [it.submit(k, cooling=0.1)[1] for k in range(1, 5)]
    inboxes += [it.submit(9, length=5, cooling=0.1)[1], it.submit(8, cooling=0.03)[1]]
    it.engine.start()
    assert [inbox.error for inbox in inboxes] == [None] * 6
    assert sorted(map(sorted, it.backend.steps)) == sorted([[1, 2, 3], [4, 8], [9]] + [[1, 2, 3], [4], [8], [9]] * 3)
    assert it.engine.counters.denoising_rows - it.engine.counters.denoising_passes == 2 * 4 + 1
    assert len(it.backend.joined) == 2, "the same caches were joined again"


def test_in_bfloat16_nothing_is_batched() -> None:
    model = DiffusionGemma(None, Scripted())  # type: ignore[arg-type]
    model.tokenizer = None  # type: ignore[assignment]
    assert Engine(model).max_batch == 8
    model.backend.dtype = "bfloat16"
    assert Engine(model).max_batch == 1


def test_a_late_request_joins_a_batch(bench: Callable[..., Bench]) -> None:
    it, late = bench(), []

    def arrive(call: int) -> None:
        if call == 3:
            late.append(it.submit(2, "b", count=3)[1])

    it.backend.during = arrive
    _, inbox = it.submit(1, count=8)
    it.engine.start()
    assert inbox.error is None
    assert late[0].error is None
    assert it.backend.steps == [[1], [1], [1], [1], [2], [1, 2], [1, 2], [1], [1]]


def test_a_cancelled_job_takes_no_further_step(bench: Callable[..., Bench]) -> None:
    it = bench()
    asked, cancelled = threading.Event(), threading.Event()

    def wait(call: int) -> None:
        if call == 4:
            asked.set()
            assert cancelled.wait(SECONDS)

    it.backend.during = wait
    refused: list[str] = []

    def work() -> Iterator[int]:
        try:
            yield from it.steps(1, count=100)
        finally:
            backend = it.engine.model.backend
            for call in (lambda: backend.encode(np.ones((1, 1), np.int32), backend.new_cache(1)), lambda: next(it.steps(5))):
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
    assert it.backend.calls == [("encode", [1]), *[("denoise", [1])] * 3], "calls after the job was cancelled"
    assert refused == ["engine"] * 2, "calls of the backend while the work was closed"
    assert inbox.events[:-1] == [0, 1], "an event of a step that nobody waits for"
    assert it.closed == [1, 5]
    assert (it.engine.counters.cancelled, it.engine.running) == (1, 0)


def test_a_cancelled_job_falls_out_of_its_batch(bench: Callable[..., Bench]) -> None:
    it = bench()
    jobs = [it.submit(k) for k in (1, 2, 3)]
    it.backend.during = lambda call: jobs[1][0].cancel() if call == 5 else None  # in the second step
    it.engine.start()
    errors = [inbox.error for _, inbox in jobs]
    assert it.backend.steps == [[1, 2, 3], [1, 2, 3], [1, 3], [1, 3]]
    assert (errors[0], type(errors[1]), errors[2]) == (None, Cancelled, None)
    assert len(it.backend.joined) == 2


def test_a_job_may_be_cancelled_while_others_are_told(bench: Callable[..., Bench]) -> None:
    """By what takes the events of the second, when the first waits for its next step already."""
    it, inbox = bench(), Inbox()
    job, first = it.submit(1)

    def deliver(event: Any) -> None:
        inbox(event)
        if event == 1:
            job.cancel()

    it.engine.submit(lambda: it.steps(2), deliver, client="a")
    it.engine.start()
    assert (type(first.error), inbox.error) == (Cancelled, None)
    assert it.backend.steps == [[1, 2], [1, 2], [2], [2]]


@pytest.mark.parametrize("ending", ["cancel", "error"])
def test_a_job_gives_its_caches_back_as_it_ends(bench: Callable[..., Bench], ending: str) -> None:
    """Keys and values are large: they must not wait for the garbage collector, nor for those who keep jobs."""
    it, inboxes = bench(), [Inbox(), Inbox()]

    def failing(token: int) -> Iterator[int]:
        own = it.engine.model.backend.new_cache(1)
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
            it.backend.during = lambda call: [job.cancel() for job in jobs] if call == 5 else None  # type: ignore[return-value]
        it.engine.start()
        assert [type(inbox.error) for inbox in inboxes] == [{"cancel": Cancelled, "error": InputError}[ending]] * 2
        assert it.submit(5)[1].error is None  # the engine is past all of that
        for inbox in inboxes:
            inbox.events.clear()  # an error's traceback is its receiver's
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
    assert (it.backend.calls, it.closed, it.engine.counters.admitted) == ([], [], 0)


def test_time_limits(bench: Callable[..., Bench], clock: SimpleNamespace) -> None:
    it = bench(parallel=2)

    def pass_time(_: int) -> None:
        clock.now += 1.0

    it.backend.during = pass_time
    _, first = it.submit(1, "a", count=9, length=1)
    _, running = it.submit(2, "b", count=9, length=2, seconds=4.5)
    _, waiting = it.submit(3, "c", count=9, length=3, seconds=2.5)
    _, patient = it.submit(4, "d", count=1, length=4, seconds=60.0)
    it.engine.start()
    assert (first.error, patient.error) == (None, None)
    assert isinstance(running.error, TimedOut)
    assert isinstance(waiting.error, TimedOut)
    assert "longer than 2.5 s" in str(waiting.error)
    asked = [tokens[0] for _, tokens in it.backend.calls]
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
        it.engine.model.backend.denoise(np.full((1, WIDTH), MODEL.vocab_size, np.int32), Rows([[1] * 3]), temperature=1.0)

    def swallowing() -> Iterator[int]:
        for _ in range(2):
            try:
                yield from it.steps(3, count=100)
            except Cancelled:
                yield -1

    for work, inbox in zip((no_iterator, broken, foreign_tokens, swallowing), inboxes, strict=True):
        job = it.engine.submit(work, inbox, client="a")
    _, good = it.submit(4)
    it.backend.during = lambda call: job.cancel() if call == 12 else None
    it.engine.start()
    assert [type(inbox.error) for inbox in inboxes] == [InputError, SystemExit, InputError, Cancelled]
    assert "vocabulary" in str(inboxes[2].error)
    assert good.error is None
    assert it.engine.counters.failed == 3


def test_an_error_of_a_pass_goes_to_all_in_it(bench: Callable[..., Bench]) -> None:
    it = bench()

    def fail(_: int) -> None:
        if it.backend.steps[2:] and it.backend.calls[-1][1] == [1, 2]:
            raise MemoryError("no more memory")

    it.backend.during = fail
    inboxes = [it.submit(k)[1] for k in (1, 2)] + [it.submit(3, length=5)[1]]
    it.engine.start()
    assert [type(inbox.error) for inbox in inboxes] == [MemoryError, MemoryError, type(None)]
    assert it.submit(4)[1].error is None, "the engine goes on"


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
    assert it.backend.steps == [[1, 2], [2], [2], [2]]
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

    it.backend.during = wait
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
    it.backend.during = lambda call: asked.set() if call == 5 else None
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


def test_a_failing_engine_leaves_nobody_waiting(bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    it, gathered = bench(parallel=2), Inbox()
    picked = it.engine._picked

    def fail() -> Any:
        if len(it.backend.calls) == 6:
            raise ZeroDivisionError
        return picked()

    monkeypatch.setattr(it.engine, "_picked", fail)
    it.engine.submit(lambda: it.engine.gather([it.steps(1), it.steps(2)]), gathered, client="a")
    inboxes = [gathered, it.submit(3)[1], it.submit(4)[1]]
    it.engine.start()
    assert [type(inbox.error) for inbox in inboxes] == [ZeroDivisionError] * 3
    assert sorted(it.closed) == [1, 2, 3]
    with pytest.raises(Stopping):
        it.submit(5)


def test_gathered_choices_are_one_batch(bench: Callable[..., Bench]) -> None:
    it, inbox = bench(), Inbox()
    it.engine.submit(lambda: it.engine.gather([it.steps(k, count=4 + (k == 2)) for k in (1, 2, 3)]), inbox, client="a")
    it.engine.start()
    assert inbox.error is None
    assert inbox.events[:-1] == [(index, step) for step in range(4) for index in range(3)] + [(1, 4)]
    assert it.backend.steps == [[1, 2, 3]] * 4 + [[2]]


def test_gather_within_gather_and_calls_between(bench: Callable[..., Bench]) -> None:
    it, inbox = bench(), Inbox()

    def work() -> Iterator[Any]:
        inner = it.engine.gather([it.steps(1, count=2), it.steps(2, count=2)])
        for event in it.engine.gather([inner, iter("xy")]):
            it.engine.model.backend.encode(np.full((1, 1), 9, np.int32), Rows([[]]))
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
    assert it.backend.steps == [[1, 2, 3]] * 2, "steps after the gathering was closed"
    assert {1, 2, 3} <= set(it.closed)
    if ending == "break":
        assert {1, 2} <= set(inbox.events[-2]), "closed before the work went on"
    assert it.engine.running == 0


def test_the_model_computes_in_work_alone(bench: Callable[..., Bench]) -> None:
    it, inbox, other = bench(), Inbox(), bench()
    with pytest.raises(RuntimeError, match="inside work"):
        next(it.steps(1))
    it.engine.submit(lambda: other.steps(1), inbox, client="a")
    it.engine.start()
    assert isinstance(inbox.error, RuntimeError)


def test_a_long_prompt_takes_a_turn_a_chunk(bench: Callable[..., Bench]) -> None:
    it, inbox = bench(), Inbox()
    length = 2 * PREFILL_CHUNK + 5

    def work() -> Iterator[Any]:
        backend, tokens = it.engine.model.backend, np.ones((1, length), np.int32)
        cache = backend.new_cache(1)
        yield backend.encode(tokens, cache, logits=True)
        tokens[0] = np.arange(length) % MODEL.vocab_size
        assert_close(backend.score(tokens, cache), tokens, 0, "scores of chunks")

    it.engine.submit(work, inbox, client="a")
    _, other = it.submit(7, "b", count=2)
    it.engine.start()
    assert (inbox.error, other.error) == (None, None)
    assert inbox.events[0] == [[length]]
    assert [tokens[0] for _, tokens in it.backend.calls][:5] == [1, 7, 1, 7, 1]
    assert it.engine.counters.encode_calls == 7
    assert it.engine.counters.encoded_tokens == 2 * length + 3


# Both backends.


@pytest.mark.parametrize("before", [0, 1, 21])
def test_joined_rows_are_each_by_itself(backend: Callable[..., Backend], backend_name: str, before: int) -> None:
    """``before`` positions are cached; 21 are more than a window."""
    it = backend(backend_name, "odd_sizes")
    rows, length, random = (1, 2, 1), it.config.canvas_length, np.random.default_rng(before)
    caches = [it.new_cache(count) for count in rows]
    if before:
        for count, cache in zip(rows, caches, strict=True):
            it.encode(random.integers(0, it.config.vocab_size, (count, before), np.int32), cache)
    joined = caches[0].joined(caches[1:])
    assert len(joined) == before
    ends = np.cumsum(rows).tolist()
    spans = [slice(end - count, end) for count, end in zip(rows, ends, strict=True)]
    believed: list[Any] = [None] * len(rows)
    together: Any = None
    for step in range(1, 4):
        canvas = random.integers(0, it.config.vocab_size, (sum(rows), length), np.int32)
        keys = noise.sampling_keys(range(sum(rows)), 0, step)
        frozen = np.where(random.random(canvas.shape) < 0.2, canvas, -1).astype(np.int32)
        if step == 3:  # after a step together, each goes on with its rows of it
            believed = [together.self_conditioning[span] for span in spans]
        alone = [
            it.denoise(
                canvas[span], cache, temperature=0.7, noise_keys=keys[span], frozen=frozen[span], self_conditioning=before_it
            )
            for span, cache, before_it in zip(spans, caches, believed, strict=True)
        ]
        together = it.denoise(
            canvas, joined, temperature=0.7, noise_keys=keys, frozen=frozen, self_conditioning=None if step == 1 else believed
        )
        believed = [result.self_conditioning for result in alone]
        for span, result in zip(spans, alone, strict=True):
            assert (together.argmax[span] == result.argmax).all()
            assert (together.sampled[span] == result.sampled).all()
            assert_close(together.entropy[span], result.entropy, 1e-4, f"entropy of rows {span} in step {step}")
    it.encode(together.argmax, joined)
    assert [len(cache) for cache in caches] == [before] * 3, "they do not go on with it"
    for span, cache in zip(spans, caches, strict=True):
        it.encode(together.argmax[span], cache)
    expected = np.concatenate([it.encode(canvas[span], cache, logits=True) for span, cache in zip(spans, caches, strict=True)])
    assert_close(it.encode(canvas, joined, logits=True), expected, 1e-3, "logits after more tokens")


@pytest.fixture(scope="session")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_checkpoint(tmp_path_factory.mktemp("engine"))


def test_requests_at_once_write_what_they_write_alone(chat: Path, backend_name: str) -> None:
    model = load(chat, backend=backend_name, device="cpu", dtype="float32")
    engine = Engine(model, parallel=9)
    prompts = [list(range(300 + 7 * k, 300 + 7 * k + n)) for k, n in enumerate((4, 4, 4, 3, 1, 4, 4))]
    options: list[dict[str, Any]] = [{"seed": seed} for seed in range(7)]
    options[3] |= {"mode": "causal", "max_new_tokens": 6}
    options[1] |= {"logprobs": True}
    for given in (options[0], options[2]):
        given["frozen"] = np.array([310, -1, 311], np.int32)
    expected = [model.generate(prompt, **given) for prompt, given in zip(prompts, options, strict=True)]
    template = {"template": "ab<hole:1-3>cd", "raw": True, "prompt": [301, 302]}
    fillings = [model.infill(**template, seed=seed) for seed in (7, 8)]
    leaving, inboxes, jobs = (5, 6), [Inbox() for _ in range(9)], []

    def deliver(index: int) -> Callable[[Any], None]:
        def take(event: Any) -> None:
            inboxes[index](event)
            if index in leaving and isinstance(event, Draft) and event.step == index - 3:
                jobs[index].cancel()

        return take

    for index, (prompt, given) in enumerate(zip(prompts, options, strict=True)):
        work = partial(engine.model.stream, prompt, **given)
        jobs.append(engine.submit(work, deliver(index), client=f"client {index % 3}"))

    def fill(seed: int) -> Iterator[Any]:
        yield engine.model.infill(**template, seed=seed)

    for seed in (7, 8):
        engine.submit(partial(fill, seed), deliver(seed), client="client 0")
    engine.start()
    errors = [type(inbox.error) for inbox in inboxes]
    engine.stop()
    assert errors == [Cancelled if index in leaving else type(None) for index in range(9)]
    for index, (inbox, alone) in enumerate(zip(inboxes, expected, strict=False)):
        if index not in leaving:
            result = inbox.events[-2]
            assert isinstance(result, Generation)
            assert (result.tokens, result.text, result.statistics.denoising_steps) == (
                alone.tokens, alone.text, alone.statistics.denoising_steps,
            )  # fmt: skip
            if alone.logprobs is not None:
                assert_close(result.logprobs, alone.logprobs, 1e-4, "log-probabilities")
    assert [len(inboxes[index].events) for index in leaving] == [3, 4], "drafts up to the cancelling one, and the end"
    for index, filling in zip((7, 8), fillings, strict=True):
        infilled = inboxes[index].events[0]
        assert infilled.text == filling.text
        assert [each.candidate.lengths for each in infilled.fillings] == [each.candidate.lengths for each in filling.fillings]
        assert_close(
            [each.candidate.score for each in infilled.fillings],
            [each.candidate.score for each in filling.fillings],
            1e-4,
            "scores",
        )
    counters = engine.counters
    print(f"{counters.denoising_rows} rows in {counters.denoising_passes} passes")
    assert counters.denoising_rows > 1.5 * counters.denoising_passes, "hardly anything was batched"
    assert (counters.finished, counters.cancelled, counters.failed) == (7, 2, 0)


def test_choices_of_a_request_solve_a_puzzle_as_alone(backend_name: str) -> None:
    """The trained model. All the choices of both requests are one batch, as long as none has finished."""
    model = load("sudoku", backend=backend_name, device="cpu", dtype="float32")
    engine, inboxes = Engine(model), [Inbox(), Inbox()]
    puzzles, seeds = [fresh_puzzle(6, 20, seed) for seed in (1, 2)], range(3)
    expected = [[model.generate(puzzle.clues.text(), seed=seed) for seed in seeds] for puzzle in puzzles]

    def choices(text: str) -> Iterator[tuple[int, Any]]:
        return engine.gather([engine.model.stream(text, seed=seed) for seed in seeds])

    for puzzle, inbox in zip(puzzles, inboxes, strict=True):
        engine.submit(partial(choices, puzzle.clues.text()), inbox, client="a")
    engine.start()
    assert [inbox.error for inbox in inboxes] == [None, None]
    engine.stop()
    for inbox, alone in zip(inboxes, expected, strict=True):
        results = dict(event for event in inbox.events[:-1] if isinstance(event[1], Generation))
        assert [results[index].tokens for index in range(3)] == [each.tokens for each in alone]
    steps = [sum(each.statistics.denoising_steps) for alone in expected for each in alone]
    print(f"{engine.counters.denoising_rows} rows in {engine.counters.denoising_passes} passes; alone, steps of {steps}")
    assert (engine.counters.denoising_rows, engine.counters.denoising_passes) == (sum(steps), max(steps))

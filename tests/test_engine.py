"""The engine: whose turn it is, and what one pass holds; on the real backends and on a fake one.

Jobs submitted before the start arrive in that order. To make something happen at a certain call, the fake backend does it within
that call. No test depends on speed.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlx_diffgemma import DiffusionGemma, Draft, Generation, InputError, infill, load, noise
from mlx_diffgemma.backends import Backend, Piece, Row
from mlx_diffgemma.demo.sudoku import fresh_puzzle
from mlx_diffgemma.prefix_cache import read
from mlx_diffgemma.prompts import CHUNK, PieceRule, PromptTokens, chunks
from mlx_diffgemma.scheduler.engine import Engine
from mlx_diffgemma.scheduler.jobs import Busy, Cancelled, Finished
from mlx_diffgemma.scheduler.limits import Limits
from support.checkpoints import make_chat_checkpoint
from support.comparing import assert_close
from support.fake import FakeBackend, L, V
from support.scheduling import SECONDS, Bench, Inbox


def test_events_in_order_and_one_end(bench: Callable[..., Bench]) -> None:
    it = bench()
    _, inbox = it.submit(7, count=3)
    it.engine.start()
    assert inbox.error is None
    assert inbox.events == [0, 1, 2, Finished()]
    assert it.calls == [("encode", [7]), *[("denoise", [7])] * 3]
    counters = it.engine.counters
    assert (counters.admitted, counters.finished, counters.encode_calls, counters.encoded_tokens) == (1, 1, 1, 3)
    assert (counters.denoising_passes, counters.denoising_rows) == (3, 3)
    assert counters.device_seconds > 0


@pytest.mark.parametrize("others", [1, 3])
def test_no_client_waits_for_more_turns_than_there_are_others(bench: Callable[..., Bench], others: int) -> None:
    it = bench(parallel=8, max_batch=1)
    crowd = [it.submit(10 * client + k, f"crowd{client}") for client in range(1, 1 + others) for k in range(9)]
    _, inbox = it.submit(1, "single", count=8)
    it.engine.start()
    assert inbox.error is None
    assert [job.error for _, job in crowd] == [None] * len(crowd)
    turns = [turn for turn, (_, tokens) in enumerate(it.calls) if tokens == [1]]
    waits = np.diff([-1, *turns]) - 1
    print(f"one request among {len(crowd)}: waits of {waits.tolist()} turns before its calls")
    assert len(turns) == 9
    assert waits.max() == others


def test_admission_is_fair(bench: Callable[..., Bench]) -> None:
    it = bench(parallel=1)
    inboxes = [it.submit(10 + k, "crowd", count=1)[1] for k in range(5)] + [it.submit(1, "late", count=1)[1]]
    it.engine.start()
    assert [inbox.error for inbox in inboxes] == [None] * 6
    assert [tokens for method, tokens in it.calls if method == "encode"] == [[10], [1], [11], [12], [13], [14]]


def test_a_full_queue_refuses(bench: Callable[..., Bench], clock: SimpleNamespace) -> None:
    it = bench(parallel=2, queue=3, max_batch=1)
    inboxes = [it.submit(k)[1] for k in range(1, 6)]
    with pytest.raises(Busy, match="try again in 1 s") as refused:
        it.submit(6)
    assert (refused.value.retry_after, it.engine.counters.refused, it.engine.waiting) == (1, 1, 5)

    def pass_time(_: int) -> None:
        clock.now += 1.0

    it.during = pass_time
    it.engine.start()
    assert [inbox.error for inbox in inboxes] == [None] * 5
    assert it.engine.counters.admitted == 5
    gate, entered = threading.Event(), threading.Event()
    it.during = lambda _: (entered.set(), gate.wait(SECONDS))
    more = [it.submit(k)[1] for k in range(1, 6)]
    assert entered.wait(SECONDS)
    with pytest.raises(Busy) as refused:
        it.submit(6)
    gate.set()
    assert [inbox.error for inbox in more] == [None] * 5
    # A request takes 5 calls of 1 s, most of them in turn with another request's.
    assert 5 <= refused.value.retry_after <= 10, refused.value.retry_after


def test_any_rows_and_any_pieces_go_into_one_pass(bench: Callable[..., Bench]) -> None:
    """Lengths and temperatures may differ. A pass takes as many as there is room for."""
    it = bench(max_batch=3)
    inboxes = [it.submit(k, length=k, width=1 + k, cooling=0.1 * (k % 3))[1] for k in range(1, 6)]
    it.engine.start()
    assert [inbox.error for inbox in inboxes] == [None] * 5
    assert it.calls[:2] == [("encode", [1, 2, 3]), ("encode", [4, 5])]
    in_turn = [1, 2, 3, 4, 5] * 4
    assert it.passes == [in_turn[start : start + 3] for start in range(0, 20, 3)]
    first, *_, last = (asked.row for asked in it.backend.asked if asked.canvas[0] == 2)
    assert (len(first.canvas), first.temperature, round(last.temperature, 6)) == (3, 1.0, 0.4)
    counters = it.engine.counters
    assert (counters.encode_calls, counters.encoded_tokens) == (2, 1 + 2 + 3 + 4 + 5)
    assert (counters.denoising_passes, counters.denoising_rows) == (7, 20)


@pytest.mark.parametrize(
    ("exact_rows", "batch", "several"), [(True, "exact", True), (False, "exact", False), (False, "fast", True)]
)
def test_what_is_not_exact_is_batched_when_asked_for(
    bench: Callable[..., Bench], exact_rows: bool, batch: str, several: bool
) -> None:
    it = bench(exact_rows=exact_rows, batch=batch)
    inboxes = [it.submit(k, count=2)[1] for k in (1, 2)]
    it.engine.start()
    assert [inbox.error for inbox in inboxes] == [None] * 2
    together = [[1, 2]] if several else [[1], [2]]
    assert it.calls == [("encode", each) for each in together] + [("denoise", each) for each in together] * 2
    assert it.engine.max_batch == (8 if several else 1)


def test_batches_of_an_unknown_kind() -> None:
    model = DiffusionGemma(None, FakeBackend())  # type: ignore[arg-type]
    model.tokenizer = None  # type: ignore[assignment]
    with pytest.raises(InputError, match="unknown batch 'quick'; known are exact and fast"):
        Engine(model, Limits(batch="quick"))


def test_a_late_request_joins_a_batch(bench: Callable[..., Bench]) -> None:
    it, late = bench(), []

    def arrive(call: int) -> None:
        if call == 3:
            late.append(it.submit(2, "b", count=3)[1])

    it.during = arrive
    _, inbox = it.submit(1, count=8)
    it.engine.start()
    assert inbox.error is None
    assert late[0].error is None
    assert it.passes == [[1], [1], [1], [1, 2], [1, 2], [1, 2], [1], [1]]


def test_the_model_computes_in_work_alone(bench: Callable[..., Bench]) -> None:
    it, inbox, other = bench(), Inbox(), bench()
    with pytest.raises(RuntimeError, match="inside work"):
        next(it.steps(1))
    with pytest.raises(RuntimeError, match="inside work"):
        it.engine.later(it.idle(1))
    it.engine.submit(lambda: other.steps(1), inbox, client="a")
    it.engine.start()
    assert isinstance(inbox.error, RuntimeError)


def test_a_long_prompt_takes_a_turn_a_piece(bench: Callable[..., Bench]) -> None:
    it, inbox = bench(), Inbox()
    it.backend.causal = lambda tokens: tokens
    length = 2 * CHUNK + 5

    def work() -> Iterator[Any]:
        backend, tokens = it.engine.model.backend, np.ones(length, np.int32)
        context = read(backend, PromptTokens(tokens), PieceRule(L))
        yield context
        tokens = np.arange(length, dtype=np.int32) % V
        tokens[::CHUNK] = 1
        scores = [backend.score([Piece(piece, context.cache)])[0] for piece in chunks(tokens)]
        assert_close(np.concatenate(scores), tokens, 0, "scores of pieces")

    it.engine.submit(work, inbox, client="a")
    _, other = it.submit(7, "b", count=2)
    it.engine.start()
    assert (inbox.error, other.error) == (None, None)
    assert (len(inbox.events[0].cache), inbox.events[0].cached_tokens) == (2 * length, 0)
    assert [tokens[0] for _, tokens in it.calls][:5] == [1, 7, 1, 7, 1]
    assert it.engine.counters.encode_calls == 7
    assert it.engine.counters.encoded_tokens == 2 * length + 3


def test_pieces_share_a_pass_up_to_a_piece_of_full_length(bench: Callable[..., Bench]) -> None:
    it = bench()
    lengths = {1: CHUNK - 3, 2: 4, 3: 3, 4: CHUNK}
    inboxes = [it.submit(token, count=1, length=length)[1] for token, length in lengths.items()]
    it.engine.start()
    assert [inbox.error for inbox in inboxes] == [None] * 4
    assert [tokens for method, tokens in it.calls if method == "encode"] == [[1, 3], [2], [4]]


def test_answers_of_every_kind_go_to_who_asked(bench: Callable[..., Bench]) -> None:
    it, inboxes = bench(), [Inbox(), Inbox()]
    it.backend.causal, it.backend.canvas = (lambda tokens: -tokens), (lambda tokens: -2 * tokens)

    def work(lengths: tuple[int, int]) -> Iterator[Any]:
        backend = it.engine.model.backend
        caches = [backend.new_cache() for _ in lengths]
        pieces = [Piece(np.full(n, n, np.int32), cache) for n, cache in zip(lengths, caches, strict=True)]
        rows = [Row(np.full(n, n, np.int32), cache, 1.0) for n, cache in zip(lengths, caches, strict=True)]
        backend.encode(pieces)
        yield [each.argmax.tolist() for each in backend.denoise(rows)]
        yield [each.tolist() for each in backend.score_canvas(rows)]
        yield backend.next_logits(caches).argmax(axis=-1).tolist()
        yield [each.tolist() for each in backend.score(pieces)]

    for lengths, inbox in zip(((1, 2), (3, 4)), inboxes, strict=True):
        it.engine.submit(partial(work, lengths), inbox, client="a")
    it.engine.start()
    assert [inbox.error for inbox in inboxes] == [None] * 2
    for (a, b), inbox in zip(((1, 2), (3, 4)), inboxes, strict=True):
        assert inbox.events[:-1] == [[[a] * a, [b] * b], [[-2 * a] * a, [-2 * b] * b], [a, b], [[-a] * a, [-b] * b]]
    together = [("denoise", [1, 2, 3, 4]), ("score_canvas", [1, 2, 3, 4]), ("next_logits", [1, 2, 3, 4])]
    in_turn = [[1, 3], [2, 4]]  # a turn is one piece of a request
    assert it.calls == [("encode", each) for each in in_turn] + together + [("score", each) for each in in_turn]


# Idle work.


def test_idle_work_waits_until_no_request_does(bench: Callable[..., Bench]) -> None:
    """It also gives way, between two of its own calls, to a request that arrives."""
    it, first, late = bench(parallel=1), Inbox(), []

    def work() -> Iterator[int]:
        for step in it.steps(1, count=3):
            if step == 0:
                it.engine.later(it.idle(9, count=4))
            yield step

    def arrive(call: int) -> None:
        if it.passes[-1:] == [[9]] and it.passes.count([9]) == 2 and not late:
            assert (it.engine.running, it.engine.waiting) == (0, 0), "idle work is no request"
            late.append(it.submit(3, "c", count=2)[1])

    it.during = arrive
    it.engine.submit(work, first, client="a")
    _, second = it.submit(2, "b", count=2)
    it.engine.start()
    assert it.idled.get(timeout=SECONDS) == 9
    assert [inbox.error for inbox in (first, second, *late)] == [None] * 3
    expected = [("encode", 1), *[("denoise", 1)] * 3, ("encode", 2), *[("denoise", 2)] * 2]
    expected += [("encode", 9), *[("denoise", 9)] * 2, ("encode", 3), *[("denoise", 3)] * 2, *[("denoise", 9)] * 2]
    assert it.calls == [(method, [token]) for method, token in expected]
    counters = it.engine.counters
    assert (counters.admitted, counters.finished, counters.encoded_tokens) == (3, 3, 4 * 3)


def test_idle_work_costs_its_client_no_turn(bench: Callable[..., Bench]) -> None:
    """A client with idle work still counts as least recently served, and as having nothing in progress."""
    it, inboxes, late = bench(parallel=2, max_batch=1), [Inbox(), Inbox()], []

    def work(token: int, idle: int) -> Iterator[int]:
        it.engine.later(it.idle(idle, count=2))
        yield from it.steps(token, count=1)

    def arrive(call: int) -> None:
        if it.calls[-1] == ("encode", [8]):
            late.extend(it.submit(token, client)[1] for token, client in ((5, "c"), (4, "b"), (3, "a")))

    it.during = arrive
    for client, tokens, inbox in zip("ab", ((1, 8), (2, 9)), inboxes, strict=True):
        it.engine.submit(partial(work, *tokens), inbox, client=client)
    it.engine.start()
    assert [it.idled.get(timeout=SECONDS) for _ in range(2)] == [8, 9]
    assert [inbox.error for inbox in (*inboxes, *late)] == [None] * 5
    assert [tokens for method, tokens in it.calls if method == "encode"] == [[1], [2], [8], [3], [4], [5], [9]]


def test_idle_work_shares_passes_with_its_like_alone(bench: Callable[..., Bench]) -> None:
    it, inbox = bench(), Inbox()

    def work() -> Iterator[int]:
        for token in (8, 9):
            it.engine.later(it.idle(token, count=2))
        yield from it.steps(1, count=2)

    it.engine.submit(work, inbox, client="a")
    it.engine.start()
    assert {it.idled.get(timeout=SECONDS) for _ in range(2)} == {8, 9}
    assert inbox.error is None
    assert it.calls == [(method, tokens) for tokens in ([1], [8, 9]) for method in ("encode", "denoise", "denoise")]


def test_of_idle_work_the_newest_is_kept(bench: Callable[..., Bench]) -> None:
    it, inbox = bench(parallel=2), Inbox()

    def work() -> Iterator[int]:
        for token in (5, 6, 7, 8):
            it.engine.later(it.idle(token, count=1))
        yield from it.steps(1, count=1)

    it.engine.submit(work, inbox, client="a")
    it.engine.start()
    assert {it.idled.get(timeout=SECONDS) for _ in range(2)} == {7, 8}
    assert inbox.error is None
    assert it.submit(2)[1].error is None
    assert {token for _, tokens in it.calls for token in tokens} == {1, 2, 7, 8}


@pytest.mark.parametrize("begun", [False, True])
def test_idle_work_is_dropped_at_a_stop(bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture, begun: bool) -> None:
    it, inbox = bench(), Inbox()
    asked, stopping = threading.Event(), threading.Event()

    def work() -> Iterator[int]:
        it.engine.later(it.idle(8, count=100))
        for step in it.steps(1, count=2):
            yield step
            if it.engine.stopping:
                it.engine.later(it.idle(9))

    def wait(call: int) -> None:
        if call == (5 if begun else 2):
            asked.set()
            assert stopping.wait(SECONDS)

    it.during = wait
    it.engine.submit(work, inbox, client="a")
    it.engine.start()
    assert asked.wait(SECONDS)
    stopper = threading.Thread(target=it.engine.stop)
    stopper.start()
    while not it.engine.stopping:
        stopper.join(0.001)
    stopping.set()
    stopper.join(SECONDS)
    assert not stopper.is_alive(), "a stop waits for no idle work"
    assert inbox.events == [0, 1, Finished()]
    assert it.calls[3:] == [("encode", [8]), ("denoise", [8])][: 2 * begun]
    assert it.idled.empty()
    assert sorted(it.closed) == [1, 8]
    assert not caplog.records, "that is no failure"


@pytest.mark.parametrize("failing", ["work", "exit", "pass"])
def test_idle_work_that_fails_harms_nobody(bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture, failing: str) -> None:
    it, inbox, late = bench(), Inbox(), []
    errors = {"work": InputError("no more"), "exit": SystemExit("not this process"), "pass": MemoryError("no more memory")}

    def idle() -> None:
        next(it.steps(9))
        if failing != "pass":
            raise errors[failing]

    def work() -> Iterator[int]:
        it.engine.later(idle)
        it.engine.later(it.idle(8, count=3))
        yield from it.steps(1)

    def fail(_: int) -> None:
        if it.calls[-1] == ("denoise", [9, 8]) and not late:
            late.append(it.submit(2)[1])
            if failing == "pass":
                raise errors[failing]

    it.during = fail
    it.engine.submit(work, inbox, client="a")
    it.engine.start()
    assert inbox.error is None
    if failing != "pass":
        assert it.idled.get(timeout=SECONDS) == 8
    assert it.submit(3)[1].error is None
    assert late[0].error is None
    assert (it.engine.counters.finished, it.engine.counters.failed) == (3, 0)
    it.engine.stop()
    logged = [(record.levelno, record.getMessage(), record.exc_info[1]) for record in caplog.records if record.exc_info]
    assert logged == [(logging.ERROR, "idle work has failed", errors[failing])] * (2 if failing == "pass" else 1)


# Both backends.


@pytest.mark.parametrize("seed", range(3))
def test_rows_side_by_side_are_each_by_itself(backend: Callable[..., Backend], backend_name: str, seed: int) -> None:
    """The rows differ in everything; 21 positions exceed a window. If a backend's rows are exact, they agree to the bit."""
    it, random = backend(backend_name, "odd_sizes"), np.random.default_rng(seed)
    tolerance = 0.0 if it.exact_rows else 1e-4
    before, widths = (0, 1, 21, 21), (7, 3, 7, 5)

    def tokens(length: int) -> Any:
        return random.integers(0, it.config.vocab_size, length, np.int32)

    caches = [it.new_cache() for _ in before]
    it.encode([Piece(tokens(count), cache) for count, cache in zip(before, caches, strict=True) if count])
    assert [len(cache) for cache in caches] == list(before)
    believed: list[Any] = [None] * len(before)
    for step in range(1, 4):
        rows = []
        for index, (width, cache) in enumerate(zip(widths, caches, strict=True)):
            canvas = tokens(width)
            frozen = np.where(random.random(width) < 0.2, canvas, -1).astype(np.int32) if index else None
            key = noise.sampling_key(index, 0, step) if index != 1 else None
            rows.append(Row(canvas, cache, 0.5 + 0.1 * index, key, believed[index], frozen))
        alone = [it.denoise([row])[0] for row in rows]
        together = it.denoise(rows)
        for index, (one, other) in enumerate(zip(together, alone, strict=True)):
            assert (one.argmax == other.argmax).all()
            assert (one.sampled == other.sampled).all()
            assert_close(one.entropy, other.entropy, tolerance, f"entropy of row {index} in step {step}")
        believed = [one.self_conditioning for one in (together if step == 2 else alone)]  # step 3 continues from the shared pass
        believed[3] = believed[3] if step == 1 else None  # one row in its first step, the others in later steps
    forks = [cache.fork() for cache in caches]
    it.encode([Piece(one.argmax, fork) for one, fork in zip(together, forks, strict=True)])
    assert [len(cache) for cache in caches] == list(before), "they do not go on with their forks"
    for one, cache in zip(together, caches, strict=True):
        it.encode([Piece(one.argmax, cache)])
    expected = np.concatenate([it.next_logits([cache]) for cache in caches])
    assert_close(it.next_logits(forks), expected, 10 * tolerance, "logits after more tokens")


@pytest.fixture(scope="session")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_checkpoint(tmp_path_factory.mktemp("engine"))


@pytest.mark.parametrize("batch", ["exact", "fast"])
def test_requests_at_once_write_what_they_write_alone(chat: Path, backend_name: str, batch: str) -> None:
    model = load(chat, backend=backend_name, device="cpu", dtype="float32")
    engine = Engine(model, Limits(parallel=9, batch=batch))
    prompts = [list(range(300 + 7 * k, 300 + 7 * k + n)) for k, n in enumerate((4, 40, 4, 3, 1, 9, 4))]
    options: list[dict[str, Any]] = [{"seed": seed} for seed in range(7)]
    options[3] |= {"mode": "causal", "max_new_tokens": 6}
    options[1] |= {"logprobs": True}
    options[4] |= {"canvas_length": 5, "t_max": 0.6}
    for given in (options[0], options[2]):
        given["frozen"] = np.array([310, -1, 311], np.int32)
    expected = [model.generate(prompt, **given) for prompt, given in zip(prompts, options, strict=True)]
    template: dict[str, Any] = {"template": "ab<hole:1-3>cd", "raw": True, "prompt": [301, 302]}
    fillings = [infill(model, **template, seed=seed) for seed in (7, 8)]
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
        yield infill(engine.model, **template, seed=seed, batch=batch)

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
    if batch == "fast" or model.backend.exact_rows:
        assert counters.denoising_rows > 1.5 * counters.denoising_passes, "hardly anything was batched"
    else:
        assert counters.denoising_rows == counters.denoising_passes, "it is not exact"
    assert (counters.finished, counters.cancelled, counters.failed) == (7, 2, 0)


def test_choices_of_a_request_solve_a_puzzle_as_alone(backend_name: str) -> None:
    """With the trained model. All choices of both requests form one batch until the first one finishes."""
    model = load("sudoku", backend=backend_name, device="cpu", dtype="float32")
    engine, inboxes = Engine(model, Limits(batch="fast")), [Inbox(), Inbox()]
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

"""The engine: whose turn it is, and what goes into one pass; on the backends there are, and on one that computes nothing.

Jobs that are submitted before the start arrive in that order. What must happen at a certain call is done by the backend in that
call; no test depends on how fast anything is.
"""

import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlx_diffgemma import DiffusionGemma, Generation, load, noise
from mlx_diffgemma.backends import PREFILL_CHUNK, Backend
from mlx_diffgemma.demo.sudoku import fresh_puzzle
from mlx_diffgemma.sampler import Draft
from mlx_diffgemma.scheduler.engine import Busy, Cancelled, Engine, Finished
from support.checkpoints import make_chat_checkpoint
from support.comparing import assert_close
from support.fake import MODEL
from support.scheduling import SECONDS, Bench, Inbox, Scripted


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


def test_what_is_not_exact_is_not_batched() -> None:
    model = DiffusionGemma(None, Scripted())  # type: ignore[arg-type]
    model.tokenizer = None  # type: ignore[assignment]
    assert Engine(model).max_batch == 8
    model.backend.exact_rows = False
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
    """``before`` positions are cached; 21 are more than a window. Where rows are said to be exact, they are, to the bit."""
    it = backend(backend_name, "odd_sizes")
    tolerance = 0.0 if it.exact_rows else 1e-4
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
            assert_close(together.entropy[span], result.entropy, tolerance, f"entropy of rows {span} in step {step}")
    it.encode(together.argmax, joined)
    assert [len(cache) for cache in caches] == [before] * 3, "they do not go on with it"
    for span, cache in zip(spans, caches, strict=True):
        it.encode(together.argmax[span], cache)
    expected = np.concatenate([it.encode(canvas[span], cache, logits=True) for span, cache in zip(spans, caches, strict=True)])
    assert_close(it.encode(canvas, joined, logits=True), expected, 10 * tolerance, "logits after more tokens")


@pytest.fixture(scope="session")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_checkpoint(tmp_path_factory.mktemp("engine"))


def test_requests_at_once_write_what_they_write_alone(chat: Path, backend_name: str) -> None:
    model = load(chat, backend=backend_name, device="cpu", dtype="float32")
    engine = Engine(model, parallel=9, max_batch=8)
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
    engine, inboxes = Engine(model, max_batch=8), [Inbox(), Inbox()]
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

"""When a denoising step is launched: before the caller takes the events of the step before it."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_diffgemma.backends import Backend, Piece, Row
from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.errors import ComputationError, InputError
from mlx_diffgemma.sampler import Block, Draft, Text, block_diffusion, diffuse
from support.comparing import assert_close
from support.fake import Answer, Asked, FakeBackend, L, V, full

CONFIG = GenerationConfig(max_new_tokens=L, max_denoising_steps=3, eos_token_ids=(V - 1,))
PROMPT = np.array([3, 1, 4], np.int32)
TEXTS = [Text(np.array([index], np.int32)) for index in range(3)]

both = pytest.mark.parametrize("ahead", [False, True], ids=["in the wait", "ahead"])


def never_done(asked: Asked) -> Answer:
    return full(asked.step, 1.0)


def passes(backend: FakeBackend) -> int:
    return len(backend.tokens_of("denoise"))


def followed(backend: FakeBackend, events: Iterator[Any]) -> list[tuple[str, int]]:
    """The kind of each event, and how many passes were computed when the caller took it."""
    return [(type(event).__name__, passes(backend)) for event in events]


@both
def test_the_next_pass_is_launched_before_the_events_are_taken(ahead: bool) -> None:
    backend = FakeBackend(never_done, ahead=ahead)
    told = followed(backend, block_diffusion(backend, Text(PROMPT), replace(CONFIG, max_new_tokens=2 * L)))
    counts = [2, 3, 3, 3, 5, 6, 6, 6] if ahead else [1, 2, 3, 3, 4, 5, 6, 6]
    assert told == list(zip([*["Draft"] * 3, "Block"] * 2, counts, strict=True)), "a canvas that is done leaves no pass behind"


@both
def test_the_last_draft_is_not_held_back_by_its_score(ahead: bool) -> None:
    backend = FakeBackend(never_done, ahead=ahead)
    for event in block_diffusion(backend, replace(TEXTS[0], logprobs=True), CONFIG):
        assert len(backend.tokens_of("score")) == isinstance(event, Block)


@both
def test_texts_in_groups(ahead: bool) -> None:
    backend = FakeBackend(lambda asked: full(7) if asked.cached[0] == 0 else never_done(asked), ahead=ahead)
    events = list[tuple[int, str, int]]()
    for index, event in diffuse(backend, TEXTS, CONFIG, max_batch=2):
        events.append((index, type(event).__name__, passes(backend)))
    # Text 2 has a prompt to encode first. Text 0 is done in step 2, and what follows is not known before its commit.
    assert events == [
        *[(0, "Draft", 1), (1, "Draft", 1), (2, "Draft", 2 + ahead)],
        *[(0, "Draft", 3), (0, "Block", 3), (1, "Draft", 3), (2, "Draft", 4 + ahead)],
        *[(1, "Draft", 5), (1, "Block", 5), (2, "Draft", 5), (2, "Block", 5)],
    ]


def scripted(asked: Asked) -> Answer:
    """A result that depends on the row. Texts are done in different steps and end in different blocks."""
    seed = [len(asked.cached), asked.step, *asked.canvas]
    rng = np.random.default_rng(seed)
    calm = asked.step > asked.cached[0] % 3
    return full(rng.integers(0, V, L) if not calm else asked.cached[0] + asked.block, rng.random(L) * (0 if calm else 4))


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3))
def test_the_events_are_the_same_in_the_same_order(count: int, max_batch: int, blocks: int) -> None:
    texts = [Text(np.array([45 + index, 1][: 1 + index % 2], np.int32), index) for index in range(count)]
    config = replace(CONFIG, max_new_tokens=blocks * L, max_denoising_steps=5)
    first, second = (
        [
            (index, [np.asarray(value).tolist() for name, value in vars(event).items() if not name.endswith("seconds")])
            for index, event in diffuse(FakeBackend(scripted, ahead=ahead), texts, config, max_batch=max_batch)
        ]
        for ahead in (False, True)
    )
    assert first == second


@both
def test_closing_early(ahead: bool) -> None:
    backend = FakeBackend(never_done, ahead=ahead)
    cache = backend.new_cache()
    events = block_diffusion(backend, Text(PROMPT, cache=cache), CONFIG)
    next(events)
    events.close()  # type: ignore[attr-defined]
    assert passes(backend) == 1 + ahead
    assert cache == PROMPT.tolist()
    again = block_diffusion(backend, Text(np.empty(0, np.int32), cache=cache), CONFIG)
    assert [type(event) for event in again] == [Draft, Draft, Draft, Block]


@both
def test_an_error_comes_after_the_events_before_it(ahead: bool) -> None:
    """Of a launch, or of the wait; and of one text's numbers, where the events of the text before it have been decided."""

    def refused(asked: Asked) -> Answer:
        if asked.step == 2:
            raise InputError("refused")
        return full(asked.step, 1.0)

    def broken(asked: Asked) -> Answer:
        return full(asked.step, np.nan if (asked.cached[0], asked.step) == (1, 2) else 1.0)

    for script, error, expected in (
        (refused, InputError, [(0, 1), (1, 1), (2, 1)]),
        (broken, ComputationError, [(0, 1), (1, 1), (2, 1), (0, 2)]),
    ):
        seen = []
        events = diffuse(FakeBackend(script, ahead=ahead), TEXTS, CONFIG)
        with pytest.raises(error):
            seen.extend((index, event.step) for index, event in events)
        assert seen == expected


def test_a_pass_that_nobody_waits_for_changes_nothing(backend: Callable[..., Backend], backend_name: str) -> None:
    ours = backend(backend_name, "base")
    rng, length = np.random.default_rng(0), ours.config.canvas_length
    prompt, first, second, last = (rng.integers(3, ours.config.vocab_size, length, np.int32) for _ in range(4))
    answers = []
    for dropped in (False, True):
        cache = ours.new_cache()
        ours.encode([Piece(prompt, cache)])
        if dropped:
            ours.launch([Row(first, cache, 1.0)])
        answer = ours.denoise([Row(second, cache, 1.0)])[0]
        if dropped:
            ours.launch([Row(first, cache, 1.0)])
        ours.encode([Piece(second, cache)])
        answers.append((answer.entropy, ours.denoise([Row(last, cache, 1.0)])[0].entropy))
    for plain, beside in zip(*answers, strict=True):
        assert_close(beside, plain, 1e-6, "entropies beside a dropped pass")

"""The sampler over a fake backend: every rule against the plainest way to write it. No framework is needed."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mlx_diffgemma import noise
from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.errors import InputError
from mlx_diffgemma.sampler import Block, Draft, accept, block_diffusion
from support.fake import Answer, FakeBackend, L, V, full

CONFIG = GenerationConfig(max_new_tokens=L, max_denoising_steps=8, eos_token_ids=(V - 1,), confidence_threshold=0.5)
PROMPT = np.array([[3, 1, 4]], np.int32)


def run(backend: FakeBackend, config: GenerationConfig = CONFIG, **options: Any) -> tuple[list[Draft], list[Block]]:
    events = list(block_diffusion(backend, options.pop("prompt", PROMPT), config, seed=options.pop("seed", 0), **options))
    return [e for e in events if isinstance(e, Draft)], [e for e in events if isinstance(e, Block)]


def plainly_accepted(entropy: list[float], free: list[bool], bound: float) -> list[bool]:
    accepted = [not is_free for is_free in free]
    total = 0.0
    for position in sorted((p for p in range(len(entropy)) if free[p]), key=lambda p: entropy[p]):
        if total > bound:
            break
        accepted[position] = True
        total += entropy[position]
    return accepted


# Multiples of 1/64 add up without rounding, in any order and either precision.
ENTROPIES = st.integers(0, 640).map(lambda n: n / 64)


@given(st.data(), st.integers(1, 24), ENTROPIES)
def test_accept_is_the_plain_loop(data: st.DataObject, length: int, bound: float) -> None:
    rows = data.draw(st.lists(st.lists(ENTROPIES, min_size=length, max_size=length), min_size=1, max_size=3))
    free = data.draw(st.lists(st.booleans(), min_size=length, max_size=length))
    actual = accept(np.array(rows, np.float32), np.array(free), bound)
    for row, entropy in zip(actual.tolist(), rows, strict=True):
        assert row == plainly_accepted(entropy, free, bound), f"entropy {entropy}, free {free}, bound {bound}"
        assert any(row), "a step must accept something"


def test_accepted_positions_take_the_sample_and_the_others_fresh_tokens() -> None:
    entropy = [0.3, 0.0, 0.2, 0.1, 5.0, 0.05]
    sampled = [40, 41, 42, 43, 44, 45]
    backend = FakeBackend(lambda block, step, canvas: full(step, entropy, sampled))
    config = replace(CONFIG, entropy_bound=0.16, confidence_threshold=0.0, max_denoising_steps=4)
    drafts, blocks = run(backend, config, seed=9)
    expected = [False, True, True, True, False, True]  # 0 + .05 + .1 = .15 before the fourth, .35 before the fifth
    canvas = noise.canvas_tokens([9], 0, 0, L, V)
    for draft in drafts:
        np.testing.assert_array_equal(draft.canvas, canvas, f"what step {draft.step} was given")
        assert draft.accepted[0].tolist() == expected
        canvas = np.where(expected, sampled, noise.canvas_tokens([9], 0, draft.step, L, V))
    assert blocks[0].tokens[0].tolist() == [4] * L, "the last argmax is committed, and neither samples nor noise"


@pytest.mark.parametrize(("threshold", "steps"), [(0, 3), (1, 4), (2, 7)])
def test_stability_threshold(threshold: int, steps: int) -> None:
    # Sure of itself from the third step on; equal are steps 1 and 2, 3 and 4, and 5 to 8.
    canvases = [7, 7, 9, 9, 10, 10, 10, 10]
    backend = FakeBackend(lambda block, step, canvas: full(canvases[step - 1], 1.0 if step < 3 else 0.1))
    drafts, blocks = run(backend, replace(CONFIG, stability_threshold=threshold))
    assert blocks[0].steps.tolist() == [steps]
    assert [draft.done.tolist() for draft in drafts] == [[False]] * (steps - 1) + [[True]]


def test_an_unsure_canvas_goes_on_however_stable() -> None:
    backend = FakeBackend(lambda block, step, canvas: full(7, 0.5))  # the mean must lie below the threshold, 0.5
    _, blocks = run(backend)
    assert blocks[0].steps.tolist() == [CONFIG.max_denoising_steps]


def test_each_row_stops_for_itself() -> None:
    def script(block: int, step: int, canvas: NDArray[np.int32]) -> Answer:
        tokens = np.full((2, L), 10 * step)
        tokens[0] = 7 if step <= 2 else 30 + step  # stable in steps 1 and 2; what comes later must not reach it
        return full(tokens, np.array([[0.0], [0.1 * step]]))

    backend = FakeBackend(script)
    drafts, blocks = run(backend, replace(CONFIG, max_denoising_steps=4, eos_token_ids=(V,)), prompt=PROMPT.repeat(2, axis=0))
    assert blocks[0].steps.tolist() == [2, 4]
    assert blocks[0].tokens.tolist() == [[7] * L, [40] * L]
    assert [draft.active.tolist() for draft in drafts] == [[True, True]] * 2 + [[False, True]] * 2
    held = backend.steps[2]["canvas"][0]
    for name in ("argmax", "entropy", "accepted"):
        np.testing.assert_array_equal(getattr(drafts[3], name)[0], getattr(drafts[1], name)[0], name)
    np.testing.assert_array_equal(backend.steps[3]["canvas"][0], held, "the canvas of a row that is done")


def test_rows_have_seeds_of_their_own() -> None:
    backend = FakeBackend(lambda block, step, canvas: full(np.full((2, L), step), 1.0))
    run(backend, replace(CONFIG, max_denoising_steps=2), prompt=PROMPT.repeat(2, axis=0), seed=[5, 2**64 - 1])
    for asked in backend.steps:
        assert asked["noise_keys"].tolist() == [noise.key(seed, 2, 0, asked["step"]) for seed in (5, 2**64 - 1)]
    np.testing.assert_array_equal(backend.steps[0]["canvas"], noise.canvas_tokens([5, 2**64 - 1], 0, 0, L, V))


def test_padding_after_the_end_token_and_the_rows_that_go_on() -> None:
    texts = np.array([[[1, 2, V - 1, 4, V - 1, 6], [1, 2, 3, 4, 5, 6]], [[9] * 6, [7, V - 1, 7, 7, 7, 7]], [[8] * 6] * 2])
    backend = FakeBackend(lambda block, step, canvas: full(texts[block]))
    config = replace(CONFIG, max_new_tokens=3 * L, pad_token_id=0, stability_threshold=0)
    _, blocks = run(backend, config, prompt=PROMPT.repeat(2, axis=0))
    assert [block.tokens.tolist() for block in blocks] == [
        [[1, 2, V - 1, 0, 0, 0], [1, 2, 3, 4, 5, 6]],
        [[0] * L, [7, V - 1, 0, 0, 0, 0]],
    ]
    assert [block.ended.tolist() for block in blocks] == [[True, False], [True, True]]
    assert [block.steps.tolist() for block in blocks] == [[1, 1], [0, 1]]


def test_the_cache_receives_the_prompt_and_then_whole_canvases() -> None:
    backend = FakeBackend(lambda block, step, canvas: full(np.arange(L) + 10 * block))
    cache = backend.new_cache()
    run(backend, replace(CONFIG, max_new_tokens=2 * L + 1), cache=cache)  # the third canvas is whole too
    canvases = [(np.arange(L) + 10 * block).tolist() for block in range(2)]
    assert [tokens.tolist() for tokens in backend.encoded] == [PROMPT.tolist(), [canvases[0]], [canvases[1]]]
    assert {(asked["block"], asked["cached"]) for asked in backend.steps} == {(0, 3), (1, 3 + L), (2, 3 + 2 * L)}
    assert len(cache) == 3 + 2 * L, "the last canvas is not encoded: nothing follows it"


def test_greedy_draws_nothing() -> None:
    backend = FakeBackend(lambda block, step, canvas: full(step, 1.0))
    run(backend, replace(CONFIG, greedy=True))
    assert [asked["noise_keys"] for asked in backend.steps] == [None] * CONFIG.max_denoising_steps


def test_temperature_falls_from_t_max_towards_t_min_in_every_block() -> None:
    backend = FakeBackend(lambda block, step, canvas: full(step, 1.0))
    drafts, _ = run(backend, replace(CONFIG, max_new_tokens=2 * L, max_denoising_steps=4, t_min=0.25, t_max=1.25))
    asked = [step["temperature"] for step in backend.steps]
    assert asked == [1.25, 1.0, 0.75, 0.5] * 2
    assert [draft.temperature for draft in drafts] == asked


def test_self_conditioning_is_handed_on_within_a_block_only() -> None:
    backend = FakeBackend(lambda block, step, canvas: full(step, 1.0))
    run(backend, replace(CONFIG, max_new_tokens=2 * L, max_denoising_steps=3))
    assert [asked["self_conditioning"] for asked in backend.steps] == [None, (0, 1), (0, 2), None, (1, 1), (1, 2)]


def test_a_shorter_canvas() -> None:
    backend = FakeBackend(lambda block, step, canvas: tuple(part[:, :4] for part in full(np.arange(L))))  # type: ignore[arg-type,return-value]
    _, blocks = run(backend, replace(CONFIG, canvas_length=4, max_new_tokens=9))
    assert [block.tokens.tolist() for block in blocks] == [[[0, 1, 2, 3]]] * 3
    np.testing.assert_array_equal(backend.steps[0]["canvas"], noise.canvas_tokens([0], 0, 0, 4, V))


def test_a_draft_over_several_blocks() -> None:
    backend = FakeBackend(lambda block, step, canvas: full(step, 1.0))
    draft = np.arange(L + 2, dtype=np.int32)[None]
    draft[0, 3] = -1
    run(backend, replace(CONFIG, max_new_tokens=3 * L, max_denoising_steps=1), canvas=draft)
    expected = [noise.canvas_tokens([0], block, 0, L, V) for block in range(3)]
    expected[0][0, [0, 1, 2, 4, 5]] = 0, 1, 2, 4, 5
    expected[1][0, :2] = L, L + 1
    for asked, canvas in zip(backend.steps, expected, strict=True):
        np.testing.assert_array_equal(asked["canvas"], canvas)


def test_each_row_has_a_template_of_its_own() -> None:
    frozen = np.array([[30, -1, 31], [-1, 32, -1], [-1, -1, -1]], np.int32)
    answers = np.array([[0.0, 0.1, 0.0, 0.1, 0.1, 0.3], [1.0, 0.0, 1.0, 0.9, 1.0, 1.0], [0.2] * 6])
    backend = FakeBackend(lambda block, step, canvas: full(np.full((3, L), 7), answers))
    # The free positions' means are 0.15, 0.98 and 0.2: over all positions the first would be 0.1.
    config = replace(CONFIG, entropy_bound=0.0, confidence_threshold=0.15, stability_threshold=0, max_denoising_steps=2)
    drafts, blocks = run(backend, config, prompt=PROMPT.repeat(3, axis=0), frozen=frozen)
    assert drafts[0].accepted.sum(axis=1).tolist() == [3, 2, 1], "the frozen ones and one more"
    assert [asked["canvas"][:, :3][frozen >= 0].tolist() for asked in backend.steps] == [[30, 31, 32]] * 2
    assert blocks[0].steps.tolist() == [2, 2, 2]
    _, blocks = run(backend, replace(config, confidence_threshold=0.16), prompt=PROMPT.repeat(3, axis=0), frozen=frozen)
    assert blocks[0].steps.tolist() == [1, 2, 2]


def test_frozen_over_several_blocks() -> None:
    frozen = np.full(2 * L + 2, -1, np.int32)
    frozen[[1, 4]] = 30, 31  # block 0; block 1 is free
    frozen[2 * L :] = 32, 33  # the head of block 2
    template = {0: [-1, 30, -1, -1, 31, -1], 2: [32, 33, -1, -1, -1, -1]}

    def script(block: int, step: int, canvas: NDArray[np.int32]) -> Answer:
        # Frozen ones, as a backend answers them: their token, with entropy 0. The free ones' mean is just over the threshold.
        known = np.array(template.get(block, [-1] * L))
        return full(np.where(known >= 0, known, 7), np.where(known >= 0, 0.0, 0.51))

    backend = FakeBackend(script)
    drafts, blocks = run(backend, replace(CONFIG, max_new_tokens=3 * L, max_denoising_steps=3, entropy_bound=0.0), frozen=frozen)
    assert [block.steps.tolist() for block in blocks] == [[3]] * 3, "frozen positions lower the mean that stops a block"
    for asked, draft in zip(backend.steps, drafts, strict=True):
        known = template.get(asked["block"])
        if known is None:
            assert asked["frozen"] is None
            assert draft.accepted.sum() == 1
        else:
            assert asked["frozen"].tolist() == known
            where = np.array(known) >= 0
            np.testing.assert_array_equal(asked["canvas"][0, where], np.array(known)[where])
            assert draft.accepted[0, where].all()
            assert draft.accepted.sum() == where.sum() + 1, "a bound of 0 accepts one free position beside the frozen ones"


def test_stopping_to_read_stops_the_backend() -> None:
    backend = FakeBackend(lambda block, step, canvas: full(step, 1.0))
    events: Iterator[Draft | Block] = block_diffusion(backend, PROMPT, CONFIG, seed=0)
    assert not backend.encoded
    for count in (1, 2):
        next(events)
        assert (len(backend.encoded), len(backend.steps)) == (1, count)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"seed": -1}, "between 0 and 2^64 - 1, got -1"),
        ({"seed": 2**64}, "between 0 and 2^64 - 1, got 18446744073709551616"),
        ({"seed": [1, 2]}, "2 seeds for 1 rows"),
        ({"prompt": np.empty((1, 0), np.int32)}, "at least one position"),
        ({"prompt": np.array([1, 2], np.int32)}, "of shape [rows, positions]"),
        ({"prompt": np.array([[0, V]], np.int32)}, f"token id {V} is outside the vocabulary of {V} tokens"),
        ({"prompt": np.array([[-2]], np.int32)}, "token id -2 is outside the vocabulary"),
        ({"prompt": np.zeros((1, 59), np.int32)}, "59 prompt tokens and 6 new ones, in canvases of 6, exceed"),
        ({"cache": list(range(56))}, "59 prompt tokens and 6 new ones"),
        ({"config": replace(CONFIG, canvas_length=L + 1)}, "canvas_length 7 exceeds the model's 6"),
        ({"config": replace(CONFIG, max_new_tokens=61)}, "exceed the model's context of 64 tokens"),
        ({"canvas": np.zeros((2, L), np.int32)}, "canvas must be one row, or 1, within the 6 new tokens, got shape [2, 6]"),
        ({"canvas": np.full((1, L), V, np.int32)}, "canvas holds a token id outside the vocabulary of 50 tokens"),
        ({"frozen": np.full(L, V, np.int32)}, "frozen holds a token id outside the vocabulary"),
        ({"frozen": np.full(L + 1, -1, np.int32)}, "frozen must be one row, or 1, within the 6 new tokens, got shape [7]"),
        ({"frozen": np.full((2, L), -1, np.int32)}, "got shape [2, 6]"),
        ({"frozen": np.full(L, -2, np.int32)}, "frozen holds a token id outside the vocabulary"),
    ],
)
def test_bad_input_is_told_before_anything_is_computed(options: dict[str, Any], told: str) -> None:
    backend = FakeBackend(lambda block, step, canvas: full(step))
    with pytest.raises(InputError) as error:
        block_diffusion(
            backend,
            options.pop("prompt", PROMPT),
            options.pop("config", CONFIG),
            seed=options.pop("seed", 0),
            **options,
        )
    assert told in str(error.value)
    assert "\n" not in str(error.value)
    assert not backend.encoded


@given(st.integers(1, 3 * L))
def test_canvases_are_whole_and_as_many_as_needed(max_new_tokens: int) -> None:
    backend = FakeBackend(lambda block, step, canvas: full(7))
    _, blocks = run(backend, replace(CONFIG, max_new_tokens=max_new_tokens))
    assert (len(blocks) - 1) * L < max_new_tokens <= len(blocks) * L
    assert all(block.tokens.shape == (1, L) for block in blocks)

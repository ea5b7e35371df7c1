"""The sampler over a fake backend: every rule against its simplest implementation. No framework is needed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mlx_diffgemma import noise
from mlx_diffgemma.backends import Denoised
from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.errors import InputError
from mlx_diffgemma.sampler import Block, Canvas, Draft, Rules, Text, accept, block_diffusion, decide, diffuse
from support.fake import Answer, Asked, FakeBackend, FakeCache, L, V, full

CONFIG = GenerationConfig(max_new_tokens=L, max_denoising_steps=8, eos_token_ids=(V - 1,), confidence_threshold=0.5)


def ids(*tokens: int) -> NDArray[np.int32]:
    return np.array(tokens, np.int32)


PROMPT = ids(3, 1, 4)

#: Prompts of texts that share passes. Their lengths differ, and the first token identifies the text.
PROMPTS = [ids(0, 3, 1, 4), ids(1, 9), ids(2)]


def run(
    backend: FakeBackend, config: GenerationConfig = CONFIG, prompt: NDArray[np.int32] = PROMPT, **given: Any
) -> tuple[list[Draft], list[Block]]:
    """The drafts and blocks of one text."""
    return sorted_out(block_diffusion(backend, Text(prompt, **given), config))


def sorted_out(events: Iterator[Draft | Block] | Sequence[Draft | Block]) -> tuple[list[Draft], list[Block]]:
    events = list(events)
    return [e for e in events if isinstance(e, Draft)], [e for e in events if isinstance(e, Block)]


def side_by_side(
    backend: FakeBackend, config: GenerationConfig, texts: Sequence[Text], **options: Any
) -> list[tuple[list[Draft], list[Block]]]:
    """The drafts and blocks of each of several texts."""
    found: list[list[Draft | Block]] = [[] for _ in texts]
    for index, event in diffuse(backend, texts, config, **options):
        found[index].append(event)
    return [sorted_out(events) for events in found]


def rows_in_passes(backend: FakeBackend) -> list[int]:
    return [len(rows) for rows in backend.tokens_of("denoise")]


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
    entropy = data.draw(st.lists(ENTROPIES, min_size=length, max_size=length))
    free = data.draw(st.lists(st.booleans(), min_size=length, max_size=length))
    actual = accept(np.array(entropy, np.float32), np.array(free), bound).tolist()
    assert actual == plainly_accepted(entropy, free, bound), f"entropy {entropy}, free {free}, bound {bound}"
    assert any(actual), "a step must accept something"


def test_a_step_leaves_its_canvas_as_it_was() -> None:
    rules = Rules(CONFIG, L, V)
    before = Canvas.begin(Text(PROMPT, 5, frozen=ids(30, -1, 31)), 0, rules)
    tokens = before.tokens.copy()
    answer = Denoised(np.arange(L, dtype=np.int32), np.full(L, 7, np.int32), np.full(L, 0.25, np.float32), "signal")
    once, again = decide(before, answer, rules), decide(before, answer, rules)
    assert (before.step, before.history, before.self_conditioning, before.done) == (0, (), None, False)
    np.testing.assert_array_equal(before.tokens, tokens)
    assert (once.step, once.self_conditioning, once.done) == (1, "signal", False)
    np.testing.assert_array_equal(once.tokens, again.tokens)
    assert decide(once, answer, rules).done, "the same argmax again, at a mean entropy of .25"


def test_accepted_positions_take_the_sample_and_the_others_fresh_tokens() -> None:
    entropy = [0.3, 0.0, 0.2, 0.1, 5.0, 0.05]
    sampled = [40, 41, 42, 43, 44, 45]
    backend = FakeBackend(lambda asked: full(asked.step, entropy, sampled))
    config = replace(CONFIG, entropy_bound=0.16, confidence_threshold=0.0, max_denoising_steps=4)
    drafts, blocks = run(backend, config, seed=9)
    expected = [False, True, True, True, False, True]  # 0 + .05 + .1 = .15 before the fourth, .35 before the fifth
    canvas = noise.canvas_tokens(9, 0, 0, L, V)
    for draft in drafts:
        np.testing.assert_array_equal(draft.canvas, canvas, f"what step {draft.step} was given")
        assert draft.accepted.tolist() == expected
        canvas = np.where(expected, sampled, noise.canvas_tokens(9, 0, draft.step, L, V))
    assert blocks[0].tokens.tolist() == [4] * L, "the last argmax is committed, and neither samples nor noise"


@pytest.mark.parametrize(("threshold", "steps"), [(0, 3), (1, 4), (2, 7)])
def test_stability_threshold(threshold: int, steps: int) -> None:
    # The entropy is low from the third step on. Steps 1 and 2, 3 and 4, and 5 to 8 have equal tokens.
    canvases = [7, 7, 9, 9, 10, 10, 10, 10]
    backend = FakeBackend(lambda asked: full(canvases[asked.step - 1], 1.0 if asked.step < 3 else 0.1))
    drafts, blocks = run(backend, replace(CONFIG, stability_threshold=threshold))
    assert blocks[0].steps == steps
    assert [draft.done for draft in drafts] == [False] * (steps - 1) + [True]


def test_an_unsure_canvas_goes_on_however_stable() -> None:
    backend = FakeBackend(lambda asked: full(7, 0.5))  # the mean must lie below the threshold, 0.5
    drafts, blocks = run(backend)
    assert blocks[0].steps == CONFIG.max_denoising_steps
    assert [draft.done for draft in drafts] == [False] * (len(drafts) - 1) + [True], "there are no steps left"


def test_each_text_stops_for_itself() -> None:
    def script(asked: Asked) -> Answer:
        if asked.cached[0] == 0:
            return full(7)  # stable in steps 1 and 2
        return full(10 * asked.step, 0.1 * asked.step)

    backend = FakeBackend(script)
    texts = [Text(prompt) for prompt in PROMPTS[:2]]
    first, second = side_by_side(backend, replace(CONFIG, max_denoising_steps=4, eos_token_ids=(V,)), texts)
    assert [block.steps for _, blocks in (first, second) for block in blocks] == [2, 4]
    assert [block.tokens.tolist() for _, blocks in (first, second) for block in blocks] == [[7] * L, [40] * L]
    assert [draft.step for draft in first[0]] == [1, 2]
    assert [draft.step for draft in second[0]] == [1, 2, 3, 4]
    assert rows_in_passes(backend) == [2, 2, 1, 1], "a text that has ended takes part no more"
    assert [asked.cached[0] for asked in backend.asked] == [0, 1, 0, 1, 1, 1]


def test_events_of_texts_side_by_side_come_pass_by_pass() -> None:
    backend = FakeBackend(lambda asked: full(7))
    events = diffuse(backend, [Text(prompt) for prompt in PROMPTS[:2]], replace(CONFIG, max_new_tokens=2 * L))
    told = [(index, type(event).__name__) for index, event in events]
    step, last = [(0, "Draft"), (1, "Draft")], [(0, "Draft"), (0, "Block"), (1, "Draft"), (1, "Block")]
    assert told == [*step, *last] * 2


def test_texts_have_seeds_of_their_own() -> None:
    seeds = [5, 2**64 - 1]
    backend = FakeBackend(lambda asked: full(asked.step, 1.0))
    texts = [Text(prompt, seed) for prompt, seed in zip(PROMPTS[:2], seeds, strict=True)]
    side_by_side(backend, replace(CONFIG, max_denoising_steps=2), texts)
    for asked in backend.asked:
        seed = seeds[asked.cached[0]]
        assert asked.row.noise_key == noise.key(seed, 2, 0, asked.step)
        if asked.step == 1:
            np.testing.assert_array_equal(asked.row.canvas, noise.canvas_tokens(seed, 0, 0, L, V))
    assert len(backend.asked) == 4


def test_padding_after_the_end_token_and_the_texts_that_go_on() -> None:
    texts = [
        [[1, 2, V - 1, 4, V - 1, 6], [9] * 6, [8] * 6],
        [[1, 2, 3, 4, 5, 6], [7, V - 1, 7, 7, 7, 7], [8] * 6],
    ]
    backend = FakeBackend(lambda asked: full(texts[asked.cached[0]][asked.block]))
    config = replace(CONFIG, max_new_tokens=3 * L, pad_token_id=0, stability_threshold=0)
    (_, first), (_, second) = side_by_side(backend, config, [Text(prompt) for prompt in PROMPTS[:2]])
    assert [block.tokens.tolist() for block in first] == [[1, 2, V - 1, 0, 0, 0]]
    assert [block.tokens.tolist() for block in second] == [[1, 2, 3, 4, 5, 6], [7, V - 1, 0, 0, 0, 0]]
    assert [block.ended for block in (*first, *second)] == [True, False, True]
    assert [block.index for block in (*first, *second)] == [0, 0, 1]
    assert rows_in_passes(backend) == [2, 1]


def test_an_end_token_in_the_last_place_ends_the_text_too() -> None:
    backend = FakeBackend(lambda asked: full([1, 2, 3, 4, 5, V - 1]))
    _, blocks = run(backend, replace(CONFIG, max_new_tokens=3 * L))
    assert [(block.tokens.tolist(), block.ended) for block in blocks] == [([1, 2, 3, 4, 5, V - 1], True)]


def test_the_cache_receives_the_prompt_and_then_whole_canvases() -> None:
    backend = FakeBackend(lambda asked: full(np.arange(L) + 10 * asked.block))
    cache = backend.new_cache()
    run(backend, replace(CONFIG, max_new_tokens=2 * L + 1), cache=cache)  # the third canvas is whole too
    canvases = [(np.arange(L) + 10 * block).tolist() for block in range(2)]
    assert backend.tokens_of("encode") == [[PROMPT.tolist()], [canvases[0]], [canvases[1]]]
    assert {(asked.block, len(asked.cached)) for asked in backend.asked} == {(0, 3), (1, 3 + L), (2, 3 + 2 * L)}
    assert cache == [*PROMPT.tolist(), *canvases[0], *canvases[1]], "the last canvas is not encoded: nothing follows it"


def test_a_text_may_begin_where_a_cache_ends() -> None:
    alone, behind = (FakeBackend(lambda asked: full(asked.step, 1.0)) for _ in range(2))
    config = replace(CONFIG, max_denoising_steps=2)
    run(alone, config)
    run(behind, config, prompt=ids(), cache=FakeCache(PROMPT.tolist()))
    assert behind.tokens_of("encode") == []
    assert [asked.cached for asked in behind.asked] == [asked.cached for asked in alone.asked] == [PROMPT.tolist()] * 2
    assert behind.tokens_of("denoise") == alone.tokens_of("denoise")


def test_log_probabilities_are_of_the_tokens_that_count() -> None:
    canvases = [[1, 2, 3, 4, 5, 6], [7, V - 1, 9, 9, 9, 9]]
    backend = FakeBackend(lambda asked: full(canvases[asked.block]), causal=lambda tokens: -tokens / 8)
    config = replace(CONFIG, max_new_tokens=3 * L)
    cache = backend.new_cache()
    _, blocks = run(backend, config, cache=cache, logprobs=True)
    assert [block.logprobs.tolist() for block in blocks if block.logprobs is not None] == [
        [-token / 8 for token in canvases[0]], [-7 / 8, -(V - 1) / 8]
    ]  # fmt: skip
    assert backend.tokens_of("score") == [[canvases[0]], [[7, V - 1]]], "padding is not scored"
    assert backend.tokens_of("encode") == [[PROMPT.tolist()]], "what is scored is committed by it"
    assert cache == [*PROMPT.tolist(), *canvases[0], 7, V - 1]
    _, [block] = run(backend, replace(CONFIG, max_new_tokens=4), logprobs=True)
    assert block.logprobs is not None
    assert len(block.logprobs) == 4, "of a canvas of six tokens, four were asked for"


def test_greedy_draws_nothing() -> None:
    backend = FakeBackend(lambda asked: full(asked.step, 1.0))
    run(backend, replace(CONFIG, greedy=True))
    assert [asked.row.noise_key for asked in backend.asked] == [None] * CONFIG.max_denoising_steps


def test_temperature_falls_from_t_max_towards_t_min_in_every_block() -> None:
    backend = FakeBackend(lambda asked: full(asked.step, 1.0))
    drafts, _ = run(backend, replace(CONFIG, max_new_tokens=2 * L, max_denoising_steps=4, t_min=0.25, t_max=1.25))
    told = [asked.row.temperature for asked in backend.asked]
    assert told == [1.25, 1.0, 0.75, 0.5] * 2
    assert [draft.temperature for draft in drafts] == told


def test_self_conditioning_is_handed_on_within_a_block_only() -> None:
    backend = FakeBackend(lambda asked: full(asked.step, 1.0))
    run(backend, replace(CONFIG, max_new_tokens=2 * L, max_denoising_steps=3))
    assert [asked.row.self_conditioning for asked in backend.asked] == [None, (0, 1), (0, 2), None, (1, 1), (1, 2)]


def test_a_shorter_canvas() -> None:
    backend = FakeBackend(lambda asked: full(np.arange(4), width=4))
    _, blocks = run(backend, replace(CONFIG, canvas_length=4, max_new_tokens=9))
    assert [block.tokens.tolist() for block in blocks] == [[0, 1, 2, 3]] * 3
    np.testing.assert_array_equal(backend.asked[0].row.canvas, noise.canvas_tokens(0, 0, 0, 4, V))


def test_a_draft_over_several_blocks() -> None:
    backend = FakeBackend(lambda asked: full(asked.step, 1.0))
    draft = np.arange(L + 2, dtype=np.int32)
    draft[3] = -1
    run(backend, replace(CONFIG, max_new_tokens=3 * L, max_denoising_steps=1), canvas=draft)
    expected = [noise.canvas_tokens(0, block, 0, L, V) for block in range(3)]
    expected[0][[0, 1, 2, 4, 5]] = 0, 1, 2, 4, 5
    expected[1][:2] = L, L + 1
    for asked, canvas in zip(backend.asked, expected, strict=True):
        np.testing.assert_array_equal(asked.row.canvas, canvas)


def test_each_text_has_a_template_of_its_own() -> None:
    frozen = [ids(30, -1, 31), ids(-1, 32), None]
    answers = [[9.0, 0.1, 9.0, 0.1, 0.1, 0.3], [1.0, 9.0, 1.0, 0.9, 1.0, 1.0], [0.2] * 6]
    texts = [Text(prompt, frozen=template) for prompt, template in zip(PROMPTS, frozen, strict=True)]
    backend = FakeBackend(lambda asked: full(7, answers[asked.cached[0]]))
    # The means over free positions are 0.15, 0.98 and 0.2. Over all positions the first would be 0.1.
    config = replace(CONFIG, entropy_bound=0.0, confidence_threshold=0.15, stability_threshold=0, max_denoising_steps=2)
    written = side_by_side(backend, config, texts)
    assert [int(drafts[0].accepted.sum()) for drafts, _ in written] == [3, 2, 1], "the frozen ones and one more"
    for asked in backend.asked:
        known = {0: [(0, 30), (2, 31)], 1: [(1, 32)], 2: []}[asked.cached[0]]
        assert [(place, asked.canvas[place]) for place, _ in known] == known
        template = None if not known else [dict(known).get(place, -1) for place in range(L)]
        assert (None if asked.row.frozen is None else asked.row.frozen.tolist()) == template
    assert rows_in_passes(backend) == [3, 3]
    assert [[block.steps for block in blocks] for _, blocks in written] == [[2], [2], [2]]
    written = side_by_side(backend, replace(config, confidence_threshold=0.16), texts)
    assert [[block.steps for block in blocks] for _, blocks in written] == [[1], [2], [2]]


def test_frozen_over_several_blocks() -> None:
    frozen = np.full(2 * L + 2, -1, np.int32)
    frozen[[1, 4]] = 30, 31  # block 0; block 1 is free
    frozen[2 * L :] = 32, 33  # the head of block 2
    template = {0: [-1, 30, -1, -1, 31, -1], 2: [32, 33, -1, -1, -1, -1]}
    backend = FakeBackend(lambda asked: full(7, 0.51))  # the mean over free positions is just over the threshold
    drafts, blocks = run(backend, replace(CONFIG, max_new_tokens=3 * L, max_denoising_steps=3, entropy_bound=0.0), frozen=frozen)
    assert [block.steps for block in blocks] == [3] * 3, "frozen positions lower the mean that stops a block"
    for asked, draft in zip(backend.asked, drafts, strict=True):
        known = template.get(asked.block)
        if known is None:
            assert asked.row.frozen is None
            assert draft.accepted.sum() == 1
        else:
            assert asked.row.frozen is not None
            assert asked.row.frozen.tolist() == known
            where = np.array(known) >= 0
            np.testing.assert_array_equal(asked.row.canvas[where], np.array(known)[where])
            assert draft.accepted[where].all()
            assert draft.accepted.sum() == where.sum() + 1, "a bound of 0 accepts one free position beside the frozen ones"


def test_a_canvas_without_a_free_position_stops_when_it_is_stable() -> None:
    backend = FakeBackend(lambda asked: full(7, 9.0))
    _, blocks = run(backend, replace(CONFIG, confidence_threshold=0.0), frozen=np.arange(L, dtype=np.int32))
    assert [(block.tokens.tolist(), block.steps) for block in blocks] == [(list(range(L)), 2)]


def test_stopping_to_read_stops_the_backend() -> None:
    backend = FakeBackend(lambda asked: full(asked.step, 1.0))
    events = block_diffusion(backend, Text(PROMPT), CONFIG)
    assert not backend.calls
    for count in (1, 2):
        next(events)
        assert [method for method, _ in backend.calls] == ["encode", *["denoise"] * count]


# Several texts in one pass.


def scrambled(asked: Asked) -> Answer:
    """A result that depends on everything in the row and on nothing else. Some canvases settle."""
    row = asked.row
    state = noise.fold(*asked.cached, *asked.canvas, row.noise_key or 0, int(row.temperature * 1000))
    words = noise.bits(state, np.arange(3 * L, dtype=np.uint32)).reshape(3, L)
    calm = noise.fold(*asked.cached) % 3 == 0
    argmax = (noise.bits(len(asked.cached), np.arange(L, dtype=np.uint32)) if calm else words[0]) % V
    return full(argmax, words[2] / (2.0**33 if calm else 2.0**31), words[1] % V)


def told(written: tuple[list[Draft], list[Block]]) -> Any:
    drafts, blocks = written
    names = ("block", "step", "temperature", "canvas", "argmax", "entropy", "accepted", "done")
    return (
        [[np.asarray(getattr(draft, name)).tolist() for name in names] for draft in drafts],
        [(block.index, block.tokens.tolist(), block.steps, block.ended) for block in blocks],
    )


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 2**64 - 1)), min_size=1, max_size=5), st.integers(1, 5))
def test_texts_side_by_side_are_written_as_alone(given: list[tuple[int, int]], max_batch: int) -> None:
    config = replace(CONFIG, max_new_tokens=3 * L, max_denoising_steps=4, eos_token_ids=(3, 4))
    texts = [Text(np.arange(index, index + length, dtype=np.int32), seed) for index, (length, seed) in enumerate(given)]
    written = side_by_side(FakeBackend(scrambled), config, texts, max_batch=max_batch)
    for text, beside in zip(texts, written, strict=True):
        alone = sorted_out(block_diffusion(FakeBackend(scrambled), text, config))
        assert told(beside) == told(alone)


@pytest.mark.parametrize(
    ("exact_rows", "options", "passes"),
    [
        (True, {}, [3]),
        (True, {"max_batch": 2}, [2, 1]),
        (False, {}, [1, 1, 1]),
        (False, {"batch": "exact", "max_batch": 2}, [1, 1, 1]),
        (False, {"batch": "fast"}, [3]),
        (False, {"batch": "fast", "max_batch": 2}, [2, 1]),
    ],
)
def test_rows_in_a_pass(exact_rows: bool, options: dict[str, Any], passes: list[int]) -> None:
    backend = FakeBackend(lambda asked: full(asked.step, 1.0), exact_rows=exact_rows)
    side_by_side(backend, replace(CONFIG, max_denoising_steps=2), [Text(prompt) for prompt in PROMPTS], **options)
    assert rows_in_passes(backend) == passes * 2
    assert [len(pieces) for pieces in backend.tokens_of("encode")] == passes


def test_an_unknown_batch() -> None:
    with pytest.raises(InputError, match="unknown batch 'quick'; known are exact and fast"):
        diffuse(FakeBackend(), [Text(PROMPT)], CONFIG, batch="quick")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"seed": -1}, "a seed must be an integer between 0 and 2^64 - 1, got -1"),
        ({"seed": 2**64}, "between 0 and 2^64 - 1, got 18446744073709551616"),
        ({"seed": [1, 2]}, "a seed must be an integer between 0 and 2^64 - 1, got [1, 2]"),
        ({"seed": True}, "a seed must be an integer between 0 and 2^64 - 1, got True"),
        ({"prompt": ids()}, "token ids must be a list of at least one id, got shape [0]"),
        ({"prompt": ids(), "cache": FakeCache()}, "token ids must be a list of at least one id, got shape [0]"),
        ({"prompt": np.array([[1, 2]], np.int32)}, "token ids must be a list of at least one id, got shape [1, 2]"),
        ({"prompt": np.empty((1, 0), np.int32), "cache": FakeCache([1])}, "got shape [1, 0]"),
        ({"prompt": ids(0, V)}, f"token id {V} is outside the vocabulary of {V} tokens"),
        ({"prompt": ids(-2)}, "token id -2 is outside the vocabulary"),
        ({"prompt": np.zeros(59, np.int32)}, "59 prompt tokens and 6 new tokens, in canvases of 6, exceed"),
        ({"cache": FakeCache(range(56))}, "59 prompt tokens and 6 new tokens"),
        ({"config": replace(CONFIG, canvas_length=L + 1)}, "canvas_length 7 is larger than the model's 6"),
        ({"config": replace(CONFIG, max_new_tokens=61)}, "exceed the model's context of 64 tokens"),
        (
            {"canvas": np.zeros((2, L), np.int32)},
            "canvas must be a list of at most 6 tokens (max_new_tokens 6 in whole canvases), got shape [2, 6]",
        ),
        ({"canvas": np.full(L, V, np.int32)}, "canvas has a token id outside the vocabulary of 50 tokens"),
        ({"frozen": np.full(L, V, np.int32)}, "frozen has a token id outside the vocabulary"),
        ({"frozen": np.full(L + 1, -1, np.int32)}, "frozen must be a list of at most 6 tokens"),
        ({"frozen": np.full(L + 1, -1, np.int32)}, "got shape [7]"),
        ({"frozen": np.full((2, L), -1, np.int32)}, "got shape [2, 6]"),
        ({"frozen": np.full(L, -2, np.int32)}, "frozen has a token id outside the vocabulary"),
    ],
)
def test_bad_input_is_told_before_anything_is_computed(options: dict[str, Any], expected: str) -> None:
    config = options.get("config", CONFIG)
    text = Text(**{"prompt": PROMPT, **{name: value for name, value in options.items() if name != "config"}})
    calls: list[Callable[[FakeBackend], object]] = [
        lambda backend: block_diffusion(backend, text, config),
        lambda backend: diffuse(backend, [Text(ids(1)), text], config),
    ]
    for call in calls:
        backend = FakeBackend(lambda asked: full(asked.step))
        with pytest.raises(InputError) as error:
            call(backend)
        assert expected in str(error.value)
        assert "\n" not in str(error.value)
        assert not backend.calls


@given(st.integers(1, 3 * L))
def test_canvases_are_whole_and_as_many_as_needed(max_new_tokens: int) -> None:
    backend = FakeBackend(lambda asked: full(7))
    _, blocks = run(backend, replace(CONFIG, max_new_tokens=max_new_tokens))
    assert (len(blocks) - 1) * L < max_new_tokens <= len(blocks) * L
    assert all(block.tokens.shape == (L,) for block in blocks)

"""The sampler over both backends against ``generate`` of `transformers`, token by token, with the same noise."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from mlx_diffgemma.backends import Backend
from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.sampler import Block, Draft, Text, block_diffusion, diffuse
from support.reference import SHAPES, GenerateResult, Reference

Load = Callable[..., Backend]
Oracle = Callable[..., Reference]
Prompts = Sequence[NDArray[np.int32]]

# Layers that change little let a canvas settle. With these scalars some texts stop by the rule and some reach the step limit.
CALM = {"base": {"layer_scalars": (0.9, 1.2)}, "odd_sizes": {"layer_scalars": (1.3, 1.6)}}
CAP = 10
SEEDS = [*range(19), 2**64 - 1]


def options(shape: str, **changed: object) -> GenerationConfig:
    """Options with which blocks end in both ways. No token of the vocabulary ends the text unless one is given."""
    text = SHAPES[shape]["text_config"]
    return GenerationConfig(
        max_new_tokens=2 * SHAPES[shape]["canvas_length"] + 1,  # makes three canvases
        max_denoising_steps=CAP,
        entropy_bound=2.0,
        confidence_threshold=1.0,
        eos_token_ids=(text["vocab_size"],),
    ).replace(**changed)


def prompts(shape: str, rows: int, length: int = 11) -> NDArray[np.int32]:
    """Prompts [B, N] of one length, as `transformers` requires in a batch."""
    vocab_size = SHAPES[shape]["text_config"]["vocab_size"]
    return np.random.default_rng(7).integers(0, vocab_size, (rows, length), dtype=np.int32)


def unequal(shape: str, rows: int) -> list[NDArray[np.int32]]:
    """Prompts of 1, 4, 7, ... tokens: some shorter than the sliding window, some longer."""
    return [row[: 1 + 3 * index] for index, row in enumerate(prompts(shape, rows, length=1 + 3 * rows))]


def write(
    backend: Backend,
    prompts: Prompts,
    seeds: Sequence[int],
    config: GenerationConfig,
    frozen: Sequence[NDArray[np.int32] | None] | None = None,
    batch: str = "fast",
) -> list[GenerateResult]:
    """The tokens [N] and the steps per block of each text. The texts are written together, up to eight in a pass."""
    texts = [
        Text(prompt, seed, frozen=template)
        for prompt, seed, template in zip(prompts, seeds, frozen or [None] * len(seeds), strict=True)
    ]
    blocks: list[list[Block]] = [[] for _ in texts]
    for index, event in diffuse(backend, texts, config, batch=batch):
        if isinstance(event, Block):
            blocks[index].append(event)
    return [
        GenerateResult(np.concatenate([block.tokens for block in written]), np.array([block.steps for block in written]))
        for written in blocks
    ]


def alone(oracle: Reference, prompts: Prompts, seeds: Sequence[int], config: GenerationConfig) -> list[GenerateResult]:
    """The result of `transformers` for each text, run alone, because its batches need prompts of one length."""
    runs = [oracle.generate(prompt[None], [seed], config) for prompt, seed in zip(prompts, seeds, strict=True)]
    return [text for result in runs for text in texts_of(result, config)]


def texts_of(result: GenerateResult, config: GenerationConfig) -> list[GenerateResult]:
    """The rows of a batch, each up to the block in which it ends. The rest is padding and takes no steps."""
    blocks, texts = len(result.steps), []
    for tokens, steps in zip(result.tokens, result.steps.T, strict=True):
        count = blocks if steps.all() else int(steps.argmin())
        length = len(tokens) // blocks * count
        assert not steps[count:].any(), "a text goes on after its end"
        assert (tokens[length:] == config.pad_token_id).all(), "a text goes on after its end"
        texts.append(GenerateResult(tokens[:length], steps[:count]))
    return texts


def assert_same(actual: Sequence[GenerateResult], expected: Sequence[GenerateResult], what: str) -> None:
    """Assert that tokens and steps of all texts are equal. Names the first text and block that differ."""
    texts = list(zip(actual, expected, strict=True))
    wrong = [index for index, (ours, right) in enumerate(texts) if not same(ours, right)]
    report = f"{what}: {len(wrong)} of {len(texts)} texts differ in tokens or steps"
    print(report)
    if wrong:
        ours, right = texts[wrong[0]]
        assert len(ours.steps) == len(right.steps), f"{report}; text {wrong[0]}: {ours.steps} steps for {right.steps}"
        blocks = [
            [GenerateResult(*each) for each in zip(np.split(one.tokens, len(one.steps)), one.steps, strict=True)]
            for one in (ours, right)
        ]
        block = next(index for index, pair in enumerate(zip(*blocks, strict=True)) if not same(*pair))
        one, other = blocks[0][block], blocks[1][block]
        pytest.fail(
            f"{report}; text {wrong[0]}, block {block}: {one.tokens} in {one.steps} steps for {other.tokens} in {other.steps}"
        )


def same(one: GenerateResult, other: GenerateResult) -> bool:
    return np.array_equal(one.tokens, other.tokens) and np.array_equal(one.steps, other.steps)


def test_the_seed_decides_what_the_reference_writes(reference: Oracle) -> None:
    oracle, config = reference("base", **CALM["base"]), options("base")
    prompt = np.repeat(prompts("base", 1), 4, axis=0)
    once = texts_of(oracle.generate(prompt, [0, 1, 2, 0], config), config)
    assert_same(texts_of(oracle.generate(prompt, [0, 1, 2, 0], config), config), once, "the same seeds again")
    assert_same(alone(oracle, prompt[:1], [2], config), once[2:3], "one row alone")
    assert (once[0].tokens == once[3].tokens).all(), "one seed twice in a batch"
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (once[one].tokens != once[other].tokens).any(), f"seeds {one} and {other} write the same"


@pytest.mark.parametrize(
    ("shape", "stability", "confidence"), [("base", 0, 0.1), ("base", 1, 1.0), ("base", 2, 1.0), ("odd_sizes", 1, 0.2)]
)
def test_twenty_seeds(backend: Load, reference: Oracle, backend_name: str, shape: str, stability: int, confidence: float) -> None:
    config = options(shape, stability_threshold=stability, confidence_threshold=confidence)
    prompt = prompts(shape, len(SEEDS))
    result = reference(shape, **CALM[shape]).generate(prompt, SEEDS, config)
    early, capped = (result.steps < CAP).sum(), (result.steps == CAP).sum()
    assert min(early, capped) >= 3, f"{early} stops by the rule and {capped} at the cap are too few to tell"
    assert len(result.steps) == 3
    assert len(np.unique(result.tokens)) > 40, "a text of few tokens shows little"
    what = f"{backend_name}, {shape}, stability {stability}, {early} early stops of {result.steps.size}"
    actual = write(backend(backend_name, shape, **CALM[shape]), prompt, SEEDS, config)
    assert_same(actual, texts_of(result, config), what)


@pytest.mark.parametrize("shape", CALM)
def test_prompts_of_unequal_lengths(backend: Load, reference: Oracle, backend_name: str, shape: str) -> None:
    config = options(shape, eos_token_ids=tuple(range(1, 9)))
    given, seeds = unequal(shape, 8), SEEDS[:8]
    expected = alone(reference(shape, **CALM[shape]), given, seeds, config)
    assert len({len(text.steps) for text in expected}) > 1, "all texts have as many blocks"
    steps = np.concatenate([text.steps for text in expected])
    assert len(np.unique(steps)) > 2, f"all blocks take about the same steps: {steps}"
    assert_same(write(backend(backend_name, shape, **CALM[shape]), given, seeds, config), expected, f"{backend_name}, {shape}")


def test_default_options(backend: Load, reference: Oracle, backend_name: str) -> None:
    config = GenerationConfig(max_new_tokens=12)
    prompt = prompts("one_layer", len(SEEDS), length=3)
    result = reference("one_layer", logit_std=6.0).generate(prompt, SEEDS, config)
    stops = np.unique(result.steps)
    assert len(stops) > 3, f"all blocks took {stops} steps"
    actual = write(backend(backend_name, "one_layer", logit_std=6.0), prompt, SEEDS, config)
    assert_same(actual, texts_of(result, config), backend_name)


def test_end_token_inside_a_block(backend: Load, reference: Oracle, backend_name: str) -> None:
    ours, oracle = backend(backend_name, "base", **CALM["base"]), reference("base", **CALM["base"])
    prompt, length = prompts("base", len(SEEDS)), SHAPES["base"]["canvas_length"]
    some, every = tuple(range(1, 9)), tuple(range(1, 100))
    for ends in (some, every):
        config = options("base", eos_token_ids=ends, pad_token_id=127, max_new_tokens=4 * length)
        result = oracle.generate(prompt, SEEDS, config)
        is_end = np.isin(result.tokens, ends)
        first = is_end.argmax(axis=1)[is_end.any(axis=1)]
        if ends == some:
            assert 3 <= len(first) < len(SEEDS), f"{len(first)} of {len(SEEDS)} texts end"
            assert (first >= length).any(), "no text ends in a later block"
        else:
            assert len(first) == len(SEEDS), "a text does not end"
            assert len(result.steps) < 4, "all texts ended, and yet all canvases were made"
        assert ((first % length > 0) & (first % length < length - 1)).any(), "no end token lies inside a block"
        actual = write(ours, prompt, SEEDS, config)
        assert_same(actual, texts_of(result, config), f"{backend_name}, {len(ends)} end tokens")
        for index in np.flatnonzero(is_end.any(axis=1)):
            tokens = actual[index].tokens
            assert (tokens[is_end[index].argmax() + 1 :] == 127).all(), f"text {index} goes on after its end"
            assert len(tokens) // length == is_end[index].argmax() // length + 1, f"text {index} has canvases after its end"


@pytest.mark.parametrize("shape", CALM)
def test_texts_side_by_side_equal_texts_alone(backend: Load, backend_name: str, shape: str) -> None:
    ours, config = backend(backend_name, shape, **CALM[shape]), options(shape, eos_token_ids=tuple(range(1, 9)))
    given, seeds = unequal(shape, 4), [11, 5, 2**40 + 3, 0]
    by_itself = [write(ours, [prompt], [seed], config)[0] for prompt, seed in zip(given, seeds, strict=True)]
    steps = np.concatenate([text.steps for text in by_itself])
    assert len(np.unique(steps)) > 2, f"the texts all take about the same steps: {steps}"
    for batch in ("fast", "exact"):
        assert_same(write(ours, given, seeds, config, batch=batch), by_itself, f"{backend_name}, {shape}, {batch}")


def test_frozen_positions(backend: Load, reference: Oracle, backend_name: str) -> None:
    ours, length = backend(backend_name, "base", **CALM["base"]), SHAPES["base"]["canvas_length"]
    # `transformers` includes frozen positions in the mean entropy. A threshold out of reach keeps both comparable.
    config = options("base", confidence_threshold=1e-30, max_new_tokens=4 * length)
    prompt, seeds = prompts("base", 4), [3, 1, 4, 15]
    frozen = np.full(4 * length - 1, -1, np.int32)
    frozen[[0, 3, 4]] = 17, 90, 90  # block 0; block 1 is free
    frozen[2 * length : 3 * length] = np.arange(40, 40 + length)  # all of block 2
    frozen[3 * length + 1 :] = 5  # block 3, except its first and last position
    fixed = np.flatnonzero(frozen >= 0)
    result = reference("base", **CALM["base"]).generate(prompt, seeds, config, frozen=frozen)
    assert (result.tokens[:, fixed] == frozen[fixed]).all()
    assert (result.steps[[0, 1, 3]] == CAP).all()
    assert (result.steps[2] < CAP).all(), "a block without a free position stops when it is stable"
    free = reference("base", **CALM["base"]).generate(prompt, seeds, config)
    assert (free.tokens[:, 1:3] != result.tokens[:, 1:3]).any(), "the frozen tokens change nothing around them"

    expected = texts_of(result, config)
    assert_same(write(ours, prompt, seeds, config, [frozen] * 4), expected, f"{backend_name}, frozen")
    mixed = write(ours, prompt, seeds, config, [frozen, None, frozen, None])
    right = [expected[0], texts_of(free, config)[1], expected[2], texts_of(free, config)[3]]
    assert_same(mixed, right, f"{backend_name}, frozen and free texts in one pass")
    for row, seed in zip(prompt, seeds, strict=True):
        for event in block_diffusion(ours, Text(row, seed, frozen=frozen), config):
            if isinstance(event, Draft):
                template = frozen[event.block * length :][:length]
                here = np.flatnonzero(template >= 0)
                for name in ("canvas", "argmax"):
                    found = getattr(event, name)[here]
                    assert (found == template[here]).all(), f"block {event.block}, step {event.step}: {name} {found}"
                assert event.accepted[here].all()
                assert not event.entropy[here].any()


def test_stop_averages_over_free_positions(backend: Load, reference: Oracle, backend_name: str) -> None:
    ours, oracle = backend(backend_name, "base", **CALM["base"]), reference("base", **CALM["base"])
    prompt, length = prompts("base", len(SEEDS)), SHAPES["base"]["canvas_length"]
    # stability is not required: the mean entropy alone decides
    config = options("base", max_new_tokens=2 * length, stability_threshold=0, confidence_threshold=0.1)
    frozen = np.full(length, -1, np.int32)
    frozen[[1, 2, 6]] = 30, 60, 90
    frozen = np.tile(frozen, 2)
    # `transformers` averages over all positions, and the frozen ones add 0. A proportionally lower threshold is the same rule.
    scaled = config.replace(confidence_threshold=config.confidence_threshold * (length - 3) / length)
    result = oracle.generate(prompt, SEEDS, scaled, frozen=frozen)
    unscaled = oracle.generate(prompt, SEEDS, config, frozen=frozen)
    assert (result.steps > unscaled.steps).sum() >= 3, "the two means hardly ever decide differently"
    assert (result.steps < CAP).sum() > 10
    actual = write(ours, prompt, SEEDS, config, [frozen] * len(SEEDS))
    assert_same(actual, texts_of(result, config), f"{backend_name}, frozen, steps {np.unique(result.steps)}")

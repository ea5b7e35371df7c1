"""The sampler over both backends against ``generate`` of `transformers`, token by token, with the same noise."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from mlx_diffgemma.backends import Backend
from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.sampler import Block, Draft, block_diffusion
from support.reference import SHAPES, GenerateResult, Reference

Load = Callable[..., Backend]
Oracle = Callable[..., Reference]

# Layers that change little make a canvas settle: with these scalars some rows stop by the rule and some reach the cap.
CALM = {"base": {"layer_scalars": (0.9, 1.2)}, "odd_sizes": {"layer_scalars": (1.3, 1.6)}}
CAP = 10
SEEDS = [*range(19), 2**64 - 1]


def options(shape: str, **changed: object) -> GenerationConfig:
    """Options under which both ends of a block occur. No token of the vocabulary ends the text unless one is given."""
    text = SHAPES[shape]["text_config"]
    return GenerationConfig(
        max_new_tokens=2 * SHAPES[shape]["canvas_length"] + 1,  # makes three canvases
        max_denoising_steps=CAP,
        entropy_bound=2.0,
        confidence_threshold=1.0,
        eos_token_ids=(text["vocab_size"],),
    ).replace(**changed)


def prompts(shape: str, rows: int, length: int = 11) -> NDArray[np.int32]:
    vocab_size = SHAPES[shape]["text_config"]["vocab_size"]
    return np.random.default_rng(7).integers(0, vocab_size, (rows, length), dtype=np.int32)


def run(
    backend: Backend,
    prompt: NDArray[np.int32],
    seeds: Sequence[int],
    config: GenerationConfig,
    frozen: NDArray[np.int32] | None = None,
) -> GenerateResult:
    events = block_diffusion(backend, prompt, config, seed=seeds, frozen=frozen)
    blocks = [event for event in events if isinstance(event, Block)]
    return GenerateResult(np.concatenate([block.tokens for block in blocks], axis=1), np.array([block.steps for block in blocks]))


def assert_same(actual: GenerateResult, expected: GenerateResult, what: str) -> None:
    """Assert that tokens and steps are the same; names the first block and row in which they are not."""
    assert actual.tokens.shape == expected.tokens.shape, f"{what}: {actual.tokens.shape} tokens for {expected.tokens.shape}"
    blocks = len(expected.steps)
    tokens = actual.tokens != expected.tokens
    by_block = tokens.reshape(len(tokens), blocks, -1).any(axis=2).T | (actual.steps != expected.steps)  # [blocks, B]
    report = f"{what}: {tokens.sum()} of {tokens.size} tokens differ, and {(actual.steps != expected.steps).sum()} step counts"
    print(report)
    if by_block.any():
        block, row = np.argwhere(by_block)[0]
        length = tokens.shape[1] // blocks
        span = slice(block * length, (block + 1) * length)
        pytest.fail(
            f"{report}; first in block {block}, row {row}: {actual.tokens[row, span]} in {actual.steps[block, row]} steps "
            f"for {expected.tokens[row, span]} in {expected.steps[block, row]}"
        )


def test_the_seed_decides_what_the_reference_writes(reference: Oracle) -> None:
    oracle, config = reference("base", **CALM["base"]), options("base")
    prompt = np.repeat(prompts("base", 1), 4, axis=0)
    once = oracle.generate(prompt, [0, 1, 2, 0], config)
    assert_same(oracle.generate(prompt, [0, 1, 2, 0], config), once, "the same seeds again")
    assert_same(oracle.generate(prompt[:1], [2], config), GenerateResult(once.tokens[2:3], once.steps[:, 2:3]), "one row alone")
    assert (once.tokens[0] == once.tokens[3]).all(), "one seed twice in a batch"
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (once.tokens[one] != once.tokens[other]).any(), f"seeds {one} and {other} write the same"


@pytest.mark.parametrize(
    ("shape", "stability", "confidence"), [("base", 0, 0.1), ("base", 1, 1.0), ("base", 2, 1.0), ("odd_sizes", 1, 0.2)]
)
def test_twenty_seeds(backend: Load, reference: Oracle, backend_name: str, shape: str, stability: int, confidence: float) -> None:
    config = options(shape, stability_threshold=stability, confidence_threshold=confidence)
    prompt = prompts(shape, len(SEEDS))
    expected = reference(shape, **CALM[shape]).generate(prompt, SEEDS, config)
    early, capped = (expected.steps < CAP).sum(), (expected.steps == CAP).sum()
    assert min(early, capped) >= 3, f"{early} stops by the rule and {capped} at the cap are too few to tell"
    assert len(expected.steps) == 3
    assert len(np.unique(expected.tokens)) > 40, "a text of few tokens shows little"
    what = f"{backend_name}, {shape}, stability {stability}, {early} early stops of {expected.steps.size}"
    assert_same(run(backend(backend_name, shape, **CALM[shape]), prompt, SEEDS, config), expected, what)


def test_default_options(backend: Load, reference: Oracle, backend_name: str) -> None:
    config = GenerationConfig(max_new_tokens=12)
    prompt = prompts("one_layer", len(SEEDS), length=3)
    expected = reference("one_layer", logit_std=6.0).generate(prompt, SEEDS, config)
    stops = np.unique(expected.steps)
    assert len(stops) > 3, f"all blocks took {stops} steps"
    assert_same(run(backend(backend_name, "one_layer", logit_std=6.0), prompt, SEEDS, config), expected, backend_name)


def test_end_token_inside_a_block(backend: Load, reference: Oracle, backend_name: str) -> None:
    ours, oracle = backend(backend_name, "base", **CALM["base"]), reference("base", **CALM["base"])
    prompt, length = prompts("base", len(SEEDS)), SHAPES["base"]["canvas_length"]
    some, every = tuple(range(1, 9)), tuple(range(1, 100))
    for ends in (some, every):
        config = options("base", eos_token_ids=ends, pad_token_id=127, max_new_tokens=4 * length)
        expected = oracle.generate(prompt, SEEDS, config)
        is_end = np.isin(expected.tokens, ends)
        first = is_end.argmax(axis=1)[is_end.any(axis=1)]
        if ends == some:
            assert 3 <= len(first) < len(SEEDS), f"{len(first)} of {len(SEEDS)} rows end"
            assert (first >= length).any(), "no row ends in a later block"
        else:
            assert len(first) == len(SEEDS), "a row does not end"
            assert len(expected.steps) < 4, "all rows ended, and yet all canvases were made"
        assert ((first % length > 0) & (first % length < length - 1)).any(), "no end token lies inside a block"
        actual = run(ours, prompt, SEEDS, config)
        assert_same(actual, expected, f"{backend_name}, {len(ends)} end tokens")
        for row in np.flatnonzero(is_end.any(axis=1)):
            assert (actual.tokens[row, is_end[row].argmax() + 1 :] == 127).all(), f"row {row} goes on after its end"


@pytest.mark.parametrize("shape", CALM)
def test_batch_equals_its_rows(backend: Load, backend_name: str, shape: str) -> None:
    ours, config = backend(backend_name, shape, **CALM[shape]), options(shape, eos_token_ids=tuple(range(1, 9)))
    prompt, seeds = prompts(shape, 4), [11, 5, 2**40 + 3, 0]
    together = run(ours, prompt, seeds, config)
    assert len(np.unique(together.steps)) > 2, f"the rows all take about the same steps: {together.steps}"
    for row in range(4):
        alone = run(ours, prompt[row : row + 1], seeds[row : row + 1], config)
        width = alone.tokens.shape[1]  # a row that ends alone makes no more canvases
        beside = GenerateResult(together.tokens[row : row + 1, :width], together.steps[: len(alone.steps), row : row + 1])
        assert_same(beside, alone, f"{backend_name}, {shape}, row {row} of a batch")
        assert not together.steps[len(alone.steps) :, row].any(), f"row {row} went on after its end"
        assert (together.tokens[row, width:] == config.pad_token_id).all()


def test_frozen_positions(backend: Load, reference: Oracle, backend_name: str) -> None:
    ours, length = backend(backend_name, "base", **CALM["base"]), SHAPES["base"]["canvas_length"]
    # The mean entropy of `transformers` is over frozen positions too; a threshold out of reach keeps the two comparable.
    config = options("base", confidence_threshold=1e-30, max_new_tokens=4 * length)
    prompt, seeds = prompts("base", 4), [3, 1, 4, 15]
    frozen = np.full(4 * length - 1, -1, np.int32)
    frozen[[0, 3, 4]] = 17, 90, 90  # block 0; block 1 is free
    frozen[2 * length : 3 * length] = np.arange(40, 40 + length)  # all of block 2
    frozen[3 * length + 1 :] = 5  # block 3, but for its two ends
    fixed = np.flatnonzero(frozen >= 0)
    expected = reference("base", **CALM["base"]).generate(prompt, seeds, config, frozen=frozen)
    assert (expected.tokens[:, fixed] == frozen[fixed]).all()
    assert (expected.steps[[0, 1, 3]] == CAP).all()
    assert (expected.steps[2] < CAP).all(), "a block without a free position stops when it is stable"
    free = reference("base", **CALM["base"]).generate(prompt, seeds, config)
    assert (free.tokens[:, 1:3] != expected.tokens[:, 1:3]).any(), "the frozen tokens change nothing around them"

    assert_same(run(ours, prompt, seeds, config, frozen), expected, f"{backend_name}, frozen")
    for event in block_diffusion(ours, prompt, config, seed=seeds, frozen=frozen):
        if isinstance(event, Draft):
            template = frozen[event.block * length :][:length]
            here = np.flatnonzero(template >= 0)
            for name in ("canvas", "argmax"):
                found = getattr(event, name)[:, here]
                assert (found == template[here]).all(), f"block {event.block}, step {event.step}: {name} {found}"
            assert event.accepted[:, here].all()
            assert not event.entropy[:, here].any()


def test_stop_averages_over_free_positions(backend: Load, reference: Oracle, backend_name: str) -> None:
    ours, oracle = backend(backend_name, "base", **CALM["base"]), reference("base", **CALM["base"])
    prompt, length = prompts("base", len(SEEDS)), SHAPES["base"]["canvas_length"]
    # no need of stability: the mean entropy alone decides
    config = options("base", max_new_tokens=2 * length, stability_threshold=0, confidence_threshold=0.1)
    frozen = np.full(length, -1, np.int32)
    frozen[[1, 2, 6]] = 30, 60, 90
    frozen = np.tile(frozen, 2)
    # `transformers` averages over all positions, of which the frozen ones add nothing: a threshold lower in proportion is the
    # same rule.
    scaled = config.replace(confidence_threshold=config.confidence_threshold * (length - 3) / length)
    expected = oracle.generate(prompt, SEEDS, scaled, frozen=frozen)
    unscaled = oracle.generate(prompt, SEEDS, config, frozen=frozen)
    assert (expected.steps > unscaled.steps).sum() >= 3, "the two means hardly ever decide differently"
    assert (expected.steps < CAP).sum() > 10
    assert_same(run(ours, prompt, SEEDS, config, frozen), expected, f"{backend_name}, frozen, steps {np.unique(expected.steps)}")

"""Texts after prompts with images, on both backends, against ``generate`` of `transformers` with its own image mask."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from mlx_diffgemma.backends import Backend, Row
from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.prefix_cache import PrefixCache, read
from mlx_diffgemma.prompts import PieceRule, PromptTokens, place_images
from mlx_diffgemma.sampler import Block, Text, diffuse
from support.pictures import Placed, random_picture, random_text
from support.reference import GenerateResult, Reference

Load = Callable[..., Backend]
Oracle = Callable[..., Reference]

# With these scalars some texts stop by the rule and some reach the step limit.
CALM = {"pictures": {"layer_scalars": (0.9, 1.2)}, "large_patches": {"layer_scalars": (1.3, 1.6)}}
SEEDS = range(6)

#: The length of a prompt, and (start, rows, columns) of the soft tokens of its images.
PROMPTS: dict[str, tuple[int, tuple[tuple[int, int, int], ...]]] = {
    "one image, larger than the window": (30, ((3, 3, 5),)),
    "two images": (44, ((1, 2, 3), (20, 4, 5))),
    "five images, the last at the end": (60, ((1, 1, 1), (4, 2, 4), (13, 1, 9), (30, 3, 5), (54, 2, 3))),
}


def prompt_with(backend: Backend, name: str) -> tuple[NDArray[np.int32], Placed]:
    length, sizes = PROMPTS[name]
    assert backend.config.vision is not None
    images = [(start, random_picture(backend.config.vision, *size, seed=seed)) for seed, (start, *size) in enumerate(sizes)]
    return random_text(backend, length, images), images


def write(backend: Backend, prompt: PromptTokens, config: GenerationConfig, kept: PrefixCache | None) -> list[GenerateResult]:
    """What the sampler writes after the prompt, for each seed."""
    assert backend.config.image_token_id is not None
    rule = PieceRule(backend.config.canvas_length, soft=(backend.config.image_token_id,))
    context = read(backend, prompt, rule, kept)
    texts = [Text(np.empty(0, np.int32), seed, context.fork().cache) for seed in SEEDS]
    blocks: list[list[Block]] = [[] for _ in texts]
    for index, event in diffuse(backend, texts, config, batch="fast"):
        if isinstance(event, Block):
            blocks[index].append(event)
    return [
        GenerateResult(np.concatenate([block.tokens for block in each]), np.array([block.steps for block in each]))
        for each in blocks
    ]


@pytest.mark.parametrize("shape", CALM)
@pytest.mark.parametrize("name", PROMPTS)
def test_tokens_and_steps_are_those_of_transformers(
    backend: Load, reference: Oracle, backend_name: str, shape: str, name: str
) -> None:
    ours = backend(backend_name, shape, image_mask="transformers", **CALM[shape])
    ids, images = prompt_with(ours, name)
    config = GenerationConfig(
        max_new_tokens=2 * ours.config.canvas_length + 1,  # makes three canvases
        max_denoising_steps=10,
        entropy_bound=2.0,
        confidence_threshold=1.0,
        eos_token_ids=(ours.config.vocab_size - 1,),
    )
    assert ours.config.image_token_id is not None
    prompt = place_images(ids, [patches for _, patches in images], (ours.config.image_token_id,))
    kept = PrefixCache()
    cold, warm = write(ours, prompt, config, kept), write(ours, prompt, config, kept)
    oracle, wrong = reference(shape, **CALM[shape]), []
    for seed in SEEDS:
        theirs = oracle.generate(ids[None], [seed], config, images=images)
        for what, mine in (("cold", cold[seed]), ("warm", warm[seed])):
            count = len(mine.tokens)
            if (
                mine.tokens.tolist() != theirs.tokens[0][:count].tolist()
                or mine.steps.tolist() != theirs.steps[: len(mine.steps), 0].tolist()
            ):
                wrong.append(f"seed {seed}, {what}: {mine} for {theirs}")
            assert not theirs.steps[len(mine.steps) :].any(), "the text of transformers goes on"
    steps = [step for each in cold for step in each.steps.tolist()]
    print(f"{shape}, {name}: {len(wrong)} of {2 * len(SEEDS)} texts differ; steps {sorted(steps)}")
    assert not wrong, wrong[0]


@pytest.mark.parametrize("name", PROMPTS)
def test_what_is_cached_changes_no_bit(backend: Load, backend_name: str, name: str) -> None:
    ours = backend(backend_name, "pictures", **CALM["pictures"])
    ids, images = prompt_with(ours, name)
    soft, end = ours.config.image_token_id, 7
    assert soft is not None
    rule = PieceRule(ours.config.canvas_length, (end,), soft=(soft,))
    last = images[-1][0]
    ids[last - 1] = end  # a piece ends before the last image
    prompt = place_images(ids, [patches for _, patches in images], (soft,))
    kept, canvas = PrefixCache(), np.arange(ours.config.canvas_length, dtype=np.int32)
    read(ours, PromptTokens(np.append(ids[:last], [9, 10]).astype(np.int32), prompt.images[:-1]), rule, kept)
    warm, cold, again = (read(ours, prompt, rule, each) for each in (kept, None, kept))
    assert (warm.cached_tokens, cold.cached_tokens, again.cached_tokens) == (last, 0, len(prompt))
    logits = [ours.logits([Row(canvas, each.fork().cache, 1.0)])[0] for each in (warm, cold, again)]
    print(f"{name}: {[int((each != logits[1]).sum()) for each in logits]} logits differ from those without a cache")
    assert all(np.array_equal(each, logits[1]) for each in logits)

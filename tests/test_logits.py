"""Logits and hidden states of both backends against `transformers`, in float32 on small random models.

Every shape runs over prompts that end on either side of the sliding window, and over three blocks, so that caches are appended
to by whole canvases.
"""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from mlx_diffgemma.backends import Backend
from mlx_diffgemma.errors import BackendError
from support.comparing import BACKENDS, assert_close
from support.reference import SHAPES, Reference

ATOL = 1e-4
TEMPERATURE = 0.6
BLOCKS = 3

Load = Callable[..., Backend]
Oracle = Callable[..., Reference]


def random_tokens(backend: Backend, rows: int, length: int, seed: int = 0) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, backend.config.vocab_size, (rows, length), dtype=np.int32)


def prompt_lengths(window: int) -> list[int]:
    """One token, shorter than the window, about as long, and much longer."""
    return sorted({1, window // 2, window - 2, window - 1, window, window + 1, window + 2, 4 * window + 3})


@pytest.mark.parametrize("shape", SHAPES)
def test_canvas_logits_of_three_blocks(backend: Load, reference: Oracle, backend_name: str, shape: str) -> None:
    ours, oracle = backend(backend_name, shape), reference(shape)
    for length in prompt_lengths(ours.config.sliding_window):
        chunks = [random_tokens(ours, 2, length, seed=length)]
        cache = ours.new_cache(2)
        for block in range(BLOCKS):
            case = f"{backend_name}, {shape}, prompt of {length}, block {block}"
            ours.encode(chunks[-1], cache)
            assert len(cache) == sum(chunk.shape[1] for chunk in chunks)
            first, second = (random_tokens(ours, 2, ours.config.canvas_length, seed) for seed in (100 + block, 200 + block))
            expected = oracle.canvas_logits(chunks, first)
            assert_close(ours.logits(first, cache), expected, ATOL, f"{case}, first step")
            signal = ours.denoise(first, cache, temperature=TEMPERATURE).self_conditioning
            expected = oracle.canvas_logits(chunks, second, expected / TEMPERATURE)
            assert_close(ours.logits(second, cache, self_conditioning=signal), expected, ATOL, f"{case}, second step")
            chunks.append(second)


@pytest.mark.parametrize("shape", SHAPES)
def test_causal_logits_at_every_position(backend: Load, reference: Oracle, backend_name: str, shape: str) -> None:
    ours, oracle = backend(backend_name, shape), reference(shape)
    window = ours.config.sliding_window
    for chunks in ([1, window + 2], [window - 1, 1, 1], [window, 3], [4 * window + 3, 2 * window]):
        tokens = [random_tokens(ours, 2, length, seed) for seed, length in enumerate(chunks)]
        every, last = ours.new_cache(2), ours.new_cache(2)
        for index, chunk in enumerate(tokens):
            case = f"{backend_name}, {shape}, chunks {chunks[: index + 1]}"
            expected = oracle.causal_logits(tokens[: index + 1])
            assert_close(ours.logits(chunk, every, causal=True), expected, ATOL, f"{case}, every position")
            answer = ours.encode(chunk, last, logits=True)
            assert answer is not None
            assert_close(answer, expected[:, -1], ATOL, f"{case}, encode")
        assert len(every) == len(last) == sum(chunks)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", ["odd_sizes", "six_layers"])
def test_hidden_states(backend: Load, reference: Oracle, backend_name: str, shape: str, causal: bool) -> None:
    ours, oracle = backend(backend_name, shape), reference(shape)
    prompt, canvas = random_tokens(ours, 2, 21), random_tokens(ours, 2, ours.config.canvas_length, 1)
    cache = ours.new_cache(2)
    trace: list[NDArray[np.float32]] = []
    if causal:
        ours.logits(prompt, cache, causal=True, trace=trace)
    else:
        ours.encode(prompt, cache)
        ours.logits(canvas, cache, trace=trace)
    expected = oracle.hidden_states([prompt], None if causal else canvas)
    assert len(trace) == len(expected) == ours.config.num_hidden_layers + 2
    for index, (state, right) in enumerate(zip(trace, expected, strict=True)):
        assert_close(state, right, ATOL, f"{backend_name}, {shape}, causal={causal}, state {index} of {len(trace)}")


@pytest.mark.parametrize("shape", ["base", "window_below_canvas"])
def test_shorter_canvas(backend: Load, reference: Oracle, backend_name: str, shape: str) -> None:
    ours, oracle = backend(backend_name, shape), reference(shape)
    prompt = random_tokens(ours, 2, 13)
    cache = ours.new_cache(2)
    ours.encode(prompt, cache)
    for length in (1, ours.config.canvas_length - 1):
        canvas = random_tokens(ours, 2, length, seed=length)
        expected = oracle.canvas_logits([prompt], canvas)
        assert_close(ours.logits(canvas, cache), expected, ATOL, f"{backend_name}, {shape}, canvas of {length}")


@pytest.mark.parametrize("shape", ["base", "odd_sizes", "window_below_canvas"])
def test_chunked_encode_equals_whole(backend: Load, backend_name: str, shape: str) -> None:
    ours = backend(backend_name, shape)
    window = ours.config.sliding_window
    prompt = random_tokens(ours, 2, 5 * window)
    canvas = random_tokens(ours, 2, ours.config.canvas_length, 1)
    whole = ours.new_cache(2)
    ours.encode(prompt, whole)
    expected = ours.logits(canvas, whole)
    for ends in ([1], [window], [window - 1, window + 1], [3 * window, 3 * window + 1], [1, 2, 3, 4]):
        chunked = ours.new_cache(2)
        for chunk in np.split(prompt, ends, axis=1):
            ours.encode(chunk, chunked)
        assert len(chunked) == len(whole)
        assert_close(ours.logits(canvas, chunked), expected, ATOL, f"{backend_name}, {shape}, encoded in parts ending at {ends}")


@pytest.mark.parametrize("shape", ["base", "wide_window"])
def test_batch_equals_its_rows(backend: Load, backend_name: str, shape: str) -> None:
    ours = backend(backend_name, shape)
    chunks = [random_tokens(ours, 3, 11), random_tokens(ours, 3, ours.config.canvas_length, 1)]
    canvas = random_tokens(ours, 3, ours.config.canvas_length, 2)

    def run(rows: slice) -> NDArray[np.float32]:
        cache = ours.new_cache(len(canvas[rows]))
        for chunk in chunks:
            ours.encode(chunk[rows], cache)
        signal = ours.denoise(canvas[rows], cache, temperature=TEMPERATURE).self_conditioning
        return ours.logits(canvas[rows], cache, self_conditioning=signal)

    together = run(slice(None))
    for row in range(3):
        alone = run(slice(row, row + 1))
        assert_close(together[row : row + 1], alone, ATOL, f"{backend_name}, {shape}, row {row} of a batch")


def test_bfloat16_checkpoint_in_the_layout_of_the_hub(backend: Load, reference: Oracle, backend_name: str) -> None:
    tuning = {"hub_layout": True, "bfloat16": True}
    ours, oracle = backend(backend_name, "six_layers", **tuning), reference("six_layers", **tuning)
    prompt, canvas = random_tokens(ours, 2, 21), random_tokens(ours, 2, ours.config.canvas_length, 1)
    cache = ours.new_cache(2)
    ours.encode(prompt, cache)
    expected = oracle.canvas_logits([prompt], canvas)
    assert_close(ours.logits(canvas, cache), expected, ATOL, f"{backend_name}, BF16 weights in the hub's layout")


@pytest.mark.parametrize("shape", ["one_layer", "all_full", "wide_window"])
def test_bfloat16_is_near_float32(backend: Load, backend_name: str, shape: str) -> None:
    if backend_name == "mlx" and backend("mlx", shape).device == "cpu":
        with pytest.raises(BackendError, match="in float32 only"):  # MLX's gather_mm takes nothing else on a CPU
            backend("mlx", shape, "bfloat16", bfloat16=True)
        return
    answers = []
    for dtype in ("float32", "bfloat16"):
        ours = backend(backend_name, shape, dtype, bfloat16=True)
        prompt, canvas = random_tokens(ours, 4, 21), random_tokens(ours, 4, ours.config.canvas_length, 1)
        cache = ours.new_cache(4)
        ours.encode(prompt, cache)
        logits = ours.logits(canvas, cache).astype(np.float64)
        answers.append(logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)))
    full, half = answers
    divergence = (np.exp(full) * (full - half)).sum(axis=-1)
    report = f"{backend_name}, {shape}: KL {divergence.mean():.2e} nats in the mean, {divergence.max():.2e} at most"
    print(report)
    assert np.isfinite(divergence).all()
    assert divergence.mean() < 1e-2, report
    assert divergence.max() > 1e-9, f"{report}: bfloat16 was not used"


@pytest.mark.skipif(len(BACKENDS) < 2, reason="one backend was asked for")
@pytest.mark.parametrize("shape", SHAPES)
def test_backends_agree(backend: Load, shape: str) -> None:
    answers = []
    for name in BACKENDS:
        ours = backend(name, shape)
        cache = ours.new_cache(2)
        prompt = random_tokens(ours, 2, 19)
        canvas = random_tokens(ours, 2, ours.config.canvas_length, 1)
        causal = ours.logits(prompt, cache, causal=True)
        signal = ours.denoise(canvas, cache, temperature=TEMPERATURE).self_conditioning
        answers.append((causal, ours.logits(canvas, cache, self_conditioning=signal)))
    for kind, one, other in zip(("causal", "canvas"), *answers, strict=True):
        assert_close(one, other, ATOL, f"{' and '.join(BACKENDS)}, {shape}, {kind} logits")

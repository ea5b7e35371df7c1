"""Logits and hidden states of both backends against `transformers`, in float32 on small random models.

Every shape runs on prompts shorter and longer than the sliding window, and on three blocks, so that whole canvases are appended
to caches. `transformers` takes batches of one length; our side takes each row as a separate text.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mlx_diffgemma.backends import QUERY_TILE, SCORE_TILE, Backend, Cache, Piece, Row
from mlx_diffgemma.errors import BackendError
from mlx_diffgemma.noise import sampling_key
from support.comparing import BACKENDS, assert_close
from support.reference import SHAPES, Reference

ATOL = 1e-4
TEMPERATURE = 0.6
BLOCKS = 3

Load = Callable[..., Backend]
Oracle = Callable[..., Reference]


def random_tokens(backend: Backend, length: int, seed: int = 0) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, backend.config.vocab_size, length, dtype=np.int32)


def random_rows(backend: Backend, rows: int, length: int, seed: int = 0) -> NDArray[np.int32]:
    """Random tokens [rows, length]."""
    return random_tokens(backend, rows * length, seed).reshape(rows, length)


def pieces(tokens: Sequence[NDArray[np.int32]], caches: Sequence[Cache]) -> list[Piece]:
    return [Piece(each, cache) for each, cache in zip(tokens, caches, strict=True)]


def rows_of(canvases: Sequence[NDArray[np.int32]], caches: Sequence[Cache], signals: Sequence[Any] | None = None) -> list[Row]:
    given = zip(canvases, caches, signals or [None] * len(caches), strict=True)
    return [Row(canvas, cache, TEMPERATURE, self_conditioning=signal) for canvas, cache, signal in given]


def signals_of(backend: Backend, rows: Sequence[Row]) -> list[Any]:
    return [answer.self_conditioning for answer in backend.denoise(rows)]


def prompt_lengths(window: int) -> list[int]:
    """Lengths: one token, shorter than the window, about as long, and much longer."""
    return sorted({1, window // 2, window - 2, window - 1, window, window + 1, window + 2, 4 * window + 3})


@pytest.mark.parametrize("shape", SHAPES)
def test_canvas_logits_of_three_blocks(backend: Load, reference: Oracle, backend_name: str, shape: str) -> None:
    ours, oracle = backend(backend_name, shape), reference(shape)
    for length in prompt_lengths(ours.config.sliding_window):
        chunks = [random_rows(ours, 2, length, seed=length)]
        caches = [ours.new_cache() for _ in range(2)]
        for block in range(BLOCKS):
            case = f"{backend_name}, {shape}, prompt of {length}, block {block}"
            ours.encode(pieces(chunks[-1], caches))
            assert [len(cache) for cache in caches] == [sum(chunk.shape[1] for chunk in chunks)] * 2
            first, second = (random_rows(ours, 2, ours.config.canvas_length, seed) for seed in (100 + block, 200 + block))
            expected = oracle.canvas_logits(chunks, first)
            assert_close(ours.logits(rows_of(first, caches)), expected, ATOL, f"{case}, first step")
            signals = signals_of(ours, rows_of(first, caches))
            expected = oracle.canvas_logits(chunks, second, expected / TEMPERATURE)
            assert_close(ours.logits(rows_of(second, caches, signals)), expected, ATOL, f"{case}, second step")
            chunks.append(second)


@pytest.mark.parametrize("shape", SHAPES)
def test_causal_logits_at_every_position(backend: Load, reference: Oracle, backend_name: str, shape: str) -> None:
    ours, oracle = backend(backend_name, shape), reference(shape)
    window = ours.config.sliding_window
    for chunks in ([1, window + 2], [window - 1, 1, 1], [window, 3], [4 * window + 3, 2 * window]):
        tokens = [random_rows(ours, 2, length, seed) for seed, length in enumerate(chunks)]
        every, last = ([ours.new_cache() for _ in range(2)] for _ in range(2))
        for index, chunk in enumerate(tokens):
            case = f"{backend_name}, {shape}, chunks {chunks[: index + 1]}"
            expected = oracle.causal_logits(tokens[: index + 1])
            assert_close(ours.logits(pieces(chunk, every)), expected, ATOL, f"{case}, every position")
            ours.encode(pieces(chunk, last))
            assert_close(ours.next_logits(last), expected[:, -1], ATOL, f"{case}, the next token")
        assert [len(cache) for cache in (*every, *last)] == [sum(chunks)] * 4


def test_causal_logits_of_a_piece_longer_than_a_tile_of_queries(backend: Load, reference: Oracle, backend_name: str) -> None:
    ours, oracle = backend(backend_name, "base"), reference("base")
    for lengths in ([QUERY_TILE + 5], [7, QUERY_TILE + 1], [2 * QUERY_TILE - 20]):  # the context is 512 tokens
        tokens = [random_rows(ours, 1, length, seed) for seed, length in enumerate(lengths)]
        cache = ours.new_cache()
        for index, chunk in enumerate(tokens):
            [logits] = ours.logits([Piece(chunk[0], cache)])
            expected = oracle.causal_logits(tokens[: index + 1])[0]
            assert_close(logits, expected, ATOL, f"{backend_name}, pieces of {lengths[: index + 1]}")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", ["odd_sizes", "six_layers"])
def test_hidden_states(backend: Load, reference: Oracle, backend_name: str, shape: str, causal: bool) -> None:
    ours, oracle = backend(backend_name, shape), reference(shape)
    prompt, canvas = random_rows(ours, 2, 21), random_rows(ours, 2, ours.config.canvas_length, 1)
    caches = [ours.new_cache() for _ in range(2)]
    trace: list[list[NDArray[np.float32]]] = []
    if causal:
        ours.logits(pieces(prompt, caches), trace)
    else:
        ours.encode(pieces(prompt, caches))
        ours.logits(rows_of(canvas, caches), trace)
    expected = oracle.hidden_states([prompt], None if causal else canvas)
    assert len(trace) == 2
    assert len(trace[0]) == len(trace[1]) == len(expected) == ours.config.num_hidden_layers + 2
    for index, (state, right) in enumerate(zip(zip(*trace, strict=True), expected, strict=True)):
        assert_close(state, right, ATOL, f"{backend_name}, {shape}, causal={causal}, state {index} of {len(expected)}")


@pytest.mark.parametrize("shape", ["base", "window_below_canvas"])
def test_shorter_canvas(backend: Load, reference: Oracle, backend_name: str, shape: str) -> None:
    ours, oracle = backend(backend_name, shape), reference(shape)
    prompt = random_rows(ours, 2, 13)
    caches = [ours.new_cache() for _ in range(2)]
    ours.encode(pieces(prompt, caches))
    for length in (1, ours.config.canvas_length - 1):
        canvas = random_rows(ours, 2, length, seed=length)
        expected = oracle.canvas_logits([prompt], canvas)
        assert_close(ours.logits(rows_of(canvas, caches)), expected, ATOL, f"{backend_name}, {shape}, canvas of {length}")


@pytest.mark.parametrize("shape", ["base", "odd_sizes", "window_below_canvas"])
def test_encoding_in_pieces_equals_encoding_at_once(backend: Load, backend_name: str, shape: str) -> None:
    ours = backend(backend_name, shape)
    window = ours.config.sliding_window
    prompt = random_tokens(ours, 5 * window)
    canvas = random_tokens(ours, ours.config.canvas_length, 1)
    whole = ours.new_cache()
    ours.encode([Piece(prompt, whole)])
    [expected] = ours.logits(rows_of([canvas], [whole]))
    for ends in ([1], [window], [window - 1, window + 1], [3 * window, 3 * window + 1], [1, 2, 3, 4]):
        parted = ours.new_cache()
        for part in np.split(prompt, ends):
            ours.encode([Piece(part, parted)])
        assert len(parted) == len(whole)
        [logits] = ours.logits(rows_of([canvas], [parted]))
        assert_close(logits, expected, ATOL, f"{backend_name}, {shape}, encoded in parts ending at {ends}")


# Several texts in one pass.


@pytest.mark.parametrize("shape", ["base", "odd_sizes", "wide_window", "window_below_canvas"])
def test_unequal_texts_side_by_side_equal_texts_alone(backend: Load, reference: Oracle, backend_name: str, shape: str) -> None:
    """Each row has its own prompt, canvas and other inputs. Rows in their first step share a pass with rows in later steps."""
    ours, oracle = backend(backend_name, shape), reference(shape)
    window, length = ours.config.sliding_window, ours.config.canvas_length
    prompts = [random_tokens(ours, size, size) for size in (1, window - 1, window + 3, 4 * window + 1)]
    blocks = [random_tokens(ours, size, 50 + size) for size in (length, 2, length - 1, 1)]
    canvases = [random_tokens(ours, size, 90 + size) for size in (length, length - 1, 1, length)]
    caches = [ours.new_cache() for _ in prompts]
    for parts in (prompts, blocks):
        ours.encode(pieces(parts, caches))
    assert [len(cache) for cache in caches] == [len(p) + len(b) for p, b in zip(prompts, blocks, strict=True)]
    signals = signals_of(ours, rows_of(canvases, caches))
    known = [signals[0], None, signals[2], None]
    together = ours.logits(rows_of(canvases, caches, known))
    last = ours.next_logits(caches)
    for index, (prompt, block, canvas) in enumerate(zip(prompts, blocks, canvases, strict=True)):
        case = f"{backend_name}, {shape}, text {index}"
        cache = ours.new_cache()
        for part in (prompt, block):
            ours.encode([Piece(part, cache)])
        signal = signals_of(ours, rows_of([canvas], [cache]))[0] if known[index] is not None else None
        [alone] = ours.logits(rows_of([canvas], [cache], [signal]))
        assert_close(together[index], alone, ATOL, f"{case} beside others and alone")
        assert_close(last[index], ours.next_logits([cache])[0], ATOL, f"{case}, the next token")
        before = [prompt[None], block[None]]
        expected = oracle.canvas_logits(before, canvas[None])
        if known[index] is not None:
            expected = oracle.canvas_logits(before, canvas[None], expected / TEMPERATURE)
        assert_close(together[index], expected[0], ATOL, f"{case} against transformers")
        assert_close(last[index], oracle.causal_logits(before)[0, -1], ATOL, f"{case} against transformers, the next token")


def test_more_positions_than_have_logits_at_once(backend: Load, backend_name: str) -> None:
    ours = backend(backend_name, "window_below_canvas")
    length = ours.config.canvas_length
    count = SCORE_TILE // length + 2  # a tile ends within these rows
    canvases = [random_tokens(ours, length, seed) for seed in range(count)]
    caches = [ours.new_cache() for _ in canvases]
    ours.encode(pieces([random_tokens(ours, 1 + seed % 7, seed) for seed in range(count)], caches))
    rows = [replace(row, noise_key=sampling_key(seed, 0, 1)) for seed, row in enumerate(rows_of(canvases, caches))]
    together = ours.denoise(rows)
    for index, row in enumerate(rows):
        [alone] = ours.denoise([row])
        assert together[index].argmax.tolist() == alone.argmax.tolist(), f"{backend_name}, row {index}"
        assert together[index].sampled.tolist() == alone.sampled.tolist(), f"{backend_name}, row {index}"
        assert_close(together[index].entropy, alone.entropy, ATOL, f"{backend_name}, row {index}")
        beside, alone_logits = (
            ours.logits([replace(row, self_conditioning=answer.self_conditioning)])[0] for answer in (together[index], alone)
        )
        assert_close(beside, alone_logits, ATOL, f"{backend_name}, row {index}, the next step")


@pytest.mark.parametrize("shape", ["base", "odd_sizes"])
def test_forks_go_on_for_themselves(backend: Load, backend_name: str, shape: str) -> None:
    ours = backend(backend_name, shape)
    window, length = ours.config.sliding_window, ours.config.canvas_length
    prompt, canvas = random_tokens(ours, 3 * window), random_tokens(ours, length, 99)
    shared = ours.new_cache()
    ours.encode([Piece(prompt, shared)])
    forks = [shared.fork() for _ in range(3)]
    goes_on = [random_tokens(ours, size, size) for size in (length, 2 * window + 1, 1)]
    ours.encode(pieces(goes_on, forks))
    ours.encode([Piece(goes_on[0], forks[0])])  # the first fork to commit keeps the shared memory
    written = [[prompt], *([prompt, more] for more in goes_on)]
    written[1].append(goes_on[0])
    for index, (cache, parts) in enumerate(zip((shared, *forks), written, strict=True)):
        fresh = ours.new_cache()
        for part in parts:
            ours.encode([Piece(part, fresh)])
        assert len(cache) == len(fresh)
        [logits], [expected] = ours.logits(rows_of([canvas], [cache])), ours.logits(rows_of([canvas], [fresh]))
        assert_close(logits, expected, ATOL, f"{backend_name}, {shape}, fork {index}")
        assert_close(ours.next_logits([cache]), ours.next_logits([fresh]), ATOL, f"{backend_name}, {shape}, fork {index}")


# The types of the weights.


def test_bfloat16_checkpoint_in_the_layout_of_the_hub(backend: Load, reference: Oracle, backend_name: str) -> None:
    tuning = {"hub_layout": True, "bfloat16": True}
    ours, oracle = backend(backend_name, "six_layers", **tuning), reference("six_layers", **tuning)
    prompt, canvas = random_rows(ours, 2, 21), random_rows(ours, 2, ours.config.canvas_length, 1)
    caches = [ours.new_cache() for _ in range(2)]
    ours.encode(pieces(prompt, caches))
    expected = oracle.canvas_logits([prompt], canvas)
    assert_close(ours.logits(rows_of(canvas, caches)), expected, ATOL, f"{backend_name}, BF16 weights in the hub's layout")


@pytest.mark.parametrize("shape", ["one_layer", "all_full", "wide_window"])
def test_bfloat16_is_near_float32(backend: Load, backend_name: str, shape: str) -> None:
    if backend_name == "mlx" and backend("mlx", shape).device == "cpu":
        with pytest.raises(BackendError, match="in float32 only"):  # MLX's gather_mm takes no other type on a CPU
            backend("mlx", shape, "bfloat16", bfloat16=True)
        return
    answers = []
    for dtype in ("float32", "bfloat16"):
        ours = backend(backend_name, shape, dtype, bfloat16=True)
        prompt, canvas = random_rows(ours, 4, 21), random_rows(ours, 4, ours.config.canvas_length, 1)
        caches = [ours.new_cache() for _ in range(4)]
        ours.encode(pieces(prompt, caches))
        logits = np.stack(ours.logits(rows_of(canvas, caches))).astype(np.float64)
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
        caches = [ours.new_cache() for _ in range(2)]
        prompts = [random_tokens(ours, size) for size in (19, 6)]
        canvases = [random_tokens(ours, ours.config.canvas_length, seed) for seed in (1, 2)]
        causal = ours.logits(pieces(prompts, caches))
        signals = signals_of(ours, rows_of(canvases, caches))
        answers.append((causal, ours.logits(rows_of(canvases, caches, signals))))
    for kind, one, other in zip(("causal", "canvas"), *answers, strict=True):
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_close(*pair, ATOL, f"{' and '.join(BACKENDS)}, {shape}, {kind} logits of text {index}")

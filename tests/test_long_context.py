"""The released model's attention up to its full context: the keys that a position sees, and the memory that a step allocates."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import DynamicCache

from mlx_diffgemma.backends import Backend, Piece, Row, load_backend
from mlx_diffgemma.checkpoint import Checkpoint
from support.comparing import assert_close
from support.long_context import WINDOW, filled, make_long_checkpoint
from support.reference import Reference


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_long_checkpoint(tmp_path_factory.mktemp("long"))


@pytest.fixture(scope="module")
def ours(folder: Path, backend_name: str) -> Backend:
    return load_backend(Checkpoint.open(folder), backend_name, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Reference:
    return Reference(folder)


def tokens(count: int, seed: int) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, 512, count).astype(np.int32)


def reference_logits(oracle: Reference, dtype: torch.dtype, start: int, before: Any, canvas: Any) -> NDArray[np.float64]:
    """Logits of a canvas after tokens whose positions begin at ``start``, with nothing before them."""
    model: Any = oracle.model.to(dtype)
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    name = oracle.cache_name
    place = start + len(before)
    positions = [torch.arange(start, place)[None], torch.arange(place, place + len(canvas))[None]]
    with torch.no_grad():
        model.model.encoder(input_ids=torch.tensor(before[None]).long(), position_ids=positions[0], **{name: cache})
        ids = torch.tensor(canvas[None]).long()
        logits = model(decoder_input_ids=ids, decoder_position_ids=positions[1], **{name: cache}).logits
    found: NDArray[np.float64] = logits[0].double().numpy()
    return found


@pytest.mark.parametrize("start", [0, 1000, 262_000])
def test_logits_at_far_positions(ours: Backend, oracle: Reference, backend_name: str, start: int) -> None:
    """A short text at far positions differs from float64 by at most three times as much as the reference's own float32."""
    before, canvas = tokens(60, 1), tokens(40, 2)
    exact, single = (reference_logits(oracle, dtype, start, before, canvas) for dtype in (torch.float64, torch.float32))
    cache: Any = ours.new_cache()
    cache.length = start  # positions count from here, but the layers are empty
    ours.encode([Piece(before, cache)])
    allowed = 3 * np.abs(single - exact).max() + 1e-5
    print(f"reference in float32: {np.abs(single - exact).max():.1e}")
    assert_close(ours.logits([Row(canvas, cache, 1.0)])[0], exact, allowed, f"{backend_name}, positions from {start}")


def keys_of(buffer: Any) -> Any:
    """The array that holds a buffer's keys: MLX's holds the values behind them."""
    return buffer.keys if hasattr(buffer, "keys") else buffer.entries


@pytest.mark.parametrize("length", [900, 1024, 4200])
def test_what_a_canvas_sees(ours: Backend, length: int) -> None:
    """Changes one key at a time. In a sliding layer the last window - 1 keys have an effect; in a full layer all do."""
    canvas = tokens(8, 3)
    cache: Any = filled(ours, length)
    before = ours.logits([Row(canvas, cache, 1.0)])[0]
    edge = max(0, length - (WINDOW - 1))
    places = {0, 1, length // 2, length - 1, edge, edge + 1, *([edge - 1] if edge else [])}
    for layer, kind in zip(cache.layers, ours.config.layers, strict=True):
        for place in sorted(places):
            if place < layer.buffer.first:
                continue
            slot = place - layer.buffer.first
            kept = keys_of(layer.buffer)[0, 0, slot] * 1.0
            keys_of(layer.buffer)[0, 0, slot] = kept * 30 + 1
            changed = bool((ours.logits([Row(canvas, cache, 1.0)])[0] != before).any())
            keys_of(layer.buffer)[0, 0, slot] = kept
            assert changed == (not kind.is_sliding or place >= edge), f"{kind.layer_type}, position {place} of {length}"
    assert (ours.logits([Row(canvas, cache, 1.0)])[0] == before).all()


@pytest.mark.parametrize("length", [1500])
def test_what_a_position_of_the_causal_pass_sees(ours: Backend, length: int) -> None:
    """Position q of a piece sees q - window + 1 .. q on the sliding layer, and 0 .. q on the full one."""
    piece = tokens(70, 4)

    def states(layer: int | None = None, place: int = 0) -> list[NDArray[np.float32]]:
        """Hidden states of the piece after one key of one layer was changed."""
        cache: Any = filled(ours, length)
        if layer is not None:
            buffer = cache.layers[layer].buffer
            keys_of(buffer)[0, 0, place - buffer.first] = keys_of(buffer)[0, 0, place - buffer.first] * 30 + 1
        trace: list[list[NDArray[np.float32]]] = []
        ours.logits([Piece(piece, cache)], trace)
        return trace[0]

    plain = states()
    edge = length - WINDOW + 1  # the first position that the first query sees
    for layer, place, last in ((0, edge - 1, -1), (0, edge, 0), (0, edge + 60, 60), (1, 0, 69), (1, length - 1, 69)):
        if layer == 0 and place < edge // 256 * 256:
            continue  # no longer in the buffer
        [seen] = np.nonzero((states(layer, place)[layer + 1] != plain[layer + 1]).any(axis=1))
        assert seen.tolist() == list(range(last + 1)), f"layer {layer}, position {place} of {length}: seen by {seen}"


@pytest.mark.parametrize("length", [4096, 32_768])
def test_the_second_step_of_a_block_copies_no_key(ours: Backend, length: int) -> None:
    """The largest single allocation of a step after the first is smaller than the keys of any layer."""
    cache: Any = filled(ours, length)
    row = Row(tokens(8, 6), cache, 1.0)
    ours.denoise([row])
    addresses = [layer.buffer for layer in cache.layers]
    largest = largest_allocation(ours, lambda: ours.denoise([row]))
    keys = {
        kind.layer_type: 4 * kind.num_key_value_heads * kind.head_dim * (min(length, WINDOW) if kind.is_sliding else length)
        for kind in ours.config.layers
    }
    print(f"{length} positions: largest allocation {largest:,} bytes; keys {keys}")
    assert [layer.buffer for layer in cache.layers] == addresses
    assert largest < min(keys.values())


def largest_allocation(backend: Backend, run: Callable[[], object]) -> int:
    """The largest allocation of a call, from PyTorch's profiler. MLX reports the peak, which no single allocation exceeds."""
    if backend.name == "mlx":
        import mlx.core as mx

        mx.reset_peak_memory()
        before = mx.get_active_memory()
        run()
        return int(mx.get_peak_memory()) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    return max(event.self_cpu_memory_usage for event in profile.events())

"""Measures memory and time of a denoising step and of the causal pass for long texts.

    python benchmarks/long_context.py torch [--json FILE]
    python benchmarks/long_context.py mlx --canvas 16

The model has the attention of the released one (16 heads; 8 key-value heads of 256 and a window of 1,024 on sliding layers, 2 of
512 on full ones) in two layers, one of each kind, and very little else. A step and one more piece of the causal pass are measured
with 4,096 to 261,000 positions in the cache. These are random keys and values, because encoding them would take hours on a CPU.
The whole causal pass is measured over 4,096 and 16,384 tokens, in the pieces in which every text is read.

Each figure comes from its own process. Peak memory is the most that the process, or MLX, held at once, minus what it held before.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np

LENGTHS = (4_096, 32_768, 131_072, 261_000)
PROMPTS = (4_096, 16_384)
FILLED_AT_ONCE = 4_096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("backend", choices=("mlx", "torch"))
    parser.add_argument("--canvas", type=int, default=256, help="tokens of the canvas (default %(default)s)")
    parser.add_argument(
        "--piece", type=int, default=1024, help="tokens of the extra piece of the causal pass (default %(default)s)"
    )
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS, help="positions in the cache before a step")
    parser.add_argument("--prompts", type=int, nargs="*", default=PROMPTS, help="tokens of the causal pass")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoints.write(Path(folder), "long")
        figures = [run(step, folder, arguments.backend, length, arguments.canvas) for length in arguments.lengths]
        figures += [run(piece, folder, arguments.backend, length, arguments.piece) for length in arguments.lengths]
        figures += [run(prefill, folder, arguments.backend, length, arguments.canvas) for length in arguments.prompts]
    print(f"{arguments.backend}, canvas of {arguments.canvas}")
    print(f"{'what':8} {'positions':>9} {'cache, MB':>10} {'peak over it, MB':>17} {'seconds':>8}")
    for each in figures:
        sizes = f"{each['cache'] / 1e6:>10,.1f} {each['peak'] / 1e6:>17,.1f}"
        print(f"{each['what']:8} {each['positions']:>9,} {sizes} {each['seconds']:>8.2f}")
    if arguments.json:
        from mlx_diffgemma.reports.speed import Machine

        content = {"backend": arguments.backend, "canvas": arguments.canvas, "machine": vars(Machine.this()), "figures": figures}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


def run(measure: Any, *arguments: Any) -> dict[str, Any]:
    """Call ``measure`` in a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        result: dict[str, Any] = pool.apply(measure, arguments)
    print(result, flush=True)
    return result


def step(folder: str, name: str, length: int, canvas: int) -> dict[str, Any]:
    """Measure the second denoising step of a block."""
    from mlx_diffgemma.backends import Row, load_backend
    from mlx_diffgemma.checkpoint import Checkpoint

    backend = load_backend(Checkpoint.open(folder), name, device="cpu", dtype="float32")
    cache = filled(backend, length)
    row = Row(np.arange(canvas, dtype=np.int32), cache, 1.0, noise_key=1)
    backend.denoise([row])
    seconds, peak = measured(name, lambda: backend.denoise([row]))
    return {"what": "step", "positions": length, "cache": cache.nbytes, "peak": peak, "seconds": seconds}


def piece(folder: str, name: str, length: int, count: int) -> dict[str, Any]:
    """Measure the causal pass over one more piece of ``count`` tokens."""
    from mlx_diffgemma.backends import Piece, load_backend
    from mlx_diffgemma.checkpoint import Checkpoint

    backend = load_backend(Checkpoint.open(folder), name, device="cpu", dtype="float32")
    cache, tokens = filled(backend, length), np.arange(count, dtype=np.int32) % backend.config.vocab_size
    backend.encode([Piece(tokens[:1], cache)])
    before = cache.nbytes
    seconds, peak = measured(name, lambda: backend.encode([Piece(tokens, cache)]))
    peak -= cache.nbytes - before
    return {"what": "piece", "positions": length, "cache": cache.nbytes, "peak": peak, "seconds": seconds}


def prefill(folder: str, name: str, length: int, canvas: int) -> dict[str, Any]:
    """Measure the causal pass over a prompt, in pieces. Peak memory does not count the final size of the cache."""
    from mlx_diffgemma.backends import load_backend
    from mlx_diffgemma.checkpoint import Checkpoint
    from mlx_diffgemma.prefix_cache import read
    from mlx_diffgemma.prompts import PieceRule, PromptTokens

    backend = load_backend(Checkpoint.open(folder), name, device="cpu", dtype="float32")
    tokens = np.random.default_rng(0).integers(0, backend.config.vocab_size, length).astype(np.int32)
    found: list[Any] = []
    seconds, peak = measured(
        name, lambda: found.append(read(backend, PromptTokens(tokens), PieceRule(backend.config.canvas_length)))
    )
    cache = found[0].cache.nbytes
    return {"what": "prompt", "positions": length, "cache": cache, "peak": peak - cache, "seconds": seconds}


def filled(backend: Any, length: int) -> Any:
    """A cache of random keys and values."""
    cache, random = backend.new_cache(), np.random.default_rng(0)
    for start in range(0, length, FILLED_AT_ONCE):
        count = min(FILLED_AT_ONCE, length - start)
        for layer, shape in zip(cache.layers, backend.config.layers, strict=True):
            drawn = random.standard_normal((2, 1, shape.num_key_value_heads, count, shape.head_dim), np.float32) * 0.3
            layer.append(*(on_device(backend, each) for each in drawn))
        if backend.name == "mlx":
            import mlx.core as mx

            mx.eval(cache.arrays())
    cache.length = length
    return cache


def on_device(backend: Any, array: np.ndarray) -> Any:
    if backend.name == "mlx":
        import mlx.core as mx

        return mx.array(array)
    import torch

    return torch.from_numpy(array)


def measured(name: str, call: Any) -> tuple[float, int]:
    """Seconds of a call, and the most bytes held at once, minus those held before it."""
    if name == "mlx":
        import mlx.core as mx

        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: reset the peak
        before = resident("VmRSS")
    started = time.perf_counter()
    call()
    seconds = time.perf_counter() - started
    if name == "mlx":
        return seconds, int(mx.get_peak_memory()) - before
    return seconds, resident("VmHWM") - before


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()

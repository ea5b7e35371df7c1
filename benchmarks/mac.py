"""Measures what only a Mac can tell, in at most ten minutes, and writes one JSON file to send to us.

    pip install .
    python benchmarks/mac.py --json mac.json

Nobody who works on this project has a Mac: its speed there is counted (``graph_mlx.py``) and not measured. If you have one, run
this and attach ``mac.json`` to an issue of the repository. Close other programs first, and let the machine run on power. The
script needs 8 GB of free memory and no download. It prints a line for each section. The file does not name your home folder.

With ``--model MODEL`` it also measures a real checkpoint, which must fit into memory:

    python benchmarks/mac.py --json mac.json --model mlx-community/diffusiongemma-26B-A4B-it-4bit

A section that fails records its error, and the others go on. After ``--minutes`` no further section begins; those left out are
named. ``--toy`` runs everything at a toy size in seconds, as the tests do on MLX's CPU. Without a GPU, all runs on the CPU in
float32; the real size takes hours there.

Times are in seconds: the median, the least and the most of repeated runs after a warm-up. Short operations run several times
in a round, each after the one before, and the time is that of a round by its number of runs.
"""

import argparse
import copy
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import presets
from mac_operations import TYPES, attentions, device, matrix_products, metal_kernels, model_type, only_mlx, rotations
from mlx.utils import tree_flatten
from real_4bit_cpu import value
from sections import REAL, TOY, WARMUP, Sizes, causal_token, random_row, released_format, spread, text_before, tried

from mlx_diffgemma.backends import Row, load_backend
from mlx_diffgemma.backends.memory import main_memory
from mlx_diffgemma.backends.mlx import kernels, quantized
from mlx_diffgemma.backends.mlx.backend import MlxBackend
from mlx_diffgemma.backends.mlx.cache import Cache
from mlx_diffgemma.backends.mlx.model import Segment, TextModel
from mlx_diffgemma.backends.mlx.step import Inputs, step
from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.reports.speed import Machine, bench

#: Layers of the slice of the model, five sliding and one full, and of the whole model.
LAYERS, ALL_LAYERS = 6, 30
DEVICES = {"cpu": mx.cpu, "gpu": mx.gpu}


def machine(sizes: Sizes) -> dict[str, Any]:
    """What this ran on."""
    del sizes
    cores = None
    if sys.platform == "darwin":
        found = subprocess.run(["ioreg", "-rc", "AGXAccelerator", "-d1"], capture_output=True, text=True, check=False).stdout
        cores = next((line.split("=")[1].strip() for line in found.splitlines() if '"gpu-core-count"' in line), None)
    return {
        **asdict(Machine.this()),
        "macos": platform.mac_ver()[0] or None,
        "gpu_cores": cores,
        "memory": main_memory(),
        "device_info": dict(mx.device_info()),
    }


@cache
def slice_of_model(sizes: Sizes, where: str, dtype: str) -> MlxBackend:
    """The first layers of the released 4-bit layout with random weights, in memory."""
    with mx.stream(DEVICES[where]):
        kernels.check(TYPES[dtype])
        model: Any = TextModel(sizes.config(LAYERS))
        bits = {
            path: released_format(path) for path, module in model.named_modules() if getattr(module.get("weight"), "ndim", 0) > 1
        }
        quantized.quantize_modules(model, bits, TYPES[dtype])
        arrays = dict(tree_flatten(model.parameters()))
        stored = {name: (array.shape, str(array.dtype)) for name, array in arrays.items()}
        random, drawn = np.random.default_rng(0), []
        for name, array in arrays.items():
            if array.dtype == mx.uint32:
                drawn.append((name, mx.array(random.integers(0, 2**32, array.shape, np.uint32))))
            else:
                kept = name.rpartition(".")[0] in bits
                drawn.append((name, mx.full(array.shape, value(name, stored), mx.bfloat16 if kept else TYPES[dtype])))
            mx.eval(drawn[-1][1])
        model.load_weights(drawn)
        del arrays, drawn
        for joined in model.join():
            mx.eval(joined)
    return MlxBackend(model, None, DEVICES[where], dtype)


def whole(backend: MlxBackend, sizes: Sizes) -> MlxBackend:
    """A model of all layers, made of those of the slice again and again. It takes no more memory than the slice."""
    model = copy.copy(backend.model)
    model.config = sizes.config(ALL_LAYERS)
    model.layers = [copy.copy(layer) for _ in range(ALL_LAYERS // LAYERS) for layer in backend.model.layers]
    return MlxBackend(model, None, DEVICES[backend.device], backend.dtype)


def denoising(backend: MlxBackend, prefix: int, repeats: int) -> dict[str, Any]:
    """Seconds of a step: until its graph is built, until the launch returns, and until its results are here.

    The first two are the host's. A launch builds the graph and encodes it for the device. Each step has self-conditioning.
    """
    text = text_before(backend, prefix)
    row = random_row(backend, text)
    times: dict[str, list[float]] = {"graph": [], "launch": [], "step": []}
    for turn in range(WARMUP + repeats):
        mx.synchronize()
        started = time.perf_counter()
        pending = backend.launch([row])
        launched = time.perf_counter()
        [result] = pending()
        done = time.perf_counter()
        row = replace(row, self_conditioning=result.self_conditioning)
        built = _graph_seconds(backend, row, text)
        if turn >= WARMUP:
            for name, taken in (("graph", built), ("launch", launched - started), ("step", done - started)):
                times[name].append(taken)
    return {name: spread(values) for name, values in times.items()}


def _graph_seconds(backend: MlxBackend, row: Row, text: Cache) -> float:
    """Seconds that Python takes to build a step's graph, which is then computed so that it leaves nothing behind."""
    count = len(row.canvas)
    with mx.stream(DEVICES[backend.device]):
        soft = mx.zeros((count, backend.config.hidden_size), TYPES[backend.dtype])
        given = Inputs(
            mx.array(row.canvas),
            mx.full((count,), 0.8),
            mx.arange(count, dtype=mx.uint32),
            mx.ones((count,), mx.bool_),
            soft,
            None,
        )
        mx.eval(given[:5])
        started = time.perf_counter()
        *results, conditioning = step(backend.model, [Segment(0, count, text)], given)
        results.append(conditioning.array())
        taken = time.perf_counter() - started
        mx.eval(results, text.arrays())
    return taken


def encoding(backend: MlxBackend, length: int, repeats: int) -> dict[str, float]:
    """Seconds of the causal pass over a prompt."""
    return spread([_timed(partial(text_before, backend, length)) for _ in range(WARMUP + repeats)][WARMUP:])


def token_seconds(backend: MlxBackend, prefix: int, repeats: int) -> dict[str, float]:
    """Seconds of a token of the causal mode, with its logits."""
    token = partial(causal_token, backend, text_before(backend, prefix))
    return spread([_timed(token) for _ in range(WARMUP + repeats)][WARMUP:])


def _timed(run: Callable[[], object]) -> float:
    mx.synchronize()
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def model_slice(sizes: Sizes) -> dict[str, Any]:
    """Six layers of the model: steps, prompt and causal token; with our Metal kernels and without; and all layers.

    ``all_layers_of_six`` is a measured step of 30 layers, which are the six five times, after ``prefixes[1]``.
    ``extrapolated_to_30_layers`` gives seconds after each prefix: the layers' time five times, and the rest once.
    """
    backend = slice_of_model(sizes, device(), model_type())
    names = sorted(name for name, dtype in kernels.enabled if dtype == TYPES[model_type()])

    def measure() -> dict[str, Any]:
        return {
            "step": {str(prefix): denoising(backend, prefix, sizes.repeats) for prefix in sizes.prefixes},
            "encode": encoding(backend, sizes.prompt, sizes.repeats),
            "token": token_seconds(backend, sizes.prompt, sizes.repeats),
        }

    found: dict[str, Any] = {"layers": LAYERS, "dtype": model_type(), "kernels_used": names}
    found["kernels"] = measure() if names else None
    with only_mlx():
        found["plain"] = measure()
    known = str(sizes.prefixes[1])
    found["all_layers_of_six"] = denoising(whole(backend, sizes), sizes.prefixes[1], sizes.repeats)
    six = {prefix: times["step"]["median"] for prefix, times in (found["kernels"] or found["plain"])["step"].items()}
    times = ALL_LAYERS // LAYERS
    layers = (found["all_layers_of_six"]["step"]["median"] - six[known]) / (times - 1)
    found["extrapolated_to_30_layers"] = {
        prefix: (six[prefix] - six[known]) * times + six[known] + (times - 1) * layers for prefix in six
    }
    return found


def limits(sizes: Sizes) -> dict[str, Any]:
    """A step with MLX's own wired limit and with the largest one, and its memory."""
    backend, prefix = slice_of_model(sizes, device(), model_type()), sizes.prefixes[1]
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    found: dict[str, Any] = {"own": denoising(backend, prefix, sizes.repeats)}
    found["bytes"] = {"before": held, "peak": mx.get_peak_memory(), "cached": mx.get_cache_memory()}

    def raised() -> dict[str, Any]:
        limit = int(mx.device_info()["max_recommended_working_set_size"])
        before = mx.set_wired_limit(limit)
        try:
            return {"limit": limit, "limit_before": before, **denoising(backend, prefix, sizes.repeats)}
        finally:
            mx.set_wired_limit(before)

    return found | {"raised": tried(raised) if kernels.on_metal() else None}


def same_rows(sizes: Sizes) -> dict[str, Any]:
    """Whether a row has the same bits in a pass of two as alone: tokens and entropies."""
    cases: dict[str, Any] = {f"slice, {device()}, {model_type()}": slice_of_model(sizes, device(), model_type())}
    for where, dtype in places():
        cases[f"small slice, {where}, {dtype}"] = slice_of_model(TOY, where, dtype)
        cases[f"sudoku, {where}, {dtype}"] = load_backend(Checkpoint.open("sudoku"), "mlx", device=where, dtype=dtype)
    return {name: _rows_of(backend) for name, backend in cases.items()}


def _rows_of(backend: Any) -> dict[str, Any]:
    rows = [random_row(backend, text_before(backend, length, seed), seed) for seed, length in enumerate((40, 24))]
    together, alone = backend.denoise(rows), [backend.denoise([row])[0] for row in rows]
    pairs = list(zip(together, alone, strict=True))
    equal = [np.array_equal(a.argmax, b.argmax) and np.array_equal(a.sampled, b.sampled) for a, b in pairs]
    return {
        "same_tokens": all(equal),
        "same_entropy_bits": all(np.array_equal(a.entropy.view(np.int32), b.entropy.view(np.int32)) for a, b in pairs),
        "entropy_difference": max(float(np.abs(a.entropy - b.entropy).max()) for a, b in pairs),
        "exact_rows": backend.exact_rows,
    }


def places() -> list[tuple[str, str]]:
    """Devices and number types that run a whole model."""
    return [("cpu", "float32"), *([("gpu", "float32"), ("gpu", "bfloat16")] if device() == "gpu" else [])]


def answers(sizes: Sizes) -> dict[str, Any]:
    """The boxed models on each device and in each type, compared with the CPU in float32. Without a GPU, the CPU again."""
    found: dict[str, Any] = {}
    for name in ("sudoku", "pictures"):
        checkpoint, written = Checkpoint.open(name), []
        for where, dtype in places() if device() == "gpu" else [("cpu", "float32")] * 2:
            backend = load_backend(checkpoint, "mlx", device=where, dtype=dtype)
            if name == "sudoku":
                task = presets.sudoku(backend, (14, 26), sizes.puzzles, seed=presets.FINAL)
            else:
                task = presets.pictures(backend, sizes.puzzles, seed=presets.FINAL)
            started = time.perf_counter()
            texts = task(checkpoint.generation, 0)
            written.append((f"{where}, {dtype}", texts, time.perf_counter() - started))
        _, expected, _ = written[0]
        found[name] = [
            {
                "place": place,
                "solved": float(texts.right.mean()),
                "steps": float(texts.steps.mean()),
                "same_tokens_and_steps": _same(texts, expected),
                "seconds_in_all": taken,
            }
            for place, texts, taken in written
        ]
    return found


def _same(texts: presets.Texts, expected: presets.Texts) -> float:
    """Share of the texts with the same tokens in the same number of steps."""
    equal = [np.array_equal(one, other) for one, other in zip(texts.tokens, expected.tokens, strict=True)]
    return float(np.mean(np.array(equal) & (texts.steps == expected.steps)))


def given_model(model: str, sizes: Sizes) -> dict[str, Any]:
    """``mlx-diffgemma bench`` of a checkpoint."""
    slice_of_model.cache_clear()
    mx.clear_cache()
    checkpoint = Checkpoint.open(model)
    result = bench(load_backend(checkpoint, "mlx"), checkpoint.generation, prompt_length=sizes.model_prompt, repeats=3)
    return {"model": Path(model).name, **asdict(result)}


SECTIONS: dict[str, Callable[[Sizes], dict[str, Any]]] = {
    "machine": machine,
    "kernels": metal_kernels,
    "attention": attentions,
    "rotate": rotations,
    "products": matrix_products,
    "slice": model_slice,
    "limits": limits,
    "rows": same_rows,
    "answers": answers,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("mac.json"), help="file to write (default %(default)s)")
    parser.add_argument("--model", help="also measure this checkpoint")
    parser.add_argument("--minutes", type=float, default=10, help="begin no section after this time (default %(default)s)")
    parser.add_argument("--toy", action="store_true", help="run everything at a toy size, in seconds")
    parser.add_argument("--sections", help=f"run only these, separated by commas: {', '.join(SECTIONS)}")
    arguments = parser.parse_args()
    sections = dict(SECTIONS)
    if arguments.sections:
        if unknown := set(arguments.sections.split(",")) - set(SECTIONS):
            parser.error(f"there is no section {sorted(unknown)[0]!r}; choose from {', '.join(SECTIONS)}")
        sections = {name: sections[name] for name in arguments.sections.split(",")}
    if arguments.model:
        sections["model"] = partial(given_model, arguments.model)

    began, sizes = time.perf_counter(), TOY if arguments.toy else REAL
    if device() == "cpu" and not arguments.toy:
        print("There is no GPU here, and on a CPU this takes hours. Use --toy to rehearse it.", flush=True)
    report: dict[str, Any] = {"toy": arguments.toy, "device": device(), "sizes": asdict(sizes), "skipped": [], "sections": {}}
    for name, section in sections.items():
        started = time.perf_counter()
        if started - began >= 60 * arguments.minutes:
            report["skipped"].append(name)
            print(f"{name}: left out, there is no time left")
            continue
        found = tried(lambda section=section: json.loads(json.dumps(section(sizes), allow_nan=False)))  # type: ignore[misc]
        taken = time.perf_counter() - started
        report["sections"][name] = found | {"section_seconds": round(taken, 1)}
        mx.clear_cache()
        print(f"{name}: {found.get('error', 'done')} ({taken:.1f} s)", flush=True)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")  # a crash later loses nothing
    arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"Thank you. Please attach {arguments.json} to an issue of the repository.")


if __name__ == "__main__":
    main()

"""Counts the kernels and bytes of one forward pass of the released model on Metal: of ours, and of mlx-vlm's.

    python benchmarks/graph_mlx.py [--cases step-1024,encode] [--detail] [--json FILE]

The graph is built lazily at the real size, from zeros of the 4-bit checkpoint's shapes, and never evaluated: it needs no Mac, no
weights and little memory. ``kernel_counting.py`` says how a graph becomes kernels and bytes. Time on a Mac also depends on what
this does not count: how well each kernel uses the GPU, and what its caches hold.

Both sides do the same work: a denoising step with self-conditioning, sampling and entropies; the causal pass over a prompt; one
token of the causal mode with its logits. mlx-vlm's step is that of its entropy-bound sampler (``pip install --no-deps mlx-vlm``).
``plain`` is ours without the Metal kernels of ``backends/mlx/kernels.py``, as on other GPUs.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from kernel_counting import Graph, Kernel, Marks
from rich.console import Console
from rich.table import Table
from sections import released_format

from mlx_diffgemma.reports.speed import Machine

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))
from support.real_layout import config as released_config  # noqa: E402

VOCABULARY = 262_144


@dataclass(frozen=True)
class Case:
    """A forward pass: ``rows`` texts with ``prefix`` positions in the cache each."""

    what: str
    prefix: int = 1_024
    tokens: int = 256
    rows: int = 1


CASES = {
    "step-0": Case("a denoising step, empty cache", prefix=0),
    "step-1024": Case("a denoising step after 1,024"),
    "step-32768": Case("a denoising step after 32,768", prefix=32_768),
    "canvas-64": Case("a step of a canvas of 64", tokens=64),
    "rows-4": Case("a step of 4 rows", rows=4),
    "token": Case("a causal token", tokens=1),
    "encode": Case("the causal pass over 2,048", prefix=0, tokens=2_048),
}


@dataclass(frozen=True)
class Ours:
    """Our model at the real size, with weights that are never computed."""

    model: Any
    weights: dict[str, mx.array]

    @classmethod
    def build(cls, imports: AbstractContextManager[None], *, custom: bool) -> "Ours":
        """Import the backend within ``imports``, and build the model, with or without our Metal kernels."""
        with imports:
            from mlx.utils import tree_flatten

            from mlx_diffgemma.backends.mlx import kernels, products, quantized
            from mlx_diffgemma.backends.mlx import model as models
            from mlx_diffgemma.config import ModelConfig

            # As on Metal.
            products._summable = lambda x: x  # type: ignore[assignment]
            kernels.on_metal = lambda: True  # type: ignore[assignment]
            kernels.enabled.clear()
            kernels.enabled |= {(name, mx.bfloat16) for name in ("statistics", "route", "combine") if custom}
            model = models.TextModel(ModelConfig.from_dict(released_config()))
            packed = {
                path: released_format(path)
                for path, module in model.named_modules()
                if getattr(module.get("weight"), "ndim", 0) > 1
            }
            quantized.quantize_modules(model, packed, mx.bfloat16)
            model.set_dtype(mx.bfloat16)
        for _ in model.join():  # evaluates small tables only
            pass
        return cls(model, {name: _stored(array) for name, array in dict(tree_flatten(model.parameters())).items()})

    def forward(self, case: Case) -> tuple[Callable[..., Any], list[mx.array]]:
        """A pass, and its arguments: its inputs, all weights, and the buffers of the caches."""
        from mlx.utils import tree_unflatten

        from mlx_diffgemma.backends.mlx.cache import Cache
        from mlx_diffgemma.backends.mlx.model import Segment
        from mlx_diffgemma.backends.mlx.step import Inputs, step
        from mlx_diffgemma.prompts import CHUNK

        model, config, count = self.model, self.model.config, case.rows * case.tokens
        rows = [Cache(config) for _ in range(case.rows)]
        for cache in rows:
            _fill(cache, config, case.prefix)
        buffers = [layer.buffer for cache in rows for layer in cache.layers if layer.buffer]
        held = [buffer.entries for buffer in buffers]

        def run(tokens: Any, soft: Any, noise: Any, temperature: Any, drawn: Any, *arrays: Any) -> Any:
            model.update(tree_unflatten(list(zip(self.weights, arrays, strict=False))))
            for buffer, array in zip(buffers, arrays[len(self.weights) :], strict=True):
                buffer.entries = array
            if case.what.startswith("the causal pass"):
                for start in range(0, case.tokens, CHUNK):
                    stop = min(start + CHUNK, case.tokens)
                    model.encode(tokens[start:stop], [Segment(0, stop - start, rows[0])], last=True)
                return rows[0].arrays()
            if case.tokens == 1:
                hidden = model.encode(tokens, [Segment(0, 1, rows[0])], last=True)
                return [model.head(hidden), *rows[0].arrays()]
            segments = [Segment(row * case.tokens, (row + 1) * case.tokens, cache) for row, cache in enumerate(rows)]
            *results, late = step(model, segments, Inputs(tokens, temperature, noise, drawn, soft, None))
            return [*results, late.array(), *(array for cache in rows for array in cache.arrays())]

        inputs = [
            mx.zeros((count,), mx.int32),
            mx.zeros((count, config.hidden_size), mx.bfloat16),
            mx.zeros((count,), mx.uint32),
            mx.zeros((count,)),
            mx.zeros((count,), mx.bool_),
        ]
        return run, [*inputs, *self.weights.values(), *held]


def ours(case: Case, marks: Marks, *, custom: bool = True) -> Graph:
    """The graph of our pass, with the kernels of ``backends/mlx/kernels.py`` or with MLX's own operations in their place."""
    built = Ours.build(marks.here(), custom=custom)
    with marks.here():
        return Graph(*built.forward(case), marks)


def python_time() -> dict[str, Any]:
    """Milliseconds in which Python builds the graph of a step, and how many functions are traced in the steps of two blocks.

    Compiled functions are traced once for each shape of their arguments. The second block begins with a longer prefix. To be
    called in a process of its own, before anything is marked.
    """
    traced, compiled = 0, mx.compile

    def counting(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
        if function is None:
            return partial(counting, **options)

        def body(*args: Any) -> Any:
            nonlocal traced
            traced += 1
            return function(*args)

        return compiled(body, **options)

    mx.compile = counting  # type: ignore[assignment]
    built = Ours.build(nullcontext(), custom=False)  # a kernel of ours can be built on Metal only
    seconds, traces = [], []
    for prefix in (1_024, 1_024, 1_024, 1_280, 1_280):
        run, arguments = built.forward(Case("a step", prefix=prefix))
        before, started = traced, time.perf_counter()
        run(*arguments)
        seconds.append(round(1000 * (time.perf_counter() - started), 1))
        traces.append(traced - before)
    return {"prefixes": [1_024, 1_024, 1_024, 1_280, 1_280], "milliseconds": seconds, "functions_traced": traces}


def _fill(cache: Any, config: Any, prefix: int) -> None:
    """Put ``prefix`` positions of zeros into a cache."""
    for layer, shape in zip(cache.layers, config.layers, strict=True):
        if prefix:
            layer.append(mx.zeros((1, 2 * shape.num_key_value_heads, prefix, shape.head_dim), mx.bfloat16))
    cache.length = prefix


def theirs(case: Case, marks: Marks) -> Graph:
    """The graph of mlx-vlm's pass."""
    with marks.here():
        from mlx import nn
        from mlx.utils import tree_flatten, tree_unflatten
        from mlx_vlm.generate import diffusion
        from mlx_vlm.models.diffusion_gemma import language
        from mlx_vlm.models.diffusion_gemma.config import ModelConfig

        raw = released_config()
        config = ModelConfig.from_dict({**raw, "vision_config": None})
        config.vision_config = None
        model = language.LanguageModel(config.text_config, config)

        def packed(path: str, module: Any) -> Any:
            if not hasattr(module, "to_quantized"):
                return False
            form = released_format(path)
            return {"group_size": form.group_size, "bits": form.bits if "experts" not in path else 4}

        nn.quantize(model, class_predicate=packed)
        model.eval()
        mx.random.seed(0)  # the initial weights are a lazy chain of random numbers, which is not theirs
        weights = {name: _stored(array) for name, array in dict(tree_flatten(model.parameters())).items()}
        keys = []
        for kind in config.text_config.layer_types:
            full = kind == "full_attention"
            text = config.text_config
            heads = text.num_global_key_value_heads if full else text.num_key_value_heads
            size = text.global_head_dim if full else text.head_dim
            keys += [mx.zeros((case.rows, heads, case.prefix, size), mx.bfloat16) for _ in range(2)]
        canvas = mx.zeros((case.rows, case.tokens), mx.int32)
        before = mx.zeros((case.rows, case.tokens, VOCABULARY), mx.float32)

        def run(canvas: Any, before: Any, *arrays: Any) -> Any:
            model.update(tree_unflatten(list(zip(weights, arrays, strict=False))))
            cache = model.make_cache()
            for index, layer in enumerate(cache if case.prefix else []):
                layer.keys, layer.values = arrays[len(weights) + 2 * index : len(weights) + 2 * index + 2]
                layer.offset = case.prefix
                if hasattr(layer, "_idx"):
                    layer._idx = case.prefix
            if case.what.startswith("the causal pass") or case.tokens == 1:
                hidden, cache = model.model.encoder(canvas, attention_mask=None, cache=cache)
                kept = [array for layer in cache for array in (layer.keys, layer.values)]
                return [model.model.decoder.embed_tokens.as_linear(hidden) if case.tokens == 1 else hidden, *kept]
            masks = model.diffusion_decoder_masks(canvas, cache, None)
            logits = model.diffusion_decoder_logits(canvas, cache=cache, self_conditioning=before, decoder_attention_mask=masks)
            logits = logits / 0.6
            argmax = mx.argmax(logits, axis=-1).astype(mx.int32)
            sampled = diffusion._diffusion_sample_canvas(logits, mx.int32, 1.0)
            accepted = diffusion._diffusion_entropy_transfer_mask(diffusion._diffusion_token_entropy(logits), 0.1)
            fresh = diffusion._diffusion_initialize_canvas(case.rows, case.tokens, VOCABULARY, mx.int32)
            return argmax, mx.where(accepted, mx.where(accepted, sampled, canvas), fresh), logits, mx.all(argmax == canvas)

        return Graph(run, [canvas, before, *weights.values(), *keys], marks)


def _stored(array: mx.array) -> mx.array:
    """Zeros of a parameter's shape, in the type that the checkpoint stores."""
    return mx.zeros(array.shape, array.dtype if array.dtype == mx.uint32 else mx.bfloat16)


def kind(kernel: Kernel) -> str:
    """What a kernel is for, by its name and shapes."""
    if kernel.name in ("QuantizedMatmul", "GatherQMM"):
        return "quantized products"
    if any(VOCABULARY in shape for shape in kernel.shapes):
        return "statistics over the vocabulary"
    if any(len(shape) > 3 for shape in kernel.shapes) and kernel.name in ("Matmul", "Softmax", "Select", "attention"):
        return "attention"
    return kernel.name


def table(results: dict[str, dict[str, Any]], sides: Sequence[str]) -> Table:
    """The counts for a terminal."""
    shown = Table("pass", *(f"{side}: {unit}" for side in sides for unit in ("kernels", "GB")))
    for name, found in results.items():
        cells = [text for side in sides for text in (f"{found[side]['kernels']:,}", f"{found[side]['gb']:.1f}")]
        shown.add_row(CASES[name].what, *cells)
    return shown


def summary(graph: Graph) -> dict[str, Any]:
    """The counts as JSON."""
    kinds = {name: {"kernels": count, "gb": round(nbytes / 1e9, 3)} for name, (count, nbytes) in graph.by(kind).items()}
    return {"kernels": graph.count, "gb": round(graph.nbytes / 1e9, 2), "kinds": kinds}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", default=",".join(CASES), help="passes, separated by commas (default all: %(default)s)")
    parser.add_argument("--sides", default="ours,plain,mlx-vlm", help="default %(default)s")
    parser.add_argument("--detail", action="store_true", help="also show the kernels by kind")
    parser.add_argument("--python", action="store_true", help="print only the time in which Python builds a step, as JSON")
    parser.add_argument("--json", type=Path, help="file to write the counts to")
    arguments = parser.parse_args()
    if arguments.python:
        print(json.dumps(python_time()))
        return

    marks, console = Marks(), Console(width=max(Console().width, 120))
    counts: dict[str, Callable[[Case, Marks], Graph]] = {
        "ours": ours,
        "plain": partial(ours, custom=False),
        "mlx-vlm": theirs,
    }
    sides, results = arguments.sides.split(","), dict[str, dict[str, Any]]()
    for name in arguments.cases.split(","):
        results[name] = {side: summary(counts[side](CASES[name], marks)) for side in sides}
        for side in sides if arguments.detail else ():
            console.print(f"[bold]{side}, {CASES[name].what}[/bold]")
            for label, found in results[name][side]["kinds"].items():
                console.print(f"  {label:36} {found['kernels']:6,} kernels {found['gb']:9.3f} GB")
    console.print(table(results, sides))
    timed = subprocess.run([sys.executable, __file__, "--python"], capture_output=True, text=True, check=True)
    python = json.loads(timed.stdout)
    console.print(f"Python builds a step's graph in {python['milliseconds']} ms; functions traced: {python['functions_traced']}")
    if arguments.json:
        report = {
            "command": f"python {shlex.join(sys.argv)}",
            "date": date.today().isoformat(),
            "machine": Machine.this().cpu,
            "versions": Machine.this().versions,
            "results": results,
            "python": python,
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

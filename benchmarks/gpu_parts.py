"""Where the time of a step goes, for ``gpu.py``: by part, in milliseconds, bytes and operations; and the kernels that ran."""

import functools
import importlib
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gpu_model import conditioned, synchronize
from sections import error_line
from torch.profiler import ProfilerActivity, profile, record_function

from mlx_diffgemma.backends import Row
from mlx_diffgemma.backends import torch as wing
from mlx_diffgemma.backends.torch.backend import TorchBackend
from mlx_diffgemma.config import LayerConfig, ModelConfig

PREFIX, REST = "part: ", "norms and the rest"

#: The parts of a step: what runs in one of these functions of the torch wing belongs to the label, unless an inner one has a
#: label too. Names that the wing does not have are passed over.
WATCHED = (
    ("experts", "model", "Experts.forward"),
    ("router", "model", "Router.forward"),
    ("attention", "attention", "bidirectional"),
    ("attention", "attention", "causal"),
    ("other products", "model", "nn.Linear.forward"),
    ("other products", "quantized", "QuantizedLinear.forward"),
    ("head", "model", "Embedding.as_linear"),
    ("head", "quantized", "QuantizedEmbedding.as_linear"),
    ("self-conditioning product", "model", "Embedding.weighted_rows"),
    ("self-conditioning product", "quantized", "QuantizedEmbedding.weighted_rows"),
    ("statistics", "step", "statistics"),
    ("statistics", "statistics", "_probabilities"),
    ("statistics", "kernels.statistics", "probabilities"),
)


class Clock:
    """Milliseconds of each label on the device, by CUDA events; on a CPU its own. A gap counts for the label before it."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.labels: list[str] = [REST]
        self.marks: list[tuple[str, Any]] = []

    def switch(self) -> None:
        """What follows belongs to the innermost label."""
        mark: Any = time.perf_counter()
        if self.device != "cpu":
            mark = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            mark.record()
        self.marks.append((self.labels[-1], mark))

    @contextmanager
    def part(self, label: str) -> Iterator[None]:
        self.labels.append(label)
        self.switch()
        try:
            yield
        finally:
            self.labels.pop()
            self.switch()

    def milliseconds(self) -> Counter[str]:
        """Between the marks so far, which the device must have reached."""
        found: Counter[str] = Counter()
        for (label, one), (_, other) in zip(self.marks, self.marks[1:], strict=False):
            found[label] += one.elapsed_time(other) if self.device != "cpu" else 1e3 * (other - one)
        return found


@contextmanager
def watched(part: Callable[[str], Any]) -> Iterator[None]:
    """Run each call of the watched functions within ``part(label)``."""
    with ExitStack() as stack:
        for label, module, path in WATCHED:
            try:
                owner: Any = importlib.import_module(f"{wing.__name__}.{module}")
                *outer, name = path.split(".")
                for each in outer:
                    owner = getattr(owner, each)
                stack.enter_context(_watch(part, label, owner, name))
            except (ImportError, AttributeError):
                continue
        yield


@contextmanager
def _watch(part: Callable[[str], Any], label: str, owner: Any, name: str) -> Iterator[None]:
    function = getattr(owner, name)

    @functools.wraps(function)
    def within(*args: Any, **options: Any) -> Any:
        with part(label):
            return function(*args, **options)

    setattr(owner, name, within)
    try:
        yield
    finally:
        setattr(owner, name, function)


@dataclass
class Kernels:
    """The kernels of a trace by part: how many, and their milliseconds on the device; and by name.

    ``graphs`` are launches of graphs. ``orphans`` are kernels without a launch in the trace, which count for the rest.
    """

    count: Counter[str] = field(default_factory=Counter)
    milliseconds: Counter[str] = field(default_factory=Counter)
    names: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    graphs: int = 0
    orphans: int = 0

    @classmethod
    def of(cls, events: list[dict[str, Any]]) -> "Kernels":
        """Read the events of a Chrome trace of ``torch.profiler``.

        A kernel belongs to the innermost part in which the host launched it; the launch has the kernel's correlation. All kernels
        of a replayed graph have that of its one launch.
        """
        launches = {}
        for event in events:
            if event.get("cat") in ("cuda_runtime", "cuda_driver"):
                launches[event.get("args", {}).get("correlation")] = event
        parts = sorted(
            (event["ts"], event["ts"] + event["dur"], event["name"].removeprefix(PREFIX))
            for event in events
            if event.get("cat") == "user_annotation" and event["name"].startswith(PREFIX)
        )
        found = cls(graphs=sum("GraphLaunch" in event["name"] for event in launches.values()))
        for event in events:
            if event.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
                continue
            launch = launches.get(event.get("args", {}).get("correlation"))
            found.orphans += launch is None
            at = -1.0 if launch is None else launch["ts"]
            label = next((name for start, stop, name in reversed(parts) if start <= at <= stop), REST)
            found.count[label] += 1
            found.milliseconds[label] += event["dur"] / 1e3
            found.names[event["name"]] += event["dur"] / 1e3
            found.calls[event["name"]] += 1
        return found

    def largest(self, count: int = 15) -> list[dict[str, Any]]:
        """The kernels that take the most time."""
        return [{"name": name[:100], "launches": self.calls[name], "ms": ms} for name, ms in self.names.most_common(count)]


@dataclass(frozen=True)
class Work:
    """What a part must do in a step: the bytes that it cannot avoid to move, and its operations."""

    nbytes: float
    flops: float

    def floor(self, limits: "Limits") -> float:
        """The least milliseconds."""
        return 1e3 * max(self.nbytes / limits.bandwidth, self.flops / limits.arithmetic)


@dataclass(frozen=True)
class Limits:
    """What the machine reached: bytes per second, and operations per second of a large product."""

    bandwidth: float
    arithmetic: float


def work(backend: TorchBackend, prefix: int) -> dict[str, Work]:
    """The work of each part of a step after ``prefix`` positions.

    Weights, keys and values are read once, and so are the logits and the probabilities by what consumes them; these are written
    once. All other activations count as nothing. Every expert is read, as 256 tokens choose practically all of them.
    """
    config: ModelConfig = backend.config
    count, hidden, vocabulary = config.canvas_length, config.hidden_size, config.vocab_size
    itemsize = 4 if backend.dtype == "float32" else 2
    stored: Counter[str] = Counter()
    elements: Counter[str] = Counter()
    for path, module in backend.model.named_modules():
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        kind = _kind(path)
        stored[kind] += sum(tensor.nbytes for tensor in tensors)
        if kind == "other products" and tensors and tensors[0].ndim > 1:
            format_ = getattr(module, "format", None)
            elements[kind] += tensors[0].numel() * (32 // format_.bits if format_ is not None else 1)
    table, scores = stored["embed_tokens"], count * vocabulary * itemsize
    products = 2 * count * hidden * vocabulary
    expert = 6 * hidden * config.moe_intermediate_size * config.top_k_experts * config.num_hidden_layers
    seen = {layer: _keys(config, layer, prefix) for layer in set(config.layers)}
    heads = [(seen[layer], layer.head_dim, layer.num_key_value_heads) for layer in config.layers]
    return {
        "experts": Work(stored["experts"], count * expert),
        "router": Work(stored["router"], 2 * count * hidden * config.num_experts * config.num_hidden_layers),
        "attention": Work(
            sum(2 * keys * size * shared * itemsize for keys, size, shared in heads),
            sum(4 * count * keys * size * config.num_attention_heads for keys, size, _ in heads),
        ),
        "other products": Work(stored["other products"], 2 * count * elements["other products"]),
        "head": Work(table + scores, products),
        "self-conditioning product": Work(table + scores, products),
        "statistics": Work(2 * scores, 0),
        REST: Work(stored[REST], 0),
    }


def _kind(path: str) -> str:
    """Which part reads the weights of a module."""
    for kind in ("embed_tokens", "experts", "router"):
        if kind in path:
            return kind
    return "other products" if "_proj" in path else REST


def _keys(config: ModelConfig, layer: LayerConfig, prefix: int) -> int:
    """Keys that a canvas sees."""
    return config.canvas_length + (min(prefix, config.sliding_window - 1) if layer.is_sliding else prefix)


def by_part(backend: TorchBackend, row: Row, prefix: int, limits: Limits | None) -> dict[str, Any]:
    """A step by part: milliseconds by CUDA events and by the kernels of a trace, rates, and the share that the floor is of them.

    The events also count the time in which the device waits for the host.
    """
    clock = Clock(backend.device)
    with watched(clock.part):
        rows = conditioned([row], backend.denoise([row]))  # what this step leaves for the next one is watched too
        clock.marks.clear()
        clock.switch()
        backend.denoise(rows)
        clock.switch()
        synchronize(backend.device)
    elapsed = clock.milliseconds()
    kernels, traced = Kernels(), dict[str, Any]()
    try:
        kernels = traced_kernels(backend, row)
    except Exception as error:  # noqa: BLE001 (the profiler may be absent or forbidden; the clock has told the most)
        traced["trace_error"] = error_line(error)
    parts: dict[str, dict[str, Any]] = {}
    for label, each in work(backend, prefix).items():
        ms = kernels.milliseconds[label] or elapsed[label]
        parts[label] = {
            "clock_ms": elapsed[label],
            "kernel_ms": kernels.milliseconds[label] or None,
            "launches": kernels.count[label],
            "gb": each.nbytes / 1e9,
            "tflop": each.flops / 1e12,
            "gb_per_second": each.nbytes / ms / 1e6 if ms else None,
            "tflops": each.flops / ms / 1e9 if ms else None,
        }
        if limits is not None:
            floor = each.floor(limits)
            parts[label] |= {"floor_ms": floor, "share_of_floor": floor / ms if ms else None}
    return traced | {
        "parts": parts,
        "launches": kernels.count.total(),
        "graph_launches": kernels.graphs,
        "kernels_without_a_launch": kernels.orphans,
        "kernel_ms": kernels.milliseconds.total() or None,
        "floor_ms": None if limits is None else sum(part["floor_ms"] for part in parts.values()),
        "largest_kernels": kernels.largest(),
    }


def traced_kernels(backend: TorchBackend, row: Row) -> Kernels:
    """The kernels of one step. On a CPU there are none."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if backend.device != "cpu" else [])]
    with watched(lambda label: record_function(PREFIX + label)):
        rows = conditioned([row], backend.denoise([row]))
        with profile(activities=activities) as profiler:
            backend.denoise(rows)
            synchronize(backend.device)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        return Kernels.of(json.loads(file.read_text(encoding="utf-8", errors="replace"))["traceEvents"])

"""The machine's limits, and every kernel of the torch wing against float64 and row by row, for ``gpu.py``."""

import importlib
import os
import pkgutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from gpu_model import Extent, timed
from sections import GROUP, TEMPERATURE, Sizes, error_line, spread
from torch import Tensor

from mlx_diffgemma.backends.torch import attention, fused, kernels, packing
from mlx_diffgemma.backends.torch import statistics as wing_statistics
from mlx_diffgemma.backends.torch.noise import gumbel, words
from mlx_diffgemma.checkpoint import Quantization
from mlx_diffgemma.reports.speed import Machine

#: Triton's interpreter, which rehearses kernels on a CPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FORMATS = [Quantization(64, 4), Quantization(16, 4, "nvfp4"), Quantization(32, 3), Quantization(64, 8), Quantization(128, 6)]
FORMATS += [Quantization(32, 4, "mxfp4"), Quantization(32, 8, "mxfp8")]
CAP, EPS = 30.0, 1e-6
#: A rounding of bfloat16, with room for one more.
ROUNDING = 2**-7
Outputs = tuple[Tensor, ...]


def machine(device: str, extent: Extent) -> Iterator[tuple[str, Any]]:
    """What this runs on, and what it reaches: bytes per second of a copy and of a sum, operations per second of a product."""
    yield "machine", asdict(Machine.this())
    if device != "cpu":
        fields = "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        try:
            shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()[0]
            yield "nvidia_smi", dict(zip(fields.split(","), map(str.strip, shown.split(",")), strict=True))
        except (OSError, subprocess.SubprocessError, IndexError, ValueError) as error:
            yield "nvidia_smi", {"error": error_line(error)}
        shape = torch.cuda.get_device_properties(device)
        yield (
            "device",
            {
                "name": shape.name,
                "capability": f"{shape.major}.{shape.minor}",
                "multiprocessors": shape.multi_processor_count,
                "memory": shape.total_memory,
                "l2": getattr(shape, "L2_cache_size", None),
                "cuda": torch.version.cuda,
            },
        )
    count = extent.read_bytes // 4
    ones = torch.ones(count, device=device)
    yield "copy_gb_per_second", 2 * extent.read_bytes / _seconds(device, partial(torch.empty_like(ones).copy_, ones)) / 1e9
    yield "read_gb_per_second", extent.read_bytes / _seconds(device, ones.sum) / 1e9
    del ones
    a = torch.randn(extent.matmul, extent.matmul, device=device, dtype=torch.bfloat16)
    b = torch.randn(extent.matmul, extent.matmul, device=device, dtype=torch.bfloat16)
    yield "bf16_tflops", 2 * extent.matmul**3 / _seconds(device, partial(torch.mm, a, b)) / 1e12


def _seconds(device: str, run: Callable[[], object]) -> float:
    """The median of five rounds of three runs each, after two. On a CPU, where only the script is rehearsed, one run."""
    if device == "cpu":
        return timed(device, run)
    timed(device, run), timed(device, run)
    return spread([timed(device, lambda: [run() for _ in range(3)]) / 3 for _ in range(5)])["median"]


@dataclass(frozen=True)
class Check:
    """One kernel on one shape.

    Attributes:
        compute: from x to results, whose first dimension is that of x.
        differences: from the results to the numbers that must not exceed the bounds of the same names.
        by_row: whether rows are to be independent of each other.
        weights: bytes that are read once besides x. None if the time is of no interest.
    """

    name: str
    x: Tensor
    compute: Callable[[Tensor], Outputs]
    differences: Callable[[Outputs], dict[str, float]]
    bounds: dict[str, float]
    by_row: bool = True
    weights: int | None = None
    counts: tuple[int, ...] = (1, 2, 64)

    @torch.inference_mode()
    def run(self, device: str) -> dict[str, Any]:
        started = time.perf_counter()
        found = self.compute(self.x)
        once = time.perf_counter() - started
        different = self.differences(found)
        right = all(different[name] <= bound for name, bound in self.bounds.items())
        result: dict[str, Any] = {"shape": list(self.x.shape), "right": right, **different, "bounds": self.bounds}
        if self.by_row:
            whole = [_bits(each) for each in found]
            result["same_bits"] = {}
            for count in self.counts:
                if count < len(self.x):
                    alone = [_bits(each) for each in self.compute(self.x[-count:])]
                    same = all(torch.equal(part, each[-count:]) for part, each in zip(alone, whole, strict=True))
                    result["same_bits"][f"{count} of {len(self.x)}"] = same
        if self.weights is not None:
            seconds = once if device == "cpu" else _seconds(device, partial(self.compute, self.x))
            moved = self.weights + self.x.nbytes + sum(each.nbytes for each in found)
            result |= {"us": 1e6 * seconds, "gb_per_second": moved / seconds / 1e9}
        return result


def _bits(x: Tensor) -> Tensor:
    sizes = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
    return x.contiguous().view(sizes.get(x.dtype, x.dtype))


def conformance(device: str, sizes: Sizes, extent: Extent, *, odd: bool) -> Iterator[tuple[str, Any]]:
    """Each kernel of each module in ``backends/torch/kernels``; of a missing module, the operations that stand for it.

    ``odd`` takes the checks at odd shapes, otherwise those at the model's.
    """
    present = {each.name for each in pkgutil.iter_modules(kernels.__path__)}
    yield "kernel_modules", {name: "checked" if name in CHECKS else "no check here knows it" for name in sorted(present)}
    for name, checks in CHECKS.items():
        try:
            module = importlib.import_module(f"{kernels.__name__}.{name}") if name in present else None
            made = iter(checks(module if device != "cpu" or INTERPRETED else None, device, sizes, extent))
            while (check := next(made, None)) is not None:
                if odd == (check.weights is not None):
                    continue
                label = f"{name}: {check.name}"
                try:
                    yield label, check.run(device)
                except Exception as error:  # noqa: BLE001 (a kernel that fails is a finding; the others go on)
                    yield label, {"error": error_line(error)}
        except Exception as error:  # noqa: BLE001 (likewise, for a module)
            yield name, {"error": error_line(error)}


def _relative(*expected: Tensor) -> Callable[[Outputs], dict[str, float]]:
    """The largest difference, relative to the largest value of what is expected (float64)."""

    def differences(found: Outputs) -> dict[str, float]:
        pairs = zip(found, expected, strict=True)
        errors = [(one.double() - other).abs().max() / other.abs().max() for one, other in pairs]
        return {"error": float(torch.stack(errors).max())}  # NaN if one of them is

    return differences


def _packed(device: str, quantization: Quantization, *shape: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """A random packed weight [.., out, in] whose products with normal rows are of order 1."""
    *rows, size = shape
    codes = torch.empty(*rows, size * quantization.bits // 32, dtype=torch.int32, device=device).random_(-(2**31), 2**31 - 1)
    groups = (*rows, size // quantization.group_size)
    if quantization.mode == "affine":
        scale = (12 / size) ** 0.5 / (2**quantization.bits - 1)
        scales = (scale * (0.5 + torch.rand(groups, device=device))).to(torch.bfloat16)
        return codes, scales, (scales * -((2**quantization.bits - 1) / 2)).to(torch.bfloat16)
    codes &= 0x77777777 if quantization.bits == 8 else -1  # no NaN of E4M3
    low, high = (0x28, 0x38) if quantization.mode == "nvfp4" else (120, 126)
    return codes, torch.randint(low, high, groups, device=device, dtype=torch.uint8), None


def _values(packed: tuple[Tensor, Tensor, Tensor | None], quantization: Quantization) -> Iterator[tuple[int, Tensor]]:
    """Where each tile of a packed weight's first dimension begins, and its values in float64. Of experts, a tile is one."""
    size = 1 if packed[0].ndim == 3 else max(1, 2**25 // packed[0].shape[1])
    for start in range(0, len(packed[0]), size):
        weight, scales, biases = (None if each is None else each[start : start + size] for each in packed)
        assert weight is not None
        assert scales is not None
        yield start, packing.dequantize(weight, scales, biases, quantization, torch.float32).double()


def _half() -> tuple[torch.dtype, float]:
    """The activations' type and a rounding of it. The interpreter does not multiply bfloat16; float16 takes the same path."""
    return (torch.float16, 2**-10) if INTERPRETED else (torch.bfloat16, ROUNDING)


def _nbytes(packed: tuple[Tensor | None, ...]) -> int:
    return sum(each.nbytes for each in packed if each is not None)


def products(module: Any, device: str, sizes: Sizes, extent: Extent) -> Iterator[Check]:
    """The three products with packed weights, at the model's shapes, and at odd ones in every format."""
    wing = packing if module is None else module
    hidden, heads, rows = sizes.hidden, sizes.heads, extent.check_rows
    shapes = {
        "queries": (heads * sizes.sliding[1], hidden),
        "keys": (sizes.sliding[0] * sizes.sliding[1], hidden),
        "queries of a full layer": (heads * sizes.full[1], hidden),
        "outputs": (hidden, heads * sizes.sliding[1]),
        "gate": (sizes.inner, hidden),
        "down": (hidden, sizes.inner),
        "router": (sizes.experts, hidden),
        "head": (extent.check_vocabulary, hidden),
    }
    eight, four = Quantization(GROUP, 8), Quantization(GROUP, 4)
    for name, shape in shapes.items():
        yield _linear(wing, device, f"{name}, 8 bits {list(shape)}", eight, shape, rows, timing=True)
    pairs = rows * sizes.top_k
    for out, size in ((2 * sizes.expert_inner, hidden), (hidden, sizes.expert_inner)):
        name = f"experts, 4 bits {[sizes.experts, out, size]}"
        yield _experts(wing, device, name, four, (sizes.experts, out, size), pairs, timing=True)
    table = (extent.check_vocabulary, hidden)
    yield _weighted(wing, device, f"mean embeddings, 8 bits {list(table)}", eight, table, rows, timing=True)
    for each in FORMATS[: extent.formats]:
        label, odd = f"{each.mode} {each.bits} bits in {each.group_size}", 3 * max(each.group_size, 32)
        yield _linear(wing, device, f"linear [75, {odd}], {label}", each, (75, odd), 21)
        yield _experts(wing, device, f"experts [5, 75, {odd}], {label}", each, (5, 75, odd), 37)
        yield _weighted(wing, device, f"weighted rows [131, {odd}], {label}", each, (131, odd), 3)


def _linear(
    wing: Any, device: str, name: str, form: Quantization, shape: tuple[int, ...], rows: int, timing: bool = False
) -> Check:
    (dtype, rounding), packed = _half(), _packed(device, form, *shape)
    x = torch.randn(rows, shape[1], device=device).to(dtype)
    expected = torch.cat([x.double() @ values.T for _, values in _values(packed, form)], dim=1)
    compute = partial(_one, lambda x: wing.linear(x, *packed, form))
    return Check(name, x, compute, _relative(expected), {"error": rounding}, weights=_nbytes(packed) if timing else None)


def _experts(
    wing: Any, device: str, name: str, form: Quantization, shape: tuple[int, ...], rows: int, timing: bool = False
) -> Check:
    """The rows' experts are random; the first and the last have none."""
    (dtype, rounding), packed = _half(), _packed(device, form, *shape)
    chosen = torch.randint(1, max(2, shape[0] - 1), (rows,), device=device).sort().values
    ends = torch.searchsorted(chosen, torch.arange(shape[0], device=device), right=True).int()
    x = torch.randn(rows, shape[2], device=device).to(dtype)
    expected = torch.empty(rows, shape[1], dtype=torch.float64, device=device)
    for expert, [matrix] in _values(packed, form):
        expected[chosen == expert] = x[chosen == expert].double() @ matrix.T

    def compute(x: Tensor) -> Tensor:
        result: Tensor = wing.expert_linear(x, (ends - rows + len(x)).clamp(min=0), *packed, form)
        return result

    bounds, weights = {"error": rounding}, _nbytes(packed) if timing else None
    return Check(name, x, partial(_one, compute), _relative(expected), bounds, weights=weights)


def _weighted(
    wing: Any, device: str, name: str, form: Quantization, shape: tuple[int, ...], rows: int, timing: bool = False
) -> Check:
    (dtype, rounding), packed = _half(), _packed(device, form, *shape)
    p = torch.softmax(6 * torch.randn(rows, shape[0], device=device), dim=-1).to(dtype)
    expected: Tensor = torch.zeros(rows, shape[1], dtype=torch.float64, device=device)
    for start, values in _values(packed, form):
        expected += p[:, start : start + len(values)].double() @ values
    compute = partial(_one, lambda p: wing.weighted_rows(p, *packed, form))
    return Check(name, p, compute, _relative(expected), {"error": rounding}, weights=_nbytes(packed) if timing else None)


def _one(compute: Callable[[Tensor], Tensor], x: Tensor) -> Outputs:
    return (compute(x),)


def experts(module: Any, device: str, sizes: Sizes, extent: Extent) -> Iterator[Check]:
    """The experts of a layer: two products, GELU and the weighted sum. Without that module, the checks of products do."""
    if module is None:
        return
    form = Quantization(GROUP, 4)
    real = sizes.hidden, sizes.expert_inner, sizes.experts, sizes.top_k, extent.check_rows
    for (hidden, inner, count, top_k, rows), timing in ((real, True), ((128, 192, 3, 2, 5), False)):
        gate_up, down = _packed(device, form, count, 2 * inner, hidden), _packed(device, form, count, hidden, inner)
        x = torch.randn(rows, hidden, device=device).to(torch.bfloat16)
        scores, chosen = torch.softmax(torch.randn(rows, count, device=device), dim=-1).topk(top_k)
        expected = torch.zeros(rows, hidden, dtype=torch.float64, device=device)
        for (expert, [one]), (_, [two]) in zip(_values(gate_up, form), _values(down, form), strict=True):
            token, place = (chosen == expert).nonzero(as_tuple=True)
            gate, up = (x[token].double() @ one.T).chunk(2, dim=-1)
            y = torch.nn.functional.gelu(gate, approximate="tanh") * up @ two.T
            expected.index_add_(0, token, y * scores[token, place, None].double())
        at_end = partial(_last_tokens, module, scores, chosen, gate_up, down)
        name = f"mixed, {count} experts [{2 * inner}, {hidden}] and [{hidden}, {inner}], {top_k} of them"
        weights = _nbytes((*gate_up, *down)) if timing else None
        # Gate, up, GELU and the outputs are each rounded: a few roundings of bfloat16.
        yield Check(name, x, at_end, _relative(expected), {"error": 2 * ROUNDING}, weights=weights)


def _last_tokens(module: Any, scores: Tensor, chosen: Tensor, gate_up: Any, down: Any, x: Tensor) -> Outputs:
    return (module.mixed(x, scores[-len(x) :], chosen[-len(x) :], gate_up, down),)


def statistics(module: Any, device: str, sizes: Sizes, extent: Extent) -> Iterator[Check]:
    """The statistics of a step: tokens that are as good as the best, entropies, and probabilities."""
    for rows, vocabulary, timing in ((extent.check_rows, extent.check_vocabulary, True), (5, 1_003, False)):
        raw = (8 * torch.randn(rows, vocabulary, device=device)).to(torch.bfloat16)
        bits = torch.empty(rows, dtype=torch.int32, device=device).random_(-(2**31), 2**31 - 1)
        temperature = torch.full((rows,), TEMPERATURE, device=device)
        compute = partial(_statistics, module, bits, temperature)
        differences = partial(_statistics_differences, raw, bits, temperature)
        bounds = {"argmax_loss": 1e-4, "sampled_loss": 1e-4, "entropy_error": 1e-4, "probabilities_error": ROUNDING}
        name = f"[{rows}, {vocabulary}]" + ("" if module is not None else ", the operations of the step")
        yield Check(name, raw, compute, differences, bounds, weights=0 if timing else None)


def _statistics(module: Any, bits: Tensor, temperature: Tensor, raw: Tensor) -> Outputs:
    bits, temperature = bits[-len(raw) :], temperature[-len(raw) :]
    if module is None:
        found = wing_statistics.statistics(raw.clone(), bits, CAP, temperature)
        return found.argmax, found.sampled, found.entropy, found.probabilities()
    argmax, sampled, entropy, most, total = module.statistics(raw, bits, CAP, temperature)
    return argmax, sampled, entropy, module.probabilities(raw, CAP, temperature, most, total)


def _statistics_differences(raw: Tensor, bits: Tensor, temperature: Tensor, found: Outputs) -> dict[str, float]:
    argmax, sampled, entropy, probabilities = found
    rows: list[dict[str, Tensor]] = []
    for row in range(len(raw)):  # float64 of all rows would take gigabytes
        scores = CAP * torch.tanh(raw[row].double() / CAP) / temperature[row].double()
        noisy = scores + gumbel(words(bits[row : row + 1], len(scores)))[0].double()
        logs = torch.log_softmax(scores, dim=-1)
        rounded = torch.softmax(scores.to(torch.bfloat16).double(), dim=-1)
        own = {
            "argmax_loss": scores.max() - scores[argmax[row]],
            "sampled_loss": noisy.max() - noisy[sampled[row]],
            "entropy_error": (entropy[row].double() + (logs.exp() * logs).sum()).abs(),
            "probabilities_error": (probabilities[row].double() - rounded).abs().max() / rounded.max(),
        }
        rows.append(own)
    return {name: float(torch.stack([own[name] for own in rows]).max()) for name in rows[0]}


def attentions(module: Any, device: str, sizes: Sizes, extent: Extent) -> Iterator[Check]:
    """Attention as the wing calls it, over a canvas and in the causal pass. Whether a kernel or torch computes it, it decides."""
    del module, extent
    # On a CPU the interpreter is not asked: the wing takes torch's own attention there.
    for shared, size in (sizes.sliding, sizes.full):
        windowed = sizes.window if (shared, size) == sizes.sliding else None
        for keys in (*(sizes.canvas + prefix for prefix in sizes.prefixes), sizes.canvas + 37):
            if windowed is None or keys < sizes.canvas + windowed:
                shape = shared, size, sizes.canvas, keys
                yield _attention(device, sizes.heads, shape, None, causal=False, odd=keys == sizes.canvas + 37)
        for count, keys, odd in (*((sizes.pass_length, keys, False) for keys in sizes.pass_keys), (33, 71, True), (1, 45, True)):
            yield _attention(device, sizes.heads, (shared, size, count, keys), windowed, causal=True, odd=odd)


def _attention(
    device: str, heads: int, shape: tuple[int, int, int, int], window: int | None, *, causal: bool, odd: bool
) -> Check:
    shared, size, count, total = shape
    dtype, rounding = (torch.float32, 1e-5) if device == "cpu" else (torch.bfloat16, ROUNDING)
    queries = (size**-0.25 * torch.randn(count, heads, size, device=device)).to(dtype)
    keys = (size**-0.25 * torch.randn(1, shared, total, size, device=device)).to(dtype)
    values = torch.randn(1, shared, total, size, device=device).to(dtype)
    own = torch.arange(total - count, total, device=device)[:, None]
    place = torch.arange(total, device=device)[None, :]
    seen = (place <= own) & (place > own - (window or total)) if causal else place >= 0
    scores = torch.einsum("nkgd,ksd->kgns", queries.double().unflatten(1, (shared, -1)), keys[0].double())
    weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
    expected = torch.einsum("kgns,ksd->nkgd", weights, values[0].double()).flatten(1, 2)
    function = partial(attention.causal, window=window) if causal else attention.bidirectional

    def compute(queries: Tensor) -> Outputs:
        return (function(queries.transpose(0, 1)[None], keys, values)[0].transpose(0, 1),)

    way = f"causal, window {window}" if causal else "canvas"
    name = f"{way}, {heads} heads over {shared} of {size}, {count} queries, {total} keys"
    weights_read = None if odd else keys.nbytes + values.nbytes
    return Check(name, queries, compute, _relative(expected), {"error": rounding}, by_row=not causal, weights=weights_read)


def norms(module: Any, device: str, sizes: Sizes, extent: Extent) -> Iterator[Check]:
    """Norms, residuals, rotation and gates between the products."""
    wing = fused if module is None else module
    odd = extent.check_rows - 2, 203, 3, 18, 75
    real = extent.check_rows, sizes.hidden, sizes.heads, sizes.full[1], sizes.inner
    for (rows, hidden, heads, size, inner), weights in ((real, 0), (odd, None)):
        x, other, third = (torch.randn(rows, hidden, device=device).to(torch.bfloat16) for _ in range(3))
        one, two, three, scale = ((1 + 0.1 * torch.randn(hidden, device=device)).to(torch.bfloat16) for _ in range(4))
        head = torch.randn(rows, heads, size, device=device).to(torch.bfloat16)
        per_head = (1 + 0.1 * torch.randn(size, device=device)).to(torch.bfloat16)
        angles = torch.randn(rows, 1, size // 2, device=device).repeat(1, 1, 2)
        cos, sin = angles.cos().to(torch.bfloat16), angles.sin().to(torch.bfloat16)
        gate, up = (torch.randn(rows, inner, device=device).to(torch.bfloat16) for _ in range(2))

        normed = _norm(x, one)
        yield Check(
            f"rms_norm [{rows}, {hidden}]",
            x,
            partial(_one, partial(_with, wing.rms_norm, (), (one, EPS))),
            _relative(normed),
            {"error": ROUNDING},
            weights=weights,
        )
        turned = _norm(head, per_head)
        turned = turned * cos.double() + torch.cat(turned.chunk(2, dim=-1)[::-1], dim=-1) * sin.double() * _signs(size, device)
        yield Check(
            f"heads [{rows}, {heads}, {size}]",
            head,
            partial(_rotated, wing, per_head, cos, sin),
            _relative(turned),
            {"error": 2 * ROUNDING},
            weights=weights,
        )
        active = torch.nn.functional.gelu(gate.double(), approximate="tanh") * up.double()
        yield Check(
            f"geglu [{rows}, {inner}]",
            gate,
            partial(_one, partial(_with, wing.geglu, (up,), ())),
            _relative(active),
            {"error": 2 * ROUNDING},
            weights=weights,
        )
        total = x.double() + _norm(other, one)
        inputs = _norm(total, two), _norm(total, three), _norm(total, None) * scale.double() * hidden**-0.5
        yield Check(
            f"after_attention [{rows}, {hidden}]",
            x,
            partial(_with, wing.after_attention, (other,), ((one, two, three), scale, EPS)),
            _relative(total, *inputs),
            {"error": 3 * ROUNDING},
            weights=weights,
        )
        both = x.double() + _norm(_norm(other, one) + _norm(third, two), three)
        yield Check(
            f"after_experts [{rows}, {hidden}]",
            x,
            partial(_one, partial(_with, wing.after_experts, (other, third), ((one, two, three), scale[:1], EPS))),
            _relative(both * scale[:1].double()),
            {"error": 3 * ROUNDING},
            weights=weights,
        )


def _norm(x: Tensor, weight: Tensor | None) -> Tensor:
    wide = x.double()
    normed = wide * (wide.square().mean(dim=-1, keepdim=True) + EPS).rsqrt()
    return normed if weight is None else normed * weight.double()


def _signs(size: int, device: str) -> Tensor:
    """-1 for the first half of a head, 1 for the second."""
    return torch.cat([-torch.ones(size // 2, device=device), torch.ones(size // 2, device=device)]).double()


def _with(function: Callable[..., Any], by_row: tuple[Tensor, ...], others: tuple[Any, ...], x: Tensor) -> Any:
    """``function`` of the last rows: x, and as many of each of ``by_row``."""
    return function(x, *(each[-len(x) :] for each in by_row), *others)


def _rotated(wing: Any, weight: Tensor, cos: Tensor, sin: Tensor, x: Tensor) -> Outputs:
    return (wing.heads(x, weight, (cos[-len(x) :], sin[-len(x) :]), EPS),)


#: The modules of ``backends/torch/kernels`` and their checks.
CHECKS: dict[str, Callable[[Any, str, Sizes, Extent], Iterator[Check]]] = {
    "products": products,
    "statistics": statistics,
    "experts": experts,
    "attention": attentions,
    "norms": norms,
}

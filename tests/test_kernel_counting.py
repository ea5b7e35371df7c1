"""The counter of kernels and bytes: its rules on small graphs, and the counts of the released model's passes."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

mx = pytest.importorskip("mlx.core")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))
counting: Any = __import__("kernel_counting")


def counted(make: Callable[[], Callable[..., Any]], *shapes: tuple[int, ...]) -> Any:
    """The graph of the function that ``make`` returns, over float32 arrays of zeros."""
    marks = counting.Marks()
    with marks.here():
        return counting.Graph(make(), [mx.zeros(shape) for shape in shapes], marks)


def test_elementwise_operations_are_a_kernel_each_unless_compiled() -> None:
    def formula(x: Any, y: Any) -> Any:
        return mx.tanh(x * y) + x

    plain = counted(lambda: formula, (8, 4), (8, 4))
    compiled = counted(lambda: mx.compile(formula), (8, 4), (8, 4))
    size = 8 * 4 * 4
    assert (plain.count, plain.nbytes) == (3, (3 + 2 + 3) * size)
    assert (compiled.count, compiled.nbytes) == (1, 3 * size)


@pytest.mark.parametrize(("depth", "kernels"), [(2, 1), (11, 1), (12, 2), (23, 3)])
def test_what_is_compiled_is_cut_at_the_depth_that_mlx_fuses(depth: int, kernels: int) -> None:
    def formula(x: Any) -> Any:
        for _ in range(depth):
            x = mx.abs(x)
        return x

    assert counted(lambda: mx.compile(formula), (8, 4)).count == kernels


def test_outputs_that_do_not_depend_on_each_other_are_kernels_of_their_own() -> None:
    def siblings(x: Any, y: Any) -> Any:
        return mx.exp(x) * y, mx.tanh(x) * y

    def chain(x: Any, y: Any) -> Any:
        first = mx.exp(x) * y
        return first, first * y

    assert counted(lambda: mx.compile(siblings), (8, 4), (8, 4)).count == 2
    assert counted(lambda: mx.compile(chain), (8, 4), (8, 4)).count == 1


def test_views_cost_nothing_and_layouts_that_do_not_fit_are_copied() -> None:
    assert counted(lambda: lambda x: x.reshape(4, 8)[1:, ::-1].swapaxes(0, 1), (8, 4)).count == 0
    assert counted(lambda: lambda x: x.swapaxes(0, 1).flatten(), (8, 4)).count == 1
    assert counted(lambda: lambda x: mx.fast.rms_norm(x, None, 1e-6), (8, 4)).count == 1
    assert counted(lambda: lambda x: mx.fast.rms_norm(x[:, :2], None, 1e-6), (8, 4)).count == 2


def test_attention_is_one_kernel_where_metal_has_one() -> None:
    def attend(queries: Any, keys: Any) -> Any:
        return mx.fast.scaled_dot_product_attention(queries, keys, keys, scale=1.0)

    for count, size, kernels in ((32, 64, 1), (1, 256, 1), (32, 256, 4)):
        graph = counted(lambda: attend, (1, 4, count, size), (1, 4, 40, size))
        assert graph.count == kernels, f"{count} queries of size {size}: {[kernel.name for kernel in graph.kernels]}"


def test_the_released_model_s_passes_stay_as_few(tmp_path: Path) -> None:
    """More kernels or bytes than these mean that something is no longer fused, or copied."""
    command = [sys.executable, "graph_mlx.py", "--cases", "step-1024,encode,token", "--sides", "ours,plain"]
    run = subprocess.run(
        [*command, "--json", str(tmp_path / "counts.json")], cwd=BENCHMARKS, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    report = json.loads((tmp_path / "counts.json").read_text())
    results = report["results"]
    print({name: {side: (each["kernels"], each["gb"]) for side, each in sides.items()} for name, sides in results.items()})
    for name, side, kernels, gb in (
        ("step-1024", "ours", 1_210, 23.7),
        ("step-1024", "plain", 1_440, 28.4),
        ("encode", "ours", 3_510, 77.8),
        ("token", "ours", 1_025, 3.7),
    ):
        assert results[name][side]["kernels"] <= kernels, f"kernels of {name}, {side}"
        assert results[name][side]["gb"] <= gb, f"GB of {name}, {side}"
    assert sum(report["python"]["functions_traced"][1:]) == 0, "a compiled function is traced again in later steps"

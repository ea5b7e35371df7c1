"""The rehearsal of benchmarks/gpu.py, which measures everything when a GPU is at hand: at a toy size, here mostly on the CPU."""

import importlib
import importlib.util
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from support.comparing import BACKENDS, within
from support.real_layout import LAYERS, stored_tensors

pytestmark = pytest.mark.skipif(
    "torch" not in BACKENDS or importlib.util.find_spec("triton") is None, reason="torch is not tested here, or has no triton"
)

FOLDER = Path(__file__).parents[1] / "benchmarks"
STEPS = ["step_4bit", "step_bf16"]
SECTIONS = ["machine", "conformance", *STEPS, "speed", "batches", "prefill", "transformers", "mlx", "odd_shapes"]


def command(file: Path, *options: str) -> list[str]:
    return [sys.executable, str(FOLDER / "gpu.py"), "--toy", "--json", str(file), *options]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The file of a run of all sections, and what it prints."""
    file = tmp_path_factory.mktemp("gpu") / "gpu.json"
    done = subprocess.run(command(file), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return file, done.stdout


@pytest.fixture(scope="module")
def report(whole: tuple[Path, str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(whole[0].read_text())
    return found


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a module of the benchmarks, for the time of a test."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER)):
            del sys.modules[name]


def test_every_section_is_there_and_finite(report: dict[str, Any]) -> None:
    assert list(report["sections"]) == SECTIONS
    assert report["ended"] == "all sections"
    assert report["left_out"] == {}
    for name, section in report["sections"].items():
        assert "error" not in section, section
        may_skip = {"mlx": "mlx", "transformers": "transformers"}.get(name)
        assert section["entries"] or (may_skip and importlib.util.find_spec(may_skip) is None), name
    for path, entry in within(report["sections"]):
        assert entry not in ("nan", "inf", "-inf"), path
        if isinstance(entry, dict):
            assert "error" not in entry or isinstance(entry["error"], float), f"{path}: {entry}"
            if "median" in entry:
                assert 0 < entry["least"] <= entry["median"] <= entry["most"], path


def test_kernels_agree_with_float64_and_their_rows_are_independent(report: dict[str, Any]) -> None:
    checked = report["sections"]["conformance"]["entries"] | report["sections"]["odd_shapes"]["entries"]
    modules = checked.pop("kernel_modules")
    assert set(modules.values()) == {"checked"}, modules
    for name, found in checked.items():
        print(name, {each: found[each] for each in found["bounds"]})
        assert found["right"], name
        if "same_bits" in found and not name.startswith("attention"):  # torch's attention on a CPU promises no such thing
            assert all(found["same_bits"].values()), name
    assert {name.partition(":")[0] for name in checked} == set(modules) | {"attention"}


def test_a_step_is_divided_into_parts(report: dict[str, Any]) -> None:
    for section in STEPS:
        entries = report["sections"][section]["entries"]
        prefixes = [str(prefix) for prefix in report["sizes"]["prefixes"]]
        assert [name for name in entries if name.isdecimal()] == prefixes
        for prefix in prefixes:
            found = entries[prefix]
            assert found["host_ms"]["median"] > 0
            assert len(found["parts"]) == 8
            for part, each in found["parts"].items():
                assert each["gb"] > 0, part
                assert each["clock_ms"] > 0, part
                assert each["floor_ms"] > 0, part


def test_the_script_settles_a_fixed_number_of_tokens(report: dict[str, Any]) -> None:
    accepted, canvas = report["extent"]["accepted"], report["sizes"]["canvas"]
    found = report["sections"]["speed"]["entries"][f"diffusion at {accepted} tokens a forward"]
    assert found["tokens_per_forward"] == accepted
    assert found["accepted_in_the_first_canvas"] == list(range(accepted, canvas + 1, accepted))
    assert found["new_tokens"] == canvas * report["extent"]["blocks"]


def test_the_table_and_the_picture_show_every_section(whole: tuple[Path, str]) -> None:
    file, output = whole
    table = [line for line in output.splitlines() if line.startswith("|")]
    for what in ("machine", "kernels within their bounds", "a step, 4 bits", "a step, BF16", "causal pass", "2 rows", "tokens/s"):
        assert any(what in line for line in table), what
    assert all(line.count("|") == 3 for line in table)
    picture = ElementTree.parse(file.with_suffix(".svg")).getroot()
    labels = {text.text for text in picture.iter("{http://www.w3.org/2000/svg}text")}
    assert {"experts", "head", "attention", "a step, BF16, prefix 24", "a step, 4 bits, prefix 24"} <= labels


def test_sigterm_in_the_middle_leaves_what_there_is(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    running = subprocess.Popen(command(file, "--sections", "conformance,machine"), stdout=subprocess.PIPE, text=True)
    while not (file.exists() and len(json.loads(file.read_text())["sections"].get("conformance", {}).get("entries", {})) > 2):
        assert running.poll() is None
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    output, _ = running.communicate(timeout=60)
    assert running.returncode == 128 + signal.SIGTERM
    report = json.loads(file.read_text())
    assert report["ended"] == "SIGTERM"
    assert len(report["sections"]["conformance"]["entries"]) > 2
    assert "machine" not in report["sections"]
    assert "| kernels within their bounds of float64 |" in output
    assert [each.name for each in tmp_path.iterdir()] == ["gpu.json"], "a temporary file is left"


def test_it_ends_when_the_time_is_over(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    done = subprocess.run(command(file, "--minutes", "0"), capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0
    assert json.loads(file.read_text())["ended"] == "the time was over"


def test_a_failing_section_is_one_line(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu: ModuleType = script("gpu")

    def failing(battery: Any) -> Iterator[tuple[str, Any]]:
        yield "before", {"value": math.nan}
        raise RuntimeError("first line\nsecond line")

    def skipping(battery: Any) -> Iterator[tuple[str, Any]]:
        yield "version", "1"
        raise gpu.Skipped("this machine has none")

    def working(battery: Any) -> Iterator[tuple[str, Any]]:
        yield "value", 1.0

    gpu.SECTIONS = {"failing": failing, "skipping": skipping, "working": working}
    report = gpu.Report(tmp_path / "gpu.json", {})
    gpu.run(gpu.Battery(report, gpu.TOY, "cpu", time.perf_counter() + 60, None), list(gpu.SECTIONS))
    report.end("all sections")
    written = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert written["failing"]["error"] == "RuntimeError: first line second line"
    assert written["failing"]["entries"] == {"before": {"value": "nan"}}
    assert written["skipping"]["skipped"] == "this machine has none"
    assert written["working"]["entries"] == {"value": 1.0}
    output = capsys.readouterr().out
    assert "failing: RuntimeError: first line second line (" in output
    assert "| failing: error | RuntimeError: first line second line |" in output
    assert "| skipping: skipped | this machine has none |" in output


@pytest.mark.parametrize("with_file", [True, False], ids=["file", "no_file"])
def test_a_new_process_goes_on_when_the_device_is_lost(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_file: bool
) -> None:
    gpu: ModuleType = script("gpu")
    begun: list[list[str]] = []
    monkeypatch.setattr(gpu, "usable", lambda device: False)
    monkeypatch.setattr(gpu.os, "execv", lambda program, given: begun.append(given))
    monkeypatch.setattr(gpu.tempfile, "tempdir", str(tmp_path))
    gpu.SECTIONS = {"conformance": lambda battery: iter([("kernel_modules", {})])}
    file = tmp_path / "gpu.json" if with_file else None
    report = gpu.Report(file, {"toy": True})
    gpu.run(gpu.Battery(report, gpu.TOY, "cpu", time.perf_counter() + 600, None), ["conformance"])
    assert begun == [], "nothing is left to do"
    gpu.begin_anew(gpu.Battery(report, gpu.TOY, "cpu", time.perf_counter() + 600, None), ["machine"])
    monkeypatch.undo()
    done = subprocess.run(begun[0], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "| kernels within their bounds of float64 | 0 of 0 |" in done.stdout
    assert "| BF16 product, TFLOP/s |" in done.stdout
    if file:
        written = json.loads(file.read_text())
        assert list(written["sections"]) == ["conformance", "machine"]
        assert written["sections"]["conformance"]["lost_the_device"] is True
        assert written["ended"] == "all sections"


def test_a_wrong_kernel_is_found(script: Any) -> None:
    """A kernel whose values are off, and one whose rows depend on each other."""
    import torch

    kernels = script("gpu_kernels")
    x = torch.ones(8, 4)

    def check(compute: Any) -> dict[str, Any]:
        differences = kernels._relative(torch.ones(8, 4).double())
        found: dict[str, Any] = kernels.Check("", x, lambda x: (compute(x),), differences, {"error": 0.01}).run("cpu")
        return found

    assert check(lambda x: x.clone())["right"]
    assert all(check(lambda x: x.clone())["same_bits"].values())
    assert not check(lambda x: 1.02 * x)["right"]
    assert not check(lambda x: x * math.nan)["right"]
    assert not any(check(lambda x: x * (1 + 1e-6 * len(x)))["same_bits"].values())


def test_kernels_of_a_trace_belong_to_the_part_that_launched_them(script: Any) -> None:
    parts = script("gpu_parts")

    def event(category: str, name: str, start: float, length: float, correlation: int | None = None) -> dict[str, Any]:
        arguments = {} if correlation is None else {"correlation": correlation}
        return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": length, "args": arguments}

    kernels = parts.Kernels.of(
        [
            event("user_annotation", "part: experts", 10, 30),
            event("user_annotation", "part: other products", 20, 5),
            event("user_annotation", "another range", 0, 100),
            event("cuda_runtime", "cudaLaunchKernel", 12, 1, 1),
            event("cuda_driver", "cuLaunchKernelEx", 21, 1, 2),  # as Triton launches
            event("cuda_runtime", "cudaLaunchKernel", 30, 1, 3),
            event("cuda_runtime", "cudaMemcpyAsync", 50, 1, 4),
            event("cuda_runtime", "cudaGraphLaunch", 60, 1, 5),
            event("kernel", "sort", 1000, 2000, 1),  # kernels run long after their launches
            event("kernel", "product", 3000, 4000, 2),
            event("kernel", "sort", 7000, 1000, 3),
            event("gpu_memcpy", "copy", 8000, 500, 4),
            event("kernel", "in a graph", 9000, 100, 5),
            event("kernel", "unknown", 9500, 100, 6),
        ]
    )
    assert kernels.count == {"experts": 2, "other products": 1, parts.REST: 3}
    assert kernels.milliseconds == pytest.approx({"experts": 3.0, "other products": 4.0, parts.REST: 0.7})
    assert kernels.largest(2) == [{"name": "product", "launches": 1, "ms": 4.0}, {"name": "sort", "launches": 2, "ms": 3.0}]
    assert (kernels.graphs, kernels.orphans) == (1, 1)


def test_the_real_model_has_the_released_bytes(script: Any) -> None:
    """The model that a GPU gets, here without memory: its bytes are those of the released 4-bit checkpoint, part by part."""
    model, parts, sections = script("gpu_model"), script("gpu_parts"), script("sections")
    backend = model.random_model(sections.REAL.config(LAYERS), "meta", bits_4=True)
    released = {
        name: prod(shape) * (4 if dtype == "U32" else 2)
        for name, (shape, dtype) in stored_tensors("weights_mlx_4bit.tsv").items()
        if name.startswith("model.decoder.")
    }
    work = parts.work(backend, 0)
    assert work["experts"].nbytes == sum(size for name, size in released.items() if ".experts." in name)
    table = sum(size for name, size in released.items() if "embed_tokens" in name)
    assert work["head"].nbytes == table + 256 * 262_144 * 2
    weights = sum(work[part].nbytes for part in ("experts", "router", "other products", parts.REST))
    # The encoder's own scalar of a layer is stored elsewhere.
    assert weights == sum(released.values()) - table + 2 * LAYERS
    assert np.isclose(work["experts"].flops, 256 * 8 * LAYERS * 2 * 3 * 2816 * 704)
    later = parts.work(backend, 8192)["attention"]
    assert later.nbytes == 2 * 2 * (25 * 8 * 256 * (1023 + 256) + 5 * 2 * 512 * (8192 + 256))

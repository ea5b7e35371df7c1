"""The rehearsal of benchmarks/mac.py, which people with a Mac run for us: at a toy size, here mostly on MLX's CPU."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.comparing import BACKENDS, within

pytestmark = pytest.mark.skipif("mlx" not in BACKENDS, reason="MLX is not tested here")

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "mac.py"
SECTIONS = ["machine", "kernels", "attention", "rotate", "products", "slice", "limits", "rows", "answers"]


def run(file: Path, *options: str) -> tuple[dict[str, Any], str]:
    """The file that a toy run writes, and what it prints."""
    command = [sys.executable, str(SCRIPT), "--toy", "--json", str(file), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text()), done.stdout


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("mac") / "mac.json", "--model", "sudoku")[0]


def test_every_section_is_there_and_finite(report: dict[str, Any]) -> None:
    assert list(report["sections"]) == [*SECTIONS, "model"]
    assert report["skipped"] == []
    assert report["toy"] is True
    timed: set[str] = set()
    for path, entry in within(report["sections"]):
        if isinstance(entry, float):
            assert math.isfinite(entry), path
        if isinstance(entry, dict):
            assert "error" not in entry or ("force_fused" in path or "raised" in path), f"{path}: {entry}"
            if "median" in entry:
                assert set(entry) == {"median", "least", "most"}, path
                assert 0 < entry["least"] <= entry["median"] <= entry["most"], path
                timed.add(path.split("/")[1])
    assert timed == {"kernels", "attention", "rotate", "products", "slice", "limits", "model"}


def test_sections_have_their_form(report: dict[str, Any]) -> None:
    sections, sizes = report["sections"], report["sizes"]
    on_gpu = report["device"] == "gpu"
    assert {"cpu", "macos", "memory", "versions", "device_info", "system"} <= set(sections["machine"])
    for dtype in ("float32", "bfloat16"):
        found = sections["kernels"][dtype]
        assert {"statistics", "route", "combine", "not_used"} <= set(found)
        assert on_gpu or (found["not_used"] and found["statistics"]["kernel"] is None)
    for ways in sections["attention"]["canvas"].values():
        assert {"ours", "mlx"} <= set(ways)
    for ways in sections["attention"]["causal"].values():
        assert set(ways) == {"ours", "tiles", "mlx"}
    assert len(sections["attention"]["canvas"]) == 2 * len(sizes["keys"])
    assert len(sections["attention"]["causal"]) == 2 * len(sizes["pass_keys"])
    products = {name: found for name, found in sections["products"].items() if name != "section_seconds"}
    assert len(products) == 8
    for name, found in products.items():
        assert found["gb_per_second"] > 0, name
        assert found["tflops"] > 0, name
    assert sections["slice"]["layers"] == 6
    assert on_gpu or sections["slice"]["kernels"] is None
    prefixes = {str(prefix) for prefix in sizes["prefixes"]}
    assert set(sections["slice"]["plain"]["step"]) == set(sections["slice"]["extrapolated_to_30_layers"]) == prefixes
    assert sections["limits"]["bytes"]["peak"] > sections["limits"]["bytes"]["before"] > 0
    assert {"sudoku, cpu, float32", "small slice, cpu, float32"} <= set(sections["rows"])
    assert sections["model"]["model"] == "sudoku"


def test_values_are_those_of_mlx(report: dict[str, Any]) -> None:
    """Our attention and rotation are MLX's up to rounding. What the CPU writes is the same a second time."""
    for path, entry in within(report["sections"]):
        if path.endswith(("/difference", "_difference")):
            print(path, entry)
            assert entry < (1e-4 if report["device"] == "cpu" else 0.1), path
    for name in ("sudoku", "pictures"):
        places = report["sections"]["answers"][name]
        assert len(places) >= 2
        assert places[0]["place"] == "cpu, float32"
        assert [place["same_tokens_and_steps"] for place in places if place["place"].startswith("cpu")] != []
        assert all(place["same_tokens_and_steps"] == 1 for place in places if place["place"].startswith("cpu")), places


def test_a_failure_is_one_line_and_the_rest_goes_on(tmp_path: Path) -> None:
    report, output = run(tmp_path / "mac.json", "--sections", "rotate", "--model", str(tmp_path / "nothing"))
    assert list(report["sections"]) == ["rotate", "model"]
    error = report["sections"]["model"]["error"]
    assert "\n" not in error
    assert "nothing" in error
    assert "ours" in report["sections"]["rotate"]
    assert "Traceback" not in output


def test_what_the_time_does_not_allow_is_named(tmp_path: Path) -> None:
    report, output = run(tmp_path / "mac.json", "--minutes", "0")
    assert report["skipped"] == SECTIONS
    assert report["sections"] == {}
    assert output.count("left out") == len(SECTIONS)

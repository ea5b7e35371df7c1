"""benchmarks/kernel_table.py: a kernel is compiled as it is launched, and its machine code is read right. Needs no GPU."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from support.compiling import recorded
from support.interpreting import needs_triton

pytestmark = needs_triton

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    command = [sys.executable, str(BENCHMARKS / "kernel_table.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("kernel_table")


def test_one_kernel(tmp_path: Path) -> None:
    result = run(
        "--only", "product, 2,112", "--arch", "90", "--json", str(tmp_path / "table.json"), TRITON_CACHE_DIR=str(tmp_path)
    )
    assert result.returncode == 0, result.stderr
    print(result.stdout)
    content = json.loads((tmp_path / "table.json").read_text())
    [row] = content["rows"]
    assert content["versions"]["triton"]
    assert (row["kernel"], row["arch"], row["unit"]) == ("_linear", 90, "weight")

    from mlx_diffgemma.backends.torch.kernels.products import LinearTiles

    tiles = LinearTiles.of(2816, 1, torch.bfloat16)
    expected = {"block_n": tiles.block_n, "block_k": tiles.block_k, "block_m": tiles.block_m(256), "k_size": 2112, "bits": 8}
    assert expected.items() <= row["constants"].items()
    assert row["warps"] == tiles.num_warps
    # One instruction of four warps covers 64 outputs, all rows, and 16 terms.
    count = tiles.block_n * tiles.block_k // (64 * 16) * 4 // tiles.num_warps
    assert row["mma"] == f"64x{tiles.block_m(256)}x16 ({count})"
    assert 0 < row["registers"] <= 255
    assert row["spills"] == 0
    assert 1 < row["instructions"] < 20
    header, _, line = result.stdout.splitlines()
    assert header.startswith("| case | kernel | sm | ")
    grid = f"{-(-256 // tiles.block_m(256))} x {-(-2816 // tiles.block_n)}"
    assert f"| `_linear` | 90 | {grid} | {row['warps']} | {row['registers']} | 0 | {row['shared']:,} |" in line


def test_wrong_arguments(tmp_path: Path) -> None:
    nothing = run("--only", "no such case", "--json", str(tmp_path / "table.json"))
    interpreted = run(TRITON_INTERPRET="1")
    assert (nothing.returncode, interpreted.returncode) == (2, 2)
    assert "no case has 'no such case' in its name; there are: " in nothing.stderr
    assert "TRITON_INTERPRET is set" in interpreted.stderr
    assert not (tmp_path / "table.json").exists()


def test_loops_spills_and_shapes(table: Any) -> None:
    code = table.Code(
        [
            (0x00, "MOV", "R1, c[0x0][0x28]"),
            (0x10, "LDG.E", "R2, [R4]"),  # the outer loop begins
            (0x20, "HGMMA.64x32x16.F32.BF16", "R24, R4, gdesc[UR8]"),  # the inner one
            (0x30, "HGMMA.64x32x16.F32.BF16", "R24, R8, gdesc[UR8]"),
            (0x40, "BRA", "`(.L_x_1) 0x20"),
            (0x50, "STL", "[R1], R2"),
            (0x60, "BRA", "0x10"),
            (0x70, "LDL.LU", "R2, [R1]"),
            (0x80, "HMMA.16816.F32.BF16", "R4, R8, R12, R4"),
            (0x90, "BRA", "0x90"),  # what follows the end
        ],
        registers=40,
    )
    assert code.spills == 2
    loop = code.loop()
    assert [at for at, _, _ in loop] == [0x20, 0x30, 0x40]
    assert table._mma(loop) == {(64, 32, 16): 2}
    assert table._mma(code.instructions) == {(64, 32, 16): 2, (16, 8, 16): 1}


def test_arguments_are_typed_as_the_compiler_types_them(table: Any) -> None:
    """A one and a multiple of 16 are special, unless the kernel says that they are not."""
    import triton

    @triton.jit(do_not_specialize=["rows"])
    def kernel(x, y, rows, one, wide, odd, scale, block: triton.language.constexpr):  # type: ignore[no-untyped-def]
        pass

    [launch] = recorded(lambda: kernel[(1,)](table.empty(4), None, 32, 1, 2**40, 7, 0.5, block=64, num_warps=2))
    assert launch.options == {"num_warps": 2}
    types, constants, aligned = launch.signature()
    assert types == {
        **{"x": "*bf16", "y": "constexpr", "rows": "i32", "one": "constexpr"},
        **{"wide": "i64", "odd": "i32", "scale": "fp32", "block": "constexpr"},
    }
    assert constants == {"y": None, "one": 1, "block": 64}
    assert aligned == ["x", "wide"]

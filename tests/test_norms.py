"""The kernels between the products: right in Triton's interpreter (and on CUDA if available), and compiled for a Hopper GPU."""

from pathlib import Path

import pytest

from support.compiling import compile_for_hopper
from support.interpreting import interpreted_and_on_cuda, needs_triton, run_checks

pytestmark = needs_triton


@interpreted_and_on_cuda
def test_the_kernels_between_the_products_are_right(interpret: bool) -> None:
    run_checks("norms", interpret=interpret)


def test_they_compile_for_hopper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from mlx_diffgemma.backends.torch.kernels import norms

    half, row = "*bf16", {"size": 2816, "block": 4096}
    rows = dict.fromkeys(("x", "weight", "y"), half) | {"eps": "fp32"}
    compile_for_hopper(norms._rms_norm, rows, row | {"weighted": True}, 8, 1)
    names = ("x", "attended", "weight", "dense_weight", "sparse_weight", "router_scale", "total", "dense", "sparse", "routed")
    compile_for_hopper(norms._after_attention, dict.fromkeys(names, half) | {"eps": "fp32", "factor": "fp32"}, row, 8, 1)
    names = ("x", "dense", "sparse", "dense_weight", "sparse_weight", "weight", "scalar", "y")
    compile_for_hopper(norms._after_experts, dict.fromkeys(names, half) | {"eps": "fp32"}, row, 8, 1)
    types = dict.fromkeys(("x", "weight", "cos", "sin", "y"), half) | {"eps": "fp32", "heads": "i32", "row_stride": "i32"}
    for size in (256, 512):
        sizes = {"size": size, "half": size // 2, "block": size // 2, "weighted": True, "rotated": True}
        compile_for_hopper(norms._heads, types, sizes, 1, 1)
    types = dict.fromkeys(("gate", "up", "y"), half) | dict.fromkeys(("columns_size", "gate_stride", "up_stride"), "i32")
    compile_for_hopper(norms._geglu, types, {"block": 1024}, 4, 1)

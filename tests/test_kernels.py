"""The Triton kernels: correct in Triton's interpreter (and on CUDA if available), and compiled for a Hopper GPU."""

from pathlib import Path

import pytest
import torch

from mlx_diffgemma.checkpoint import Quantization
from support.compiling import check_instructions, compile_for_hopper
from support.interpreting import interpreted_and_on_cuda, needs_triton, run_checks
from support.packed import identifier

pytestmark = needs_triton


@interpreted_and_on_cuda
def test_kernels_are_right(interpret: bool) -> None:
    run_checks("kernels", interpret=interpret)


@pytest.mark.parametrize("activations", ["bf16", "fp32"])
@pytest.mark.parametrize(
    "quantization",
    [Quantization(64, 4), Quantization(128, 6), Quantization(64, 8), Quantization(32, 8, "mxfp8"), Quantization(16, 4, "nvfp4")],
    ids=identifier,
)
def test_kernels_compile_for_hopper(
    quantization: Quantization, activations: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels compile as launched for few rows and for many, with the same instruction for both.

    The interpreter accepts code that the compiler rejects, such as a variable with two types. Compiling needs no GPU.
    """
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from mlx_diffgemma.backends.torch.kernels import products as kernels

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[activations]
    affine = quantization.mode == "affine"
    scales = "*bf16" if affine else "*u8"
    units = {4: "*i32", 8: "*i64"}.get(quantization.bits, "*u8")
    packed = {"weight": units, "scales": scales} | ({"biases": scales} if affine else {})
    form = {"bits": quantization.bits, "group": quantization.group_size, "mode": quantization.mode}
    form |= {} if affine else {"biases": None}

    for experts, n_size in ((0, 4096), (0, 262_144), (128, 1408)):
        types = packed | {"x": f"*{activations}", "y": f"*{activations}", "m_size": "i32", "n_size": "i32"}
        types |= {"ends": "*i32"} if experts else {}
        matrix = form | {"k_size": 2816, "experts": experts, "experts_block": max(experts, 1)}
        matrix |= {} if experts else {"ends": None}
        tiles = kernels.LinearTiles.of(n_size, max(experts, 1), dtype)
        for rows in (1, 256):
            blocks = {"block_m": tiles.block_m(rows), "block_n": tiles.block_n, "block_k": tiles.block_k}
            stages = tiles.stages(blocks["block_m"])
            compiled = compile_for_hopper(kernels._linear, types, matrix | blocks, tiles.num_warps, stages)
            check_instructions(compiled, activations)

    tiles = kernels.WeightedTiles.of(262144, 2816, dtype)
    types = packed | {"p": f"*{activations}", "partial": "*fp32", "m_size": "i32", "v_size": "i32", "v_per_slot": "i32"}
    blocks = {"block_m": tiles.block_m, "block_v": tiles.block_v, "block_h": tiles.block_h, "h_size": 2816}
    compiled = compile_for_hopper(kernels._weighted_rows, types, form | blocks, tiles.num_warps, tiles.num_stages)
    check_instructions(compiled, activations)
    types = {"partial": "*fp32", "y": f"*{activations}", "size": "i32", "slots": "i32"}
    compile_for_hopper(kernels._added, types, {"block": 1024})

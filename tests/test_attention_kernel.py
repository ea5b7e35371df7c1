"""The attention kernels: correct in Triton's interpreter (and on CUDA if available), and compiled without spills.

``pytest tests/test_attention_kernel.py -k compile -s`` prints registers, spills and shared memory.
"""

from pathlib import Path

import pytest

from support.compiling import check_instructions, compile_for, usage
from support.interpreting import interpreted_and_on_cuda, needs_triton, run_checks

pytestmark = needs_triton


@interpreted_and_on_cuda
def test_attention_kernels_are_right(interpret: bool) -> None:
    run_checks("attention", interpret=interpret)


@pytest.mark.parametrize("size", [256, 512])
@pytest.mark.parametrize(("capability", "shared"), [(90, 227 * 1024), (89, 99 * 1024), (120, 99 * 1024)])
def test_attention_kernels_compile(
    capability: int, shared: int, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from mlx_diffgemma.backends.torch.kernels import attention as kernels

    tiles = kernels.Tiles.of(size, hopper=capability == 90)
    strides = [f"{each}_{stride}" for each in ("query", "key", "value") for stride in ("batch", "head", "row")]
    parts = dict.fromkeys(("partial", "peaks", "sums"), "*fp32") | {"seen": "*i32", "count": "i32"}
    types = parts | dict.fromkeys(("queries", "keys", "values"), "*bf16") | dict.fromkeys(strides, "i32")
    heads = {256: 8, 512: 2}[size]
    form = {"shared": heads, "group": 16 // heads, "size": size, "splits": kernels.SPLITS, "block_n": tiles.block_n}
    blocks = {"columns": tiles.columns, "block_m": tiles.block_m, "block_d": tiles.block_d}
    attend = compile_for(
        capability, kernels._attend, types, form | blocks, tiles.num_warps, tiles.num_stages, shared, aligned=strides
    )
    if capability == 90:
        check_instructions(attend, "bf16")
    blocks = {"block_m": kernels.COMBINED}
    combine = compile_for(capability, kernels._combine, parts | {"mixed": "*bf16"}, form | blocks, 4, 3, shared)
    for name, compiled in (("attend", attend), ("combine", combine)):
        registers, stack = usage(compiled)
        print(
            f"sm_{capability} {name:7} size {size}: {registers} registers, {stack} B spilled, {compiled.metadata.shared} B shared"
        )
        assert stack <= 16, "Triton 3.3 spills up to 16 bytes in some; 3.6 and 3.9 spill none"

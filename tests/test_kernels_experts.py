"""The experts' Triton kernels: right in Triton's interpreter (and on CUDA if available), and compiled for three kinds of GPU."""

from pathlib import Path

import pytest
import torch

from support.compiling import recorded, tensor_core_products
from support.interpreting import interpreted_and_on_cuda, needs_triton, run_checks

pytestmark = needs_triton


@interpreted_and_on_cuda
def test_kernels_are_right(interpret: bool) -> None:
    run_checks("experts", interpret=interpret)


@pytest.mark.parametrize(("capability", "tokens"), [((9, 0), 1), ((9, 0), 256), ((9, 0), 2048), ((8, 9), 256), ((12, 0), 256)])
def test_kernels_compile(capability: tuple[int, int], tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of a layer of the real size compile, with one instruction for any number of rows.

    Weights go from registers to tensor cores: shared memory holds no more than prefetched words and rows.
    """
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from mlx_diffgemma.backends.torch.kernels import experts

    monkeypatch.setattr(experts, "_capability", lambda device: capability)
    hidden, inner, count, top_k = 2816, 704, 128, 8

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def packed(rows: int, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        groups = empty(count, rows, size // 64)
        return empty(count, rows, size // 8, dtype=torch.int32), groups, groups

    def layer() -> None:
        weights, chosen = experts.routed(empty(tokens, count), empty(count), top_k)
        experts.mixed(empty(tokens, hidden), weights, chosen, packed(2 * inner, hidden), packed(hidden, inner))

    launches = {launch.kernel.__name__: launch for launch in recorded(layer)}
    assert list(launches) == ["_route", "_prepare", "_gate_up", "_down", "_sum"]
    for name, launch in launches.items():
        compiled = launch.compiled(10 * capability[0] + capability[1])
        assert compiled.asm["cubin"], name
        assert launch.options["enable_fp_fusion"]
        if name in ("_gate_up", "_down"):
            assert tensor_core_products(compiled) == {"wgmma.mma_async" if capability[0] == 9 else "mma.sync"}
            stage = 128 * (64 + 2 * launch.arguments["block_m"])  # 128 rows of 64 bytes of words, and bfloat16 x
            print(f"{name}: {compiled.metadata.shared} bytes of shared memory, {stage} a stage")
            assert compiled.metadata.shared <= launch.options["num_stages"] * stage

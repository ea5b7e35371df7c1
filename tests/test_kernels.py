"""The Triton kernels: right in Triton's interpreter (and on CUDA where it is), and accepted by the compiler for a Hopper GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mlx_diffgemma.checkpoint import Quantization
from support.packed import identifier

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.parametrize("interpret", [True, False], ids=["interpreter", "cuda"])
def test_kernels_are_right(interpret: bool) -> None:
    if not interpret and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    # Triton looks at this variable while it is imported, so each way needs a process of its own.
    environment = os.environ | {"TRITON_INTERPRET": "1" if interpret else "0"}
    checks = Path(__file__).parent / "support" / "kernels_checks.py"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(checks)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    print(result.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("activations", ["bf16", "fp32"])
@pytest.mark.parametrize(
    "quantization",
    [Quantization(64, 4), Quantization(64, 6), Quantization(32, 8, "mxfp8"), Quantization(16, 4, "nvfp4")],
    ids=identifier,
)
def test_kernels_compile_for_hopper(
    quantization: Quantization, activations: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter lets pass what the compiler refuses, such as a variable of two types; compiling needs no GPU."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mlx_diffgemma.backends.torch import kernels

    affine = quantization.mode == "affine"
    units = {4: "*i32", 8: "*i64"}.get(quantization.bits, "*u8")
    scales = "*bf16" if affine else "*u8"
    packed = {"weight": units, "scales": scales} | ({"biases": scales} if affine else {})
    form = {"bits": quantization.bits, "group": quantization.group_size, "mode": quantization.mode}
    rows = {"x": f"*{activations}", "ends": "*i32", "y": f"*{activations}", "m_size": "i32", "n_size": "i32"}
    blocks = {"block_m": 16, "block_n": 64, "block_k": 128, "k_size": 704, "experts": 128, "experts_block": 128}
    sums = {"p": f"*{activations}", "partial": "*fp32", "m_size": "i32", "v_size": "i32", "v_per_program": "i32"}
    tiles = {"block_m": 16, "block_v": 32, "block_h": 128, "h_size": 704}
    for kernel, types, constants in ((kernels._linear, rows, blocks), (kernels._weighted_rows, sums, tiles)):
        variables = types | packed
        fixed = constants | form | ({} if affine else {"biases": None})
        source = ASTSource(
            kernel,
            signature={name: variables.get(name, "constexpr") for name in kernel.arg_names},
            constexprs={(kernel.arg_names.index(name),): value for name, value in fixed.items()},
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": True})
        assert compiled.asm["cubin"], kernel
        # Half of what one multiprocessor has, so that two programs share it.
        assert compiled.metadata.shared <= 113 * 1024, f"{compiled.metadata.shared} bytes of shared memory"

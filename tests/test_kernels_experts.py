"""The experts' Triton kernels: right in Triton's interpreter (and on CUDA if available), and compiled for three kinds of GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.parametrize("interpret", [True, False], ids=["interpreter", "cuda"])
def test_kernels_are_right(interpret: bool) -> None:
    if not interpret and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    # Triton reads this variable when it is imported, so each value needs a separate process.
    environment = os.environ | {"TRITON_INTERPRET": "1" if interpret else "0"}
    checks = Path(__file__).parent / "support" / "experts_checks.py"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(checks)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    print(result.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize(("capability", "tokens"), [((9, 0), 1), ((9, 0), 256), ((9, 0), 2048), ((8, 9), 256), ((12, 0), 256)])
def test_kernels_compile(capability: tuple[int, int], tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of a layer of the real size compile, with one instruction for any number of rows.

    Weights go from registers to tensor cores: shared memory holds no more than prefetched words and rows.
    """
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mlx_diffgemma.backends.torch.kernels import experts

    prepare, gate_up, down, add = experts.launches(tokens, 2816, 704, 128, 8, capability)
    for launch in (experts.routing(tokens, 128, 8), prepare, gate_up, down, add):
        names = launch.kernel.arg_names
        aligned = [name for name, kind in launch.signature.items() if kind[0] == "*" and name not in experts.UNALIGNED]
        source = ASTSource(
            launch.kernel,
            signature={name: launch.signature.get(name, "constexpr") for name in names},
            constexprs={(names.index(name),): value for name, value in launch.constants.items()},
            attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
        )
        target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
        compiled = triton.compile(source, target=target, options=launch.options | {"enable_fp_fusion": True})
        assert compiled.asm["cubin"], launch.kernel
        if launch in (gate_up, down):
            found = {name for name in ("wgmma.mma_async", "mma.sync") if name in compiled.asm["ptx"]}
            assert found == {"wgmma.mma_async" if capability[0] == 9 else "mma.sync"}
            stage = 128 * (64 + 2 * launch.constants["block_m"])  # 128 rows of 64 bytes of words, and bfloat16 x
            print(f"{launch.kernel.__name__}: {compiled.metadata.shared} bytes of shared memory, {stage} a stage")
            assert compiled.metadata.shared <= launch.options["num_stages"] * stage

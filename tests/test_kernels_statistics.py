"""The statistics of a denoising step in PyTorch: the Triton kernels in the interpreter (and on CUDA if available), compiled
without spills, and the operations that stand for them elsewhere. The self-conditioning is computed only when a step needs it.

``pytest tests/test_kernels_statistics.py -k compile -s`` prints registers, spills and shared memory.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlx_diffgemma import load
from mlx_diffgemma.backends.torch import statistics, tiling
from mlx_diffgemma.backends.torch.statistics import eager
from mlx_diffgemma.noise import bits
from support.checkpoints import make_chat_checkpoint
from support.comparing import assert_close
from support.compiling import compile_for, usage
from support.interpreting import interpreted_and_on_cuda, needs_triton, run_checks


@needs_triton
@interpreted_and_on_cuda
def test_statistics_kernels_are_right(interpret: bool) -> None:
    run_checks("statistics", interpret=interpret)


@needs_triton
@pytest.mark.parametrize(
    ("v_size", "dtype"), [(262_144, torch.bfloat16), (262_144, torch.float32), (70_001, torch.bfloat16), (1_000, torch.bfloat16)]
)
def test_statistics_kernels_compile_without_spills(
    v_size: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton

    from mlx_diffgemma.backends.torch.kernels import statistics as kernels

    types = {name: "*fp32" for name in ("temperature", "sums", "entropy", "most", "total")}
    types |= {"noise": "*i32", "places": "*i32", "argmax": "*i64", "sampled": "*i64"}
    types |= {"v_size": "i32", "slots": "i32", "cap": "fp32", "inverse_cap": "fp32"}
    types |= dict.fromkeys(("raw", "out"), "*bf16" if dtype == torch.bfloat16 else "*fp32")
    block = kernels.slot_size(v_size)
    slots = triton.cdiv(v_size, block)
    for kernel, form, warps in (
        (kernels._slots, {"block": block, "draws": True}, kernels._warps(block)),
        (kernels._slots, {"block": block, "draws": False}, kernels._warps(block)),
        (kernels._combined, {"slots_block": triton.next_power_of_2(slots), "dtype": kernels._TYPES[dtype], "draws": True}, 1),
        (kernels._probabilities, {"block": block}, kernels._warps(block)),
    ):
        # As at a launch: 1 and None are constants.
        constants = form | ({"slots": 1} if slots == 1 else {}) | ({} if form.get("draws", True) else {"noise": None})
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        mine = {name: types[name] for name in kernel.arg_names if name in types and name not in constants}
        aligned = [] if v_size % 16 else ["v_size", "slots"]
        compiled = compile_for(90, kernel, mine, constants, warps, 3, shared=1024, aligned=aligned)
        registers, spilled = usage(compiled)
        print(
            f"sm_90 {kernel.__name__:14} {str(dtype)[6:]:8} V {v_size}: {registers} registers, {spilled} B spilled, "
            f"{compiled.metadata.shared} B shared, {warps} warps"
        )
        assert spilled == 0
        assert registers <= 128, "two programs of eight warps fit on a multiprocessor"
        assert "lg2.approx" not in compiled.asm["ptx"], "its error near 1 is as large as the logarithms that the noise needs"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("draws", [True, False], ids=["noise", "no noise"])
def test_plain_operations_agree_with_those_of_the_cpu(draws: bool, dtype: torch.dtype) -> None:
    """They are the oracle of the kernels, and stand for them on CUDA without Triton. A CPU goes over tiles."""
    rows, v_size, cap = 21, 20_011, 30.0
    raw = (torch.from_numpy(np.random.default_rng(1).standard_normal((rows, v_size), np.float32)) * 8).to(dtype)
    noise = torch.from_numpy(bits(5, np.arange(rows, dtype=np.uint32)).view(np.int32)) if draws else None
    temperature = torch.linspace(0.4, 0.9, rows)
    plain = eager(raw, noise, cap, temperature)
    argmax, sampled, entropy, probabilities = tiling.statistics(
        raw.float().clone(), noise, dtype, cap=cap, temperature=temperature
    )
    assert torch.equal(plain.argmax, argmax)
    assert torch.equal(plain.sampled, sampled)
    assert (argmax != sampled).any() == draws
    assert_close(plain.entropy, entropy, 1e-5, "entropy in nats")
    assert_close(plain.probabilities().float(), probabilities.float(), 1e-6, "probabilities")


def test_without_triton(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A device other than a CPU takes the plain operations then, and says so. Torch's meta device computes shapes only."""
    monkeypatch.setitem(sys.modules, "mlx_diffgemma.backends.torch.kernels.statistics", None)
    monkeypatch.setattr(statistics, "_kernels", statistics._kernels.__wrapped__)
    raw = torch.empty(5, 1_000, dtype=torch.bfloat16, device="meta")
    found = statistics.statistics(raw, raw[:, 0].int(), 30.0, raw[:, 0].float())
    probabilities = found.probabilities()
    assert (probabilities.shape, probabilities.dtype) == (raw.shape, raw.dtype)
    assert found.argmax.shape == found.sampled.shape == found.entropy.shape == (5,)
    assert "pip install triton" in caplog.text


@pytest.mark.parametrize("greedy", [True, False], ids=["greedy", "sampled"])
def test_the_last_step_of_a_canvas_computes_no_self_conditioning(
    greedy: bool, tmp_path: Path, backend_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(make_chat_checkpoint(tmp_path), backend=backend_name)
    inner: Any = model.backend
    compute, computed = inner.model.soft_embeddings, []

    def counted(probabilities: Any) -> Any:
        computed.append(probabilities.shape[0])
        return compute(probabilities)

    monkeypatch.setattr(inner.model, "soft_embeddings", counted)
    steps = model.generate("How are you today", seed=3, greedy=greedy, max_new_tokens=40).statistics.denoising_steps
    print(steps, computed)
    assert len(steps) > 1, "several canvases"
    assert computed == [model.config.canvas_length] * sum(each - 1 for each in steps)

"""Checks of Triton kernels, each run in a process of its own: in Triton's interpreter, or on CUDA."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
interpreted_and_on_cuda = pytest.mark.parametrize("interpret", [True, False], ids=["interpreter", "cuda"])


def run_checks(name: str, *, interpret: bool) -> None:
    """Run the tests in ``NAME_checks.py``, which is beside this file, in Triton's interpreter or on CUDA."""
    if not interpret and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    # Triton reads this variable when it is imported, so each value needs a separate process.
    environment = os.environ | {"TRITON_INTERPRET": "1" if interpret else "0"}
    checks = Path(__file__).with_name(f"{name}_checks.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(checks)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    print(result.stdout.strip().splitlines()[-1])

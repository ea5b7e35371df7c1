"""Triton kernels for CUDA. This package is imported without Triton; its modules are not."""

from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor


def load(name: str) -> ModuleType:
    """The module ``name`` of this package. Raises ImportError without Triton."""
    return import_module(f"{__name__}.{name}")


@cache
def find(name: str) -> ModuleType | None:
    """The module ``name`` of this package, or None without Triton."""
    try:
        return load(name)
    except ImportError:
        return None


def on_tensor_cores(x: Tensor) -> bool:
    """Whether x is in bfloat16 on a GPU that multiplies it: Ampere or newer."""
    return x.is_cuda and x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device) >= (8, 0)

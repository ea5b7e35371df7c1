"""The self-conditioning that a backend hands on, as numbers."""

from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray


def numbers_of(signal: Any) -> NDArray[np.float64]:
    """Self-conditioning [L, H]. Both backends compute it when it is needed, the reference at once."""
    return np.array((signal.array() if hasattr(signal, "array") else signal).tolist())


def times(signal: Any, factor: float) -> Any:
    """Self-conditioning times a number."""
    if not hasattr(signal, "array"):
        return signal * factor
    step = import_module(type(signal).__module__)  # of its backend
    return step.Signal(step.SoftEmbeddings(lambda: signal.array() * factor), slice(0, len(signal)))

"""The self-conditioning that a backend hands on, as numbers."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_diffgemma.backends.stream import Signal, SoftEmbeddings


def numbers_of(signal: Any) -> NDArray[np.float64]:
    """Self-conditioning [L, H]. Both backends compute it when it is needed, the reference at once."""
    return np.array((signal.array() if hasattr(signal, "array") else signal).tolist())


def times(signal: Any, factor: float) -> Any:
    """Self-conditioning times a number."""
    if not hasattr(signal, "array"):
        return signal * factor
    return Signal(SoftEmbeddings(lambda: signal.array() * factor), slice(0, len(signal)))

"""The self-conditioning that a backend hands on, as numbers."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def numbers_of(signal: Any) -> NDArray[np.float64]:
    """Self-conditioning [L, H]. MLX's is computed when it is needed."""
    return np.array((signal.array() if hasattr(signal, "array") else signal).tolist())


def times(signal: Any, factor: float) -> Any:
    """Self-conditioning times a number."""
    if not hasattr(signal, "array"):
        return signal * factor
    from mlx_diffgemma.backends.mlx.step import Signal, SoftEmbeddings

    return Signal(SoftEmbeddings(lambda: signal.array() * factor), slice(0, len(signal)))

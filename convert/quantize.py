"""Packs the rows of one tensor.

``mx.quantize`` does the packing, so the words equal MLX's own. Its groups lie within rows. A tensor can therefore be packed some
rows at a time with the same result, and this bounds memory.
"""

from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_diffgemma.checkpoint import Checkpoint, Quantization
from mlx_diffgemma.errors import BackendError

#: Source bytes to pack at a time. On a CPU, mx.quantize briefly takes up to 33 times as much memory (nvfp4), and is fastest with
#: a few megabytes.
PIECE_BYTES = 4 << 20


def mlx_version() -> str:
    """Version of mlx. Raises BackendError if mlx cannot be imported."""
    try:
        import mlx.core  # noqa: F401
    except ImportError as broken:
        reason = str(broken).partition("\n")[0]
        raise BackendError(
            f'mlx packs the weights, but cannot be imported ({reason}); try: pip install "mlx-diffgemma[cpu]"'
        ) from broken
    return version("mlx")


def check_shapes(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless the source has exactly the tensors that its config.json asks for. Reads no weights.

    Raises BackendError if mlx cannot be imported.
    """
    mlx_version()
    from mlx.utils import tree_flatten

    from mlx_diffgemma.backends.mlx.model import TextModel
    from mlx_diffgemma.backends.mlx.vision import VisionModel

    config = checkpoint.config
    parts: list[Any] = [TextModel(config), *([VisionModel(config)] if config.vision else [])]  # lazy, so this makes no weights
    checkpoint.check({name: array.shape for part in parts for name, array in dict(tree_flatten(part.parameters())).items()})


def pack(rows: NDArray[Any], dtype: str, quantization: Quantization | None) -> list[NDArray[Any]]:
    """Pack rows [R, N]. If ``quantization`` is None, round them to BF16.

    Args:
        rows: raw words, uint16 or uint32, because NumPy has no bfloat16.
        dtype: number type of the words: BF16, F16 or F32. They are rounded to BF16 first, which is then the dtype of the scales.

    Returns:
        uint32 words [R, N * bits / 32], scales [R, N / group_size] (BF16 as uint16, or uint8) and, if affine, biases like the
        scales. If ``quantization`` is None, only BF16 as uint16 [R, N].
    """
    if quantization is None and dtype == "BF16":
        return [rows]
    import mlx.core as mx

    weights = mx.array(rows).view({"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}[dtype]).astype(mx.bfloat16)
    if quantization is None:
        return [np.array(weights.view(mx.uint16))]
    outputs = mx.quantize(weights, quantization.group_size, quantization.bits, mode=quantization.mode)
    return [np.array(output.view(mx.uint16) if output.dtype == mx.bfloat16 else output) for output in outputs]

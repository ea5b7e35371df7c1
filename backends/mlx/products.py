"""Products with packed weights, using MLX's own operations. Results have the dtype of the activations."""

from typing import Any

import mlx.core as mx

from mlx_diffgemma.checkpoint import Quantization


def linear(x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array | None, quantization: Quantization) -> mx.array:
    """x [.., in] times the transpose of a packed matrix [out, in * bits / 32] -> [.., out]."""
    y = mx.quantized_matmul(_summable(x), weight, scales, biases, transpose=True, **_format(quantization))
    return y.astype(x.dtype)


def weighted_rows(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array | None, quantization: Quantization
) -> mx.array:
    """x [.., out] times a packed matrix [out, in * bits / 32] -> [.., in]."""
    y = mx.quantized_matmul(_summable(x), weight, scales, biases, transpose=False, **_format(quantization))
    return y.astype(x.dtype)


def expert_linear(
    x: mx.array, experts: mx.array, weight: mx.array, scales: mx.array, biases: mx.array | None, quantization: Quantization
) -> mx.array:
    """Row m of x [M, 1, in] times the transpose of the matrix of ``experts[m]`` -> [M, 1, out]. Rows are sorted by expert."""
    y = mx.gather_qmm(_summable(x), weight, scales, biases, rhs_indices=experts, sorted_indices=True, **_format(quantization))
    return y.astype(x.dtype)


def rows(index: mx.array, weight: mx.array, scales: mx.array, biases: mx.array | None, quantization: Quantization) -> mx.array:
    """The weights at ``index`` of the first dimension, float32."""
    if biases is None:
        return mx.dequantize(weight[index], scales[index], dtype=mx.float32, **_format(quantization))
    groups = scales[index].astype(mx.float32), biases[index].astype(mx.float32)
    return mx.dequantize(weight[index], *groups, **_format(quantization))


def _format(quantization: Quantization) -> dict[str, Any]:
    return {"group_size": quantization.group_size, "bits": quantization.bits, "mode": quantization.mode}


def _summable(x: mx.array) -> mx.array:
    """Activations in a type that is precise enough for sums: MLX sums in the operands' type on a CPU, in float32 on a GPU."""
    return x.astype(mx.float32) if mx.default_device() == mx.Device(mx.DeviceType.cpu) else x

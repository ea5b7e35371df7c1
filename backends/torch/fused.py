"""What lies between the products of a layer: norms, rotations, gates and residuals.

Each function is written with PyTorch's operations, which run everywhere and carry gradients. On CUDA in bfloat16 a Triton kernel
of kernels/norms.py takes their place, which reads and writes each value once. Both round at the same places.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from mlx_diffgemma.backends.torch import kernels


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x [.., H] / rms(x), times ``weight`` [H] if there is one; in float32."""
    if ours := _kernels(x):
        y: Tensor = ours.rms_norm(x, weight, eps)
        return y
    return F.rms_norm(x.float(), x.shape[-1:], None if weight is None else weight.float(), eps).to(x.dtype)


def heads(x: Tensor, weight: Tensor | None, rope: tuple[Tensor, Tensor] | None, eps: float) -> Tensor:
    """The norm of each head of x [T, heads, D], rotated by cosines and sines [T, 1, D] if there are any."""
    if ours := _kernels(x):
        y: Tensor = ours.heads(x, weight, rope, eps)
        return y
    x = rms_norm(x, weight, eps)
    return x if rope is None else rotate(x, *rope)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [T, heads, D]; the pairs are (i, i + D/2)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up, with the tanh approximation of gelu."""
    if ours := _kernels(gate):
        y: Tensor = ours.geglu(gate, up)
        return y
    return F.gelu(gate, approximate="tanh") * up


def after_attention(
    x: Tensor, attended: Tensor, weights: Sequence[Tensor], scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [T, H] plus the norm of ``attended``, and the inputs of the MLP, of the experts and of the router, each [T, H].

    ``weights`` are those of that norm, and of the MLP's and the experts' norms of the sum. The router's input is the sum's norm
    times ``scale`` / sqrt(H).
    """
    if ours := _kernels(x):
        results: tuple[Tensor, Tensor, Tensor, Tensor] = ours.after_attention(x, attended, weights, scale, eps)
        return results
    own, dense, sparse = weights
    x = x + rms_norm(attended, own, eps)
    return x, rms_norm(x, dense, eps), rms_norm(x, sparse, eps), rms_norm(x, None, eps) * scale * x.shape[-1] ** -0.5


def after_experts(x: Tensor, dense: Tensor, sparse: Tensor, weights: Sequence[Tensor], scalar: Tensor, eps: float) -> Tensor:
    """(x + norm(norm(dense) + norm(sparse))) * scalar, [T, H]; ``weights`` of the norms of dense, of sparse and of their sum."""
    if ours := _kernels(x):
        y: Tensor = ours.after_experts(x, dense, sparse, weights, scalar, eps)
        return y
    one, other, both = weights
    return (x + rms_norm(rms_norm(dense, one, eps) + rms_norm(sparse, other, eps), both, eps)) * scalar


def routed(scores: Tensor, scale: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The ``top_k`` experts with the highest scores [T, E], and their weights: float32 and int64 [T, K], the highest first.

    Weights are the softmax over all experts, divided by the sum over those chosen, times each expert's ``scale`` [E].
    """
    if ours := _kernels(scores, "experts"):
        results: tuple[Tensor, Tensor] = ours.routed(scores, scale, top_k)
        return results
    weights, experts = scores.softmax(dim=-1, dtype=torch.float32).topk(top_k)
    return weights / weights.sum(dim=-1, keepdim=True) * scale[experts], experts


def _kernels(x: Tensor, name: str = "norms") -> ModuleType | None:
    """The module with the kernels for x, or None where PyTorch's operations are to be used."""
    return kernels.find(name) if x.is_cuda and x.dtype == torch.bfloat16 and not torch.is_grad_enabled() else None

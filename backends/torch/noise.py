"""The noise of :mod:`mlx_diffgemma.noise`, computed on the device."""

import torch
from torch import Tensor


def words(bits: Tensor, count: int) -> Tensor:
    """One word for each of ``count`` tokens at each position: int32 [T, count] from the positions' bits, int32 [T].

    PyTorch has no uint32 arithmetic, so int32 stands for 32-bit words, and products wrap around.
    """
    return mix(torch.arange(count, dtype=torch.int32, device=bits.device) ^ bits[:, None])


def mix(x: Tensor) -> Tensor:
    """:func:`mlx_diffgemma.noise.mix`."""
    x = (x ^ down(x, 16)) * 0x7FEB352D
    x = (x ^ down(x, 15)) * (0x846CA68B - 2**32)
    return x ^ down(x, 16)


def gumbel(x: Tensor) -> Tensor:
    """Gumbel noise float32 of int32 words, as :func:`mlx_diffgemma.noise.gumbel` defines it."""
    # The two halves are exact; only their sum is rounded. This gives the float32 of an unsigned word.
    unsigned = down(x, 16).float() * 65536.0 + (x & 0xFFFF).float()
    uniform = unsigned * 2.0**-32 + 2.0**-33
    return -torch.log(-torch.log1p(-uniform))


def down(x: Tensor, places: int) -> Tensor:
    """Shift right without copying the sign."""
    return (x >> places) & ((1 << (32 - places)) - 1)

"""The noise of :mod:`mlx_diffgemma.noise`, computed on the device."""

import mlx.core as mx


def words(bits: mx.array, count: int) -> mx.array:
    """One word for each of ``count`` tokens at each position: uint32 [T, count] from the positions' bits, uint32 [T]."""
    return mix(mx.arange(count, dtype=mx.uint32) ^ bits[:, None])


def mix(x: mx.array) -> mx.array:
    """:func:`mlx_diffgemma.noise.mix`."""
    x = (x ^ (x >> 16)) * mx.array(0x7FEB352D, dtype=mx.uint32)
    x = (x ^ (x >> 15)) * mx.array(0x846CA68B, dtype=mx.uint32)
    return x ^ (x >> 16)


def gumbel(x: mx.array) -> mx.array:
    """Gumbel noise float32 of uint32 words, as :func:`mlx_diffgemma.noise.gumbel` defines it."""
    uniform = x.astype(mx.float32) * 2.0**-32 + 2.0**-33
    return -mx.log(-mx.log1p(-uniform))

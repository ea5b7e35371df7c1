"""Counter-based noise: the only source of randomness.

Every random number is a pure function of (seed, block, step, position[, token]), so that one seed gives the same tokens on
every backend, in every batch and in any order of evaluation. All arithmetic is on 32-bit unsigned words that wrap around.

Three streams:

1. canvas tokens: the first canvas (step 0) and the renoising after the s-th denoising step (step s >= 1);
2. sampling: Gumbel noise over the vocabulary in the s-th denoising step (s from 1), made by the backend from
   :func:`sampling_key`;
3. causal sampling: Gumbel noise over the vocabulary for the n-th new token (n from 0), under :func:`causal_key`.

``mix`` is the 32-bit finalizer "lowbias32" of C. Wellons' hash prospector (https://nullprogram.com/blog/2018/07/31/).
"""

import numpy as np
from numpy.typing import NDArray

CANVAS_STREAM, SAMPLING_STREAM, CAUSAL_STREAM = 1, 2, 3

#: Largest value of the Gumbel noise, -log(-log1p(-u)) at the smallest u, 2^-33, rounded up. A token whose logit lies further
#: than this below the best perturbed logit cannot be drawn.
MAX_GUMBEL = 22.9

_GOLDEN = 0x9E3779B9
_MASK = 0xFFFFFFFF


def mix(words: NDArray[np.uint32] | np.uint32) -> NDArray[np.uint32]:
    """Scramble each 32-bit word, bijectively."""
    x = np.asarray(words, np.uint32)
    with np.errstate(over="ignore"):  # wrapping is meant; NumPy warns of it for scalars
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
        x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def fold(*words: int) -> int:
    """Fold 32-bit words, in order, into one."""
    folded = 0
    for word in words:
        folded = int(mix(np.uint32(((folded + _GOLDEN) & _MASK) ^ word)))
    return folded


def key(seed: int, stream: int, block: int, step: int) -> int:
    """The 32-bit key of one (stream, block, step) under a 64-bit ``seed``."""
    return fold(seed & _MASK, seed >> 32, stream, block, step)


def bits(keys: NDArray[np.uint32] | int, positions: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """32 random bits for every position; ``keys`` and ``positions`` broadcast against each other."""
    keys = np.asarray(keys, np.uint32)
    with np.errstate(over="ignore"):
        return mix(mix(np.asarray(positions, np.uint32) ^ keys) + keys)


def canvas_tokens(seed: int, block: int, step: int, length: int, vocab_size: int) -> NDArray[np.int32]:
    """Uniform token ids [length]: the first canvas (step 0), or what renoises after step ``step``."""
    random = _canvas_bits(seed, block, step, length)
    return ((random.astype(np.uint64) * np.uint64(vocab_size)) >> np.uint64(32)).astype(np.int32)


def replaced(seed: int, block: int, length: int, strength: float) -> NDArray[np.bool_]:
    """Which positions [length] of a draft give way to the first canvas's random token: each with probability ``strength``.

    Those where mix(h) < strength * 2^32, h being the bits that the random token is made of; so a position that is replaced at
    one strength is so at every higher one.
    """
    words = mix(_canvas_bits(seed, block, 0, length))
    chosen: NDArray[np.bool_] = words < strength * 2.0**32
    return chosen


def _canvas_bits(seed: int, block: int, step: int, length: int) -> NDArray[np.uint32]:
    return bits(key(seed, CANVAS_STREAM, block, step), np.arange(length, dtype=np.uint32))


def sampling_key(seed: int, block: int, step: int) -> int:
    """Key of the Gumbel noise in denoising step ``step`` (from 1): the ``noise_key`` of a backend's row."""
    return key(seed, SAMPLING_STREAM, block, step)


def causal_key(seed: int, index: int) -> int:
    """Key of the Gumbel noise for new token ``index`` (from 0) of the causal mode; its position is 0."""
    return key(seed, CAUSAL_STREAM, index, 0)


def gumbel(keys: NDArray[np.uint32], positions: NDArray[np.uint32], tokens: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Standard Gumbel noise in float32 for every (key, position, token); the three broadcast against each other.

    h = mix(token ^ bits(key, position)), u = float32(h) * 2^-32 + 2^-33, g = -log(-log1p(-u)). Where u rounds to 1 the noise is
    -inf, and that token is not drawn. This is the definition; the backends compute it on their device.
    """
    words = mix(np.asarray(tokens, np.uint32) ^ bits(keys, positions))
    uniform = words.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)
    with np.errstate(divide="ignore"):
        noise: NDArray[np.float32] = -np.log(-np.log1p(-uniform))
    return noise

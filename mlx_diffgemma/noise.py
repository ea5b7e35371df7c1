"""Counter-based noise: the only source of randomness in the package.

Every random number is a pure function of (seed, block, step, position[, token]). One seed therefore gives the same noise on every
backend, in every batch and in any order of evaluation. All arithmetic uses 32-bit unsigned words that wrap around.

There are three streams:

1. canvas tokens: the first canvas (step 0), and the renoising after denoising step s (s >= 1);
2. sampling: Gumbel noise over the vocabulary in denoising step s (s >= 1). The backend makes it from :func:`sampling_key`;
3. causal sampling: Gumbel noise over the vocabulary for new token n (n from 0), with :func:`causal_key`.

``mix`` is the 32-bit finalizer "lowbias32" of C. Wellons' hash prospector (https://nullprogram.com/blog/2018/07/31/).
"""

import numpy as np
from numpy.typing import NDArray

CANVAS_STREAM, SAMPLING_STREAM, CAUSAL_STREAM = 1, 2, 3

#: The largest value of the Gumbel noise, -log(-log1p(-u)) at the smallest u, 2^-33, rounded up. A token cannot be drawn if its
#: logit is further than this below the best perturbed logit.
MAX_GUMBEL = 22.9

_GOLDEN = 0x9E3779B9
_MASK = 0xFFFFFFFF


def mix(words: NDArray[np.uint32] | np.uint32) -> NDArray[np.uint32]:
    """Scramble each 32-bit word, bijectively."""
    x = np.asarray(words, np.uint32)
    with np.errstate(over="ignore"):  # the words must wrap around, and NumPy warns about that for scalars
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
        x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def fold(*words: int) -> int:
    """Fold several 32-bit words into one. The order matters."""
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
    """Uniform token ids [length]: the first canvas (step 0), or the new tokens of the renoising after step ``step``."""
    random = _canvas_bits(seed, block, step, length)
    return ((random.astype(np.uint64) * np.uint64(vocab_size)) >> np.uint64(32)).astype(np.int32)


def replaced(seed: int, block: int, length: int, strength: float) -> NDArray[np.bool_]:
    """Which positions [length] of a draft are replaced by the first canvas's random token: each with probability ``strength``.

    A position is replaced if mix(h) < strength * 2^32, where h are the bits that its random token is made of. A position that is
    replaced at one strength is therefore replaced at every higher strength too.
    """
    words = mix(_canvas_bits(seed, block, 0, length))
    chosen: NDArray[np.bool_] = words < strength * 2.0**32
    return chosen


def _canvas_bits(seed: int, block: int, step: int, length: int) -> NDArray[np.uint32]:
    return bits(key(seed, CANVAS_STREAM, block, step), np.arange(length, dtype=np.uint32))


def sampling_key(seed: int, block: int, step: int) -> int:
    """The key of the Gumbel noise in denoising step ``step`` (from 1). This is the ``noise_key`` of a backend's row."""
    return key(seed, SAMPLING_STREAM, block, step)


def causal_key(seed: int, index: int) -> int:
    """The key of the Gumbel noise for new token ``index`` (from 0) in the causal mode. The position is always 0."""
    return key(seed, CAUSAL_STREAM, index, 0)


def gumbel(keys: NDArray[np.uint32], positions: NDArray[np.uint32], tokens: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Standard Gumbel noise in float32 for every (key, position, token). The three arrays broadcast against each other.

    h = mix(token ^ bits(key, position)), u = float32(h) * 2^-32 + 2^-33, g = -log(-log1p(-u)). If u rounds to 1, the noise is
    -inf and the token is not drawn. This function is the definition; the backends compute the same noise on their device.
    """
    words = mix(np.asarray(tokens, np.uint32) ^ bits(keys, positions))
    uniform = words.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)
    with np.errstate(divide="ignore"):
        noise: NDArray[np.float32] = -np.log(-np.log1p(-uniform))
    return noise

"""The statistics of a denoising step on a CPU, computed in tiles that fit the processor's cache."""

import math

import torch
from torch import Tensor

from mlx_diffgemma.backends.torch.noise import gumbel

#: Elements of a tile of logits: 1 MiB of float32.
TILE = 2**18

#: Noise is computed only for tokens that can win: those whose logit is within NEAR of the best perturbed logit, and the few
#: others whose noise exceeds NEAR. Noise falls as the random word grows, and exceeds NEAR only if the word's upper bits are zero.
FAR_BITS = 21
NEAR = 1e-3 - math.log(-math.log1p(-(2.0 ** (FAR_BITS - 32))))


def statistics(
    raw: Tensor, noise: Tensor | None, dtype: torch.dtype, *, cap: float, temperature: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Argmax, sampled, entropy and probabilities, as :class:`mlx_diffgemma.backends.torch.statistics.Statistics` has them.

    Overwrites ``raw``, float32 [T, V]. The probabilities are [T, V] in ``dtype``, the weights' type.
    """
    tile = max(1, TILE // raw.shape[1])
    probabilities = raw if dtype == torch.float32 else torch.empty_like(raw, dtype=dtype)
    # New memory for every tile would cost more time than the computation.
    weights = torch.empty_like(raw[:tile])
    words, shifted = torch.empty(2, *weights.shape, dtype=torch.int32)
    tokens, factors = torch.arange(raw.shape[1], dtype=torch.int32), (cap / temperature)[:, None]
    parts = []
    for start in range(0, len(raw), tile):
        span = slice(start, start + tile)
        scores = raw[span].div_(cap).tanh_().mul_(factors[span])
        size = len(scores)
        best, argmax = scores.max(dim=-1)
        sampled = argmax
        if noise is not None:
            torch.bitwise_xor(noise[span, None], tokens, out=words[:size])
            sampled = _sample(scores, _mix(words[:size], shifted[:size]), shifted[:size], best, argmax)
        if dtype != torch.float32:
            probabilities[span] = scores.to(dtype).softmax(dim=-1, dtype=torch.float32).to(dtype)
        torch.exp(scores.sub_(best[:, None]), out=weights[:size])
        total = weights[:size].sum(dim=-1)
        entropy = total.log() - scores.mul_(weights[:size]).sum(dim=-1) / total
        if dtype == torch.float32:
            torch.div(weights[:size], total[:, None], out=scores)  # the probabilities take the logits' place
        parts.append((argmax, sampled, entropy))
    argmax, sampled, entropy = (torch.cat(part) for part in zip(*parts, strict=True))
    return argmax, sampled, entropy, probabilities


def _sample(scores: Tensor, words: Tensor, shifted: Tensor, best: Tensor, argmax: Tensor) -> Tensor:
    """argmax(scores + noise) of scores float32 [R, V] and the noise's words int32 [R, V].

    ``shifted`` is a work buffer of the same shape. ``best`` and ``argmax`` are the maxima of the scores and their places.
    """
    # The best perturbed logit is at least the perturbed logit of the likeliest token.
    least = best + gumbel(words.gather(1, argmax[:, None]))[:, 0]
    loud = torch.bitwise_right_shift(words, FAR_BITS, out=shifted) == 0
    row, token = loud.logical_or_(scores > (least - NEAR)[:, None]).nonzero(as_tuple=True)
    perturbed = scores[row, token] + gumbel(words[row, token])
    winner = torch.full_like(best, -torch.inf).scatter_reduce(0, row, perturbed, "amax")
    wins = perturbed == winner[row]
    return torch.full_like(argmax, scores.shape[1]).scatter_reduce(0, row[wins], token[wins], "amin")


def _mix(words: Tensor, shifted: Tensor) -> Tensor:
    """:func:`mlx_diffgemma.backends.torch.noise.mix` in place; ``shifted`` is a work buffer."""

    def fold_down(places: int) -> None:
        torch.bitwise_right_shift(words, places, out=shifted)
        words.bitwise_xor_(shifted.bitwise_and_((1 << (32 - places)) - 1))

    fold_down(16)
    words.mul_(0x7FEB352D)
    fold_down(15)
    words.mul_(0x846CA68B - 2**32)
    fold_down(16)
    return words

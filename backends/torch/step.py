"""The hot step: a canvas in, three small arrays and the next step's self-conditioning out; nothing large outlives it.

On a CPU the statistics go over the logits in tiles that fit its cache; on a GPU in one piece, without a word from the device
in between.
"""

import math

import torch
from torch import Tensor

from mlx_diffgemma.backends.torch.cache import Cache
from mlx_diffgemma.backends.torch.model import TextModel

#: Elements of a tile of logits on the CPU: 1 MiB of float32.
CPU_TILE = 2**18

#: A CPU makes noise only for tokens that can win: those within NEAR of the best perturbed logit, and of the others the few
#: whose noise exceeds NEAR. Noise falls as the random word grows, so these are the words below FAR_WORDS.
NEAR = 8.0
FAR_WORDS = math.ceil(-math.expm1(-math.exp(-NEAR)) * 2**32) + 1


def step(
    model: TextModel,
    canvas: Tensor,
    cache: Cache,
    *,
    temperature: float,
    noise: Tensor | None,
    soft_embeddings: Tensor | None,
    frozen: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One denoising step.

    Args:
        canvas: int64 [B, L].
        noise: int32 [B, L], the bits of :func:`mlx_diffgemma.noise.bits` at each position, or None to draw nothing.
        soft_embeddings: [B, L, H] from the previous step, or None.
        frozen: int64 [L], -1 where the model may write, or None.

    Returns:
        argmax, sampled (int64 [B, L]), entropy (float32 [B, L], nats), and the next step's soft embeddings [B, L, H].
    """
    hidden = model.denoise(canvas, cache, soft_embeddings)
    logits = model.head(hidden).div_(temperature)  # [B, L, V]
    argmax, sampled, entropy, probabilities = statistics(logits, noise, hidden.dtype)
    soft = model.soft_embeddings(probabilities)
    if frozen is not None:
        known, token = frozen >= 0, frozen.clamp(min=0)
        argmax, sampled = torch.where(known, token, argmax), torch.where(known, token, sampled)
        entropy = entropy.masked_fill(known, 0.0)
        soft = torch.where(known[:, None], model.embed(token), soft)
    return argmax, sampled, entropy, soft


def statistics(logits: Tensor, noise: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Argmax, sample, entropy and probabilities of tempered logits float32 [B, L, V], which are overwritten.

    The probabilities are the float32 softmax of the logits rounded to ``dtype``, and are of that type.
    """
    rows = logits.flatten(0, 1)
    tile = rows.shape[0] if rows.is_cuda else max(1, CPU_TILE // rows.shape[1])
    probabilities = rows if dtype == torch.float32 else torch.empty_like(rows, dtype=dtype)
    parts = []
    for start in range(0, rows.shape[0], tile):
        span = slice(start, start + tile)
        best, argmax = rows[span].max(dim=-1)
        sampled = argmax if noise is None else _sample(rows[span], noise.flatten()[span], best, argmax)
        if dtype != torch.float32:
            probabilities[span] = rows[span].to(dtype).softmax(dim=-1, dtype=torch.float32).to(dtype)
        shifted = rows[span].sub_(best[:, None])
        weights = shifted.exp()
        total = weights.sum(dim=-1)
        entropy = total.log() - shifted.mul_(weights).sum(dim=-1) / total
        if dtype == torch.float32:
            torch.div(weights, total[:, None], out=probabilities[span])
        parts.append((argmax, sampled, entropy))
    argmax, sampled, entropy = (torch.cat(part).view(logits.shape[:2]) for part in zip(*parts, strict=True))
    return argmax, sampled, entropy, probabilities.view(logits.shape)


def _sample(scores: Tensor, noise: Tensor, best: Tensor, argmax: Tensor) -> Tensor:
    """argmax(scores + Gumbel noise) of scores float32 [R, V] whose maxima are ``best`` at ``argmax``; noise int32 [R]."""
    tokens = torch.arange(scores.shape[1], dtype=torch.int32, device=scores.device)
    words = mix_(tokens ^ noise[:, None])
    if scores.is_cuda:
        return (gumbel(words) + scores).argmax(dim=-1)
    # The best perturbed logit is at least that of the likeliest token.
    least = best + gumbel(words.gather(1, argmax[:, None]))[:, 0]
    row, token = (((words >= 0) & (words < FAR_WORDS)) | (scores > (least - NEAR)[:, None])).nonzero(as_tuple=True)
    perturbed = scores[row, token] + gumbel(words[row, token])
    winner = torch.full_like(best, -torch.inf).scatter_reduce(0, row, perturbed, "amax")
    wins = perturbed == winner[row]
    return torch.full_like(argmax, scores.shape[1]).scatter_reduce(0, row[wins], token[wins], "amin")


def mix_(words: Tensor) -> Tensor:
    """:func:`mlx_diffgemma.noise.mix` in place, on int32 that stand for 32-bit words; their products wrap around."""
    shifted = torch.empty_like(words)

    def fold_down(places: int) -> None:
        torch.bitwise_right_shift(words, places, out=shifted)
        words.bitwise_xor_(shifted.bitwise_and_((1 << (32 - places)) - 1))  # the shift copies the sign; clear it

    fold_down(16)
    words.mul_(0x7FEB352D)
    fold_down(15)
    words.mul_(0x846CA68B - 2**32)
    fold_down(16)
    return words


def gumbel(words: Tensor) -> Tensor:
    """Gumbel noise float32 of int32 words, as :func:`mlx_diffgemma.noise.gumbel` defines it."""
    # Two exact halves and one rounding make the float32 of an unsigned word.
    unsigned = ((words >> 16) & 0xFFFF).float() * 65536.0 + (words & 0xFFFF).float()
    uniform = unsigned * 2.0**-32 + 2.0**-33
    return -torch.log(-torch.log1p(-uniform))

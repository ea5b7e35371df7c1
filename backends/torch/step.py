"""The hot step: a canvas in, three small arrays and the next step's self-conditioning out; nothing large outlives it.

Scoring, which lies beside it, is the same head on given tokens.

On a CPU the statistics go over the logits in tiles that fit its cache; on a GPU in one piece, without a word from the device
in between.
"""

import math

import torch
from torch import Tensor

from mlx_diffgemma.backends import SCORE_TILE
from mlx_diffgemma.backends.torch.cache import Cache
from mlx_diffgemma.backends.torch.model import TextModel

#: Elements of a tile of logits on the CPU: 1 MiB of float32.
CPU_TILE = 2**18

#: A CPU makes noise only for tokens that can win: those within NEAR of the best perturbed logit, and of the others the few
#: whose noise exceeds NEAR. Noise falls as the random word grows, and exceeds NEAR only where the word's upper bits are zero.
FAR_BITS = 21
NEAR = 1e-3 - math.log(-math.log1p(-(2.0 ** (FAR_BITS - 32))))


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
        frozen: int64 [L] or [B, L], -1 where the model may write, or None.

    Returns:
        argmax, sampled (int64 [B, L]), entropy (float32 [B, L], nats), and the next step's soft embeddings [B, L, H].
    """
    hidden = model.denoise(canvas, cache, soft_embeddings)
    raw = model.embed_tokens.as_linear(hidden).float()  # [B, L, V]
    cap = model.config.final_logit_softcapping
    argmax, sampled, entropy, probabilities = statistics(raw, noise, hidden.dtype, cap=cap, temperature=temperature)
    soft = model.soft_embeddings(probabilities)
    if frozen is not None:
        known, token = frozen >= 0, frozen.clamp(min=0)
        argmax, sampled = torch.where(known, token, argmax), torch.where(known, token, sampled)
        entropy = entropy.masked_fill(known, 0.0)
        soft = torch.where(known[..., None], model.embed(token), soft)
    return argmax, sampled, entropy, soft


def score(model: TextModel, tokens: Tensor, cache: Cache) -> Tensor:
    """Encode tokens int64 [B, N], N at least 1; the log-probability of each after all before it, float32 [B, N].

    That of the first token after an empty cache says nothing.
    """
    before = cache.last
    hidden = model.encode(tokens, cache)
    before = torch.zeros_like(hidden[:, 0]) if before is None else before
    return logprobs(model, torch.cat([before[:, None], hidden[:, :-1]], dim=1), tokens)


def logprobs(model: TextModel, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability float32 [B, N] of tokens int64 [B, N] where the final hidden states are [B, N, H]."""
    states, parts = hidden.flatten(0, 1), []
    for start in range(0, len(states), SCORE_TILE):
        span = slice(start, start + SCORE_TILE)
        logits = model.head(states[span])
        parts.append(logits.gather(1, tokens.reshape(-1, 1)[span])[:, 0] - logits.logsumexp(dim=-1))
    return torch.cat(parts).view(tokens.shape)


def statistics(
    raw: Tensor, noise: Tensor | None, dtype: torch.dtype, *, cap: float, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Argmax, sample, entropy and probabilities of cap * tanh(raw / cap) / temperature.

    Args:
        raw: float32 [B, L, V], the head's output before its softcap; overwritten.
        noise: int32 [B, L] as in :func:`step`, or None.

    Returns:
        argmax, sampled (int64 [B, L]), entropy (float32 [B, L], nats), and the probabilities [B, L, V], which are the float32
        softmax of the tempered logits rounded to ``dtype``, and are of that type.
    """
    rows = raw.flatten(0, 1)
    tile = rows.shape[0] if rows.is_cuda else max(1, CPU_TILE // rows.shape[1])
    probabilities = rows if dtype == torch.float32 else torch.empty_like(rows, dtype=dtype)
    # Fresh pages for every tile would cost more than what is computed in them.
    weights, words, shifted = (
        torch.empty_like(rows[:tile]),
        *torch.empty(2, *rows[:tile].shape, dtype=torch.int32, device=raw.device),
    )
    parts = []
    for start in range(0, rows.shape[0], tile):
        span = slice(start, start + tile)
        scores = rows[span].div_(cap).tanh_().mul_(cap / temperature)
        size = len(scores)
        best, argmax = scores.max(dim=-1)
        if noise is None:
            sampled = argmax
        else:
            torch.bitwise_xor(
                noise.view(-1, 1)[span], torch.arange(rows.shape[1], dtype=torch.int32, device=raw.device), out=words[:size]
            )
            sampled = _sample(scores, mix_(words[:size], shifted[:size]), shifted[:size], best, argmax)
        if dtype != torch.float32:
            probabilities[span] = scores.to(dtype).softmax(dim=-1, dtype=torch.float32).to(dtype)
        torch.exp(scores.sub_(best[:, None]), out=weights[:size])
        total = weights[:size].sum(dim=-1)
        entropy = total.log() - scores.mul_(weights[:size]).sum(dim=-1) / total
        if dtype == torch.float32:
            torch.div(weights[:size], total[:, None], out=scores)  # the probabilities take the logits' place
        parts.append((argmax, sampled, entropy))
    argmax, sampled, entropy = (torch.cat(part).view(raw.shape[:2]) for part in zip(*parts, strict=True))
    return argmax, sampled, entropy, probabilities.view(raw.shape)


def _sample(scores: Tensor, words: Tensor, shifted: Tensor, best: Tensor, argmax: Tensor) -> Tensor:
    """argmax(scores + noise) of scores float32 [R, V] and the noise's words int32 [R, V]; ``shifted`` is room for as many.

    The scores' maxima are ``best`` at ``argmax``.
    """
    if scores.is_cuda:
        return (gumbel(words) + scores).argmax(dim=-1)
    # The best perturbed logit is at least that of the likeliest token.
    least = best + gumbel(words.gather(1, argmax[:, None]))[:, 0]
    loud = torch.bitwise_right_shift(words, FAR_BITS, out=shifted) == 0
    row, token = loud.logical_or_(scores > (least - NEAR)[:, None]).nonzero(as_tuple=True)
    perturbed = scores[row, token] + gumbel(words[row, token])
    winner = torch.full_like(best, -torch.inf).scatter_reduce(0, row, perturbed, "amax")
    wins = perturbed == winner[row]
    return torch.full_like(argmax, scores.shape[1]).scatter_reduce(0, row[wins], token[wins], "amin")


def mix_(words: Tensor, shifted: Tensor) -> Tensor:
    """:func:`mlx_diffgemma.noise.mix` in place, on int32 that stand for 32-bit words; ``shifted`` is room for as many."""

    def fold_down(places: int) -> None:
        torch.bitwise_right_shift(words, places, out=shifted)
        words.bitwise_xor_(shifted.bitwise_and_((1 << (32 - places)) - 1))  # the shift copies the sign; clear it

    fold_down(16)
    words.mul_(0x7FEB352D)  # products wrap around
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

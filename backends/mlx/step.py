"""The hot step: a canvas in, three small arrays and the next step's self-conditioning out; nothing large outlives it.

Scoring, which lies beside it, is the same head on given tokens.
"""

import mlx.core as mx

from mlx_diffgemma.backends import SCORE_TILE
from mlx_diffgemma.backends.mlx.cache import Cache
from mlx_diffgemma.backends.mlx.model import TextModel


def step(
    model: TextModel,
    canvas: mx.array,
    cache: Cache,
    *,
    temperature: float,
    noise: mx.array | None,
    soft_embeddings: mx.array | None,
    frozen: mx.array | None,
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """One denoising step.

    Args:
        canvas: int32 [B, L].
        noise: uint32 [B, L], the bits of :func:`mlx_diffgemma.noise.bits` at each position, or None to draw nothing.
        soft_embeddings: [B, L, H] from the previous step, or None.
        frozen: int32 [L] or [B, L], -1 where the model may write, or None.

    Returns:
        argmax, sampled (int32 [B, L]), entropy (float32 [B, L], nats), and the next step's soft embeddings [B, L, H].
    """
    hidden = model.denoise(canvas, cache, soft_embeddings)
    raw = model.embed_tokens.as_linear(hidden).astype(mx.float32)  # [B, L, V]
    cap = model.config.final_logit_softcapping
    argmax, sampled, entropy, probabilities = statistics(raw, noise, hidden.dtype, cap=cap, temperature=temperature)
    soft = model.soft_embeddings(probabilities)
    if frozen is not None:
        known, token = frozen >= 0, mx.maximum(frozen, 0)
        argmax, sampled = mx.where(known, token, argmax), mx.where(known, token, sampled)
        entropy = mx.where(known, 0.0, entropy)
        soft = mx.where(known[..., None], model.embed(token), soft)
    return argmax, sampled, entropy, soft


def score(model: TextModel, tokens: mx.array, cache: Cache) -> mx.array:
    """Encode tokens int32 [B, N], N at least 1; the log-probability of each after all before it, float32 [B, N].

    That of the first token after an empty cache says nothing.
    """
    before = cache.last
    hidden = model.encode(tokens, cache)
    before = mx.zeros_like(hidden[:, 0]) if before is None else before
    return logprobs(model, mx.concatenate([before[:, None], hidden[:, :-1]], axis=1), tokens)


def logprobs(model: TextModel, hidden: mx.array, tokens: mx.array) -> mx.array:
    """Log-probability float32 [B, N] of tokens int32 [B, N] where the final hidden states are [B, N, H]."""
    states, parts = hidden.flatten(0, 1), []
    for start in range(0, len(states), SCORE_TILE):
        span = slice(start, start + SCORE_TILE)
        logits = model.head(states[span])
        shifted = logits - logits.max(axis=-1, keepdims=True)
        part = mx.take_along_axis(shifted, tokens.reshape(-1, 1)[span], axis=-1)[:, 0] - mx.log(_sum(mx.exp(shifted)))
        mx.eval(part)  # keeps no more than one tile of logits
        parts.append(part)
    return mx.concatenate(parts).reshape(tokens.shape)


def statistics(
    raw: mx.array, noise: mx.array | None, dtype: mx.Dtype, *, cap: float, temperature: float
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Argmax, sample, entropy and probabilities of cap * tanh(raw / cap) / temperature.

    Args:
        raw: float32 [B, L, V], the head's output before its softcap.
        noise: uint32 [B, L] as in :func:`step`, or None.

    Returns:
        argmax, sampled (int32 [B, L]), entropy (float32 [B, L], nats), and the probabilities [B, L, V], which are the float32
        softmax of the tempered logits rounded to ``dtype``, and are of that type.
    """
    scores = mx.tanh(raw / cap) * (cap / temperature)
    argmax = scores.argmax(axis=-1).astype(mx.int32)
    sampled = argmax if noise is None else _sample(scores, noise)
    shifted = scores - scores.max(axis=-1, keepdims=True)
    weights = mx.exp(shifted)
    total = _sum(weights)
    entropy = mx.log(total) - _sum(shifted * weights) / total
    if dtype == mx.float32:
        return argmax, sampled, entropy, weights / total[..., None]
    return argmax, sampled, entropy, mx.softmax(scores.astype(dtype).astype(mx.float32), axis=-1).astype(dtype)


def _sum(x: mx.array) -> mx.array:
    """Sum over the last axis in two levels: one naive float32 pass over 262,144 terms is off by more than 1e-3 nats."""
    size = x.shape[-1]
    inner = 512 if size >= 512 else 1
    padded = mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -size % inner)])
    return padded.reshape(*x.shape[:-1], -1, inner).sum(axis=-1).sum(axis=-1)


def _sample(scores: mx.array, noise: mx.array) -> mx.array:
    """argmax(scores + Gumbel noise) of scores float32 [B, L, V]; noise uint32 [B, L]."""
    words = mix(mx.arange(scores.shape[-1], dtype=mx.uint32) ^ noise[..., None])
    return (scores + gumbel(words)).argmax(axis=-1).astype(mx.int32)


def mix(words: mx.array) -> mx.array:
    """:func:`mlx_diffgemma.noise.mix`."""
    words = (words ^ (words >> 16)) * mx.array(0x7FEB352D, dtype=mx.uint32)
    words = (words ^ (words >> 15)) * mx.array(0x846CA68B, dtype=mx.uint32)
    return words ^ (words >> 16)


def gumbel(words: mx.array) -> mx.array:
    """Gumbel noise float32 of uint32 words, as :func:`mlx_diffgemma.noise.gumbel` defines it."""
    uniform = words.astype(mx.float32) * 2.0**-32 + 2.0**-33
    return -mx.log(-mx.log1p(-uniform))

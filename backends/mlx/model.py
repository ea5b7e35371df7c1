"""DiffusionGemma's text model in MLX.

One stack of layers is run in two ways: causally, appending keys and values to the cache (*encode*), and over a canvas that
sees the cache and the whole of itself (*denoise*). Attribute names are the checkpoint's. The PyTorch twin of this file has the
same classes in the same order. B rows, L positions, H hidden size, V vocabulary, S cached and new positions together.
"""

import math

import mlx.core as mx
from mlx import nn

from mlx_diffgemma.backends.mlx.cache import Cache, LayerCache
from mlx_diffgemma.config import SLIDING, LayerConfig, ModelConfig


class Embedding(nn.Module):
    """The token table [V, H], in all three of its uses."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = mx.zeros((config.vocab_size, config.hidden_size))

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.weight[tokens]  # [.., H]

    def as_linear(self, x: mx.array) -> mx.array:
        return x @ self.weight.T  # [.., V]

    def weighted_rows(self, probabilities: mx.array) -> mx.array:
        return probabilities @ self.weight  # [.., H]


class RMSNorm(nn.Module):
    """x / rms(x), times a weight where it has one; in float32."""

    def __init__(self, size: int, eps: float, *, weighted: bool = True) -> None:
        super().__init__()
        self.eps = eps
        if weighted:
            self.weight = mx.ones(size)

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, self.get("weight"), self.eps)  # accumulates in float32


class Rope:
    """Cosines and sines [L, D] of one kind of layer, repeated over the two halves of the head."""

    def __init__(self, layer: LayerConfig) -> None:
        self.frequencies = mx.array(layer.rope.inverse_frequencies(layer.head_dim), dtype=mx.float32)

    def tables(self, start: int, length: int, like: mx.array) -> tuple[mx.array, mx.array]:
        positions = mx.arange(start, start + length, dtype=mx.float32)
        angles = mx.tile(mx.outer(positions, self.frequencies), (1, 2))
        return mx.cos(angles).astype(like.dtype), mx.sin(angles).astype(like.dtype)


def rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Rotate x [B, heads, L, D]; the pairs are (i, i + D/2)."""
    first, second = mx.split(x, 2, axis=-1)
    return x * cos + mx.concatenate([-second, first], axis=-1) * sin


class Attention(nn.Module):
    """Grouped-query attention with normed queries, keys and values, and scale 1. Full layers use the keys as values."""

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__()
        self.head_dim = layer.head_dim
        queries, keys = config.num_attention_heads * layer.head_dim, layer.num_key_value_heads * layer.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False) if layer.is_sliding else None
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(layer.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(layer.head_dim, config.rms_norm_eps)
        self.v_norm = RMSNorm(layer.head_dim, config.rms_norm_eps, weighted=False)

    def __call__(
        self, x: mx.array, rope: tuple[mx.array, mx.array], cache: LayerCache, mask: mx.array | None, *, causal: bool
    ) -> mx.array:
        queries = self.q_norm(self._heads(self.q_proj(x))).swapaxes(1, 2)  # [B, heads, L, D]
        keys = self._heads(self.k_proj(x))
        values = keys if self.v_proj is None else self._heads(self.v_proj(x))
        keys, values = self.k_norm(keys).swapaxes(1, 2), self.v_norm(values).swapaxes(1, 2)
        queries, keys = rotate(queries, *rope), rotate(keys, *rope)
        keys, values = cache.append(keys, values) if causal else cache.extended(keys, values)  # [B, heads, S, D]
        mixed = mx.fast.scaled_dot_product_attention(queries, keys, values, mask=mask, scale=1.0)
        return self.o_proj(mixed.swapaxes(1, 2).flatten(2))

    def _heads(self, x: mx.array) -> mx.array:
        return x.reshape(*x.shape[:-1], -1, self.head_dim)  # [B, L, heads, D]


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(gelu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """Which experts a token goes to, and their weights. Its input is the raw residual, which it norms itself."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k = config.top_k_experts
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, weighted=False)
        self.proj = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.scale = mx.ones(config.hidden_size)
        self.per_expert_scale = mx.ones(config.num_experts)

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        scores = self.proj(self.norm(x) * self.scale * x.shape[-1] ** -0.5)  # [T, E]
        probabilities = mx.softmax(scores.astype(mx.float32), axis=-1)
        experts = mx.argpartition(probabilities, -self.top_k, axis=-1)[:, -self.top_k :]  # [T, K]
        weights = mx.take_along_axis(probabilities, experts, axis=-1)
        return weights / weights.sum(axis=-1, keepdims=True) * self.per_expert_scale[experts], experts


class ExpertLinear(nn.Module):
    """One linear map an expert, weight [E, out, in]."""

    def __init__(self, num_experts: int, input_size: int, output_size: int) -> None:
        super().__init__()
        self.weight = mx.zeros((num_experts, output_size, input_size))

    def __call__(self, x: mx.array, experts: mx.array) -> mx.array:
        """Row m of x [M, 1, in] goes through expert ``experts[m]``; the rows are sorted by expert."""
        return mx.gather_mm(x, self.weight.swapaxes(1, 2), rhs_indices=experts, sorted_indices=True)


class Experts(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up_proj = ExpertLinear(config.num_experts, config.hidden_size, 2 * config.moe_intermediate_size)
        self.down_proj = ExpertLinear(config.num_experts, config.moe_intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array, weights: mx.array, experts: mx.array) -> mx.array:
        """x [T, H] through its experts [T, K], summed by ``weights`` [T, K]."""
        order = mx.argsort(experts.flatten())  # T * K (token, expert) pairs, by expert
        chosen = experts.flatten()[order]
        gate, up = mx.split(self.gate_up_proj(x[order // experts.shape[1]][:, None], chosen), 2, axis=-1)
        y = self.down_proj(gelu(gate) * up, chosen)
        y = y[mx.argsort(order)].reshape(*experts.shape, -1)  # [T, K, H], back in the tokens' order
        return (y * weights[..., None]).sum(axis=1).astype(x.dtype)


class Layer(nn.Module):
    """Attention, then a dense MLP and the experts side by side. Each way of running has a scalar of its own."""

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.router = Router(config)
        self.experts = Experts(config)
        self.input_layernorm = RMSNorm(size, eps)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.pre_feedforward_layernorm = RMSNorm(size, eps)
        self.post_feedforward_layernorm_1 = RMSNorm(size, eps)
        self.pre_feedforward_layernorm_2 = RMSNorm(size, eps)
        self.post_feedforward_layernorm_2 = RMSNorm(size, eps)
        self.post_feedforward_layernorm = RMSNorm(size, eps)
        self.layer_scalar = mx.ones(1)
        self.encoder_layer_scalar = mx.ones(1)

    def __call__(
        self, x: mx.array, rope: tuple[mx.array, mx.array], cache: LayerCache, mask: mx.array | None, *, causal: bool
    ) -> mx.array:
        attended = self.self_attn(self.input_layernorm(x), rope, cache, mask, causal=causal)
        x = x + self.post_attention_layernorm(attended)
        dense = self.post_feedforward_layernorm_1(self.mlp(self.pre_feedforward_layernorm(x)))
        tokens = x.flatten(0, 1)  # [T, H]
        sparse = self.experts(self.pre_feedforward_layernorm_2(tokens), *self.router(tokens)).reshape(x.shape)
        x = x + self.post_feedforward_layernorm(dense + self.post_feedforward_layernorm_2(sparse))
        return x * (self.encoder_layer_scalar if causal else self.layer_scalar)


class SelfConditioning(nn.Module):
    """Adds to the canvas what the previous step believed, as soft embeddings; zeros in a block's first step."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.pre_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, weighted=False)
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def __call__(self, embeddings: mx.array, soft_embeddings: mx.array) -> mx.array:
        signal = self.pre_norm(soft_embeddings)
        return self.post_norm(embeddings + self.down_proj(gelu(self.gate_proj(signal)) * self.up_proj(signal)))


class TextModel(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config)
        self.self_conditioning = SelfConditioning(config)
        self.layers = [Layer(config, layer) for layer in config.layers]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._ropes = {layer.layer_type: Rope(layer) for layer in config.layers}

    def encode(self, tokens: mx.array, cache: Cache, trace: list[mx.array] | None = None) -> mx.array:
        """Hidden states [B, N, H] of tokens [B, N], each of which sees those before it; appends them to the cache."""
        x = self._run(self.embed(tokens), cache, trace, causal=True)
        cache.length += tokens.shape[1]
        cache.last = mx.contiguous(x[:, -1])  # a slice would keep the whole alive
        return x

    def denoise(
        self, canvas: mx.array, cache: Cache, soft_embeddings: mx.array | None = None, trace: list[mx.array] | None = None
    ) -> mx.array:
        """Hidden states [B, L, H] of a canvas [B, L] that sees the cache and all of itself."""
        embeddings = self.embed(canvas)
        signal = mx.zeros_like(embeddings) if soft_embeddings is None else soft_embeddings
        return self._run(self.self_conditioning(embeddings, signal), cache, trace, causal=False)

    def _run(self, x: mx.array, cache: Cache, trace: list[mx.array] | None, *, causal: bool) -> mx.array:
        ropes = {kind: rope.tables(len(cache), x.shape[1], x) for kind, rope in self._ropes.items()}
        masks = {kind: self._mask(x, cache, kind) if causal else None for kind in self._ropes}
        states = [x]
        for layer, shape, kept in zip(self.layers, self.config.layers, cache.layers, strict=True):
            x = layer(x, ropes[shape.layer_type], kept, masks[shape.layer_type], causal=causal)
            if trace is not None:
                states.append(x)
        x = self.norm(x)
        if trace is not None:
            trace.extend([*states, x])
        return x

    def _mask(self, x: mx.array, cache: Cache, layer_type: str) -> mx.array:
        """Causal mask [N, S]: position q sees q - window + 1 .. q on a sliding layer, and 0 .. q on a full one."""
        window = self.config.sliding_window if layer_type == SLIDING else len(cache) + x.shape[1]
        kept = min(len(cache), window - 1)
        queries = mx.arange(x.shape[1])[:, None] + kept
        keys = mx.arange(kept + x.shape[1])[None, :]
        return (keys <= queries) & (keys > queries - window)

    def embed(self, tokens: mx.array) -> mx.array:
        return self._scaled(self.embed_tokens(tokens))

    def soft_embeddings(self, probabilities: mx.array) -> mx.array:
        """The embeddings' mean [B, L, H] under probabilities [B, L, V]."""
        return self._scaled(self.embed_tokens.weighted_rows(probabilities))

    def _scaled(self, rows: mx.array) -> mx.array:
        # The factor is rounded to the weights' type, as it was in training: sqrt(2816) = 53.07 is 53.0 in bfloat16.
        return rows * mx.array(math.sqrt(self.config.hidden_size), dtype=rows.dtype)

    def head(self, hidden: mx.array) -> mx.array:
        """Logits float32 [.., V] after the softcap, c * tanh(logits / c)."""
        cap = self.config.final_logit_softcapping
        return mx.tanh(self.embed_tokens.as_linear(hidden).astype(mx.float32) / cap) * cap


def gelu(x: mx.array) -> mx.array:
    return nn.gelu_approx(x)

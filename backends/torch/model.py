"""DiffusionGemma's text model in PyTorch.

One stack of layers is run in two ways: causally, appending keys and values to the cache (*encode*), and over a canvas that
sees the cache and the whole of itself (*denoise*). Attribute names are the checkpoint's. The MLX twin of this file has the
same classes in the same order. B rows, L positions, H hidden size, V vocabulary, S cached and new positions together.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlx_diffgemma.backends.torch.cache import Cache, LayerCache
from mlx_diffgemma.config import SLIDING, LayerConfig, ModelConfig


class Embedding(nn.Module):
    """The token table [V, H], in all three of its uses."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)  # [.., H]

    def as_linear(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)  # [.., V]

    def weighted_rows(self, probabilities: Tensor) -> Tensor:
        return probabilities @ self.weight  # [.., H]


class RMSNorm(nn.Module):
    """x / rms(x), times a weight where it has one; in float32."""

    def __init__(self, size: int, eps: float, *, weighted: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size)) if weighted else None

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.float()
        return F.rms_norm(x.float(), x.shape[-1:], weight, self.eps).to(x.dtype)


class Rope:
    """Cosines and sines [L, D] of one kind of layer, repeated over the two halves of the head."""

    def __init__(self, layer: LayerConfig) -> None:
        self.frequencies = torch.tensor(layer.rope.inverse_frequencies(layer.head_dim), dtype=torch.float32, device="cpu")

    def tables(self, start: int, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        positions = torch.arange(start, start + length, dtype=torch.float32, device=like.device)
        angles = torch.outer(positions, self.frequencies.to(like.device)).repeat(1, 2)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, heads, L, D]; the pairs are (i, i + D/2)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


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

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: LayerCache, mask: Tensor | None, *, causal: bool) -> Tensor:
        queries = self.q_norm(self._heads(self.q_proj(x))).transpose(1, 2)  # [B, heads, L, D]
        keys = self._heads(self.k_proj(x))
        values = keys if self.v_proj is None else self._heads(self.v_proj(x))
        keys, values = self.k_norm(keys).transpose(1, 2), self.v_norm(values).transpose(1, 2)
        queries, keys = rotate(queries, *rope), rotate(keys, *rope)
        keys, values = cache.append(keys, values) if causal else cache.extended(keys, values)  # [B, heads, S, D]
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=1.0, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))  # [B, L, heads, D]


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gelu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """Which experts a token goes to, and their weights. Its input is the raw residual, which it norms itself."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k = config.top_k_experts
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, weighted=False)
        self.proj = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.scale = nn.Parameter(torch.ones(config.hidden_size))
        self.per_expert_scale = nn.Parameter(torch.ones(config.num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.proj(self.norm(x) * self.scale * x.shape[-1] ** -0.5)  # [T, E]
        weights, experts = scores.softmax(dim=-1, dtype=torch.float32).topk(self.top_k)  # [T, K]
        return weights / weights.sum(dim=-1, keepdim=True) * self.per_expert_scale[experts], experts


class ExpertLinear(nn.Module):
    """One linear map an expert, weight [E, out, in]."""

    def __init__(self, num_experts: int, input_size: int, output_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, output_size, input_size))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """Rows of x [M, in] are sorted by expert; those of expert e end at ``ends[e]`` (int32 [E])."""
        if x.is_cuda and x.dtype == torch.bfloat16:  # the only type that it takes there; needs no word from the device
            return F.grouped_mm(x, self.weight.transpose(1, 2), offs=ends)
        stops = ends.tolist()
        groups = zip(self.weight, [0, *stops], stops, strict=False)
        return torch.cat([F.linear(x[start:stop], weight) for weight, start, stop in groups if stop > start])


class Experts(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.gate_up_proj = ExpertLinear(config.num_experts, config.hidden_size, 2 * config.moe_intermediate_size)
        self.down_proj = ExpertLinear(config.num_experts, config.moe_intermediate_size, config.hidden_size)

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """x [T, H] through its experts [T, K], summed by ``weights`` [T, K]."""
        chosen, order = experts.flatten().sort(stable=True)  # T * K (token, expert) pairs, by expert
        ends = torch.searchsorted(chosen, torch.arange(self.num_experts, device=x.device), right=True).int()
        gate, up = self.gate_up_proj(x[order // experts.shape[1]], ends).chunk(2, dim=-1)
        y = self.down_proj(gelu(gate) * up, ends)
        y = torch.empty_like(y).index_copy(0, order, y).view(*experts.shape, -1)  # [T, K, H], back in the tokens' order
        return (y * weights[..., None]).sum(dim=1).to(x.dtype)


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
        self.layer_scalar = nn.Parameter(torch.ones(1))
        self.encoder_layer_scalar = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: LayerCache, mask: Tensor | None, *, causal: bool) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), rope, cache, mask, causal=causal)
        x = x + self.post_attention_layernorm(attended)
        dense = self.post_feedforward_layernorm_1(self.mlp(self.pre_feedforward_layernorm(x)))
        tokens = x.flatten(0, 1)  # [T, H]
        sparse = self.experts(self.pre_feedforward_layernorm_2(tokens), *self.router(tokens)).view_as(x)
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

    def forward(self, embeddings: Tensor, soft_embeddings: Tensor) -> Tensor:
        signal = self.pre_norm(soft_embeddings)
        return self.post_norm(embeddings + self.down_proj(gelu(self.gate_proj(signal)) * self.up_proj(signal)))


class TextModel(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config)
        self.self_conditioning = SelfConditioning(config)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in config.layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ropes = {layer.layer_type: Rope(layer) for layer in config.layers}

    def encode(self, tokens: Tensor, cache: Cache, trace: list[Tensor] | None = None) -> Tensor:
        """Hidden states [B, N, H] of tokens [B, N], each of which sees those before it; appends them to the cache."""
        x = self._run(self.embed(tokens), cache, trace, causal=True)
        cache.length += tokens.shape[1]
        cache.last = x[:, -1].clone()  # a slice would keep the whole alive
        return x

    def denoise(
        self, canvas: Tensor, cache: Cache, soft_embeddings: Tensor | None = None, trace: list[Tensor] | None = None
    ) -> Tensor:
        """Hidden states [B, L, H] of a canvas [B, L] that sees the cache and all of itself."""
        embeddings = self.embed(canvas)
        signal = torch.zeros_like(embeddings) if soft_embeddings is None else soft_embeddings
        return self._run(self.self_conditioning(embeddings, signal), cache, trace, causal=False)

    def _run(self, x: Tensor, cache: Cache, trace: list[Tensor] | None, *, causal: bool) -> Tensor:
        ropes = {kind: rope.tables(len(cache), x.shape[1], x) for kind, rope in self.ropes.items()}
        masks = {kind: self._mask(x, cache, kind) if causal else None for kind in self.ropes}
        states = [x]
        for layer, shape, kept in zip(self.layers, self.config.layers, cache.layers, strict=True):
            x = layer(x, ropes[shape.layer_type], kept, masks[shape.layer_type], causal=causal)
            if trace is not None:
                states.append(x)
        x = self.norm(x)
        if trace is not None:
            trace.extend([*states, x])
        return x

    def _mask(self, x: Tensor, cache: Cache, layer_type: str) -> Tensor:
        """Causal mask [N, S]: position q sees q - window + 1 .. q on a sliding layer, and 0 .. q on a full one."""
        window = self.config.sliding_window if layer_type == SLIDING else len(cache) + x.shape[1]
        kept = min(len(cache), window - 1)
        queries = torch.arange(x.shape[1], device=x.device)[:, None] + kept
        keys = torch.arange(kept + x.shape[1], device=x.device)[None, :]
        return (keys <= queries) & (keys > queries - window)

    def embed(self, tokens: Tensor) -> Tensor:
        return self._scaled(self.embed_tokens(tokens))

    def soft_embeddings(self, probabilities: Tensor) -> Tensor:
        """The embeddings' mean [B, L, H] under probabilities [B, L, V]."""
        return self._scaled(self.embed_tokens.weighted_rows(probabilities))

    def _scaled(self, rows: Tensor) -> Tensor:
        # The factor is rounded to the weights' type, as it was in training: sqrt(2816) = 53.07 is 53.0 in bfloat16.
        return rows * torch.tensor(math.sqrt(self.config.hidden_size), dtype=rows.dtype, device="cpu").item()

    def head(self, hidden: Tensor) -> Tensor:
        """Logits float32 [.., V] after the softcap, c * tanh(logits / c)."""
        cap = self.config.final_logit_softcapping
        return torch.tanh(self.embed_tokens.as_linear(hidden).float() / cap) * cap


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")

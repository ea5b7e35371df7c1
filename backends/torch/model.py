"""DiffusionGemma's text model in PyTorch.

One stack of layers runs in two ways: causally, appending keys and values to a cache (*encode*), and over a canvas that sees a
cache and all of itself (*denoise*). The input is a stream of T tokens [T, H]: stretches of any number of texts, one after
another. Only attention distinguishes the texts. Attribute names are the checkpoint's. The MLX twin of this file has the
same classes in the same order. H hidden size, V vocabulary, D head size.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlx_diffgemma.backends.torch import attention, fused, products
from mlx_diffgemma.backends.torch.cache import Cache, LayerCache
from mlx_diffgemma.backends.torch.quantized import Quantized
from mlx_diffgemma.config import LayerConfig, ModelConfig


class Segment(NamedTuple):
    """One text's stretch of a stream: the tokens from ``start`` to ``stop`` - 1, which come after those in ``cache``.

    ``images`` are (start, features [n, H]): the features take the places of the embeddings of n tokens, from ``start`` in the
    stretch on. In a cache of several rows, features are [rows, n, H]: each row has its own image in the same place.
    """

    start: int
    stop: int
    cache: Cache
    images: Sequence[tuple[int, Tensor]] = ()


class Text(NamedTuple):
    """A text as one layer's attention sees it: its part of the stream, the layer's cache, and where images start and stop.

    The part holds ``rows`` texts of one length.
    """

    span: slice
    rows: int
    cache: LayerCache
    images: Sequence[tuple[int, int]]


class Embedding(nn.Module):
    """The token table [V, H] and its three uses."""

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
    """x / rms(x), times a weight if it has one; in float32."""

    def __init__(self, size: int, eps: float, *, weighted: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size)) if weighted else None

    def forward(self, x: Tensor) -> Tensor:
        return fused.rms_norm(x, self.weight, self.eps)


class Rope:
    """Cosines and sines [T, 1, D] for one kind of layer, repeated over the two halves of the head."""

    def __init__(self, layer: LayerConfig) -> None:
        self.frequencies = torch.tensor(layer.rope.inverse_frequencies(layer.head_dim), dtype=torch.float32, device="cpu")

    def tables(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """At positions float32 [T]. Angles, cosines and sines are computed in float32."""
        angles = torch.outer(positions, self.frequencies.to(positions.device)).repeat(1, 2)[:, None]
        return angles.cos().to(dtype), angles.sin().to(dtype)


class Joined(nn.Module):
    """Several linear maps of the same input, as one product whose outputs are views of one tensor.

    Maps of different kinds or formats stay apart. For inference: the parts' weights are copied into one, and no longer theirs.
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        held = [dict(part.named_parameters()) | dict(part.named_buffers()) for part in parts]
        self.sizes = [len(tensors["weight"]) for tensors in held]
        forms = [
            (type(part), getattr(part, "format", None), {name: tensor.dtype for name, tensor in tensors.items()})
            for part, tensors in zip(parts, held, strict=True)
        ]
        if all(form == forms[0] for form in forms):
            for name in held[0]:
                whole = torch.cat([_signed(tensors[name].detach()) for tensors in held]).view(held[0][name].dtype)
                kept = nn.Parameter(whole, requires_grad=False) if isinstance(held[0][name], nn.Parameter) else whole
                setattr(parts[0], name, kept)
            parts = parts[:1]
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Sequence[Tensor]:
        """The output [.., out] of each map."""
        if len(self.parts) == 1:
            whole: Tensor = self.parts[0](x)
            return whole.split(self.sizes, dim=-1)
        return [part(x) for part in self.parts]


def _signed(tensor: Tensor) -> Tensor:
    """Words as int32: torch can do little with uint32."""
    return tensor.view(torch.int32) if tensor.dtype == torch.uint32 else tensor


class Attention(nn.Module):
    """Grouped-query attention with normalized queries, keys and values, and scale 1. Full layers use the keys as values."""

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__()
        self.head_dim, self.reach = layer.head_dim, config.image_reach(layer)
        queries, keys = config.num_attention_heads * layer.head_dim, layer.num_key_value_heads * layer.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False) if layer.is_sliding else None
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(layer.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(layer.head_dim, config.rms_norm_eps)
        self.qkv_proj: Joined | None = None

    def join(self) -> None:
        """Make one product of the projections."""
        parts = [self.q_proj, self.k_proj] if self.v_proj is None else [self.q_proj, self.k_proj, self.v_proj]
        self.qkv_proj = Joined(parts)
        del self.q_proj, self.k_proj, self.v_proj

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], texts: Sequence[Text], *, causal: bool) -> Tensor:
        eps = self.q_norm.eps
        queries, keys, values = (self._heads(each) for each in self._projected(x))
        queries = fused.heads(queries, self.q_norm.weight, rope, eps)  # [T, heads, D]
        values = fused.heads(values, None, None, eps)
        keys = fused.heads(keys, self.k_norm.weight, rope, eps)
        mixed = [self._attend(queries[text.span], keys[text.span], values[text.span], text, causal=causal) for text in texts]
        return self.o_proj((torch.cat(mixed) if len(mixed) > 1 else mixed[0]).flatten(1))

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, text: Text, *, causal: bool) -> Tensor:
        """One text, or several rows: queries [T, heads, D] over the cache and over their own keys."""
        queries, keys, values = (
            x.unflatten(0, (text.rows, -1)).transpose(1, 2) for x in (queries, keys, values)
        )  # [B, heads, N, D]
        if causal:
            seen = text.cache.append(keys, values)
            mixed = attention.causal(queries, *seen, text.cache.room.window, text.images, self.reach)
        else:
            mixed = attention.bidirectional(queries, *text.cache.extended(keys, values))
        return mixed.transpose(1, 2).flatten(0, 1)

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values before their norms, [T, heads * D]."""
        if self.qkv_proj is not None:
            queries, keys, *own = self.qkv_proj(x)
            return queries, keys, own[0] if own else keys
        keys = self.k_proj(x)
        return self.q_proj(x), keys, keys if self.v_proj is None else self.v_proj(x)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))  # [T, heads, D]


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.gate_up_proj: Joined | None = None

    def join(self) -> None:
        """Make one product of the two maps of the input."""
        self.gate_up_proj = Joined([self.gate_proj, self.up_proj])
        del self.gate_proj, self.up_proj

    def forward(self, x: Tensor) -> Tensor:
        gate, up = (self.gate_proj(x), self.up_proj(x)) if self.gate_up_proj is None else self.gate_up_proj(x)
        return self.down_proj(fused.geglu(gate, up))


class Router(nn.Module):
    """Chooses the experts of a token, and their weights. Its input is the residual, normalized and scaled by :class:`Layer`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k = config.top_k_experts
        self.proj = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.scale = nn.Parameter(torch.ones(config.hidden_size))
        self.per_expert_scale = nn.Parameter(torch.ones(config.num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return fused.routed(self.proj(x), self.per_expert_scale, self.top_k)  # [T, K], [T, K]


class ExpertLinear(nn.Module):
    """One linear map per expert, weight [E, out, in]."""

    def __init__(self, num_experts: int, input_size: int, output_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, output_size, input_size))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """Send each row of x [M, in] through its expert. Rows are sorted by expert; those of e end at ``ends[e]`` (int32 [E])."""
        if x.is_cuda and x.dtype == torch.bfloat16:  # its only type on CUDA; does not wait for the device
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
        """Send each token of x [T, H] through its experts [T, K], and sum the results weighted by ``weights`` [T, K]."""
        if isinstance(self.gate_up_proj, Quantized) and isinstance(self.down_proj, Quantized):
            mixed = products.experts(x, weights, experts, self.gate_up_proj.packed, self.down_proj.packed)
            if mixed is not None:
                return mixed
        chosen, order = experts.flatten().sort(stable=True)  # T * K (token, expert) pairs, by expert
        ends = torch.searchsorted(chosen, torch.arange(self.num_experts, device=x.device), right=True).int()
        gate, up = self.gate_up_proj(x[order // experts.shape[1]], ends).chunk(2, dim=-1)
        y = self.down_proj(fused.geglu(gate, up), ends)
        y = torch.empty_like(y).index_copy(0, order, y).view(*experts.shape, -1)  # [T, K, H], back in the tokens' order
        return (y * weights[..., None]).sum(dim=1).to(x.dtype)


class Layer(nn.Module):
    """Attention, then a dense MLP and the experts in parallel. Encode and denoise each have their own scalar."""

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

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], texts: Sequence[Text], *, causal: bool) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), rope, texts, causal=causal)
        inputs = self.post_attention_layernorm, self.pre_feedforward_layernorm, self.pre_feedforward_layernorm_2
        outputs = self.post_feedforward_layernorm_1, self.post_feedforward_layernorm_2, self.post_feedforward_layernorm
        x, dense, sparse, routed = fused.after_attention(
            x, attended, [norm.weight for norm in inputs if norm.weight is not None], self.router.scale, self.input_layernorm.eps
        )
        dense, sparse = self.mlp(dense), self.experts(sparse, *self.router(routed))
        scalar = self.encoder_layer_scalar if causal else self.layer_scalar
        return fused.after_experts(
            x, dense, sparse, [norm.weight for norm in outputs if norm.weight is not None], scalar, self.input_layernorm.eps
        )


class SelfConditioning(nn.Module):
    """Adds the previous step's probabilities to the canvas, as soft embeddings; zeros in a block's first step."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.pre_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, weighted=False)
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, embeddings: Tensor, soft_embeddings: Tensor) -> Tensor:
        signal = self.pre_norm(soft_embeddings)
        return self.post_norm(embeddings + self.down_proj(fused.geglu(self.gate_proj(signal), self.up_proj(signal))))


class TextModel(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config)
        self.self_conditioning = SelfConditioning(config)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in config.layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ropes = {layer.layer_type: Rope(layer) for layer in config.layers}

    def join(self) -> None:
        """Make one product of those with the same input, for inference on a GPU. To be called once, after weights are loaded."""
        for layer in self.layers:
            assert isinstance(layer, Layer)
            layer.self_attn.join()
            layer.mlp.join()

    def encode(self, tokens: Tensor, segments: Sequence[Segment], trace: list[Tensor] | None = None) -> Tensor:
        """Hidden states [T, H] of tokens [T]. Each token sees those before it in its text. Appends to the caches."""
        x = self.embed(tokens)
        for segment in segments:
            rows = x[segment.start : segment.stop].unflatten(0, (segment.cache.rows, -1))  # a view
            for start, features in segment.images:
                rows[:, start : start + features.shape[-2]] = features
        x = self._run(x, segments, trace, causal=True)
        for start, stop, cache, _ in segments:
            states = x[start:stop].unflatten(0, (cache.rows, -1))
            cache.length += states.shape[1]
            cache.last = states[:, -1].clone()  # a view would keep the whole array alive
        return x

    def denoise(
        self,
        canvases: Tensor,
        segments: Sequence[Segment],
        soft_embeddings: Tensor | None = None,
        trace: list[Tensor] | None = None,
    ) -> Tensor:
        """Hidden states [T, H] of canvases [T]. Each canvas sees its cache and all of itself."""
        embeddings = self.embed(canvases)
        signal = torch.zeros_like(embeddings) if soft_embeddings is None else soft_embeddings
        return self._run(self.self_conditioning(embeddings, signal), segments, trace, causal=False)

    def _run(self, x: Tensor, segments: Sequence[Segment], trace: list[Tensor] | None, *, causal: bool) -> Tensor:
        positions = torch.cat([_positions(segment, x.device) for segment in segments])
        ropes = {kind: rope.tables(positions, x.dtype) for kind, rope in self.ropes.items()}
        images = [[(start, start + features.shape[-2]) for start, features in segment.images] for segment in segments]
        states = [x]
        for index, (layer, shape) in enumerate(zip(self.layers, self.config.layers, strict=True)):
            texts = [
                Text(slice(start, stop), cache.rows, cache.layers[index], spans)
                for (start, stop, cache, _), spans in zip(segments, images, strict=True)
            ]
            x = layer(x, ropes[shape.layer_type], texts, causal=causal)
            if trace is not None:
                states.append(x)
        x = self.norm(x)
        if trace is not None:
            trace.extend([*states, x])
        return x

    def embed(self, tokens: Tensor) -> Tensor:
        return self._scaled(self.embed_tokens(tokens))

    def soft_embeddings(self, probabilities: Tensor) -> Tensor:
        """The mean embeddings [T, H] under probabilities [T, V]."""
        return self._scaled(self.embed_tokens.weighted_rows(probabilities))

    def _scaled(self, rows: Tensor) -> Tensor:
        # The factor is rounded to the weights' type, as it was in training: sqrt(2816) = 53.07 is 53.0 in bfloat16.
        return rows * torch.tensor(math.sqrt(self.config.hidden_size), dtype=rows.dtype, device="cpu").item()

    def head(self, hidden: Tensor) -> Tensor:
        """Logits float32 [.., V] after the softcap, c * tanh(logits / c)."""
        cap = self.config.final_logit_softcapping
        return torch.tanh(self.embed_tokens.as_linear(hidden).float() / cap) * cap


def _positions(segment: Segment, device: torch.device) -> Tensor:
    """Positions float32 [stop - start] of a segment's tokens in their text."""
    begin, rows = len(segment.cache), segment.cache.rows
    return torch.arange(begin, begin + (segment.stop - segment.start) // rows, dtype=torch.float32, device=device).repeat(rows)

"""DiffusionGemma's text model in MLX.

One stack of layers runs in two ways: causally, appending keys and values to a cache (*encode*), and over a canvas that sees a
cache and all of itself (*denoise*). The input is a stream of T tokens [T, H]: stretches of any number of texts, one after
another. Only attention distinguishes the texts. Attribute names are the checkpoint's. The PyTorch twin of this file has
the same classes in the same order. H hidden size, V vocabulary, D head size.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
from mlx import nn

from mlx_diffgemma.backends.mlx import attention, fused, kernels
from mlx_diffgemma.backends.mlx.cache import Cache, LayerCache
from mlx_diffgemma.config import LayerConfig, ModelConfig


class Segment(NamedTuple):
    """One text's stretch of a stream: the tokens from ``start`` to ``stop`` - 1, which come after those in ``cache``.

    ``images`` are (start, features [n, H]): the features take the places of the embeddings of n tokens, from ``start`` in the
    stretch on.
    """

    start: int
    stop: int
    cache: Cache
    images: Sequence[tuple[int, mx.array]] = ()


class Text(NamedTuple):
    """A text as one layer's attention sees it: its part of the stream, the layer's cache, and where images start and stop.

    The part holds ``rows`` texts of one length. ``masks`` are those that all layers share.
    """

    def ending(self) -> "Text":
        """The text as its last position's query sees it, in a stream of such positions alone."""
        before = self.span.stop - self.span.start - 1
        return self._replace(images=[(start - before, stop - before) for start, stop in self.images], masks={})

    span: slice
    rows: int
    cache: LayerCache
    images: Sequence[tuple[int, int]]
    masks: attention.Masks


class Embedding(nn.Module):
    """The token table [V, H] and its three uses."""

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
    """x / rms(x), times a weight if it has one; in float32."""

    def __init__(self, size: int, eps: float, *, weighted: bool = True) -> None:
        super().__init__()
        self.eps = eps
        if weighted:
            self.weight = mx.ones(size)

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, self.get("weight"), self.eps)  # accumulates in float32


class Rope:
    """Cosines [T, 1, 1, D / 2] and sines [T, 1, 2, D / 2] for one kind of layer, the sines of the head's first half negative."""

    def __init__(self, layer: LayerConfig) -> None:
        self.frequencies = mx.array(layer.rope.inverse_frequencies(layer.head_dim), dtype=mx.float32)

    def tables(self, positions: mx.array, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """At positions float32 [T]. Angles, cosines and sines are computed in float32."""
        angles = mx.outer(positions, self.frequencies)[:, None, None]
        sines = mx.sin(angles).astype(dtype)
        return mx.cos(angles).astype(dtype), mx.concatenate([-sines, sines], axis=2)


class Joined(nn.Module):
    """Several linear maps of the same input, as one product. Its outputs stand one after another.

    Maps of different kinds or formats stay apart.
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        first = parts[0]
        arrays = [{name: array for name, array in part.items() if isinstance(array, mx.array)} for part in parts]
        types = [{name: array.dtype for name, array in held.items()} for held in arrays]
        forms = [(type(part), getattr(part, "format", None), held) for part, held in zip(parts, types, strict=True)]
        self.parts = list(parts)
        if all(form == forms[0] for form in forms):
            first.update({name: mx.concatenate([held[name] for held in arrays]) for name in arrays[0]})
            self.parts = [first]

    def __call__(self, x: mx.array) -> mx.array:
        outputs = [part(x) for part in self.parts]
        return mx.concatenate(outputs, axis=-1) if len(outputs) > 1 else outputs[0]


class Attention(nn.Module):
    """Grouped-query attention with normalized queries, keys and values, and scale 1. Full layers use the keys as values."""

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__()
        self.head_dim, self.reach = layer.head_dim, config.image_reach(layer)
        self.queries, self.shared = config.num_attention_heads, layer.num_key_value_heads
        queries, keys = config.num_attention_heads * layer.head_dim, layer.num_key_value_heads * layer.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False) if layer.is_sliding else None
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(layer.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(layer.head_dim, config.rms_norm_eps)
        self.v_norm = RMSNorm(layer.head_dim, config.rms_norm_eps, weighted=False)

    def join(self) -> None:
        """Join the projections, and the weights of the norms."""
        parts = [self.q_proj, self.k_proj] if self.v_proj is None else [self.q_proj, self.k_proj, self.v_proj]
        self.qkv_proj = Joined(parts)
        rotated = [(self.q_norm.weight, self.queries), (self.k_norm.weight, self.shared)]
        weights = [mx.broadcast_to(weight, (heads, self.head_dim)) for weight, heads in rotated]
        if self.v_proj is not None:
            weights.append(mx.ones((self.shared, self.head_dim), weights[0].dtype))
        halves = mx.concatenate(weights).reshape(-1, 2, self.head_dim // 2)
        self._head_weights = halves, mx.contiguous(halves[:, ::-1])
        self._is_value = (mx.arange(len(halves)) >= self.queries + self.shared)[:, None, None]
        mx.eval(self._head_weights, self._is_value)
        del self.q_proj, self.k_proj, self.v_proj, self.q_norm, self.k_norm

    def __call__(
        self, x: mx.array, rope: tuple[mx.array, mx.array], texts: Sequence[Text], *, causal: bool, last: bool = False
    ) -> mx.array:
        """Attention of x [T, H], or of each text's last position alone."""
        heads = self.v_norm(self.qkv_proj(x).reshape(len(x), -1, self.head_dim))  # queries, keys and values [T, heads, D]
        halves = heads.reshape(*heads.shape[:2], 2, -1)
        ready = fused.rotate(halves, halves[:, :, ::-1], *self._head_weights, *rope, self._is_value).reshape(heads.shape)
        queries, entries = ready[:, : self.queries], ready[:, self.queries :]
        if entries.shape[1] == self.shared:
            entries = mx.concatenate([entries, heads[:, self.queries :]], axis=1)  # the keys, not rotated, are the values
        mixed = []
        for text in texts:
            span, seen = (slice(text.span.stop - 1, text.span.stop), text.ending()) if last else (text.span, text)
            mixed.append(self._attend(queries[span], entries[text.span], seen, causal=causal))
        return self.o_proj((mx.concatenate(mixed) if len(mixed) > 1 else mixed[0]).flatten(1))

    def _attend(self, queries: mx.array, entries: mx.array, text: Text, *, causal: bool) -> mx.array:
        """One text, or several rows: queries [T, heads, D] over the cache and over their own keys and values [T, 2 K, D]."""
        queries, entries = (x.reshape(text.rows, -1, *x.shape[1:]).swapaxes(1, 2) for x in (queries, entries))
        if causal:
            seen = text.cache.append(entries)  # [B, K, S, D] twice
            mixed = attention.causal(queries, *seen, text.cache.room.window, text.images, self.reach, text.masks)
        else:
            mixed = attention.bidirectional(queries, *text.cache.extended(entries))
        return mixed.swapaxes(1, 2).flatten(0, 1)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def join(self) -> None:
        """Join the two maps of the input."""
        self.gate_up_proj = Joined([self.gate_proj, self.up_proj])
        del self.gate_proj, self.up_proj

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(fused.geglu(*mx.split(self.gate_up_proj(x), 2, axis=-1)))


class Router(nn.Module):
    """Chooses the experts of a token, and their weights. Its input is the residual, normalized and scaled by :class:`Layer`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k = config.top_k_experts
        self.proj = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.scale = mx.ones(config.hidden_size)
        self.per_expert_scale = mx.ones(config.num_experts)

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        return kernels.route(self.proj(x), self.per_expert_scale, self.top_k)


class ExpertLinear(nn.Module):
    """One linear map per expert, weight [E, out, in]."""

    def __init__(self, num_experts: int, input_size: int, output_size: int) -> None:
        super().__init__()
        self.weight = mx.zeros((num_experts, output_size, input_size))

    def __call__(self, x: mx.array, experts: mx.array) -> mx.array:
        """Send row m of x [M, 1, in] through expert ``experts[m]``. Rows are sorted by expert."""
        return mx.gather_mm(x, self.weight.swapaxes(1, 2), rhs_indices=experts, sorted_indices=True)


class Experts(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up_proj = ExpertLinear(config.num_experts, config.hidden_size, 2 * config.moe_intermediate_size)
        self.down_proj = ExpertLinear(config.num_experts, config.moe_intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array, experts: mx.array, weights: mx.array) -> mx.array:
        """Send each token of x [T, H] through its experts [T, K], and sum the results weighted by ``weights`` [T, K]."""
        pairs = experts.flatten()
        order = mx.argsort(pairs)  # T * K (token, expert) pairs, by expert
        chosen = pairs[order]
        gate, up = mx.split(self.gate_up_proj(x[order // experts.shape[1]][:, None], chosen), 2, axis=-1)
        y = self.down_proj(fused.geglu(gate, up), chosen).squeeze(1)
        return kernels.combine(y, _inverse(order), weights)


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
        self.layer_scalar = mx.ones(1)
        self.encoder_layer_scalar = mx.ones(1)

    def join(self) -> None:
        """Join what has the same input: the projections, and the weights of the three norms after the attention."""
        self.self_attn.join()
        self.mlp.join()
        norms = self.pre_feedforward_layernorm, self.pre_feedforward_layernorm_2
        self._eps = norms[0].eps
        weights = mx.stack([*(norm.weight for norm in norms), self.router.scale])
        self._inputs = weights[:, None], mx.array([1.0, 1.0, weights.shape[-1] ** -0.5], weights.dtype)[:, None, None]
        mx.eval(self._inputs)
        del self.pre_feedforward_layernorm, self.pre_feedforward_layernorm_2, self.router.scale

    def __call__(
        self, x: mx.array, rope: tuple[mx.array, mx.array], texts: Sequence[Text], *, causal: bool, last: bool = False
    ) -> mx.array:
        """The states after the layer, of all positions [T, H] or of each text's last one."""
        attended = self.self_attn(self.input_layernorm(x), rope, texts, causal=causal, last=last)
        x = mx.concatenate([x[text.span][-1:] for text in texts]) if last else x
        x = x + self.post_attention_layernorm(attended)
        inputs = fused.three_inputs(mx.fast.rms_norm(x, None, self._eps), *self._inputs)
        dense, sparse, routed = (part.squeeze(0) for part in mx.split(inputs, 3))
        dense = self.post_feedforward_layernorm_1(self.mlp(dense))
        sparse = self.post_feedforward_layernorm_2(self.experts(sparse, *self.router(routed)))
        scalar = self.encoder_layer_scalar if causal else self.layer_scalar
        return fused.scaled_sum(x, self.post_feedforward_layernorm(dense + sparse), scalar)


class SelfConditioning(nn.Module):
    """Adds the previous step's probabilities to the canvas, as soft embeddings; zeros in a block's first step."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.pre_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, weighted=False)
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def __call__(self, embeddings: mx.array, soft_embeddings: mx.array) -> mx.array:
        signal = self.pre_norm(soft_embeddings)
        return self.post_norm(embeddings + self.down_proj(fused.geglu(self.gate_proj(signal), self.up_proj(signal))))


class TextModel(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config)
        self.self_conditioning = SelfConditioning(config)
        self.layers = [Layer(config, layer) for layer in config.layers]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._ropes = {layer.layer_type: Rope(layer) for layer in config.layers}

    def join(self) -> Iterator[dict[str, Any]]:
        """Join weights that are multiplied by the same input, layer by layer. To be exhausted once, after the weights are loaded.

        Yields the weights of each layer; evaluated before the next one, little is held twice.
        """
        for layer in self.layers:
            layer.join()
            yield layer.parameters()

    def encode(
        self, tokens: mx.array, segments: Sequence[Segment], trace: list[mx.array] | None = None, *, last: bool = False
    ) -> mx.array:
        """Hidden states [T, H] of tokens [T]. Each token sees those before it in its text. Appends to the caches.

        With ``last``, only those of the texts' last tokens [texts, H], which is all that the next token needs of the last layer.
        """
        x = self.embed(tokens)
        for segment in segments:
            for start, features in segment.images:
                begin = segment.start + start
                x[begin : begin + len(features)] = features
        x = self._run(x, segments, trace, causal=True, last=last)
        for index, (start, stop, cache, _) in enumerate(segments):
            states = (x[index : index + 1] if last else x[start:stop]).reshape(cache.rows, -1, x.shape[1])
            cache.length += (stop - start) // cache.rows
            cache.last = mx.contiguous(states[:, -1])  # a view would keep the whole array alive
        return x

    def denoise(
        self,
        canvases: mx.array,
        segments: Sequence[Segment],
        soft_embeddings: mx.array | None = None,
        trace: list[mx.array] | None = None,
    ) -> mx.array:
        """Hidden states [T, H] of canvases [T]. Each canvas sees its cache and all of itself."""
        embeddings = self.embed(canvases)
        signal = mx.zeros_like(embeddings) if soft_embeddings is None else soft_embeddings
        return self._run(self.self_conditioning(embeddings, signal), segments, trace, causal=False)

    def _run(
        self, x: mx.array, segments: Sequence[Segment], trace: list[mx.array] | None, *, causal: bool, last: bool = False
    ) -> mx.array:
        positions = mx.concatenate([_positions(segment) for segment in segments])
        ropes = {kind: rope.tables(positions, x.dtype) for kind, rope in self._ropes.items()}
        images = [[(start, start + features.shape[-2]) for start, features in segment.images] for segment in segments]
        masks: list[attention.Masks] = [{} for _ in segments]
        states = [x]
        for index, (layer, shape) in enumerate(zip(self.layers, self.config.layers, strict=True)):
            texts = [
                Text(slice(start, stop), cache.rows, cache.layers[index], spans, shared)
                for (start, stop, cache, _), spans, shared in zip(segments, images, masks, strict=True)
            ]
            x = layer(x, ropes[shape.layer_type], texts, causal=causal, last=last and index + 1 == len(self.layers))
            if trace is not None:
                states.append(x)
        x = self.norm(x)
        if trace is not None:
            trace.extend([*states, x])
        return x

    def embed(self, tokens: mx.array) -> mx.array:
        return self._scaled(self.embed_tokens(tokens))

    def soft_embeddings(self, probabilities: mx.array) -> mx.array:
        """The mean embeddings [T, H] under probabilities [T, V]."""
        return self._scaled(self.embed_tokens.weighted_rows(probabilities))

    def _scaled(self, rows: mx.array) -> mx.array:
        # The factor is rounded to the weights' type, as it was in training: sqrt(2816) = 53.07 is 53.0 in bfloat16.
        return rows * mx.array(math.sqrt(self.config.hidden_size), dtype=rows.dtype)

    def head(self, hidden: mx.array) -> mx.array:
        """Logits float32 [.., V] after the softcap, c * tanh(logits / c)."""
        cap = self.config.final_logit_softcapping
        return mx.tanh(self.embed_tokens.as_linear(hidden).astype(mx.float32) / cap) * cap


def _inverse(order: mx.array) -> mx.array:
    """Where each of 0 .. n - 1 stands in ``order``. To sort more than 2,048 takes Metal many kernels."""
    if len(order) <= 2048:
        return mx.argsort(order)
    return mx.put_along_axis(order, order, mx.arange(len(order), dtype=order.dtype), axis=0)


def _positions(segment: Segment) -> mx.array:
    """Positions float32 [stop - start] of a segment's tokens in their text."""
    begin, rows = len(segment.cache), segment.cache.rows
    return mx.tile(mx.arange(begin, begin + (segment.stop - segment.start) // rows, dtype=mx.float32), rows)

"""DiffusionGemma's vision tower in MLX: from the patches of an image to soft tokens, which stand for embeddings in a text.

Several images of one size go through together. Attribute names are the checkpoint's. The PyTorch twin of this file has the same
classes in the same order. B images, P patches of an image, n soft tokens, H hidden size of the tower, D head size.
"""

import mlx.core as mx
from mlx import nn

from mlx_diffgemma.backends.mlx import attention, fused
from mlx_diffgemma.backends.mlx.model import RMSNorm
from mlx_diffgemma.config import ModelConfig, RopeConfig
from mlx_diffgemma.vision_config import VisionConfig


class Projection(nn.Module):
    """A matrix under the name ``linear``, where other models of the family clip its input and output."""

    def __init__(self, input_size: int, output_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(input_size, output_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear(x)


class Rope:
    """Cosines and sines [P, 1, 2, D/2]: the first half of a head turns by the patch's column, the second by its row.

    In each half, the pairs are split-half.
    """

    def __init__(self, config: VisionConfig) -> None:
        frequencies = RopeConfig("default", config.rope_theta).inverse_frequencies(config.head_dim // 2)
        self.frequencies = mx.array(frequencies, dtype=mx.float32)

    def tables(self, places: mx.array, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """At (column, row) int32 [P, 2]. Angles, cosines and sines are computed in float32."""
        angles = mx.tile(places[..., None].astype(mx.float32) * self.frequencies, (1, 1, 2))[:, None]
        return mx.cos(angles).astype(dtype), mx.sin(angles).astype(dtype)


class Attention(nn.Module):
    """Attention of all patches to each other, with normalized queries, keys and values, and scale 1."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = Projection(config.hidden_size, queries)
        self.k_proj = Projection(config.hidden_size, keys)
        self.v_proj = Projection(config.hidden_size, keys)
        self.o_proj = Projection(queries, config.hidden_size)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.v_norm = RMSNorm(config.head_dim, config.rms_norm_eps, weighted=False)

    def __call__(self, x: mx.array, rope: tuple[mx.array, mx.array]) -> mx.array:
        queries = self._rotated(self.q_norm(self._heads(self.q_proj(x))), rope)  # [B, P, heads, D]
        keys = self._rotated(self.k_norm(self._heads(self.k_proj(x))), rope)
        values = self.v_norm(self._heads(self.v_proj(x)))
        mixed = attention.bidirectional(*(each.swapaxes(1, 2) for each in (queries, keys, values)))
        return self.o_proj(mixed.swapaxes(1, 2).flatten(2))

    def _heads(self, x: mx.array) -> mx.array:
        return x.reshape(*x.shape[:-1], -1, self.head_dim)  # [B, P, heads, D]

    def _rotated(self, x: mx.array, rope: tuple[mx.array, mx.array]) -> mx.array:
        cos, sin = rope
        halves = x.reshape(*x.shape[:-1], 2, -1)
        first, second = mx.split(halves, 2, axis=-1)
        return (halves * cos + mx.concatenate([-second, first], axis=-1) * sin).flatten(-2)


class MLP(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.gate_proj = Projection(config.hidden_size, config.intermediate_size)
        self.up_proj = Projection(config.hidden_size, config.intermediate_size)
        self.down_proj = Projection(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(fused.geglu(self.gate_proj(x), self.up_proj(x)))


class Layer(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(size, eps)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.pre_feedforward_layernorm = RMSNorm(size, eps)
        self.post_feedforward_layernorm = RMSNorm(size, eps)

    def __call__(self, x: mx.array, rope: tuple[mx.array, mx.array]) -> mx.array:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), rope))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Encoder(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = [Layer(config) for _ in range(config.num_hidden_layers)]
        self._rope = Rope(config)

    def __call__(self, x: mx.array, places: mx.array, trace: list[mx.array] | None = None) -> mx.array:
        rope = self._rope.tables(places, x.dtype)
        for layer in self.layers:
            x = layer(x, rope)
            mx.eval(x)  # lazy evaluation would hold what several layers computed
            if trace is not None:
                trace.append(x)
        return x


class PatchEmbedder(nn.Module):
    """Projects the numbers of a patch, and adds an embedding of its column and one of its row."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.input_proj = nn.Linear(3 * config.patch_size**2, config.hidden_size, bias=False)
        self.position_embedding_table = mx.zeros((2, config.position_embedding_size, config.hidden_size))

    def __call__(self, pixels: mx.array, places: mx.array) -> mx.array:
        columns, rows = self.position_embedding_table
        scaled = (2 * (pixels - 0.5)).astype(columns.dtype)  # from -1 to 1
        return self.input_proj(scaled) + (columns[places[:, 0]] + rows[places[:, 1]])


class VisionTower(nn.Module):
    """From patches to one vector [H] for each square of them."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.side = config.pooling_kernel_size
        self.patch_embedder = PatchEmbedder(config)
        self.encoder = Encoder(config)
        self.std_bias = mx.zeros(config.hidden_size) if config.standardize else None
        self.std_scale = mx.zeros(config.hidden_size) if config.standardize else None

    def __call__(self, pixels: mx.array, places: mx.array, rows: int, trace: list[mx.array] | None = None) -> mx.array:
        embedded = self.patch_embedder(pixels, places)
        if trace is not None:
            trace.append(embedded)
        x = self.encoder(embedded, places, trace)  # [B, P, H]
        squares = x.astype(mx.float32).reshape(len(x), rows // self.side, self.side, -1, self.side, x.shape[-1])
        pooled = squares.mean(axis=(2, 4)).flatten(1, 2) * x.shape[-1] ** 0.5  # [B, n, H]
        if self.std_bias is not None and self.std_scale is not None:
            pooled = (pooled - self.std_bias.astype(mx.float32)) * self.std_scale.astype(mx.float32)
        if trace is not None:
            trace.append(pooled)
        return pooled.astype(x.dtype)


class Embedder(nn.Module):
    """Projects what the tower saw into the text model's embeddings, which take no scale."""

    def __init__(self, config: VisionConfig, hidden_size: int) -> None:
        super().__init__()
        self.embedding_projection = nn.Linear(config.hidden_size, hidden_size, bias=False)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, weighted=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.embedding_projection(self.norm(x))


class VisionModel(nn.Module):
    """The tower and the projection. ``config.vision`` must be there."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.vision is not None
        self.vision_tower = VisionTower(config.vision)
        self.embed_vision = Embedder(config.vision, config.hidden_size)

    def __call__(self, pixels: mx.array, places: mx.array, rows: int, trace: list[mx.array] | None = None) -> mx.array:
        """Soft tokens [B, n, hidden size of the text model] of images of one size.

        Args:
            pixels: float32 [B, P, patch_size * patch_size * 3], from 0 to 1, row by row.
            places: int32 [P, 2], the (column, row) of each patch.
            rows: how many rows of patches an image has.
            trace: receives the states of the tower: [B, P, H] after the patch embedding and after each layer, and [B, n, H] after
                the pooling.
        """
        return self.embed_vision(self.vision_tower(pixels, places, rows, trace))

"""DiffusionGemma's vision tower in PyTorch: from the patches of an image to soft tokens, which stand for embeddings in a text.

Several images of one size go through together. Attribute names are the checkpoint's. The MLX twin of this file has the same
classes in the same order. B images, P patches of an image, n soft tokens, H hidden size of the tower, D head size.
"""

import torch
from torch import Tensor, nn

from mlx_diffgemma.backends.torch import attention, fused
from mlx_diffgemma.backends.torch.model import RMSNorm
from mlx_diffgemma.config import ModelConfig, RopeConfig
from mlx_diffgemma.vision_config import VisionConfig


class Projection(nn.Module):
    """A matrix under the name ``linear``, where other models of the family clip its input and output."""

    def __init__(self, input_size: int, output_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(input_size, output_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Rope:
    """Cosines and sines [P, 1, 2, D/2]: the first half of a head turns by the patch's column, the second by its row.

    In each half, the pairs are split-half.
    """

    def __init__(self, config: VisionConfig) -> None:
        frequencies = RopeConfig("default", config.rope_theta).inverse_frequencies(config.head_dim // 2)
        self.frequencies = torch.tensor(frequencies, dtype=torch.float32, device="cpu")

    def tables(self, places: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """At (column, row) int64 [P, 2]. Angles, cosines and sines are computed in float32."""
        angles = (places[..., None].float() * self.frequencies.to(places.device)).repeat(1, 1, 2)[:, None]
        return angles.cos().to(dtype), angles.sin().to(dtype)


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

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        queries = self._rotated(self.q_norm(self._heads(self.q_proj(x))), rope)  # [B, P, heads, D]
        keys = self._rotated(self.k_norm(self._heads(self.k_proj(x))), rope)
        values = self.v_norm(self._heads(self.v_proj(x)))
        mixed = attention.bidirectional(*(each.transpose(1, 2) for each in (queries, keys, values)))
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))  # [B, P, heads, D]

    def _rotated(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        return fused.rotate(x.unflatten(-1, (2, -1)), *rope).flatten(-2)


class MLP(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.gate_proj = Projection(config.hidden_size, config.intermediate_size)
        self.up_proj = Projection(config.hidden_size, config.intermediate_size)
        self.down_proj = Projection(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
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

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), rope))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Encoder(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.rope = Rope(config)

    def forward(self, x: Tensor, places: Tensor, trace: list[Tensor] | None = None) -> Tensor:
        rope = self.rope.tables(places, x.dtype)
        for layer in self.layers:
            x = layer(x, rope)
            if trace is not None:
                trace.append(x)
        return x


class PatchEmbedder(nn.Module):
    """Projects the numbers of a patch, and adds an embedding of its column and one of its row."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.input_proj = nn.Linear(3 * config.patch_size**2, config.hidden_size, bias=False)
        self.position_embedding_table = nn.Parameter(torch.empty(2, config.position_embedding_size, config.hidden_size))

    def forward(self, pixels: Tensor, places: Tensor) -> Tensor:
        columns, rows = self.position_embedding_table
        scaled = (2 * (pixels - 0.5)).to(columns.dtype)  # from -1 to 1
        return self.input_proj(scaled) + (columns[places[:, 0]] + rows[places[:, 1]])


class VisionTower(nn.Module):
    """From patches to one vector [H] for each square of them."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.side = config.pooling_kernel_size
        self.patch_embedder = PatchEmbedder(config)
        self.encoder = Encoder(config)
        self.std_bias = nn.Parameter(torch.empty(config.hidden_size)) if config.standardize else None
        self.std_scale = nn.Parameter(torch.empty(config.hidden_size)) if config.standardize else None

    def forward(self, pixels: Tensor, places: Tensor, rows: int, trace: list[Tensor] | None = None) -> Tensor:
        embedded = self.patch_embedder(pixels, places)
        if trace is not None:
            trace.append(embedded)
        x = self.encoder(embedded, places, trace)  # [B, P, H]
        squares = x.float().unflatten(1, (rows // self.side, self.side, -1, self.side))
        pooled = squares.mean(dim=(2, 4)).flatten(1, 2) * x.shape[-1] ** 0.5  # [B, n, H]
        if self.std_bias is not None and self.std_scale is not None:
            pooled = (pooled - self.std_bias.float()) * self.std_scale.float()
        if trace is not None:
            trace.append(pooled)
        return pooled.to(x.dtype)


class Embedder(nn.Module):
    """Projects what the tower saw into the text model's embeddings, which take no scale."""

    def __init__(self, config: VisionConfig, hidden_size: int) -> None:
        super().__init__()
        self.embedding_projection = nn.Linear(config.hidden_size, hidden_size, bias=False)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, weighted=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.embedding_projection(self.norm(x))


class VisionModel(nn.Module):
    """The tower and the projection. ``config.vision`` must be there."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.vision is not None
        self.vision_tower = VisionTower(config.vision)
        self.embed_vision = Embedder(config.vision, config.hidden_size)

    def forward(self, pixels: Tensor, places: Tensor, rows: int, trace: list[Tensor] | None = None) -> Tensor:
        """Soft tokens [B, n, hidden size of the text model] of images of one size.

        Args:
            pixels: float32 [B, P, patch_size * patch_size * 3], from 0 to 1, row by row.
            places: int64 [P, 2], the (column, row) of each patch.
            rows: how many rows of patches an image has.
            trace: receives the states of the tower: [B, P, H] after the patch embedding and after each layer, and [B, n, H] after
                the pooling.
        """
        return self.embed_vision(self.vision_tower(pixels, places, rows, trace))

"""A checkpoint with the released model's attention, and caches that are filled without encoding."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_diffgemma.backends import Backend, Cache
from mlx_diffgemma.config import FULL, SLIDING
from support.reference import make_checkpoint

WINDOW, CONTEXT = 1024, 262_144

#: 16 heads; 8 key-value heads of 256 on the sliding layer, 2 of 512 on the full one. The rest of the model is tiny.
SHAPE: dict[str, Any] = {
    "canvas_length": 256,
    "text_config": {
        "layer_types": [SLIDING, FULL],
        "num_hidden_layers": 2,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "num_global_key_value_heads": 2,
        "global_head_dim": 512,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
        "max_position_embeddings": CONTEXT,
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 128,
        "sliding_window": WINDOW,
        "rope_parameters": {
            FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
            SLIDING: {"rope_type": "default", "rope_theta": 1e4},
        },
    },
}


def make_long_checkpoint(folder: Path) -> Path:
    return make_checkpoint(folder, SHAPE)


def filled(backend: Backend, length: int, seed: int = 0) -> Cache:
    """A cache of ``length`` positions of random keys and values, as if they had been encoded in pieces of 4,096."""
    cache: Any = backend.new_cache()
    random = np.random.default_rng(seed)
    for start in range(0, length, 4096):
        count = min(4096, length - start)
        for layer, shape in zip(cache.layers, backend.config.layers, strict=True):
            drawn = random.standard_normal((2, 1, shape.num_key_value_heads, count, shape.head_dim), np.float32) * 0.3
            layer.append(*entries_of(backend.name, *(array_of(backend.name, each) for each in drawn)))
        cache.length += count
    cache.last = array_of(backend.name, np.zeros((1, backend.config.hidden_size), np.float32))
    evaluate(backend, cache)
    return cache


def array_of(backend_name: str, array: NDArray[np.float32]) -> Any:
    """Convert an array to a backend's framework."""
    if backend_name == "torch":
        import torch

        return torch.from_numpy(array)
    import mlx.core as mx

    return mx.array(array)


def entries_of(backend_name: str, keys: Any, values: Any) -> tuple[Any, ...]:
    """Keys and values [B, K, N, D] as a layer's cache of this backend takes them. MLX's takes both in one array."""
    if backend_name == "torch":
        return keys, values
    import mlx.core as mx

    return (mx.concatenate([keys, values], axis=1),)


def evaluate(backend: Backend, cache: Any) -> None:
    if backend.name == "mlx":
        import mlx.core as mx

        mx.eval(cache.arrays())

"""The tensors of the released checkpoint and of its 4-bit conversion on the hub, from the tables in ``data``."""

from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[1] / "data"
LAYERS, FULL_LAYERS = 30, (5, 11, 17, 23, 29)


def stored_tensors(table: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """Stored name -> (shape, safetensors dtype) from ``weights.tsv`` or ``weights_mlx_4bit.tsv``, a line per kind of tensor."""
    tensors = {}
    for line in (DATA / table).read_text().splitlines()[2:-1]:
        pattern, shape, dtype, count, _, layers = line.split("\t")
        sizes = tuple(map(int, shape.strip("[]").split(",")))
        if layers.startswith("sliding"):
            indices = [layer for layer in range(LAYERS) if layer not in FULL_LAYERS]
        elif layers.startswith("full"):
            indices = list(FULL_LAYERS)
        else:
            indices = list(range(int(count)))
        tensors.update({pattern.replace("{N}", str(index)): (sizes, dtype) for index in indices})
    return tensors


def total_bytes(table: str) -> int:
    """Bytes of all tensors, from the table's last line."""
    return int((DATA / table).read_text().splitlines()[-1].split("\t")[4])


def config() -> dict[str, Any]:
    """The part of the released ``config.json`` that defines the text model."""
    return {
        "model_type": "diffusion_gemma",
        "canvas_length": 256,
        "text_config": {
            "vocab_size": 262144,
            "hidden_size": 2816,
            "intermediate_size": 2112,
            "moe_intermediate_size": 704,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "num_global_key_value_heads": 2,
            "head_dim": 256,
            "global_head_dim": 512,
            "num_experts": 128,
            "top_k_experts": 8,
            "rms_norm_eps": 1e-6,
            "sliding_window": 1024,
            "max_position_embeddings": 262144,
            "num_hidden_layers": LAYERS,
            "layer_types": ["full_attention" if layer in FULL_LAYERS else "sliding_attention" for layer in range(LAYERS)],
            "rope_parameters": {
                "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    }

"""Writes random checkpoints of several sizes in the hub's layout, for benchmarks. Weights are drawn tensor by tensor.

python benchmarks/checkpoints.py mid FOLDER
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPES = {
    # name: hidden, layers, experts, top k, vocabulary, canvas, heads, (kv heads, head) sliding and full, window, context
    "mid": (768, 8, 32, 4, 65_536, 256, 8, (4, 128), (2, 256), 1024, 8192),
    "small": (256, 6, 16, 4, 8_192, 128, 4, (2, 64), (1, 128), 256, 8192),
    "2GB": (1024, 16, 32, 4, 65_536, 256, 8, (4, 128), (2, 256), 1024, 8192),
    "long": (128, 2, 4, 2, 512, 256, 16, (8, 256), (2, 512), 1024, 262_144),
}

#: The smallest vision tower, for programs that need one.
SMALL_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 8,
    "position_embedding_size": 32,
    "pooling_kernel_size": 1,
    "patch_size": 4,
}


def config(shape: str) -> dict:
    """A config.json in the hub's layout. The intermediate sizes are 3/4 and 1/4 of the hidden size, as in the real model."""
    hidden, layers, experts, top_k, vocabulary, canvas, heads, sliding, full, window, context = SHAPES[shape]
    kinds = ["full_attention" if layer % 6 == 5 or layer == layers - 1 else "sliding_attention" for layer in range(layers)]
    text = {
        "model_type": "diffusion_gemma_text",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden // 4,
        "moe_intermediate_size": hidden // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": sliding[0],
        "num_global_key_value_heads": full[0],
        "head_dim": sliding[1],
        "global_head_dim": full[1],
        "num_experts": experts,
        "top_k_experts": top_k,
        "sliding_window": window,
        "layer_types": kinds,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-6,
        "final_logit_softcapping": 30.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "use_bidirectional_attention": "vision",
        "rope_parameters": {
            "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    }
    return {
        "model_type": "diffusion_gemma",
        "canvas_length": canvas,
        "text_config": text,
        "vision_config": {"model_type": "gemma4_vision", **SMALL_VISION},
    }


def tensors(model: dict) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of the text model in float32. Norms are near 1, projections keep a token's scale, logits deviate by about 6."""
    text = model["text_config"]
    hidden, inner, moe = text["hidden_size"], text["intermediate_size"], text["moe_intermediate_size"]
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=draw) * scale / shape[-1] ** 0.5

    def near_one(size: int) -> torch.Tensor:
        return 1 + 0.1 * torch.randn(size, generator=draw)

    # A normed hidden state has length sqrt(hidden). Logits deviate by 6 if the table's rows deviate by 6 / sqrt(hidden).
    yield "model.decoder.embed_tokens.weight", normal(text["vocab_size"], hidden, scale=6.0)
    yield "model.decoder.norm.weight", torch.ones(hidden)
    block = "model.decoder.self_conditioning."
    yield block + "pre_norm.weight", near_one(hidden)
    yield block + "gate_proj.weight", normal(inner, hidden)
    yield block + "up_proj.weight", normal(inner, hidden)
    yield block + "down_proj.weight", normal(hidden, inner)
    for index, kind in enumerate(text["layer_types"]):
        layer = f"model.decoder.layers.{index}."
        full = kind == "full_attention"
        head = text["global_head_dim"] if full else text["head_dim"]
        keys = head * (text["num_global_key_value_heads"] if full else text["num_key_value_heads"])
        queries = head * text["num_attention_heads"]
        yield layer + "self_attn.q_proj.weight", normal(queries, hidden)
        yield layer + "self_attn.k_proj.weight", normal(keys, hidden)
        if not full:
            yield layer + "self_attn.v_proj.weight", normal(keys, hidden)
        yield layer + "self_attn.o_proj.weight", normal(hidden, queries)
        # Attention has scale 1, so the norms of queries and keys must bound its scores.
        yield layer + "self_attn.q_norm.weight", near_one(head) * head**-0.25
        yield layer + "self_attn.k_norm.weight", near_one(head) * head**-0.25
        yield layer + "mlp.gate_proj.weight", normal(inner, hidden)
        yield layer + "mlp.up_proj.weight", normal(inner, hidden)
        yield layer + "mlp.down_proj.weight", normal(hidden, inner)
        yield layer + "experts.gate_up_proj", normal(text["num_experts"], 2 * moe, hidden)
        yield layer + "experts.down_proj", normal(text["num_experts"], hidden, moe)
        yield layer + "router.proj.weight", normal(text["num_experts"], hidden, scale=hidden**0.5)
        yield layer + "router.scale", near_one(hidden)
        yield layer + "router.per_expert_scale", near_one(text["num_experts"])
        for norm in (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm_1",
            "pre_feedforward_layernorm_2",
            "post_feedforward_layernorm_2",
            "post_feedforward_layernorm",
        ):
            yield layer + norm + ".weight", near_one(hidden)
        yield layer + "layer_scalar", torch.full((1,), 0.9)
        yield f"model.encoder.language_model.layers.{index}.layer_scalar", torch.full((1,), 0.8)


def write(folder: Path, shape: str, dtype: torch.dtype = torch.float32, shard_bytes: int = 2**29) -> Path:
    """Write the checkpoint in shards of about ``shard_bytes``. An existing checkpoint is kept."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    model, weight_map, shard, size, total = config(shape), {}, {}, 0, 0

    def flush() -> None:
        nonlocal shard, size
        name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard, size = {}, 0

    for name, tensor in tensors(model):
        shard[name] = tensor.to(dtype)
        size, total = size + shard[name].nbytes, total + shard[name].nbytes
        if size >= shard_bytes:
            flush()
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1], "pad_token_id": 0}))
    (folder / "config.json").write_text(json.dumps(model, indent=1))
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    write(arguments.folder, arguments.shape, getattr(torch, arguments.dtype))

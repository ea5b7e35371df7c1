"""Checkpoints for tests of the code around the model: tiny ones that can chat, and the hub's with headers only."""

import json
import shutil
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from support.real_layout import DATA, stored_tensors
from support.reference import make_checkpoint
from support.tiny_tokenizer import write_tokenizer

ITEMSIZE = {"BF16": 2, "U32": 4}

#: The hub's checkpoints: the folder of their JSON in ``data`` -> the table of their tensors.
HUB = {"hub_bf16": "weights.tsv", "hub_4bit": "weights_mlx_4bit.tsv"}

VOCAB_SIZE, CANVAS, CONTEXT = 512, 8, 512

#: Two layers, with the vocabulary of the tokenizer.
CHAT_SHAPE: dict[str, Any] = {
    "canvas_length": CANVAS,
    "text_config": {
        "layer_types": ["sliding_attention", "full_attention"],
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "num_global_key_value_heads": 1,
        "global_head_dim": 32,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
        "max_position_embeddings": CONTEXT,
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "sliding_window": 8,
    },
}


#: The same with a vision tower, whose pictures have the released model's patches of 16 and squares of 3 x 3.
SEEING_SHAPE = {
    **CHAT_SHAPE,
    "text_config": {
        **CHAT_SHAPE["text_config"],  # type: ignore[dict-item]
        "use_bidirectional_attention": "vision",
        "max_position_embeddings": 4096,
    },
    "vision_config": {
        "model_type": "gemma4_vision",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "global_head_dim": 8,
        "position_embedding_size": 3 * 1120,
        "pooling_kernel_size": 3,
        "patch_size": 16,
    },
}


def make_chat_checkpoint(folder: Path, shape: Mapping[str, Any] = CHAT_SHAPE) -> Path:
    """A model of random weights with a tokenizer. It writes quickly, and its text is nonsense that may hold any byte.

    ``shape`` is :data:`CHAT_SHAPE`, or :data:`SEEING_SHAPE` for a model that reads images.
    """
    make_checkpoint(folder, shape, logit_std=6.0)
    write_tokenizer(folder, VOCAB_SIZE)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    edit_json(folder / "config.json", image_token_id=vocabulary["<|image|>"])
    edit_json(folder / "generation_config.json", max_new_tokens=20, max_denoising_steps=4)
    return folder


def edit_json(file: Path, **changes: Any) -> None:
    """Set keys of the JSON object in a file. Keys set to None are removed."""
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def make_hub_layout(folder: Path, layout: str) -> Path:
    """A checkpoint of :data:`HUB`: its JSON, and one safetensors file with the right header and a sparse hole for the data."""
    shutil.copytree(DATA / layout, folder)
    header: dict[str, Any] = {}
    end = 0
    for name, (shape, dtype) in stored_tensors(HUB[layout]).items():
        start, end = end, end + prod(shape) * ITEMSIZE[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + end)
    return folder

"""The tiny DiffusionGemma: its configuration in the hub's layout, its initial weights, and the checkpoint's files."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from vocabulary import BOS, END_OF_TURN, EOS, PAD

from mlx_diffgemma.backends.torch.model import TextModel
from mlx_diffgemma.backends.torch.vision import VisionModel
from mlx_diffgemma.checkpoint import is_vision
from mlx_diffgemma.config import FULL, SLIDING, ModelConfig


def hub_config(
    vocab_size: int, canvas_length: int, sliding_window: int, *, hidden_size: int = 64, layers: str = "SSSF"
) -> dict[str, Any]:
    """``config.json`` of a tiny model in the hub's layout, with the special tokens of :mod:`vocabulary`.

    Args:
        layers: one letter per layer, S for sliding and F for full attention. `transformers` needs full attention in the last.
    """
    text = {
        "model_type": "diffusion_gemma_text",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": BOS,
        "dtype": "bfloat16",
        "eos_token_id": EOS,
        "final_logit_softcapping": 30.0,
        "global_head_dim": 32,
        "head_dim": 16,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": 2 * hidden_size,
        "layer_types": [SLIDING if letter == "S" else FULL for letter in layers],
        "max_position_embeddings": 1024,
        "moe_intermediate_size": hidden_size,
        "num_attention_heads": 4,
        "num_experts": 4,
        "num_global_key_value_heads": 2,
        "num_hidden_layers": len(layers),
        "num_key_value_heads": 4,
        "pad_token_id": PAD,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            FULL: {"partial_rotary_factor": 0.5, "rope_theta": 1000.0, "rope_type": "proportional"},
            SLIDING: {"rope_theta": 100.0, "rope_type": "default"},
        },
        "sliding_window": sliding_window,
        "tie_word_embeddings": True,
        "top_k_experts": 2,
        "use_bidirectional_attention": "vision",
        "vocab_size": vocab_size,
    }
    return {
        "architectures": ["DiffusionGemmaForBlockDiffusion"],
        "canvas_length": canvas_length,
        "dtype": "bfloat16",
        "eos_token_id": [EOS, END_OF_TURN],
        "initializer_range": 0.02,
        "model_type": "diffusion_gemma",
        "text_config": text,
        "tie_word_embeddings": True,
        "vision_config": _VISION,
    }


#: `transformers` always builds a vision tower, so this is the smallest possible one.
_VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "global_head_dim": 16,
    "position_embedding_size": 16,
    "pooling_kernel_size": 1,
    "patch_size": 4,
    "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
}


def new_model(config: ModelConfig, seed: int) -> TextModel:
    """A model with random weights. Embeddings, logits and attention scores start with a variance near 1."""
    model = TextModel(config)
    _randomize(model, torch.Generator().manual_seed(seed))
    return model


def new_vision(config: ModelConfig, seed: int) -> VisionModel:
    """The vision tower of ``config.vision`` and its projection, with random weights as in :func:`new_model`."""
    vision = VisionModel(config)
    _randomize(vision, torch.Generator().manual_seed(seed))
    return vision


@torch.no_grad()
def _randomize(model: nn.Module, generator: torch.Generator) -> None:
    for name, weight in model.named_parameters():
        if name.endswith("router.proj.weight"):
            weight.normal_(generator=generator)  # the router divides its input by the square root of its size
        elif name.endswith("position_embedding_table"):
            weight.normal_(std=0.5, generator=generator)  # as large as what a patch adds to it
        elif weight.ndim > 1:
            weight.normal_(std=weight.shape[-1] ** -0.5, generator=generator)
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            weight.fill_(weight.shape[0] ** -0.25)  # attention has no other scale
        elif name.endswith(("std_bias", "std_scale")):
            weight.fill_(float(name.endswith("scale")))


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: matrices with weight decay, norms and scales without."""
    parameters = list(parameters)
    return [
        {"params": [weight for weight in parameters if weight.ndim > 1], "weight_decay": weight_decay},
        {"params": [weight for weight in parameters if weight.ndim <= 1], "weight_decay": 0.0},
    ]


def stored_name(name: str) -> str:
    """The hub's name of a tensor of the graph. The inverse of :func:`mlx_diffgemma.checkpoint.graph_name`."""
    if is_vision(name):
        return "model.encoder." + name
    if name.endswith("encoder_layer_scalar"):
        return "model.encoder.language_model." + name.replace("encoder_layer_scalar", "layer_scalar")
    if ".experts." in name:
        name = name.removesuffix(".weight")
    return f"model.decoder.{name}"


def write_checkpoint(folder: Path, parts: Sequence[nn.Module], config: Mapping[str, Any], generation: Mapping[str, Any]) -> None:
    """Write the weights (BF16) and configurations in the hub's layout: a complete checkpoint except for the tokenizer.

    Args:
        parts: the text model, and the vision tower if there is one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    named = {name: weight for part in parts for name, weight in part.state_dict().items()}
    weights = {stored_name(name): weight.detach().to("cpu", torch.bfloat16) for name, weight in named.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

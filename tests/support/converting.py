"""Helpers for the converter's tests: a small source checkpoint, the command, and assertions about its errors."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from click.testing import CliRunner, Result

from mlx_diffgemma.cli.convert import convert
from mlx_diffgemma.errors import DiffGemmaError
from support.reference import make_checkpoint

#: Large enough for groups of 128 everywhere except in the experts' down_proj, whose rows have 64 weights.
SHAPE = {
    "canvas_length": 8,
    "text_config": {
        "vocab_size": 256,
        "hidden_size": 128,
        "intermediate_size": 128,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_global_key_value_heads": 1,
        "global_head_dim": 64,
        "num_experts": 4,
        "top_k_experts": 2,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "max_position_embeddings": 512,
    },
}

#: One layer. Its experts and the embedding are each read in several pieces of PIECE_BYTES, and the last piece is not full.
LARGE = {
    "canvas_length": 8,
    "text_config": {
        **SHAPE["text_config"],  # type: ignore[dict-item]
        "vocab_size": 40_000,
        "num_hidden_layers": 1,
        "num_experts": 300,
        "layer_types": ["full_attention"],
    },
}


def make_source(folder: Path, shape: Mapping[str, Any] = SHAPE) -> Path:
    """A BF16 checkpoint as transformers saves it, with tokenizer files and one file that does not belong to a model."""
    make_checkpoint(folder, shape, bfloat16=True)
    for name in ("tokenizer.json", "chat_template.jinja", "processor_config.json", "training_log.json"):
        (folder / name).write_text(f"the content of {name}")
    return folder


def run(source: Path, target: Path, *options: str) -> Result:
    """Run the command in this process."""
    return CliRunner().invoke(convert, [str(source), str(target), *options])


def converted(source: Path, target: Path, *options: str) -> Path:
    """Run the command, assert that it succeeds, and return ``target``."""
    result = run(source, target, *options)
    assert result.exit_code == 0, result.output
    return target


def refused(result: Result, kind: type[DiffGemmaError], message: str) -> None:
    """Assert that the command ended with this error, in one line."""
    assert type(result.exception) is kind, f"{result.exception!r}; expected {kind.__name__}"
    print(result.exception)
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def copy_with(
    source: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = lambda tensors: tensors
) -> Path:
    """A copy of a checkpoint with its tensors changed."""
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = change(safetensors.torch.load_file(source / "model.safetensors"))
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    return folder

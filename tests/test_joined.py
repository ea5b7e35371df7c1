"""PyTorch's products of the same input in one: as on a GPU, here on the CPU."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_diffgemma.backends import Backend, Piece, Row, load_backend
from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.convert import Plan, make_recipe, side_files, write
from support.comparing import assert_close


def answers(backend: Backend) -> list[np.ndarray]:
    """Logits of a prompt and of a canvas after it."""
    cache, tokens = backend.new_cache(), np.arange(20, dtype=np.int32) % backend.config.vocab_size
    prompt = backend.logits([Piece(tokens, cache)])
    return [*prompt, *backend.logits([Row(tokens, cache, 0.7)])]


@pytest.mark.parametrize("form", ["plain", "packed", "of two formats"])
def test_joined_products_are_those_of_the_parts(form: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open("sudoku")
    if form != "plain":
        plan = Plan.make(checkpoint, make_recipe("4bit"))
        write(plan, tmp_path / "packed", side_files(checkpoint, plan))
        checkpoint = Checkpoint.open(tmp_path / "packed")
    backend: Any = load_backend(checkpoint, "torch", device="cpu", dtype="float32")
    if form == "of two formats":  # queries with wider scales than keys and values
        for layer in backend.model.layers:
            layer.self_attn.q_proj.scales = layer.self_attn.q_proj.scales.float()
    apart = answers(backend)
    backend.model.join()
    assert {len(layer.self_attn.qkv_proj.parts) == 1 for layer in backend.model.layers} == {form != "of two formats"}
    assert not hasattr(backend.model.layers[0].mlp, "up_proj")
    for one, other in zip(answers(backend), apart, strict=True):
        assert_close(one, other, 2e-5, "logits")

"""The summary of a checkpoint, against known facts about the released ones."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from mlx_diffgemma.backends import Piece, Row, load_backend
from mlx_diffgemma.backends.memory import LOGITS_AT_ONCE
from mlx_diffgemma.checkpoint import NORMS, PARTS, Checkpoint, graph_name, part_of
from mlx_diffgemma.cli import main
from mlx_diffgemma.convert import Plan, make_recipe
from mlx_diffgemma.errors import CheckpointError, InputError
from mlx_diffgemma.reports.summary import Images, summarize
from support.checkpoints import HUB, make_hub_layout
from support.pictures import random_picture
from support.real_layout import stored_tensors, total_bytes

#: Billions of parameters of the released model, and of all stored tensors, counted from its headers.
BILLIONS = {
    "experts": 22.838,
    "attention": 1.110,
    "embedding": 0.738,
    "mlp": 0.535,
    "vision": 0.573,
    "self_conditioning": 0.018,
    "router": 0.011,
    "norms and scales": 0.001,
}
STORED = 25_823_781_228


def info(folder: Path, *arguments: str) -> str:
    """What the command prints."""
    result = CliRunner().invoke(main, ["info", str(folder), *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folders = {layout: make_hub_layout(tmp_path_factory.mktemp("hub") / layout, layout) for layout in HUB}
    return folders.__getitem__


@pytest.mark.parametrize("layout", HUB)
def test_parameters_and_bytes_of_the_hub(hub: Callable[[str], Path], layout: str) -> None:
    checkpoint = Checkpoint.open(hub(layout))
    assert len(checkpoint.tensors) + len(checkpoint.vision) == len(stored_tensors(HUB[layout]))
    summary = summarize(checkpoint)
    assert {part.name: round(part.parameters / 1e9, 3) for part in summary.parts} == BILLIONS
    assert summary.parameters == STORED
    assert summary.nbytes == total_bytes(HUB[layout]) == {"hub_bf16": 51_647_562_456, "hub_4bit": 16_542_844_632}[layout]
    # "A4B": a token does not use 15 of 16 experts.
    assert summary.active_parameters == STORED - summary.parts[PARTS.index("vision")].parameters - 22_837_985_280 * 15 // 16
    assert round(summary.active_parameters / 1e9, 1) == 3.8


def test_formats_of_the_4bit_checkpoint(hub: Callable[[str], Path]) -> None:
    parts = {part.name: part for part in summarize(Checkpoint.open(hub("hub_4bit"))).parts}
    four, eight = "affine 4-bit, groups of 64", "affine 8-bit, groups of 64"
    assert {name: part.format for name, part in parts.items()} == {
        "experts": four,
        "embedding": eight,
        "attention": eight,
        "mlp": eight,
        "router": eight,
        "self_conditioning": four,
        "vision": f"BF16; {four}",
        "norms and scales": "BF16",
    }
    # Scale and bias, in BF16, for every 64 weights.
    assert parts["experts"].bits_per_weight == 4 + 32 / 64
    assert parts["attention"].bits_per_weight == 8 + 32 / 64
    assert parts["norms and scales"].bits_per_weight == 16


def test_memory(hub: Callable[[str], Path]) -> None:
    def memory(layout: str, dtype: str, context: int) -> Any:
        return summarize(Checkpoint.open(hub(layout)), context).memory[dtype]

    plain = memory("hub_bf16", "bfloat16", 10_000)
    assert plain.weights == total_bytes(HUB["hub_bf16"])
    assert memory("hub_bf16", "float32", 10_000).weights == 2 * plain.weights
    # Keys and values in BF16: 5 full layers of 2 heads of 512, 25 sliding ones of 8 heads of 256 in windows of 1,024.
    assert plain.cache_per_token == 2 * 2 * 5 * 2 * 512
    assert plain.cache_windows == 2 * 2 * 25 * 8 * 256 * 1023
    # With room for a canvas, and for a quarter more (full layers) or another canvas (sliding layers), rounded up to a multiple
    # of 32. A window begins at a multiple of the canvas's length: for 10,000 positions at 8,960.
    capacities = {10_000: (12_832, 1_568), 1023: (1_600, 1_536), 1: (352, 544)}
    for context, (full, sliding) in capacities.items():
        expected = full * plain.cache_per_token + sliding * 2 * 2 * 25 * 8 * 256
        assert memory("hub_bf16", "bfloat16", context).cache == expected
        assert memory("hub_bf16", "float32", context).cache == 2 * expected
    assert plain.workspace == LOGITS_AT_ONCE * 256 * 262_144 * 4
    assert plain.total == plain.weights + plain.cache + plain.workspace

    packed, wide = (memory("hub_4bit", dtype, 10_000) for dtype in ("bfloat16", "float32"))
    unpacked = {"norms and scales": 703_292, "vision tower": 569_550_384}
    assert 0 < wide.weights - packed.weights == 2 * sum(unpacked.values()), "what is packed stays as it is; the rest is widened"


def test_images(hub: Callable[[str], Path]) -> None:
    for layout, projection in (("hub_bf16", "BF16"), ("hub_4bit", "affine 4-bit, groups of 64")):
        folder = hub(layout)
        images = summarize(Checkpoint.open(folder)).images
        features = {"float32": 280 * 2816 * 4, "bfloat16": 280 * 2816 * 2}
        assert images == Images(27, 280, (70, 140, 280, 560, 1120), projection, features)
        shown = info(folder)
        assert "images        up to 280 tokens each; with --image-tokens 70, 140, 280, 560 or 1,120\n" in shown
        assert f"vision tower  27 layers; projection {projection}\n" in shown
        assert re.search(r"\nfeatures of an image of 280 tokens +3,153,920 +1,576,960\n", shown)
        assert json.loads(info(folder, "--json"))["images"]["projection"] == projection


def test_a_checkpoint_without_a_tower(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint("pictures"), tmp_path / "text"))
    tensors = load_file(folder / "model.safetensors")
    save_file({name: each for name, each in tensors.items() if "vision" not in name}, folder / "model.safetensors")
    assert summarize(Checkpoint.open(folder)).images is None
    shown = info(folder)
    assert re.search(r"\nimages +not read, because there is no vision tower\n", shown)
    assert "projection" not in shown
    assert "features" not in shown
    assert json.loads(info(folder, "--json"))["images"] is None


def test_a_tower_without_its_projection(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint("pictures"), tmp_path / "damaged"))
    tensors = load_file(folder / "model.safetensors")
    save_file({name: each for name, each in tensors.items() if "embed_vision" not in name}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"the weights of embed_vision\.embedding_projection are missing; fetch them again"):
        summarize(Checkpoint.open(folder))


def test_features_take_what_is_shown(checkpoint: Callable[..., Path], backend: Callable[..., Any], backend_name: str) -> None:
    ours, images = backend(backend_name, "pictures"), summarize(Checkpoint.open(checkpoint("pictures"))).images
    assert images is not None
    [features] = ours.see([random_picture(ours.config.vision, 14, 20)])
    assert (len(features), features.nbytes) == (images.soft_tokens, images.nbytes["float32"])


def test_context_outside_the_model(hub: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint.open(hub("hub_bf16"))
    assert summarize(checkpoint, 262_144).context == 262_144
    for context in (0, -1, 262_145):
        with pytest.raises(InputError, match=f"context must be from 1 to the model's 262144 tokens, got {context}"):
            summarize(checkpoint, context)


def test_parts_are_those_of_a_conversion(hub: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint.open(hub("hub_bf16"))
    *rows, _ = Plan.make(checkpoint, make_recipe("bf16")).rows()
    ours = {(part.name, part.parameters) for part in summarize(checkpoint).parts}
    assert ours == {(row.part, row.weights) for row in rows}


def test_every_tensor_has_a_part() -> None:
    expected = {
        "layers.3.experts.down_proj.scales": "experts",
        "embed_tokens.weight": "embedding",
        "layers.29.self_attn.q_proj.biases": "attention",
        "layers.29.self_attn.q_norm.weight": "norms and scales",
        "layers.0.mlp.up_proj.weight": "mlp",
        "layers.0.router.proj.scales": "router",
        "layers.0.router.scale": "norms and scales",
        "layers.0.router.per_expert_scale": "norms and scales",
        "layers.0.encoder_layer_scalar": "norms and scales",
        "self_conditioning.pre_norm.weight": "norms and scales",
        "self_conditioning.up_proj.weight": "self_conditioning",
        "norm.weight": "norms and scales",
        "vision_tower.std_bias": "vision",
        "vision_tower.encoder.layers.3.self_attn.q_norm.weight": "vision",
        "vision_tower.encoder.layers.3.mlp.up_proj.linear.weight": "vision",
        "embed_vision.embedding_projection.scales": "vision",
    }
    assert {name: part_of(name) for name in expected} == expected
    names = {graph_name(name) for table in HUB.values() for name in stored_tensors(table)}
    assert {part_of(name) for name in names} == {*PARTS, NORMS}


def test_memory_is_what_a_backend_holds(checkpoint: Callable[..., Path], backend_name: str) -> None:
    opened = Checkpoint.open(checkpoint("base"))
    summary = summarize(opened, 20)
    for dtype in ("bfloat16", "float32"):
        if (backend_name, dtype) == ("mlx", "bfloat16") and load_backend(opened, "mlx").device == "cpu":
            continue  # refused there
        backend: Any = load_backend(opened, backend_name, dtype=dtype)
        held = _weight_bytes(backend.model) + _weight_bytes(backend.vision)
        expected = summary.memory[dtype].weights
        print(f"{backend_name} holds {held} bytes of weights in {dtype}, and {expected} are announced")
        assert held == expected or (backend_name == "mlx" and expected <= held < 1.02 * expected)  # norms repeated for each head


@pytest.mark.parametrize("length", [5, 20, 300])
def test_memory_is_what_a_cache_holds(
    checkpoint: Callable[..., Path], backend: Callable[..., Any], backend_name: str, length: int
) -> None:
    opened, ours = Checkpoint.open(checkpoint("base")), backend(backend_name, "base")
    expected = summarize(opened, length).memory["float32"].cache
    cache, tokens = ours.new_cache(), np.arange(length, dtype=np.int32) % opened.config.vocab_size
    row = Row(np.zeros(opened.config.canvas_length, np.int32), cache, 1.0)
    ours.encode([Piece(tokens, cache)])
    ours.denoise([row])
    assert 0 < cache.nbytes <= expected, "room that was made for less may do"
    ours.encode([Piece(tokens[:1], cache.fork())])  # takes the room, so the next canvas needs new room
    ours.denoise([row])
    assert cache.nbytes == expected, f"{backend_name} holds {cache.nbytes} bytes for {length} positions"


def _weight_bytes(model: Any) -> int:
    if hasattr(model, "state_dict"):
        return sum(tensor.nbytes for tensor in model.state_dict().values())
    from mlx.utils import tree_flatten

    tables = [table for _, module in model.named_modules() for name, table in module.items() if name.startswith("_")]
    arrays = [array for _, array in tree_flatten([model.parameters(), tables]) if hasattr(array, "nbytes")]
    return sum(array.nbytes for array in arrays)

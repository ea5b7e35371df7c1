"""The vision tower of both backends against `transformers`, in float32 on small random towers."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from mlx_diffgemma.backends import KEY_TILE, Backend, load_backend
from mlx_diffgemma.checkpoint import Checkpoint, Quantization
from mlx_diffgemma.errors import BackendError, InputError
from mlx_diffgemma.vision.patches import Patches
from support.checkpoints import edit_json
from support.comparing import assert_close
from support.packed import arguments, as_torch, unpack
from support.pictures import random_picture
from support.reference import PICTURE_SHAPES, Reference, make_checkpoint

#: Soft tokens are of a few units, up to 12.
ATOL = 2e-5

Load = Callable[..., Backend]
Folder = Callable[..., Path]
PROJECTION = "model.encoder.embed_vision.embedding_projection"


def seen(backend: Backend, *pictures: Patches) -> list[NDArray[np.float32]]:
    return [np.array(each.tolist(), np.float32) for each in backend.see(pictures)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("shape", PICTURE_SHAPES)
def test_soft_tokens(backend: Load, reference: Callable[..., Reference], backend_name: str, shape: str) -> None:
    ours, oracle = backend(backend_name, shape), reference(shape)
    assert ours.config.vision is not None
    for seed, (rows, columns) in enumerate([(1, 1), (1, 6), (6, 1), (3, 5), (5, 3), (7, 7)]):
        picture = random_picture(ours.config.vision, rows, columns, seed)
        assert_close(seen(ours, picture)[0], oracle.features(picture), ATOL, f"{backend_name}, {shape}, {rows} x {columns}")


def test_columns_and_rows_are_not_confused(backend: Load, backend_name: str) -> None:
    """The same patches in other places. The tables and the rotation tell columns from rows."""
    ours = backend(backend_name, "pictures")
    assert ours.config.vision is not None
    plain = random_picture(ours.config.vision, 1, 1)
    turned = replace(plain, pixels=plain.pixels.reshape(3, 3, -1).swapaxes(0, 1).reshape(plain.pixels.shape))
    assert np.abs(np.subtract(*seen(ours, plain, turned))).max() > 0.1


def test_more_patches_than_keys_at_once(backend: Load, reference: Callable[..., Reference], backend_name: str) -> None:
    ours, oracle = backend(backend_name, "small_squares"), reference("small_squares")
    assert ours.config.vision is not None
    picture = random_picture(ours.config.vision, 29, 37)
    assert len(picture.pixels) > KEY_TILE
    assert_close(seen(ours, picture)[0], oracle.features(picture), ATOL, f"{backend_name}, {len(picture.pixels)} patches")


def test_memory_of_a_large_picture(backend: Load, backend_name: str) -> None:
    """All scores at once would take 10,000^2 * 4 bytes for each head."""
    ours = backend(backend_name, "small_squares")
    assert ours.config.vision is not None
    picture = random_picture(ours.config.vision, 39, 40)
    every = 4 * len(picture.pixels) ** 2
    if backend_name == "mlx":
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        ours.see([picture])
        most = mx.get_peak_memory() - before
    else:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            ours.see([picture])
        most = max(event.self_cpu_memory_usage for event in profile.events())
    print(f"{backend_name}: {most / 1e6:.1f} MB for {len(picture.pixels)} patches, whose scores are {every / 1e6:.1f} MB")
    assert most < every / 3


def test_the_widths_of_the_released_tower(tmp_path: Path, backend_name: str) -> None:
    tower = {
        **PICTURE_SHAPES["pictures"]["vision_config"],
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 1,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 72,
        "patch_size": 16,
        "position_embedding_size": 64,
    }
    folder = make_checkpoint(tmp_path, {**PICTURE_SHAPES["pictures"], "vision_config": tower})
    ours = load_backend(Checkpoint.open(folder), backend_name)
    assert ours.config.vision is not None
    picture = random_picture(ours.config.vision, 2, 3)
    assert_close(seen(ours, picture)[0], Reference(folder).features(picture), ATOL, f"{backend_name}, 54 patches")


def test_several_pictures_are_what_each_is(backend: Load, backend_name: str) -> None:
    ours: Any = backend(backend_name, "large_patches")
    pictures = [random_picture(ours.config.vision, *size, seed=seed) for seed, size in enumerate([(2, 3), (1, 1), (2, 3)])]
    together = seen(ours, *pictures)
    for picture, features in zip(pictures, together, strict=True):
        assert_close(features, seen(ours, picture)[0], 0.0, f"{backend_name}, {picture.soft_tokens} soft tokens")
    assert [len(each) for each in ours.see(pictures)] == [6, 1, 6]
    assert ours.see(pictures)[0].nbytes == together[0].nbytes
    # The model takes pictures of one size together, for training.
    pixels, places = np.stack([pictures[0].values, pictures[2].values]), pictures[0].positions
    given = (mx.array(pixels), mx.array(places)) if backend_name == "mlx" else (torch.tensor(pixels), torch.tensor(places).long())
    both = np.array(ours.vision(*given, pictures[0].rows).tolist())
    assert_close(both, np.stack([together[0], together[2]]), ATOL, f"{backend_name}, two at once")


@pytest.mark.parametrize("spelling", ["default", "axial"])
def test_both_spellings_of_the_rope(checkpoint: Folder, tmp_path: Path, backend_name: str, spelling: str) -> None:
    """`transformers` wrote "default" before it wrote "axial"; the hub has the older one."""
    folder = Path(shutil.copytree(checkpoint("large_patches"), tmp_path / "model"))
    vision = json.loads((folder / "config.json").read_text())["vision_config"]
    edit_json(folder / "config.json", vision_config={**vision, "rope_parameters": {"rope_type": spelling, "rope_theta": 9.0}})
    ours = load_backend(Checkpoint.open(folder), backend_name)
    assert ours.config.vision is not None
    picture = random_picture(ours.config.vision, 4, 3)
    assert_close(seen(ours, picture)[0], Reference(folder).features(picture), ATOL, f"{backend_name}, {spelling}")


@pytest.mark.parametrize("quantization", [Quantization(64, 4), Quantization(32, 8), Quantization(32, 4, "mxfp4")], ids=str)
def test_a_quantized_projection(tmp_path: Path, backend_name: str, quantization: Quantization) -> None:
    """mlx-community's checkpoints pack the projection and nothing else of the tower."""
    shape = PICTURE_SHAPES["pictures"]
    shape = {**shape, "vision_config": {**shape["vision_config"], "hidden_size": 64}}
    packed, plain = (make_checkpoint(tmp_path / name, shape) for name in ("packed", "plain"))
    tensors = load_file(plain / "model.safetensors")
    weight = mx.array(tensors.pop(f"{PROJECTION}.weight").numpy()).astype(mx.bfloat16)
    arrays = dict(zip(("weight", "scales", "biases"), mx.quantize(weight, **arguments(quantization)), strict=False))
    words = {f"{PROJECTION}.{name}": as_torch(array) for name, array in arrays.items()}
    save_file({**tensors, **words}, packed / "model.safetensors")
    save_file({**tensors, f"{PROJECTION}.weight": as_torch(unpack(quantization, **arrays))}, plain / "model.safetensors")
    edit_json(packed / "config.json", quantization=arguments(quantization))
    checkpoint = Checkpoint.open(packed)
    assert checkpoint.quantization == {"embed_vision.embedding_projection": quantization}
    ours = load_backend(checkpoint, backend_name)
    assert ours.config.vision is not None
    picture = random_picture(ours.config.vision, 2, 4)
    assert_close(seen(ours, picture)[0], Reference(plain).features(picture), ATOL, f"{backend_name}, {quantization}")


def test_bfloat16_is_near_float32(backend: Load, backend_name: str) -> None:
    if backend_name == "mlx" and backend("mlx", "pictures").device == "cpu":
        with pytest.raises(BackendError, match="in float32 only"):
            backend("mlx", "pictures", "bfloat16", bfloat16=True)
        return
    full, half = (backend(backend_name, "pictures", dtype, bfloat16=True) for dtype in ("float32", "bfloat16"))
    assert full.config.vision is not None
    picture = random_picture(full.config.vision, 5, 4)
    [expected], [found] = seen(full, picture), seen(half, picture)
    error = np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2))
    print(f"{backend_name}: bfloat16 differs by {error:.1e} of the size")
    assert 1e-4 < error < 2e-2


# --- bad input ---


def test_a_checkpoint_without_a_tower_sees_nothing(checkpoint: Folder, tmp_path: Path, backend_name: str) -> None:
    folder = Path(shutil.copytree(checkpoint("pictures"), tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    save_file({name: each for name, each in tensors.items() if "vision" not in name}, folder / "model.safetensors")
    with_tower, without = (load_backend(Checkpoint.open(each), backend_name) for each in (checkpoint("pictures"), folder))
    assert with_tower.config.vision is not None
    assert without.config.vision is None
    with pytest.raises(InputError, match="this checkpoint has no vision tower and reads no images"):
        without.see([random_picture(with_tower.config.vision, 1, 1)])
    assert without.see([]) == []


def test_patches_that_do_not_fit(backend: Load, backend_name: str) -> None:
    ours = backend(backend_name, "pictures")
    assert ours.config.vision is not None
    sound = random_picture(ours.config.vision, 2, 3)
    wrong = {
        "do not fit the model": [
            replace(sound, pixels=sound.pixels[:-1]),
            replace(sound, pixels=sound.pixels[:, :-1]),
            replace(sound, rows=27, columns=2),
            replace(sound, pixels=sound.pixels[:0], rows=0, columns=3, soft_tokens=0),
            replace(sound, pixels=sound.pixels[:18], rows=2, columns=9, soft_tokens=2),
        ],
        "is larger than the model's 200 along a side": [random_picture(ours.config.vision, 1, 67)],
        "make 6 soft tokens, not 7": [replace(sound, soft_tokens=7)],
    }
    for message, pictures in wrong.items():
        for picture in pictures:
            with pytest.raises(InputError, match=message):
                ours.see([sound, picture])

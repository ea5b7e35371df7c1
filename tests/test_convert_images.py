"""Conversion of checkpoints that read images: the vision tower goes through unchanged, and the result reads images."""

import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from mlx_diffgemma.backends import Backend, Piece, Row, load_backend
from mlx_diffgemma.checkpoint import Checkpoint, Quantization
from mlx_diffgemma.convert import RECIPES
from mlx_diffgemma.errors import CheckpointError, InputError
from mlx_diffgemma.reports.summary import summarize
from support.checkpoints import edit_json
from support.comparing import assert_close
from support.converting import SHAPE, converted, copy_with, make_source, refused, run
from support.packed import as_torch, unpack
from support.pictures import Placed, piece_with, random_picture, random_text
from support.reference import Reference, tower

#: Its projection has rows of 64 weights, so that mlx-community's format fits.
SEEING = {
    **SHAPE,
    "text_config": {**SHAPE["text_config"], "use_bidirectional_attention": "vision"},  # type: ignore[dict-item]
    "vision_config": tower(64, 2, heads=(4, 4, 16), pooling=3, position_embedding_size=60, standardize=True),
    "image_token_id": 255,
}
PROJECTION = "model.encoder.embed_vision.embedding_projection"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("bf16"), SEEING)


@pytest.fixture(scope="module")
def four_bits(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(source, tmp_path_factory.mktemp("converted") / "4bit")


def images_of(backend: Backend) -> Placed:
    assert backend.config.vision is not None
    return [(4, random_picture(backend.config.vision, 2, 5)), (20, random_picture(backend.config.vision, 3, 1, seed=1))]


def computed(backend: Backend) -> dict[str, NDArray[np.float32]]:
    """The soft tokens of an image, and the logits of a text with images and of a canvas after it."""
    images = images_of(backend)
    piece = piece_with(backend, random_text(backend, 30, images), images)
    [causal] = backend.logits([piece])
    [canvas] = backend.logits([Row(random_text(backend, 8, seed=1), piece.cache, 1.0)])
    return {"soft tokens": backend.vision_states(images[0][1])[1][-1], "causal pass": causal, "canvas": canvas}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_tower_goes_through_unchanged(source: Path, tmp_path: Path, recipe: str) -> None:
    folder = converted(source, tmp_path / "out", "--recipe", recipe)
    before, after = load_file(source / "model.safetensors"), load_file(folder / "model.safetensors")
    names = [name for name in before if "vision" in name]
    assert len(names) == len(Checkpoint.open(source).vision) > 20
    for name in names:
        assert after[name].dtype == before[name].dtype
        assert after[name].equal(before[name]), name
    assert Checkpoint.open(folder).config == Checkpoint.open(source).config
    assert not [module for module in Checkpoint.open(folder).quantization if "vision" in module]


@pytest.mark.parametrize("recipe", ["4bit", "bf16"])
def test_what_is_not_quantized_is_computed_to_the_bit(source: Path, tmp_path: Path, backend_name: str, recipe: str) -> None:
    """The same weights, in the same products."""
    folder = converted(source, tmp_path / "out", "--recipe", recipe)
    theirs, ours = (computed(load_backend(Checkpoint.open(each), backend_name, dtype="float32")) for each in (source, folder))
    for name in ("soft tokens",) if recipe == "4bit" else theirs:
        assert_close(ours[name], theirs[name], 0.0, f"{backend_name}, {recipe}, {name}")
    if recipe == "4bit":
        assert np.abs(ours["causal pass"] - theirs["causal pass"]).max() > 0.1, "nothing was quantized"


def pack_projection(folder: Path, target: Path) -> Path:
    """A copy in mlx-community's layout: the projection has the global format, 4 bits in groups of 64."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    weight = mx.array(tensors.pop(f"{PROJECTION}.weight").float().numpy()).astype(mx.bfloat16)
    packed = mx.quantize(weight, group_size=64, bits=4)
    words = {f"{PROJECTION}.{name}": as_torch(array) for name, array in zip(("weight", "scales", "biases"), packed, strict=True)}
    save_file({**tensors, **words}, target / "model.safetensors")
    (target / "model.safetensors.index.json").unlink()  # it names the tensors that were there
    return target


def unpack_all(folder: Path, target: Path) -> Path:
    """A copy with the values that the packed weights stand for, which `transformers` reads."""
    shutil.copytree(folder, target)
    (target / "model.safetensors.index.json").unlink(missing_ok=True)
    arrays = dict(mx.load(str(target / "model.safetensors")))
    checkpoint, tensors = Checkpoint.open(target), {}
    for name, tensor in checkpoint.stored.items():
        module, _, part = name.rpartition(".")
        if module not in checkpoint.quantization:
            tensors[tensor.name] = as_torch(arrays[tensor.name].astype(mx.float32))
        elif part == "weight":
            path = tensor.name.removesuffix(".weight")
            packed = {each: arrays[f"{path}.{each}"] for each in ("weight", "scales", "biases")}
            stored = path if path.endswith(("gate_up_proj", "experts.down_proj")) else tensor.name
            tensors[stored] = as_torch(unpack(checkpoint.quantization[module], **packed))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    edit_json(target / "config.json", quantization=None, quantization_config=None, dtype="float32")
    return target


@pytest.mark.parametrize("layout", ["ours", "mlx-community"])
def test_a_converted_checkpoint_reads_images(four_bits: Path, tmp_path: Path, backend_name: str, layout: str) -> None:
    folder = four_bits if layout == "ours" else pack_projection(four_bits, tmp_path / "packed")
    checkpoint = Checkpoint.open(folder)
    projection = checkpoint.quantization.get("embed_vision.embedding_projection")
    assert projection == (None if layout == "ours" else Quantization(64, 4))
    ours, oracle = load_backend(checkpoint, backend_name, dtype="float32"), Reference(unpack_all(folder, tmp_path / "plain"))
    images, found = images_of(ours), computed(ours)
    tokens, canvas = random_text(ours, 30, images), random_text(ours, 8, seed=1)
    expected = {
        "soft tokens": oracle.features(images[0][1]),
        "causal pass": oracle.picture_logits(tokens, images, "makers"),
        "canvas": oracle.picture_logits(tokens, images, "makers", canvas),
    }
    for name, values in expected.items():
        assert_close(found[name], values, 1e-4, f"{backend_name}, {layout}, {name}")


def test_formats_that_are_shown(four_bits: Path, tmp_path: Path) -> None:
    packed = pack_projection(four_bits, tmp_path / "packed")
    for folder, vision, projection in (
        (four_bits, "BF16", "BF16"),
        (packed, "BF16; affine 4-bit, groups of 64", "affine 4-bit, groups of 64"),
    ):
        summary = summarize(Checkpoint.open(folder))
        assert {part.name: part.format for part in summary.parts}["vision"] == vision
        assert summary.images is not None
        assert summary.images.projection == projection
    refused(run(packed, tmp_path / "out"), CheckpointError, "already quantized")


def test_the_plan_names_the_tower(source: Path, four_bits: Path, tmp_path: Path) -> None:
    tensors = Checkpoint.open(source).vision.values()
    count, size = len(tensors), sum(tensor.nbytes for tensor in tensors)
    result = run(source, tmp_path / "out", "--dry-run", "--set", "vision=bf16")
    assert result.exit_code == 0, result.output
    assert ["vision", "BF16", str(count), f"{size:,}", "16.00"] in [line.split() for line in result.stdout.splitlines()]
    assert f"| vision | BF16 | {count} | {size:,} | 16.00 |\n" in (four_bits / "README.md").read_text()

    text_only = copy_with(source, tmp_path / "text", lambda tensors: {n: t for n, t in tensors.items() if "vision" not in n})
    result = run(text_only, tmp_path / "out", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "vision" not in result.stdout


@pytest.mark.parametrize("form", ["8", "4:32", "mxfp4"])
def test_the_tower_cannot_be_quantized(source: Path, tmp_path: Path, form: str) -> None:
    message = "the vision tower stays in BF16, because no group of 32 or more divides its rows of 4,304 weights; use vision=bf16"
    refused(run(source, tmp_path / "out", "--set", f"vision={form}"), InputError, message)


def test_a_converted_text_continues_after_an_image(four_bits: Path, backend_name: str) -> None:
    """A piece after the image, and the next token."""
    ours = load_backend(Checkpoint.open(four_bits), backend_name, dtype="float32")
    images = images_of(ours)
    tokens = random_text(ours, 40, images)
    whole = piece_with(ours, tokens, images)
    [expected] = ours.logits([whole])
    first = piece_with(ours, tokens[:30], images)
    ours.encode([first])
    [after] = ours.logits([Piece(tokens[30:], first.cache)])
    assert_close(after, expected[30:], 1e-5, f"{backend_name}, after the image")

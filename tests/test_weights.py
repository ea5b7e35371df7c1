"""Weights are checked as data: types, numbers, copies of tied tensors, and the files and index around them."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mlx_diffgemma import CheckpointError, load
from mlx_diffgemma.backends import load_backend
from mlx_diffgemma.checkpoint import LARGEST, Checkpoint
from mlx_diffgemma.weights import Tensor, same_bytes
from support.checkpoints import edit_json, make_chat_checkpoint
from support.converting import converted, make_source

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, NORM = "model.decoder.embed_tokens.weight", "model.decoder.norm.weight"
UP = "model.decoder.layers.0.mlp.up_proj.weight"
TOWER = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")
TABLE = "model.encoder.vision_tower.patch_embedder.position_embedding_table"
PROJECTION = "model.encoder.embed_vision.embedding_projection.weight"

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_checkpoint(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a checkpoint whose experts are packed in a mode."""
    folder = tmp_path_factory.mktemp("packed")
    source = make_source(folder / "source")

    def make(mode: str) -> Path:
        target = folder / mode
        return target if target.exists() else converted(source, target, f"--set=experts={mode}")

    return make


@pytest.fixture
def folder(chat: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint that the test may damage."""
    return Path(shutil.copytree(chat, tmp_path / "model"))


def weight_file(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


def change(folder: Path, edit: Callable[[Tensors], Any]) -> None:
    file = weight_file(folder)
    tensors = load_file(file)
    edit(tensors)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, file)


def refusal(folder: Path, backend: str) -> str:
    with pytest.raises(CheckpointError) as error:
        load_backend(Checkpoint.open(folder), backend, device="cpu")
    print(error.value)
    assert str(error.value).isprintable()
    return str(error.value)


# --- types ---


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.int32, torch.int8, torch.uint8, torch.int64, torch.bool, torch.uint32, torch.float8_e4m3fn]
)
def test_types_that_are_no_weights(folder: Path, backend_name: str, dtype: torch.dtype) -> None:
    change(folder, lambda tensors: tensors.update({UP: tensors[UP].to(dtype)}))
    name = {torch.float64: "F64", torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3"}.get(dtype)
    name = name or str(dtype).removeprefix("torch.").upper().replace("INT", "I").replace("UI", "U")
    assert f"of the wrong type: {UP} is {name}, not F32 or BF16 or F16" in refusal(folder, backend_name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types_of_weights(folder: Path, backend_name: str, dtype: torch.dtype) -> None:
    change(folder, lambda tensors: tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()}))
    assert load(folder, backend=backend_name, device="cpu").generate("Hi", seed=0).tokens


@pytest.mark.parametrize(
    ("mode", "part", "dtype", "expected"),
    [
        *((mode, "weight", torch.int32, "U32") for mode in ("4:32", "mxfp4", "nvfp4", "mxfp8")),
        *((mode, "scales", torch.float32, "U8") for mode in ("mxfp4", "nvfp4", "mxfp8")),
        ("4:32", "scales", torch.uint8, "F32 or BF16 or F16"),
    ],
)
def test_types_of_packed_weights(
    packed: Callable[[str], Path], tmp_path: Path, backend_name: str, mode: str, part: str, dtype: torch.dtype, expected: str
) -> None:
    folder = Path(shutil.copytree(packed(mode), tmp_path / "model"))
    stored = f"model.decoder.layers.0.experts.gate_up_proj.{part}"
    change(folder, lambda tensors: tensors.update({stored: tensors[stored].to(dtype)}))
    line = refusal(folder, backend_name)
    assert f"{stored} is " in line
    assert line.endswith(f"not {expected}")


@pytest.mark.parametrize("name", [TABLE, PROJECTION])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.uint8, torch.float8_e4m3fn])
def test_types_of_the_vision_tower(folder: Path, backend_name: str, name: str, dtype: torch.dtype) -> None:
    change(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    stored = {torch.float64: "F64", torch.int32: "I32", torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3"}[dtype]
    assert f"of the wrong type: {name} is {stored}, not F32 or BF16 or F16" in refusal(folder, backend_name)


def test_tensors_of_the_vision_tower_are_missing_unexpected_or_of_another_shape(folder: Path, backend_name: str) -> None:
    change(folder, lambda tensors: tensors.pop(TABLE))
    assert refusal(folder, backend_name).endswith("missing: vision_tower.patch_embedder.position_embedding_table")
    change(folder, lambda tensors: tensors.update({TABLE: torch.zeros(2, 31, 16), f"{TABLE}.more": torch.zeros(2)}))
    line = refusal(folder, backend_name)
    assert f"unexpected: {TABLE}.more; of the wrong shape: {TABLE} is [2, 31, 16], not [2, 32, 16]" in line


def test_the_vision_tower_may_be_left_out_whole(chat: Path, folder: Path, backend_name: str) -> None:
    change(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(TOWER)])
    whole, without = (load(each, backend=backend_name, device="cpu") for each in (chat, folder))
    assert whole.generate("Hi", seed=2).tokens == without.generate("Hi", seed=2).tokens
    assert without.config.vision is None
    edit_json(folder / "config.json", vision_config=None)
    assert load(folder, backend=backend_name, device="cpu").config.vision is None


def test_a_vision_tower_without_its_configuration(folder: Path, backend_name: str) -> None:
    edit_json(folder / "config.json", vision_config=None)
    line = refusal(folder, backend_name)
    assert "unexpected:" in line
    assert TABLE in line


# --- numbers ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e38, -1e38, 1.1e9])
@pytest.mark.parametrize("name", [EMBEDDING, NORM, "model.decoder.layers.1.layer_scalar", TABLE])
def test_numbers_that_are_no_weights_are_counted(
    folder: Path, backend_name: str, dtype: torch.dtype, bad: float, name: str
) -> None:
    count = 0

    def spoil(tensors: Tensors) -> None:
        nonlocal count
        tensor = tensors[name].to(dtype).contiguous()
        tensor.view(-1)[:: max(1, tensor.numel() // 3)] = bad
        count = int((~(tensor.double().abs() <= LARGEST)).sum())
        tensors[name] = tensor

    change(folder, spoil)
    assert count >= 1
    line = refusal(folder, backend_name)
    assert f"model.safetensors: {count} values of {name} are NaN, infinite or beyond 1e+09; the weights are damaged" in line


@pytest.mark.parametrize("value", [LARGEST, -LARGEST, 65504.0, 0.0, -0.0, 1e-40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_up_to_the_bound_are_taken(folder: Path, backend_name: str, dtype: torch.dtype, value: float) -> None:
    value = max(-65504.0, min(65504.0, value)) if dtype == torch.float16 else value
    change(folder, lambda tensors: tensors.update({UP: torch.full_like(tensors[UP], value, dtype=dtype)}))
    assert load_backend(Checkpoint.open(folder), backend_name, device="cpu")


@pytest.mark.parametrize(
    ("mode", "part", "code"),
    [
        ("mxfp4", "scales", 255), ("mxfp4", "scales", 200), ("mxfp8", "scales", 255), ("nvfp4", "scales", 0x7F),
        ("nvfp4", "scales", 0xFF), ("mxfp8", "weight", 0x7F), ("mxfp8", "weight", 0xFF),
    ],
)  # fmt: skip
def test_codes_that_stand_for_no_number(
    packed: Callable[[str], Path], tmp_path: Path, backend_name: str, mode: str, part: str, code: int
) -> None:
    folder = Path(shutil.copytree(packed(mode), tmp_path / "model"))
    name = f"model.decoder.layers.1.experts.down_proj.{part}"
    assert load_backend(Checkpoint.open(folder), backend_name, device="cpu")

    def spoil(tensors: Tensors) -> None:
        tensors[name].view(torch.uint8).view(-1)[5:7] = code

    change(folder, spoil)
    assert f"2 values of {name} are NaN, infinite or beyond" in refusal(folder, backend_name)


@pytest.mark.parametrize("part", ["scales", "biases"])
def test_scales_and_biases(packed: Callable[[str], Path], tmp_path: Path, backend_name: str, part: str) -> None:
    folder = Path(shutil.copytree(packed("4:32"), tmp_path / "model"))
    name = f"model.decoder.layers.1.experts.down_proj.{part}"

    def spoil(tensors: Tensors) -> None:
        tensors[name].view(-1)[3] = torch.nan

    change(folder, spoil)
    assert f"1 values of {name} are NaN" in refusal(folder, backend_name)


# --- copies of tied tensors ---

COPIES = {
    "lm_head.weight": EMBEDDING,
    "model.encoder.language_model.embed_tokens.weight": EMBEDDING,
    "model.encoder.language_model.norm.weight": NORM,
    "model.encoder.language_model.layers.0.mlp.up_proj.weight": UP,
    "model.encoder.language_model.layers.1.experts.gate_up_proj": "model.decoder.layers.1.experts.gate_up_proj",
    "model.encoder.language_model.layers.1.router.per_expert_scale": "model.decoder.layers.1.router.per_expert_scale",
}


def test_equal_copies_change_nothing(chat: Path, folder: Path, backend_name: str) -> None:
    change(folder, lambda tensors: tensors.update({copy: tensors[name] for copy, name in COPIES.items()}))
    with_copies, without = (load(each, backend=backend_name, device="cpu") for each in (folder, chat))
    assert with_copies.generate("Hi", seed=2).tokens == without.generate("Hi", seed=2).tokens
    assert with_copies.checkpoint.tensors.keys() == without.checkpoint.tensors.keys()


@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_that_differs_is_named_with_its_original(folder: Path, backend_name: str, copy: str) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[copy] = tensors[COPIES[copy]].clone()
        tensors[copy].view(-1)[-1] += 1e-3

    change(folder, spoil)
    assert f"{copy} and {COPIES[copy]} are tied, but their values differ" in refusal(folder, backend_name)


def test_a_copy_of_another_shape_or_type(folder: Path, backend_name: str) -> None:
    change(folder, lambda tensors: tensors.update({"lm_head.weight": tensors[EMBEDDING].to(torch.bfloat16)}))
    line = refusal(folder, backend_name)
    assert f"tied but different: lm_head.weight is BF16 [512, 32], {EMBEDDING} is F32 [512, 32]" in line


def test_a_copy_alone_is_as_good_as_its_original(chat: Path, folder: Path, backend_name: str) -> None:
    change(folder, lambda tensors: tensors.update({copy: tensors.pop(name) for copy, name in list(COPIES.items())[1:]}))
    alone, whole = (load(each, backend=backend_name, device="cpu").generate("Hi", seed=2) for each in (folder, chat))
    assert alone.tokens == whole.tokens


def test_bytes_are_compared_in_pieces(tmp_path: Path) -> None:
    size = 3_000_001  # several pieces, and a rest
    left = torch.arange(size, dtype=torch.float32)
    for place in (None, 0, size - 1, 2_100_000):
        right = left.clone()
        if place is not None:
            right[place] = -1
        for name, tensor in (("a", left), ("b", right)):
            save_file({"first": torch.zeros(3), name: tensor}, tmp_path / f"{name}.safetensors")
        one, other = (Tensor(tmp_path / f"{name}.safetensors", name, (size,), "F32") for name in "ab")
        assert same_bytes(one, other) == (place is None)


# --- files ---


def fifo(file: Path) -> None:
    os.mkfifo(file)


@pytest.mark.parametrize(
    "make", [fifo, Path.mkdir, lambda file: file.symlink_to("gone"), lambda file: file.symlink_to("/dev/zero")],
    ids=["pipe", "folder", "broken link", "device"],
)  # fmt: skip
def test_files_that_are_none(folder: Path, make: Callable[[Path], None]) -> None:
    (folder / FILE).unlink()
    make(folder / FILE)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a regular file, or a broken link; fetch it again"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "name",
    [5, None, ["a"], {"a": 1}, "", "..", f"../{FILE}", f"/tmp/{FILE}", f"sub/{FILE}", "model.bin", f"..\\{FILE}", f"{FILE}\0"],
)
def test_names_in_the_index_that_are_none(folder: Path, name: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {EMBEDDING: FILE, NORM: name}}))
    with pytest.raises(CheckpointError, match="which is not the name of a safetensors file in this folder") as error:
        Checkpoint.open(folder)
    assert NORM in str(error.value)


@pytest.mark.parametrize("weight_map", [5, [], "x", {}, None])
def test_an_index_without_a_table(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="weight_map is missing or not a table of file names"):
        Checkpoint.open(folder)


def test_names_with_terminal_escapes_are_shown_escaped(folder: Path, backend_name: str) -> None:
    change(folder, lambda tensors: tensors.update({"\x1b[2J\u202e\n": torch.zeros(2)}))
    assert r"unexpected: \x1b[2J\u202e\n" in refusal(folder, backend_name)


# --- the table of formats ---


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (5, "quantization must be a JSON object, got 5"),
        ("x", "quantization must be a JSON object, got 'x'"),
        ({"group_size": 32, "bits": 4, "mode": {}}, "{} with 4 bits in groups of 32 is not a known format"),
        ({"group_size": 32.0, "bits": 4}, "affine with 4 bits in groups of 32.0 is not a known format"),
        ({"group_size": 32, "bits": True}, "affine with True bits in groups of 32 is not a known format"),
        ({"bits": 4}, "quantization has no group_size"),
        ({"group_size": 32, "bits": 4, "model.decoder.embed_tokens": 5}, "embed_tokens.scales exists, but quantization has 5"),
        ({"group_size": 32, "bits": 4, "model.decoder.embed_tokens": False}, "but quantization has False for its module"),
    ],
)
def test_tables_of_formats_that_are_wrong(packed: Callable[[str], Path], tmp_path: Path, table: Any, expected: str) -> None:
    folder = Path(shutil.copytree(packed("4:32"), tmp_path / "model"))
    edit_json(folder / "config.json", quantization=table, quantization_config=table)
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(folder)
    assert expected in str(error.value)

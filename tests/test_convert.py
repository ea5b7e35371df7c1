"""The converter: formats against ``mx.quantize``, the layout against the hub's, and errors."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import mlx.core as mx
import numpy as np
import pytest
import safetensors.torch
import torch

from mlx_diffgemma.checkpoint import Checkpoint, Quantization, graph_name
from mlx_diffgemma.config import GenerationConfig, ModelConfig
from mlx_diffgemma.convert import RECIPES, Plan, make_recipe, parse_format, side_files
from mlx_diffgemma.convert.quantize import PIECE_BYTES, pack
from mlx_diffgemma.convert.source import read_rows
from mlx_diffgemma.errors import BackendError, CheckpointError, InputError
from mlx_diffgemma.weights import Tensor
from support.converting import LARGE, SHAPE, contents, converted, copy_with, make_source, refused, run
from support.real_layout import config as real_config
from support.real_layout import stored_tensors, total_bytes
from support.reference import make_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("bf16"))


@pytest.fixture(scope="module")
def float32_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("float32"), SHAPE, hub_layout=True)


def weights(folder: Path) -> dict[str, mx.array]:
    return {name: array for file in sorted(folder.glob("*.safetensors")) for name, array in mx.load(str(file)).items()}


def stored_bits(array: mx.array) -> np.ndarray[Any, Any]:
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def assert_packed_like_mlx(folder: Path, source: Path) -> None:
    """Assert that every tensor of ``folder`` equals, bit for bit, the result of mx.quantize on the whole source tensor."""
    plan, made = Checkpoint.open(folder).quantization, weights(folder)
    for name, stored in weights(source).items():
        whole = stored.astype(mx.bfloat16)
        module = graph_name(name).removesuffix(".weight")
        if module in plan:
            form, path = plan[module], name.removesuffix(".weight")
            parts = mx.quantize(whole, form.group_size, form.bits, mode=form.mode)
            expected = dict(zip((f"{path}.weight", f"{path}.scales", f"{path}.biases"), parts, strict=False))
        else:
            expected = {name: whole}
        for part, array in expected.items():
            actual = made.pop(part)
            assert actual.dtype == array.dtype, f"{part} is {actual.dtype}, not {array.dtype}"
            np.testing.assert_array_equal(stored_bits(actual), stored_bits(array), err_msg=part)
    assert not made, f"also written: {sorted(made)}"


# --- formats ---


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_packs_like_mlx(recipe: str, source: Path, tmp_path: Path) -> None:
    folder = converted(source, tmp_path / "out", "--recipe", recipe)
    assert_packed_like_mlx(folder, source)
    by_part = {module: str(form) for module, form in Checkpoint.open(folder).quantization.items()}
    expected = {
        "4bit": ("affine 4-bit, groups of 64", 23),
        "6bit": ("affine 6-bit, groups of 64", 23),
        "8bit": ("affine 8-bit, groups of 64", 23),
        "mxfp4": ("mxfp4", 23),
        "nvfp4": ("nvfp4", 23),
        "bf16": (None, 0),
    }[recipe]
    assert (by_part.get("layers.1.experts.down_proj"), len(by_part)) == expected
    if recipe != "bf16":
        assert by_part["embed_tokens"] == by_part["layers.0.router.proj"] == "affine 8-bit, groups of 64"


MODULES = ("layers.0.experts.gate_up_proj", "embed_tokens", "layers.1.self_attn.o_proj")

#: One format for each of the modules.
FORMATS = [
    ("2:32", "3:128", "mxfp8"),
    ("3:32", "5", "nvfp4"),
    ("4:32", "6:128", "mxfp4"),
    ("5:64", "8:32", "2"),
    ("6:32", "bf16", "4:128"),
    ("bf16", "mxfp4", "nvfp4"),
]


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("formats", FORMATS)
def test_any_portion_of_rows_packs_like_the_whole(
    formats: tuple[str, str, str], dtype: str, source: Path, float32_source: Path
) -> None:
    """Seven rows at a time. No tensor has a multiple of seven rows."""
    folder = {"BF16": source, "F32": float32_source}[dtype]
    tensors, stored = Checkpoint.open(folder).tensors, {graph_name(name): array for name, array in weights(folder).items()}
    for module, form in zip(MODULES, map(parse_format, formats), strict=True):
        tensor, whole = tensors[f"{module}.weight"], stored[f"{module}.weight"].astype(mx.bfloat16)
        assert tensor.dtype == dtype
        pieces = list(read_rows(tensor, 7 * whole.shape[-1] * {"BF16": 2, "F32": 4}[dtype] + 1))
        assert len(pieces[-1]) < len(pieces[0]) == 7
        packed = zip(*(pack(piece, dtype, form) for piece in pieces), strict=True)
        parts = mx.quantize(whole, form.group_size, form.bits, mode=form.mode) if form else [whole]
        for actual, expected in zip(packed, map(stored_bits, parts), strict=True):
            np.testing.assert_array_equal(np.concatenate(actual), expected.reshape(-1, expected.shape[-1]), f"{module}: {form}")


@pytest.mark.parametrize("formats", FORMATS)
def test_each_part_has_the_format_that_was_set(formats: tuple[str, str, str], source: Path, tmp_path: Path) -> None:
    parts = ("experts", "embedding", "attention")
    settings = [f"--set={part}={form}" for part, form in zip(parts, formats, strict=True)]
    folder = converted(source, tmp_path / "out", *settings)
    assert_packed_like_mlx(folder, source)
    quantization = Checkpoint.open(folder).quantization
    assert [quantization.get(module) for module in MODULES] == [parse_format(form) for form in formats]


@pytest.mark.parametrize("settings", [["--set=experts=nvfp4", "--set=embedding=3:128"], ["--recipe=bf16"]])
def test_tensors_of_several_pieces(settings: list[str], tmp_path: Path) -> None:
    """Each piece of the words, scales and biases is written after the previous one."""
    source = make_source(tmp_path / "large", LARGE)
    large = [tensor for tensor in Checkpoint.open(source).tensors.values() if tensor.nbytes > PIECE_BYTES]
    assert [tensor.nbytes % PIECE_BYTES > 0 for tensor in large] == [True] * 3
    assert_packed_like_mlx(converted(source, tmp_path / "out", *settings), source)


@pytest.mark.parametrize("recipe", ["4bit", "bf16"])
def test_float32_is_rounded_to_bfloat16_first(recipe: str, float32_source: Path, tmp_path: Path) -> None:
    folder = converted(float32_source, tmp_path / "out", "--recipe", recipe)
    assert_packed_like_mlx(folder, float32_source)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_float16_is_rounded_to_bfloat16_first(source: Path, tmp_path: Path) -> None:
    folder = copy_with(source, tmp_path / "float16", lambda tensors: {name: t.to(torch.float16) for name, t in tensors.items()})
    assert_packed_like_mlx(converted(folder, tmp_path / "out"), folder)


# --- layout ---


def real_checkpoint() -> Checkpoint:
    tensors = {name: Tensor(Path("model.safetensors"), name, *form) for name, form in stored_tensors("weights.tsv").items()}
    vision = {name: tensor for name, tensor in tensors.items() if ".vision_tower." in name or ".embed_vision." in name}
    text = {graph_name(name): tensor for name, tensor in tensors.items() if name not in vision}
    return Checkpoint(Path("."), ModelConfig.from_dict(real_config()), GenerationConfig(), text, vision, {})


def test_plan_of_the_released_checkpoint_is_the_layout_on_the_hub() -> None:
    """mlx-community's 4-bit conversion, except for the vision projection: 4 bits there, BF16 here."""
    plan = Plan.make(real_checkpoint(), make_recipe("4bit", ["self_conditioning=4"]))
    planned = {output.name: (output.shape, output.dtype) for entry in plan.entries for output in entry.outputs}
    expected = stored_tensors("weights_mlx_4bit.tsv")
    projection = "model.encoder.embed_vision.embedding_projection"
    for part in ("weight", "scales", "biases"):
        del expected[f"{projection}.{part}"]
    expected[f"{projection}.weight"] = ((2816, 1152), "BF16")
    assert planned == expected
    packed_projection = 2816 * 144 * 4 + 2 * 2816 * 18 * 2
    assert plan.nbytes == total_bytes("weights_mlx_4bit.tsv") - packed_projection + 2816 * 1152 * 2

    table = plan.quantization()
    assert table is not None
    assert {key: table.pop(key) for key in ("group_size", "bits", "mode")} == {"group_size": 64, "bits": 4, "mode": "affine"}
    eight = [f"layers.{n}.{module}" for n in range(30) for module in ("router.proj", "mlp.gate_proj", "mlp.up_proj")]
    eight += [f"layers.{n}.{module}" for n in range(30) for module in ("mlp.down_proj", "self_attn.q_proj", "self_attn.k_proj")]
    eight += [f"layers.{n}.self_attn.o_proj" for n in range(30)] + ["embed_tokens"]
    eight += [f"layers.{n}.self_attn.v_proj" for n in range(30) if n not in (5, 11, 17, 23, 29)]
    assert table == {f"model.decoder.{module}": {"group_size": 64, "bits": 8} for module in eight}


def test_plan_of_the_released_checkpoint_in_numbers() -> None:
    plan = Plan.make(real_checkpoint(), make_recipe("bf16"))
    assert plan.nbytes == total_bytes("weights.tsv")
    billions = {row.part: row.weights / 1e9 for row in plan.rows()}
    expected = {
        "experts": 22.84,
        "attention": 1.11,
        "embedding": 0.738,
        "mlp": 0.535,
        "self_conditioning": 0.018,
        "router": 0.011,
    }
    assert {part: round(billions[part], 2 if billions[part] > 1 else 3) for part in expected} == expected
    assert plan.rows()[-1].bits_per_weight == 16


def test_shards_are_what_the_library_would_write(source: Path, tmp_path: Path) -> None:
    folder = converted(source, tmp_path / "out", "--shard-size", "60KB", "--recipe", "mxfp4")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-{n + 1:05}-of-{len(files):05}.safetensors" for n in range(len(files))]
    total = 0
    for file in files:
        tensors = safetensors.torch.load_file(file)
        assert {name for name, shard in index["weight_map"].items() if shard == file.name} == tensors.keys()
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        assert nbytes <= 60_000
        total += nbytes
        safetensors.torch.save_file(tensors, tmp_path / "library", metadata={"format": "mlx"})
        assert file.read_bytes() == (tmp_path / "library").read_bytes(), file.name
    assert index["metadata"]["total_size"] == total
    assert len(files) > 5


def test_a_module_larger_than_a_shard_has_its_own(source: Path, tmp_path: Path) -> None:
    folder = converted(source, tmp_path / "out", "--shard-size", "20KB")
    for file in folder.glob("*.safetensors"):
        names = safetensors.torch.load_file(file).keys()
        modules = {name.rpartition(".")[0] for name in names}
        print(file.name, file.stat().st_size, sorted(modules))
        assert sum(tensor.nbytes for tensor in safetensors.torch.load_file(file).values()) <= 20_000 or len(modules) == 1


def test_a_single_file_has_an_index_too(source: Path, tmp_path: Path) -> None:
    folder = converted(source, tmp_path / "out")
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(weight_map.values()) == {"model.safetensors"}


def test_overrides_name_their_mode_where_it_is_not_affine(source: Path, tmp_path: Path) -> None:
    folder = converted(
        source, tmp_path / "out", "--recipe=mxfp4", "--set=router=nvfp4", "--set=mlp=mxfp4", "--set=embedding=bf16"
    )
    written = json.loads((folder / "config.json").read_text())
    assert written["quantization"] == written["quantization_config"]
    table = written["quantization"]
    assert {key: table[key] for key in ("group_size", "bits", "mode")} == {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    assert table["model.decoder.layers.0.router.proj"] == {"group_size": 16, "bits": 4, "mode": "nvfp4"}
    assert table["model.decoder.layers.0.self_attn.q_proj"] == {"group_size": 64, "bits": 8}
    assert not {"model.decoder.layers.0.mlp.up_proj", "model.decoder.embed_tokens"} & table.keys()
    read = Checkpoint.open(folder).quantization
    assert read["layers.0.mlp.up_proj"] == Quantization(32, 4, "mxfp4")
    assert read["layers.0.self_attn.q_proj"] == Quantization(64, 8)
    assert "embed_tokens" not in read


@pytest.mark.parametrize("settings", [[], ["--recipe=mxfp4", "--set=router=nvfp4"], ["--recipe=nvfp4"], ["--recipe=bf16"]])
@pytest.mark.parametrize("layout", ["hub", "transformers"])
def test_mlx_vlm_loads_the_output(layout: str, settings: list[str], source: Path, float32_source: Path, tmp_path: Path) -> None:
    utils = pytest.importorskip("mlx_vlm.utils")
    folder = converted({"hub": float32_source, "transformers": source}[layout], tmp_path / "out", *settings)
    model = utils.load_model(folder)  # loading is strict
    made = weights(folder)
    router = model.model.decoder.layers[1].router.proj
    np.testing.assert_array_equal(stored_bits(router.weight), stored_bits(made["model.decoder.layers.1.router.proj.weight"]))
    form = Checkpoint.open(folder).quantization.get("layers.1.router.proj")
    assert (getattr(router, "mode", None), getattr(router, "bits", None)) == ((form.mode, form.bits) if form else (None, None))


# --- the files other than the weights ---


def test_the_other_files_are_carried_over(source: Path, tmp_path: Path) -> None:
    folder = converted(source, tmp_path / "out")
    for name in ("tokenizer.json", "chat_template.jinja", "processor_config.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (source / name).read_bytes(), name
    assert not (folder / "training_log.json").exists()
    assert not list(tmp_path.glob("*.partial"))
    before, after = (json.loads((path / "config.json").read_text()) for path in (source, folder))
    assert {key: after[key] for key in before.keys() - {"text_config"}} == {
        key: before[key] for key in before.keys() - {"text_config"}
    }
    assert Checkpoint.open(folder).config == Checkpoint.open(source).config


def test_the_model_card_says_what_was_done(source: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(source)
    plan = Plan.make(checkpoint, make_recipe("4bit", ["router=bf16"]))
    local = side_files(checkpoint, plan)["README.md"].decode()
    assert "base_model" not in local, "a folder's origin is not known"
    assert f"# DiffusionGemma, converted from {source.name}\n" in local
    assert "license: apache-2.0\n" in local
    assert "| experts | affine 4-bit, groups of 64 | 4 | 110,592 | 4.50 |\n" in local
    assert "| router | BF16 | 2 | 2,048 | 16.00 |\n" in local

    snapshot = make_source(tmp_path / "models--google--diffusiongemma-26B-A4B-it" / "snapshots" / ("0123456789" * 4))
    checkpoint = Checkpoint.open(snapshot)
    hub = side_files(checkpoint, Plan.make(checkpoint, make_recipe("4bit")))["README.md"].decode()
    assert "base_model: google/diffusiongemma-26B-A4B-it\nbase_model_relation: quantized\n" in hub
    assert f"google/diffusiongemma-26B-A4B-it at revision {'0123456789' * 4} by" in hub


def test_dry_run_prints_the_plan_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    result = run(source, tmp_path / "out", "--dry-run", "--set=embedding=bf16")
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["embedding", "BF16", "1", "65,536", "16.00"] in rows
    plan = Plan.make(Checkpoint.open(source), make_recipe("4bit", ["embedding=bf16"]))
    assert rows[-1] == ["total", "67", f"{plan.nbytes:,}", f"{plan.rows()[-1].bits_per_weight:.2f}"]
    assert not list(tmp_path.iterdir())


class HubStub:
    calls: list[tuple[str, dict[str, Any]]]
    failure: Exception | None

    def create_repo(self, repository: str, **options: Any) -> None:
        self.calls.append(("create_repo", {"repo_id": repository, **options}))
        if self.failure:
            raise self.failure

    def upload_folder(self, **options: Any) -> None:
        self.calls.append(("upload_folder", options))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[HubStub]:
    HubStub.calls, HubStub.failure = [], None
    monkeypatch.setattr(huggingface_hub, "HfApi", HubStub)
    return HubStub


def test_upload(source: Path, tmp_path: Path, hub: type[HubStub]) -> None:
    target = converted(source, tmp_path / "out", "--upload-repo", "me/mine")
    (made, made_with), (sent, sent_with) = hub.calls
    assert (made, made_with) == ("create_repo", {"repo_id": "me/mine", "exist_ok": True})
    assert (sent, sent_with["repo_id"], sent_with["folder_path"]) == ("upload_folder", "me/mine", target)


def test_a_failed_upload_keeps_the_checkpoint(source: Path, tmp_path: Path, hub: type[HubStub]) -> None:
    hub.failure = huggingface_hub.errors.LocalTokenNotFoundError("Token is required\nlong advice")
    refused(run(source, tmp_path / "out", "--upload-repo=me/mine"), CheckpointError, "(Token is required)")
    assert Checkpoint.open(tmp_path / "out").quantization
    assert [call for call, _ in hub.calls] == ["create_repo"]


# --- errors ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe=5bit"], "unknown recipe '5bit'; known are 4bit, 6bit, 8bit, mxfp4, nvfp4, bf16"),
        (["--set=expert=4"], "unknown part 'expert'; known are experts, embedding, attention, mlp, router, self_conditioning"),
        (["--set=experts"], "'experts' is not of the form PART=FORMAT"),
        (["--set=experts=q4"], "unknown format 'q4'; known are BITS[:GROUP], mxfp4, mxfp8, nvfp4 and bf16"),
        (["--set=experts=7"], "7 bits are not possible; use 2, 3, 4, 5, 6, 8"),
        (["--set=experts=4:48"], "groups of 48 are not possible; use 32, 64, 128"),
        (["--set=experts=mxfp4:16"], "unknown format 'mxfp4:16'"),
        (["--set=vision=8"], "the vision tower stays in BF16"),
        (
            ["--set=experts=4:128"],
            "experts.down_proj: groups of 128 do not divide its rows of 64; set another format for experts",
        ),
        (["--shard-size=big"], "--shard-size 'big' is not a size"),
        (["--shard-size=0"], "--shard-size must be at least 1 bytes, got '0'"),
        (["--shard-size=-1"], "--shard-size '-1' is not a size"),
        (["--upload-repo=mine"], "'mine' is not a hub repository; write it as OWNER/NAME"),
    ],
)
def test_refused_options(options: list[str], message: str, source: Path, tmp_path: Path) -> None:
    refused(run(source, tmp_path / "out", *options), InputError, message)
    assert not list(tmp_path.iterdir())


def test_refused_sources(source: Path, tmp_path: Path) -> None:
    quantized = converted(source, tmp_path / "4bit")
    refused(run(quantized, tmp_path / "out"), CheckpointError, "already quantized (model.decoder.embed_tokens.")

    name = "model.decoder.layers.1.experts.down_proj"
    without = copy_with(source, tmp_path / "without", lambda tensors: {key: t for key, t in tensors.items() if key != name})
    refused(run(without, tmp_path / "out"), CheckpointError, "incomplete; missing: layers.1.experts.down_proj.weight")

    integers = copy_with(source, tmp_path / "int8", lambda tensors: {key: t.to(torch.int8) for key, t in tensors.items()})
    refused(run(integers, tmp_path / "out"), CheckpointError, "is I8, but convert reads only BF16, F16 and F32")

    def narrower(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: t[:-1] if key == "model.decoder.norm.weight" else t for key, t in tensors.items()}

    misshaped = copy_with(source, tmp_path / "misshaped", narrower)
    refused(
        run(misshaped, tmp_path / "out"), CheckpointError, "of the wrong shape: model.decoder.norm.weight is [127], not [128]"
    )

    def empty(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: t[:, :0] if key == "model.decoder.embed_tokens.weight" else t for key, t in tensors.items()}

    for options in ([], ["--dry-run"]):
        hollow = copy_with(source, tmp_path / f"hollow{len(options)}", empty)
        refused(run(hollow, tmp_path / "out", *options), CheckpointError, "embed_tokens.weight has the shape [256, 0]")

    refused(run(tmp_path / "absent", tmp_path / "out"), CheckpointError, "no such folder")
    assert {path.name for path in tmp_path.iterdir()} == {"4bit", "without", "int8", "misshaped", "hollow0", "hollow1"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("recipe", ["4bit", "bf16"])
@pytest.mark.parametrize(
    ("name", "place"),
    [("experts.gate_up_proj", -1), ("embed_tokens.weight", 0), ("layer_scalar", 0), ("input_layernorm.weight", 7)],
)
def test_a_number_that_no_weight_has(
    dtype: torch.dtype, recipe: str, name: str, place: int, source: Path, tmp_path: Path
) -> None:
    for index, bad in enumerate((torch.nan, -torch.inf, *([] if dtype == torch.float16 else [1.1e9]))):

        def change(tensors: dict[str, torch.Tensor], bad: float = bad) -> dict[str, torch.Tensor]:
            changed = {key: tensor.to(dtype) for key, tensor in tensors.items()}
            chosen = next(key for key in sorted(changed, reverse=True) if key.endswith(name))
            changed[chosen].view(-1)[place] = bad
            return changed

        folder = copy_with(source, tmp_path / f"source{index}", change)
        result = run(folder, tmp_path / "out", "--recipe", recipe, "--restart")
        refused(result, CheckpointError, f"{name} holds values that are NaN, infinite or beyond 1e+09; the weights are damaged")
        assert not (tmp_path / "out").exists()


def test_the_largest_numbers_that_weights_have(source: Path, tmp_path: Path) -> None:
    for dtype, large in ((torch.bfloat16, 998244352), (torch.float32, 1e9), (torch.float16, 65504)):

        def change(tensors: dict[str, torch.Tensor], dtype: Any = dtype, large: float = large) -> dict[str, torch.Tensor]:
            return {
                key: tensor.to(dtype).fill_(-large) if key.endswith("up_proj") else tensor.to(dtype)
                for key, tensor in tensors.items()
            }

        for recipe in RECIPES:
            folder = copy_with(source, tmp_path / f"source {dtype} {recipe}", change)
            assert_packed_like_mlx(converted(folder, tmp_path / f"out {dtype} {recipe}", "--recipe", recipe), folder)


def test_refused_targets(source: Path, tmp_path: Path) -> None:
    full, empty, file = tmp_path / "full", tmp_path / "empty", tmp_path / "file"
    full.mkdir()
    empty.mkdir()
    (full / "note").touch()
    file.touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "link").symlink_to(empty)
    for target in (full, file, tmp_path / "dangling", tmp_path / "link", source):
        refused(run(source, target), InputError, f"{target} already exists")
    inside = source / "4bit"
    refused(run(source, inside), InputError, f"the target {inside} and the source {source} overlap; choose a target outside")
    (tmp_path / "taken.partial").touch()
    refused(run(source, tmp_path / "taken"), InputError, "taken.partial is needed for the conversion, but is not a folder")
    (tmp_path / "taken.partial").unlink()
    refused(run(source, file / "out"), CheckpointError, "Not a directory")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "note").touch()
    refused(run(source, tmp_path / "out", "--restart"), InputError, "holds other files; move it away")
    assert {path.name for path in tmp_path.iterdir()} == {"full", "empty", "file", "dangling", "link", "out.partial"}
    assert os.listdir(tmp_path / "out.partial") == ["note"]


def test_a_source_in_the_folder_of_the_unfinished_work(source: Path, tmp_path: Path) -> None:
    """--restart would remove it."""
    (tmp_path / "out.partial").mkdir()
    copy = copy_with(source, tmp_path / "out.partial" / "model")
    refused(run(copy, tmp_path / "out", "--restart"), InputError, "overlap; choose a target outside the source")
    assert Checkpoint.open(copy)


def test_an_empty_folder_is_a_target(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert contents(converted(source, tmp_path / "out")) == contents(converted(source, tmp_path / "deeper" / "out"))


def test_writing_needs_mlx(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    refused(run(source, tmp_path / "out"), BackendError, "mlx packs the weights, but cannot be imported")
    assert not list(tmp_path.iterdir())


def test_planning_needs_no_framework(source: Path, tmp_path: Path) -> None:
    program = f"""
import sys
from click.testing import CliRunner
from mlx_diffgemma.cli.convert import convert
result = CliRunner().invoke(convert, [{str(source)!r}, {str(tmp_path / "out")!r}, "--dry-run"])
print(result.exit_code, sorted({{"mlx", "torch", "transformers", "huggingface_hub"}} & sys.modules.keys()))
"""
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output == "0 []\n"

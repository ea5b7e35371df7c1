"""User errors and their messages: exit status 2, one line on stderr, nothing on stdout."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from mlx_diffgemma import BackendError, DiffGemmaError, DiffusionGemma, InputError, load
from mlx_diffgemma.backends import load_backend
from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.cli import main
from support import hub
from support.checkpoints import CONTEXT, VOCAB_SIZE, edit_json, make_chat_checkpoint


@pytest.fixture(scope="session")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_checkpoint(tmp_path_factory.mktemp("chat"))


@pytest.fixture
def folder(chat: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint that the test may damage."""
    return Path(shutil.copytree(chat, tmp_path / "model"))


@pytest.fixture(scope="session")
def model(chat: Path, backend_name: str) -> DiffusionGemma:
    return load(chat, backend=backend_name)


def told(*arguments: str, **invoke: Any) -> str:
    """Run a command that must fail, and return its line on stderr."""
    result = CliRunner().invoke(main, list(arguments), **invoke)
    assert result.exit_code == 2, f"status {result.exit_code}: {result.output} {result.exception!r}"
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, f"more than one line: {result.stderr}"
    assert result.stderr.startswith("mlx-diffgemma: error: ")
    print(result.stderr)
    return result.stderr


def refused(*arguments: str) -> str:
    """The last line of click's own message about a bad option, which follows the usage text."""
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Usage: ")
    return result.stderr.splitlines()[-1]


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def change_weights(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def cut(file: Path, keep: int) -> None:
    file.write_bytes(file.read_bytes()[:keep])


def index(folder: Path, content: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another model": (
        lambda f: edit_json(f / "config.json", model_type="gemma3"),
        "model_type is 'gemma3', not 'diffusion_gemma'",
    ),
    "no text_config": (lambda f: edit_json(f / "config.json", text_config=None), "config.json: text_config is missing"),
    "no canvas_length": (lambda f: edit_json(f / "config.json", canvas_length=None), "config.json: canvas_length is missing"),
    "wrong type": (
        lambda f: edit_json(f / "config.json", canvas_length="8"),
        "config.json: canvas_length must be an integer from 1 to 4096, got '8'",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing; is this a model folder?"),
    "cut JSON": (lambda f: cut(f / "config.json", 40), "config.json: cannot be read"),
    "JSON list": (lambda f: (f / "config.json").write_text("[]"), "config.json: not a JSON object"),
    "not UTF-8": (lambda f: (f / "config.json").write_bytes(b"\xff"), "config.json: cannot be read"),
    "bad default": (lambda f: edit_json(f / "generation_config.json", t_max=-1), "generation_config.json: t_max must be"),
    "cut weights": (lambda f: cut(f / "model.safetensors", 5000), "model.safetensors: truncated or not safetensors"),
    "empty weights": (lambda f: cut(f / "model.safetensors", 0), "model.safetensors: truncated or not safetensors"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors nor an index of shards is there"),
    "missing shards": (
        lambda f: index(f, {"weight_map": {"a": "model-2.safetensors", "b": "model.safetensors", "c": "model-1.safetensors"}}),
        "missing shards: model-1.safetensors, model-2.safetensors; fetch them again\n",
    ),
    "no weight_map": (lambda f: index(f, {}), "weight_map is missing"),
    "other quantization": (
        lambda f: edit_json(f / "config.json", quantization_config={"quant_method": "bitsandbytes"}),
        "quantized by bitsandbytes, which is not supported",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folder(folder: Path, damage: str) -> None:
    harm, expected = DAMAGE[damage]
    harm(folder)
    before = files(folder)
    for command in (["generate", str(folder), "Hi"], ["info", str(folder)]):
        assert expected in told(*command)
    assert files(folder) == before


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_tokenizer(folder: Path, name: str) -> None:
    cut(folder / name, 30)
    assert name in told("generate", str(folder), "Hi")
    (folder / "tokenizer.json").unlink()
    assert "neither tokenizer.json nor tokenizer.model is there" in told("generate", str(folder), "Hi")


def test_tensors_that_do_not_fit_are_all_named(folder: Path, backend_name: str) -> None:
    def change(tensors: dict[str, Any]) -> None:
        del tensors["model.decoder.norm.weight"]
        del tensors["model.decoder.layers.1.self_attn.k_proj.weight"]
        tensors["model.decoder.layers.1.self_attn.v_proj.weight"] = np.zeros((32, 32), np.float32)
        tensors["lm_head.bias"] = np.zeros(VOCAB_SIZE, np.float32)
        tensors["model.decoder.layers.0.mlp.up_proj.weight"] = np.zeros((32, 48), np.float32)
        tensors["model.decoder.layers.0.layer_scalar"] = np.zeros(2, np.float32)

    change_weights(folder, change)
    line = told("generate", str(folder), "Hi", "--backend", backend_name)
    assert line.endswith(
        "the weights do not fit config.json; tensors "
        "missing: layers.1.self_attn.k_proj.weight, norm.weight; "
        "unexpected: lm_head.bias, model.decoder.layers.1.self_attn.v_proj.weight; "
        "of the wrong shape: model.decoder.layers.0.layer_scalar is [2], not [1], "
        "model.decoder.layers.0.mlp.up_proj.weight is [32, 48], not [48, 32]\n"
    )


@pytest.mark.parametrize("source", ["nowhere", "./some/model", "/no/such/folder", "a/b/c", "some/mo del", "some--body/model"])
def test_neither_a_folder_nor_a_hub_id(source: str) -> None:
    assert "no such folder, and not a hub id" in told("info", source)


# Each test asks a hub on this machine, in a separate process, because the downloader reads the endpoint when it is imported.
@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (hub.refuse(404, "RepoNotFound"), "no such repository on the hub (or it needs a login)"),
        (hub.refuse(401, "RepoNotFound"), "no such repository on the hub (or it needs a login)"),
        (hub.refuse(403, "GatedRepo"), "it needs a login"),
        (hub.refuse(404, "RevisionNotFound"), "the hub has no revision 'v9'"),
        (hub.refuse(500), "not in the local cache, and the hub cannot be reached"),
        (hub.drop_downloads, "the download failed"),
        (hub.captive_portal, "the download failed"),
        (lambda method, path: None, "the download failed"),
        (None, "not in the local cache, and the hub cannot be reached; check the network"),
    ],
    ids=["unknown", "unknown 401", "gated", "revision", "broken hub", "broken off", "captive portal", "hangs up", "no network"],
)
def test_download(answer: hub.Answer | None, expected: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from mlx_diffgemma.cli import main; main()", "info", "some/model", "--revision", "v9"]
    with hub.serve(answer or hub.refuse(500)) as endpoint:
        environment = {
            **os.environ,
            "HF_HOME": str(tmp_path),
            "HF_ENDPOINT": endpoint if answer else "http://127.0.0.1:9",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "no_proxy": "127.0.0.1",
        }
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    *noise, line = result.stderr.splitlines()  # the downloader warns about its retries
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in "\n".join(noise)
    assert line.startswith("mlx-diffgemma: error: some/model: ")
    assert expected in line
    assert result.stdout == ""


def test_full_disk_while_downloading(monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/cache/blobs/abc.incomplete")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fill)
    assert "the disk is full; free some space and run again, the download resumes" in told("info", "some/model")


def test_unknown_backend_and_dtype(chat: Path) -> None:
    assert "'jax' is not one of 'mlx', 'torch'" in refused("generate", str(chat), "Hi", "--backend", "jax")
    assert "'float16' is not one of 'float32', 'bfloat16'" in refused("generate", str(chat), "Hi", "--dtype", "float16")
    with pytest.raises(InputError, match="unknown backend 'jax'; known are mlx, torch"):
        load(chat, backend="jax")
    with pytest.raises(InputError, match="unknown dtype 'float16'; known are float32, bfloat16"):
        load(chat, dtype="float16")


def test_backend_that_is_not_installed(chat: Path, backend_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    line = told("generate", str(chat), "Hi", "--backend", backend_name)
    assert f"backend '{backend_name}' needs the package {backend_name}, which is not installed" in line
    assert "neither mlx nor torch is installed; try: pip install" in told("generate", str(chat), "Hi")


def test_device_that_is_not_there(chat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for device in ("cuda", "cuda:1"):
        line = told("generate", str(chat), "Hi", "--backend", "torch", "--device", device)
        assert f"device '{device}' is not available: this machine has 0 CUDA devices" in line
    checkpoint = Checkpoint.open(chat)
    for name, device in (("torch", "tpu"), ("torch", "mps"), ("mlx", "cuda"), ("mlx", "")):
        with pytest.raises(InputError, match=repr(device)):
            load_backend(checkpoint, name, device=device)


def test_mlx_gpu_that_is_not_there(chat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mx = pytest.importorskip("mlx.core")
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    assert "device 'gpu' is not available: " in told("generate", str(chat), "Hi", "--backend", "mlx", "--device", "gpu")
    with pytest.raises(BackendError):
        load(chat, backend="mlx", device="gpu")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--max-new-tokens", "0"], "max_new_tokens must be an integer from 1 to 16777216, got 0"),
        (["--max-new-tokens", "-3"], "max_new_tokens must be an integer from 1 to 16777216, got -3"),
        (["--preset", "fats"], "unknown preset 'fats'; did you mean fast?"),
        (["--max-denoising-steps", "0"], "max_denoising_steps must be an integer from 1 to 1024, got 0"),
        (["--canvas-length", "0"], "canvas_length must be an integer from 1 to 4096, got 0"),
        (["--canvas-length", "9"], "canvas_length 9 is larger than the model's 8; use 8 or less"),
        (["--stability-threshold", "-1"], "stability_threshold must be an integer from 0 to 1024, got -1"),
        (["--confidence-threshold", "-0.1"], "confidence_threshold must be a number from 0 to 1e+06, got -0.1"),
        (["--confidence-threshold", "nan"], "confidence_threshold must be a number from"),
        (["--entropy-bound", "-1"], "entropy_bound must be a number from 0 to 1e+06, got -1.0"),
        (["--entropy-bound", "inf"], "entropy_bound must be a number from"),
        (["--t-min", "-0.5"], "t_min must be a number from 0 to 1000, got -0.5"),
        (["--t-min", "0.9"], "not below t_min, got t_max 0.8 and t_min 0.9"),
        (["--t-max", "0", "--t-min", "0"], "t_max must be at least 1e-06"),
        (["--t-max", "nan"], "t_max must be a number from 0 to 1000"),
        (
            ["--max-new-tokens", str(CONTEXT)],
            f"exceed the model's context of {CONTEXT} tokens; use a shorter prompt or fewer new tokens",
        ),
    ],
)
def test_bad_sampler_values(chat: Path, options: list[str], expected: str) -> None:
    assert expected in told("generate", str(chat), "Hi", *options)


@pytest.mark.parametrize("options", [["--seed", "-1"], ["--seed", str(2**64)], ["--seed", "x"], ["--max-new-tokens", "1.5"]])
def test_bad_numbers(chat: Path, options: list[str]) -> None:
    assert f"Invalid value for '{options[0]}'" in refused("generate", str(chat), "Hi", *options)


def test_prompt_longer_than_the_context(chat: Path) -> None:
    assert f"in canvases of 8, exceed the model's context of {CONTEXT} tokens; use a shorter prompt or fewer new tokens" in told(
        "generate", str(chat), "word " * CONTEXT
    )


def test_prompts_that_are_none(chat: Path, tmp_path: Path) -> None:
    blank = tmp_path / "blank"
    blank.write_text(" \n")
    binary = tmp_path / "binary"
    binary.write_bytes(b"ab\xff")
    generate = ("generate", str(chat))
    for arguments in ([""], [" \n\t"], ["--file", str(blank)], ["-"]):
        assert "the prompt is empty" in told(*generate, *arguments)
    assert "the prompt is empty" in told(*generate, input=b"\n")
    assert "is not UTF-8: byte 2 is 0xFF" in told(*generate, "--file", str(binary))
    assert "standard input is not UTF-8: byte 0 is 0xE2" in told(*generate, input=b"\xe2\x82")
    assert "the prompt is not UTF-8: byte 1 is 0x80" in told(*generate, "a\udc80")
    assert "both as an argument and with --file" in told(*generate, "Hi", "--file", str(blank))
    assert f"--file {tmp_path / 'none'}: cannot be read: No such file" in told(*generate, "--file", str(tmp_path / "none"))
    assert "cannot be read: Is a directory" in told(*generate, "--file", str(tmp_path))
    assert "a system message needs the chat template" in told(*generate, "Hi", "--raw", "--system", "Be brief.")


def test_no_chat_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    assert "this checkpoint has no chat template; give a raw prompt" in told("generate", str(folder), "Hi")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (
            [{"role": "user", "content": [{"type": "image", "url": "no.png"}, {"type": "text", "text": "Hm?"}]}],
            "no.png: there is no such file",
        ),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "no.png"}}]}], "no.png: there is no such file"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"messages\[0\]: the part with an image has no source"),
        ([{"role": "user", "content": "<|image|>Hm?"}], "the prompt has 1 place for an image, but 0 images came with it"),
        ("<|image|>Hm?", "the prompt has 1 place for an image, but 0 images came with it"),
        ("<|image|><|video|>Hm?", "the prompt has 1 place for an image, but 0 images came with it"),
    ],
)
def test_images(model: DiffusionGemma, prompt: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        model.generate(prompt, markup=True)


def test_the_marker_of_an_image_is_text_unless_markup_is_read(model: DiffusionGemma) -> None:
    for prompt in ("<|image|>What is this?", [{"role": "user", "content": "<|image|>What is this?"}]):
        assert model.generate(prompt, seed=0, max_new_tokens=1).statistics.new_tokens == 1
    token = model.tokenizer.token_id("<|image|>")
    for raw in (False, True):
        assert token not in model.prompt_ids("<|image|>What is this?", raw=raw)
        with pytest.raises(InputError, match="the prompt has 1 place for an image, but 0 images came with it"):
            model.prompt_ids("<|image|>What is this?", raw=raw, markup=True)
    with pytest.raises(InputError, match="the prompt has places for 1 image, but 0 images came with it"):
        model.generate([token])


@pytest.mark.parametrize("prompt", ["", " ", [], [VOCAB_SIZE], [-1], [2**31], [2**40], [[]], [{}], [{"role": "user"}]])
def test_prompts_of_the_wrong_form(model: DiffusionGemma, prompt: Any) -> None:
    with pytest.raises(InputError) as error:
        model.generate(prompt)
    print(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("seed", [-1, 2**64, "1", 1.5, [1, 2]])
def test_seeds_of_the_wrong_form(model: DiffusionGemma, seed: Any) -> None:
    with pytest.raises(DiffGemmaError, match="seed"):
        model.generate([3], seed=seed)


def test_options_of_the_wrong_form(model: DiffusionGemma) -> None:
    for options, expected in (
        ({"heat": 1.0}, r"unknown option 'heat'; known are preset, max_new_tokens, .*, canvas_length$"),
        ({"max_new_token": 1}, r"unknown option 'max_new_token'; did you mean max_new_tokens\?$"),
        ({"tmax": 1.0}, r"unknown option 'tmax'; did you mean t_max\?$"),
        ({"heat": None}, "unknown option 'heat'"),
        ({"top_k": 5}, "top_k belongs to the causal mode; leave it out, or change the mode"),
        ({"mode": "causal", "t_max": 0.5}, "t_max belongs to the diffusion mode; leave it out, or change the mode"),
        ({"mode": "causal", "preset": "fast"}, "preset belongs to the diffusion mode; leave it out, or change the mode"),
        ({"preset": "fats"}, r"unknown preset 'fats'; did you mean fast\?$"),
        ({"preset": "turbo"}, "unknown preset 'turbo'; known are exact, fast, draft$"),
        ({"mode": "causal", "topk": 5}, r"unknown option 'topk'; did you mean top_k\?$"),
        ({"mode": "sideways"}, "unknown mode 'sideways'; known are diffusion and causal"),
        ({"max_new_tokens": 1.5}, "max_new_tokens must be an integer"),
        ({"max_new_tokens": True}, "max_new_tokens must be an integer"),
        ({"t_max": "0.5"}, "t_max must be a number from 0 to 1000"),
    ):
        with pytest.raises(InputError, match=expected):
            model.generate("Hi", **options)

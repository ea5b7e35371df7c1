"""Models from the hub: what is downloaded, in which order, and what is refused before it. The hub is a fake on this machine."""

import json
import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from click.testing import CliRunner
from huggingface_hub import constants

from mlx_diffgemma import BackendError, CheckpointError, InputError, load
from mlx_diffgemma.backends import find_place
from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.cli import main
from mlx_diffgemma.reports.summary import summarize
from support import hub
from support.checkpoints import edit_json, make_chat_checkpoint

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_checkpoint(tmp_path_factory.mktemp("chat"))


@pytest.fixture
def repository(chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub.Repository]:
    """The chat checkpoint on a hub, and an empty cache."""
    answer = hub.Repository(Path(shutil.copytree(chat, tmp_path / "remote")))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with hub.serve(answer) as endpoint:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        huggingface_hub.close_session()
        yield answer
    huggingface_hub.close_session()


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, list(arguments))
    print(result.stderr)
    return result.exit_code, result.stdout, result.stderr


def told(*arguments: str) -> str:
    """Run a command that must fail with one line, and return that line."""
    status, out, line = run(*arguments)
    assert (status, out, line.count("\n")) == (2, "", 1)
    assert line.startswith("mlx-diffgemma: error: ")
    return line


def commands(backend: str) -> list[list[str]]:
    chosen = ["--backend", backend]
    return [
        ["generate", "some/model", "Hi", *chosen],
        ["chat", "some/model", *chosen],
        ["infill", "some/model", "Hi <hole>", *chosen],
        ["revise", "some/model", "Hi", "--strength", "0.5", *chosen],
        ["bench", "some/model", "--prompt-length", "8", *chosen],
        ["serve", "some/model", "--port", "0", *chosen],
        ["verify", "some/model", "--backends", f"{backend},reference"],
    ]


def in_cache(tmp_path: Path, name: str = WEIGHTS) -> bool:
    return bool(list((tmp_path / "cache").rglob(name)))


def test_info_reads_only_the_header(repository: hub.Repository, chat: Path, tmp_path: Path) -> None:
    status, out, _ = run("info", "some/model", "--json")
    assert status == 0
    assert repository.got().count(WEIGHTS) == 1, "the first 100 kB, which hold the header"
    assert not in_cache(tmp_path)
    assert in_cache(tmp_path, "config.json")
    assert json.loads(out)["parameters"] == summarize(Checkpoint.open(chat)).parameters


def test_estimate_reads_only_the_header(repository: hub.Repository, tmp_path: Path) -> None:
    status, out, _ = run("bench", "some/model", "--estimate", "h100", "--prompt-length", "8")
    assert status == 0
    assert out.startswith("some/model on H100 SXM: ")
    assert repository.got().count(WEIGHTS) == 1
    assert not in_cache(tmp_path)


def test_generate_downloads_the_weights_last_and_then_needs_no_network(
    repository: hub.Repository, chat: Path, backend_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["Hi", "--seed", "3", "--backend", backend_name, "--quiet"]
    status, out, _ = run("generate", "some/model", *arguments)
    assert (status, out) == run("generate", str(chat), *arguments)[:2]
    assert status == 0
    got = repository.got()
    assert got[0] == "config.json"
    assert got[-2:] == [WEIGHTS, WEIGHTS], "its header, then all of it"
    assert "tokenizer.json" in got[1:-2]
    pinned = [path for _, path in repository.requests if "/resolve/" in path]
    assert all(f"/resolve/{hub.COMMIT}/" in path for path in pinned)
    repository.requests.clear()
    assert run("generate", "some/model", *arguments)[1] == out
    assert repository.got() == [], "all of it is in the cache"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert run("generate", "some/model", *arguments)[1] == out


def test_shards_are_downloaded_as_the_index_says(repository: hub.Repository, tmp_path: Path, backend_name: str) -> None:
    (repository.folder / WEIGHTS).rename(repository.folder / "all.safetensors")
    (repository.folder / "other.safetensors").write_bytes(b"not a part of the model")
    edit = {"weight_map": {"model.decoder.norm.weight": "all.safetensors"}}
    (repository.folder / "model.safetensors.index.json").write_text(json.dumps(edit))
    assert run("generate", "some/model", "Hi", "--backend", backend_name)[0] == 0
    assert not in_cache(tmp_path, "other.safetensors")


def test_a_backend_that_is_missing_costs_no_request(
    repository: hub.Repository, backend_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == backend_name else find(name))
    for command in commands(backend_name):
        assert f"backend '{backend_name}' needs the package {backend_name}, which is not installed" in told(*command), command
    with pytest.raises(BackendError):
        load("some/model", backend=backend_name)
    assert repository.requests == []


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["generate", "--max-new-tokens", "0"], "max_new_tokens must be an integer"),
        (["generate", "--mode", "causal", "--top-p", "2"], "top_p must be above 0 and at most 1"),
        (["generate", "--top-k", "2"], "top_k belongs to the causal mode"),
        (["generate", "--device", "nowhere"], "unknown torch device 'nowhere'"),
        (["chat", "--t-max", "0"], "t_max must be at least"),
        (["infill", "--t-min", "nan"], "t_min must be a number"),
        (["revise", "--entropy-bound", "-1"], "entropy_bound must be a number"),
        (["bench", "--repeats", "0"], "repeats must be at least 1"),
        (["bench", "--seed", "-1"], "a seed must be an integer between 0 and"),
    ],
)
def test_an_option_that_is_wrong_costs_no_request(repository: hub.Repository, options: list[str], expected: str) -> None:
    (command,) = [each for each in commands("torch") if each[0] == options[0]]
    assert expected in told(*command, *options[1:])
    assert repository.requests == []


def test_verify_checks_its_backends_first(repository: hub.Repository) -> None:
    assert "unknown backend 'jax'" in told("verify", "some/model", "--backends", "torch,jax")
    assert "there is nothing to compare" in told("verify", "some/model", "--backends", "torch")
    assert "tolerance must be at least 0" in told("verify", "some/model", "--backends", "torch,reference", "--tolerance", "-1")
    assert "runs on cpu or cuda, not on 'mps'" in told("verify", "some/model", "--backends", "torch,torch:mps")
    assert repository.requests == []


def test_another_model_is_noticed_by_its_config(repository: hub.Repository) -> None:
    edit_json(repository.folder / "config.json", model_type="llama")
    for command in commands("torch"):
        assert "model_type is 'llama', not 'diffusion_gemma'" in told(*command), command
    assert set(repository.got()) == {"config.json"}


def damage_tokenizer(folder: Path) -> str:
    (folder / "tokenizer.json").write_text("{")
    return "tokenizer.json"


def damage_shape(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", text_config={**config["text_config"], "intermediate_size": 64})
    return "the weights do not fit config.json"


def shrink_canvas(folder: Path) -> str:
    edit_json(folder / "config.json", canvas_length=4)
    return "canvas_length 8 is larger than the model's 4"


@pytest.mark.parametrize("damage", [damage_tokenizer, damage_shape, shrink_canvas])
def test_what_small_files_and_headers_show_is_known_before_the_weights(
    repository: hub.Repository, tmp_path: Path, backend_name: str, damage: Any
) -> None:
    expected = damage(repository.folder)
    for command in commands(backend_name)[:4]:  # those that take a canvas_length
        assert expected in told(*command, "--canvas-length", "8"), command
    assert not in_cache(tmp_path)


def test_texts_that_are_too_long_are_known_before_the_weights(repository: hub.Repository, tmp_path: Path) -> None:
    for command, text in (("generate", "word " * 600), ("infill", "word " * 600 + "<hole>"), ("revise", "word " * 600)):
        options = ["--strength", "0.5"] if command == "revise" else []
        assert "exceed the model's context of 512 tokens" in told(command, "some/model", text, "--backend", "torch", *options)
    assert not in_cache(tmp_path)


def test_a_model_that_does_not_fit_into_memory(
    repository: hub.Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_diffgemma.backends.torch.backend.main_memory", lambda: 200_000)
    for command in commands("torch"):
        assert "some/model needs" in told(*command), command
    line = told("generate", "some/model", "Hi", "--backend", "torch")
    assert "in float32 (weights 226.3 kB" in line
    assert "but torch on cpu has only 200.0 kB free" in line
    assert "To load it anyway, use force (--force)" in line
    assert not in_cache(tmp_path)
    with pytest.raises(BackendError, match="some/model needs"):
        load("some/model", backend="torch", device="cpu")
    assert load("some/model", backend="torch", device="cpu", force=True).generate([3], seed=0, max_new_tokens=1).tokens
    assert run("generate", "some/model", "Hi", "--backend", "torch", "--force")[0] == 0


def test_a_disk_without_room(repository: hub.Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(100, 99, 1000))
    monkeypatch.setattr(huggingface_hub.file_download, "_check_disk_space", lambda *_: None)
    line = told("generate", "some/model", "Hi", "--backend", "torch")
    size = (repository.folder / WEIGHTS).stat().st_size
    assert f"the weights need {size / 1000:.1f} kB more on the disk of the hub's cache, but only 1.0 kB are free" in line
    assert not in_cache(tmp_path)


def test_offline(repository: hub.Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(source: str) -> str:
        line = told("generate", source, "Hi", "--backend", "torch")
        assert "offline mode is set, and the local cache does not have all of it" in line
        assert "HF_HUB_OFFLINE" in line
        assert "network" not in line
        return line

    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        refused("some/model")
    assert run("info", "some/model")[0] == 0
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        refused("some/model")  # all but the weights is in the cache
    assert repository.got().count(WEIGHTS) == 1


def test_a_header_on_the_hub_that_is_damaged(repository: hub.Repository, tmp_path: Path) -> None:
    (repository.folder / WEIGHTS).write_bytes(b"\xff" * 200)
    assert "the weights on the hub are not safetensors" in told("info", "some/model")
    (repository.folder / WEIGHTS).write_bytes(b"<!DOCTYPE html>")
    assert "some/model" in told("info", "some/model")


def test_a_repository_without_weights(repository: hub.Repository) -> None:
    (repository.folder / WEIGHTS).unlink()
    assert "neither model.safetensors nor an index of shards is there" in told("info", "some/model")


def test_the_place_is_found_without_a_checkpoint(backend_name: str) -> None:
    place = find_place(backend_name)
    assert (place.backend, place.dtype in place.dtypes) == (backend_name, True)
    with pytest.raises(InputError, match="device 'x'"):
        find_place(backend_name, device="x")


def test_a_source_without_the_form_of_a_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_diffgemma.pipeline.find_place", None)  # is not reached
    for source in ("nowhere", "a/b/c", "x" * 5000, "a\0b", "~nobody-here/x/y", Path("some/model")):
        with pytest.raises(CheckpointError, match="no such folder, and not a hub id"):
            load(source)

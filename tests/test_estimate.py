"""The estimate of the least time that a pass takes: its counts against numbers worked out by hand, and the command."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.cli import main
from mlx_diffgemma.errors import CheckpointError, InputError
from mlx_diffgemma.reports.estimate import HARDWARE, Work, estimate, find_hardware, recognize
from support.checkpoints import HUB, make_hub_layout

HIDDEN, LAYERS, EXPERTS, CHOSEN, MOE, INNER, VOCABULARY = 2816, 30, 128, 8, 704, 2112, 262_144
SLIDING, FULL, WINDOW = 25, 5, 1024
BITS_4, BITS_8 = (4 + 32 / 64) / 8, (8 + 32 / 64) / 8  # bytes of a weight, with its share of a group's scale and bias


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folders = {layout: make_hub_layout(tmp_path_factory.mktemp("hub") / layout, layout) for layout in HUB}
    return folders.__getitem__


def bytes_of(work: Work) -> dict[str, int]:
    return {share.name: share.nbytes for share in work.shares}


def flops_of(work: Work) -> dict[str, int]:
    return {share.name: share.flops for share in work.shares}


def run(*arguments: str) -> str:
    result = CliRunner().invoke(main, ["bench", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_step_of_the_released_4_bit_layout(hub: Callable[[str], Path]) -> None:
    step = estimate(Checkpoint.open(hub("hub_4bit")), 1024).step
    experts = LAYERS * EXPERTS * 3 * HIDDEN * MOE
    queries, keys = (16 * 256, 8 * 256), (16 * 512, 2 * 512)
    # Full layers have no v_proj.
    attention = HIDDEN * (SLIDING * (2 * queries[0] + 2 * queries[1]) + FULL * (2 * keys[0] + keys[1]))
    mlp, conditioning, table = LAYERS * 3 * HIDDEN * INNER, 3 * HIDDEN * INNER, VOCABULARY * HIDDEN
    expected = {
        "experts": (experts * BITS_4, 2 * 256 * experts * CHOSEN / EXPERTS),
        "attention": (attention * BITS_8, 2 * 256 * attention),
        "mlp": (mlp * BITS_8, 2 * 256 * mlp),
        "router": (LAYERS * EXPERTS * HIDDEN * BITS_8, 2 * 256 * LAYERS * EXPERTS * HIDDEN),
        "self_conditioning": (conditioning * BITS_4, 2 * 256 * conditioning),
        "embedding, output head": (table * BITS_8, 2 * 256 * table),
        "embedding, self-conditioning": (table * BITS_8, 2 * 256 * table),
        "embedding, rows": (256 * HIDDEN * BITS_8, 0),
        "keys and values": (
            2 * 2 * (SLIDING * 8 * 256 * (WINDOW - 1) + FULL * 2 * 512 * 1024),
            4 * 16 * 256 * (SLIDING * 256 * (WINDOW - 1 + 256) + FULL * 512 * (1024 + 256)),
        ),
    }
    for name, (nbytes, flops) in expected.items():
        print(name, bytes_of(step)[name], flops_of(step)[name])
        assert bytes_of(step)[name] == pytest.approx(nbytes, rel=1e-6)  # 256 tokens leave an expert out with probability 7e-8
        assert flops_of(step)[name] == flops
    assert bytes_of(step).keys() == {*expected, "norms and scales"}
    weights = step.nbytes - bytes_of(step)["keys and values"]
    assert f"{weights / 1e9:.1f}" == "16.2"
    floors = {name: f"{weights / find_hardware(name).bandwidth / 1e6:.1f}" for name in ("H100", "H200")}
    assert floors == {"H100": "4.8", "H200": "3.4"}
    # In bfloat16, each of q, k, v, the heads' outputs, and the ends of the other products; the logits three times.
    layer = 4 * HIDDEN + 2 * INNER + 2 * CHOSEN * (HIDDEN + MOE) + HIDDEN + EXPERTS
    layers = LAYERS * layer + SLIDING * (4 * queries[0] + 4 * queries[1]) + FULL * (4 * keys[0] + 4 * keys[1])
    ends = 3 * VOCABULARY + 4 * HIDDEN + 2 * INNER
    assert step.activations == 2 * 256 * (layers + ends)


def test_the_same_step_in_bfloat16_reads_two_bytes_a_weight(hub: Callable[[str], Path]) -> None:
    packed, plain = (estimate(Checkpoint.open(hub(layout)), 1024).step for layout in ("hub_4bit", "hub_bf16"))
    assert bytes_of(plain)["experts"] / bytes_of(packed)["experts"] == pytest.approx(2 / BITS_4)
    assert bytes_of(plain)["attention"] / bytes_of(packed)["attention"] == pytest.approx(2 / BITS_8)
    assert bytes_of(plain)["keys and values"] == bytes_of(packed)["keys and values"]
    assert flops_of(plain) == flops_of(packed)


def test_experts_touched(hub: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint.open(hub("hub_4bit"))
    every = LAYERS * EXPERTS * 3 * HIDDEN * MOE * BITS_4
    assert bytes_of(estimate(checkpoint, 1).token)["experts"] == pytest.approx(every * 8 / 128)
    assert bytes_of(estimate(checkpoint, 1, canvas_length=2).step)["experts"] == pytest.approx(every * (16 - 0.5) / 128)


def test_passes_of_other_kinds(hub: Callable[[str], Path]) -> None:
    """A causal token reads the head alone, a commit and a prompt neither; a long prompt reads the weights once per piece."""
    result = estimate(Checkpoint.open(hub("hub_4bit")), 2500)
    heads = {"embedding, output head", "embedding, self-conditioning", "self_conditioning"}
    assert [len(bytes_of(work).keys() & heads) for work in result.works] == [3, 0, 1, 0]
    assert flops_of(result.token)["embedding, output head"] == 2 * VOCABULARY * HIDDEN
    for name in ("attention", "mlp", "router", "experts", "norms and scales"):
        assert bytes_of(result.prompt)[name] == pytest.approx(3 * bytes_of(result.commit)[name], rel=1e-6)
    assert flops_of(result.prompt)["mlp"] == 2 * 2500 * LAYERS * 3 * HIDDEN * INNER


def test_attention_of_the_causal_pass(hub: Callable[[str], Path]) -> None:
    """Each query sees itself and what is before it, on sliding layers only the window."""
    result = estimate(Checkpoint.open(hub("hub_4bit")), 2500)
    for work, positions in ((result.prompt, range(2500)), (result.commit, range(2500, 2756)), (result.token, range(2500, 2501))):
        sliding, full = (sum(min(position + 1, reach) for position in positions) for reach in (WINDOW, 10**9))
        assert flops_of(work)["keys and values"] == 4 * 16 * (SLIDING * 256 * sliding + FULL * 512 * full)
    position, full = 2 * 2 * 8 * 256, 2 * 2 * 2 * 512
    read, written = SLIDING * position * 1023 + FULL * full * 2500, SLIDING * position * 256 + FULL * full * 256
    assert bytes_of(result.commit)["keys and values"] == read + written
    pieces = [(0, 1024), (1024, 1024), (2048, 452)]
    expected = sum(SLIDING * position * (min(a, 1023) + min(n, 1023)) + FULL * full * (a + n) for a, n in pieces)
    assert bytes_of(result.prompt)["keys and values"] == expected


def test_floors_follow_the_machine(hub: Callable[[str], Path]) -> None:
    result = estimate(Checkpoint.open(hub("hub_4bit")), 512)
    by_bandwidth = sorted(HARDWARE, key=lambda each: each.bandwidth)
    for work in result.works:
        times = [work.reading(each) for each in by_bandwidth]
        assert times == sorted(times, reverse=True)
        for each in HARDWARE:
            unknown = dataclasses.replace(each, tflops=None)
            assert work.floor(unknown) == work.reading(each) == work.nbytes / (each.bandwidth * 1e9)
            assert work.floor(each) >= work.floor(unknown)
            if each.tflops is not None:
                assert work.floor(each) >= work.flops / (each.tflops * 1e12)
                faster = dataclasses.replace(each, bandwidth=2 * each.bandwidth, tflops=2 * each.tflops)
                assert work.floor(faster) == pytest.approx(work.floor(each) / 2)
    assert [result.step.bound(find_hardware(name)) for name in ("M1", "H100")] == ["arithmetic", "memory"]


def test_tokens_per_second_count_the_commit(hub: Callable[[str], Path]) -> None:
    result, h200 = estimate(Checkpoint.open(hub("hub_4bit")), 512), find_hardware("H200")
    seconds = 16 * result.step.floor(h200) + result.commit.floor(h200)
    assert result.tokens_per_second(h200, 16) == pytest.approx(256 / seconds)


def test_what_fits(hub: Callable[[str], Path]) -> None:
    def fitting(layout: str) -> list[str]:
        result = estimate(Checkpoint.open(hub(layout)), 512)
        return [each.name for each in HARDWARE if result.fits(each)]

    assert fitting("hub_4bit") == [each.name for each in HARDWARE if each.name != "M1"]
    assert {"H100 SXM", "DGX Spark", "M3 Max"} < set(fitting("hub_bf16"))
    assert not {"M3", "RTX 5090", "M1 Pro"} & set(fitting("hub_bf16"))


def test_machines_have_sources() -> None:
    assert len({each.name for each in HARDWARE}) == len(HARDWARE)
    for each in HARDWARE:
        assert each.source.startswith(("Apple, ", "NVIDIA, "))
        assert each.name.startswith("M") == each.source.startswith("Apple, ") == (each.system is None)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("M3 Pro", "M3 Pro"),
        ("m3-pro", "M3 Pro"),
        ("m1", "M1"),
        ("4090", "RTX 4090"),
        ("h100", "H100 SXM"),
        ("SPARK", "DGX Spark"),
    ],
)
def test_names_in_any_spelling(name: str, found: str) -> None:
    assert find_hardware(name).name == found


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("M4 Ultra", "unknown machine 'M4 Ultra'; the nearest are M3 Ultra, M2 Ultra, M1 Ultra"),
        ("rtx", "unknown machine 'rtx'; the nearest are RTX 3090, RTX 4090, RTX 5090"),
        ("abacus", "unknown machine 'abacus'; known are M1, M1 Pro, "),
        ("", "unknown machine ''; known are M1, M1 Pro, "),
    ],
)
def test_unknown_machines(name: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        find_hardware(name)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_this_machine_is_recognized_by_what_it_reports() -> None:
    def name(cpu: str, gpu: str | None = None) -> str | None:
        found = recognize(cpu, gpu)
        return found and found.name

    assert name("Apple M3 Pro") == "M3 Pro"
    assert name("Apple M3") == "M3"
    assert name("AMD EPYC", "NVIDIA H100 80GB HBM3") == "H100 SXM"
    assert name("AMD EPYC", "NVIDIA H100 PCIe") is None, "slower than the SXM"
    assert name("Intel", "NVIDIA GeForce RTX 4090 Laptop GPU") is None
    assert name("Intel") is None


def test_weights_that_are_missing(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint("base"), tmp_path / "part")
    [file] = folder.glob("*.safetensors")
    save_file({name: tensor for name, tensor in load_file(file).items() if ".experts." not in name}, file)
    with pytest.raises(CheckpointError, match="the weights of experts are missing; fetch them again"):
        estimate(Checkpoint.open(folder), 8)


def test_command_for_one_machine(hub: Callable[[str], Path]) -> None:
    text = run(str(hub("hub_4bit")), "--estimate", "h100", "--prompt-length", "1024")
    print(text)
    assert "20.1 GB needed, 85.9 GB there at most: fits" in text
    for line in (
        "experts                                     12,846.4    730.8  128.0 of 128 in each layer, 8 for each token",
        "reading      16,417.5 MB / 3,350 GB/s = 4.90 ms",
        "arithmetic   2,531.7 GFLOP / 989.4 TFLOP/s = 2.56 ms",
        "floor        4.90 ms, by memory",
    ):
        assert line in text.splitlines()
    assert ", by reading alone" in run(str(hub("hub_4bit")), "--estimate", "m3-max"), "its arithmetic is not published"


def test_command_for_all_machines(hub: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_diffgemma.cli.bench.recognize", lambda cpu, gpu: None)
    text = run(str(hub("hub_4bit")), "--estimate")
    lines = text.splitlines()
    for each in HARDWARE:
        assert any(line.startswith(f"{each.name}  ") for line in lines), each.name
    assert text == run(str(hub("hub_4bit")), "--estimate", "all")
    monkeypatch.setattr("mlx_diffgemma.cli.bench.recognize", lambda cpu, gpu: find_hardware("M2"))
    assert run(str(hub("hub_4bit")), "--estimate") == run(str(hub("hub_4bit")), "--estimate", "M2")


@pytest.mark.parametrize("model", ["sudoku", "pictures"])
def test_boxed_models_as_json(model: str) -> None:
    result = json.loads(run(model, "--estimate", "m5", "--prompt-length", "20", "--json"))
    expected = estimate(Checkpoint.open(model), 20)
    assert {name: result[name] for name in ("model", "prompt_length", "canvas_length")} == {
        "model": model,
        "prompt_length": 20,
        "canvas_length": expected.canvas_length,
    }
    [machine] = result["machines"]
    assert machine["seconds"]["step"] == expected.step.floor(find_hardware("M5"))
    assert machine["name"] == "M5"
    assert machine["fits"] is True
    assert result["step"]["shares"] == [dataclasses.asdict(share) for share in expected.step.shares]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sudoku", "--estimate", "m33"], "unknown machine 'm33'; the nearest are M3, "),
        (["sudoku", "--estimate", "--prompt-length", "100000"], "exceed the model's context"),
        (["sudoku", "--estimate", "--canvas-length", "1000"], "canvas_length 1000"),
        (["nowhere", "--estimate", "m3"], "no such folder"),
        ([], "Missing argument 'MODEL'"),
    ],
)
def test_command_exits_2_for_bad_input(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(main, ["bench", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_the_default_is_the_released_4_bit_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    opened, sudoku = [], Checkpoint.open("sudoku")
    monkeypatch.setattr(Checkpoint, "open", lambda model, revision: opened.append(model) or sudoku)
    assert run("--estimate", "m1").startswith("mlx-community/diffusiongemma-26B-A4B-it-4bit on M1: ")
    assert opened == ["mlx-community/diffusiongemma-26B-A4B-it-4bit"]


def test_the_page_shows_what_the_command_prints(hub: Callable[[str], Path]) -> None:
    page = (Path(__file__).parents[1] / "docs" / "performance.md").read_text()
    released = str(hub("hub_4bit"))
    everything = run(released, "--estimate", "all", "--prompt-length", "1024").rstrip()
    assert everything.replace(released, "mlx-community/diffusiongemma-26B-A4B-it-4bit") in page
    step = run(released, "--estimate", "h100", "--prompt-length", "1024").split("\n\n")[1]
    assert f"```\n{step}\n```" in page

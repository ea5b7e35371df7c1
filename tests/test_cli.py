"""The command line as a user sees it: stdout, stderr and the exit status."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mlx_diffgemma import Block, Content, Draft, Generation, GenerationConfig, Infill, infill, load, revise
from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.cli import COMMANDS, main
from mlx_diffgemma.cli.generate import TextView
from mlx_diffgemma.pipeline import DiffusionGemma
from mlx_diffgemma.reports.summary import summarize
from mlx_diffgemma.tokenizer import Tokenizer
from support.checkpoints import HUB, VOCAB_SIZE, make_chat_checkpoint, make_hub_layout
from support.fake import MODEL, FakeBackend, full
from support.tiny_tokenizer import write_tokenizer

PROGRAM = [sys.executable, "-c", "from mlx_diffgemma.cli import main; main()"]
QUESTION = "Why is the sky blue?"


@pytest.fixture(scope="session")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_checkpoint(tmp_path_factory.mktemp("chat"))


def run(*arguments: object, **options: Any) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], **options)
    assert result.exit_code == 0, f"status {result.exit_code}: {result.output} {result.exception!r}"
    return result


@pytest.fixture(scope="session")
def expected(chat: Path) -> Callable[..., Generation]:
    """The API's result for a prompt."""
    return load(chat).generate


def test_text_on_stdout_and_the_rest_on_stderr(chat: Path, expected: Callable[..., Generation]) -> None:
    generation = expected(QUESTION, seed=7)
    result = run("generate", chat, QUESTION, "--seed", 7)
    assert result.stdout == generation.text + "\n"
    assert re.fullmatch(
        r"18 prompt tokens, 20 new tokens in [\d.]+ s \([\d.]+ per second\); denoising steps by block: 4, 4, 4 "
        r"\(1\.7 tokens per step\); finish reason: length; seed: 7\n",
        result.stderr,
    )
    quiet = run("generate", chat, QUESTION, "--seed", 7, "--quiet")
    assert (quiet.stdout, quiet.stderr) == (result.stdout, "")


def test_prompt_from_everywhere(chat: Path, expected: Callable[..., Generation], tmp_path: Path) -> None:
    text = expected(QUESTION, seed=7).text + "\n"
    file = tmp_path / "prompt.txt"
    file.write_text(QUESTION + "\n")
    assert run("generate", chat, "--file", file, "--seed", 7).stdout == text
    assert run("generate", chat, "-", "--seed", 7, input=QUESTION + "\n").stdout == text
    assert run("generate", chat, "--seed", 7, input=QUESTION).stdout == text
    # an argument is the prompt even if standard input is not a terminal
    assert run("generate", chat, QUESTION, "--seed", 7, input="something else").stdout == text
    unicode = "Größe 🌊 空"
    assert run("generate", chat, "--seed", 7, input=unicode).stdout == expected(unicode, seed=7).text + "\n"


def test_options_reach_the_model(chat: Path, expected: Callable[..., Generation], backend_name: str) -> None:
    options = {
        "max_new_tokens": 11, "max_denoising_steps": 3, "t_min": 0.2, "t_max": 1.5, "entropy_bound": 2.0,
        "stability_threshold": 0, "confidence_threshold": 3.5, "canvas_length": 5,
    }  # fmt: skip
    base = ["generate", chat, QUESTION, "--json", "--backend", backend_name, "--dtype", "float32", "--device", "cpu"]
    given = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", value)]
    for flags, more in (
        ([], {}),
        (["--greedy"], {"greedy": True}),
        (["--raw"], {"raw": True}),
        (["--system", "Be brief."], {"system": "Be brief."}),
        (["--system", "<|think|>"], {"system": "<|think|>"}),
        (["--system", "<|think|>", "--markup"], {"system": "<|think|>", "markup": True}),
    ):
        content = json.loads(run(*base, "--seed", 3, *given, *flags).stdout)
        wanted = expected(QUESTION, seed=3, **options, **more)
        assert content["tokens"] == wanted.tokens, f"{flags}"
        assert content["statistics"]["denoising_steps"] == list(wanted.statistics.denoising_steps)
        assert content["statistics"]["prompt_tokens"] == wanted.statistics.prompt_tokens


@pytest.mark.parametrize("command", ["infill", "revise"])
def test_system_and_markup_reach_the_editors(chat: Path, command: str) -> None:
    """Each flag changes the prompt, and so, with the same seed, the text that is written or its scores."""
    model, text = load(chat), "Why <|think|><hole:3> blue?" if command == "infill" else "Why <|think|> is it blue?"
    base = [command, chat, text, "--seed", 3, "--json", *(["--strength", 0.9] if command == "revise" else [])]
    results = []
    for flags, more in (
        ([], {}),
        (["--system", "Be brief."], {"system": "Be brief."}),
        (["--markup"], {"markup": True}),
        (["--markup", "--system", "<|think|>"], {"markup": True, "system": "<|think|>"}),
        (["--markup", "--raw"], {"markup": True, "raw": True}),
    ):
        content = json.loads(run(*base, *flags).stdout)
        given: dict[str, Any] = {"seed": 3, **more}
        wanted = infill(model, text, **given) if command == "infill" else revise(model, text, 0.9, **given)
        assert content["text"] == wanted.text, f"{flags}"
        results.append((wanted.text, wanted.fillings[0].candidate.score if isinstance(wanted, Infill) else 0))
    assert len(set(results)) == len(results)
    result = CliRunner().invoke(main, [str(argument) for argument in (*base, "--raw", "--system", "x")])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "a system message needs the chat template" in result.stderr


def test_json(chat: Path, expected: Callable[..., Generation]) -> None:
    result = run("generate", chat, QUESTION, "--json")
    assert result.stderr == ""
    content = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    generation = expected(QUESTION, seed=content["seed"])
    for name in ("text", "tokens", "finish_reason"):
        assert content[name] == getattr(generation, name)
    statistics = content["statistics"]
    assert statistics["tokens_per_forward"] == pytest.approx(len(generation.tokens) / sum(statistics["denoising_steps"]))
    seconds = statistics["encode_seconds"] + statistics["denoise_seconds"]
    assert statistics["tokens_per_second"] == pytest.approx(len(generation.tokens) / seconds)


def test_a_fresh_seed_is_told_and_reproduces(chat: Path) -> None:
    results = [run("generate", chat, QUESTION) for _ in range(2)]
    seeds = [re.search(r"seed: (\d+)\n", result.stderr)[1] for result in results]
    assert seeds[0] != seeds[1]
    assert run("generate", chat, QUESTION, "--seed", seeds[0]).stdout == results[0].stdout


def test_text_is_shown_by_blocks_and_characters_are_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tokenizer(tmp_path, VOCAB_SIZE)
    tokenizer = Tokenizer.from_folder(tmp_path)
    wave = [tokenizer.token_id(f"<0x{byte:02X}>") for byte in "🌊".encode()]
    a, b, c = (tokenizer.encode(letter)[0] for letter in "abc")
    texts = [[a, b, c, a, *wave[:2]], [*wave[2:], b, b, wave[0], wave[1]], [c] * 6]
    backend = FakeBackend(lambda asked: full(texts[asked.block]), dataclasses.replace(MODEL, vocab_size=VOCAB_SIZE))
    generation = GenerationConfig(max_new_tokens=13, max_denoising_steps=1)
    model = DiffusionGemma(Checkpoint(tmp_path, backend.config, generation, {}, {}, {}), backend)

    view, shown = TextView(summary=False), []
    for event in model.stream([5], seed=0):
        view(event)
        shown.append((type(event), capsys.readouterr().out))
    assert shown == [
        (Draft, ""),
        (Block, ""),
        (Content, "abca"),
        (Draft, ""),
        (Block, ""),
        (Content, "🌊bb"),
        (Draft, ""),
        (Block, ""),
        (Content, "\ufffdc"),  # the cut at 13 tokens holds in the stream too
        (Generation, "\n"),
    ]


# Signals and pipes, each in a separate process.


def test_reader_that_goes_away(chat: Path) -> None:
    command = [*PROGRAM, "generate", str(chat), QUESTION, "--max-new-tokens", "400", "--quiet"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_full_disk_under_the_output(chat: Path) -> None:
    with open("/dev/full", "w") as full_disk:
        result = subprocess.run(
            [*PROGRAM, "info", str(chat)], stdout=full_disk, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    assert (result.returncode, result.stderr) == (2, "mlx-diffgemma: error: No space left on device\n")


def test_ctrl_c_keeps_what_was_written(chat: Path, expected: Callable[..., Generation]) -> None:
    first = expected(QUESTION, seed=7, max_new_tokens=8, max_denoising_steps=100, confidence_threshold=0)
    # A shell that starts the tests in the background makes them, and what they start, ignore SIGINT.
    heeding = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {PROGRAM[-1]}"
    command = [*PROGRAM[:-1], heeding, "generate", str(chat), QUESTION, "--seed", "7", "--max-new-tokens", "480"]  # 60 blocks
    command += ["--max-denoising-steps", "100", "--confidence-threshold", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        begun = os.read(process.stdout.fileno(), 1)  # wait for the first block
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err.decode()
    assert err == b"\n", "the end of the text's line, and no traceback"
    assert (begun + out).decode().startswith(first.text.rstrip("\ufffd"))  # half a character is held back


# The commands.


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help(command: str | None) -> None:
    text = run(*([command] if command else []), "--help").stdout
    assert text.startswith("Usage: ")
    assert all(len(line) <= 80 for line in text.splitlines())
    if command is None:
        assert [line.split()[0] for line in text.split("Commands:\n")[1].splitlines()] == list(COMMANDS)


def test_every_sampler_option_of_the_configuration_can_be_given() -> None:
    text = run("generate", "--help").stdout
    names = set(GenerationConfig.option_names()) - {"eos_token_ids", "pad_token_id"}
    assert {name for name in names if f"--{name.replace('_', '-')} " in text} == names


def test_version() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert run("--version", prog_name="mlx-diffgemma").stdout == f"mlx-diffgemma {project['version']}\n"


def test_wrong_usage() -> None:
    for arguments in (["paint"], ["generate"], ["info", "a", "b"], ["generate", "m", "--heat", "1"]):
        result = CliRunner().invoke(main, arguments)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith("Usage: ")


@pytest.mark.parametrize("layout", HUB)
def test_info(layout: str, tmp_path: Path) -> None:
    folder = make_hub_layout(tmp_path / layout, layout)
    summary = summarize(Checkpoint.open(folder), 5000)
    content = json.loads(run("info", folder, "--context", 5000, "--json").stdout)
    assert content["parameters"] == summary.parameters
    assert content["parts"][0] == {**dataclasses.asdict(summary.parts[0]), "bits_per_weight": summary.parts[0].bits_per_weight}
    assert content["memory"]["bfloat16"]["total"] == summary.memory["bfloat16"].total
    assert content["generation"]["eos_token_ids"] == [1, 106, 50]
    assert content["config"]["layers"][5]["head_dim"] == 512

    lines = run("info", folder, "--context", 5000).stdout.splitlines()
    cells = {line.split("  ")[0].strip(): re.split(r" {2,}", line.strip())[1:] for line in lines if "  " in line.strip()}
    for part in summary.parts:
        numbers = [f"{part.parameters:,}", f"{part.nbytes:,}", f"{part.bits_per_weight:.2f}"]
        assert cells[part.name] == [part.format, *numbers]
    assert cells["parameters"] == ["25,823,781,228; active for each token: 3,840,375,612"]
    assert cells["layers"] == ["30: 25 with a window of 1,024, 5 full"]
    assert cells["cache of 5,000 tokens, with room"] == [f"{summary.memory[dtype].cache:,}" for dtype in ("float32", "bfloat16")]
    assert cells["max_denoising_steps"] == ["48"]
    assert cells["eos_token_ids"] == ["1, 106, 50"]

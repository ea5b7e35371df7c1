"""Presets: what they change, what wins over them, and where they are taken. What they cost is in benchmarks/presets.py."""

import dataclasses
import json
from collections.abc import Callable
from math import ceil
from typing import Any

import pytest
from click.testing import CliRunner

from mlx_diffgemma import Conversation, Reply, infill, load, revise
from mlx_diffgemma.cli import main
from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.demo.sudoku import fresh_puzzle
from mlx_diffgemma.errors import InputError
from mlx_diffgemma.pipeline import DiffusionGemma
from mlx_diffgemma.presets import PRESETS, configured
from mlx_diffgemma.server.errors import ApiError
from mlx_diffgemma.server.requests import chat_request, completion_request, infill_request
from mlx_diffgemma.writing import sampling_config
from support.comparing import BACKENDS
from support.serving import serving

RELEASED = GenerationConfig()
SUDOKU = GenerationConfig(max_new_tokens=40, t_max=1.4, confidence_threshold=0.02)
PUZZLES = [fresh_puzzle(6, clues, seed).clues.text() for clues, seed in ((11, 0), (12, 1), (14, 2), (16, 3), (24, 4))]


@pytest.fixture(scope="module")
def model(backend_name: str) -> DiffusionGemma:
    return load("sudoku", backend=backend_name, device="cpu", dtype="float32")


def steps(model: DiffusionGemma, **options: Any) -> list[int]:
    return [sum(model.generate(puzzle, seed=1, **options).statistics.denoising_steps) for puzzle in PUZZLES]


@pytest.mark.parametrize("own", [RELEASED, SUDOKU, GenerationConfig(stability_threshold=3, max_denoising_steps=5)])
def test_each_preset_is_looser_than_the_one_before(own: GenerationConfig) -> None:
    """A preset multiplies the checkpoint's own values, and none of them asks for more steps than a stricter one."""
    exact, fast, draft = (configured(own, {"preset": name}) for name in ("exact", "fast", "draft"))
    assert list(PRESETS) == ["exact", "fast", "draft"]
    assert exact == own
    for strict, loose in ((exact, fast), (fast, draft)):
        assert loose != strict
        assert loose.confidence_threshold >= strict.confidence_threshold
        assert loose.entropy_bound >= strict.entropy_bound
        assert loose.stability_threshold <= strict.stability_threshold
        assert 1 <= loose.max_denoising_steps <= strict.max_denoising_steps
    for name, config in (("fast", fast), ("draft", draft)):
        for option, factor in PRESETS[name].items():
            before, after = getattr(own, option), getattr(config, option)
            assert after == (ceil(factor * before) if isinstance(before, int) else pytest.approx(factor * before)), option
        kept = {field.name for field in dataclasses.fields(own)} - set(PRESETS[name])
        assert {option: getattr(config, option) for option in kept} == {option: getattr(own, option) for option in kept}


def test_presets_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        PRESETS["fast"] = {}  # type: ignore[index]
    with pytest.raises(TypeError):
        PRESETS["fast"]["entropy_bound"] = 100  # type: ignore[index]


def test_options_win_over_the_preset() -> None:
    draft = configured(RELEASED, {"preset": "draft"})
    assert draft.confidence_threshold != 0.007
    given = configured(RELEASED, {"preset": "draft", "confidence_threshold": 0.007, "entropy_bound": None, "greedy": True})
    assert given == dataclasses.replace(draft, confidence_threshold=0.007, greedy=True)
    assert configured(RELEASED, {"preset": None, "t_max": 0.9}) == dataclasses.replace(RELEASED, t_max=0.9)
    assert sampling_config(RELEASED, "diffusion", {"preset": "draft", "stability_threshold": 2}).stability_threshold == 2  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ("Draft", "unknown preset 'Draft'; did you mean draft?"),
        ("quick", "unknown preset 'quick'; known are exact, fast, draft"),
        (1, "preset must be one of exact, fast, draft, got 1"),
    ],
)
def test_an_unknown_preset(preset: object, message: str) -> None:
    with pytest.raises(InputError) as error:
        configured(RELEASED, {"preset": preset})
    assert str(error.value) == message


def test_exact_writes_what_no_preset_writes(model: DiffusionGemma) -> None:
    for puzzle in PUZZLES:
        plain, exact = (model.generate(puzzle, seed=1, preset=preset) for preset in (None, "exact"))
        assert exact.tokens == plain.tokens
        assert exact.statistics.denoising_steps == plain.statistics.denoising_steps


def test_fewer_steps(model: DiffusionGemma) -> None:
    exact, fast, draft = (steps(model, preset=name) for name in ("exact", "fast", "draft"))
    print(f"steps of {len(PUZZLES)} puzzles: exact {exact}, fast {fast}, draft {draft}")
    assert sum(exact) > sum(fast) >= sum(draft)
    endless = [model.generate(PUZZLES[0], seed=1, preset=name, confidence_threshold=0.0) for name in ("fast", "draft")]
    assert [each.statistics.denoising_steps for each in endless] == [(48,), (24,)], "no step is confident enough"


def test_the_same_tokens_on_all_backends() -> None:
    models = [load("sudoku", backend=name, device="cpu", dtype="float32") for name in BACKENDS]
    for preset in PRESETS:
        for puzzle in PUZZLES:
            written = [each.generate(puzzle, seed=1, preset=preset) for each in models]
            tokens = [(each.tokens, each.statistics.denoising_steps) for each in written]
            assert all(each == tokens[0] for each in tokens), f"{preset}: {tokens}"


def test_wherever_options_are_taken(model: DiffusionGemma) -> None:
    """Each way to write takes a preset, and writes what the preset's values write."""
    config = configured(model.checkpoint.generation, {"preset": "draft"})
    values = {option: getattr(config, option) for option in PRESETS["draft"]}

    def chatted(**options: Any) -> object:
        *_, reply = Conversation(model).send(PUZZLES[0], seed=1, **options)
        assert isinstance(reply, Reply)
        return reply.tokens, reply.statistics.denoising_steps

    ways: dict[str, Callable[..., object]] = {
        "generate": lambda **options: model.generate(PUZZLES[0], seed=1, **options).tokens,
        "steps": lambda **options: steps(model, **options),
        "chat": chatted,
        "infill": lambda **options: infill(model, "12<hole:6>", raw=True, seed=1, **options).fillings,
        "revise": lambda **options: dataclasses.asdict(revise(model, PUZZLES[0], 1.0, seed=1, **options)),
    }
    differ = []
    for name, way in ways.items():
        assert way(preset="draft") == way(**values), name
        differ.append(way(preset="draft") != way())
    assert any(differ), "the preset changed nothing"


def of_command(*arguments: object) -> Any:
    run = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert run.exit_code == 0, run.output
    return json.loads(run.stdout)


def test_commands(model: DiffusionGemma, backend_name: str) -> None:
    place = ("--backend", backend_name, "--device", "cpu", "--dtype", "float32", "--json")
    found = of_command("generate", "sudoku", PUZZLES[0], "--seed", 1, "--preset", "draft", *place)
    expected = model.generate(PUZZLES[0], seed=1, preset="draft")
    assert found["tokens"] == expected.tokens
    assert found["statistics"]["denoising_steps"] == list(expected.statistics.denoising_steps)
    strict = ("--max-denoising-steps", 3, "--confidence-threshold", 0)
    runs = ("--prompt-length", 4, "--repeats", 1, "--warmup", 0)
    assert of_command("bench", "sudoku", "--preset", "draft", *strict, *runs, *place)["text"]["denoising_steps"] == [3]


@pytest.mark.parametrize(
    "command", [["generate"], ["chat"], ["infill"], ["revise", "--strength", "0.5"], ["bench"], ["serve", "--port", "0"]]
)
def test_every_command_refuses_an_unknown_preset(command: list[str]) -> None:
    run = CliRunner().invoke(main, [*command, "sudoku", "--preset", "fats"], input="a <hole:2>")
    assert run.exit_code == 2, run.output
    assert run.stderr.splitlines()[-1].endswith("unknown preset 'fats'; did you mean fast?")


def test_a_causal_command_refuses_a_preset() -> None:
    run = CliRunner().invoke(main, ["generate", "sudoku", "1", "--mode", "causal", "--preset", "fast"])
    assert run.exit_code == 2
    assert "preset belongs to the diffusion mode; leave it out, or change the mode" in run.stderr


def test_requests() -> None:
    message = [{"role": "user", "content": "Hi"}]
    for request in (
        chat_request({"messages": message, "preset": "fast"}),
        completion_request({"prompt": "a", "preset": "fast"}),
        infill_request({"template": "<hole>", "preset": "fast"}),
    ):
        assert request.options.preset == "fast"
        assert request.options.ignored == ()
        assert request.options.sampling(RELEASED)["preset"] == "fast"
    for body, message_of in (
        ({"preset": "fats"}, "preset: unknown preset 'fats'; did you mean fast?"),
        ({"preset": "{x}"}, "preset: unknown preset '{x}'; known are exact, fast, draft"),
        ({"preset": 5}, "preset: input should be a valid string"),
    ):
        with pytest.raises(ApiError) as refused:
            chat_request({"messages": message, **body})
        assert (refused.value.status, refused.value.param, str(refused.value)) == (400, "preset", message_of)
    causal = chat_request({"messages": message, "preset": "fast", "mode": "causal"}).options
    assert causal.ignored == ("preset",), "as max_denoising_steps"
    assert "preset" not in causal.sampling(RELEASED, "draft")


def test_the_server_s_preset(model: DiffusionGemma, backend_name: str) -> None:
    """It is for requests that name none."""
    body = {"messages": [{"role": "user", "content": PUZZLES[0]}], "seed": 1}
    with serving(load("sudoku", backend=backend_name, device="cpu", dtype="float32"), preset="draft") as served:
        for given, expected in (({}, "draft"), ({"preset": "fast"}, "fast"), ({"preset": "exact"}, None)):
            answer = served.post("chat/completions", {**body, **given}).json()
            wanted = model.generate(PUZZLES[0], seed=1, preset=expected)
            assert answer["diffgemma"]["denoising_steps"] == [list(wanted.statistics.denoising_steps)]
            assert answer["choices"][0]["message"]["content"] == wanted.text
        assert served.post("chat/completions", {**body, "mode": "causal"}).status_code == 200
        hole = served.post("infill", {"template": "12<hole:6>", "seed": 1, "raw": True}).json()
        assert hole["text"] == infill(model, "12<hole:6>", raw=True, seed=1, preset="draft").text

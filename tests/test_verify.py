"""The conformance report: correct backends pass, and a backend that is wrong in one place fails, with the place named."""

import dataclasses
import json
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlx_diffgemma.backends import Backend, Pending, Piece, Row, load_backend
from mlx_diffgemma.backends.torch import reference as reference_module
from mlx_diffgemma.checkpoint import Checkpoint, Quantization
from mlx_diffgemma.errors import BackendError, CheckpointError, InputError
from mlx_diffgemma.noise import sampling_key
from mlx_diffgemma.reports import conformance
from mlx_diffgemma.reports.conformance import REFERENCE, verify
from support.comparing import BACKENDS, assert_close
from support.verifying import TEXT, WITH_IMAGES, Sabotage, run, scaled, show

Folder = Callable[..., Path]


@pytest.mark.parametrize(
    ("shape", "tuning"),
    [("base", {}), ("odd_sizes", {}), ("window_below_canvas", {}), ("six_layers", {"bfloat16": True, "hub_layout": True})],
)
def test_sound_backends_agree_with_transformers(checkpoint: Folder, shape: str, tuning: dict[str, Any]) -> None:
    opened = Checkpoint.open(checkpoint(shape, **tuning))
    report = verify(opened, BACKENDS, against=REFERENCE, seed=3)
    show(report)
    assert report.problems() == []
    assert report.prompt_length == opened.config.sliding_window + 8
    assert tuple(each.backend for each in report.comparisons) == BACKENDS
    for each in report.comparisons:
        assert [one.name for one in each.passes] == [*TEXT, *WITH_IMAGES]
        assert all(len(one.states) == opened.config.num_hidden_layers + 2 for one in each.passes)
        assert all(0 <= one.mean_abs <= one.max_abs <= 1e-4 for one in each.passes)
        assert all(abs(one.mean_kl) < 1e-8 and abs(one.median_kl) < 1e-8 and one.same_argmax == 1 for one in each.passes)
        assert (each.tokens, each.different_tokens, each.first_different) == (2 * report.canvas_length, 0, None)
        assert each.entropy < 1e-4
    # two programs round differently; if one had been compared with itself, this would be 0
    assert max(one.max_abs for each in report.comparisons for one in each.passes) > 0


def test_the_first_backend_is_the_baseline(checkpoint: Folder) -> None:
    opened = Checkpoint.open(checkpoint("base"))
    report = verify(opened, ["torch:cpu", REFERENCE], prompt_length=1, canvas_length=3)
    assert (report.baseline, report.prompt_length, report.canvas_length) == ("torch:cpu", 1, 3)
    assert [(each.backend, each.device, each.tokens) for each in report.comparisons] == [(REFERENCE, "cpu", 6)]
    assert report.problems() == []


def test_bfloat16_is_judged_by_its_divergence(checkpoint: Folder) -> None:
    report = verify(Checkpoint.open(checkpoint("base", bfloat16=True)), ["torch:cpu"], against=REFERENCE, dtype="bfloat16")
    show(report)
    assert report.problems() == []
    (comparison,) = report.comparisons
    worst = max(comparison.passes, key=lambda one: one.median_kl)
    assert worst.max_abs > 1e-3  # bfloat16 was used
    wrong = dataclasses.replace(worst, median_kl=2e-2)
    report = dataclasses.replace(report, comparisons=(dataclasses.replace(comparison, passes=(wrong,)),))
    assert report.problems() == [f"torch:cpu: median KL of the {worst.name} is 2.0e-02 nats, not below 1e-02"]


def test_divergence_is_that_of_torch(checkpoint: Folder) -> None:
    right, other = torch.randn(2, 5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).float() * 5
    expected = torch.nn.functional.kl_div(
        other.double().log_softmax(-1), right.double().log_softmax(-1), log_target=True, reduction="batchmean"
    )
    answers = (conformance._Answer("pass", logits.numpy(), [logits.numpy()]) for logits in (right, other))
    found = conformance._difference(*answers)
    assert_close(found.mean_kl, expected, 1e-9, "KL(baseline || backend)")
    by_position = torch.nn.functional.kl_div(
        other.double().log_softmax(-1), right.double().log_softmax(-1), log_target=True, reduction="none"
    )
    assert_close(found.median_kl, by_position.sum(-1).median(), 1e-9, "the median of KL(baseline || backend)")
    assert_close(found.max_abs, (right - other).abs().max(), 0, "the largest difference")
    assert_close(found.states[0], (right - other).norm() / right.norm(), 1e-6, "RMS over RMS")
    nothing = np.zeros((5, 40), np.float32)
    assert conformance._relative([nothing, nothing], [nothing, right.numpy()]) == (0.0, float("inf"))
    assert found.same_argmax == (right.argmax(-1) == other.argmax(-1)).double().mean()


# --- wrong backends


def scaled_layer(backend: Any) -> None:
    mlp = backend.model.layers[1].mlp
    scaled(mlp.gate_proj if backend.name == "torch" else mlp.gate_up_proj.parts[0], 1.02)


def swapped_scalars(backend: Any) -> None:
    layer = backend.model.layers[1]  # the last layer's scalar has no effect, because the final norm follows
    layer.layer_scalar, layer.encoder_layer_scalar = layer.encoder_layer_scalar, layer.layer_scalar


def encoder_scalar_everywhere(backend: Any) -> None:
    layer = backend.model.layers[0]
    layer.layer_scalar = layer.encoder_layer_scalar


def softcap(backend: Any) -> None:
    backend.model.config = dataclasses.replace(backend.model.config, final_logit_softcapping=25.0)


def no_self_conditioning(backend: Any) -> None:
    scaled(backend.model.self_conditioning.down_proj, 0.0)


def forgotten_commit(backend: Any) -> None:
    encode = backend.encode

    def forgetful(pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            if not len(piece.cache):
                encode([piece])

    backend.encode = forgetful


def not_a_number(backend: Any) -> None:
    scaled(backend.model.norm, float("nan"))


def other_samples(backend: Any) -> None:
    launch, size = backend.launch, backend.config.vocab_size

    def wrong(rows: Sequence[Row]) -> Pending:
        wait = launch(rows)
        return lambda: [answer._replace(sampled=(answer.sampled + 1) % size) for answer in wait()]

    backend.launch = wrong


WRONG = [
    (scaled_layer, "causal pass", "first hidden state that differs: layer 1"),
    (swapped_scalars, "causal pass", "first hidden state that differs: layer 1"),
    (encoder_scalar_everywhere, "first step", "first hidden state that differs: layer 0"),
    (softcap, "causal pass", "the hidden states agree, so look at the output head"),
    (no_self_conditioning, "second step", "first hidden state that differs: embedding"),
    (forgotten_commit, "second block", "first hidden state that differs: layer 0"),
    (not_a_number, "causal pass", "first hidden state that differs: final norm"),
    (other_samples, "tokens differ, the first at position", "though the logits agree"),
]


@pytest.mark.parametrize(("change", "where", "what"), WRONG, ids=[case[0].__name__ for case in WRONG])
def test_a_wrong_backend_fails_where_it_is_wrong(
    checkpoint: Folder,
    sabotage: Sabotage,
    backend_name: str,
    change: Callable[[Any], None],
    where: str,
    what: str,
) -> None:
    sabotage(backend_name, change)
    report = verify(Checkpoint.open(checkpoint("base")), [backend_name], against=REFERENCE)
    show(report)
    (problem,) = report.problems()
    print(problem)
    assert problem.startswith(f"{backend_name}: ")
    assert where in problem
    assert what in problem


def test_a_wrong_backend_fails_in_bfloat16(checkpoint: Folder, sabotage: Sabotage) -> None:
    sabotage("torch", forgotten_commit)
    opened = Checkpoint.open(checkpoint("base", bfloat16=True))
    (problem,) = verify(opened, ["torch:cpu"], against=REFERENCE, dtype="bfloat16").problems()
    print(problem)
    assert problem.startswith("torch:cpu: median KL of the second block is ")


def test_a_wrong_baseline_fails_too(checkpoint: Folder, sabotage: Sabotage, backend_name: str) -> None:
    sabotage(backend_name, scaled_layer)
    (problem,) = verify(Checkpoint.open(checkpoint("base")), [backend_name, REFERENCE]).problems()
    assert problem.startswith("reference: ")
    assert problem.endswith("layer 1")


def test_models_are_held_one_at_a_time(checkpoint: Folder, monkeypatch: pytest.MonkeyPatch, backend_name: str) -> None:
    loaded: list[weakref.ref[Any]] = []
    alive: list[bool] = []

    def load(opened: Checkpoint, name: str, **options: Any) -> Backend:
        alive.extend(model() is not None for model in loaded)
        backend: Any = load_backend(opened, name, **options)
        loaded.append(weakref.ref(backend.model))
        return backend

    monkeypatch.setattr(conformance, "load_backend", load)
    verify(Checkpoint.open(checkpoint("base")), [f"{backend_name}:cpu", backend_name])
    assert alive == [False]


# --- the reference


def test_reference_freezes_samples_and_encodes_as_the_backends_do(
    checkpoint: Folder, backend: Callable[..., Backend], backend_name: str
) -> None:
    answers = []
    for each in (reference_module.load(Checkpoint.open(checkpoint("base"))), backend(backend_name, "base")):
        rng = np.random.default_rng(0)
        prompts, canvases = (
            [rng.integers(0, each.config.vocab_size, length, dtype=np.int32) for length in lengths]
            for lengths in ((11, 4), (8, 8))
        )
        frozen = np.array([-1, 5, -1, -1, 7, 7, -1, -1], np.int32)
        caches = [each.new_cache() for _ in prompts]
        each.encode([Piece(prompt, cache) for prompt, cache in zip(prompts, caches, strict=True)])
        last = each.next_logits(caches)
        rows = [Row(canvas, cache, 0.7) for canvas, cache in zip(canvases, caches, strict=True)]
        scores = each.score_canvas(rows)
        plain = each.denoise(rows)
        keys = [sampling_key(seed, 0, 1) for seed in (1, 2)]
        drawing = [dataclasses.replace(row, noise_key=key, frozen=frozen) for row, key in zip(rows, keys, strict=True)]
        step = each.denoise(drawing)
        signals = [answer.self_conditioning for answer in step]
        later = [dataclasses.replace(row, self_conditioning=signal) for row, signal in zip(rows, signals, strict=True)]
        after = each.logits(later)
        assert [len(cache) for cache in caches] == [11, 4]
        for free, pinned in zip(plain, step, strict=True):
            assert (free.sampled == free.argmax).all()
            assert pinned.argmax[[1, 4, 5]].tolist() == pinned.sampled[[1, 4, 5]].tolist() == [5, 7, 7]
            assert (pinned.entropy[[1, 4, 5]] == 0).all()
        assert any((pinned.sampled != pinned.argmax).any() for pinned in step)
        answers.append(
            [
                ("next logits", last),
                ("scores of the canvas", scores),
                *((name, [getattr(answer, name) for answer in plain]) for name in ("argmax", "entropy")),
                *((f"frozen {name}", [getattr(answer, name) for answer in step]) for name in ("argmax", "sampled", "entropy")),
                ("logits after a frozen step", after),
            ]
        )
    for (name, right), (_, ours) in zip(*answers, strict=True):
        for row in range(2):
            assert right[row].dtype == ours[row].dtype, name
            assert_close(ours[row], right[row], 1e-4, f"{backend_name} against the reference, {name}, row {row}")


def test_reference_says_what_it_cannot_do(checkpoint: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Checkpoint.open(checkpoint("base"))
    quantized = dataclasses.replace(opened, quantization={"layers.0.mlp.up_proj": Quantization(64, 4)})
    with pytest.raises(BackendError, match="is quantized, but the reference reads only unquantized weights"):
        reference_module.load(quantized)
    config = json.loads((opened.folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 64
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(opened.folder / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"missing or of the wrong shape: model\.decoder\.layers\.0\.mlp\.down_proj\.weight, "
    ):
        reference_module.load(Checkpoint.open(tmp_path))
    loaded = reference_module.load(opened)
    with pytest.raises(BackendError, match="encode one first"):
        loaded.logits([Row(np.zeros(8, np.int32), loaded.new_cache(), 1.0)])
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BackendError, match="pip install"):
        reference_module.load(opened)


# --- input and the command line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backends": ["torch"]}, "nothing to compare torch with"),
        ({"backends": ["torch"], "against": "torch"}, "nothing to compare torch with"),
        ({"backends": ["torch", "jax"]}, "unknown backend 'jax'; known are mlx, torch and reference"),
        ({"backends": ["torch", ""]}, "unknown backend ''"),
        ({"backends": ["torch"], "against": "reference:cuda"}, "the reference backend runs on the cpu only"),
        ({"prompt_length": 0}, "prompt_length must be at least 1"),
        ({"prompt_length": 500}, "within the model's context of 512 tokens, got 500"),
        ({"prompt_length": 490}, "with 2 canvases of 8, or one and 16 tokens of images, within the model's context of 512"),
        ({"canvas_length": 9}, "canvas_length must be 1 to 8"),
        ({"canvas_length": 0}, "canvas_length must be 1 to 8"),
        ({"seed": -1}, "a seed must be an integer between 0 and"),
        ({"tolerance": float("nan")}, "tolerance must be at least 0"),
        ({"dtype": "float16"}, "unknown dtype 'float16'"),
    ],
)
def test_bad_input_is_refused(checkpoint: Folder, options: dict[str, Any], message: str) -> None:
    options = {"backends": ["torch", REFERENCE], **options}
    with pytest.raises(InputError, match=message):
        verify(Checkpoint.open(checkpoint("base")), options.pop("backends"), **options)


def test_command_exits_0_within_tolerance(checkpoint: Folder) -> None:
    result = run(checkpoint("base"), "--backends", ",".join(BACKENDS), "--against", "reference")
    print(result.stdout)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == "within tolerance"
    assert result.stdout.count("second block") == result.stdout.count("image of 2 x 6 patches") == len(BACKENDS)
    assert "seed 0, image mask causal" in result.stdout


def test_command_exits_1_out_of_tolerance_and_shows_the_layers(checkpoint: Folder, sabotage: Sabotage) -> None:
    sabotage("torch", scaled_layer)
    arguments = (checkpoint("base"), "--backends", "torch", "--against", "reference")
    result = run(*arguments)
    print(result.stdout)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert lines[-1].startswith("out of tolerance: torch: logits of the causal pass differ by ")
    assert lines[-1].endswith("layer 1")
    assert any(line.split()[:3] == ["tower", "layer", "0"] for line in lines)
    states = {
        name: float(line.split()[len(name.split())]) for line in lines for name in ("layer 0", "layer 1") if line.startswith(name)
    }
    assert states["layer 0"] < 1e-5
    assert states["layer 1"] > 1e-4

    result = run(*arguments, "--json")
    assert result.exit_code == 1
    content = json.loads(result.stdout)
    assert (content["within"], len(content["problems"]), content["baseline"]) == (False, 1, "reference")
    assert content["checkpoint"] == str(checkpoint("base"))
    causal = content["comparisons"][0]["passes"][0]
    assert causal["states"][1] < 1e-5
    assert causal["states"][2] > 1e-4


@pytest.mark.parametrize(
    "arguments", [["--backends", "torch"], ["--backends", "torch,jax"], ["--dtype", "float16"], ["--seed", "x"]]
)
def test_command_exits_2_for_bad_input(checkpoint: Folder, arguments: list[str]) -> None:
    result = run(checkpoint("base"), *arguments)
    print(result.stderr)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "rror: " in result.stderr


def test_command_exits_2_without_a_checkpoint(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert result.exit_code == 2
    assert "config.json is missing" in result.stderr

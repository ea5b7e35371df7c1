"""The conformance report of checkpoints that read images: the tower, the image mask, and checkpoints without a tower."""

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mlx_diffgemma.backends import Piece, Row, load_backend
from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.config import IMAGE_MASKS
from mlx_diffgemma.reports import conformance
from mlx_diffgemma.reports.conformance import REFERENCE, verify
from support.comparing import BACKENDS
from support.reference import PICTURE_SHAPES
from support.verifying import TEXT, WITH_IMAGES, Sabotage, run, scaled, show

Folder = Callable[..., Path]


@pytest.mark.parametrize("image_mask", IMAGE_MASKS)
@pytest.mark.parametrize("shape", PICTURE_SHAPES)
def test_sound_backends_agree_on_images(checkpoint: Folder, shape: str, image_mask: str) -> None:
    opened = Checkpoint.open(checkpoint(shape)).with_image_mask(image_mask)
    assert opened.config.vision is not None
    report = verify(opened, BACKENDS, against=REFERENCE, seed=4)
    show(report)
    assert report.problems() == []
    assert report.image_mask == image_mask
    side = opened.config.vision.pooling_kernel_size
    for each in report.comparisons:
        assert [(image.rows, image.columns) for image in each.images] == [
            (side * rows, side * columns) for rows, columns in conformance.IMAGES
        ]
        for image in each.images:
            assert len(image.states) == opened.config.vision.num_hidden_layers + 3
            assert 0 <= image.mean_abs <= image.max_abs <= 2e-5
        assert [one.name for one in each.passes] == [*TEXT, *WITH_IMAGES]
        assert all(one.max_abs <= 1e-4 and one.same_argmax == 1 for one in each.passes)
    assert max(image.max_abs for each in report.comparisons for image in each.images) > 0


def test_images_are_different_and_those_of_the_seed(checkpoint: Folder) -> None:
    opened = Checkpoint.open(checkpoint("pictures"))
    made = [conformance._Inputs.make(opened, None, None, seed) for seed in (1, 1, 2)]
    digests = [[image.patches.digest for image in inputs.images] for inputs in made]
    assert digests[0] == digests[1]
    assert len({*digests[0], *digests[2]}) == 4
    text = made[0].illustrated
    assert text is not None
    free = len(text) - sum(image.patches.soft_tokens for image in text.images)
    assert free == len(made[0].prompt)
    edges = [0, *(edge for image in text.images for edge in (image.start, image.stop)), len(text)]
    assert edges == sorted(set(edges)), "an image has no text beside it"


def test_a_checkpoint_without_a_tower(checkpoint: Folder, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint("pictures"), tmp_path / "text"))
    tensors = load_file(folder / "model.safetensors")
    save_file({name: each for name, each in tensors.items() if "vision" not in name}, folder / "model.safetensors")
    report = verify(Checkpoint.open(folder), BACKENDS, against=REFERENCE)
    assert report.problems() == []
    assert report.image_mask is None
    for each in report.comparisons:
        assert (each.images, [one.name for one in each.passes]) == ((), TEXT)
    result = run(folder, "--backends", ",".join(BACKENDS), "--against", "reference")
    assert result.exit_code == 0
    assert "image" not in result.stdout


# --- wrong backends


def ignored_images(backend: Any) -> None:
    logits = backend.logits

    def blind(parts: Sequence[Piece | Row], *trace: Any) -> Any:
        return logits([dataclasses.replace(part, images=()) if isinstance(part, Piece) else part for part in parts], *trace)

    backend.logits = blind


def exchanged_places(backend: Any) -> None:
    """Columns for rows."""
    embedder = backend.vision.vision_tower.patch_embedder
    table = embedder.position_embedding_table
    turned = torch.nn.Parameter(table.flip(0), requires_grad=False) if isinstance(table, torch.Tensor) else table[::-1]
    embedder.position_embedding_table = turned


def scaled_tower_layer(backend: Any) -> None:
    scaled(backend.vision.vision_tower.encoder.layers[1].mlp.gate_proj.linear, 1.02)


def tower_layer_without_rope(backend: Any) -> None:
    rope = next(value for name, value in vars(backend.vision.vision_tower.encoder).items() if name.endswith("rope"))
    rope.frequencies = 0 * rope.frequencies


def no_standardizing(backend: Any) -> None:
    backend.vision.vision_tower.std_bias = None


def scaled_projection(backend: Any) -> None:
    scaled(backend.vision.embed_vision.embedding_projection, 1.001)


WRONG_IMAGES = [
    (exchanged_places, "vision tower that differs: patch embedding"),
    (scaled_tower_layer, "vision tower that differs: tower layer 1"),
    (tower_layer_without_rope, "vision tower that differs: tower layer 0"),
    (no_standardizing, "vision tower that differs: pooling"),
    (scaled_projection, "image of 6 x 18 patches differ by 1.0e-03 of their size, more than 1e-04; the first state of the"),
    (ignored_images, "logits of the causal pass with images differ by"),
]


@pytest.mark.parametrize(("change", "what"), WRONG_IMAGES, ids=[case[0].__name__ for case in WRONG_IMAGES])
def test_a_backend_that_is_wrong_about_images(
    checkpoint: Folder,
    sabotage: Sabotage,
    backend_name: str,
    change: Callable[[Any], None],
    what: str,
) -> None:
    sabotage(backend_name, change)
    report = verify(Checkpoint.open(checkpoint("pictures")), [backend_name], against=REFERENCE)
    (problem,) = report.problems()
    print(problem)
    assert what in problem
    assert all(one.max_abs <= 1e-4 for one in report.comparisons[0].passes[: len(TEXT)])


@pytest.mark.parametrize("image_mask", ["transformers", "causal"])
def test_another_image_mask(checkpoint: Folder, monkeypatch: pytest.MonkeyPatch, backend_name: str, image_mask: str) -> None:
    monkeypatch.setattr(conformance, "load_backend", partial(load_backend, image_mask=image_mask))
    (problem,) = verify(Checkpoint.open(checkpoint("pictures")), [backend_name], against=REFERENCE).problems()
    print(problem)
    assert "logits of the causal pass with images differ" in problem
    assert "first hidden state that differs: layer 0" in problem


@pytest.mark.parametrize("change", [tower_layer_without_rope, no_standardizing])
def test_a_wrong_tower_fails_in_bfloat16(checkpoint: Folder, sabotage: Sabotage, change: Callable[[Any], None]) -> None:
    sabotage("torch", change)
    opened = Checkpoint.open(checkpoint("pictures", bfloat16=True))
    (problem,) = verify(opened, ["torch:cpu"], against=REFERENCE, dtype="bfloat16").problems()
    print(problem)
    assert problem.startswith("torch:cpu: soft tokens of the image of 6 x 18 patches differ by ")
    assert "of their size, more than 1e-01" in problem

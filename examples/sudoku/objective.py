"""The training objective of the tiny model: the two losses of a batch, through the project's own PyTorch graph.

Diffusion: t is uniform in (0, 1), and each token of the canvas is replaced by a uniform token with probability t. The model
predicts the true token at every position, replaced or not, and all positions count alike. In half of the batches, the model first
makes a prediction without gradient and gets it as its self-conditioning signal. In the other batches the signal is zero.

Causal: the encoder pass predicts each next token of prompt and solution, except the soft tokens of an image. The solution is
appended to the cache after the canvas was denoised, so the canvas sees only the prompt.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from puzzles import Grids, random_symmetry
from solving import canvas_tokens
from torch import Tensor
from vocabulary import VOCABULARY, prompt_tokens

from mlx_diffgemma.backends.torch.cache import TrainingCache
from mlx_diffgemma.backends.torch.model import Segment, TextModel
from mlx_diffgemma.backends.torch.vision import VisionModel


@dataclass(frozen=True)
class Images:
    """One image in each prompt of a batch. All have one size and stand in the same place.

    Attributes:
        start: the place in the prompt where the soft tokens begin.
        pixels, places, rows: as :class:`~mlx_diffgemma.backends.torch.vision.VisionModel` takes them.
    """

    start: int
    pixels: Tensor
    places: Tensor
    rows: int


@dataclass(frozen=True)
class Batch:
    """A batch of token ids, int64, on the model's device.

    Attributes:
        prompt: [B, N].
        target: [B, L], the true canvas.
        noisy: [B, L], the canvas that the model sees.
        self_conditioned: whether the model gets its own first prediction as the self-conditioning signal.
        images: the images in the prompts, if there are any.
    """

    prompt: Tensor
    target: Tensor
    noisy: Tensor
    self_conditioned: bool
    images: Images | None = None


class Losses(NamedTuple):
    """Mean cross-entropies in nats per token."""

    diffusion: Tensor
    causal: Tensor


def make_batch(puzzles: Grids, solutions: Grids, batch_size: int, rng: np.random.Generator, device: str) -> Batch:
    """Random puzzles of a pool [n, cells], each in a random symmetric form, and their noisy canvases."""
    chosen = rng.integers(len(puzzles), size=batch_size)
    clues, answers = random_symmetry(rng, puzzles[chosen], solutions[chosen])
    target = canvas_tokens(answers)
    replaced = rng.random(target.shape) < rng.random((batch_size, 1))
    return noisy_batch(prompt_tokens(clues), target, replaced, len(VOCABULARY), rng, device)


def noisy_batch(
    prompt: NDArray[np.int32],
    target: NDArray[np.int32],
    replaced: NDArray[np.bool_],
    vocab_size: int,
    rng: np.random.Generator,
    device: str,
) -> Batch:
    """A batch of prompts [B, N] and canvases [B, L]. Where ``replaced`` [B, L] is true, the noisy canvas has a uniform token."""
    noisy = np.where(replaced, rng.integers(vocab_size, size=target.shape), target)
    prompts, targets, noisy = (torch.from_numpy(tokens.astype(np.int64)).to(device) for tokens in (prompt, target, noisy))
    return Batch(prompts, targets, noisy, bool(rng.random() < 0.5))


def losses(model: TextModel, batch: Batch, vision: VisionModel | None = None) -> Losses:
    """Both losses of a batch. Every parameter gets a gradient; the probabilities of the signal get none.

    Args:
        vision: the tower, for a batch with images.
    """
    rows = len(batch.prompt)
    cache = TrainingCache(model.config, rows)

    def stream(tokens: Tensor, images: list[tuple[int, Tensor]] | None = None) -> tuple[Tensor, list[Segment]]:
        """Tokens [B, N] in the form of the graph: all rows one after the other."""
        return tokens.flatten(), [Segment(0, tokens.numel(), cache, images or [])]

    images, soft = [], range(0)
    if batch.images is not None:
        assert vision is not None, "a batch with images needs the vision tower"
        start, features = batch.images.start, vision(batch.images.pixels, batch.images.places, batch.images.rows)
        images, soft = [(start, features)], range(start, start + features.shape[1])
    prompt = model.encode(*stream(batch.prompt, images))
    signal = None
    if batch.self_conditioned:
        with torch.no_grad():
            probabilities = model.head(model.denoise(*stream(batch.noisy))).softmax(dim=-1)
        signal = model.soft_embeddings(probabilities)
    canvas = model.head(model.denoise(*stream(batch.noisy), signal))
    solution = model.encode(*stream(batch.target))  # after the canvas, which must not see it
    hidden = torch.cat([states.unflatten(0, (rows, -1)) for states in (prompt, solution)], dim=1)  # [B, N + L, H]
    predicted = [index for index in range(1, hidden.shape[1]) if index not in soft]
    causal = model.head(hidden[:, [index - 1 for index in predicted]])
    following = torch.cat([batch.prompt, batch.target], dim=1)[:, predicted]
    return Losses(_cross_entropy(canvas, batch.target), _cross_entropy(causal, following))


def _cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), tokens.flatten())

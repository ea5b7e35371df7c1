"""Trains a tiny model that reads a 4x4 Sudoku from a picture and solves it, with the trainer of the Sudoku model.

    python examples/pictures/train.py OUT [--steps 3000] [--resume]

:mod:`trainer` describes the content of ``OUT``.

A new picture is drawn for every example and goes through the package's own preprocessing. The first pictures look alike: black on
white, in one font, size and place. The model learns to read these in a few hundred steps. From then on, their variety grows in
every step in which the model reads well. With all kinds of pictures from the start, it had not begun to read after 475 steps.

In half of the rows the whole canvas is noise, as in the first step of a block, when only the picture tells what it shows. In the
others, each token is replaced with probability t, uniform in (0, 1).
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.append(str(Path(__file__).parents[1] / "sudoku"))
from architecture import hub_config
from drawing import SIZE, draw, random_look
from objective import Batch, Images, noisy_batch
from puzzles import make_puzzles, random_symmetry
from reading import (
    BEGIN_ID,
    CANVAS_LENGTH,
    CLUES,
    END_ID,
    IMAGE_ID,
    IMAGE_START,
    VOCABULARY,
    canvas_tokens,
    fresh_pictures,
    is_right,
    patches_of,
    prompt_tokens,
    read_all,
    write_picture_tokenizer,
)
from trainer import BaseTrainer, RunOptions, from_command_line, train
from vocabulary import END_OF_TURN, EOS, PAD

from mlx_diffgemma.backends import Backend
from mlx_diffgemma.config import GenerationConfig

GENERATION: dict[str, Any] = {
    "confidence_threshold": 0.02,
    "eos_token_id": [EOS, END_OF_TURN],
    "max_denoising_steps": 24,
    "pad_token_id": PAD,
    "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
    "stability_threshold": 1,
    "t_max": 0.8,
    "t_min": 0.4,
}

#: The tower: that of the released model with fewer and smaller layers, and places for 64 patches along a side instead of 10,240.
VISION: dict[str, Any] = {
    "attention_bias": False,
    "head_dim": 16,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 64,
    "intermediate_size": 128,
    "model_type": "gemma4_vision",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "patch_size": 16,
    "pooling_kernel_size": 3,
    "position_embedding_size": 64,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
    "standardize": True,
    "use_clipped_linears": False,
}


@dataclass(frozen=True)
class Options(RunOptions):
    """The options of a run.

    Attributes:
        well: the variety of the pictures grows while the mean causal loss, in nats per token, is below this.
        growth: how much it grows in a step. At 1 it stays.
    """

    steps: int = 3000
    batch_size: int = 16
    warmup: int = 100
    pool: int = 20_000
    held_out: int = 100
    well: float = 0.2
    growth: float = 1 / 400


class Trainer(BaseTrainer):
    options_type, metric, reads_images = Options, "solve_rate", True

    def __init__(self, options: Options) -> None:
        # The window is longer than a prompt and a canvas.
        config = hub_config(len(VOCABULARY), CANVAS_LENGTH, 128, layers="SSSF")
        config["text_config"]["intermediate_size"] = 64
        config |= {
            "boi_token_id": BEGIN_ID,
            "eoi_token_id": END_ID,
            "image_token_id": IMAGE_ID,
            "vision_config": VISION,
            "vision_soft_tokens_per_image": 70,
        }
        super().__init__(options, config, GENERATION)
        self.pace = {"variety": 0.0, "mean_loss": 1.0}
        self.pool = make_puzzles(SIZE, options.pool, CLUES, options.seed, held_out=False)
        self.held_out = fresh_pictures(options.held_out, options.seed)

    def make_batch(self, rng: np.random.Generator) -> Batch:
        options, (puzzles, solutions) = self.options, self.pool
        rows, vision = options.batch_size, self.model.config.vision
        assert vision is not None
        chosen = rng.integers(len(puzzles), size=rows)
        clues, answers = random_symmetry(rng, puzzles[chosen], solutions[chosen])
        looks = [random_look(rng, variety=self.pace["variety"]) for _ in clues]
        seen = [patches_of(draw(each, look, rng), vision) for each, look in zip(clues, looks, strict=True)]
        target = canvas_tokens(clues, answers)
        share = np.where(rng.random((rows, 1)) < 0.5, 1.0, rng.random((rows, 1)))
        prompts = np.tile(prompt_tokens(seen[0].soft_tokens), (rows, 1))
        batch = noisy_batch(prompts, target, rng.random(target.shape) < share, len(VOCABULARY), rng, options.device)
        images = Images(
            IMAGE_START,
            torch.from_numpy(np.stack([each.values for each in seen])).to(options.device),
            torch.from_numpy(seen[0].positions).long().to(options.device),
            seen[0].rows,
        )
        return replace(batch, images=images)

    def follow(self, diffusion: float, causal: float) -> None:
        mean = 0.95 * self.pace["mean_loss"] + 0.05 * causal
        growth = self.options.growth if mean < self.options.well else 0.0
        self.pace = {"variety": min(1.0, self.pace["variety"] + growth), "mean_loss": mean}

    def evaluate(self, backend: Backend, config: GenerationConfig) -> float:
        """Share of the held-out pictures that the model solves."""
        return float(is_right(read_all(backend, self.held_out, config), self.held_out)[1].mean())

    def write_tokenizer(self, folder: Path) -> None:
        write_picture_tokenizer(folder)


if __name__ == "__main__":
    train(*from_command_line(Trainer, (__doc__ or "").partition("\n")[0]))

"""Trains a tiny model to fill in cut-out fields of records, with the trainer of the Sudoku model.

    python examples/records/train.py OUT [--steps 3000] [--resume]

:mod:`trainer` describes the content of ``OUT``.

The prompt is the record up to the value of a field. The canvas is the rest of the record, its end and padding, laid out as by
the infill. In half of the rows, every token of the canvas is replaced with probability t, uniform in (0, 1). In the other rows,
only tokens of the cut are replaced, with t uniform in (1/2, 1), and all other tokens are right: this is how frozen tokens look to
the model. The loss counts all tokens alike.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "sudoku"))
from architecture import hub_config
from filling import fill, is_right
from objective import Batch, noisy_batch
from records import AGES, CANVAS_LENGTH, CUTS, FIELDS, NAME_LENGTHS, VOCABULARY, prompt_and_canvas, random_record
from trainer import BaseTrainer, RunOptions, from_command_line, train
from vocabulary import END_OF_TURN, EOS, PAD, write_tokenizer

from mlx_diffgemma.backends import Backend
from mlx_diffgemma.config import GenerationConfig

GENERATION: dict[str, Any] = {
    "confidence_threshold": 0.005,
    "eos_token_id": [EOS, END_OF_TURN],
    "max_denoising_steps": 16,
    "pad_token_id": PAD,
    "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
    "stability_threshold": 1,
    "t_max": 0.8,
    "t_min": 0.4,
}


@dataclass(frozen=True)
class Options(RunOptions):
    """The options of a run."""

    steps: int = 3000
    batch_size: int = 32
    evaluate_every: int = 500
    held_out: int = 60


class Trainer(BaseTrainer):
    options_type, metric = Options, "filled"

    def __init__(self, options: Options) -> None:
        # The window is longer than any record with its first token.
        super().__init__(options, hub_config(len(VOCABULARY), CANVAS_LENGTH, 64, layers="SSF"), GENERATION)

    def make_batch(self, rng: np.random.Generator) -> Batch:
        """A batch of records with equal lengths, so that a field begins at the same position in all of them."""
        rows = self.options.batch_size
        lengths = {
            "name_length": int(rng.integers(*NAME_LENGTHS, endpoint=True)),
            "age_digits": int(rng.integers(1, len(AGES), endpoint=True)),
        }
        records = [random_record(rng, held_out=False, **lengths) for _ in range(rows)]
        first = FIELDS[rng.integers(len(FIELDS))]
        start = records[0].span(first).start
        prompts, canvases = prompt_and_canvas(records, start)
        cuts = [cut for cut in CUTS if cut[0] == first]
        share = rng.random((rows, 1)) * np.ones(canvases.shape)
        for row, cut in enumerate(rng.choice(len(cuts), rows // 2)):
            high = 0.5 + 0.5 * share[row, 0]
            share[row] = 0.0
            for field in cuts[cut]:
                span = records[row].span(field)
                share[row, span.start - start : span.stop - start] = high
        replaced = rng.random(canvases.shape) < share
        return noisy_batch(prompts, canvases, replaced, len(VOCABULARY), rng, self.options.device)

    def evaluate(self, backend: Backend, config: GenerationConfig) -> float:
        """Share of held-out records whose holes of known length are filled exactly."""
        rng = np.random.default_rng(self.options.seed)
        right = []
        for index in range(self.options.held_out):
            record, cut = random_record(rng, held_out=True), CUTS[index % len(CUTS)]
            right.append(is_right(fill(backend, record, cut, config)[0], record, cut))
        return float(np.mean(right))

    def write_tokenizer(self, folder: Path) -> None:
        write_tokenizer(folder, VOCABULARY, normalizer=None)


if __name__ == "__main__":
    train(*from_command_line(Trainer, (__doc__ or "").partition("\n")[0]))

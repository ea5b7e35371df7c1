"""Writes the model card: the model, its training, its curve and its results.

    python examples/sudoku/card.py RUN RESULTS.json --machine "..." [--note "..."] > README.md

``RUN`` is the folder that train.py wrote, and ``RESULTS.json`` the report of evaluate.py. All numbers come from these two.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from train import CLUES, Options

from mlx_diffgemma.checkpoint import Checkpoint

CARD = """\
---
license: apache-2.0
library_name: mlx-diffgemma
tags: [diffusion_gemma, block-diffusion, sudoku]
---

# Sudoku: a tiny DiffusionGemma

It solves {size}x{size} Sudoku by denoising the whole grid at once. The architecture and the file layout are those of
`google/diffusiongemma-26B-A4B-it`, with {parameters:,} parameters instead of 26 billion, so that everything that runs the large
model can be tried in a second, on any machine:

```python
from mlx_diffgemma import load

print(load("sudoku").generate("{puzzle}").text)
```

## Model

{layers} layers (the last with full attention), hidden size {hidden}, {experts} experts of which a token takes {top_k},
a vocabulary of {vocabulary} tokens, a canvas of {canvas}. The prompt is the puzzle, one token a cell, and the canvas the
solved grid, the end of the turn and padding. Weights are stored as BF16; they were trained in float32. There is no vision
tower among them.

## Data

{pool:,} puzzles with one solution each and {fewest} to {most} clues, in a random symmetric form whenever they are drawn: digits
relabelled, rows and columns permuted within and between boxes. One puzzle in ten, with all its symmetric forms, is held out
from training. Complete grids of this size are few up to symmetry, so a held-out puzzle's solution may well be known.

## Objective

t is uniform in (0, 1), and each token of the canvas is replaced with probability t by a uniform one; cross-entropy on all tokens
of the canvas, unweighted. In half of the batches the model sees its own first prediction as self-conditioning signal, else
zero. To this is added the next-token loss of the causal pass over prompt and solution, with weight 1. AdamW, learning rate
{learning_rate} after {warmup} steps of warmup, falling as a cosine; gradients clipped at norm 1.

{steps:,} steps of {batch_size} puzzles, from seed {seed}, took {minutes:.0f} minutes on {machine}:
`python examples/sudoku/train.py`.

| step | diffusion loss | causal loss | held-out puzzles solved |
|---:|---:|---:|---:|
{curve}

The last column is of {held_out} puzzles over the whole range of clues. {note}

## What it solves

{puzzles} other held-out puzzles for each range of clues, with the sampler's settings of `generation_config.json`:
`python examples/sudoku/evaluate.py`.

| clues | solved | denoising steps | tokens per forward pass | one token at a time, causal |
|---|---:|---:|---:|---:|
{rates}

## Limits

It knows nothing but Sudoku of this size. A puzzle that has several solutions gets one, or none.
"""


def card(run: Path, results: Mapping[str, Any], machine: str, note: str) -> str:
    """The text of README.md."""
    state = torch.load(run / "state.pt", weights_only=True)
    options, config = Options(**state["options"]), Checkpoint.open(run / "checkpoint").config
    lines = [json.loads(line) for line in (run / "curve.jsonl").read_text().splitlines()]
    fewest, most = CLUES[options.size]
    return CARD.format(
        **asdict(options),
        parameters=sum(weight.numel() for weight in state["model"].values()),
        puzzle=results["example"],
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        experts=config.num_experts,
        top_k=config.top_k_experts,
        vocabulary=config.vocab_size,
        canvas=config.canvas_length,
        fewest=fewest,
        most=most,
        minutes=state["seconds"] / 60,
        machine=machine,
        note=note,
        curve=_curve(lines),
        puzzles=next(iter(results["clues"].values()))["puzzles"],
        rates=_rates(results),
    )


def _curve(lines: Sequence[Mapping[str, float]]) -> str:
    rows = [
        f"| {line['step']:,} | {line['diffusion_loss']:.3f} | {line['causal_loss']:.3f} | {line['solve_rate']:.0%} |"
        for line in lines
        if "solve_rate" in line
    ]
    return "\n".join(rows)


def _rates(results: Mapping[str, Any]) -> str:
    rows = []
    for clues, found in results["clues"].items():
        of = next(iter(found["diffusion"].values()))
        rows.append(
            f"| {clues} | {of['solve_rate']:.1%} | {of['denoising_steps']:.1f} | {of['tokens_per_forward']:.1f} "
            f"| {found['causal']['solve_rate']:.1%} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="the folder that train.py wrote")
    parser.add_argument("results", type=Path, help="the report that evaluate.py wrote")
    parser.add_argument("--machine", required=True, help="description of the machine that trained the model")
    parser.add_argument("--note", default="", help="remark about the curve")
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text(encoding="utf-8"))
    sys.stdout.write(card(arguments.run, results, arguments.machine, arguments.note))


if __name__ == "__main__":
    main()

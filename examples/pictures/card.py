"""Writes the model card: the model, its pictures, its training, its curve and its results.

    python examples/pictures/card.py RUN RESULTS.json --machine "..." > README.md

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

sys.path.append(str(Path(__file__).parents[1] / "sudoku"))
from drawing import FONTS, SIDES
from reading import CLUES
from train import Options

from mlx_diffgemma.checkpoint import Checkpoint

CARD = """\
---
license: apache-2.0
library_name: mlx-diffgemma
tags: [diffusion_gemma, block-diffusion, image-to-text, sudoku]
---

# Pictures: a tiny DiffusionGemma that reads

It reads a 4x4 Sudoku from a picture and solves it, both in one canvas. The architecture and the file layout are those of
`google/diffusiongemma-26B-A4B-it`, with {parameters:,} parameters instead of 26 billion, so that everything that runs the large
model on images can be tried in a second, on any machine:

```python
from mlx_diffgemma import load

print(load("pictures").generate("Solve", images=["puzzle.png"]).text)  # CLUES=SOLUTION, such as 1..4.3.......2.1=1234...
```

The text of the prompt can be any words: the tokenizer drops them.

## Model

The tower has {vision_layers} layers, hidden size {vision_hidden}, patches of {patch} x {patch} pixels, and one soft token for
{pooled} x {pooled} patches; an image takes at most {budget} soft tokens. The text model has {layers} layers (the last with full
attention), hidden size {hidden}, {experts} experts of which a token takes {top_k}, a vocabulary of {vocabulary} tokens and a
canvas of {canvas}. Weights are stored as BF16; they were trained in float32.

## Pictures

`examples/pictures/drawing.py` draws them with Pillow, without font files: {fonts} kinds of digits in three weights, slanted,
turned and off their places; grids of many sizes and places, turned a little, with and without thin lines; random colours, the
digits darker than the paper; noise; {least} to {most} pixels along each side. Puzzles have one solution and {fewest} to
{most_clues} clues. One puzzle in ten, with all its symmetric forms, is held out from training.

## Training

The objective is that of the Sudoku model, with gradients through the tower. In half of the rows, all tokens of the canvas are
noise. The first pictures look alike. Their variety, from 0 to 1, grows while the mean causal loss is below {well} nats per
token. AdamW, learning rate {learning_rate} after {warmup} steps of warmup, falling as a cosine; gradients clipped at norm 1.

{steps:,} steps of {batch_size} pictures, from seed {seed}, took {minutes:.0f} minutes on {machine}:
`python examples/pictures/train.py`.

| step | variety | diffusion loss | causal loss | held-out pictures solved |
|---:|---:|---:|---:|---:|
{curve}

The last column is of {held_out} pictures of full variety.

## What it reads and solves

{pictures} fresh pictures of held-out puzzles, in all fonts: `python examples/pictures/evaluate.py`. A picture is read right if
all 16 cells of its clues are, and solved if all 16 cells of its solution are. The time is from the bytes of a PNG file to the
text, on {cpu}.

| weights | backend | read right | solved | denoising steps | ms per picture |
|---|---|---:|---:|---:|---:|
{shares}

{agreement}

| font | {by_font_head} |
|---|{by_font_rule}|
| read right | {by_font} |

## Limits

It knows nothing but 4x4 Sudoku in pictures like these. What it makes of handwriting or of a photo is chance.
"""


def card(run: Path, results: Mapping[str, Any], machine: str, cpu: str) -> str:
    """The text of README.md."""
    state = torch.load(run / "state.pt", weights_only=True)
    options, config = Options(**state["options"]), Checkpoint.open(run / "checkpoint").config
    vision = config.vision
    assert vision is not None
    lines = [json.loads(line) for line in (run / "curve.jsonl").read_text().splitlines()]
    recipes = results["recipes"]
    by_font = next(iter(next(iter(recipes.values()))["backends"].values()))["read_right_by_font"]
    return CARD.format(
        **asdict(options),
        parameters=sum(weight.numel() for weight in state["model"].values()),
        vision_layers=vision.num_hidden_layers,
        vision_hidden=vision.hidden_size,
        patch=vision.patch_size,
        pooled=vision.pooling_kernel_size,
        budget=vision.soft_tokens,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        experts=config.num_experts,
        top_k=config.top_k_experts,
        vocabulary=config.vocab_size,
        canvas=config.canvas_length,
        fonts=("six" if len(FONTS) == 6 else len(FONTS)),
        least=SIDES[0],
        most=SIDES[1],
        fewest=CLUES[0],
        most_clues=CLUES[1],
        minutes=state["seconds"] / 60,
        machine=machine,
        cpu=cpu,
        curve=_curve(lines),
        pictures=results["pictures"],
        shares=_shares(recipes),
        agreement=_agreement(recipes),
        by_font_head=" | ".join(by_font),
        by_font_rule="|".join("---:" for _ in by_font),
        by_font=" | ".join(f"{share:.1%}" for share in by_font.values()),
    )


def _curve(lines: Sequence[Mapping[str, float]]) -> str:
    rows = [
        f"| {line['step']:,} | {line['variety']:.2f} | {line['diffusion_loss']:.3f} | {line['causal_loss']:.3f} "
        f"| {line['solve_rate']:.0%} |"
        for line in lines
        if "solve_rate" in line
    ]
    return "\n".join(rows)


def _shares(recipes: Mapping[str, Any]) -> str:
    rows = [
        f"| {recipe} | {name} | {of['read_right']:.1%} | {of['solved']:.1%} | {of['denoising_steps']:.2f} "
        f"| {1000 * of['seconds_per_picture']:.0f} |"
        for recipe, found in recipes.items()
        for name, of in found["backends"].items()
    ]
    return "\n".join(rows)


def _agreement(recipes: Mapping[str, Any]) -> str:
    shares = " and ".join(f"{found['agreement']:.1%} ({recipe})" for recipe, found in recipes.items())
    return f"The backends wrote the same tokens in the same steps for {shares} of the pictures."


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="the folder that train.py wrote")
    parser.add_argument("results", type=Path, help="the report that evaluate.py wrote")
    parser.add_argument("--machine", required=True, help="description of the machine that trained the model")
    parser.add_argument("--cpu", required=True, help="description of the machine that ran evaluate.py")
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text(encoding="utf-8"))
    sys.stdout.write(card(arguments.run, results, arguments.machine, arguments.cpu))


if __name__ == "__main__":
    main()

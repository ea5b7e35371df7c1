"""Measures how well the tiny Sudoku model solves puzzles that it has never seen, on every backend.

    python examples/sudoku/evaluate.py [--checkpoint sudoku] [--backends mlx,torch] [--count 200] [--json FILE]

For each range of clues it measures:

- the solve rate, the denoising steps and the tokens per forward pass;
- whether the backends wrote the same tokens in the same steps;
- how many cells were accepted with one token and committed with another;
- the results when the canvas starts as a solution with wrong cells, and when the clues are frozen inside the canvas;
- the same weights as a causal language model, one token at a time.
"""

import argparse
import json
from collections.abc import Iterable, Mapping
from itertools import pairwise
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
from puzzles import Grids, make_puzzles
from rich.console import Console
from rich.table import Table
from solving import Solved, canvas_tokens, solve
from vocabulary import prompt_tokens

from mlx_diffgemma.backends import Backend, Piece, load_backend
from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.demo.sudoku import fresh_puzzle, to_tokens
from mlx_diffgemma.sampler import FREE

#: Number of puzzles that are also solved with frozen clues.
FROZEN = 50

#: Number of cells with a wrong digit in the warm start's solution.
WRONG_CELLS = 4


def diffusion(result: Solved) -> dict[str, float]:
    """Rates and means over all puzzles."""
    return {
        "solve_rate": float(result.solved.mean()),
        "denoising_steps": float(result.steps.mean()),
        "tokens_per_forward": float(result.new_tokens.sum() / result.steps.sum()),
        "seconds": round(result.seconds, 3),
    }


def self_correction(result: Solved, puzzles: Grids, solutions: Grids) -> dict[str, int]:
    """Empty cells that the sampler accepted with one token and committed with another, and how many of these are right.

    The token that a step accepts is in the canvas of the next step. Tokens accepted in a puzzle's last step do not count, because
    the most likely tokens are committed. ``wrong_when_accepted`` counts the cells that were accepted with a wrong token in any
    step, whether they ended right or not.
    """
    cells = puzzles.shape[1]
    empty, right, final = puzzles == 0, to_tokens(solutions), result.tokens[:, :cells]
    changed, wrong = np.zeros(empty.shape, bool), np.zeros(empty.shape, bool)
    for index, drafts in enumerate(result.drafts):
        for draft, following in pairwise(drafts):
            accepted = draft.accepted[:cells] & empty[index]
            token = following.canvas[:cells]
            changed[index] |= accepted & (token != final[index])
            wrong[index] |= accepted & (token != right[index])
    return {
        "empty_cells": int(empty.sum()),
        "wrong_when_accepted": int(wrong.sum()),
        "taken_back": int(changed.sum()),
        "taken_back_and_right": int((changed & (final == right)).sum()),
    }


def warm_start(backend: Backend, puzzles: Grids, solutions: Grids, config: GenerationConfig, seed: int) -> dict[str, float]:
    """Start from the solution with :data:`WRONG_CELLS` wrong cells that are not clues."""
    rng = np.random.default_rng(seed)
    size = isqrt(puzzles.shape[1])
    draft = solutions.copy()
    for row, puzzle in zip(draft, puzzles, strict=True):
        empty = np.flatnonzero(puzzle == 0)
        cells = rng.choice(empty, min(WRONG_CELLS, len(empty)), replace=False)
        row[cells] = (row[cells] - 1 + rng.integers(1, size, len(cells))) % size + 1
    return diffusion(solve(backend, puzzles, solutions, config, seed=seed, canvas=canvas_tokens(draft)))


def frozen_clues(backend: Backend, puzzles: Grids, solutions: Grids, config: GenerationConfig, seed: int) -> dict[str, float]:
    """Solve the first :data:`FROZEN` puzzles with their clues frozen in the canvas, and without."""
    puzzles, solutions = puzzles[:FROZEN], solutions[:FROZEN]
    templates = np.where(puzzles > 0, to_tokens(puzzles), FREE).astype(np.int32)
    frozen = solve(backend, puzzles, solutions, config, seed=seed, frozen=templates)
    free = solve(backend, puzzles, solutions, config, seed=seed)
    return {
        "puzzles": len(puzzles),
        "solve_rate": float(frozen.solved.mean()),
        "denoising_steps": float(frozen.steps.mean()),
        "solve_rate_unfrozen": float(free.solved.mean()),
        "denoising_steps_unfrozen": float(free.steps.mean()),
    }


def causal(backend: Backend, puzzles: Grids, solutions: Grids) -> dict[str, float]:
    """The weights as a causal language model: nats per token of the true solution up to the end of the turn, and the solve rate
    if the most likely token is written at each position."""
    cells = puzzles.shape[1]
    prompts, answers = prompt_tokens(puzzles), canvas_tokens(solutions)[:, : cells + 1]
    texts = np.concatenate([prompts, answers], axis=1)
    logprobs = np.stack(backend.score([Piece(text, backend.new_cache()) for text in texts]))[:, prompts.shape[1] :]

    caches, tokens, right = [backend.new_cache() for _ in prompts], prompts, np.ones(len(prompts), bool)
    for position in range(cells):
        backend.encode([Piece(new, cache) for new, cache in zip(tokens, caches, strict=True)])
        tokens = backend.next_logits(caches).argmax(axis=-1).astype(np.int32)[:, None]
        right &= tokens[:, 0] == answers[:, position]
    loss = -logprobs.mean(dtype=np.float64)
    return {"loss": float(loss), "solve_rate": float(right.mean()), "forward_passes": cells}


def agreement(results: Iterable[Solved]) -> float:
    """Share of puzzles with the same tokens and the same number of steps in all results."""
    first, *others = results
    same = np.ones(len(first.tokens), bool)
    for other in others:
        same &= (other.tokens == first.tokens).all(axis=1) & (other.steps == first.steps)
    return float(same.mean())


def evaluate(
    backends: Mapping[str, Backend], puzzles: Grids, solutions: Grids, config: GenerationConfig, *, seed: int
) -> dict[str, Any]:
    """All measurements for one set of puzzles."""
    results = {
        name: solve(backend, puzzles, solutions, config, seed=seed, keep_drafts=True) for name, backend in backends.items()
    }
    name, backend = next(iter(backends.items()))
    return {
        "puzzles": len(puzzles),
        "diffusion": {name: diffusion(result) for name, result in results.items()},
        "agreement": agreement(results.values()),
        "self_correction": self_correction(results[name], puzzles, solutions),
        "warm_start": warm_start(backend, puzzles, solutions, config, seed),
        "frozen_clues": frozen_clues(backend, puzzles, solutions, config, seed),
        "causal": causal(backend, puzzles, solutions),
    }


def tables(report: Mapping[str, Any]) -> Iterable[Table]:
    """The report as tables for a terminal. The second table shows the first backend."""
    solving = Table("clues", "backend", "solved", "steps", "tokens per forward", "puzzles/s", title="Diffusion")
    modes = Table(
        "clues", "same tokens", "taken back", "of these right", "warm start", "frozen clues", "causal loss", "causal solved"
    )  # fmt: skip
    for clues, found in report["clues"].items():
        for name, of in found["diffusion"].items():
            rates = f"{of['solve_rate']:.1%}", f"{of['denoising_steps']:.1f}", f"{of['tokens_per_forward']:.1f}"
            solving.add_row(clues, name, *rates, f"{found['puzzles'] / of['seconds']:.0f}")
        correction, warm, frozen = found["self_correction"], found["warm_start"], found["frozen_clues"]
        modes.add_row(
            clues,
            f"{found['agreement']:.1%}",
            f"{correction['taken_back']} of {correction['empty_cells']}",
            str(correction["taken_back_and_right"]),
            f"{warm['solve_rate']:.1%} in {warm['denoising_steps']:.1f}",
            f"{frozen['solve_rate']:.0%} in {frozen['denoising_steps']:.1f} (free {frozen['denoising_steps_unfrozen']:.1f})",
            f"{found['causal']['loss']:.3f}",
            f"{found['causal']['solve_rate']:.1%}",
        )
    return solving, modes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--checkpoint", default="sudoku", help="a folder, or the name of a model in the package (default %(default)s)"
    )
    parser.add_argument("--backends", default="mlx,torch", help="backends, separated by commas (default %(default)s)")
    parser.add_argument("--dtype", help="float32 or bfloat16")
    parser.add_argument("--count", type=int, default=200, help="puzzles for each range of clues (default %(default)s)")
    parser.add_argument("--clues", default="10-12,14-18,20-26", help="ranges of clues, separated by commas (default %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=2, help="seed of the puzzles and the sampler; training uses 0 (default %(default)s)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="OPTION=VALUE", help="set a sampler option; may be repeated"
    )
    parser.add_argument("--json", type=Path, help="file to write the report to")
    arguments = parser.parse_args()

    checkpoint = Checkpoint.open(arguments.checkpoint)
    size = isqrt(checkpoint.config.canvas_length)
    options = {name: json.loads(value) for name, _, value in (option.partition("=") for option in arguments.set)}
    config = checkpoint.generation.replace(**options)
    backends = {name: load_backend(checkpoint, name, dtype=arguments.dtype) for name in arguments.backends.split(",")}
    report: dict[str, Any] = {
        "checkpoint": str(arguments.checkpoint),
        "backends": {name: f"{backend.device}, {backend.dtype}" for name, backend in backends.items()},
        "sampler": {name: getattr(config, name) for name in _SAMPLER_OPTIONS},
        "seed": arguments.seed,
        "example": fresh_puzzle(size, size * size // 2, arguments.seed).clues.text(),
        "clues": {},
    }
    for clues in arguments.clues.split(","):
        low, _, high = clues.partition("-")
        puzzles, solutions = make_puzzles(size, arguments.count, (int(low), int(high or low)), arguments.seed, held_out=True)
        report["clues"][clues] = evaluate(backends, puzzles, solutions, config, seed=arguments.seed)
    Console(width=140).print(*tables(report))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


_SAMPLER_OPTIONS = ("max_denoising_steps", "t_min", "t_max", "entropy_bound", "stability_threshold", "confidence_threshold")


if __name__ == "__main__":
    main()

"""Measures how many tokens the settled rule shows before their block is done, and how often they are wrong.

    python benchmarks/settled.py --puzzles 500 --json benchmarks/results/settled.json

The model is the Sudoku model that comes with the package. Its canvas has 40 tokens and takes few steps. The released model has
not been measured yet.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from mlx_diffgemma import Block, Draft, load
from mlx_diffgemma.demo.sudoku import fresh_puzzle
from mlx_diffgemma.settling import Front, Settled

RULES = [Settled(steps, entropy) for steps in (1, 2, 3, 4) for entropy in (0.5, 0.1, 0.05, 0.01)]
CLUES = (10, 12, 16, 24)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--puzzles", type=int, default=500, help="puzzles for each number of clues (default %(default)s)")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    arguments = parser.parse_args()
    model = load("sudoku", backend="torch")
    early, wrong, blocks = [0] * len(RULES), [0] * len(RULES), 0
    for clues in CLUES:
        for seed in range(arguments.puzzles):
            fronts, shown = [Front(rule) for rule in RULES], [0] * len(RULES)
            for event in model.stream(fresh_puzzle(6, clues, seed).clues.text(), seed=seed):
                if isinstance(event, Draft):
                    for front in fronts:
                        front.update(event.argmax, event.entropy)
                    if not event.done:
                        shown = [len(front.tokens) for front in fronts]
                elif isinstance(event, Block):
                    blocks += 1
                    for index, front in enumerate(fronts):
                        early[index] += shown[index]
                        ends = np.flatnonzero(np.isin(front.tokens, model.checkpoint.generation.eos_token_ids))
                        told = front.tokens[: ends[0] + 1] if ends.size else front.tokens  # nothing after the end token is shown
                        wrong[index] += int((told != event.tokens[: len(told)]).sum())
    results = [
        {"steps": rule.steps, "entropy": rule.entropy, "early": early[index] / blocks, "wrong": wrong[index]}
        for index, rule in enumerate(RULES)
    ]
    print(f"{blocks} blocks of {model.backend.config.canvas_length} tokens")
    for result in results:
        print(
            "{steps} steps below {entropy} nats: {early:.2f} tokens per block shown early, {wrong} wrong in total".format(
                **result
            )
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"blocks": blocks, "rules": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()

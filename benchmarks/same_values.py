"""Whether a change keeps the values of a backend: logits, entropies and tokens of small models, before and after, bit for bit.

    git worktree add ../before COMMIT
    python benchmarks/same_values.py ../before . [--backend mlx]

Each folder is a tree of this project, and computes in a process of its own: both boxed models in BF16 and in 4 bits, and
random models of five shapes (``tests/support/reference.py``), 20 prompts each: the logits after the prompt and of a canvas, two
denoising steps; and ten whole Sudokus. The exit status is 1 if a token differs, or a bit of a logit.
"""

import argparse
import os
import pickle
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
PROMPTS, TEXTS = 20, 10
SHAPES = ("base", "odd_sizes", "window_below_canvas", "six_layers", "other_constants")


def values(backend: Any) -> dict[str, Any]:
    """Logits, and the tokens and entropies of steps, by what they are of."""
    from mlx_diffgemma.backends import Piece, Row

    found, random = dict[str, Any](), np.random.default_rng(0)
    length, vocabulary = backend.config.canvas_length, backend.config.vocab_size

    def tokens(count: int) -> Any:
        return random.integers(0, vocabulary, count).astype(np.int32)

    for index in range(PROMPTS):
        text = backend.new_cache()
        backend.encode([Piece(tokens(12 + index), text)])
        found[f"logits, prompt {index}"] = backend.next_logits([text])
        row = Row(tokens(length), text, 0.7, noise_key=index + 1)
        for step in range(2):
            answer = backend.denoise([row])[0]
            found[f"step {step}, canvas {index}"] = [answer.argmax, answer.sampled, answer.entropy]
            row = replace(row, canvas=tokens(length), self_conditioning=answer.self_conditioning)
        found[f"logits, canvas {index}"] = backend.logits([row])[0]
    return found


def compute(name: str) -> dict[str, dict[str, Any]]:
    """The values of every model, in this process."""
    from mlx_diffgemma import load
    from mlx_diffgemma.backends import load_backend
    from mlx_diffgemma.checkpoint import Checkpoint
    from mlx_diffgemma.convert import Plan, make_recipe, side_files, write

    sys.path.append(str(ROOT / "tests"))  # the same models for both trees
    from support import reference

    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        for boxed in (str(ROOT / "mlx_diffgemma" / "models" / each) for each in ("sudoku", "pictures")):
            checkpoint, packed = Checkpoint.open(boxed), Path(temporary) / Path(boxed).name
            plan = Plan.make(checkpoint, make_recipe("4bit"))
            write(plan, packed, side_files(checkpoint, plan))
            for form, folder in (("BF16", boxed), ("4 bits", str(packed))):
                backend = load_backend(Checkpoint.open(folder), name, device="cpu", dtype="float32")
                found[f"{packed.name}, {form}"] = values(backend)
        for shape in SHAPES:
            folder = reference.make_checkpoint(Path(temporary) / shape, reference.SHAPES[shape])
            found[f"random, {shape}"] = values(load_backend(Checkpoint.open(folder), name, device="cpu", dtype="float32"))
    sudoku = load(ROOT / "mlx_diffgemma" / "models" / "sudoku", backend=name, device="cpu", dtype="float32")
    found["whole texts"] = {f"text {seed}": [np.array(sudoku.generate("." * 36, seed=seed).tokens)] for seed in range(TEXTS)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("before", type=Path, help="a tree of this project")
    parser.add_argument("after", type=Path, help="another one")
    parser.add_argument("--backend", default="mlx", choices=["mlx", "torch"], help="default %(default)s")
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)  # the process that computes
    arguments = parser.parse_args()
    if arguments.into:
        arguments.into.write_bytes(pickle.dumps(compute(arguments.backend)))
        return
    both = []
    with tempfile.TemporaryDirectory() as temporary:
        for tree in (arguments.before, arguments.after):
            file = Path(temporary) / "values"
            command = [sys.executable, __file__, str(tree), str(tree), "--backend", arguments.backend, "--into", str(file)]
            subprocess.run(command, env=os.environ | {"PYTHONPATH": str(tree.resolve())}, check=True)
            both.append(pickle.loads(file.read_bytes()))
    different = 0
    for model, before in both[0].items():
        after, same, largest = both[1][model], {"logits": 0, "steps": 0}, 0.0
        for name, old in before.items():
            new = after[name]
            if name.startswith("logits"):
                largest = max(largest, float(np.abs(old - new).max()))
                same["logits"] += np.array_equal(old, new)
            else:  # tokens; an entropy is a number like a logit
                same["steps"] += all(np.array_equal(*pair) for pair in zip(old[:2], new[:2], strict=True))
        logits = sum(name.startswith("logits") for name in before)
        print(
            f"{model}: {same['logits']} of {logits} logits equal bit for bit, by {largest:.1e} at most; "
            f"tokens of {same['steps']} of {len(before) - logits} equal"
        )
        different += len(before) - sum(same.values())
    sys.exit(different > 0)


if __name__ == "__main__":
    main()

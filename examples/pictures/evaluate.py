"""Measures how well the tiny model reads and solves pictures that it has never seen, on every backend, in BF16 and in 4 bits.

    python examples/pictures/evaluate.py [--checkpoint pictures] [--recipes bf16,4bit] [--count 500] [--json FILE]

Each picture is given as a PNG file to ``generate``. A picture is read right if all 16 cells of the clues are right, and solved if
all 16 cells of the solution are. Other recipes than bf16 are conversions of the checkpoint, as by ``mlx-diffgemma convert``.
"""

import argparse
import io
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).parents[1] / "sudoku"))
from drawing import FONTS, Picture
from reading import CANVAS_LENGTH, PROMPT, Pictures, fresh_pictures, is_right

from mlx_diffgemma import load
from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.convert import Plan, make_recipe, side_files, write
from mlx_diffgemma.hub import local_folder
from mlx_diffgemma.pipeline import DiffusionGemma
from mlx_diffgemma.reports.speed import Machine


@dataclass(frozen=True)
class Answers:
    """What a model wrote for n pictures.

    Attributes:
        tokens: int32 [n, CANVAS_LENGTH].
        read, solved: bool [n].
        steps: int [n], denoising steps.
        seconds: float [n], from the bytes of the file to the text.
    """

    tokens: NDArray[np.int32]
    read: NDArray[np.bool_]
    solved: NDArray[np.bool_]
    steps: NDArray[np.int64]
    seconds: NDArray[np.float64]

    def report(self, fonts: NDArray[np.str_]) -> dict[str, Any]:
        """Shares and means."""
        return {
            "read_right": float(self.read.mean()),
            "solved": float(self.solved.mean()),
            "solved_of_read_right": float(self.solved[self.read].mean()) if self.read.any() else None,
            "denoising_steps": float(self.steps.mean()),
            "seconds_per_picture": float(np.median(self.seconds)),
            "read_right_by_font": {font: float(self.read[fonts == font].mean()) for font in sorted(set(fonts))},
        }


def png(picture: Picture) -> bytes:
    """A picture as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def answer(model: DiffusionGemma, puzzles: Pictures, *, seed: int = 0) -> Answers:
    """Ask a model about pictures, one after the other. Picture i has the seed ``seed`` + i."""
    files = [png(picture) for picture in puzzles.pictures]
    rows, steps, seconds = np.zeros((len(files), CANVAS_LENGTH), np.int32), [], []
    for index, file in enumerate(files):
        started = time.perf_counter()
        written = model.generate(PROMPT, images=[file], seed=seed + index)
        seconds.append(time.perf_counter() - started)
        steps.append(sum(written.statistics.denoising_steps))
        tokens = written.tokens[:CANVAS_LENGTH]
        rows[index, : len(tokens)] = tokens
    return Answers(rows, *is_right(rows, puzzles), np.array(steps), np.array(seconds))


def agreement(results: Mapping[str, Answers]) -> float:
    """Share of pictures with the same tokens in the same number of steps in all results."""
    first, *others = results.values()
    same = [(other.tokens == first.tokens).all(axis=1) & (other.steps == first.steps) for other in others]
    return float(np.mean(np.all(same, axis=0))) if others else 1.0


def converted(source: str, recipe: str, folder: Path) -> Path:
    """The checkpoint that ``mlx-diffgemma convert --recipe`` writes; the source itself for bf16."""
    own = local_folder(source)
    assert own is not None
    if recipe == "bf16":
        return own
    checkpoint, target = Checkpoint.open(source), folder / recipe
    plan = Plan.make(checkpoint, make_recipe(recipe))
    write(plan, target, side_files(checkpoint, plan))
    return target


def table(report: Mapping[str, Any]) -> Table:
    """The report for a terminal."""
    shown = Table("weights", "backend", "read right", "solved", "steps", "ms per picture", "same tokens on all backends")
    for recipe, found in report["recipes"].items():
        for name, of in found["backends"].items():
            shares = f"{of['read_right']:.1%}", f"{of['solved']:.1%}", f"{of['denoising_steps']:.2f}"
            shown.add_row(recipe, name, *shares, f"{1000 * of['seconds_per_picture']:.0f}", f"{found['agreement']:.1%}")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--checkpoint", default="pictures", help="a folder, or the name of a model in the package (default %(default)s)"
    )
    parser.add_argument("--backends", default="torch,mlx", help="backends, separated by commas (default %(default)s)")
    parser.add_argument("--recipes", default="bf16,4bit", help="recipes of convert, separated by commas (default %(default)s)")
    parser.add_argument("--dtype", help="float32 or bfloat16")
    parser.add_argument("--count", type=int, default=500, help="pictures (default %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=2, help="seed of the pictures and the sampler; training uses 0 (default %(default)s)"
    )
    parser.add_argument("--font", choices=list(FONTS), help="draw all digits in this font")
    parser.add_argument("--json", type=Path, help="file to write the report to")
    arguments = parser.parse_args()

    puzzles = fresh_pictures(arguments.count, arguments.seed, arguments.font)
    report: dict[str, Any] = {
        "command": f"python {shlex.join(sys.argv)}",
        "machine": asdict(Machine.this()),
        "pictures": len(puzzles.pictures),
        "recipes": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for recipe in arguments.recipes.split(","):
            source, results = converted(arguments.checkpoint, recipe, Path(folder)), {}
            for name in arguments.backends.split(","):
                model = load(source, backend=name, dtype=arguments.dtype)
                results[name] = answer(model, puzzles, seed=arguments.seed)
            report["recipes"][recipe] = {
                "bytes": Checkpoint.open(source).nbytes,
                "backends": {name: result.report(puzzles.fonts) for name, result in results.items()},
                "agreement": agreement(results),
            }
    Console(width=140).print(table(report))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

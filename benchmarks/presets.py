"""Measures what the presets save and what they cost, on the two small models of this repository.

    python benchmarks/presets.py --json benchmarks/results/presets.json
    python benchmarks/presets.py --sweep --puzzles 200 --records 100 --json benchmarks/results/presets_sweep.json

The models are the two that come with the package (held-out Sudokus of three ranges of clues, and pictures of held-out 4x4
Sudokus) and the records model of the tests (cut-out fields of held-out records, true lengths given). Each prompt is answered with
several seeds. The text of a preset is compared with the text that ``exact`` writes from the same prompt and seed. The line
``other seed`` is ``exact`` again with other seeds: what chance alone changes. Standard errors are of the paired difference, over
prompts. ``all`` is the mean over the tasks.

``--sweep`` measures all combinations of :data:`GRID` instead, on other prompts, with one seed each. The presets were chosen from
its result.
"""

import argparse
import itertools
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "examples" / name) for name in ("sudoku", "records", "pictures")]
import reading  # noqa: E402
from filling import fill, is_right  # noqa: E402
from puzzles import make_puzzles  # noqa: E402
from records import CUTS, Record, random_record  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from solving import MAX_BATCH, solve  # noqa: E402

from mlx_diffgemma.backends import Backend, Cache, ImageSpan, Piece, load_backend  # noqa: E402
from mlx_diffgemma.checkpoint import Checkpoint  # noqa: E402
from mlx_diffgemma.config import GenerationConfig  # noqa: E402
from mlx_diffgemma.presets import PRESETS, scaled  # noqa: E402
from mlx_diffgemma.reports.speed import Machine  # noqa: E402
from mlx_diffgemma.sampler import Block, Text, commit, diffuse  # noqa: E402

#: Ranges of clues of the puzzles.
CLUES = ((10, 12), (14, 18), (20, 26))

#: The factors of the sweep.
GRID: Mapping[str, Sequence[float]] = {
    "stability_threshold": (1, 0),
    "confidence_threshold": (1, 2, 4, 10),
    "entropy_bound": (1, 4),
    "max_denoising_steps": (1, 1 / 2, 1 / 4, 1 / 8),
}

#: Seeds of the puzzles and records of the presets' result, and of the sweep. Training uses 0.
FINAL, SWEEP = 2, 3

#: The seeds of a text's later runs are this far from those of its first run.
STRIDE = 1_000_003


@dataclass(frozen=True)
class Texts:
    """Texts that a model wrote: their tokens up to the end, whether each is right, and its denoising steps."""

    tokens: list[NDArray[np.int32]]
    right: NDArray[np.bool_]
    steps: NDArray[np.int64]

    @classmethod
    def joined(cls, several: Sequence["Texts"]) -> "Texts":
        return cls(
            [text for each in several for text in each.tokens],
            np.concatenate([each.right for each in several]),
            np.concatenate([each.steps for each in several]),
        )


@dataclass(frozen=True)
class Figures:
    """What a preset costs and saves.

    Attributes:
        right: share of the texts that are right.
        lost: that of ``exact`` minus this.
        lost_error: standard error of ``lost``, of paired differences over the prompts.
        steps: denoising steps per block.
        saved: share of the steps of ``exact`` that are saved.
        same_texts: share of the texts with all tokens equal to those of ``exact``.
        same_tokens: share of the tokens of ``exact`` that have the same token at their position.
    """

    right: float
    lost: float
    lost_error: float
    steps: float
    saved: float
    same_texts: float
    same_tokens: float

    @classmethod
    def of(cls, texts: Texts, exact: Texts, seeds: int) -> "Figures":
        """Figures of texts that are sorted by seed, then by prompt."""
        lost = (exact.right.astype(float) - texts.right).reshape(seeds, -1).mean(0)
        pairs = list(zip(texts.tokens, exact.tokens, strict=True))
        equal = [sum(a == b for a, b in zip(text.tolist(), true.tolist(), strict=False)) for text, true in pairs]
        return cls(
            right=float(texts.right.mean()),
            lost=float(lost.mean()),
            lost_error=float(lost.std(ddof=1) / np.sqrt(len(lost))),
            steps=float(texts.steps.mean()),
            saved=float(1 - texts.steps.mean() / exact.steps.mean()),
            same_texts=float(np.mean([np.array_equal(text, true) for text, true in pairs])),
            same_tokens=sum(equal) / sum(len(true) for _, true in pairs),
        )


#: Writes all texts of a task with a configuration and a seed.
Task = Callable[[GenerationConfig, int], Texts]


def sudoku(backend: Backend, clues: tuple[int, int], count: int, seed: int) -> Task:
    """Held-out puzzles of one range of clues."""
    puzzles, solutions = make_puzzles(6, count, clues, seed, held_out=True)

    def run(config: GenerationConfig, seed: int) -> Texts:
        found = solve(backend, puzzles, solutions, config, seed=seed)
        tokens = [canvas[:length] for canvas, length in zip(found.tokens, found.new_tokens, strict=True)]
        return Texts(tokens, found.solved, found.steps)

    return run


def pictures(backend: Backend, count: int, seed: int) -> Task:
    """Pictures of held-out puzzles. An answer is right if the clues are read right and the puzzle is solved."""
    puzzles, vision = reading.fresh_pictures(count, seed), backend.config.vision
    assert vision is not None
    caches: list[Cache] = []
    for picture in puzzles.pictures:
        [features] = backend.see([reading.patches_of(picture, vision)])
        caches.append(backend.new_cache())
        span = ImageSpan(reading.IMAGE_START, features)
        backend.encode([Piece(reading.prompt_tokens(len(features)), caches[-1], (span,))])

    def run(config: GenerationConfig, seed: int) -> Texts:
        config = config.replace(max_new_tokens=reading.CANVAS_LENGTH)
        texts = [Text(np.empty(0, np.int32), seed + index, cache.fork()) for index, cache in enumerate(caches)]
        events = diffuse(backend, texts, config, batch="fast", max_batch=MAX_BATCH)
        blocks = {index: event for index, event in events if isinstance(event, Block)}
        written = [blocks[index] for index in range(count)]
        read, solved = reading.is_right(np.stack([block.tokens for block in written]), puzzles)
        tokens = [block.tokens[: commit(block.tokens, config)[1]] for block in written]
        return Texts(tokens, read & solved, np.array([block.steps for block in written]))

    return run


def records(backend: Backend, count: int, seed: int) -> Task:
    """Held-out records with one or two fields cut out. Names are random letters, which nobody can know, and are not cut."""
    rng = np.random.default_rng(seed)
    cuts = [cut for cut in CUTS if "name" not in cut]
    cases: list[tuple[Record, tuple[str, ...]]] = [
        (random_record(rng, held_out=True), cuts[index % len(cuts)]) for index in range(count)
    ]

    def run(config: GenerationConfig, seed: int) -> Texts:
        found = [fill(backend, *case, config, seed=seed + index)[0] for index, case in enumerate(cases)]
        return Texts(
            [np.array(list(itertools.chain(*each.holes)), np.int32) for each in found],
            np.array([is_right(each, *case) for each, case in zip(found, cases, strict=True)]),
            np.array([each.steps for each in found]),
        )

    return run


def combinations() -> Iterator[dict[str, float]]:
    """The combinations of the sweep, the one that changes nothing first. Each names only the factors that are not 1."""
    for factors in itertools.product(*GRID.values()):
        yield {name: factor for name, factor in zip(GRID, factors, strict=True) if factor != 1}


def measure(
    tasks: Mapping[str, Task], own: GenerationConfig, factors: Mapping[str, Mapping[str, float]], seeds: int
) -> dict[str, dict[str, Any]]:
    """Figures of each of the named ``factors``, by task. The first of them is compared with."""
    report: dict[str, dict[str, Any]] = {task: {} for task in tasks}
    for task, run in tasks.items():
        exact: Texts | None = None
        for name, each in factors.items():
            config = scaled(own, each)
            texts = Texts.joined([run(config, STRIDE * index) for index in range(seeds)])
            exact = exact or texts
            report[task][name] = asdict(Figures.of(texts, exact, seeds))
            if texts is exact:
                other = Texts.joined([run(config, STRIDE * (seeds + index)) for index in range(seeds)])
                report[task]["other seed"] = asdict(Figures.of(other, exact, seeds))
    return report


def overall(report: Mapping[str, Mapping[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Means over the tasks, sorted by the steps saved."""
    tasks = list(report.values())
    means = {}
    for name in tasks[0]:
        rows = [task[name] for task in tasks]
        means[name] = {figure: float(np.mean([row[figure] for row in rows])) for figure in rows[0]}
        means[name]["lost_error"] = float(np.linalg.norm([row["lost_error"] for row in rows]) / len(rows))
    return dict(sorted(means.items(), key=lambda item: item[1]["saved"]))


def agreement(backends: Mapping[str, Backend], own: GenerationConfig, count: int) -> dict[str, float]:
    """For each preset, the share of the hardest puzzles with the same tokens and the same number of steps on all backends."""
    shares = {}
    for name, factors in PRESETS.items():
        first, *others = [sudoku(backend, CLUES[0], count, FINAL)(scaled(own, factors), 0) for backend in backends.values()]
        same = [
            all(np.array_equal(first.tokens[i], other.tokens[i]) and first.steps[i] == other.steps[i] for other in others)
            for i in range(count)
        ]
        shares[name] = float(np.mean(same))
    return shares


def rounded(content: Any) -> Any:
    """The content of a JSON file, with numbers of at most four decimals."""
    if isinstance(content, dict):
        return {name: rounded(value) for name, value in content.items()}
    return round(content, 4) if isinstance(content, float) else content


def table(report: Mapping[str, Mapping[str, Any]]) -> Table:
    shown = Table(
        "model and prompts", "", "right", "lost (error), points", "steps per block", "saved", "same texts", "same tokens"
    )
    for task, rows in report.items():
        for name, figures in rows.items():
            each = Figures(**figures)
            shown.add_row(
                *(task, name, f"{each.right:.1%}", f"{100 * each.lost:+.2f} ({100 * each.lost_error:.2f})"),
                *(f"{each.steps:.2f}", f"{each.saved:.0%}", f"{each.same_texts:.1%}", f"{each.same_tokens:.1%}"),
            )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="measure all combinations of the sweep, not the presets")
    parser.add_argument(
        "--factors", action="append", type=json.loads, help="measure these factors, a JSON object, on the prompts of the sweep"
    )
    parser.add_argument("--backend", default="torch", help="backend of the figures (default %(default)s)")
    parser.add_argument(
        "--puzzles", type=int, default=300, help="puzzles for each range of clues, and pictures (default %(default)s)"
    )
    parser.add_argument("--records", type=int, default=200, help="records (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=4, help="seeds for each puzzle; one in a sweep (default %(default)s)")
    parser.add_argument("--compared", type=int, default=100, help="puzzles on both backends (default %(default)s)")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    arguments = parser.parse_args()

    checkpoint, seed = Checkpoint.open("sudoku"), SWEEP if arguments.sweep or arguments.factors else FINAL
    backend = load_backend(checkpoint, arguments.backend)
    puzzles = {f"Sudoku, {low} to {high} clues": sudoku(backend, (low, high), arguments.puzzles, seed) for low, high in CLUES}
    seen = Checkpoint.open("pictures")
    seeing = {"pictures": pictures(load_backend(seen, arguments.backend), arguments.puzzles, seed)}
    small = Checkpoint.open(ROOT / "tests" / "data" / "records")
    filling = {"records": records(load_backend(small, arguments.backend), arguments.records, seed)}
    if arguments.sweep:
        factors: dict[str, Mapping[str, float]] = {json.dumps(each): each for each in combinations()}
        seeds = 1
    elif arguments.factors:
        factors, seeds = {json.dumps(each): each for each in ({}, *arguments.factors)}, arguments.seeds
    else:
        factors, seeds = dict(PRESETS), arguments.seeds
    report: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/presets.py", *sys.argv[1:]]),
        "machine": asdict(Machine.this()),
        "puzzles": arguments.puzzles,
        "records": arguments.records,
        "seeds": seeds,
    }
    report["figures"] = figures = (
        measure(puzzles, checkpoint.generation, factors, seeds)
        | measure(seeing, seen.generation, factors, seeds)
        | measure(filling, small.generation, factors, seeds)
    )
    report["overall"] = overall(figures)
    shown = {} if arguments.sweep else figures
    Console(width=140).print(table({**shown, "all": report["overall"]}))
    if arguments.sweep:  # keep the file small
        report["figures"] = {
            task: {name: {figure: row[figure] for figure in ("right", "steps")} for name, row in rows.items()}
            for task, rows in figures.items()
        }
    if not arguments.sweep and not arguments.factors:
        report["presets"] = {name: dict(each) for name, each in PRESETS.items()}
        backends = {name: load_backend(checkpoint, name) for name in ("torch", "mlx")}
        report["same_on_both_backends"] = agreement(backends, checkpoint.generation, arguments.compared)
        print("puzzles with the same tokens and steps on both backends:", report["same_on_both_backends"])
    if arguments.json:
        arguments.json.write_text(json.dumps(rounded(report), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Measures how well a model fills the holes of records that it has never seen, with known and unknown lengths.

    python examples/records/evaluate.py CHECKPOINT [--backends torch,mlx] [--count 297] [--compared 27] [--json FILE]

One or two fields of each record are cut out. First the true lengths are given. Then every length in a range is tried, and several
formulas rank the candidates by the same log-probabilities. The report says how often each formula ranks the true lengths first,
and how often its first candidate is the record. All these figures come from the first backend. The other backends fill only the
first few records, and should write the same tokens.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).parents[1] / "sudoku"))
from filling import fill, is_right
from records import CUTS, Record, random_record

from mlx_diffgemma.backends import Backend, load_backend
from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.editing.infilling import Candidate, Hole
from mlx_diffgemma.reports.speed import Machine

#: Lengths to try when they are unknown, by number of holes.
RANGES = {1: Hole(1, 10), 2: Hole(1, 8)}


@dataclass(frozen=True)
class Case:
    """A record without the fields ``cut``."""

    record: Record
    cut: tuple[str, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(len(value) for value in self.record.cut(self.cut)[1])

    def text_length(self, candidate: Candidate) -> int:
        """Number of tokens in the mean of the causal score: from the first hole to the end of the turn."""
        return sum(map(len, candidate.holes)) + sum(map(len, self.record.cut(self.cut)[0][1:])) + 1


def _canvas_sum(candidate: Candidate) -> float:
    return candidate.canvas_logprob * sum(map(len, candidate.holes))


#: Scores of a candidate for a case. Higher is better.
FORMULAS: Mapping[str, Callable[[Case, Candidate], float]] = {
    "canvas mean": lambda _, candidate: candidate.canvas_logprob,
    "canvas sum": lambda _, candidate: _canvas_sum(candidate),
    "causal mean": lambda _, candidate: candidate.causal_logprob,
    "causal sum": lambda case, candidate: candidate.causal_logprob * case.text_length(candidate),
    "canvas mean + causal mean": lambda _, candidate: candidate.canvas_logprob + candidate.causal_logprob,
    "canvas sum + causal sum": lambda case, candidate: (
        _canvas_sum(candidate) + candidate.causal_logprob * case.text_length(candidate)
    ),
    "infill's score": lambda _, candidate: candidate.score,
}


@dataclass(frozen=True)
class Filled:
    """What one backend wrote for a case: with the true lengths, and with each length of the range."""

    known: Candidate
    tried: list[Candidate]

    @property
    def tokens(self) -> tuple[Any, ...]:
        """All written tokens, independent of the ranking."""
        return self.known.holes, sorted((candidate.lengths, candidate.holes) for candidate in self.tried)


def make_cases(count: int, seed: int) -> list[Case]:
    """Cases of held-out records, with the cuts in turn."""
    rng = np.random.default_rng(seed)
    return [Case(random_record(rng, held_out=True), CUTS[index % len(CUTS)]) for index in range(count)]


def fill_both_ways(backend: Backend, case: Case, config: GenerationConfig, seed: int) -> Filled:
    known = fill(backend, case.record, case.cut, config, seed=seed)
    tried = fill(backend, case.record, case.cut, config, lengths=RANGES[len(case.cut)], seed=seed)
    return Filled(known[0], tried)


def shares(cases: Sequence[Case], filled: Sequence[Filled]) -> dict[str, Any]:
    """Share of cases filled exactly with known lengths; and by formula, shares of lengths found and of exact fillings."""
    pairs = list(zip(cases, filled, strict=True))
    report: dict[str, Any] = {
        "cases": len(pairs),
        "known_length_right": float(np.mean([is_right(found.known, case.record, case.cut) for case, found in pairs])),
        "formulas": {},
    }
    for name, formula in FORMULAS.items():
        best = [max(found.tried, key=lambda candidate: formula(case, candidate)) for case, found in pairs]
        report["formulas"][name] = {
            "length_found": float(np.mean([one.lengths == case.lengths for case, one in zip(cases, best, strict=True)])),
            "right": float(np.mean([is_right(one, case.record, case.cut) for case, one in zip(cases, best, strict=True)])),
        }
    return report


def agreement(results: Sequence[Sequence[Filled]]) -> float:
    """Share of cases with the same tokens in every candidate, among those that all backends filled."""
    return float(np.mean([all(one.tokens == row[0].tokens for one in row) for row in zip(*results, strict=False)]))


def tables(report: Mapping[str, Any]) -> list[Table]:
    """The report as tables for a terminal."""
    by_cut = Table("cut out", "cases", "true length given: right", "length unknown: found", "right")
    for name, found in report["cuts"].items():
        ours = found["formulas"]["infill's score"]
        rates = found["known_length_right"], ours["length_found"], ours["right"]
        by_cut.add_row(name, str(found["cases"]), *(f"{rate:.1%}" for rate in rates))
    formulas = Table("ranked by", *(f"{name}: {what}" for name in _GROUPS for what in ("found", "right")))
    for name in FORMULAS:
        found = [report["cuts"][group]["formulas"][name] for group in _GROUPS]
        formulas.add_row(name, *(f"{one[what]:.1%}" for one in found for what in ("length_found", "right")))
    return [by_cut, formulas]


_GROUPS = ("one hole", "two holes", "all")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", help="a checkpoint folder that train.py wrote")
    parser.add_argument("--backends", default="torch,mlx", help="backends, separated by commas (default %(default)s)")
    parser.add_argument("--count", type=int, default=297, help="records for the first backend (default %(default)s)")
    parser.add_argument("--compared", type=int, default=27, help="records for the other backends (default %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=2, help="seed of the records and the sampler; training uses 0 (default %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="file to write the report to")
    arguments = parser.parse_args()

    checkpoint = Checkpoint.open(arguments.checkpoint)
    cases = make_cases(arguments.count, arguments.seed)
    results: list[list[Filled]] = []
    for name in arguments.backends.split(","):
        backend = load_backend(checkpoint, name, device="cpu", dtype="float32")
        own = cases[: arguments.compared] if results else cases
        results.append([fill_both_ways(backend, case, checkpoint.generation, arguments.seed) for case in own])
    filled = results[0]
    groups = {
        **{" and ".join(cut): [case.cut == cut for case in cases] for cut in CUTS},
        "one hole": [len(case.cut) == 1 for case in cases],
        "two holes": [len(case.cut) == 2 for case in cases],
        "all": [True] * len(cases),
    }
    report = {
        "command": f"python {shlex.join(sys.argv)}",
        "machine": asdict(Machine.this()),
        "ranges": {str(holes): [tried.least, tried.most] for holes, tried in RANGES.items()},
        "backends": arguments.backends.split(","),
        "compared": min(arguments.compared, len(cases)),
        "same_tokens": agreement(results),
        "cuts": {
            name: shares(
                [case for case, chosen in zip(cases, mask, strict=True) if chosen],
                [found for found, chosen in zip(filled, mask, strict=True) if chosen],
            )
            for name, mask in groups.items()
        },
    }
    Console(width=140).print(*tables(report))
    print(f"same tokens on {arguments.backends}: {report['same_tokens']:.1%} of {report['compared']} records")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

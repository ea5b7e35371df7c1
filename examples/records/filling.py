"""Fills the holes of records with the infill of a backend."""

from collections.abc import Sequence

from records import Record, to_tokens
from vocabulary import BOS, END_OF_TURN, PAD

from mlx_diffgemma.backends import Backend
from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.editing import infilling
from mlx_diffgemma.editing.infilling import Candidate, Frame, Hole


def fill(
    backend: Backend, record: Record, cut: Sequence[str], config: GenerationConfig, *, lengths: Hole | None = None, seed: int = 0
) -> list[Candidate]:
    """Fill in the fields ``cut`` of a record. Returns the candidates, the best first.

    Args:
        lengths: range of lengths to try for each hole; by default the true length.
    """
    known, values = record.cut(cut)
    template: list[list[int] | Hole] = [[BOS, *to_tokens(known[0])]]
    for value, behind in zip(values, known[1:], strict=True):
        template += [lengths or Hole(len(value), len(value)), to_tokens(behind)]
    return infilling.fill(backend, template, config, seed=seed, frame=Frame((END_OF_TURN, PAD)), batch="fast")


def is_right(candidate: Candidate, record: Record, cut: Sequence[str]) -> bool:
    """Whether every hole holds its value exactly."""
    return [list(hole) for hole in candidate.holes] == [to_tokens(value) for value in record.cut(cut)[1]]

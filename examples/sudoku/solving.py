"""Makes canvases of grids, and solves many puzzles side by side with a backend and the sampler."""

import time
from dataclasses import dataclass
from math import isqrt

import numpy as np
from numpy.typing import NDArray
from puzzles import Grids
from vocabulary import END_OF_TURN, PAD, prompt_tokens

from mlx_diffgemma.backends import Backend
from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.demo.sudoku import from_tokens, to_tokens
from mlx_diffgemma.sampler import Block, Draft, Text, diffuse

#: Maximum number of puzzles in one forward pass.
MAX_BATCH = 64


def canvas_length(size: int) -> int:
    """Canvas length for a grid of ``size``: its cells, the end of the turn, and three padding tokens."""
    return size * size + 4


def canvas_tokens(grids: Grids) -> NDArray[np.int32]:
    """Canvases int32 [n, L] of complete grids [n, cells], as the model should write them."""
    count, cells = grids.shape
    canvases = np.full((count, canvas_length(isqrt(cells))), PAD, np.int32)
    canvases[:, :cells] = to_tokens(grids)
    canvases[:, cells] = END_OF_TURN
    return canvases


@dataclass(frozen=True)
class Solved:
    """Results of the sampler for n puzzles.

    Attributes:
        tokens: int32 [n, L], the committed canvases.
        solved: bool [n]. A puzzle has one solution, so all cells must equal it.
        steps: int [n], number of denoising steps.
        new_tokens: int [n], number of tokens up to the end token, which counts.
        drafts: for each puzzle one draft per denoising step, with ``keep_drafts``; else empty.
        seconds: wall time for all puzzles.
    """

    tokens: NDArray[np.int32]
    solved: NDArray[np.bool_]
    steps: NDArray[np.int64]
    new_tokens: NDArray[np.int64]
    drafts: list[list[Draft]]
    seconds: float


def solve(
    backend: Backend,
    puzzles: Grids,
    solutions: Grids,
    config: GenerationConfig,
    *,
    seed: int = 0,
    canvas: NDArray[np.int32] | None = None,
    frozen: NDArray[np.int32] | None = None,
    keep_drafts: bool = False,
) -> Solved:
    """Solve puzzles int8 [n, cells], each in one canvas and many in one pass. Puzzle i has the seed ``seed`` + i.

    Args:
        canvas, frozen: int32 [n, P], for each puzzle as in :class:`~mlx_diffgemma.sampler.Text`.
    """
    length = config.canvas_length or backend.config.canvas_length
    texts = [
        Text(
            prompt,
            seed + index,
            canvas=None if canvas is None else canvas[index],
            frozen=None if frozen is None else frozen[index],
        )
        for index, prompt in enumerate(prompt_tokens(puzzles))
    ]
    blocks: dict[int, Block] = {}
    drafts: list[list[Draft]] = [[] for _ in texts]
    started = time.perf_counter()
    for index, event in diffuse(backend, texts, config.replace(max_new_tokens=length), batch="fast", max_batch=MAX_BATCH):
        if isinstance(event, Block):
            blocks[index] = event
        elif keep_drafts:
            drafts[index].append(event)
    seconds = time.perf_counter() - started
    written = [blocks[index] for index in range(len(texts))]
    tokens = np.stack([block.tokens for block in written])
    cells = puzzles.shape[1]
    answers = from_tokens(tokens[:, :cells], isqrt(cells))
    is_end = np.isin(tokens, config.eos_token_ids)
    return Solved(
        tokens=tokens,
        solved=(answers == solutions).all(axis=1),
        steps=np.array([block.steps for block in written]),
        new_tokens=np.where(is_end.any(axis=1), is_end.argmax(axis=1) + 1, length),
        drafts=drafts,
        seconds=seconds,
    )

"""What a canvas holds, and many puzzles at once through a backend and the sampler."""

from dataclasses import dataclass
from math import isqrt

import numpy as np
from numpy.typing import NDArray
from puzzles import Grids
from vocabulary import END_OF_TURN, PAD, prompt_tokens

from mlx_diffgemma.backends import Backend
from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.demo.sudoku import from_tokens, to_tokens
from mlx_diffgemma.sampler import Block, Draft, block_diffusion


def canvas_length(size: int) -> int:
    """Tokens of the canvas for a grid of ``size``: the cells, the end of the turn, and three of padding."""
    return size * size + 4


def canvas_tokens(grids: Grids) -> NDArray[np.int32]:
    """Canvases int32 [n, L] of complete grids [n, cells], as the model is to write them."""
    count, cells = grids.shape
    canvases = np.full((count, canvas_length(isqrt(cells))), PAD, np.int32)
    canvases[:, :cells] = to_tokens(grids)
    canvases[:, cells] = END_OF_TURN
    return canvases


@dataclass(frozen=True)
class Solved:
    """What the sampler made of n puzzles.

    Attributes:
        tokens: int32 [n, L], the committed canvases.
        solved: bool [n]. A puzzle has one solution, so that all cells must equal it.
        steps: int [n], denoising steps.
        new_tokens: int [n], up to and with the end token.
        drafts: one a denoising step, if they were asked for.
        seconds: wall time of all forward passes.
    """

    tokens: NDArray[np.int32]
    solved: NDArray[np.bool_]
    steps: NDArray[np.int64]
    new_tokens: NDArray[np.int64]
    drafts: list[Draft]
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
    """Solve puzzles int8 [n, cells] in one batch of one canvas; row i has the seed ``seed`` + i.

    Args:
        canvas, frozen: as in :func:`mlx_diffgemma.sampler.block_diffusion`.
    """
    length = config.canvas_length or backend.config.canvas_length
    seeds = range(seed, seed + len(puzzles))
    events = block_diffusion(
        backend, prompt_tokens(puzzles), config.replace(max_new_tokens=length), seed=seeds, canvas=canvas, frozen=frozen
    )
    drafts: list[Draft] = []
    for event in events:
        if isinstance(event, Block):
            block = event
        elif keep_drafts:
            drafts.append(event)
    cells = puzzles.shape[1]
    answers = from_tokens(block.tokens[:, :cells], isqrt(cells))
    is_end = np.isin(block.tokens, config.eos_token_ids)
    new_tokens = np.where(is_end.any(axis=1), is_end.argmax(axis=1) + 1, length)
    return Solved(
        tokens=block.tokens,
        solved=(answers == solutions).all(axis=1),
        steps=block.steps,
        new_tokens=new_tokens,
        drafts=drafts,
        seconds=block.encode_seconds + block.denoise_seconds,
    )

"""A fake backend: it computes nothing, returns scripted results, and records its calls."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_diffgemma.backends import Denoised, Pending, Piece, Row
from mlx_diffgemma.config import FULL, LayerConfig, ModelConfig, RopeConfig
from mlx_diffgemma.vision.patches import Patches

L, V = 6, 50
MODEL = ModelConfig(
    vocab_size=V, hidden_size=8, intermediate_size=8, moe_intermediate_size=8, num_attention_heads=1, num_experts=1,
    top_k_experts=1, rms_norm_eps=1e-6, final_logit_softcapping=30.0, sliding_window=4, max_position_embeddings=64,
    canvas_length=L, layers=(LayerConfig(FULL, 8, 1, RopeConfig("default", 1e4)),),
)  # fmt: skip


class FakeCache(list[int]):
    """The tokens that a cache would hold. Each position counts as 10 bytes.

    Attributes:
        denoised: the cache's length at each denoising step that used it.
    """

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        super().__init__(tokens)
        self.denoised: list[int] = []

    def fork(self) -> "FakeCache":
        return FakeCache(self)

    def buffers(self) -> dict[int, int]:
        return {id(self): 10 * len(self)}

    @property
    def nbytes(self) -> int:
        return 10 * len(self)


@dataclass(frozen=True)
class Asked:
    """A row that the fake was asked to denoise.

    Attributes:
        block, step: the row's block in its text, counted from 0, and the step in that block, counted from 1.
        cached: the tokens in the row's cache.
    """

    row: Row
    block: int
    step: int
    cached: list[int]

    @property
    def canvas(self) -> list[int]:
        tokens: list[int] = self.row.canvas.tolist()
        return tokens


#: The argmax, sampled and entropy of a row; see :func:`full`.
Answer = tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]


@dataclass
class FakeBackend:
    """Returns the result of ``script`` for each row. Frozen positions keep their tokens, as in every backend.

    Attributes:
        causal, canvas: log-probabilities of token ids, for ``score`` and ``score_canvas``.
        following: the likeliest token after those in a cache, for ``next_logits``; by default their number.
        head: logits [N, V] of a piece or a row, for ``logits``; by default zeros.
        during: called within each call, with the method's name and the parts.
        ahead: whether a pass is computed when it is launched, as beside the host. Otherwise the wait computes it.
        peak: the result of ``peak_memory``.
        calls: the methods that were called, each with the tokens of its parts.
        asked: the rows that were denoised, in order.
    """

    script: Callable[[Asked], Answer] = lambda asked: full(asked.canvas, width=len(asked.canvas))
    config: ModelConfig = MODEL
    causal: Callable[[NDArray[np.int32]], Any] = np.zeros_like
    canvas: Callable[[NDArray[np.int32]], Any] = np.zeros_like
    following: Callable[[list[int]], int] = len
    head: Callable[[Piece | Row], Any] = lambda part: np.zeros((len(_tokens(part)), V))
    during: Callable[[str, Sequence[Any]], object] = lambda method, parts: None
    exact_rows: bool = True
    ahead: bool = False
    peak: int | None = None
    calls: list[tuple[str, list[list[int]]]] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    name, device, dtype = "fake", "none", "float32"

    def new_cache(self) -> FakeCache:
        return FakeCache()

    def peak_memory(self) -> int | None:
        return self.peak

    def see(self, images: Sequence[Patches]) -> list[NDArray[np.float32]]:
        """The features [N, hidden_size] of each image all have its first pixel as their value."""
        self._note("see", images, [image.pixels[0] for image in images])
        return [np.full((image.soft_tokens, self.config.hidden_size), image.pixels[0, 0], np.float32) for image in images]

    def vision_states(self, image: Patches) -> tuple[NDArray[np.float32], list[NDArray[np.float32]]]:
        raise AssertionError("there are no states here")

    def encode(self, pieces: Sequence[Piece]) -> None:
        self._note("encode", pieces, [piece.tokens for piece in pieces])
        for piece in pieces:
            piece.cache.extend(piece.tokens.tolist())  # type: ignore[attr-defined]

    def next_logits(self, caches: Sequence[FakeCache]) -> NDArray[np.float32]:
        self._note("next_logits", caches, [np.array(cache) for cache in caches])
        tokens = np.arange(self.config.vocab_size)
        return np.stack([np.float32(10) * (tokens == self.following(list(cache))).astype(np.float32) for cache in caches])

    def score(self, pieces: Sequence[Piece]) -> list[NDArray[np.float32]]:
        self._note("score", pieces, [piece.tokens for piece in pieces])
        for piece in pieces:
            piece.cache.extend(piece.tokens.tolist())  # type: ignore[attr-defined]
        return [np.asarray(self.causal(piece.tokens), np.float32) for piece in pieces]

    def launch(self, rows: Sequence[Row]) -> Pending:
        if not self.ahead:
            return partial(self.denoise, rows)
        answers = self.denoise(rows)
        return lambda: answers

    def denoise(self, rows: Sequence[Row]) -> list[Denoised]:
        self._note("denoise", rows, [row.canvas for row in rows])
        return [self._denoise(row) for row in rows]

    def score_canvas(self, rows: Sequence[Row]) -> list[NDArray[np.float32]]:
        self._note("score_canvas", rows, [row.canvas for row in rows])
        return [np.asarray(self.canvas(row.canvas), np.float32) for row in rows]

    def logits(self, parts: Sequence[Piece | Row], trace: object = None) -> list[NDArray[np.float32]]:
        assert trace is None, "there are no hidden states here"
        self._note("logits", parts, [_tokens(part) for part in parts])
        answers = [np.asarray(self.head(part), np.float32) for part in parts]
        for part in parts:
            if isinstance(part, Piece):
                part.cache.extend(part.tokens.tolist())  # type: ignore[attr-defined]
        return answers

    def _denoise(self, row: Row) -> Denoised:
        assert isinstance(row.cache, FakeCache)
        lengths = row.cache.denoised
        lengths.append(len(row.cache))
        block = len(set(lengths)) - 1
        asked = Asked(row, block, lengths.count(len(row.cache)), list(row.cache))
        self.asked.append(asked)
        argmax, sampled, entropy = self.script(asked)
        if row.frozen is not None:
            known = row.frozen >= 0
            argmax, sampled = np.where(known, row.frozen, argmax), np.where(known, row.frozen, sampled)
            entropy = np.where(known, np.float32(0), entropy)
        return Denoised(argmax, sampled, entropy, (asked.block, asked.step))

    def _note(self, method: str, parts: Sequence[Any], tokens: Sequence[NDArray[np.int32]]) -> None:
        self.calls.append((method, [each.tolist() for each in tokens]))
        self.during(method, parts)

    def tokens_of(self, method: str) -> list[list[list[int]]]:
        """The tokens of the parts, for each call of a method."""
        return [tokens for name, tokens in self.calls if name == method]


def _tokens(part: Piece | Row) -> NDArray[np.int32]:
    return part.tokens if isinstance(part, Piece) else part.canvas


def full(tokens: Any, entropy: Any = 0.0, sampled: Any = None, *, width: int = L) -> Answer:
    """A result for one row. ``tokens``, ``entropy`` and ``sampled`` are broadcast over the canvas."""
    argmax = np.broadcast_to(np.asarray(tokens, np.int32), (width,))
    drawn = argmax if sampled is None else np.broadcast_to(np.asarray(sampled, np.int32), (width,))
    return argmax, drawn, np.broadcast_to(np.asarray(entropy, np.float32), (width,))


def writes(text: Callable[[Asked], list[int]], pad: int = 0) -> Callable[[Asked], Answer]:
    """A script that returns, with entropy 0, the tokens that ``text`` gives for a canvas, followed by padding."""

    def script(asked: Asked) -> Answer:
        width = len(asked.canvas)
        return full([*text(asked)[:width], *[pad] * width][:width], width=width)

    return script

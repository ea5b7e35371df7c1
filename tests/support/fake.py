"""A backend that computes nothing: it answers by a script, and keeps what it was asked."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_diffgemma.backends import Denoised
from mlx_diffgemma.config import FULL, LayerConfig, ModelConfig, RopeConfig

L, V = 6, 50
MODEL = ModelConfig(
    vocab_size=V, hidden_size=8, intermediate_size=8, moe_intermediate_size=8, num_attention_heads=1, num_experts=1,
    top_k_experts=1, rms_norm_eps=1e-6, final_logit_softcapping=30.0, sliding_window=4, max_position_embeddings=64,
    canvas_length=L, layers=(LayerConfig(FULL, 8, 1, RopeConfig("default", 1e4)),),
)  # fmt: skip
Answer = tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]


@dataclass
class FakeBackend:
    """Answers what ``script(block, step, canvas)`` says: argmax, sampled and entropy. Keeps what it was asked."""

    script: Callable[[int, int, NDArray[np.int32]], Answer]
    config: ModelConfig = MODEL
    name, device, dtype, exact_rows = "fake", "none", "none", True
    encoded: list[NDArray[np.int32]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)

    def new_cache(self, batch_size: int = 1) -> list[int]:
        return []

    def encode(self, tokens: NDArray[np.int32], cache: list[int]) -> None:
        self.encoded.append(tokens.copy())
        cache.extend(range(tokens.shape[1]))

    def denoise(self, canvas: NDArray[np.int32], cache: list[int], **given: Any) -> Denoised:
        block = len(self.encoded) - 1
        step = 1 + sum(asked["block"] == block for asked in self.steps)
        self.steps.append({"block": block, "step": step, "canvas": canvas.copy(), "cached": len(cache), **given})
        return Denoised(*self.script(block, step, canvas), self_conditioning=(block, step))


class Marked(list[int]):
    """What a fake cache holds, at 10 bytes a position."""

    @property
    def nbytes(self) -> int:
        return 10 * len(self)


class FakeCache(Marked):
    """Positions, or the tokens there; like the real ones, it can be cut back to where its windows were."""

    def repeated(self, rows: int) -> "FakeCache":
        return FakeCache(self)

    def windows(self) -> Marked:
        return Marked(self)

    def cut(self, windows: Marked) -> "FakeCache":
        assert self[: len(windows)] == windows
        return FakeCache(windows)


@dataclass
class EditingFake(FakeBackend):
    """Keeps to frozen tokens, and scores tokens by ``causal`` and ``canvas``, which map token ids to log-probabilities."""

    causal: Callable[[NDArray[np.int32]], Any] = np.zeros_like
    canvas: Callable[[NDArray[np.int32]], Any] = np.zeros_like
    scored: list[NDArray[np.int32]] = field(default_factory=list)

    def new_cache(self, batch_size: int = 1) -> FakeCache:
        return FakeCache()

    def denoise(self, canvas: NDArray[np.int32], cache: list[int], **given: Any) -> Denoised:
        answer, frozen = super().denoise(canvas, cache, **given), given["frozen"]
        return answer if frozen is None else answer._replace(argmax=np.where(frozen >= 0, frozen, answer.argmax))

    def score(self, tokens: NDArray[np.int32], cache: list[int]) -> NDArray[np.float32]:
        self.scored.append(tokens.copy())
        return np.asarray(self.causal(tokens), np.float32)

    def score_canvas(self, canvas: NDArray[np.int32], cache: list[int]) -> NDArray[np.float32]:
        return np.asarray(self.canvas(canvas), np.float32)


def full(tokens: Any, entropy: Any = 0.0, sampled: Any = None) -> Answer:
    """An answer for one row or more; ``tokens`` and ``entropy`` broadcast over the canvas."""
    argmax = np.atleast_2d(np.broadcast_to(np.asarray(tokens, np.int32), np.broadcast_shapes(np.shape(tokens), (L,))))
    drawn = argmax if sampled is None else np.broadcast_to(np.asarray(sampled, np.int32), argmax.shape)
    return argmax, drawn, np.broadcast_to(np.asarray(entropy, np.float32), argmax.shape)

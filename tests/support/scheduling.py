"""What an engine is tested with: jobs that take steps of a backend that computes nothing, and who listens to them."""

import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mlx_diffgemma import DiffusionGemma
from mlx_diffgemma.backends import Denoised
from mlx_diffgemma.scheduler import engine as engine_module
from mlx_diffgemma.scheduler.engine import Engine, Finished, Job
from support.fake import MODEL

WIDTH, SECONDS = 4, 20.0  # of a canvas; to wait for what must come


class Rows:
    """A cache: the positions of each row."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows[0])

    def joined(self, others: list["Rows"]) -> "Rows":
        return Rows([list(row) for part in (self, *others) for row in part.rows])


@dataclass
class Scripted:
    """Answers each row of a canvas with the row itself, and keeps the first token of each row that it was asked about.

    Attributes:
        calls: the kind of each call, and those tokens.
        joined: the caches of passes of several.
        during: called with the number of the call, from 1, within it.
    """

    during: Callable[[int], None] = lambda _: None
    calls: list[tuple[str, list[int]]] = field(default_factory=list)
    joined: list[Rows] = field(default_factory=list)
    config = MODEL
    name, device, dtype, exact_rows = "scripted", "none", "float32", True
    logits = peak_memory = None

    def new_cache(self, batch_size: int = 1) -> Rows:
        return Rows([[] for _ in range(batch_size)])

    def encode(self, tokens: NDArray[np.int32], cache: Rows, *, logits: bool = False) -> NDArray[np.float32] | None:
        self._note("encode", tokens)
        for row, new in zip(cache.rows, tokens.tolist(), strict=True):
            row.extend(new)
        return np.full((1, 1), len(cache), np.float32) if logits else None

    def score(self, tokens: NDArray[np.int32], cache: Rows) -> NDArray[np.float32]:
        self.encode(tokens, cache)
        return tokens.astype(np.float32)

    def denoise(self, canvas: NDArray[np.int32], cache: Rows, **given: Any) -> Denoised:
        self._note("denoise", canvas)
        assert [row[0] for row in cache.rows] == canvas[:, 0].tolist(), "rows of a canvas with rows of another cache"
        if len(canvas) > 1 and all(cache is not known for known in self.joined):
            self.joined.append(cache)
        before = given["self_conditioning"]
        if before is not None:
            before = np.concatenate(before) if isinstance(before, list) else before
            assert before.tolist() == canvas.tolist(), "self-conditioning of other rows"
        return Denoised(canvas, canvas, np.zeros(canvas.shape, np.float32), canvas.copy())

    def _note(self, kind: str, tokens: NDArray[np.int32]) -> None:
        self.calls.append((kind, tokens[:, 0].tolist()))
        self.during(len(self.calls))

    @property
    def steps(self) -> list[list[int]]:
        return [tokens for kind, tokens in self.calls if kind == "denoise"]


@dataclass
class Inbox:
    """Takes what is delivered."""

    events: list[Any] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def __call__(self, event: Any) -> None:
        assert not self.ended.is_set(), "delivered after the end"
        self.events.append(event)
        if isinstance(event, Finished):
            self.ended.set()

    @property
    def error(self) -> BaseException | None:
        assert self.ended.wait(SECONDS), "no end was delivered"
        return self.events[-1].error


class Bench:
    """An engine on a scripted backend, and jobs that take steps on it."""

    def __init__(self, **options: Any) -> None:
        self.backend = Scripted()
        model = DiffusionGemma(None, self.backend)  # type: ignore[arg-type]
        model.tokenizer = None  # type: ignore[assignment]
        self.engine = Engine(model, **options)
        self.closed: list[int] = []  # the requests whose `finally` ran, in the engine's thread
        self.caches: list[weakref.ref[Rows]] = []

    def steps(self, token: int, count: int = 4, length: int = 3, cooling: float = 0.0) -> Iterator[int]:
        """One encode of ``length`` tokens, and ``count`` steps; ``token`` tells the request."""
        backend = self.engine.model.backend
        cache, canvas = backend.new_cache(1), np.full((1, WIDTH), token, np.int32)
        self.caches.append(weakref.ref(cache))
        conditioning = None
        try:
            backend.encode(np.full((1, length), token, np.int32), cache)
            for step in range(count):
                result = backend.denoise(canvas, cache, temperature=1 - cooling * step, self_conditioning=conditioning)
                assert result.argmax.tolist() == canvas.tolist()
                conditioning = result.self_conditioning
                yield step
        finally:
            if threading.current_thread().name == "engine":
                self.closed.append(token)

    def submit(self, token: int, client: str = "a", *, seconds: float | None = None, **options: Any) -> tuple[Job, Inbox]:
        inbox = Inbox()
        return self.engine.submit(lambda: self.steps(token, **options), inbox, client=client, seconds=seconds), inbox


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    """A maker of benches; their engines are stopped in the end."""
    made = []

    def make(**options: Any) -> Bench:
        made.append(Bench(**options))
        return made[-1]

    yield make
    for each in made:
        each.engine.stop(0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The engine's clock, which stands still but for ``clock.now``."""
    made = SimpleNamespace(now=100.0)
    monkeypatch.setattr(engine_module, "time", SimpleNamespace(monotonic=lambda: made.now))
    return made

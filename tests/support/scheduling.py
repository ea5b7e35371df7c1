"""Helpers for the engine's tests: jobs that take steps on a fake backend, and inboxes that receive their events."""

import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlx_diffgemma import DiffusionGemma
from mlx_diffgemma.backends import Piece, Row
from mlx_diffgemma.scheduler import engine as engine_module
from mlx_diffgemma.scheduler import jobs as jobs_module
from mlx_diffgemma.scheduler.engine import Engine
from mlx_diffgemma.scheduler.jobs import Finished, Job
from mlx_diffgemma.scheduler.limits import Limits
from support.fake import Answer, Asked, FakeBackend, FakeCache, full

WIDTH, SECONDS = 4, 20.0  # tokens of a canvas; longest wait for an event


@dataclass
class Inbox:
    """Collects the events that the engine delivers."""

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
    """An engine on a backend that returns each canvas unchanged, and jobs that take steps on it.

    Attributes:
        during: called within each call of the backend, with the call's number, counted from 1.
        closed: the requests whose `finally` ran in the engine's thread.
        caches: the caches of all jobs, in the order in which they were made.
        idled: the requests whose idle work was completed.
    """

    def __init__(self, *, exact_rows: bool = True, **options: Any) -> None:
        self.during: Callable[[int], object] = lambda call: None
        self.backend = FakeBackend(
            self._answer, exact_rows=exact_rows, during=lambda method, parts: self.during(len(self.backend.calls))
        )
        model = DiffusionGemma(None, self.backend)  # type: ignore[arg-type]
        model.tokenizer = None  # type: ignore[assignment]
        self.engine = Engine(model, Limits(**options))
        self.closed: list[int] = []
        self.caches: list[weakref.ref[FakeCache]] = []
        self.idled: queue.Queue[int] = queue.Queue()

    def _answer(self, asked: Asked) -> Answer:
        assert asked.cached[0] == asked.canvas[0], "a canvas over another text's cache"
        assert asked.row.self_conditioning == (None if asked.step == 1 else (0, asked.step - 1)), "of another row"
        return full(asked.canvas, width=len(asked.canvas))

    @property
    def calls(self) -> list[tuple[str, list[int]]]:
        """The backend's calls: the method, and the first token of each part, which identifies the request."""
        return [(method, [tokens[0] for tokens in parts]) for method, parts in self.backend.calls]

    @property
    def passes(self) -> list[list[int]]:
        """The requests in each denoising pass."""
        return [tokens for method, tokens in self.calls if method == "denoise"]

    def steps(self, token: int, count: int = 4, length: int = 3, width: int = WIDTH, cooling: float = 0.0) -> Iterator[int]:
        """Encode ``length`` tokens once, then take ``count`` steps. ``token`` identifies the request."""
        backend = self.engine.model.backend
        cache, canvas = backend.new_cache(), np.full(width, token, np.int32)
        assert isinstance(cache, FakeCache)
        self.caches.append(weakref.ref(cache))
        conditioning = None
        try:
            backend.encode([Piece(np.full(length, token, np.int32), cache)])
            for step in range(count):
                [result] = backend.denoise([Row(canvas, cache, 1 - cooling * step, self_conditioning=conditioning)])
                assert result.argmax.tolist() == canvas.tolist()
                conditioning = result.self_conditioning
                yield step
        finally:
            if threading.current_thread().name == "engine":
                self.closed.append(token)

    def submit(self, token: int, client: str = "a", *, seconds: float | None = None, **options: Any) -> tuple[Job, Inbox]:
        inbox = Inbox()
        return self.engine.submit(lambda: self.steps(token, **options), inbox, client=client, seconds=seconds), inbox

    def idle(self, token: int, **options: Any) -> Callable[[], object]:
        """The same steps, as idle work."""

        def work() -> None:
            for _ in self.steps(token, **options):
                pass
            self.idled.put(token)

        return work


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    """A factory of benches. Their engines are stopped after the test."""
    made = []

    def make(**options: Any) -> Bench:
        made.append(Bench(**options))
        return made[-1]

    yield make
    for each in made:
        each.engine.stop(0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The engine's clock. It stands still and changes only with ``clock.now``."""
    made = SimpleNamespace(now=100.0)
    for module in (engine_module, jobs_module):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: made.now))
    return made

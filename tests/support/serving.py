"""A server to ask: the real one, in threads, with a real model or one that writes what it is told."""

import asyncio
import contextlib
import re
import selectors
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import uvicorn

from mlx_diffgemma import DiffusionGemma
from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.scheduler.engine import Engine
from mlx_diffgemma.scheduler.limits import Limits
from mlx_diffgemma.server.app import create_app
from mlx_diffgemma.server.settings import Settings
from support.fake import Asked, FakeBackend, writes

#: To wait for what must come.
SECONDS = 20.0
#: How much faster the clock of a hurried server runs.
HURRY = 500


class HurriedLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock runs :data:`HURRY` times as fast: half a minute in it is over in 60 ms."""

    def __init__(self) -> None:
        class Selector(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
            def select(self, timeout: float | None = None) -> Any:
                return super().select(None if timeout is None else timeout / HURRY)

        super().__init__(Selector())

    def time(self) -> float:
        return HURRY * super().time()


@dataclass
class Served:
    engine: Engine
    url: str
    api_key: str | None

    @property
    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.api_key or "none", max_retries=0, timeout=SECONDS)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/{path}", json=body, timeout=SECONDS, **options)

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics", headers={"Authorization": f"Bearer {self.api_key}"}).text
        return sum(float(value) for value in re.findall(rf"^mlx_diffgemma_{name}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE))


@contextlib.contextmanager
def serving(
    model: DiffusionGemma, *, parallel: int = 4, queue: int = 8, hurried: bool = False, **options: Any
) -> Iterator[Served]:
    """A server that answers with a model; where it is ``hurried``, it waits a :data:`HURRY`-th of its times for clients."""
    engine = Engine(model, Limits(parallel, queue))
    app = create_app(engine, Settings("tiny", **options))
    stop_seconds = 5 * HURRY if hurried else 5
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_config=None, timeout_graceful_shutdown=stop_seconds))

    def run() -> None:
        with asyncio.Runner(loop_factory=HurriedLoop if hurried else None) as runner:
            runner.run(server.serve())

    thread = threading.Thread(target=run, daemon=True)
    engine.start()
    thread.start()
    until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Served(engine, f"http://127.0.0.1:{port}", options.get("api_key"))
    finally:
        engine.stop(0)
        server.should_exit = True
        thread.join(SECONDS)
        assert not thread.is_alive()


def until(condition: Callable[[], Any]) -> None:
    """Wait for what another thread does and tells nobody."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


class Writer:
    """A model on a backend that writes ``texts[tool answers in the prompt]``.

    Attributes:
        gate: while it is cleared, each denoising step is held up.
        seconds: that a step takes.
    """

    def __init__(self, folder: Path, texts: Sequence[str]) -> None:
        checkpoint = Checkpoint.open(folder)
        self.backend = FakeBackend(writes(self._part), checkpoint.config, during=self._hold)
        self.model = DiffusionGemma(checkpoint, self.backend)  # type: ignore[arg-type]
        self.texts, self.gate, self.seconds = texts, threading.Event(), 0.0
        self.gate.set()

    @property
    def steps(self) -> int:
        """Denoising steps that have begun."""
        return len(self.backend.tokens_of("denoise"))

    def _part(self, asked: Asked) -> list[int]:
        """The part of the text that falls into a canvas."""
        tokenizer, width = self.model.tokenizer, len(asked.canvas)
        answers = asked.cached.count(tokenizer.token_id("<tool_response|>"))
        return tokenizer.encode(self.texts[answers], markup=True)[asked.block * width :][:width]

    def _hold(self, method: str, parts: Sequence[Any]) -> None:
        if method == "denoise":
            assert self.gate.wait(SECONDS)
            time.sleep(self.seconds)

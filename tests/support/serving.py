"""A server for tests: the real one, in threads, with a real model or with one that writes scripted texts."""

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
from mlx_diffgemma.server.protocol import server_config
from mlx_diffgemma.server.settings import ConnectionLimits, Settings
from support.fake import Asked, FakeBackend, writes

#: Longest wait for an event, in seconds.
SECONDS = 20.0
#: How many times faster the clock of a hurried server runs.
HURRY = 500


class HurriedLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock runs :data:`HURRY` times as fast: 30 s in it take 60 ms."""

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
    """Run a server with a model. A ``hurried`` server divides its timeouts for clients by :data:`HURRY`.

    ``options`` are settings, and ``downloads`` and ``api_key``.
    """
    engine = Engine(model, Limits(parallel, queue))
    api_key = options.pop("api_key", None)
    if api_key is not None:
        options["api_keys"] = {"default": api_key}
    if hurried:  # a client of the real clock needs real time to send its request
        options.setdefault("connections", ConnectionLimits(head_seconds=SECONDS * HURRY))
    downloads = options.pop("downloads", None)
    app = create_app(engine, Settings("tiny", **options), downloads)
    server = uvicorn.Server(server_config(app, port=0, timeout_graceful_shutdown=5 * HURRY if hurried else 5))

    def run() -> None:
        with asyncio.Runner(loop_factory=HurriedLoop if hurried else None) as runner:
            runner.run(server.serve())

    thread = threading.Thread(target=run, daemon=True)
    engine.start()
    thread.start()
    until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Served(engine, f"http://127.0.0.1:{port}", api_key)
    finally:
        engine.stop(0)
        server.should_exit = True
        thread.join(SECONDS)
        assert not thread.is_alive()


def until(condition: Callable[[], Any]) -> None:
    """Poll until ``condition`` holds, for work in another thread that sends no event."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


class Writer:
    """A model on a fake backend that writes ``texts[n]``, where n is the number of tool answers in the prompt.

    Attributes:
        gate: while this is cleared, every denoising step waits.
        seconds: duration of a step.
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
        """The part of the text that belongs to a canvas."""
        tokenizer, width = self.model.tokenizer, len(asked.canvas)
        [marker] = tokenizer.encode("<tool_response|>", markup=True)
        answers = asked.cached.count(marker)
        return tokenizer.encode(self.texts[answers], markup=True)[asked.block * width :][:width]

    def _hold(self, method: str, parts: Sequence[Any]) -> None:
        if method == "denoise":
            assert self.gate.wait(SECONDS)
            time.sleep(self.seconds)

"""A server to ask: the real one, in threads, with a real model or one that writes what it is told."""

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import openai
import uvicorn

from mlx_diffgemma import DiffusionGemma
from mlx_diffgemma.backends import Denoised
from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.scheduler.engine import Engine
from mlx_diffgemma.server.app import create_app
from mlx_diffgemma.server.settings import Settings
from support.fake import FakeCache

#: To wait for what must come.
SECONDS = 20.0


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
def serving(model: DiffusionGemma, *, parallel: int = 4, queue: int = 8, **options: Any) -> Iterator[Served]:
    engine = Engine(model, parallel=parallel, queue=queue)
    app = create_app(engine, Settings("tiny", **options))
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_config=None, timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, daemon=True)
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


@dataclass
class Scripted:
    """A backend that writes ``texts[tool answers in the prompt]``, and is held up in each step while the gate is shut."""

    checkpoint: Checkpoint
    texts: Sequence[str]
    gate: threading.Event = field(default_factory=threading.Event)
    steps: int = 0
    seconds: float = 0.0  # that a step takes
    name, device, dtype, exact_rows = "scripted", "none", "float32", True

    def __post_init__(self) -> None:
        self.config = self.checkpoint.config
        self.model = DiffusionGemma(self.checkpoint, self)  # type: ignore[arg-type] (what is left out is not called)
        self.new_cache, self.logits, self.peak_memory = lambda batch_size=1: FakeCache(), None, None
        self.gate.set()

    def encode(self, tokens: Any, cache: FakeCache, *, logits: bool = False) -> None:
        cache.extend(tokens[0].tolist())

    def denoise(self, canvas: Any, cache: FakeCache, **given: Any) -> Denoised:
        self.steps += 1
        assert self.gate.wait(SECONDS)
        time.sleep(self.seconds)
        tokenizer = self.model.tokenizer
        answered, begin = tokenizer.token_id("<tool_response|>"), tokenizer.token_id("<|turn>")
        turn = max(place for place, token in enumerate(cache) if token in (answered, begin))
        prompt = turn + 1 + (0 if cache[turn] == answered else len(tokenizer.encode("model\n")))
        ids = tokenizer.encode(self.texts[cache.count(answered)])[len(cache) - prompt :][: canvas.shape[1]]
        row = np.array([ids + [0] * (canvas.shape[1] - len(ids))], np.int32)
        return Denoised(row, row, np.zeros(row.shape, np.float32), None)

"""The routes that use the model: each reads a request, runs it on the engine, and sends the response."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from mlx_diffgemma.chat.reply import Reply, ReplyEvent
from mlx_diffgemma.editing.infilling import Infill, PreparedInfill
from mlx_diffgemma.pipeline import DiffusionGemma
from mlx_diffgemma.prefix_cache import PrefixCache
from mlx_diffgemma.sampler import Draft
from mlx_diffgemma.scheduler.engine import Engine
from mlx_diffgemma.server import requests
from mlx_diffgemma.server.answers import Answer, ChatAnswer, CompletionAnswer, encoded, infill_answer
from mlx_diffgemma.server.downloads import Downloads
from mlx_diffgemma.server.metrics import Metrics
from mlx_diffgemma.server.middleware import LEFT, read_body
from mlx_diffgemma.server.preparing import Question, Sender, chat_question, completion_question, infill_question
from mlx_diffgemma.server.requests import Options
from mlx_diffgemma.server.settings import Settings
from mlx_diffgemma.server.streaming import EventStream, Left, Running, while_connected
from mlx_diffgemma.steps import Steps
from mlx_diffgemma.writing import Content, Reasoning, ToolCall

A = TypeVar("A", requests.ChatRequest, requests.CompletionRequest, requests.InfillRequest)
P = TypeVar("P")
T = TypeVar("T")

#: Larger bodies are parsed one at a time. To parse 32 MiB takes 0.1 s, in which the server does nothing else.
LARGE = 1 << 20
#: Events that become text or tool calls in a response.
_PARTS = (Reasoning, Content, ToolCall)


class ModelRoutes:
    """The routes of one engine. They share a prefix cache, which keeps keys and values from request to request."""

    def __init__(self, engine: Engine, settings: Settings, metrics: Metrics, downloads: Downloads) -> None:
        self.engine, self.settings, self.metrics, self.downloads = engine, settings, metrics, downloads
        self.kept = PrefixCache(settings.cache_memory)
        metrics.watch(self.kept)
        tokenizer = engine.model.tokenizer
        self._large = asyncio.Lock()  # other tasks have their turn between two large bodies
        self.cell = lru_cache(1 << 16)(lambda token: tokenizer.decode([token]))

    async def chat(self, request: Request) -> Response:
        return await self._answered(request, requests.chat_request, chat_question, ChatAnswer)

    async def completions(self, request: Request) -> Response:
        return await self._answered(request, requests.completion_request, completion_question, CompletionAnswer)

    async def infill(self, request: Request) -> Response:
        model, batch = self.engine.model, self.engine.limits.batch

        def work(prepared: PreparedInfill) -> Iterator[Infill]:
            yield prepared.fill(model, batch)

        try:
            asked = await self._read(request, requests.infill_request)
            options, between = asked.options, asked.between
            prepare = infill_question(model, asked, self.settings, request.state.held)
            del asked  # its images may be large, and only the preparation needs them
            async with self._running(request, prepare, work) as running:
                prepared = await running.prepared()
                [filled] = [event async for event in running if event is not None]
        except Left:
            return self._left()
        tokens = len(prepared.before) + prepared.known_tokens
        return _json(infill_answer(options, self.settings.name, filled, prompt_tokens=tokens, between=between))

    async def _read(self, request: Request, parse: Callable[[dict[str, Any]], A]) -> A:
        """Read a request, and fetch its images that are at URLs. Raises ApiError, Left."""
        limits, reads_images = self.settings, self.engine.model.config.vision is not None
        with_images = reads_images and parse is not requests.completion_request
        hint = "" if reads_images else "; this model reads text only, and no images"
        body = await read_body(request, limits.max_body + (limits.max_image_bytes if with_images else 0), hint)
        async with self._large if len(body) > LARGE else nullcontext():
            await asyncio.sleep(0)
            asked = parse(requests.read_json(body, limits.max_body))
        limits.check_model(asked.options.model)
        requests.check_media(asked, body, limits, reads_images=reads_images)
        urls = requests.web_urls(asked)
        if not urls:
            return asked
        del body
        started = time.perf_counter()
        work = self.downloads.fetch(urls, request.state.client, request.state.held)
        fetched = await while_connected(request.receive, work)
        request.state.fetch_seconds = time.perf_counter() - started
        return asked.with_sources(lambda source: fetched.get(source, source))

    def _running(self, request: Request, prepare: Steps[P], work: Callable[[P], Iterator[T]]) -> Running[P, T]:
        seconds = self.settings.timeout
        if seconds is not None:
            seconds = max(0.0, seconds - getattr(request.state, "fetch_seconds", 0.0))
        return Running(self.engine, prepare, work, request.receive, client=request.state.client, seconds=seconds)

    async def _answered(
        self,
        request: Request,
        parse: Callable[[dict[str, Any]], A],
        prepare: Callable[[DiffusionGemma, A, Settings, Sender], Steps[Question]],
        kind: type[Answer],
    ) -> Response:
        try:
            asked = await self._read(request, parse)
        except Left:
            return self._left()
        options: Options = asked.options
        wanted = (*(_PARTS if options.stream else ()), *((Draft,) if options.drafts else ()), Reply)

        def work(question: Question) -> Iterator[tuple[int, ReplyEvent]]:
            return question.answered(self.engine, self.kept, wanted)

        def begin(question: Question) -> Answer:
            return kind(options, self.settings.name, self.cell, len(question.seeds), options.n)

        # Neither cached_tokens nor the time of a response tells what was asked under another key, or with another salt.
        salt = f"{getattr(request.state, 'key_name', None) or ''}\0{options.cache_salt or ''}"
        steps = prepare(self.engine.model, asked, self.settings, Sender(salt, request.state.held))
        del asked  # its images may be large, and only the preparation needs them
        running = self._running(request, steps, work)
        heard = self._listener(request)
        if options.stream:
            return EventStream(running, begin, heard, self._left)
        try:
            async with running:
                answer = begin(await running.prepared())
                async for item in running:
                    if item is not None:
                        heard(item[1])
                        answer.chunks(*item)
        except Left:
            return self._left()
        return _json(answer.whole())

    def _listener(self, request: Request) -> Callable[[ReplyEvent], None]:
        """Returns the function that counts a request's events."""
        started, route, state = request.state.started, request.url.path, request.state
        silent = True

        def heard(event: ReplyEvent) -> None:
            nonlocal silent
            if silent and isinstance(event, (*_PARTS, Reply)):
                silent = False
                self.metrics.first_text.labels(route).observe(time.perf_counter() - started)
            if isinstance(event, Reply):
                self.metrics.count(event)
                before, new = getattr(state, "tokens", (0, 0))
                state.tokens = (before + event.statistics.prompt_tokens, new + event.statistics.new_tokens)

        return heard

    def _left(self) -> Response:
        self.metrics.cancellations.inc()
        return Response(status_code=LEFT)


def _json(content: dict[str, Any]) -> Response:
    return Response(encoded(content), media_type="application/json")

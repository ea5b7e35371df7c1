"""The routes that use the model: each reads a request, runs it on the engine, and sends the response."""

import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from mlx_diffgemma.chat.reply import Reply, ReplyEvent
from mlx_diffgemma.editing.infilling import Infill, PreparedInfill
from mlx_diffgemma.prefix_cache import PrefixCache
from mlx_diffgemma.sampler import Draft
from mlx_diffgemma.scheduler.engine import Engine
from mlx_diffgemma.server import requests
from mlx_diffgemma.server.answers import Answer, ChatAnswer, CompletionAnswer, encoded, infill_answer
from mlx_diffgemma.server.metrics import Metrics
from mlx_diffgemma.server.middleware import LEFT, read_body
from mlx_diffgemma.server.preparing import Question, chat_question, completion_question, infill_question
from mlx_diffgemma.server.settings import Settings
from mlx_diffgemma.server.streaming import EventStream, Left, Running
from mlx_diffgemma.steps import Steps
from mlx_diffgemma.writing import Content, Reasoning, ToolCall

P = TypeVar("P")
T = TypeVar("T")

#: Events that become text or tool calls in a response.
_PARTS = (Reasoning, Content, ToolCall)


class ModelRoutes:
    """The routes of one engine. They share a prefix cache, which keeps keys and values from request to request."""

    def __init__(self, engine: Engine, settings: Settings, metrics: Metrics) -> None:
        self.engine, self.settings, self.metrics = engine, settings, metrics
        self.kept = PrefixCache(settings.cache_memory)
        metrics.watch(self.kept)
        tokenizer = engine.model.tokenizer
        self.cell = lru_cache(1 << 16)(lambda token: tokenizer.decode([token]))

    async def chat(self, request: Request) -> Response:
        chat = requests.chat_request(await self._body(request))
        return await self._answered(request, chat_question, chat, ChatAnswer)

    async def completions(self, request: Request) -> Response:
        completion = requests.completion_request(await self._body(request))
        return await self._answered(request, completion_question, completion, CompletionAnswer)

    async def infill(self, request: Request) -> Response:
        asked = requests.infill_request(await self._body(request))
        self.settings.check_model(asked.options.model)
        model, batch = self.engine.model, self.engine.limits.batch

        def work(prepared: PreparedInfill) -> Iterator[Infill]:
            yield prepared.fill(model, batch)

        try:
            async with self._running(request, infill_question(model, asked, self.settings), work) as running:
                prepared = await running.prepared()
                [filled] = [event async for event in running if event is not None]
        except Left:
            return self._left()
        tokens = prepared.known_tokens
        return _json(infill_answer(asked.options, self.settings.name, filled, prompt_tokens=tokens, between=asked.between))

    async def _body(self, request: Request) -> dict[str, Any]:
        return requests.read_json(await read_body(request, self.settings.max_body))

    def _running(self, request: Request, prepare: Steps[P], work: Callable[[P], Iterator[T]]) -> Running[P, T]:
        return Running(self.engine, prepare, work, request.receive, client=request.state.client, seconds=self.settings.timeout)

    async def _answered(
        self,
        request: Request,
        prepare: Callable[..., Steps[Question]],
        asked: requests.ChatRequest | requests.CompletionRequest,
        kind: type[Answer],
    ) -> Response:
        options = asked.options
        self.settings.check_model(options.model)
        wanted = (*(_PARTS if options.stream else ()), *((Draft,) if options.drafts else ()), Reply)

        def work(question: Question) -> Iterator[tuple[int, ReplyEvent]]:
            return question.answered(self.engine, self.kept, wanted)

        def begin(question: Question) -> Answer:
            return kind(options, self.settings.name, self.cell, len(question.seeds), options.n)

        # Neither cached_tokens nor the time of a response tells what was asked under another key, or with another salt.
        salt = f"{getattr(request.state, 'key_name', None) or ''}\0{options.cache_salt or ''}"
        running = self._running(request, prepare(self.engine.model, asked, self.settings, salt), work)
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

"""Turns a checked request into work for the engine: prompts as token ids, lengths that fit, seeds."""

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mlx_diffgemma.chat.reply import Reply, ReplyEvent, reply
from mlx_diffgemma.editing.infilling import Infill, infill, parse_template
from mlx_diffgemma.pipeline import DiffusionGemma
from mlx_diffgemma.prefix_cache import Context, PrefixCache, read, settle
from mlx_diffgemma.scheduler.engine import Engine
from mlx_diffgemma.server.errors import ApiError
from mlx_diffgemma.server.requests import ChatRequest, CompletionRequest, InfillRequest, Options
from mlx_diffgemma.server.settings import Settings
from mlx_diffgemma.settling import Settled
from mlx_diffgemma.writing import Generation, Writing, sampling_config, write


@dataclass(frozen=True)
class Question:
    """Prompts that are ready to be encoded, and how to answer them. Of n choices each, choice i of prompt p has number p * n + i.

    Attributes:
        prompts: token ids, each int32 [N].
        seeds: one per choice.
        writing: how to write each choice, except for its seed.
        markup: whether thoughts and tool calls are separated from the content.
    """

    prompts: tuple[NDArray[np.int32], ...]
    seeds: tuple[int, ...]
    writing: Writing
    markup: bool

    def answered(self, engine: Engine, kept: PrefixCache, wanted: tuple[type, ...]) -> Iterator[tuple[int, ReplyEvent]]:
        """Work for the engine: yields the ``wanted`` events of all choices, each with the number of its choice."""
        model, per_prompt = engine.model, len(self.seeds) // len(self.prompts)
        contexts: list[Context] = []
        for prompt in self.prompts:
            context = read(model.backend, prompt, model.piece_rule, kept)
            contexts += [context.fork() for _ in range(per_prompt)]
        replies = [self._reply(engine, *each) for each in zip(contexts, self.seeds, strict=True)]
        try:
            for index, event in engine.gather(replies):
                if isinstance(event, Reply):
                    # The part of the reply that is not encoded yet is encoded for the next turn, when no request needs the model.
                    engine.later(self._settling(model, contexts[index], event.tokens, kept))
                if isinstance(event, wanted):
                    yield index, event
        finally:
            for context in contexts:
                kept.recount(context.cache)

    def _reply(self, engine: Engine, context: Context, seed: int) -> Iterator[ReplyEvent]:
        model, writing = engine.model, replace(self.writing, seed=seed)
        if self.markup:
            return reply(model, context, writing, stopping=lambda: engine.stopping)
        events = write(model.backend, model.tokenizer, context, writing, stopping=lambda: engine.stopping)
        return (Reply.of(event) if isinstance(event, Generation) else event for event in events)

    def _settling(self, model: DiffusionGemma, context: Context, tokens: list[int], kept: PrefixCache) -> Callable[[], None]:
        step = self.writing.step(model.backend.config)
        return lambda: settle(model.backend, context, tokens, model.piece_rule, kept, step=step)


def chat_question(model: DiffusionGemma, chat: ChatRequest, settings: Settings) -> Question:
    """Render and tokenize a conversation. Raises InputError or ApiError."""
    ids = model.tokenizer.chat(chat.messages, tools=list(chat.tools) or None, enable_thinking=chat.thinking)
    return _question(model, [model.prompt_ids(ids)], chat.options, settings, markup=True)


def completion_question(model: DiffusionGemma, completion: CompletionRequest, settings: Settings) -> Question:
    """Tokenize raw texts, each behind the beginning-of-sequence token. Raises InputError or ApiError."""
    begin = model.tokenizer.bos_token_id
    prompts = []
    for prompt in completion.prompts:
        ids = model.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        prompts.append(model.prompt_ids(ids if ids[:1] == [begin] else [begin, *ids]))
    return _question(model, prompts, completion.options, settings, markup=False)


def infill_work(model: DiffusionGemma, request: InfillRequest, batch: str) -> Callable[[], Iterator[Infill]]:
    """Work for the engine: yields one :class:`~mlx_diffgemma.editing.infilling.Infill`. Its errors come when the work runs."""
    options = request.options
    seed = _fresh_seed() if options.seed is None else options.seed

    def work() -> Iterator[Infill]:
        yield infill(
            model,
            request.template,
            marker=request.marker,
            prompt=request.prompt,
            raw=request.raw,
            system=request.system,
            seed=seed,
            batch=batch,
            canvas_length=request.canvas_length,
            **options.sampling(model.checkpoint.generation),
        )

    return work


def known_tokens(model: DiffusionGemma, request: InfillRequest) -> int:
    """Count the tokens of the text around the holes."""
    template = request.template
    parts = parse_template(template, request.marker) if isinstance(template, str) else template
    return sum(len(model.tokenizer.encode(part)) for part in parts if isinstance(part, str))


def _question(
    model: DiffusionGemma, prompts: list[NDArray[np.int32]], options: Options, settings: Settings, *, markup: bool
) -> Question:
    generation = model.checkpoint.generation
    canvas = 1 if options.mode == "causal" else generation.canvas_length or model.backend.config.canvas_length
    room = _max_new_tokens(max(map(len, prompts)), canvas, model.backend.config.max_position_embeddings, options, settings)
    first = _fresh_seed() if options.seed is None else options.seed
    writing = Writing(
        config=sampling_config(generation, options.mode, {**options.sampling(generation), "max_new_tokens": room}),
        seed=first,
        stop=options.stop,
        settled=Settled() if options.stream and options.settled else None,
        logprobs=options.logprobs,
    )
    seeds = tuple((first + choice) % 2**64 for choice in range(options.n * len(prompts)))
    return Question(tuple(prompts), seeds, writing, markup)


def _max_new_tokens(prompt: int, canvas: int, context: int, options: Options, settings: Settings) -> int:
    """How many tokens may be written after ``prompt`` tokens. Raises ApiError if they do not fit in whole canvases."""
    most = settings.max_prompt_tokens
    if most is not None and prompt > most:
        raise _too_long(f"the prompt has {prompt} tokens; this server accepts at most {most}")
    room = (context - prompt) // canvas * canvas
    if room < 1:
        raise _too_long(f"the prompt has {prompt} tokens and leaves no room for a reply in the model's context of {context}")
    if options.max_tokens is None:
        return min(settings.max_tokens, room)
    if options.max_tokens > room:
        raise _too_long(
            f"{options.max_tokens} tokens do not fit: after the prompt of {prompt} tokens, the model's context of {context} has "
            f"room for {room}",
            param="max_tokens",
        )
    return options.max_tokens


def _too_long(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code="context_length_exceeded")


def _fresh_seed() -> int:
    """A random seed of 53 bits, which is still exact where a client reads JSON numbers as doubles."""
    return secrets.randbits(53)

"""Turns a checked request into work for the engine: prompts as token ids, lengths that fit, seeds."""

import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from mlx_diffgemma.chat.reply import Reply, ReplyEvent, reply
from mlx_diffgemma.editing.infilling import PreparedInfill, parse_template, prepare_infill
from mlx_diffgemma.errors import ComputationError
from mlx_diffgemma.pipeline import DiffusionGemma
from mlx_diffgemma.prefix_cache import Context, PrefixCache, read, settle
from mlx_diffgemma.prompts import PromptTokens
from mlx_diffgemma.scheduler.engine import Engine
from mlx_diffgemma.server import parts
from mlx_diffgemma.server.errors import ApiError
from mlx_diffgemma.server.memory import Held
from mlx_diffgemma.server.requests import ChatRequest, CompletionRequest, InfillRequest, Options
from mlx_diffgemma.server.settings import Settings
from mlx_diffgemma.settling import Settled
from mlx_diffgemma.steps import Steps
from mlx_diffgemma.vision.media import split_media_steps
from mlx_diffgemma.vision.sources import TooManyTokens
from mlx_diffgemma.writing import Generation, Writing, sampling_config, write


@dataclass(frozen=True)
class Question:
    """Prompts that are ready to be encoded, and how to answer them. Of n choices each, choice i of prompt p has number p * n + i.

    Attributes:
        prompts: their tokens and images.
        seeds: one per choice.
        writing: how to write each choice, except for its seed.
        salt: see :func:`~mlx_diffgemma.prefix_cache.read`.
        markup: whether thoughts and tool calls are separated from the content.
    """

    prompts: tuple[PromptTokens, ...]
    seeds: tuple[int, ...]
    writing: Writing
    salt: str
    markup: bool

    def answered(self, engine: Engine, kept: PrefixCache, wanted: tuple[type, ...]) -> Iterator[tuple[int, ReplyEvent]]:
        """Work for the engine: yields the ``wanted`` events of all choices, each with the number of its choice."""
        model, per_prompt = engine.model, len(self.seeds) // len(self.prompts)
        contexts: list[Context] = []
        for prompt in self.prompts:
            context = read(model.backend, prompt, model.piece_rule, kept, salt=self.salt)
            contexts += [context.fork() for _ in range(per_prompt)]
        replies = [self._reply(engine, *each) for each in zip(contexts, self.seeds, strict=True)]
        try:
            for index, event in engine.gather(replies):
                if isinstance(event, Reply):
                    # The part of the reply that is not encoded yet is encoded for the next turn, when no request needs the model.
                    engine.later(self._settling(model, contexts[index], event.tokens, kept))
                if isinstance(event, wanted):
                    yield index, event
        except ComputationError:
            for context in contexts:
                kept.forget(context)
            raise
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


@dataclass(frozen=True)
class Sender:
    """Who sent a request: the salt of what it shares (see :func:`~mlx_diffgemma.prefix_cache.read`), and the memory it holds."""

    salt: str
    held: Held


def chat_question(model: DiffusionGemma, chat: ChatRequest, settings: Settings, sender: Sender) -> Steps[Question]:
    """Read the images of a conversation, render it and tokenize it, in steps. Raises InputError or ApiError."""
    _check_size(model, parts.texts(chat.messages), settings)
    messages = yield from _with_media_read(model, chat.messages, settings, sender.held)
    prompt = yield from model.prompt_steps(messages, tools=list(chat.tools) or None, enable_thinking=chat.thinking)
    return _question(model, [prompt], chat.options, settings, sender.salt, markup=True)


def completion_question(
    model: DiffusionGemma, completion: CompletionRequest, settings: Settings, sender: Sender
) -> Steps[Question]:
    """Tokenize raw texts in steps, each behind the beginning-of-sequence token. Raises InputError or ApiError."""
    begin = model.tokenizer.bos_token_id
    prompts = []
    for prompt in completion.prompts:
        if isinstance(prompt, str):
            _check_size(model, [prompt], settings)
            ids = yield from model.tokenizer.encode_steps(prompt)
        else:
            ids = list(prompt)
        prompts.append((yield from model.prompt_steps(ids if ids[:1] == [begin] else [begin, *ids])))
    return _question(model, prompts, completion.options, settings, sender.salt, markup=False)


def infill_question(model: DiffusionGemma, request: InfillRequest, settings: Settings, held: Held) -> Steps[PreparedInfill]:
    """Read the images of a prompt, and tokenize it and its template, in steps. Raises InputError or ApiError."""
    options, template = request.options, request.template
    pieces = parse_template(template, request.marker) if isinstance(template, str) else template
    _check_size(model, (piece for piece in pieces if isinstance(piece, str)), settings)
    messages = yield from _with_media_read(model, request.messages, settings, held)
    return (
        yield from prepare_infill(
            model,
            pieces,
            prompt=messages or request.prompt,
            raw=request.raw,
            system=request.system,
            seed=_fresh_seed() if options.seed is None else options.seed,
            canvas_length=request.canvas_length,
            **options.sampling(model.checkpoint.generation, settings.preset),
        )
    )


def _with_media_read(model: DiffusionGemma, messages: parts.Messages, settings: Settings, held: Held) -> Steps[parts.Messages]:
    """Messages whose images and videos are decoded and cut into patches, one image a step. Paths and URLs are refused.

    The bytes of all patches are counted before the first image is decoded, and no more soft tokens are read than the context has
    room for.
    """
    vision, media = model.config.vision, list(parts.media(messages))
    if vision is None or not media:
        return messages
    room, each = _most_tokens(model, settings), 3 * vision.side**2
    held.take(each * min(room, sum(parts.most_soft_tokens(one, vision) for one in media)))
    try:
        split, read = yield from split_media_steps(messages, vision, allow_paths=False, max_soft_tokens=room)
    except TooManyTokens as wrong:
        raise _too_long(str(wrong)) from None
    held.set(sum(image.nbytes for one in read for image in one.images))
    return parts.with_media(split, read)


def _check_size(model: DiffusionGemma, texts: Iterable[str], settings: Settings) -> None:
    """Refuse texts with more bytes than the allowed tokens can hold, before anything is done with them."""
    most, longest = _most_tokens(model, settings), model.tokenizer.longest_token
    size = sum(len(text.encode(errors="surrogatepass")) for text in texts)
    if longest is not None and size > most * longest:
        raise _too_long(f"the prompt has {size} bytes, more than {most} tokens can hold")


def _most_tokens(model: DiffusionGemma, settings: Settings) -> int:
    """Tokens of a prompt at most."""
    context = model.backend.config.max_position_embeddings
    return min(context, settings.max_prompt_tokens or context)


def _question(
    model: DiffusionGemma, prompts: list[PromptTokens], options: Options, settings: Settings, salt: str, *, markup: bool
) -> Question:
    generation = model.checkpoint.generation
    canvas = 1 if options.mode == "causal" else generation.canvas_length or model.backend.config.canvas_length
    room = _max_new_tokens(max(map(len, prompts)), canvas, model.backend.config.max_position_embeddings, options, settings)
    first = _fresh_seed() if options.seed is None else options.seed
    writing = Writing(
        config=sampling_config(
            generation, options.mode, {**options.sampling(generation, settings.preset), "max_new_tokens": room}
        ),
        seed=first,
        stop=options.stop,
        settled=Settled() if options.stream and options.settled else None,
        logprobs=options.logprobs,
    )
    seeds = tuple((first + choice) % 2**64 for choice in range(options.n * len(prompts)))
    return Question(tuple(prompts), seeds, writing, salt, markup)


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

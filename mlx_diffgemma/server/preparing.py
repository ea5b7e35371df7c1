"""From a checked request to work for the engine: prompts of token ids, lengths that fit, seeds."""

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_diffgemma.chat.reply import Event, reply
from mlx_diffgemma.editing.infilling import Infill, parse_template
from mlx_diffgemma.pipeline import DiffusionGemma, sampling_options
from mlx_diffgemma.prefix_cache import Context, PrefixCache, read
from mlx_diffgemma.scheduler.engine import Engine
from mlx_diffgemma.server.errors import ApiError
from mlx_diffgemma.server.requests import Chat, Completion, Infilling, Options
from mlx_diffgemma.server.settings import Settings
from mlx_diffgemma.settling import Settled


@dataclass(frozen=True)
class Question:
    """Prompts that are ready to be read, and how to answer them; choice i of n of prompt p is number p * n + i.

    Attributes:
        prompts: token ids, each int32 [1, N].
        prompt_text: as the chat template wrote it.
        seeds: one a choice.
        arguments: of :func:`~mlx_diffgemma.chat.reply.reply`, which all choices share.
    """

    prompts: tuple[NDArray[np.int32], ...]
    prompt_text: str
    seeds: tuple[int, ...]
    arguments: dict[str, Any]

    def answered(self, engine: Engine, kept: PrefixCache, wanted: tuple[type, ...]) -> Iterator[tuple[int, Event]]:
        """Work for the engine: the ``wanted`` events of all choices, with their numbers."""
        per_prompt = len(self.seeds) // len(self.prompts)
        replies = []
        for number, prompt in enumerate(self.prompts):
            tokenizer = engine.model.tokenizer
            context = read(engine.model.backend, prompt, kept, end_of_turn_id=tokenizer.end_of_turn_id)
            seeds = self.seeds[number * per_prompt : (number + 1) * per_prompt]
            replies += [self._reply(engine, context.repeated(), kept, seed) for seed in seeds]
        for index, event in engine.gather(replies):
            if isinstance(event, wanted):
                yield index, event

    def _reply(self, engine: Engine, context: Context, kept: PrefixCache, seed: int) -> Iterator[Event]:
        return reply(
            engine.model,
            context,
            seed=seed,
            prompt_text=self.prompt_text,
            kept=kept,
            stopping=lambda: engine.stopping,
            **self.arguments,
        )


def chat_question(model: DiffusionGemma, chat: Chat, settings: Settings) -> Question:
    """Render and encode a conversation; raises InputError or ApiError."""
    template: dict[str, Any] = {"tools": list(chat.tools) or None, "enable_thinking": chat.thinking}
    ids = model.tokenizer.chat(chat.messages, escape=True, **template)
    text = model.tokenizer.render(chat.messages, **template)
    return _question(model, [model.prompt_ids(ids)], text, chat.options, settings, markup=True)


def completion_question(model: DiffusionGemma, completion: Completion, settings: Settings) -> Question:
    """Encode raw texts, each after the beginning-of-sequence token; raises InputError or ApiError."""
    begin = model.tokenizer.bos_token_id
    prompts = []
    for prompt in completion.prompts:
        ids = model.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        prompts.append(model.prompt_ids(ids if ids[0] == begin else [begin, *ids]))
    return _question(model, prompts, "", completion.options, settings, markup=False)


def infill_work(model: DiffusionGemma, request: Infilling) -> Callable[[], Iterator[Infill]]:
    """Work for the engine: one :class:`~mlx_diffgemma.editing.infilling.Infill`. What it refuses, it refuses when it begins."""
    options = request.options
    seed = _fresh_seed() if options.seed is None else options.seed

    def work() -> Iterator[Infill]:
        yield model.infill(
            request.template,
            marker=request.marker,
            prompt=request.prompt,
            raw=request.raw,
            system=request.system,
            seed=seed,
            escape=True,
            canvas_length=request.canvas_length,
            **options.sampling(model.checkpoint.generation),
        )

    return work


def known_tokens(model: DiffusionGemma, request: Infilling) -> int:
    """Tokens of the text around the holes."""
    template = request.template
    parts = parse_template(template, request.marker) if isinstance(template, str) else template
    return sum(len(model.tokenizer.encode(part, escape=True)) for part in parts if isinstance(part, str))


def _question(
    model: DiffusionGemma, prompts: list[NDArray[np.int32]], text: str, options: Options, settings: Settings, *, markup: bool
) -> Question:
    generation = model.checkpoint.generation
    canvas = 1 if options.mode == "causal" else generation.canvas_length or model.backend.config.canvas_length
    longest = max(prompt.shape[1] for prompt in prompts)
    sampling = options.sampling(generation)
    sampling["max_new_tokens"] = _max_new_tokens(longest, canvas, model.backend.config.max_position_embeddings, options, settings)
    sampling_options(generation, options.mode, sampling)  # refuses now what a reply would refuse when it begins
    first = _fresh_seed() if options.seed is None else options.seed
    arguments = {
        **sampling,
        "mode": options.mode,
        "stop": options.stop,
        "settled": Settled() if options.stream and options.settled else None,
        "logprobs": options.logprobs,
        "markup": markup,
    }
    seeds = tuple((first + choice) % 2**64 for choice in range(options.n * len(prompts)))
    return Question(tuple(prompts), text, seeds, arguments)


def _max_new_tokens(prompt: int, canvas: int, context: int, options: Options, settings: Settings) -> int:
    """Tokens to write after ``prompt`` tokens, in whole canvases."""
    most = settings.max_prompt_tokens
    if most is not None and prompt > most:
        raise _too_long(f"the prompt has {prompt} tokens; this server takes {most} at most")
    room = (context - prompt) // canvas * canvas
    if room < 1:
        raise _too_long(f"the prompt has {prompt} tokens, which leaves no room to answer in the model's context of {context}")
    if options.max_tokens is None:
        return min(settings.max_tokens, room)
    if options.max_tokens > room:
        raise _too_long(
            f"the prompt has {prompt} tokens, which leaves room for {room} in the model's context of {context}, "
            f"and {options.max_tokens} were asked for",
            param="max_tokens",
        )
    return options.max_tokens


def _too_long(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code="context_length_exceeded")


def _fresh_seed() -> int:
    """Of 53 bits: what reads JSON into doubles still reads it exactly."""
    return secrets.randbits(53)

"""One text being written, as events: drafts of its canvas, text as it becomes certain, and in the end the whole.

What is shown within a block comes from the settled front of its canvas (:mod:`mlx_diffgemma.settling`); what the text is in the
end comes from the committed blocks.
"""

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mlx_diffgemma.backends import Backend, Cache
from mlx_diffgemma.causal import Token, causal, check_causal
from mlx_diffgemma.config import CausalConfig, GenerationConfig, ModelConfig
from mlx_diffgemma.errors import InputError
from mlx_diffgemma.options import unknown_option
from mlx_diffgemma.prefix_cache import Context
from mlx_diffgemma.sampler import Block, Draft, Text, block_diffusion, check_seed, check_text
from mlx_diffgemma.settling import Front, Settled
from mlx_diffgemma.tokenizer import Growing, Tokenizer

#: Two ways to write with one model: a canvas at a time, or one token at a time.
MODES = ("diffusion", "causal")


@dataclass(frozen=True, eq=False)
class Writing:
    """How to write a text.

    Attributes:
        config: how to sample; its type says in which mode.
        seed: 0 to 2^64 - 1; with the prompt and the other fields, it gives the same tokens again.
        stop: texts that end the answer before they begin. Thoughts and tool calls are not searched.
        settled: show text within a block, by this rule; None shows it when its block is committed.
        logprobs: tell how likely the causal model finds each token. In diffusion this costs an output head a block, and one more
            pass in the end; text then comes at the end of each block, since they do.
        frozen, canvas: as in :class:`~mlx_diffgemma.sampler.Text`. Diffusion only.
    """

    config: GenerationConfig | CausalConfig
    seed: int
    stop: tuple[str, ...] = ()
    settled: Settled | None = None
    logprobs: bool = False
    frozen: NDArray[np.int32] | None = None
    canvas: NDArray[np.int32] | None = None

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if not all(self.stop):
            raise InputError("a stop text is empty; leave it out")

    def check(self, model: ModelConfig, prompt: NDArray[np.int32]) -> None:
        """Raise InputError where this cannot be written by ``model`` after a prompt [N]."""
        if isinstance(self.config, CausalConfig):
            check_causal(model, self.text(prompt), self.config)
        else:
            check_text(model, self.text(prompt), self.config)

    def step(self, model: ModelConfig) -> int:
        """How many tokens ``model`` commits at a time."""
        return 1 if isinstance(self.config, CausalConfig) else self.config.canvas_length or model.canvas_length

    def text(self, prompt: NDArray[np.int32], cache: Cache | None = None) -> Text:
        """The text to write behind what is in ``cache`` and a prompt [N]."""
        return Text(prompt, self.seed, cache, self.frozen, self.canvas, self.logprobs)


@dataclass(frozen=True)
class Content:
    """A stretch of the answer."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """A stretch of the thinking channel."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """A call of the function ``name``. The arguments are JSON: str, int, finite float, bool, None, list and dict."""

    name: str
    arguments: dict[str, Any]


#: What a written text consists of. Stretches of one kind that follow each other are one text.
Part = Reasoning | Content | ToolCall


class Reader(Protocol):
    """Tells the parts of a text while it still grows. What they are does not depend on where the text is cut."""

    def feed(self, text: str) -> list[Part]:
        """The parts that became certain with ``text``."""
        ...

    def close(self) -> list[Part]:
        """What was held back, the text being over."""
        ...


class Plain:
    """Reads all text as the answer; markup in it is text."""

    def feed(self, text: str) -> list[Part]:
        return [Content(text)] if text else []

    def close(self) -> list[Part]:
        return []


@dataclass(frozen=True)
class Statistics:
    """What a generation took.

    Attributes:
        prompt_tokens: tokens before the first canvas.
        new_tokens: tokens written, the end token included and the padding behind it not.
        denoising_steps: of each block; none in the causal mode, whose every pass is the encoder's.
        encode_seconds, denoise_seconds: wall time in either.
    """

    prompt_tokens: int
    new_tokens: int
    denoising_steps: tuple[int, ...]
    encode_seconds: float
    denoise_seconds: float

    @property
    def tokens_per_forward(self) -> float:
        """New tokens per denoising step: how much a canvas saves over one token at a time, which is 1."""
        return self.new_tokens / sum(self.denoising_steps) if self.denoising_steps else 1.0

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / (self.encode_seconds + self.denoise_seconds)


def statistics(prompt_tokens: int, new_tokens: int, written: Sequence[Block | Token], encode_seconds: float = 0.0) -> Statistics:
    """Of a text that was ``written`` in these, after a prompt that took ``encode_seconds`` beforehand."""
    blocks = [each for each in written if isinstance(each, Block)]
    return Statistics(
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        denoising_steps=tuple(block.steps for block in blocks),
        encode_seconds=encode_seconds + sum(each.encode_seconds if isinstance(each, Block) else each.seconds for each in written),
        denoise_seconds=sum(block.denoise_seconds for block in blocks),
    )


@dataclass(frozen=True)
class Generation:
    """A finished text.

    Attributes:
        text: the answer, without structural markers, the end token and what follows a stop text.
        tokens: the new ids, up to and with the end token, or the one that completed a stop text.
        finish_reason: "stop" (the model ended its text, or a stop text came) or "length" (``max_new_tokens`` reached).
        seed: with the prompt and the options, it gives the same tokens again.
        statistics: what it took.
        logprobs: of each token after all before it, natural, under the causal model at temperature 1; None where not asked for.
        parts: the text as it was read: plainly, or with thoughts and tool calls told apart.
        cached_tokens: of the prompt's, those that a kept cache held.
        unsettled: tokens that had been shown as settled, and that their block then changed.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    seed: int
    statistics: Statistics
    logprobs: list[float] | None = None
    parts: tuple[Part, ...] = ()
    cached_tokens: int = 0
    unsettled: int = 0


#: What writing yields: what has been computed, what is certain of the text with it, and at the end the Generation.
Event = Draft | Block | Token | Part | Generation


def sampling_config(generation: GenerationConfig, mode: str, options: Mapping[str, Any]) -> GenerationConfig | CausalConfig:
    """The options of ``mode`` where they are not None, over those of a checkpoint's ``generation``.

    Raises InputError for an unknown mode or option, one of the other mode, or a bad value.
    """
    if mode not in MODES:
        raise InputError(f"unknown mode {mode!r}; known are {' and '.join(MODES)}")
    own, other = (GenerationConfig, CausalConfig) if mode == "diffusion" else (CausalConfig, GenerationConfig)
    for name, value in options.items():
        if name not in (*own.option_names(), *other.option_names()):
            raise unknown_option(name, own.option_names())
        if value is not None and name not in own.option_names():
            raise InputError(f"{name} belongs to the {MODES[mode == 'diffusion']} mode; leave it out, or change the mode")
    config = generation if mode == "diffusion" else CausalConfig.from_generation(generation)
    return config.replace(**{name: value for name, value in options.items() if name in own.option_names()})


def fresh_seed() -> int:
    """A seed that nobody chose."""
    return secrets.randbits(64)


def write(
    backend: Backend,
    tokenizer: Tokenizer,
    context: Context,
    writing: Writing,
    *,
    reader: Callable[[], Reader] = Plain,
    stopping: Callable[[], bool] = bool,
) -> Iterator[Event]:
    """Write on from a prompt that has been read; its cache is used up.

    Args:
        reader: makes what tells the parts of the text; one reads what is shown, another what is committed.
        stopping: asked after each block or token; true ends the text there, with "length".

    Yields:
        Every Draft and Block or Token, each followed by the parts that it made certain; and the :class:`Generation`. Whoever
        stops reading stops the computation.

    Raises:
        InputError: at once, before the first event is asked for.
    """
    text = writing.text(np.empty(0, np.int32), context.cache)
    events: Iterator[Draft | Block] | Iterator[Token]
    if isinstance(writing.config, CausalConfig):
        events = causal(backend, text, writing.config)
    else:
        events = block_diffusion(backend, text, writing.config)
    shown, committed = (_Grown(tokenizer.decode, reader(), writing) for _ in range(2))
    rule = None if writing.logprobs else writing.settled
    return _Write(context, events, writing.seed, rule, shown, committed).run(stopping)


@dataclass
class _Write:
    context: Context
    events: Iterator[Draft | Block] | Iterator[Token]
    seed: int
    rule: Settled | None
    shown: "_Grown"  # what the caller has been told
    committed: "_Grown"
    written: list[Block | Token] = field(default_factory=list)
    unsettled: int = 0

    def run(self, stopping: Callable[[], bool]) -> Iterator[Event]:
        front: Front | None = None
        for event in self.events:
            yield event
            if isinstance(event, Draft):
                if self.rule is not None:
                    front = front or Front(self.rule)
                    yield from self.shown.add(front.update(event.argmax, event.entropy))
                continue
            self.written.append(event)
            tokens = event.tokens if isinstance(event, Block) else np.array([event.token], np.int32)
            told = max(0, len(self.shown.tokens) - len(self.committed.tokens))  # of this block
            if front is not None:
                self.unsettled += int((front.tokens[:told] != tokens[:told]).sum())
                front = None
            yield from self.shown.add(tokens[told:])
            self.committed.add(tokens)
            if self.committed.finish_reason or stopping():
                break
        yield from self.shown.close()
        self.committed.close()
        yield self.finished()

    def finished(self) -> Generation:
        text = self.committed
        return Generation(
            text="".join(part.text for part in text.parts if isinstance(part, Content)),
            tokens=text.tokens,
            finish_reason=text.finish_reason or "length",
            seed=self.seed,
            statistics=statistics(len(self.context.tokens), len(text.tokens), self.written, self.context.encode_seconds),
            logprobs=self._logprobs(len(text.tokens)),
            parts=tuple(_joined(text.parts)),
            cached_tokens=self.context.cached_tokens,
            unsettled=self.unsettled,
        )

    def _logprobs(self, count: int) -> list[float] | None:
        found: list[float] = []
        for each in self.written:
            if isinstance(each, Token):
                found += [] if each.logprob is None else [each.logprob]
            elif each.logprobs is not None:
                found += each.logprobs.tolist()
        return found[:count] or None


class _Grown:
    """Tokens in, parts out, up to the end of the text.

    Attributes:
        tokens: those taken in, up to and with the one that ended the text.
        parts: all that came out.
        finish_reason: "stop" or "length" once the text has ended.
    """

    def __init__(self, decode: Callable[..., str], reader: Reader, writing: Writing) -> None:
        self.tokens: list[int] = []
        self.parts: list[Part] = []
        self.finish_reason: str | None = None
        self._growing, self._reader, self._stop = Growing(decode), reader, _Stop(writing.stop)
        self._config = writing.config

    def add(self, tokens: NDArray[np.int32]) -> list[Part]:
        """The parts that are certain with these tokens; those behind the end are left."""
        new: list[Part] = []
        for token in tokens.tolist():
            if self.finish_reason:
                break
            self.tokens.append(token)
            if token in self._config.eos_token_ids:
                self.finish_reason = "stop"
                break
            new += self._cut(self._reader.feed(self._growing.add([token])))
            if len(self.tokens) == self._config.max_new_tokens:
                self.finish_reason = self.finish_reason or "length"
        self.parts += new
        return _joined(new)

    def close(self) -> list[Part]:
        """What was held back."""
        if self._stop.found:
            return []
        rest = self._cut([*self._reader.feed(self._growing.end()), *self._reader.close()])
        if not self._stop.found:
            rest += self._contents(self._stop.rest())
        self.parts += rest
        return _joined(rest)

    def _cut(self, parts: list[Part]) -> list[Part]:
        """The parts up to a stop text in the answer; what may begin one is held back."""
        new: list[Part] = []
        for part in parts:
            if isinstance(part, Content):
                new += self._contents(self._stop.add(part.text))
                if self._stop.found:
                    self.finish_reason = "stop"
                    break
            else:
                new += [*self._contents(self._stop.rest()), part]  # no stop text goes on behind a thought or a call
        return new

    @staticmethod
    def _contents(text: str) -> list[Part]:
        return [Content(text)] if text else []


class _Stop:
    """Finds the first of some texts in one that grows.

    Attributes:
        found: one has been found; nothing comes out any more.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.found = False
        self._texts, self._held = texts, ""

    def add(self, text: str) -> str:
        """What of the text so far may go out now: it is before any of the texts, and begins none."""
        text = self._held + text
        places = [place for place in map(text.find, self._texts) if place >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        held = max((length for stop in self._texts for length in range(1, len(stop)) if text.endswith(stop[:length])), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def rest(self) -> str:
        """What was held back, which turned out to begin none."""
        text, self._held = self._held, ""
        return text


def _joined(parts: Sequence[Part]) -> list[Part]:
    """The parts with neighbours of one kind of text put together."""
    joined: list[Part] = []
    for kind, group in groupby(parts, type):
        if kind is ToolCall:
            joined += group
        else:
            joined.append(kind("".join(part.text for part in group)))  # type: ignore[union-attr,arg-type,call-arg]
    return joined

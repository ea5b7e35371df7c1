"""Writing one text, as a stream of events: drafts of its canvas, text as it becomes certain, and the finished text at the end.

Text that is shown within a block comes from the settled front of its canvas (:mod:`mlx_diffgemma.settling`). The finished text
comes from the committed blocks.
"""

import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from mlx_diffgemma.presets import OPTIONS, configured
from mlx_diffgemma.sampler import Block, Draft, Text, block_diffusion, check_seed, check_text
from mlx_diffgemma.settling import Front, Settled
from mlx_diffgemma.tokenizer import Growing, Tokenizer

#: The two ways to write with one model: a canvas at a time, or one token at a time.
MODES = ("diffusion", "causal")


@dataclass(frozen=True, eq=False)
class Writing:
    """How to write a text.

    Attributes:
        config: how to sample. Its type decides the mode.
        seed: 0 to 2^64 - 1. With the same prompt and fields, it gives the same tokens again.
        stop: the answer ends before the first of these texts. Thoughts and tool calls are not searched.
        settled: show text within a block, by this rule. None shows text when its block is committed.
        logprobs: also return how likely the causal model finds each token. In the diffusion mode this costs an output head per
            block, and one more pass at the end. Text then comes at the end of each block, together with its log-probabilities.
        frozen, canvas: as in :class:`~mlx_diffgemma.sampler.Text`. Diffusion mode only.
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
        """Raise InputError if ``model`` cannot write this text after a prompt [N]."""
        if isinstance(self.config, CausalConfig):
            check_causal(model, self.text(prompt), self.config)
        else:
            check_text(model, self.text(prompt), self.config)

    def step(self, model: ModelConfig) -> int:
        """How many tokens ``model`` commits at a time."""
        return 1 if isinstance(self.config, CausalConfig) else self.config.canvas_length or model.canvas_length

    def text(self, prompt: NDArray[np.int32], cache: Cache | None = None) -> Text:
        """The text to write after the tokens in ``cache`` and a prompt [N]."""
        return Text(prompt, self.seed, cache, self.frozen, self.canvas, self.logprobs)


@dataclass(frozen=True)
class Content:
    """A part of the answer's text."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """A part of the thinking channel's text."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """A call of the function ``name``. The arguments have JSON types: str, int, finite float, bool, None, list and dict."""

    name: str
    arguments: dict[str, Any]


#: The parts of a written text. Neighbouring parts of one kind are one text.
Part = Reasoning | Content | ToolCall


class Reader(Protocol):
    """Splits a text into parts while the text still grows. The parts do not depend on how the text arrives."""

    def feed(self, text: str) -> list[Part]:
        """Add ``text``, and return the parts that are now certain."""
        ...

    def close(self) -> list[Part]:
        """End the text, and return the parts that were held back."""
        ...


class Plain:
    """Reads all text as the answer. Markup in it is plain text."""

    def feed(self, text: str) -> list[Part]:
        return [Content(text)] if text else []

    def close(self) -> list[Part]:
        return []


@dataclass(frozen=True)
class Statistics:
    """The counts and times of a generation.

    Attributes:
        prompt_tokens: tokens before the first canvas.
        new_tokens: tokens written, including the end token and without the padding after it.
        denoising_steps: how many steps each block took. Empty in the causal mode, where every pass is an encoder pass.
        encode_seconds, denoise_seconds: wall time of encoding and of denoising.
    """

    prompt_tokens: int
    new_tokens: int
    denoising_steps: tuple[int, ...]
    encode_seconds: float
    denoise_seconds: float

    @property
    def tokens_per_forward(self) -> float:
        """New tokens per denoising step. One token at a time would be 1, so this is how many passes a canvas saves."""
        return self.new_tokens / sum(self.denoising_steps) if self.denoising_steps else 1.0

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / (self.encode_seconds + self.denoise_seconds)


def statistics(prompt_tokens: int, new_tokens: int, written: Sequence[Block | Token], encode_seconds: float = 0.0) -> Statistics:
    """The statistics of a text that was ``written`` in these blocks or tokens. Its prompt took ``encode_seconds`` beforehand."""
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
        text: the answer, without structural markers, without the end token, and cut before a stop text.
        tokens: the new ids, up to and including the end token or the token that completed a stop text.
        finish_reason: "stop" (the model ended its text, or a stop text was found) or "length" (``max_new_tokens`` were written).
        seed: with the same prompt and options, it gives the same tokens again.
        statistics: counts and times.
        logprobs: the natural-log probability of each token given all tokens before it, under the causal model at temperature 1.
            None when not requested.
        parts: the parts of the text, as the reader split it: all of it content, or with thoughts and tool calls separate.
        cached_tokens: how many of the prompt's tokens were found in the prefix cache.
        unsettled: how many tokens were shown as settled and then changed by their block.
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


#: The events of writing: each computed result, the parts of the text that are then certain, and the Generation at the end.
Event = Draft | Block | Token | Part | Generation


def sampling_config(generation: GenerationConfig, mode: str, options: Mapping[str, Any]) -> GenerationConfig | CausalConfig:
    """The checkpoint's ``generation`` values for ``mode``, replaced by the ``options`` that are not None.

    ``options`` may have a ``preset`` in the diffusion mode; the others replace its values. Raises InputError for an unknown mode,
    preset or option, an option of the other mode, or a bad value.
    """
    if mode not in MODES:
        raise InputError(f"unknown mode {mode!r}; known are {' and '.join(MODES)}")
    own, other = OPTIONS, tuple(CausalConfig.option_names())
    if mode == "causal":
        own, other = other, own
    for name, value in options.items():
        if name not in (*own, *other):
            raise unknown_option(name, own)
        if value is not None and name not in own:
            raise InputError(f"{name} belongs to the {MODES[mode == 'diffusion']} mode; leave it out, or change the mode")
    given = {name: value for name, value in options.items() if name in own}
    if mode == "causal":
        return CausalConfig.from_generation(generation).replace(**given)
    return configured(generation, given)


def fresh_seed() -> int:
    """A random seed."""
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
    """Write a text after a prompt that has been encoded. This changes the context's cache, so fork the context to use it again.

    Args:
        reader: makes the reader that splits the text into parts. One reader gets the text that is shown, another one the text
            that is committed.
        stopping: called after each block or token. If it returns true, the text ends there, with finish reason "length".

    Yields:
        Every Draft and Block or Token, each followed by the parts that it made certain, and at the end the :class:`Generation`.
        When you stop reading, the computation stops.

    Raises:
        InputError: by this call itself, before the first event is requested.
    """
    text = writing.text(np.empty(0, np.int32), context.cache)
    events: Iterator[Draft | Block] | Iterator[Token]
    if isinstance(writing.config, CausalConfig):
        events = causal(backend, text, writing.config)
    else:
        events = block_diffusion(backend, text, writing.config)
    shown, committed = (_Grown(tokenizer.utf8, reader(), writing) for _ in range(2))
    rule = None if writing.logprobs else writing.settled
    return _Write(context, events, writing.seed, rule, shown, committed).run(stopping)


@dataclass
class _Write:
    context: Context
    events: Iterator[Draft | Block] | Iterator[Token]
    seed: int
    rule: Settled | None
    shown: "_Grown"  # the text that the caller has seen
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
            told = max(0, len(self.shown.tokens) - len(self.committed.tokens))  # tokens of this block that were shown
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
    """Turns tokens into parts, up to the end of the text.

    Attributes:
        tokens: the tokens so far, up to and including the token that ended the text.
        parts: all parts so far.
        finish_reason: "stop" or "length" once the text has ended.
    """

    def __init__(self, utf8: Callable[[Iterable[int]], bytes], reader: Reader, writing: Writing) -> None:
        self.tokens: list[int] = []
        self.parts: list[Part] = []
        self.finish_reason: str | None = None
        self._growing, self._reader, self._stop = Growing(utf8), reader, _Stop(writing.stop)
        self._config = writing.config

    def add(self, tokens: NDArray[np.int32]) -> list[Part]:
        """Add tokens, and return the parts that are now certain. Tokens after the end of the text are ignored."""
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
        """End the text, and return the parts that were held back."""
        if self._stop.found:
            return []
        rest = self._cut([*self._reader.feed(self._growing.end()), *self._reader.close()])
        if not self._stop.found:
            rest += self._contents(self._stop.rest())
        self.parts += rest
        return _joined(rest)

    def _cut(self, parts: list[Part]) -> list[Part]:
        """The parts up to a stop text in the answer. Text that may be the beginning of one is held back."""
        new: list[Part] = []
        for part in parts:
            if isinstance(part, Content):
                new += self._contents(self._stop.add(part.text))
                if self._stop.found:
                    self.finish_reason = "stop"
                    break
            else:
                new += [*self._contents(self._stop.rest()), part]  # no stop text continues across a thought or a call
        return new

    @staticmethod
    def _contents(text: str) -> list[Part]:
        return [Content(text)] if text else []


class _Stop:
    """Finds the first stop text in a growing text.

    Attributes:
        found: whether a stop text has been found. No more text is then returned.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.found = False
        self._texts, self._held = texts, ""

    def add(self, text: str) -> str:
        """Add text, and return what is certainly before any stop text."""
        text = self._held + text
        places = [place for place in map(text.find, self._texts) if place >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        held = max((length for stop in self._texts for length in range(1, len(stop)) if text.endswith(stop[:length])), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def rest(self) -> str:
        """Return the text that was held back; no stop text begins in it."""
        text, self._held = self._held, ""
        return text


def _joined(parts: Sequence[Part]) -> list[Part]:
    """The parts, with neighbouring texts of one kind joined."""
    joined: list[Part] = []
    for kind, group in groupby(parts, type):
        if kind is ToolCall:
            joined += group
        else:
            joined.append(kind("".join(part.text for part in group)))  # type: ignore[union-attr,arg-type,call-arg]
    return joined

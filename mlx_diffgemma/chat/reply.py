"""One reply of a model, as events: drafts of its canvas, stretches of its thoughts and of its answer, tool calls.

What a reply shows as it grows comes from the settled front of each canvas (:mod:`mlx_diffgemma.settling`), so that text appears
within a block and not only at its end; what it is in the end comes from the committed blocks.
"""

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_diffgemma.backends import Backend
from mlx_diffgemma.causal import Token, causal, check_context
from mlx_diffgemma.chat.markup import Content, Part, Reasoning, ReplyParser, ToolCall
from mlx_diffgemma.config import CausalConfig, GenerationConfig, ModelConfig
from mlx_diffgemma.errors import InputError
from mlx_diffgemma.pipeline import DiffusionGemma, Statistics, sampling_options, statistics
from mlx_diffgemma.prefix_cache import Context, PrefixCache
from mlx_diffgemma.sampler import Block, Draft, block_diffusion, check_lengths
from mlx_diffgemma.settling import Front, Settled
from mlx_diffgemma.tokenizer import Growing


@dataclass(frozen=True)
class Reply:
    """A finished reply.

    Attributes:
        reasoning: the thinking channel's text.
        content: the answer.
        tool_calls: in order.
        finish_reason: "stop" (the model ended it, or a stop text came), "tool_calls" (it ended behind some) or "length".
        tokens: the new ids, up to and with the end token, or the one that completed a stop text.
        seed: with the prompt and the options, it gives the same tokens again.
        cached_tokens: of the prompt's, those that a kept cache held.
        unsettled: tokens that had been shown as settled, and that their block then changed.
        logprobs: of each token, as in :class:`~mlx_diffgemma.pipeline.Generation`.
    """

    reasoning: str
    content: str
    tool_calls: tuple[ToolCall, ...]
    finish_reason: str
    tokens: list[int]
    seed: int
    statistics: Statistics
    cached_tokens: int
    unsettled: int = 0
    logprobs: list[float] | None = None


#: What :func:`reply` yields. Parts are stretches of text: several make up what a :class:`Reply` has whole.
Event = Draft | Block | Token | Part | Reply


def check_room(model: ModelConfig, config: GenerationConfig | CausalConfig, prompt: NDArray[np.int32]) -> None:
    """Raise InputError where a prompt [1, N] leaves no room for the new tokens; :func:`reply` would say so only behind it."""
    if isinstance(config, CausalConfig):
        check_context(model, config, prompt, 0)
    else:
        check_lengths(model, config, prompt, 0, config.canvas_length or model.canvas_length)


def reply(
    model: DiffusionGemma,
    context: Context,
    *,
    mode: str = "diffusion",
    seed: int | None = None,
    stop: Sequence[str] = (),
    settled: Settled | None = None,
    logprobs: bool = False,
    markup: bool = True,
    prompt_text: str = "",
    kept: PrefixCache | None = None,
    stopping: Callable[[], bool] = bool,
    **options: Any,
) -> Iterator[Event]:
    """Write on from a prompt that has been read, whose cache is used up.

    Args:
        mode, seed, options: as in :meth:`~mlx_diffgemma.pipeline.DiffusionGemma.stream`.
        stop: texts that end the answer before they begin. Thoughts and tool calls are not searched.
        settled: show text within a block, by this rule; by default when its block is committed.
        logprobs: tell them. Text then comes at the end of each block, since they do.
        markup: tell thoughts and tool calls from the answer. Otherwise all is answer, and markers are text.
        prompt_text: the prompt as the chat template wrote it: a thought may begin in it.
        kept: where to keep the cache of the whole text, once it is finished.
        stopping: asked after each block or token; true ends the reply there, with "length".

    Yields:
        Every Draft and Block or Token, each followed by the parts that it made certain; and the :class:`Reply`. Then, with
        ``kept``, the reply's end is encoded, so that what follows finds it: read on to the end.

    Raises:
        InputError: at once, before the first event is asked for.
    """
    config = sampling_options(model.checkpoint.generation, mode, options)
    seed = secrets.randbits(64) if seed is None else seed
    if not all(stop):
        raise InputError("a stop text is empty; leave it out")
    nothing = np.empty((1, 0), np.int32)
    events: Iterator[Draft | Block] | Iterator[Token]
    if isinstance(config, CausalConfig):
        events = causal(model.backend, nothing, config, seed=seed, cache=context.cache, logprobs=logprobs)
    else:
        events = block_diffusion(model.backend, nothing, config, seed=seed, cache=context.cache, logprobs=logprobs)

    def writer() -> _Writer:
        parser = ReplyParser(prompt_text) if markup else None
        return _Writer(model.tokenizer.decode, parser, stop, config.max_new_tokens, config.eos_token_ids)

    rule = None if logprobs else settled
    return _Reply(model.backend, context, events, seed, rule, writer(), writer()).run(kept, stopping)


@dataclass
class _Reply:
    backend: Backend
    context: Context
    events: Iterator[Draft | Block] | Iterator[Token]
    seed: int
    rule: Settled | None
    shown: "_Writer"  # what the caller has been told
    written: "_Writer"  # what the committed blocks say
    parts: list[Block | Token] = field(default_factory=list)
    unsettled: int = 0

    def run(self, kept: PrefixCache | None, stopping: Callable[[], bool]) -> Iterator[Event]:
        front: Front | None = None
        for event in self.events:
            yield event
            if isinstance(event, Draft):
                if self.rule is not None:
                    front = front or Front(self.rule)
                    yield from self.shown.add(front.update(event.argmax[0], event.entropy[0]))
                continue
            self.parts.append(event)
            tokens = event.tokens[0]
            told = max(0, len(self.shown.tokens) - len(self.written.tokens))  # of this block
            if front is not None:
                self.unsettled += int((front.tokens[:told] != tokens[:told]).sum())
                front = None
            yield from self.shown.add(tokens[told:])
            self.written.add(tokens)
            if self.written.finish_reason or stopping():
                break
        yield from self.shown.close()
        self.written.close()
        yield self.finished()
        if kept is not None:
            self.keep(kept)

    def finished(self) -> Reply:
        text = self.written
        logprobs = [part.logprobs[0] for part in self.parts if part.logprobs is not None]
        return Reply(
            reasoning="".join(part.text for part in text.parts if isinstance(part, Reasoning)),
            content="".join(part.text for part in text.parts if isinstance(part, Content)),
            tool_calls=(calls := tuple(part for part in text.parts if isinstance(part, ToolCall))),
            finish_reason="tool_calls" if calls and text.finish_reason == "stop" else text.finish_reason or "length",
            tokens=text.tokens,
            seed=self.seed,
            statistics=statistics(self.context.tokens.shape[1], len(text.tokens), self.parts, self.context.encode_seconds),
            cached_tokens=self.context.cached_tokens,
            unsettled=self.unsettled,
            logprobs=np.concatenate(logprobs)[: len(text.tokens)].tolist() if logprobs else None,
        )

    def keep(self, kept: PrefixCache) -> None:
        cache, prompt = self.context.cache, self.context.tokens
        rest = self.written.tokens[len(cache) - prompt.shape[1] :]
        # With logprobs the last block is in the cache already, and what it holds behind the end cannot be taken out.
        behind = len(cache) - prompt.shape[1] > len(self.written.tokens)
        if behind or len(cache) + len(rest) > self.backend.config.max_position_embeddings:
            return
        if rest:
            self.backend.encode(np.array([rest], np.int32), cache)
        kept.keep(np.append(prompt[0], np.array(self.written.tokens, np.int32)), cache, self.context.marks)


class _Writer:
    """Tokens in, parts out, up to the end of the reply.

    Attributes:
        tokens: those taken in, up to and with the one that ended the reply.
        parts: all that came out.
        finish_reason: "stop" or "length" once the reply has ended.
    """

    def __init__(
        self,
        decode: Callable[..., str],
        parser: ReplyParser | None,
        stop: Sequence[str],
        max_new_tokens: int,
        eos_token_ids: tuple[int, ...],
    ) -> None:
        self.tokens: list[int] = []
        self.parts: list[Part] = []
        self.finish_reason: str | None = None
        self._growing, self._parser, self._stop = Growing(decode), parser, _Stop(stop)
        self._max_new_tokens, self._eos_token_ids = max_new_tokens, eos_token_ids

    def add(self, tokens: NDArray[np.int32]) -> list[Part]:
        """The parts that are certain with these tokens; those behind the end are left."""
        new: list[Part] = []
        for token in tokens.tolist():
            if self.finish_reason:
                break
            self.tokens.append(token)
            if token in self._eos_token_ids:
                self.finish_reason = "stop"
                break
            new += self._cut(self._parsed(self._growing.add([token])))
            if len(self.tokens) == self._max_new_tokens:
                self.finish_reason = self.finish_reason or "length"
        self.parts += new
        return _joined(new)

    def close(self) -> list[Part]:
        """What was held back."""
        if self._stop.found:
            return []
        rest = self._cut([*self._parsed(self._growing.end()), *(self._parser.close() if self._parser else [])])
        if not self._stop.found:
            rest += self._contents(self._stop.rest())
        self.parts += rest
        return _joined(rest)

    def _parsed(self, text: str) -> list[Part]:
        return self._parser.feed(text) if self._parser else self._contents(text)

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
    for part in parts:
        last = joined[-1] if joined else None
        if isinstance(last, Reasoning) and isinstance(part, Reasoning):
            joined[-1] = Reasoning(last.text + part.text)
        elif isinstance(last, Content) and isinstance(part, Content):
            joined[-1] = Content(last.text + part.text)
        else:
            joined.append(part)
    return joined

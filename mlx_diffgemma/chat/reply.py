"""Writes one reply of a model, with its thoughts, answer and tool calls separate."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mlx_diffgemma.causal import Token
from mlx_diffgemma.chat.markup import ReplyParser
from mlx_diffgemma.pipeline import DiffusionGemma
from mlx_diffgemma.prefix_cache import Context
from mlx_diffgemma.sampler import Block, Draft
from mlx_diffgemma.writing import Generation, Part, Reasoning, Statistics, ToolCall, Writing, write


@dataclass(frozen=True)
class Reply:
    """A finished reply.

    Attributes:
        reasoning: the text of the thinking channel.
        content: the answer.
        tool_calls: the tool calls, in order.
        finish_reason: "stop" (the model ended the reply, or a stop text was found), "tool_calls" (the same, with tool calls) or
            "length".
        tokens, seed, statistics, logprobs, cached_tokens, unsettled: as in :class:`~mlx_diffgemma.writing.Generation`.
    """

    reasoning: str
    content: str
    tool_calls: tuple[ToolCall, ...]
    finish_reason: str
    tokens: list[int]
    seed: int
    statistics: Statistics
    logprobs: list[float] | None = None
    cached_tokens: int = 0
    unsettled: int = 0

    @classmethod
    def of(cls, generation: Generation) -> "Reply":
        """Make a reply from a finished generation."""
        calls = tuple(part for part in generation.parts if isinstance(part, ToolCall))
        return cls(
            reasoning="".join(part.text for part in generation.parts if isinstance(part, Reasoning)),
            content=generation.text,
            tool_calls=calls,
            finish_reason="tool_calls" if calls and generation.finish_reason == "stop" else generation.finish_reason,
            tokens=generation.tokens,
            seed=generation.seed,
            statistics=generation.statistics,
            logprobs=generation.logprobs,
            cached_tokens=generation.cached_tokens,
            unsettled=generation.unsettled,
        )


#: The events of :func:`reply`. A Part can be a piece of a text that the :class:`Reply` has as a whole.
ReplyEvent = Draft | Block | Token | Part | Reply


def reply(
    model: DiffusionGemma, context: Context, writing: Writing, *, stopping: Callable[[], bool] = bool
) -> Iterator[ReplyEvent]:
    """Write a reply to a prompt that has been encoded. This changes the context's cache.

    Args:
        stopping: as in :func:`~mlx_diffgemma.writing.write`.

    Yields:
        The events of write, with thoughts and tool calls separate from the answer, and a :class:`Reply` instead of the
        Generation.

    Raises:
        InputError: by this call itself, before the first event is requested.
    """
    thought = model.tokenizer.opened_thought(context.tokens.tolist())
    events = write(model.backend, model.tokenizer, context, writing, reader=lambda: ReplyParser(thought), stopping=stopping)
    return (Reply.of(event) if isinstance(event, Generation) else event for event in events)

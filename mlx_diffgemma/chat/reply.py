"""One reply of a model: thoughts, answer and tool calls told apart."""

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
        reasoning: the thinking channel's text.
        content: the answer.
        tool_calls: in order.
        finish_reason: "stop" (the model ended it, or a stop text came), "tool_calls" (it ended behind some) or "length".
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
        """What has been generated, as a reply."""
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


#: What :func:`reply` yields. Parts are stretches of text: several make up what a :class:`Reply` has whole.
ReplyEvent = Draft | Block | Token | Part | Reply


def reply(
    model: DiffusionGemma, context: Context, writing: Writing, *, stopping: Callable[[], bool] = bool
) -> Iterator[ReplyEvent]:
    """Write a reply to a prompt that has been read, whose cache is used up.

    Args:
        stopping: as in :func:`~mlx_diffgemma.writing.write`.

    Yields:
        What write does, with thoughts and tool calls told from the answer, and a :class:`Reply` in place of the Generation.

    Raises:
        InputError: at once, before the first event is asked for.
    """
    thought = model.tokenizer.opened_thought(context.tokens.tolist())
    events = write(model.backend, model.tokenizer, context, writing, reader=lambda: ReplyParser(thought), stopping=stopping)
    return (Reply.of(event) if isinstance(event, Generation) else event for event in events)

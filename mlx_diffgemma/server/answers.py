"""From events of replies to OpenAI's JSON: an answer as one object, or as the chunks of a stream."""

import json
import secrets
import time
from collections.abc import Callable, Iterable
from typing import Any

from mlx_diffgemma.chat.reply import Reply, ReplyEvent
from mlx_diffgemma.editing.infilling import Infill
from mlx_diffgemma.sampler import Draft
from mlx_diffgemma.server.requests import Options
from mlx_diffgemma.writing import Content, Reasoning, ToolCall

#: Stands for the log-probability of what has none in JSON: minus infinity.
LEAST_LOGPROB = -9999.0

Json = dict[str, Any]


class Answer:
    """The answer to one request, whose choices grow by events; what differs between chats and completions is in two subclasses.

    Args:
        name: of the model, as clients know it.
        cell: the text of one token.
        per_prompt: choices of each prompt; they follow one another.
    """

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, options: Options, name: str, cell: Callable[[int], str], choices: int, per_prompt: int) -> None:
        self.options, self.cell, self.choices, self.per_prompt = options, cell, choices, per_prompt
        self.replies: dict[int, Reply] = {}
        self._head = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": name}

    def opening(self) -> list[Json]:
        """The chunks that a stream begins with."""
        return []

    def chunks(self, index: int, event: ReplyEvent) -> list[Json]:
        """The chunks that an event of one choice is told by; those of a stream that is not asked for are none."""
        if isinstance(event, Draft):
            return [self._chunk([], diffgemma={"draft": self._draft(index, event)})] if self.options.drafts else []
        if isinstance(event, Reply):
            self.replies[index] = event
            last = len(self.replies) == self.choices and not self.options.include_usage
            return [self._chunk([self._finish(index, event)], **({"diffgemma": self._statistics()} if last else {}))]
        if isinstance(event, Content | Reasoning | ToolCall):
            return [self._chunk([self._growth(index, event)])]
        return []

    def closing(self) -> list[Json]:
        """The chunks that a stream ends with, once all replies are there."""
        if not self.options.include_usage:
            return []
        return [{**self._chunk([]), "usage": self._usage(), "diffgemma": self._statistics()}]

    def whole(self) -> Json:
        """The answer as one object, once all replies are there."""
        return {
            **self._head,
            "object": self.whole_object,
            "choices": [self._choice(index, self.replies[index]) for index in range(self.choices)],
            "usage": self._usage(),
            "diffgemma": self._statistics(),
        }

    def _growth(self, index: int, part: Content | Reasoning | ToolCall) -> Json:
        raise NotImplementedError

    def _finish(self, index: int, reply: Reply) -> Json:
        raise NotImplementedError

    def _choice(self, index: int, reply: Reply) -> Json:
        raise NotImplementedError

    def _chunk(self, choices: list[Json], **more: Any) -> Json:
        usage = {"usage": None} if self.options.include_usage else {}
        return {**self._head, "object": self.chunk_object, "choices": choices, **usage, **more}

    def _usage(self) -> Json:
        replies = [self.replies[index] for index in range(self.choices)]
        prompts = replies[:: self.per_prompt]  # a prompt is read once for all its choices
        before, new = sum(reply.statistics.prompt_tokens for reply in prompts), sum(len(reply.tokens) for reply in replies)
        return {
            "prompt_tokens": before,
            "completion_tokens": new,
            "total_tokens": before + new,
            "prompt_tokens_details": {"cached_tokens": sum(reply.cached_tokens for reply in prompts)},
        }

    def _statistics(self) -> Json:
        replies = [self.replies[index] for index in range(self.choices)]
        steps = sum(sum(reply.statistics.denoising_steps) for reply in replies)
        new = sum(reply.statistics.new_tokens for reply in replies)
        return {
            "denoising_steps": [list(reply.statistics.denoising_steps) for reply in replies],
            "tokens_per_forward": round(new / steps, 3) if steps else 1.0,
            "seeds": [reply.seed for reply in replies],
            "unsettled": sum(reply.unsettled for reply in replies),
            "ignored": list(self.options.ignored),
        }

    def _draft(self, index: int, draft: Draft) -> Json:
        return {
            "index": index,
            "block": draft.block,
            "step": draft.step,
            "temperature": round(draft.temperature, 6),
            "cells": [self.cell(token) for token in draft.argmax.tolist()],
            "entropy": [round(nats, 3) for nats in draft.entropy.tolist()],
            "accepted": draft.accepted.astype(int).tolist(),
            "done": draft.done,
        }

    def _scored(self, reply: Reply) -> Iterable[tuple[str, float]]:
        """The text and the log-probability of each token that has a text; the end token has none."""
        for token, logprob in zip(reply.tokens, reply.logprobs or (), strict=True):
            if text := self.cell(token):
                yield text, max(logprob, LEAST_LOGPROB)


class ChatAnswer(Answer):
    """As ``/v1/chat/completions`` answers."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, options: Options, name: str, cell: Callable[[int], str], choices: int, per_prompt: int) -> None:
        super().__init__(options, name, cell, choices, per_prompt)
        self._calls = [0] * choices  # tool calls that have been told, by choice

    def opening(self) -> list[Json]:
        return [self._chunk([_delta(index, {"role": "assistant", "content": ""})]) for index in range(self.choices)]

    def _growth(self, index: int, part: Content | Reasoning | ToolCall) -> Json:
        if isinstance(part, ToolCall):
            self._calls[index] += 1
            return _delta(index, {"tool_calls": [{"index": self._calls[index] - 1, **_tool_call(part)}]})
        return _delta(index, {"content" if isinstance(part, Content) else "reasoning_content": part.text})

    def _finish(self, index: int, reply: Reply) -> Json:
        return {**_delta(index, {}), "logprobs": self._logprobs(reply), "finish_reason": reply.finish_reason}

    def _choice(self, index: int, reply: Reply) -> Json:
        message: Json = {"role": "assistant", "content": reply.content, "refusal": None}
        if reply.reasoning:
            message["reasoning_content"] = reply.reasoning
        if reply.tool_calls:
            message["content"] = reply.content or None
            message["tool_calls"] = [_tool_call(call) for call in reply.tool_calls]
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(reply),
            "finish_reason": reply.finish_reason,
        }

    def _logprobs(self, reply: Reply) -> Json | None:
        if reply.logprobs is None:
            return None
        content = [
            {
                "token": text,
                "logprob": logprob,
                "bytes": None if "\ufffd" in text else list(text.encode()),  # a part of a character has no text of its own
                "top_logprobs": [],
            }
            for text, logprob in self._scored(reply)
        ]
        return {"content": content, "refusal": None}


class CompletionAnswer(Answer):
    """As ``/v1/completions`` answers."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def _growth(self, index: int, part: Content | Reasoning | ToolCall) -> Json:
        assert isinstance(part, Content), "a raw text has no markup"
        return {"index": index, "text": part.text, "logprobs": None, "finish_reason": None}

    def _finish(self, index: int, reply: Reply) -> Json:
        return {"index": index, "text": "", "logprobs": self._logprobs(reply), "finish_reason": reply.finish_reason}

    def _choice(self, index: int, reply: Reply) -> Json:
        return {**self._finish(index, reply), "text": reply.content}

    def _logprobs(self, reply: Reply) -> Json | None:
        if reply.logprobs is None:
            return None
        texts, logprobs, offsets, end = [], [], [], 0
        for text, logprob in self._scored(reply):
            texts.append(text)
            logprobs.append(logprob)
            offsets.append(end)
            end += len(text)
        return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": None, "text_offset": offsets}


def infill_answer(options: Options, name: str, filled: Infill, *, prompt_tokens: int, between: bool) -> Json:
    """As ``/v1/infill`` answers.

    Args:
        prompt_tokens: of the text that was given, without its holes.
        between: the text was given as what is before and behind one hole, whose text is then the ``content``.
    """
    best = filled.fillings[0].candidate
    new = sum(map(len, best.holes))
    return {
        "id": f"infill-{secrets.token_hex(12)}",
        "object": "infill",
        "created": int(time.time()),
        "model": name,
        "text": filled.text,
        "holes": list(filled.holes),
        **({"content": filled.holes[0]} if between else {}),
        "candidates": [
            {
                "holes": list(filling.holes),
                "lengths": list(filling.candidate.lengths),
                "canvas_logprob": max(filling.candidate.canvas_logprob, LEAST_LOGPROB),
                "causal_logprob": max(filling.candidate.causal_logprob, LEAST_LOGPROB),
            }
            for filling in filled.fillings
        ],
        "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": new, "total_tokens": prompt_tokens + new},
        "diffgemma": {
            "denoising_steps": [filling.candidate.steps for filling in filled.fillings],
            "seeds": [filled.seed],
            "ignored": list(options.ignored),
        },
    }


def encoded(content: Json) -> bytes:
    """JSON in UTF-8; what a model writes is text, and has no lone surrogates."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def server_sent(content: Json) -> bytes:
    """A server-sent event."""
    return b"data: " + encoded(content) + b"\n\n"


def _delta(index: int, delta: Json) -> Json:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _tool_call(call: ToolCall) -> Json:
    function = {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}

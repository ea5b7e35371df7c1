"""Turns the events of replies into OpenAI's JSON: a response as one object, or as the chunks of a stream."""

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

#: Stands for a log-probability of minus infinity, which JSON cannot hold.
LEAST_LOGPROB = -9999.0

Json = dict[str, Any]


class Answer:
    """The response to one request. Its choices grow with the events of their replies.

    Two subclasses hold what differs between chats and completions.

    Args:
        name: the model's name, as clients know it.
        cell: returns the text of one token.
        per_prompt: choices per prompt; the choices of one prompt follow one another.
    """

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, options: Options, name: str, cell: Callable[[int], str], choices: int, per_prompt: int) -> None:
        self.options, self.cell, self.choices, self.per_prompt = options, cell, choices, per_prompt
        self.replies: dict[int, Reply] = {}
        self._head = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": name}

    def opening(self) -> list[Json]:
        """The chunks that begin a stream."""
        return []

    def chunks(self, index: int, event: ReplyEvent) -> list[Json]:
        """The chunks for one event of one choice. Empty for a draft that the client did not request."""
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
        """The chunks that end a stream, when all replies are complete."""
        if not self.options.include_usage:
            return []
        return [{**self._chunk([]), "usage": self._usage(), "diffgemma": self._statistics()}]

    def whole(self) -> Json:
        """The response as one object, when all replies are complete."""
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
        """The text and the log-probability of each token that has a text. The end token has none."""
        for token, logprob in zip(reply.tokens, reply.logprobs or (), strict=True):
            if text := self.cell(token):
                yield text, max(logprob, LEAST_LOGPROB)


class ChatAnswer(Answer):
    """A response of ``/v1/chat/completions``."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, options: Options, name: str, cell: Callable[[int], str], choices: int, per_prompt: int) -> None:
        super().__init__(options, name, cell, choices, per_prompt)
        self._calls = [0] * choices  # tool calls sent so far, by choice

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
                "bytes": None if "\ufffd" in text else list(text.encode()),  # the token is a part of a character
                "top_logprobs": [],
            }
            for text, logprob in self._scored(reply)
        ]
        return {"content": content, "refusal": None}


class CompletionAnswer(Answer):
    """A response of ``/v1/completions``."""

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
    """The response of ``/v1/infill``.

    Args:
        prompt_tokens: tokens of the prompt, with its images, and of the given text, without its holes.
        between: whether the client sent a prefix or a suffix instead of a template. The hole's text is then also ``content``.
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
    """JSON in UTF-8. The model's text has no lone surrogates, so it can always be encoded."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def server_sent(content: Json) -> bytes:
    """A server-sent event."""
    return b"data: " + encoded(content) + b"\n\n"


def _delta(index: int, delta: Json) -> Json:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _tool_call(call: ToolCall) -> Json:
    function = {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}

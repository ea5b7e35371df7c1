"""A conversation: messages in, events out, with the KV cache kept over its turns."""

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, Unpack

from mlx_diffgemma.chat.reply import Reply, ReplyEvent, reply
from mlx_diffgemma.errors import InputError
from mlx_diffgemma.files import replace_text
from mlx_diffgemma.options import SamplerOptions, spelled_out
from mlx_diffgemma.pipeline import DiffusionGemma
from mlx_diffgemma.prefix_cache import Context, PrefixCache, read, settle
from mlx_diffgemma.settling import Settled
from mlx_diffgemma.writing import Content, Part, Reasoning, ToolCall, Writing, fresh_seed, sampling_config

#: Says in a saved file what it is.
FORMAT = "mlx-diffgemma conversation"


class Conversation:
    """Turns of a user, or of tools, and of a model.

    Only what a turn adds is encoded for it, where the chat template writes the earlier turns as they were. Where it leaves a
    thought out, what follows the last prompt is encoded again.

    Args:
        system: instructions before the first turn.
        tools: JSON schemas of functions that the model may call, as the OpenAI API has them.
        thinking: have the model think before it answers.
        kept: where the KV cache is kept; give one to several conversations to bound their memory together.

    Attributes:
        messages: of the turns so far, as the OpenAI API has them, but for a tool call's arguments, which are a mapping. They may
            be changed between two turns.
    """

    def __init__(
        self,
        model: DiffusionGemma,
        *,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = False,
        kept: PrefixCache | None = None,
    ) -> None:
        self.model, self.system, self.tools, self.thinking = model, system, tools, thinking
        self.kept = PrefixCache() if kept is None else kept
        self.messages: list[dict[str, Any]] = []

    @spelled_out
    def send(
        self,
        message: str | Mapping[str, Any] | Sequence[Mapping[str, Any]],
        *,
        mode: str = "diffusion",
        seed: int | None = None,
        stop: Sequence[str] = (),
        settled: Settled | None = None,
        logprobs: bool = False,
        stopping: Callable[[], bool] = bool,
        **options: Unpack[SamplerOptions],
    ) -> Generator[ReplyEvent]:
        """Add a turn, and have the model reply.

        When the reply is finished it is the last of the messages. Where reading stops before that, what has come of it so far
        is; where nothing has, the turn is taken back, as it is after an error.

        Args:
            message: the user's text; or a message, such as ``{"role": "tool", "tool_call_id": ..., "content": ...}``, or
                several.
            mode, seed, stop, settled, logprobs, options: as in :meth:`~mlx_diffgemma.pipeline.DiffusionGemma.stream`.
            stopping: asked after each block or token; true ends the reply there, with "length".

        Yields:
            What :func:`~mlx_diffgemma.chat.reply.reply` does. Read to the end: behind the Reply, its end is encoded for the next
            turn.

        Raises:
            InputError: when the first event is asked for; the conversation stays as it was.
        """
        writing = Writing(
            config=sampling_config(self.model.checkpoint.generation, mode, options),
            seed=fresh_seed() if seed is None else seed,
            stop=tuple(stop),
            settled=settled,
            logprobs=logprobs,
        )
        if isinstance(message, str):
            if not message.strip():
                raise InputError("the message is empty")
            message = {"role": "user", "content": message}
        before = len(self.messages)
        self.messages += [dict(one) for one in ([message] if isinstance(message, Mapping) else message)]
        said: list[Part] = []
        try:
            context = self._read(writing)
            try:
                for event in reply(self.model, context, writing, stopping=stopping):
                    if isinstance(event, Reply):
                        said = [Reasoning(event.reasoning), Content(event.content), *event.tool_calls]
                        finished = event
                    elif isinstance(event, Reasoning | Content | ToolCall):
                        said.append(event)
                    yield event
                step = writing.step(self.model.backend.config)
                settle(self.model.backend, context, finished.tokens, self.model.piece_rule, self.kept, step=step)
            finally:
                self.kept.recount(context.cache)
        finally:
            if said:
                self.messages.append(self._answer(said))
            else:
                del self.messages[before:]

    def prompt(self) -> str:
        """What the chat template makes of the messages so far."""
        return self.model.tokenizer.render(self._all(), tools=self.tools, enable_thinking=self.thinking)

    def _read(self, writing: Writing) -> Context:
        ids = self.model.tokenizer.chat(self._all(), tools=self.tools, enable_thinking=self.thinking)
        tokens = self.model.prompt_ids(ids)
        writing.check(self.model.backend.config, tokens)  # before a long prompt is read
        return read(self.model.backend, tokens, self.model.piece_rule, self.kept)

    def _all(self) -> list[dict[str, Any]]:
        return [*([] if self.system is None else [{"role": "system", "content": self.system}]), *self.messages]

    def _answer(self, said: Sequence[Part]) -> dict[str, Any]:
        """The assistant's message of what it said."""
        answer: dict[str, Any] = {
            "role": "assistant",
            "content": "".join(part.text for part in said if isinstance(part, Content)),
        }
        if reasoning := "".join(part.text for part in said if isinstance(part, Reasoning)):
            answer["reasoning_content"] = reasoning
        if calls := [part for part in said if isinstance(part, ToolCall)]:
            earlier = sum(len(message.get("tool_calls", ())) for message in self.messages)
            answer["tool_calls"] = [
                {"id": f"call_{number}", "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for number, call in enumerate(calls, start=earlier)
            ]
        return answer

    def save(self, file: Path) -> None:
        """Write the messages, the system text, the tools and whether it thinks, as JSON, to a new file or in place of an old one.

        Raises OSError; an old file is then as it was.
        """
        content = {
            "format": FORMAT,
            "system": self.system,
            "tools": self.tools,
            "thinking": self.thinking,
            "messages": self.messages,
        }
        replace_text(file, json.dumps(content, ensure_ascii=False, indent=1) + "\n")

    @classmethod
    def load(cls, model: DiffusionGemma, file: Path, *, kept: PrefixCache | None = None) -> Self:
        """A conversation as :meth:`save` wrote it. Raises OSError, or InputError where it is no such file."""
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as wrong:  # of the JSON, or of its UTF-8; or it is nested without end
            raise InputError(f"{file}: not a saved conversation: {wrong}") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise InputError(f"{file}: not a saved conversation; one is written by /save in mlx-diffgemma chat")
        system, tools, thinking, messages = (content.get(name) for name in ("system", "tools", "thinking", "messages"))
        if (
            not isinstance(system, str | None)
            or not isinstance(tools, list | None)
            or not isinstance(thinking, bool)
            or not isinstance(messages, list)
            or not all(isinstance(message, dict) and isinstance(message.get("tool_calls", []), list) for message in messages)
        ):
            raise InputError(f"{file}: a saved conversation, but damaged: a field is missing or of another type")
        loaded = cls(model, system=system, tools=tools, thinking=thinking, kept=kept)
        loaded.messages = messages
        if messages:
            loaded.prompt()  # raises for messages of the wrong form
        return loaded

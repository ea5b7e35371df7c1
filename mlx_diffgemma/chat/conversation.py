"""Conversations: take messages and yield events, and keep the KV cache over the turns."""

import json
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Self, Unpack

from mlx_diffgemma.arguments import checked
from mlx_diffgemma.chat.reply import Reply, ReplyEvent, reply
from mlx_diffgemma.errors import ComputationError, InputError
from mlx_diffgemma.files import replace_text
from mlx_diffgemma.options import SamplerOptions, spelled_out
from mlx_diffgemma.pipeline import DiffusionGemma
from mlx_diffgemma.prefix_cache import Context, PrefixCache, read, settle
from mlx_diffgemma.settling import Settled
from mlx_diffgemma.steps import run
from mlx_diffgemma.vision.media import split_media
from mlx_diffgemma.vision.saved import media_from_json, media_to_json, with_parts
from mlx_diffgemma.vision.sources import with_images
from mlx_diffgemma.writing import Content, Part, Reasoning, ToolCall, Writing, fresh_seed, sampling_config

#: The value of ``format`` in a saved conversation.
FORMAT = "mlx-diffgemma conversation"


class Conversation:
    """The turns of a user (or of tools) and a model.

    Each turn encodes only its new tokens, as long as the chat template renders the earlier turns unchanged. If the template
    leaves out a thought, everything after the last prompt is encoded again.

    A conversation writes one reply at a time. While it does, another turn is an InputError, in any thread.

    Args:
        system: instructions before the first turn.
        tools: JSON schemas of functions that the model may call, in the form of the OpenAI API.
        thinking: let the model think before it replies.
        kept: the prefix cache that keeps the KV cache. Several conversations can share one, which limits their memory together.

    Attributes:
        messages: the messages of the turns so far, in the form of the OpenAI API, except that a tool call's arguments are a
            mapping, and that images and videos are kept as they were read:
            ``{"type": "image", "image": Picture}`` and ``{"type": "video", "video": Film}``. They may be changed between two
            turns. New images may be in any form that ``send`` takes.
    """

    @checked
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
        self._replying = threading.Lock()

    @spelled_out
    @checked
    def send(
        self,
        message: str | Mapping[str, Any] | Sequence[Mapping[str, Any]],
        *,
        images: Sequence[Any] = (),
        mode: str = "diffusion",
        seed: int | None = None,
        stop: Sequence[str] = (),
        settled: Settled | None = None,
        logprobs: bool = False,
        stopping: Callable[[], bool] = bool,
        **options: Unpack[SamplerOptions],
    ) -> Generator[ReplyEvent]:
        """Add a turn, and yield the model's reply.

        The finished reply becomes the last message. If you stop reading early, or after an error, the part of the reply so far
        becomes the last message. If there is no such part, the turn is removed.

        Args:
            message: the user's text, a message such as ``{"role": "tool", "tool_call_id": ..., "content": ...}``, or a list of
                messages. The content may have parts with images and videos; see :mod:`mlx_diffgemma.vision.media`.
            images: images and videos that come before the text of the message, as in
                :meth:`~mlx_diffgemma.pipeline.DiffusionGemma.stream`. They are read once, and stay as they are if a file changes.
            mode, seed, stop, settled, logprobs, options: as in :meth:`~mlx_diffgemma.pipeline.DiffusionGemma.stream`.
            stopping: called after each block or token. If it returns true, the reply ends there, with finish reason "length".

        Yields:
            The events of :func:`~mlx_diffgemma.chat.reply.reply`. Read to the end: after the Reply, the end of the reply is
            encoded for the next turn.

        Raises:
            InputError: by this call itself for an argument of the wrong type, else when the first event is requested. The
                conversation is then unchanged.
            ComputationError: the model computed NaN or infinity.
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
        with self._alone():
            before = len(self.messages)
            added = with_images([message] if isinstance(message, Mapping) else message, images)
            self.messages[:] = self._with_media([*self.messages, *map(dict, added)])
            said: list[Part] = []
            try:
                with closing(self._reply(writing, stopping)) as events:
                    for event in events:
                        if isinstance(event, Reply):
                            said = [Reasoning(event.reasoning), Content(event.content), *event.tool_calls]
                        elif isinstance(event, Reasoning | Content | ToolCall):
                            said.append(event)
                        yield event
            finally:
                if said:
                    self.messages.append(self._answer(said))
                else:
                    del self.messages[before:]

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Raise InputError while another reply is written."""
        if not self._replying.acquire(blocking=False):
            raise InputError(
                "this conversation is writing a reply, here or in another thread; read that one to its end or close it first, or "
                "use another conversation"
            )
        try:
            yield
        finally:
            self._replying.release()

    def _reply(self, writing: Writing, stopping: Callable[[], bool]) -> Generator[ReplyEvent]:
        """Reply to the messages, and then encode the end of the reply for the next turn."""
        context = self._read(writing)
        try:
            for event in reply(self.model, context, writing, stopping=stopping):
                if isinstance(event, Reply):
                    finished = event
                yield event
            step = writing.step(self.model.backend.config)
            settle(self.model.backend, context, finished.tokens, self.model.piece_rule, self.kept, step=step)
        except ComputationError:
            self.kept.forget(context)
            raise
        finally:
            self.kept.recount(context.cache)

    def prompt(self) -> str:
        """The messages so far, rendered by the chat template. An image is ``<|image|>`` in it, and a video ``<|video|>``."""
        messages, _ = split_media(self._all(), self.model.config.vision)
        return self.model.tokenizer.render(messages, tools=self.tools, enable_thinking=self.thinking)

    def _with_media(self, messages: Sequence[Any]) -> list[Any]:
        """The messages with the Picture or Film of each image and video, which is read unless it is one already."""
        config = self.model.config
        split, media = split_media(messages, config.vision, max_soft_tokens=config.max_position_embeddings)
        found = iter(media)

        def kept(part: Any, _: str) -> Any:
            kind = part.get("type") if isinstance(part, Mapping) else None
            return {"type": kind, kind: next(found)} if kind in ("image", "video") else part

        return with_parts(split, kept)

    def _read(self, writing: Writing) -> Context:
        prompt = run(self.model.prompt_steps(self._all(), tools=self.tools, enable_thinking=self.thinking))
        writing.check(self.model.backend.config, prompt.ids)  # raises before a long prompt is encoded
        return read(self.model.backend, prompt, self.model.piece_rule, self.kept)

    def _all(self) -> list[dict[str, Any]]:
        return [*([] if self.system is None else [{"role": "system", "content": self.system}]), *self.messages]

    def _answer(self, said: Sequence[Part]) -> dict[str, Any]:
        """The assistant's message with these parts."""
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

    @checked
    def save(self, file: Path) -> None:
        """Save the messages, ``system``, ``tools`` and ``thinking`` as JSON. Replaces an existing file.

        Images and videos are saved as the model sees them, with every pixel.

        Raises OSError, or InputError if a message is no JSON or has an image that cannot be read. An existing file is then
        unchanged.
        """
        content = {
            "format": FORMAT,
            "system": self.system,
            "tools": self.tools,
            "thinking": self.thinking,
            "messages": media_to_json(self._with_media(self.messages)),
        }
        try:
            text = json.dumps(content, ensure_ascii=False, indent=1)
        except (TypeError, ValueError, RecursionError) as wrong:
            raise InputError(f"a message or tool cannot be saved as JSON: {wrong}") from None
        replace_text(file, text + "\n")

    @classmethod
    @checked
    def load(cls, model: DiffusionGemma, file: Path, *, kept: PrefixCache | None = None) -> Self:
        """Load a conversation that :meth:`save` wrote. Raises OSError, or InputError if the file is not a saved conversation."""
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as wrong:  # not JSON, not UTF-8, or nested too deep
            raise InputError(f"{file}: not a saved conversation: {wrong}") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise InputError(f"{file}: not a saved conversation; write one with /save in mlx-diffgemma chat")
        system, tools, thinking, messages = (content.get(name) for name in ("system", "tools", "thinking", "messages"))
        if (
            not isinstance(system, str | None)
            or not isinstance(tools, list | None)
            or not isinstance(thinking, bool)
            or not isinstance(messages, list)
            or not all(isinstance(message, dict) and isinstance(message.get("tool_calls", []), list) for message in messages)
        ):
            raise InputError(f"{file}: this saved conversation is damaged: a field is missing or has the wrong type")
        loaded = cls(model, system=system, tools=tools, thinking=thinking, kept=kept)
        try:
            loaded.messages = media_from_json(messages, model.config.vision, model.config.max_position_embeddings)
        except InputError as damaged:
            raise InputError(f"{file}: {damaged}") from None
        if messages:
            loaded.prompt()  # raises if messages have the wrong form
        return loaded

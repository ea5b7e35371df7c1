"""Request bodies: checks the JSON, and turns it into our own options.

There are three kinds of fields. Known fields are checked strictly. OpenAI's fields that the server cannot support (a response
format, a penalty, audio) are refused, unless they ask for nothing. All other fields are ignored; their names are in
:attr:`Options.ignored`, and the response repeats them.

The first mistake raises an :class:`~mlx_diffgemma.server.errors.ApiError`: one line that names the field.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError, from_json

from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.editing.infilling import LEAST, MARKER, MOST, Hole
from mlx_diffgemma.errors import InputError
from mlx_diffgemma.presets import factors
from mlx_diffgemma.server import parts
from mlx_diffgemma.server.errors import ApiError
from mlx_diffgemma.server.messages import Message, Tool, check_conversation, levels, template_messages
from mlx_diffgemma.server.settings import Settings

#: How deep objects and lists may be nested. Templates walk them on Python's own stack.
MAX_DEPTH = 32
#: Choices that one request may ask for, over all its prompts.
MAX_CHOICES = 16
#: A temperature below this counts as 0, which is greedy: float32 logits divided by a smaller number may overflow.
MIN_TEMPERATURE = 1e-3
#: Ignored fields that a response names at most, and the characters that it repeats of a field's name.
MAX_IGNORED, MAX_NAME = 32, 100


@dataclass(frozen=True)
class Options:
    """How to answer a request, on any route.

    Attributes:
        model: the model's name in the request; None if the request has none.
        mode: ``diffusion`` or ``causal``.
        seed: seed of the first choice, 0 to 2^64 - 1; choice i takes seed + i. None for a random seed.
        stop: texts that end the reply, and are not part of it.
        max_tokens: tokens to write at most; None for the server's default.
        temperature: 0 to 2; its meaning depends on the mode, see :meth:`sampling`.
        stream: send the response as server-sent events; the next three options are for streams only.
        include_usage: end the stream with the usage figures.
        drafts: send the whole canvas after every denoising step.
        settled: send text as soon as the front of a canvas has settled, not a block at a time.
        cache_salt: only requests with the same salt share the prefix cache.
        ignored: names of fields that had no effect.
    """

    model: str | None = None
    mode: str = "diffusion"
    n: int = 1
    seed: int | None = None
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_denoising_steps: int | None = None
    preset: str | None = None
    logprobs: bool = False
    stream: bool = False
    include_usage: bool = False
    drafts: bool = False
    settled: bool = True
    cache_salt: str | None = None
    ignored: tuple[str, ...] = ()

    def sampling(self, generation: GenerationConfig, preset: str | None = None) -> dict[str, Any]:
        """The sampler's options, without the length, that override those of the checkpoint.

        ``preset`` is that of requests that name none. It has no effect in the causal mode.

        A temperature of 0 is greedy in both modes. In the diffusion mode, any other temperature scales both ends of the
        checkpoint's schedule, so that 1 is the checkpoint's own. In the causal mode it is the usual temperature.
        """
        if self.temperature is not None and self.temperature < MIN_TEMPERATURE:
            tempered: dict[str, Any] = {"greedy": True}
        elif self.temperature is None:
            tempered = {}
        elif self.mode == "causal":
            tempered = {"temperature": float(self.temperature), "greedy": False}
        else:
            scale = self.temperature
            tempered = {"t_min": generation.t_min * scale, "t_max": generation.t_max * scale, "greedy": False}
        if self.mode == "causal":
            return {**tempered, "top_p": self.top_p, "top_k": self.top_k}
        return {**tempered, "max_denoising_steps": self.max_denoising_steps, "preset": self.preset or preset}


@dataclass(frozen=True)
class ChatRequest:
    """A conversation to reply to, with messages and tools in the form that the chat template reads.

    The messages have their images and videos in the form of :mod:`mlx_diffgemma.server.parts`.
    """

    messages: parts.Messages
    tools: tuple[dict[str, Any], ...]
    thinking: bool
    options: Options

    def with_sources(self, change: Callable[[Any], Any]) -> "ChatRequest":
        """The request, with ``change`` applied to the source of each image and video."""
        return replace(self, messages=parts.with_sources(self.messages, change))


@dataclass(frozen=True)
class CompletionRequest:
    """Raw prompts to continue: texts, or token ids."""

    prompts: tuple[str | tuple[int, ...], ...]
    options: Options
    messages: parts.Messages = ()

    def with_sources(self, change: Callable[[Any], Any]) -> "CompletionRequest":
        """The request itself: raw prompts have no images."""
        return self


@dataclass(frozen=True)
class InfillRequest:
    """A text with holes; ``template``, ``marker``, ``prompt``, ``raw`` and ``system`` as in
    :func:`mlx_diffgemma.editing.infilling.infill`. ``between`` says that the client sent a prefix or a suffix, not a template."""

    template: str | tuple[str | Hole, ...]
    marker: str
    prompt: str | parts.Messages | None
    raw: bool
    system: str | None
    between: bool
    canvas_length: int | None
    options: Options

    @property
    def messages(self) -> parts.Messages:
        """The messages of the prompt, if it is a conversation."""
        return self.prompt if isinstance(self.prompt, tuple) else ()

    def with_sources(self, change: Callable[[Any], Any]) -> "InfillRequest":
        """The request, with ``change`` applied to the source of each image and video."""
        return replace(self, prompt=parts.with_sources(self.messages, change)) if self.messages else self


def _one_or_more(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _prompts(value: Any) -> Any:
    """Put a single text, or a single list of token ids, into a list."""
    is_ids = isinstance(value, list) and value and all(type(token) is int for token in value)
    return [value] if isinstance(value, str) or is_ids else value


def _prompt(value: Any) -> str | list[int]:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(type(token) is int for token in value):
        return value
    raise PydanticCustomError("prompt", "a prompt must be a string or a list of token ids, and must not be empty")


def _preset(value: str) -> str:
    try:
        factors(value)
    except InputError as unknown:
        raise PydanticCustomError("preset", "{message}", {"message": str(unknown)}) from None
    return value


Text = Annotated[str, Field(min_length=1)]
Preset = Annotated[str, Field(max_length=64), AfterValidator(_preset)]
Stop = Annotated[list[Annotated[str, Field(min_length=1, max_length=1024)]], Field(max_length=16), BeforeValidator(_one_or_more)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
Count = Annotated[int, Field(ge=1, lt=2**31)]


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    include_usage: bool | None = None
    drafts: bool | None = None
    settled: bool | None = None


class _TemplateOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    enable_thinking: bool | None = None


class _Body(BaseModel):
    """Fields that all three routes share."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    model: str | None = None
    seed: Seed | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    max_denoising_steps: Count | None = None
    preset: Preset | None = None
    stream: bool | None = None


class _Generating(_Body):
    """Fields that chats and completions share."""

    mode: Literal["diffusion", "causal"] = "diffusion"
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Stop | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None
    max_tokens: Count | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: int | None = None
    stream_options: _StreamOptions | None = None


class _ChatBody(_Generating):
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    chat_template_kwargs: _TemplateOptions | None = None
    reasoning_effort: str | None = None

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _not_forced(cls, value: Any) -> Any:
        if value is None or value in ("auto", "none"):
            return value
        raise PydanticCustomError("tool_choice", "a tool call cannot be forced; tool_choice must be auto or none")


class _CompletionBody(_Generating):
    prompt: Annotated[
        list[Annotated[Any, BeforeValidator(_prompt)]], Field(min_length=1, max_length=MAX_CHOICES), BeforeValidator(_prompts)
    ]
    logprobs: Annotated[int, Field(ge=0, le=0)] | None = None


class _InfillBody(_Body):
    template: Text | None = None
    marker: Annotated[str, Field(max_length=64)] = MARKER
    prefix: str | None = None
    suffix: str | None = None
    min_hole_tokens: Count = LEAST
    max_hole_tokens: Count = MOST
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)] | None = None
    raw: bool = False
    system: str | None = None
    canvas_length: Count | None = None


def _nothing(value: Any) -> bool:
    return not value


def _text_only(value: Any) -> bool:
    """Whether a reply of text is asked for."""
    return value in (None, ["text"], {"type": "text"})


#: OpenAI's fields that the server cannot support. For each: whether a value asks for nothing, and why others are refused.
_UNSUPPORTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "response_format": (_text_only, "the server can only promise plain text"),
    "modalities": (_text_only, "the model writes text only"),
    "audio": (_nothing, "the model writes text only"),
    "frequency_penalty": (_nothing, "the sampler has no penalties"),
    "presence_penalty": (_nothing, "the sampler has no penalties"),
    "logit_bias": (_nothing, "the sampler has no biases"),
    "top_logprobs": (_nothing, "only the written tokens have log-probabilities"),
    "functions": (_nothing, "use tools instead"),
    "function_call": (lambda value: value in (None, "auto", "none"), "use tools instead"),
    "web_search_options": (lambda value: value is None, "the server has no web search"),
}
_UNSUPPORTED_IN_COMPLETIONS = _UNSUPPORTED | {
    "suffix": (_nothing, "use /v1/infill, which takes a prefix and a suffix"),
    "echo": (_nothing, "the prompt is not repeated"),
    "best_of": (lambda value: value in (None, 1), "ask for more choices with n"),
}
_UNSUPPORTED_IN_INFILLS = _UNSUPPORTED | {
    "stream": (_nothing, "the lengths of the holes are not known until the end"),
    "n": (lambda value: value in (None, 1), "the response has every length that was tried"),
    "mode": (lambda value: value in (None, "diffusion"), "holes are filled by diffusion"),
}


def read_json(body: bytes | bytearray, max_values: int = 1 << 20) -> dict[str, Any]:
    """The JSON object of a body.

    Raises ApiError for other JSON, too many levels, invalid numbers or text, and more than ``max_values`` values: each takes many
    times the memory of its text. Images, as base64, have none of the characters that separate values.
    """
    if sum(body.count(separator) for separator in (b",", b"[", b"{")) > max_values:
        raise ApiError(413, f"the body has more than {max_values} values", code="body_too_large")
    try:
        content = from_json(body, allow_inf_nan=False)
    except ValueError as wrong:
        raise ApiError(400, f"the body is not JSON: {wrong}") from None
    if not isinstance(content, dict):
        raise ApiError(400, "the body must be a JSON object")
    check_values(content)
    return content


def check_media(
    asked: "ChatRequest | CompletionRequest | InfillRequest", body: bytes | bytearray, limits: Settings, *, reads_images: bool
) -> None:
    """Refuse images and videos that the model does not read, and a request whose text or whose images are too large.

    Args:
        body: the body that the request was read from.
    """
    media = list(parts.media(asked.messages))
    if media and not reads_images:
        raise ApiError(400, "this model reads text only; leave the images out", code="unsupported_value")
    size = sum(len(each.source) for each in media)
    if size > limits.max_image_bytes:
        message = f"the images have {size} bytes as sent, more than this server's limit of {limits.max_image_bytes}"
        raise ApiError(413, message, code="images_too_large")
    text = len(body) - size - body.count(rb"\/")  # some clients write the slashes of base64 so
    if text > limits.max_body:
        message = f"the body has {text} bytes without its images, more than this server's limit of {limits.max_body}"
        raise ApiError(413, message, code="body_too_large")


def web_urls(asked: "ChatRequest | CompletionRequest | InfillRequest") -> list[str]:
    """The URLs of a request's images and videos that must be fetched, each once."""
    return list(dict.fromkeys(each.source for each in parts.media(asked.messages) if parts.is_web(each.source)))


def check_values(content: Any) -> None:
    """Refuse values nested deeper than :data:`MAX_DEPTH`, and numbers too large for a float."""
    for depth, level in enumerate(levels(content)):
        if depth > MAX_DEPTH:
            raise ApiError(400, f"the body is nested more than {MAX_DEPTH} levels deep")
        if any(isinstance(value, float) and not math.isfinite(value) for value in level):
            raise ApiError(400, "the body has a number that is out of range")


def chat_request(content: dict[str, Any]) -> ChatRequest:
    """The body of ``/v1/chat/completions``."""
    body = _parsed(_ChatBody, content, _UNSUPPORTED)
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise ApiError(400, "max_tokens and max_completion_tokens differ; send only one", param="max_tokens")
    check_conversation(body.messages)
    ignored = [] if body.parallel_tool_calls is not False else ["parallel_tool_calls"]
    thinking = body.chat_template_kwargs.enable_thinking if body.chat_template_kwargs else None
    if thinking is None:
        thinking = body.reasoning_effort not in (None, "none")
    tools = [] if body.tool_choice == "none" else body.tools or []
    return ChatRequest(
        messages=template_messages(body.messages),
        tools=tuple(tool.for_template() for tool in tools),
        thinking=thinking,
        options=_options(body, body.max_completion_tokens or body.max_tokens, bool(body.logprobs), ignored),
    )


def completion_request(content: dict[str, Any]) -> CompletionRequest:
    """The body of ``/v1/completions``."""
    body = _parsed(_CompletionBody, content, _UNSUPPORTED_IN_COMPLETIONS)
    if (body.n or 1) * len(body.prompt) > MAX_CHOICES:
        message = f"{len(body.prompt)} prompts with {body.n} choices each are too many; a request may have {MAX_CHOICES} in all"
        raise ApiError(400, message, param="n")
    prompts = (prompt if isinstance(prompt, str) else tuple(prompt) for prompt in body.prompt)
    return CompletionRequest(tuple(prompts), _options(body, body.max_tokens, body.logprobs is not None, []))


def infill_request(content: dict[str, Any]) -> InfillRequest:
    """The body of ``/v1/infill``."""
    body = _parsed(_InfillBody, content, _UNSUPPORTED_IN_INFILLS)
    between = body.template is None
    if between == (body.prefix is None and body.suffix is None):
        raise ApiError(400, "send either a template with holes, or a prefix, a suffix or both", param="template")
    if body.prompt is not None and body.messages is not None:
        raise ApiError(400, "send a prompt or messages or neither, not both", param="prompt")
    if body.raw and (body.messages is not None or body.system is not None):
        raise ApiError(400, "a raw text has no chat; leave out raw, or leave out messages and system", param="raw")
    if body.min_hole_tokens > body.max_hole_tokens:
        message = f"min_hole_tokens {body.min_hole_tokens} exceeds max_hole_tokens {body.max_hole_tokens}"
        raise ApiError(400, message, param="min_hole_tokens")
    template: str | tuple[str | Hole, ...] = body.template or ""
    if between:
        hole = Hole(body.min_hole_tokens, body.max_hole_tokens)
        template = tuple(part for part in (body.prefix or "", hole, body.suffix or "") if part)
    if body.messages is not None:
        check_conversation(body.messages)
    options = Options(
        model=body.model,
        seed=_seed(body.seed),
        temperature=body.temperature,
        max_denoising_steps=body.max_denoising_steps,
        preset=body.preset,
        ignored=tuple(_ignored(body))[:MAX_IGNORED],
    )
    prompt = body.prompt if body.messages is None else template_messages(body.messages)
    return InfillRequest(template, body.marker, prompt, body.raw, body.system, between, body.canvas_length, options)


def _options(body: _Generating, max_tokens: int | None, logprobs: bool, ignored: Sequence[str]) -> Options:
    stream = body.stream_options or _StreamOptions()
    causal = body.mode == "causal"
    top_k = body.top_k if body.top_k is not None and body.top_k > 0 else None  # other servers take 0 or -1 for no limit
    without_effect = {
        "top_p": not causal and body.top_p not in (None, 1),
        "top_k": not causal and top_k is not None,
        "max_denoising_steps": causal and body.max_denoising_steps is not None,
        "preset": causal and body.preset is not None,
    }
    names = [*ignored, *(name for name, has_none in without_effect.items() if has_none), *_ignored(body)]
    return Options(
        model=body.model,
        mode=body.mode,
        n=body.n or 1,
        seed=_seed(body.seed),
        stop=tuple(body.stop or ()),
        max_tokens=max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=top_k,
        max_denoising_steps=body.max_denoising_steps,
        preset=body.preset,
        logprobs=logprobs,
        stream=bool(body.stream),
        include_usage=bool(stream.include_usage),
        drafts=bool(stream.drafts) and bool(body.stream),
        settled=stream.settled is not False,
        cache_salt=body.cache_salt,
        ignored=tuple(names)[:MAX_IGNORED],
    )


def _seed(seed: int | None) -> int | None:
    """The same bits without a sign: OpenAI's seeds are signed, ours are not."""
    return None if seed is None else seed % 2**64


Body = TypeVar("Body", bound=BaseModel)


def _parsed(kind: type[Body], content: Mapping[str, Any], unsupported: Mapping[str, tuple[Callable[[Any], bool], str]]) -> Body:
    for name, (asks_nothing, reason) in unsupported.items():
        if name in content and not asks_nothing(content[name]):
            raise ApiError(400, f"{name} is not supported: {reason}", param=name, code="unsupported_value")
    try:
        return kind.model_validate({name: value for name, value in content.items() if name not in unsupported})
    except ValidationError as wrong:
        first = wrong.errors(include_url=False, include_input=False, include_context=False)[0]
        param = _place(first["loc"])
        raise ApiError(400, f"{param}: {first['msg'][:1].lower()}{first['msg'][1:]}", param=param) from None


def _place(location: Sequence[str | int]) -> str:
    """The path of a field, written as in JavaScript: ``messages[0].content``."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step[:MAX_NAME]}" for step in location).lstrip(".")


def _ignored(model: BaseModel, prefix: str = "") -> Iterator[str]:
    """The names of a body's unknown fields, including those inside known fields, each once."""
    seen = set()
    for name in (name[:MAX_NAME] for name in _unknown(model, prefix)):
        if name not in seen:
            seen.add(name)
            yield name


def _unknown(model: BaseModel, prefix: str) -> Iterator[str]:
    yield from (prefix + name for name in model.model_extra or {})
    for name in type(model).model_fields:
        value = getattr(model, name)
        parts = value if isinstance(value, list) else [value]
        for part in parts:
            if isinstance(part, BaseModel):
                yield from _unknown(part, f"{prefix}{name}{'[]' if isinstance(value, list) else ''}.")

"""The messages and tools of a request: checks them, and turns them into the form that a chat template reads."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError, from_json

from mlx_diffgemma.server import parts
from mlx_diffgemma.server.errors import ApiError

#: How deep a tool's schema and a call's arguments may be nested.
MAX_DEPTH = 24

_NAME = Field(pattern=r"^[a-zA-Z0-9_.\-]{1,64}$")


def _arguments(value: Any) -> dict[str, Any]:
    """The arguments of a call: JSON in a string, as OpenAI writes it, or an object."""
    if isinstance(value, str):
        try:
            value = from_json(value.strip() or "{}", allow_inf_nan=False)
        except ValueError:
            raise PydanticCustomError("arguments", "the arguments are not valid JSON") from None
    if not isinstance(value, dict):
        raise PydanticCustomError("arguments", "the arguments must be a JSON object")
    return _not_too_deep(value)


def levels(value: Any) -> Iterator[list[Any]]:
    """Yields [value], then all values inside it, then all values inside those, through objects and lists. Not recursive."""
    level = [value]
    while level:
        yield level
        inner = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list))
        level = [each for values in inner for each in values]


def _not_too_deep(value: dict[str, Any]) -> dict[str, Any]:
    for depth, _ in enumerate(levels(value)):
        if depth == MAX_DEPTH:
            raise PydanticCustomError("depth", f"nested more than {MAX_DEPTH} levels deep")
    return value


def _schema(value: Any) -> Any:
    """Check that a JSON schema has, at every depth, the form that a chat template expects without checking."""
    if not isinstance(value, dict):
        raise PydanticCustomError("schema", "must be a JSON schema, which is an object")
    schemas: list[dict[str, Any]] = [_not_too_deep(value)]
    while schemas:
        schema = schemas.pop()
        properties = schema.get("properties", {})
        if not isinstance(properties, dict) or not all(isinstance(each, dict) for each in properties.values()):
            raise PydanticCustomError("schema", "properties must be an object of JSON schemas")
        if not isinstance(schema.get("description", ""), str):
            raise PydanticCustomError("schema", "a description must be a string")
        kinds = schema.get("type", "object")
        if not isinstance(kinds, str) and not (isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)):
            raise PydanticCustomError("schema", "a type must be a string or a list of strings")
        required = schema.get("required", [])
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise PydanticCustomError("schema", "required must be a list of names")
        items = schema.get("items", {})
        if not isinstance(items, dict):
            raise PydanticCustomError("schema", "items must be a JSON schema, which is an object")
        schemas += [*properties.values(), *([items] if items else [])]
    return value


class _Function(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    name: Annotated[str, _NAME]
    description: str | None = None
    parameters: Annotated[dict[str, Any], BeforeValidator(_schema)] | None = None


class Tool(BaseModel):
    """A function that the model may call."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["function"]
    function: _Function

    def for_template(self) -> dict[str, Any]:
        """The tool in the form that a chat template reads. Templates expect a description."""
        function: dict[str, Any] = {"name": self.function.name, "description": self.function.description or ""}
        if self.function.parameters is not None:
            function["parameters"] = self.function.parameters
        return {"type": "function", "function": function}


class _Called(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    name: Annotated[str, _NAME]
    arguments: Annotated[dict[str, Any], BeforeValidator(_arguments)]


class _Call(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    id: Annotated[str, Field(min_length=1, max_length=256)]
    type: Literal["function"] = "function"
    function: _Called

    def for_template(self) -> dict[str, Any]:
        function = {"name": self.function.name, "arguments": self.function.arguments}
        return {"id": self.id, "type": "function", "function": function}


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | list[Any] | None, BeforeValidator(parts.content)] = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[_Call], Field(max_length=128)] | None = None
    tool_call_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    refusal: None = None

    def for_template(self) -> dict[str, Any]:
        """The message in the form that a chat template reads: arguments are a mapping, and missing fields are left out."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.role == "assistant":
            if self.reasoning_content:
                message["reasoning_content"] = self.reasoning_content
            if self.tool_calls:
                message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        elif self.role == "tool":
            message["tool_call_id"] = self.tool_call_id
        return message


def check_conversation(messages: Sequence[Message]) -> None:
    """Refuse messages without a field that their role needs, tool results without a tool call, and images of the assistant."""
    called: set[str] = set()
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        called |= {call.id for call in message.tool_calls or ()}
        if message.tool_calls and message.role != "assistant":
            raise ApiError(400, f"{where}.tool_calls: only the assistant can call tools", param=f"{where}.tool_calls")
        if message.content is None and not (message.role == "assistant" and message.tool_calls):
            raise ApiError(400, f"{where}.content is missing", param=f"{where}.content")
        if message.role == "assistant" and parts.has_media(message.content):
            told = "the assistant writes text only; put images and videos into a message of the user, or into a tool's result"
            raise ApiError(400, f"{where}.content: {told}", param=f"{where}.content")
        if message.role == "tool" and message.tool_call_id not in called:
            raise ApiError(
                400, f"{where}.tool_call_id matches no tool call in the messages before it", param=f"{where}.tool_call_id"
            )


def template_messages(messages: Sequence[Message]) -> tuple[dict[str, Any], ...]:
    """The messages in the form that a chat template reads."""
    return tuple(message.for_template() for message in messages)

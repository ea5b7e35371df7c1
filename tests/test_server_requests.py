"""Request bodies: how they are read, and the errors for invalid ones."""

import json
from typing import Any

import pytest

from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.editing.infilling import Hole
from mlx_diffgemma.server.errors import ApiError
from mlx_diffgemma.server.requests import MAX_DEPTH, Options, chat_request, completion_request, infill_request, read_json

USER = {"role": "user", "content": "Hi"}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": [1, "y"]}'}}


def chat(**body: Any) -> Any:
    return chat_request({"messages": [USER], **body})


def test_what_editors_send() -> None:
    """Fields that clients send by default. Some have no effect here."""
    request = chat(
        model="m", stream=True, stream_options={"include_usage": True, "x": 1}, parallel_tool_calls=False, top_p=0.9, user="u",
        metadata={"a": "b"}, reasoning_effort="low", frequency_penalty=0, presence_penalty=0.0, logit_bias={}, n=None, stop=None,
        response_format={"type": "text"}, tools=[], tool_choice="auto", temperature=1, store=False, top_logprobs=0, seed=None,
    )  # fmt: skip
    assert request.thinking
    assert request.options == Options(
        model="m", stream=True, include_usage=True, temperature=1, top_p=0.9,
        ignored=("parallel_tool_calls", "top_p", "user", "metadata", "store", "stream_options.x"),
    )  # fmt: skip
    assert not chat(reasoning_effort="none").thinking
    assert not chat(reasoning_effort="high", chat_template_kwargs={"enable_thinking": False}).thinking
    assert not chat().thinking


def test_messages_become_the_template_s() -> None:
    body = {
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "Be brief", "cache_control": {}}]},
            USER | {"name": "Ann"},
            {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "Hm.", "refusal": None},
            {"role": "tool", "tool_call_id": "a", "content": "1"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    }
    request = chat_request(body)
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": {"x": [1, "y"]}}}
    assert request.messages == (
        {"role": "developer", "content": [{"type": "text", "text": "Be brief"}]},
        USER,
        {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [call]},
        {"role": "tool", "content": "1", "tool_call_id": "a"},
    )
    assert request.tools == (
        {"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}},
    )
    assert request.options.ignored == ("messages[].name",)
    assert chat_request(body | {"tool_choice": "none"}).tools == ()


def test_strict_tools_are_taken_as_others() -> None:
    """Agents request strict tools by default. The response says that strict is ignored."""
    tool = {"type": "function", "function": {"name": "f", "strict": True}}
    assert chat(tools=[tool]).options.ignored == ("tools[].function.strict",)


def test_seeds_stops_and_lengths() -> None:
    assert [chat(seed=seed).options.seed for seed in (0, 2**64 - 1, -1, -(2**63))] == [0, 2**64 - 1, 2**64 - 1, 2**63]
    assert [chat(stop=stop).options.stop for stop in ("a", ["a", "b"], [])] == [("a",), ("a", "b"), ()]
    assert chat(max_tokens=3).options.max_tokens == chat(max_completion_tokens=3).options.max_tokens == 3
    assert completion_request({"prompt": "a"}).prompts == ("a",)
    assert completion_request({"prompt": [1, 2]}).prompts == ((1, 2),)
    assert completion_request({"prompt": ["a", [1]], "n": 8}).prompts == ("a", (1,))
    assert completion_request({"prompt": "a", "logprobs": 0}).options.logprobs


def test_temperature_scales_the_schedule() -> None:
    own = GenerationConfig(t_min=0.4, t_max=0.8)
    assert Options(temperature=0.5).sampling(own) == {
        "t_min": 0.2, "t_max": 0.4, "greedy": False, "max_denoising_steps": None, "preset": None
    }  # fmt: skip
    for tiny in (0, 1e-300):
        assert Options(temperature=tiny).sampling(own)["greedy"]
        assert Options(temperature=tiny, mode="causal").sampling(own)["greedy"]
    assert "greedy" not in Options().sampling(own)
    causal = Options(temperature=0.5, mode="causal", top_p=0.5, top_k=3).sampling(own)
    assert causal == {"temperature": 0.5, "greedy": False, "top_p": 0.5, "top_k": 3}


def test_infills() -> None:
    template = infill_request({"template": "a [x] b", "marker": "[x]", "seed": -1})
    assert (template.template, template.marker, template.options.seed, template.between) == ("a [x] b", "[x]", 2**64 - 1, False)
    between = infill_request({"prefix": "a", "max_hole_tokens": 4, "messages": [USER]})
    assert (between.template, between.between, between.prompt) == (("a", Hole(1, 4)), True, (USER,))


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"messages": "Hi"}, "messages", "should be a valid list"),
        ({"messages": [{"role": "robot", "content": ""}]}, "messages[0].role", "'assistant' or 'tool'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content", "a string or a list of parts"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "must have the form"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content", "a string as its text"),
        ({"messages": [USER | {"tool_calls": [CALL]}]}, "messages[0].tool_calls", "only the assistant"),
        ({"messages": [USER, {"role": "tool", "tool_call_id": "b", "content": ""}]}, "messages[1].tool_call_id", "no tool call"),
        ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
        ({"temperature": "1"}, "temperature", "valid number"),
        ({"temperature": True}, "temperature", "valid number"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 1.5}, "max_tokens", "valid integer"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "differ"),
        ({"n": 17}, "n", "less than or equal to 16"),
        ({"seed": 2**64}, "seed", "less than"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"stop": [""]}, "stop[0]", "at least 1 character"),
        ({"mode": "magic"}, "mode", "'diffusion' or 'causal'"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"frequency_penalty": 0.1}, "frequency_penalty", "not supported"),
        ({"logit_bias": {"1": 1}}, "logit_bias", "not supported"),
        ({"top_logprobs": 2}, "top_logprobs", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"tool_choice": "required"}, "tool_choice", "cannot be forced"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice", "cannot be forced"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "match pattern"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": [1]}}}]},
         "tools[0].function.parameters", "properties must be"),
        ({"chat_template_kwargs": {"bos_token": "x"}}, "chat_template_kwargs.bos_token", "not permitted"),
    ],
)  # fmt: skip
def test_what_a_chat_may_not_say(body: dict[str, Any], param: str, message: str) -> None:
    refused(lambda: chat(**body), param, message)


@pytest.mark.parametrize("arguments", ["", "  ", "{}"])
def test_a_call_may_have_no_arguments(arguments: str) -> None:
    call = CALL | {"function": {"name": "f", "arguments": arguments}}
    [_, message] = chat_request({"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}).messages
    assert message["tool_calls"][0]["function"]["arguments"] == {}


@pytest.mark.parametrize("arguments", ["[1]", "{", '{"a": "\\ud800"}', '{"a":' * 30 + "1" + "}" * 30, 1])
def test_arguments_that_are_none(arguments: Any) -> None:
    call = CALL | {"function": {"name": "f", "arguments": arguments}}
    messages = [USER, {"role": "assistant", "tool_calls": [call]}]
    refused(lambda: chat_request({"messages": messages}), "messages[1].tool_calls[0].function.arguments", "")


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "prompt", "required"),
        ({"prompt": ""}, "prompt[0]", "not be empty"),
        ({"prompt": []}, "prompt", "at least 1"),
        ({"prompt": [1, "a"]}, "prompt[0]", "a string or a list of token ids"),
        ({"prompt": [True]}, "prompt[0]", "a string or a list of token ids"),
        ({"prompt": ["a"] * 5, "n": 4}, "n", "too many"),
        ({"prompt": "a", "suffix": "b"}, "suffix", "/v1/infill"),
        ({"prompt": "a", "echo": True}, "echo", "not supported"),
        ({"prompt": "a", "best_of": 2}, "best_of", "not supported"),
        ({"prompt": "a", "logprobs": 1}, "logprobs", "less than or equal to 0"),
    ],
)
def test_what_a_completion_may_not_say(body: dict[str, Any], param: str, message: str) -> None:
    refused(lambda: completion_request(body), param, message)


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "template", "either"),
        ({"template": "<hole>", "prefix": "a"}, "template", "either"),
        ({"template": "<hole>", "prompt": "a", "messages": [USER]}, "prompt", "or neither"),
        ({"template": "<hole>", "raw": True, "system": "a"}, "raw", "no chat"),
        ({"prefix": "a", "min_hole_tokens": 9}, "min_hole_tokens", "exceeds"),
        ({"prefix": "a", "stream": True}, "stream", "not supported"),
    ],
)
def test_what_an_infill_may_not_say(body: dict[str, Any], param: str, message: str) -> None:
    refused(lambda: infill_request(body), param, message)


def test_depth_and_size_of_values() -> None:
    deep: Any = 1
    for _ in range(MAX_DEPTH):
        deep = {"a": deep}
    assert read_json(json.dumps(deep).encode()) == deep
    refused(lambda: read_json(json.dumps({"a": deep}).encode()), None, "nested more than")
    refused(lambda: read_json(b"[" * 10**5), None, "not JSON")
    refused(lambda: read_json(b'{"a": [1e999]}'), None, "out of range")


def refused(request: Any, param: str | None, message: str) -> None:
    with pytest.raises(ApiError) as error:
        request()
    print(error.value.message)
    assert (error.value.status, error.value.param) == (400, param)
    assert message in error.value.message
    assert "\n" not in error.value.message

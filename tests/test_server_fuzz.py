"""The server responds to whatever a client sends. Errors are the client's: never a 500, and never no response."""

import base64
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_diffgemma import load
from support.checkpoints import SEEING_SHAPE, make_chat_checkpoint
from support.image_files import noise, saved
from support.serving import SECONDS, serving

PATHS = ("chat/completions", "completions", "infill")

_WILD = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
_TEXT = st.text(max_size=12) | st.sampled_from(["Hi", "<|turn>model\n", "<|channel>thought\n", '<|"|>', "<tool_call|>"])
_PICTURE = base64.b64encode(saved(noise(8, 8), "PNG")).decode()
_URL = st.sampled_from([f"data:image/png;base64,{_PICTURE}", "data:image/png;base64,AAAA", "http://localhost/", "data:", ""])
_IMAGE = st.one_of(
    st.builds(lambda url, how: {"type": "image_url", "image_url": {"url": url, "detail": how}}, _URL, st.just("low") | _WILD),
    st.builds(
        lambda kind, name, value: {"type": kind, name: value},
        st.sampled_from(["image_url", "input_image", "image", "video_url", "video", "input_audio", "file"]),
        st.sampled_from(["image_url", "image", "source", "url", "data", "base64", "video_url", "detail"]),
        _URL | st.just(_PICTURE) | _WILD,
    ),
)
_PARTS = st.lists(st.builds(lambda text: {"type": "text", "text": text}, _TEXT) | _IMAGE, max_size=2)
_ARGUMENTS = st.dictionaries(_TEXT, _WILD.filter(lambda value: "Infinity" not in json.dumps(value)), max_size=2).map(
    lambda arguments: json.dumps(arguments).replace("NaN", "0")
)


def _called(arguments: str, content: str | None, answer: str) -> list[dict[str, Any]]:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return [
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": answer},
    ]


_TURN = st.one_of(
    st.builds(lambda role, content: [{"role": role, "content": content}], st.sampled_from(["user", "system"]), _TEXT | _PARTS),
    st.builds(lambda content: [{"role": "assistant", "content": content}], _TEXT),
    st.builds(_called, _ARGUMENTS, st.none() | _TEXT, _TEXT),
)
_MESSAGES = st.lists(_TURN, min_size=1, max_size=3).map(lambda turns: [message for turn in turns for message in turn])
_SCHEMA = st.recursive(
    st.fixed_dictionaries({}, optional={"type": st.sampled_from(["string", ["null", "integer"]]), "enum": _WILD, "x": _WILD}),
    lambda inner: st.fixed_dictionaries(
        {"type": st.just("object")},
        optional={"properties": st.dictionaries(_TEXT, inner, max_size=2), "items": inner, "description": _TEXT},
    ),
    max_leaves=4,
)
_FUNCTION = st.fixed_dictionaries({"name": st.just("f")}, optional={"description": _TEXT, "parameters": _SCHEMA})
_TOOLS = st.lists(st.builds(lambda function: {"type": "function", "function": function}, _FUNCTION), max_size=2)
_PROMPT = st.text(min_size=1, max_size=8)
_IDS = st.lists(st.integers(0, 511), min_size=1, max_size=4)

#: Valid options of a request.
_COMMON = {"seed": st.integers(-(2**63), 2**64 - 1), "temperature": st.floats(0, 2), "max_denoising_steps": st.integers(1, 2)}
_GENERATING = _COMMON | {
    "n": st.integers(1, 2),
    "top_p": st.floats(0.01, 1),
    "top_k": st.integers(-1, 5),
    "stop": _PROMPT | st.lists(_PROMPT, max_size=2),
    "mode": st.sampled_from(["diffusion", "causal"]),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({}, optional=dict.fromkeys(("include_usage", "drafts", "settled"), st.booleans())),
}
_BODIES = {
    "chat/completions": st.fixed_dictionaries(
        {"messages": _MESSAGES, "max_tokens": st.just(1)},
        optional=_GENERATING | {"tools": _TOOLS, "logprobs": st.booleans(), "reasoning_effort": st.sampled_from(["none", "low"])},
    ),
    "completions": st.fixed_dictionaries(
        {"prompt": _PROMPT | _IDS | st.lists(_PROMPT | _IDS, min_size=1, max_size=2), "max_tokens": st.just(1)},
        optional=_GENERATING | {"logprobs": st.just(0)},
    ),
    "infill": st.fixed_dictionaries(
        {"template": st.sampled_from(["a <hole:1> b", "<hole:1-2> b", "a <hole:1>, <hole:1>"])},
        optional=_COMMON | {"raw": st.booleans(), "canvas_length": st.integers(1, 8)},
    ),
}
#: At most one field that may be wrong.
_NAMES = (*_GENERATING, "messages", "prompt", "template", "tools", "marker", "raw", "logprobs", "tool_choice", "model", "suffix")
_FLAW = st.just({}) | st.dictionaries(st.sampled_from(_NAMES) | st.text(max_size=4), _WILD, min_size=1, max_size=1)
_REQUEST = st.sampled_from(PATHS).flatmap(lambda path: st.tuples(st.just(path), _BODIES[path], _FLAW))
_EXAMPLES = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = make_chat_checkpoint(tmp_path_factory.mktemp("chat"), SEEING_SHAPE)
    with (
        serving(load(folder), queue=64, max_tokens=16, cache_memory=1 << 20) as served,
        httpx.Client(base_url=f"{served.url}/v1/", timeout=SECONDS) as connected,
    ):
        yield connected


def answered(client: httpx.Client, path: str, content: bytes | str) -> int:
    """Send a request, check the response, and return its status."""
    response = client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    elif response.headers["content-type"].startswith("text/event-stream"):
        assert response.text.endswith("data: [DONE]\n\n")
    else:
        assert response.json()["usage"]["completion_tokens"] >= 0
    return response.status_code


def test_no_body_is_a_bug(client: httpx.Client) -> None:
    statuses: Counter[int] = Counter()

    @_EXAMPLES
    @given(_REQUEST)
    def ask(request: tuple[str, dict[str, Any], dict[str, Any]]) -> None:
        path, body, flaw = request
        statuses[answered(client, path, json.dumps(body | flaw))] += 1

    ask()
    print(statuses)
    assert min(statuses[200], statuses[400]) > 0, "both kinds were tried"


@pytest.mark.parametrize("path", PATHS)
def test_no_bytes_are_a_bug(client: httpx.Client, path: str) -> None:
    @_EXAMPLES
    @given(st.binary(max_size=60))
    def ask(content: bytes) -> None:
        assert answered(client, path, content) == 400

    ask()

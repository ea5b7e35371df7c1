"""What one client sends cannot hurt another: heavy texts, other clients' caches, and passes that compute no numbers."""

import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from mlx_diffgemma import load
from mlx_diffgemma.editing.infilling import Hole, parse_template
from mlx_diffgemma.server.answers import ChatAnswer
from mlx_diffgemma.steps import Steps
from support.checkpoints import make_chat_checkpoint
from support.fake import Answer, Asked
from support.serving import SECONDS, Served, Writer, serving, until

USER = [{"role": "user", "content": "Hi"}]
#: Seconds for what takes a small part of one. Work that grows with the square of a megabyte takes hours.
SOON = 10.0


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_checkpoint(tmp_path_factory.mktemp("chat"))


@pytest.fixture
def writer(chat_folder: Path) -> Writer:
    return Writer(chat_folder, ["x" * 30])


@pytest.mark.parametrize(
    "text",
    ["<hole:" * 170_000, "<hole:1-" * 130_000, "<hole" * 200_000, "<hole:2>" * 30_000, "<" * 1_000_000, "<hole:\n" * 140_000],
    ids=["no end", "a range", "no colon", "holes", "beginnings", "lines"],
)
def test_templates_are_read_in_linear_time(text: str) -> None:
    started = time.perf_counter()
    try:
        parts = parse_template(text)
    except ValueError:
        parts = []
    assert time.perf_counter() - started < SOON
    assert parts == ([Hole(2, 2)] * 30_000 if "<hole:2>" in text else [])


def test_a_length_ends_before_the_next_marker() -> None:
    assert parse_template("<hole: <hole:3> b") == ["<hole: ", Hole(3, 3), " b"]


def steady(served: Served, during: threading.Event) -> float:
    """Ask for the health again and again; the longest that a response took."""
    longest = 0.0
    while not during.is_set():
        started = time.perf_counter()
        assert httpx.get(f"{served.url}/health", timeout=SECONDS).status_code == 200
        longest = max(longest, time.perf_counter() - started)
    return longest


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("infill", {"template": "<hole:" * 170_000, "raw": True}),
        ("chat/completions", {"messages": [{"role": "user", "content": "<|turn>" * 140_000}]}),
        ("chat/completions", {"messages": [{"role": "user", "content": "".join(f"<|turn>{n}" for n in range(70_000))}]}),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}] * 4000}),
        ("completions", {"prompt": "a" * 1_000_000}),
        ("completions", {"prompt": "<|" * 500_000}),
    ],
    ids=["holes", "turns", "different turns", "messages", "letters", "beginnings"],
)
def test_a_heavy_text_stops_nobody(chat_folder: Path, path: str, body: dict[str, Any]) -> None:
    """Its own response comes soon, and the server answers others meanwhile."""
    with serving(load(chat_folder)) as served:
        done, longest = threading.Event(), [0.0]
        other = threading.Thread(target=lambda: longest.append(steady(served, done)))
        other.start()
        started = time.perf_counter()
        response = served.post(path, body)
        seconds = time.perf_counter() - started
        done.set()
        other.join(SECONDS)
        assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error"), response.text[:300]
        assert seconds < SOON, "the response"
        assert max(longest) < SOON / 4, "the health meanwhile"
        assert served.post("chat/completions", {"messages": USER, "max_tokens": 1}).status_code == 200


def test_bytes_are_counted_before_anything_else(chat_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that no number of tokens of the context can hold is refused before it is rendered or tokenized."""
    model = load(chat_folder)
    longest = model.tokenizer.longest_token
    assert longest is not None

    def steps(*_: Any, **__: Any) -> Steps[Any]:
        raise AssertionError("it was read")
        yield

    monkeypatch.setattr(model.tokenizer, "chat_steps", steps)
    monkeypatch.setattr(model.tokenizer, "encode_steps", steps)
    size = 512 * longest + 1
    with serving(model) as served:
        for path, body in (
            ("chat/completions", {"messages": [{"role": "user", "content": "x" * size}]}),
            ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * size}]}]}),
            ("completions", {"prompt": "x" * size}),
            ("infill", {"template": "x" * size + "<hole>"}),
        ):
            error = served.post(path, body).json()["error"]
            assert error["message"].endswith(f"has {size} bytes, more than 512 tokens can hold"), (path, error)
            assert error["code"] == "context_length_exceeded"


def test_a_prompt_of_white_space_is_no_bug(chat_folder: Path) -> None:
    with serving(load(chat_folder)) as served:
        for text in ("\n", " ", "\ufeff", "\u200b"):
            for path, body in (
                ("completions", {"prompt": text, "max_tokens": 1}),
                ("completions", {"prompt": ["a", text], "max_tokens": 1}),
                ("chat/completions", {"messages": [{"role": "user", "content": text}], "max_tokens": 1}),
                ("infill", {"prefix": text, "suffix": text, "raw": True}),
                ("infill", {"template": f"{text}<hole:1>", "prompt": text}),
            ):
                assert served.post(path, body).status_code in (200, 400), (path, body)


# --- the prefix cache


def cached(served: Served, key: str | None = None, **fields: Any) -> int:
    body = {"messages": [{"role": "user", "content": "a secret question"}], "max_tokens": 1, **fields}
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    response = served.post("chat/completions", body, headers=headers)
    assert response.status_code == 200, response.text
    found: int = response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found


def test_a_salt_hides_what_was_asked(chat_folder: Path) -> None:
    with serving(load(chat_folder)) as served:
        assert cached(served) == 0
        assert cached(served) > 0
        assert cached(served, cache_salt="a") == 0
        assert cached(served, cache_salt="b") == 0
        assert cached(served, cache_salt="a") > 0


def test_keys_share_no_cache(chat_folder: Path) -> None:
    with serving(load(chat_folder), api_keys={"ann": "key-of-ann", "bob": "key-of-bob"}) as served:
        assert cached(served, "key-of-ann") == 0
        assert cached(served, "key-of-bob") == 0
        assert cached(served, "key-of-ann") > 0


# --- errors in a pass, and in a stream


def poison(writer: Writer, poisoned: Sequence[int]) -> None:
    """Let the entropies of a row be NaN where its cached text has one of the tokens."""
    script = writer.backend.script

    def poisoning(asked: Asked) -> Answer:
        argmax, sampled, entropy = script(asked)
        return argmax, sampled, np.full_like(entropy, np.nan) if set(poisoned) & set(asked.cached) else entropy

    writer.backend.script = poisoning


@pytest.mark.parametrize("stream", [False, True])
def test_a_pass_without_numbers_is_an_error_for_its_own_request(writer: Writer, stream: bool) -> None:
    [bad] = writer.model.tokenizer.encode("Z")
    poison(writer, [bad])
    wrong = {"messages": [{"role": "user", "content": "Z"}], "stream": stream}
    writer.gate.clear()
    with serving(writer.model, parallel=2) as served:
        right: list[httpx.Response] = []
        other = threading.Thread(target=lambda: right.append(served.post("chat/completions", {"messages": USER})))
        other.start()
        until(lambda: writer.steps == 1)
        writer.gate.set()
        response = served.post("chat/completions", wrong)
        other.join(SECONDS)
        if stream:
            *_, last = [line for line in response.text.splitlines() if line.startswith("data: ")]
            error = json.loads(last.removeprefix("data: "))["error"]
        else:
            error = response.json()["error"]
        assert response.status_code == (200 if stream else 500)
        assert (error["type"], error["code"]) == ("server_error", "computation_failed")
        assert "NaN" in error["message"]
        assert "[DONE]" not in response.text
        assert right[0].json()["choices"][0]["message"]["content"] == "x" * 30


def test_any_error_in_a_stream_is_its_last_event(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, *_: Any) -> Any:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(ChatAnswer, "chunks", broken)
    with serving(writer.model) as served:
        response = served.post("chat/completions", {"messages": USER, "stream": True})
        *_, last = [line for line in response.text.splitlines() if line]
        error = json.loads(last.removeprefix("data: "))["error"]
        assert error["type"] == "server_error"
        assert "secret" not in response.text
        until(lambda: served.engine.running == 0)

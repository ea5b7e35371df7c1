"""Images over HTTP: with OpenAI's own client, in every form that clients send, and from clients that mean harm."""

import asyncio
import base64
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image as Pillow
from starlette.requests import Request

from mlx_diffgemma import DiffusionGemma, Hole, infill, load
from mlx_diffgemma.server.downloads import Downloads
from mlx_diffgemma.server.errors import ApiError
from mlx_diffgemma.server.memory import RequestMemory
from mlx_diffgemma.server.middleware import read_body
from support.checkpoints import SEEING_SHAPE, edit_json, make_chat_checkpoint
from support.image_files import BOMBS, noise, png, saved
from support.seeing import SOON, ask, data_url, expected, image, own, picture, refusal, said, text, user
from support.serving import SECONDS, HurriedLoop, Served, serving, until

#: Soft tokens of a square image by its detail.
SQUARE = {"low": 64, "auto": 256, "high": 1089}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_chat_checkpoint(tmp_path_factory.mktemp("seeing"), SEEING_SHAPE)
    edit_json(folder / "generation_config.json", eos_token_id=[1, 106, 50])  # as released
    return folder


@pytest.fixture(scope="module")
def model(folder: Path, backend_name: str) -> DiffusionGemma:
    return load(folder, backend=backend_name, dtype="float32")


@pytest.fixture(scope="module")
def seer(folder: Path, backend_name: str) -> Iterator[Served]:
    with serving(load(folder, backend=backend_name, dtype="float32"), queue=64, max_tokens=16) as served:
        yield served


@pytest.fixture(scope="module")
def library(folder: Path) -> DiffusionGemma:
    """For what does not depend on the backend; and so the server below."""
    return load(folder)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Served]:
    with serving(load(folder), queue=64, max_tokens=8) as served:
        yield served


# ---- Responses


@pytest.mark.parametrize("stream", [False, True])
def test_the_openai_client_sends_images(seer: Served, model: DiffusionGemma, stream: bool) -> None:
    """Two images and texts between them, in this order, give what they give in the library."""
    first, second = picture(1), picture(2, 200, 100)
    right = expected(model, user(text("A"), own(first, 70), text("B"), own(second, 70)))
    swapped = expected(model, user(text("A"), own(second, 70), text("B"), own(first, 70)))
    print(right, swapped)
    assert right != swapped, "the model tells the images apart"
    message = user(text("A"), image(first, detail="low"), text("B"), image(second, detail="low"))
    if not stream:
        assert said(ask(seer, message)) == right
        return
    chunks = list(ask(seer, message, stream=True, stream_options={"include_usage": True}))
    content = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert (content, chunks[-1].usage.prompt_tokens) == right


FORMS: dict[str, Callable[[bytes], dict[str, Any]]] = {
    "OpenAI": image,
    "a plain URL": lambda content: {"type": "image_url", "image_url": data_url(content)},
    "OpenAI's responses": lambda content: {"type": "input_image", "image_url": data_url(content), "detail": "auto"},
    "Hugging Face": lambda content: {"type": "image", "url": data_url(content)},
    "Hugging Face, base64": lambda content: {"type": "image", "base64": base64.b64encode(content).decode()},
    "AI SDK": lambda content: {"type": "image", "image": base64.b64encode(content).decode(), "mediaType": "image/png"},
    "MCP": lambda content: {"type": "image", "data": base64.b64encode(content).decode(), "mimeType": "image/png"},
    "Anthropic": lambda content: {
        "type": "image",
        "source": {"type": "base64", "media_type": "image/png", "data": base64.b64encode(content).decode()},
    },
    "another type": lambda content: image(data_url(content, "image/jpeg")),
    "in capitals": lambda content: image(data_url(content, "IMAGE/PNG").replace("data", "DATA")),
    "escaped slashes": image,
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_an_image(server: Served, library: DiffusionGemma, form: str) -> None:
    body = {"messages": [user(FORMS[form](picture(1)), text())], "seed": 3, "max_tokens": 8}
    written = json.dumps(body)
    if form == "escaped slashes":
        written = written.replace("/", "\\/")
    response = httpx.post(
        f"{server.url}/v1/chat/completions", content=written, headers={"Content-Type": "application/json"}, timeout=SECONDS
    ).json()
    print(response)
    usage = response["usage"]["prompt_tokens"]
    assert (response["choices"][0]["message"]["content"], usage) == expected(library, user(own(picture(1)), text()), max_tokens=8)


@pytest.mark.parametrize("detail", ["low", "auto", "high", None])
def test_detail_is_a_budget(server: Served, detail: str | None) -> None:
    options = {} if detail is None else {"detail": detail}
    plain = said(ask(server, user(text()), max_tokens=1))[1]
    seen = said(ask(server, user(image(picture(1), **options), text()), max_tokens=1))[1]
    assert seen - plain == SQUARE[detail or "auto"] + 2, "the soft tokens, between a begin and an end"


def test_images_in_other_messages(server: Served, library: DiffusionGemma) -> None:
    """In a system message, and in the result of a tool."""
    system = {"role": "system", "content": [text("Look."), image(picture(1), detail="low")]}
    right = expected(library, {"role": "system", "content": [text("Look."), own(picture(1), 70)]}, user(text()), max_tokens=8)
    assert said(ask(server, system, user(text()), max_tokens=8)) == right

    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    called = [user(text()), {"role": "assistant", "content": None, "tool_calls": [call]}]
    result = {"role": "tool", "tool_call_id": "a", "content": [text("A photo:"), image(picture(2), detail="low")]}
    plain = {**result, "content": [text("A photo:")]}
    with_image, without = (said(ask(server, *called, each, max_tokens=1))[1] for each in (result, plain))
    print(with_image, without)
    assert with_image - without >= SQUARE["low"] + 2


def test_an_image_is_seen_once(folder: Path, backend_name: str) -> None:
    """The second turn finds the first in the cache. In a fork with another text before it, the image is encoded again only."""
    loaded = load(folder, backend=backend_name, dtype="float32")
    seen: list[bytes] = []
    see = loaded.backend.see
    loaded.backend.see = lambda images: seen.extend(each.digest for each in images) or see(images)  # type: ignore[method-assign]
    with serving(loaded, max_tokens=8) as served:
        first = ask(served, user(image(picture(1), detail="low"), text()))
        read = first.usage.total_tokens
        until(lambda: served.metric("encoded_tokens_total") >= read)
        reply = {"role": "assistant", "content": first.choices[0].message.content}
        turn = user(image(picture(2), detail="low"), text("And this?"))
        second = ask(served, user(image(picture(1), detail="low"), text()), reply, turn)
        assert second.usage.prompt_tokens_details.cached_tokens > SQUARE["low"]
        assert len(seen) == len(set(seen)) == 2
        assert served.metric("seen_images_total") == 2

        fork = ask(served, user(text("Now:"), image(picture(1), detail="low"), text()))
        assert fork.usage.prompt_tokens_details.cached_tokens < SQUARE["low"]
        assert len(seen) == 2
        salted = ask(served, user(image(picture(1), detail="low"), text()), extra_body={"cache_salt": "another"})
        assert salted.usage.prompt_tokens_details.cached_tokens == 0
        assert len(seen) == 3, "who has another salt cannot tell by the time that an image was sent before"


def test_infill_sees_images(server: Served, library: DiffusionGemma) -> None:
    messages = [user(image(picture(1), detail="low"), text())]
    body = {"prefix": "It is ", "suffix": ".", "min_hole_tokens": 2, "max_hole_tokens": 2, "seed": 5, "messages": messages}
    answer = server.post("infill", body).json()
    template = ["It is ", Hole(2, 2), "."]
    own_messages = [user(own(picture(1), 70), text())]
    print(answer)
    assert answer["text"] == infill(library, template, prompt=own_messages, seed=5).text
    assert answer["usage"]["prompt_tokens"] > SQUARE["low"]


def test_videos(server: Served, library: DiffusionGemma) -> None:
    pytest.importorskip("av")
    from support.video_files import video

    film = video(12)
    part = {"type": "video_url", "video_url": {"url": data_url(film, "video/mp4")}, "frames": 3}
    answer = said(ask(server, user(part, text()), max_tokens=8))
    plain = {"type": "video", "video": film, "frames": 3}
    assert answer == expected(library, user(plain, text()), max_tokens=8)
    refusal(server, user(part | {"frames": 0}), "frames must be")


def test_what_the_model_reads_is_listed(server: Served) -> None:
    [listed] = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert listed["input_modalities"][:2] == ["text", "image"]
    assert listed["output_modalities"] == ["text"]
    assert server.openai.models.retrieve("tiny").input_modalities == listed["input_modalities"]  # type: ignore[attr-defined]


# ---- A model of texts only


def test_a_model_that_reads_text_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_diffgemma.vision import media

    def read(*_: Any) -> Any:
        raise AssertionError("it was decoded")

    monkeypatch.setattr(media, "read_picture", read)
    fetched: list[str] = []

    async def resolve(host: str, port: int) -> Sequence[str]:
        fetched.append(host)
        return []

    with serving(load("sudoku"), downloads=Downloads(["a.example"], 1 << 20, resolve=resolve)) as served:
        assert httpx.get(f"{served.url}/v1/models").json()["data"][0]["input_modalities"] == ["text"]
        for content in (picture(1), "http://a.example/"):
            told = refusal(served, user(image(content), text()), "this model reads text only")
            assert told["code"] == "unsupported_value"
        assert served.post("infill", {"prefix": "1", "messages": [user(image(picture(1)))]}).status_code == 400
        large = served.post("chat/completions", {"messages": [user(image(b"x" * (1 << 20)))]})
        assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")
        assert "this model reads text only" in large.json()["error"]["message"]
    assert fetched == []


# ---- Bad input


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
WRONG: dict[str, tuple[Any, str]] = {
    "truncated": (lambda: picture(1)[:-300], "damaged or cut short"),
    "empty": (lambda: b"", "empty"),
    "zero-sized": (lambda: png(0, 0, 8, 2, b""), "has no pixels"),
    "a PDF": (lambda: b"%PDF-1.7\n" + b"x" * 1000, "not an image that can be read"),
    "an SVG": (lambda: SVG, "not an image that can be read"),
    "a text": (lambda: b"hello", "not an image that can be read"),
    "noise": (lambda: noise(50, 50).tobytes(), "not an image that can be read"),
    "a PDF as such": (lambda: data_url(b"%PDF-1.7", "application/pdf"), "a data URL must begin like"),
    "an SVG as text": (lambda: "data:image/svg+xml;utf8," + SVG.decode(), "a data URL must begin like"),
    "no base64": (lambda: "data:image/png;base64,!!!", "the base64 of the data URL is damaged"),
    "base64 with white space": (lambda: "data:image/png;base64,iVBO Rw0K", "the base64 of the data URL is damaged"),
    "base64 without its end": (lambda: data_url(picture(1))[:-1], "the base64 of the data URL is damaged"),
    "letters beyond ASCII": (lambda: "data:image/png;base64,é", "the base64 of the data URL is damaged"),
    "no data": (lambda: "data:", "a data URL must begin like"),
    "a path": (lambda: "/etc/passwd", "must be a data URL"),
    "a file URL": (lambda: "file:///etc/passwd", "must be a data URL"),
    "a relative path": (lambda: "picture.png", "must be a data URL"),
    "ftp": (lambda: "ftp://a.example/", "must be a data URL"),
    "nothing": (lambda: "", "must be a data URL"),
    "a URL": (lambda: "https://a.example/a.png", "start the server with --allow-image-urls a.example"),
    "an address": (lambda: "http://8.8.8.8/", "fetches no images from 8.8.8.8"),
    **{
        host: (lambda host=host: f"http://{host}/", "is not on the public internet")
        for host in ("127.0.0.1", "127.0.0.1:8000", "10.1.2.3", "169.254.169.254", "2130706433", "0x7f.1", "0177.0.0.01")
    },
    "IPv6": (lambda: "http://[::1]/", "no valid host name"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_images_that_are_none(server: Served, kind: str) -> None:
    make, told = WRONG[kind]
    refusal(server, user(text(), image(make())), told)


def test_a_stream_does_not_begin_with_a_wrong_image(server: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="not an image that can be read"):
        ask(server, user(image(b"%PDF-1.7"), text()), stream=True)


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs(server: Served, bomb: str) -> None:
    """Each is refused, or is read in little time. The limits of memory are tested with the readers."""
    started = time.perf_counter()
    response = server.post("chat/completions", {"messages": [user(image(BOMBS[bomb]()), text())], "max_tokens": 1})
    print(f"{time.perf_counter() - started:.2f} s: {response.status_code} {response.text[:200]}")
    assert response.status_code in (200, 400)
    assert time.perf_counter() - started < SOON
    if response.status_code == 400:
        assert response.json()["error"]["message"].isprintable()


def test_a_narrow_image(server: Served) -> None:
    """It is as the library makes it: a row of squares, at most as many as the budget."""
    narrow = saved(Pillow.new("RGB", (10_000, 1)), "PNG")
    plain, seen = (said(ask(server, user(*parts), max_tokens=1))[1] for parts in ([text()], [image(narrow), text()]))
    assert seen - plain == 280 + 2


PARTS: dict[str, tuple[Any, str]] = {
    "no source": ({"type": "image_url"}, "must have the form"),
    "two sources": ({"type": "image", "url": "data:", "data": "x"}, "must have the form"),
    "a number": ({"type": "image_url", "image_url": 1}, "must have the form"),
    "a list": ({"type": "image_url", "image_url": {"url": ["a"]}}, "must have the form"),
    "no URL": ({"type": "image_url", "image_url": {}}, "must have the form"),
    "a file's number": ({"type": "input_image", "file_id": "file-1"}, "must have the form"),
    "a path": ({"type": "image", "path": "/etc/passwd"}, "must have the form"),
    "a path as an image": ({"type": "image", "image": "/etc/passwd"}, "the base64 of the data URL is damaged"),
    "another detail": (image(b"", detail="huge"), "must be low, high or auto"),
    "detail of no text": (image(b"", detail=["low"]), "must be low, high or auto"),
    "audio": ({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}, "audio is not supported"),
    "a file": ({"type": "file", "file": {"file_data": ""}}, "files are not supported"),
    "a document": ({"type": "document", "source": {}}, "documents are not supported"),
    "an unknown type": ({"type": "hologram"}, "must have the type text"),
    "no type": ({"text": "a"}, "an object with a type"),
}


@pytest.mark.parametrize("kind", PARTS)
def test_parts_that_are_none(server: Served, kind: str) -> None:
    part, told = PARTS[kind]
    refusal(server, user(text(), part), told)


def test_the_assistant_has_no_images(server: Served) -> None:
    error = refusal(server, {"role": "assistant", "content": [image(picture(1))]}, "the assistant writes text only")
    assert error["param"] == "messages[0].content"


def test_more_images_than_the_context_holds(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading stops at the image that does not fit."""
    from mlx_diffgemma.vision import media

    count, read_picture = 0, media.read_picture

    def read(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        return read_picture(*arguments)

    monkeypatch.setattr(media, "read_picture", read)
    error = refusal(server, user(*[image(picture(1))] * 500, text()), "soft tokens, but only 4,096 fit")
    assert error["code"] == "context_length_exceeded"
    assert count == 4096 // SQUARE["auto"] + 1
    texts = refusal(server, user(*[image(picture(1))] * 15, text("a b " * 400)), "tokens")
    assert texts["code"] == "context_length_exceeded"


def test_images_that_are_too_large(folder: Path) -> None:
    """Text and images have limits of their own, and together they may have the sum."""
    with serving(load(folder), max_body=20_000, max_image_bytes=100_000, max_tokens=4) as served:
        large = picture(1, 150, 150)
        assert 80_000 < len(data_url(large)) < 100_000
        assert ask(served, user(image(large), text("a" * 500)), max_tokens=4)
        assert refusal(served, user(image(large), image(large)), "", 413)["code"] == "body_too_large"
        assert refusal(served, user(image(b"x" * 75_000), text("x")), "", 413)["code"] == "images_too_large"
        assert refusal(served, user(image(picture(1, 9, 9)), text("x" * 20_000)), "", 413)["code"] == "body_too_large"
        values = served.post("chat/completions", {"messages": [user(text())], "x": [[]] * 10_001})
        assert (values.status_code, "values" in values.json()["error"]["message"]) == (413, True)


@pytest.mark.parametrize(("chunk", "arrives"), [(16 << 20, True), (1 << 10, False)])
def test_a_large_body_has_more_time(chunk: int, arrives: bool) -> None:
    """Three chunks, 50 s apart. A large one gives its client a minute more, and a small one nothing."""
    sent = 0

    async def receive() -> Any:
        nonlocal sent
        await asyncio.sleep(50 if sent else 0)
        sent += 1
        return {"type": "http.request", "body": bytes(chunk), "more_body": sent < 3}

    async def read_whole() -> int:
        scope = {"type": "http", "headers": [(b"content-type", b"application/json")]}
        request = Request(scope | {"state": {"held": RequestMemory(1 << 30).held("a")}}, receive)
        return len(await read_body(request, 1 << 30))

    with asyncio.Runner(loop_factory=HurriedLoop) as runner:
        if arrives:
            assert runner.run(read_whole()) == 3 * chunk
            return
        with pytest.raises(ApiError) as late:
            runner.run(read_whole())
        assert late.value.status == 408


def test_memory_of_all_requests(folder: Path) -> None:
    """Images beyond it get status 429 while others hold it, and requests without images go on."""
    model = load(folder)
    gate = threading.Event()
    denoise = model.backend.denoise
    model.backend.denoise = lambda rows: gate.wait(SECONDS) and denoise(rows)  # type: ignore[method-assign]
    # In the form of patches, an image of 1,089 soft tokens takes 7.5 MB; the first MiB of each request is free.
    with serving(model, parallel=8, request_memory=30 << 20, max_tokens=1) as served:
        body = {"messages": [user(image(picture(1), detail="high"))], "max_tokens": 1}
        answers: list[httpx.Response] = []

        def post(sent: dict[str, Any]) -> None:
            answers.append(served.post("chat/completions", sent))

        threads = [threading.Thread(target=post, args=(each,)) for each in (body, body, {"messages": [user(text())]})]
        for thread in threads:
            thread.start()
        until(lambda: served.engine.running + len(served.engine._waiting) == 3)  # all are prepared
        refused = served.post("chat/completions", body)
        gate.set()
        for thread in threads:
            thread.join(SECONDS)
        assert [answer.status_code for answer in answers] == [200] * 3
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "request_memory_exceeded")
        assert "Retry-After" in refused.headers
        assert served.post("chat/completions", body).status_code == 200, "the memory is free again"
        twice = served.post("chat/completions", {"messages": [user(*[image(picture(1), detail="high")] * 3)]})
        assert (twice.status_code, twice.json()["error"]["code"]) == (413, "request_memory_exceeded")


def test_others_go_on_while_images_are_read(server: Served) -> None:
    """A client sends large images, one after the other. Another client's texts are answered meanwhile."""
    count, large = 20, saved(np.zeros((4000, 4000, 3), np.uint8), "PNG")
    body = {"messages": [user(*[image(large, detail="low")] * count)], "max_tokens": 1}
    answers: list[httpx.Response] = []
    thread = threading.Thread(
        target=lambda: answers.append(httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=100))
    )
    thread.start()
    until(lambda: server.engine.waiting == 1)
    others, started = 0, time.perf_counter()
    # From another address: else both are one client, whose requests are prepared one after the other.
    with httpx.Client(transport=httpx.HTTPTransport(local_address="127.0.0.2"), timeout=SECONDS) as other:
        while server.engine.waiting:
            answer = other.post(f"{server.url}/v1/chat/completions", json={"messages": [user(text())], "max_tokens": 1})
            assert answer.status_code == 200
            others += 1
    print(f"{others} texts beside {count} images in {time.perf_counter() - started:.2f} s")
    thread.join(SECONDS)
    assert answers[0].status_code == 200
    assert others >= count / 5

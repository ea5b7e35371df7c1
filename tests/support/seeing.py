"""Requests with images, what the library makes of them, and errors."""

import base64
import time
from typing import Any

from mlx_diffgemma import DiffusionGemma, Reply
from mlx_diffgemma.chat.reply import reply
from mlx_diffgemma.prefix_cache import read
from mlx_diffgemma.steps import run
from mlx_diffgemma.vision.sources import Image
from mlx_diffgemma.writing import Writing, sampling_config
from support.image_files import noise, saved
from support.serving import Served

#: Seconds for what takes a small part of one.
SOON = 10.0


def picture(seed: int, height: int = 90, width: int = 90) -> bytes:
    return saved(noise(height, width, seed=seed), "PNG")


def data_url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def image(content: bytes | str, **options: Any) -> dict[str, Any]:
    """OpenAI's part with an image."""
    url = content if isinstance(content, str) else data_url(content)
    return {"type": "image_url", "image_url": {"url": url, **options}}


def text(words: str = "What is this?") -> dict[str, Any]:
    return {"type": "text", "text": words}


def user(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def own(content: bytes, tokens: int | None = None) -> dict[str, Any]:
    """The library's part with an image."""
    return {"type": "image", "image": Image(content, tokens)}


def ask(served: Served, *messages: dict[str, Any], seed: int = 3, max_tokens: int = 16, **body: Any) -> Any:
    given: dict[str, Any] = {"model": "tiny", "messages": list(messages), "seed": seed, "max_tokens": max_tokens}
    return served.openai.chat.completions.create(**given, **body)


def said(answer: Any) -> tuple[str, int]:
    """The reply and the number of prompt tokens."""
    return answer.choices[0].message.content, answer.usage.prompt_tokens


def expected(model: DiffusionGemma, *messages: dict[str, Any], seed: int = 3, max_tokens: int = 16) -> tuple[str, int]:
    """The library's own."""
    context = read(model.backend, run(model.prompt_steps(messages)), model.piece_rule)
    config = sampling_config(model.checkpoint.generation, "diffusion", {"max_new_tokens": max_tokens})
    *_, answer = reply(model, context, Writing(config, seed), stopping=lambda: False)
    assert isinstance(answer, Reply)
    return answer.content, len(context.tokens)


def refusal(served: Served, message: dict[str, Any], told: str, status: int = 400) -> dict[str, Any]:
    """The error of a request with a message, which comes soon and is one line."""
    started = time.perf_counter()
    response = served.post("chat/completions", {"messages": [message]})
    seconds = time.perf_counter() - started
    assert response.status_code == status, response.text[:500]
    error: dict[str, Any] = response.json()["error"]
    print(f"{seconds:.2f} s: {error}")
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].isprintable()
    assert len(error["message"]) < 500
    assert told in error["message"]
    assert seconds < SOON
    return error

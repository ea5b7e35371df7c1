"""Images at URLs, over HTTP. What the server does with a single URL is tested in test_downloads.py."""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from mlx_diffgemma import DiffusionGemma, load
from mlx_diffgemma.server.downloads import Downloads
from support.checkpoints import SEEING_SHAPE, make_chat_checkpoint
from support.seeing import ask, expected, image, own, picture, refusal, said, text, user
from support.serving import SECONDS, serving, until


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_checkpoint(tmp_path_factory.mktemp("seeing"), SEEING_SHAPE)


@pytest.fixture(scope="module")
def library(folder: Path) -> DiffusionGemma:
    return load(folder)


class Web:
    """A web server on this machine, under the name ``pictures.example``.

    Attributes:
        asked: the paths that were asked for.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.gone = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                if self.path == "/slow":
                    self.connection.settimeout(SECONDS)
                    assert self.connection.recv(1) == b""  # the other side has closed
                    outer.gone.set()
                    return
                redirected = self.path.removeprefix("/to/") if self.path.startswith("/to/") else None
                self.send_response(302 if redirected else 200)
                if redirected:
                    self.send_header("Location", redirected)
                content = picture(int(self.path.strip("/"))) if self.path.strip("/").isdigit() else b"%PDF-1.7"
                self.send_header("Content-Type", "image/png")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def url(self, path: str) -> str:
        return f"http://pictures.example:{self.port}/{path}"

    def downloads(self, **options: Any) -> Downloads:
        async def resolve(host: str, port: int) -> Sequence[str]:
            return ["10.0.0.1" if host == "inside.example" else "127.0.0.1"]

        def allows(address: str) -> bool:
            return address == "127.0.0.1"

        hosts = [f"pictures.example:{self.port}", "inside.example"]
        return Downloads(hosts, 1 << 20, resolve=resolve, allows=allows, **options)


@pytest.fixture
def web() -> Iterator[Web]:
    served = Web()
    yield served
    served.server.shutdown()
    served.server.server_close()


def test_images_at_urls(folder: Path, library: DiffusionGemma, web: Web) -> None:
    with serving(load(folder), downloads=web.downloads(), max_tokens=8) as served:
        one, two = (image(web.url(name), detail="low") for name in "12")
        right = user(own(picture(1), 70), text(), own(picture(2), 70), own(picture(1), 70))
        assert said(ask(served, user(one, text(), two, one), max_tokens=8)) == expected(library, right, max_tokens=8)
        assert web.asked == ["/1", "/2"], "each URL is fetched once"
        template = {"prefix": "It", "max_hole_tokens": 1, "messages": [user(image(web.url("1"), detail="low"))], "seed": 1}
        assert served.post("infill", template).status_code == 200

        refusal(served, user(image(web.url("a.png"))), "not an image that can be read")
        refusal(served, user(image("http://other.example/")), "fetches no images from other.example")
        refusal(served, user(image("http://inside.example/")), "inside.example is not on the public internet")
        refusal(served, user(image(web.url("to/http://inside.example/"))), "inside.example is not on the public internet")
        refusal(served, user(image(web.url("to/http://10.0.0.1/"))), "10.0.0.1 is not on the public internet")
        refusal(served, user(image(web.url("to/http://other.example/"))), "fetches no images from other.example")


def test_slow_urls(folder: Path, web: Web) -> None:
    with serving(load(folder), downloads=web.downloads(seconds=0.5), max_tokens=1) as served:
        refusal(served, user(image(web.url("slow"))), "did not arrive within 0.5 s")
        assert web.gone.wait(SECONDS)
        assert served.engine.waiting == 0


def test_a_client_that_leaves_while_its_image_is_fetched(folder: Path, web: Web) -> None:
    async def leave(url: str) -> None:
        body = {"messages": [user(image(web.url("slow")))]}
        async with httpx.AsyncClient() as client:
            with pytest.raises(httpx.ReadTimeout):
                await client.post(f"{url}/v1/chat/completions", json=body, timeout=httpx.Timeout(SECONDS, read=0.3))

    with serving(load(folder), downloads=web.downloads(), max_tokens=1) as served:
        asyncio.run(leave(served.url))
        assert web.gone.wait(SECONDS), "the download ends too"
        until(lambda: served.metric("cancellations_total") == 1)

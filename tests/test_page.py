"""The server's page: the contents of its files, and its behaviour in a browser.

The browser is Chromium, driven by playwright. If either is missing, the browser tests are skipped. If
``MLX_DIFFGEMMA_TEST_BROWSER`` is set, to the path of a browser or to 1, they fail instead.
"""

import base64
import fnmatch
import json
import os
import re
import shutil
import socket
import threading
import tomllib
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mlx_diffgemma import load
from mlx_diffgemma.server.app import PAGE as PAGE_FILES
from support.checkpoints import SEEING_SHAPE, make_chat_checkpoint
from support.comparing import BACKENDS
from support.image_files import noise, saved

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "mlx_diffgemma" / "server" / "page"
FILES = {path.name: path.read_text(encoding="utf-8") for path in PAGE.iterdir()}
KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}

#: With this seed the boxed model takes 16 steps for this puzzle, and takes cells back.
PUZZLE, SEED = ".5..3......4..3.1...2...12.....4..61", 1

WANTED = os.environ.get("MLX_DIFFGEMMA_TEST_BROWSER")


# ---- The files


def test_page_has_no_outside_address() -> None:
    for name, text in FILES.items():
        addresses = re.findall(r"(?:https?:|wss?:)?//\w[^\s\"']*|@import[^;]*|url\([^)]*\)", text)
        print(name, addresses)
        assert not addresses


def test_page_reads_no_text_as_markup_or_code() -> None:
    banned = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|createContextualFragment|\beval\b|\bFunction\(|srcdoc"
    )
    for name in ("page.js", "pictures.js"):
        assert not re.findall(banned, FILES[name])
        assert not re.findall(r"""setAttribute\(["'](?:on|style|href|src)""", FILES[name])
    html = FILES["index.html"]
    assert not re.findall(r"<style|\sstyle=|\son\w+=|javascript:", html), "the Content-Security-Policy forbids these"
    assert re.findall(r"<script[^>]*>", html) == ['<script type="module" src="page.js">']
    assert "></script>" in html


def test_page_is_complete_and_packaged() -> None:
    referred = {name for name in re.findall(r'(?:src|href)="([^"]+)"', FILES["index.html"]) if not name.startswith("data:")}
    imported = set(re.findall(r'^import .* from "\./([^"]+)";$', FILES["page.js"], re.MULTILINE))
    assert referred | imported | {"index.html"} == set(FILES) == set(PAGE_FILES)
    ids = set(re.findall(r'\bid="([^"]+)"', FILES["index.html"]))
    asked = set(re.findall(r'\bat\("([^"]+)"\)', FILES["page.js"]))
    assert asked <= ids, f"the script asks for {asked - ids}"
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert "mlx_diffgemma.server" in setuptools["packages"]
    patterns = setuptools["package-data"]["mlx_diffgemma.server"]
    for name in FILES:
        assert any(fnmatch.fnmatch(f"page/{name}", pattern) for pattern in patterns), f"{name} would not be installed"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_entropy_is_ordered_by_lightness_and_text_readable(scheme: str) -> None:
    """WCAG 2.2: text has a contrast of 4.5. The luminance of the colours falls with the entropy, or rises in dark mode."""
    sheet = FILES["page.css"]
    pairs = re.findall(r"--([\w-]+): light-dark\((#[0-9a-f]{6}), (#[0-9a-f]{6})\)", sheet)
    colours = {name: light if scheme == "light" else dark for name, light, dark in pairs}
    luminances = [luminance(colours[f"e{level}"]) for level in range(8)]
    rising = [before < after for before, after in pairwise(luminances)]
    assert rising == [scheme == "dark"] * 7, luminances
    high = set(re.findall(r"\.e(\d) \{[^}]*--on-high", sheet))
    for level in range(8):
        ink = colours["on-high" if str(level) in high else "on-low"]
        assert_readable(ink, colours[f"e{level}"], f"e{level}")
    for ink in ("ink", "soft", "warm", "accent"):
        assert_readable(colours[ink], colours["paper"], ink)
    assert_readable(colours["soft"], colours["e0"], "special tokens")
    assert_readable(colours["on-accent"], colours["accent"], "the button")


def luminance(colour: str) -> float:
    """Relative luminance of an sRGB colour, WCAG 2.2."""
    values = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def assert_readable(ink: str, ground: str, what: str) -> None:
    dark, light = sorted((luminance(ink), luminance(ground)))
    contrast = (light + 0.05) / (dark + 0.05)
    print(f"{what}: contrast {contrast:.2f}")
    assert contrast >= 4.5, what


# ---- In a browser


def missing(reason: str) -> None:
    if WANTED:
        pytest.fail(f"MLX_DIFFGEMMA_TEST_BROWSER is set, and {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        missing("playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = WANTED if WANTED not in (None, "1") else next(filter(None, map(shutil.which, names)), None)
    with sync_playwright() as driver:
        try:
            # Chromium's sandbox does not work for root.
            chromium = driver.chromium.launch(executable_path=path, chromium_sandbox=os.geteuid() != 0)
        except Error as failed:
            missing(f"no Chromium starts: {str(failed).splitlines()[0]}")
        yield chromium
        chromium.close()


class Visit:
    """An open page, with its console messages, errors and requests."""

    def __init__(self, browser: Any, address: str) -> None:
        self.context = browser.new_context(reduced_motion="reduce", viewport={"width": 1200, "height": 800})
        self.page, self.complaints, self.requests = self.context.new_page(), [], []
        self.page.set_default_timeout(20_000)
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(address)

    def ask(self, prompt: str) -> None:
        """Send a prompt and wait until the reply ends, in whichever way."""
        self.page.fill("#prompt", prompt)
        self.page.click("#start")
        self.ended()

    def ended(self) -> None:
        self.page.wait_for_selector("#start", state="visible")
        self.page.evaluate("new Promise(requestAnimationFrame)")  # the last received data is drawn

    def canvas(self) -> list[tuple[str, str]]:
        """Text and class of each cell."""
        return [
            tuple(cell)
            for cell in self.page.eval_on_selector_all("#cells span", "all => all.map(c => [c.textContent, c.className])")
        ]

    def key(self, name: str) -> None:
        self.page.keyboard.press(name)
        self.page.evaluate("new Promise(requestAnimationFrame)")

    def text(self, selector: str) -> str:
        return self.page.text_content(selector)


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[[str], Visit]]:
    """``visit(address)`` opens a new page there. After the test, the page must have sent no request to another origin."""
    visits: list[tuple[str, Visit]] = []

    def go(address: str) -> Visit:
        visits.append((address, Visit(browser, address)))
        return visits[-1][1]

    yield go
    for address, each in visits:
        each.context.close()
        assert [url for url in each.requests if not url.startswith((address, "data:"))] == []


@contextmanager
def served(model: Any, name: str) -> Iterator[str]:
    """Run the real server with a model; gives its address."""
    import uvicorn

    from mlx_diffgemma.scheduler.engine import Engine
    from mlx_diffgemma.server.app import create_app
    from mlx_diffgemma.server.settings import Settings

    engine = Engine(model)
    engine.start()
    listening = socket.create_server(("127.0.0.1", 0))
    serving = uvicorn.Server(uvicorn.Config(create_app(engine, Settings(name)), log_level="warning"))
    thread = threading.Thread(target=serving.run, args=([listening],))
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    serving.should_exit = True
    thread.join()
    engine.stop(10)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The boxed model."""
    with served(load("sudoku", backend=BACKENDS[0]), "sudoku") as address:
        yield address


@pytest.fixture(scope="module")
def seer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A model of random weights that reads images."""
    folder = make_chat_checkpoint(tmp_path_factory.mktemp("seeing"), SEEING_SHAPE)
    with served(load(folder, backend=BACKENDS[0]), "seer") as address:
        yield address


def test_canvas_is_denoised_and_replayed(visit: Callable[[str], Visit], server: str) -> None:
    opened = visit(server)
    page = opened.page
    page.wait_for_selector("#model:text('sudoku')")
    assert len(page.input_value("#prompt")) == 36, "an example stands there"
    page.evaluate(
        """() => {
            const cells = document.getElementById("cells");
            const look = () => seen.add([...cells.children].map((cell) => cell.textContent + cell.className).join());
            globalThis.seen = new Set();
            new MutationObserver(look).observe(cells, { childList: true, subtree: true, attributes: true, characterData: true });
        }"""
    )
    page.click("summary")
    page.fill("#seed", str(SEED))
    opened.ask(PUZZLE)
    seen = page.evaluate("seen.size")
    print("different canvases seen:", seen)
    assert seen >= 2

    answer = post(server, {"model": "sudoku", "messages": [{"role": "user", "content": PUZZLE}], "seed": SEED})
    text = answer["choices"][0]["message"]["content"]
    assert opened.text(".answered .answer") == text
    last = opened.canvas()
    assert "".join(token for token, _ in last)[:36] == text
    steps = answer["diffgemma"]["denoising_steps"][0][0]
    figures = opened.text("#figures")
    assert f"denoising steps{steps}" in figures
    assert f"seed{SEED}" in figures
    assert f"tokens per forward{answer['diffgemma']['tokens_per_forward']:.1f}" in figures
    assert f"step{steps} of {steps}" in opened.text("#readout")

    page.focus("#step")
    opened.key("Home")
    first = opened.canvas()
    assert f"step1 of {steps}" in opened.text("#readout")
    changed = sum(before != after for before, after in zip(first, last, strict=True))
    print("cells that differ between the first and the last step:", changed)
    assert changed
    assert "step 1 of" in page.get_attribute("#step", "aria-valuetext")
    opened.key("End")
    assert opened.canvas() == last
    assert any("back" in name.split() for _, name in last), "this run takes cells back"

    for _ in range(3):
        opened.key("ArrowLeft")
    assert f"step{steps - 3} of" in opened.text("#readout")
    page.click("#play")  # from here to the end
    page.wait_for_selector("#play:text('Replay')")
    assert opened.canvas() == last
    page.fill("#seed", "")
    page.click("#reuse")
    assert page.input_value("#seed") == str(SEED)
    assert opened.complaints == []


def test_causal_mode_needs_no_canvas(visit: Callable[[str], Visit], server: str) -> None:
    opened = visit(server)
    opened.page.click("summary")
    opened.page.select_option("#mode", "causal")
    assert opened.page.is_disabled("#max-steps")
    opened.page.fill("#seed", "3")
    opened.page.fill("#max-tokens", "8")
    opened.ask(PUZZLE)
    body = {"messages": [{"role": "user", "content": PUZZLE}], "seed": 3, "mode": "causal", "max_tokens": 8}
    assert opened.text(".answered .answer") == post(server, body)["choices"][0]["message"]["content"] != ""
    assert not opened.page.is_visible("#film")
    assert opened.complaints == []


def post(server: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"{server}v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


# ---- Against a server with scripted responses


class Scripted:
    """Serves the page, answers each question with the next item of ``answers``, and records the questions.

    An answer is a list of chunks, or a status and a JSON object. Chunks of bytes are sent unchanged. After None the stream stays
    open until the client leaves, which sets ``left``.
    """

    def __init__(self) -> None:
        self.questions: list[tuple[dict[str, Any], str | None]] = []
        self.answers: list[Any] = []
        self.left = threading.Event()
        self.key: str | None = None
        self.model: dict[str, Any] = {"id": "some/model"}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/v1/models":
                    self.json(*outer.guarded(self.headers["Authorization"], {"data": [outer.model]}))
                    return
                name = self.path.strip("/") or "index.html"
                self.whole(200, KINDS[Path(name).suffix], FILES[name].encode())

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.questions.append((body, self.headers["Authorization"]))
                answer = outer.answers.pop(0)
                if isinstance(answer, tuple):
                    self.json(*answer)
                else:
                    self.stream(answer)

            def stream(self, answer: list[dict[str, Any] | bytes | None]) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                for chunk in answer:
                    if chunk is None:
                        self.connection.settimeout(10)
                        assert self.connection.recv(1) == b""  # the client has closed its side
                        outer.left.set()
                        return
                    data = (
                        chunk if isinstance(chunk, bytes) else f"data: {json.dumps(chunk, ensure_ascii=False)}\r\n\r\n".encode()
                    )
                    self.wfile.write(data)

            def json(self, status: int, content: Any) -> None:
                self.whole(status, "application/json", json.dumps(content).encode())

            def whole(self, status: int, kind: str, content: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                self.send_header("Content-Security-Policy", "default-src 'self'; img-src data:")
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, args=(0.05,)).start()

    def guarded(self, authorization: str | None, content: Any) -> tuple[int, Any]:
        if self.key and authorization != f"Bearer {self.key}":
            return 401, {"error": {"message": "a key is needed", "code": "invalid_api_key"}}
        return 200, content


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    served = Scripted()
    yield served
    served.server.shutdown()
    served.server.server_close()


#: Makes a page receive streams one byte at a time.
SPLIT = """() => {
    const whole = fetch;
    globalThis.fetch = async (...asked) => {
        const response = await whole(...asked);
        if (response.headers.get("Content-Type") !== "text/event-stream") return response;
        const transform = (chunk, out) => chunk.forEach((byte) => out.enqueue(Uint8Array.of(byte)));
        return new Response(response.body.pipeThrough(new TransformStream({ transform })), response);
    };
}"""

DONE = b": a comment\r\n\r\ndata: [DONE]\r\n\r\n"


def says(**delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": None}], "usage": None}


def draft(block: int, step: int, cells: list[str], entropy: list[float], accepted: list[int]) -> dict[str, Any]:
    seen = {
        "index": 0,
        "block": block,
        "step": step,
        "temperature": 0.5,
        "cells": cells,
        "entropy": entropy,
        "accepted": accepted,
    }
    return {"choices": [], "usage": None, "diffgemma": {"draft": {**seen, "done": False}}}


def test_what_a_model_writes_is_text(scripted: Scripted, visit: Callable[[str], Visit]) -> None:
    """Also works if chunks of the stream split events, lines and characters."""
    nasty = "<img src=x onerror=\"document.title='broken into'\"> 日本語 🌤 <script>document.title=1</script>"
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": nasty, "arguments": '{"a":'}}
    rest = {"index": 0, "function": {"arguments": ' "<b>b</b>"}'}}
    answer = [
        says(role="assistant", content=""),
        says(reasoning_content=nasty),
        draft(0, 1, [nasty, "\n", "<pad>"], [0.2, 0.0, 5.0], [0, 1, 0]),
        says(content=nasty[:40]),
        says(content=nasty[40:]),
        b'data: {"choices": [],\r\ndata: "usage": null}\r\n\r\n',
        says(tool_calls=[call]),
        says(tool_calls=[rest]),
        {"error": {"message": nasty}},
    ]
    scripted.answers = [answer]
    opened = visit(scripted.address)
    opened.page.evaluate(SPLIT)
    opened.ask(nasty)
    assert opened.text(".yours .answer") == nasty
    assert opened.text(".answered .answer") == nasty
    assert opened.text(".answered details p") == nasty
    assert opened.text(".answered pre") == nasty + '({"a": "<b>b</b>"})'
    assert opened.text("#alert") == nasty
    assert opened.canvas() == [(nasty, "cell e3"), ("↵", "cell e0 accepted"), ("<pad>", "cell e7 special")]
    assert opened.page.query_selector("img, b, body script") is None
    assert opened.page.title() == "mlx-diffgemma"
    assert opened.complaints == []


def test_blocks_and_what_is_taken_back(scripted: Scripted, visit: Callable[[str], Visit]) -> None:
    ends = {
        "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}],
        "diffgemma": {"tokens_per_forward": 1.25, "seeds": [5]},
    }
    scripted.answers = [
        [
            draft(0, 1, ["The", " fox"], [0.0, 0.5], [1, 1]),
            draft(0, 2, ["The", " sky"], [0.0, 0.4], [1, 0]),
            draft(0, 3, ["The", " sky"], [0.0, 0.0], [1, 1]),
            draft(0, 4, ["The", " sky"], [0.0, 0.0], [1, 1]),
            draft(1, 1, [" is", " sky"], [3.0, 1.0], [0, 0]),
            draft(1, 2, [" blue", "<turn|>"], [0.0, 0.0], [1, 1]),
            says(content="The sky blue"),
            ends,
            DONE,
        ]
    ]
    opened = visit(scripted.address)
    opened.ask("Why?")
    assert opened.text("#committed") == "The sky"
    assert [name for _, name in opened.canvas()] == ["cell e0 accepted", "cell e0 accepted special"]
    assert "taken back0" in opened.text("#readout")
    assert opened.text("#figures").startswith("tokens per forward1.3")
    opened.page.focus("#step")
    texts, backs = [], []
    for _ in range(5):
        opened.key("ArrowLeft")
        texts.append("".join(token for token, _ in opened.canvas()))
        backs.append([place for place, (_, name) in enumerate(opened.canvas()) if "back" in name.split()])
    assert texts == [" is sky", "The sky", "The sky", "The sky", "The fox"]
    assert backs == [[], [1], [1], [1], []]
    assert opened.text("#committed") == ""
    assert opened.complaints == []


def test_conversation_is_kept(scripted: Scripted, visit: Callable[[str], Visit]) -> None:
    scripted.answers = [
        [says(content="Hello."), DONE],
        [says(content="Half"), {"error": {"message": "out of time"}}],
        (429, {"error": {"message": "too many requests"}}),
        [says(content="New."), DONE],
    ]
    opened = visit(scripted.address)
    opened.ask("Hi")
    opened.page.fill("#prompt", "More")
    opened.page.press("#prompt", "Enter")
    opened.page.wait_for_selector("#alert:text('out of time')")
    opened.ask("Again")
    assert "too many requests" in opened.text("#alert")
    assert opened.page.input_value("#prompt") == "Again", "a prompt that had no reply comes back"
    opened.page.click("#new-chat")
    opened.ask("Fresh")
    assert opened.page.locator(".turn").count() == 2
    sent = [[(message["role"], message["content"]) for message in body["messages"]] for body, _ in scripted.questions]
    first = [("user", "Hi"), ("assistant", "Hello."), ("user", "More")]
    assert sent == [first[:1], first, [*first, ("assistant", "Half"), ("user", "Again")], [("user", "Fresh")]]
    body = scripted.questions[0][0]
    assert body["stream"]
    assert body["stream_options"] == {"drafts": True, "include_usage": True}
    assert set(body) == {"model", "messages", "stream", "stream_options", "mode", "seed"}, (
        "what is left empty is the server's to choose"
    )
    assert len({body["seed"] for body, _ in scripted.questions}) == 4, "each run has a seed of its own"


def test_key_is_asked_for_and_kept_in_the_tab(scripted: Scripted, visit: Callable[[str], Visit]) -> None:
    scripted.key, scripted.answers = "secret", [[says(content="Hello."), DONE]]
    opened = visit(scripted.address)
    opened.page.wait_for_selector("#key", state="visible")
    assert opened.page.get_attribute("#key", "type") == "password"
    opened.page.fill("#key", "secret")
    opened.ask("Hi")
    assert scripted.questions[0][1] == "Bearer secret"
    assert opened.text("#model") == "some/model"
    assert opened.page.evaluate("[localStorage.length, document.cookie, sessionStorage.length]") == [0, "", 1]


def test_stop_leaves_the_server(scripted: Scripted, visit: Callable[[str], Visit]) -> None:
    scripted.answers = [[says(content="Begun"), None], [says(content="On."), DONE]]
    opened = visit(scripted.address)
    opened.page.fill("#prompt", "Go")
    opened.page.click("#start")
    opened.page.wait_for_selector(".answered .answer:text('Begun')")
    opened.page.click("#stop")
    assert scripted.left.wait(10)
    opened.ended()
    assert not opened.page.is_visible("#alert")
    opened.ask("On")
    assert [message["content"] for message in scripted.questions[1][0]["messages"]] == ["Go", "Begun", "On"]
    assert opened.complaints == []


# ---- Images

#: Drops, or pastes, files of names, types and base64 contents on an element.
TRANSFER = """([selector, event, files]) => {
    const data = new DataTransfer();
    for (const [name, type, content] of files) {
        const bytes = Uint8Array.from(atob(content), (character) => character.charCodeAt(0));
        data.items.add(new File([bytes], name, { type }));
    }
    const options = { bubbles: true, cancelable: true };
    const made = event === "paste"
        ? new ClipboardEvent("paste", { ...options, clipboardData: data })
        : new DragEvent(event, { ...options, dataTransfer: data });
    return document.querySelector(selector).dispatchEvent(made);
}"""

PICTURES = {name: saved(noise(60, 80, seed=seed), "PNG") for seed, name in enumerate(("one.png", "two.png"))}


def transfer(opened: Visit, event: str, names: Sequence[str], selector: str = "#cells", kind: str = "image/png") -> bool:
    """Returns whether the browser would go on, and open the files itself."""
    files = [(name, kind, base64.b64encode(PICTURES.get(name, b"a text")).decode()) for name in names]
    return opened.page.evaluate(TRANSFER, [selector, event, files])


def shown(opened: Visit, where: str = "#pictures") -> list[str]:
    """The names of the images that are shown; each must be one that the browser could read."""
    images = opened.page.eval_on_selector_all(
        f"{where} img", "async (all) => { await Promise.all(all.map((i) => i.decode())); return all.map((i) => i.alt); }"
    )
    return list(images)


def url_of(name: str) -> str:
    return "data:image/png;base64," + base64.b64encode(PICTURES[name]).decode()


def test_images_are_dropped_pasted_and_chosen(scripted: Scripted, visit: Callable[[str], Visit], tmp_path: Path) -> None:
    scripted.model["input_modalities"] = ["text", "image"]
    scripted.answers = [(413, {"error": {"message": "the images are too large"}}), [says(content="Two squares."), DONE]]
    scripted.answers.append([says(content="Yes."), DONE])
    opened = visit(scripted.address)
    page = opened.page
    page.wait_for_selector("#add-picture", state="visible")
    assert transfer(opened, "dragover", ["one.png"]) is False
    assert page.query_selector("#prompt.dropping")
    assert transfer(opened, "drop", ["one.png"]) is False, "the browser does not leave the page"
    assert not page.query_selector("#prompt.dropping")
    page.wait_for_selector("#pictures img")
    (tmp_path / "two.png").write_bytes(PICTURES["two.png"])
    for _ in range(2):  # the same file twice
        page.set_input_files("#picture-files", tmp_path / "two.png")
    page.wait_for_selector("#pictures li:nth-child(3)")
    page.click("[aria-label='Remove two.png'] >> nth=0")
    assert transfer(opened, "paste", ["one.png"], "#prompt") is False
    page.wait_for_selector("#pictures li:nth-child(3)")
    page.click("#pictures li:nth-child(3) button")
    assert shown(opened) == ["one.png", "two.png"]

    transfer(opened, "drop", ["notes.txt"], kind="text/plain")
    page.wait_for_selector("#alert:text('notes.txt cannot be added: it is not an image')")
    opened.ask("What are these?")
    assert opened.text("#alert") == "the images are too large"
    assert shown(opened) == ["one.png", "two.png"], "they come back with the prompt"
    assert opened.page.input_value("#prompt") == "What are these?"
    page.click("#start")
    page.wait_for_selector(".answered .answer:text('Two squares.')")
    opened.ended()
    assert shown(opened) == []
    assert shown(opened, ".yours") == ["one.png", "two.png"]
    opened.ask("Really?")
    images = [{"type": "image_url", "image_url": {"url": url_of(name)}} for name in ("one.png", "two.png")]
    first = {"role": "user", "content": [*images, {"type": "text", "text": "What are these?"}]}
    reply = {"role": "assistant", "content": "Two squares."}
    sent = [body["messages"] for body, _ in scripted.questions]
    assert sent == [[first], [first], [first, reply, {"role": "user", "content": "Really?"}]]
    assert [complaint for complaint in opened.complaints if "413" not in complaint] == []


def test_a_model_of_texts_takes_no_images(scripted: Scripted, visit: Callable[[str], Visit]) -> None:
    opened = visit(scripted.address)
    opened.page.wait_for_selector("#model:text('some/model')")
    assert not opened.page.is_visible("#add-picture")
    assert transfer(opened, "drop", ["one.png"]) is False
    opened.page.wait_for_selector("#alert:text('This model reads text only.')")
    assert shown(opened) == []
    assert opened.complaints == []


def test_an_image_reaches_the_model(visit: Callable[[str], Visit], seer: str) -> None:
    opened = visit(seer)
    page = opened.page
    page.wait_for_selector("#add-picture", state="visible")
    transfer(opened, "drop", ["one.png"], selector="body")
    page.wait_for_selector("#pictures img")
    page.click("summary")
    page.fill("#seed", "5")
    page.fill("#max-tokens", "8")
    opened.ask("What is this?")
    image = {"type": "image_url", "image_url": {"url": url_of("one.png")}}
    messages = [{"role": "user", "content": [image, {"type": "text", "text": "What is this?"}]}]
    answer = post(seer, {"messages": messages, "seed": 5, "max_tokens": 8})
    assert opened.text(".answered .answer") == answer["choices"][0]["message"]["content"] != ""
    assert f"prompt tokens{answer['usage']['prompt_tokens']}" in opened.text("#figures")
    assert shown(opened, ".yours") == ["one.png"]
    assert opened.complaints == []


@pytest.mark.parametrize("width", [380, 1200])
def test_nothing_sticks_out(scripted: Scripted, visit: Callable[[str], Visit], width: int) -> None:
    scripted.model["input_modalities"] = ["text", "image"]
    cells = [" word" * (place % 3 + 1) for place in range(256)]
    scripted.answers = [[draft(0, 1, cells, [0.1] * 256, [0] * 256), says(content="x" * 500), DONE]]
    opened = visit(scripted.address)
    opened.page.set_viewport_size({"width": width, "height": 800})
    opened.page.wait_for_selector("#add-picture", state="visible")
    transfer(opened, "drop", ["one.png", "two.png"] * 10)
    opened.page.wait_for_selector("#pictures li:nth-child(20)")
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    opened.page.click("summary")
    opened.ask("y" * 300)
    assert len(opened.canvas()) == 256
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width

"""Hostile and broken HTTP requests and connections, while honest clients ask on.

The servers are the real command: one with the Sudoku model, and one with a model of random weights that reads images, which gets
the attacks with images. An attack sends whatever it likes, but the server's behaviour is fixed: each
response is valid HTTP with one of the expected statuses, an error is OpenAI's error object of one line, and nothing takes longer
than :data:`PATIENCE`. The honest clients' responses must be those of the library. At the end the log has no traceback, and the
server stops with status 0.
"""

import asyncio
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from fuzz import images
from support.checkpoints import SEEING_SHAPE, make_chat_checkpoint

ROOT = Path(__file__).parents[2]
#: Seconds in which every attack must have its response or lose its connection.
PATIENCE = 60.0
#: Attacks at the same time, and honest clients.
ATTACKERS, HONEST = 24, 2
#: Statuses that an attack may get.
EXPECTED = {200, 400, 401, 403, 404, 405, 408, 413, 415, 422, 429, 431, 501, 503, 504}

#: Values that break what does not check: wrong types, extremes, control characters, markup.
POISON: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63) - 1, 10**40, 1.5, -0.0, 1e308, 1e-320, 5e-324),
    *("", " ", "\n", "\x00", "\x1b[31m", "\u202e", "\ufeff", "x" * 5000, "<|turn>", "<turn|>", "<|channel>thought\n", "<hole>"),
    *("<hole:", "<hole:9999999999>", '<|"|>', "0" * 400, "😀", "a\ud800b", "{}", "null", "../../etc/passwd", "%s%n", "{{7*7}}"),
    *([], [[]], [None], [0], ["a"], [{}], {}, {"a": {}}, {"": ""}, {"type": "text"}, {"role": "user"}, [["a"] * 50] * 50),
]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "sudoku",
        "messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "3"}],
        "max_tokens": 4,
        "max_completion_tokens": None,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 4,
        "n": 1,
        "seed": 1,
        "stop": ["9"],
        "stream": False,
        "stream_options": {"include_usage": True, "drafts": True, "settled": True},
        "mode": "diffusion",
        "max_denoising_steps": 3,
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}],
        "tool_choice": "auto",
        "logprobs": False,
        "cache_salt": "a",
        "chat_template_kwargs": {"enable_thinking": False},
        "reasoning_effort": "low",
    },
    "/v1/completions": {
        "model": "sudoku", "prompt": "12", "max_tokens": 4, "n": 1, "seed": 1, "stop": "9", "stream": False, "temperature": 1,
        "mode": "causal", "max_denoising_steps": 3, "logprobs": None, "cache_salt": None,
    },
    "/v1/infill": {
        "model": "sudoku", "template": "12<hole:1-2>34", "marker": "<hole>", "raw": True, "seed": 1, "temperature": 1,
        "max_denoising_steps": 3, "prompt": None, "system": None, "canvas_length": 8, "min_hole_tokens": 1, "max_hole_tokens": 2,
    },
}  # fmt: skip
PATHS = (*BODIES, "/v1/models", "/v1/models/sudoku", "/health", "/metrics", "/", "/page.js", "/v1/none", "//", "/%00", "/v1/../x")


@dataclass
class Findings:
    """What the attacks and the honest clients saw."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def fail(self, kind: str, what: str) -> None:
        self.counts[kind] += 1
        self.failures.append(f"{kind}: {what[:400]}")


# --- the server ---


@asynccontextmanager
async def served(findings: Findings, model: str, *options: str) -> AsyncIterator[tuple[str, int, int]]:
    """Start the command; yields host, port and process id. Checks its log and exit status at the end."""
    with TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [sys.executable, "-c", "from mlx_diffgemma.cli import main; main()", "serve", model, "--port", "0", *options]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with (
            log.open("w") as errors,
            subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
        ):
            assert process.stdout is not None
            line = await asyncio.to_thread(process.stdout.readline)
            found = re.search(r"http://([\d.]+):(\d+)/", line)
            assert found, f"the server does not start: {line} {log.read_text()}"
            try:
                yield found[1], int(found[2]), process.pid
            finally:
                process.send_signal(signal.SIGTERM)
                try:
                    status = await asyncio.to_thread(process.wait, 60)
                except subprocess.TimeoutExpired:
                    process.kill()
                    findings.fail("HANG", "the server does not stop")
                else:
                    if status:
                        findings.fail("CRASH", f"the server's exit status is {status}")
        text = log.read_text()
        if "Traceback" in text or "internal error" in text:
            findings.fail("CRASH", f"the log has a traceback: {text[text.find('Traceback') :][-1500:]}")
        if any(ord(character) < 32 and character != "\n" for character in text):
            findings.fail("WRONG", "the log has control characters")


# --- attacks on the application ---


class Attack:
    """One attack: random choices from a generator of its own, and raw sockets. ``headers`` go into each request."""

    def __init__(self, host: str, port: int, rng: random.Random, headers: Mapping[str, str] | None = None) -> None:
        self.host, self.port, self.rng, self.headers = host, port, rng, dict(headers or {})

    def request(self, path: str, body: bytes, *, method: str = "POST", headers: dict[str, str] | None = None) -> bytes:
        own = {"Host": f"{self.host}:{self.port}", "Content-Type": "application/json", "Content-Length": str(len(body))}
        given = {**own, "Connection": "close", **self.headers, **(headers or {})}
        head = "".join(f"{name}: {value}\r\n" for name, value in given.items())
        return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("utf-8", "replace") + body

    async def connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A new connection, under Linux from one of eight addresses that are not the honest clients'."""
        own = (f"127.0.0.{2 + self.rng.randrange(8)}", 0) if sys.platform == "linux" else None
        return await asyncio.open_connection(self.host, self.port, local_addr=own)

    async def sent(self, data: bytes, *, pause: float = 0.0, shut: bool = False, read: bool = True) -> bytes:
        """Send bytes, in two parts if there is a pause, and read until the server closes. ``shut`` closes the writing side."""
        reader, writer = await self.connected()
        try:
            cut = self.rng.randrange(len(data) + 1) if pause else len(data)
            for part in (data[:cut], data[cut:]):
                if part:
                    writer.write(part)
                    await writer.drain()
                    await asyncio.sleep(pause)
            if shut:
                writer.write_eof()
            return await reader.read() if read else b""
        except (ConnectionError, BrokenPipeError):
            return b""
        finally:
            writer.close()

    def body(self) -> tuple[str, Any]:
        """A valid request with one to three damages."""
        path = self.rng.choice(list(BODIES))
        body = json.loads(json.dumps(BODIES[path]))
        for _ in range(self.rng.choice([1, 1, 2, 3])):
            self.damage(body)
        return path, body

    def damage(self, body: dict[str, Any]) -> None:
        place: Any = body
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                return
            key = self.rng.choice(keys)
            if isinstance(place[key], dict | list) and place[key] and self.rng.random() < 0.6:
                place = place[key]
                continue
            action = self.rng.random()
            if action < 0.7:
                place[key] = deepcopy(self.rng.choice(POISON))  # a value that contains itself is no JSON
            elif action < 0.85:
                del place[key]
            elif isinstance(place, dict):
                place[str(self.rng.choice(POISON))[:50]] = deepcopy(self.rng.choice(POISON))
            return

    async def wrong_fields(self) -> bytes:
        path, body = self.body()
        return await self.sent(self.request(path, json.dumps(body).encode()))

    async def broken_json(self) -> bytes:
        path, body = self.body()
        text = bytearray(json.dumps(body).encode())
        for _ in range(self.rng.randint(1, 5)):
            place = self.rng.randrange(len(text))
            text[place : place + self.rng.randint(0, 3)] = self.rng.randbytes(self.rng.randint(0, 3))
        if self.rng.random() < 0.2:
            text = bytearray(
                self.rng.choice([b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe", b"", b"1", b"nul", b'"' + b"a" * 9999])
            )
        return await self.sent(self.request(path, bytes(text)))

    async def heavy_text(self) -> bytes:
        """Texts that cost much to read: markers that never close, control tokens, spaces, long words."""
        size = self.rng.choice([1_000, 30_000, 200_000])
        unit = self.rng.choice(["<hole:", "<|turn>", "<", "<|", "<hole:1>", "a", " ", "\n", "é", "<|turn>1", "12"])
        text = unit * (size // len(unit))
        path = self.rng.choice(list(BODIES))
        body = dict(BODIES[path])
        if path == "/v1/infill":
            body["template"] = text
        elif path == "/v1/completions":
            body["prompt"] = text
        else:
            body["messages"] = [{"role": "user", "content": text}]
        return await self.sent(self.request(path, json.dumps(body).encode()))

    async def many_messages(self) -> bytes:
        turns = [{"role": self.rng.choice(["user", "assistant"]), "content": "1"} for _ in range(self.rng.choice([100, 5000]))]
        return await self.sent(self.request("/v1/chat/completions", json.dumps({"messages": turns}).encode()))

    async def wrong_route(self) -> bytes:
        method = self.rng.choice(["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "BREW", "get"])
        return await self.sent(self.request(self.rng.choice(PATHS), b"{}", method=method))

    async def wrong_header(self) -> bytes:
        wrong = {
            "Host": self.rng.choice(["evil.example", "", "[::1", "a b", "127.0.0.1.evil", "x" * 300]),
            "Content-Type": self.rng.choice(["text/plain", "", "application/json; charset=x", "multipart/form-data"]),
            "Content-Length": self.rng.choice(["-1", "x", "99999999999999999999", "0", "5, 5", "+2", "2 2"]),
            "Transfer-Encoding": self.rng.choice(["chunked", "gzip", "chunked, chunked", "identity", "\x0bchunked"]),
            "Expect": "100-continue",
            "Upgrade": "websocket",
            "Authorization": self.rng.choice(["Bearer", "Bearer x", "Basic x", "\x80"]),
            "X-Forwarded-For": self.rng.choice(["1.2.3.4", "a" * 100, ",,,", "::1"]),
            "X": "y" * self.rng.choice([10, 5000, 100_000]),
            "Origin": "https://evil.example",
            "Cookie": "a=b",
        }
        chosen = {name: wrong[name] for name in self.rng.sample(list(wrong), self.rng.randint(1, 2))}
        return await self.sent(
            self.request("/v1/completions", json.dumps(BODIES["/v1/completions"]).encode(), headers=chosen), shut=True
        )

    # --- attacks on the connection ---

    async def not_http(self) -> bytes:
        data = self.rng.choice(
            [
                self.rng.randbytes(self.rng.randint(1, 3000)),
                b"\x16\x03\x01\x02\x00" + self.rng.randbytes(500),  # TLS
                b"GET / HTTP/9.9\r\n\r\n",
                b"GET  / HTTP/1.1\r\n\r\n",
                b"GET / HTTP/1.1\r\nHost\r\n\r\n",
                b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
                b"\r\n" * 100,
                b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
                b"GET / HTTP/1.1\r\n" + b"".join(b"X%d: y\r\n" % n for n in range(3000)) + b"\r\n",
            ]
        )
        return await self.sent(data, shut=True)

    async def chunked(self) -> bytes:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        head += b"Transfer-Encoding: chunked\r\n\r\n"
        body = json.dumps(BODIES["/v1/completions"]).encode()
        parts = self.rng.choice(
            [
                b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n",
                b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n",
                b"fffffffffffffffffff\r\n" + body,
                b"-1\r\n" + body,
                b"5\r\n" + body,
                b"zz\r\n",
                b"1;" + b"x" * 20_000 + b"\r\na\r\n",
            ]
        )
        return await self.sent(head + parts, shut=True)

    async def cut_short(self) -> bytes:
        """A valid request of which only a part arrives."""
        path = self.rng.choice(list(BODIES))
        data = self.request(path, json.dumps(BODIES[path]).encode())
        return await self.sent(data[: self.rng.randrange(len(data))], shut=self.rng.random() < 0.7, read=False)

    async def half_closed(self) -> bytes:
        """A valid request whose client then closes its writing side: it gets its response."""
        response = await self.sent(self.request("/v1/completions", json.dumps(BODIES["/v1/completions"]).encode()), shut=True)
        return response if re.search(rb"HTTP/1.1 (200|429|503|504) ", response) else b"no response: " + response

    async def in_two_parts(self) -> bytes:
        path = self.rng.choice(list(BODIES))
        return await self.sent(self.request(path, json.dumps(BODIES[path]).encode()), pause=0.05)

    async def leaves(self) -> bytes:
        """A stream whose client leaves, politely or with a reset."""
        body = {**BODIES["/v1/chat/completions"], "stream": True, "max_tokens": 64}
        reader, writer = await self.connected()
        writer.write(self.request("/v1/chat/completions", json.dumps(body).encode()))
        await writer.drain()
        if self.rng.random() < 0.5:
            await asyncio.wait_for(reader.read(self.rng.choice([1, 500])), PATIENCE)
        if self.rng.random() < 0.5:
            writer.get_extra_info("socket").setsockopt(1, 13, struct.pack("ii", 1, 0))  # SO_LINGER 0: reset
        writer.close()
        return b""

    async def silent(self) -> bytes:
        """A connection that says nothing, or a little, for a second."""
        _, writer = await self.connected()
        writer.write(self.rng.choice([b"", b"G", b"POST /v1/completions HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nA"]))
        await asyncio.sleep(self.rng.uniform(0, 1))
        writer.close()
        return b""

    async def crowd(self) -> bytes:
        """Many silent connections at once."""
        opened = await asyncio.gather(*(self.connected() for _ in range(100)), return_exceptions=True)
        await asyncio.sleep(1)
        for each in opened:
            if not isinstance(each, BaseException):
                each[1].close()
        return b""

    async def pipelined(self) -> bytes:
        """Several requests in one piece."""
        one = self.request("/health", b"", method="GET", headers={"Connection": "keep-alive"})
        last = self.request("/health", b"", method="GET")
        return await self.sent(one * self.rng.randint(1, 20) + last)


ATTACKS: list[tuple[Callable[[Attack], Coroutine[Any, Any, bytes]], int]] = [
    (Attack.wrong_fields, 40),
    (Attack.broken_json, 12),
    (Attack.heavy_text, 3),
    (Attack.many_messages, 1),
    (Attack.wrong_route, 8),
    (Attack.wrong_header, 8),
    (Attack.not_http, 6),
    (Attack.chunked, 4),
    (Attack.cut_short, 5),
    (Attack.half_closed, 3),
    (Attack.in_two_parts, 3),
    (Attack.leaves, 4),
    (Attack.silent, 4),
    (Attack.crowd, 1),
    (Attack.pipelined, 2),
    *images.ATTACKS,
]


def check(response: bytes) -> str | None:
    """What is wrong with a response; None if nothing is. An empty one means that the server closed the connection."""
    while response.startswith(b"HTTP/1.1 100"):
        response = response.partition(b"\r\n\r\n")[2]
    if not response:
        return None
    head, separator, body = response.partition(b"\r\n\r\n")
    status = re.match(rb"HTTP/1\.1 (\d{3}) ", head)
    if not status or not separator:
        return f"not HTTP: {response[:200]!r}"
    if int(status[1]) not in EXPECTED:
        return f"status {int(status[1])}: {body[:300]!r}"
    if int(status[1]) >= 400 and body and b"HTTP/1.1 " not in body:  # not of pipelined requests
        try:
            error = json.loads(body)["error"]
        except (ValueError, KeyError, TypeError):
            return f"an error that is no error object: {body[:200]!r}"
        if set(error) != {"message", "type", "param", "code"} or not error["message"].isprintable():
            return f"an error of another form: {error}"
    return None


async def attack(
    host: str,
    port: int,
    rng: random.Random,
    findings: Findings,
    headers: Mapping[str, str] | None = None,
    *,
    sees: tuple[str, int] | None = None,
    patience: float = PATIENCE,
) -> None:
    """One attack of a random kind. One with images goes to the server at ``sees``, if there is one.

    An attack that has no response after ``patience`` seconds is a failure.
    """
    [(kind, _)] = rng.choices(ATTACKS, [weight for _, weight in ATTACKS])
    number = rng.getrandbits(32)
    if sees is not None and any(kind is each for each, _ in images.ATTACKS):
        host, port = sees
    try:
        response = await asyncio.wait_for(kind(Attack(host, port, random.Random(number), headers)), patience)
    except TimeoutError:
        findings.fail("HANG", f"{kind.__name__} {number}")
        return
    except ConnectionError as error:
        findings.fail("CRASH", f"{kind.__name__} {number}: no connection: {error}")
        return
    wrong = check(response)
    status = re.match(rb"HTTP/1\.1 (\d{3}) ", response)
    if wrong:
        findings.fail("CRASH" if "status 500" in wrong else "WRONG", f"{kind.__name__} {number}: {wrong}")
    else:
        findings.counts[f"status {int(status[1])}" if status else "closed"] += 1


# --- honest clients ---

Case = tuple[dict[str, Any], str]


def honest_cases(count: int = 12) -> list[Case]:
    """Requests with their expected texts, from the library."""
    from mlx_diffgemma import load
    from mlx_diffgemma.demo.sudoku import fresh_puzzle

    model, cases = load("sudoku", backend="torch", dtype="float32", device="cpu"), []
    for seed in range(count):
        messages = [{"role": "user", "content": fresh_puzzle(6, 14, seed).clues.text()}]
        body = {"model": "sudoku", "messages": messages, "seed": seed, "max_tokens": 40}
        cases.append((body, model.generate(messages, seed=seed, max_new_tokens=40).text))
    return cases


def honest_images(folder: Path, count: int = 6) -> list[Case]:
    """Requests with images, and their expected texts. Texts with markup are left out, which a response separates."""
    from mlx_diffgemma import load

    model, cases, seed = load(folder, backend="torch", dtype="float32", device="cpu"), [], 0
    while len(cases) < count:
        seed += 1
        parts = [images.part(images.random_file(random.Random(seed)), random.Random(0)), {"type": "text", "text": "Hi"}]
        messages: list[Any] = [{"role": "user", "content": parts}]
        try:
            text = model.generate(messages, seed=seed, max_new_tokens=8).text
        except ValueError:  # a format that is not supported
            continue
        if "<" not in text and "\ufffd" not in text:
            cases.append(({"messages": messages, "seed": seed, "max_tokens": 8}, text))
    return cases


async def honest(base: str, cases: list[Case], done: asyncio.Event, rng: random.Random, findings: Findings) -> None:
    """Ask one request after the other until the attacks are done."""
    async with httpx.AsyncClient(base_url=base, timeout=PATIENCE) as http:
        while not done.is_set():
            body, text = rng.choice(cases)
            try:
                answer = await http.post("/v1/chat/completions", json=body)
            except httpx.HTTPError as error:
                findings.fail("LOST", f"an honest client has no response: {type(error).__name__} {error}")
                continue
            if answer.status_code != 200 or answer.json()["choices"][0]["message"]["content"] != text:
                findings.fail("WRONG", f"an honest client's response: {answer.status_code} {answer.text[:200]}")
            else:
                findings.counts["honest, right"] += 1


async def attacked(seed: int, count: int | None, seconds: float) -> Findings:
    """Attack servers ``count`` times, or for ``seconds``."""
    findings, rng, end = Findings(), random.Random(seed), time.monotonic() + seconds
    numbers = iter(range(count if count is not None else sys.maxsize))
    options = ("--backend", "torch", "--dtype", "float32", "--device", "cpu", "--timeout", "50")
    urls = ("--allow-image-urls", "localhost", "--allow-image-urls", "*.localhost")
    with TemporaryDirectory() as folder:
        seeing = make_chat_checkpoint(Path(folder) / "seeing", SEEING_SHAPE)
        cases, with_images = await asyncio.to_thread(lambda: (honest_cases(), honest_images(seeing)))
        async with (
            served(findings, "sudoku", *options) as (host, port, _),
            served(findings, str(seeing), *options, *urls) as (*sees, _),
        ):
            done = asyncio.Event()

            async def attacker() -> None:
                for _ in numbers:
                    if time.monotonic() > end:
                        return
                    await attack(host, port, rng, findings, sees=(str(sees[0]), int(sees[1])))

            bases = [(f"http://{host}:{port}", cases)] * HONEST + [(f"http://{sees[0]}:{sees[1]}", with_images)]
            clients = [asyncio.create_task(honest(*each, done, random.Random(n), findings)) for n, each in enumerate(bases)]
            await asyncio.gather(*(attacker() for _ in range(ATTACKERS)))
            done.set()
            await asyncio.gather(*clients)
    return findings


def run(seed: int, count: int | None, seconds: float) -> Counter[str]:
    """Attack a server; prints the failures and returns the counts."""
    findings = asyncio.run(attacked(seed, count, seconds))
    for failure in findings.failures[:40]:
        print(failure, file=sys.stderr)
    return findings.counts

"""Tests the server under load: 16 clients for half an hour, each response compared with the same request alone.

    python benchmarks/load_server.py --minutes 30 --json benchmarks/results/load_server.json

The model is the Sudoku model that comes with the package. A client sends one request after the other, drawn from a fixed pool:
chats of one to five turns and raw prompts, in diffusion and causal mode, of up to 120 new tokens, some with several choices, some
with stop texts, as streams or not. In one of ten requests the client leaves midway. One of twenty requests is malformed and must
be refused with its own status. With ``--attacks 0.05``, one of twenty is an attack of the fuzzer instead (tests/fuzz/http.py).
Under Linux each client has its own address, and attacks have others. The library computes the expected responses beforehand,
alone and on the same backend. The server's resident memory is sampled during the whole run.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from mlx_diffgemma import DiffusionGemma, Generation, Reply, load
from mlx_diffgemma.backends import BATCHES
from mlx_diffgemma.chat.reply import reply
from mlx_diffgemma.demo.sudoku import fresh_puzzle
from mlx_diffgemma.prefix_cache import read
from mlx_diffgemma.prompts import PromptTokens
from mlx_diffgemma.writing import Writing, sampling_config, write

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from fuzz import http as fuzz

KEY = "load-test"
#: The most seconds that a client waits for a response.
SECONDS = 120
HEADERS = {"Authorization": f"Bearer {KEY}"}

CHAT = {"model": "sudoku", "messages": [{"role": "user", "content": "1"}]}

#: Malformed requests: the status that each must get, method, path, body (JSON or bytes), headers.
MALFORMED: list[tuple[int, str, str, Any, dict[str, str]]] = [
    (400, "POST", "/v1/chat/completions", b'{"model": "sudoku", "messages": [', HEADERS),
    (400, "POST", "/v1/chat/completions", {"model": "sudoku", "messages": []}, HEADERS),
    (400, "POST", "/v1/chat/completions", {**CHAT, "temperature": 9}, HEADERS),
    (400, "POST", "/v1/chat/completions", {**CHAT, "n": 0}, HEADERS),
    (400, "POST", "/v1/completions", {"model": "sudoku", "prompt": "1" * 2000}, HEADERS),
    (404, "POST", "/v1/chat/completions", {**CHAT, "model": "other"}, HEADERS),
    (404, "GET", "/v1/nothing", None, HEADERS),
    (405, "GET", "/v1/chat/completions", None, HEADERS),
    (401, "POST", "/v1/chat/completions", CHAT, {}),
    (413, "POST", "/v1/completions", {"model": "sudoku", "prompt": "1" * 2_000_000}, HEADERS),
]  # fmt: skip


@dataclass
class Case:
    """A request, and the response it gets when it runs alone."""

    path: str
    body: dict[str, Any]
    texts: list[str]
    reasons: list[str]


@dataclass
class Tally:
    """What the clients saw."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    unsettled: int = 0  # streams that reported a settled token that its block changed later
    first_text: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)


def make_cases(model: DiffusionGemma, count: int, rng: random.Random) -> list[Case]:
    """Requests of mixed lengths and kinds, with their expected responses."""
    cases = []
    for seed in range(count):
        body: dict[str, Any] = {"model": "sudoku", "seed": seed, "max_tokens": rng.choice([8, 40, 40, 80, 120])}
        if rng.random() < 0.2:
            body["mode"] = "causal"
        if rng.random() < 0.2:
            body["stop"] = [str(rng.randint(1, 6)) * 2]
        if rng.random() < 0.2:
            body["n"] = rng.randint(2, 3)
        if rng.random() < 0.2:
            path, text = "/v1/completions", "".join(rng.choices(".123456", k=rng.randint(5, 300)))
            body["prompt"] = text
            ids = model.prompt_ids([model.tokenizer.bos_token_id, *model.tokenizer.encode(text)])
        else:
            path, messages = "/v1/chat/completions", []
            for _ in range(rng.choice([1, 1, 1, 2, 3, 5])):
                puzzle = fresh_puzzle(6, rng.choice([10, 14, 20]), rng.randrange(1000))
                messages += [
                    {"role": "user", "content": puzzle.clues.text()},
                    {"role": "assistant", "content": puzzle.solution.text()},
                ]
            body["messages"] = messages[:-1]
            ids = model.prompt_ids(messages[:-1])
        replies = [alone(model, ids, seed + choice, path, body) for choice in range(body.get("n", 1))]
        cases.append(Case(path, body, [one.content for one in replies], [one.finish_reason for one in replies]))
    return cases


def alone(model: DiffusionGemma, ids: Any, seed: int, path: str, body: dict[str, Any]) -> Reply:
    """The library's reply for one choice of a request."""
    options = {"max_new_tokens": body["max_tokens"]}
    config = sampling_config(model.checkpoint.generation, body.get("mode", "diffusion"), options)
    writing, context = (
        Writing(config, seed, tuple(body.get("stop", ()))),
        read(model.backend, PromptTokens(ids), model.piece_rule),
    )
    if "chat" in path:
        *_, last = reply(model, context, writing)
        assert isinstance(last, Reply)
        return last
    *_, written = write(model.backend, model.tokenizer, context, writing)
    assert isinstance(written, Generation)
    return Reply.of(written)


async def client(number: int, base: str, cases: list[Case], until: float, tally: Tally, attacks: float) -> None:
    """One client: a request after the other."""
    rng, own = random.Random(number), f"127.0.1.{number + 1}" if sys.platform == "linux" else None
    async with httpx.AsyncClient(base_url=base, timeout=SECONDS, transport=httpx.AsyncHTTPTransport(local_address=own)) as http:
        await ask(http, cases, until, tally, rng, attacks)


async def ask(http: httpx.AsyncClient, cases: list[Case], until: float, tally: Tally, rng: random.Random, attacks: float) -> None:
    while time.monotonic() < until:
        if rng.random() < attacks:
            await send_attack(http, tally, rng)
            continue
        malformed = rng.random() < 0.05
        case, leaving, stream = rng.choice(cases), rng.random() < 0.1, rng.random() < 0.6
        try:
            if malformed:
                await send_malformed(http, tally, rng)
            elif stream:
                await send_stream(http, case, leaving, tally, rng)
            else:
                await send_whole(http, case, leaving, tally, rng)
        except httpx.HTTPError as error:
            tally.wrong.append(f"{type(error).__name__}: {error}; {case.path} {json.dumps(case.body)[:300]}")


async def send_attack(http: httpx.AsyncClient, tally: Tally, rng: random.Random) -> None:
    """An attack of the fuzzer's, with the key, from an address that no other client has."""
    findings = fuzz.Findings()
    headers = {"Authorization": f"Bearer {KEY}"}
    # Some attacks are valid requests, and wait as long as those of other clients.
    await fuzz.attack(http.base_url.host, http.base_url.port or 80, rng, findings, headers, patience=SECONDS)
    tally.outcomes.update({f"attack: {outcome}": count for outcome, count in findings.counts.items()})
    tally.wrong += findings.failures


async def send_malformed(http: httpx.AsyncClient, tally: Tally, rng: random.Random) -> None:
    status, method, path, body, headers = rng.choice(MALFORMED)
    content = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
    answer = await http.request(method, path, content=content, headers={**headers, "Content-Type": "application/json"})
    tally.outcomes[f"refused with {answer.status_code}"] += 1
    if answer.status_code != status or "error" not in answer.json():
        tally.wrong.append(f"{answer.status_code} for a request that should get {status}: {method} {path}")


async def send_whole(http: httpx.AsyncClient, case: Case, leaving: bool, tally: Tally, rng: random.Random) -> None:
    started = time.monotonic()
    request = asyncio.create_task(http.post(case.path, json=case.body, headers=HEADERS))
    if leaving:
        done, _ = await asyncio.wait([request], timeout=rng.uniform(0, 0.5))
        if not done:
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)
            tally.outcomes["left"] += 1
            return
    answer = await request
    if busy(answer, tally):
        return
    tally.whole.append(time.monotonic() - started)
    choices = sorted(answer.json()["choices"], key=lambda choice: choice["index"])
    texts = [choice["message"]["content"] if "message" in choice else choice["text"] for choice in choices]
    check(case, texts, [choice["finish_reason"] for choice in choices], tally)


async def send_stream(http: httpx.AsyncClient, case: Case, leaving: bool, tally: Tally, rng: random.Random) -> None:
    body = {**case.body, "stream": True}
    if rng.random() < 0.3:
        body["stream_options"] = {"include_usage": True, "drafts": rng.random() < 0.5}
    started, first, events_left = time.monotonic(), None, rng.randint(0, 4) if leaving else None
    texts, reasons, before = [""] * len(case.texts), [""] * len(case.texts), tally.unsettled
    async with http.stream("POST", case.path, json=body, headers=HEADERS) as answer:
        if answer.status_code != 200:
            await answer.aread()
            busy(answer, tally)
            return
        async for line in answer.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            tally.unsettled += bool(event.get("diffgemma", {}).get("unsettled"))
            if "error" in event:
                tally.wrong.append(f"error event: {event['error']['message']}")
                return
            for choice in event["choices"]:
                text = (choice["delta"].get("content") if "delta" in choice else choice["text"]) or ""
                first = first or (time.monotonic() - started if text else None)
                texts[choice["index"]] += text
                reasons[choice["index"]] = choice["finish_reason"] or reasons[choice["index"]]
            if events_left is not None:
                events_left -= 1
                if events_left < 0:
                    tally.outcomes["left"] += 1
                    return
    tally.whole.append(time.monotonic() - started)
    if first is not None:
        tally.first_text.append(first)
    if tally.unsettled == before:
        check(case, texts, reasons, tally)


def busy(answer: httpx.Response, tally: Tally) -> bool:
    """Count a response that is not 200. Status 429 (full queue) is allowed; any other status is an error. True if not 200."""
    if answer.status_code == 429 and int(answer.headers["Retry-After"]) >= 1:
        tally.outcomes["refused with 429"] += 1
    elif answer.status_code != 200:
        tally.wrong.append(f"{answer.status_code}: {answer.text[:200]}")
    return answer.status_code != 200


def check(case: Case, texts: list[str], reasons: list[str], tally: Tally) -> None:
    tally.outcomes["answered"] += 1
    if texts != case.texts or reasons != case.reasons:
        tally.wrong.append(f"{texts} {reasons} for {case.texts} {case.reasons}: {json.dumps(case.body)[:300]}")


async def sample_memory(pid: int, until: float, samples: list[tuple[float, float]]) -> None:
    """Sample the server's resident memory in megabytes every 5 seconds."""
    started = time.monotonic()
    while time.monotonic() < until:
        status = Path(f"/proc/{pid}/status").read_text()
        kilobytes = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
        samples.append((time.monotonic() - started, kilobytes / 1000))
        await asyncio.sleep(5)


async def run(
    port: int, pid: int, cases: list[Case], clients: int, seconds: float, attacks: float
) -> tuple[Tally, list[tuple[float, float]], str]:
    tally, samples, until = Tally(), [], time.monotonic() + seconds
    base = f"http://127.0.0.1:{port}"
    async with httpx.AsyncClient(base_url=base, timeout=120) as http:
        while True:
            try:
                await http.get("/health")
                break
            except httpx.ConnectError:
                await asyncio.sleep(0.2)
        await asyncio.gather(
            sample_memory(pid, until, samples),
            *(client(number, base, cases, until, tally, attacks) for number in range(clients)),
        )
        return tally, samples, (await http.get("/metrics", headers=HEADERS)).text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="duration of the load (default %(default)s)")
    parser.add_argument("--clients", type=int, default=16, help="clients at the same time (default %(default)s)")
    parser.add_argument("--cases", type=int, default=300, help="requests in the pool (default %(default)s)")
    parser.add_argument("--backend", default="torch", help="mlx or torch (default %(default)s)")
    parser.add_argument(
        "--batch", choices=BATCHES, default="exact", help="the server's --batch; with fast, responses may differ on PyTorch"
    )
    parser.add_argument(
        "--attacks",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the requests that are attacks of tests/fuzz (default 0)",
    )
    parser.add_argument("--json", type=Path, help="file to write the result to")
    arguments = parser.parse_args()
    cases = make_cases(load("sudoku", backend=arguments.backend, dtype="float32"), arguments.cases, random.Random(0))
    print(f"computed the expected responses of {len(cases)} requests", file=sys.stderr)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program = str(Path(sys.executable).with_name("mlx-diffgemma"))
    command = [program, "serve", "sudoku", "--port", str(port), "--backend", arguments.backend]
    command += ["--dtype", "float32", "--cache-memory", "64MiB", "--batch", arguments.batch]
    environment = {**os.environ, "MLX_DIFFGEMMA_API_KEY": KEY}
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    try:
        tally, samples, metrics = asyncio.run(
            run(port, server.pid, cases, arguments.clients, 60 * arguments.minutes, arguments.attacks)
        )
    finally:
        server.terminate()
        status = server.wait(60)
    report(arguments, tally, samples, metrics, status)


def report(arguments: argparse.Namespace, tally: Tally, samples: list[tuple[float, float]], metrics: str, status: int) -> None:
    settled = min(300.0, samples[-1][0] / 2)
    after = np.array([sample for sample in samples if sample[0] >= settled])
    slope = np.polyfit(after[:, 0], after[:, 1], 1)[0] * 3600 if len(after) > 2 else 0.0
    kept = [line for line in metrics.splitlines() if line and not line.startswith("#") and "bucket" not in line]
    result = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "date": date.today().isoformat(),
        "command": " ".join(sys.argv),
        "minutes": arguments.minutes,
        "clients": arguments.clients,
        "outcomes": dict(tally.outcomes),
        "wrong": len(tally.wrong),
        "examples_of_wrong": tally.wrong[:10],
        "unsettled_streams": tally.unsettled,
        "seconds_whole": percentiles(tally.whole),
        "seconds_to_first_text": percentiles(tally.first_text),
        "memory_mb": {
            "at_5_minutes": round(float(after[0, 1]), 1),
            "highest_after": round(float(after[:, 1].max()), 1),
            "at_the_end": round(float(after[-1, 1]), 1),
            "growth_per_hour": round(float(slope), 2),
        },
        "exit_status_after_sigterm": status,
        "metrics": kept,
    }
    print(json.dumps({name: value for name, value in result.items() if name != "metrics"}, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if tally.wrong or status:
        sys.exit(1)


def percentiles(seconds: list[float]) -> dict[str, float]:
    return {f"p{q}": round(float(np.percentile(seconds, q)), 3) for q in (50, 90, 95, 99, 100)} if seconds else {}


if __name__ == "__main__":
    main()

"""``mlx-diffgemma serve`` as a process: its messages, its shutdown, and being killed."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from mlx_diffgemma.cli import main
from mlx_diffgemma.cli.serve import serve
from support.checkpoints import make_chat_checkpoint

PROGRAM = [sys.executable, "-c", "from mlx_diffgemma.cli import main; main()", "serve"]
SECONDS = 60.0
BODY = {"messages": [{"role": "user", "content": "Hi"}], "seed": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_checkpoint(tmp_path_factory.mktemp("served") / "tiny")


@contextmanager
def served(folder: Path, *arguments: str, port: int = 0) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start the server; gives the process, once it is ready, and its address."""
    command = [*PROGRAM, str(folder), "--port", str(port), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # a small model: threads cost more than they give
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            ready = re.fullmatch(r"tiny is served at (http://127\.0\.0\.1:\d+)/\n", line)
            assert ready, line
            yield process, ready[1]
        finally:
            process.kill()


def test_a_signal_ends_streams_with_their_block(folder: Path) -> None:
    with served(folder) as (process, url):
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}
        body = BODY | {"stream": True, "max_tokens": 400, "stream_options": {"settled": False}}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=SECONDS) as response:
            events = (line.removeprefix("data: ") for line in response.iter_lines() if line)
            next(events)
            next(events)  # it is running
            process.send_signal(signal.SIGTERM)
            *_, last, done = events
        [choice] = json.loads(last)["choices"]
        assert (choice["finish_reason"], done) == ("length", "[DONE]")
        assert process.wait(SECONDS) == 0
        assert process.stderr is not None
        log = process.stderr.read()
        print(log)
        [tokens] = re.findall(r"POST /v1/chat/completions 200 in .* (\d+) new tokens", log)
        assert 0 < int(tokens) < 400
        assert int(tokens) % 8 == 0, "whole blocks"
        assert "Traceback" not in log


def test_new_requests_are_refused_while_it_stops_and_a_second_signal_ends_it(folder: Path) -> None:
    long = {"template": "<hole:1-8> and <hole:1-8>", "max_denoising_steps": 1000}

    def ask(url: str) -> None:
        with suppress(httpx.HTTPError):
            httpx.post(f"{url}/v1/infill", json=long, timeout=SECONDS)

    with served(folder) as (process, url), httpx.Client(base_url=url) as client:
        asking = threading.Thread(target=ask, args=(url,))
        asking.start()
        while "mlx_diffgemma_requests_running 1.0" not in client.get("/metrics").text:
            assert asking.is_alive()
        process.send_signal(signal.SIGTERM)
        while client.get("/health").status_code != 503:
            assert asking.is_alive()
        refused = client.post("/v1/chat/completions", json=BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "stopping")
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 128 + signal.SIGINT
        asking.join(SECONDS)


def test_killed_under_load_and_started_again(folder: Path) -> None:
    generator = random.Random(0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def load(url: str, answered: threading.Semaphore) -> None:
        with suppress(httpx.HTTPError), httpx.Client(timeout=SECONDS) as client:
            while True:
                client.post(f"{url}/v1/chat/completions", json=BODY | {"max_tokens": 16})
                answered.release()

    texts = []
    for _ in range(2):
        with served(folder, port=port) as (process, url):
            texts.append(httpx.post(f"{url}/v1/chat/completions", json=BODY, timeout=SECONDS).json()["choices"][0]["message"])
            answered = threading.Semaphore(0)
            clients = [threading.Thread(target=load, args=(url, answered)) for _ in range(3)]
            for client in clients:
                client.start()
            for _ in range(generator.randint(1, 20)):
                assert answered.acquire(timeout=SECONDS)
            process.kill()
            assert process.wait(SECONDS) == -signal.SIGKILL
            for client in clients:
                client.join(SECONDS)
                assert not client.is_alive()
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "other machines can reach 0.0.0.0; set --api-key, or use --no-api-key to let everybody in"),
        (["--host", "example.com"], "other machines can reach example.com"),
        (["--host", "192.0.2.1", "--no-api-key"], "cannot listen on 192.0.2.1, port 8000"),
        (["--api-key", "schlüssel"], "the API key must be ASCII"),
        (
            ["--max-body", "much"],
            "--max-body 'much' is not a size; write a number of bytes, or a size such as 4GiB (powers of 1,024) or 5GB "
            "(powers of 1,000)",
        ),
        (["--batch", "quick"], "'quick' is not one of 'exact', 'fast'"),
    ],
)
def test_mistakes_are_told_in_a_line(folder: Path, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(main, ["serve", str(folder), *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_a_port_in_use(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(main, ["serve", str(folder), "--port", str(port)])
    assert result.exit_code == 2
    assert result.stderr == (
        f"mlx-diffgemma: error: cannot listen on 127.0.0.1, port {port}: Address already in use; "
        f"choose another with --port or --host\n"
    )


def test_without_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)  # as if it were not installed
    result = CliRunner().invoke(main, ["serve", str(folder)])
    assert result.exit_code == 2
    assert result.stderr.endswith("the server needs uvicorn; try: pip install 'mlx-diffgemma[server]'\n")


def test_sizes() -> None:
    sizes = {"1MiB": 2**20, "4 GiB": 2**32, "512": 512, "3k": 3000, "2gb": 2 * 10**9, "0.5MiB": 2**19, "7B": 7}
    for option in ("max_body", "cache_memory"):
        kind = next(parameter.type for parameter in serve.params if parameter.name == option)
        assert {written: kind.convert(written, None, None) for written in sizes} == sizes

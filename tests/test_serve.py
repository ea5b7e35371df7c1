"""``mlx-diffgemma serve`` as a process: its messages, its shutdown, and being killed."""

import json
import os
import random
import re
import resource
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
from mlx_diffgemma.cli.serve import SPARE_CONNECTIONS, SPARE_FILES, connection_limits, serve
from mlx_diffgemma.scheduler.limits import Limits
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
            ready = re.fullmatch(r"tiny is served at (http://[\d.]+:\d+)/\n", line)
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


def many_requests(url: str, count: int) -> None:
    """Send requests and read their responses, all on one connection."""
    address = (httpx.URL(url).host, httpx.URL(url).port)
    with socket.create_connection(address, SECONDS) as connection, connection.makefile("rb") as responses:
        for _ in range(count // 50):
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 50)
            for _ in range(50):
                assert responses.readline() == b"HTTP/1.1 200 OK\r\n"
                while responses.readline() != b"\r\n":
                    pass
                assert responses.read(15) == b'{"status":"ok"}'


@pytest.mark.parametrize("read", [True, False])
def test_a_log_that_nobody_reads(folder: Path, read: bool) -> None:
    """The log is a pipe. When it is full, lines are dropped, counted and reported, and nothing else happens."""
    with served(folder) as (process, url):
        many_requests(url, 2500)
        figures = httpx.get(f"{url}/metrics").text
        [dropped] = map(float, re.findall(r"^mlx_diffgemma_log_lines_dropped_total (\S+)$", figures, re.MULTILINE))
        print(dropped)
        assert dropped > 0
        process.send_signal(signal.SIGTERM)
        if read:
            assert process.stderr is not None
            log = process.stderr.read()
            [told] = re.findall(r"(\d+) log lines were dropped", log)
            assert int(told) >= dropped
            assert "Traceback" not in log
            assert log.count("GET /health 200") > 1000
        assert process.wait(SECONDS) == 0


def test_a_log_that_is_closed(folder: Path) -> None:
    with served(folder) as (process, url):
        assert process.stderr is not None
        process.stderr.close()
        many_requests(url, 50)
        assert "mlx_diffgemma_log_lines_dropped_total 50.0" in httpx.get(f"{url}/metrics").text
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 0


def test_a_server_for_other_machines(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("anna first\nbert second\n")
    (tmp_path / "keys").chmod(0o600)
    arguments = ("--api-keys", str(tmp_path / "keys"), "--allowed-host", "host.docker.internal", "--trusted-proxy", "127.0.0.0/8")
    with served(folder, "--host", "0.0.0.0", *arguments) as (process, url), httpx.Client(base_url=url) as client:
        for host, status in (
            ("host.docker.internal:8000", 200),
            (socket.gethostname(), 200),
            ("localhost:8000", 200),
            ("192.0.2.1", 200),
            ("evil.example", 403),
        ):
            headers = {"Host": host, "Authorization": "Bearer second", "X-Forwarded-For": "203.0.113.5"}
            assert client.get("/v1/models", headers=headers).status_code == status, host
        assert client.get("/v1/models").status_code == 401
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        log = process.stderr.read()
    assert len(re.findall(r"GET /v1/models 200 .*, key bert$", log, re.MULTILINE)) == 4
    assert "warning" not in log


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "other machines can reach 0.0.0.0; set --api-key, or use --no-api-key to let everybody in"),
        (["--host", "example.com"], "other machines can reach example.com"),
        (["--host", "192.0.2.1", "--no-api-key"], "cannot listen on 192.0.2.1, port 8000"),
        *(
            (
                ["--api-key", key],
                "the API key must be ASCII without white space or control characters, and not empty; set another",
            )
            for key in ("schlüssel", "", " ", "my key", "key ", "key\n", "key\x00", "k\x7f")
        ),
        (["--api-keys", "nowhere"], "the file of API keys 'nowhere' is not a file; give one with lines NAME KEY"),
        (["--allowed-host", "http://x"], "--allowed-host 'http://x' is not a host name"),
        (["--allowed-host", "x:80"], "--allowed-host 'x:80' is not a host name; write one such as host.docker.internal, or *"),
        (["--allowed-host", ""], "--allowed-host '' is not a host name"),
        (["--trusted-proxy", "proxy.example"], "--trusted-proxy 'proxy.example' is not an address; write one such as 10.0.0.5"),
        (["--trusted-proxy", "10.0.0.0/99"], "--trusted-proxy '10.0.0.0/99' is not an address"),
        (
            ["--max-body", "much"],
            "--max-body 'much' is not a size; write a number of bytes, or a size such as 4GiB (powers of 1,024) or 5GB "
            "(powers of 1,000)",
        ),
        (
            ["--allow-image-urls", "*"],
            "--allow-image-urls '*' is not a host name; write one such as images.example.com, or *.exam",
        ),
        (["--allow-image-urls", "https://a.example"], "--allow-image-urls 'https://a.example' is not a host name"),
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
    for option in ("max_body", "max_image_bytes", "request_memory", "cache_memory"):
        kind = next(parameter.type for parameter in serve.params if parameter.name == option)
        assert {written: kind.convert(written, None, None) for written in sizes} == sizes


def test_few_open_files_mean_few_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server asks the system for as many open files as it needs, and has fewer connections if it gets fewer."""
    wanted = Limits().parallel + Limits().queue + SPARE_CONNECTIONS
    for soft, hard, most in (
        (256, resource.RLIM_INFINITY, wanted),
        (256, 400, 150),
        (256, 256, 51),
        (2**20, 2**20, wanted),
    ):
        given: list[tuple[int, int]] = []
        monkeypatch.setattr(resource, "getrlimit", lambda kind, soft=soft, hard=hard: (soft, hard))
        monkeypatch.setattr(resource, "setrlimit", lambda kind, limits, given=given: given.append(limits))
        limits = connection_limits(Limits())
        assert limits.most == most
        assert 0 < limits.per_client < most
        need = wanted + SPARE_FILES
        assert given == ([] if soft >= need else [(need if hard == resource.RLIM_INFINITY else hard, hard)])

"""Connections that are slow, silent, broken or too many, and clients that shut down their side, on the real server."""

import json
import logging
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import httpx
import pytest

from mlx_diffgemma.server import connections
from mlx_diffgemma.server.settings import ConnectionLimits
from support.checkpoints import make_chat_checkpoint
from support.serving import SECONDS, Served, Writer, serving, until

USER = [{"role": "user", "content": "Hi"}]
HERE, ELSEWHERE, THIRD = "127.0.0.1", "127.0.0.2", "127.0.0.3"
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
SHORT = ConnectionLimits(head_seconds=0.3, idle_seconds=0.3, send_seconds=0.3, linger_seconds=0.3, probe_seconds=0.1)


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Writer:
    return Writer(make_chat_checkpoint(tmp_path_factory.mktemp("chat")), ["Blue.<turn|>"])


@pytest.fixture
def endless(tmp_path: Path) -> Writer:
    return Writer(make_chat_checkpoint(tmp_path / "chat"), ["x" * 500])


@pytest.fixture
def short(writer: Writer) -> Iterator[Served]:
    """A server with short deadlines."""
    with serving(writer.model, connections=SHORT) as served:
        yield served


@contextmanager
def connected(served: Served, sent: bytes = b"", source: str = HERE) -> Iterator[socket.socket]:
    address = (HERE, int(served.url.rpartition(":")[2]))
    try:
        connection = socket.create_connection(address, SECONDS, source_address=(source, 0))
    except OSError:
        pytest.skip(f"this machine has no address {source}")
    with connection:
        connection.sendall(sent)
        yield connection


def rest(connection: socket.socket) -> bytes:
    """All that the server sends until it closes the connection."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


def until_healthy(connection: socket.socket) -> None:
    """Read the whole response to HEALTH."""
    received = b""
    while not received.endswith(b'{"status":"ok"}'):
        part = connection.recv(1000)
        assert part, received
        received += part


def error_of(response: bytes, status: int) -> dict[str, Any]:
    """The error object of a refusal that has the form of the application's own."""
    head, _, body = response.partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode()), response
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head.decode().split("\r\n")[1:])}
    assert headers["content-type"] == "application/json"
    assert headers["connection"] == "close"
    assert headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in headers["content-security-policy"]
    assert int(headers["content-length"]) == len(body)
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error, dict)
    return error


def refused(served: Served, reason: str) -> float:
    return served.metric(rf'connections_refused_total\{{reason="{reason}"\}}')


def asking(body: dict[str, Any], path: str = "/v1/chat/completions", version: str = "1.1") -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/{version}\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    return f"{head}\r\n\r\n".encode() + content


# ---- Deadlines


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost: loc", HEALTH + b"GET"])
def test_a_head_that_does_not_arrive(short: Served, sent: bytes) -> None:
    with connected(short, sent) as connection:
        received = rest(connection)
    if sent.startswith(HEALTH):
        first = received.index(b'{"status":"ok"}') + len(b'{"status":"ok"}')
        received = received[first:]
    assert error_of(received, 408)["code"] == "request_timeout"
    assert refused(short, "slow_head") == 1


def test_a_head_at_a_byte_at_a_time_is_cut(short: Served) -> None:
    begin = time.monotonic()
    with connected(short) as connection:
        connection.settimeout(0.02)
        received = b""
        for byte in b"GET /health HTTP/1.1\r\nX: " + b"a" * 1000:
            connection.sendall(bytes([byte]))
            try:
                received = connection.recv(10_000)
                break
            except TimeoutError:
                continue
    assert error_of(received, 408)
    assert time.monotonic() - begin < 3


def test_a_connection_that_is_kept_alive_and_silent_is_closed(short: Served) -> None:
    with connected(short, HEALTH) as connection:
        assert rest(connection).endswith(b'{"status":"ok"}')
    assert sum(refused(short, reason) for reason in connections.REASONS) == 0


def test_a_body_that_trickles_after_its_response(short: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_diffgemma.server.middleware.REFUSED_BODY_SECONDS", 0.2)
    with connected(short, b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nx") as connection:
        assert rest(connection).endswith(b'{"status":"ok"}')


def test_a_response_that_nobody_reads(writer: Writer) -> None:
    with serving(writer.model, connections=SHORT) as served, connected(served) as connection:
        page = b"GET /page.js HTTP/1.1\r\nHost: localhost\r\n\r\n"
        connection.setblocking(False)
        until(lambda: _filled(connection, page) and refused(served, "slow_reader") == 1)
        until(lambda: served.metric("connections_open") == 1)  # the one that asks for the metrics


def _filled(connection: socket.socket, page: bytes) -> bool:
    """Send requests until the server reads no more."""
    try:
        while True:
            connection.send(page)
    except OSError:
        return True


# ---- Broken requests


@pytest.mark.parametrize(
    ("sent", "status", "reason"),
    [
        (b"\x16\x03\x01\x02\x00\x01", 400, "bad_request"),
        (b"GET /secret\r\n\r\n", 400, "bad_request"),
        (b"GET / HTTP/1.1\r\n\r\n", 400, "bad_request"),
        (b"GET / HTTP/1.1\r\nHost: secret\r\nHost: b\r\n\r\n", 400, "bad_request"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nsecret\r\n\r\n", 400, "bad_request"),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: secret\r\n\r\n", 501, "bad_request"),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: secret\r\n\r\n", 400, "bad_request"),
        (b"POST /v1/infill HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nsecret\r\n",
         400, "bad_request"),
        (HEALTH + b"secret\r\n\r\n", 400, "bad_request"),
        (b"GET / HTTP/1.1\r\nX: " + b"secret" * 5000, 431, "head_too_large"),
        (b"GET / HTTP/1.1\r\n" + b"X: secret\r\n" * 5000, 431, "head_too_large"),
        (b"GET / HTTP/1.1\r\n" + b"secret:\r\n" * 200 + b"\r\n", 431, "head_too_large"),
        (b"POST /v1/infill HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
         + b"1\r\na\r\n" * 300, 413, "bad_request"),
        (b"GET /" + b"secret" * 100_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 431, "head_too_large"),
    ],
)  # fmt: skip
def test_what_is_not_http(writer: Writer, caplog: pytest.LogCaptureFixture, sent: bytes, status: int, reason: str) -> None:
    caplog.set_level(logging.DEBUG)
    with serving(writer.model) as served:
        with connected(served, sent) as connection:
            received = rest(connection)
        error_of(received[received.index(b"HTTP/1.1", 1) :] if sent.startswith(HEALTH) else received, status)
        assert refused(served, reason) == 1
        assert httpx.get(f"{served.url}/health").status_code == 200
    text = "\n".join(f"{record.getMessage()} {record.exc_text}" for record in caplog.records if record.name != "httpx")
    assert "refused connections: 1 " in text
    assert "secret" not in text
    assert "Traceback" not in text


def test_refusals_are_logged_at_a_bounded_rate(writer: Writer, caplog: pytest.LogCaptureFixture) -> None:
    with serving(writer.model) as served:
        for _ in range(30):
            with connected(served, b"nonsense\r\n\r\n") as connection:
                error_of(rest(connection), 400)
        assert refused(served, "bad_request") == 30
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1


# ---- Shares


def test_silent_connections_lock_nobody_out(writer: Writer) -> None:
    with serving(writer.model, connections=ConnectionLimits(most=10, per_client=10)) as served, ExitStack() as stack:
        silent = [stack.enter_context(connected(served, b"GET", ELSEWHERE)) for _ in range(10)]
        until(lambda: served.metric("connections_open") == 10)  # this takes a place itself
        for _ in range(20):
            assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
        assert refused(served, "replaced") == 1
        assert error_of(rest(silent[0]), 503)["code"] == "too_many_connections"
        silent[-1].sendall(HEALTH[3:])  # the others keep their places
        until_healthy(silent[-1])


def test_one_client_has_its_share(endless: Writer) -> None:
    endless.gate.clear()
    with serving(endless.model, connections=ConnectionLimits(most=10, per_client=4)) as served, ExitStack() as stack:
        oldest, *_ = [stack.enter_context(connected(served, b"GET", ELSEWHERE)) for _ in range(4)]
        for _ in range(4):  # each takes the place of a silent one
            stack.enter_context(connected(served, asking({"messages": USER, "max_tokens": 1}), ELSEWHERE))
        until(lambda: served.engine.running + served.engine.waiting == 4)
        assert error_of(rest(oldest), 503)["code"] == "too_many_connections"
        with connected(served, HEALTH, ELSEWHERE) as ninth:
            assert error_of(rest(ninth), 429)["code"] == "too_many_connections"
        assert httpx.get(f"{served.url}/health").status_code == 200
        assert (refused(served, "replaced"), refused(served, "per_client")) == (4, 1)
        endless.gate.set()


def test_whole_requests_keep_their_places(endless: Writer) -> None:
    """Neither newcomers of the same client nor of others end a request that is computed."""
    endless.gate.clear()
    with serving(endless.model, connections=ConnectionLimits(most=3, per_client=3)) as served, ExitStack() as stack:
        asked = [stack.enter_context(connected(served, asking({"messages": USER, "max_tokens": 1}))) for _ in range(2)]
        until(lambda: served.engine.running + served.engine.waiting == 2)
        idle = stack.enter_context(connected(served, HEALTH))
        until_healthy(idle)
        other = stack.enter_context(connected(served, HEALTH, ELSEWHERE))
        until_healthy(other)
        assert idle.recv(1000) == b"", "a connection between two requests closes without a response"
        stack.enter_context(connected(served, b"GET", THIRD))
        with connected(served, HEALTH) as newcomer:
            assert error_of(rest(newcomer), 503)["code"] == "too_many_connections"
        endless.gate.set()
        for connection in asked:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")


def test_a_proxy_s_clients_have_their_shares(endless: Writer) -> None:
    """The proxy itself has no limit. A client's requests through it are counted as the client's."""
    endless.gate.clear()
    limits = ConnectionLimits(most=10, per_client=2)
    body = asking({"messages": USER, "max_tokens": 1})

    def of(client: str) -> bytes:
        return body.replace(b"Host", b"X-Forwarded-For: 8.8.8.8, " + client.encode() + b"\r\nHost", 1)

    with (
        serving(endless.model, connections=limits, trusted_proxies=(ip_network(HERE),)) as served,
        ExitStack() as stack,
    ):
        for _ in range(5):
            stack.enter_context(connected(served, b""))
        for number in range(2):
            stack.enter_context(connected(served, of("192.0.2.1")))
            until(lambda total=number + 1: served.engine.running + served.engine.waiting == total)  # type: ignore[misc]
        with connected(served, of("192.0.2.1")) as third:
            assert third.recv(1000).startswith(b"HTTP/1.1 429")
        with connected(served, of("192.0.2.2")):
            until(lambda: served.engine.running + served.engine.waiting == 3)
            endless.gate.set()


# ---- Half-closed connections


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_half_closed_connection_gets_its_answer(writer: Writer, stream: bool, version: str) -> None:
    with serving(writer.model) as served:
        with connected(served, asking({"messages": USER, "stream": stream}, version=version)) as connection:
            connection.shutdown(socket.SHUT_WR)
            received = rest(connection)
        if version == "1.1":
            received = re.sub(rb"^(HTTP/1.1 100 Continue\r\n\r\n)*", b"", received)
        assert received.startswith(b"HTTP/1.1 200")
        assert (b"data: [DONE]\n\n" if stream else b'"content":"Blue."') in received


@pytest.mark.parametrize("stream", [False, True])
def test_a_half_closed_connection_is_probed_while_it_waits(endless: Writer, stream: bool) -> None:
    endless.gate.clear()
    with serving(endless.model, connections=SHORT) as served:
        with connected(served, asking({"messages": USER, "stream": stream, "max_tokens": 1})) as connection:
            until(lambda: endless.steps)
            connection.shutdown(socket.SHUT_WR)
            sign, received = b"still here" if stream else b"HTTP/1.1 100 Continue\r\n\r\n", b""
            while received.count(sign) < 4:
                part = connection.recv(1000)
                assert part, received
                received += part
            endless.gate.set()
            received += rest(connection)
        assert b"HTTP/1.1 200" in received
        assert (b"data: [DONE]\n\n" if stream else b'"finish_reason":"length"') in received


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("more", [b"", HEALTH[:10]])
def test_a_client_that_leaves_is_noticed(endless: Writer, stream: bool, version: str, more: bytes) -> None:
    """Also if it has sent the beginning of a next request, which is not read yet."""
    endless.gate.clear()
    with serving(endless.model, parallel=1) as served:
        with connected(served, asking({"messages": USER, "stream": stream}, version=version) + more):
            until(lambda: endless.steps)
        begin = time.monotonic()
        until(lambda: served.metric("cancellations_total") == 1)
        print(f"{time.monotonic() - begin:.2f} s")
        endless.gate.set()
        until(lambda: served.engine.running == 0)
        assert endless.steps == 1


def test_pipelined_requests_are_answered_after_a_half_close(writer: Writer) -> None:
    with serving(writer.model) as served, connected(served, HEALTH * 3) as connection:
        connection.shutdown(socket.SHUT_WR)
        assert rest(connection).count(b'{"status":"ok"}') == 3


def test_a_body_that_ends_early(writer: Writer) -> None:
    with serving(writer.model) as served, connected(served, asking({"messages": USER})[:-1]) as connection:
        connection.shutdown(socket.SHUT_WR)
        assert error_of(rest(connection), 400)["code"] == "incomplete_body"


def test_a_last_request_may_have_a_tail(writer: Writer) -> None:
    """Some clients send an empty line after a body."""
    last = asking({"messages": USER}).replace(b"Host", b"Connection: close\r\nHost", 1) + b"\r\n"
    with serving(writer.model) as served, connected(served, last) as connection:
        connection.sendall(b"\r\n")
        assert rest(connection).startswith(b"HTTP/1.1 200")

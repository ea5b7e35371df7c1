"""A connection below the application: its deadlines, and what is refused before the application.

uvicorn's h11 protocol speaks HTTP. This module adds what a server needs whose clients may be slow, silent or hostile. A refusal
has the form of the application's own: OpenAI's error object and the same headers. Nothing that a client sends reaches the log.
"""

import asyncio
import json
import logging
import re
import sys
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, cast

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from mlx_diffgemma.server.clients import client_name
from mlx_diffgemma.server.connections import REPLACED, Connections, Refusal
from mlx_diffgemma.server.errors import ApiError
from mlx_diffgemma.server.middleware import SECURITY_HEADERS

#: Bytes of a request's head that may be incomplete. Data is parsed in pieces of this size, so a head has at most twice as many.
HEAD_BYTES = 16384
#: Headers that a request may have.
MAX_HEADERS = 128
#: Chunks that a body may have, and the bytes that must be in each further one on average. To parse a chunk takes 4 us.
FREE_CHUNKS, CHUNK_BYTES = 256, 512
#: Seconds until the second sign of life: the first makes the system of a client that has left reset the connection.
SECOND_PROBE_SECONDS = 0.1
#: Seconds that a client of HTTP/1.0 may wait for its response after it has shut down its side. It understands no sign of life.
HALF_CLOSED_SECONDS = 1.0

#: For the status of an error of the parser: the reason, and the error's code and message.
_BROKEN = {
    400: ("bad_request", "bad_http", "the request is not valid HTTP/1.1"),
    413: ("bad_request", "chunks_too_small", f"the chunks of the body are too small; send {CHUNK_BYTES} bytes or more in each"),
    431: (
        "head_too_large",
        "head_too_large",
        f"the head of the request is too large; it may have {HEAD_BYTES} bytes and {MAX_HEADERS} headers",
    ),
    501: ("bad_request", "bad_http", "the server does not know this transfer encoding; send the body as it is, or in chunks"),
}


class Reader(h11.Connection):
    """h11's parser, with limits on input that takes long to parse for its size."""

    _chunks = _content = 0

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        if self.their_state is h11.IDLE:
            head = self.trailing_data[0]
            end = _END_OF_HEAD.search(head)
            if head.count(b"\n", 0, end.start() if end else len(head)) > MAX_HEADERS:
                raise h11.RemoteProtocolError("too many headers", error_status_hint=431)
            self._chunks = self._content = 0
        event = super().next_event()
        if isinstance(event, h11.Data):
            self._chunks += event.chunk_start
            self._content += len(event.data)
            if self._chunks > FREE_CHUNKS + self._content // CHUNK_BYTES:
                raise h11.RemoteProtocolError("the chunks are too small", error_status_hint=413)
        return event


_END_OF_HEAD = re.compile(rb"\r?\n\r?\n")


class Connection(H11Protocol):
    """One connection.

    Attributes:
        owner: the client that the connection counts for; None for a trusted proxy between two requests.
    """

    def __init__(self, connections: Connections, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.registry = connections
        self.limits = connections.limits
        self.conn = Reader(h11.SERVER, HEAD_BYTES)
        self.logger = _PROTOCOL_LOG
        self.app_state = {**self.app_state, "connection": self}  # becomes the scope's state
        self.owner: str | None = None
        self.trusted = False
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._half_closed = False  # the client has shut down its side
        self._ended = False  # nothing more is read

    # ---- State

    @property
    def in_progress(self) -> bool:
        """Whether there is a request without its whole response."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def replaceable(self) -> bool:
        """Whether the connection has no whole request, or a client that does not take its response."""
        if self.in_progress and not self.flow.write_paused:
            return self.conn.their_state is h11.SEND_BODY and not self.cycle.response_started
        return True

    @property
    def _awaits_response(self) -> bool:
        return self.in_progress and self.conn.their_state is not h11.SEND_BODY

    @property
    def _unseen(self) -> bool:
        """Whether the server cannot see that the client leaves, because it reads nothing.

        Either the client has shut down its side, or it has sent more than this request, which is read later.
        """
        return self._half_closed or self.flow.read_paused

    def claim(self, client: str) -> bool:
        """Count this connection as a client's while it has a request, if a proxy made it. Returns whether the client may."""
        return not self.trusted or self.registry.own(self, client)

    def release(self) -> None:
        """The request is done: undo :meth:`claim`."""
        if self.trusted:
            self.registry.own(self, None)

    # ---- The protocol's hooks

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        peer = self.client[0] if self.client else ""
        self.trusted = self.registry.proxies.trusts(peer)
        self.owner = None if self.trusted else client_name(peer)
        if refusal := self.registry.admit(self):
            self.refuse(refusal)
        else:
            self._after("head", self.limits.head_seconds, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_timers()
        self.registry.left(self)

    def data_received(self, data: bytes) -> None:
        for start in range(0, len(data), HEAD_BYTES):
            if self._ended or self.conn.their_state is h11.MUST_CLOSE:  # after the last request
                return
            super().data_received(data[start : start + HEAD_BYTES])

    def handle_events(self) -> None:
        super().handle_events()
        if self._ended:
            return
        if self.conn.their_state is not h11.IDLE:
            self._stop("head")
        elif self.conn.trailing_data[0] and "head" not in self._timers:  # the first bytes of a next request
            self._unset_keepalive_if_required()
            self._after("head", self.limits.head_seconds, self._head_is_late)
        if self._unseen and self._awaits_response and "probe" not in self._timers:
            self._after("probe", self.limits.probe_seconds, self._probe)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP. ``handle_events`` calls this while it handles h11's error, which has the status."""
        error = sys.exception()
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        reason, code, message = _BROKEN.get(status, _BROKEN[400])
        self.refuse(Refusal(reason, ApiError(status, message, code=code)))

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client has shut down its side, or has left. Returns whether to keep the connection for the response."""
        self._half_closed = True
        if self._ended or not self.in_progress:
            return False
        if not self._awaits_response:
            message = "the body ended before its length; send all of it"
            self.refuse(Refusal("bad_request", ApiError(400, message, code="incomplete_body")))
            return False
        if self.scope["http_version"] != "1.1":
            self._after("leave", HALF_CLOSED_SECONDS, self._leave)
        self._probe()
        self._after("probe", min(SECOND_PROBE_SECONDS, self.limits.probe_seconds), self._probe)
        return True

    def on_response_complete(self) -> None:
        self._stop("probe")
        super().on_response_complete()  # may begin the next request, or refuse it
        if self._half_closed and not self.in_progress:
            self.transport.close()
        if self._ended:
            return
        if self.transport.is_closing():
            self._after("send", self.limits.send_seconds, self._reader_is_slow)
        elif not self.in_progress and self.conn.their_state is h11.SEND_BODY:
            self._linger()  # the middleware has waited for the rest of the body in vain

    def pause_writing(self) -> None:
        super().pause_writing()
        self._after("send", self.limits.send_seconds, self._reader_is_slow)

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._stop("send")

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._after("send", self.limits.send_seconds, self._reader_is_slow)

    def shutdown(self) -> None:
        if self._ended:
            self.transport.abort()
        else:
            super().shutdown()

    # ---- Ends

    def refuse(self, refusal: Refusal) -> None:
        """Answer with an error, if no other response has begun, and close the connection."""
        self.registry.note(refusal.reason)
        # Clients expect that a connection closes between two requests, and try again.
        silent = refusal is REPLACED and self.cycle is not None and not self.in_progress and not self.conn.trailing_data[0]
        begun = False
        if self.in_progress:
            begun = self.cycle.response_started
            self.cycle.disconnected, self.cycle.waiting_for_100_continue = True, False
            self.cycle.message_event.set()
        if not (silent or begun or self.transport.is_closing()):
            head = self.in_progress and self.scope["method"] == "HEAD"
            self.transport.write(_response(refusal.error, self.server_state.default_headers, body=not head))
        self._linger()

    def _linger(self) -> None:
        """Close the connection, but let the client read the response first: what it still sends would reset the connection."""
        self._ended = True
        self._stop_timers()
        self._unset_keepalive_if_required()
        self.conn.send_failed()
        self.flow.resume_writing()
        self.registry.left(self)
        if self._half_closed or self.transport.is_closing() or not self.registry.linger(self):
            self.transport.close()
        else:
            self.flow.resume_reading()
            self.transport.write_eof()
        flushed = self.transport.get_write_buffer_size() == 0
        self._after("linger", self.limits.linger_seconds if flushed else self.limits.send_seconds, self.transport.abort)

    def _head_is_late(self) -> None:
        message = f"the head of the request did not arrive within {self.limits.head_seconds:g} s"
        self.refuse(Refusal("slow_head", ApiError(408, message, code="request_timeout")))

    def _reader_is_slow(self) -> None:
        self.registry.note("slow_reader")
        self.transport.abort()

    def _leave(self) -> None:
        if self.in_progress and not self.cycle.response_started:
            self.transport.abort()

    def _probe(self) -> None:
        """Send a sign of life, which a client skips. If the client has left, its system resets the connection."""
        if self._ended or not self._awaits_response or not self._unseen or self.transport.is_closing():
            return
        event: h11.Event | None = None
        if self.cycle.response_started:
            if self.scope["state"].get("event_stream"):
                event = h11.Data(data=b": still here\n\n")
        elif self.scope["http_version"] == "1.1":
            event = h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
        if event is not None and not self.flow.write_paused:
            self.transport.write(self.conn.send(event) or b"")
        self._after("probe", self.limits.probe_seconds, self._probe)

    # ---- Timers

    def _after(self, name: str, seconds: float, action: Callable[[], None]) -> None:
        """Call ``action`` after ``seconds``, in place of the timer that has this name."""
        self._stop(name)

        def run() -> None:
            self._timers.pop(name, None)
            action()

        self._timers[name] = self.loop.call_later(seconds, run)

    def _stop(self, name: str) -> None:
        if timer := self._timers.pop(name, None):
            timer.cancel()

    def _stop_timers(self) -> None:
        for name in tuple(self._timers):
            self._stop(name)


def _response(error: ApiError, headers: list[tuple[bytes, bytes]], *, body: bool) -> bytes:
    """The bytes of a refusal. h11 could not write it: the client may have broken its rules."""
    content = json.dumps(error.body(), separators=(",", ":")).encode()
    own = {"Content-Type": "application/json", "Content-Length": len(content), "Connection": "close"}
    lines = [
        f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}".encode(),
        *(name + b": " + value for name, value in headers),
        *(f"{name}: {value}".encode() for name, value in (own | error.headers | SECURITY_HEADERS).items()),
    ]
    return b"\r\n".join(lines) + b"\r\n\r\n" + (content if body else b"")


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a record of the protocol is more than a request that was cancelled when the server stopped."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


#: The log of uvicorn's protocol. Its warnings are about clients, one line for each, so only its errors are logged.
_PROTOCOL_LOG = logging.getLogger("mlx_diffgemma.server.protocol")
_PROTOCOL_LOG.setLevel(logging.ERROR)
_PROTOCOL_LOG.addFilter(_is_news)


def server_config(app: Starlette, **options: Any) -> uvicorn.Config:
    """uvicorn's configuration for an application of :func:`~mlx_diffgemma.server.app.create_app`."""
    connections: Connections = app.state.connections

    class Protocol(Connection):
        def __init__(self, **arguments: Any) -> None:
            super().__init__(connections, **arguments)

    return uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # the middleware reads them
        timeout_keep_alive=cast(int, connections.limits.idle_seconds),  # uvicorn only passes it to call_later
        **options,
    )

"""The middleware that every request and response passes, and the reading of bodies."""

import asyncio
import logging
import secrets
import time
from collections.abc import Collection
from contextlib import suppress

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_diffgemma.server.clients import Keys, Proxies, parse_address
from mlx_diffgemma.server.errors import ApiError
from mlx_diffgemma.server.memory import RequestMemory
from mlx_diffgemma.server.metrics import Metrics

log = logging.getLogger("mlx_diffgemma.server")

#: Status of a request whose client has left. It is not an HTTP status, and is only counted, never sent.
LEFT = 499
#: Seconds in which a client must send its body, and the rest of a body that is refused before it is read.
BODY_SECONDS, REFUSED_BODY_SECONDS = 30.0, 5.0
#: Bytes of a body that give its client one second more; and of a body that is refused, up to the seconds of one that is not.
BODY_BYTES, REFUSED_BODY_BYTES = 1 << 18, 1 << 20

#: The page may use its own script and style and talk to its own server, nothing else. No other page may show it in a frame.
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_METHODS = ("GET", "HEAD", "POST", "OPTIONS", "PUT", "DELETE", "PATCH")


def error_response(error: ApiError) -> Response:
    """The response with OpenAI's error object."""
    return JSONResponse(error.body(), error.status, error.headers)


def unexpected(error: BaseException) -> ApiError:
    """Log a bug, and return the error for the client: a number that finds the traceback in the log."""
    reference = secrets.token_hex(6)
    log.error("internal error %s", reference, exc_info=error)
    return ApiError(500, f"internal error; the server's log has the details under {reference}", kind="server_error")


class Observed:
    """Counts requests, logs one line for each, and answers unexpected errors. Nothing that a client sent reaches the log."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), LEFT  # until a response begins
        unread = True  # more of the body may come
        state = scope.setdefault("state", {})
        state["started"] = started

        async def received() -> Message:
            nonlocal unread
            message = await receive()
            unread = message["type"] == "http.request" and message.get("more_body", False)
            return message

        async def rest() -> None:
            """Read the rest of the body, longer if it arrives fast."""
            began, size = asyncio.get_running_loop().time(), 0
            with suppress(TimeoutError):
                async with asyncio.timeout(REFUSED_BODY_SECONDS) as limit:
                    while unread:
                        size += len((await received()).get("body", b""))
                        limit.reschedule(began + min(REFUSED_BODY_SECONDS + size / REFUSED_BODY_BYTES, BODY_SECONDS))

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                # Read the rest of the body first: if the connection closes while the client still writes, it is reset, and the
                # client may lose the response.
                status = message["status"]
                if status != 408:  # the server has already waited for the body
                    await rest()
                headers = MutableHeaders(scope=message)
                state["event_stream"] = headers.get("content-type", "").startswith("text/event-stream")
                for name, value in SECURITY_HEADERS.items():
                    headers[name] = value
            await send(message)

        try:
            await self.app(scope, received, observed)
        except ClientDisconnect:
            status = LEFT  # while it sent its body
        except Exception as error:  # noqa: BLE001 (a bug must not end the server, and its text must not reach the client)
            told = unexpected(error)
            if status == LEFT:
                await error_response(told)(scope, receive, observed)
        route = scope["route"].path if "route" in scope else "(unknown)"
        method = scope["method"] if scope["method"] in _METHODS else "(unknown)"
        seconds = time.perf_counter() - started
        status = state.get("status", status)
        self.metrics.requests.labels(route, status).inc()
        self.metrics.duration.labels(route).observe(seconds)
        before, new = state.get("tokens", (0, 0))
        key = state.get("key_name")
        if key is not None:
            self.metrics.key_requests.labels(key).inc()
            self.metrics.key_tokens.labels(key, "prompt").inc(before)
            self.metrics.key_tokens.labels(key, "new").inc(new)
        log.info(
            "%s %s %d in %.3f s, %d prompt tokens, %d new tokens%s",
            *(method, route, status, seconds, before, new),
            "" if key is None else f", key {key}",
        )


class Guarded:
    """Refuses requests without an API key, if there are keys, and requests whose Host header names another host.

    A page of another site can make a browser send requests to this server. That site can also let its own host name point to this
    machine; the Host header then has that name. A Host header with an IP address is safe, because no name server was asked. So is
    a request without the header, because browsers always send it.

    The request's state then has ``client``, a name that stands for one client (its key if there are several keys, else its
    address), ``key_name``, None without a key, and ``held``, the memory that the request holds until its response has ended. A
    proxy's connection counts as its client's during the request.

    Args:
        hosts: names that the Host header may have, without the port; empty for any.
        open_paths: paths that need no key.
        memory: counts what the requests hold.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Keys,
        proxies: Proxies,
        hosts: Collection[str],
        open_paths: Collection[str],
        memory: RequestMemory,
    ) -> None:
        self.app, self.keys, self.proxies, self.memory = app, keys, proxies, memory
        self.hosts, self.open_paths = {host.lower() for host in hosts}, open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, state = Headers(scope=scope), scope.setdefault("state", {})
        peer = scope["client"][0] if scope.get("client") else ""
        address = self.proxies.client(peer, headers.getlist("x-forwarded-for"))
        key = _key(headers)
        state["key_name"] = self.keys.name_of(key) if key else None
        state["client"] = state["key_name"] if state["key_name"] and len(self.keys) > 1 else address
        connection = state.get("connection")  # None if another server runs the application
        state["held"] = self.memory.held(state["client"])
        try:
            refusal = self._refusal(scope["path"], headers, key, state["key_name"])
            if refusal is None and connection is not None and not connection.claim(address):
                refusal = too_many_connections()
            await (error_response(refusal) if refusal else self.app)(scope, receive, send)
        finally:
            state["held"].close()
            if connection is not None:
                connection.release()

    def _refusal(self, path: str, headers: Headers, key: str, key_name: str | None) -> ApiError | None:
        if self.hosts and "host" in headers and not self._is_own(_host(headers["host"])):
            message = (
                "the Host header does not name this server; use the address it listens on, or start the server with "
                "--allowed-host NAME"
            )
            return ApiError(403, message, code="host_not_allowed")
        if not self.keys or path in self.open_paths or key_name is not None:
            return None
        message = "the API key is wrong" if key else "this server needs an API key; send the header Authorization: Bearer KEY"
        return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def _is_own(self, host: str) -> bool:
        return host in self.hosts or parse_address(host) is not None


def too_many_connections() -> ApiError:
    """The error for a client that has its share of the connections."""
    message = "this client has too many connections to this server; close some, or try again later"
    return ApiError(429, message, kind="rate_limit_error", code="too_many_connections", headers={"Retry-After": "1"})


def _key(headers: Headers) -> str:
    """The API key of a request; empty if it has none."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _host(header: str) -> str:
    """The name in a Host header, in lower case and without the port; an IPv6 address without its brackets."""
    header = header.strip().lower()
    return header[1:].partition("]")[0] if header.startswith("[") else header.partition(":")[0].removesuffix(".")


async def read_body(request: Request, max_bytes: int, hint: str = "") -> bytearray:
    """Read a JSON body, and stop when it exceeds ``max_bytes``. The request's memory counts its bytes.

    Raises ApiError; ``hint`` is the end of its message about the size.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "the body must be JSON; send it with Content-Type: application/json")
    too_large = ApiError(
        413,
        f"the body is larger than this server's limit of {max_bytes} bytes{hint}",
        code="body_too_large",
        headers={"Connection": "close"},
    )
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_bytes:
        raise too_large
    # Counted at once: if bodies were counted as they arrive, many at the same time could all fail.
    announced = int(length) if length.isdecimal() else 0
    request.state.held.take(announced)
    body = bytearray()
    end = asyncio.get_running_loop().time() + BODY_SECONDS
    try:
        async with asyncio.timeout_at(end) as limit:
            async for chunk in request.stream():
                body += chunk
                request.state.held.set(max(announced, len(body)))
                if len(body) > max_bytes:
                    raise too_large
                limit.reschedule(end + len(body) / BODY_BYTES)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:g} s", headers={"Connection": "close"}) from None
    return body

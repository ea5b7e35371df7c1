"""What every request passes before it reaches a route, and every answer after it."""

import asyncio
import hmac
import logging
import secrets
import time
from collections.abc import Collection
from contextlib import suppress

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_diffgemma.server.errors import ApiError
from mlx_diffgemma.server.metrics import Metrics

log = logging.getLogger("mlx_diffgemma.server")

#: The client has left: no status of HTTP, and never sent, but counted.
LEFT = 499
#: What a client has to send its body within; and the rest of one that is refused before it is read.
BODY_SECONDS, REFUSED_BODY_SECONDS = 30.0, 5.0

#: The page uses its own script and style, and talks to its own server; nothing else, and nothing of it in a frame.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_METHODS = ("GET", "HEAD", "POST", "OPTIONS", "PUT", "DELETE", "PATCH")


def error_response(error: ApiError) -> Response:
    """OpenAI's error object."""
    return JSONResponse(error.body(), error.status, error.headers)


def unexpected(error: BaseException) -> ApiError:
    """What a client is told of a bug: a number that finds the traceback in the log."""
    reference = secrets.token_hex(6)
    log.error("internal error %s", reference, exc_info=error)
    return ApiError(500, f"internal error; the server's log has more under {reference}", kind="server_error")


class Observed:
    """Counts requests and logs a line for each; answers what nobody expected. Nothing a client wrote reaches the log."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), LEFT  # as long as nothing is answered
        unread = True  # there may be more of the body
        state = scope.setdefault("state", {})
        state["started"] = started

        async def received() -> Message:
            nonlocal unread
            message = await receive()
            unread = message["type"] == "http.request" and message.get("more_body", False)
            return message

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                # A connection that is closed on a client still writing is reset, and what it was answered is lost with it.
                status = message["status"]
                with suppress(TimeoutError):
                    async with asyncio.timeout(REFUSED_BODY_SECONDS):
                        while unread and status != 408:  # one that does not come has been waited for
                            await received()
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
            await send(message)

        try:
            await self.app(scope, received, observed)
        except ClientDisconnect:
            status = LEFT  # in the middle of its own body
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
        log.info("%s %s %d in %.3f s, %d prompt tokens, %d new tokens", method, route, status, seconds, before, new)


class Guarded:
    """Refuses requests without the key, where there is one, and requests to hosts that are not this one.

    A page of another site can make a browser send requests here, also under a name of its own that it lets point to this machine;
    the name is then in the Host header.

    Args:
        hosts: names that the Host header may say, without the port; empty for any.
        open_paths: what needs no key.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, hosts: Collection[str], open_paths: Collection[str]) -> None:
        self.app, self.hosts, self.open_paths = app, {host.lower() for host in hosts}, open_paths
        self.api_key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        await (error_response(refusal) if refusal else self.app)(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        if self.hosts and _host(headers.get("host", "")) not in self.hosts:
            return ApiError(403, "this server does not go by the name in the Host header", code="host_not_allowed")
        if self.api_key is None or scope["path"] in self.open_paths:
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), self.api_key):
            return None
        headers_of_refusal = {"WWW-Authenticate": "Bearer"}
        message = "a key is needed: send Authorization: Bearer KEY" if not key else "the key is wrong"
        return ApiError(401, message, code="invalid_api_key", headers=headers_of_refusal)


def _host(header: str) -> str:
    """The name in a Host header, without the port, in lower case; an IPv6 address without brackets."""
    header = header.strip().lower()
    return header[1:].partition("]")[0] if header.startswith("[") else header.partition(":")[0]


async def read_body(request: Request, max_bytes: int) -> bytes:
    """A body of JSON, of which no more than ``max_bytes`` are ever held; raises ApiError."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "the body must be JSON: send Content-Type: application/json")
    too_large = ApiError(
        413, f"the body is larger than {max_bytes} bytes", code="body_too_large", headers={"Connection": "close"}
    )
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:g} s", headers={"Connection": "close"}) from None
    return bytes(body)

"""Fetches the images of a request from the web, from hosts that the operator allows.

The checks are those that protect what only this machine can reach (see addresses.py). A host's name is looked up once, all its
addresses must be public, and the connection goes to one of these addresses itself: an answer of another look-up cannot change
where it goes. TLS verifies the certificate for the name. A redirect is checked like a new URL. The server uses no proxy, no
credentials and no cookies.

All of this runs in the event loop, without blocking it. A few downloads run at a time, and the clients take turns.
"""

import asyncio
import socket
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from urllib.parse import urljoin

import h11

from mlx_diffgemma.server.addresses import Hosts, Url, as_address, is_public
from mlx_diffgemma.server.errors import ApiError
from mlx_diffgemma.server.memory import Held
from mlx_diffgemma.server.protocol import HEAD_BYTES, Reader

#: Downloads at the same time, and the requests that may wait for one.
AT_ONCE, MOST_WAITING = 8, 64
#: Seconds that the images of one request may take, including the wait for its turn.
SECONDS = 30.0
#: Redirects that are followed from one URL.
MAX_REDIRECTS = 3
#: Addresses of one host that are tried, and the seconds for each to accept the connection.
ADDRESSES, CONNECT_SECONDS = 3, 5.0

_REDIRECTS = (301, 302, 303, 307, 308)
_HEADERS = (("User-Agent", "mlx-diffgemma"), ("Accept", "image/*, video/*;q=0.5"), ("Accept-Encoding", "identity"))

#: Returns the IP addresses of a host's name. Raises OSError if there are none.
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]


async def look_up(host: str, port: int) -> Sequence[str]:
    """The addresses of a host's name, as the system finds them."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class Downloads:
    """Fetches images for requests.

    Args:
        hosts: the hosts that are allowed; see :class:`~mlx_diffgemma.server.addresses.Hosts`. Without any, each URL is refused.
        max_bytes: bytes of all images of one request.
        resolve: looks up the addresses of a host.
        allows: whether a connection may go to an address.
        seconds: seconds that the images of one request may take.
        tls: how certificates are verified. By default, as the system does it.
    """

    def __init__(
        self,
        hosts: Sequence[str],
        max_bytes: int,
        *,
        resolve: Resolve = look_up,
        allows: Callable[[str], bool] = is_public,
        seconds: float = SECONDS,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.hosts, self.max_bytes, self.seconds = Hosts(hosts), max_bytes, seconds
        self._resolve, self._allows = resolve, allows
        self._tls = tls or (ssl.create_default_context() if hosts else None)
        self._turns = Turns(AT_ONCE, MOST_WAITING)

    async def fetch(self, urls: Iterable[str], client: str, held: Held) -> dict[str, bytes]:
        """Fetch URLs of one request, one after the other. ``held`` counts their bytes.

        Raises ApiError if a URL is not allowed, or does not give its image.
        """
        checked = {url: self._checked(url) for url in urls}
        fetched: dict[str, bytes] = {}
        try:
            async with asyncio.timeout(self.seconds), self._turns.turn(client):
                for text, url in checked.items():
                    fetched[text] = await self._follow(url, self.max_bytes - sum(map(len, fetched.values())), held)
        except TimeoutError:
            raise ApiError(
                400, f"the images at the URLs did not arrive within {self.seconds:g} s; send them as data URLs"
            ) from None
        return fetched

    def _checked(self, text: str) -> Url:
        url = Url.parse(text)
        address = as_address(url.host)
        if address is not None and not self._allows(address):
            raise _not_public(url)
        if url not in self.hosts:
            message = (
                f"this server fetches no images from {url.authority}; send a data URL, or start the server with "
                f"--allow-image-urls {url.authority}"
            )
            raise ApiError(400, message, code="image_url_not_allowed")
        return url

    async def _follow(self, url: Url, room: int, held: Held) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            try:
                content = await self._get(url, room, held)
            except (OSError, h11.RemoteProtocolError) as failed:
                raise _failed(url, _reason(failed)) from None
            if isinstance(content, bytes):
                return content
            url = self._checked(content)
        raise _failed(url, f"there are more than {MAX_REDIRECTS} redirects")

    async def _get(self, url: Url, room: int, held: Held) -> bytes | str:
        """The body of a response; for a redirect, the URL that it leads to."""
        connection = Reader(h11.CLIENT, HEAD_BYTES)
        reader, writer = await self._connect(url)
        try:
            headers = [("Host", url.authority), *_HEADERS, ("Connection", "close")]
            writer.write(connection.send(h11.Request(method="GET", target=url.target, headers=headers)) or b"")
            connection.send(h11.EndOfMessage())
            body = bytearray()
            while True:
                event = connection.next_event()
                if event is h11.NEED_DATA:
                    connection.receive_data(await reader.read(HEAD_BYTES))
                elif isinstance(event, h11.Response):
                    if (leads_to := _redirect(url, event)) is not None:
                        return leads_to
                    _check_response(url, event, room)
                elif isinstance(event, h11.Data):
                    held.take(len(event.data))
                    body += event.data
                    if len(body) > room:
                        raise _too_large(url)
                elif isinstance(event, h11.EndOfMessage):
                    return bytes(body)
                elif not isinstance(event, h11.InformationalResponse):
                    raise h11.RemoteProtocolError("the connection ended")
        finally:
            writer.transport.abort()

    async def _connect(self, url: Url) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        try:
            addresses = await self._resolve(url.host, url.port)
        except (OSError, UnicodeError):
            raise _failed(url, "its name cannot be looked up") from None
        if not addresses or not all(map(self._allows, addresses)):
            raise _not_public(url)
        tls, name = (self._tls, url.host) if url.scheme == "https" else (None, None)
        error: Exception = OSError("it has no address")
        for address in addresses[:ADDRESSES]:
            try:
                async with asyncio.timeout(CONNECT_SECONDS):
                    return await asyncio.open_connection(address, url.port, ssl=tls, server_hostname=name)
            except (OSError, TimeoutError) as failed:
                error = failed
        raise error


def _redirect(url: Url, response: h11.Response) -> str | None:
    """Where a response leads; None if it is no redirect."""
    location = next((value for name, value in response.headers if name == b"location"), None)
    if response.status_code not in _REDIRECTS or location is None:
        return None
    try:
        return urljoin(f"{url.scheme}://{url.authority}{url.target}", location.decode("latin-1"))
    except ValueError:
        raise _failed(url, "it leads to a URL that is not valid") from None


def _check_response(url: Url, response: h11.Response, room: int) -> None:
    if response.status_code != 200:
        raise _failed(url, f"it answers with status {response.status_code}")
    headers = dict(response.headers)
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise _failed(url, "it answers with a compressed body")
    length = headers.get(b"content-length", b"")
    if length.isdigit() and int(length) > room:
        raise _too_large(url)


def _reason(error: Exception) -> str:
    match error:
        case TimeoutError():
            return "it does not accept the connection in time"
        case ssl.SSLError():
            return "its TLS certificate is not valid, or it does not speak TLS"
        case h11.RemoteProtocolError():
            return "its answer is not valid HTTP, or ends too early"
        case _:
            return "the connection fails"


def _not_public(url: Url) -> ApiError:
    return ApiError(400, f"{url.host} is not on the public internet; send a data URL", code="image_url_not_allowed")


def _failed(url: Url, reason: str) -> ApiError:
    return ApiError(400, f"the image cannot be fetched from {url.authority}: {reason}", code="image_url_failed")


def _too_large(url: Url) -> ApiError:
    return ApiError(413, f"the images from {url.authority} are larger than this server's limit", code="images_too_large")


class Turns:
    """Lets ``most`` tasks through at a time. Next is one of the client that has the fewest, in order of arrival.

    Only the event loop uses it.
    """

    def __init__(self, most: int, most_waiting: int) -> None:
        self.most, self.most_waiting = most, most_waiting
        self._running: Counter[str] = Counter()
        self._waiting: dict[asyncio.Future[None], str] = {}

    @asynccontextmanager
    async def turn(self, client: str) -> AsyncIterator[None]:
        """Wait for a turn of a client, and keep it. Raises ApiError (429) if too many wait; half of them may be one client's."""
        if self._running.total() < self.most:
            self._running[client] += 1
        else:
            await self._wait(client)
        try:
            yield
        finally:
            self._end(client)

    async def _wait(self, client: str) -> None:
        own = sum(other == client for other in self._waiting.values())
        if len(self._waiting) == self.most_waiting or own == self.most_waiting // 2:
            message = "too many requests wait for images from URLs; try again later, or send data URLs"
            raise ApiError(429, message, kind="rate_limit_error", code="rate_limit_exceeded", headers={"Retry-After": "5"})
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[turn] = client
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._waiting.pop(turn, None)
            else:  # the turn came at the same moment
                self._end(client)
            raise

    def _end(self, client: str) -> None:
        self._running[client] -= 1
        self._running += Counter()  # drops clients without tasks
        if self._waiting and self._running.total() < self.most:
            turn = min(self._waiting, key=lambda each: self._running[self._waiting[each]])
            self._running[self._waiting.pop(turn)] += 1
            turn.set_result(None)

"""Each client's share of the server's connections, and why connections are refused.

The connections themselves are in protocol.py.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

from mlx_diffgemma.server.clients import Proxies
from mlx_diffgemma.server.errors import ApiError
from mlx_diffgemma.server.metrics import Metrics
from mlx_diffgemma.server.middleware import too_many_connections
from mlx_diffgemma.server.settings import ConnectionLimits

log = logging.getLogger("mlx_diffgemma.server")

#: Refused connections, beyond the limit, that stay open until their clients have read the response.
MAX_LINGERING = 64
#: Seconds between two lines of the log about refusals.
LOG_SECONDS = 10.0

#: Why a connection was refused or closed: the labels of the metric, and the words of the log.
REASONS = {
    "bad_request": "broke the rules of HTTP",
    "head_too_large": "sent too large a head",
    "slow_head": "sent no request in time",
    "slow_reader": "did not take the response",
    "per_client": "had too many connections",
    "full": "found all connections taken",
    "replaced": "made room for newer ones",
}


class Refusal(NamedTuple):
    """Why a connection is refused, and the error for its client."""

    reason: str
    error: ApiError


class Connection(Protocol):
    """What is counted: an open connection.

    Attributes:
        owner: the address of its client; None while a trusted proxy waits for a request.
        replaceable: whether a newer connection may take its place.
    """

    owner: str | None

    @property
    def replaceable(self) -> bool: ...

    def refuse(self, refusal: Refusal) -> None:
        """Answer with the refusal's error, and close."""
        ...


_PER_CLIENT = Refusal("per_client", too_many_connections())
_FULL, REPLACED = (
    Refusal(reason, ApiError(503, message, kind="server_error", code="too_many_connections", headers={"Retry-After": "1"}))
    for reason, message in (
        ("full", "this server has no more connections; try again later"),
        ("replaced", "this server needs the connection for a newer one; try again later"),
    )
)


class Connections:
    """The open connections of one server. Only the event loop uses them.

    One client, told by its address, has at most ``limits.per_client`` connections. When a client has its share, or when all
    connections are taken, a newcomer takes the place of a connection without a whole request: of its own client, or of the client
    that has the most. The oldest one makes room, because an honest client sends its request at once. So silent connections lock
    nobody out.

    Trusted proxies speak for many clients. They have no limit of their own, and never lose a connection that waits for a request.
    Each of their requests counts as its client's.
    """

    def __init__(self, limits: ConnectionLimits, proxies: Proxies, metrics: Metrics) -> None:
        self.limits, self.proxies = limits, proxies
        self._of: dict[str | None, dict[Connection, None]] = {}  # by client, in order of arrival; None for waiting proxies
        self._lingering: set[Connection] = set()
        self._count, self._refused = 0, metrics.refused
        self._unlogged: Counter[str] = Counter()
        self._log_timer: asyncio.TimerHandle | None = None
        metrics.watch_connections(lambda: self._count, lambda: len(self._lingering))
        for reason in REASONS:
            self._refused.labels(reason)

    def admit(self, connection: Connection) -> Refusal | None:
        """Count a new connection. Returns why it is refused, if it is."""
        owner = connection.owner
        if not self._has_room(owner):
            return _PER_CLIENT
        if self._count >= self.limits.most and not self._replace((*self._rivals(owner), *self._held(owner))):
            return _FULL
        self._of.setdefault(owner, {})[connection] = None
        self._count += 1
        return None

    def _held(self, owner: str | None) -> tuple[Connection, ...]:
        """A client's connections, from the oldest to the newest; none for a proxy, which loses no connection."""
        return () if owner is None else tuple(self._of.get(owner, ()))

    def _rivals(self, owner: str | None) -> Iterator[Connection]:
        """The connections of clients that have more than ``owner``: from the client that has the most."""
        held = len(self._held(owner))
        names = sorted((name for name in self._of if name is not None), key=lambda name: len(self._of[name]), reverse=True)
        return (connection for name in names if len(self._of[name]) > held and name != owner for connection in self._of[name])

    def _has_room(self, owner: str | None) -> bool:
        """Whether a client may have one more connection, perhaps in the place of another one of its own."""
        held = self._held(owner)
        return len(held) < self.limits.per_client or self._replace(held)

    @staticmethod
    def _replace(candidates: Iterable[Connection]) -> bool:
        """Refuse the first of the candidates without a whole request. Returns whether there is one."""
        replaced = next((connection for connection in candidates if connection.replaceable), None)
        if replaced is not None:
            replaced.refuse(REPLACED)
        return replaced is not None

    def left(self, connection: Connection) -> None:
        """Stop counting a connection, if it is counted."""
        held = self._of.get(connection.owner, {})
        if connection in held:
            del held[connection]
            self._count -= 1
            if not held:
                del self._of[connection.owner]
        self._lingering.discard(connection)

    def own(self, connection: Connection, owner: str | None) -> bool:
        """Count a proxy's connection as its client's, or as the proxy's again. Returns whether the client may have it."""
        if connection not in self._of.get(connection.owner, {}):
            return True  # it is closing
        if not self._has_room(owner):
            self.note("per_client")
            return False
        self.left(connection)
        connection.owner = owner
        self._of.setdefault(owner, {})[connection] = None
        self._count += 1
        return True

    def linger(self, connection: Connection) -> bool:
        """Whether a refused connection may stay open until its client has read the response."""
        if len(self._lingering) >= MAX_LINGERING:
            return False
        self._lingering.add(connection)
        return True

    def note(self, reason: str) -> None:
        """Count a refusal, and log it: at once, or in the next summary."""
        self._refused.labels(reason).inc()
        self._unlogged[reason] += 1
        if self._log_timer is None:
            self._log()

    def _log(self) -> None:
        self._log_timer = None
        if self._unlogged:
            told = ", ".join(f"{count} {REASONS[reason]}" for reason, count in sorted(self._unlogged.items()))
            log.warning("refused connections: %s", told)
            self._unlogged.clear()
            self._log_timer = asyncio.get_running_loop().call_later(LOG_SECONDS, self._log)

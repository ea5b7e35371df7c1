"""Which URLs the server may fetch: the hosts that the operator allows, and addresses of the public internet only.

A URL that a client sends, or that a redirect leads to, must not reach what only this machine can reach: its own services, its
network, or the metadata of a cloud.
"""

import ipaddress
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self
from urllib.parse import quote, urlsplit

from mlx_diffgemma.server.errors import ApiError

#: The most characters of a URL.
MAX_URL = 4096
PORTS = {"http": 80, "https": 443}
#: Special networks that ``ipaddress`` takes for public, at least in some versions of Python: protocol assignments, relays of 6to4
#: (which lead to an IPv4 address), and the address at which each machine on Azure finds its host.
_SPECIAL_IPV4 = tuple(map(ipaddress.IPv4Network, ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32")))
#: IPv6 on the internet, and special networks in it: protocol assignments with Teredo, documentation, and 6to4. Addresses that
#: stand for IPv4, such as ::ffff:127.0.0.1 or those of NAT64, are outside.
_IPV6 = ipaddress.IPv6Network("2000::/3")
_SPECIAL_IPV6 = tuple(map(ipaddress.IPv6Network, ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")))
_NAME = r"(?=.{1,253}(?::|$))[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?(?:\.[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?)*"
_PATTERN = re.compile(rf"(?:\*\.)?{_NAME}(?::[0-9]{{1,5}})?")
_HOST = re.compile(_NAME)
#: Characters that a URL may have as they are. Others are escaped, as browsers do.
_KEPT = "".join(map(chr, range(0x21, 0x7F)))


def is_public(address: str) -> bool:
    """Whether an IP address is one of a single machine on the public internet."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:  # fe80::1%eth0, for example
        return False
    if not parsed.is_global or parsed.is_multicast:
        return False
    if isinstance(parsed, ipaddress.IPv4Address):
        return not any(parsed in network for network in _SPECIAL_IPV4)
    return parsed in _IPV6 and not any(parsed in network for network in _SPECIAL_IPV6)


def as_address(host: str) -> str | None:
    """The IPv4 address that the system takes a host for, in any of its forms: 127.1, 0x7f000001 or 2130706433 is 127.0.0.1."""
    try:
        return socket.inet_ntoa(socket.inet_aton(host))
    except OSError:
        return None


def is_pattern(text: str) -> bool:
    """Whether a text names hosts, as in :class:`Hosts`."""
    return _PATTERN.fullmatch(text.lower()) is not None


class Hosts:
    """The hosts whose URLs may be fetched.

    Args:
        patterns: names such as ``images.example.com``, or ``*.example.com`` for all names below it. A port may follow. Without
            one, only the usual ports are allowed: 80 for http and 443 for https.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        self._patterns = []
        for pattern in patterns:
            name, _, port = pattern.lower().partition(":")
            self._patterns.append((name, int(port) if port else None))

    def __contains__(self, url: "Url") -> bool:
        ports = (url.port, None) if url.port == PORTS[url.scheme] else (url.port,)
        return any(
            port in ports and (url.host.endswith(name[1:]) if name.startswith("*.") else url.host == name)
            for name, port in self._patterns
        )


@dataclass(frozen=True)
class Url:
    """A URL of http or https.

    Attributes:
        host: in lower case, and without a dot at its end.
        target: path and query, as a request has them.
    """

    scheme: str
    host: str
    port: int
    target: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a URL. Raises ApiError."""
        try:
            if len(text) > MAX_URL or re.search(r"[\x00-\x20\x7f\\]", text):
                raise ValueError
            parts = urlsplit(quote(text, safe=_KEPT))
            port = parts.port
        except ValueError:  # also of urlsplit and of the port
            raise ApiError(400, f"the URL of an image is not valid, or has more than {MAX_URL} characters") from None
        if parts.scheme not in PORTS:
            raise ApiError(400, "the URL of an image must be a data URL, or begin with https:// or http://")
        if parts.username is not None or parts.password is not None:
            raise ApiError(400, "the URL of an image has a user name or a password; the server sends none")
        host = (parts.hostname or "").removesuffix(".")
        if not _HOST.fullmatch(host):
            raise ApiError(400, "the URL of an image has no valid host name")
        query = f"?{parts.query}" if parts.query else ""
        return cls(parts.scheme, host, PORTS[parts.scheme] if port is None else port, (parts.path or "/") + query)

    @property
    def authority(self) -> str:
        """The value of the Host header."""
        return self.host if self.port == PORTS[self.scheme] else f"{self.host}:{self.port}"

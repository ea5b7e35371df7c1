"""Who a client is: its address, also behind a proxy, and its API key."""

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mlx_diffgemma.errors import InputError

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

#: The name of the key of ``--api-key``.
DEFAULT_KEY = "default"
#: Entries of an X-Forwarded-For header that are read, from the right.
_MAX_HOPS = 32
#: Bytes of a file of keys at most.
_MAX_KEY_FILE = 1 << 20
_KEY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def client_name(address: str) -> str:
    """The name that an address counts under.

    An IPv6 address counts by its /64, because one client usually owns all addresses of a /64. Link-local addresses share their
    /64 with the neighbours, so these count one by one.
    """
    parsed = parse_address(address)
    if not isinstance(parsed, ipaddress.IPv6Address) or parsed.is_link_local:
        return str(parsed or address)
    return f"{ipaddress.IPv6Address(int(parsed) >> 64 << 64)}/64"


def parse_address(text: str) -> Address | None:
    """An IP address, without the port that some proxies add; None if it is none. ``::ffff:192.0.2.1`` is 192.0.2.1."""
    text = text.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return address.ipv4_mapped or address if isinstance(address, ipaddress.IPv6Address) else address


class Proxies:
    """The proxies whose X-Forwarded-For header is trusted. Without them, no header changes who a client is."""

    def __init__(self, networks: Iterable[Network]) -> None:
        self.networks = tuple(networks)

    def trusts(self, address: str) -> bool:
        """Whether an address is a trusted proxy's."""
        parsed = parse_address(address) if self.networks else None
        return parsed is not None and any(parsed in network for network in self.networks)

    def client(self, peer: str, forwarded: Sequence[str]) -> str:
        """The name of a request's client.

        Args:
            peer: the address that the connection comes from.
            forwarded: the request's X-Forwarded-For headers, in order. Each proxy adds, at the right, the address that it was
                asked from. So the client is the right-most address that is no trusted proxy; anybody may have written what is
                further left.
        """
        client = peer
        hops = ",".join(forwarded).rsplit(",", _MAX_HOPS)[-_MAX_HOPS:]
        while hops and self.trusts(client):
            address = parse_address(hops.pop())
            if address is None:
                break
            client = str(address)
        return client_name(client)


class Keys:
    """The API keys that clients may send, each with a name."""

    def __init__(self, keys: Mapping[str, str]) -> None:
        self._digests = {name: _digest(key) for name, key in keys.items()}

    def __len__(self) -> int:
        return len(self._digests)

    def name_of(self, key: str) -> str | None:
        """The name of a key; None if it is none of the keys. The time that this takes does not depend on ``key``'s content."""
        digest, found = _digest(key), None
        for name, known in self._digests.items():
            if hmac.compare_digest(digest, known):
                found = name
        return found


def _digest(key: str) -> bytes:
    """Digests have one length, so comparing them does not tell the length of a key."""
    return hashlib.sha256(key.encode()).digest()


def check_key(key: str, where: str = "the API key") -> None:
    """Raises InputError if no client could send the key in a header."""
    if not key or not all("!" <= character <= "~" for character in key):
        raise InputError(f"{where} must be ASCII without white space or control characters, and not empty; set another one")


def read_keys(path: Path) -> dict[str, str]:
    """Read a file of API keys: a line ``NAME KEY`` for each; lines that begin with # are comments.

    Raises:
        InputError: the file cannot be read, or a line is wrong. The message has the number of the line, and never a key.
    """
    try:
        if not path.is_file():  # a pipe could make the server wait forever
            raise InputError(f"the file of API keys {str(path)!r} is not a file; give one with lines NAME KEY")
        with path.open("rb") as file:
            content = file.read(_MAX_KEY_FILE + 1)
    except OSError as wrong:
        raise InputError(f"cannot read the file of API keys {str(path)!r}: {wrong.strerror}") from None
    if len(content) > _MAX_KEY_FILE:
        raise InputError(f"the file of API keys {str(path)!r} is larger than {_MAX_KEY_FILE} bytes; give one with lines NAME KEY")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"the file of API keys {str(path)!r} is not UTF-8 text; give one with lines NAME KEY") from None
    keys: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        fields = line.split()
        if not fields or fields[0].startswith("#"):
            continue
        where = f"line {number} of the file of API keys {str(path)!r}"
        if len(fields) != 2:
            raise InputError(f"{where} must have a name and a key, with a space between them")
        name, key = fields
        if not _KEY_NAME.fullmatch(name):
            raise InputError(f"{where}: a name has at most 64 letters, digits, dots, dashes and underscores; choose another name")
        check_key(key, f"{where}: the key")
        if name in keys or key in keys.values():
            raise InputError(f"{where} repeats the {'name' if name in keys else 'key'} of an earlier line; choose another one")
        keys[name] = key
    if not keys:
        raise InputError(f"the file of API keys {str(path)!r} has no keys; add a line NAME KEY for each")
    return keys

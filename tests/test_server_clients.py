"""Who a client is: addresses, proxies, keys and names of the server."""

import asyncio
import logging
import os
from ipaddress import ip_network
from pathlib import Path

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse

from mlx_diffgemma.errors import InputError
from mlx_diffgemma.server.clients import Keys, Proxies, client_name, read_keys
from mlx_diffgemma.server.memory import RequestMemory
from mlx_diffgemma.server.middleware import Guarded
from support.checkpoints import make_chat_checkpoint
from support.serving import Writer, serving


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1:2", "fe80::1:2"),
        ("fe80::1%eth0", "fe80::1%eth0"),
        ("", ""),
        ("a name", "a name"),
    ],
)
def test_names_of_addresses(address: str, name: str) -> None:
    assert client_name(address) == name


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        ("192.0.2.9", ["203.0.113.5"], "192.0.2.9"),  # it is no proxy, so its header means nothing
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["203.0.113.5"], "203.0.113.5"),
        ("10.0.0.1", ["6.6.6.6, 203.0.113.5"], "203.0.113.5"),  # the client wrote the first one itself
        ("10.0.0.1", ["6.6.6.6, 203.0.113.5, 10.9.9.9"], "203.0.113.5"),
        ("10.0.0.1", ["6.6.6.6", "203.0.113.5"], "203.0.113.5"),
        ("10.0.0.1", ["203.0.113.5:4711"], "203.0.113.5"),
        ("10.0.0.1", ["[2001:db8::5]:4711"], "2001:db8::/64"),
        ("10.0.0.1", ["2001:db8::5"], "2001:db8::/64"),
        ("10.0.0.1", ["203.0.113.5, unknown"], "10.0.0.1"),
        ("10.0.0.1", ["10.0.0.2, 10.0.0.3"], "10.0.0.2"),
        ("10.0.0.1", [""], "10.0.0.1"),
        ("10.0.0.1", [",".join(["10.0.0.2"] * 100_000)], "10.0.0.2"),
        ("2001:db8:9::1", ["203.0.113.5"], "203.0.113.5"),
        ("::ffff:10.0.0.1", ["203.0.113.5"], "203.0.113.5"),
    ],
)
def test_clients_behind_proxies(peer: str, forwarded: list[str], client: str) -> None:
    assert Proxies([ip_network("10.0.0.0/8"), ip_network("2001:db8:9::1")]).client(peer, forwarded) == client


async def _state(proxies: Proxies, keys: dict[str, str], **headers: str) -> tuple[int, dict[str, str | None]]:
    async def told(request: Request) -> JSONResponse:
        return JSONResponse({"client": request.state.client, "key_name": request.state.key_name})

    async def app(scope, receive, send):  # type: ignore[no-untyped-def]
        await (await told(Request(scope)))(scope, receive, send)

    guarded = Guarded(app, Keys(keys), proxies, (), (), RequestMemory(0))
    transport = httpx.ASGITransport(guarded, client=("10.0.0.1", 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        response = await client.get("/", headers={name.replace("_", "-"): value for name, value in headers.items()})
        return response.status_code, response.json()


@pytest.mark.parametrize(
    ("proxies", "keys", "client", "key_name"),
    [
        ([], {}, "10.0.0.1", None),
        (["10.0.0.1"], {}, "203.0.113.5", None),
        (["10.0.0.1"], {"default": "k1"}, "203.0.113.5", "default"),
        (["10.0.0.1"], {"anna": "k1", "bert": "k2"}, "anna", "anna"),
    ],
)
def test_what_the_routes_learn(proxies: list[str], keys: dict[str, str], client: str, key_name: str | None) -> None:
    known = Proxies(map(ip_network, proxies))
    status, state = asyncio.run(_state(known, keys, X_Forwarded_For="6.6.6.6, 203.0.113.5", Authorization="Bearer k1"))
    assert (status, state) == (200, {"client": client, "key_name": key_name})


def test_keys_with_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys"
    file.write_bytes(b"\xef\xbb\xbf# who may use it\r\nanna  first-key\r\n\r\n  bert\tsecond=key\r\n")
    keys = read_keys(file)
    assert keys == {"anna": "first-key", "bert": "second=key"}
    caplog.set_level(logging.INFO)
    writer = Writer(make_chat_checkpoint(tmp_path / "chat"), ["Blue.<turn|>"])
    with serving(writer.model, api_keys=keys) as served:
        body = {"messages": [{"role": "user", "content": "Hi"}]}
        for key, status in (("first-key", 200), ("second=key", 200), ("second", 401), ("first-keysecond=key", 401)):
            response = served.post("chat/completions", body, headers={"Authorization": f"Bearer {key}"})
            assert response.status_code == status, key
        figures = httpx.get(f"{served.url}/metrics", headers={"Authorization": "Bearer first-key"}).text
    assert 'mlx_diffgemma_key_requests_total{key="bert"} 1.0' in figures
    assert 'mlx_diffgemma_key_tokens_total{key="bert",kind="new"}' in figures
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("mlx_diffgemma")]
    assert sum(line.endswith(", key anna") for line in lines) == 2
    assert sum(line.endswith(", key bert") for line in lines) == 1
    assert not [line for line in lines if "first-key" in line or "second" in line]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no keys; add a line NAME KEY for each"),
        (b"# nothing\n", "has no keys"),
        (b"anna\n", "line 1 .* must have a name and a key"),
        (b"a k\n\nanna my key\n", "line 3 .* must have a name and a key"),
        (b"anna secret\nanna other\n", "line 2 .* repeats the name"),
        (b"anna secret\nbert secret\n", "line 2 .* repeats the key"),
        (b"anna schl\xc3\xbcssel\n", "line 1 .*: the key must be ASCII"),
        (b"anna a\x01b\n", "line 1 .*: the key must be ASCII"),
        (b"a\x1b[1m secret\n", "line 1 .*: a name has at most 64 letters"),
        (b"anna secret\xff\n", "is not UTF-8"),
        (b"#" * (2 << 20), "is larger than"),
    ],
)
def test_files_of_keys_that_are_wrong(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(InputError, match=message) as wrong:
        read_keys(file)
    assert "secret" not in str(wrong.value)
    assert "\n" not in str(wrong.value)


def test_a_file_of_keys_that_is_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", tmp_path / "none"):
        with pytest.raises(InputError, match="is not a file"):
            read_keys(path)


@pytest.mark.parametrize(
    ("hosts", "host", "allowed"),
    [
        ((), "anything.example", True),
        (("localhost", "box"), "localhost:8000", True),
        (("localhost", "box"), "BOX.", True),
        (("localhost", "box"), "192.0.2.1:8000", True),
        (("localhost", "box"), "[2001:db8::1]:8000", True),
        (("localhost", "box"), "host.docker.internal:8000", False),
        (("localhost", "host.docker.internal"), "host.docker.internal:8000", True),
        (("localhost",), "192.0.2.1.evil.example", False),
        (("localhost",), "localhost.evil.example", False),
        (("localhost",), "", False),
    ],
)
def test_hosts(tmp_path: Path, hosts: tuple[str, ...], host: str, allowed: bool) -> None:
    writer = Writer(make_chat_checkpoint(tmp_path / "chat"), ["Blue.<turn|>"])
    with serving(writer.model, hosts=hosts) as served:
        response = httpx.get(f"{served.url}/health", headers={"Host": host})
    assert response.status_code == (200 if allowed else 403)
    if not allowed:
        assert "--allowed-host" in response.json()["error"]["message"]

"""Images at URLs: which URLs the server fetches, and what it does with slow, endless and hostile servers."""

import asyncio
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from mlx_diffgemma.server.addresses import Hosts, Url, is_pattern, is_public
from mlx_diffgemma.server.downloads import Downloads, Turns
from mlx_diffgemma.server.errors import ApiError
from mlx_diffgemma.server.memory import FREE, RequestMemory

CONTENT = b"an image" * 1000
OK = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(CONTENT) + CONTENT


# ---- Addresses and URLs


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.8.9.1", "10.1.2.3", "172.16.0.1", "192.168.0.1", "169.254.169.254", "0.0.0.0", "100.64.0.1"),
        *(
            "100.100.100.200",
            "192.0.0.192",
            "192.0.0.9",
            "192.88.99.1",
            "198.18.0.1",
            "224.0.1.1",
            "240.0.0.1",
            "255.255.255.255",
        ),
        *(
            "192.0.2.1",
            "168.63.129.16",
            "::1",
            "::",
            "::127.0.0.1",
            "::ffff:127.0.0.1",
            "::ffff:8.8.8.8",
            "fe80::1",
            "fe80::1%lo",
        ),
        *(
            "fc00::1",
            "fd00:ec2::254",
            "fec0::1",
            "ff0e::1",
            "64:ff9b::7f00:1",
            "64:ff9b::808:808",
            "64:ff9b:1::1",
            "2002:7f00:1::",
        ),
        *("2001::1", "2001:20::1", "2001:db8::1", "3fff::1", "5f00::1", "100::1", "localhost", "", "1", "127.0.0.1:80"),
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "192.0.1.1", "2606:4700::1111", "2a00:1450:4001:82a::200e"])
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    ("pattern", "right", "wrong"),
    [
        ("example.com", ["http://example.com/a", "https://EXAMPLE.com.:443/", "http://example.com:80"],
         ["http://a.example.com/", "http://example.com:81/", "https://example.com:80/", "http://example.com.evil/",
          "http://evil/example.com", "http://evil?example.com", "http://evil#.example.com", "http://example.community/"]),
        ("*.example.com", ["http://a.example.com/", "http://a.b.example.com/"],
         ["http://example.com/", "http://evilexample.com/", "http://aexample.com/"]),
        ("Example.com:8080", ["http://example.com:8080/", "https://example.com:8080/"], ["http://example.com/"]),
    ],
)  # fmt: skip
def test_hosts(pattern: str, right: list[str], wrong: list[str]) -> None:
    assert is_pattern(pattern)
    hosts = Hosts([pattern])
    assert [url for url in right if Url.parse(url) not in hosts] == []
    assert [url for url in wrong if Url.parse(url) in hosts] == []


@pytest.mark.parametrize("text", ["*", "*.", "a b", "http://a", "a/b", "a:", "a:x", "-a", "a..b", "[::1]", "a*", "", "é", "a@b"])
def test_texts_that_name_no_host(text: str) -> None:
    assert not is_pattern(text)


@pytest.mark.parametrize(
    "url",
    [
        *("ftp://a/", "file:///etc/passwd", "gopher://a/", "http:///a", "http://", "http://a b/", "http://a\n/", "http://a\\@b/"),
        *(
            "http://user@a/",
            "http://user:pass@a/",
            "http://@a/",
            "http://a:b/",
            "http://a:99999/",
            "http://[::1]/",
            "http://[",
            "a",
        ),
        *("http://é/", "http://a%00b/", "http://" + "a" * 300, "http://a/" + "b" * 5000, "http://a\x00/", "http://a_b..c/"),
    ],
)
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(ApiError) as refused:
        Url.parse(url)
    assert refused.value.status == 400
    assert refused.value.message.isprintable()


def test_urls_are_sent_as_browsers_do() -> None:
    assert Url.parse("https://A.b/c/é?d=ü&e=%20#f").target == "/c/%C3%A9?d=%C3%BC&e=%20"
    assert Url.parse("http://a?b").target == "/?b"
    assert (Url.parse("http://a:80").authority, Url.parse("http://a:81").authority) == ("a", "a:81")


# ---- Downloads

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def web(answer: bytes | Handler, tls: ssl.SSLContext | None = None) -> AsyncIterator[tuple[int, list[bytes]]]:
    """A server that answers each request with the same bytes, or as a function does. Yields its port and the requests' heads."""
    heads: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            heads.append(await reader.readuntil(b"\r\n\r\n"))
            if isinstance(answer, bytes):
                writer.write(answer)
            else:
                await answer(reader, writer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1], heads
    finally:
        server.close()


async def local(host: str, port: int) -> Sequence[str]:
    """Every name is this machine."""
    return ["127.0.0.1"]


def downloads(hosts: Sequence[str], **options: Any) -> Downloads:
    """Downloads that may come from this machine."""
    given = {"resolve": local, "allows": lambda address: address == "127.0.0.1", "seconds": 5.0}
    return Downloads(hosts, options.pop("max_bytes", 1 << 20), **given | options)


async def fetched(url: str, port: int, **options: Any) -> bytes:
    """The content of a URL at ``pictures.example``, which is this machine. ``PORT`` in it stands for the port."""
    url = url.replace("PORT", str(port))
    source = downloads(options.pop("hosts", [f"pictures.example:{port}"]), **options)
    return (await source.fetch([url], "a client", RequestMemory(1 << 30).held("a client")))[url]


def refused(work: Callable[[], Any], status: int = 400) -> str:
    """The message of the error that a coroutine raises."""
    with pytest.raises(ApiError) as error:
        asyncio.run(work())
    print(error.value.message)
    assert error.value.status == status
    assert error.value.message.isprintable()
    return error.value.message


@pytest.mark.parametrize(
    "answer",
    [
        OK,
        b"HTTP/1.1 200 OK\r\n\r\n" + CONTENT,
        b"HTTP/1.0 200 OK\r\n\r\n" + CONTENT,
        b"HTTP/1.1 100 Continue\r\n\r\n" + OK,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(CONTENT), CONTENT),
    ],
    ids=["length", "close", "1.0", "continue", "chunked"],
)
def test_an_image_is_fetched(answer: bytes) -> None:
    async def work() -> list[bytes]:
        async with web(answer) as (port, heads):
            assert await fetched("http://pictures.example:PORT/a.png?b=c", port) == CONTENT
            return heads

    [head] = asyncio.run(work())
    print(head)
    assert head.startswith(b"GET /a.png?b=c HTTP/1.1\r\nHost: pictures.example:")
    assert b"cookie" not in head.lower()
    assert b"authorization" not in head.lower()


def test_nothing_from_the_environment_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    test_an_image_is_fetched(OK)


@pytest.mark.parametrize(
    "url", ["http://pictures.example/a", "http://other.example:PORT/", "http://127.0.0.1:PORT/", "http://pictures.example.:1/"]
)
def test_other_hosts_are_not_asked(url: str) -> None:
    async def work() -> None:
        async with web(OK) as (port, heads):
            try:
                await fetched(url, port)
            finally:
                assert heads == []

    assert "this server fetches no images from" in refused(work)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "2130706433", "0x7f000001", "017700000001", "127.1", "0177.0.0.1", "10.0.0.1", "0"]
)
def test_forms_of_private_addresses(host: str) -> None:
    """They are refused even if the operator allows the host, and even if nothing is looked up."""

    async def work() -> None:
        source = Downloads([host], 1 << 20)
        await source.fetch([f"http://{host}/"], "a client", RequestMemory(1 << 30).held("a client"))

    assert "is not on the public internet" in refused(work)


@pytest.mark.parametrize(
    "addresses",
    [["127.0.0.1"], ["8.8.8.8", "10.0.0.1"], ["8.8.8.8", "::1"], ["::ffff:169.254.169.254"], ["64:ff9b::a9fe:a9fe"], []],
)
def test_names_of_private_addresses(addresses: list[str]) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        return addresses

    async def work() -> None:
        source = Downloads(["name.example"], 1 << 20, resolve=resolve)
        await source.fetch(["http://name.example/"], "a client", RequestMemory(1 << 30).held("a client"))

    assert "name.example is not on the public internet" in refused(work)


def test_a_name_is_looked_up_once() -> None:
    """A name whose address changes between two look-ups cannot lead the connection elsewhere."""
    asked: list[str] = []

    async def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"] if len(asked) == 1 else ["10.0.0.1"]

    async def work() -> bytes:
        async with web(OK) as (port, _):
            return await fetched("http://pictures.example:PORT/", port, resolve=resolve)

    assert asyncio.run(work()) == CONTENT
    assert asked == ["pictures.example"]


def leads_to(location: str) -> bytes:
    return f"HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()


def test_redirects_are_followed() -> None:
    async def work() -> tuple[bytes, list[bytes]]:
        async with web(OK) as (last, heads), web(leads_to(f"http://last.example:{last}/b")) as (first, _):
            hosts = [f"pictures.example:{first}", f"last.example:{last}"]
            return await fetched("http://pictures.example:PORT/a", first, hosts=hosts), heads

    content, [head] = asyncio.run(work())
    assert content == CONTENT
    assert head.startswith(b"GET /b HTTP/1.1\r\nHost: last.example:")


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("/again", "more than 3 redirects"),
        ("//other.example/", "fetches no images from other.example"),
        ("http://127.0.0.1:8000/v1/models", "fetches no images from 127.0.0.1:8000"),
        ("http://169.254.169.254/latest/meta-data/", "is not on the public internet"),
        ("http://2852039166/", "is not on the public internet"),
        ("http://[::1]/", "no valid host name"),
        ("http://[", "a URL that is not valid"),
        ("file:///etc/passwd", "must be a data URL, or begin with https"),
        ("http://user:secret@pictures.example/", "a user name or a password"),
    ],
)
def test_redirects_are_checked(location: str, message: str) -> None:
    async def work() -> None:
        async with web(leads_to(location)) as (port, _):
            await fetched("http://pictures.example:PORT/", port)

    told = refused(work)
    assert message in told
    assert "secret" not in told


def test_a_redirect_to_a_name_of_a_private_address() -> None:
    async def resolve(host: str, port: int) -> list[str]:
        return ["10.0.0.1" if host == "inside.example" else "127.0.0.1"]

    async def work() -> None:
        async with web(leads_to("http://inside.example/")) as (port, _):
            await fetched("http://pictures.example:PORT/", port, resolve=resolve, hosts=[f"pictures.example:{port}", "*.example"])

    assert "inside.example is not on the public internet" in refused(work)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "it answers with status 404"),
        (b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n", "it answers with status 302"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", "it answers with status 204"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\nshort", "its answer is not valid HTTP, or ends too early"),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 1\r\n\r\nx", "a compressed body"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "not valid HTTP"),
        (b"", "not valid HTTP, or ends too early"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 50_000 + b"\r\n\r\n", "not valid HTTP"),
        (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", "not valid HTTP"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 5000, "not valid HTTP"),
    ],
)  # fmt: skip
def test_answers_that_are_none(answer: bytes, message: str) -> None:
    async def work() -> None:
        async with web(answer) as (port, _):
            await fetched("http://pictures.example:PORT/", port)

    assert message in refused(work)


def test_a_port_where_nobody_listens() -> None:
    async def work() -> None:
        async with web(OK) as (port, _):
            pass
        await fetched("http://pictures.example:PORT/", port)

    assert "the connection fails" in refused(work)


async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        writer.write(b"x" * 65536)
        await writer.drain()


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def trickling(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("length", [b"", b"Content-Length: 2000000\r\n"], ids=["endless", "announced"])
def test_a_server_that_sends_too_much(length: bytes) -> None:
    memory = RequestMemory(1 << 30)

    async def work() -> None:
        answer = endless if not length else b"HTTP/1.1 200 OK\r\n" + length + b"\r\n"
        async with web(answer) as (port, _):
            held = memory.held("a client")
            try:
                await downloads([f"a.example:{port}"], max_bytes=1 << 20).fetch([f"http://a.example:{port}/"], "a client", held)
            finally:
                assert memory.nbytes <= 1 << 17, "no more than the limit and one read were taken"
                held.close()

    assert "are larger than this server's limit" in refused(work, 413)
    assert memory.nbytes == 0


@pytest.mark.parametrize("server", [silent, trickling])
def test_a_server_that_is_slow(server: Handler) -> None:
    async def work() -> None:
        async with web(server) as (port, _):
            await fetched("http://pictures.example:PORT/", port, seconds=0.3)

    assert "did not arrive within 0.3 s" in refused(work)


def test_all_images_of_a_request_share_the_limit() -> None:
    async def work() -> None:
        async with web(OK) as (port, _):
            urls = [f"http://a.example:{port}/{number}" for number in range(4)]
            source, held = downloads([f"a.example:{port}"], max_bytes=3 * len(CONTENT)), RequestMemory(1 << 30).held("a")
            assert len(await source.fetch(urls[:3], "a", held)) == 3
            await source.fetch(urls, "a", held)

    refused(work, 413)


@pytest.fixture
def certified(tmp_path: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """What a server of ``pictures.example`` uses, and what a client that trusts it uses."""
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    names = ("-subj", "/CN=pictures.example", "-addext", "subjectAltName=DNS:pictures.example")
    made = ("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    try:
        subprocess.run([*made, *names, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key)
    return server, ssl.create_default_context(cafile=str(certificate))


def test_tls_is_verified_for_the_name(certified: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    server, client = certified

    async def work(host: str, tls: ssl.SSLContext | None) -> bytes:
        async with web(OK, server) as (port, _):
            return await fetched(f"https://{host}:PORT/", port, hosts=[f"{host}:{port}"], tls=tls)

    assert asyncio.run(work("pictures.example", client)) == CONTENT
    assert "its TLS certificate is not valid" in refused(lambda: work("other.example", client))
    assert "its TLS certificate is not valid" in refused(lambda: work("pictures.example", None))


def test_plain_http_where_tls_is_expected() -> None:
    async def work() -> None:
        async with web(OK) as (port, _):
            await fetched("https://pictures.example:PORT/", port)

    refused(work)


# ---- Turns


def test_clients_take_turns() -> None:
    async def work() -> list[str]:
        turns, order, go = Turns(2, 64), [], asyncio.Event()

        async def take(client: str) -> None:
            async with turns.turn(client):
                order.append(client)
                await go.wait()

        names = ["a"] * 6 + ["b"] * 2
        tasks = []
        for name in names:
            tasks.append(asyncio.create_task(take(name)))
            await asyncio.sleep(0)
        assert order == ["a", "a"]
        go.set()
        await asyncio.gather(*tasks)
        assert turns._running.total() == 0
        return order

    order = asyncio.run(work())
    assert order.index("b") < 4, "not after all of the first client"


def test_waiting_is_limited_and_can_be_cancelled() -> None:
    async def work() -> None:
        turns, go = Turns(1, 4), asyncio.Event()

        async def take(client: str) -> None:
            async with turns.turn(client):
                await go.wait()

        async def started(client: str) -> asyncio.Task[None]:
            task = asyncio.create_task(take(client))
            await asyncio.sleep(0)
            return task

        first, second, third = [await started("a") for _ in range(3)]
        with pytest.raises(ApiError) as full:
            await take("a")
        assert full.value.status == 429
        others = [await started(name) for name in "bc"]
        with pytest.raises(ApiError):
            await take("d")
        for task in (second, first):
            task.cancel()
        await asyncio.sleep(0)
        third.cancel()  # perhaps at the moment of its turn
        go.set()
        await asyncio.gather(*others)
        async with asyncio.timeout(5), turns.turn("d"):
            pass

    asyncio.run(work())


# ---- Memory


def test_memory_is_limited_in_all_and_by_client() -> None:
    memory = RequestMemory(8 << 20)
    first, second, other = memory.held("a"), memory.held("a"), memory.held("b")
    first.take(FREE)
    assert memory.nbytes == 0, "the first MiB is free"
    first.take(3 << 20)
    with pytest.raises(ApiError) as refused_:
        second.take(FREE + (2 << 20))
    assert refused_.value.status == 429
    second.take(FREE + (1 << 20))
    other.take(FREE + (4 << 20))
    with pytest.raises(ApiError):
        other.take(1)
    assert memory.nbytes == 8 << 20
    first.set(1 << 20)
    assert memory.nbytes == 5 << 20
    second.close()
    other.close()
    first.close()
    assert memory.nbytes == 0
    with pytest.raises(ApiError):
        first.take(1)
    with pytest.raises(ApiError) as never:
        memory.held("c").take(FREE + (4 << 20) + 1)
    assert never.value.status == 413

"""Hostile images and URLs in requests, for the attacks of http.py."""

import base64
import io
import json
import random
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from support.image_files import BOMBS

if TYPE_CHECKING:
    from fuzz.http import Attack

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO")
MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16")
#: Hosts that a server must not reach; the attacked server allows ``localhost`` by name.
HOSTS = (
    *("localhost", "LOCALHOST.", "a.localhost", "127.0.0.1", "127.1", "2130706433", "0x7f000001", "017700000001", "0", "[::1]"),
    *(
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[64:ff9b::7f00:1]",
        "[fe80::1%25lo]",
        "10.0.0.1",
        "192.168.1.1",
        "169.254.169.254",
    ),
    *("metadata.google.internal", "localhost@evil.example", "evil.example#localhost", "localhost%00.example", "localhost:22", ""),
    *("xn--", "lo\u0441alhost", "\uff11\uff12\uff17.0.0.1", "a" * 300, "localhost\\@evil.example", "[", "localhost:99999999"),
)


def random_file(rng: random.Random) -> bytes:
    """A small image in a random format."""
    width, height = (rng.choice([1, 2, 7, 48, 100, 1000]) for _ in range(2))
    pixels = np.random.default_rng(rng.getrandbits(32)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    while True:
        file, mode = io.BytesIO(), rng.choice(MODES)
        picture = Image.fromarray(pixels)
        picture = picture.convert("L").convert(mode) if mode == "I;16" else picture.convert(mode)
        try:
            picture.save(file, rng.choice(FORMATS))
        except (OSError, ValueError):  # the format does not have this mode
            continue
        return file.getvalue()


def damaged(content: bytes, rng: random.Random) -> bytes:
    """A file with a few wrong bytes, more often at its beginning, or cut short."""
    changed = bytearray(content)
    for _ in range(rng.choice([0, 1, 1, 3, 20])):
        place = rng.randrange(min(len(changed), rng.choice([32, 200, 10**9])))
        changed[place : place + rng.randint(0, 4)] = rng.randbytes(rng.randint(0, 4))
        if not changed:
            return b""
    return bytes(changed[: rng.randrange(len(changed))]) if rng.random() < 0.2 else bytes(changed)


def part(content: bytes, rng: random.Random) -> dict[str, Any]:
    """A part of a message, in one of the forms that clients send."""
    data = base64.b64encode(content).decode()
    url = f"data:{rng.choice(['image/png', 'image/jpeg', 'image/any'])};base64,{data}"
    forms: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": url, "detail": rng.choice(["low", "auto", "high"])}},
        {"type": "image_url", "image_url": url},
        {"type": "input_image", "image_url": url},
        {"type": "image", "data": data},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}},
        {"type": "video_url", "video_url": {"url": url.replace("image/", "video/")}},
    ]
    return rng.choices(forms, [8, 2, 2, 2, 2, 1])[0]


def body(rng: random.Random, *parts: dict[str, Any]) -> dict[str, Any]:
    content = [*parts, {"type": "text", "text": "What is this?"}]
    rng.shuffle(content)
    return {"messages": [{"role": rng.choice(["user", "user", "system"]), "content": content}], "max_tokens": 2, "seed": 1}


async def _sent(attack: "Attack", content: dict[str, Any]) -> bytes:
    if attack.rng.random() < 0.1:
        content = {"prefix": "It is ", "max_hole_tokens": 2, "messages": content["messages"]}
        return await attack.sent(attack.request("/v1/infill", json.dumps(content).encode()))
    return await attack.sent(attack.request("/v1/chat/completions", json.dumps(content).encode()))


async def damaged_images(attack: "Attack") -> bytes:
    rng = attack.rng
    return await _sent(attack, body(rng, *(part(damaged(random_file(rng), rng), rng) for _ in range(rng.choice([1, 1, 2])))))


async def damaged_parts(attack: "Attack") -> bytes:
    """Wrong fields around a good image."""
    content = body(attack.rng, part(random_file(attack.rng), attack.rng))
    for _ in range(attack.rng.choice([1, 2])):
        attack.damage(content["messages"][0])
    return await _sent(attack, content)


async def damaged_urls(attack: "Attack") -> bytes:
    """Data URLs with wrong characters anywhere."""
    rng = attack.rng
    url = list("data:image/png;base64," + base64.b64encode(random_file(rng)).decode())
    for _ in range(rng.choice([1, 1, 5])):
        place = rng.randrange(min(len(url), rng.choice([25, 10**9])))
        url[place] = rng.choice(["", "=", " ", "\n", "%", ";", ",", "é", "\x00", "-", "A" * 1000, ":"])
    return await _sent(attack, body(rng, {"type": "image_url", "image_url": {"url": "".join(url)}}))


async def bombs(attack: "Attack") -> bytes:
    return await _sent(attack, body(attack.rng, part(attack.rng.choice(list(BOMBS.values()))(), attack.rng)))


async def many_images(attack: "Attack") -> bytes:
    one = part(random_file(attack.rng), attack.rng)
    return await _sent(attack, body(attack.rng, *[one] * attack.rng.choice([10, 100, 500])))


async def private_urls(attack: "Attack") -> bytes:
    """URLs that lead into this machine or its network: none may be fetched."""
    rng = attack.rng
    scheme = rng.choices(["http", "https", "HTTP", "file", "gopher", "ftp", "//", "unix"], [8, 4, 1, 1, 1, 1, 1, 1])[0]
    url = f"{scheme}://{rng.choice(HOSTS)}/{rng.choice(['', 'v1/models', 'latest/meta-data/', '../..', '?' * 5000])}"
    response = await _sent(attack, body(rng, {"type": "image_url", "image_url": {"url": url}}))
    return b"it was fetched: " + response if response.startswith(b"HTTP/1.1 200 ") else response


#: Each with its weight.
ATTACKS = [(damaged_images, 12), (damaged_parts, 6), (damaged_urls, 4), (bombs, 1), (many_images, 1), (private_urls, 6)]

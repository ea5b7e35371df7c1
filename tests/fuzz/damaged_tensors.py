"""Damage to tensors: bytes, types, shapes, names, numbers, offsets and headers."""

import json
import pickle
import struct
from dataclasses import replace
from math import prod
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from fuzz.stored import FILE, FLOATS, ITEMSIZE, Entry, Expected, Harm, header_of, kind, names_of, read, write
from mlx_diffgemma.checkpoint import LARGEST

# --- bytes ---


@kind()
def flip_header(folder: Path, random: Random) -> Harm:
    content = bytearray((folder / FILE).read_bytes())
    size = int.from_bytes(content[:8], "little")
    places = [(random.randrange(8, 8 + size), random.randrange(8)) for _ in range(random.choice((1, 1, 1, 2, 5)))]
    for place, bit in places:
        content[place] ^= 1 << bit
    (folder / FILE).write_bytes(content)
    return Harm(f"bits {places}", "same or refused")


@kind()
def flip_length(folder: Path, random: Random) -> Harm:
    content = bytearray((folder / FILE).read_bytes())
    place, bit = random.randrange(8), random.randrange(8)
    content[place] ^= 1 << bit
    (folder / FILE).write_bytes(content)
    return Harm(f"bit {bit} of byte {place}", "refused")


@kind()
def truncate(folder: Path, random: Random) -> Harm:
    content = (folder / FILE).read_bytes()
    size = int.from_bytes(content[:8], "little")
    places = (
        0,
        1,
        7,
        8,
        9,
        8 + size - 1,
        8 + size,
        8 + size + 1,
        len(content) - 1,
        len(content) - 2,
        random.randrange(len(content)),
    )
    keep = random.choice(places)
    (folder / FILE).write_bytes(content[:keep])
    return Harm(f"after {keep} of {len(content)} bytes", "refused")


@kind()
def append(folder: Path, random: Random) -> Harm:
    more = random.randbytes(random.choice((1, 3, 8, 100, 4096)))
    with (folder / FILE).open("ab") as file:
        file.write(more)
    return Harm(f"{len(more)} bytes, {more[:4]!r}", "refused")


@kind()
def flip_data(folder: Path, random: Random) -> Harm:
    tensors = read(folder / FILE)
    name = random.choice(list(tensors))
    one = tensors[name]
    data = bytearray(one.data)
    place, bit = random.randrange(len(data)), random.choice((6, 7, random.randrange(8)))
    data[place] ^= 1 << bit
    changed = replace(one, data=bytes(data))
    write(folder / FILE, {**tensors, name: changed})
    bad = one.dtype in FLOATS and not (np.abs(changed.floats()) <= LARGEST).all()
    return Harm(f"bit {bit} of byte {place} of {name}", "refused" if bad else "any")


# --- types and shapes ---


@kind()
def rename_type(folder: Path, random: Random) -> Harm:
    tensors = read(folder / FILE)
    name = random.choice(list(tensors))
    header, own = header_of(tensors), tensors[name].dtype
    other = random.choice(
        [dtype for dtype in (*ITEMSIZE, "U8", "I8", "BOOL", "F4", "f32", "", "complex", None, 5) if dtype != own]
    )
    header[name]["dtype"] = other
    write(folder / FILE, tensors, header)
    # A scale in BF16 is as good as one in F16, whatever the numbers are then.
    alike = own in FLOATS and other in FLOATS and ITEMSIZE[own] == ITEMSIZE[str(other)]
    return Harm(f"{name} is {other}", "any" if alike else "refused")


@kind()
def store_as(folder: Path, random: Random) -> Harm:
    """The same numbers, in a type that fits the size of the data."""
    tensors = read(folder / FILE)
    name = random.choice(names_of(tensors, floats=True))
    dtype = random.choice(("F64", "F32", "BF16", "F16", "I64", "I32", "U32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "F8_E8M0"))
    one = tensors[name]
    if dtype in ("F64", *FLOATS):
        tensors[name] = one.of(dtype, one.floats())
    else:
        size = ITEMSIZE.get(dtype, 1)
        tensors[name] = Entry(dtype, one.shape, bytes(size * prod(one.shape)))
    write(folder / FILE, tensors)
    return Harm(f"{name} is {dtype}", "same" if dtype == one.dtype else "works" if dtype in FLOATS else "refused")


@kind()
def reshape(folder: Path, random: Random) -> Harm:
    tensors = read(folder / FILE)
    name = random.choice(names_of(tensors))
    shape = list(tensors[name].shape)
    changes: list[list[Any]] = [
        [*shape, 1], [1, *shape], shape[:-1], [prod(shape)], [], [0, *shape[1:]], [shape[0] + 1, *shape[1:]], [-1, *shape[1:]],
        [2**63, *shape[1:]], [2**40, 2**40], [1.5, *shape[1:]], ["2", *shape[1:]], [True, *shape[1:]], [None], [[*shape]],
        [2 * shape[0], *shape[1:]], [*shape] * 30,
    ]  # fmt: skip
    if len(shape) > 1 and shape[0] != shape[-1]:
        changes.append(shape[::-1])
    header, other = header_of(tensors), random.choice([each for each in changes if each != shape])
    header[name]["shape"] = other
    write(folder / FILE, tensors, header)
    return Harm(f"{name} is {other}", "refused")


@kind()
def resize(folder: Path, random: Random) -> Harm:
    """Another shape, with as much data as it needs."""
    tensors = read(folder / FILE)
    name = random.choice(names_of(tensors))
    one = tensors[name]
    size = len(one.data) // prod(one.shape)
    axis = random.randrange(len(one.shape))
    shape = tuple(length + random.choice((-1, 1, 32)) * (at == axis) for at, length in enumerate(one.shape))
    tensors[name] = Entry(one.dtype, shape, bytes(size * prod(shape)))
    write(folder / FILE, tensors)
    return Harm(f"{name} is {shape}", "refused")


# --- names ---

_NAMES = (
    "", "x", "model.decoder.", "layers", ".", "weight", "\0", "\n", "a\nb", "\x1b[2J\x1b[31mred", "\u202eevil", "nul\0l",
    "model.decoder.layers.99.mlp.up_proj.weight", "model.decoder.layers.-1.layer_scalar", "lm_head.bias", "x" * 3000, "../../x",
    "model.decoder.embed_tokens.scales", "model.encoder.language_model.layers.7.layer_scalar", "__metadata__x", "%s%n{0}",
    "[red]x", "é" * 300,
)  # fmt: skip


@kind()
def rename(folder: Path, random: Random) -> Harm:
    tensors = read(folder / FILE)
    old, new = random.choice(names_of(tensors)), random.choice(_NAMES)
    write(folder / FILE, {new if name == old else name: one for name, one in tensors.items()})
    return Harm(f"{old} to {new[:60]!r}", "refused")


@kind()
def add(folder: Path, random: Random) -> Harm:
    tensors, new = read(folder / FILE), random.choice(_NAMES)
    dtype = random.choice(("F32", "U32", "U8", "I64", "F8_E4M3"))
    write(folder / FILE, {**tensors, new: Entry(dtype, (2,), bytes(2 * ITEMSIZE.get(dtype, 1)))})
    return Harm(f"{new[:60]!r}, {dtype}", "refused")


@kind()
def remove(folder: Path, random: Random) -> Harm:
    tensors = read(folder / FILE)
    names = random.sample(names_of(tensors), random.choice((1, 1, 2, 10)))
    write(folder / FILE, {name: one for name, one in tensors.items() if name not in names})
    return Harm(", ".join(names), "refused")


@kind()
def repeat(folder: Path, random: Random) -> Harm:
    """The same tensor under two names, which are not those of tied tensors."""
    tensors = read(folder / FILE)
    name = random.choice(names_of(tensors))
    others = (f"{name}.copy", f"{name} ", name.upper(), f"model.{name}", name.replace("coder", "code"))
    other = random.choice([each for each in others if each != name])
    write(folder / FILE, {**tensors, other: tensors[name]})
    return Harm(f"{name} as {other}", "refused")


@kind()
def drop_prefix(folder: Path, random: Random) -> Harm:
    """Names without ``model.decoder.``, or in the vision tower ``model.encoder.``, as in the model. They are read, too."""
    tensors = read(folder / FILE)
    prefixes = ("model.decoder.", "model.encoder.vision_tower.", "model.encoder.embed_vision.")
    some = {name for name in tensors if name.startswith(prefixes) and random.random() < 0.3}
    write(folder / FILE, {name.split(".", 2)[2] if name in some else name: one for name, one in tensors.items()})
    quantized = any(one.dtype == "U32" for one in tensors.values())  # config.json names modules by their stored names
    return Harm(f"{len(some)} names, {random.random()}", "any" if quantized else "same")


@kind()
def shuffle(folder: Path, random: Random) -> Harm:
    tensors = list(read(folder / FILE).items())
    random.shuffle(tensors)
    write(folder / FILE, dict(tensors))
    return Harm(tensors[0][0] + tensors[1][0], "same")


# --- numbers ---

_BAD = (np.nan, -np.nan, np.inf, -np.inf, 1e38, -1e38, 3e38, 1e10, -2e9)


@kind()
def bad_numbers(folder: Path, random: Random) -> Harm:
    tensors = read(folder / FILE)
    name, value = random.choice(names_of(tensors, floats=True)), random.choice(_BAD)
    one = tensors[name]
    numbers = one.floats()
    count = random.choice((1, 1, 2, len(numbers)))
    places = random.sample(range(len(numbers)), min(count, len(numbers)))
    numbers[places] = value
    dtype = random.choice((one.dtype, *FLOATS)) if one.dtype in FLOATS else one.dtype
    tensors[name] = one.of(dtype, numbers)
    write(folder / FILE, tensors)
    return Harm(f"{len(places)} numbers of {name}, from {places[0]}, are {value} in {dtype}", "refused")


@kind()
def large_numbers(folder: Path, random: Random) -> Harm:
    """Numbers within the bounds. The result may overflow, which is an error of its own, or it may not."""
    tensors = read(folder / FILE)
    name, value = (
        random.choice(names_of(tensors, floats=True)),
        random.choice((1e9, -1e9, 1e6, 65504.0, 0.0, -0.0, 1e-38, 1e-45)),
    )
    one = tensors[name]
    tensors[name] = one.of(one.dtype, np.full(prod(one.shape), value, np.float32))
    write(folder / FILE, tensors)
    return Harm(f"{name} is {value}", "any" if one.dtype == "F16" or abs(value) > 1e-3 else "works")


@kind("mxfp4", "mxfp8", "nvfp4")
def bad_codes(folder: Path, random: Random) -> Harm:
    """The code for NaN among scales, or among the codes of mxfp8."""
    tensors = read(folder / FILE)
    eights = [name for name, one in tensors.items() if one.dtype == "U8"]
    name = random.choice(eights)
    mxfp8 = "mxfp8" in (folder / "config.json").read_text()
    nvfp4 = "nvfp4" in (folder / "config.json").read_text()
    bad = random.choice((0x7F, 0xFF)) if nvfp4 else random.choice((255, 200, 160))
    if mxfp8 and random.random() < 0.5:
        name, bad = f"{name.removesuffix('scales')}weight", random.choice((0x7F, 0xFF))
    data = bytearray(tensors[name].data)
    place = random.randrange(len(data))
    data[place] = bad
    write(folder / FILE, {**tensors, name: replace(tensors[name], data=bytes(data))})
    return Harm(f"byte {place} of {name} is {bad}", "refused")


# --- offsets and headers ---


@kind()
def move_offsets(folder: Path, random: Random) -> Harm:
    tensors = read(folder / FILE)
    header, (one, other) = header_of(tensors), random.sample(list(tensors), 2)
    begin, end = header[one]["data_offsets"]
    changes: dict[str, Any] = {
        "earlier": [begin - 4, end - 4],
        "later": [begin + 4, end + 4],
        "shorter": [begin, end - 1],
        "longer": [begin, end + 1],
        "backwards": [end, begin],
        "negative": [-8, end - begin - 8],
        "far away": [2**60, 2**60 + end - begin],
        "too large": [2**64, 2**64 + 1],
        "fractions": [begin + 0.5, end + 0.5],
        "one": [begin],
        "three": [begin, end, end],
        "none": None,
        "words": ["a", "b"],
        "empty": [begin, begin],
        "another's": header[other]["data_offsets"],
    }
    name = random.choice(list(changes))
    if name == "another's" and len(tensors[one].data) == len(tensors[other].data):
        name = "empty"
    header[one]["data_offsets"] = changes[name]
    write(folder / FILE, tensors, header)
    return Harm(f"{one} is {name}, {other}", "refused")


@kind()
def swap_offsets(folder: Path, random: Random) -> Harm:
    """Two tensors of one shape and type, which have each other's data: another model, but a sound file."""
    tensors = read(folder / FILE)
    names = names_of(tensors)
    random.shuffle(names)
    form = {name: (tensors[name].dtype, tensors[name].shape) for name in names}
    one, other = next((a, b) for a in names for b in names if a != b and form[a] == form[b])
    header = header_of(tensors)
    header[one]["data_offsets"], header[other]["data_offsets"] = header[other]["data_offsets"], header[one]["data_offsets"]
    write(folder / FILE, tensors, header)
    return Harm(f"{one} and {other}", "any")


@kind()
def bad_header(folder: Path, random: Random) -> Harm:
    tensors = read(folder / FILE)
    header, name = header_of(tensors), random.choice(names_of(tensors))
    sound = json.dumps(header)
    depth, wrong = random.choice((200, 5000, 100_000)), '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    changes: dict[str, tuple[bytes, Expected]] = {
        "a list": (b"[]", "refused"),
        "null": (b"null", "refused"),
        "a number": (b"5", "refused"),
        "empty": (b"{}", "refused"),
        "not UTF-8": (sound.encode().replace(b"decoder", b"dec\xffder", 1), "refused"),
        "a byte order mark": (b"\xef\xbb\xbf" + sound.encode(), "refused"),
        "white space first": (b"  " + sound.encode(), "same or refused"),
        "cut": (sound.encode()[: random.randrange(len(sound))], "refused"),
        f"lists in lists, {depth} deep": (b"[" * depth, "refused"),
        f"objects in objects, {depth} deep": (b'{"a":' * depth, "refused"),
        f"metadata of depth {depth}": (sound.replace('{"format": "pt"}', "[" * depth + "]" * depth).encode(), "refused"),
        "metadata with a number": (sound.replace('"pt"', "5").encode(), "refused"),
        "no metadata": (json.dumps({key: one for key, one in header.items() if key != "__metadata__"}).encode(), "same"),
        "the name twice": ((sound[:-1] + f', "{name}": {json.dumps(header[name])}}}').encode(), "same or refused"),
        "the name twice, first wrong": ((f'{{"{name}": {wrong}, ' + sound[1:]).encode(), "same or refused"),
        "an unknown key": (json.dumps({**header, name: {**header[name], "extra": 1}}).encode(), "same or refused"),
        "a key less": (json.dumps({**header, name: {"dtype": "F32"}}).encode(), "refused"),
        "a tensor that is null": (json.dumps({**header, name: None}).encode(), "refused"),
        "a lone surrogate": (sound.replace(name, "\\ud800", 1).encode(), "refused"),
        "a comment": (b"/* */" + sound.encode(), "refused"),
        "NaN for a shape": (json.dumps({**header, name: {**header[name], "shape": [float("nan")]}}).encode(), "refused"),
        "zeros behind": (sound.encode() + b"\0\0\0\0\0\0\0\0", "same or refused"),
    }  # fmt: skip
    what = random.choice(list(changes))
    text, expected = changes[what]
    write(folder / FILE, tensors, text)
    return Harm(f"{what}, {name}", expected)


@kind()
def other_file(folder: Path, random: Random) -> Harm:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    contents = {
        "a Git LFS pointer": pointer,
        "a web page": b"<!DOCTYPE html><html><body>404</body></html>",
        "a pickle": pickle.dumps({"weight": [1.0] * 100}),
        "JSON": b'{"weight": [1, 2]}',
        "zeros": bytes(random.randrange(10_000)),
        "noise": random.randbytes(random.randrange(10_000)),
        "a zip": b"PK\x03\x04" + random.randbytes(100),
        "GGUF": b"GGUF" + random.randbytes(100),
        "one header too long": struct.pack("<Q", 100_000_000) + b"{" + b" " * 1000,
        "a huge header": struct.pack("<Q", 2**63) + b"{}",
    }
    what = random.choice(list(contents))
    (folder / FILE).write_bytes(contents[what])
    return Harm(f"{what}, {len(contents[what])}", "refused")

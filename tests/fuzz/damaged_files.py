"""Damage to the files around tensors: special files, shards and their index, copies of tied tensors, packed weights."""

import json
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from random import Random
from typing import Any

from fuzz.stored import FILE, INDEX, PACKED, PLAIN, Entry, Expected, Harm, Tensors, kind, read, write
from support.checkpoints import edit_json

# --- special files ---


@kind()
def special_file(folder: Path, random: Random) -> Harm:
    name = random.choice((FILE, FILE, INDEX))
    file = folder / name
    content = file.read_bytes() if file.exists() else b""
    file.unlink(missing_ok=True)
    (folder / "elsewhere").write_bytes(content)

    def bind() -> None:
        here = os.open(".", os.O_RDONLY)
        os.chdir(folder)  # the address of a socket is short
        socket.socket(socket.AF_UNIX).bind(name)
        os.fchdir(here)
        os.close(here)

    makers: dict[str, Callable[[], Any]] = {
        "a pipe": lambda: os.mkfifo(file),
        "a folder": file.mkdir,
        "a socket": bind,
        "a link to nothing": lambda: file.symlink_to("nothing"),
        "a link to itself": lambda: file.symlink_to(name),
        "a link to its folder": lambda: file.symlink_to("."),
        "a link to a pipe": lambda: (os.mkfifo(folder / "pipe"), file.symlink_to("pipe")),
        "/dev/null": lambda: file.symlink_to("/dev/null"),
        "/dev/zero": lambda: file.symlink_to("/dev/zero"),
        "/dev/full": lambda: file.symlink_to("/dev/full"),
        "/proc/self/mem": lambda: file.symlink_to("/proc/self/mem"),
        "missing": lambda: None,
        "empty": lambda: file.write_bytes(b""),
        "a link to it": lambda: file.symlink_to("elsewhere"),
        "a hard link to it": lambda: os.link(folder / "elsewhere", file),
    }
    what = random.choice(list(makers))
    makers[what]()
    sound = (what == "missing" and name == INDEX) or (what.endswith("to it") and name == FILE)
    return Harm(f"{name} is {what}", "same" if sound else "refused")


# --- the index ---


def split(folder: Path, random: Random, count: int) -> dict[str, str]:
    """Split the file into shards, without an index. Returns the file of each tensor."""
    tensors = read(folder / FILE)
    (folder / FILE).unlink()
    names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    where = {name: random.choice(names) for name in tensors}
    for file in names:
        write(folder / file, {name: one for name, one in tensors.items() if where[name] == file})
    return where


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


@kind()
def sound_shards(folder: Path, random: Random) -> Harm:
    count = random.choice((2, 3, 7))
    where = split(folder, random, count)
    if with_index := random.random() < 0.7:
        write_index(folder, where)
        (folder / "unrelated.safetensors").write_bytes(b"not in the index")
    return Harm(f"{count} shards, {with_index}, {random.random()}", "same")


@kind()
def bad_shards(folder: Path, random: Random) -> Harm:
    where = split(folder, random, 3)
    one = random.choice(sorted(set(where.values())))
    tensors = read(folder / one)
    if random.random() < 0.7:
        write_index(folder, where)
    what = random.choice(("missing", "cut", "twice", "empty", "a folder", "swapped"))
    match what:
        case "missing":
            (folder / one).unlink()
        case "cut":
            content = (folder / one).read_bytes()
            (folder / one).write_bytes(content[: random.randrange(len(content))])
        case "twice":
            other = next(file for file in where.values() if file != one)
            write(folder / other, {**read(folder / other), next(iter(tensors)): next(iter(tensors.values()))})
        case "empty":
            (folder / one).write_bytes(b"")
        case "a folder":
            (folder / one).unlink()
            (folder / one).mkdir()
        case "swapped":  # another shard under this name
            other = next(file for file in where.values() if file != one)
            (folder / one).write_bytes((folder / other).read_bytes())
    # A shard of the vision tower alone is not missed where nothing names it; three shards of these are never that.
    return Harm(f"{one} {what}, {len(tensors)} {random.random()}", "refused")


@kind()
def bad_index(folder: Path, random: Random) -> Harm:
    names = list(read(folder / FILE))
    name = random.choice(names)
    deep = random.choice((1000, 100_000))
    values: dict[str, tuple[Any, Expected]] = {
        **{
            f"a name that is {value!r:.40}": ({**dict.fromkeys(names, FILE), name: value}, "refused")
            for value in (
                5, 1.5, None, True, [], ["a"], {"a": 1}, [[[]]], "", ".", "..", "/", f"../{FILE}", f"./{FILE}", f"x/../{FILE}",
                f"/etc/{FILE}", "/dev/zero", "sub/model.safetensors", "model.bin", "pytorch_model.pkl", "config.json",
                f"{FILE}\0",
                "nothing.safetensors", "x" * 5000, "x" * 5000 + ".safetensors", "\ud800.safetensors", "\x1b[2J.safetensors",
                f"..\\{FILE}", f"C:\\{FILE}", f"{FILE} ", f"file://{FILE}", "~/model.safetensors", "a\nb.safetensors",
            )
        },
        "a list": (names, "refused"),
        "a string": (FILE, "refused"),
        "a number": (10**30, "refused"),
        "null": (None, "refused"),
        "empty": ({}, "refused"),
        "of one tensor": ({name: FILE}, "same"),
        "of unknown tensors": ({"x": FILE, "\x1b[2J": FILE}, "same"),
        "true": (True, "refused"),
    }  # fmt: skip
    texts: dict[str, bytes] = {
        "nothing": b"",
        "not JSON": b"{",
        "a list": b"[]",
        "a string": b'"x"',
        "no weight_map": b"{}",
        "not UTF-8": b"\xff\xfe{}",
        "noise": random.randbytes(100),
        f"lists {deep} deep": b"[" * deep + b"]" * deep,
        f"a name of lists {deep} deep": b'{"weight_map": {"a": ' + b"[" * deep + b"]" * deep + b"}}",
        f"a weight_map {deep} deep": b'{"weight_map": ' + b'{"a":' * deep + b"1" + b"}" * deep + b"}",
    }
    if random.random() < 0.75:
        what = random.choice(list(values))
        weight_map, expected = values[what]
        write_index(folder, weight_map)
        return Harm(f"weight_map is {what}, {name}", expected)
    what = random.choice(list(texts))
    (folder / INDEX).write_bytes(texts[what])
    return Harm(f"the index is {what}, {texts[what][:5]!r}", "refused")


# --- copies of tied tensors ---


def twins(tensors: Tensors, random: Random) -> dict[str, str]:
    """Names of copies that transformers ties -> the names of their originals."""
    tied = {f"lm_head.{part}": f"model.decoder.embed_tokens.{part}" for part in ("weight", "scales", "biases")}
    tied |= {
        f"model.encoder.language_model.{name.removeprefix('model.decoder.')}": name
        for name in tensors
        if name.startswith("model.decoder.") and not name.endswith("layer_scalar") and "self_conditioning" not in name
    }
    known = {copy: name for copy, name in tied.items() if name in tensors}
    return dict(random.sample(sorted(known.items()), random.choice((1, 1, 3, len(known)))))


@kind()
def equal_twins(folder: Path, random: Random) -> Harm:
    tensors = read(folder / FILE)
    copies = {copy: tensors[name] for copy, name in twins(tensors, random).items()}
    both = [*tensors.items(), *copies.items()]
    random.shuffle(both)
    write(folder / FILE, dict(both))
    return Harm(f"{len(copies)}, {next(iter(copies))} {random.random()}", "same")


@kind()
def unequal_twins(folder: Path, random: Random) -> Harm:
    tensors = read(folder / FILE)
    copies = {copy: tensors[name] for copy, name in twins(tensors, random).items()}
    name = random.choice(list(copies))
    one, what = copies[name], random.choice(("bit", "bit", "zeros", "type", "shape", "swapped"))
    if what == "bit":
        place = random.choice((0, len(one.data) - 1, random.randrange(len(one.data))))
        data = bytearray(one.data)
        data[place] ^= 1 << random.randrange(8)
        copies[name], what = replace(one, data=bytes(data)), f"byte {place}"
    elif what == "zeros" and any(one.data):
        copies[name] = replace(one, data=bytes(len(one.data)))
    elif what == "type":
        dtype = {"F32": "I32", "BF16": "F16", "F16": "BF16", "U32": "I32", "U8": "I8"}[one.dtype]
        copies[name] = replace(one, dtype=dtype)
    else:
        copies[name], what = replace(one, shape=(1, *one.shape)), "shape"
    write(folder / FILE, {**tensors, **copies})
    return Harm(f"{what} of {name}, of {len(copies)}", "refused")


@kind(*PLAIN)
def twins_alone(folder: Path, random: Random) -> Harm:
    """Copies without their originals, as a library may store them: they are as good."""
    tensors = read(folder / FILE)
    others = {name: copy for copy, name in twins(tensors, random).items()}
    write(folder / FILE, {others.get(name, name): one for name, one in tensors.items()})
    return Harm(f"{len(others)}, {next(iter(others))}", "same")


# --- packed weights and the table of formats ---


@kind(*PACKED)
def bad_packing(folder: Path, random: Random) -> Harm:
    tensors = read(folder / FILE)
    weights = [name for name, one in tensors.items() if one.dtype == "U32"]
    name = random.choice(weights)
    scales, biases = (name.removesuffix("weight") + part for part in ("scales", "biases"))
    what = random.choice(("words I32", "words F32", "scales I8", "scales gone", "scales F64", "biases", "weight gone"))
    match what:
        case "words I32" | "words F32":
            tensors[name] = replace(tensors[name], dtype=what.removeprefix("words "))
        case "scales I8":
            tensors[scales] = Entry("I8", tensors[scales].shape, bytes(prod(tensors[scales].shape)))
        case "scales F64":
            tensors[scales] = Entry("F64", tensors[scales].shape, bytes(8 * prod(tensors[scales].shape)))
        case "scales gone":
            del tensors[scales]
        case "weight gone":
            del tensors[name]
        case "biases":  # too many, or one too few
            if tensors.pop(biases, None) is None:
                tensors[biases] = replace(tensors[scales])
    write(folder / FILE, tensors)
    return Harm(f"{what}, {name}", "refused")


@kind(*PACKED)
def bad_table(folder: Path, random: Random) -> Harm:
    config = json.loads((folder / "config.json").read_text())
    table = config["quantization"]
    wrong: list[Any] = [
        5, "x", [1], True, {}, {"group_size": 32}, {"bits": 4}, {"quant_method": "gptq"}, {"quant_method": {"a": [1]}},
        *({"group_size": size, "bits": bits} for size, bits in (
            (33, 4), (32, 7), ("32", 4), (32.0, 8.0), (True, True), ([32], 4), (10**30, 4), (-32, 4), (64, 8), (0, 8),
            (None, None),
        )),
        *({"group_size": 32, "bits": 4, "mode": mode} for mode in ({}, None, "x", 5, [])),
        {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    ]  # fmt: skip
    if random.random() < 0.6:
        modules = [key for key, value in table.items() if isinstance(value, dict)]
        name, value = random.choice(modules), random.choice([each for each in wrong if each is not True])
        if isinstance(value, dict) and "quant_method" in value:
            value = []
        table, what = {**table, name: value}, f"{name} is {value}"
    else:
        table = random.choice(wrong)
        what = f"all is {table}"
    edit_json(folder / "config.json", quantization=table, quantization_config=table)
    return Harm(what, "refused")

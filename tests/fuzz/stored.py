"""Weight files as the fuzzing sees them: undamaged checkpoints, their tensors as bytes, and the register of kinds of damage.

A kind of damage changes a folder, and says what opening it must lead to.
"""

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from support.checkpoints import CHAT_SHAPE, edit_json, make_chat_checkpoint
from support.converting import converted
from support.reference import make_checkpoint
from support.tiny_tokenizer import write_tokenizer

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"

#: What must come of it. ``same``: it works, and writes what the undamaged one writes. ``works``: it writes something.
#: ``same or refused``: the damage may lie where it does no harm. ``any``: nothing but a crash or a hang is wrong.
Expected = Literal["refused", "same", "works", "same or refused", "any"]

ITEMSIZE = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2, "F8_E4M3": 1}
FLOATS = ("F32", "BF16", "F16")

PLAIN, PACKED = ("plain", "bfloat16"), ("affine", "mxfp4", "nvfp4", "mxfp8")


@dataclass(frozen=True)
class Harm:
    """What was done, in words, and what must come of it."""

    what: str
    expected: Expected


Damage = Callable[[Path, Random], Harm]
#: The kinds of damage by name, and the bases that each is for.
KINDS: dict[str, Damage] = {}
_BASES: dict[str, tuple[str, ...]] = {}


def kind(*bases: str) -> Callable[[Damage], Damage]:
    def register(damage: Damage) -> Damage:
        KINDS[damage.__name__] = damage
        _BASES[damage.__name__] = bases or (*PLAIN, *PACKED)
        return damage

    return register


class Bases:
    """The undamaged checkpoints: two of floats, and one for each mode of packing."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self._folders = folders

    def __iter__(self) -> Iterator[tuple[str, Path]]:
        return iter(self._folders.items())

    def pick(self, kind: str, random: Random) -> tuple[str, Path]:
        name = random.choice(_BASES[kind])
        return name, self._folders[name]

    @classmethod
    def make(cls, folder: Path) -> Self:
        text = {**CHAT_SHAPE["text_config"], "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64}
        source = make_checkpoint(folder / "source", {**CHAT_SHAPE, "text_config": text}, logit_std=6.0, bfloat16=True)
        write_tokenizer(source, text["vocab_size"])
        vocabulary = json.loads((source / "tokenizer.json").read_text())["model"]["vocab"]
        edit_json(source / "config.json", image_token_id=vocabulary["<|image|>"])
        others = [f"--set={part}=8:32" for part in ("embedding", "attention", "mlp", "router", "self_conditioning")]
        made = {"plain": make_chat_checkpoint(folder / "plain"), "bfloat16": source}
        for name, experts in {"affine": "4:32", "mxfp4": "mxfp4", "nvfp4": "nvfp4", "mxfp8": "mxfp8"}.items():
            made[name] = converted(source, folder / name, f"--set=experts={experts}", *others)
        for each in made.values():
            config = json.loads((each / "config.json").read_text())
            for index in each.glob(INDEX):  # one file, under the name that the kinds of damage know
                (each / next(iter(set(json.loads(index.read_text())["weight_map"].values())))).rename(each / FILE)
                index.unlink()
            assert config["model_type"] == "diffusion_gemma"
        return cls(made)


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def floats(self) -> NDArray[np.float32]:
        """Its numbers, if they are floats."""
        if self.dtype == "BF16":
            return (np.frombuffer(self.data, "<u2").astype(np.uint32) << 16).view(np.float32)
        return np.frombuffer(self.data, "<f4" if self.dtype == "F32" else "<f2").astype(np.float32)

    def of(self, dtype: str, numbers: NDArray[np.float32]) -> "Entry":
        """The tensor with other numbers, as floats of another type."""
        if dtype == "BF16":
            return replace(self, dtype=dtype, data=(numbers.astype(np.float32).view(np.uint32) >> 16).astype("<u2").tobytes())
        with np.errstate(over="ignore"):
            return replace(self, dtype=dtype, data=numbers.astype({"F32": "<f4", "F16": "<f2", "F64": "<f8"}[dtype]).tobytes())


Tensors = dict[str, Entry]


def read(file: Path) -> Tensors:
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header.pop("__metadata__", None)
    data = content[8 + size :]
    return {name: Entry(one["dtype"], tuple(one["shape"]), data[slice(*one["data_offsets"])]) for name, one in header.items()}


def header_of(tensors: Tensors) -> dict[str, Any]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, one in tensors.items():
        header[name] = {"dtype": one.dtype, "shape": list(one.shape), "data_offsets": [end, end + len(one.data)]}
        end += len(one.data)
    return header


def write(file: Path, tensors: Tensors, header: Any = None) -> None:
    """Write a file, with a header that need not fit. The header is JSON, or its text."""
    text = header if isinstance(header, bytes) else json.dumps(header_of(tensors) if header is None else header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(one.data for one in tensors.values()))


def names_of(tensors: Tensors, *, floats: bool = False) -> list[str]:
    """The names of all tensors, or of those that are floats."""
    return [name for name, one in tensors.items() if not floats or one.dtype in FLOATS]

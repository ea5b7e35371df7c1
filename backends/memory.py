"""The memory that a checkpoint needs to run, the memory that a machine has, and whether the one fits into the other."""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from rich.filesize import decimal

from mlx_diffgemma.backends.room import Room
from mlx_diffgemma.checkpoint import NORMS, Checkpoint, part_of
from mlx_diffgemma.errors import BackendError

if TYPE_CHECKING:
    from mlx_diffgemma.backends import Place

ITEMSIZE = {"float32": 4, "bfloat16": 2}

#: How many float32 arrays of logits a denoising step holds at once, measured with MLX. PyTorch on a CPU holds one.
LOGITS_AT_ONCE = 12

#: Bits per weight of the recipe 4bit: of the experts, and of the other parts (convert/recipe.py). A group of 64 weights has a
#: scale and a bias in BF16.
_EXPERT_BITS, _OTHER_BITS = 4 + 32 / 64, 8 + 32 / 64


@dataclass(frozen=True)
class Memory:
    """The bytes that running a checkpoint takes, for one text.

    Attributes:
        weights: the text model and the vision tower. Packed weights count as stored, all others in the dtype.
        cache_per_token: keys and values of one committed position on the full-attention layers, which keep all positions.
        cache_windows: keys and values of the sliding layers when they are full. They keep the last ``sliding_window - 1``
            positions.
        cache: all buffers of the requested context, including the room after it. Each further text takes as much again.
        workspace: what a denoising step holds in addition: :data:`LOGITS_AT_ONCE` arrays of [canvas_length, vocab_size] in
            float32. A pass of several canvases takes no more, because the canvases go through the output head one by one. The
            vision tower takes less: 1.1 GB in float32 for the released model's largest images.
    """

    weights: int
    cache_per_token: int
    cache_windows: int
    cache: int
    workspace: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.workspace


def memory(checkpoint: Checkpoint, dtype: str, context: int) -> Memory:
    """The memory for ``context`` positions. Reads headers only."""
    config, itemsize = checkpoint.config, ITEMSIZE[dtype]
    weights = sum(
        tensor.nbytes if name.rpartition(".")[0] in checkpoint.quantization else prod(tensor.shape) * itemsize
        for name, tensor in checkpoint.stored.items()
    )
    position = {True: 0, False: 0}  # bytes of keys and values per position, on sliding layers and on full layers
    cache = 0
    for layer in config.layers:
        each = 2 * layer.num_key_value_heads * layer.head_dim * itemsize
        room = Room(config.sliding_window if layer.is_sliding else None, config.canvas_length)
        position[layer.is_sliding] += each
        cache += each * room.capacity(context, context + config.canvas_length)
    return Memory(
        weights=weights,
        cache_per_token=position[False],
        cache_windows=position[True] * (config.sliding_window - 1),
        cache=cache,
        workspace=LOGITS_AT_ONCE * config.canvas_length * config.vocab_size * 4,
    )


def require_memory(checkpoint: Checkpoint, place: "Place") -> None:
    """Raise BackendError if a checkpoint, with a text of one canvas, does not fit into the memory that is free at ``place``.

    The message has the numbers, and says what would fit. Nothing is refused where the free memory is not known.
    """
    context = checkpoint.config.canvas_length
    needed = memory(checkpoint, place.dtype, context)
    if place.memory is None or needed.total <= place.memory:
        return
    small = memory(checkpoint, "bfloat16", context)
    packed = replace(small, weights=_packed_weights(checkpoint))
    fitting = []
    if place.dtype != "bfloat16" and "bfloat16" in place.dtypes and small.total <= place.memory:
        fitting.append(f"dtype bfloat16, with {decimal(small.total)}")
    if not checkpoint.quantization and packed.total <= place.memory:
        fitting.append(f"its 4-bit conversion, with about {decimal(packed.total)}")
    advice = f"What would fit: {', or '.join(fitting)}" if fitting else "Use a machine with more memory"
    raise BackendError(
        f"{checkpoint.name} needs {decimal(needed.total)} in {place.dtype} (weights {decimal(needed.weights)}, cache of a short "
        f"text {decimal(needed.cache)}, workspace {decimal(needed.workspace)}), but {place.backend} on {place.device} has only "
        f"{decimal(place.memory)} free. {advice}. To load it anyway, use force (--force)"
    )


def _packed_weights(checkpoint: Checkpoint) -> int:
    """About how many bytes the weights take after `convert` with the recipe 4bit."""
    bits = 0.0
    for name, tensor in checkpoint.stored.items():
        part = part_of(name)
        bits += prod(tensor.shape) * (16 if part in (NORMS, "vision") else _EXPERT_BITS if part == "experts" else _OTHER_BITS)
    return int(bits / 8)


def main_memory(root: Path = Path("/")) -> int | None:
    """Bytes of the machine's memory that a program may still take, or None if the system does not say.

    On Linux this is the kernel's estimate of what is available, or what the control groups of this process (a container's limit,
    for example) leave, if that is less. On macOS it is all memory: other programs are moved out when it is needed.
    """
    if sys.platform == "darwin":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [*_available(root / "proc/meminfo"), *_left_by_groups(root)]
    return min(limits, default=None)


def _available(meminfo: Path) -> Iterator[int]:
    for line in _lines(meminfo):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _left_by_groups(root: Path) -> Iterator[int]:
    """What each control group around this process leaves. Files that the kernel can drop do not count as used."""
    groups = root / "sys/fs/cgroup"
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, limit_name, used_name, dropped = groups, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit_name, used_name = groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            dropped = "total_inactive_file"
        else:
            continue
        own = base / path.lstrip("/")
        for group in (own, *own.parents):
            if group != base and base not in group.parents:
                break
            limit, used = _number(group / limit_name), _number(group / used_name)
            if limit is not None and used is not None:
                cache = next((int(each.split()[1]) for each in _lines(group / "memory.stat") if each.startswith(dropped)), 0)
                yield max(0, limit - max(0, used - cache))


def _number(file: Path) -> int | None:
    """The number in a file; None if the file is missing or holds a word, such as ``max``."""
    text = next(_lines(file), "").strip()
    return int(text) if text.isdecimal() else None


def _lines(file: Path) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8") as opened:
            yield from opened
    except OSError:
        return

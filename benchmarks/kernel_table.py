"""Compiles the Triton kernels of ``backends/torch/kernels`` without a GPU, and prints a table of what the compiler made of them.

    python benchmarks/kernel_table.py [--only PART] [--arch 90 --arch 89 --arch 120] [--json FILE]

The functions of the kernels' modules are called at the released model's sizes with tensors that have no data (torch's ``meta``
device), and their launches are recorded. So each kernel is compiled as it is launched: the same types, constants, warps and
stages. :data:`CASES` has one line for each call; a case whose function does not exist is left out, with a line on standard error.

The columns, from the machine code and its resource usage:

- grid: programs. A product with two blocks of rows, 2 x n, unpacks its weights twice.
- regs: registers of a thread (at most 255). spills: instructions that move registers to local memory and back. shared: bytes.
- instr: instructions that a thread runs, times the threads of a program, for each weight, score or element of its inner loop. The
  inner loop is the shortest one with tensor-core products; a kernel without such products counts whole. For weights, the number
  in a turn of the loop is the volume of its tensor-core products by the rows of a program.
- mma: shape and number of the loop's tensor-core instructions. 64 x n x 16 is Hopper's wgmma, 16 x 8 x 16 is mma.sync.

These are static figures. They say what cannot be fast, not how fast a kernel is: nothing is run.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from mlx_diffgemma.checkpoint import Quantization
from mlx_diffgemma.reports.speed import Machine

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from support.compiling import Launch, cuobjdump, recorded

TOKENS, HIDDEN, INNER, MOE, EXPERTS, CHOSEN, VOCABULARY, HEADS, PREFIX = 256, 2816, 2112, 704, 128, 8, 262_144, 16, 1024
BITS_4, BITS_8 = Quantization(64, 4), Quantization(64, 8)
RESULT = Path(__file__).with_name("results") / "kernel_table.json"

#: The most shared memory of a program, in bytes, by compute capability (CUDA C++ Programming Guide).
_MOST_SHARED = {90: 227 * 1024, 89: 99 * 1024, 120: 99 * 1024}
#: The constant with the number of elements that a program computes, of kernels without tensor-core products.
_ELEMENTS = {
    **{"_added": "block", "_sum": "block", "_slots": "block", "_probabilities": "block", "_geglu": "block"},
    **{"_rms_norm": "size", "_after_attention": "size", "_after_experts": "size", "_heads": "size"},
}


@dataclass(frozen=True)
class Case:
    """A call of one function of a kernels' module, given the module and the compute capability."""

    name: str
    module: str
    call: Callable[[Any, int], object]


@dataclass(frozen=True)
class Row:
    """One kernel in the table. ``instructions`` is per ``unit``; None where the number of units is not known."""

    case: str
    kernel: str
    arch: int
    grid: Sequence[int]
    warps: int
    registers: int
    spills: int
    shared: int
    instructions: float | None
    unit: str
    mma: str
    constants: Mapping[str, Any]


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def packed(quantization: Quantization, *shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight, scales and biases of an affine matrix [.., out, in]."""
    *rows, size = shape
    groups = empty(*rows, size // quantization.group_size)
    return empty(*rows, size * quantization.bits // 32, dtype=torch.int32), groups, groups


def _linear(inputs: int, outputs: int) -> Callable[[Any, int], object]:
    return lambda products, arch: products.linear(empty(TOKENS, inputs), *packed(BITS_8, outputs, inputs), BITS_8)


def _expert_linear(inputs: int, outputs: int) -> Callable[[Any, int], object]:
    ends, rows = empty(EXPERTS, dtype=torch.int32), TOKENS * CHOSEN
    return lambda products, arch: products.expert_linear(
        empty(rows, inputs), ends, *packed(BITS_4, EXPERTS, outputs, inputs), BITS_4
    )


def _weighted_rows(products: Any, arch: int) -> object:
    return products.weighted_rows(empty(TOKENS, VOCABULARY), *packed(BITS_8, VOCABULARY, HIDDEN), BITS_8)


def _mixed(experts: Any, arch: int) -> object:
    with mock.patch.object(experts, "_capability", return_value=divmod(arch, 10)):
        weights, chosen = empty(TOKENS, CHOSEN, dtype=torch.float32), empty(TOKENS, CHOSEN, dtype=torch.int64)
        gate_up, down = packed(BITS_4, EXPERTS, 2 * MOE, HIDDEN), packed(BITS_4, EXPERTS, HIDDEN, MOE)
        return experts.mixed(empty(TOKENS, HIDDEN), weights, chosen, gate_up, down)


def _attend(size: int, shared: int) -> Callable[[Any, int], object]:
    queries, keys = empty(1, HEADS, TOKENS, size), empty(1, shared, PREFIX + TOKENS, size)
    seen = empty(1, 2, dtype=torch.int32)
    return lambda attention, arch: attention.attend_with(
        attention.Tiles.of(size, hopper=arch // 10 == 9), queries, keys, keys, seen
    )


def _statistics(statistics: Any, arch: int) -> None:
    one = empty(TOKENS, dtype=torch.float32)
    statistics.statistics(empty(TOKENS, VOCABULARY), empty(TOKENS, dtype=torch.int32), 30.0, one)
    statistics.probabilities(empty(TOKENS, VOCABULARY), 30.0, one, one, one)


def _norms(norms: Any, arch: int) -> None:
    x, weight, eps = empty(TOKENS, HIDDEN), empty(HIDDEN), 1e-6
    norms.rms_norm(x, weight, eps)
    norms.after_attention(x, x, [weight] * 3, weight, eps)
    norms.after_experts(x, x, x, [weight] * 3, empty(1), eps)
    norms.heads(empty(TOKENS, HEADS, 256), empty(256), (empty(TOKENS, 1, 256), empty(TOKENS, 1, 256)), eps)
    norms.geglu(empty(TOKENS, INNER), empty(TOKENS, INNER))


CASES = (
    Case("8-bit product, 2,816 to 4,096", "products", _linear(HIDDEN, 4096)),
    Case("8-bit product, 2,112 to 2,816", "products", _linear(INNER, HIDDEN)),
    Case("output head", "products", _linear(HIDDEN, VOCABULARY)),
    Case("self-conditioning", "products", _weighted_rows),
    Case("experts by any format, gate and up", "products", _expert_linear(HIDDEN, 2 * MOE)),
    Case("experts by any format, down", "products", _expert_linear(MOE, HIDDEN)),
    Case("4-bit experts", "experts", _mixed),
    Case("router", "experts", lambda experts, arch: experts.routed(empty(TOKENS, EXPERTS), empty(EXPERTS), CHOSEN)),
    Case("attention, heads of 256", "attention", _attend(256, 8)),
    Case("attention, heads of 512", "attention", _attend(512, 2)),
    Case("statistics", "statistics", _statistics),
    Case("norms and gates", "norms", _norms),
)


def launches(case: Case, arch: int) -> list[Launch] | None:
    """The launches of a case, each kind once; None if its module or function does not exist."""
    name = f"mlx_diffgemma.backends.torch.kernels.{case.module}"
    try:
        module = import_module(name)
    except ModuleNotFoundError as missing:
        if missing.name == name:
            return None
        raise
    found = recorded(lambda: case.call(module, arch))
    once = {repr((launch.kernel.__name__, launch.signature(), sorted(launch.options.items()))): launch for launch in found}
    return list(once.values())


_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)\s*(.*?);")
_MMA = re.compile(r"(HGMMA|HMMA)\.(\d+)x(\d+)x(\d+)|HMMA\.(16816)")


@dataclass(frozen=True)
class Code:
    """The machine code of a kernel: (address, operation, operands) of each instruction."""

    instructions: Sequence[tuple[int, str, str]]
    registers: int

    @classmethod
    def of(cls, made: Any) -> "Code":
        text, usage = (cuobjdump(made, option) for option in ("-sass", "-res-usage"))
        found = [(int(at, 16), operation, rest) for at, operation, rest in _INSTRUCTION.findall(text)]
        return cls(found, int(re.findall(r"REG:(\d+)", usage)[0]))

    @property
    def spills(self) -> int:
        return sum(operation.startswith(("LDL", "STL")) for _, operation, _ in self.instructions)

    def loop(self) -> Sequence[tuple[int, str, str]] | None:
        """The shortest loop with tensor-core products: from the target of a jump backwards to the jump. None without one."""
        loops = []
        for at, operation, rest in self.instructions:
            target = re.search(r"0x([0-9a-f]+)", rest) if operation.startswith("BRA") else None
            if target and int(target[1], 16) < at:
                body = [each for each in self.instructions if int(target[1], 16) <= each[0] <= at]
                if _mma(body):
                    loops.append(body)
        return min(loops, key=len, default=None)


def _mma(body: Sequence[tuple[int, str, str]]) -> Counter[tuple[int, int, int]]:
    """How often each shape of a tensor-core product is in ``body``."""
    shapes: Counter[tuple[int, int, int]] = Counter()
    for _, operation, _ in body:
        if found := _MMA.match(operation):
            shapes[(16, 8, 16) if found[5] else (int(found[2]), int(found[3]), int(found[4]))] += 1
    return shapes


def row(case: Case, launch: Launch, arch: int) -> Row:
    made = launch.compiled(arch)
    code, warps = Code.of(made), made.metadata.num_warps
    loop = code.loop()
    shapes = _mma(loop if loop is not None else code.instructions)
    _, constants, _ = launch.signature()
    units, unit = None, "element"
    if loop is None:
        units = constants.get(_ELEMENTS.get(launch.kernel.__name__, ""))
    elif "scales" in launch.arguments:
        # wgmma is one instruction of four warps, mma.sync of one.
        volume = sum(math.prod(shape) * count * warps // (4 if shape[0] == 64 else 1) for shape, count in shapes.items())
        units, unit = volume // constants["block_m"], "weight"
    else:
        units, unit = constants["block_m"] * constants["block_n"], "score"
    counted = code.instructions if loop is None else loop
    return Row(
        case=case.name,
        kernel=launch.kernel.__name__,
        arch=arch,
        grid=launch.grid,
        warps=warps,
        registers=code.registers,
        spills=code.spills,
        shared=made.metadata.shared,
        instructions=round(len(counted) * warps * 32 / units, 2) if units else None,
        unit=unit,
        mma=", ".join(f"{'x'.join(map(str, shape))} ({count})" for shape, count in shapes.items()),
        constants={name: value if isinstance(value, int | str | None) else str(value) for name, value in constants.items()},
    )


def markdown(rows: Sequence[Row]) -> str:
    lines = [
        "| case | kernel | sm | grid | warps | regs | spills | shared | instr | mma |",
        "|---|---|---:|---|---:|---:|---:|---:|---|---|",
    ]
    for each in rows:
        shared = f"{each.shared:,}" + (" (too much)" if each.shared > _MOST_SHARED.get(each.arch, math.inf) else "")
        per = "" if each.instructions is None else f"{each.instructions} a{'n' * (each.unit[0] == 'e')} {each.unit}"
        grid = " x ".join(map(str, each.grid))
        cells = (each.case, f"`{each.kernel}`", each.arch, grid, each.warps, each.registers, each.spills, shared, per, each.mma)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="PART", help="only cases with this in their name")
    parser.add_argument("--arch", type=int, action="append", help="compute capability, as 90 (default: 90, 89 and 120)")
    parser.add_argument("--json", type=Path, default=RESULT, help=f"file to write the result to (default: {RESULT.name})")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set, and then nothing is compiled; unset it")
    rows = []
    for case in CASES:
        for arch in arguments.arch or (90, 89, 120):
            if arguments.only not in case.name:
                continue
            found = launches(case, arch)
            if found is None:
                print(f"{case.name}: there is no module {case.module}", file=sys.stderr)
                break
            rows += [row(case, launch, arch) for launch in found]
    if not rows:
        parser.error(f"no case has {arguments.only!r} in its name; there are: {', '.join(case.name for case in CASES)}")
    print(markdown(rows))
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "date": date.today().isoformat(),
        "versions": Machine.this().versions,
        "rows": [dataclasses.asdict(each) for each in rows],
    }
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

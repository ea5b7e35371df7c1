"""The output of ``mlx-diffgemma bench --estimate``: the arithmetic of one machine line by line, or a table of all machines."""

import dataclasses
from typing import Any

from rich.filesize import decimal

from mlx_diffgemma.cli.table import table
from mlx_diffgemma.reports.estimate import HARDWARE, Estimate, Hardware, Work

#: The tokens that a step settles for the estimate of tokens per second.
TOKENS_PER_FORWARD = 16


def estimate_text(model: str, result: Estimate, hardware: Hardware | None) -> str:
    """Tables for one machine; without one, a line for each."""
    return _all_machines(model, result) if hardware is None else _one_machine(model, result, hardware)


def estimate_json(model: str, result: Estimate, hardware: Hardware | None) -> dict[str, Any]:
    machines = HARDWARE if hardware is None else (hardware,)
    return {"model": model, **dataclasses.asdict(result), "machines": [_machine_json(result, each) for each in machines]}


def _machine_json(result: Estimate, hardware: Hardware) -> dict[str, Any]:
    names = ("step", "commit", "token", "prompt")
    works = {name: getattr(result, name) for name in names}
    return {
        **dataclasses.asdict(hardware),
        "fits": result.fits(hardware),
        "seconds": {name: work.floor(hardware) for name, work in works.items()},
        "bound": {name: work.bound(hardware) for name, work in works.items()},
        "tokens_per_second": result.tokens_per_second(hardware, TOKENS_PER_FORWARD),
    }


def _one_machine(model: str, result: Estimate, hardware: Hardware) -> str:
    rate = "not published; below, reading alone counts" if hardware.tflops is None else f"{hardware.tflops:,} TFLOP/s"
    fits = "fits" if result.fits(hardware) else "does not fit"
    written = result.tokens_per_second(hardware, TOKENS_PER_FORWARD)
    facts = [
        ("bandwidth", f"{hardware.bandwidth:,} GB/s"),
        ("arithmetic", rate),
        ("source", hardware.source),
        ("memory", f"{decimal(result.needed)} needed, {decimal(hardware.memory * 2**30)} there at most: {fits}"),
        ("diffusion", f"at most {written:,.0f} tokens/s, if a step settles {TOKENS_PER_FORWARD}"),
    ]
    head = f"{model} on {hardware.name}: the least time, by arithmetic. Nothing was measured."
    return "\n\n".join([f"{head}\n{table(facts, left=2)}", *(_work(work, hardware) for work in result.works)])


def _work(work: Work, hardware: Hardware) -> str:
    large = work.nbytes >= 1e8
    (nbytes, bytes_unit), (flops, flops_unit) = ((1e6, "MB"), (1e9, "GFLOP")) if large else ((1e3, "kB"), (1e6, "MFLOP"))
    rows = [(work.what, bytes_unit, flops_unit, "")]
    rows += [(each.name, f"{each.nbytes / nbytes:,.1f}", f"{each.flops / flops:,.1f}", each.reason) for each in work.shares]
    total_bytes, total_flops = f"{work.nbytes / nbytes:,.1f}", f"{work.flops / flops:,.1f}"
    rows.append(("total", total_bytes, total_flops, ""))
    numbers = table([row[:3] for row in rows]).splitlines()
    lines = [f"{line}  {row[3]}".rstrip() for line, row in zip(numbers, rows, strict=True)]
    computing = work.computing(hardware)
    times = [("reading", f"{total_bytes} {bytes_unit} / {hardware.bandwidth:,} GB/s = {_ms(work.reading(hardware))} ms")]
    if computing is not None:
        times.append(("arithmetic", f"{total_flops} {flops_unit} / {hardware.tflops:,} TFLOP/s = {_ms(computing)} ms"))
    times.append(("floor", f"{_ms(work.floor(hardware))} ms, by {_bound(work, hardware)}"))
    times.append(("activations", f"{work.activations / nbytes:,.1f} {bytes_unit} besides, if they leave the chip"))
    return "\n".join([*lines, table(times, left=2)])


def _bound(work: Work, hardware: Hardware) -> str:
    return "reading alone" if hardware.tflops is None else work.bound(hardware)


def _all_machines(model: str, result: Estimate) -> str:
    rows = [
        ("machine", "GiB", "fits", "GB/s", "TFLOP/s", "step, ms", "by", "tokens/s", "causal token, ms", "prompt, ms"),
        *(
            (
                each.name,
                f"{each.memory}",
                "yes" if result.fits(each) else "no",
                f"{each.bandwidth:,}",
                "-" if each.tflops is None else f"{each.tflops:,}",
                _ms(result.step.floor(each)),
                _bound(result.step, each),
                f"{result.tokens_per_second(each, TOKENS_PER_FORWARD):,.0f}",
                _ms(result.token.floor(each)),
                _ms(result.prompt.floor(each)),
            )
            for each in HARDWARE
        ),
    ]
    works = "\n".join(f"{work.what}: {work.nbytes / 1e9:,.2f} GB, {work.flops / 1e9:,.1f} GFLOP" for work in result.works)
    note = _NOTE.format(needed=decimal(result.needed), tokens=TOKENS_PER_FORWARD)
    return f"{model}: the least times, by arithmetic. Nothing was measured.\n{works}\n\n{table(rows)}\n\n{note}"


_NOTE = """\
The model needs {needed} of memory. Tokens/s are the most that diffusion can write if a step settles {tokens}.
Reading alone: the maker has not published the rate of bfloat16. Arithmetic may take longer, as it does for the released model on
M1 and M2. --estimate MACHINE shows the arithmetic line by line."""


def _ms(seconds: float) -> str:
    """Milliseconds with three digits or two decimals."""
    return f"{seconds * 1e3:,.2f}" if seconds >= 1e-3 else f"{seconds * 1e3:.3g}"

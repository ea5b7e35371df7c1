"""What ``gpu.py`` makes of its figures for a reader: a Markdown table, and a picture of the roofline as SVG."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

#: The sections with a step by part, and what they measure.
STEPS = {"step_4bit": "a step, 4 bits", "step_bf16": "a step, BF16"}


def table(report: Mapping[str, Any]) -> str:
    """All sections as a Markdown table. A section without results says why."""
    lines = ["| what | result |", "|---|---:|"]
    for name, found in report["sections"].items():
        entries = found["entries"]
        rows = _ROWS[name](entries) if name in _ROWS else _plain(name, entries)
        lines += [f"| {what} | {result} |" for what, result in rows]
        lines += [f"| {name}: {state} | {_cell(found[state])} |" for state in ("skipped", "error") if state in found]
    lines += [f"| {name}: not begun | {why} |" for name, why in report["left_out"].items()]
    return "\n".join(lines)


def _cell(text: object) -> str:
    return str(text).replace("|", "/")[:160]


def _number(value: Any) -> str:
    if not isinstance(value, float):
        return _cell(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _spread(found: Mapping[str, float]) -> str:
    return f"{_number(found['median'])} ({_number(found['least'])} to {_number(found['most'])})"


def _machine(entries: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    this = entries.get("machine", {})
    if this:
        versions = ", ".join(f"{name} {version}" for name, version in this["versions"].items())
        yield "machine", _cell(f"{this['gpu'] or this['cpu']}; {versions}")
    for name, label in (
        ("copy_gb_per_second", "copy, GB/s read and written"),
        ("read_gb_per_second", "sum, GB/s read"),
        ("bf16_tflops", "BF16 product, TFLOP/s"),
    ):
        if name in entries:
            yield label, _number(entries[name])


def _conformance(entries: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    checks = {name: found for name, found in entries.items() if name != "kernel_modules"}
    whole = [name for name, found in checks.items() if found.get("right")]
    yield "kernels within their bounds of float64", f"{len(whole)} of {len(checks)}"
    for name, found in checks.items():
        if "error" in found and "right" not in found:
            yield f"{_cell(name)}: error", _cell(found["error"])
        elif not found["right"]:
            yield f"{_cell(name)}: wrong", ", ".join(f"{each} {_number(found[each])}" for each in found["bounds"])
    compared = {name: found["same_bits"] for name, found in checks.items() if found.get("same_bits")}
    same = [name for name, bits in compared.items() if all(bits.values())]
    yield "kernels whose rows have the same bits alone", f"{len(same)} of {len(compared)}"
    for name in compared.keys() - set(same):
        yield f"{_cell(name)}: other bits", ", ".join(each for each, equal in compared[name].items() if not equal)
    for name, found in checks.items():
        if "gb_per_second" in found:
            yield f"{_cell(name)}: us, GB/s", f"{_number(found['us'])}, {_number(found['gb_per_second'])}"


def _step(label: str, entries: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for prefix, found in entries.items():
        if not isinstance(found, dict) or "ms" not in found:
            continue
        what = f"{label}, prefix {prefix}"
        yield f"{what}: ms", _spread(found["ms"])
        yield f"{what}: the host alone, ms", _spread(found["host_ms"])
        if "parts" not in found:
            yield f"{what}: parts", _cell(found.get("parts_error", "not measured"))
            continue
        yield (
            f"{what}: launches, kernels' ms, floor",
            ", ".join(_number(found[each]) for each in ("launches", "kernel_ms", "floor_ms")),
        )
        for part, each in found["parts"].items():
            ms = each["kernel_ms"] or each["clock_ms"]
            share = each.get("share_of_floor")
            rates = f"{_number(ms)}, {_number(each['gb_per_second'])}, {_number(each['tflops'])}, {each['launches']}"
            yield f"{what}, {part}: ms, GB/s, TFLOP/s, launches, floor", f"{rates}, {'-' if share is None else f'{share:.0%}'}"


def _prefill(entries: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for length, found in entries.items():
        if "tokens_per_second" in found:
            yield f"causal pass over {length}: tokens/s", _number(found["tokens_per_second"])
        else:
            yield f"causal pass over {length}", f"cut at {found['cut_at']} after {_number(found['seconds_until_then'])} s"


def _speed(entries: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, found in entries.items():
        yield f"{name}: tokens/s", _number(found.get("tokens_per_second", found.get("error")))


def _batches(entries: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, found in entries.items():
        if "ms" in found:
            same = "same bits" if all(found["first_row_same_bits"].values()) else "other bits"
            yield f"{name} rows: ms, ms a row", f"{_spread(found['ms'])}, {_number(found['ms_per_row'])}, {same}"


def _plain(section: str, entries: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, found in entries.items():
        for each, value in found.items() if isinstance(found, dict) else [("", found)]:
            label = ", ".join(part for part in (name, each) if part)
            yield _cell(f"{section}, {label}"), _spread(value) if isinstance(value, dict) else _number(value)


_ROWS: dict[str, Any] = {
    "machine": _machine,
    "conformance": _conformance,
    "odd_shapes": _conformance,
    **{name: lambda entries, label=label: _step(label, entries) for name, label in STEPS.items()},
    "prefill": _prefill,
    "speed": _speed,
    "batches": _batches,
}

WIDTH, HEIGHT, MARGIN, LINE = 900, 560, 70, 14
COLOURS = {"step_4bit": "#0072b2", "step_bf16": "#d55e00"}


def measured_limits(report: Mapping[str, Any]) -> tuple[float, float] | None:
    """GB/s and TFLOP/s that the machine reached. None if they were not measured."""
    found = report["sections"].get("machine", {}).get("entries", {})
    names = ("read_gb_per_second", "copy_gb_per_second", "bf16_tflops")
    if not all(isinstance(found.get(name), float) for name in names):
        return None
    return max(found[name] for name in names[:2]), found[names[2]]


def roofline(report: Mapping[str, Any]) -> str | None:
    """The measured limits, and the parts of the measured steps, as SVG. None if the limits were not measured.

    Operations per byte to the right, TFLOP/s upwards, both logarithmic. A point below the roof could be faster.
    """
    limits = measured_limits(report)
    if limits is None:
        return None
    bandwidth, peak = limits[0] / 1e3, limits[1]  # TB/s, TFLOP/s
    points = list(_points(report))
    rates = [peak, *(rate for *_, rate in points)]
    bottom, top = math.floor(math.log10(min(rates))) - 1, math.ceil(math.log10(peak)) + 0.2
    left, right = -1.0, max(4.0, math.ceil(math.log10(peak / bandwidth)) + 1.0)

    def x(intensity: float) -> float:
        place = (math.log10(intensity) - left) / (right - left)
        return MARGIN + (WIDTH - 2 * MARGIN) * min(1.0, max(0.0, place))

    def y(rate: float) -> float:
        place = (math.log10(rate) - bottom) / (top - bottom)
        return HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * min(1.0, max(0.0, place))

    this = report["sections"]["machine"]["entries"]["machine"]
    title = f"{this['gpu'] or this['cpu']}: {1e3 * bandwidth:,.0f} GB/s and {peak:,.3g} TFLOP/s measured"
    ridge, start = peak / bandwidth, 10.0**left
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{MARGIN}" y="30" font-size="16">{_escaped(title)}</text>',
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 20}" text-anchor="middle">operations per byte</text>',
        f'<text x="20" y="{HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 20 {HEIGHT / 2})">TFLOP/s</text>',
    ]
    for power in range(math.ceil(left), math.floor(right) + 1):
        at = x(10.0**power)
        lines.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{MARGIN}" y2="{HEIGHT - MARGIN}" stroke="#ddd"/>')
        lines.append(f'<text x="{at:.1f}" y="{HEIGHT - MARGIN + 18}" text-anchor="middle">{10.0**power:g}</text>')
    for power in range(math.ceil(bottom), math.floor(top) + 1):
        at = y(10.0**power)
        lines.append(f'<line x1="{MARGIN}" x2="{WIDTH - MARGIN}" y1="{at:.1f}" y2="{at:.1f}" stroke="#ddd"/>')
        lines.append(f'<text x="{MARGIN - 8}" y="{at + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
    roof = f"{x(start):.1f},{y(bandwidth * start):.1f} {x(ridge):.1f},{y(peak):.1f} {WIDTH - MARGIN},{y(peak):.1f}"
    lines.append(f'<polyline points="{roof}" fill="none" stroke="black" stroke-width="2"/>')
    taken: list[tuple[float, float]] = []
    for section, label, intensity, rate in points:
        at, height, colour = x(intensity), y(rate), COLOURS[section]
        line = height + 4
        while any(abs(line - other) < LINE and abs(at - place) < 160 for place, other in taken):
            line += LINE
        taken.append((at, line))
        lines.append(f'<circle cx="{at:.1f}" cy="{height:.1f}" r="5" fill="{colour}"><title>{_escaped(label)}</title></circle>')
        lines.append(f'<text x="{at + 8:.1f}" y="{line:.1f}" fill="{colour}">{_escaped(label)}</text>')
    return "\n".join([*lines, "</svg>", ""])


def _points(report: Mapping[str, Any]) -> Iterator[tuple[str, str, float, float]]:
    """Section, label, operations per byte and TFLOP/s of the whole step after the middle prefix, and of each part."""
    for section, name in STEPS.items():
        entries = report["sections"].get(section, {}).get("entries", {})
        steps = [(prefix, found) for prefix, found in entries.items() if isinstance(found, dict) and "parts" in found]
        if not steps:
            continue
        prefix, found = steps[min(1, len(steps) - 1)]
        work = [sum(each[unit] for each in found["parts"].values()) for unit in ("tflop", "gb")]
        yield section, f"{name}, prefix {prefix}", 1e3 * work[0] / work[1], 1e3 * work[0] / found["ms"]["median"]
        for part, each in found["parts"].items():
            if each["tflops"] and each["gb"]:
                yield section, part, 1e3 * each["tflop"] / each["gb"], each["tflops"]


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")

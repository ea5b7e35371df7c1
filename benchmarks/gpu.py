"""Measures everything on an NVIDIA GPU, in at most ten minutes, and writes one JSON file.

    python benchmarks/gpu.py --minutes 10 --json gpu.json

It needs no installation and no network: from the repository's folder, a Python (3.11 or newer) that has torch, Triton and NumPy,
and with them rich, Pillow and safetensors, which this package imports. Weights are random and made on the device: the released
4-bit layout takes 16.5 GB, BF16 51.6 GB.

The file is written anew after every figure, so a run that is cut at any moment leaves what it has. At the end, after --minutes
and after SIGTERM, it prints a Markdown table, and draws a roofline beside the file (``gpu.svg``). A section that fails records
its error in one line, and the others go on. Sections run in order of their worth:

- machine: versions, clocks, the bandwidth and the arithmetic that the device reaches.
- conformance: every kernel at the model's shapes against float64, and rows alone against the same rows among others, bit for bit.
- step_4bit, step_bf16: a denoising step of 256 tokens by part, after three prefixes.
- speed, batches, prefill: of the 4-bit model: a text at 16 tokens a forward, a causal token, several rows, prompts.
- transformers, mlx: the step of other programs, where they are at hand.
- odd_shapes: kernels at odd shapes and in every format. Each takes seconds to compile.

Times are the median, the least and the most after a warm-up. ``--toy`` rehearses everything in seconds; without a GPU Triton's
interpreter runs the kernels, and the times then mean nothing.
"""

import argparse
import gc
import json
import math
import os
import select
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the package, where it is not installed

from gpu_report import measured_limits, roofline, table  # noqa: E402
from sections import REAL, TOY, Sizes, Skipped, error_line, random_row, text_before  # noqa: E402

if TYPE_CHECKING:
    from gpu_model import Extent

#: BF16 weights, a cache and the head's workspace fit from here on.
BF16_MEMORY = 70e9
#: The part of the time left that the causal passes may take.
PREFILL_SHARE = 0.4
Entries = Iterator[tuple[str, Any]]


class Report:
    """The figures so far, in memory and in a file that is always whole."""

    def __init__(self, file: Path | None, content: dict[str, Any]) -> None:
        self.file, self.lock = file, threading.RLock()
        self.content: dict[str, Any] = {"sections": {}, "left_out": {}, **content, "ended": None}
        self.write()

    @property
    def sections(self) -> dict[str, Any]:
        found: dict[str, Any] = self.content["sections"]
        return found

    def update(self, place: dict[str, Any], **values: Any) -> None:
        """Put values into a part of the content, and write the file."""
        with self.lock:
            place |= json.loads(json.dumps(_finite(values)))
            self.write()

    def write(self) -> None:
        if self.file:
            temporary = self.file.with_name(f"{self.file.name}.{os.getpid()}.tmp")
            temporary.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, self.file)

    def end(self, why: str) -> None:
        """Write and print everything, once."""
        with self.lock:
            if self.content["ended"]:
                return
            self.update(self.content, ended=why)
            picture = roofline(self.content)
            if self.file and picture:
                self.file.with_suffix(".svg").write_text(picture, encoding="utf-8")
            print(f"\n{table(self.content)}\n\nended: {why}", flush=True)


def _finite(value: Any) -> Any:
    """The same, with names for the numbers that JSON does not have."""
    if isinstance(value, dict):
        return {str(name): _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@dataclass
class Battery:
    """What the sections share. ``ends`` is a time of ``time.perf_counter``."""

    report: Report
    sizes: Sizes
    device: str
    ends: float
    extent: "Extent"
    models: dict[bool, Any] = field(default_factory=dict)

    def over(self) -> bool:
        return time.perf_counter() >= self.ends

    def model(self, bits_4: bool) -> Any:
        """The model in 4 bits or in BF16. Only one is held."""
        from gpu_model import random_model

        if bits_4 not in self.models:
            self.free()
            self.models[bits_4] = random_model(self.sizes.config(self.extent.layers), self.device, bits_4=bits_4)
        return self.models[bits_4]

    def free(self) -> None:
        """Give the models' memory back."""
        self.models.clear()
        gc.collect()
        if self.device != "cpu":
            import torch

            torch.cuda.empty_cache()


def machine(battery: Battery) -> Entries:
    from gpu_kernels import machine

    return machine(battery.device, battery.extent)


def conformance(battery: Battery, *, odd: bool) -> Entries:
    from gpu_kernels import conformance

    return conformance(battery.device, battery.sizes, battery.extent, odd=odd)


def steps(battery: Battery, *, bits_4: bool) -> Entries:
    import torch
    from gpu_model import denoising, weight_bytes
    from gpu_parts import Limits, by_part

    if not bits_4 and battery.device != "cpu":
        battery.free()
        memory = torch.cuda.get_device_properties(battery.device).total_memory
        if memory < BF16_MEMORY:
            gigabytes = weight_bytes(battery.sizes.config(battery.extent.layers)) / 1e9
            raise Skipped(f"the weights take {gigabytes:.1f} GB, and the device has {memory / 1e9:.1f} GB")
    started = time.perf_counter()
    backend = battery.model(bits_4)
    yield "seconds_to_make_the_weights", time.perf_counter() - started
    reached = measured_limits(battery.report.content)
    limits = None if reached is None else Limits(1e9 * reached[0], 1e12 * reached[1])
    for prefix in battery.sizes.prefixes:
        row = random_row(backend, text_before(backend, prefix))
        found = denoising(backend, [row], battery.extent.steps)
        yield str(prefix), found
        try:
            yield str(prefix), found | by_part(backend, row, prefix, limits)
        except Exception as error:  # noqa: BLE001 (the whole step is measured; what follows goes on)
            yield str(prefix), found | {"parts_error": error_line(error)}
    yield "peak_memory", backend.peak_memory()


def prefill(battery: Battery) -> Entries:
    from gpu_model import prefill

    ends = time.perf_counter() + PREFILL_SHARE * (battery.ends - time.perf_counter())
    return prefill(battery.model(True), battery.extent.prompts, lambda: time.perf_counter() >= ends)


def speed(battery: Battery) -> Entries:
    from gpu_model import causal_tokens, scripted_text

    backend, prefix = battery.model(True), battery.sizes.prefixes[1]
    yield f"diffusion at {battery.extent.accepted} tokens a forward", scripted_text(backend, prefix, battery.extent)
    yield "causal", causal_tokens(backend, prefix, battery.extent.tokens)


def batches(battery: Battery) -> Entries:
    from gpu_model import batches

    return batches(battery.model(True), battery.extent.rows, battery.sizes.prefixes[1], battery.extent.steps)


def others(battery: Battery, *, program: str) -> Entries:
    import gpu_others

    battery.free()
    section = {"transformers": gpu_others.transformers_step, "mlx": gpu_others.mlx_step}[program]
    return section(battery.device, battery.sizes, battery.extent, battery.over)


SECTIONS: dict[str, Callable[[Battery], Entries]] = {
    "machine": machine,
    "conformance": partial(conformance, odd=False),
    "step_4bit": partial(steps, bits_4=True),
    "step_bf16": partial(steps, bits_4=False),
    "speed": speed,
    "batches": batches,
    "prefill": prefill,
    "transformers": partial(others, program="transformers"),
    "mlx": partial(others, program="mlx"),
    "odd_shapes": partial(conformance, odd=True),
}


def run(battery: Battery, names: list[str]) -> None:
    """Run the sections one after the other. What is left when the time is over is named.

    After an access to memory that is not the program's, a process can use the device no more: a new one then does the rest.
    """
    report = battery.report
    for index, name in enumerate(names):
        if battery.over():
            report.update(report.content["left_out"], **{name: "there was no time left"})
            continue
        started = time.perf_counter()
        report.update(report.sections, **{name: {"entries": {}}})
        found = report.sections[name]
        try:
            for entry, value in SECTIONS[name](battery):
                report.update(found["entries"], **{entry: value})
        except Skipped as why:
            report.update(found, skipped=str(why))
        except Exception as error:  # noqa: BLE001 (what fails on this machine is a finding)
            report.update(found, error=error_line(error))
        taken = time.perf_counter() - started
        report.update(found, seconds=taken)
        print(f"{name}: {found.get('error') or found.get('skipped') or 'done'} ({taken:.1f} s)", flush=True)
        if not usable(battery.device):
            report.update(found, lost_the_device=True)
            begin_anew(battery, names[index + 1 :])


def usable(device: str) -> bool:
    """Whether this process can still use the device."""
    if device == "cpu":
        return True
    import torch

    try:
        torch.ones(1, device=device).sum().item()
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def begin_anew(battery: Battery, names: list[str]) -> None:
    """Turn into a new process that runs the sections ``names`` and goes on with the report."""
    report = battery.report
    if not names:
        return
    file = report.file
    if file is None:
        with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as temporary:
            json.dump(report.content, temporary)
        file = Path(temporary.name)
    minutes = max(0.0, battery.ends - time.perf_counter()) / 60
    options = [f"--minutes={minutes}", f"--sections={','.join(names)}", f"--go-on={file}"]
    options += [f"--json={report.file}"] if report.file else []
    options += ["--toy"] if report.content["toy"] else []
    os.execv(sys.executable, [sys.executable, __file__, *options])


def end_in_time(report: Report, ends: float) -> None:
    """End the program on SIGTERM, on SIGINT, and when the time is over, also while the main thread waits for the device."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda *_: None)
    signal.set_wakeup_fd(writing)  # takes the numbers of signals in any thread, at any moment

    def wait() -> None:
        told, _, _ = select.select([reading], [], [], max(0.0, ends - time.perf_counter()))
        number = os.read(reading, 1)[0] if told else 0
        try:
            report.end(signal.Signals(number).name if number else "the time was over")
        finally:
            os._exit(128 + number if number else 0)

    threading.Thread(target=wait, daemon=True).start()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="end after this time (default %(default)s)")
    parser.add_argument("--json", type=Path, help="file to write (default: none)")
    parser.add_argument("--toy", action="store_true", help="rehearse everything at a toy size, in seconds")
    parser.add_argument("--sections", help=f"run only these, separated by commas: {', '.join(SECTIONS)}")
    parser.add_argument("--go-on", type=Path, help=argparse.SUPPRESS)  # the report of the process before this one
    arguments = parser.parse_args()
    names = arguments.sections.split(",") if arguments.sections else list(SECTIONS)
    if unknown := set(names) - set(SECTIONS):
        parser.error(f"there is no section {sorted(unknown)[0]!r}; choose from {', '.join(SECTIONS)}")
    ends = time.perf_counter() + 60 * arguments.minutes
    content = {"command": sys.argv[1:], "toy": arguments.toy}
    if arguments.go_on:
        content = json.loads(arguments.go_on.read_text(encoding="utf-8"))
    report = Report(arguments.json, content)
    end_in_time(report, ends)

    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        if not arguments.toy:
            parser.error("there is no GPU here; use --toy to rehearse")
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
        torch.set_num_threads(1)  # a rehearsal is too small for more
    from gpu_model import TOY_EXTENT, Extent

    sizes, extent = (TOY, TOY_EXTENT) if arguments.toy else (REAL, Extent())
    report.update(report.content, device=device, sizes=asdict(sizes), extent=asdict(extent))
    run(Battery(report, sizes, device, ends, extent), names)
    report.end("all sections")


if __name__ == "__main__":
    main()

"""Runs a model of the released size on a CPU: the published 4-bit layout with random weights, on the torch backend.

    python benchmarks/real_4bit_cpu.py FOLDER [--threads 2] [--json FILE]

This takes 16.6 GB of disk in FOLDER, and up to 18.5 GB of memory, most of it pages of the mapped files. FOLDER must not exist. It
is removed at the end unless --keep is given. Names, shapes, types and config.json are those of mlx-community's 4-bit conversion.
Packed words are uniform. Scales and biases give the weights mean 0, and a deviation with which a projection keeps a token's scale
(0.019 for rows of 2,816), logits deviate by 6, and the router's scores by 1.

The run has its own process: a prefill of 64 random tokens, then denoising steps of a canvas of 256. Each step is fed by the one
before, and the last one is timed in parts. Resident memory is the operating system's count for the whole process, including the
mapped weights; the bound is 18 GB. If other jobs run on the machine, threads wait for each other in every operation and times are
many times longer. Use real-time priority then (`chrt -f 10`), as for results/real_4bit_cpu.json.
"""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from mlx_diffgemma import noise  # noqa: E402
from mlx_diffgemma.backends import Piece, Row, load_backend  # noqa: E402
from mlx_diffgemma.checkpoint import Checkpoint  # noqa: E402
from mlx_diffgemma.reports.speed import Machine  # noqa: E402
from support.real_layout import DATA, stored_tensors  # noqa: E402

SHARD_BYTES, PIECE = 5_000_000_000, 2**24
ITEMSIZE = {"BF16": 2, "U32": 4}
PROMPT, BOUND = 64, 19e9  # 16.5 GB of weights, of which the vision tower takes 2.3 GB in float32 instead of 1.1


def write(folder: Path) -> None:
    """Write the checkpoint in pieces of a tensor."""
    shutil.copytree(DATA / "hub_4bit", folder)
    stored = stored_tensors("weights_mlx_4bit.tsv")
    shards: list[list[str]] = []
    room = 0
    for name, (shape, dtype) in stored.items():
        nbytes = prod(shape) * ITEMSIZE[dtype]
        if nbytes > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= nbytes
    weight_map, random = {}, np.random.default_rng(0)
    for number, names in enumerate(shards, 1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map.update(dict.fromkeys(names, file_name))
        names.sort(key=lambda name: (-ITEMSIZE[stored[name][1]], name))  # the library's order, which aligns tensors
        header, end = {}, 0
        for name in names:
            shape, dtype = stored[name]
            start, end = end, end + prod(shape) * ITEMSIZE[dtype]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        with (folder / file_name).open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            for name in names:
                shape, dtype = stored[name]
                for start in range(0, prod(shape), PIECE):
                    count = min(PIECE, prod(shape) - start)
                    if dtype == "U32":
                        file.write(random.integers(0, 2**32, count, np.uint32).data)
                    else:
                        file.write(bfloat16(np.full(count, value(name, stored), np.float32)).data)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def bfloat16(values: np.ndarray) -> np.ndarray:
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def value(name: str, stored: dict[str, tuple[tuple[int, ...], str]]) -> float:
    """The value of all numbers in a BF16 tensor."""
    module, _, kind = name.rpartition(".")
    if kind not in ("scales", "biases"):
        # attention has scale 1, so the norms of queries and keys must bound its scores
        return stored[name][0][0] ** -0.25 if module.endswith(("q_norm", "k_norm")) else 1.0
    groups = stored[name][0][-1]
    bits = stored[f"{module}.weight"][0][-1] * 32 // (groups * 64)
    scale: float = deviation(module, 64 * groups) / ((4**bits - 1) / 12) ** 0.5  # deviation of uniform codes
    return scale if kind == "scales" else -scale * (2**bits - 1) / 2


def deviation(module: str, size: int) -> float:
    """The deviation of a module's weights, whose rows have ``size`` of them."""
    if module.endswith("router.proj"):
        return 1.0  # the router divides its input by the square root of the hidden size
    scale: float = size**-0.5
    return 6 * scale if module.endswith("embed_tokens") else scale


class Clock:
    """Seconds spent in each watched function, without the time in watched functions that it calls."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.labels: list[str] = []
        self.mark = 0.0

    def switch(self) -> None:
        now = time.perf_counter()
        if self.labels:
            self.seconds[self.labels[-1]] = self.seconds.get(self.labels[-1], 0.0) + now - self.mark
        self.mark = now

    def watch(self, owner: Any, name: str, label: str) -> None:
        """Count every call of ``owner.name`` under ``label``."""
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **options: Any) -> Any:
            self.switch()
            self.labels.append(label)
            try:
                return function(*args, **options)
            finally:
                self.switch()
                self.labels.pop()

        setattr(owner, name, timed)


def run(folder: Path, threads: int, steps: int) -> dict[str, Any]:
    """Load, prefill and denoise. Returns the figures."""
    import torch

    from mlx_diffgemma.backends.torch import packing, quantized
    from mlx_diffgemma.backends.torch import step as step_module

    torch.set_num_threads(threads)
    started = time.perf_counter()
    backend = load_backend(Checkpoint.open(folder), "torch", device="cpu")
    seconds: dict[str, Any] = {"load": time.perf_counter() - started}
    memory = {"after load": resident()}
    config = backend.config
    cache = backend.new_cache()

    started = time.perf_counter()
    backend.encode([Piece(noise.canvas_tokens(0, 0, 0, PROMPT, config.vocab_size), cache)])
    seconds["prefill"] = time.perf_counter() - started
    memory["after prefill"] = resident()

    signal, clock, seconds["steps"] = None, Clock(), []
    for step in range(1, steps + 1):
        if step == steps:
            clock.watch(packing.Room, "widen", "widening weights")
            clock.watch(quantized.QuantizedExpertLinear, "forward", "products, experts")
            clock.watch(quantized.QuantizedLinear, "forward", "products, other projections")
            clock.watch(quantized.QuantizedEmbedding, "as_linear", "products, output head")
            clock.watch(quantized.QuantizedEmbedding, "weighted_rows", "products, self-conditioning embeddings")
            clock.watch(step_module, "statistics", "softcap, softmax, entropy and sampling")
            clock.watch(backend, "denoise", "the rest: attention, norms, routing")
        canvas = noise.canvas_tokens(0, 1, step, config.canvas_length, config.vocab_size)
        row = Row(canvas, cache, 0.8, noise.sampling_key(0, 1, step), signal)
        started = time.perf_counter()
        [result] = backend.denoise([row])
        seconds["steps"].append(time.perf_counter() - started)
        signal = result.self_conditioning
        assert np.isfinite(result.entropy).all()
        memory[f"after step {step}"] = resident()
    seconds["last step"] = dict(sorted(clock.seconds.items(), key=lambda entry: -entry[1]))
    return {"seconds": rounded(seconds), "memory_GB": memory, "mean_entropy_nats": float(result.entropy.mean())}


def resident() -> dict[str, float]:
    """This process's memory in GB: the peak, and the current sizes of its own memory and of mapped file pages."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    names = {"peak": "VmHWM", "own": "RssAnon", "of files": "RssFile"}
    return {name: round(int(fields[field].split()[0]) * 1024 / 1e9, 2) for name, field in names.items()}


def rounded(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: rounded(entry) for key, entry in content.items()}
    return [rounded(entry) for entry in content] if isinstance(content, list) else round(content, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder for the checkpoint")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all)")
    parser.add_argument("--steps", type=int, default=2, help="denoising steps (default %(default)s)")
    parser.add_argument("--keep", action="store_true", help="keep FOLDER at the end, and use an existing one")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(run(options.folder, options.threads, options.steps)))
        return
    if not (options.keep and options.folder.exists()):
        write(options.folder)
    load_before = os.getloadavg()
    command = [sys.executable, __file__, options.folder, "--run", f"--threads={options.threads}", f"--steps={options.steps}"]
    try:
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        nbytes = sum(file.stat().st_size for file in options.folder.glob("*.safetensors"))
    finally:
        if not options.keep:
            shutil.rmtree(options.folder)
    figures = json.loads(output)
    peak = figures["memory_GB"][f"after step {options.steps}"]["peak"]
    result = {
        "command": f"python benchmarks/real_4bit_cpu.py FOLDER --threads {options.threads} --steps {options.steps}",
        "machine": dataclasses.asdict(Machine.this()),
        "load_average": {"before": load_before, "after": os.getloadavg()},
        "threads": options.threads,
        "file_bytes": nbytes,
        "peak_GB": peak,
        "within": peak * 1e9 <= BOUND,
        **figures,
    }
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(not result["within"])


if __name__ == "__main__":
    main()

"""Times a denoising step on the CPU: this project's torch backend and transformers, in turns in one process.

    python benchmarks/step_torch.py [--steps 8] [--rounds 3] [--json FILE]

Model: "mid" of checkpoints.py (hidden 768, 8 layers, 32 experts top 4, vocabulary 65,536), canvas 256 after a prefix of 600,
float32. A step includes the graph, statistics, sampling, acceptance, stop rule and self-conditioning, at temperatures from 0.8
down. Each program runs its own loop: `block_diffusion` here, and `generate` in transformers, whose step function is wrapped in a
timer.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import torch
import transformers
from torch.profiler import ProfilerActivity, profile

from mlx_diffgemma import Draft
from mlx_diffgemma.backends import load_backend
from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.sampler import Text, block_diffusion

PREFIX = 600


def reference_seconds(
    reference: Any, prompt: torch.Tensor, new_tokens: int, steps: int, done: Callable[[], object] = lambda: None
) -> list[float]:
    """Seconds of each denoising step of a ``generate`` of `transformers`. ``done`` waits for the device."""
    seconds, step = [], type(reference)._denoising_step

    def timed(self: object, *args: object, **kwargs: object) -> object:
        done()
        started = time.perf_counter()
        result = step(self, *args, **kwargs)
        done()
        seconds.append(time.perf_counter() - started)
        return result

    type(reference)._denoising_step = timed
    try:
        reference.generate(prompt, max_new_tokens=new_tokens, max_denoising_steps=steps, confidence_threshold=1e-9)
    finally:
        type(reference)._denoising_step = step
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="steps of a run (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each program (default %(default)s)")
    parser.add_argument(
        "--folder", type=Path, help="folder of the checkpoint, which is made if missing (default: a temporary folder)"
    )
    parser.add_argument("--json", type=Path, help="file to write the result to")
    parser.add_argument("--profile", action="store_true", help="print where the time of this project's step goes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = checkpoints.write(arguments.folder or Path(temporary), "mid")
        checkpoint = Checkpoint.open(folder)
        backend = load_backend(checkpoint, "torch", device="cpu", dtype="float32")
        reference = transformers.DiffusionGemmaForBlockDiffusion.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = np.random.default_rng(0).integers(3, checkpoint.config.vocab_size, PREFIX, dtype=np.int32)
    config = checkpoint.generation.replace(
        max_new_tokens=checkpoint.config.canvas_length, max_denoising_steps=arguments.steps, confidence_threshold=1e-9
    )

    def ours() -> list[float]:
        return [event.seconds for event in block_diffusion(backend, Text(prompt), config) if isinstance(event, Draft)]

    def theirs() -> list[float]:
        return reference_seconds(reference, torch.from_numpy(prompt).long()[None], config.max_new_tokens, arguments.steps)

    ours(), theirs()
    pairs = [(ours(), theirs()) for _ in range(arguments.rounds)]
    mine, other = ([second for round_ in part for second in round_] for part in zip(*pairs, strict=True))
    ratios = [statistics.median(a) / statistics.median(b) for a, b in pairs]
    result = {
        "command": "python benchmarks/step_torch.py",
        "date": date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "ours_s": {"median": statistics.median(mine), "min": min(mine), "max": max(mine)},
        "transformers_s": {"median": statistics.median(other), "min": min(other), "max": max(other)},
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
    }
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.profile:
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            ours()
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


if __name__ == "__main__":
    main()

"""Times a denoising step on MLX's CPU build: this project's MLX backend and mlx-vlm, in turns in one process.

    pip install --no-deps mlx-vlm   # and the small packages that it reports as missing
    python benchmarks/step_mlx.py [--steps 6] [--rounds 5] [--json FILE]

Model: "small" of checkpoints.py (hidden 256, 6 layers, 16 experts top 4, vocabulary 8,192), canvas 128 after a prefix of 200,
float32, one canvas. Both programs use the entropy-bounded sampler and sample tokens. mlx-vlm's loop cannot be timed step by step
from outside. For both programs, the time of a step is therefore (run of N steps - run of one step) / (N - 1).
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import checkpoints
import mlx.core as mx
import numpy as np
from mlx_vlm.generate import diffusion
from mlx_vlm.models.diffusion_gemma import Model, ModelConfig

from mlx_diffgemma.backends import Piece, Row, load_backend
from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.sampler import Text, block_diffusion

PREFIX = 200


def peer(folder: Path) -> Model:
    """mlx-vlm's model with the checkpoint's text weights. Its vision tower stays random and is not used."""
    raw = json.loads((folder / "config.json").read_text())
    raw["generation_config"] = {"t_min": 0.4, "t_max": 0.8, "confidence_threshold": 1e-9, "stability_threshold": 1}
    model = Model(ModelConfig.from_dict(raw))
    weights: dict[str, mx.array] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights.update(mx.load(str(file)))
    model.load_weights(list(model.sanitize(weights).items()), strict=False)
    mx.eval(model.parameters())
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="steps of the long run (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each program (default %(default)s)")
    parser.add_argument(
        "--folder", type=Path, help="folder of the checkpoint, which is made if missing (default: a temporary folder)"
    )
    parser.add_argument("--json", type=Path, help="file to write the result to")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = checkpoints.write(arguments.folder or Path(temporary), "small")
        checkpoint = Checkpoint.open(folder)
        backend = load_backend(checkpoint, "mlx", device="cpu", dtype="float32")
        other = peer(folder)
    length = checkpoint.config.canvas_length
    prompt = np.random.default_rng(0).integers(3, checkpoint.config.vocab_size, PREFIX, dtype=np.int32)

    cache, theirs_cache = backend.new_cache(), other.make_cache()
    backend.encode([Piece(prompt, cache)])
    theirs_cache = other.diffusion_prefill_cache(mx.array(prompt[None]), attention_mask=None, cache=theirs_cache)
    canvas = prompt[:length]
    logits = np.array(other.diffusion_decoder_logits(mx.array(canvas[None]), cache=theirs_cache, self_conditioning=None))[0]
    [ours_logits] = backend.logits([Row(canvas, cache, temperature=1.0)])
    print(f"largest difference of the two programs' logits: {np.abs(logits - ours_logits).max():.1e}")

    text = SimpleNamespace(add_token=lambda *_, **__: None, last_segment="", finalize=lambda: None)
    diffusion.make_streaming_detokenizer = lambda _: text  # time the sampler without decoding

    def ours(steps: int) -> None:
        config = checkpoint.generation.replace(
            max_new_tokens=length, max_denoising_steps=steps, confidence_threshold=1e-9, eos_token_ids=()
        )
        for _ in block_diffusion(backend, Text(prompt), config):
            pass

    def theirs(steps: int) -> None:
        run = diffusion.stream_diffusion_generate(
            other,
            None,
            SimpleNamespace(stopping_criteria=lambda _: False),
            mx.array(prompt[None]),
            None,
            None,
            max_tokens=length,
            skip_special_token_ids=set(),
            temperature=1.0,
            max_denoising_steps=steps,
            diffusion_full_canvas=True,
            diffusion_sampler="entropy-bound",
        )
        for _ in run:
            pass

    def step(program: Callable[[int], None]) -> float:
        times = []
        for steps in (1, arguments.steps):
            started = time.perf_counter()
            program(steps)
            times.append(time.perf_counter() - started)
        return (times[1] - times[0]) / (arguments.steps - 1)

    step(ours), step(theirs)
    pairs = [(step(ours), step(theirs)) for _ in range(arguments.rounds)]
    mine, peers = zip(*pairs, strict=True)
    ratios = [a / b for a, b in pairs]
    result = {
        "command": "python benchmarks/step_mlx.py",
        "date": date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, MLX on the CPU",
        "mlx": version("mlx"),
        "mlx-vlm": version("mlx-vlm"),
        "ours_s": {"median": statistics.median(mine), "min": min(mine), "max": max(mine)},
        "mlx_vlm_s": {"median": statistics.median(peers), "min": min(peers), "max": max(peers)},
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
    }
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Measures the vision tower on the CPU: seconds and peak memory for one image.

    python benchmarks/vision.py torch [--budgets 70 280 1120] [--layers N] [--json FILE]

The tower has the released model's shape (27 layers of 1,152, 16 heads of 72, MLPs of 4,304; 2.3 GB in float32) and random
weights. Images take their whole budget of soft tokens: 7 x 10, 14 x 20 and 28 x 40 squares of 3 x 3 patches. Each figure comes
from its own process. Peak memory is the most that the process, or MLX, held at once, minus what it held before.

MLX's CPU build is slow at this. With fewer ``--layers``, seconds are those of these layers times 27 / N; the peak stays the same,
because layers run one after another.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from long_context import measured, run

from mlx_diffgemma.config import FULL, LayerConfig, ModelConfig, RopeConfig
from mlx_diffgemma.vision.patches import Patches
from mlx_diffgemma.vision_config import VisionConfig

#: Budget -> rows and columns of soft tokens.
GRIDS = {70: (7, 10), 140: (10, 14), 280: (14, 20), 560: (20, 28), 1120: (28, 40)}

TOWER = VisionConfig(
    hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, num_key_value_heads=16, head_dim=72,
    patch_size=16, pooling_kernel_size=3, position_embedding_size=10_240, standardize=True,
)  # fmt: skip
#: Of the text model, only the hidden size counts.
MODEL = ModelConfig(
    vocab_size=1, hidden_size=2816, intermediate_size=1, moe_intermediate_size=1, num_attention_heads=1, num_experts=1,
    top_k_experts=1, rms_norm_eps=1e-6, final_logit_softcapping=30.0, sliding_window=1, max_position_embeddings=1,
    canvas_length=1, layers=(LayerConfig(FULL, 2, 1, RopeConfig("default", 1e4)),), vision=TOWER,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("backend", choices=("mlx", "torch"))
    parser.add_argument("--budgets", type=int, nargs="*", choices=GRIDS, default=(70, 280, 1120), help="soft tokens of the image")
    parser.add_argument("--layers", type=int, default=TOWER.num_hidden_layers, help="layers to run (default %(default)s)")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    arguments = parser.parse_args()
    figures = [run(see, arguments.backend, budget, arguments.layers) for budget in arguments.budgets]
    print(f"{arguments.backend}, {arguments.layers} layers")
    print(f"{'soft tokens':>11} {'patches':>8} {'peak, MB':>9} {'seconds':>8}")
    for each in figures:
        print(f"{each['soft_tokens']:>11,} {each['patches']:>8,} {each['peak'] / 1e6:>9,.0f} {each['seconds']:>8.1f}")
    if arguments.json:
        from mlx_diffgemma.reports.speed import Machine

        content = {"backend": arguments.backend, "layers": arguments.layers, "machine": vars(Machine.this()), "figures": figures}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


def see(name: str, budget: int, layers: int) -> dict[str, Any]:
    """Measure one image, after a small one."""
    model = replace(MODEL, vision=replace(TOWER, num_hidden_layers=layers))
    call = (torch_tower if name == "torch" else mlx_tower)(model)
    call(picture(1, 1))
    image = picture(*GRIDS[budget])
    seconds, peak = measured(name, lambda: call(image))
    seconds *= TOWER.num_hidden_layers / layers
    return {"soft_tokens": budget, "patches": len(image.pixels), "peak": peak, "seconds": seconds}


def picture(rows: int, columns: int) -> Patches:
    side = TOWER.pooling_kernel_size
    pixels = np.random.default_rng(0).integers(0, 256, (rows * columns * side**2, 3 * TOWER.patch_size**2), dtype=np.uint8)
    return Patches(pixels, rows * side, columns * side, rows * columns)


def torch_tower(config: ModelConfig) -> Callable[[Patches], object]:
    """A function that runs an image through a tower of random weights."""
    import torch

    from mlx_diffgemma.backends.torch.vision import VisionModel

    with torch.device("meta"):
        model = VisionModel(config)
    model.to_empty(device="cpu").requires_grad_(False)
    for weight in model.parameters():
        weight.normal_(std=weight.shape[-1] ** -0.5)

    @torch.inference_mode()
    def call(image: Patches) -> torch.Tensor:
        return model(torch.from_numpy(image.values)[None], torch.from_numpy(image.positions).long(), image.rows)

    return call


def mlx_tower(config: ModelConfig) -> Callable[[Patches], object]:
    import mlx.core as mx
    from mlx.utils import tree_map

    from mlx_diffgemma.backends.mlx.vision import VisionModel

    model = VisionModel(config)
    model.update(tree_map(lambda weight: mx.random.normal(weight.shape) * weight.shape[-1] ** -0.5, model.parameters()))
    mx.eval(model.parameters())

    def call(image: Patches) -> None:
        mx.eval(model(mx.array(image.values)[None], mx.array(image.positions), image.rows))

    return call


if __name__ == "__main__":
    main()

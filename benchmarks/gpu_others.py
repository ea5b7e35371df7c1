"""The same step in other programs, for ``gpu.py``: `transformers`, and this project's MLX wing on MLX's CUDA build.

Neither is needed for the other sections, and a machine may have neither.
"""

import importlib
import importlib.metadata
from collections.abc import Iterator
from typing import Any

import torch
from checkpoints import SMALL_VISION
from gpu_model import Extent, milliseconds, synchronize
from sections import WARMUP, Sizes, Skipped

from mlx_diffgemma import noise


def transformers_step(device: str, sizes: Sizes, extent: Extent, over: Any) -> Iterator[tuple[str, Any]]:
    """Milliseconds of the eager denoising step of `transformers`, random BF16 weights: two small models and what follows.

    A step is that of its ``generate``, with the sampler, after ``sizes.prompt`` positions. The step of all layers is extrapolated
    from the two: it is not measured.
    """
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise Skipped(f"transformers cannot be imported: {error}") from None
    yield "version", transformers.__version__
    if not hasattr(transformers, "DiffusionGemmaForBlockDiffusion"):
        raise Skipped(f"transformers {transformers.__version__} has no DiffusionGemma")
    from step_torch import reference_seconds

    prompt = torch.from_numpy(noise.canvas_tokens(0, 0, 0, sizes.prompt, sizes.vocabulary)).long()[None].to(device)
    medians = {}
    for layers in extent.peers:
        if over():
            return
        model = _transformers_model(transformers, sizes, layers, device)
        count = WARMUP + extent.steps
        seconds = reference_seconds(model, prompt, sizes.canvas, count, lambda: synchronize(device))
        found = milliseconds(seconds[WARMUP:])
        yield f"{layers} layers", {"ms": found, "steps": len(seconds)}
        medians[layers] = found["median"]
        del model
    few, more = extent.peers
    each = (medians[more] - medians[few]) / (more - few)
    yield "ms_per_layer", each
    yield f"ms_extrapolated_to_{extent.layers}_layers", medians[few] + each * (extent.layers - few)


def _transformers_model(transformers: Any, sizes: Sizes, layers: int, device: str) -> Any:
    """A model of random weights, with the smallest vision tower."""
    raw = sizes.raw_config(layers)
    kinds = raw["text_config"]["layer_types"]
    raw["text_config"]["layer_types"] = [*kinds[:-1], "full_attention"]  # the last one is full there
    raw["text_config"]["eos_token_id"] = None
    config = transformers.DiffusionGemmaConfig(
        text_config=raw["text_config"],
        vision_config=SMALL_VISION,
        canvas_length=raw["canvas_length"],
    )
    with torch.device(device):
        return transformers.DiffusionGemmaForBlockDiffusion._from_config(config, dtype=torch.bfloat16).eval()


def mlx_step(device: str, sizes: Sizes, extent: Extent, over: Any) -> Iterator[tuple[str, Any]]:
    """Milliseconds of a step of the MLX wing, as ``mac.py`` measures it: six layers, and all layers made of these six."""
    try:
        mac = importlib.import_module("mac")
    except ImportError as error:
        raise Skipped(f"MLX cannot be imported: {error}") from None
    yield "version", importlib.metadata.version("mlx")
    if device != "cpu" and mac.device() != "gpu":
        raise Skipped("this MLX has no GPU: it needs the CUDA build (mlx[cuda13])")
    prefix = sizes.prefixes[1]
    backend = mac.slice_of_model(sizes, mac.device(), mac.model_type())
    few = mac.denoising(backend, prefix, extent.steps)
    yield f"{mac.LAYERS} layers", {f"{name}_ms": milliseconds(list(taken.values())) for name, taken in few.items()}
    if over():
        return
    every = mac.denoising(mac.whole(backend, sizes), prefix, extent.steps)
    yield (
        f"{mac.ALL_LAYERS} layers of {mac.LAYERS}",
        {f"{name}_ms": milliseconds(list(taken.values())) for name, taken in every.items()},
    )

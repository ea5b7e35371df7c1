"""Converts a BF16 checkpoint into a quantized one, a piece at a time.

The public functions make a recipe, plan the conversion, and carry out the plan::

    checkpoint = Checkpoint.open("google/diffusiongemma-26B-A4B-it")
    plan = Plan.make(checkpoint, make_recipe("4bit", ["embedding=bf16"]))
    check_shapes(checkpoint)
    checkpoint.fetch_weights()
    write(plan, Path("diffusiongemma-4bit"), side_files(checkpoint, plan))
    upload(Path("diffusiongemma-4bit"), "me/diffusiongemma-4bit")

Both backends and mlx-vlm read the output. Planning needs no framework; the other functions import mlx when they are called.
"""

from mlx_diffgemma.convert.folder import check_repository, side_files, upload
from mlx_diffgemma.convert.quantize import check_shapes
from mlx_diffgemma.convert.recipe import NAMED_FORMATS, RECIPES, Plan, make_recipe, parse_format
from mlx_diffgemma.convert.shards import Progress, write
from mlx_diffgemma.convert.work import check_target

__all__ = [
    "NAMED_FORMATS",
    "RECIPES",
    "Plan",
    "Progress",
    "check_repository",
    "check_shapes",
    "check_target",
    "make_recipe",
    "parse_format",
    "side_files",
    "upload",
    "write",
]

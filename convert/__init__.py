"""Making a quantized checkpoint out of the BF16 one, a piece at a time.

Public are a recipe, its plan, and the plan's execution::

    checkpoint = Checkpoint.open("google/diffusiongemma-26B-A4B-it")
    plan = Plan.make(checkpoint, make_recipe("4bit", ["embedding=bf16"]))
    write(plan, Path("diffusiongemma-4bit"), side_files(checkpoint, plan))
    upload(Path("diffusiongemma-4bit"), "me/diffusiongemma-4bit")

The output is read by both backends, and by mlx-vlm. Planning needs no framework; the rest imports mlx when it is called.
"""

from mlx_diffgemma.convert.folder import check_repository, side_files, upload
from mlx_diffgemma.convert.recipe import NAMED_FORMATS, RECIPES, Plan, make_recipe, parse_format
from mlx_diffgemma.convert.shards import Progress, write

__all__ = [
    "NAMED_FORMATS",
    "RECIPES",
    "Plan",
    "Progress",
    "check_repository",
    "make_recipe",
    "parse_format",
    "side_files",
    "upload",
    "write",
]

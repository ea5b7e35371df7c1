"""The files beside the weights of a converted checkpoint, and the upload to the hub."""

import json
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.convert.quantize import mlx_version
from mlx_diffgemma.convert.recipe import Plan
from mlx_diffgemma.convert.source import carried_over
from mlx_diffgemma.errors import CheckpointError, InputError
from mlx_diffgemma.files import read_json

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
#: Path of a repository's revision in the cache of huggingface_hub.
_SNAPSHOT = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)/snapshots/(?P<revision>[0-9a-f]{40})")


@dataclass(frozen=True)
class Origin:
    """Where a checkpoint comes from: a hub repository and its commit, or a folder name and None."""

    name: str
    revision: str | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Origin":
        """Find the origin in the path of the checkpoint's folder: in the hub's cache, it contains the repository and commit."""
        folder = checkpoint.folder.resolve()
        if snapshot := _SNAPSHOT.fullmatch("/".join(folder.parts[-3:])):
            return cls(f"{snapshot['owner']}/{snapshot['name']}", snapshot["revision"])
        return cls(folder.name)


def side_files(checkpoint: Checkpoint, plan: Plan) -> dict[str, bytes]:
    """Name -> content of all files except the weights and their index. Raises BackendError if mlx cannot be imported."""
    carried = {file.name: file.read_bytes() for file in carried_over(checkpoint.folder)}
    card = model_card(plan, Origin.of(checkpoint)).encode()
    return {**carried, "config.json": _config(checkpoint, plan), "README.md": card}


def _config(checkpoint: Checkpoint, plan: Plan) -> bytes:
    config = read_json(checkpoint.folder / "config.json")
    for section in (config, config.get("text_config"), config.get("vision_config")):
        if isinstance(section, dict) and "dtype" in section:
            section["dtype"] = "bfloat16"
    full = {(layer.head_dim, layer.num_key_value_heads) for layer in checkpoint.config.layers if not layer.is_sliding}
    if len(full) == 1:
        # mlx-vlm reads the hub's names only, not transformers' per_layer_config
        config["text_config"]["global_head_dim"], config["text_config"]["num_global_key_value_heads"] = full.pop()
    if quantization := plan.quantization():
        # mlx-lm and mlx-vlm read the first key, transformers and the hub's pages the second
        config["quantization"] = config["quantization_config"] = quantization
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def model_card(plan: Plan, origin: Origin) -> str:
    """README.md: the source, the tools, and the format and size of each part."""
    source = origin.name if origin.revision is None else f"{origin.name} at revision {origin.revision}"
    lines = ["---", "license: apache-2.0", "library_name: mlx", "pipeline_tag: text-generation", "tags: [mlx, diffusion_gemma]"]
    if origin.revision is not None:
        lines.append(f"base_model: {origin.name}")
        if plan.quantization():
            lines.append("base_model_relation: quantized")
    lines += [
        "---",
        "",
        f"# DiffusionGemma, converted from {origin.name}",
        "",
        f"Converted from {source} by mlx-diffgemma {version('mlx-diffgemma')} with mlx {mlx_version()}.",
        "mlx-diffgemma runs it on MLX and on PyTorch; mlx-vlm loads it too.",
        "",
        "| part | format | tensors | bytes | bits per weight |",
        "|---|---|---:|---:|---:|",
    ]
    lines += [
        f"| {row.part} | {row.format} | {row.tensors} | {row.nbytes:,} | {row.bits_per_weight:.2f} |" for row in plan.rows()
    ]
    return "\n".join([*lines, ""])


def check_repository(repository: str) -> None:
    """Raise InputError if ``repository`` does not have the form OWNER/NAME."""
    if not _REPOSITORY.fullmatch(repository):
        raise InputError(f"{repository!r} is not a hub repository; write it as OWNER/NAME")


def upload(folder: Path, repository: str) -> None:
    """Upload a converted folder to the hub. Creates the repository if it does not exist.

    Raises CheckpointError if the hub refuses or cannot be reached. The folder is not changed.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # base class of its HTTP client's errors

    check_repository(repository)
    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"mlx-diffgemma {version('mlx-diffgemma')}")
    except (HTTPError, OSError) as refused:
        reason = str(refused).strip().partition("\n")[0]
        raise CheckpointError(
            f"{repository}: the upload failed ({reason}); the checkpoint is complete, retry with: hf upload {repository} {folder}"
        ) from None

"""The summary of a checkpoint: its parameters by part and format, its size and the memory it needs. Reads headers only."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from mlx_diffgemma.backends import DTYPES
from mlx_diffgemma.backends.memory import ITEMSIZE, Memory
from mlx_diffgemma.backends.memory import memory as memory_of
from mlx_diffgemma.checkpoint import NORMS, PARTS, Checkpoint, Quantization, part_of
from mlx_diffgemma.config import GenerationConfig, ModelConfig
from mlx_diffgemma.errors import CheckpointError, InputError
from mlx_diffgemma.vision_config import BUDGETS
from mlx_diffgemma.weights import Tensor

#: The module that projects what the vision tower saw into the text model's embeddings. Some conversions quantize it.
_PROJECTION = "embed_vision.embedding_projection"


@dataclass(frozen=True)
class StoredPart:
    """One part of a model as it is stored.

    Attributes:
        format: the format of its weights, such as "BF16" or "affine 4-bit, groups of 64". Several formats are separated by "; ".
        parameters: the number of weights. A packed word counts as all the weights in it; scales and biases of groups do not
            count.
        nbytes: the size of everything that is stored for the part, in bytes.
    """

    name: str
    format: str
    parameters: int
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.parameters


@dataclass(frozen=True)
class Images:
    """How a checkpoint reads images.

    Attributes:
        layers: layers of the vision tower.
        soft_tokens: how many tokens an image takes at most, unless the caller says otherwise.
        budgets: what the caller may say.
        projection: the format of the projection into the text model.
        nbytes: bytes of the features of an image of ``soft_tokens``, for each dtype.
    """

    layers: int
    soft_tokens: int
    budgets: tuple[int, ...]
    projection: str
    nbytes: Mapping[str, int]


@dataclass(frozen=True)
class Summary:
    """A checkpoint in numbers.

    Attributes:
        parts: the parts in the order of ``checkpoint.PARTS``, then the norms. Parts that the checkpoint does not have are left
            out.
        images: None if the checkpoint reads text only.
        active_parameters: how many parameters of the text model one token uses. Only the chosen experts count.
        context: the number of committed positions that ``memory`` is computed for.
        memory: the memory for each dtype.
    """

    config: ModelConfig
    generation: GenerationConfig
    parts: tuple[StoredPart, ...]
    images: Images | None
    active_parameters: int
    context: int
    memory: Mapping[str, Memory]

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.parameters


def summarize(checkpoint: Checkpoint, context: int | None = None) -> Summary:
    """Summarize a checkpoint and the memory for ``context`` positions (by default 8,192, or the model's context if that is less).

    Raises InputError if ``context`` is larger than the model's or below 1, and CheckpointError if a part has scales but no
    weights.
    """
    config = checkpoint.config
    if context is None:
        context = min(8192, config.max_position_embeddings)
    if not 1 <= context <= config.max_position_embeddings:
        raise InputError(f"context must be from 1 to the model's {config.max_position_embeddings} tokens, got {context}")
    by_part: dict[str, dict[str, Tensor]] = {name: {} for name in (*PARTS, NORMS)}
    for name, tensor in checkpoint.stored.items():
        by_part[part_of(name)][name] = tensor
    parts = tuple(_part(name, tensors, checkpoint.quantization) for name, tensors in by_part.items() if tensors)
    counts = {part.name: part.parameters for part in parts if part.name != "vision"}
    # A token uses only the chosen experts, but the whole embedding, which is also the output head.
    idle = counts.get("experts", 0) * (config.num_experts - config.top_k_experts) // config.num_experts
    memory = {dtype: memory_of(checkpoint, dtype, context) for dtype in DTYPES}
    active = sum(counts.values()) - idle
    return Summary(config, checkpoint.generation, parts, _images(checkpoint), active, context, memory)


def _images(checkpoint: Checkpoint) -> Images | None:
    vision = checkpoint.config.vision
    if vision is None:
        return None
    packed = checkpoint.quantization.get(_PROJECTION)
    weight = checkpoint.vision.get(f"{_PROJECTION}.weight")
    if weight is None:
        raise CheckpointError(f"the weights of {_PROJECTION} are missing; fetch them again")
    size = vision.soft_tokens * checkpoint.config.hidden_size
    return Images(
        layers=vision.num_hidden_layers,
        soft_tokens=vision.soft_tokens,
        budgets=BUDGETS,
        projection=weight.dtype if packed is None else str(packed),
        nbytes={dtype: size * ITEMSIZE[dtype] for dtype in DTYPES},
    )


def _part(name: str, tensors: Mapping[str, Tensor], quantization: Mapping[str, Quantization]) -> StoredPart:
    formats: set[str] = set()
    parameters = 0
    for path, tensor in tensors.items():
        module, _, attribute = path.rpartition(".")
        packed = quantization.get(module)
        if packed is None:
            formats.add(tensor.dtype)
            parameters += prod(tensor.shape)
        elif attribute == "weight":
            formats.add(str(packed))
            parameters += prod(tensor.shape) * 32 // packed.bits
    if not parameters:
        raise CheckpointError(f"the weights of {name} are missing; only {', '.join(sorted(tensors))} are there; fetch them again")
    return StoredPart(name, "; ".join(sorted(formats)), parameters, sum(tensor.nbytes for tensor in tensors.values()))

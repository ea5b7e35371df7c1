"""What a checkpoint is: its parameters by part and format, its size, and the memory it needs. Reads headers, no weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from mlx_diffgemma.backends import DTYPES
from mlx_diffgemma.backends.room import Room
from mlx_diffgemma.checkpoint import NORMS, PARTS, Checkpoint, Quantization, Tensor, part_of, quantized_modules
from mlx_diffgemma.config import GenerationConfig, ModelConfig
from mlx_diffgemma.errors import CheckpointError, InputError
from mlx_diffgemma.files import read_json

_ITEMSIZE = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class StoredPart:
    """One part of a model as it is stored.

    Attributes:
        format: of its weights, such as "BF16" or "affine 4-bit, groups of 64"; several are separated by "; ".
        parameters: logical ones: a packed word counts for all the weights in it, scales and biases of groups for none.
        nbytes: of everything stored for it.
    """

    name: str
    format: str
    parameters: int
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.parameters


#: Arrays of float32 logits that a denoising step holds at once: measured with MLX; PyTorch takes one on a CPU.
LOGITS_AT_ONCE = 12


@dataclass(frozen=True)
class Memory:
    """Bytes that running a checkpoint takes, for one text.

    Attributes:
        weights: of the text model: what is packed as it is stored, everything else in the dtype. The vision tower stays unread.
        cache_per_token: keys and values of one committed position on the full-attention layers, which keep all of them.
        cache_windows: those of the sliding layers, which keep the last ``sliding_window - 1`` positions, once these are full.
        cache: all buffers of the context that was asked for, with the room behind it; each further text takes as much.
        workspace: what a denoising step holds besides: :data:`LOGITS_AT_ONCE` of [canvas_length, vocab_size] in float32. A pass
            of several canvases takes no more, since they are finished one by one.
    """

    weights: int
    cache_per_token: int
    cache_windows: int
    cache: int
    workspace: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.workspace


@dataclass(frozen=True)
class Summary:
    """A checkpoint in numbers.

    Attributes:
        parts: in the order of ``checkpoint.PARTS``, then the norms; those that the checkpoint does not have are left out.
        active_parameters: of the text model, those that one token passes through: of the experts, only the chosen ones.
        context: committed positions that ``memory`` is reckoned for.
        memory: by dtype.
    """

    config: ModelConfig
    generation: GenerationConfig
    parts: tuple[StoredPart, ...]
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
    """Sum up a checkpoint, and the memory for ``context`` positions (by default 8,192, or as many as the model has).

    Raises InputError where ``context`` is not within the model's, and CheckpointError where a part has scales and no weights.
    """
    config = checkpoint.config
    if context is None:
        context = min(8192, config.max_position_embeddings)
    if not 1 <= context <= config.max_position_embeddings:
        raise InputError(f"context must lie between 1 and the model's {config.max_position_embeddings} tokens, got {context}")
    by_part: dict[str, dict[str, Tensor]] = {name: {} for name in (*PARTS, NORMS)}
    for name, tensor in checkpoint.tensors.items():
        by_part[part_of(name)][name] = tensor
    by_part["vision"] = dict(checkpoint.vision)
    vision_quantization = quantized_modules(read_json(checkpoint.folder / "config.json"), checkpoint.vision)
    quantization = {**checkpoint.quantization, **vision_quantization}
    parts = tuple(_part(name, tensors, quantization) for name, tensors in by_part.items() if tensors)
    counts = {part.name: part.parameters for part in parts if part.name != "vision"}
    # A token passes through the chosen experts, and of the embedding through all of it, as the output head.
    idle = counts.get("experts", 0) * (config.num_experts - config.top_k_experts) // config.num_experts
    memory = {dtype: _memory(checkpoint, dtype, context) for dtype in DTYPES}
    return Summary(config, checkpoint.generation, parts, sum(counts.values()) - idle, context, memory)


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
        raise CheckpointError(f"the weights of {name} are missing; only {', '.join(sorted(tensors))} are there")
    return StoredPart(name, "; ".join(sorted(formats)), parameters, sum(tensor.nbytes for tensor in tensors.values()))


def _memory(checkpoint: Checkpoint, dtype: str, context: int) -> Memory:
    config, itemsize = checkpoint.config, _ITEMSIZE[dtype]
    weights = sum(
        tensor.nbytes if name.rpartition(".")[0] in checkpoint.quantization else prod(tensor.shape) * itemsize
        for name, tensor in checkpoint.tensors.items()
    )
    position = {True: 0, False: 0}  # bytes of keys and values a position, on sliding layers and on full ones
    cache = 0
    for layer in config.layers:
        each = 2 * layer.num_key_value_heads * layer.head_dim * itemsize
        room = Room(config.sliding_window if layer.is_sliding else None, config.canvas_length)
        position[layer.is_sliding] += each
        cache += each * room.capacity(context, context + config.canvas_length)
    return Memory(
        weights=weights,
        cache_per_token=position[False],
        cache_windows=position[True] * (config.sliding_window - 1),
        cache=cache,
        workspace=LOGITS_AT_ONCE * config.canvas_length * config.vocab_size * 4,
    )

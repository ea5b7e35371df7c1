"""DiffusionGemma on MLX and on PyTorch: one API, one checkpoint, the same tokens.

>>> from mlx_diffgemma import load
>>> model = load("google/diffusiongemma-26B-A4B-it")
>>> print(model.generate("Why is the sky blue?", seed=0).text)

Importing this package imports neither framework; loading a model imports the one that is chosen.
"""

from mlx_diffgemma.causal import Token
from mlx_diffgemma.chat.conversation import Conversation
from mlx_diffgemma.chat.markup import Content, Reasoning, ToolCall
from mlx_diffgemma.chat.reply import Reply
from mlx_diffgemma.config import CausalConfig, GenerationConfig
from mlx_diffgemma.editing.infilling import Hole, Infill
from mlx_diffgemma.editing.revising import Doubt, Revision
from mlx_diffgemma.errors import BackendError, CheckpointError, DiffGemmaError, InputError
from mlx_diffgemma.pipeline import DiffusionGemma, Generation, Score, Statistics, load
from mlx_diffgemma.sampler import Block, Draft
from mlx_diffgemma.settling import Settled

__all__ = [
    "BackendError",
    "Block",
    "CausalConfig",
    "CheckpointError",
    "Content",
    "Conversation",
    "DiffGemmaError",
    "DiffusionGemma",
    "Doubt",
    "Draft",
    "Generation",
    "GenerationConfig",
    "Hole",
    "Infill",
    "InputError",
    "Reasoning",
    "Reply",
    "Revision",
    "Score",
    "Settled",
    "Statistics",
    "Token",
    "ToolCall",
    "load",
]

"""DiffusionGemma on MLX and on PyTorch: one API, one checkpoint, the same tokens.

>>> from mlx_diffgemma import load
>>> model = load("google/diffusiongemma-26B-A4B-it")
>>> print(model.generate("Why is the sky blue?", seed=0).text)

Importing this package imports neither framework. Loading a model imports the framework of its backend.
"""

from mlx_diffgemma.causal import Token
from mlx_diffgemma.chat.conversation import Conversation
from mlx_diffgemma.chat.reply import Reply
from mlx_diffgemma.config import CausalConfig, GenerationConfig
from mlx_diffgemma.editing.infilling import Candidate, Filling, Hole, Infill, infill
from mlx_diffgemma.editing.proofreading import Doubt, proofread
from mlx_diffgemma.editing.revising import Revision, revise
from mlx_diffgemma.errors import BackendError, CheckpointError, ComputationError, DiffGemmaError, InputError
from mlx_diffgemma.pipeline import DiffusionGemma, Score, load
from mlx_diffgemma.prefix_cache import PrefixCache
from mlx_diffgemma.sampler import Block, Draft
from mlx_diffgemma.settling import Settled
from mlx_diffgemma.vision.sources import Image, Video
from mlx_diffgemma.writing import Content, Generation, Reasoning, Statistics, ToolCall

__all__ = [
    "BackendError",
    "Block",
    "Candidate",
    "CausalConfig",
    "CheckpointError",
    "ComputationError",
    "Content",
    "Conversation",
    "DiffGemmaError",
    "DiffusionGemma",
    "Doubt",
    "Draft",
    "Filling",
    "Generation",
    "GenerationConfig",
    "Hole",
    "Image",
    "Infill",
    "InputError",
    "PrefixCache",
    "Reasoning",
    "Reply",
    "Revision",
    "Score",
    "Settled",
    "Statistics",
    "Token",
    "ToolCall",
    "Video",
    "infill",
    "load",
    "proofread",
    "revise",
]

"""The tokens around a text that is edited.

The text takes the place of the model's answer, directly after a prompt. By default the prompt is a chat with one user turn: the
instruction, which also contains the text. After the text come the end of the turn, and padding up to the end of the last canvas.
A ``raw`` text comes after the beginning-of-sequence token alone, and nothing follows it. A ``prompt`` replaces what comes before
the text in either case.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.errors import InputError
from mlx_diffgemma.pipeline import DiffusionGemma
from mlx_diffgemma.presets import configured
from mlx_diffgemma.prompts import Prompt, PromptTokens
from mlx_diffgemma.steps import Steps


def around(
    model: DiffusionGemma,
    instruction: str,
    prompt: Prompt | None,
    *,
    images: Sequence[Any],
    system: str | None,
    raw: bool,
    markup: bool,
) -> Steps[tuple[PromptTokens, tuple[int, ...]]]:
    """The tokens before a text, and the ids after it, in steps."""
    ending = () if raw else (model.tokenizer.end_of_turn_id, model.checkpoint.generation.pad_token_id)
    if prompt is None and raw:
        if system is not None:
            raise InputError("a system message needs the chat template; leave out raw")
        if len(images):
            raise InputError("images need a prompt; leave out raw, or give a prompt with <|image|> for each image")
        return PromptTokens(np.array([model.tokenizer.bos_token_id], np.int32)), ending
    text = instruction if prompt is None else prompt
    before = yield from model.prompt_steps(text, system=system, raw=raw, markup=markup, images=images)
    return before, ending


def editing_config(model: DiffusionGemma, options: Mapping[str, Any]) -> GenerationConfig:
    """The checkpoint's configuration for sampling, with some values replaced by those of a preset and by ``options``."""
    if options.get("max_new_tokens") is not None:
        raise InputError("an edited text has its own length; leave out max_new_tokens")
    return configured(model.checkpoint.generation, options)


def not_empty(text: str) -> str:
    """Return the text. Raises InputError if it is empty."""
    if not text.strip():
        raise InputError("the text is empty")
    return text

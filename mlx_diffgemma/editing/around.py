"""What stands around a text that is edited.

The text stands where a model's answer would: after a prompt, from its first token on. By default the prompt is a chat of one
user turn, the instruction, which holds the text too. The end of the turn follows the text, and padding up to the end of its last
canvas. A ``raw`` text comes after nothing but the beginning-of-sequence token, and nothing follows it. A ``prompt`` takes the
place of either.
"""

from collections.abc import Mapping
from typing import Any

from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.errors import InputError
from mlx_diffgemma.pipeline import DiffusionGemma
from mlx_diffgemma.prompts import Prompt


def around(
    model: DiffusionGemma, instruction: str, prompt: Prompt | None, *, system: str | None, raw: bool, markup: bool
) -> tuple[list[int], tuple[int, ...]]:
    """Ids of what comes before a text, and of what follows it."""
    ending = () if raw else (model.tokenizer.end_of_turn_id, model.checkpoint.generation.pad_token_id)
    if prompt is None and raw:
        if system is not None:
            raise InputError("a system message needs the chat template; leave out raw")
        return [model.tokenizer.bos_token_id], ending
    text = instruction if prompt is None else prompt
    ids: list[int] = model.prompt_ids(text, system=system, raw=raw, markup=markup).tolist()
    return ids, ending


def editing_config(model: DiffusionGemma, options: Mapping[str, Any]) -> GenerationConfig:
    """A checkpoint's way to sample, with ``options`` over it."""
    if options.get("max_new_tokens") is not None:
        raise InputError("the text itself says how many tokens there are; leave out max_new_tokens")
    return model.checkpoint.generation.replace(**options)


def checked(text: str) -> str:
    """The text; raises InputError where it is empty."""
    if not text.strip():
        raise InputError("the text is empty")
    return text

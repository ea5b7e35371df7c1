"""The tokenizer files of the tiny Sudoku checkpoint: 16 tokens, one per character, and a chat template without roles.

A chat of one user turn renders to ``<bos><|turn>CELLS<turn|><|turn>``, one token per cell. White space is ignored, so a grid may
be typed in rows. ``0`` and ``_`` are read as ``.``.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from mlx_diffgemma.demo.sudoku import to_tokens

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>")
PAD, EOS, BOS, UNKNOWN, TURN, END_OF_TURN = range(len(SPECIAL))
VOCABULARY = (*SPECIAL, ".", *"123456789")
_NORMALIZER = normalizers.Sequence([normalizers.Replace(Regex(r"\s"), ""), normalizers.Replace(Regex("[0_]"), ".")])

_CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|turn>' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] -%}
            {{- part['text'] -}}
        {%- endfor -%}
    {%- endif -%}
    {{- '<turn|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|turn>' -}}
{%- endif -%}
"""


def prompt_tokens(puzzles: NDArray[np.int8]) -> NDArray[np.int32]:
    """Prompts int32 [n, cells + 4] of puzzles [n, cells]: a user turn with the puzzle, as the chat template renders it."""
    before, after = np.array([BOS, TURN], np.int32), np.array([END_OF_TURN, TURN], np.int32)
    shape = (len(puzzles), 2)
    return np.concatenate([np.broadcast_to(before, shape), to_tokens(puzzles), np.broadcast_to(after, shape)], axis=1)


def write_tokenizer(
    folder: Path,
    vocabulary: Sequence[str] = VOCABULARY,
    normalizer: normalizers.Normalizer | None = _NORMALIZER,
    special: Sequence[str] = SPECIAL,
    chat_template: str = _CHAT_TEMPLATE,
) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and ``chat_template.jinja`` into the existing ``folder``.

    Args:
        vocabulary: :data:`SPECIAL`, then single characters and other special tokens.
        normalizer: applied to a text before it is split into characters; None for no change.
        special: the special tokens.
        chat_template: the text of the chat template.
    """
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.add_special_tokens(list(special))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()  # without a decoder, spaces would appear between tokens
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "<eos>",
        "bos_token": "<bos>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")

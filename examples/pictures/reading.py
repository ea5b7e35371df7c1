"""The language of the picture model: its tokens, the prompt with a picture in it, and the canvas that it writes.

The prompt is ``<bos><|turn>IMAGE<turn|><|turn>``, and the canvas ``CLUES=SOLUTION<turn|>``: first the 16 cells as the model reads
them, ``.`` for an empty one, then the 16 solved cells.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from drawing import SIZE, Picture, draw, random_look
from numpy.typing import NDArray
from PIL import Image
from puzzles import Grids, make_puzzles
from tokenizers import Regex, normalizers
from vocabulary import BOS, END_OF_TURN, PAD, SPECIAL, TURN, write_tokenizer
from vocabulary import VOCABULARY as OF_SUDOKU

from mlx_diffgemma.backends import Backend, ImageSpan, Piece
from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.demo.sudoku import to_tokens
from mlx_diffgemma.prompts import IMAGE, IMAGE_BEGIN, IMAGE_END
from mlx_diffgemma.sampler import Block, Text, diffuse
from mlx_diffgemma.vision.patches import Patches
from mlx_diffgemma.vision.pictures import read_picture
from mlx_diffgemma.vision_config import VisionConfig

CELLS = SIZE * SIZE
VOCABULARY = (*OF_SUDOKU, "=", IMAGE_BEGIN, IMAGE, IMAGE_END)
EQUALS, BEGIN_ID, IMAGE_ID, END_ID = range(len(OF_SUDOKU), len(VOCABULARY))
#: Tokens of a canvas: clues, ``=``, solution, the end of the turn, and padding.
CANVAS_LENGTH = 2 * CELLS + 4
#: Fewest and most clues of a puzzle.
CLUES = (4, 12)
#: A text to send with a picture. The tokenizer drops it, but a prompt cannot be empty.
PROMPT = "Solve"
#: Where the soft tokens begin in the prompt.
IMAGE_START = 3

_CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|turn>' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] -%}
            {{- '<|image|>' if part['type'] == 'image' else part['text'] -}}
        {%- endfor -%}
    {%- endif -%}
    {{- '<turn|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|turn>' -}}
{%- endif -%}
"""


@dataclass(frozen=True, eq=False)
class Pictures:
    """Puzzles with their pictures.

    Attributes:
        clues, solutions: int8 [n, 16].
        pictures: one for each.
        fonts: the font of each, str [n].
    """

    clues: Grids
    solutions: Grids
    pictures: Sequence[Picture]
    fonts: NDArray[np.str_]


def fresh_pictures(count: int, seed: int, font: str | None = None) -> Pictures:
    """Pictures that training never sees: of held-out puzzles, and drawn with other random numbers."""
    clues, solutions = make_puzzles(SIZE, count, CLUES, seed, held_out=True)
    streams = [np.random.default_rng([seed, index, 1]) for index in range(count)]  # training's have two words
    looks = [random_look(rng, font=font) for rng in streams]
    pictures = [draw(each, look, rng) for each, look, rng in zip(clues, looks, streams, strict=True)]
    return Pictures(clues, solutions, pictures, np.array([look.font for look in looks]))


def patches_of(picture: Picture, vision: VisionConfig) -> Patches:
    """The patches of a picture, as any caller's image becomes patches."""
    return read_picture(Image.fromarray(picture), vision)


def prompt_tokens(soft_tokens: int) -> NDArray[np.int32]:
    """The prompt int32 [N] with an image, as the chat template renders it."""
    return np.array([BOS, TURN, BEGIN_ID, *[IMAGE_ID] * soft_tokens, END_ID, END_OF_TURN, TURN], np.int32)


def canvas_tokens(clues: Grids, solutions: Grids) -> NDArray[np.int32]:
    """Canvases int32 [n, CANVAS_LENGTH] of clues and solutions [n, 16], as the model should write them."""
    canvases = np.full((len(clues), CANVAS_LENGTH), PAD, np.int32)
    canvases[:, :CELLS] = to_tokens(clues)
    canvases[:, CELLS] = EQUALS
    canvases[:, CELLS + 1 : 2 * CELLS + 1] = to_tokens(solutions)
    canvases[:, 2 * CELLS + 1] = END_OF_TURN
    return canvases


def is_right(tokens: NDArray[np.int32], puzzles: Pictures) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """For canvases [n, CANVAS_LENGTH]: which pictures were read right, and which were solved, in every cell."""
    same = tokens == canvas_tokens(puzzles.clues, puzzles.solutions)
    return same[:, :CELLS].all(axis=1), same[:, CELLS + 1 : 2 * CELLS + 1].all(axis=1)


def read_all(backend: Backend, puzzles: Pictures, config: GenerationConfig) -> NDArray[np.int32]:
    """The canvases [n, CANVAS_LENGTH] that a backend writes for pictures, many in one pass."""
    vision = backend.config.vision
    assert vision is not None
    texts = []
    for seed, picture in enumerate(puzzles.pictures):
        [features] = backend.see([patches_of(picture, vision)])
        cache = backend.new_cache()
        backend.encode([Piece(prompt_tokens(len(features)), cache, (ImageSpan(IMAGE_START, features),))])
        texts.append(Text(np.empty(0, np.int32), seed, cache))
    events = diffuse(backend, texts, config.replace(max_new_tokens=CANVAS_LENGTH), batch="fast", max_batch=64)
    blocks = {index: event for index, event in events if isinstance(event, Block)}
    return np.stack([blocks[index].tokens for index in range(len(texts))])


def write_picture_tokenizer(folder: Path) -> None:
    """The tokenizer's files. All characters that can stand in no canvas are dropped, so any words may stand beside a picture."""
    special = (*SPECIAL, *VOCABULARY[BEGIN_ID:])
    write_tokenizer(folder, VOCABULARY, normalizers.Replace(Regex("[^.1-9=]"), ""), special, _CHAT_TEMPLATE)

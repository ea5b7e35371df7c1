"""Prompts: the forms that they can have, and how their tokens are cut into pieces for the causal pass.

The cuts of a text decide how its keys and values are rounded. A text must therefore always be cut in the same places, whatever a
cache holds. Each boundary depends only on the tokens before it, so all continuations of a text share it. A cache that ends at a
boundary then holds, bit for bit, what encoding the text again would give.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_diffgemma.errors import InputError
from mlx_diffgemma.vision.patches import Patches, PlacedImage
from mlx_diffgemma.vision_config import BUDGETS

#: A text, a conversation of {"role": ..., "content": ...} messages, or token ids.
Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]

#: Gemma 4's markup. Each marker begins with "<", ends with ">" and has neither in between, so no two markers overlap.
CHANNEL, CHANNEL_END, CALL, CALL_END, QUOTE = "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>'
TURN, TURN_END, RESPONSE, RESPONSE_END = "<|turn>", "<turn|>", "<|tool_response>", "<tool_response|>"
#: The markers of an image: before its soft tokens, each of them, and after them. A frame of a video has its own soft token.
IMAGE_BEGIN, IMAGE, IMAGE_END, VIDEO = "<|image>", "<|image|>", "<image|>", "<|video|>"
MARKERS = (
    *(CHANNEL, CHANNEL_END, CALL, CALL_END, QUOTE, TURN, TURN_END, RESPONSE, RESPONSE_END),
    *("<|think|>", "<|tool>", "<tool|>"),
    *(IMAGE_BEGIN, IMAGE, IMAGE_END, "<|audio>", "<|audio|>", "<audio|>", VIDEO),
)


#: Tokens that the causal pass reads at once, if nothing else cuts the text. On a CPU, pieces of 512, 1,024 and 2,048 encode a
#: prompt of 4,096 at the same speed within 5%, and pieces of 256 are 10% slower. With smaller pieces, more of a changed prompt
#: is found in a cache.
CHUNK = 1024

#: A piece is not cut within an image. It may therefore be longer than the rule says, by the soft tokens of the largest image.
MOST_SOFT_TOKENS = max(BUDGETS)


@dataclass(frozen=True, eq=False)
class PromptTokens:
    """A prompt as token ids.

    Attributes:
        ids: int32 [N].
        images: the images in it, in order. The frames of a video are images.
    """

    ids: NDArray[np.int32]
    images: tuple[PlacedImage, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)


def place_images(ids: NDArray[np.int32], images: Sequence[Patches], soft: Sequence[int]) -> PromptTokens:
    """Find the soft tokens of each image in ids [N], in order.

    Args:
        soft: the ids of soft tokens.

    Raises InputError if the ids do not have exactly the soft tokens of these images.
    """
    inside = np.concatenate([[False], np.isin(ids, soft), [False]])
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    runs = list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
    if len(runs) != len(images):
        raise InputError(
            f"the prompt has places for {counted(len(runs), 'image')}, but {counted(len(images), 'image')} came with it"
        )
    for number, ((start, stop), patches) in enumerate(zip(runs, images, strict=True), 1):
        if stop - start != patches.soft_tokens:
            raise InputError(
                f"image {number} has {patches.soft_tokens} soft tokens, but its place in the prompt has {stop - start}"
            )
    return PromptTokens(ids, tuple(PlacedImage(start, each) for (start, _), each in zip(runs, images, strict=True)))


def counted(number: int, one: str, several: str | None = None) -> str:
    """A number and what it counts, as a message says it."""
    return f"{number} {one if number == 1 else several or f'{one}s'}"


def chunks(ids: NDArray[np.int32]) -> list[NDArray[np.int32]]:
    """Cut ids [N] without a rule: into pieces of CHUNK tokens, the last one shorter."""
    return [ids[start : start + CHUNK] for start in range(0, len(ids), CHUNK)]


@dataclass(frozen=True)
class PieceRule:
    """Where the texts of one model are cut.

    A reply is generated and committed canvas by canvas, from the end of its prompt. Where a reply begins, the text is therefore
    cut every ``canvas_length`` tokens, up to the reply's end. Everywhere else it is cut every :data:`CHUNK` tokens.

    Attributes:
        canvas_length: tokens per canvas.
        ends: ids of tokens that end a turn or a reply. Each of them ends a piece.
        starts: sequences of token ids with which the chat template ends a prompt. A reply begins after them, and so does a piece.
        soft: ids of the soft tokens of images. A cut that would fall within an image comes after it instead.
    """

    canvas_length: int
    ends: tuple[int, ...] = ()
    starts: tuple[tuple[int, ...], ...] = ()
    soft: tuple[int, ...] = ()

    def boundaries(self, ids: NDArray[np.int32]) -> list[int]:
        """Where each piece of ids [N] ends, counted in tokens. The last one ends with the text, even if that is no boundary."""
        cuts = list(self._cuts(ids))
        return cuts if cuts and cuts[-1] == len(ids) else [*cuts, *([len(ids)] if len(ids) else [])]

    def is_boundary(self, ids: NDArray[np.int32]) -> bool:
        """Whether ids [N] end at a boundary, which every text that begins with them then has."""
        return bool(len(ids)) and [0, *self._cuts(ids)][-1] == len(ids)

    def is_start(self, ids: NDArray[np.int32]) -> bool:
        """Whether a reply begins after ids [N]."""
        return any(len(ids) >= len(start) and ids[-len(start) :].tolist() == list(start) for start in self.starts)

    def _cuts(self, ids: NDArray[np.int32]) -> Iterator[int]:
        """The boundaries within ids [N] that every text with this prefix has."""
        replies = dict.fromkeys((np.flatnonzero(np.isin(ids, self.ends)) + 1).tolist(), False)
        for start in self.starts:
            replies |= dict.fromkeys(_behind(ids, start), True)
        within = np.isin(ids, self.soft)
        cut, step = 0, CHUNK
        for place in sorted({*replies, len(ids)}):
            while (cut := _outside(within, cut + step)) < place:
                yield cut
            if place in replies or cut == place:
                yield place
            cut, step = place, self.canvas_length if replies.get(place) else CHUNK


def _outside(within: NDArray[np.bool_], cut: int) -> int:
    """The first place from ``cut`` on that is not directly after a soft token. It depends only on the tokens before it."""
    most = min(cut + MOST_SOFT_TOKENS, len(within) + 1)
    while cut < most and cut <= len(within) and within[cut - 1]:
        cut += 1
    return cut


def _behind(ids: NDArray[np.int32], pattern: tuple[int, ...]) -> list[int]:
    """The places in ids [N] after each occurrence of a pattern."""
    if not 0 < len(pattern) <= len(ids):
        return []
    windows = np.lib.stride_tricks.sliding_window_view(ids, len(pattern))
    places: list[int] = (np.flatnonzero((windows == pattern).all(axis=1)) + len(pattern)).tolist()
    return places


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raise InputError unless the messages have the form of :data:`Prompt`, and each part is text or the place of an image."""
    if not is_list(messages) or not messages:
        raise InputError("messages must be a non-empty list of mappings with role and content")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f"messages[{index}] must be a mapping with role and content")
        content = message.get("content")
        if "content" not in message and message["role"] not in ("assistant", "model"):
            raise InputError(f"messages[{index}] has no content")
        if content is None or isinstance(content, str):
            continue
        if not is_list(content):
            raise InputError(f"messages[{index}]: content must be a string or a list of parts, got {type(content).__name__}")
        for part in content:
            _check_part(part, f"messages[{index}]")


def _check_part(part: Any, where: str) -> None:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(kind, str):
        raise InputError(
            f'{where}: each part of the content must be a mapping with a type, such as {{"type": "text", "text": "Hi"}}'
        )
    if kind in ("image", "video"):
        return
    if "audio" in kind:  # another name in use is input_audio
        raise InputError(f"{where}: the model does not hear audio; send text, images and video only")
    if kind != "text":
        raise InputError(f"{where}: each part of the content must have the type text, image or video, got {kind!r}")
    if not isinstance(part.get("text"), str):
        raise InputError(f"{where}: each part of the content must have a string as its text, got {part.get('text')!r}")


def is_list(value: object) -> bool:
    """Whether a value is a list in JSON."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)

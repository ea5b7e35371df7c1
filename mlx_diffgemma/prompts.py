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

#: A text, a conversation of {"role": ..., "content": ...} messages, or token ids.
Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]

#: Gemma 4's markup. Each marker begins with "<", ends with ">" and has neither in between, so no two markers overlap.
CHANNEL, CHANNEL_END, CALL, CALL_END, QUOTE = "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>'
TURN, TURN_END, RESPONSE, RESPONSE_END = "<|turn>", "<turn|>", "<|tool_response>", "<tool_response|>"
MARKERS = (
    *(CHANNEL, CHANNEL_END, CALL, CALL_END, QUOTE, TURN, TURN_END, RESPONSE, RESPONSE_END),
    *("<|think|>", "<|tool>", "<tool|>"),
    *("<|image>", "<|image|>", "<image|>", "<|audio>", "<|audio|>", "<audio|>", "<|video|>"),
)

_MEDIA = {"image": "images are", "video": "video is", "audio": "audio is"}

#: Tokens that the causal pass reads at once, if nothing else cuts the text. On a CPU, pieces of 512, 1,024 and 2,048 encode a
#: prompt of 4,096 at the same speed within 5%, and pieces of 256 are 10% slower. With smaller pieces, more of a changed prompt
#: is found in a cache.
CHUNK = 1024


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
    """

    canvas_length: int
    ends: tuple[int, ...] = ()
    starts: tuple[tuple[int, ...], ...] = ()

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
        begin, step = 0, CHUNK
        for place in sorted({*replies, len(ids)}):
            yield from range(begin + step, place, step)
            if place in replies or (place > begin and (place - begin) % step == 0):
                yield place
            begin, step = place, self.canvas_length if replies.get(place) else CHUNK


def _behind(ids: NDArray[np.int32], pattern: tuple[int, ...]) -> list[int]:
    """The places in ids [N] after each occurrence of a pattern."""
    if not 0 < len(pattern) <= len(ids):
        return []
    windows = np.lib.stride_tricks.sliding_window_view(ids, len(pattern))
    places: list[int] = (np.flatnonzero((windows == pattern).all(axis=1)) + len(pattern)).tolist()
    return places


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raise InputError unless the messages have the form of :data:`Prompt` and contain only text."""
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
    for medium, media_are in _MEDIA.items():
        if medium in kind:  # other names in use are image_url and input_audio
            raise InputError(f"{where}: {media_are} not supported yet; send text only")
    if kind != "text":
        raise InputError(f"{where}: each part of the content must have the type text, got {kind!r}")
    if not isinstance(part.get("text"), str):
        raise InputError(f"{where}: each part of the content must have a string as its text, got {part.get('text')!r}")


def is_list(value: object) -> bool:
    """Whether a value is a list in JSON."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)

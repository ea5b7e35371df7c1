"""What a prompt may be, and how its tokens are cut into the pieces that the causal pass reads.

How a text is cut decides how its keys and values are rounded. A text must therefore always be cut in the same places, whatever is
in a cache: each boundary depends on the tokens before it alone, so that all continuations of a text share it. A cache that ends
at a boundary then holds, bit for bit, what encoding the text afresh would give.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_diffgemma.errors import InputError

#: A text, a conversation of {"role": ..., "content": ...} messages, or token ids.
Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]

#: Gemma 4's markup. Each begins with "<", ends with ">" and has neither in between, so that no two overlap.
CHANNEL, CHANNEL_END, CALL, CALL_END, QUOTE = "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>'
TURN, TURN_END, RESPONSE, RESPONSE_END = "<|turn>", "<turn|>", "<|tool_response>", "<tool_response|>"
MARKERS = (
    *(CHANNEL, CHANNEL_END, CALL, CALL_END, QUOTE, TURN, TURN_END, RESPONSE, RESPONSE_END),
    *("<|think|>", "<|tool>", "<tool|>"),
    *("<|image>", "<|image|>", "<image|>", "<|audio>", "<|audio|>", "<audio|>", "<|video|>"),
)

_MEDIA = {"image": "images are", "video": "video is", "audio": "audio is"}

#: Tokens that the causal pass reads at once, where nothing else cuts the text. On a CPU, pieces of 512, 1,024 and 2,048 read a
#: prompt of 4,096 at the same speed within 5%, and pieces of 256 are 10% slower. The smaller they are, the more of a changed
#: prompt is found in a cache.
CHUNK = 1024


def chunks(ids: NDArray[np.int32]) -> list[NDArray[np.int32]]:
    """The pieces of ids [N] of which nothing else is known: CHUNK tokens each, and what is left."""
    return [ids[start : start + CHUNK] for start in range(0, len(ids), CHUNK)]


@dataclass(frozen=True)
class PieceRule:
    """Where the texts of one model are cut.

    A reply is generated and committed canvas by canvas from the end of its prompt. Behind each place where a reply begins, a text
    is therefore cut every ``canvas_length`` tokens, up to the reply's end; elsewhere, every :data:`CHUNK`.

    Attributes:
        canvas_length: tokens.
        ends: ids of tokens that end a turn or a reply: each ends a piece.
        starts: token ids that end a prompt, as the chat template writes it: behind them a reply begins, and a piece.
    """

    canvas_length: int
    ends: tuple[int, ...] = ()
    starts: tuple[tuple[int, ...], ...] = ()

    def boundaries(self, ids: NDArray[np.int32]) -> list[int]:
        """How many of the ids [N] are before the end of each piece; the last one ends with the text, wherever that is."""
        cuts = list(self._cuts(ids))
        return cuts if cuts and cuts[-1] == len(ids) else [*cuts, *([len(ids)] if len(ids) else [])]

    def is_boundary(self, ids: NDArray[np.int32]) -> bool:
        """Whether ids [N] end where every text that begins with them has a boundary."""
        return bool(len(ids)) and [0, *self._cuts(ids)][-1] == len(ids)

    def is_start(self, ids: NDArray[np.int32]) -> bool:
        """Whether a reply begins behind ids [N]."""
        return any(len(ids) >= len(start) and ids[-len(start) :].tolist() == list(start) for start in self.starts)

    def _cuts(self, ids: NDArray[np.int32]) -> Iterator[int]:
        """The boundaries that every text which begins with ids [N] has within them."""
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
    """The places in ids [N] behind each occurrence of a pattern."""
    if not 0 < len(pattern) <= len(ids):
        return []
    windows = np.lib.stride_tricks.sliding_window_view(ids, len(pattern))
    places: list[int] = (np.flatnonzero((windows == pattern).all(axis=1)) + len(pattern)).tolist()
    return places


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raise InputError unless messages are of the form that :data:`Prompt` says, and of text alone."""
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
            f'{where}: a part of the content must be a mapping with a type, such as {{"type": "text", "text": "Hi"}}'
        )
    for medium, media_are in _MEDIA.items():
        if medium in kind:  # image_url and input_audio are other names in use
            raise InputError(f"{where}: {media_are} not supported yet; text only")
    if kind != "text" or not isinstance(part.get("text"), str):
        raise InputError(f"{where}: a part of type {kind!r} must be of type text, with a string as its text")


def is_list(value: object) -> bool:
    """Whether a value stands for a list in JSON."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)

"""The markup of a reply: thoughts, answer and tool calls told apart while the text still grows.

Gemma 4 writes ``<|channel>thought\\n...<channel|>`` around what it thinks, and calls a tool by
``<|tool_call>call:NAME{key:value,...}<tool_call|>``: keys are bare, strings stand between ``<|"|>`` and are not escaped, other
values are JSON's, in ``{...}`` and ``[...]`` again. ``<turn|>`` or ``<|tool_response>`` ends the reply.

How it is read:

- What lies in a channel is reasoning, whatever the channel's name, as for the chat template, which drops every channel of an
  earlier reply. The heading ``thought\\n`` and one newline before ``<channel|>`` belong to the markup: the template writes them.
- All else is the answer. Text is kept to the character, except that white space between a thought and the answer is dropped, and
  so is a stretch of nothing but white space before or behind a call, a thought, or the whole reply.
- Where a call has been opened and what follows is no call, or never ends, the opening is a stray marker, and what follows is
  text, so that a person sees what was tried. Stray markers are dropped.
- In a call, white space between the parts is skipped, a key may stand between ``<|"|>``, a comma may be the last, and ``None``,
  ``True`` and ``False``, which some chat templates write, are read as JSON's.
- A call within a thought counts; the thought goes on behind it.
- No marker is ever shown. Where shown text would come to spell one across what was left out between, its last character is
  dropped.

The response parser of transformers 5.23 is not used: it ends a call at a ``<tool_call|>`` inside a string, reads keys of word
characters only, has neither ``None`` nor a way back from a call that it cannot read, which raises ValueError; and it strips text.
"""

import json
import math
import re
from collections.abc import Generator
from typing import Any

from mlx_diffgemma.prompts import CALL, CALL_END, CHANNEL, CHANNEL_END, MARKERS, QUOTE, RESPONSE, TURN, TURN_END
from mlx_diffgemma.writing import Content, Part, Reasoning, ToolCall

_MARKER = re.compile("|".join(map(re.escape, MARKERS)))
_LONGEST = max(map(len, MARKERS))
_HEADING = "thought\n"
_ENDS = (TURN, TURN_END, RESPONSE)


class ReplyParser:
    """Reads a reply's text in pieces. The parts do not depend on where it is cut, but for where a text's stretches end.

    Args:
        thought: what the prompt holds already of a thought in which the reply begins, from its heading on; None where it begins
            in none.
    """

    def __init__(self, thought: str | None = None) -> None:
        self._text, self._at = "", 0  # what has not been read is behind _at
        self._call: _Call | None = None  # being read, from _at on
        self._ended = False
        self._tails = {Reasoning: "", Content: ""}  # the end of what has been shown of each kind
        self._begin(Content if thought is None else Reasoning)
        if thought is not None:
            if _is_unfinished_heading(thought):
                self._held = thought
            else:
                self._fresh = False

    def feed(self, text: str) -> list[Part]:
        """The parts that became certain with ``text``. What may be the beginning of a marker or a call is held back."""
        self._text += text
        return self._read(final=False)

    def close(self) -> list[Part]:
        """What was held back, the reply being over. Nothing comes after it."""
        return self._read(final=True)

    def _begin(self, kind: type[Reasoning] | type[Content], *, strip: bool = False) -> None:
        """Begin a stretch, with leading white space dropped if ``strip``; what was held of the one before is dropped."""
        self._kind, self._strip = kind, strip
        self._fresh = True  # nothing of it has been shown
        self._held = ""  # its heading or white space, of which what follows decides

    def _read(self, *, final: bool) -> list[Part]:
        parts: list[Part] = []
        while not self._ended:
            if self._call is not None:
                try:
                    call = self._call.read(self._text, self._at)
                except ValueError:
                    self._call = None
                    continue
                if call is not None:
                    parts += [*self._release(), call]
                    self._at += self._call.length
                elif not final:
                    break
                self._call = None
                continue
            marker = _MARKER.search(self._text, self._at)
            end = marker.start() if marker else len(self._text) if final else self._certain()
            parts += self._show(self._readable(self._text[self._at : end]))
            self._at = marker.end() if marker else end
            if marker and marker[0] not in _ENDS:
                self._obey(marker[0])
            elif marker or final:
                parts += self._release()
                self._ended, self._at = True, len(self._text)
            else:
                break
        self._text, self._at = self._text[self._at :], 0
        return parts

    def _certain(self) -> int:
        """Where a marker may begin at the text's end, or else its end."""
        start = self._text.rfind("<", self._at)
        unfinished = start >= 0 and any(marker.startswith(self._text[start:]) for marker in MARKERS)
        return start if unfinished else len(self._text)

    def _obey(self, marker: str) -> None:
        if marker == CHANNEL:
            self._begin(Reasoning)
        elif marker == CHANNEL_END and self._kind is Reasoning:
            self._begin(Content, strip=True)
        elif marker == CALL:
            self._call = _Call()

    def _readable(self, text: str) -> str:
        """What of the stretch can be shown, now that ``text`` has come."""
        text = self._held + text
        if self._fresh and (_is_unfinished_heading(text) if self._kind is Reasoning else not text.strip()):
            self._held = text
            return ""
        if self._fresh:
            text = text.removeprefix(_HEADING) if self._kind is Reasoning else text.lstrip() if self._strip else text
            self._fresh = False
        self._held = "\n" if self._kind is Reasoning and text.endswith("\n") else ""
        return text[: len(text) - len(self._held)]

    def _release(self) -> list[Part]:
        """End a stretch that no ``<channel|>`` ends: a thought shows its last newline, and goes on; an answer begins anew."""
        if self._kind is Content:
            self._begin(Content)
        if self._fresh:
            return []
        held, self._held = self._held, ""
        return self._show(held)

    def _show(self, text: str) -> list[Part]:
        tail = self._tails[self._kind]
        text = tail + text
        while marker := _MARKER.search(text):
            text = text[: marker.end() - 1] + text[marker.end() :]
        self._tails[self._kind] = text[1 - _LONGEST :]
        text = text[len(tail) :]
        return [self._kind(text)] if text else []


def _is_unfinished_heading(text: str) -> bool:
    return text != _HEADING and _HEADING.startswith(text)


# --- tool calls

#: What a call consists of: ("string", text), ("word", text) or ("sign", one of { } [ ] , : and the end of the call).
_Token = tuple[str, str]

_TOKEN = re.compile(
    rf"""\s*+(?:(?P<quote>{re.escape(QUOTE)})
    |(?P<sign>[{{}}\[\],:]|{re.escape(CALL_END)})
    |(?P<word>[^<{{}}\[\],:]++)(?=[<{{}}\[\],:]))""",
    re.VERBOSE,
)
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_CONSTANTS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}

#: Objects and lists within each other; Python's own JSON gives up at some hundreds.
_MAX_DEPTH = 100


class _Call:
    """Reads a call from behind its opening marker on; each token once, however the text is cut."""

    def __init__(self) -> None:
        self.length = 0  # characters read
        self._reader = _read_call()
        next(self._reader)

    def read(self, text: str, start: int) -> ToolCall | None:
        """The call that begins at ``start``; None where more text must come. Raises ValueError where it is none."""
        while found := _next_token(text, start + self.length):
            token, end = found
            self.length = end - start
            try:
                self._reader.send(token)
            except StopIteration as finished:
                call: ToolCall = finished.value
                return call
        return None


def _next_token(text: str, start: int) -> tuple[_Token, int] | None:
    """The token and where it ends; None where more text must come. Raises ValueError for a marker that belongs in no call."""
    match = _TOKEN.match(text, start)
    if match is None:
        rest = text[start:].lstrip()
        if rest.startswith("<") and not any(marker.startswith(rest) for marker in (QUOTE, CALL_END)):
            raise ValueError
        return None
    if match["quote"]:
        end = text.find(QUOTE, match.end())
        return None if end < 0 else (("string", text[match.end() : end]), end + len(QUOTE))
    return (("sign", match["sign"]) if match["sign"] else ("word", match["word"].rstrip())), match.end()


def _read_call() -> Generator[None, _Token, ToolCall]:
    """A generator that is sent the tokens and returns the call, or raises ValueError at the first that does not belong."""
    _expect((yield), "word", "call")
    _expect((yield), "sign", ":")
    kind, name = yield
    if kind != "word":
        raise ValueError
    _expect((yield), "sign", "{")
    arguments = yield from _read_object(1)
    _expect((yield), "sign", CALL_END)
    return ToolCall(name, arguments)


def _expect(token: _Token, kind: str, text: str) -> None:
    if token != (kind, text):
        raise ValueError


def _read_value(token: _Token, depth: int) -> Generator[None, _Token, Any]:
    kind, text = token
    if kind == "string":
        return text
    if kind == "word":
        return _constant(text)
    if depth < _MAX_DEPTH and text == "{":
        return (yield from _read_object(depth + 1))
    if depth < _MAX_DEPTH and text == "[":
        return (yield from _read_list(depth + 1))
    raise ValueError


def _read_object(depth: int) -> Generator[None, _Token, dict[str, Any]]:
    members: dict[str, Any] = {}
    token = yield
    while token != ("sign", "}"):
        kind, key = token
        if kind == "sign":
            raise ValueError
        _expect((yield), "sign", ":")
        members[key] = yield from _read_value((yield), depth)
        token = yield
        if token == ("sign", ","):
            token = yield
        else:
            _expect(token, "sign", "}")
    return members


def _read_list(depth: int) -> Generator[None, _Token, list[Any]]:
    items: list[Any] = []
    token = yield
    while token != ("sign", "]"):
        items.append((yield from _read_value(token, depth)))
        token = yield
        if token == ("sign", ","):
            token = yield
        else:
            _expect(token, "sign", "]")
    return items


def _constant(word: str) -> Any:
    if word in _CONSTANTS:
        return _CONSTANTS[word]
    if not _NUMBER.fullmatch(word):
        raise ValueError
    number = json.loads(word)  # refuses leading zeros, and integers too long for Python
    if number in (math.inf, -math.inf):  # JSON has neither
        raise ValueError
    return number

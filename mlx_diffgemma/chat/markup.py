"""The parser of a reply's markup: separates thoughts, answer and tool calls while the text still grows.

Gemma 4 writes a thought as ``<|channel>thought\\n...<channel|>``, and a tool call as
``<|tool_call>call:NAME{key:value,...}<tool_call|>``. Keys are bare. Strings stand between two ``<|"|>`` and are not escaped.
Other values are as in JSON, with ``{...}`` and ``[...]`` in the same notation. ``<turn|>`` or ``<|tool_response>`` ends the
reply.

The rules:

- Text in a channel is reasoning, whatever the channel's name. (The chat template also drops every channel of an earlier reply.)
  The heading ``thought\\n`` and one newline before ``<channel|>`` belong to the markup, because the template writes them.
- All other text is the answer. Text is kept to the character, with two exceptions: white space between a thought and the answer
  is dropped, and so is text that consists only of white space before or after a call, a thought or the whole reply.
- If a call is opened but what follows is not a call, or never ends, the opening is a stray marker and what follows is text, so
  that a person sees what the model tried. Stray markers are dropped.
- In a call, white space between the parts is skipped, a key may stand between two ``<|"|>``, a comma may come last, and ``None``,
  ``True`` and ``False``, which some chat templates write, are read as JSON's null, true and false.
- A call within a thought counts, and the thought continues after it.
- No marker is ever shown. If dropping something between two texts would make them spell a marker, the marker's last character is
  dropped.

The response parser of transformers 5.23 is not used. It ends a call at a ``<tool_call|>`` inside a string, reads only keys of
word characters, does not know ``None``, raises ValueError for a call that it cannot read, and strips text.
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
    """Reads a reply's text as it grows. The parts do not depend on how the text arrives, except for how a text is split into
    parts.

    Args:
        thought: if the prompt ends inside a thought, the text of that thought so far, from its heading on; otherwise None.
    """

    def __init__(self, thought: str | None = None) -> None:
        self._text, self._at = "", 0  # the text from _at on has not been read
        self._new: list[str] = []  # what comes after it
        self._call: _Call | None = None  # the call that is being read, from _at on
        self._ended = False
        self._tails = {Reasoning: "", Content: ""}  # the last characters that were shown of each kind
        self._begin(Content if thought is None else Reasoning)
        if thought is not None:
            if _is_unfinished_heading(thought):
                self._held = thought
            else:
                self._fresh = False

    def feed(self, text: str) -> list[Part]:
        """Add ``text``, and return the parts that are now certain. Text that may begin a marker or a call is held back."""
        self._new.append(text)
        return [] if self._call is not None and self._call.waits(text) else self._read(final=False)

    def close(self) -> list[Part]:
        """End the reply, and return the parts that were held back."""
        return self._read(final=True)

    def _begin(self, kind: type[Reasoning] | type[Content], *, strip: bool = False) -> None:
        """Begin a text of ``kind``. ``strip`` drops its leading white space. Text held back from the one before is dropped."""
        self._kind, self._strip = kind, strip
        self._fresh = True  # no character of it has been shown
        self._held = ""  # a heading or white space; the text that follows decides whether it is shown

    def _read(self, *, final: bool) -> list[Part]:
        parts: list[Part] = []
        self._text += "".join(self._new)
        self._new = []
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
        """Where an unfinished marker may begin at the text's end, or else the text's end."""
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
        """The text that can be shown, now that ``text`` has arrived."""
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
        """Called before a call and at the reply's end: a thought shows the newline that was held back, an answer begins again."""
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

#: A token of a call: ("string", text), ("word", text), or ("sign", one of { } [ ] , : or the end of the call).
_Token = tuple[str, str]

_TOKEN = re.compile(
    rf"""\s*+(?:(?P<quote>{re.escape(QUOTE)})
    |(?P<sign>[{{}}\[\],:]|{re.escape(CALL_END)})
    |(?P<word>[^<{{}}\[\],:]++)(?=[<{{}}\[\],:]))""",
    re.VERBOSE,
)
_STRING = re.compile(rf"\s*+{re.escape(QUOTE)}")
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_CONSTANTS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}

#: The most objects and lists within each other. Python's own JSON fails at some hundreds.
_MAX_DEPTH = 100


class _Call:
    """Reads a call, from after its opening marker. Each token is read once, however the text arrives."""

    def __init__(self) -> None:
        self.length = 0  # characters read
        self._tail: str | None = None  # within a string, the last characters that have come
        self._reader = _read_call()
        next(self._reader)

    def read(self, text: str, start: int) -> ToolCall | None:
        """The call that begins at ``start``, or None if more text is needed. Raises ValueError if it is not a call."""
        while found := _next_token(text, start + self.length):
            token, end = found
            self.length = end - start
            try:
                self._reader.send(token)
            except StopIteration as finished:
                call: ToolCall = finished.value
                return call
        self._tail = text[1 - len(QUOTE) :] if _STRING.match(text, start + self.length) else None
        return None

    def waits(self, text: str) -> bool:
        """Whether a string goes on behind ``text``, which has come since the last ``read``. There is then nothing to read."""
        if self._tail is None:
            return False
        text = self._tail + text
        self._tail = text[1 - len(QUOTE) :]
        return QUOTE not in text


def _next_token(text: str, start: int) -> tuple[_Token, int] | None:
    """The token and where it ends, or None if more text is needed. Raises ValueError for a marker that cannot be in a call."""
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
    """A generator that takes tokens and returns the call. Raises ValueError at the first token that does not fit."""
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
    number = json.loads(word)  # refuses leading zeros, and integers that are too long for Python
    if number in (math.inf, -math.inf):  # JSON has no infinity
        raise ValueError
    return number

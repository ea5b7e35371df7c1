"""The live view: finished text above, and below it the canvas, redrawn in place after every denoising step.

Only whole lines of finished text leave the redrawn region. The unfinished line is part of it, so the region always begins at the
start of a line. It can therefore be erased exactly, whatever the text is and however the window is resized.

All text of a model goes through :func:`printable` before a terminal shows it.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray
from rich.cells import chop_cells
from rich.console import Console
from rich.text import Text

from mlx_diffgemma.causal import Token
from mlx_diffgemma.sampler import Block, Draft
from mlx_diffgemma.tokenizer import Growing
from mlx_diffgemma.writing import Content, Event, Generation

#: States of a canvas position, and the style of each. The underline shows "taken back" without colour, too.
UNSETTLED, SETTLED, TAKEN_BACK = range(3)
STYLES = ("dim", "", "yellow underline")
STATUS_STYLE = "cyan"

_TAB = 8

# Characters that control a terminal: C0 except newline and tab, DEL, C1, and those that change the direction of text.
_OBEYED = [*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_PICTURES = {code: 0x2400 + code for code in range(0x20)} | {0x7F: 0x2421}
_SHOWN = {code: _PICTURES.get(code, 0xFFFD) for code in _OBEYED if chr(code) not in "\n\t"}

# Control sequences (ECMA-48 and DEC private modes). A terminal that knows the first two shows no half-drawn picture.
_BEGIN_UPDATE, _END_UPDATE = "\x1b[?2026h", "\x1b[?2026l"
_HIDE_CURSOR, _SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
_WRAP_OFF, _WRAP_ON = "\x1b[?7l", "\x1b[?7h"
_ERASE_BELOW = "\x1b[J"


#: Token ids to UTF-8, as Tokenizer.utf8 does it.
ToUtf8 = Callable[[Iterable[int]], bytes]


def printable(text: str) -> str:
    """``text`` without characters that control a terminal: they become their pictures (U+2400 on), or U+FFFD.

    Newlines and tabs stay. No escape sequence remains, and every character keeps its place in the string.
    """
    return text.translate(_SHOWN)


def live_console() -> Console | None:
    """A console on standard output; None if that is no terminal, is a dumb one, or cannot show Unicode."""
    if sys.stdout is None or not sys.stdout.isatty():
        return None
    console = Console(force_terminal=True, highlight=False)
    unfit = console.is_dumb_terminal or console.legacy_windows or not console.encoding.startswith("utf")
    return None if unfit else console


class Region:
    """The last lines on a terminal, which can be redrawn. A context manager that shows the cursor again on exit.

    The cursor stays at the start of the region's last row. After a resize, a line may take several rows. The start of the region
    is therefore computed from the width at the time of erasing.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._widths: list[int] = []  # width in cells of each drawn line

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.print(Text())

    def draw(self, lines: Sequence[Text]) -> None:
        """Replace the region. ``lines`` must fit into the console's height and width."""
        # Wrapping is off: if a character is wider than computed, its line loses its end, but the layout holds.
        self._write(_HIDE_CURSOR, self._erase(), _WRAP_OFF, self._rendered(Text("\n").join(lines)), _WRAP_ON, "\r")
        self._widths = [line.cell_len for line in lines]

    def print(self, text: Text) -> None:
        """Erase the region and print ``text``, which is empty or whole lines. It will not be redrawn."""
        self._write(self._erase(), self._rendered(text), _SHOW_CURSOR)
        self._widths = []

    def _rendered(self, text: Text) -> str:
        with self.console.capture() as capture:
            self.console.print(text, end="", no_wrap=True, overflow="ignore", crop=False)
        return capture.get()

    def _erase(self) -> str:
        width = self.console.width
        rows = sum(max(1, -(-cells // width)) for cells in self._widths[:-1])
        return (f"\x1b[{rows}A" if rows else "") + "\r" + _ERASE_BELOW

    def _write(self, *parts: str) -> None:
        self.console.file.write("".join([_BEGIN_UPDATE, *parts, _END_UPDATE]))
        self.console.file.flush()


class Settling:
    """Follows a canvas through the denoising steps of a block.

    Attributes:
        taken_back: bool [L], positions where an accepted token was taken back in any step so far.
    """

    def __init__(self) -> None:
        self.taken_back = np.zeros(0, bool)
        self._accepted = self._previous = np.zeros(0, np.int32)

    def update(self, draft: Draft) -> NDArray[np.int64]:
        """States [L] after a step.

        SETTLED: accepted in this step, with the same most likely token as in the step before. TAKEN_BACK: the last token accepted
        here is no longer the most likely one. UNSETTLED: everything else.
        """
        argmax, accepted = draft.argmax, draft.accepted
        if draft.step == 1:
            self._accepted = self._previous = np.full(argmax.shape, -1, np.int32)
            self.taken_back = np.zeros(argmax.shape, bool)
        taken_back = (self._accepted >= 0) & (argmax != self._accepted)
        settled = accepted & (argmax == self._previous)
        self.taken_back |= taken_back
        self._accepted, self._previous = np.where(accepted, argmax, self._accepted), argmax
        return np.where(taken_back, TAKEN_BACK, np.where(settled, SETTLED, UNSETTLED))


def pieces(tokens: Sequence[int], utf8: ToUtf8) -> Iterator[tuple[slice, str]]:
    """Split tokens into the shortest runs that decode alone. Yields each run and its text, which may be empty.

    A character whose bytes are several tokens is one run.
    """
    growing, start, text = Growing(utf8), 0, ""
    for end, token in enumerate(tokens, 1):
        text += growing.add([token])
        if end == len(tokens):
            text += growing.end()
        if growing.complete:
            yield slice(start, end), text
            start, text = end, ""


class LivePage:
    """Shows one text of a model: the finished part, and below it the canvas during denoising. A context manager.

    On exit, also after an exception, it erases the canvas and leaves the finished text. Finished tokens are decoded once, and
    finished text is wrapped once for each width, so a step costs the same however long the text is.

    Args:
        console: see :func:`live_console`.
        utf8: token ids to UTF-8.
        max_new_tokens: maximum length of the text; tokens after it are not counted.
    """

    def __init__(self, console: Console, utf8: ToUtf8, max_new_tokens: int) -> None:
        self.console, self.utf8, self.max_new_tokens = console, utf8, max_new_tokens
        self._region, self._settling = Region(console), Settling()
        self._tokens = 0  # finished
        self._written = 0  # those of them that have text
        self._growing, self._held = Growing(utf8), 0  # the finished tokens, and how many of them wait for a character's end
        self._begin_line()
        self._steps = 0
        self._seconds = 0.0  # without the first token, whose time includes the prompt's pass
        self._status = Text()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        line = Text().join(self._line)
        self._region.print(line + "\n" if line else line)

    def draft(self, draft: Draft) -> None:
        """Show the canvas after a denoising step."""
        self._steps += 1
        self._draw(self._canvas(draft))

    def committed(self, part: Block | Token) -> None:
        """Count finished tokens for the status line, up to ``max_new_tokens``."""
        new = [part.token] if isinstance(part, Token) else part.tokens.tolist()
        for token in new[: self.max_new_tokens - self._tokens]:
            self._tokens, self._held = self._tokens + 1, self._held + 1
            text = self._growing.add([token])
            if self._growing.complete:
                self._written, self._held = self._written + self._held * bool(text), 0
        if isinstance(part, Token):
            self._seconds += part.seconds if part.index else 0.0
            rate = f"  {part.index / self._seconds:.1f} per second" if self._seconds else ""
            self._status = Text(f"{self._tokens} tokens{rate}", STATUS_STYLE)
            self._draw(Text())  # update the status even if the token made no text certain

    def write(self, text: str, style: str = "") -> None:
        """Add to the finished text. The canvas stays erased until its next step."""
        self._append(text, style)
        self._draw(Text())

    def finish(self) -> None:
        """End the last line of the text."""
        self._append("\n")

    def _append(self, text: str, style: str = "") -> None:
        new = Text(printable(text), style)
        whole, new = new.divide([new.plain.rfind("\n") + 1])
        if whole:
            self._region.print(Text().join([*self._line, whole]))
            self._begin_line()
        self._line.append(new)
        self._wrap(new)

    def _begin_line(self) -> None:
        self._line: list[Text] = []  # the parts of the finished text after the last line break
        self._rewrap()

    def _rewrap(self) -> None:
        """Wrap the whole line to the console's width."""
        self._rows, self._column, self._width = [Text()], 0, self.console.width  # the line's rows and its cells
        self._wrap(Text().join(self._line))

    def _wrap(self, new: Text) -> None:
        """Add a part of the line to its rows."""
        new = expanded(new, self._column)
        self._column += new.cell_len
        self._rows += wrap(self._rows.pop() + new, self._width)

    def _canvas(self, draft: Draft) -> Text:
        states, canvas, settled = self._settling.update(draft).tolist(), Text(), 0
        # Text of one style is added at once, which halves the time of drawing it.
        for state, runs in groupby(pieces(draft.argmax.tolist(), self.utf8), lambda piece: states[piece[0].start]):
            texts = [(text, states[run].count(SETTLED)) for run, text in runs if text]
            canvas.append(printable("".join(text for text, _ in texts)), STYLES[state])
            settled += sum(count for _, count in texts)
        fields = [
            f"block {draft.block + 1}",
            f"step {draft.step}",
            f"entropy {draft.entropy.mean():.3f}",
            f"temperature {draft.temperature:.2f}",
            f"tokens per forward {(self._written + self._held + settled) / self._steps:.1f}",
        ]
        self._status = Text("  ".join(fields), STATUS_STYLE)
        return canvas

    def _draw(self, canvas: Text) -> None:
        width, height = self.console.size
        if width != self._width:
            self._rewrap()
        *above, last = self._rows[-height:]
        rows, before = [*above, *wrap(last + expanded(canvas, self._column), width)], len(above)
        # If the screen is too low, drop text above the canvas first, then the end of the canvas.
        skipped = max(0, min(before, len(rows) - (height - 1)))
        self._region.draw([*clip(rows[skipped:], height - 1), cut(self._status, width)])


class LiveView(LivePage):
    """Shows the events of one generation."""

    def __call__(self, event: Event) -> None:
        if isinstance(event, Draft):
            self.draft(event)
        elif isinstance(event, Block | Token):
            self.committed(event)
        elif isinstance(event, Content):
            self.write(event.text)
        elif isinstance(event, Generation):
            self.finish()


def expanded(text: Text, column: int = 0) -> Text:
    """``text`` with spaces instead of tabs. It begins ``column`` cells after the start of its line."""
    if "\t" not in text.plain:
        return text
    text = Text(" " * (column % _TAB)) + text
    text.expand_tabs(_TAB)
    return text[column % _TAB :]


def wrap(text: Text, width: int) -> list[Text]:
    """Rows of at most ``width`` cells, wrapped as a terminal wraps them. There are no tabs in ``text``."""
    rows: list[Text] = []
    for line in text.split("\n", allow_blank=True):
        offsets, end = [], 0
        for part in chop_cells(line.plain, width)[:-1]:
            end += len(part)
            offsets.append(end)
        rows.extend(line.divide(offsets))
    return rows


def clip(rows: Sequence[Text], height: int) -> list[Text]:
    """At most ``height`` rows. If there are more, the last one says how many are missing."""
    if len(rows) <= height:
        return list(rows)
    kept = max(height - 1, 0)
    return [*rows[:kept], Text(f"... {len(rows) - kept} more rows", STATUS_STYLE)][:height]


def cut(line: Text, width: int) -> Text:
    """One row of at most ``width`` cells; a longer line ends in an ellipsis."""
    line = line.copy()
    line.truncate(width, overflow="ellipsis")
    return line

"""The live view: finished text above, and below it the canvas, redrawn in place after every denoising step.

Only whole lines of finished text are printed for good. The line that is still being written belongs to the redrawn part, which
therefore always begins at a line's start: it can be erased exactly, whatever the text is and however the window is resized.

Everything that a model wrote goes through :func:`printable` on its way to a terminal.
"""

import sys
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray
from rich.cells import chop_cells
from rich.console import Console
from rich.text import Text

from mlx_diffgemma.causal import Token
from mlx_diffgemma.sampler import Block, Draft
from mlx_diffgemma.writing import Content, Event, Generation

#: State of a canvas position, and the style it is shown in. "Taken back" also differs where there is no colour.
UNSETTLED, SETTLED, TAKEN_BACK = range(3)
STYLES = ("dim", "", "yellow underline")
STATUS_STYLE = "cyan"

_TAB = 8

# Characters that a terminal obeys instead of showing: C0 but for newline and tab, DEL, C1, and what reorders a line.
_OBEYED = [*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_PICTURES = {code: 0x2400 + code for code in range(0x20)} | {0x7F: 0x2421}
_SHOWN = {code: _PICTURES.get(code, 0xFFFD) for code in _OBEYED if chr(code) not in "\n\t"}

# Control sequences (ECMA-48 and DEC private modes). Between the first two a terminal that knows them shows nothing half done.
_BEGIN_UPDATE, _END_UPDATE = "\x1b[?2026h", "\x1b[?2026l"
_HIDE_CURSOR, _SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
_WRAP_OFF, _WRAP_ON = "\x1b[?7l", "\x1b[?7h"
_ERASE_BELOW = "\x1b[J"


class Decode(Protocol):
    """Token ids to text; with ``final`` false an incomplete character at the end is held back, as Tokenizer.decode does."""

    def __call__(self, ids: Sequence[int], *, final: bool = True) -> str: ...


def printable(text: str) -> str:
    """``text`` without anything that a terminal would obey: control characters become their pictures, or U+FFFD.

    Newlines and tabs stay; no escape sequence can be left, and no character changes its place in the string.
    """
    return text.translate(_SHOWN)


def live_console() -> Console | None:
    """Standard output as something to draw on; None where it is piped, dumb, or cannot show Unicode."""
    if sys.stdout is None or not sys.stdout.isatty():
        return None
    console = Console(force_terminal=True, highlight=False)
    unfit = console.is_dumb_terminal or console.legacy_windows or not console.encoding.startswith("utf")
    return None if unfit else console


class Region:
    """The last lines on a terminal, drawn again and again. A context manager, which gives the cursor back at its end.

    The cursor rests at the start of the region's last row. A line of a resized window may have become several rows; where
    the region begins is computed from the width at the time of erasing.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._widths: list[int] = []  # cells of the lines that are drawn

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.print(Text())

    def draw(self, lines: Sequence[Text]) -> None:
        """Replace the region. ``lines`` must fit: at most the console's height of them, none wider than it."""
        # Without wrapping a character that is wider than we think costs its line's end, and not the layout.
        self._write(_HIDE_CURSOR, self._erase(), _WRAP_OFF, self._rendered(Text("\n").join(lines)), _WRAP_ON, "\r")
        self._widths = [line.cell_len for line in lines]

    def print(self, text: Text) -> None:
        """Erase the region and print ``text``, empty or whole lines, for good in its place."""
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
        taken_back: bool [L], positions whose accepted token was taken back in any step so far.
    """

    def __init__(self) -> None:
        self.taken_back = np.zeros(0, bool)
        self._accepted = self._previous = np.zeros(0, np.int32)

    def update(self, draft: Draft) -> NDArray[np.int64]:
        """States [L] after a step.

        SETTLED: accepted now, and the most likely token is that of the step before. TAKEN_BACK: another token than this was
        accepted here last. Everything else is UNSETTLED.
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


def pieces(tokens: Sequence[int], decode: Decode) -> Iterator[tuple[slice, str]]:
    """Split tokens into the shortest runs that decode by themselves: the run, and its text, which may be empty.

    A character whose bytes are several tokens is one run.
    """
    start = 0
    for end in range(1, len(tokens) + 1):
        run = tokens[start:end]
        text = decode(run)
        if end == len(tokens) or decode(run, final=False) == text:
            yield slice(start, end), text
            start = end


class LivePage:
    """Text that grows, and below it the canvas that is being denoised; a context manager around one reply of a model.

    Left by an exception, it erases the canvas and leaves the finished text.

    Args:
        console: see :func:`live_console`.
        decode: token ids to text.
        max_new_tokens: where the reply is cut.
    """

    def __init__(self, console: Console, decode: Decode, max_new_tokens: int) -> None:
        self.console, self.decode, self.max_new_tokens = console, decode, max_new_tokens
        self._region, self._settling = Region(console), Settling()
        self._tokens: list[int] = []
        self._unfinished = Text()  # the line of finished text that has no end yet
        self._steps = 0
        self._seconds = 0.0  # of all tokens but the first, whose pass is the prompt's
        self._status = Text()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._region.print(self._unfinished + "\n" if self._unfinished else Text())

    def draft(self, draft: Draft) -> None:
        """Show the canvas after a denoising step."""
        self._steps += 1
        self._draw(self._canvas(draft))

    def committed(self, part: Block | Token) -> None:
        """Take in finished tokens, for the status line; none behind ``max_new_tokens`` counts."""
        new = [part.token] if isinstance(part, Token) else part.tokens.tolist()
        self._tokens += new[: self.max_new_tokens - len(self._tokens)]
        if isinstance(part, Token):
            self._seconds += part.seconds if part.index else 0.0
            rate = f"  {part.index / self._seconds:.1f} per second" if self._seconds else ""
            self._status = Text(f"{len(self._tokens)} tokens{rate}", STATUS_STYLE)
            self._draw(Text())  # not every token makes text certain

    def write(self, text: str, style: str = "") -> None:
        """Go on with the finished text; the canvas is erased until it is drawn again."""
        self._append(text, style)
        self._draw(Text())

    def finish(self) -> None:
        """End the text's last line."""
        self._append("\n")

    def _append(self, text: str, style: str = "") -> None:
        self._unfinished.append(printable(text), style)
        end = self._unfinished.plain.rfind("\n") + 1
        whole, self._unfinished = self._unfinished.divide([end])
        self._region.print(whole)

    def _canvas(self, draft: Draft) -> Text:
        states, canvas = self._settling.update(draft), Text()
        settled = 0
        for run, text in pieces(draft.argmax.tolist(), self.decode):
            canvas.append(printable(text), STYLES[states[run.start]])
            settled += int((states[run] == SETTLED).sum()) if text else 0
        written = sum(run.stop - run.start for run, text in pieces(self._tokens, self.decode) if text)
        fields = [
            f"block {draft.block + 1}",
            f"step {draft.step}",
            f"entropy {draft.entropy.mean():.3f}",
            f"temperature {draft.temperature:.2f}",
            f"tokens per forward {(written + settled) / self._steps:.1f}",
        ]
        self._status = Text("  ".join(fields), STATUS_STYLE)
        return canvas

    def _draw(self, canvas: Text) -> None:
        width, height = self.console.size
        rows, before = wrap(self._unfinished + canvas, width), len(wrap(self._unfinished, width)) - 1
        # Where not all fits, the canvas comes before the text above it, and its head before its tail.
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


def wrap(text: Text, width: int) -> list[Text]:
    """Rows of at most ``width`` cells, broken where a terminal would break them; tabs become spaces."""
    text = text.copy()
    text.expand_tabs(_TAB)
    rows: list[Text] = []
    for line in text.split("\n", allow_blank=True):
        offsets, end = [], 0
        for part in chop_cells(line.plain, width)[:-1]:
            end += len(part)
            offsets.append(end)
        rows.extend(line.divide(offsets))
    return rows


def clip(rows: Sequence[Text], height: int) -> list[Text]:
    """The first rows, and how many more there are, if they are more than ``height``."""
    if len(rows) <= height:
        return list(rows)
    kept = max(height - 1, 0)
    return [*rows[:kept], Text(f"... {len(rows) - kept} more rows", STATUS_STYLE)][:height]


def cut(line: Text, width: int) -> Text:
    """One row of at most ``width`` cells, ending in an ellipsis where it was longer."""
    line = line.copy()
    line.truncate(width, overflow="ellipsis")
    return line

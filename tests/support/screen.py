"""A terminal emulator for tests. It supports only the control sequences that the live view uses, and keeps the screen."""

import io
import re
import unicodedata
from typing import Any

from rich.console import Console

_TOKEN = re.compile(r"\x1b\[(\??)([\d;]*)([A-Za-z])|[\s\S]")


def cells(character: str) -> int:
    """Columns of a character, from Unicode's own tables."""
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


class Screen(io.StringIO):
    """A file that shows what is written to it. An unknown control character or sequence fails the test.

    Attributes:
        rows: text of every row, starting with those that have scrolled off the top; a wide character is followed by "".
        styles: the SGR parameters of each cell, in the layout of ``rows``.
        cursor_hidden, wraps: modes 25 and 7.
        wrapped: rows that continue the one above because the terminal wrapped it.
    """

    def __init__(self, width: int, height: int) -> None:
        super().__init__()
        self.width, self.height = width, height
        self.rows: list[list[str]] = [[]]
        self.styles: list[list[str]] = [[]]
        self.row = self.column = 0
        self.cursor_hidden, self.wraps = False, True
        self.wrapped: set[int] = set()
        self.style = ""

    def console(self, **options: Any) -> Console:
        """A console that draws on this screen, by default with 256 colours."""
        options = {"color_system": "256", "_environ": {}} | options
        return Console(file=self, force_terminal=True, width=self.width, height=self.height, highlight=False, **options)

    @property
    def lines(self) -> list[str]:
        """All rows, without trailing blanks and without blank rows at the end. Wrapped rows are joined."""
        lines: list[str] = []
        for index, row in enumerate(self.rows):
            if index in self.wrapped:
                lines[-1] += "".join(row)
            else:
                lines.append("".join(row))
        while lines and not lines[-1].strip():
            lines.pop()
        return [line.rstrip() for line in lines]

    def styled(self, style: str) -> str:
        """The characters in this style, such as "2" for dim, row by row."""
        pairs = [pair for row, styles in zip(self.rows, self.styles, strict=True) for pair in zip(row, styles, strict=True)]
        return "".join(character for character, its in pairs if its == style)

    def write(self, text: str) -> int:
        for token in _TOKEN.finditer(text):
            if token[3]:
                self._control(token[1], token[2], token[3])
            elif token[0] == "\n":
                self.column = 0
                self._down()
            elif token[0] == "\r":
                self.column = 0
            elif token[0] == "\t":
                self.column = max(self.column, min((self.column // 8 + 1) * 8, self.width - 1))
            else:
                assert unicodedata.category(token[0]) != "Cc", f"control character {token[0]!r} reached the terminal"
                self._put(token[0])
        return len(text)

    def resize(self, width: int, height: int, *consoles: Console) -> None:
        """Resize as modern terminals do: a line that no longer fits becomes several, and the cursor stays at its character."""
        rows, styles, cursor = [], [], self.row
        for index, (row, style) in enumerate(zip(self.rows, self.styles, strict=True)):
            if index == self.row:
                cursor = len(rows) + self.column // width
            for start in range(0, max(len(row), 1), width):
                rows.append(row[start : start + width])
                styles.append(style[start : start + width])
        self.rows, self.styles, self.row, self.column = rows, styles, cursor, self.column % width
        self.width, self.height, self.wrapped = width, height, set()
        for console in consoles:
            console.width, console.height = width, height

    def _control(self, private: str, parameters: str, final: str) -> None:
        top = max(0, len(self.rows) - self.height)
        if private:
            assert final in "hl", f"mode {parameters}{final}"
            assert parameters in ("7", "25", "2026"), f"mode {parameters}{final}"
            self.wraps = final == "h" if parameters == "7" else self.wraps
            self.cursor_hidden = final == "l" if parameters == "25" else self.cursor_hidden
        elif final == "A":
            self.row = max(top, self.row - int(parameters))
        elif final == "J":
            assert not parameters
            assert self.column == 0
            del self.rows[self.row + 1 :], self.styles[self.row + 1 :]
            self.rows[self.row], self.styles[self.row] = [], []
            self.wrapped = {row for row in self.wrapped if row < self.row}
        else:
            assert final == "m", f"control sequence {parameters}{final} reached the terminal"
            self.style = "" if parameters == "0" else parameters

    def _down(self) -> None:
        self.row += 1
        if self.row == len(self.rows):
            self.rows.append([])
            self.styles.append([])

    def _put(self, character: str) -> None:
        width = cells(character)
        if not width:
            self.rows[self.row][self.column - 1] += character
            return
        if self.column + width > self.width:
            if not self.wraps:
                return  # real terminals overwrite the last cell
            self._down()
            self.column = 0
            self.wrapped.add(self.row)
        row, styles = self.rows[self.row], self.styles[self.row]
        missing = self.column + width - len(row)
        row.extend([" "] * missing)
        styles.extend([""] * missing)
        row[self.column : self.column + width] = [character, *[""] * (width - 1)]
        styles[self.column : self.column + width] = [self.style] * width
        self.column += width

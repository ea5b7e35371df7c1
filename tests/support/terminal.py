"""Runs the program on a pseudo-terminal, as a user would: keys go in, and its output appears on a screen."""

import codecs
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from typing import Self

from support.screen import Screen

# The terminal becomes the controlling terminal of the process, so that Ctrl-C sends it a signal.
_PROGRAM = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); from mlx_diffgemma.cli import main; main()"
_INCOMPLETE = re.compile(r"\x1b(\[[\d;?]*)?$")

#: Modes that do not change the screen: the modes of the cursor keys and of the cursor, and bracketed paste.
_UNSEEN = ("1", "12", "2004")


class Terminal(Screen):
    """The command line with ``arguments`` on a terminal. A context manager that ends the process.

    It supports the live view's control sequences, and those of prompt_toolkit.
    """

    def __init__(self, *arguments: object, width: int = 80, height: int = 24, environment: dict[str, str]) -> None:
        super().__init__(width, height)
        self._keyboard, program = pty.openpty()
        fcntl.ioctl(program, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, *map(str, arguments)],
            stdin=program,
            stdout=program,
            stderr=program,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm-256color", **environment},
        )
        os.close(program)
        self._decoder, self._rest = codecs.getincrementaldecoder("utf-8")(), ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._keyboard)

    def type(self, keys: str) -> None:
        os.write(self._keyboard, keys.encode())

    def wait(self, seen: Callable[[], bool], what: str, seconds: float = 30) -> None:
        """Show the program's output until ``seen``. Fails after ``seconds``, or if the program ends."""
        limit = time.monotonic() + seconds
        while not seen():
            ready, _, _ = select.select([self._keyboard], [], [], max(0.0, limit - time.monotonic()))
            assert ready, f"no {what} in {seconds} s; on the screen:\n" + "\n".join(self.lines)
            assert self._read(), f"ended before {what}; on the screen:\n" + "\n".join(self.lines)

    def end(self) -> int:
        """Show all output until the program ends, and return its exit status."""
        while self._read():
            pass
        return self.process.wait(60)

    def _read(self) -> bool:
        try:
            data = os.read(self._keyboard, 65536)
        except OSError:  # Linux raises this once the other end is closed
            return False
        text = self._rest + self._decoder.decode(data)
        cut = _INCOMPLETE.search(text)
        end = cut.start() if cut else len(text)
        self._rest = text[end:]
        self.write(text[:end].replace("\b", "\x1b[D"))
        return bool(data)

    def _control(self, private: str, parameters: str, final: str) -> None:
        count = int(parameters) if parameters.isdecimal() else 1
        if private and parameters in _UNSEEN:
            return
        if final == "n" and parameters == "6":
            top = max(0, len(self.rows) - self.height)
            self.type(f"\x1b[{self.row - top + 1};{self.column + 1}R")
        elif final in "CD":
            self.column = min(max(0, self.column + (count if final == "C" else -count)), self.width - 1)
        elif final == "B":
            self.row = min(self.row + count, len(self.rows) - 1)
        elif final == "K" or (final == "J" and self.column):
            del self.rows[self.row][self.column :], self.styles[self.row][self.column :]
            if final == "J":
                del self.rows[self.row + 1 :], self.styles[self.row + 1 :]
        else:
            super()._control(private, str(count) if final == "A" else parameters, final)

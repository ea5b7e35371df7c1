"""Input of the chat: a terminal prompt with history, completion and multi-line messages, or lines of standard input."""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, Self

import click
from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

#: Among a command's choices, stands for any file name.
FILE = "FILE"

_PROMPT, _CONTINUED = "> ", "  "


def lines() -> Iterator[str]:
    """The messages on standard input, one per line. A line that ends in a backslash continues on the next line.

    Bytes that are not UTF-8 become lone surrogates, as in Python's file names; the tokenizer refuses them. If standard input is a
    terminal, a prompt is shown on standard error.
    """
    pending = ""
    while True:
        if sys.stdin.isatty():
            click.echo(_CONTINUED if pending else _PROMPT, nl=False, err=True)
        read = sys.stdin.buffer.readline()
        line = pending + read.decode(errors="surrogateescape").removesuffix("\n").removesuffix("\r")
        if read and line.endswith("\\"):
            pending = line[:-1] + "\n"
            continue
        if line:
            yield line
        if not read:
            return
        pending = ""


class Terminal:
    """The prompt on a terminal. A context manager: while it is open, Ctrl-C raises nothing between prompts and replies.

    Args:
        commands: arguments to complete, by command name such as "/mode"; :data:`FILE` completes file names.
    """

    def __init__(self, commands: Mapping[str, Sequence[str]]) -> None:
        self._session: PromptSession[str] = PromptSession(
            _PROMPT,
            multiline=True,
            prompt_continuation=_CONTINUED,
            key_bindings=_key_bindings(),
            history=history(),
            completer=_Commands(commands),
            complete_while_typing=False,
        )
        self._pressed: int | None = None  # number of Ctrl-C presses during this reply; None between replies

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._interrupted)
        return self

    def __exit__(self, *exception: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def __iter__(self) -> Iterator[str]:
        """The messages that the user types, until Ctrl-D."""
        while True:
            try:
                text = self._session.prompt()
            except KeyboardInterrupt:
                click.echo("Ctrl-D or /exit leaves.", err=True)
                continue
            except EOFError:
                return
            yield text

    @contextmanager
    def watching(self) -> Iterator[Callable[[], bool]]:
        """During a reply, count Ctrl-C instead of raising, so that the running step can finish.

        A second Ctrl-C raises KeyboardInterrupt, because a step can take long. The exception does not leave this context.

        Yields:
            A function that says whether Ctrl-C was pressed.
        """
        self._pressed = 0
        try:
            with suppress(KeyboardInterrupt), _silent_keys():
                yield lambda: bool(self._pressed)
        finally:
            self._pressed = None

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        if self._pressed is not None:
            self._pressed += 1
            if self._pressed > 1:
                raise KeyboardInterrupt


@contextmanager
def _silent_keys() -> Iterator[None]:
    """Keep keys pressed during a reply for the next prompt, so that they do not appear on the live view."""
    if sys.platform == "win32":  # has no termios
        yield
        return
    import termios

    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    silent: list[Any] = termios.tcgetattr(keyboard)
    silent[0] &= ~termios.ICRNL  # keep Enter as it is: the prompt tells it from Ctrl-J
    silent[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(keyboard, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(keyboard, termios.TCSANOW, before)


def _key_bindings() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    @keys.add("c-c", filter=Condition(lambda: bool(get_app().current_buffer.text)))
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.reset()

    return keys


class _Commands(Completer):
    """Completes the name of a command and its argument."""

    def __init__(self, commands: Mapping[str, Sequence[str]]) -> None:
        self._commands, self._files = commands, PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        name, space, argument = document.text_before_cursor.partition(" ")
        if not name.startswith("/") or "\n" in document.text:
            return
        candidates = self._commands.get(name, ()) if space else self._commands
        typed = argument if space else name
        for candidate in candidates:
            if candidate == FILE:
                yield from self._files.get_completions(Document(argument.lstrip("'\"")), complete_event)
            elif candidate.startswith(typed):
                yield Completion(candidate, start_position=-len(typed))


class _FileHistory(FileHistory):
    def store_string(self, string: str) -> None:
        with suppress(OSError, UnicodeError):  # a full disk or invalid text must not end the chat
            super().store_string(string)


def history() -> History:
    """History in a file in the user's state directory that only the owner can read; in memory if that cannot be written."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    try:
        file = Path(state).expanduser() / "mlx-diffgemma" / "history"
        file.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))
    except (OSError, RuntimeError):  # RuntimeError: there is no home directory
        return InMemoryHistory()
    return _FileHistory(str(file))

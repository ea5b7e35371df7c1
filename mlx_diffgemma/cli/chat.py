"""``mlx-diffgemma chat``: a conversation in the terminal, with commands to undo, retry, save and load."""

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import click
from prompt_toolkit.utils import is_dumb_terminal
from rich.console import Console

from mlx_diffgemma.causal import Token
from mlx_diffgemma.chat.conversation import Conversation
from mlx_diffgemma.chat.reply import Reply, ReplyEvent
from mlx_diffgemma.cli.generate import mode_option, no_live_option
from mlx_diffgemma.cli.live import LivePage, ToUtf8, live_console, printable
from mlx_diffgemma.cli.loading import check_options, prepared
from mlx_diffgemma.cli.options import Detail, backend_options, causal_options, detail_options, sampler_options, source_options
from mlx_diffgemma.cli.repl import FILE, Terminal, lines
from mlx_diffgemma.cli.table import table
from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.errors import DiffGemmaError, InputError
from mlx_diffgemma.sampler import Block, Draft, check_lengths
from mlx_diffgemma.vision.film import Film, Media
from mlx_diffgemma.vision.media import split_media
from mlx_diffgemma.vision.sources import Image, Video, with_images
from mlx_diffgemma.writing import MODES, Content, Part, Reasoning, ToolCall, sampling_config

#: Receives every event of a reply as it happens.
View = Callable[[ReplyEvent], None]

_SEEDS = 2**64
# An argument of /image and /video.
_NO_FILE = "none"

# The style of each part of a reply.
_STYLES: dict[type[Part], str] = {Reasoning: "dim", Content: "", ToolCall: "cyan"}


@click.command(short_help="Talk with the model, turn by turn.")
@source_options
@click.option("--system", metavar="TEXT", help="System message to put before the first turn.")
@click.option("--load", "file", type=click.Path(path_type=Path), metavar="FILE", help="Continue a chat that /save wrote.")
@click.option("--thinking", is_flag=True, help="Let the model think before it replies.")
@click.option(
    "--seed",
    type=click.IntRange(0, _SEEDS - 1),
    metavar="N",
    help="Use seed N for the first turn, N + 1 for the second, and so on.  [default: a new seed each turn]",
)
@detail_options
@mode_option
@sampler_options
@causal_options
@backend_options
@no_live_option
def chat(
    model: str,
    revision: str | None,
    system: str | None,
    file: Path | None,
    thinking: bool,
    seed: int | None,
    detail: Detail,
    mode: str,
    backend: str | None,
    device: str | None,
    dtype: str | None,
    force: bool,
    no_live: bool,
    **sampler: Any,
) -> None:
    """Talk with MODEL. The KV cache is kept between turns, so each turn computes only what is new.

    On a terminal, Enter sends the message. Alt-Enter, Ctrl-J or a backslash at the end of a line starts a new line. Up and down
    recall earlier messages. Ctrl-C stops a reply and keeps what is shown of it. Ctrl-D leaves. /help lists the commands.
    /image FILE and /video FILE add an image or a video to the next message.

    Without a terminal, each line of standard input is a message or a command. A line that ends in a backslash continues on the
    next line. Replies go to standard output; the model's thoughts and everything else go to standard error.

    With --seed or /seed a chat can be repeated: the same messages get the same replies.
    """
    if file is not None and system is not None:
        raise InputError("--system starts a new chat and --load continues an old one; leave out one of them")
    check_options(sampler, mode)
    loaded = prepared(model, revision, backend=backend, device=device, dtype=dtype, force=force)
    config = sampling_config(loaded.checkpoint.generation, mode, sampler)
    if isinstance(config, GenerationConfig):
        check_lengths(loaded.config, config, 0)
    conversation = Conversation(loaded, system=system) if file is None else Conversation.load(loaded, file)
    conversation.thinking |= thinking
    _ = loaded.backend  # what is wrong with the arguments is known now
    talk = partial(ChatSession, conversation, mode=mode, seed=seed, sampler=sampler, detail=detail)
    if not (sys.stdin and sys.stdin.isatty() and sys.stdout.isatty()) or is_dumb_terminal():
        talk().run(lines())
        return
    console = None if no_live else live_console()
    with Terminal({name: command.choices for name, command in COMMANDS.items()}) as terminal:
        say(f"Talking with {model}. /help lists the commands, Ctrl-D leaves.")
        talk(console=console, watching=terminal.watching).run(terminal)


def say(text: str) -> None:
    """Print a message to the user, as whole lines on standard error."""
    click.echo(printable(text), err=True)


class ChatSession:
    """A conversation, the settings of its next turns, and the commands that change them.

    Args:
        mode, sampler: as in :meth:`~mlx_diffgemma.pipeline.DiffusionGemma.stream`.
        seed: the first turn's seed; each later turn adds 1. None draws a new seed for each turn.
        detail: how finely the model sees images and videos.
        console: where to draw the canvas; None prints only finished text.
        watching: makes a context manager that is open during a reply. It yields a function that says whether to stop the reply.
    """

    def __init__(
        self,
        conversation: Conversation,
        *,
        mode: str,
        seed: int | None,
        sampler: Mapping[str, Any],
        detail: Detail,
        console: Console | None = None,
        watching: Callable[[], AbstractContextManager[Callable[[], bool]]] = lambda: nullcontext(bool),
    ) -> None:
        self.conversation, self.mode, self.seed, self.sampler, self.detail = conversation, mode, seed, sampler, detail
        self._console, self._watching = console, watching
        self._utf8 = conversation.model.tokenizer.utf8  # loading takes a second: do it before the first turn
        self._replies: list[Reply] = []  # the finished ones
        self._waiting: list[tuple[str, dict[str, Any]]] = []  # files to show with the next message, and their parts of it
        self._over = False

    def run(self, typed: Iterable[str]) -> None:
        """Process messages and commands until the input ends or /exit."""
        for text in typed:
            try:
                self._take(text)
            except DiffGemmaError as error:
                say(f"error: {error}")
            if self._over:
                break

    def _take(self, text: str) -> None:
        if text.startswith("/") and not text.startswith("//"):
            name, *rest = text.split(maxsplit=1)
            argument = rest[0].rstrip() if rest else ""
            if name not in COMMANDS:
                raise InputError(f"unknown command {name}; /help lists the commands, and /{name} sends the text {name}")
            command = COMMANDS[name]
            if argument and not command.usage:
                raise InputError(f"{name} takes no argument; leave it out")
            if command.usage == FILE and not argument:
                raise InputError(f"{name} needs a file name")
            command.run(self, argument)
        elif text.strip():
            message = text.removeprefix("/") if text.startswith("//") else text
            content = [*(part for _, part in self._waiting), {"type": "text", "text": message}]
            if self._turn({"role": "user", "content": content} if self._waiting else message, self._next_seed()):
                self._waiting = []

    def _turn(self, message: str | Mapping[str, Any], seed: int | None) -> bool:
        """Let the model reply to a message. False if it was stopped before any text; the message is then removed."""
        conversation, reply = self.conversation, None
        before = len(conversation.messages)
        room = sampling_config(conversation.model.checkpoint.generation, self.mode, self.sampler).max_new_tokens
        events = conversation.send(message, mode=self.mode, seed=seed, **self.sampler)
        with self._watching() as stopped, self._view(room) as show, closing(events):
            for event in events:
                show(event)
                if isinstance(event, Reply):
                    reply = event
                    self._replies.append(reply)
                if stopped():
                    break
        grown = len(conversation.messages) > before
        if reply is None:
            say("stopped; the text shown is kept as the reply" if grown else "stopped before any text; the message is not kept")
        elif reply.finish_reason == "length":
            say(f"the reply is cut at {len(reply.tokens)} tokens; allow more with --max-new-tokens")
        return grown

    def _view(self, max_new_tokens: int) -> "LiveReply | PlainReply":
        if self._console is None:
            return PlainReply()
        return LiveReply(self._console, self._utf8, max_new_tokens)

    def _next_seed(self) -> int | None:
        return None if self.seed is None else (self.seed + self._turns()) % _SEEDS

    def _turns(self) -> int:
        return sum(message["role"] == "user" for message in self.conversation.messages)

    def _begin(self, system: str | None) -> None:
        old = self.conversation
        self.conversation = Conversation(old.model, system=system, tools=old.tools, thinking=old.thinking, kept=old.kept)

    def help(self, argument: str) -> None:
        """List the commands."""
        say(table([(f"{name} {command.usage}", command.help) for name, command in COMMANDS.items()], left=2))
        say(
            "//text sends a text that starts with a slash. Alt-Enter, Ctrl-J or a backslash at a line's end starts a new line.\n"
            "Ctrl-C stops a reply and keeps what is shown of it. Ctrl-D leaves."
        )

    def system(self, argument: str) -> None:
        if not argument:
            text = self.conversation.system
            say("no system message" if text is None else f"system message: {text}")
            return
        self._begin(argument)
        say("new chat with this system message")

    def set_seed(self, argument: str) -> None:
        if argument == "fresh":
            self.seed = None
        elif argument:
            if not (argument.isascii() and argument.isdigit() and len(argument) <= 20 and int(argument) < _SEEDS):
                raise InputError("the seed must be a whole number from 0 to 2^64 - 1, or fresh")
            self.seed = int(argument)
        say(
            "a new seed each turn"
            if self.seed is None
            else f"seed {self.seed} in the first turn, 1 more in each later turn; next: {self._next_seed()}"
        )

    def set_mode(self, argument: str) -> None:
        if argument:
            sampling_config(self.conversation.model.checkpoint.generation, argument, self.sampler)
            self.mode = argument
        say(f"mode: {self.mode}")

    def set_thinking(self, argument: str) -> None:
        if argument not in ("", "on", "off"):
            raise InputError(f"/thinking takes on or off, got {argument!r}")
        if argument:
            self.conversation.thinking = argument == "on"
        say(f"thinking: {'on' if self.conversation.thinking else 'off'}")

    def image(self, argument: str) -> None:
        self._show("image", argument, self.detail.image)

    def video(self, argument: str) -> None:
        self._show("video", argument, self.detail.video)

    def _show(self, kind: str, argument: str, source: Callable[[Path], Image | Video]) -> None:
        """Add a file to those that come with the next message, or drop them all, and list them."""
        if argument == _NO_FILE:
            self._waiting = []
        elif argument:
            file = _file(argument)
            message = with_images([{"role": "user", "content": None}], [source(file)])
            _, [media] = split_media(message, self.conversation.model.config.vision)
            self._waiting.append((str(file), {"type": kind, kind: media}))
        if self._waiting:
            shown = ", ".join(f"{file} ({_size(part[part['type']])})" for file, part in self._waiting)
            say(f"with the next message: {shown}")
        else:
            say(f"no image or video comes with the next message; /{kind} FILE adds one")

    def stats(self, argument: str) -> None:
        if not self._replies:
            raise InputError("there is no finished reply yet")
        last = self._replies[-1]
        say(table([_FIGURES, ("last reply", *figures([last])), ("session", *figures(self._replies))]))
        say(f"finish reason: {last.finish_reason}; seed: {last.seed}; replies in this session: {len(self._replies)}")

    def clear(self, argument: str) -> None:
        self._begin(self.conversation.system)
        self._waiting = []
        say("new chat")

    def retry(self, argument: str) -> None:
        messages = self.conversation.messages
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise InputError("there is no reply to retry")
        earlier, again = messages[:], False
        del messages[-2:]
        try:
            again = self._turn(earlier[-2], None)
        finally:
            if not again:
                messages[:] = earlier

    def undo(self, argument: str) -> None:
        messages = self.conversation.messages
        turns = [index for index, message in enumerate(messages) if message["role"] == "user"]
        if not turns:
            raise InputError("there is no turn to undo")
        del messages[turns[-1] :]
        say(f"removed the last turn; {_counted(self._turns(), 'turn')} left")

    def save(self, argument: str) -> None:
        if _file(argument).exists():
            raise InputError(f"{argument} already exists; /save! {argument} replaces it")
        self.save_over(argument)

    def save_over(self, argument: str) -> None:
        try:
            self.conversation.save(_file(argument))
        except OSError as error:
            raise InputError(f"{argument}: {error.strerror}") from None
        say(f"saved: {argument}")

    def load(self, argument: str) -> None:
        old = self.conversation
        try:
            self.conversation = Conversation.load(old.model, _file(argument), kept=old.kept)
        except OSError as error:
            raise InputError(f"{argument}: {error.strerror}") from None
        say(f"loaded: {_counted(self._turns(), 'turn')}")

    def exit(self, argument: str) -> None:
        self._over = True


class Command(NamedTuple):
    """A command: its arguments, its help line, the method of ChatSession that runs it, and the arguments to complete."""

    usage: str
    help: str
    run: Callable[[ChatSession, str], None]
    choices: Sequence[str] = ()


COMMANDS = {
    "/help": Command("", "List the commands.", ChatSession.help),
    "/system": Command("[TEXT]", "Show the system message, or set it and start a new chat.", ChatSession.system),
    "/seed": Command(
        "[N|fresh]",
        "Use seed N for the first turn, N + 1 for the second, and so on; fresh: a new seed each turn.",
        ChatSession.set_seed,
        ("fresh",),
    ),
    "/mode": Command(
        f"[{'|'.join(MODES)}]", "Write a canvas at a time (diffusion) or a token at a time (causal).", ChatSession.set_mode, MODES
    ),
    "/thinking": Command("[on|off]", "Let the model think before it replies.", ChatSession.set_thinking, ("on", "off")),
    "/image": Command(
        f"[{FILE}|{_NO_FILE}]",
        f"Add an image to the next message, or list what was added; {_NO_FILE} drops it all.",
        ChatSession.image,
        (_NO_FILE, FILE),
    ),
    "/video": Command(f"[{FILE}|{_NO_FILE}]", "The same for a video.", ChatSession.video, (_NO_FILE, FILE)),
    "/stats": Command("", "Show tokens, steps, time and seed of the last reply, and the session's totals.", ChatSession.stats),
    "/clear": Command("", "Start a new chat with the same settings.", ChatSession.clear),
    "/retry": Command("", "Write the last reply again with a new seed.", ChatSession.retry),
    "/undo": Command("", "Remove the last message and its reply.", ChatSession.undo),
    "/save": Command(FILE, "Save the chat to a new file.", ChatSession.save, (FILE,)),
    "/save!": Command(FILE, "Save the chat and replace the file.", ChatSession.save_over, (FILE,)),
    "/load": Command(FILE, "Continue a saved chat instead of this one.", ChatSession.load, (FILE,)),
    "/exit": Command("", "Leave.", ChatSession.exit),
}


_FIGURES = ("", "prompt tokens", "cached", "new tokens", "steps", "per forward", "seconds")


def figures(replies: Sequence[Reply]) -> tuple[str, ...]:
    """Totals of the replies in the order of ``_FIGURES``: prompt tokens and how many of them were cached, new tokens, denoising
    steps, new tokens per forward pass, seconds."""
    statistics = [reply.statistics for reply in replies]
    prompt, cached = sum(each.prompt_tokens for each in statistics), sum(reply.cached_tokens for reply in replies)
    new, steps = sum(each.new_tokens for each in statistics), sum(sum(each.denoising_steps) for each in statistics)
    forwards = sum(sum(each.denoising_steps) or each.new_tokens for each in statistics)
    seconds = sum(each.encode_seconds + each.denoise_seconds for each in statistics)
    return f"{prompt}", f"{cached}", f"{new}", f"{steps}", f"{new / forwards:.1f}", f"{seconds:.2f}"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _size(media: Media) -> str:
    tokens = _counted(sum(image.soft_tokens for image in media.images), "token")
    return f"{_counted(len(media.frames), 'frame')}, {tokens}" if isinstance(media, Film) else tokens


def _file(typed: str) -> Path:
    """The file that a user means. Its name can be quoted or escaped, as terminals write a file that is dropped on them."""
    if "\0" in typed:
        raise InputError("the name of a file cannot contain a null character")
    with suppress(ValueError):  # a quote without its end is part of the name
        words = shlex.split(typed)
        if len(words) == 1 and not os.path.lexists(os.path.expanduser(typed)):
            typed = words[0]
    return Path(os.path.expanduser(typed))


class _Stretches:
    """Turns the parts of a reply into text that puts thoughts, answers and tool calls on lines of their own.

    Attributes:
        kind: type of the last part; None before the first.
    """

    def __init__(self) -> None:
        self.kind: type[Part] | None = None
        self._line_is_open = False

    def add(self, part: Part) -> Iterator[tuple[type[Part], str]]:
        """Pieces of text, each with the type of part that it belongs to."""
        kind = type(part)
        if self.kind and self._line_is_open and (kind is not self.kind or kind is ToolCall):
            yield self.kind, "\n"
        text = part.text if not isinstance(part, ToolCall) else f"{part.name}({json.dumps(part.arguments, ensure_ascii=False)})"
        self.kind, self._line_is_open = kind, not text.endswith("\n")
        yield kind, text


class LiveReply(LivePage):
    """Shows the events of a reply, and its canvas during denoising."""

    def __init__(self, console: Console, utf8: ToUtf8, max_new_tokens: int) -> None:
        super().__init__(console, utf8, max_new_tokens)
        self._stretches = _Stretches()

    def __call__(self, event: ReplyEvent) -> None:
        if isinstance(event, Draft):
            self.draft(event)
        elif isinstance(event, Block | Token):
            self.committed(event)
        elif isinstance(event, Reply):
            self.finish()
        else:
            for kind, text in self._stretches.add(event):
                self.write(text, _STYLES[kind])


class PlainReply:
    """Prints the parts of a reply as they are finished. A context manager: on exit it ends the line of an interrupted reply.

    On a terminal, control characters are made visible and thoughts are dim. Elsewhere the text is printed unchanged, and
    thoughts go to standard error.
    """

    def __init__(self) -> None:
        self._stretches = _Stretches()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._stretches.kind:
            self._print(self._stretches.kind, "\n")

    def __call__(self, event: ReplyEvent) -> None:
        if isinstance(event, Reply):
            if self._stretches.kind is Reasoning:
                self._print(Reasoning, "\n")
            self._print(Content, "\n")
            self._stretches.kind = None
        elif isinstance(event, Reasoning | Content | ToolCall):
            for kind, text in self._stretches.add(event):
                self._print(kind, text)

    def _print(self, kind: type[Part], text: str) -> None:
        if sys.stdout.isatty():
            click.secho(printable(text), nl=False, dim=kind is Reasoning)
        else:
            click.echo(text, nl=False, err=kind is Reasoning, color=True)

"""``mlx-diffgemma chat``: a conversation that can be watched, stopped, taken back, saved and gone on with."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import click
from prompt_toolkit.utils import is_dumb_terminal
from rich.console import Console

from mlx_diffgemma.backends import load_backend
from mlx_diffgemma.causal import Token
from mlx_diffgemma.chat.conversation import Conversation
from mlx_diffgemma.chat.reply import Reply, ReplyEvent
from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.cli.generate import mode_option, no_live_option
from mlx_diffgemma.cli.live import Decode, LivePage, live_console, printable
from mlx_diffgemma.cli.options import backend_options, causal_options, sampler_options, source_options
from mlx_diffgemma.cli.repl import FILE, Terminal, lines
from mlx_diffgemma.cli.table import table
from mlx_diffgemma.errors import DiffGemmaError, InputError
from mlx_diffgemma.pipeline import DiffusionGemma
from mlx_diffgemma.sampler import Block, Draft
from mlx_diffgemma.writing import MODES, Content, Part, Reasoning, ToolCall, sampling_config

#: Is shown every event of a reply, as it happens.
View = Callable[[ReplyEvent], None]

_SEEDS = 2**64

# In what style the parts of a reply are shown.
_STYLES: dict[type[Part], str] = {Reasoning: "dim", Content: "", ToolCall: "cyan"}


@click.command(short_help="Talk with the model, turn by turn.")
@source_options
@click.option("--system", metavar="TEXT", help="A system message before the first turn.")
@click.option("--load", "file", type=click.Path(path_type=Path), metavar="FILE", help="Go on with a chat that /save wrote.")
@click.option("--thinking", is_flag=True, help="Have the model think before it answers.")
@click.option(
    "--seed",
    type=click.IntRange(0, _SEEDS - 1),
    metavar="N",
    help="Turn K, counted from 0, takes seed N + K.  [default: a fresh one each turn]",
)
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
    mode: str,
    backend: str | None,
    device: str | None,
    dtype: str | None,
    no_live: bool,
    **sampler: Any,
) -> None:
    """Talk with MODEL. What was read and written in earlier turns is not computed again.

    On a terminal: Enter sends; Alt-Enter, Ctrl-J or a backslash at the end of a line begins a new line of the message. Up and
    down recall earlier ones. Ctrl-C stops a reply and keeps what is shown of it; Ctrl-D leaves. /help lists the commands.

    Elsewhere each line of standard input is a message or a command, and one that ends in a backslash goes on in the next line.
    The answers go to standard output, the model's thoughts and everything else to standard error.

    With --seed or /seed the whole chat is repeatable: the same messages get the same replies.
    """
    if file is not None and system is not None:
        raise InputError("--system begins a new chat, and --load goes on with an old one; leave out one of them")
    checkpoint = Checkpoint.open(model, revision)
    sampling_config(checkpoint.generation, mode, sampler)  # a bad value is told before the weights are read
    loaded = DiffusionGemma(checkpoint, load_backend(checkpoint, backend, device=device, dtype=dtype))
    conversation = Conversation(loaded, system=system) if file is None else Conversation.load(loaded, file)
    conversation.thinking |= thinking
    talk = partial(ChatSession, conversation, mode=mode, seed=seed, sampler=sampler)
    if not (sys.stdin and sys.stdin.isatty() and sys.stdout.isatty()) or is_dumb_terminal():
        talk().run(lines())
        return
    console = None if no_live else live_console()
    with Terminal({name: command.choices for name, command in COMMANDS.items()}) as terminal:
        say(f"Talking with {model}. /help lists the commands, Ctrl-D leaves.")
        talk(console=console, watching=terminal.watching).run(terminal)


def say(text: str) -> None:
    """Tell a person what is not part of a reply: whole lines on standard error."""
    click.echo(printable(text), err=True)


class ChatSession:
    """A conversation, the settings of its next turns, and the commands that change them.

    Args:
        mode, sampler: as in :meth:`~mlx_diffgemma.pipeline.DiffusionGemma.stream`.
        seed: that of the turn before which there is none; each later turn takes the next. None for a fresh one each.
        console: where the canvas is drawn; None to print what is finished.
        watching: a context manager for the time of a reply, which gives a function that says whether to stop it.
    """

    def __init__(
        self,
        conversation: Conversation,
        *,
        mode: str,
        seed: int | None,
        sampler: Mapping[str, Any],
        console: Console | None = None,
        watching: Callable[[], AbstractContextManager[Callable[[], bool]]] = lambda: nullcontext(bool),
    ) -> None:
        self.conversation, self.mode, self.seed, self.sampler = conversation, mode, seed, sampler
        self._console, self._watching = console, watching
        self._decode = conversation.model.tokenizer.decode  # takes a second to load: here, and not in the first turn
        self._replies: list[Reply] = []  # all that were finished
        self._over = False

    def run(self, typed: Iterable[str]) -> None:
        """Take all messages and commands, up to the end or /exit."""
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
                raise InputError(f"there is no command {name}; /help lists them, and /{name} sends it as text")
            command = COMMANDS[name]
            if argument and not command.usage:
                raise InputError(f"nothing can follow {name}")
            if command.usage == FILE and not argument:
                raise InputError(f"{name} needs the name of a file")
            command.run(self, argument)
        elif text.strip():
            self._turn(text.removeprefix("/") if text.startswith("//") else text, self._next_seed())

    def _turn(self, message: str | Mapping[str, Any], seed: int | None) -> bool:
        """Have a message answered; False where it was stopped before there was any text, which takes the message back."""
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
            say("stopped; what is shown stays as the reply" if grown else "stopped before there was any text; nothing is kept")
        elif reply.finish_reason == "length":
            say(f"the reply is cut at {len(reply.tokens)} tokens; --max-new-tokens allows more")
        return grown

    def _view(self, max_new_tokens: int) -> "LiveReply | PlainReply":
        if self._console is None:
            return PlainReply()
        return LiveReply(self._console, self._decode, max_new_tokens)

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
            "//text sends a text that begins with a slash. Alt-Enter, Ctrl-J or a backslash at a line's end begins a new line.\n"
            "Ctrl-C stops a reply and keeps what is shown of it. Ctrl-D leaves."
        )

    def system(self, argument: str) -> None:
        if not argument:
            text = self.conversation.system
            say("no system message" if text is None else f"system message: {text}")
            return
        self._begin(argument)
        say("a new chat, since the system message is its beginning")

    def set_seed(self, argument: str) -> None:
        if argument == "fresh":
            self.seed = None
        elif argument:
            if not (argument.isascii() and argument.isdigit() and len(argument) <= 20 and int(argument) < _SEEDS):
                raise InputError("a seed is a whole number from 0 to 2^64 - 1, or fresh")
            self.seed = int(argument)
        say("a fresh seed each turn" if self.seed is None else f"turn K takes seed {self.seed} + K; next is {self._next_seed()}")

    def set_mode(self, argument: str) -> None:
        if argument:
            sampling_config(self.conversation.model.checkpoint.generation, argument, self.sampler)
            self.mode = argument
        say(f"mode: {self.mode}")

    def set_thinking(self, argument: str) -> None:
        if argument not in ("", "on", "off"):
            raise InputError(f"/thinking takes on or off, not {argument!r}")
        if argument:
            self.conversation.thinking = argument == "on"
        say(f"thinking: {'on' if self.conversation.thinking else 'off'}")

    def stats(self, argument: str) -> None:
        if not self._replies:
            raise InputError("there is no finished reply yet")
        last = self._replies[-1]
        say(table([_FIGURES, ("last reply", *figures([last])), ("session", *figures(self._replies))]))
        say(f"finish reason: {last.finish_reason}; seed: {last.seed}; replies in this session: {len(self._replies)}")

    def clear(self, argument: str) -> None:
        self._begin(self.conversation.system)
        say("a new chat")

    def retry(self, argument: str) -> None:
        messages = self.conversation.messages
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise InputError("there is no reply to write anew")
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
            raise InputError("there is no turn to take back")
        del messages[turns[-1] :]
        say(f"the last turn is taken back; {_counted(self._turns())} left")

    def save(self, argument: str) -> None:
        if Path(argument).expanduser().exists():
            raise InputError(f"{argument} is there already; /save! {argument} replaces it")
        self.save_over(argument)

    def save_over(self, argument: str) -> None:
        try:
            self.conversation.save(Path(argument).expanduser())
        except OSError as error:
            raise InputError(f"{argument}: {error.strerror}") from None
        say(f"saved: {argument}")

    def load(self, argument: str) -> None:
        old = self.conversation
        try:
            self.conversation = Conversation.load(old.model, Path(argument).expanduser(), kept=old.kept)
        except OSError as error:
            raise InputError(f"{argument}: {error.strerror}") from None
        say(f"loaded: {_counted(self._turns())}")

    def exit(self, argument: str) -> None:
        self._over = True


class Command(NamedTuple):
    """What may follow its name, what it does, by which method of ChatSession, and what completion knows."""

    usage: str
    help: str
    run: Callable[[ChatSession, str], None]
    choices: Sequence[str] = ()


COMMANDS = {
    "/help": Command("", "List the commands.", ChatSession.help),
    "/system": Command("[TEXT]", "Show the system message, or set it, which begins a new chat.", ChatSession.system),
    "/seed": Command(
        "[N|fresh]",
        "Turn K of the chat, counted from 0, takes seed N + K; or a fresh one each turn.",
        ChatSession.set_seed,
        ("fresh",),
    ),
    "/mode": Command(f"[{'|'.join(MODES)}]", "Write a canvas at a time, or one token at a time.", ChatSession.set_mode, MODES),
    "/thinking": Command("[on|off]", "Have the model think before it answers.", ChatSession.set_thinking, ("on", "off")),
    "/stats": Command("", "Tokens, steps and seed of the last reply, and the sums of the session.", ChatSession.stats),
    "/clear": Command("", "Begin a new chat with the same settings.", ChatSession.clear),
    "/retry": Command("", "Write the last reply anew, with a fresh seed.", ChatSession.retry),
    "/undo": Command("", "Take back the last message and its reply.", ChatSession.undo),
    "/save": Command(FILE, "Save the chat to a new file.", ChatSession.save, (FILE,)),
    "/save!": Command(FILE, "Save the chat, in place of what the file was.", ChatSession.save_over, (FILE,)),
    "/load": Command(FILE, "Go on with a saved chat instead of this one.", ChatSession.load, (FILE,)),
    "/exit": Command("", "Leave.", ChatSession.exit),
}


_FIGURES = ("", "prompt tokens", "cached", "new tokens", "steps", "per forward", "seconds")


def figures(replies: Sequence[Reply]) -> tuple[str, ...]:
    """What replies took, summed up: prompt tokens, and how many of them were cached; new tokens, the denoising steps that they
    took, and how many of them each forward pass wrote; seconds."""
    statistics = [reply.statistics for reply in replies]
    prompt, cached = sum(each.prompt_tokens for each in statistics), sum(reply.cached_tokens for reply in replies)
    new, steps = sum(each.new_tokens for each in statistics), sum(sum(each.denoising_steps) for each in statistics)
    forwards = sum(sum(each.denoising_steps) or each.new_tokens for each in statistics)
    seconds = sum(each.encode_seconds + each.denoise_seconds for each in statistics)
    return f"{prompt}", f"{cached}", f"{new}", f"{steps}", f"{new / forwards:.1f}", f"{seconds:.2f}"


def _counted(turns: int) -> str:
    return f"{turns} turn{'' if turns == 1 else 's'}"


class _Stretches:
    """The parts of a reply as text, in which thoughts, answers and tool calls stand on lines of their own.

    Attributes:
        kind: the last part's; None before the first.
    """

    def __init__(self) -> None:
        self.kind: type[Part] | None = None
        self._line_is_open = False

    def add(self, part: Part) -> Iterator[tuple[type[Part], str]]:
        """Stretches of text, and of which kind of part each is."""
        kind = type(part)
        if self.kind and self._line_is_open and (kind is not self.kind or kind is ToolCall):
            yield self.kind, "\n"
        text = part.text if not isinstance(part, ToolCall) else f"{part.name}({json.dumps(part.arguments, ensure_ascii=False)})"
        self.kind, self._line_is_open = kind, not text.endswith("\n")
        yield kind, text


class LiveReply(LivePage):
    """Shows the events of a reply, and its canvas while that is denoised."""

    def __init__(self, console: Console, decode: Decode, max_new_tokens: int) -> None:
        super().__init__(console, decode, max_new_tokens)
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
    """Prints the parts of a reply as they are finished; a context manager, which ends the line of one that is broken off.

    On a terminal nothing of it is obeyed, and thoughts are dim. Elsewhere it goes out as it is, the thoughts to standard error.
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

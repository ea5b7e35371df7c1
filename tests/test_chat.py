"""The chat: line by line, against the replies of Conversation; and on a terminal, key by key."""

import json
import pty
import re
import signal
import stat
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from prompt_toolkit.application import create_app_session
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input import DummyInput
from prompt_toolkit.output import DummyOutput
from test_live import DIM, block, draft, utf8

from mlx_diffgemma import Content, Conversation, Reasoning, Reply, ToolCall, load
from mlx_diffgemma.cli import chat as chat_module
from mlx_diffgemma.cli import main, repl
from mlx_diffgemma.cli.live import printable
from mlx_diffgemma.cli.options import Detail
from mlx_diffgemma.pipeline import DiffusionGemma
from support.checkpoints import edit_json, make_chat_checkpoint
from support.screen import Screen
from support.terminal import Terminal

CTRL_C, CTRL_D, CTRL_J, ALT_ENTER, UP = "\x03", "\x04", "\n", "\x1b\r", "\x1b[A"
PASTE = "\x1b[200~{}\x1b[201~"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_checkpoint(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def model(folder: Path) -> DiffusionGemma:
    return load(folder)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, model: DiffusionGemma, folder: Path) -> Callable[..., Result]:
    """Run the command with lines of standard input, on the loaded model."""
    monkeypatch.setattr(chat_module, "prepared", lambda *arguments, **options: model)

    def run(*typed: str, options: tuple[object, ...] = ()) -> Result:
        arguments = ["chat", str(folder), *map(str, options)]
        lines = "".join(f"{line}\n" for line in typed).encode(errors="surrogateescape")
        result = CliRunner().invoke(main, arguments, input=lines)
        assert result.exit_code == 0, f"status {result.exit_code}: {result.output} {result.exception!r}"
        assert "Traceback" not in result.stderr
        return result

    return run


def answers(conversation: Conversation, *messages: str, **options: Any) -> list[Reply]:
    """The replies of a conversation. ``seed`` is the seed of the first turn; each later turn uses the next one."""
    seed = options.pop("seed", 0)
    replies = []
    for turn, message in enumerate(messages):
        *_, reply = conversation.send(message, seed=seed + turn, **options)
        assert isinstance(reply, Reply)
        replies.append(reply)
    return replies


def stdout(result: Result) -> str:
    """Standard output as it was written, including carriage returns from the model."""
    return result.stdout_bytes.decode()


def on_stdout(*replies: Reply) -> str:
    return "".join(reply.content + "\n" for reply in replies)


def test_replies_are_those_of_a_conversation(run: Callable[..., Result], model: DiffusionGemma) -> None:
    expected = answers(Conversation(model, system="Be brief."), "Hi", "Why?", "//\nthen", "/etc", seed=5, max_new_tokens=11)
    typed = ("Hi", "", "Why?", "///\\", "then", "//etc")
    result = run(*typed, options=("--seed", 5, "--system", "Be brief.", "--max-new-tokens", 11))
    assert stdout(result) == on_stdout(*expected)
    assert set(result.stderr.splitlines()) == {"the reply is cut at 11 tokens; allow more with --max-new-tokens"}


def test_a_last_line_without_an_end_is_a_message(run: Callable[..., Result], model: DiffusionGemma, folder: Path) -> None:
    result = CliRunner().invoke(main, ["chat", str(folder), "--seed", "1"], input="Hi")
    assert stdout(result) == on_stdout(*answers(Conversation(model), "Hi", seed=1))


def test_without_a_seed_each_turn_has_a_fresh_one(run: Callable[..., Result]) -> None:
    result = run("Hi", "/stats", "/clear", "Hi", "/stats", "/seed 7", "/seed fresh", "Hi", "/stats")
    seeds = re.findall(r"seed: (\d+)", result.stderr)
    assert len(seeds) == len(set(seeds)) == 3


def test_settings(run: Callable[..., Result], model: DiffusionGemma) -> None:
    conversation = Conversation(model)
    first = answers(conversation, "Hi", seed=9)
    second = answers(conversation, "Hi", seed=2**64 - 1, mode="causal")
    conversation.thinking = True
    third = answers(conversation, "Hi", seed=0)
    result = run(
        "/seed 9", "Hi", f"/seed {2**64 - 2}", "/mode causal", "Hi", "/mode diffusion", "/thinking on", "Hi", "/thinking", "/seed"
    )
    assert stdout(result) == on_stdout(*first, *second, *third)
    told = [line for line in result.stderr.splitlines() if not line.startswith("the reply is cut")]
    assert told == [
        "seed 9 in the first turn, 1 more in each later turn; next: 9",
        f"seed {2**64 - 2} in the first turn, 1 more in each later turn; next: {2**64 - 1}",
        "mode: causal",
        "mode: diffusion",
        "thinking: on",
        "thinking: on",
        f"seed {2**64 - 2} in the first turn, 1 more in each later turn; next: 1",
    ]


def test_system_and_clear_begin_anew(run: Callable[..., Result], model: DiffusionGemma) -> None:
    (plain,) = answers(Conversation(model), "Hi", seed=3)
    (told,) = answers(Conversation(model, system="Be brief."), "Hi", seed=3)
    result = run("/system", "Hi", "/system Be brief.", "Hi", "/clear", "Hi", "/system", options=("--seed", 3))
    assert stdout(result) == on_stdout(plain, told, told)
    assert plain.content != told.content
    assert "no system message\n" in result.stderr
    assert "new chat with this system message\n" in result.stderr
    assert result.stderr.endswith("system message: Be brief.\n")


def test_undo_and_retry(run: Callable[..., Result], model: DiffusionGemma, tmp_path: Path) -> None:
    first, second = answers(Conversation(model), "Hi", "Why?", seed=3)
    file = tmp_path / "chat.json"
    result = run("Hi", "How?", "/undo", "Why?", "/retry", f"/save {file}", options=("--seed", 3))
    messages = json.loads(file.read_text())["messages"]
    assert [message["content"] for message in messages[:3]] == ["Hi", first.content, "Why?"]
    assert len(messages) == 4
    anew = messages[3]["content"]
    assert stdout(result).endswith(on_stdout(second) + anew + "\n")
    assert anew != second.content, "the same seed again"
    assert "removed the last turn; 1 turn left\n" in result.stderr


def test_stats(run: Callable[..., Result], model: DiffusionGemma) -> None:
    replies = answers(Conversation(model), "Hi", "Why?", seed=3)
    result = run("Hi", "Why?", "/stats", options=("--seed", 3))
    last, session, rest = result.stderr.splitlines()[-3:]

    def figures(replies: list[Reply]) -> list[str]:
        prompt, cached = sum(reply.statistics.prompt_tokens for reply in replies), sum(reply.cached_tokens for reply in replies)
        new, steps = sum(len(reply.tokens) for reply in replies), sum(sum(reply.statistics.denoising_steps) for reply in replies)
        assert cached > 0
        return [f"{prompt}", f"{cached}", f"{new}", f"{steps}", f"{new / steps:.1f}"]

    assert last.split()[:-1] == ["last", "reply", *figures(replies[1:])]
    assert session.split()[:-1] == ["session", *figures(replies)]
    assert rest == f"finish reason: {replies[1].finish_reason}; seed: 4; replies in this session: 2"


def test_a_saved_chat_goes_on_as_if_it_had_not_ended(
    run: Callable[..., Result], model: DiffusionGemma, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = answers(Conversation(model, system="Be brief."), "Hi", "Why?", "How?", seed=3)
    file = tmp_path / "a chat.json"
    saved = run("Hi", "Why?", "/save ~/a chat.json", options=("--seed", 3, "--system", "Be brief."))
    assert saved.stderr.endswith("saved: ~/a chat.json\n")
    loaded = run("Else", f"/load {file}", "How?", options=("--seed", 3))
    assert stdout(loaded).endswith(on_stdout(expected[2]))
    assert "loaded: 2 turns\n" in loaded.stderr
    again = run("How?", options=("--seed", 3, "--load", file))
    assert stdout(again) == on_stdout(expected[2])


def test_a_file_is_not_overwritten_unasked(run: Callable[..., Result], tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    file.write_text("mine")
    result = run(f"/save {file}")
    assert file.read_text() == "mine"
    assert result.stderr == f"error: {file} already exists; /save! {file} replaces it\n"
    run(f"/save! {file}")
    assert json.loads(file.read_text())["messages"] == []


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("/nonsense on", "unknown command /nonsense; /help lists the commands, and //nonsense sends the text /nonsense"),
        ("/\x1b[2J", r"unknown command /\x1b[2J; /help lists the commands, and //\x1b[2J sends the text /\x1b[2J"),
        ("/clear all", "/clear takes no argument; leave it out"),
        ("/save", "/save needs a file name"),
        ("/save {tmp}/nowhere/chat", "{tmp}/nowhere/chat: No such file or directory"),
        ("/load {tmp}/nowhere", "{tmp}/nowhere: No such file or directory"),
        ("/load {tmp}", "{tmp}: Is a directory"),
        ("/load {tmp}/foreign", "{tmp}/foreign: not a saved conversation"),
        ("/load {tmp}/binary", "{tmp}/binary: not a saved conversation"),
        ("/seed -1", "the seed must be a whole number from 0 to 2^64 - 1, or fresh"),
        ("/seed 18446744073709551616", "the seed must be a whole number"),
        ("/mode sideways", "unknown mode 'sideways'; known are diffusion and causal"),
        ("/mode causal", "t_min belongs to the diffusion mode; leave it out, or change the mode"),
        ("/thinking maybe", "/thinking takes on or off, got 'maybe'"),
        ("long " * 600, "2453 prompt tokens and 20 new tokens"),
        ("\udcff", "the text is not valid Unicode: a lone surrogate at character 0"),
    ],
)
def test_an_error_is_a_line_and_the_chat_goes_on(
    run: Callable[..., Result], model: DiffusionGemma, tmp_path: Path, typed: str, message: str
) -> None:
    (tmp_path / "foreign").write_text('{"messages": []}')
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    expected = answers(Conversation(model), "Hi", "Why?", seed=3, t_min=0.3)
    result = run("Hi", typed.format(tmp=tmp_path), "Why?", options=("--seed", 3, "--t-min", 0.3))
    assert stdout(result) == on_stdout(*expected)
    (error,) = [line for line in result.stderr.splitlines() if not line.startswith("the reply is cut")]
    assert error.startswith(f"error: {message.format(tmp=tmp_path)}")


@pytest.mark.parametrize("command", ["/stats", "/undo", "/retry"])
def test_there_is_nothing_yet(run: Callable[..., Result], command: str) -> None:
    assert re.fullmatch(r"error: there is no .*\n", run(command).stderr)


def test_a_retry_that_fails_leaves_the_reply(run: Callable[..., Result], model: DiffusionGemma, tmp_path: Path) -> None:
    (reply,) = answers(Conversation(model), "Hi", seed=3)
    conversation = Conversation(model)
    chat = chat_module.ChatSession(conversation, mode="diffusion", seed=3, sampler={}, detail=Detail())
    file = tmp_path / "chat.json"

    def typed() -> Any:
        yield "Hi"
        conversation.system = "long " * 600
        yield "/retry"
        conversation.system = None
        yield f"/save {file}"

    chat.run(typed())
    assert [message["content"] for message in json.loads(file.read_text())["messages"]] == ["Hi", reply.content]


def test_help_names_every_command_and_exit_leaves(run: Callable[..., Result]) -> None:
    result = run("/help", "/exit", "Hi")
    assert result.stdout == ""
    assert [name for name in chat_module.COMMANDS if not re.search(rf"^{re.escape(name)} ", result.stderr, re.MULTILINE)] == []


def test_load_and_system_exclude_each_other(folder: Path) -> None:
    result = CliRunner().invoke(main, ["chat", str(folder), "--load", "x", "--system", "y"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "leave out one" in result.stderr


def test_thoughts_are_dim_and_calls_stand_on_their_lines() -> None:
    screen = Screen(80, 24)
    parts = [
        Reasoning("The "),
        Reasoning("sky\x07"),
        ToolCall("look", {"at": "空"}),
        ToolCall("wait", {}),
        Content("is "),
        Content("blue\n"),
    ]
    with chat_module.LiveReply(screen.console(), utf8, 100) as show:
        show(draft(1, [0, 1, 2, 3]))
        show(block(0, [0, 1, 2, 3]))
        for part in parts:
            show(part)
    assert screen.lines == ["The sky␇", 'look({"at": "空"})', "wait({})", "is blue"]
    assert screen.styled(DIM) == "The sky␇"


def test_thoughts_go_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    with chat_module.PlainReply() as show:
        for part in [Reasoning("so\x1b[2J"), Content("yes\x1b[2J"), ToolCall("wait", {})]:
            show(part)
    assert capsys.readouterr() == ("yes\x1b[2J\nwait({})\n", "so\x1b[2J\n"), "a file gets what was written"


@pytest.mark.parametrize("state", ["file", "directory"])
def test_history_stays_in_memory_where_it_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, state: str) -> None:
    if state == "file":
        (tmp_path / "mlx-diffgemma").write_text("in the way")
    else:
        (tmp_path / "mlx-diffgemma" / "history").mkdir(parents=True)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert isinstance(repl.history(), InMemoryHistory)


def test_the_first_ctrl_c_asks_and_the_second_breaks_off(monkeypatch: pytest.MonkeyPatch) -> None:
    keyboard, program = pty.openpty()
    reached = []
    with open(keyboard, "wb"), open(program) as stdin, create_app_session(DummyInput(), DummyOutput()):
        monkeypatch.setattr(sys, "stdin", stdin)
        before = termios.tcgetattr(program)
        with repl.Terminal({}) as terminal:
            signal.raise_signal(signal.SIGINT)
            with terminal.watching() as stopped:
                assert not termios.tcgetattr(program)[3] & termios.ECHO
                assert not stopped()
                signal.raise_signal(signal.SIGINT)
                assert stopped()
                reached.append("asked")
                signal.raise_signal(signal.SIGINT)
                reached.append("not broken off")
            assert termios.tcgetattr(program) == before
    assert reached == ["asked"]


def test_on_a_terminal(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Diffusion is made so slow that a key can be pressed within a block; causal mode is fast."""
    slow, home = make_chat_checkpoint(tmp_path_factory.mktemp("slow")), tmp_path_factory.mktemp("home")
    edit_json(slow / "generation_config.json", max_new_tokens=160, max_denoising_steps=80, confidence_threshold=1e-9)
    file = home / "chat.json"
    with Terminal("chat", slow, "--seed", 3, environment={"XDG_STATE_HOME": str(home)}) as terminal:

        def at_prompt() -> bool:
            return bool(terminal.lines) and terminal.lines[-1] == ">" and terminal.column == 2

        def seen(text: str) -> None:
            terminal.wait(lambda: any(text in line for line in terminal.lines), repr(text))

        def enter(keys: str) -> str:
            """Type a message or a command, press Enter, and return the output up to the next prompt."""
            row = terminal.row
            terminal.type(keys + "\r")
            terminal.wait(lambda: at_prompt() and terminal.row > row, f"prompt after {keys!r}")
            return "\n".join("".join(cells).rstrip() for cells in terminal.rows[row + 1 : terminal.row])

        def saved() -> list[dict[str, Any]]:
            assert enter(f"/save! {file}").endswith("chat.json")
            messages: list[dict[str, Any]] = json.loads(file.read_text())["messages"]
            return messages

        terminal.wait(at_prompt, "prompt")
        terminal.type("Hi\r")
        seen("block 2  step")
        terminal.type("dropped\r")
        seen("block 3  step")
        assert not any("dropped" in line for line in terminal.lines), "keys tear the picture"
        terminal.type(CTRL_C)
        terminal.wait(at_prompt, "prompt")
        assert terminal.lines[-2] == "stopped; the text shown is kept as the reply"
        assert not any("block" in line for line in terminal.lines), "the canvas is left"
        hi, part = saved()
        assert (hi["content"], part["role"]) == ("Hi", "assistant")
        assert part["content"]
        assert dense(part["content"]) in dense("\n".join(terminal.lines))

        assert enter("/mode causal") == "mode: causal"
        shown = enter("go on")
        assert len(messages := saved()) == 4, "the chat does not go on"
        assert dense(shown).startswith(dense(messages[3]["content"]))

        enter("/clear")
        enter(f"one{CTRL_J}two{ALT_ENTER}three\\\rfour" + PASTE.format("\nfive\rsix"))
        assert saved()[0]["content"] == "one\ntwo\nthree\nfour\nfive\nsix"

        enter("/mode")
        assert enter(UP) == "mode: causal", "the last command is not recalled"
        assert terminal.lines[-3] == "> /mode"
        terminal.type(f"never sent{CTRL_C}/und\t")
        terminal.wait(lambda: terminal.lines[-1] == "> /undo", "completed command")
        assert enter("") == "removed the last turn; 0 turns left"
        terminal.type(CTRL_C)
        seen("Ctrl-D or /exit leaves.")
        terminal.wait(at_prompt, "prompt")
        terminal.type(CTRL_D)
        assert terminal.end() == 0
        assert not terminal.cursor_hidden
    history = home / "mlx-diffgemma" / "history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert "+go on\n" in history.read_text()
    assert "never sent" not in history.read_text()


def dense(text: str) -> str:
    """The text as shown, without blanks, because the screen turns a tab into blanks."""
    return "".join(printable(text).split())

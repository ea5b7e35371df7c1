"""Images and videos on the command line, and in the chat."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image as Pillow
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from mlx_diffgemma import Conversation, Reply, infill, load, revise
from mlx_diffgemma.cli import chat as chat_module
from mlx_diffgemma.cli import main, repl
from mlx_diffgemma.pipeline import DiffusionGemma
from mlx_diffgemma.vision.sources import Image, Video
from support.checkpoints import SEEING_SHAPE, edit_json, make_chat_checkpoint
from support.terminal import Terminal

QUESTION = "What is it?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_chat_checkpoint(tmp_path_factory.mktemp("seeing"), SEEING_SHAPE)
    edit_json(folder / "config.json", vision_soft_tokens_per_image=70)
    edit_json(folder / "generation_config.json", eos_token_id=[1, 106, 50], max_new_tokens=10)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> DiffusionGemma:
    return load(folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three pictures, one of them with a space in its name."""
    files = [tmp_path_factory.mktemp("pictures") / name for name in ("a.png", "my b.png", "c.png")]
    for seed, file in enumerate(files):
        pixels = np.random.default_rng(seed).integers(0, 256, (48, 64 + 32 * seed, 3), dtype=np.uint8)
        Pillow.fromarray(pixels).save(file)
    return files


def run(*arguments: object, status: int = 0, **options: Any) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], **options)
    assert result.exit_code == status, f"status {result.exit_code}: {result.output} {result.exception!r}"
    return result


def test_images_come_before_the_prompt_in_order(folder: Path, model: DiffusionGemma, pictures: list[Path]) -> None:
    texts = []
    for files in (pictures[:1], pictures[:2], pictures[1::-1]):
        given = [argument for file in files for argument in ("--image", file)]
        content = json.loads(run("generate", folder, QUESTION, "--seed", 7, "--json", *given).stdout)
        expected = model.generate(QUESTION, images=[str(file) for file in files], seed=7)
        assert content["tokens"] == expected.tokens
        assert content["statistics"]["prompt_tokens"] == expected.statistics.prompt_tokens
        texts.append(content["text"])
    assert len(set(texts)) == 3, "the images make no difference"


def test_image_tokens(folder: Path, model: DiffusionGemma, pictures: list[Path]) -> None:
    file, counts = pictures[0], []
    for tokens in (70, 140):
        result = run("generate", folder, QUESTION, "--seed", 7, "--json", "--image", file, "--image-tokens", tokens)
        content = json.loads(result.stdout)
        assert content["tokens"] == model.generate(QUESTION, images=[Image(file, tokens)], seed=7).tokens
        counts.append(content["statistics"]["prompt_tokens"])
    assert counts[0] + 50 < counts[1] < counts[0] + 100


def test_raw_prompts_say_where_images_stand(folder: Path, model: DiffusionGemma, pictures: list[Path]) -> None:
    prompt, file = "Look: <|image|> is", pictures[0]
    result = run("generate", folder, prompt, "--raw", "--markup", "--image", file, "--seed", 7)
    assert result.stdout == model.generate(prompt, raw=True, markup=True, images=[file], seed=7).text + "\n"


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A video of 8 frames in 4 seconds."""
    pytest.importorskip("av")
    file = tmp_path / "clip.gif"
    frames = [Pillow.new("RGB", (64, 48), (30 * number, 99, 0)) for number in range(8)]
    frames[0].save(file, save_all=True, append_images=frames[1:], duration=500, loop=0)
    return file


def test_a_video(folder: Path, model: DiffusionGemma, pictures: list[Path], clip: Path) -> None:
    texts = []
    for given, seen in (([], {}), (["--video-frames", 2], {"frames": 2}), (["--video-fps", 1], {"fps": 1.0})):
        arguments = ["--video", clip, "--image", pictures[0], *given]
        content = json.loads(run("generate", folder, QUESTION, "--seed", 7, "--json", *arguments).stdout)
        expected = model.generate(QUESTION, images=[pictures[0], Video(clip, **seen)], seed=7)
        assert content["tokens"] == expected.tokens
        assert content["statistics"]["prompt_tokens"] == expected.statistics.prompt_tokens
        texts.append(content["text"])
    assert len(set(texts)) == 3


@pytest.mark.parametrize("command", ["infill", "revise"])
def test_images_reach_the_editors(folder: Path, model: DiffusionGemma, pictures: list[Path], command: str) -> None:
    text = "It is a <hole:3> sky." if command == "infill" else "It is a blue sky."
    arguments = [command, folder, text, "--seed", 3, "--json", *(["--strength", 0.9] if command == "revise" else [])]
    results = []
    for files in ([], pictures[:1], pictures[1:]):
        given = [argument for file in files for argument in ("--image", file)]
        content = json.loads(run(*arguments, *given).stdout)
        images: dict[str, Any] = {"images": files, "seed": 3}
        if command == "infill":
            expected = infill(model, text, **images)
            results.append(expected.fillings[0].candidate.score)
        else:
            revision = revise(model, text, 0.9, **images)
            results.append(revision.text)
            expected = revision
        assert content["text"] == expected.text
    assert len(set(results)) == 3, "the images make no difference"


COMMANDS = {
    "generate": ["generate", "{model}", QUESTION],
    "infill": ["infill", "{model}", "It is <hole:3>."],
    "revise": ["revise", "{model}", "It is blue.", "--strength", "0.5"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--image", "{tmp}/nowhere.png"], "{tmp}/nowhere.png"),
        (["--image", "{tmp}/text.png"], "{tmp}/text.png"),
        (["--image", "{tmp}"], "{tmp}"),
        (["--video", "{tmp}/nowhere.mp4"], "{tmp}/nowhere.mp4"),
        (["--image-tokens", "280"], "--image-tokens has no effect without --image; give --image, or leave it out"),
        (["--video-frames", "3"], "--video-frames has no effect without --video"),
        (["--video-fps", "3"], "--video-fps has no effect without --video"),
        (["--video", "x", "--video-frames", "3", "--video-fps", "3"], "--video-frames and --video-fps exclude each other"),
        (["--video", "x", "--video-fps", "nan"], "fps must be a number from 0.001 to 1000, got nan"),
    ],
)
def test_an_error_is_one_line_before_the_weights_are_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, given: list[str], message: str
) -> None:
    def load_backend(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("the weights are read")

    monkeypatch.setattr("mlx_diffgemma.pipeline.load_backend", load_backend)
    (tmp_path / "text.png").write_text("This is text.")
    arguments = [argument.format(model=folder, tmp=tmp_path) for argument in (*COMMANDS[command], *given)]
    result = run(*arguments, status=2)
    [line] = result.stderr.splitlines()
    assert line.startswith("mlx-diffgemma: error: ")
    assert message.format(tmp=tmp_path) in line
    assert result.stdout == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_a_model_that_reads_text_only(command: str, pictures: list[Path]) -> None:
    arguments = [argument.format(model="sudoku") for argument in COMMANDS[command]]
    result = run(*arguments, "--image", pictures[0], status=2)
    [line] = result.stderr.splitlines()
    assert re.fullmatch(r"mlx-diffgemma: error: .*(vision tower|reads text only|reads no images).*", line)


def test_other_numbers_of_image_tokens_are_wrong_usage(folder: Path, pictures: list[Path]) -> None:
    for given in (["--image-tokens", 100], ["--video-frames", 0], ["--video-fps", 0]):
        result = run("generate", folder, QUESTION, "--image", pictures[0], *given, status=2)
        assert result.stderr.startswith("Usage: ")


# The chat.


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch, model: DiffusionGemma, folder: Path) -> Callable[..., Result]:
    """Run the chat with lines of standard input, on the loaded model."""
    monkeypatch.setattr(chat_module, "prepared", lambda *arguments, **options: model)

    def chat(*typed: object, options: tuple[object, ...] = ()) -> Result:
        return run("chat", folder, "--seed", 3, *options, input="".join(f"{line}\n" for line in typed))

    return chat


def told(result: Result) -> list[str]:
    """What the chat said, without the line after a reply that was cut."""
    return [line for line in result.stderr.splitlines() if not line.startswith("the reply is cut")]


def said(conversation: Conversation, *turns: tuple[str, list[Path]], seed: int = 3) -> str:
    """The replies of a conversation as the chat prints them. Each turn uses the next seed."""
    contents = []
    for turn, (text, files) in enumerate(turns):
        *_, reply = conversation.send(text, images=files, seed=seed + turn)
        assert isinstance(reply, Reply)
        contents.append(reply.content + "\n")
    return "".join(contents)


def test_an_image_comes_with_the_next_message(chat: Callable[..., Result], model: DiffusionGemma, pictures: list[Path]) -> None:
    a, b, _ = pictures
    expected = said(Conversation(model), ("Hi", []), (QUESTION, [a, b]), ("Why?", []))
    result = chat("Hi", f"/image {a}", "/image", f"/image {b}", QUESTION, "/image", "Why?")
    assert result.stdout_bytes.decode() == expected
    first = f"with the next message: {a} (63 tokens)"
    nothing = "no image or video comes with the next message; /image FILE adds one"
    assert told(result) == [first, first, f"{first}, {b} (55 tokens)", nothing]


def test_image_tokens_in_the_chat(chat: Callable[..., Result], pictures: list[Path]) -> None:
    result = chat(f"/image {pictures[0]}", options=("--image-tokens", 140))
    assert re.search(r"\((1[23]\d) tokens\)", result.stderr)


def test_a_video_in_the_chat(
    chat: Callable[..., Result], model: DiffusionGemma, pictures: list[Path], clip: Path, tmp_path: Path
) -> None:
    typed = [f"/video {clip}", f"/image {pictures[0]}", QUESTION, "/undo", f"/load {tmp_path / 'chat.json'}", "Why?"]
    conversation = Conversation(model)
    expected = said(conversation, (QUESTION, [Video(clip, 3), pictures[0]]))
    conversation.save(tmp_path / "chat.json")
    expected += said(conversation, ("Why?", []), seed=4)
    result = chat(*typed, options=("--video-frames", 3))
    assert told(result)[1] == f"with the next message: {clip} (3 frames, 189 tokens), {pictures[0]} (63 tokens)"
    assert result.stdout_bytes.decode() == expected


def test_images_are_dropped(chat: Callable[..., Result], model: DiffusionGemma, pictures: list[Path]) -> None:
    for drop in ("/image none", "/video none", "/clear"):
        result = chat(f"/image {pictures[0]}", f"/image {pictures[1]}", drop, QUESTION)
        assert result.stdout_bytes.decode() == said(Conversation(model), (QUESTION, []))


def test_how_a_file_can_be_written(chat: Callable[..., Result], pictures: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    b = pictures[1]
    monkeypatch.setenv("HOME", str(b.parent))
    escaped = str(b).replace(" ", "\\ ")
    result = chat(*(f"/image {typed}" for typed in (b, f'"{b}"', f"'{b}'", escaped, f"  {b}  ", "~/my b.png", "'~/my b.png'")))
    assert told(result)[-1].count(f"{b} (55 tokens)") == 7
    missing = chat("/image it's.png", "/image ~nobody-here/x.png", "/image a\0b.png", "/image my b.png")
    lines = told(missing)
    assert len(lines) == 4
    assert all(line.startswith("error: ") for line in lines)
    assert [
        name for name, line in zip(("it's.png", "~nobody-here/x.png", "null", "my b.png"), lines, strict=True) if name not in line
    ] == []


def test_images_stay_with_their_message(
    chat: Callable[..., Result], model: DiffusionGemma, pictures: list[Path], tmp_path: Path
) -> None:
    """After /retry, /undo, /save and /load."""
    a, b, _ = pictures
    file = tmp_path / "chat.json"
    result = chat(
        *(f"/image {a}", QUESTION, f"/image {b}", "/retry", "And this?", f"/save {file}"),
        *("/undo", "/image", "Why?", f"/load {file}", "How?"),
    )
    saved = Conversation.load(model, file)
    first, again, second, _ = saved.messages
    alone = Conversation(model)
    said(alone, (QUESTION, [a]), ("And this?", [b]))
    for message, expected in ((first, alone.messages[0]), (second, alone.messages[2])):
        assert [part["type"] for part in message["content"]] == ["image", "text"]
        assert message["content"][0]["image"].patches.digest == expected["content"][0]["image"].patches.digest
        assert message["content"][1] == expected["content"][1]
    assert again != alone.messages[1], "the same seed again"
    assert told(result)[-2] == "no image or video comes with the next message; /image FILE adds one", "undo drops its image"
    assert result.stdout_bytes.decode().endswith(said(saved, ("How?", []), seed=5))


def test_a_message_that_fails_keeps_its_images(chat: Callable[..., Result], model: DiffusionGemma, pictures: list[Path]) -> None:
    a = pictures[0]
    result = chat(f"/image {a}", "long " * 4000, QUESTION)
    assert result.stdout_bytes.decode() == said(Conversation(model), (QUESTION, [a]))
    assert "error: " in told(result)[1]


def test_an_error_is_a_line_and_the_chat_goes_on(chat: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("This is text.")
    typed = [f"/image {tmp_path / 'nowhere.png'}", f"/image {tmp_path / 'text.png'}", f"/image {tmp_path}", "/image"]
    *errors, nothing = told(chat(*typed))
    assert nothing.startswith("no image")
    assert len(errors) == 3
    assert all(line.startswith("error: ") and str(tmp_path) in line for line in errors)


def test_file_names_are_completed(tmp_path: Path) -> None:
    (tmp_path / "my photo.png").touch()
    choices = {name: command.choices for name, command in chat_module.COMMANDS.items()}

    def completed(typed: str) -> list[str]:
        return [each.text for each in repl._Commands(choices).get_completions(Document(typed), CompleteEvent())]

    assert completed(f"/image {tmp_path}/my") == [" photo.png"]
    assert completed(f'/image "{tmp_path}/my ph') == ["oto.png"]
    assert completed(f"/video {tmp_path}/m") == ["y photo.png"]
    assert "none" in completed("/image n")
    assert completed("/im") == ["/image"]


def test_on_a_terminal(folder: Path, pictures: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    with Terminal("chat", folder, "--seed", 3, "--no-live", width=200, environment={"XDG_STATE_HOME": str(tmp_path)}) as terminal:

        def at_prompt() -> bool:
            return bool(terminal.lines) and terminal.lines[-1] == ">" and terminal.column == 2

        def enter(keys: str) -> None:
            row = terminal.row
            terminal.type(keys + "\r")
            terminal.wait(lambda: at_prompt() and terminal.row > row, f"prompt after {keys!r}")

        terminal.wait(at_prompt, "prompt")
        terminal.type(f"/image {pictures[1].parent}/my\t")
        terminal.wait(lambda: terminal.lines[-1].endswith("/my b.png"), "completed name")
        enter("")
        assert terminal.lines[-2] == f"with the next message: {pictures[1]} (55 tokens)"
        enter(QUESTION)
        enter(f"/save {file}")
        terminal.type("\x04")
        assert terminal.end() == 0
    content = json.loads(file.read_text())["messages"][0]["content"]
    assert [part["type"] for part in content] == ["image", "text"]

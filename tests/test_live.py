"""The live view on an emulated terminal: its text, its styles, and the text that stays at the end."""

import sys
from collections.abc import Iterable, Sequence

import numpy as np
import pytest
from numpy.typing import ArrayLike

from mlx_diffgemma.cli.live import (
    SETTLED,
    TAKEN_BACK,
    UNSETTLED,
    LiveView,
    Settling,
    live_console,
    pieces,
    printable,
)
from mlx_diffgemma.sampler import Block, Draft
from mlx_diffgemma.writing import Content, Generation, Statistics
from support.screen import Screen

DIM, TAKEN = "2", "4;33"  # SGR parameters of unsettled text, and of text that was taken back
WORDS = [
    "The ",
    "sky ",
    "is ",
    "blue",
    ".",
    "\n",
    "日本語",
    "🙂",
    "e\u0301",
    "\t",
    "",
    "\x1b[2J",
    "\x9b31m",
    "\r",
    "\x07",
    "한국 ",
]
END = 10  # its text is empty


def decode(ids: Iterable[int]) -> str:
    return "".join(WORDS[token] for token in ids)


def utf8(ids: Iterable[int]) -> bytes:
    return decode(ids).encode()


def draft(step: int, tokens: Sequence[int], accepted: ArrayLike = (), block: int = 0) -> Draft:
    """A draft. ``accepted`` lists positions with entropy 0; all others have entropy 2."""
    mask = np.isin(np.arange(len(tokens)), accepted)
    argmax = np.array(tokens, np.int32)
    entropy = np.where(mask, 0.0, 2.0).astype(np.float32)
    return Draft(block, step, 0.7, argmax, argmax, entropy, mask, False, 0.1)


def block(index: int, tokens: Sequence[int], steps: int = 1) -> Block:
    return Block(index, np.array(tokens, np.int32), steps, False, 0.1, 0.1)


def commit(show: LiveView, index: int, tokens: Sequence[int]) -> None:
    """Show a block and the text that it makes certain, in the order of a model's stream."""
    show(block(index, tokens))
    show(Content(decode(tokens)))


def generation(tokens: Sequence[int]) -> Generation:
    return Generation(decode(tokens), list(tokens), "length", 0, Statistics(1, len(tokens), (1,), 0.1, 0.1))


def view(screen: Screen, max_new_tokens: int = 1000) -> LiveView:
    return LiveView(screen.console(), utf8, max_new_tokens)


def test_states() -> None:
    settling = Settling()
    steps = [
        draft(1, [0, 1, 2, 3], accepted=[0, 1, 2]),
        draft(2, [0, 4, 2, 3], accepted=[0]),
        draft(3, [0, 4, 3, 3], accepted=[0, 1, 2]),
        draft(4, [0, 4, 3, 3], accepted=[0, 1]),
    ]
    expected = [
        [UNSETTLED, UNSETTLED, UNSETTLED, UNSETTLED],  # no earlier step to compare with
        [SETTLED, TAKEN_BACK, UNSETTLED, UNSETTLED],  # 1: a different token; 2: the same token, but not accepted
        [SETTLED, TAKEN_BACK, TAKEN_BACK, UNSETTLED],  # a different token is accepted
        [SETTLED, SETTLED, UNSETTLED, UNSETTLED],
    ]
    states = [settling.update(each).tolist() for each in steps]
    assert states == expected
    assert settling.taken_back.tolist() == [False, True, True, False]
    assert settling.update(draft(1, [3, 3, 3, 3], block=1)).tolist() == [UNSETTLED] * 4, "the next block remembers the last"
    assert not settling.taken_back.any()


def test_styles_of_the_canvas() -> None:
    screen = Screen(80, 24)
    with view(screen) as show:
        show(draft(1, [0, 1, 2, 3], accepted=[0, 1]))
        show(draft(2, [0, 4, 2, 3], accepted=[0]))
        assert screen.lines == ["The .is blue", "block 1  step 2  entropy 1.500  temperature 0.70  tokens per forward 0.5"]
        assert screen.styled("") == "The "
        assert screen.styled(TAKEN) == "."
        assert screen.styled(DIM) == "is blue"


def test_without_colour_the_states_still_differ() -> None:
    screen = Screen(80, 24)
    with LiveView(screen.console(no_color=True), utf8, 1000) as show:
        show(draft(1, [0, 1, 2], accepted=[0, 1]))
        show(draft(2, [0, 4, 2], accepted=[0]))
        assert (screen.styled(""), screen.styled("4"), screen.styled(DIM)) == (f"The {screen.lines[-1]}", ".", "is ")


def test_finished_text_stays_and_the_canvas_goes() -> None:
    screen = Screen(80, 24)
    with view(screen) as show:
        show(draft(1, [0, 1, 5, 2]))
        status = screen.lines[-1]
        commit(show, 0, [0, 1, 5, 2])
        assert screen.lines == ["The sky", "is", status], "the unfinished line is not shown"
        show(draft(1, [3, 4, 4, END], block=1))
        assert screen.lines[:2] == ["The sky", "is blue.."]
        assert screen.cursor_hidden
        commit(show, 1, [3, 4, END, END])
        show(generation([0, 1, 5, 2, 3, 4]))
        assert screen.lines == ["The sky", "is blue."]
    assert screen.lines == ["The sky", "is blue."]
    assert (screen.row, screen.column) == (2, 0), "the prompt would not begin on a fresh line"
    assert not screen.cursor_hidden
    assert screen.wraps


def test_only_what_is_certain_is_shown_and_only_tokens_before_the_limit_count() -> None:
    screen = Screen(80, 24)
    with view(screen, max_new_tokens=2) as show:
        show(draft(1, [0, 1, 5, 2, 5]))
        show(block(0, [0, 1, 5, 2, 5]))
        show(Content("The sky "))
        show(draft(1, [3, 3, 3, 3, 3], block=1))
        assert screen.lines[-1].endswith("tokens per forward 1.0"), "two tokens in two steps"
        show(generation([0, 1]))
    assert screen.lines == ["The sky"]


def test_only_tokens_with_text_count_as_written() -> None:
    screen = Screen(80, 24)
    with view(screen) as show:
        show(draft(1, [0, 1, END, END], accepted=[0, 1, 2, 3]))
        show(draft(2, [0, 1, END, END], accepted=[0, 1, 2, 3]))
        assert screen.lines[-1].endswith("tokens per forward 1.0")


@pytest.mark.parametrize("size", [(80, 24), (40, 12), (20, 3), (13, 5), (9, 2), (6, 1)])
def test_any_text_on_any_terminal(size: tuple[int, int]) -> None:
    """Random canvases of wide, combining and control characters: no row is too long, and nothing of the canvas remains."""
    screen, rng, tokens = Screen(*size), np.random.default_rng(0), []
    with view(screen) as show:
        for index in range(4):
            for step in range(1, 5):
                show(draft(step, rng.integers(0, len(WORDS), 24).tolist(), np.flatnonzero(rng.random(24) < 0.5), index))
                assert max(map(len, screen.rows)) <= size[0]
            written = rng.integers(0, len(WORDS), 24).tolist()
            tokens += written
            commit(show, index, written)
        show(generation(tokens))
    # The screen turns a tab into blanks, so blanks do not count here.
    expected = ["".join(line.split()) for line in printable(decode(tokens)).rstrip().split("\n")]
    assert ["".join(line.split()) for line in screen.lines] == expected


def test_wide_characters_keep_their_rows() -> None:
    screen = Screen(9, 12)
    with view(screen) as show:
        show(draft(1, [6, 6, 15, 7, 8]))
        assert screen.lines[:3] == ["日本語日", "本語한국", "🙂e\u0301"], "a wide character was split, or a row left unfilled"


def test_tabs_reach_their_stops_and_count_in_the_width() -> None:
    screen = Screen(20, 12)
    with view(screen) as show:
        show(draft(1, [0, 9, 3, 9, 3]))
        assert screen.lines[:2] == ["The     blue    blue", "block 1  step 1  en…"]
        show(draft(1, [0, 9, 3, 9, 3, 9, 4], block=1))
        assert screen.lines[:2] == ["The     blue    blue", "    ."]


def test_a_low_screen_shows_the_head_of_the_canvas() -> None:
    screen = Screen(20, 5)
    with view(screen) as show:
        commit(show, 0, [0, 1, 2, 3] * 6)  # 90 cells: an unfinished line that fills more than a screen
        show(draft(1, [4, 5] * 8, block=1))
        assert screen.lines[:4] == ["ky is blue.", ".", ".", "... 6 more rows"]
        assert len(screen.rows) == 5, "the screen has scrolled"


def test_resizing_leaves_nothing_behind() -> None:
    screen = Screen(60, 20)
    show = view(screen)
    tokens = [0, 1, 2, 3] * 8
    with show:
        commit(show, 0, [0, 5])
        for width, height in ((60, 20), (25, 20), (50, 20), (11, 20), (60, 20)):
            screen.resize(width, height, show.console)
            show(draft(1, tokens, block=1))
            text = [line for line in screen.lines if "block" not in line]
            assert "".join(text[1:]).replace(" ", "") == decode(tokens).replace(" ", ""), f"at {width} columns: {text}"
            assert text[0] == "The"
    assert screen.lines == ["The"]


def test_nothing_the_model_writes_is_obeyed() -> None:
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    shown = printable(every)
    assert len(shown) == len(every)
    left = {character for character in shown if ord(character) < 0x20 or 0x7F <= ord(character) < 0xA0}
    assert left == {"\n", "\t"}
    assert printable("\x1b]0;title\x07 \x9b2J \u202eabc\x7f") == "␛]0;title␇ \ufffd2J \ufffdabc␡"


def test_escape_sequences_are_shown_as_text() -> None:
    screen = Screen(80, 24)
    tokens = [0, 11, 12, 13, 14, 5]
    with view(screen) as show:
        show(draft(1, tokens))
        assert screen.lines[0] == "The ␛[2J\ufffd31m␍␇"
        commit(show, 0, tokens)
        show(generation(tokens))
    assert screen.lines == ["The ␛[2J\ufffd31m␍␇"]


def test_a_character_of_several_tokens_is_one_piece() -> None:
    tokens = list("aé日🙂".encode())
    assert [(run.start, run.stop, text) for run, text in pieces(tokens, bytes)] == [
        (0, 1, "a"),
        (1, 3, "é"),
        (3, 6, "日"),
        (6, 10, "🙂"),
    ]
    screen = Screen(80, 24)
    with LiveView(screen.console(), bytes, 100) as show:
        show(draft(1, tokens, accepted=[0, 4, 6]))
        show(draft(2, tokens, accepted=[0, 4, 6]))  # the second byte of 日 is settled, and the first of 🙂
        assert (screen.styled(""), screen.styled(DIM)) == ("a🙂", "é日")


def test_an_unfinished_character_at_the_end_is_shown() -> None:
    assert [text for _, text in pieces(list("a日".encode())[:-1], bytes)] == ["a", "\ufffd"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted(error: type[BaseException]) -> None:
    screen = Screen(80, 24)
    tokens = [0, 1, 5, 2, 11]
    events = [draft(1, [0, 1, 5, 2]), block(0, tokens), Content(decode(tokens)), draft(1, [3, 3, 3, 3], block=1)]

    def run() -> None:
        with view(screen) as show:
            for event in events:
                show(event)
            raise error

    with pytest.raises(error):
        run()
    assert screen.lines == ["The sky", "is ␛[2J"], "the finished text is kept, the canvas is not"
    assert (screen.row, screen.column) == (2, 0)
    assert not screen.cursor_hidden
    assert screen.wraps


class Terminal(Screen):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "environment", "live"),
    [
        (Terminal, {"TERM": "xterm-256color"}, True),
        (Terminal, {"TERM": "dumb"}, False),
        (Screen, {"TERM": "xterm-256color", "FORCE_COLOR": "1"}, False),
        (None, {}, False),
    ],
    ids=["terminal", "dumb", "piped", "closed"],
)
def test_where_it_is_live(
    monkeypatch: pytest.MonkeyPatch, stream: type[Screen] | None, environment: dict[str, str], live: bool
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", stream(80, 24) if stream else None)
    assert (live_console() is not None) == live


def test_it_is_not_live_where_unicode_cannot_be_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(Terminal, "encoding", "iso-8859-1")
    monkeypatch.setattr(sys, "stdout", Terminal(80, 24))
    assert live_console() is None


@pytest.mark.parametrize("width", [5, 8, 13, 40])
def test_rows_do_not_depend_on_how_the_text_came(width: int) -> None:
    """In parts, in a window of another width, or in the canvas: with wide and combining characters, and tabs to their stops."""
    rng = np.random.default_rng(width)
    for _ in range(40):
        canvas = rng.integers(0, len(WORDS), 6).tolist()
        finished = [token for token in rng.integers(0, len(WORDS), 12).tolist() if WORDS[token] != "\n"]  # it can be redrawn

        def shown(parts: Sequence[Sequence[int]], canvas: Sequence[int], before: int = width) -> list[str]:
            screen = Screen(before, 60)
            with view(screen) as show:
                for part in parts:
                    show(Content(decode(part)))
                screen.resize(width, 60, show.console)
                show(draft(1, canvas, block=1))
                *lines, _ = screen.lines
            return "\n".join(lines).rstrip().split("\n")

        whole = shown([[*finished, *canvas]], [END])
        assert shown([[token] for token in finished], canvas) == whole, f"in parts: {finished}, {canvas}"
        assert shown([finished], canvas, before=9) == whole, f"in another window: {finished}, {canvas}"


def test_finished_tokens_are_decoded_once() -> None:
    decoded: list[int] = []

    def counted(ids: Iterable[int]) -> bytes:
        decoded.extend(ids := list(ids))
        return utf8(ids)

    with LiveView(Screen(40, 12).console(), counted, 1000) as show:
        for index in range(20):
            for step in range(1, 4):
                before = len(decoded)
                show(draft(step, [0, 1, 2, 3], block=index))
                assert len(decoded) - before == 4, f"in block {index}"
            commit(show, index, [0, 1, 2, 3])


def test_a_character_that_crosses_a_block_counts_with_all_its_tokens() -> None:
    first, second = list("a🙂".encode())[:3], list("a🙂b".encode())[3:]
    screen = Screen(80, 24)
    with LiveView(screen.console(), bytes, 100) as show:
        for index, (tokens, count) in enumerate(((first, 3), (second, 6))):
            show(draft(1, tokens, block=2 * index))
            show(block(2 * index, tokens))
            show(draft(1, [0], block=2 * index + 1))
            assert screen.lines[-1].endswith(f"tokens per forward {count / (2 * index + 2):.1f}")

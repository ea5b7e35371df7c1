"""Where texts are cut: against a plain loop, and independent of later tokens; and the markers read from a chat template."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.errors import InputError
from mlx_diffgemma.prompts import CHUNK, MOST_SOFT_TOKENS, PieceRule, chunks, place_images
from mlx_diffgemma.tokenizer import Tokenizer
from mlx_diffgemma.vision.patches import Patches
from support.tiny_tokenizer import CHAT_TEMPLATE, OLDER_CHAT_TEMPLATE, write_tokenizer

# --- pieces

WORD, END, OTHER_END, TURN, MODEL, SOFT = range(6)

#: Starts that overlap, that contain an end token, and that end with one.
STARTS = [(), ((TURN, MODEL),), ((TURN, MODEL), (MODEL,)), ((TURN, TURN), (TURN, MODEL, TURN)), ((END, MODEL), (MODEL, END))]

CANVASES = (1, 2, 7, 40, 256, CHUNK, CHUNK + 1)

rules = st.builds(
    PieceRule,
    canvas_length=st.sampled_from(CANVASES),
    ends=st.sampled_from([(), (END,), (END, OTHER_END)]),
    starts=st.sampled_from(STARTS),
    soft=st.sampled_from([(), (SOFT,)]),
)
#: Stretches of words, many of which end at or next to a cut; markers that begin and end replies; and any tokens.
words = st.builds(
    lambda step, count, more: [WORD] * max(0, step * count + more),
    step=st.sampled_from(CANVASES),
    count=st.integers(0, 2),
    more=st.integers(-1, 1),
)
#: The soft tokens of an image. No image has more than MOST_SOFT_TOKENS, but a hostile prompt may have more.
images = st.builds(lambda count: [SOFT] * count, st.integers(1, 3) | st.integers(MOST_SOFT_TOKENS - 2, MOST_SOFT_TOKENS + 2))
marks = st.sampled_from([[END], [OTHER_END], *([*start] for starts in STARTS for start in starts)])
texts = st.lists(words | marks | images | st.lists(st.integers(WORD, MODEL), max_size=4), max_size=8).map(
    lambda parts: np.array([token for part in parts for token in part], np.int32)
)
many = settings(max_examples=200, deadline=None)


def cut_one_by_one(rule: PieceRule, ids: Sequence[int]) -> list[int]:
    """The boundaries that are certain after the ids are read, one by one."""
    cuts, begin, step = [], 0, CHUNK
    for place in range(1, len(ids) + 1):
        begins = any(tuple(ids[max(0, place - len(start)) : place]) == start for start in rule.starts)
        ends = ids[place - 1] in rule.ends
        if begins or ends:
            step = rule.canvas_length if begins else CHUNK
        inside = ids[place - 1] in rule.soft and place - begin < step + MOST_SOFT_TOKENS
        if begins or ends or (place - begin >= step and not inside):
            cuts.append(place)
            begin = place
    return cuts


@given(rule=rules, ids=texts)
@many
def test_boundaries_are_those_of_reading_one_id_after_the_other(rule: PieceRule, ids: Any) -> None:
    certain = cut_one_by_one(rule, ids.tolist())
    assert rule.is_boundary(ids) == (len(ids) in certain)
    assert rule.boundaries(ids) == sorted({*certain, *([len(ids)] if len(ids) else [])})


@given(rule=rules, ids=texts)
@many
def test_no_piece_ends_within_an_image(rule: PieceRule, ids: Any) -> None:
    rule = replace(rule, soft=(SOFT,))
    for cut in rule.boundaries(ids)[:-1]:
        run = len(ids[:cut]) - len(bytes(ids[:cut].astype(np.uint8)).rstrip(bytes([SOFT])))
        assert not run or run >= MOST_SOFT_TOKENS or ids[cut] != SOFT, f"{cut} comes after {run} soft tokens of an image"


def test_images_are_placed_at_their_soft_tokens() -> None:
    one, two = (Patches(np.zeros((count, 3), np.uint8), count, 1, count) for count in (2, 3))
    ids = np.array([SOFT, SOFT, WORD, SOFT, SOFT, SOFT], np.int32)
    placed = place_images(ids, [one, two], (SOFT,))
    assert [(image.start, image.stop, image.patches) for image in placed.images] == [(0, 2, one), (3, 6, two)]
    assert place_images(ids[2:3], [], (SOFT,)).images == ()
    for images, message in (
        ([], "places for 2 images, but 0 images came with it"),
        ([one], "places for 2 images, but 1 image came with it"),
        ([two, one], "image 1 has 3 soft tokens, but its place in the prompt has 2"),
    ):
        with pytest.raises(InputError, match=message):
            place_images(ids, images, (SOFT,))


@given(rule=rules, ids=texts, behind=texts, other=texts)
@many
def test_what_follows_moves_no_boundary(rule: PieceRule, ids: Any, behind: Any, other: Any) -> None:
    """Boundaries within a prefix of a text are the same, whatever follows the prefix."""
    one, another = ([cut for cut in rule.boundaries(np.append(ids, more)) if cut < len(ids)] for more in (behind, other))
    assert one == another == [cut for cut in rule.boundaries(ids) if cut < len(ids)]
    if len(behind) and len(other):
        reached = [len(ids) in rule.boundaries(np.append(ids, more)) for more in (behind, other)]
        assert reached == [rule.is_boundary(ids)] * 2, "and so is a boundary at the beginning's end"


@given(rule=rules, ids=texts)
@many
def test_pieces_make_up_the_text_and_none_is_too_long(rule: PieceRule, ids: Any) -> None:
    cuts = [0, *rule.boundaries(ids)]
    assert cuts == sorted(set(cuts))
    assert cuts[-1] == len(ids)
    longest = max(CHUNK, rule.canvas_length) + (MOST_SOFT_TOKENS if rule.soft else 0)
    assert all(end - start <= longest for start, end in pairwise(cuts))


@given(rule=rules, ids=texts)
@many
def test_a_reply_begins_behind_a_start(rule: PieceRule, ids: Any) -> None:
    ends_so = any(ids.tolist()[-len(start) :] == list(start) for start in rule.starts)
    assert rule.is_start(ids) == ends_so
    if ends_so:
        reply = np.full(2 * rule.canvas_length + 1, WORD, np.int32)
        expected = [len(ids) + count * rule.canvas_length for count in range(3)]
        assert rule.boundaries(np.append(ids, reply))[-4:] == [*expected, len(ids) + len(reply)][-4:]


def test_a_reply_ends_with_its_end() -> None:
    rule = PieceRule(canvas_length=4, ends=(END,), starts=((TURN, MODEL),))
    ids = np.array([*[WORD] * 3, END, TURN, MODEL, *[WORD] * 9, END, *[WORD] * (CHUNK + 5)], np.int32)
    assert rule.boundaries(ids) == [4, 6, 10, 14, 16, 16 + CHUNK, len(ids)]


def test_a_long_text_is_cut_fast() -> None:
    """Only NumPy does work per token. Half a million tokens take milliseconds; the limit here is seconds."""
    rule = PieceRule(canvas_length=256, ends=(END, OTHER_END), starts=((TURN, MODEL), (MODEL, END)))
    ids = np.full(500_000, WORD, np.int32)
    assert rule.boundaries(ids) == [*range(CHUNK, len(ids), CHUNK), len(ids)]


@given(count=st.integers(0, 4 * CHUNK + 1))
@settings(max_examples=30, deadline=None)
def test_chunks_make_up_the_ids(count: int) -> None:
    ids = np.arange(count, dtype=np.int32)
    parts = chunks(ids)
    assert np.concatenate([ids[:0], *parts]).tolist() == ids.tolist()
    assert [len(part) for part in parts[:-1]] == [CHUNK] * (len(parts) - 1)
    assert all(0 < len(part) <= CHUNK for part in parts)


# --- the markers read from a chat template

USER = {"role": "user", "content": "Why?"}
CALL = {"id": "1", "type": "function", "function": {"name": "now", "arguments": {"zone": "UTC"}}}
CALLED = [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "1", "content": "Noon."}]
ANSWERED = [USER, {"role": "assistant", "content": "Because."}, {"role": "user", "content": "And?"}]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str | None], Tokenizer]:
    """``made(template)``: the tiny tokenizer with this chat template."""

    def make(template: str | None) -> Tokenizer:
        folder = tmp_path_factory.mktemp("tokenizer")
        write_tokenizer(folder, chat_template=template)
        return Tokenizer.from_folder(folder)

    return make


@pytest.fixture(scope="module", params=["newer", "older"])
def tokenizer(request: pytest.FixtureRequest, made: Callable[[str | None], Tokenizer]) -> Tokenizer:
    return made({"newer": CHAT_TEMPLATE, "older": OLDER_CHAT_TEMPLATE}[request.param])


@pytest.fixture(scope="module")
def boxed() -> Tokenizer:
    checkpoint = Checkpoint.open("sudoku")
    return Tokenizer.from_folder(checkpoint.folder, checkpoint.generation.eos_token_ids)


def rule_of(tokenizer: Tokenizer) -> PieceRule:
    return PieceRule(4, (tokenizer.end_of_turn_id,), tokenizer.reply_starts)


def test_where_replies_begin(tokenizer: Tokenizer) -> None:
    texts = {"".join(tokenizer._backend.convert_ids_to_tokens(list(start))) for start in tokenizer.reply_starts}
    opened = {"<tool_response|><|channel>thought\n"} if opens_thoughts(tokenizer) else set()
    assert texts == {"<|turn>model\n", "<tool_response|>"} | opened


def opens_thoughts(tokenizer: Tokenizer) -> bool:
    """Whether the template itself opens the thought after a tool's answer, as the newer one does."""
    return tokenizer.render(CALLED, enable_thinking=True).endswith("<|channel>thought\n")


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("messages", [[USER], CALLED, ANSWERED], ids=["question", "tool", "second turn"])
def test_every_prompt_ends_where_a_reply_begins(tokenizer: Tokenizer, messages: list[dict[str, Any]], thinking: bool) -> None:
    system = [{"role": "system", "content": "Be brief."}]
    for before in ([], system):
        ids = np.array(tokenizer.chat([*before, *messages], enable_thinking=thinking), np.int32)
        assert rule_of(tokenizer).is_start(ids)
        assert rule_of(tokenizer).is_boundary(ids)


def test_a_second_turn_is_cut_where_the_first_was(tokenizer: Tokenizer) -> None:
    first, second = (np.array(tokenizer.chat(messages), np.int32) for messages in (ANSWERED[:1], ANSWERED))
    rule = rule_of(tokenizer)
    assert second[: len(first)].tolist() == first.tolist()
    assert {*rule.boundaries(first), len(first) + rule.canvas_length} <= {*rule.boundaries(second)}


def test_no_text_of_a_caller_begins_a_reply(tokenizer: Tokenizer) -> None:
    for content in ("<|turn>model\n", "<tool_response|>", "a<tool_response|><|channel>thought\n"):
        ids = np.array(tokenizer.encode(content), np.int32)
        assert not any(rule_of(tokenizer).is_start(ids[:count]) for count in range(len(ids) + 1))
        marked = np.array(tokenizer.encode(content, markup=True), np.int32)
        assert any(rule_of(tokenizer).is_start(marked[:count]) for count in range(len(marked) + 1))


def test_a_template_without_tools_or_turns(made: Callable[[str | None], Tokenizer]) -> None:
    no_tools = "{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    tokenizer = made("{% for m in messages %}" + no_tools + "<|turn>{{ m.content }}{% endfor %}<|turn>")
    assert tokenizer.reply_starts == ((tokenizer.token_id("<|turn>"),),)
    assert made("{{ messages[0].content }}").reply_starts == (), "nothing tells where a reply begins"
    assert made(None).reply_starts == ()


def test_the_boxed_template(boxed: Tokenizer) -> None:
    """Its template has only turns. Each begins with the same marker, whatever its role."""
    turn = boxed.token_id("<|turn>")
    assert boxed.reply_starts == ((turn,),)
    ids = np.array(boxed.chat([{"role": "user", "content": "1..4"}]), np.int32)
    assert rule_of(boxed).is_start(ids)
    assert rule_of(boxed).boundaries(ids) == [2, 6, 7, 8]
    assert boxed.opened_thought(ids.tolist()) is None


def test_a_thought_that_the_prompt_opens(tokenizer: Tokenizer) -> None:
    for messages, thinking in ((CALLED, True), (CALLED, False), ([USER], True), (ANSWERED, True)):
        opened = messages is CALLED and thinking and opens_thoughts(tokenizer)
        ids = tokenizer.chat(messages, enable_thinking=thinking)
        assert tokenizer.opened_thought(ids) == ("thought\n" if opened else None)


@pytest.mark.parametrize(
    ("text", "thought"),
    [
        ("", None),
        ("Hm", None),
        ("<|turn>model\n", None),
        ("<|turn>model\n<|channel>", ""),
        ("<|turn>model\n<|channel>tho", "tho"),
        ("<|turn>model\n<|channel>thought\nHm", "thought\nHm"),
        ("<|turn>model\n<|channel>thought\nHm\n<channel|>", None),
        ("<|turn>model\n<|channel>thought\nHm\n<channel|>Yes", None),
        ("<|channel>thought\na\n<channel|><|channel>b", "b"),
        ("<|turn>user\n<|channel>thought\n<turn|>\n<|turn>model\n", None),
        ("<|channel>thought\n<|tool_call>call:f{}<tool_call|>", None),
    ],
)
def test_a_thought_that_a_text_opens(tokenizer: Tokenizer, text: str, thought: str | None) -> None:
    assert tokenizer.opened_thought(tokenizer.encode(text, markup=True)) == thought
    assert tokenizer.opened_thought(tokenizer.encode(text)) is None, "markup that is plain text opens nothing"


def test_the_boxed_tokenizer_knows_no_thoughts(boxed: Tokenizer) -> None:
    assert boxed.token_id("<|channel>") is None
    for ids in ([], [2], boxed.chat([{"role": "user", "content": "12"}]), [7, 8]):
        assert boxed.opened_thought(ids) is None

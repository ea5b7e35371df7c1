"""The parts of replies: written by hand, rendered by both chat templates, and from arbitrary markup, cut anywhere."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_diffgemma.chat.markup import ReplyParser
from mlx_diffgemma.prompts import MARKERS
from mlx_diffgemma.tokenizer import Tokenizer
from mlx_diffgemma.writing import Content, Part, Reasoning, ToolCall
from support.tiny_tokenizer import CHAT_TEMPLATE, OLDER_CHAT_TEMPLATE, SPECIAL_TOKENS, write_tokenizer

USER = {"role": "user", "content": "Why?"}
#: The end of a prompt that opens a thought.
OPENED = "thought\n"
PARIS = ToolCall("get_weather", {"city": "Paris"})
CALL = '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>}<tool_call|>'
NESTED = "[" * 99 + "]" * 99

#: name: (text of the reply, its parts), optionally preceded by the part of a thought that is in the prompt.
REPLIES: dict[str, tuple] = {
    "nothing": ("", []),
    "white space": (" \n", []),
    "answer": ("  Because.\n\n<b>1 < 2</b> <|no marker|> \n", [Content("  Because.\n\n<b>1 < 2</b> <|no marker|> \n")]),
    "thought, answer": (
        "<|channel>thought\nHm.\n\nSo.\n<channel|>\n\nYes.\n",
        [Reasoning("Hm.\n\nSo."), Content("Yes.\n")],
    ),
    "newlines of a thought's own": ("<|channel>thought\n\n a \n\n<channel|>b", [Reasoning("\n a \n"), Content("b")]),
    "thought without a newline": ("<|channel>thought\nHm<channel|>Yes", [Reasoning("Hm"), Content("Yes")]),
    "empty thought": ("<|channel>thought\n<channel|>Yes", [Content("Yes")]),
    "empty thought without a newline": ("<|channel>thought<channel|> Yes", [Content("Yes")]),
    "nothing after the thought": ("<|channel>thought\nHm.\n<channel|>\n", [Reasoning("Hm.")]),
    "unclosed thought": ("<|channel>thought\nHm.\n", [Reasoning("Hm.\n")]),
    "unclosed heading": ("<|channel>thou", []),
    "another channel": ("<|channel>thorough\nHm<channel|>Yes", [Reasoning("thorough\nHm"), Content("Yes")]),
    "two thoughts": ("<|channel>thought\na\n<channel|>\n<|channel>thought\nb\n<channel|>c", [Reasoning("ab"), Content("c")]),
    "a thought within one": ("<|channel>thought\na\n<|channel>thought\nb\n<channel|>c", [Reasoning("ab"), Content("c")]),
    "open thought": ("Hm.\n<channel|>\nYes", [Reasoning("Hm."), Content("Yes")], OPENED),
    "open thought, empty": ("<channel|>Yes", [Content("Yes")], OPENED),
    "open thought, unclosed": ("Hm.", [Reasoning("Hm.")], OPENED),
    "open thought, some of it in the prompt": ("m.\n<channel|>Yes", [Reasoning("m."), Content("Yes")], OPENED + "H"),
    "open thought, heading cut": ("ght\nHm<channel|>", [Reasoning("Hm")], OPENED[:-4]),
    "open thought without a heading": ("thought\nHm<channel|>", [Reasoning("Hm")], ""),
    "open thought of another name": ("Hm<channel|>", [Reasoning("Hm")], "plan\n"),
    "call": (CALL, [PARIS]),
    "thought, call": (f"<|channel>thought\nHm.\n<channel|>\n{CALL}", [Reasoning("Hm."), PARIS]),
    "calls": (f"{CALL}\n<|tool_call>call:now{{}}<tool_call|> {CALL}\n", [PARIS, ToolCall("now", {}), PARIS]),
    "text around calls": (
        f"See:\n{CALL} and {CALL}\nDone.",
        [Content("See:\n"), PARIS, Content(" and "), PARIS, Content("\nDone.")],
    ),
    "call in a thought": (
        f"<|channel>thought\nHm.\n{CALL} So\n<channel|>\nYes",
        [Reasoning("Hm.\n"), PARIS, Reasoning(" So"), Content("Yes")],
    ),
    "strings": (
        '<|tool_call>call:f{s:<|"|>}{],:"\\" \\n \n\t\x01\x02 猫🦀<|"|>,t:<|"|><|"|>}<tool_call|>',
        [ToolCall("f", {"s": '}{],:"\\" \\n \n\t\x01\x02 猫🦀', "t": ""})],
    ),
    "markers in a string": (
        '<|tool_call>call:f{s:<|"|>}<tool_call|><|channel>thought\n<turn|><|tool_response><|"|>}<tool_call|>b',
        [ToolCall("f", {"s": "}<tool_call|><|channel>thought\n<turn|><|tool_response>"}), Content("b")],
    ),
    "keys": (
        '<|tool_call>call:my-f.2{a-b:1,c d:2,$é:3,<|"|>:,{<|"|>:4}<tool_call|>',
        [ToolCall("my-f.2", {"a-b": 1, "c d": 2, "$é": 3, ":,{": 4})],
    ),
    "values": (
        '<|tool_call>call:f{a:-1,b:2.5,c:1e+16,d:true,e:false,f:null,g:{},h:[],i:[{x:[1,<|"|>]<|"|>]},[]]}<tool_call|>',
        [
            ToolCall(
                "f",
                {"a": -1, "b": 2.5, "c": 1e16, "d": True, "e": False, "f": None, "g": {}, "h": [], "i": [{"x": [1, "]"]}, []]},
            )
        ],
    ),
    "the older template's values": (
        "<|tool_call>call:f{a:None,b:[True,False]}<tool_call|>",
        [ToolCall("f", {"a": None, "b": [True, False]})],
    ),
    "white space in a call": (
        '<|tool_call> call : f {\n  a : [ 1 , 2 , ] ,\n  b : <|"|> x <|"|> ,\n}\n<tool_call|>',
        [ToolCall("f", {"a": [1, 2], "b": " x "})],
    ),
    "deep call": (f"<|tool_call>call:f{{a:{NESTED}}}<tool_call|>", [ToolCall("f", {"a": json.loads(NESTED)})]),
    "too deep": ("<|tool_call>call:f{a:" + "[" * 5000, [Content("call:f{a:" + "[" * 5000)]),
    "no JSON": ("<|tool_call>call:f{a:1e999}<tool_call|>!", [Content("call:f{a:1e999}!")]),
    "an endless number": (f"<|tool_call>call:f{{a:{'9' * 5000}}}<tool_call|>", [Content(f"call:f{{a:{'9' * 5000}}}")]),
    "a long number": (f"<|tool_call>call:f{{a:{'9' * 400}}}<tool_call|>", [ToolCall("f", {"a": int("9" * 400)})]),
    "bare word": ("<|tool_call>call:f{city:Paris}<tool_call|>!", [Content("call:f{city:Paris}!")]),
    "no name": ("<|tool_call>call:{}<tool_call|>", [Content("call:{}")]),
    "no call": ("a <|tool_call>Hello.", [Content("a Hello.")]),
    "closed by another bracket": ("<|tool_call>call:f{a:[1}}<tool_call|>", [Content("call:f{a:[1}}")]),
    "text behind the arguments": ("<|tool_call>call:f{} g<tool_call|>", [Content("call:f{} g")]),
    "malformed, then well": (f"<|tool_call>call:f{{x}}<tool_call|>\n{CALL}", [Content("call:f{x}\n"), PARIS]),
    "unclosed string, then well": (f'<|tool_call>call:f{{x:<|"|>a}}<tool_call|>{CALL}', [Content("call:f{x:a}"), PARIS]),
    "unclosed call": ('<|tool_call>call:f{x:<|"|>a', [Content("call:f{x:a")]),
    "unclosed call, all but the marker": ("<|tool_call>call:f{}", [Content("call:f{}")]),
    "malformed in a thought": ("<|channel>thought\na\n<|tool_call>b\n<channel|>c", [Reasoning("a\nb"), Content("c")]),
    "a thought in a call": (
        "<|tool_call>call:f{<|channel>thought\na\n<channel|>b",
        [Content("call:f{"), Reasoning("a"), Content("b")],
    ),
    "stray markers": ('a<channel|>b<tool_call|>c<|"|>d<|think|>e<|tool>f<tool|>g<tool_response|>h', [Content("abcdefgh")]),
    "end of turn": (f"Yes.<turn|>\n<|turn>user\n{CALL}", [Content("Yes.")]),
    "end of turn in a thought": ("<|channel>thought\nHm.\n<turn|>Yes", [Reasoning("Hm.\n")]),
    "tool response": (f"{CALL}<|tool_response>response:get_weather{{}}", [PARIS]),
    "tool response in a call": ("<|tool_call>call:f{<|tool_response>a", [Content("call:f{")]),
    "a marker cut by the end": ("Yes <|chan", [Content("Yes <|chan")]),
    "the longest marker in pieces": ('<tool_response|<|"|>>a', [Content("<tool_response|a")]),
    "a marker in pieces": ('<|chan<|"|>nel>a', [Content("<|channela")]),
    "a marker in pieces around a thought": (
        "<|turn<|channel>thought\na<channel|>>>b",
        [Content("<|turn"), Reasoning("a"), Content("b")],
    ),
}


def merged(parts: list[Part]) -> list[Part]:
    """The parts, with neighbours of one kind joined."""
    result: list[Part] = []
    for part in parts:
        if result and not isinstance(part, ToolCall) and type(part) is type(result[-1]):
            part = type(part)(result.pop().text + part.text)  # noqa: PLW2901
        result.append(part)
    return result


def parse(pieces: list[str], thought: str | None = None) -> list[Part]:
    parser = ReplyParser(thought)
    parts = [part for piece in pieces for part in parser.feed(piece)] + parser.close()
    assert parser.feed("more") + parser.close() == []
    assert all(isinstance(part, ToolCall) or part.text for part in parts), f"an empty part in {parts}"
    for kind in (Reasoning, Content):
        text = "".join(part.text for part in parts if isinstance(part, kind))
        assert not [marker for marker in MARKERS if marker in text], f"a marker in {text!r}"
    return merged(parts)


def cut(text: str, places: list[int]) -> list[str]:
    ends = sorted(place % (len(text) + 1) for place in places)
    return [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]


@pytest.mark.parametrize("name", REPLIES)
def test_parts_of_a_reply_cut_anywhere(name):
    text, expected, thought = (*REPLIES[name], None)[:3]
    assert parse([text], thought) == expected
    assert parse(list(text), thought) == expected
    for place in range(min(len(text), 300)):
        assert parse(cut(text, [place]), thought) == expected, f"cut at {place}"


def test_parts_come_as_early_as_they_are_certain():
    parser = ReplyParser()
    pieces = [
        ("<|channel>tho", []),
        ("ught\nHm", [Reasoning("Hm")]),
        (".\n", [Reasoning(".")]),
        ("So\n\n<chan", [Reasoning("\nSo\n")]),
        ("nel|>\n\n", []),
        ("Yes, 1 <", [Content("Yes, 1 ")]),
        (" 2", [Content("< 2")]),
        ("<|tool_call>", []),
        ('call:get_weather{city:<|"|>Paris<|', []),
        ('"', []),
        ("|>}<tool_call|", []),
        ("> ", [PARIS]),
        ("<|tool_call>call:f{a,", [Content(" call:f{a,")]),  # a key cannot end with a comma
        ("<|tool_call>call:f{b:<|", []),
        ("turn>", [Content("call:f{b:")]),
        ("more", []),
    ]
    for text, expected in pieces:
        assert merged(parser.feed(text)) == expected, f"after {text!r}"
    assert parser.close() == []


def test_a_long_call_is_read_in_linear_time():
    # 40,000 pieces: reading the call again for each of them would take minutes
    text = "<|tool_call>call:f{a:[" + "1," * 20_000 + "]}<tool_call|>"
    assert parse(list(text)) == [ToolCall("f", {"a": [1] * 20_000})]


# --- replies rendered by the chat templates

characters = st.characters(exclude_categories=["Cs"])
plain = st.text(characters, max_size=12).filter(lambda text: not any(marker in text for marker in MARKERS))
with_markers = st.lists(plain | st.sampled_from([m for m in SPECIAL_TOKENS if m != '<|"|>']), max_size=4).map("".join)
keys = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<{}[],:"), max_size=8).map(str.strip).filter(bool)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | with_markers,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)
calls = st.builds(ToolCall, st.from_regex(r"[a-zA-Z0-9_-]{1,16}", fullmatch=True), st.dictionaries(keys, values, max_size=4))
places = st.lists(st.integers(0, 400), max_size=12)


@pytest.fixture(scope="module", params=["newer", "older"])
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_tokenizer(folder, chat_template={"newer": CHAT_TEMPLATE, "older": OLDER_CHAT_TEMPLATE}[request.param])
    return Tokenizer.from_folder(folder)


def message_of(parts: list[Part]) -> dict:
    """The assistant's message that the chat template turns into a reply of these parts."""
    functions = [{"name": part.name, "arguments": part.arguments} for part in parts if isinstance(part, ToolCall)]
    return {
        "role": "assistant",
        "reasoning_content": "".join(part.text for part in parts if isinstance(part, Reasoning)),
        "content": "".join(part.text for part in parts if isinstance(part, Content)),
        "tool_calls": [{"type": "function", "function": function} for function in functions],
    }


@given(reasoning=plain, called=st.lists(calls, max_size=3), content=plain.map(str.strip), places=places)
@settings(max_examples=150, deadline=None)
def test_what_the_template_writes_is_read_and_written_again(tokenizer, reasoning, called, content, places):
    written = [Reasoning(reasoning), *called, Content(content)]
    prompt = tokenizer.render([USER])
    whole = tokenizer.render([USER, message_of(written)], add_generation_prompt=False)
    assert whole.startswith(prompt)
    # The older template shows a thought only before a call.
    shown = called or tokenizer.render([USER, message_of([Reasoning("a")])], add_generation_prompt=False).count("<|channel>")
    expected = [part for part in written if isinstance(part, ToolCall) or (part.text and (shown or isinstance(part, Content)))]

    parts = parse(cut(whole.removeprefix(prompt), places), tokenizer.opened_thought(tokenizer.encode(prompt, markup=True)))
    as_json = [json.dumps(message_of(some), sort_keys=True) for some in (parts, expected)]  # distinguishes 1, 1.0 and True
    assert as_json[0] == as_json[1]
    assert [type(part) for part in parts] == [type(part) for part in expected]
    assert tokenizer.render([USER, message_of(parts)], add_generation_prompt=False) == whole


def test_a_prompt_that_ends_in_an_open_thought(tokenizer):
    call = {"id": "1", "type": "function", "function": {"name": "now", "arguments": {}}}
    answered = [USER, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "1", "content": "<|channel>"}]
    prompt = tokenizer.render(answered, enable_thinking=True)
    thought = tokenizer.opened_thought(tokenizer.chat(answered, enable_thinking=True))
    if prompt.endswith("<|channel>thought\n"):
        assert thought == OPENED
        assert parse(["Noon.\n<channel|>It is noon."], thought) == [Reasoning("Noon."), Content("It is noon.")]
    else:  # with the older template, the model opens it
        assert prompt.endswith("<tool_response|>")
        assert thought is None
        text = "<|channel>thought\nNoon.\n<channel|>It is noon."
        assert parse([text], thought) == [Reasoning("Noon."), Content("It is noon.")]


# --- arbitrary markup

fragments = [
    "call:f",
    "call:",
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "a",
    "1",
    "thought\n",
    "thou",
    "\n",
    " ",
    "<",
    "<|",
    "|>",
    ">",
    "nel>",
]
anything = st.lists(st.sampled_from([*MARKERS, *fragments, *(marker[:5] for marker in MARKERS)]), max_size=25).map("".join)


@given(text=anything, thought=st.sampled_from([None, "", "thou", OPENED, "thought\nHm"]), places=places)
@settings(max_examples=1500, deadline=None)
def test_no_markup_breaks_the_parser_or_leaks(text, thought, places):
    parts = parse([text], thought)
    assert parse(cut(text, places), thought) == parts
    json.dumps([part.arguments for part in parts if isinstance(part, ToolCall)], allow_nan=False)


def test_markers_are_those_of_the_vocabulary():
    assert {token for token in SPECIAL_TOKENS if "|" in token} == set(MARKERS)

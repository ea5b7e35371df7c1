"""Arguments of the wrong type: one line at the public entry, whatever the type. NumPy's numbers are numbers."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_diffgemma import (
    Conversation,
    DiffusionGemma,
    Hole,
    InputError,
    PrefixCache,
    Settled,
    infill,
    load,
    proofread,
    revise,
)
from support.checkpoints import make_chat_checkpoint

TEXT = "The sky is blue."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_checkpoint(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def model(folder: Path, backend_name: str) -> DiffusionGemma:
    return load(folder, backend=backend_name)


def numbers() -> Iterator[int]:
    yield from (1, 2, 3)


#: Values that are no text, no conversation and no token ids.
NO_PROMPTS = (
    *(
        b"Hi",
        bytearray(b"Hi"),
        5,
        5.0,
        True,
        {"role": "user", "content": "Hi"},
        {1, 2},
        object(),
        numbers(),
        iter([1]),
        Path("Hi"),
    ),
    *([1.0], ["Hi"], [[1, 2]], [1, "Hi"], [None], [True], [1, {"role": "user"}], np.array([[1, 2]]), np.array([1.0])),
    *(np.array(5), np.array(["Hi"]), np.array([{}], object), (1, b"2"), memoryview(b"Hi"), float("nan"), Path, lambda: 5),
)
#: Values that are no string, no number and no truth value.
NOTHING = (b"x", object(), [1], {"a": 1}, np.array([1, 2]), {1})
NO_STRINGS = (5, 1.5, True, *NOTHING)
NO_INTEGERS = ("5", 1.5, True, np.float64(2), np.bool_(True), float("nan"), *NOTHING)
NO_FLAGS = ("yes", 0, 1, np.int64(1), float("nan"), *NOTHING)
NO_STOPS = ("a", ["a", 5], [b"a"], 5, {"a"}, {"a": 1}, [["a"]], [None], True)

Call = Callable[..., Any]


def calls(model: DiffusionGemma) -> dict[str, tuple[Call, dict[str, tuple[Any, ...]]]]:
    """Public functions, and for each of their arguments values of wrong types."""
    prompting = {"system": NO_STRINGS, "raw": NO_FLAGS, "markup": NO_FLAGS}
    seeded = {**prompting, "seed": (*NO_INTEGERS, -1, 2**64)}
    denoising: dict[str, tuple[Any, ...]] = {
        **dict.fromkeys(("max_denoising_steps", "stability_threshold", "canvas_length", "pad_token_id"), NO_INTEGERS),
        **dict.fromkeys(("t_min", "t_max", "entropy_bound", "confidence_threshold"), ("1", True, float("nan"), np.nan, *NOTHING)),
        "greedy": NO_FLAGS,
        "preset": (*NO_STRINGS, "", "turbo", "x" * 10**6),
        "eos_token_ids": (5, "1", ["1"], [1.5], {1}, b"1", [[1]], [None], np.array([1.5])),
    }
    templates = (b"x", 5, [5], [b"x"], [Hole(), None], {"x": 1}, object(), True)
    causal = {"temperature": ("1", True, float("nan"), *NOTHING), "top_k": NO_INTEGERS, "top_p": ("1", True, *NOTHING)}
    arrays = (5, "x", [1.5], [[1]], [None], [2**31], np.array([2**32 + 5]), np.array([1.5]), {1}, b"x", [True])
    prompts = {"prompt": (None, *NO_PROMPTS)}
    written = {"stop": NO_STOPS, "logprobs": NO_FLAGS, "settled": (True, 5, "x", {}), "mode": (*NO_STRINGS, "sideways")}
    return {
        "generate": (
            lambda **given: model.generate(**{"prompt": [3], "max_new_tokens": 2, **given}),
            {
                **prompts,
                **(seeded | {name: values for name, values in written.items() if name != "settled"}),
                **denoising,
                "max_new_tokens": (*NO_INTEGERS, 0),
                "frozen": arrays,
                "canvas": arrays,
            },
        ),
        "stream": (
            lambda **given: model.stream(**{"prompt": [3], **given}),
            {**prompts, **seeded, **written},
        ),
        "stream causal": (lambda **given: model.stream([3], mode="causal", **given), causal),
        "score": (
            lambda **given: model.score(**{"text": [3], **given}),
            {"text": NO_PROMPTS, "prompt": NO_PROMPTS, **prompting},
        ),
        "prompt_ids": (
            lambda **given: model.prompt_ids(**{"prompt": [3], **given}),
            {**prompts, **prompting},
        ),
        "infill": (
            lambda **given: infill(**{"model": model, "template": "a <hole:2>", **given}),
            {
                "model": (5, "sudoku", None, model.backend),
                "template": templates,
                "marker": (*NO_STRINGS, None),
                "prompt": NO_PROMPTS,
                "batch": (*NO_STRINGS, None, "slow"),
                **seeded,
                **denoising,
            },
        ),
        "revise": (
            lambda **given: revise(**{"model": model, "text": TEXT, "strength": 0.5, **given}),
            {
                "model": (5, "sudoku", None),
                "text": (None, *NO_STRINGS, [3]),
                "strength": ("0.5", None, True, float("nan"), 2, -1, *NOTHING),
                "keep": (5, "ab", [5], [(1,)], [(1, 2, 3)], [("a", "b")], [(1.0, 2.0)], {(1, 2)}, [None], [(True, 5)]),
                "prompt": NO_PROMPTS,
                **seeded,
                **denoising,
            },
        ),
        "proofread": (
            lambda **given: proofread(**{"model": model, "text": TEXT, **given}),
            {
                "model": (5, "sudoku", None),
                "text": (None, *NO_STRINGS, [3]),
                "canvas_length": NO_INTEGERS,
                "prompt": NO_PROMPTS,
                **prompting,
            },
        ),
        "Conversation": (
            lambda **given: Conversation(**{"model": model, **given}),
            {
                "model": (5, "sudoku", None),
                "system": NO_STRINGS,
                "thinking": (*NO_FLAGS, None),
                "tools": (5, "x", {"a": 1}, [5], ["x"]),
                "kept": (5, {}, True, PrefixCache),
            },
        ),
        "send": (
            lambda **given: list(Conversation(model).send(**{"message": "Hi", "max_new_tokens": 2, **given})),
            {
                "message": (None, b"Hi", 5, 5.0, True, ["Hi"], [5], {1}, numbers(), "", " ", {}, {"content": "Hi"}),
                "seed": (*NO_INTEGERS, -1),
                "stopping": (5, "x", []),
                **written,
                **denoising,
            },
        ),
        "save": (lambda **given: Conversation(model).save(**given), {"file": (5, None, b"x", [], True)}),
        "load a conversation": (lambda **given: Conversation.load(model, **given), {"file": (5, None, b"x", [], True)}),
        "load": (
            lambda **given: load(**{"source": "sudoku", **given}),
            {
                "source": (5, None, b"sudoku", ["sudoku"], True),
                **dict.fromkeys(("revision", "backend", "device", "dtype"), NO_STRINGS),
                "force": (*NO_FLAGS, None),
            },
        ),
        "Settled": (Settled, {"steps": (None, *NO_INTEGERS, 0), "entropy": (None, "1", True, float("nan"), 0, *NOTHING)}),
        "token_id": (model.tokenizer.token_id, {"text": (None, *NO_STRINGS)}),
        "encode": (
            lambda **given: model.tokenizer.encode(**{"text": "1", **given}),
            {"text": (None, *NO_STRINGS), "markup": (*NO_FLAGS, None)},
        ),
        "decode": (
            lambda **given: model.tokenizer.decode(**{"ids": [3], **given}),
            {"ids": (None, 5, "3", b"3", ["3"], [1.5], [None], [[3]], {3: 4}), "final": (*NO_FLAGS, None)},
        ),
        "spans": (
            lambda **given: model.tokenizer.spans(**{"ids": [3], "text": "1", **given}),
            {"ids": (None, 5, "3", b"3", ["3"], [1.5], [None], {3: 4}), "text": (None, *NO_STRINGS)},
        ),
        "chat": (
            lambda **given: model.tokenizer.chat(**{"messages": [{"role": "user", "content": "1"}], **given}),
            {"messages": (None, *NO_PROMPTS), "tools": (5, "x", {"a": 1}, [5], ["x"])},
        ),
        "Hole": (Hole, {"least": (None, *NO_INTEGERS, 0), "most": (None, *NO_INTEGERS, 0)}),
    }


FUNCTIONS = (
    *("generate", "stream", "stream causal", "score", "prompt_ids", "infill", "revise", "proofread", "Conversation", "send"),
    *("save", "load a conversation", "load", "Settled", "Hole", "token_id", "encode", "decode", "spans", "chat"),
)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_wrong_type_is_one_line(function: str, model: DiffusionGemma) -> None:
    assert set(calls(model)) == set(FUNCTIONS)
    call, arguments = calls(model)[function]
    for name, values in arguments.items():
        for value in values:
            print(f"{function}({name}={value!r})")
            with pytest.raises(InputError) as error:
                call(**{name: value})
            assert "\n" not in str(error.value)
            assert len(str(error.value)) < 300, error.value


def test_the_line_says_what_is_wrong(model: DiffusionGemma) -> None:
    for call, line in (
        (lambda: model.generate(b"Hi"), "prompt must be a string or a list of mappings or a list of integers, got b'Hi'"),  # type: ignore[arg-type]
        (lambda: model.generate([3], stop="\n"), r"stop must be a list of strings, got '\n'"),
        (lambda: model.generate([3], seed="1"), "seed must be an integer, got '1'"),  # type: ignore[arg-type]
        (lambda: model.generate([3], raw=1), "raw must be True or False, got 1"),  # type: ignore[arg-type]
        (lambda: infill(model, [5]), "template must be a string or a list of strings and Holes, got [5]"),  # type: ignore[list-item]
        (lambda: proofread("x", "y"), "model must be a DiffusionGemma, got 'x'"),  # type: ignore[arg-type]
        (lambda: revise(model, TEXT, 1, keep=[(1, "2")]), "keep must be a list of tuples of 2 integers, got [(1, '2')]"),  # type: ignore[list-item]
        (lambda: load(5), "source must be a string or a path, got 5"),  # type: ignore[arg-type]
    ):
        with pytest.raises(InputError) as error:
            call()
        assert str(error.value) == line.replace(r"\n", "\\n")


def test_numbers_of_numpy_are_numbers(model: DiffusionGemma) -> None:
    ids = model.prompt_ids(TEXT)
    both: tuple[dict[str, Any], ...] = (
        {"seed": 5, "max_new_tokens": 9, "t_max": 0.75, "greedy": True, "eos_token_ids": (1, 106), "stop": ["x"]},
        {"mode": "causal", "seed": 5, "max_new_tokens": 9, "temperature": 0.5, "top_k": 4, "top_p": 0.75, "logprobs": True},
    )
    for options in both:
        numpy = {name: _numpy(value) for name, value in options.items()}
        expected = model.generate(TEXT, **options)
        prompts: tuple[Any, ...] = (np.str_(TEXT), ids, ids.astype(np.uint64), ids.tolist(), tuple(ids), list(ids))
        for prompt in prompts:
            assert model.generate(prompt, **numpy).tokens == expected.tokens
    assert type(model.generate([3], seed=np.uint64(5), max_new_tokens=np.int8(1)).seed) is int  # type: ignore[arg-type]
    tokens = model.generate([3], seed=1, frozen=np.array([7, -1], np.int64), canvas=[4, 4], max_new_tokens=2).tokens  # type: ignore[arg-type]
    assert tokens[0] == 7
    assert revise(model, TEXT, np.float32(0), keep=np.array([[0, 2]])).text == TEXT  # type: ignore[arg-type]
    assert Hole(np.int64(2), np.int32(3)) == Hole(2, 3)  # type: ignore[arg-type]
    assert Settled(np.int64(2), np.float32(0.5)) == Settled(2, 0.5)  # type: ignore[arg-type]
    assert model.score(ids, np.array([3])).tokens == ids.tolist()  # type: ignore[arg-type]


def _numpy(value: Any) -> Any:
    kinds: dict[type, Callable[[Any], Any]] = {int: np.int64, float: np.float64, bool: np.bool_, tuple: np.array, str: np.str_}
    return kinds.get(type(value), lambda same: same)(value)


def test_paths_are_paths(model: DiffusionGemma, tmp_path: Path) -> None:
    conversation = Conversation(model, system="Be brief.")
    for file in (tmp_path / "one", str(tmp_path / "two"), os.fspath(tmp_path / "three")):
        conversation.save(file)  # type: ignore[arg-type]
        assert Conversation.load(model, file).system == "Be brief."  # type: ignore[arg-type]


def test_unknown_names_are_named(model: DiffusionGemma) -> None:
    for call in (model.generate, model.stream):
        with pytest.raises(InputError, match=r"unknown option 'max_new_token'; did you mean max_new_tokens\?"):
            call([3], max_new_token=5)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'heat'"):
        proofread(model, TEXT, heat=5)  # type: ignore[call-arg]


# --- a process that was forked ---

_FORKED = """
import os, signal, sys
from mlx_diffgemma import BackendError, Conversation, load, proofread

model = load(sys.argv[1], backend=sys.argv[2])
event = next(events := model.stream([3], seed=0, max_new_tokens=20))
assert model.generate([3], seed=0, max_new_tokens=2).tokens
child = os.fork()
if not child:
    signal.alarm(60)
    told = 0
    for use in (
        lambda: model.generate([3]),
        lambda: model.generate([3], mode="causal"),
        lambda: model.score([3]),
        lambda: proofread(model, "Hi"),
        lambda: list(Conversation(model).send("Hi")),
        lambda: list(events),
        lambda: model.backend.next_logits([model.backend.new_cache()]),
        lambda: load(sys.argv[1], backend=sys.argv[2]),
    ):
        try:
            use()
        except BackendError as error:
            print(error, flush=True)
            told += 1
    os._exit(told)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
list(events)
"""


@pytest.mark.filterwarnings("ignore:This process")
def test_a_forked_child_says_so(folder: Path, backend_name: str) -> None:
    """A framework's threads are not in the child, where its first computation would wait for them for ever."""
    command = [sys.executable, "-W", "ignore", "-c", _FORKED, str(folder), backend_name]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    *lines, count = result.stdout.splitlines()
    assert count == "8", result.stdout
    assert set(lines) == {
        "this process was forked from one that had loaded a model, and lacks that one's threads; start it with multiprocessing's "
        '"spawn" method instead, and load the model in the new process'
    }


_SPAWNED = """
import multiprocessing, sys
from mlx_diffgemma import load

def write(folder, backend):
    print(len(load(folder, backend=backend).generate([3], seed=0, max_new_tokens=2).tokens), flush=True)

if __name__ == "__main__":
    write(*sys.argv[1:])
    child = multiprocessing.get_context("spawn").Process(target=write, args=sys.argv[1:])
    child.start()
    child.join(60)
    assert child.exitcode == 0
"""


def test_the_advice_for_a_forked_child_works(folder: Path, backend_name: str, tmp_path: Path) -> None:
    (tmp_path / "spawned.py").write_text(_SPAWNED)
    command = [sys.executable, str(tmp_path / "spawned.py"), str(folder), backend_name]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    one, other = result.stdout.split()
    assert one == other

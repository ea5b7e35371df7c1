"""Damaged configurations, tokenizers and chat templates: each is opened as a user would.

It must be refused with one line, or work where the damaged value still means something, and nothing else.
"""

import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from fuzz.bad_templates import HARMFUL, HARMLESS
from fuzz.opening import Opened, opener
from support.checkpoints import make_chat_checkpoint

#: The most memory that opening a checkpoint may take.
MEGABYTES = 2000
#: The longest line of a refusal. Some name many tensors.
_LONGEST = 20_000


@dataclass(frozen=True)
class Damage:
    """One damage to a checkpoint's folder.

    Attributes:
        name: what it is, for messages.
        harm: changes the folder.
        expected: ``refused``, ``works``, or ``either`` if the damage leaves something that a reader may make sense of.
    """

    name: str
    harm: Callable[[Path], object]
    expected: str


def run(seed: int, count: int | None, seconds: float) -> "Counter[str]":
    """Open ``count`` damaged checkpoints (None: all, or as many as ``seconds`` allow), all different. Print the failures.

    Returns counts: cases, failures, and how they ended: works, refused, CRASH, HANG, MEMORY, wrong success, wrong refusal.
    """
    counts: Counter[str] = Counter(cases=0, failures=0)
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as scratch, opener() as opening:
        base, case = make_chat_checkpoint(Path(scratch) / "base"), Path(scratch) / "case"
        every = list(damages(base))
        assert len({damage.name for damage in every}) == len(every)
        sound = opening.open(base, "torch")
        assert sound.kind == "works", sound
        for damage in Random(seed).sample(every, len(every))[:count]:
            if time.monotonic() > deadline:
                break
            shutil.copytree(base, case)
            try:
                damage.harm(case)
                opened = opening.open(case, "torch")
            finally:
                shutil.rmtree(case)
            verdict = _judge(opened, damage)
            counts["cases"] += 1
            counts[verdict] += 1
            if verdict not in ("works", "refused"):
                counts["failures"] += 1
                print(f"configs: {damage.name}: {verdict}: {opened.message[:300]!r}", file=sys.stderr)
    return counts


def _judge(opened: Opened, damage: Damage) -> str:
    if opened.megabytes > MEGABYTES:
        return "MEMORY"
    if opened.kind == "refused":
        plain = opened.message.isprintable() and len(opened.message) <= _LONGEST
        return "refused" if plain and damage.expected != "works" else "wrong refusal"
    if opened.kind == "works":
        return "wrong success" if damage.expected == "refused" else "works"
    return opened.kind


def damages(base: Path) -> Iterator[Damage]:
    """All damages, in an order that does not change."""
    yield from _values(base / "config.json")
    yield from _values(base / "generation_config.json")
    yield from _values(base / "tokenizer_config.json")
    yield from _moved(base)
    yield from _tokenizers(base)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja"):
        yield from _files(base, name)
    for name in ("added_tokens.json", "special_tokens_map.json", "tokenizer.model", "additional_chat_templates/tool_use.jinja"):
        yield from _files(base, name)
    for expected, templates in (("refused", HARMFUL), ("works", HARMLESS)):
        for name, template in templates.items():
            yield Damage(f"template: {name}", _writes("chat_template.jinja", template.encode()), expected)
    for name in ("doubled text with ~", "output", "macro exponential", "lone surrogate", "raised escape"):
        harm = _edits("tokenizer_config.json", ("chat_template",), HARMFUL[name])
        yield Damage(f"template in tokenizer_config.json: {name}", lambda f, harm=harm: (harm(f), _no_template(f)), "refused")


# --- values of the JSON files

_POISON: list[Any] = [
    *(None, True, False, 0, -1, 1.5, -0.5, 3, 2**31, 2**63, 10**12, 10**30, -(10**30), 10**400),
    *(1e308, -1e308, 1e-320, float("nan"), float("inf"), float("-inf")),
    *("", "x", "8", "0x10", "\x1b[2J\u202e\n", "é" * 5000, "x" * 10**6),
    *([], [1], [[1]], [{"a": 1}], ["x", None], list(range(3000)), {}, {"a": 1}, {"x" * 5000: 1}),
]

#: What of the poison still means something, by the name of the field. Fields that nobody reads take anything.
_NOTHING: frozenset[str] = frozenset()
_STRICT = """
model_type text_config canvas_length head_dim hidden_size hidden_activation intermediate_size layer_types rms_norm_eps rope_theta
max_position_embeddings moe_intermediate_size num_attention_heads num_experts num_hidden_layers num_key_value_heads rope_type
vocab_size rope_parameters full_attention sliding_attention sliding_window partial_rotary_factor top_k_experts
"""
_SENSIBLE: dict[str, frozenset[str]] = {
    **dict.fromkeys(_STRICT.split(), _NOTHING),
    "top_k_experts": frozenset({"3"}),
    "sliding_window": frozenset({"3"}),
    "canvas_length": frozenset({"3"}),
    "rope_theta": frozenset({"3", "1.5", str(2**31), str(10**12)}),
    "partial_rotary_factor": frozenset({"0", "1e-320"}),
    "per_layer_config": frozenset({"None", "{}"}),
    "tie_word_embeddings": frozenset({"None", "True"}),
    "attention_bias": frozenset({"None", "False"}),
    "use_bidirectional_attention": frozenset({"None"}),
    "image_token_id": frozenset({"None", "0", "3"}),
    # generation_config.json: null means the default
    "max_new_tokens": frozenset({"None", "3"}),
    "max_denoising_steps": frozenset({"None", "3"}),
    "stability_threshold": frozenset({"None", "0", "3"}),
    "confidence_threshold": frozenset({"None", "0", "3", "1.5", "1e-320"}),
    "entropy_bound": frozenset({"None", "0", "3", "1.5", "1e-320"}),
    "t_min": frozenset({"None", "0", "1e-320"}),
    "t_max": frozenset({"None", "3", "1.5"}),
    "pad_token_id": frozenset({"None", "0", "3"}),
    "eos_token_id": frozenset({"None", "0", "3", "[]", "[1]"}),
    "sampler_config": frozenset({"None", *map(repr, ({}, {"a": 1}, {"x" * 5000: 1}))}),
}
#: Fields that may be missing.
_OPTIONAL = {"tie_word_embeddings", "attention_bias", "use_bidirectional_attention", "hidden_activation", "image_token_id"}
_OPTIONAL |= {"partial_rotary_factor", "per_layer_config"}


def _values(file: Path) -> Iterator[Damage]:
    """Each field of a JSON file replaced by each poison, and removed."""
    content = json.loads(file.read_text())
    for path in _paths(content):
        name = path[-1] if isinstance(path[-1], str) and not path[-1].isdigit() else str(path[-2])
        where = f"{file.name} {'.'.join(map(str, path))}"
        read = file.name == "generation_config.json" or (file.name == "config.json" and path[:-1] != ("text_config",))
        read = (read or file.name == "config.json") and name in _SENSIBLE and not _is_unread(file.name, path)
        for value in _POISON:
            text = repr(value)
            expected = "either" if not read or text in _SENSIBLE[name] else "refused"
            yield Damage(f"{where} = {_short(text)}", _edits(file.name, path, value), expected)
        needed = read and file.name == "config.json" and name not in _OPTIONAL
        yield Damage(f"{where} is removed", _edits(file.name, path, ...), "refused" if needed else "either")


def _is_unread(file: str, path: tuple[Any, ...]) -> bool:
    """Whether a field that has the name of one that is read is another one. Of the vision tower, only crashes are looked for."""
    own = {"model_type", "canvas_length", "image_token_id", "text_config"}
    if file == "generation_config.json":
        return False
    return (
        path[0] == "vision_config"
        or (len(path) == 1 and path[0] not in own)
        or (path[0] == "text_config" and path[-1] in {"model_type", *_GENERATION})
    )


_GENERATION = {"pad_token_id", "eos_token_id", "bos_token_id"}


def _paths(content: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        yield (*above, key)
        if isinstance(value, dict | list) and value:
            yield from _paths(value, (*above, key))


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:20]}... ({len(text)})"


def _edits(name: str, path: tuple[Any, ...], value: Any) -> Callable[[Path], object]:
    """Set a value in a JSON file; ``...`` removes it."""

    def edit(folder: Path) -> None:
        content = place = json.loads((folder / name).read_text())
        for key in path[:-1]:
            place = place[key]
        if value is ...:
            del place[path[-1]]
        else:
            place[path[-1]] = value
        (folder / name).write_text(json.dumps(content))

    return edit


def _moved(base: Path) -> Iterator[Damage]:
    """Values that fit each field and not each other, and values at places that the base does not have."""
    text = ("text_config",)
    for path, value in (
        ((*text, "top_k_experts"), 5),
        ((*text, "num_hidden_layers"), 3),
        ((*text, "layer_types"), ["full_attention", "sliding_attention"]),
        ((*text, "layer_types"), ["full_attention"] * 2),
        ((*text, "layer_types"), ["chunked_attention", "full_attention"]),
        ((*text, "per_layer_config"), {"1": {"head_dim": 10**9}}),
        ((*text, "per_layer_config"), {"1": {"head_dim": 33}}),
        ((*text, "per_layer_config"), {"1": {"num_key_value_heads": 0}}),
        ((*text, "per_layer_config"), {"1": 5}),
        ((*text, "head_dim"), 10**9),
        ((*text, "head_dim"), 15),
        ((*text, "num_experts"), 10**11),
        ((*text, "moe_intermediate_size"), 2**20),
        ((*text, "intermediate_size"), 2**20),
        ((*text, "hidden_size"), 2**16),
        ((*text, "vocab_size"), 2**22),
        ((*text, "vocab_size"), 511),
        ((*text, "max_position_embeddings"), 7),
        ((*text, "final_logit_softcapping"), None),
        ((*text, "final_logit_softcapping"), float("inf")),
        ((*text, "final_logit_softcapping"), 0),
        ((*text, "final_logit_softcapping"), -30),
        ((*text, "final_logit_softcapping"), 10**40),
        ((*text, "rms_norm_eps"), 10**40),
        ((*text, "rope_parameters", "full_attention", "rope_type"), "yarn"),
        ((*text, "rope_parameters", "sliding_attention", "partial_rotary_factor"), 0.5),
        (("canvas_length",), 513),
        (("quantization",), 5),
        (("quantization",), "x"),
        (("quantization",), [1]),
        (("quantization_config",), {"quant_method": "gptq"}),
        (("quantization_config",), {"quant_method": ["\x1b[2J"]}),
    ):
        yield Damage(f"config.json {'.'.join(path)} is {value}", _edits("config.json", path, value), "refused")
    yield Damage("more layers than can be", lambda f: _layers(f, 2000), "refused")
    yield Damage("many layers", lambda f: _layers(f, 1024), "refused")
    for value in ([], "x", 5, {"t_max": -1}, {"eos_token_id": {"a": 1}}, {"eos_token_id": [512]}, {"pad_token_id": 512}):
        harm = _edits("config.json", ("generation_config",), value)
        yield Damage(
            f"generation_config in config.json is {value}",
            lambda f, harm=harm: (harm(f), (f / "generation_config.json").unlink()),
            "refused",
        )
    for name, value in (
        ("t_min", 0.9),
        ("t_max", 0.1),
        ("eos_token_id", [1, 512]),
        ("eos_token_id", [1] * 5000),
        ("pad_token_id", 512),
    ):
        yield Damage(
            f"generation_config.json {name} is {_short(str(value))}", _edits("generation_config.json", (name,), value), "refused"
        )


def _layers(folder: Path, count: int) -> None:
    content = json.loads((folder / "config.json").read_text())
    content["text_config"] |= {"num_hidden_layers": count, "layer_types": ["full_attention"] * count}
    (folder / "config.json").write_text(json.dumps(content))


# --- tokenizers


def _tokenizers(base: Path) -> Iterator[Damage]:
    """Vocabularies that do not fit, and parts of ``tokenizer.json`` replaced by poison."""
    vocabulary = json.loads((base / "tokenizer.json").read_text())["model"]["vocab"]
    names = {number: name for name, number in vocabulary.items()}
    ordinary = next(name for number, name in names.items() if number > 450)
    for name, change in (
        ("an id twice", {ordinary: 300}),
        ("an id that is too large", {ordinary: 512}),
        ("a huge id", {ordinary: 2**32 - 1}),
        ("an id beyond 32 bits", {ordinary: 2**40}),
        ("a negative id", {ordinary: -1}),
        ("a fractional id", {ordinary: 1.5}),
        ("an id that is a text", {ordinary: "5"}),
        ("another token", {"\x1b[2Jnew": 512}),
        ("no pad", {"<pad>": ...}),
        ("a token less", {ordinary: ...}),
        ("pad at another place", {"<pad>": 300, names[300]: 0}),
    ):
        expected = "either" if name in ("no pad", "pad at another place") else "refused"  # the added tokens have it too
        yield Damage(f"tokenizer.json with {name}", lambda f, change=change: _vocabulary(f, change), expected)
    content = json.loads((base / "tokenizer.json").read_text())
    parts = [(key,) for key in content] + [("model", key) for key in content["model"]]
    parts += [("added_tokens", 0), ("decoder", "decoders"), ("model", "merges", 0), ("normalizer", "pattern")]
    parts += [("added_tokens", 0, key) for key in content["added_tokens"][0]]
    for path in parts:
        for value in (..., None, True, -1, 10**30, "x", [], {}, [[["x"]]], {"type": "x"}, "\x1b[2J"):
            yield Damage(
                f"tokenizer.json {'.'.join(map(str, path))} {'is removed' if value is ... else f'= {value!r}'}",
                _edits("tokenizer.json", path, value),
                "either",
            )
    for value in ({"x": 600}, {"x": -1}, {"x": "y"}, {"<x>": 512}):
        yield Damage(f"added_tokens.json is {value}", _writes("added_tokens.json", json.dumps(value).encode()), "either")
    name = "special_tokens_map.json"
    for value in ({"bos_token": "nowhere"}, {"bos_token": 5}, {"pad_token": {"content": "\x1b"}}, {"extra_special_tokens": 5}):
        yield Damage(f"{name} is {value}", _writes(name, json.dumps(value).encode()), "either")
    for value in (["../../etc/passwd"], ["tokenizer.5.json"], "x"):
        harm = _edits("tokenizer_config.json", ("fast_tokenizer_files",), value)
        yield Damage(f"fast_tokenizer_files {value}", harm, "refused")
    yield Damage("no tokenizer", lambda f: (f / "tokenizer.json").unlink(), "refused")
    yield Damage("no chat template", _no_template, "refused")
    yield Damage("no tokenizer_config.json", lambda f: (f / "tokenizer_config.json").unlink(), "works")
    yield Damage("no config.json", lambda f: (f / "config.json").unlink(), "refused")
    yield Damage("no generation_config.json", lambda f: (f / "generation_config.json").unlink(), "works")
    yield Damage("tokenizer.json as tokenizer.model", lambda f: (f / "tokenizer.json").rename(f / "tokenizer.model"), "refused")


def _vocabulary(folder: Path, change: dict[str, Any]) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"] | change
    content["model"]["vocab"] = {name: number for name, number in vocabulary.items() if number is not ...}
    merges = content["model"]["merges"]
    content["model"]["merges"] = [pair for pair in merges if {*pair, "".join(pair)} <= content["model"]["vocab"].keys()]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def _no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


# --- files


def _files(base: Path, name: str) -> Iterator[Damage]:
    """A file replaced by what is none, or is damaged as a whole."""
    known = (base / name).exists()
    content = (base / name).read_bytes() if known else b"{}"
    text = name.endswith(".jinja")
    deep = 100_000
    whole: dict[str, tuple[bytes, str]] = {
        "empty": (b"", "refused"),
        "blank": (b" \n" * 5, "refused"),
        "zeros": (bytes(len(content)), "refused"),
        "binary": (bytes(range(256)) * 20, "refused"),
        "not UTF-8": (content + b"\xff", "refused"),
        "UTF-16": (content.decode().encode("utf-16"), "refused"),
        "with a byte order mark": (b"\xef\xbb\xbf" + content, "works"),
        "with lines of Windows": (content.replace(b"\n", b"\r\n"), "works"),
        "a list": (b"[]", "refused"),
        "null": (b"null", "refused"),
        "a number": (b"5", "refused"),
        "a text": (b'"\\u001b[2J"', "refused"),
        "a deep list": (b"[" * deep + b"]" * deep, "refused"),
        "a deep object": (b'{"a":' * deep + b"1" + b"}" * deep, "refused"),
        "an object with a deep list": (b'{"a":' + b"[" * deep + b"]" * deep + b"}", "refused"),
        "unclosed": (b"[" * deep, "refused"),
        "a long number": (b'{"a": ' + b"9" * 10_000 + b"}", "refused"),
        "with a name twice": (content[:-1].rstrip().removesuffix(b"}") + b', "x": 1, "x": 2}', "refused"),
        "twice": (content + content, "refused"),
        **{f"cut at {share}": (content[: int(len(content) * share)], "refused") for share in (0.01, 0.3, 0.6, 0.9, 0.999)},
    }
    for what, (data, expected) in whole.items():
        exact = name.endswith("config.json") or (known and not text)
        yield Damage(f"{name} is {what}", _writes(name, data), expected if exact or (expected == "works" and known) else "either")
    for what, make in (
        ("a pipe", os.mkfifo),
        ("a folder", os.mkdir),
        ("a link to nothing", lambda path: os.symlink("nowhere", path)),
        ("a link to itself", lambda path: os.symlink(path, path)),
        ("a link to a device", lambda path: os.symlink("/dev/zero", path)),
    ):
        yield Damage(f"{name} is {what}", lambda f, make=make: make(_gone(f / name)), "refused")
    yield Damage(f"{name} is too large", lambda f: os.truncate(_made(f / name, content), 70 << 20), "refused")
    if known:
        yield Damage(f"{name} is a link to a file", lambda f: _linked(f / name), "works")


def _gone(file: Path) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    return file


def _writes(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: _made(folder / name, data)


def _made(file: Path, data: bytes) -> Path:
    _gone(file).write_bytes(data)
    return file


def _linked(file: Path) -> None:
    target = file.with_name(f"blob of {file.name}")
    file.rename(target)
    file.symlink_to(target.name)

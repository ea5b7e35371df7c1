"""The JSON files of a checkpoint as checked data: sizes, numbers, lists, and the files themselves."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_diffgemma.config import CausalConfig, GenerationConfig, ModelConfig
from mlx_diffgemma.errors import CheckpointError, DiffGemmaError, InputError, one_line
from mlx_diffgemma.files import MAX_JSON, read_json
from mlx_diffgemma.tokenizer_files import check_vocabulary, readable
from support.tiny_tokenizer import write_tokenizer

HUB = json.loads((Path(__file__).parent / "data" / "hub_bf16" / "config.json").read_text())
NO_INTEGERS: list[Any] = [1.5, 8.0, True, "8", None, [8], {"a": 8}, float("inf"), float("nan")]


def hub(**text: Any) -> dict[str, Any]:
    return {**HUB, "text_config": {**HUB["text_config"], **text}}


SIZES = {
    "vocab_size": 4_194_304,
    "hidden_size": 65_536,
    "intermediate_size": 1_048_576,
    "moe_intermediate_size": 1_048_576,
    "num_attention_heads": 4096,
    "num_experts": 65_536,
    "top_k_experts": 65_536,
    "sliding_window": 16_777_216,
    "max_position_embeddings": 16_777_216,
    "num_hidden_layers": 1024,
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_integers_within_bounds(name: str) -> None:
    for value in [*NO_INTEGERS, 0, -1, SIZES[name] + 1, 10**12, 10**30, 10**400]:
        with pytest.raises(CheckpointError) as refused:
            ModelConfig.from_dict(hub(**{name: value}))
        line = str(refused.value)
        assert line.startswith(f"config.json: {name} must be an integer from 1 to {SIZES[name]}, got "), line
        assert len(line) < 200


@pytest.mark.parametrize("value", [*NO_INTEGERS, 0, 4097])
def test_canvas_length(value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"^config\.json: canvas_length must be an integer from 1 to 4096, got "):
        ModelConfig.from_dict({**HUB, "canvas_length": value})


@pytest.mark.parametrize("name", ["head_dim", "num_key_value_heads", "global_head_dim", "num_global_key_value_heads"])
def test_sizes_of_layers(name: str) -> None:
    for value in (1.5, True, "8", 0, -2, 10**9, float("nan")):
        with pytest.raises(CheckpointError, match=rf"^config\.json: {name.replace('global_', '')} must be an integer from "):
            ModelConfig.from_dict(hub(**{name: value}))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"head_dim": 255}, "head_dim must be even, got 255"),
        ({"num_key_value_heads": 5}, "16 attention heads cannot share 5 key-value heads evenly"),
        ({"top_k_experts": 129}, "top_k_experts 129 exceeds num_experts 128"),
        ({"max_position_embeddings": 255}, "canvas_length 256 exceeds max_position_embeddings 255"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps must be a number from 1e-12 to 1, got inf"),
        ({"rms_norm_eps": 10**40}, "rms_norm_eps must be a number from 1e-12 to 1, got an integer of more than 38 digits"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a number from 1e-12 to 1, got '1e-6'"),
        ({"final_logit_softcapping": float("inf")}, "final_logit_softcapping must be a number from 0.001 to 1e+06, got inf"),
        ({"final_logit_softcapping": None}, "final_logit_softcapping must be a number from 0.001 to 1e+06, got None"),
        ({"layer_types": 5}, "layer_types must be a list, got 5"),
        ({"layer_types": ["full_attention"]}, "1 layer_types for 30 layers"),
        ({"layer_types": [["full_attention"]] * 30}, "layer type ['full_attention'] is not supported"),
        ({"rope_parameters": []}, "rope_parameters must be a JSON object, got []"),
        ({"rope_parameters": {"full_attention": 5, "sliding_attention": 5}}, "_attention must be a JSON object, got 5"),
        ({"per_layer_config": [1]}, "per_layer_config must be a JSON object, got [1]"),
        ({"per_layer_config": {"0": 5}}, "per_layer_config[0] must be a JSON object, got 5"),
        ({"attention_bias": "no"}, "attention_bias 'no' is not supported"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings 1 is not supported"),
        ({"hidden_activation": ["gelu"]}, "hidden_activation ['gelu'] is not supported"),
    ],
)
def test_what_does_not_fit(change: dict[str, Any], line: str) -> None:
    with pytest.raises(CheckpointError) as refused:
        ModelConfig.from_dict(hub(**change))
    assert str(refused.value).startswith("config.json: ")
    assert str(refused.value).endswith(line)


@pytest.mark.parametrize(
    ("full", "line"),
    [
        ({"rope_theta": "x"}, "rope_theta must be a number from 1 to 1e+12, got 'x'"),
        ({"rope_theta": float("nan")}, "rope_theta must be a number from 1 to 1e+12, got nan"),
        ({"rope_theta": 0}, "rope_theta must be a number from 1 to 1e+12, got 0"),
        ({"partial_rotary_factor": 1e9}, "partial_rotary_factor must be a number from 0 to 1, got 1000000000.0"),
        ({"partial_rotary_factor": float("nan")}, "partial_rotary_factor must be a number from 0 to 1, got nan"),
        ({"partial_rotary_factor": None}, "partial_rotary_factor must be a number from 0 to 1, got None"),
        ({"rope_type": {}}, "rope_type {} with partial_rotary_factor 0.25 is not supported"),
    ],
)
def test_rotary_embeddings(full: dict[str, Any], line: str) -> None:
    ropes = HUB["text_config"]["rope_parameters"]
    with pytest.raises(CheckpointError) as refused:
        ModelConfig.from_dict(hub(rope_parameters={**ropes, "full_attention": {**ropes["full_attention"], **full}}))
    assert str(refused.value) == f"config.json: {line}"


def test_the_released_configuration_is_far_within_the_bounds() -> None:
    config = ModelConfig.from_dict(HUB)
    assert all(16 * getattr(config, name) <= most for name, most in SIZES.items())


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"max_denoising_steps": 10**12}, "max_denoising_steps must be an integer from 1 to 1024, got 1000000000000"),
        ({"max_new_tokens": 1.5}, "max_new_tokens must be an integer from 1 to 16777216, got 1.5"),
        ({"t_max": float("inf")}, "t_max must be a number from 0 to 1000, got inf"),
        ({"t_max": 0, "t_min": 0}, "t_max must be at least 1e-06 and not below t_min, got t_max 0 and t_min 0"),
        ({"stability_threshold": True}, "stability_threshold must be an integer from 0 to 1024, got True"),
        ({"greedy": 1}, "greedy must be true or false, got 1"),
        ({"sampler_config": 5}, "sampler_config must be a JSON object, got 5"),
        ({"sampler_config": {"entropy_bound": "x"}}, "entropy_bound must be a number from 0 to 1e+06, got 'x'"),
        ({"eos_token_id": {"a": 1}}, "eos_token_id must be an integer from 0 to 99, got {'a': 1}"),
        ({"eos_token_id": [1, 100]}, "eos_token_id must be an integer from 0 to 99, got 100"),
        ({"eos_token_id": [{"a": 1}]}, "eos_token_id must be an integer from 0 to 99, got {'a': 1}"),
        ({"eos_token_id": 1.0}, "eos_token_id must be an integer from 0 to 99, got 1.0"),
        ({"eos_token_id": [1] * 1025}, "eos_token_id must be a list of at most 1024 token ids, got a list of 1025"),
        ({"pad_token_id": []}, "pad_token_id must be an integer from 0 to 99, got []"),
        ({"pad_token_id": 100}, "pad_token_id must be an integer from 0 to 99, got 100"),
    ],
)
def test_generation_config(change: dict[str, Any], line: str) -> None:
    with pytest.raises(CheckpointError) as refused:
        GenerationConfig.from_dict(change, vocab_size=100)
    assert str(refused.value) == f"generation_config.json: {line}"


@pytest.mark.parametrize("config", [GenerationConfig(), CausalConfig()])
@pytest.mark.parametrize(
    "options",
    [{"eos_token_ids": 5}, {"eos_token_ids": ("a",)}, {"eos_token_ids": (-1,)}, {"greedy": "yes"}, {"max_new_tokens": 10**400}],
)
def test_options_of_wrong_types(config: GenerationConfig | CausalConfig, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        config.replace(**options)


# --- JSON files


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"[" * 100_000 + b"]" * 100_000, "cannot be read: the values are nested too deep"),
        (b'{"a": ' * 100_000 + b"1" + b"}" * 100_000, "cannot be read: the values are nested too deep"),
        (b'{"a": 1, "b": {"x": 1, "x": 2}}', "cannot be read: the name 'x' stands twice in an object"),
        (b'{"a": ' + b"9" * 5000 + b"}", "cannot be read: Exceeds the limit"),
        (b" " * (MAX_JSON + 1), "has 16,777,217 bytes, more than the 16,777,216 that such a file may have"),
        (b'{"a": 1}'.decode().encode("utf-16"), "cannot be read: "),
        (b"", "cannot be read: "),
        (b"5", "not a JSON object"),
    ],
)
def test_damaged_json(tmp_path: Path, content: bytes, line: str) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(CheckpointError) as refused:
        read_json(file)
    assert str(refused.value).startswith(f"{file}: {line}")


def test_what_is_no_file_is_never_opened(tmp_path: Path) -> None:
    for make in (os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path), lambda path: os.symlink(path, path)):
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        make(file)
        with pytest.raises(CheckpointError, match=r"not a regular file|cannot be read: .*symbolic links"):
            read_json(file)
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match="link is a broken link; fetch it again"):
        read_json(tmp_path / "link")


def test_marks_line_ends_and_links_are_normal(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b'\xef\xbb\xbf{"a": \r\n 1,\r\n "b": NaN}\r\n')
    (tmp_path / "config.json").symlink_to("blob")
    content = read_json(tmp_path / "config.json")
    assert content["a"] == 1
    assert np.isnan(content["b"])


def test_messages_are_one_printable_line() -> None:
    error = DiffGemmaError("a\x1b[2J\u202eb\nc\x00\udcff é 猫")
    assert str(error) == r"a\x1b[2J\u202eb\nc\x00\udcff é 猫"
    assert str(error).isprintable()
    assert one_line("plain é") == "plain é"


def test_terminal_escapes_of_a_checkpoint_are_shown_escaped(tmp_path: Path) -> None:
    for value in ("\x1b]0;title\x07", ["\x1b[2J\n"]):
        with pytest.raises(CheckpointError) as refused:
            ModelConfig.from_dict({**HUB, "model_type": value})
        assert str(refused.value).isprintable()
    with pytest.raises(CheckpointError) as missing:
        read_json(tmp_path / "a\x1b[31m\n.json")
    assert str(missing.value).isprintable()


# --- tokenizer files


@pytest.mark.parametrize(
    ("vocabulary", "line"),
    [
        ({"a": 0, "b": 1, "c": 1}, "1 of the 3 ids have no token, such as 2"),
        ({"a": 0, "b": 1}, "1 of the 3 ids have no token, such as 2"),
        ({"a": 0, "b": 1, "c": 3}, "1 tokens have an id outside the model's vocabulary of 3, such as 3"),
        ({"a": 0, "b": 1, "c": 2, "d": 2}, "1 ids have two tokens, such as 2"),
    ],
)
def test_vocabularies_that_do_not_fit(vocabulary: dict[str, int], line: str) -> None:
    with pytest.raises(CheckpointError) as refused:
        check_vocabulary(Path("folder"), vocabulary, 3)
    assert str(refused.value) == f"folder: the tokenizer is damaged, or another model's: {line}"


def test_a_vocabulary_that_fits() -> None:
    check_vocabulary(Path("folder"), {"a": 2, "b": 0, "c": 1}, 3)


def test_tokenizer_files_with_byte_order_marks(tmp_path: Path) -> None:
    from mlx_diffgemma.tokenizer import Tokenizer

    write_tokenizer(tmp_path)
    expected = Tokenizer.from_folder(tmp_path).chat([{"role": "user", "content": "Hi"}])
    for file in tmp_path.iterdir():
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert Tokenizer.from_folder(tmp_path, vocab_size=512).chat([{"role": "user", "content": "Hi"}]) == expected


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json", "chat_template.jinja"])
def test_tokenizer_files_that_are_no_files(tmp_path: Path, name: str) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name}: not a regular file"), readable(tmp_path):
        pass


def test_no_other_file_is_read_than_those_that_were_checked(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"fast_tokenizer_files": ["../../secret.json"]}')
    with pytest.raises(CheckpointError, match="fast_tokenizer_files is not supported"), readable(tmp_path):
        pass

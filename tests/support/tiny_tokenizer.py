"""Writes a small but real tokenizer: Gemma 4's special tokens and BPE with byte fallback, at any vocabulary size."""

import json
from functools import cache
from itertools import chain, count
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE

#: The released chat template in two versions. tests/data/template_cases.json holds their differences.
CHAT_TEMPLATE = (Path(__file__).parents[1] / "data" / "chat_template.jinja").read_text(encoding="utf-8")
OLDER_CHAT_TEMPLATE = CHAT_TEMPLATE.replace("set older = false", "set older = true")

#: Gemma 4's special tokens and their ids in the released checkpoint. None means any free id.
SPECIAL_TOKENS: dict[str, int | None] = {
    "<pad>": 0,
    "<eos>": 1,
    "<bos>": 2,
    "<unk>": 3,
    "<mask>": 4,
    "<|tool>": 46,
    "<tool|>": 47,
    "<|tool_call>": 48,
    "<tool_call|>": 49,
    "<|tool_response>": 50,
    "<tool_response|>": 51,
    '<|"|>': 52,
    "<|think|>": 98,
    "<|channel>": 100,
    "<channel|>": 101,
    "<|turn>": 105,
    "<turn|>": 106,
    "<|image>": 255999,
    "<|image|>": 258880,
    "<image|>": 258882,
    "<|video|>": 258884,
    "<|audio>": None,
    "<|audio|>": None,
    "<audio|>": None,
}
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]

#: The smallest vocabulary: special tokens, bytes and the space.
MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + len(BYTES) + 1

#: The roles of the special tokens, as released.
CONFIG = {
    "tokenizer_class": "GemmaTokenizer",
    "padding_side": "left",
    "pad_token": "<pad>",
    "eos_token": "<eos>",
    "bos_token": "<bos>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
    "sot_token": "<|turn>",
    "eot_token": "<turn|>",
    "soc_token": "<|channel>",
    "eoc_token": "<channel|>",
    "think_token": "<|think|>",
    "escape_token": '<|"|>',
    "std_token": "<|tool>",
    "etd_token": "<tool|>",
    "stc_token": "<|tool_call>",
    "etc_token": "<tool_call|>",
    "str_token": "<|tool_response>",
    "etr_token": "<tool_response|>",
    "boi_token": "<|image>",
    "image_token": "<|image|>",
    "eoi_token": "<image|>",
    "boa_token": "<|audio>",
    "audio_token": "<|audio|>",
    "eoa_token": "<audio|>",
    "extra_special_tokens": ["<|video|>"],
}

CORPUS = [
    "user\nWhy is the sky blue?\nmodel\nThe sky is blue because air scatters blue light more than red light.",
    "system\nAnswer briefly. thought\nThe user asks about the weather in Paris. call:get_weather{city:Paris}",
    "The quick brown fox jumps over the lazy dog. 0123456789 (a + b) * c = d; x[i] -> {y: z} /* ! */",
    "Diffusion writes a whole canvas of tokens at once and then denoises it, step after step, until it holds still.",
    "DEF ghi JKL MNO pqr STU vwx YZ café, naïve, Größe",
]


def write_tokenizer(folder: Path, vocab_size: int = 512, *, chat_template: str | None = CHAT_TEMPLATE) -> None:
    """Write tokenizer.json, tokenizer_config.json and, unless it is None, chat_template.jinja. All ``vocab_size`` ids are in use.

    For a vocabulary of at least 512, special tokens have the released checkpoint's ids if these are in range. For a smaller one
    they are numbered from 0. Ids that characters and merges leave free are filled with ``<unusedN>``, as in Gemma's own
    vocabulary.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = bpe(vocab_size)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG, indent=1), encoding="utf-8")
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


def bpe(vocab_size: int) -> Tokenizer:
    """BPE over the corpus, built like Gemma's: a space is ▁, and text outside the vocabulary is written in bytes."""
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"special tokens, bytes and the space need a vocabulary of {MIN_VOCAB_SIZE}, got {vocab_size}")
    pieces, merges = learned()
    as_released = {
        token: number
        for token, number in SPECIAL_TOKENS.items()
        if vocab_size >= 512 and number is not None and number < vocab_size
    }
    others = chain(
        (token for token in SPECIAL_TOKENS if token not in as_released), BYTES, pieces, map("<unused{}>".format, count())
    )
    taken = set(as_released.values())
    free = (number for number in range(vocab_size) if number not in taken)
    vocab = as_released | {piece: number for number, piece in zip(free, others, strict=False)}

    kept = [(left, right) for left, right in merges if {left, right, left + right} <= vocab.keys()]
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=kept, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


@cache
def learned() -> tuple[list[str], list[tuple[str, str]]]:
    """Pieces (the space, characters, then merges by rank) and merges of the corpus. None of them crosses words or lines."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split("▁", "merged_with_next")]
    )
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=4096, show_progress=False))
    model = json.loads(tokenizer.to_str())["model"]
    pieces = sorted(model["vocab"], key=lambda piece: (piece != "▁", model["vocab"][piece]))
    return pieces, [(left, right) for left, right in model["merges"]]

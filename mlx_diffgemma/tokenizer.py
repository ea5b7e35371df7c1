"""Text <-> ids, and the chat template.

Two kinds of files are read: ``tokenizer.json``, and SentencePiece's ``tokenizer.model``; both hold Gemma's BPE, in which a
space is written ``▁`` and a character that is not in the vocabulary falls back to the bytes of its UTF-8, pieces named
``<0x00>`` to ``<0xFF>``. transformers reads and encodes both and renders the chat template in its sandbox; it is imported
when a tokenizer is loaded, and takes half a second then.
"""

import codecs
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import accumulate, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from mlx_diffgemma.errors import CheckpointError, InputError
from mlx_diffgemma.files import read_json
from mlx_diffgemma.prompts import CHANNEL, MARKERS, RESPONSE_END, TURN, TURN_END, check_messages, is_list

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REQUIRED = ("pad_token", "eos_token", "bos_token")
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
# Conversations that end where a reply begins.
_USER = ({"role": "user", "content": "Hi"},)
_CALLED = {"id": "0", "type": "function", "function": {"name": "f", "arguments": {}}}
_TOOL = (*_USER, {"role": "assistant", "tool_calls": [_CALLED]}, {"role": "tool", "tool_call_id": "0", "content": "Hi"})
# Parts a special token's characters where a caller's text spells it. A lone surrogate: in no valid text.
_CUT = "\udfff"


class Tokenizer:
    """One checkpoint's tokenizer. Made by :meth:`from_folder`.

    Attributes:
        vocab_size: number of ids; each is below it.
        pad_token_id, eos_token_id, bos_token_id: as the checkpoint names them.
        end_of_turn_id: what ends a turn of a chat; the end token where the vocabulary has no such marker.
    """

    def __init__(self, backend: "PreTrainedTokenizerBase", end_token_ids: Iterable[int] = ()) -> None:
        self._backend = backend
        self.vocab_size = len(backend)
        self.pad_token_id, self.eos_token_id, self.bos_token_id = (self._required_id(name) for name in _REQUIRED)
        begin, end = (self.token_id(marker) for marker in (TURN, TURN_END))
        self.end_of_turn_id = self.eos_token_id if end is None else end
        markers = {begin, end} - {None}
        self._structural = {self.pad_token_id, self.eos_token_id, self.bos_token_id, *end_token_ids, *markers}

    @classmethod
    def from_folder(cls, folder: Path, end_token_ids: Iterable[int] = ()) -> Self:
        """Read ``tokenizer.json`` or else ``tokenizer.model``, with ``tokenizer_config.json`` and the chat template if there.

        Args:
            end_token_ids: what ends a text besides the end token and the turn's end; :meth:`decode` drops these too.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        # Where PyTorch is not installed, transformers would otherwise advise on stderr to have it.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, SentencePieceBackend

        kinds: dict[str, type[PreTrainedTokenizerBase]] = {
            "tokenizer.json": PreTrainedTokenizerFast,
            "tokenizer.model": SentencePieceBackend,
        }
        name = next((name for name in kinds if (folder / name).is_file()), None)
        if name is None:
            raise CheckpointError(f"{folder}: neither tokenizer.json nor tokenizer.model is there; is this a model folder?")
        if (folder / "tokenizer_config.json").exists():
            read_json(folder / "tokenizer_config.json")  # only to name it where it is damaged
        try:
            backend = kinds[name].from_pretrained(str(folder), local_files_only=True)
        # A damaged file raises whatever the reader stumbles over, in the Rust library even a bare Exception.
        except Exception as broken:
            reason = f"{type(broken).__name__}: {broken}".partition("\n")[0]
            raise CheckpointError(
                f"{folder}: {name} and the files beside it cannot be read ({reason}); fetch them again"
            ) from broken
        return cls(backend, end_token_ids)

    def _required_id(self, name: str) -> int:
        """Id of the token named ``pad_token`` and so on; Gemma's own ``<pad>`` where the checkpoint names none."""
        named = getattr(self._backend, name)
        text = named or f"<{name.removesuffix('_token')}>"
        token = self.token_id(text)
        if token is None:
            raise CheckpointError(f"the tokenizer has no {text}; is this a DiffusionGemma's?")
        if not named:
            self._backend.add_special_tokens({name: text})  # the chat template reads it there, and so does encode
        return token

    def token_id(self, text: str) -> int | None:
        """Id of the one token written ``text``, such as ``<|channel>``; None where the vocabulary has none."""
        token = self._backend.convert_tokens_to_ids(text)
        # An unknown text gives the id of <unk>, or None where there is none.
        return token if isinstance(token, int) and self._backend.convert_ids_to_tokens(token) == text else None

    def encode(self, text: str, *, markup: bool = False) -> list[int]:
        """Ids of ``text``, with nothing added: the beginning-of-sequence token comes from the chat template.

        Markup such as ``<|turn>`` in the text is plain text, or with ``markup`` read as the special token. Raises InputError
        for text that is not valid Unicode (lone surrogates, as from a file name).
        """
        _check_unicode(text)
        return self._pieces(text if markup else self._cut(text))

    def _pieces(self, text: str) -> list[int]:
        """Ids of the pieces that a text is cut into."""
        return [token for piece in text.split(_CUT) for token in self._backend.encode(piece, add_special_tokens=False)]

    def decode(self, ids: Iterable[int], *, final: bool = True) -> str:
        """Text for people: without padding, beginning, end and turn markers; tool calls and channels stay as written.

        Bytes that are no UTF-8 become U+FFFD. With ``final`` false, an incomplete character at the end is held back instead;
        the text of a growing list of ids then only ever grows at its end, as streaming needs.

        Raises InputError for an id outside the vocabulary.
        """
        kept = [int(token) for token in ids if token not in self._structural]
        outside = [token for token in kept if not 0 <= token < self.vocab_size]
        if outside:
            raise InputError(f"token id {outside[0]} is outside the vocabulary of {self.vocab_size}")
        # The libraries' own decoders garble a whole run of bytes for one that is wrong (tokenizers), or drop control tokens
        # (sentencepiece).
        written = b"".join(_piece_bytes(piece) for piece in self._backend.convert_ids_to_tokens(kept))
        return codecs.getincrementaldecoder("utf-8")("replace").decode(written, final)

    def spans(self, ids: Sequence[int], text: str) -> list[tuple[int, int]]:
        """The characters (start, end) of ``text`` that each of its ``ids`` lies in; tokens of one character's bytes share it.

        Raises InputError where the tokenizer does not read every character as it is.
        """
        pieces = [_piece_bytes(piece) for piece in self._backend.convert_ids_to_tokens(list(ids))]
        written = b"".join(pieces)
        if written != text.replace("▁", " ").encode():
            raise InputError(
                "the tokenizer does not read this text character by character, so that its tokens have no place in it"
            )
        # A byte 10xxxxxx goes on with the character before it.
        character = list(accumulate(int((byte & 0xC0) != 0x80) for byte in written))
        ends = list(accumulate(map(len, pieces)))
        return [(character[end - len(piece)] - 1, character[end - 1]) for piece, end in zip(pieces, ends, strict=True)]

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **template_options: Any,
    ) -> str:
        """The conversation as the checkpoint's chat template writes it.

        Args:
            messages: mappings with ``role`` and ``content``. The content is a string, or a list of parts such as
                ``{"type": "text", "text": "Hi"}``, or None; an assistant's message may do without it (tool calls).
            add_generation_prompt: end with what has the model answer.
            tools: JSON schemas of the functions that the model may call.
            template_options: variables of the template, such as ``enable_thinking``.

        Raises:
            InputError: the messages are of the wrong form or hold images, video or audio; the template refuses them; or the
                checkpoint has no chat template.
        """
        return self._render(messages, tools, template_options | {"add_generation_prompt": add_generation_prompt}, markup=True)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        markup: bool = False,
        **template_options: Any,
    ) -> list[int]:
        """Ids of the conversation; other arguments and errors are those of :meth:`render`.

        Args:
            markup: read markup that the strings of ``messages`` and ``tools`` spell, such as ``<|turn>``, as special tokens:
                whoever wrote a string can then end a turn and begin another. By default it is plain text.

        Raises:
            InputError: a string is not valid Unicode.
        """
        options = template_options | {"add_generation_prompt": add_generation_prompt}
        text = self._render(messages, tools, options, markup=markup)
        return self.encode(text, markup=True) if markup else self._pieces(text)

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        options: Mapping[str, Any],
        *,
        markup: bool,
    ) -> str:
        """As :meth:`render`; without ``markup``, a cut behind the first character of each special token that a string spells."""
        from jinja2 import TemplateError

        check_messages(messages)
        if tools is not None and not all(isinstance(tool, Mapping) for tool in tools):
            raise InputError("tools must be a list of JSON schemas, one mapping a function")
        if not self._backend.chat_template:
            raise InputError("this checkpoint has no chat template; give a raw prompt instead of messages")
        conversation = [dict(message) for message in messages]
        schemas: list[Any] | None = None if tools is None else [dict(tool) for tool in tools]
        try:
            if not markup:
                conversation, schemas = _mapped(conversation, self._cut), _mapped(schemas, self._cut)
            text = self._backend.apply_chat_template(conversation, tools=schemas, tokenize=False, **options)
        except InputError:
            raise
        # The last five are what Python raises inside of a template that calculates with values of the wrong form.
        except (TemplateError, TypeError, ValueError, OverflowError, AttributeError, RecursionError) as refused:
            reason = str(refused).partition("\n")[0].replace(_CUT, "")
            raise InputError(f"the chat template refuses this conversation: {reason}") from refused
        return str(text)

    @cached_property
    def reply_starts(self) -> tuple[tuple[int, ...], ...]:
        """Token ids that end a prompt: behind them a reply begins. Read off what the chat template makes of small conversations.

        They go from the last turn's opening, or from the end of a tool's answer, to the prompt's end.
        """
        openings = {self.token_id(marker) for marker in (TURN, RESPONSE_END)}
        starts = []
        for messages, thinking in product((_USER, _TOOL), (False, True)):
            try:
                ids = self.chat(messages, enable_thinking=thinking)
            except InputError:  # a template that has no tools, or none at all
                continue
            places = [place for place, token in enumerate(ids) if token in openings]
            starts += [tuple(ids[places[-1] :])] if places else []
        return tuple(dict.fromkeys(starts))

    def opened_thought(self, ids: Sequence[int]) -> str | None:
        """The text of a thought that a prompt's ids open and do not close, from its heading on; None where they open none."""
        channel, markers = self.token_id(CHANNEL), {self.token_id(marker) for marker in MARKERS} - {None}
        last = next((place for place in reversed(range(len(ids))) if ids[place] in markers), None)
        return self.decode(ids[last + 1 :]) if last is not None and ids[last] == channel else None

    @cached_property
    def _special_tokens(self) -> tuple[str, ...]:
        """The texts that encode reads as a special token; each has two characters or more."""
        # SentencePiece calls only those special that the configuration names.
        known = {marker for marker in MARKERS if self.token_id(marker) is not None}
        return tuple(known | {str(token) for token in self._backend.added_tokens_decoder.values() if token.special})

    def _cut(self, text: str) -> str:
        """``text`` with a cut behind the first character of each special token, and of each that its end is the beginning of.

        The template may write another string behind this one, and leave out white space in between. The libraries' own switch
        (``split_special_tokens``) has no effect on SentencePiece's user-defined symbols.
        """
        _check_unicode(text)
        tokens, end = self._special_tokens, len(text.rstrip())
        longest = max(map(len, tokens))

        def cut(first: re.Match[str]) -> str:
            start = first.start()
            unfinished = end - start < longest and any(token.startswith(text[start:end]) for token in tokens)
            return first[0] + _CUT if unfinished or text.startswith(tokens, start) else first[0]

        return re.sub("|".join({re.escape(token[0]) for token in tokens}), cut, text)


class Growing:
    """The text of tokens that come one after the other. Only the last, incomplete character is decoded again.

    Args:
        decode: :meth:`Tokenizer.decode`, or a function that takes its arguments.
    """

    def __init__(self, decode: Callable[..., str]) -> None:
        self.decode = decode
        self._pending: list[int] = []  # since the last complete character
        self._told = 0  # characters of theirs

    def add(self, tokens: Iterable[int]) -> str:
        """What the text has grown by; an incomplete character at its end is held back."""
        self._pending += tokens
        text = self.decode(self._pending, final=False)
        new = text[self._told :]
        if self.decode(self._pending) == text:
            self._pending, self._told = [], 0
        else:
            self._told = len(text)
        return new

    def end(self) -> str:
        """What was held back, as it stands."""
        new = self.decode(self._pending)[self._told :]
        self._pending, self._told = [], 0
        return new


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as wrong:
        raise InputError(f"the text is not valid Unicode: a lone surrogate at character {wrong.start}") from None


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """``value`` with each string in it changed, the keys of its mappings too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_mapped(key, change): _mapped(item, change) for key, item in value.items()}
    return [_mapped(item, change) for item in value] if is_list(value) else value


def _piece_bytes(piece: str) -> bytes:
    if byte := _BYTE_PIECE.fullmatch(piece):
        return bytes.fromhex(byte[1])
    return piece.replace("▁", " ").encode()

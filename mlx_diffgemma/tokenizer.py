"""The tokenizer: turns text into ids and back, and renders the chat template.

It reads two kinds of files: ``tokenizer.json``, and SentencePiece's ``tokenizer.model``. Both contain Gemma's BPE, which writes a
space as ``▁``. A character outside the vocabulary becomes its UTF-8 bytes, as pieces named ``<0x00>`` to ``<0xFF>``. transformers
reads both files and encodes text. It is imported when a tokenizer is loaded, which takes half a second. The chat template is
rendered by :mod:`mlx_diffgemma.templates`.
"""

import codecs
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import accumulate, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from mlx_diffgemma.arguments import checked
from mlx_diffgemma.errors import CheckpointError, InputError
from mlx_diffgemma.files import first_line
from mlx_diffgemma.prompts import CHANNEL, IMAGE, MARKERS, RESPONSE_END, TURN, TURN_END, VIDEO, check_messages, counted, is_list
from mlx_diffgemma.steps import Steps, run
from mlx_diffgemma.tokenizer_files import check_vocabulary, readable
from mlx_diffgemma.vision.media import Media, Picture

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REQUIRED = ("pad_token", "eos_token", "bos_token")
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
# Two conversations whose rendered prompts end where a reply begins.
_USER = ({"role": "user", "content": "Hi"},)
_CALLED = {"id": "0", "type": "function", "function": {"name": "f", "arguments": {}}}
_TOOL = (*_USER, {"role": "assistant", "tool_calls": [_CALLED]}, {"role": "tool", "tool_call_id": "0", "content": "Hi"})
# The places of images and videos in a rendered conversation.
_PLACE = re.compile(f"{re.escape(IMAGE)}|{re.escape(VIDEO)}")
# Put between the characters of a special token that a caller's text spells. A lone surrogate, which no valid text contains.
_CUT = "\udfff"
# Pieces that one step encodes: about 10 ms.
_PIECES = 1000
_UTF8 = codecs.getincrementaldecoder("utf-8")


class Tokenizer:
    """The tokenizer of one checkpoint. :meth:`from_folder` makes it.

    Attributes:
        vocab_size: number of ids. Every id is below it.
        pad_token_id, eos_token_id, bos_token_id: the padding, end and beginning tokens that the checkpoint names.
        end_of_turn_id: the token that ends a turn of a chat, or the end token if the vocabulary has no such marker.
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
    def from_folder(cls, folder: Path, end_token_ids: Iterable[int] = (), vocab_size: int | None = None) -> Self:
        """Read ``tokenizer.json`` or else ``tokenizer.model``, and ``tokenizer_config.json`` and the chat template if they exist.

        Args:
            end_token_ids: other tokens that end a text, in addition to the end token and the end of a turn. :meth:`decode` drops
                them too.
            vocab_size: the number of the model's ids. Each must have a token, and no token may have another id.

        Raises:
            CheckpointError: a file is missing or damaged, or the tokens do not fit the model.
        """
        # Without PyTorch, transformers would print advice to install it on stderr.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, SentencePieceBackend

        kinds: dict[str, type[PreTrainedTokenizerBase]] = {
            "tokenizer.json": PreTrainedTokenizerFast,
            "tokenizer.model": SentencePieceBackend,
        }
        name = next((name for name in kinds if (folder / name).exists()), None)
        if name is None:
            raise CheckpointError(f"{folder}: neither tokenizer.json nor tokenizer.model is there; is this a model folder?")
        with readable(folder) as place:
            try:
                backend = kinds[name].from_pretrained(str(place), local_files_only=True)
                vocabulary = backend.get_vocab()
                backend.encode("Hi", add_special_tokens=False)  # a damaged tokenizer may load and then fail
                if not isinstance(backend.chat_template, str | dict | None):
                    raise TypeError("the chat template is not a text")
            except (KeyboardInterrupt, SystemExit):
                raise
            # A damaged file can raise any exception. The Rust library raises a bare Exception, or a BaseException when it panics.
            except BaseException as broken:
                reason = f"{type(broken).__name__}: {first_line(broken)}"[:300]
                raise CheckpointError(
                    f"{folder}: {name} and the files beside it cannot be read ({reason}); fetch them again"
                ) from broken
        check_vocabulary(folder, vocabulary, len(vocabulary) if vocab_size is None else vocab_size)
        return cls(backend, end_token_ids)

    def _required_id(self, name: str) -> int:
        """The id of the token named ``pad_token`` and so on. If the checkpoint names none, Gemma's own, such as ``<pad>``."""
        named = getattr(self._backend, name)
        text = named or f"<{name.removesuffix('_token')}>"
        token = self.token_id(text)
        if token is None:
            raise CheckpointError(f"the tokenizer has no {text}; is this the tokenizer of a DiffusionGemma?")
        if not named:
            self._backend.add_special_tokens({name: text})  # the chat template and encode read it there
        return token

    @checked
    def token_id(self, text: str) -> int | None:
        """The id of the single token ``text``, such as ``<|channel>``, or None if the vocabulary does not have it."""
        token = self._backend.convert_tokens_to_ids(text)
        # An unknown text gives the id of <unk>, or None if the vocabulary has no <unk>.
        return token if isinstance(token, int) and self._backend.convert_ids_to_tokens(token) == text else None

    @checked
    def encode(self, text: str, *, markup: bool = False) -> list[int]:
        """Ids of ``text``, with nothing added. (The chat template adds the beginning-of-sequence token.)

        Markup such as ``<|turn>`` in the text is plain text. With ``markup``, it is read as a special token. Raises InputError if
        the text is not valid Unicode (it has lone surrogates, for example from a file name).
        """
        return run(self.encode_steps(text, markup=markup))

    def encode_steps(self, text: str, *, markup: bool = False) -> Steps[list[int]]:
        """:meth:`encode` in steps."""
        _check_unicode(text)
        return (yield from self._pieces(text if markup else self._cut(text)))

    def _pieces(self, text: str) -> Steps[list[int]]:
        """Ids of a text, whose pieces between the cuts are encoded separately, and equal pieces once."""
        pieces = text.split(_CUT)
        distinct = list(dict.fromkeys(pieces))
        ids: dict[str, list[int]] = {}
        for start in range(0, len(distinct), _PIECES):
            some = distinct[start : start + _PIECES]
            # The library lets other threads run meanwhile.
            ids |= zip(some, self._backend(some, add_special_tokens=False)["input_ids"], strict=True)
            yield
        return [token for piece in pieces for token in ids[piece]]

    @checked
    def decode(self, ids: Iterable[int], *, final: bool = True) -> str:
        """Text for people, without padding, beginning, end and turn markers. Tool calls and channels stay as written.

        Bytes that are not UTF-8 become U+FFFD. If ``final`` is false, an incomplete character at the end is held back instead.
        The text of a growing list of ids then only grows at its end, as streaming needs.

        Raises InputError for an id outside the vocabulary.
        """
        return _UTF8("replace").decode(self.utf8(ids), final)

    def utf8(self, ids: Iterable[int]) -> bytes:
        """The bytes of :meth:`decode`. They may begin or end within a character."""
        kept = [int(token) for token in ids if token not in self._structural]
        outside = [token for token in kept if not 0 <= token < self.vocab_size]
        if outside:
            raise InputError(f"token id {outside[0]} is outside the vocabulary of {self.vocab_size}")
        # The libraries' own decoders garble a whole run of bytes if one byte is wrong (tokenizers), or drop control tokens
        # (sentencepiece).
        return b"".join(_piece_bytes(piece) for piece in self._backend.convert_ids_to_tokens(kept))

    @checked
    def spans(self, ids: Sequence[int], text: str) -> list[tuple[int, int]]:
        """For each of the ``ids`` of ``text``, the characters (start, end) that it lies in.

        Tokens for the bytes of one character have the same span. Raises InputError if the tokenizer changes characters of the
        text.
        """
        pieces = [_piece_bytes(piece) for piece in self._backend.convert_ids_to_tokens(list(ids))]
        written = b"".join(pieces)
        if written != text.replace("▁", " ").encode():
            raise InputError(
                "the tokenizer changes characters of this text, so its tokens have no exact places in it; use another text"
            )
        # A byte of the form 10xxxxxx belongs to the character before it.
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
        """Render a conversation with the checkpoint's chat template.

        Args:
            messages: mappings with ``role`` and ``content``. The content is a string, a list of parts such as
                ``{"type": "text", "text": "Hi"}``, or None. An assistant's message may leave it out (tool calls). A part
                ``{"type": "image"}`` is the place of an image, and becomes ``<|image|>``.
            add_generation_prompt: end with the tokens after which the model's reply begins.
            tools: JSON schemas of the functions that the model may call.
            template_options: variables of the template, such as ``enable_thinking``.

        Raises:
            InputError: the messages have the wrong form; the template refuses them, or does more than
                :mod:`mlx_diffgemma.templates` allows; or the checkpoint has no chat template.
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
        """Ids of a conversation. Other arguments and errors as in :meth:`render`.

        Args:
            markup: read markup such as ``<|turn>`` in the strings of ``messages`` and ``tools`` as special tokens. The author of
                a string can then end a turn and begin another. By default it is plain text.

        Raises:
            InputError: a string is not valid Unicode.
        """
        options = template_options | {"add_generation_prompt": add_generation_prompt}
        return run(self.chat_steps(messages, tools=tools, markup=markup, **options))

    def chat_steps(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        markup: bool = False,
        media: Sequence[Media] = (),
        **template_options: Any,
    ) -> Steps[list[int]]:
        """:meth:`chat` in steps.

        Args:
            media: the images and videos of the messages, in order. Their markup takes the place of their parts.

        Raises:
            InputError: the template does not write one place per image and video, in order.
        """
        options = template_options | {"add_generation_prompt": add_generation_prompt}
        text = with_media(self._render(messages, tools, options, markup=markup), media)
        yield
        return (yield from self.encode_steps(text, markup=True) if markup else self._pieces(text))

    @cached_property
    def longest_token(self) -> int | None:
        """The most bytes that one token stands for, in UTF-8. A text of N bytes has at least N / ``longest_token`` tokens.

        None if there is no such bound: without tokens for single bytes, one unknown token may stand for any text.
        """
        pieces = self._backend.get_vocab()
        return max(len(_piece_bytes(piece)) for piece in pieces) if "<0x00>" in pieces else None

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        options: Mapping[str, Any],
        *,
        markup: bool,
    ) -> str:
        """As :meth:`render`. Without ``markup``, each special token that a string spells is cut after its first character."""
        from mlx_diffgemma.templates.rendering import compiled

        check_messages(messages)
        if tools is not None and not (is_list(tools) and all(isinstance(tool, Mapping) for tool in tools)):
            raise InputError("tools must be a list of JSON schemas, with one mapping per function")
        if not self._backend.chat_template:
            raise InputError("this checkpoint has no chat template; give a raw prompt instead of messages")
        conversation = [dict(message) for message in messages]
        schemas: list[Any] | None = None if tools is None else [dict(tool) for tool in tools]
        try:
            if not markup:
                conversation, schemas = _mapped(conversation, self._cut), _mapped(schemas, self._cut)
            template = compiled(self._backend.get_chat_template(tools=schemas))
            text = template.render(conversation, schemas, {**self._backend.special_tokens_map, **options})
            _check_unicode(text.replace(_CUT, ""))
            return text
        except InputError:
            raise
        # A template is a program, and can raise any exception.
        except Exception as refused:
            reason = first_line(refused).replace(_CUT, "")[:300]
            raise InputError(f"the chat template refuses this conversation: {reason}") from refused

    @cached_property
    def reply_starts(self) -> tuple[tuple[int, ...], ...]:
        """The sequences of token ids that end a prompt, so that a reply begins after them.

        They are taken from small conversations that the chat template renders. Each sequence goes from the opening of the last
        turn, or from the end of a tool's result, to the end of the prompt.
        """
        from mlx_diffgemma.templates.meter import LimitError

        openings = {self.token_id(marker) for marker in (TURN, RESPONSE_END)}
        starts = []
        for messages, thinking in product((_USER, _TOOL), (False, True)):
            try:
                ids = self.chat(messages, enable_thinking=thinking)
            except InputError as refused:  # the template does not support tools, or there is no template
                if isinstance(refused.__cause__, LimitError):
                    raise
                continue
            places = [place for place, token in enumerate(ids) if token in openings]
            starts += [tuple(ids[places[-1] :])] if places else []
        return tuple(dict.fromkeys(starts))

    def opened_thought(self, ids: Sequence[int]) -> str | None:
        """The text, from its heading on, of a thought that a prompt's ids open and do not close. None if no thought is open."""
        channel, markers = self.token_id(CHANNEL), {self.token_id(marker) for marker in MARKERS} - {None}
        last = next((place for place in reversed(range(len(ids))) if ids[place] in markers), None)
        return self.decode(ids[last + 1 :]) if last is not None and ids[last] == channel else None

    @cached_property
    def _special_tokens(self) -> frozenset[str]:
        """The texts that encode reads as a special token. Each has two characters or more."""
        # With SentencePiece, only the tokens that the configuration names are marked as special.
        known = {marker for marker in MARKERS if self.token_id(marker) is not None}
        return frozenset(known | {str(token) for token in self._backend.added_tokens_decoder.values() if token.special})

    @cached_property
    def _special_lengths(self) -> tuple[int, ...]:
        """The lengths of the special tokens, in characters. Looking up a few lengths is faster than comparing all tokens."""
        return tuple(sorted({len(token) for token in self._special_tokens}))

    def _cut(self, text: str) -> str:
        """``text`` with a cut after the first character of each special token in it, and of one that may begin at its end.

        The end needs a cut because the template may write another string directly after this one, without the white space
        between. The libraries' own switch (``split_special_tokens``) has no effect on SentencePiece's user-defined symbols.
        """
        _check_unicode(text)
        tokens, lengths, end = self._special_tokens, self._special_lengths, len(text.rstrip())

        def cut(first: re.Match[str]) -> str:
            start = first.start()
            unfinished = end - start < lengths[-1] and any(token.startswith(text[start:end]) for token in tokens)
            return first[0] + _CUT if unfinished or any(text[start : start + n] in tokens for n in lengths) else first[0]

        return re.sub("|".join({re.escape(token[0]) for token in tokens}), cut, text)


class Growing:
    """The text of a growing list of tokens. Each token is decoded once.

    Args:
        utf8: :meth:`Tokenizer.utf8`, or a function with the same arguments.
    """

    def __init__(self, utf8: Callable[[Iterable[int]], bytes]) -> None:
        self._utf8, self._decoder = utf8, _UTF8("replace")

    def add(self, tokens: Iterable[int]) -> str:
        """Add tokens, and return the new text. An incomplete character at the end is held back."""
        return self._decoder.decode(self._utf8(tokens))

    @property
    def complete(self) -> bool:
        """Whether no character is held back."""
        return not self._decoder.getstate()[0]

    def end(self) -> str:
        """Return the text that was held back, incomplete as it is."""
        return self._decoder.decode(b"", True)


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as wrong:
        raise InputError(f"the text is not valid Unicode: a lone surrogate at character {wrong.start}") from None


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """``value`` with ``change`` applied to every string in it, including the keys of mappings."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_mapped(key, change): _mapped(item, change) for key, item in value.items()}
    return [_mapped(item, change) for item in value] if is_list(value) else value


def with_media(text: str, media: Sequence[Media]) -> str:
    """Put the markup of images and videos in their places ``<|image|>`` and ``<|video|>`` in a text.

    Raises InputError unless the places are those of these images and videos, in order.
    """
    wanted, found = [IMAGE if isinstance(each, Picture) else VIDEO for each in media], _PLACE.findall(text)
    if wanted != found:
        for marker, medium, article in ((IMAGE, "image", "an image"), (VIDEO, "video", "a video")):
            if found.count(marker) != wanted.count(marker):
                raise InputError(
                    f"the prompt has {counted(found.count(marker), f'place for {article}', f'places for {medium}s')}, but "
                    f"{counted(wanted.count(marker), medium)} came with it"
                )
        raise InputError("the chat template puts the images and videos in another order; send them in the template's order")
    parts = _PLACE.split(text)
    return "".join([parts[0], *(each.markup + part for each, part in zip(media, parts[1:], strict=True))])


def _piece_bytes(piece: str) -> bytes:
    if byte := _BYTE_PIECE.fullmatch(piece):
        return bytes.fromhex(byte[1])
    return piece.replace("▁", " ").encode()

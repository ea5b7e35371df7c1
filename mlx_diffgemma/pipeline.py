"""A loaded model: joins a checkpoint, its tokenizer, a backend and the sampler, and turns prompts into text."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from mlx_diffgemma.backends import Backend, Piece, check_tokens, chosen_backend, load_backend
from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.errors import InputError
from mlx_diffgemma.options import SamplerOptions, spelled_out
from mlx_diffgemma.prefix_cache import read
from mlx_diffgemma.prompts import PieceRule, Prompt, chunks
from mlx_diffgemma.settling import Settled
from mlx_diffgemma.tokenizer import Tokenizer
from mlx_diffgemma.writing import Event, Generation, Writing, fresh_seed, sampling_config, write


@dataclass(frozen=True)
class Score:
    """How likely the causal model finds a text.

    Attributes:
        tokens: the ids of the text.
        logprobs: the natural-log probability of each token given all tokens before it, at temperature 1. NaN for a token with
            nothing before it.
    """

    tokens: list[int]
    logprobs: list[float]

    @property
    def perplexity(self) -> float:
        """exp of minus the mean log-probability of the tokens that have one; NaN if no token has one."""
        known = [value for value in self.logprobs if not math.isnan(value)]
        return math.exp(-sum(known) / len(known)) if known else math.nan


class DiffusionGemma:
    """A loaded model. :func:`load` makes it.

    Functions that edit an existing text are in :mod:`mlx_diffgemma.editing`, and conversations are in :mod:`mlx_diffgemma.chat`.
    Both take a model.
    """

    def __init__(self, checkpoint: Checkpoint, backend: Backend) -> None:
        self.checkpoint, self.backend = checkpoint, backend

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer. It is loaded on first use."""
        return Tokenizer.from_folder(self.checkpoint.folder, self.checkpoint.generation.eos_token_ids)

    @cached_property
    def piece_rule(self) -> PieceRule:
        """The rule that cuts the model's texts into pieces for the causal pass."""
        ends = {self.tokenizer.end_of_turn_id, *self.checkpoint.generation.eos_token_ids}
        return PieceRule(self.backend.config.canvas_length, tuple(sorted(ends)), self.tokenizer.reply_starts)

    @spelled_out
    def generate(
        self,
        prompt: Prompt,
        *,
        mode: str = "diffusion",
        system: str | None = None,
        raw: bool = False,
        markup: bool = False,
        seed: int | None = None,
        stop: Sequence[str] = (),
        logprobs: bool = False,
        frozen: NDArray[np.int32] | None = None,
        canvas: NDArray[np.int32] | None = None,
        **options: Unpack[SamplerOptions],
    ) -> Generation:
        """Write a text after ``prompt``. Arguments and errors as in :meth:`stream`; returns the last event of that stream."""
        given: dict[str, Any] = {"mode": mode, "system": system, "raw": raw, "markup": markup, "seed": seed, "stop": stop}
        for event in self.stream(prompt, **given, logprobs=logprobs, frozen=frozen, canvas=canvas, **options):
            if isinstance(event, Generation):
                return event
        raise AssertionError("a stream ends in its Generation")

    @spelled_out
    def stream(
        self,
        prompt: Prompt,
        *,
        mode: str = "diffusion",
        system: str | None = None,
        raw: bool = False,
        markup: bool = False,
        seed: int | None = None,
        stop: Sequence[str] = (),
        settled: Settled | None = None,
        logprobs: bool = False,
        frozen: NDArray[np.int32] | None = None,
        canvas: NDArray[np.int32] | None = None,
        **options: Unpack[SamplerOptions],
    ) -> Iterator[Event]:
        """Write a text after ``prompt``, and yield every step of the work.

        Args:
            prompt: a text or a conversation, which the chat template renders, or token ids, which are used unchanged.
            mode: ``diffusion`` writes a canvas at a time, ``causal`` one token at a time.
            system: a system message to put before the conversation.
            raw: use the prompt text unchanged, without the chat template.
            markup: read markup such as ``<|turn>`` in the texts as control tokens. By default it is plain text, so the author of
                a text cannot end a turn and begin another.
            seed: 0 to 2^64 - 1. By default a fresh seed; the Generation has it.
            stop: the answer ends before the first of these texts.
            settled: show text within a block, by this rule. By default, text is shown when its block is committed.
            logprobs: also return how likely the causal model finds each token. In the diffusion mode this costs an output head
                per block, and one more pass at the end.
            frozen, canvas: as in :class:`~mlx_diffgemma.sampler.Text`. Diffusion mode only.
            options: fields of :class:`~mlx_diffgemma.config.GenerationConfig`, which replace the checkpoint's values, or in the
                causal mode fields of :class:`~mlx_diffgemma.config.CausalConfig`.

        Yields:
            A Draft after each denoising step and a Block after each canvas, or a Token after each pass; Content as text becomes
            certain; and at the end the Generation. When you stop reading, the computation stops; there is nothing to close.

        Raises:
            InputError: by this call itself, before the first event is requested.
        """
        ids = self.prompt_ids(prompt, raw=raw, system=system, markup=markup)
        writing = Writing(
            config=sampling_config(self.checkpoint.generation, mode, options),
            seed=fresh_seed() if seed is None else seed,
            stop=tuple(stop),
            settled=settled,
            logprobs=logprobs,
            frozen=None if frozen is None else np.asarray(frozen, np.int32),
            canvas=None if canvas is None else np.asarray(canvas, np.int32),
        )
        writing.check(self.backend.config, ids)
        return self._stream(ids, writing)

    def _stream(self, ids: NDArray[np.int32], writing: Writing) -> Iterator[Event]:
        context = read(self.backend, ids, self.piece_rule)
        yield from write(self.backend, self.tokenizer, context, writing)

    def score(
        self,
        text: str | Sequence[int],
        prompt: Prompt | None = None,
        *,
        system: str | None = None,
        raw: bool = False,
        markup: bool = False,
    ) -> Score:
        """How likely the causal model finds each token of ``text``. The result is exact and takes one pass over the text.

        Args:
            text: a text or token ids, used unchanged. A text is tokenized separately from the prompt.
            prompt: what comes before the text, read as in :meth:`stream`. With the chat template, ``text`` is the model's answer.
                By default the prompt is only the beginning-of-sequence token.
            system, markup: as in :meth:`stream`. ``markup`` applies to ``text`` too.
            raw: use the prompt unchanged, without the chat template. If there is no prompt, begin with ``text`` itself. Its first
                token then has no probability and does not count in the perplexity.

        Raises InputError if the text is empty or if, with the prompt, it exceeds the model's context.
        """
        tokens = self._checked_ids(self.tokenizer.encode(text, markup=markup) if isinstance(text, str) else text)
        before: NDArray[np.int32] = np.empty(0, np.int32)
        if prompt is not None:
            before = self.prompt_ids(prompt, raw=raw, system=system, markup=markup)
        elif system is not None:
            raise InputError("a system message needs a prompt; give one, or leave out system")
        elif not raw:
            before = np.array([self.tokenizer.bos_token_id], np.int32)
        total, context = len(before) + len(tokens), self.backend.config.max_position_embeddings
        if total > context:
            raise InputError(f"the text and its prompt have {total} tokens, but the model's context is {context}; shorten them")
        cache = read(self.backend, before, self.piece_rule).cache if before.size else self.backend.new_cache()
        parts = [self.backend.score([Piece(piece, cache)])[0] for piece in chunks(tokens)]
        return Score(tokens.tolist(), np.concatenate(parts).tolist())

    def prompt_ids(
        self, prompt: Prompt, *, raw: bool = False, system: str | None = None, markup: bool = False
    ) -> NDArray[np.int32]:
        """Token ids [N] of a prompt, read as in :meth:`stream`."""
        if isinstance(prompt, str):
            if not prompt.strip():
                raise InputError("the prompt is empty")
            if raw:
                if system is not None:
                    raise InputError("a system message needs the chat template; leave out raw, or write it into the prompt")
                return self._checked_ids(self.tokenizer.encode(prompt, markup=markup))
            prompt = [{"role": "user", "content": prompt}]
        if not len(prompt):  # noqa: PLC1802 (a NumPy array has no truth value)
            raise InputError("the prompt is empty")
        if isinstance(prompt[0], Mapping):
            messages = [{"role": "system", "content": system}] if system is not None else []
            return self._checked_ids(self.tokenizer.chat([*messages, *prompt], markup=markup))
        if system is not None:
            raise InputError("a system message needs the chat template; leave it out, or give a text instead of token ids")
        return self._checked_ids(prompt)

    def _checked_ids(self, ids: Sequence[Any]) -> NDArray[np.int32]:
        if self.backend.config.image_token_id in ids:
            raise InputError("the prompt has an image, and images are not supported yet; leave it out")
        tokens = np.asarray(ids)
        if not tokens.size:
            raise InputError("the text is empty")
        if tokens.dtype.kind not in "iu":
            raise InputError("a prompt of token ids must be integers")
        check_tokens(tokens, self.backend.config)  # before int32 overflows
        return tokens.astype(np.int32)


def load(
    source: str | Path,
    *,
    revision: str | None = None,
    backend: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> DiffusionGemma:
    """Load a checkpoint from a folder or the hub.

    Args:
        source: a folder, or a hub id such as ``google/diffusiongemma-26B-A4B-it``.
        revision: a branch, tag or commit of the hub's repository.
        backend, device, dtype: see :func:`mlx_diffgemma.backends.load_backend`.

    Raises:
        CheckpointError, BackendError, InputError: with one line that says what is wrong and what to do.
    """
    backend = chosen_backend(backend, dtype)  # raises before a download of many gigabytes
    checkpoint = Checkpoint.open(source, revision)
    return DiffusionGemma(checkpoint, load_backend(checkpoint, backend, device=device, dtype=dtype))

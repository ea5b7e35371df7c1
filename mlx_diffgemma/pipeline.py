"""From a checkpoint and a prompt to text: the tokenizer, a backend and the sampler put together."""

import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_diffgemma.backends import Backend, check_tokens, chosen_backend, load_backend
from mlx_diffgemma.causal import Token, causal
from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.config import CausalConfig, GenerationConfig
from mlx_diffgemma.editing.texts import Editing
from mlx_diffgemma.errors import InputError
from mlx_diffgemma.sampler import Block, Draft, block_diffusion
from mlx_diffgemma.tokenizer import Tokenizer

#: A text, a conversation of {"role": ..., "content": ...} messages, or token ids.
Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]

#: Two ways to write with one model: a canvas at a time, or one token at a time.
MODES = ("diffusion", "causal")


@dataclass(frozen=True)
class Statistics:
    """What a generation took.

    Attributes:
        prompt_tokens: tokens before the first canvas.
        new_tokens: tokens written, the end token included and the padding behind it not.
        denoising_steps: of each block; none in the causal mode, whose every pass is the encoder's.
        encode_seconds, denoise_seconds: wall time in either.
    """

    prompt_tokens: int
    new_tokens: int
    denoising_steps: tuple[int, ...]
    encode_seconds: float
    denoise_seconds: float

    @property
    def tokens_per_forward(self) -> float:
        """New tokens per denoising step: how much a canvas saves over one token at a time, which is 1."""
        return self.new_tokens / sum(self.denoising_steps) if self.denoising_steps else 1.0

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / (self.encode_seconds + self.denoise_seconds)


def statistics(prompt_tokens: int, new_tokens: int, parts: Sequence[Block | Token], encode_seconds: float = 0.0) -> Statistics:
    """Of a text that was written in ``parts``, of one row each, after a prompt that took ``encode_seconds`` beforehand."""
    blocks = [part for part in parts if isinstance(part, Block)]
    return Statistics(
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        denoising_steps=tuple(int(block.steps[0]) for block in blocks),
        encode_seconds=encode_seconds + sum(part.encode_seconds if isinstance(part, Block) else part.seconds for part in parts),
        denoise_seconds=sum(block.denoise_seconds for block in blocks),
    )


@dataclass(frozen=True)
class Generation:
    """A finished text.

    Attributes:
        text: without structural markers and the end token.
        tokens: the new ids, up to and with the end token.
        finish_reason: "stop" (the model ended its text) or "length" (``max_new_tokens`` reached).
        seed: with the prompt and the options, it gives the same tokens again.
        logprobs: of each token after all before it, natural, under the causal model at temperature 1; None where not asked for.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    seed: int
    statistics: Statistics
    logprobs: list[float] | None = None


#: What :meth:`DiffusionGemma.stream` yields.
Event = Draft | Block | Token | Generation


@dataclass(frozen=True)
class Score:
    """How likely the causal model finds a text.

    Attributes:
        tokens: its ids.
        logprobs: the natural-log probability of each after all before it, at temperature 1; NaN where nothing is before it.
    """

    tokens: list[int]
    logprobs: list[float]

    @property
    def perplexity(self) -> float:
        """exp of minus the mean log-probability of the tokens that have one; NaN where none has."""
        known = [value for value in self.logprobs if not math.isnan(value)]
        return math.exp(-sum(known) / len(known)) if known else math.nan


def sampling_options(generation: GenerationConfig, mode: str, options: Mapping[str, Any]) -> GenerationConfig | CausalConfig:
    """The options of ``mode`` where they are not None, over those of a checkpoint's ``generation``.

    Raises InputError for an unknown mode or option, one of the other mode, or a bad value.
    """
    if mode not in MODES:
        raise InputError(f"unknown mode {mode!r}; known are {' and '.join(MODES)}")
    own, other = (GenerationConfig, CausalConfig) if mode == "diffusion" else (CausalConfig, GenerationConfig)
    foreign = [name for name in options if name in other.option_names() and name not in own.option_names()]
    for name in foreign:
        if options[name] is not None:
            raise InputError(f"{name} is no option of the {mode} mode, but of the other one; leave it out, or change the mode")
    config = generation if mode == "diffusion" else CausalConfig.from_generation(generation)
    return config.replace(**{name: value for name, value in options.items() if name not in foreign})


class DiffusionGemma(Editing):
    """A loaded model. Made by :func:`load`. How it edits inside a text is in :mod:`mlx_diffgemma.editing.texts`."""

    def __init__(self, checkpoint: Checkpoint, backend: Backend) -> None:
        self.checkpoint, self.backend = checkpoint, backend

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_folder(self.checkpoint.folder, self.checkpoint.generation.eos_token_ids)

    def generate(self, prompt: Prompt, **options: Any) -> Generation:
        """Write a text after ``prompt``. Takes the options of :meth:`stream`, and returns its last event."""
        for event in self.stream(prompt, **options):
            if isinstance(event, Generation):
                return event
        raise AssertionError("a stream ends in its Generation")

    def stream(
        self,
        prompt: Prompt,
        *,
        mode: str = "diffusion",
        raw: bool = False,
        system: str | None = None,
        seed: int | None = None,
        frozen: NDArray[np.int32] | None = None,
        canvas: NDArray[np.int32] | None = None,
        logprobs: bool = False,
        **options: Any,
    ) -> Iterator[Event]:
        """Write a text after ``prompt``, and show how.

        Args:
            prompt: a text or a conversation, which the chat template renders, or token ids, which are taken as they are.
            mode: ``diffusion``, a canvas at a time, or ``causal``, one token at a time.
            raw: take a text as it is, without the chat template.
            system: a system message to put before the conversation.
            seed: 0 to 2^64 - 1; by default a fresh one, which the Generation tells.
            frozen, canvas: as in :func:`~mlx_diffgemma.sampler.block_diffusion`. Diffusion only.
            logprobs: tell how likely the causal model finds each token. In diffusion this costs an output head a block, and one
                more pass in the end.
            options: fields of :class:`~mlx_diffgemma.config.GenerationConfig`, over those of the checkpoint, or in the causal
                mode of :class:`~mlx_diffgemma.config.CausalConfig`.

        Yields:
            A Draft after each denoising step and a Block after each canvas, or a Token after each pass; and at the end the
            Generation. Whoever stops reading stops the computation; nothing is left to close.

        Raises:
            InputError: at once, before the first event is asked for.
        """
        ids = self.prompt_ids(prompt, raw=raw, system=system)
        config = sampling_options(self.checkpoint.generation, mode, options)
        seed = secrets.randbits(64) if seed is None else seed
        events: Iterator[Draft | Block] | Iterator[Token]
        if isinstance(config, CausalConfig):
            if frozen is not None or canvas is not None:
                raise InputError("frozen and canvas belong to the diffusion mode; leave them out, or change the mode")
            events = causal(self.backend, ids, config, seed=seed, logprobs=logprobs)
        else:
            first = None if canvas is None else np.atleast_2d(np.asarray(canvas, np.int32))
            events = block_diffusion(self.backend, ids, config, seed=seed, frozen=frozen, canvas=first, logprobs=logprobs)
        return self._finished(events, ids.shape[1], config, seed)

    def score(self, text: str | Sequence[int], prompt: Prompt | None = None, *, raw: bool = False) -> Score:
        """How likely the causal model finds each token of ``text``: exact, in one pass over it.

        Args:
            text: a text, which is tokenized by itself, or token ids. It is taken as it is.
            prompt: what comes before, read as in :meth:`stream`: with the chat template, ``text`` is the model's answer. By
                default the beginning-of-sequence token alone.
            raw: take a prompt as it is, without the chat template. Without one, begin with ``text`` itself: its first token then
                has no probability, and does not count in the perplexity.

        Raises InputError where the text is empty or, with the prompt, exceeds the model's context.
        """
        ids: Sequence[int] = self.tokenizer.encode(text) if isinstance(text, str) else text
        if not len(ids):
            raise InputError("the text is empty")
        tokens, cache = self._checked_ids(ids), self.backend.new_cache()
        before = np.empty((1, 0), np.int32)
        if prompt is not None:
            before = self.prompt_ids(prompt, raw=raw)
        elif not raw:
            before = np.array([[self.tokenizer.bos_token_id]], np.int32)
        total, context = before.shape[1] + tokens.shape[1], self.backend.config.max_position_embeddings
        if total > context:
            raise InputError(f"the text, with its prompt, has {total} tokens; the model's context is {context}; shorten it")
        if before.size:
            self.backend.encode(before, cache)
        return Score(tokens[0].tolist(), self.backend.score(tokens, cache)[0].tolist())

    def prompt_ids(
        self, prompt: Prompt, *, raw: bool = False, system: str | None = None, escape: bool = False
    ) -> NDArray[np.int32]:
        """Token ids [1, N] of a prompt, as :meth:`stream` reads it; with ``escape``, markup in its texts is plain text."""
        if isinstance(prompt, str):
            if not prompt.strip():
                raise InputError("the prompt is empty")
            if raw:
                if system is not None:
                    raise InputError("a system message needs the chat template; leave out raw, or write it into the prompt")
                return self._checked_ids(self.tokenizer.encode(prompt, escape=escape))
            prompt = [{"role": "user", "content": prompt}]
        if not len(prompt):  # noqa: PLC1802 (a NumPy array has no truth value)
            raise InputError("the prompt is empty")
        if isinstance(prompt[0], Mapping):
            messages = [{"role": "system", "content": system}] if system is not None else []
            return self._checked_ids(self.tokenizer.chat([*messages, *prompt], escape=escape))
        return self._checked_ids(prompt)

    def _checked_ids(self, ids: Sequence[Any]) -> NDArray[np.int32]:
        if self.backend.config.image_token_id in ids:
            raise InputError("the prompt holds an image, and images are not supported yet; leave it out")
        tokens = np.asarray([ids])
        if tokens.dtype.kind not in "iu":
            raise InputError("a prompt of token ids must be integers")
        check_tokens(tokens, self.backend.config)  # before int32 overflows
        return tokens.astype(np.int32)

    def _finished(
        self,
        events: Iterator[Draft | Block] | Iterator[Token],
        prompt_tokens: int,
        config: GenerationConfig | CausalConfig,
        seed: int,
    ) -> Iterator[Event]:
        written: list[Block | Token] = []
        for event in events:
            if not isinstance(event, Draft):
                written.append(event)
            yield event
        tokens = np.concatenate([part.tokens[0] for part in written])[: config.max_new_tokens].tolist()
        ends = [position for position, token in enumerate(tokens) if token in config.eos_token_ids]
        tokens = tokens[: ends[0] + 1] if ends else tokens
        logprobs = [part.logprobs[0] for part in written if part.logprobs is not None]
        text = self.tokenizer.decode(tokens[:-1] if ends else tokens)
        yield Generation(
            text=text,
            tokens=tokens,
            finish_reason="stop" if ends else "length",
            seed=seed,
            statistics=statistics(prompt_tokens, len(tokens), written),
            logprobs=np.concatenate(logprobs)[: len(tokens)].tolist() if logprobs else None,
        )


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
    backend = chosen_backend(backend, dtype)  # said before a download of many gigabytes
    checkpoint = Checkpoint.open(source, revision)
    return DiffusionGemma(checkpoint, load_backend(checkpoint, backend, device=device, dtype=dtype))

"""From a checkpoint and a prompt to text: the tokenizer, a backend and the sampler put together."""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_diffgemma.backends import Backend, check_tokens, chosen_backend, load_backend
from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.errors import InputError
from mlx_diffgemma.sampler import Block, Draft, block_diffusion
from mlx_diffgemma.tokenizer import Tokenizer

#: A text, a conversation of {"role": ..., "content": ...} messages, or token ids.
Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]


@dataclass(frozen=True)
class Statistics:
    """What a generation took.

    Attributes:
        prompt_tokens: tokens before the first canvas.
        new_tokens: tokens written, the end token included and the padding behind it not.
        denoising_steps: of each block.
        encode_seconds, denoise_seconds: wall time in either.
    """

    prompt_tokens: int
    new_tokens: int
    denoising_steps: tuple[int, ...]
    encode_seconds: float
    denoise_seconds: float

    @property
    def tokens_per_forward(self) -> float:
        """New tokens per denoising step: how much a canvas saves over one token at a time."""
        return self.new_tokens / sum(self.denoising_steps)

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / (self.encode_seconds + self.denoise_seconds)


@dataclass(frozen=True)
class Generation:
    """A finished text.

    Attributes:
        text: without structural markers and the end token.
        tokens: the new ids, up to and with the end token.
        finish_reason: "stop" (the model ended its text) or "length" (``max_new_tokens`` reached).
        seed: with the prompt and the options, it gives the same tokens again.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    seed: int
    statistics: Statistics


class DiffusionGemma:
    """A loaded model. Made by :func:`load`."""

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
        raw: bool = False,
        system: str | None = None,
        seed: int | None = None,
        frozen: NDArray[np.int32] | None = None,
        canvas: NDArray[np.int32] | None = None,
        **options: Any,
    ) -> Iterator[Draft | Block | Generation]:
        """Write a text after ``prompt``, and show how.

        Args:
            prompt: a text or a conversation, which the chat template renders, or token ids, which are taken as they are.
            raw: take a text as it is, without the chat template.
            system: a system message to put before the conversation.
            seed: 0 to 2^64 - 1; by default a fresh one, which the Generation tells.
            frozen, canvas: as in :func:`~mlx_diffgemma.sampler.block_diffusion`; ``canvas`` is [L] or [1, L].
            options: fields of :class:`~mlx_diffgemma.config.GenerationConfig`, over those of the checkpoint.

        Yields:
            A Draft after each denoising step, a Block after each canvas, and at the end the Generation. Whoever stops reading
            stops the computation; nothing is left to close.

        Raises:
            InputError: at once, before the first event is asked for.
        """
        ids = self.prompt_ids(prompt, raw=raw, system=system)
        config = self.checkpoint.generation.replace(**options)
        seed = secrets.randbits(64) if seed is None else seed
        first = None if canvas is None else np.atleast_2d(np.asarray(canvas, np.int32))
        events = block_diffusion(self.backend, ids, config, seed=seed, frozen=frozen, canvas=first)
        return self._finished(events, ids.shape[1], config, seed)

    def prompt_ids(self, prompt: Prompt, *, raw: bool = False, system: str | None = None) -> NDArray[np.int32]:
        """Token ids [1, N] of a prompt, as :meth:`stream` reads it."""
        if isinstance(prompt, str):
            if not prompt.strip():
                raise InputError("the prompt is empty")
            if raw:
                if system is not None:
                    raise InputError("a system message needs the chat template; leave out raw, or write it into the prompt")
                return self._checked_ids(self.tokenizer.encode(prompt))
            prompt = [{"role": "user", "content": prompt}]
        if not prompt:
            raise InputError("the prompt is empty")
        if isinstance(prompt[0], Mapping):
            messages = [{"role": "system", "content": system}] if system is not None else []
            return self._checked_ids(self.tokenizer.chat([*messages, *prompt]))
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
        self, events: Iterator[Draft | Block], prompt_tokens: int, config: GenerationConfig, seed: int
    ) -> Iterator[Draft | Block | Generation]:
        blocks = []
        for event in events:
            if isinstance(event, Block):
                blocks.append(event)
            yield event
        tokens = np.concatenate([block.tokens[0] for block in blocks])[: config.max_new_tokens].tolist()
        ends = [position for position, token in enumerate(tokens) if token in config.eos_token_ids]
        tokens = tokens[: ends[0] + 1] if ends else tokens
        statistics = Statistics(
            prompt_tokens=prompt_tokens,
            new_tokens=len(tokens),
            denoising_steps=tuple(int(block.steps[0]) for block in blocks),
            encode_seconds=sum(block.encode_seconds for block in blocks),
            denoise_seconds=sum(block.denoise_seconds for block in blocks),
        )
        text = self.tokenizer.decode(tokens[:-1] if ends else tokens)
        yield Generation(text, tokens, "stop" if ends else "length", seed, statistics)


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

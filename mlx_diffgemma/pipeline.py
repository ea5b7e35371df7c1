"""A loaded model: joins a checkpoint, its tokenizer, a backend and the sampler, and turns prompts into text."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from mlx_diffgemma.arguments import checked
from mlx_diffgemma.backends import Backend, Piece, Progress, check_tokens, find_place, load_backend, scored
from mlx_diffgemma.checkpoint import Checkpoint
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.errors import InputError
from mlx_diffgemma.hub import local_folder
from mlx_diffgemma.options import SamplerOptions, spelled_out
from mlx_diffgemma.prefix_cache import read
from mlx_diffgemma.prompts import IMAGE, VIDEO, PieceRule, Prompt, PromptTokens, chunks, place_images
from mlx_diffgemma.settling import Settled
from mlx_diffgemma.steps import Steps, run
from mlx_diffgemma.tokenizer import Tokenizer, with_media
from mlx_diffgemma.vision.media import Media, split_media_steps
from mlx_diffgemma.vision.sources import with_images
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

    def __init__(
        self, checkpoint: Checkpoint, backend: Backend | None = None, *, loader: Callable[[], Backend] | None = None
    ) -> None:
        """Take a loaded ``backend``, or else a ``loader`` that loads it when it is first needed."""
        if backend is None and loader is None:
            raise TypeError("a model needs a backend or a loader")
        self.checkpoint, self._backend, self._loader = checkpoint, backend, loader

    @property
    def backend(self) -> Backend:
        """The weights on their device."""
        if self._backend is None and self._loader is not None:
            self._backend = self._loader()
        assert self._backend is not None
        return self._backend

    @property
    def config(self) -> ModelConfig:
        """The shape of the model."""
        return self.checkpoint.config

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer. It is loaded on first use."""
        return Tokenizer.from_folder(
            self.checkpoint.folder, self.checkpoint.generation.eos_token_ids, self.checkpoint.config.vocab_size
        )

    @cached_property
    def piece_rule(self) -> PieceRule:
        """The rule that cuts the model's texts into pieces for the causal pass."""
        ends = {self.tokenizer.end_of_turn_id, *self.checkpoint.generation.eos_token_ids}
        return PieceRule(self.config.canvas_length, tuple(sorted(ends)), self.tokenizer.reply_starts, self.soft_tokens)

    @cached_property
    def soft_tokens(self) -> tuple[int, ...]:
        """The ids of the soft tokens of images and of the frames of videos. None if the model reads text only."""
        if self.config.vision is None:
            return ()
        known = (self.config.image_token_id, self.config.video_token_id)
        named = (self.tokenizer.token_id(marker) for marker in (IMAGE, VIDEO))
        return tuple(token for token in map(_first, known, named) if token is not None)

    @spelled_out
    @checked
    def generate(
        self,
        prompt: Prompt,
        *,
        images: Sequence[Any] = (),
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
        given: dict[str, Any] = {"images": images, "mode": mode, "system": system, "raw": raw, "markup": markup}
        for event in self.stream(
            prompt, **given, seed=seed, stop=stop, logprobs=logprobs, frozen=frozen, canvas=canvas, **options
        ):
            if isinstance(event, Generation):
                return event
        raise AssertionError("a stream ends in its Generation")

    @spelled_out
    @checked
    def stream(
        self,
        prompt: Prompt,
        *,
        images: Sequence[Any] = (),
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
            prompt: a text or a conversation, which the chat template renders, or token ids, which are used unchanged. The content
                of a message may have parts with images and videos; see :mod:`mlx_diffgemma.vision.media`.
            images: images and videos that come before the text of the prompt, or of the conversation's last message: paths,
                bytes, Pillow images, NumPy arrays, or :class:`~mlx_diffgemma.vision.sources.Image` and
                :class:`~mlx_diffgemma.vision.sources.Video`. A raw prompt says where they stand, by ``<|image|>`` and
                ``<|video|>`` and with ``markup``. Token ids have the soft tokens of each.
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
            ComputationError: the model computed NaN or infinity.
        """
        tokens = run(self.prompt_steps(prompt, raw=raw, system=system, markup=markup, images=images))
        writing = Writing(
            config=sampling_config(self.checkpoint.generation, mode, options),
            seed=fresh_seed() if seed is None else seed,
            stop=tuple(stop),
            settled=settled,
            logprobs=logprobs,
            frozen=frozen,
            canvas=canvas,
        )
        writing.check(self.config, tokens.ids)
        return self._stream(tokens, writing)

    def _stream(self, prompt: PromptTokens, writing: Writing) -> Iterator[Event]:
        context = read(self.backend, prompt, self.piece_rule)
        yield from write(self.backend, self.tokenizer, context, writing)

    @checked
    def score(
        self,
        text: str | Sequence[int],
        prompt: Prompt | None = None,
        *,
        images: Sequence[Any] = (),
        system: str | None = None,
        raw: bool = False,
        markup: bool = False,
    ) -> Score:
        """How likely the causal model finds each token of ``text``. The result is exact and takes one pass over the text.

        Args:
            text: a text or token ids, used unchanged. A text is tokenized separately from the prompt.
            prompt: what comes before the text, read as in :meth:`stream`. With the chat template, ``text`` is the model's answer.
                By default the prompt is only the beginning-of-sequence token.
            images, system, markup: as in :meth:`stream`. ``markup`` applies to ``text`` too.
            raw: use the prompt unchanged, without the chat template. If there is no prompt, begin with ``text`` itself. Its first
                token then has no probability and does not count in the perplexity.

        Raises InputError if the text is empty or if, with the prompt, it exceeds the model's context, and ComputationError if the
        model computed NaN or infinity.
        """
        tokens = self._placed(self.tokenizer.encode(text, markup=markup) if isinstance(text, str) else text, ()).ids
        before = PromptTokens(np.empty(0, np.int32))
        if prompt is not None:
            before = run(self.prompt_steps(prompt, raw=raw, system=system, markup=markup, images=images))
        elif system is not None:
            raise InputError("a system message needs a prompt; give one, or leave out system")
        elif len(images):
            raise InputError("images need a prompt; give one, or leave out images")
        elif not raw:
            before = PromptTokens(np.array([self.tokenizer.bos_token_id], np.int32))
        total, context = len(before) + len(tokens), self.config.max_position_embeddings
        if total > context:
            raise InputError(f"the text and its prompt have {total} tokens, but the model's context is {context}; shorten them")
        cache = read(self.backend, before, self.piece_rule).cache if len(before) else self.backend.new_cache()
        parts = [scored(self.backend, Piece(piece, cache)) for piece in chunks(tokens)]
        return Score(tokens.tolist(), np.concatenate(parts).tolist())

    @checked
    def prompt_ids(
        self,
        prompt: Prompt,
        *,
        raw: bool = False,
        system: str | None = None,
        markup: bool = False,
        images: Sequence[Any] = (),
    ) -> NDArray[np.int32]:
        """Token ids [N] of a prompt, read as in :meth:`stream`."""
        return run(self.prompt_steps(prompt, raw=raw, system=system, markup=markup, images=images)).ids

    def prompt_steps(
        self,
        prompt: Prompt,
        *,
        raw: bool = False,
        system: str | None = None,
        markup: bool = False,
        images: Sequence[Any] = (),
        tools: Sequence[Mapping[str, Any]] | None = None,
        **template_options: Any,
    ) -> Steps[PromptTokens]:
        """The tokens and images of a prompt, read as in :meth:`stream`, in steps.

        Args:
            tools, template_options: as in :meth:`~mlx_diffgemma.tokenizer.Tokenizer.render`.
        """
        if isinstance(prompt, str):
            if not prompt.strip():
                raise InputError("the prompt is empty")
            if raw:
                if system is not None:
                    raise InputError("a system message needs the chat template; leave out raw, or write it into the prompt")
                media = yield from self._media(images)
                text = with_media(prompt, media) if markup else prompt
                if media and not markup:
                    raise InputError("a raw prompt with images needs markup, and <|image|> in the prompt for each image")
                return self._placed((yield from self.tokenizer.encode_steps(text, markup=markup)), media)
            prompt = [{"role": "user", "content": prompt}]
        if not len(prompt):  # noqa: PLC1802 (a NumPy array has no truth value)
            raise InputError("the prompt is empty")
        if isinstance(prompt[0], Mapping):
            messages = with_images(prompt, images)
            messages, media = yield from self._split(messages)
            if system is not None:
                messages = [{"role": "system", "content": system}, *messages]
            ids = yield from self.tokenizer.chat_steps(messages, tools=tools, markup=markup, media=media, **template_options)
            return self._placed(ids, media)
        if system is not None:
            raise InputError("a system message needs the chat template; leave it out, or give a text instead of token ids")
        return self._placed(prompt, (yield from self._media(images)))

    def _media(self, images: Sequence[Any]) -> Steps[Sequence[Media]]:
        """Images and videos that belong to no message."""
        message = with_images([{"role": "user", "content": ""}], images)
        _, media = yield from self._split(message)
        return media

    def _split(self, messages: Sequence[Any]) -> Steps[tuple[list[Any], list[Media]]]:
        return split_media_steps(messages, self.config.vision, max_soft_tokens=self.config.max_position_embeddings)

    def _placed(self, ids: Sequence[Any], media: Sequence[Media]) -> PromptTokens:
        return place_images(self._checked_ids(ids), [image for each in media for image in each.images], self.soft_tokens)

    def _checked_ids(self, ids: Sequence[Any]) -> NDArray[np.int32]:
        tokens = np.asarray(ids)
        if not tokens.size:
            raise InputError("the text is empty")
        if tokens.dtype.kind not in "iu":
            raise InputError("a prompt of token ids must be integers")
        check_tokens(tokens, self.config)  # before int32 overflows
        return tokens.astype(np.int32)


def _first(known: int | None, named: int | None) -> int | None:
    return named if known is None else known


def prepare(
    source: str | Path,
    *,
    revision: str | None = None,
    backend: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    force: bool = False,
    image_mask: str | None = None,
    showing: Callable[[], AbstractContextManager[Progress]] = lambda: nullcontext(lambda done, total: None),
) -> DiffusionGemma:
    """As :func:`load`, but without the weights: they are downloaded and loaded when the model's backend is first needed.

    What costs little is checked first, in this order: the form of ``source``, the backend, the device, ``config.json``, the other
    small files, the headers of the weights, the tokenizer.

    Args:
        showing: a context manager that is open while the weights are loaded. It yields the function that receives the progress.
    """
    local_folder(source)
    find_place(backend, device=device, dtype=dtype)
    checkpoint = Checkpoint.open(source, revision).with_image_mask(image_mask)

    def loader() -> Backend:
        with showing() as progress:
            return load_backend(checkpoint, backend, device=device, dtype=dtype, force=force, progress=progress)

    model = DiffusionGemma(checkpoint, loader=loader)
    _ = model.tokenizer  # a damaged one is refused before the weights are read
    return model


@checked
def load(
    source: str | Path,
    *,
    revision: str | None = None,
    backend: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    force: bool = False,
    image_mask: str | None = None,
) -> DiffusionGemma:
    """Load a checkpoint from a folder or the hub.

    From the hub, the weights are downloaded last: after the checks of everything else, of the free memory and of the free disk.

    Args:
        source: a folder, or a hub id such as ``google/diffusiongemma-26B-A4B-it``.
        revision: a branch, tag or commit of the hub's repository.
        backend, device, dtype, force, image_mask: see :func:`mlx_diffgemma.backends.load_backend`.

    Raises:
        CheckpointError, BackendError, InputError: with one line that says what is wrong and what to do.
    """
    model = prepare(source, revision=revision, backend=backend, device=device, dtype=dtype, force=force, image_mask=image_mask)
    _ = model.backend
    return model

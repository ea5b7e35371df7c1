"""The sampler: block-autoregressive diffusion, with one implementation for every backend.

The sampler writes a text one canvas (block) at a time. A canvas starts as random tokens. In each denoising step, the backend
returns for every position the most likely token, a sampled token, and the entropy, which says how unsure the model is. The
sampler accepts the positions with the lowest entropy. They take the sampled token, and all others get fresh random tokens. The
next step starts from this canvas and decides again for every position, so no position stays accepted. When the most likely tokens
have stopped changing and the mean entropy is low, these tokens are the block.

The acceptance rule is the entropy-bounded sampler of https://arxiv.org/abs/2505.24857. In order of rising entropy, a position is
accepted while the entropies before it sum to at most ``entropy_bound``. This sum is an upper bound on the joint mutual
information of the accepted positions.

:func:`decide` is one step: a pure function from a :class:`Canvas` and the backend's result to the next Canvas. :func:`diffuse`
does the rest: it encodes, calls the backend and commits, for one text or for several side by side.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_diffgemma import noise
from mlx_diffgemma.backends import (
    MAX_BATCH,
    Backend,
    Cache,
    Denoised,
    Pending,
    Piece,
    Row,
    check_computed,
    check_tokens,
    rows_in_pass,
    scored,
)
from mlx_diffgemma.config import GenerationConfig, ModelConfig
from mlx_diffgemma.errors import InputError
from mlx_diffgemma.prompts import chunks

FREE = -1  # in a template: the model may write here


@dataclass(frozen=True, eq=False)
class Text:
    """One text to write.

    Attributes:
        prompt: int32 [N], the tokens before the text that are not in the cache yet. Empty if the cache holds all of them.
        seed: 0 to 2^64 - 1. The same seed gives the same tokens, beside any other texts and on any backend.
        cache: holds the tokens before ``prompt``, and is filled in place. By default a new cache.
        frozen: int32 [P], a template of the text, from its first token on: a token id where the token is given, -1 where the
            model may write. Given positions keep their token in every canvas and are always accepted. They do not count in the
            entropy bound or in the mean entropy that stops a block. An end token that the model writes before them still ends the
            text.
        canvas: int32 [P], a draft of the text, from its first token on. The canvases begin with its tokens instead of random
            ones; -1 begins with a random token.
        logprobs: score each block when it is committed. This costs an output head per block, and one extra pass for the last
            block.
    """

    prompt: NDArray[np.int32]
    seed: int = 0
    cache: Cache | None = None
    frozen: NDArray[np.int32] | None = None
    canvas: NDArray[np.int32] | None = None
    logprobs: bool = False


@dataclass(frozen=True, eq=False)
class Draft:
    """A canvas after one denoising step.

    Attributes:
        block: index of the canvas, from 0.
        step: number of the step in this block, from 1.
        temperature: the temperature of this step.
        canvas: int32 [L], the input of the step.
        argmax: int32 [L], the most likely tokens. They would be committed if this were the last step.
        entropy: float32 [L], nats.
        accepted: bool [L], which positions took their sampled token.
        done: whether the canvas needs no further step.
        seconds: wall time of the step. The time in which the caller handles events does not count, although a device may work
            meanwhile.
    """

    block: int
    step: int
    temperature: float
    canvas: NDArray[np.int32]
    argmax: NDArray[np.int32]
    entropy: NDArray[np.float32]
    accepted: NDArray[np.bool_]
    done: bool
    seconds: float


@dataclass(frozen=True, eq=False)
class Block:
    """A finished canvas.

    Attributes:
        index: index of the block, from 0.
        tokens: int32 [L], with padding after the first end token.
        steps: denoising steps that the block took.
        ended: whether the text has ended.
        encode_seconds, denoise_seconds: wall time of encoding, and of all steps as in :class:`Draft`.
        logprobs: float32, the natural-log probability of each token given all tokens before it, under the causal model at
            temperature 1, for the tokens up to the text's end. None when not requested.
    """

    index: int
    tokens: NDArray[np.int32]
    steps: int
    ended: bool
    encode_seconds: float
    denoise_seconds: float
    logprobs: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Rules:
    """The settings that all steps of all canvases share: the sampler's options, the tokens per canvas, the vocabulary's size."""

    config: GenerationConfig
    length: int
    vocab_size: int


@dataclass(frozen=True, eq=False)
class Canvas:
    """One canvas between two denoising steps.

    Attributes:
        seed, block: the seed of its text, and its index in the text.
        tokens: int32 [L], the input of the next step.
        template: int32 [L], -1 where the model may write. None if it may write everywhere.
        step: denoising steps done.
        argmax, entropy, accepted: [L], from the last step.
        history: the argmax of each of the last ``stability_threshold`` steps.
        self_conditioning: from the last step, opaque.
        done: whether the canvas needs no further step.
    """

    seed: int
    block: int
    tokens: NDArray[np.int32]
    template: NDArray[np.int32] | None
    step: int = 0
    argmax: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    entropy: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    accepted: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, bool))
    history: tuple[NDArray[np.int32], ...] = ()
    self_conditioning: Any = None
    done: bool = False

    @classmethod
    def begin(cls, text: Text, block: int, rules: Rules) -> "Canvas":
        """The canvas of a text's block, before its first step."""
        tokens = noise.canvas_tokens(text.seed, block, 0, rules.length, rules.vocab_size)
        template = _part(text.frozen, block, rules.length)
        tokens = _pin(_pin(tokens, _part(text.canvas, block, rules.length)), template)
        return cls(text.seed, block, tokens, template)

    def row(self, cache: Cache, rules: Rules) -> Row:
        """The backend's input for the next step."""
        return Row(
            canvas=self.tokens,
            cache=cache,
            temperature=temperature_of(self.step + 1, rules.config),
            noise_key=None if rules.config.greedy else noise.sampling_key(self.seed, self.block, self.step + 1),
            self_conditioning=self.self_conditioning,
            frozen=self.template,
        )


def decide(canvas: Canvas, answer: Denoised, rules: Rules) -> Canvas:
    """The canvas after a step in which the backend returned ``answer``. Raises ComputationError if an entropy is no number.

    Accepted positions take their sampled token, and all others take fresh noise. The canvas is done when its argmax equals the
    argmax of each of the last ``stability_threshold`` steps and the mean entropy of the free positions is below
    ``confidence_threshold``, or when it has taken ``max_denoising_steps`` steps.
    """
    check_computed(answer.entropy, "a denoising step")
    config, step = rules.config, canvas.step + 1
    free = np.ones(len(canvas.tokens), bool) if canvas.template is None else canvas.template == FREE
    accepted = accept(answer.entropy, free, config.entropy_bound)
    fresh = noise.canvas_tokens(canvas.seed, canvas.block, step, rules.length, rules.vocab_size)
    threshold = config.stability_threshold
    stable = len(canvas.history) >= threshold and all(np.array_equal(answer.argmax, past) for past in canvas.history)
    # The sum is in double precision. If no position is free, nothing is left to decide.
    confident = not free.any() or answer.entropy[free].sum(dtype=np.float64) < config.confidence_threshold * free.sum()
    return replace(
        canvas,
        tokens=_pin(np.where(accepted, answer.sampled, fresh), canvas.template),
        step=step,
        argmax=answer.argmax,
        entropy=answer.entropy,
        accepted=accepted,
        history=(*canvas.history, answer.argmax)[-threshold:] if threshold else (),
        self_conditioning=answer.self_conditioning,
        done=bool(stable and confident) or step == config.max_denoising_steps,
    )


def accept(entropy: NDArray[np.float32], free: NDArray[np.bool_], bound: float) -> NDArray[np.bool_]:
    """Which positions [L] are accepted: all frozen ones, and the ``free`` ones that the entropy bound allows.

    In order of rising entropy, a free position is accepted while the entropies before it sum to at most ``bound`` nats. At least
    one is always accepted.
    """
    ranked = np.where(free, entropy.astype(np.float64), 0.0)  # frozen positions come first and add nothing to the sum
    order = np.argsort(ranked, kind="stable")
    rising = ranked[order]
    accepted = np.empty(entropy.shape, bool)
    accepted[order] = rising.cumsum() - rising <= bound
    return accepted


def temperature_of(step: int, config: GenerationConfig) -> float:
    """The temperature of denoising step ``step`` (from 1). It falls linearly from ``t_max`` towards ``t_min``."""
    return config.temperature(config.max_denoising_steps + 1 - step)


def block_diffusion(backend: Backend, text: Text, config: GenerationConfig) -> Iterator[Draft | Block]:
    """Write up to ``config.max_new_tokens`` tokens of one text, in whole canvases.

    To continue the text, use the same cache, here or in :func:`~mlx_diffgemma.causal.causal`. The last block is not in the cache
    yet: pass it as the prompt. With ``logprobs`` it is in the cache, up to the text's end.

    A step is launched before the events of the step before it are yielded, so that a device works while the caller handles them.
    When you stop reading, that step is dropped. It changes nothing in the cache.

    Yields:
        A :class:`Draft` after each denoising step, and a :class:`Block` after each canvas.

    Raises:
        InputError: before anything is computed.
        ComputationError: the model computed NaN or infinity.
    """
    return (event for _, event in diffuse(backend, [text], config))


def diffuse(
    backend: Backend, texts: Sequence[Text], config: GenerationConfig, *, batch: str = "exact", max_batch: int = MAX_BATCH
) -> Iterator[tuple[int, Draft | Block]]:
    """Write several texts side by side. Their rows can share passes; each text comes out as from :func:`block_diffusion`.

    The texts are independent and may have different lengths. A text that has ended takes no part in later passes.

    Args:
        batch, max_batch: see :func:`~mlx_diffgemma.backends.rows_in_pass`.

    Yields:
        The index of a text and its event.

    Raises:
        InputError: before anything is computed.
        ComputationError: the model computed NaN or infinity for one of the texts. This ends all of them.
    """
    length = config.canvas_length or backend.config.canvas_length
    rules = Rules(config, length, backend.config.vocab_size)
    for text in texts:
        check_text(backend.config, text, config)
    size = rows_in_pass(backend, batch, max_batch)
    return _diffuse(backend, [_Writing(backend, text, rules) for text in texts], size)


class _Writing:
    """A text while it is being written, block by block."""

    def __init__(self, backend: Backend, text: Text, rules: Rules) -> None:
        self.text, self.rules, self.backend = text, rules, backend
        self.cache = backend.new_cache() if text.cache is None else text.cache
        self.pending = chunks(text.prompt)  # the pieces to encode before the next canvas
        self.blocks = ceil(rules.config.max_new_tokens / rules.length)
        self.canvas = Canvas.begin(text, 0, rules)
        self.encode_seconds = self.denoise_seconds = 0.0  # for this block

    def decided(self, answer: Denoised, temperature: float, seconds: float) -> Draft:
        """Take the result of a step that has taken ``seconds`` so far."""
        started, seen = time.perf_counter(), self.canvas.tokens
        self.canvas = canvas = decide(self.canvas, answer, self.rules)
        seconds += time.perf_counter() - started
        self.denoise_seconds += seconds
        parts = canvas.argmax, canvas.entropy, canvas.accepted, canvas.done
        return Draft(canvas.block, canvas.step, temperature, seen, *parts, seconds)

    def committed(self) -> Block:
        """Commit the canvas, which is done, and begin the next one."""
        canvas, config = self.canvas, self.rules.config
        tokens, count = commit(canvas.argmax, config)
        ended = count < len(tokens) or int(tokens[-1]) in config.eos_token_ids
        last = ended or canvas.block + 1 == self.blocks
        logprobs = None
        if self.text.logprobs:
            started = time.perf_counter()
            count = min(count, config.max_new_tokens - canvas.block * self.rules.length)
            logprobs = scored(self.backend, Piece(tokens[:count], self.cache))
            self.encode_seconds += time.perf_counter() - started
        block = Block(canvas.block, tokens, canvas.step, ended, self.encode_seconds, self.denoise_seconds, logprobs)
        self.encode_seconds = self.denoise_seconds = 0.0
        if not last:
            self.pending = [] if self.text.logprobs else [tokens]
            self.canvas = Canvas.begin(self.text, canvas.block + 1, self.rules)
        return block


class _Step:
    """One denoising step of some texts' canvases, in one pass."""

    def __init__(self, backend: Backend, texts: Sequence[tuple[int, _Writing]]) -> None:
        self.backend, self.texts = backend, texts
        self.rows: list[Row] = []
        self.pending: Pending | None = None
        self.seconds = 0.0

    @property
    def done(self) -> bool:
        """Whether a canvas is done. What follows it is not known before it is committed."""
        return any(each.canvas.done for _, each in self.texts)

    def encode(self) -> None:
        """Encode what comes before the canvases."""
        while to_encode := [each for _, each in self.texts if each.pending]:
            started = time.perf_counter()
            self.backend.encode([Piece(each.pending.pop(0), each.cache) for each in to_encode])
            seconds = time.perf_counter() - started
            for each in to_encode:
                each.encode_seconds += seconds

    def launch(self) -> None:
        """Launch the pass, unless it is launched already or something must be encoded first."""
        if self.pending is None and not any(each.pending for _, each in self.texts):
            started = time.perf_counter()
            self.rows = [each.canvas.row(each.cache, each.rules) for _, each in self.texts]
            self.pending = self.backend.launch(self.rows)
            self.seconds += time.perf_counter() - started

    def drafts(self) -> Iterator[tuple[int, _Writing, Draft]]:
        """Wait for the pass, and decide text by text."""
        assert self.pending is not None
        started = time.perf_counter()
        answers = self.pending()
        self.seconds += time.perf_counter() - started
        for (index, each), row, answer in zip(self.texts, self.rows, answers, strict=True):
            yield index, each, each.decided(answer, row.temperature, self.seconds)


def _steps(backend: Backend, writing: Sequence[_Writing], size: int) -> Iterator[_Step]:
    """The steps of all texts, round after round, until all are written. Those of a new round need the last one's commits."""
    active = list(enumerate(writing))
    while active:
        yield from (_Step(backend, active[start : start + size]) for start in range(0, len(active), size))
        # A finished canvas that was not replaced by a new one was the last canvas of its text.
        active = [(index, each) for index, each in active if not each.canvas.done]


def _diffuse(backend: Backend, writing: Sequence[_Writing], size: int) -> Iterator[tuple[int, Draft | Block]]:
    steps = _steps(backend, writing, size)
    following = next(steps, None)
    while step := following:
        step.encode()
        step.launch()
        decided: list[tuple[int, _Writing, Draft]] = []
        try:
            decided.extend(step.drafts())
            if not step.done:
                # The device works on the next step while the caller takes the events of this one.
                following = next(steps)
                following.launch()
        finally:  # an error comes after the events before it
            for index, each, draft in decided:
                yield index, draft
                if draft.done:
                    yield index, each.committed()
        if following is step:
            following = next(steps, None)


def commit(argmax: NDArray[np.int32], config: GenerationConfig) -> tuple[NDArray[np.int32], int]:
    """The tokens that are committed, padded after the first end token, and how many there are up to and including that token."""
    ends = np.flatnonzero(np.isin(argmax, config.eos_token_ids))
    if not ends.size:
        return argmax, len(argmax)
    count = int(ends[0]) + 1
    tokens = argmax.copy()
    tokens[count:] = config.pad_token_id
    return tokens, count


def _part(whole: NDArray[np.int32] | None, block: int, length: int) -> NDArray[np.int32] | None:
    """The part [L] of a template that lies in one canvas, or None if it has no tokens there."""
    if whole is None:
        return None
    part = whole[block * length : (block + 1) * length]
    template = np.full(length, FREE, np.int32)
    template[: len(part)] = part
    return template if (template != FREE).any() else None


def _pin(canvas: NDArray[np.int32], template: NDArray[np.int32] | None) -> NDArray[np.int32]:
    return canvas if template is None else np.where(template == FREE, canvas, template)


def check_seed(seed: int) -> None:
    """Raise InputError unless ``seed`` is an integer from 0 to 2^64 - 1."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise InputError(f"a seed must be an integer between 0 and 2^64 - 1, got {seed!r}")


def check_prompt(model: ModelConfig, text: Text) -> int:
    """How many tokens come before the text. Raises InputError if there are none, or if a token id or the seed is wrong."""
    cached = 0 if text.cache is None else len(text.cache)
    if not cached or text.prompt.ndim != 1 or text.prompt.size:
        check_tokens(text.prompt, model)
    check_seed(text.seed)
    return cached + len(text.prompt)


def check_lengths(model: ModelConfig, config: GenerationConfig, before: int) -> None:
    """Raise InputError unless the canvases of the new tokens fit into the model's context after ``before`` tokens."""
    length = config.canvas_length or model.canvas_length
    if length > model.canvas_length:
        raise InputError(
            f"canvas_length {length} is larger than the model's {model.canvas_length}; use {model.canvas_length} or less"
        )
    if before + ceil(config.max_new_tokens / length) * length > model.max_position_embeddings:
        raise InputError(
            f"{before} prompt tokens and {config.max_new_tokens} new tokens, in canvases of {length}, exceed the model's context "
            f"of {model.max_position_embeddings} tokens; use a shorter prompt or fewer new tokens"
        )


def check_text(model: ModelConfig, text: Text, config: GenerationConfig) -> None:
    """Raise InputError if the model cannot write the text."""
    check_lengths(model, config, check_prompt(model, text))
    length = config.canvas_length or model.canvas_length
    room = ceil(config.max_new_tokens / length) * length
    for name, template in (("frozen", text.frozen), ("canvas", text.canvas)):
        if template is None:
            continue
        if template.ndim != 1 or len(template) > room:
            raise InputError(
                f"{name} must be a list of at most {room} tokens (max_new_tokens {config.max_new_tokens} in whole canvases), "
                f"got shape {list(template.shape)}"
            )
        if template.size and (template.min() < FREE or template.max() >= model.vocab_size):
            raise InputError(f"{name} has a token id outside the vocabulary of {model.vocab_size} tokens")

"""The counter-based noise: its check values, its distribution, and its agreement with the backends' own noise."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from mlx_diffgemma import noise
from mlx_diffgemma.backends import Backend, Piece, Row, load_backend
from mlx_diffgemma.checkpoint import Checkpoint
from support.comparing import assert_close
from support.reference import REAL_VOCABULARY, make_checkpoint

WORDS = 2**32
STATISTICS = ("argmax", "sampled", "entropy")


def test_check_values() -> None:
    assert noise.key(0, 1, 0, 0) == 0x74C79E4F
    assert noise.key(12345678901234567890, 2, 3, 7) == 0x025CA280
    assert noise.canvas_tokens(0, 0, 0, 4, 262_144).tolist() == [219303, 27114, 188482, 239081]
    bits = noise.bits(noise.key(0, 2, 0, 1), np.arange(2, dtype=np.uint32))
    assert bits.tolist() == [0x5C3E644F, 0x5D1E2D8B]
    assert noise.mix(np.arange(3, dtype=np.uint32) ^ bits[1]).tolist() == [0x7F0ECB34, 0x78E9916D, 0x21CA3F07]
    assert noise.sampling_key(0, 0, 1) == noise.key(0, 2, 0, 1)
    assert noise.causal_key(0, 7) == noise.key(0, 3, 7, 0)


def test_seeds_differ_in_either_half() -> None:
    seeds = [0, 1, 2**32, 2**64 - 1]
    canvases = np.stack([noise.canvas_tokens(seed, 2, 5, 33, 331) for seed in seeds])
    assert canvases.dtype == np.int32
    assert len(np.unique(canvases, axis=0)) == len(seeds), "two seeds give one canvas"
    assert len({noise.sampling_key(seed, 0, 1) for seed in seeds}) == len(seeds), "two seeds give one key"


def test_a_position_does_not_know_of_those_behind_it() -> None:
    whole = noise.canvas_tokens(4, 2, 5, 33, 331)
    for length in (1, 2, 32):
        np.testing.assert_array_equal(noise.canvas_tokens(4, 2, 5, length, 331), whole[:length])


@pytest.mark.parametrize("vocab_size", [96, 331, 262_144])
def test_canvas_tokens_are_uniform(vocab_size: int) -> None:
    tokens = np.stack([noise.canvas_tokens(seed, 1, 3, 256, vocab_size) for seed in range(200)])
    assert tokens.min() >= 0
    assert tokens.max() < vocab_size
    bins = 64
    counts = np.bincount((tokens.ravel().astype(np.int64) * bins) // vocab_size, minlength=bins)
    # bins hold unequal numbers of ids if the vocabulary is not a multiple of the number of bins
    expected = np.bincount((np.arange(vocab_size) * bins) // vocab_size, minlength=bins) * (tokens.size / vocab_size)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    deviations = (chi_square - (bins - 1)) / math.sqrt(2 * (bins - 1))
    print(f"vocabulary {vocab_size}: chi-square {chi_square:.1f} for {bins - 1} degrees of freedom")
    assert abs(deviations) < 5, f"chi-square lies {deviations:.1f} standard deviations from its mean"


def test_every_bit_is_fair_and_changes_with_every_input() -> None:
    def words(seed: int = 3, stream: int = 2, block: int = 0, step: int = 1, first: int = 0) -> NDArray[np.uint32]:
        return noise.bits(noise.key(seed, stream, block, step), np.arange(first, first + 2**15, dtype=np.uint32))

    base = words()
    others = [words(seed=4), words(seed=3 + WORDS), words(stream=1), words(block=1), words(step=2), words(first=1)]
    for index, changed in enumerate([np.zeros_like(base), *others]):
        flipped = np.unpackbits((base ^ changed).view(np.uint8)).reshape(-1, 32).mean(axis=0)
        off = np.abs(flipped - 0.5).max()
        assert off < 5 * 0.5 / math.sqrt(base.size), f"comparison {index}: a bit is off a half by {off:.4f}"


def test_gumbel_moments_and_draws() -> None:
    keys = np.array([noise.sampling_key(seed, 0, 1) for seed in range(4000)], np.uint32)
    gumbel = noise.gumbel(keys[:, None], np.uint32(0), np.arange(64, dtype=np.uint32)).astype(np.float64)
    spread = math.sqrt(gumbel.size)
    assert abs(gumbel.mean() - np.euler_gamma) < 5 * math.pi / math.sqrt(6) / spread
    variance = math.pi**2 / 6
    assert abs(gumbel.var() - variance) < 5 * math.sqrt(4.4) * variance / spread  # the excess kurtosis is 12 / 5
    logits = np.random.default_rng(0).normal(scale=2.0, size=64)
    probabilities = np.exp(logits) / np.exp(logits).sum()
    counts = np.bincount((logits + gumbel).argmax(axis=1), minlength=64)
    off = np.abs(counts - len(keys) * probabilities) / np.sqrt(len(keys) * probabilities * (1 - probabilities))
    # a few draws of a rare token are many standard deviations
    common = len(keys) * probabilities > 10
    assert off[common].max() < 5, f"token {off[common].argmax()} is drawn {off[common].max():.1f} standard deviations off"


def unmix(word: int) -> int:
    """The inverse of :func:`noise.mix`: the word that it turns into ``word``."""
    word ^= word >> 16
    word = word * pow(0x846CA68B, -1, WORDS) % WORDS
    word ^= (word >> 15) ^ (word >> 30)
    word = word * pow(0x7FEB352D, -1, WORDS) % WORDS
    return word ^ (word >> 16)


def test_gumbel_at_both_ends() -> None:
    bits = int(noise.bits(5, np.uint32(9)))
    tokens = np.array([unmix(word) ^ bits for word in (0, 1, 2**31, WORDS - 1)], np.uint32)
    gumbel = noise.gumbel(np.uint32(5), np.uint32(9), tokens)
    assert noise.MAX_GUMBEL - 0.1 < gumbel[0] <= noise.MAX_GUMBEL
    assert_close(gumbel[:3], [33 * math.log(2), -math.log(1.5 * 2.0**-32), -math.log(math.log(2))], 1e-5, "known noise")
    assert gumbel[3] == -np.inf, "where u rounds to 1"


def gumbel_on_device(backend_name: str, words: NDArray[np.uint32]) -> NDArray[np.float32]:
    """The Gumbel noise of mixed ``words``, from the backend's own function."""
    if backend_name == "torch":
        import torch

        from mlx_diffgemma.backends.torch import noise as torch_noise

        device = "cuda" if torch.cuda.is_available() else "cpu"
        return torch_noise.gumbel(torch.from_numpy(words.view(np.int32)).to(device)).cpu().numpy()
    import mlx.core as mx

    from mlx_diffgemma.backends.mlx import noise as mlx_noise

    return np.array(mlx_noise.gumbel(mx.array(words)))


def test_device_noise_reaches_to_both_ends(backend_name: str) -> None:
    ends = [0, 1, 2, 2**31 - 1, 2**31, WORDS - 129, WORDS - 128, WORDS - 2, WORDS - 1]
    words = np.array(ends + np.random.default_rng(0).integers(0, WORDS, 2**14).tolist(), np.uint32)
    bits = int(noise.bits(0, np.uint32(0)))
    tokens = np.array([unmix(int(word)) ^ bits for word in words], np.uint32)
    expected = noise.gumbel(np.uint32(0), np.uint32(0), tokens)
    actual = gumbel_on_device(backend_name, words)
    never = expected == -np.inf
    assert never[len(ends) - 1]
    assert (actual[never] == -np.inf).all()
    assert_close(actual[~never], expected[~never], 1e-5, f"{backend_name}: Gumbel noise")


@pytest.fixture(scope="module")
def real_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Backend]:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path_factory.mktemp("real_vocabulary"), REAL_VOCABULARY))
    return lambda name: load_backend(checkpoint, name, dtype="float32")


def test_denoise_over_the_real_vocabulary(real_vocabulary: Callable[[str], Backend], backend_name: str) -> None:
    ours, seeds = real_vocabulary(backend_name), (7, 2**40)
    canvases = [noise.canvas_tokens(seed, 0, 0, ours.config.canvas_length, ours.config.vocab_size) for seed in range(2)]
    caches = [ours.new_cache() for _ in canvases]
    ours.encode([Piece(canvas[: 3 + index], cache) for index, (canvas, cache) in enumerate(zip(canvases, caches, strict=True))])
    rows = [Row(canvas, cache, 1.0) for canvas, cache in zip(canvases, caches, strict=True)]
    logits = np.stack(ours.logits(rows)).astype(np.float64)
    positions = np.arange(logits.shape[1], dtype=np.uint32)[:, None]
    tokens = np.arange(ours.config.vocab_size, dtype=np.uint32)
    farthest = 0.0
    # from nearly certain (0.4 nats) to nearly uniform (12.476 of 12.477 nats)
    for temperature in (0.3, 1.0, 2.0, 60.0):
        scores = logits / temperature
        shifted = scores - scores.max(axis=-1, keepdims=True)
        weights = np.exp(shifted)
        entropy = np.log(weights.sum(axis=-1)) - (weights * shifted).sum(axis=-1) / weights.sum(axis=-1)
        for step in (1, 2, 3):
            keys = [noise.sampling_key(seed, 1, step) for seed in seeds]
            given = [replace(row, temperature=temperature, noise_key=key) for row, key in zip(rows, keys, strict=True)]
            answers = ours.denoise(given)
            argmax, sampled, found = (np.stack([getattr(answer, name) for answer in answers]) for name in STATISTICS)
            case = f"{backend_name}, temperature {temperature}, step {step}"
            assert_close(found, entropy, 1e-4, f"{case}, entropy from {entropy.min():.3f} to {entropy.max():.3f}")
            assert (argmax == logits.argmax(axis=-1)).all(), f"{case}: argmax"
            perturbed = scores + noise.gumbel(np.array(keys, np.uint32)[:, None, None], positions, tokens)
            # a draw may differ only where two tokens tie to float32 rounding
            drawn = np.take_along_axis(perturbed, sampled[..., None], axis=-1)[..., 0]
            assert_close(drawn, perturbed.max(axis=-1), 1e-4, f"{case}, perturbed logit of the draw")
            farthest = max(farthest, -np.take_along_axis(shifted, sampled[..., None], axis=-1).min())
    assert farthest > 9, f"no draw lies further than {farthest:.1f} below the likeliest token: the noise's tail is untried"


def test_without_keys_nothing_is_drawn_and_frozen_positions_answer_themselves(
    backend: Callable[..., Backend], backend_name: str
) -> None:
    ours = backend(backend_name, "base")
    canvases = [noise.canvas_tokens(seed, 0, 0, ours.config.canvas_length, ours.config.vocab_size) for seed in (1, 2)]
    caches = [ours.new_cache() for _ in canvases]
    ours.encode([Piece(canvas[:5], cache) for canvas, cache in zip(canvases, caches, strict=True)])
    rows = [Row(canvas, cache, 0.7) for canvas, cache in zip(canvases, caches, strict=True)]
    plain = ours.denoise(rows)
    for answer in plain:
        assert (answer.sampled == answer.argmax).all()
    frozen = np.full(ours.config.canvas_length, -1, np.int32)
    frozen[[0, 5]] = 0, 77
    free = frozen < 0
    keys = [noise.sampling_key(seed, 0, 1) for seed in (1, 2)]
    given = [replace(row, noise_key=key, frozen=frozen) for row, key in zip(rows, keys, strict=True)]
    for result, unpinned in zip(ours.denoise(given), plain, strict=True):
        for name in ("argmax", "sampled"):
            assert (getattr(result, name)[~free] == frozen[~free]).all(), name
        assert not result.entropy[~free].any()
        assert_close(result.entropy[free], unpinned.entropy[free], 1e-6, f"{backend_name}: entropy of free positions")
        assert (result.argmax[free] == unpinned.argmax[free]).all()
    # A plain row is unchanged by a row that draws and a frozen row in the same pass.
    first, second = ours.denoise([given[0], rows[1]])
    assert (first.argmax[~free] == frozen[~free]).all()
    assert (second.sampled == plain[1].sampled).all()
    assert (second.argmax == plain[1].argmax).all()

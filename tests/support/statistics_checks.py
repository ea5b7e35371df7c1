"""Compares the Triton kernels for a step's statistics with float64 and with PyTorch's own operations, and rows with rows alone.

test_kernels_statistics.py runs this in a separate process, interpreted or on CUDA.
"""

import os
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mlx_diffgemma.backends.torch.kernels import statistics as kernels
from mlx_diffgemma.backends.torch.statistics import eager, statistics
from mlx_diffgemma.noise import bits, mix
from support.comparing import assert_close

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
CAP = 30.0
#: How far a tempered logit may be from its exact value, as a part of the largest one that the softcap allows: a GPU's approximate
#: power of 2 and division (2^-22 and 2^-23 of their results), and roundings.
TOLERANCE = 6e-7
SIZES = [(3, 1), (9, 1_000), (5, 5_003), (1, 4_096), (2, 70_001)]  # rows, vocabulary

each_type = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


class Given(NamedTuple):
    raw: torch.Tensor  # [T, V]
    noise: torch.Tensor  # int32 [T]
    temperature: torch.Tensor  # float32 [T]


def given(rows: int, v_size: int, dtype: torch.dtype, scale: float = 8.0) -> Given:
    raw = torch.from_numpy(np.random.default_rng(v_size).standard_normal((rows, v_size), np.float32)) * scale
    noise = torch.from_numpy(bits(77, np.arange(rows, dtype=np.uint32)).view(np.int32))
    temperature = torch.linspace(0.4, 1.3, rows)
    return Given(raw.to(DEVICE, dtype), noise.to(DEVICE), temperature.to(DEVICE))


class Exact(NamedTuple):
    """The same in float64, as NumPy arrays: tempered logits, and those plus noise [T, V]; and how far ours may be off [T, 1]."""

    scores: NDArray[np.float64]
    noisy: NDArray[np.float64]
    tolerance: NDArray[np.float64]

    @classmethod
    def of(cls, given: Given) -> "Exact":
        raw, temperature = (x.cpu().double().numpy() for x in (given.raw, given.temperature[:, None]))
        words = mix(np.arange(raw.shape[1], dtype=np.uint32) ^ given.noise.cpu().numpy().view(np.uint32)[:, None])
        uniform = (words.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)).astype(np.float64)
        with np.errstate(divide="ignore"):
            noise = -np.log(-np.log1p(-uniform))
        scores = CAP * np.tanh(raw / CAP) / temperature
        return cls(scores, scores + noise, TOLERANCE * CAP / temperature)

    @property
    def entropy(self) -> NDArray[np.float64]:
        weights = np.exp(self.scores - self.scores.max(axis=1, keepdims=True))
        p = weights / weights.sum(axis=1, keepdims=True)
        return -(p * np.log(np.where(p > 0, p, 1))).sum(axis=1)


def rounded(x: NDArray[np.float64], dtype: torch.dtype) -> NDArray[np.float64]:
    return torch.from_numpy(x).float().to(dtype).double().numpy()


def check_best(token: torch.Tensor, values: NDArray[np.float64], tolerance: NDArray[np.float64], what: str) -> None:
    """Assert that no value is larger than that of ``token``, and none before it as large, by more than ``tolerance``."""
    assert token.dtype == torch.int64
    chosen = token.cpu().numpy()
    mine = np.take_along_axis(values, chosen[:, None], axis=1)
    print(f"{what}: at most {(values.max(axis=1, keepdims=True) - mine).max():.1e} below the best")
    assert (values <= mine + tolerance).all(), what
    before = np.arange(values.shape[1]) < chosen[:, None]
    assert not ((values == mine) & before).any(), f"{what}: not the first of equals"


@each_type
@pytest.mark.parametrize(("rows", "v_size"), [*SIZES, (70, 40)])
@pytest.mark.parametrize("draws", [True, False], ids=["noise", "no noise"])
def test_statistics(rows: int, v_size: int, dtype: torch.dtype, draws: bool) -> None:
    drawn = given(rows if draws else min(rows, 3), v_size, dtype)
    exact = Exact.of(drawn)
    argmax, sampled, entropy, *_ = kernels.statistics(drawn.raw, drawn.noise if draws else None, CAP, drawn.temperature)
    check_best(argmax, exact.scores, exact.tolerance, "argmax")
    if draws:
        check_best(sampled, exact.noisy, exact.tolerance + 1e-5, "sampled")
        plain = eager(*drawn[:2], CAP, drawn.temperature)
        same = float((sampled == plain.sampled).double().mean()), float((argmax == plain.argmax).double().mean())
        print("equal to PyTorch's operations:", same)
        assert same == (1.0, 1.0)
    else:
        assert torch.equal(sampled, argmax)
    assert_close(entropy.cpu(), exact.entropy, 2e-5, "entropy in nats")


@each_type
@pytest.mark.parametrize(("rows", "v_size"), SIZES)
def test_probabilities(rows: int, v_size: int, dtype: torch.dtype) -> None:
    """Rounded where PyTorch's operations round. The bounds allow any rounding of logits that are off by the tolerance."""
    drawn = given(rows, v_size, dtype)
    exact = Exact.of(drawn)
    *_, most, total = kernels.statistics(*drawn[:2], CAP, drawn.temperature)
    found = kernels.probabilities(drawn.raw, CAP, drawn.temperature, most, total)
    assert found.dtype == dtype
    low, high = (
        np.exp(rounded(exact.scores + sign * exact.tolerance, dtype) - exact.scores.max(axis=1, keepdims=True))
        for sign in (-1, 1)
    )
    part = 2.0**-8 if dtype == torch.bfloat16 else 1e-6 + 3e-6 * CAP
    ours = found.cpu().double().numpy()
    assert (ours >= low / high.sum(axis=1, keepdims=True) * (1 - part) - 1e-37).all()
    assert (ours <= high / low.sum(axis=1, keepdims=True) * (1 + part) + 1e-37).all()
    plain = eager(*drawn[:2], CAP, drawn.temperature).probabilities()
    assert_close(found.cpu().float(), plain.cpu().float(), 4e-3 if dtype == torch.bfloat16 else 2e-5, "probabilities")
    differing = float(((found != plain) & (plain > 1e-37)).double().mean())  # they may flush smaller ones to 0
    print(f"{differing:.2%} differ from PyTorch's operations")
    assert dtype == torch.float32 or differing < 0.01


@each_type
def test_softcap(dtype: torch.dtype) -> None:
    """From where tanh is its argument to where it is 1."""
    ramp = torch.linspace(-330, 330, 5_001, dtype=torch.float64)
    raw = torch.cat([ramp, ramp / 30, ramp / 3000]).to(dtype)[None]
    drawn = Given(raw.to(DEVICE), torch.zeros(1, dtype=torch.int32, device=DEVICE), torch.full((1,), 2.0, device=DEVICE))
    exact = Exact.of(drawn)
    zero, one = torch.zeros(1, device=DEVICE), torch.ones(1, device=DEVICE)
    if dtype == torch.float32:  # exp(s) then shows s
        found = kernels.probabilities(drawn.raw, CAP, drawn.temperature, zero, one).cpu().double().log().numpy()
        assert_close(found, exact.scores, 1e-5, "tempered logits")
    argmax, _, entropy, most, _ = kernels.statistics(*drawn[:2], CAP, drawn.temperature)
    check_best(argmax, exact.scores, exact.tolerance, "argmax")
    assert_close(entropy.cpu(), exact.entropy, 2e-5, "entropy in nats")
    assert most.item() == CAP / 2


@each_type
def test_equals(dtype: torch.dtype) -> None:
    """All equal; few values; large logits that the softcap makes equal: the first one counts."""
    v_size = 9_001
    few = torch.from_numpy(np.random.default_rng(5).integers(-3, 4, (1, v_size)).astype(np.float32))
    saturated = torch.where(few > 1, few * 1e4, few * 1e3)
    raw = torch.cat([torch.zeros(1, v_size), torch.full((1, v_size), -1e4), few, saturated, saturated.flip(1)])
    drawn = given(len(raw), 1, dtype)._replace(raw=raw.to(DEVICE, dtype))
    argmax, sampled, entropy, *_ = kernels.statistics(*drawn[:2], CAP, drawn.temperature)
    exact = Exact.of(drawn)
    assert argmax.cpu().tolist() == exact.scores.argmax(axis=1).tolist()
    assert (np.take_along_axis(exact.scores, argmax.cpu().numpy()[:, None], 1)[:, 0] == exact.scores.max(axis=1)).all()
    check_best(sampled, exact.noisy, exact.tolerance + 1e-5, "sampled")
    assert_close(entropy.cpu(), exact.entropy, 2e-5, "entropy in nats")
    assert_close(entropy.cpu()[:2], np.log([v_size, v_size]), 2e-5, "entropy of equals")


def before_mixing(word: int) -> int:
    """The word that ``mix`` makes ``word`` of."""
    x = word ^ (word >> 16)
    x = x * pow(0x846CA68B, -1, 2**32) % 2**32
    x = x ^ (x >> 15) ^ (x >> 30)
    x = x * pow(0x7FEB352D, -1, 2**32) % 2**32
    return x ^ (x >> 16)


@each_type
def test_the_largest_and_the_smallest_noise(dtype: torch.dtype) -> None:
    """A token whose u is 1 is never drawn, however likely; one whose word is 0 has the largest noise, 22.87."""
    raw = torch.zeros(2, 40)
    raw[0, 7], raw[1, 7], raw[1, 9] = 1e4, -4.0, 4.0
    noise = np.array([before_mixing(0xFFFFFFFF) ^ 7, before_mixing(0) ^ 7], np.uint32)
    assert mix(noise ^ np.uint32(7)).tolist() == [0xFFFFFFFF, 0]
    drawn = Given(
        raw.to(DEVICE, dtype), torch.from_numpy(noise.view(np.int32)).to(DEVICE), torch.tensor([0.4, 0.8], device=DEVICE)
    )
    argmax, sampled, *_ = kernels.statistics(*drawn[:2], CAP, drawn.temperature)
    assert argmax.tolist() == [7, 9]
    assert sampled[0] != 7
    assert sampled[1] == 7
    check_best(sampled, Exact.of(drawn).noisy, Exact.of(drawn).tolerance + 1e-5, "sampled")


def bit_patterns(x: torch.Tensor) -> torch.Tensor:
    return x.view({torch.bfloat16: torch.int16, torch.float32: torch.int32}.get(x.dtype, x.dtype))


@each_type
@pytest.mark.parametrize(("rows", "v_size"), [(8, 1_000), (4, 20_003)])
def test_a_row_has_the_same_bits_alone(rows: int, v_size: int, dtype: torch.dtype) -> None:
    def run(places: torch.Tensor) -> list[torch.Tensor]:
        raw, noise, temperature = (x[places].contiguous() for x in drawn)
        found = kernels.statistics(raw, noise, CAP, temperature)
        return [*map(bit_patterns, (*found, kernels.probabilities(raw, CAP, temperature, *found[3:])))]

    drawn = given(rows, v_size, dtype)
    everything = torch.arange(rows, device=DEVICE)
    whole = run(everything)
    for places in (everything.flip(0), everything[-1:], everything[1:3]):
        assert all(torch.equal(part, all_rows[places]) for part, all_rows in zip(run(places), whole, strict=True))


def test_nan_stays_in_its_row() -> None:
    drawn = given(3, 5_003, torch.bfloat16)
    whole = kernels.statistics(*drawn[:2], CAP, drawn.temperature)
    drawn.raw[1, 4_999] = torch.nan
    argmax, sampled, entropy, *_ = found = kernels.statistics(*drawn[:2], CAP, drawn.temperature)
    assert entropy.isnan().tolist() == [False, True, False]
    assert (argmax < 5_003).all()
    assert (sampled < 5_003).all()
    for one, other in zip(found, whole, strict=True):
        assert torch.equal(one[::2], other[::2])


@pytest.mark.skipif(DEVICE == "cpu", reason="a CPU computes them in tiles")
@each_type
def test_the_step_takes_the_kernels(dtype: torch.dtype) -> None:
    drawn = given(17, 5_003, dtype)
    found, own = statistics(*drawn[:2], CAP, drawn.temperature), kernels.statistics(*drawn[:2], CAP, drawn.temperature)
    for one, other in zip(found[:3], own[:3], strict=True):
        assert torch.equal(one, other)
    assert torch.equal(found.probabilities(), kernels.probabilities(drawn.raw, CAP, drawn.temperature, *own[3:]))


def test_slots_follow_the_vocabulary_alone() -> None:
    assert [kernels.slot_size(v_size) for v_size in (1, 40, 1_000, 4_096, 5_003, 262_144)] == [1, 64, 1_024, 4_096, 4_096, 4_096]

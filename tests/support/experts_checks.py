"""Compares the experts' kernels with float64, rounded where they round, and tokens of a batch with the same tokens alone.

test_kernels_experts.py runs this in a separate process, interpreted or on CUDA. Blocks are as large as the model's; the sizes
of the layer are not.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mlx_diffgemma.backends.torch import fused, products
from mlx_diffgemma.backends.torch.kernels import experts as kernels
from mlx_diffgemma.backends.torch.model import Experts
from mlx_diffgemma.backends.torch.quantized import quantize_modules
from mlx_diffgemma.checkpoint import Quantization
from support.comparing import assert_close
from support.fake import MODEL

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
# The interpreter runs the code for wgmma and for mma.sync, which take terms in different orders.
CAPABILITIES = [(9, 0), (8, 9)] if DEVICE == "cpu" else [torch.cuda.get_device_capability()]
HIDDEN, INNER, EXPERTS = 256, 192, 6  # like the model's 704, INNER is a multiple of 64 and not of 128
MANY = [] if DEVICE == "cpu" else [(2048, list(range(EXPERTS)), 2)]  # two minutes in the interpreter


@pytest.fixture(autouse=True)
def new_tensors_hold_nan() -> Iterator[None]:
    """What a kernel reads and nothing has written shows in the results."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, np.float32)).to(DEVICE)


def matrices(out: int, size: int, seed: int) -> tuple[kernels.Packed, Tensor]:
    """Random packed matrices [EXPERTS, out, size], and their values rounded to bfloat16, in float64 on the CPU.

    Scales have either sign, as ``mx.quantize`` writes them.
    """
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (EXPERTS, out, size), np.uint8)
    shape = EXPERTS, out, size // 64
    scales = torch.from_numpy(rng.uniform(0.01, 0.02, shape) * rng.choice([-1, 1], shape)).bfloat16()
    biases = (-7.5 * scales.double() + torch.from_numpy(rng.normal(0, 0.02, shape))).bfloat16()
    values = torch.from_numpy(codes).double().view(*shape, 64) * scales.double()[..., None] + biases.double()[..., None]
    words = torch.from_numpy((codes[..., ::2] | codes[..., 1::2] << 4).view(np.int32))
    # Torch rounds float64 to bfloat16 by way of float32. These values are exact in float32, so they are rounded once.
    assert torch.equal(values.float().double(), values)
    return (words.to(DEVICE), scales.to(DEVICE), biases.to(DEVICE)), values.flatten(-2).bfloat16().double()


GATE_UP, DOWN = matrices(2 * INNER, HIDDEN, 1), matrices(HIDDEN, INNER, 2)


def choices(tokens: int, among: list[int], top_k: int) -> tuple[Tensor, Tensor]:
    """Weights [T, K] and experts [T, K], different ones for each token, as a router chooses them."""
    rng = np.random.default_rng(tokens)
    chosen = np.stack([rng.permutation(among)[:top_k] for _ in range(tokens)]) if tokens else np.zeros((0, top_k), np.int64)
    return normal(tokens, top_k, seed=5).abs(), torch.from_numpy(chosen).to(DEVICE)


def mixed(x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    return kernels.mixed(x, weights, chosen, GATE_UP[0], DOWN[0])


def reference(x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """In float64, rounded where ``model.Experts`` rounds: gate, up, GELU, their product, each expert's output, and the sum."""
    x, weights, chosen = x.cpu().double(), weights.cpu().double(), chosen.cpu()
    total = torch.zeros_like(x)
    for expert in range(EXPERTS):
        token, k = torch.where(chosen == expert)
        gate, up = (x[token] @ GATE_UP[1][expert].T).bfloat16().double().chunk(2, dim=-1)
        h = F.gelu(gate, approximate="tanh").bfloat16().double() * up
        y = (h.bfloat16().double() @ DOWN[1][expert].T).bfloat16().double()
        total.index_add_(0, token, y * weights[token, k, None])
    return total.bfloat16().double()


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "among", "top_k"),
    [
        (1, [4], 1),
        (1, [0, 2, 5], 3),  # fewer pairs than experts
        (23, [1, 3, 4, 5], 2),  # blocks of 16
        (77, list(range(EXPERTS)), 3),  # blocks of 64, all of them with rows left over
        (131, [3], 1),  # one expert has all tokens, in three blocks; five have none
        *MANY,
    ],
)
def test_values(tokens: int, among: list[int], top_k: int, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu" and tokens in (77, 131) and capability != {77: (9, 0), 131: (8, 9)}[tokens]:
        pytest.skip("slow in the interpreter: each of these sizes runs with one order of terms")
    monkeypatch.setattr(kernels, "_capability", lambda device: capability)
    x = normal(tokens, HIDDEN).bfloat16()
    weights, chosen = choices(tokens, among, top_k)
    y = mixed(x, weights, chosen)
    assert y.dtype == torch.bfloat16
    expected = reference(x, weights, chosen)
    # A float32 sum may round to the other neighbour than a float64 sum.
    assert_close(y.cpu().double(), expected, 2**-7 * float(expected.abs().max()), "experts")
    other = float((y.cpu().double() != expected).double().mean())
    print(f"{other:.2%} of the values differ")
    assert other < 0.1


@pytest.mark.parametrize(("experts", "top_k"), [(128, 8), (6, 6), (5, 3), (1, 1)])
def test_routing(experts: int, top_k: int) -> None:
    scores = (normal(9, experts) * 4).bfloat16()
    scores[1] = scores[1].floor()  # many are equal, and the first ones are chosen
    scale = normal(experts, seed=8).bfloat16()
    weights, chosen = kernels.routed(scores, scale, top_k)
    order = np.argsort(-scores.double().cpu().numpy(), axis=1, kind="stable")[:, :top_k]
    assert chosen.cpu().tolist() == order.tolist()
    p = scores.double().softmax(dim=1).gather(1, chosen)
    expected = p / p.sum(dim=1, keepdim=True) * scale.double()[chosen]
    assert_close(weights.cpu(), expected.cpu(), 1e-6 * float(expected.abs().max()), "routing")
    one = torch.ones_like(scale)  # so that it does not matter which of equal ones is chosen
    eager, _ = fused.routed(scores.float(), one, top_k)
    assert_close(kernels.routed(scores, one, top_k)[0].cpu(), eager.cpu(), 1e-6, "routing, eager")
    assert torch.equal(kernels.routed(scores[4:5], scale, top_k)[0], weights[4:5])
    scores[3, 0] = float("nan")
    weights, chosen = kernels.routed(scores, scale, top_k)
    assert weights[3].isnan().all()
    assert ((chosen >= 0) & (chosen < experts)).all()


def test_no_tokens() -> None:
    assert kernels.routed(normal(0, 4).bfloat16(), normal(4), 2)[0].shape == (0, 2)
    assert mixed(normal(0, HIDDEN).bfloat16(), *choices(0, [0], 1)).shape == (0, HIDDEN)


def test_what_is_not_finite_stays_in_its_token() -> None:
    x = normal(20, HIDDEN).bfloat16()
    weights, chosen = choices(20, [0, 1, 4], 2)
    whole = mixed(x, weights, chosen)
    x[11, 3] = float("nan")
    y = mixed(x, weights, chosen)
    assert y[11].isnan().all()
    others = torch.arange(20, device=DEVICE) != 11
    assert torch.equal(y[others], whole[others])


@pytest.mark.parametrize(
    ("pairs", "experts", "few"), [(1, 1, False), (1, 6, True), (1024, 6, True), (2500, 6, False), (1025, 40, True)]
)
def test_pairs_are_sorted_and_divided_into_blocks(pairs: int, experts: int, few: bool) -> None:
    chosen = torch.from_numpy(np.random.default_rng(pairs).integers(0, experts, pairs)).to(DEVICE)
    chosen = chosen // 5 * 5 if few else chosen
    prepare, products, *_ = kernels.launches(pairs, HIDDEN, INNER, experts, 1, (9, 0))
    order, block_m = torch.full((pairs,), -1, dtype=torch.int32, device=DEVICE), prepare.constants["block_m"]
    table = torch.full((products.grid[0], 4), -9, dtype=torch.int32, device=DEVICE)
    x = normal(1, HIDDEN).bfloat16()
    only_sorting = kernels.Launch(prepare.kernel, (experts,), prepare.constants, prepare.options)
    only_sorting(chosen, x, order, table, torch.empty_like(x), pairs)
    in_order, expected = chosen.sort(stable=True)
    assert torch.equal(order.long(), expected)
    covered = torch.zeros(pairs, dtype=torch.long)
    for expert, first, end, _ in table.tolist():
        assert expert >= -1
        if expert >= 0:
            covered[first : min(first + block_m, end)] += 1
            assert (in_order[first:end] == expert).all()
            assert first < end
            assert end == pairs or in_order[end] > expert
    assert (covered == 1).all()


def test_the_model_uses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """``model.Experts`` calls them, and gives what it gives from the same weights in bfloat16."""
    layer = Experts(replace(MODEL, hidden_size=HIDDEN, moe_intermediate_size=INNER, num_experts=EXPERTS, top_k_experts=2))
    layer = layer.to(DEVICE, torch.bfloat16)
    for module, (_, values) in ((layer.gate_up_proj, GATE_UP), (layer.down_proj, DOWN)):
        module.weight.data = values.bfloat16().to(DEVICE)
    x, (weights, chosen) = normal(20, HIDDEN).bfloat16(), choices(20, [0, 1, 4], 2)
    with torch.inference_mode():
        expected = layer(x, weights, chosen)
        quantize_modules(layer, {name: Quantization(64, 4) for name in ("gate_up_proj", "down_proj")}, torch.bfloat16)
        for name, (packed, _) in (("gate_up_proj", GATE_UP), ("down_proj", DOWN)):
            quantized = layer.get_submodule(name)
            quantized.weight, quantized.scales, quantized.biases = packed
        monkeypatch.setattr(products.kernels, "on_tensor_cores", lambda x: True)
        y = layer(x, weights, chosen)
        assert torch.equal(y, mixed(x, weights, chosen))
        assert_close(y.float().cpu(), expected.float().cpu(), 2**-7 * float(expected.abs().max()), "model.Experts")


class Dots:
    """Dots in an order that depends only on the terms. The interpreter's own, by BLAS, may depend on shapes and the machine."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shapes: set[tuple[int, ...]] = set()
        self.backwards: tuple[int, ...] | None = None
        monkeypatch.setattr(np, "matmul", self.matmul)

    def matmul(self, a: Any, b: Any, dtype: type) -> Any:
        assert dtype == np.float32
        self.shapes.add(a.shape)  # on Hopper the first dimension decides the instruction, and the second is the block of a sum
        total = np.zeros((a.shape[0], b.shape[1]), np.float32)
        for k in range(a.shape[1])[:: -1 if a.shape == self.backwards else 1]:
            total += a[:, k, None] * b[k]
        return total


def cancelling() -> tuple[kernels.Packed, kernels.Packed]:
    """Matrices whose sums cancel for the rows of ``test_a_token_is_the_same_alone``, so that what is left shows their order.

    Columns of the third group are those of the first (for ``down`` with the opposite sign), and so are the rows that make them.
    """
    gate_up, down = ([tensor.clone() for tensor in packed] for packed, _ in (GATE_UP, DOWN))
    for tensor, width in zip(gate_up, (8, 1, 1), strict=True):
        tensor[..., 2 * width : 3 * width] = tensor[..., :width]
        for first in (0, INNER):
            tensor[:, first + 128 : first + 192] = tensor[:, first : first + 64]
    for tensor in gate_up[1:]:
        tensor[:, INNER + 64 : INNER + 128] *= 2**-20
    for tensor, width, sign in zip(down, (8, 1, 1), (1, -1, -1), strict=True):
        tensor[..., 2 * width : 3 * width] = sign * tensor[..., :width]
    return (gate_up[0], gate_up[1], gate_up[2]), (down[0], down[1], down[2])


def test_a_token_is_the_same_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    large, small = normal(50, 64) * 2**12, normal(50, 64, seed=6) * 2**-9
    x = torch.cat((large, small, -large, small), dim=1).bfloat16()
    weights, chosen = choices(len(x), [0, 2, 5], 2)
    gate_up, down = cancelling()
    dots = Dots(monkeypatch) if DEVICE == "cpu" else None
    whole = kernels.mixed(x, weights, chosen, gate_up, down)
    moved = torch.from_numpy(np.random.default_rng(1).permutation(len(x))).to(DEVICE)
    # All tokens have blocks of 64 rows, 40 of them blocks of 32, and fewer have blocks of 16.
    for some in (moved, *(torch.arange(len(x) - count, len(x), device=DEVICE) for count in (40, 13, 1))):
        alone = kernels.mixed(x[some], weights[some], chosen[some], gate_up, down)
        assert torch.equal(alone, whole[some]), f"{len(some)} tokens"
    if dots is None:
        return
    assert dots.shapes == {(64, 128), (128, 128)}
    for shape in dots.shapes:  # of gate and up, and of down
        dots.backwards = shape
        other = kernels.mixed(x, weights, chosen, gate_up, down) != whole
        print(f"{shape}: {float(other.float().mean()):.0%} of the values differ in another order")
        assert other.float().mean() > 0.25, "these values do not show the order of a sum"

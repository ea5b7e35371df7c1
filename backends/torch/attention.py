"""Attention of queries over the keys that they see, in bounded memory.

H query heads share K key-value heads in groups; N queries, S keys, D the head size. Scores are not scaled.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from mlx_diffgemma.backends import QUERY_TILE
from mlx_diffgemma.backends.torch import kernels


def bidirectional(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Every query sees every key: [B, H, N, D] over [B, K, S, D] gives [B, H, N, D]."""
    ours = _kernels(queries, keys, values)
    if ours is None:
        return _fused(queries, keys, values, None)
    total = keys.shape[2]
    seen = torch.arange(0, total + 1, total, dtype=torch.int32, device=queries.device)  # 0 and S; a copy from the host would wait
    mixed: Tensor = ours.attend(queries, keys, values, seen.expand(len(queries), 2).contiguous())
    return mixed


def _kernels(queries: Tensor, keys: Tensor, values: Tensor) -> ModuleType | None:
    """The module of the Triton kernels for these tensors. They have no gradients."""
    if not kernels.on_tensor_cores(queries):
        return None
    if torch.is_grad_enabled() and any(each.requires_grad for each in (queries, keys, values)):
        return None
    module = kernels.find("attention")
    return module if module is not None and queries.shape[-1] in module.SIZES else None


def causal(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    window: int | None,
    images: Sequence[tuple[int, int]] = (),
    reach: int = 1,
) -> Tensor:
    """Each query sees its own position and the window - 1 before it, or all before it if ``window`` is None.

    ``images`` are (start, stop) among the queries, in order. Within one of them, positions less than ``reach`` apart see each
    other too. The last N of the S keys are the queries' own positions. Queries are processed in tiles, so no mask is larger than
    [QUERY_TILE, S].
    """
    count, total = queries.shape[2], keys.shape[2]
    before = total - count
    tiles = []
    for start in range(0, count, QUERY_TILE):
        stop = min(start + QUERY_TILE, count)
        last = before + stop
        first = max(0, before + start - window + 1) if window else 0
        shared = [(before + one, before + other) for one, other in images if one < stop and other > start]
        if shared:  # keys of an image that began before this tile, or that ends after it
            first = min(first, max(shared[0][0], before + start - reach + 1))
            last = max(last, min(shared[-1][1], before + stop + reach - 1))
        lowest, highest = _reached(range(before + start, before + stop), window, shared, reach, queries.device)
        mask = None if stop - start == 1 else _mask(range(first, last), lowest, highest)
        tiles.append(_fused(queries[:, :, start:stop], keys[:, :, first:last], values[:, :, first:last], mask))
    return torch.cat(tiles, dim=2) if len(tiles) > 1 else tiles[0]


def _reached(
    queries: range, window: int | None, images: Sequence[tuple[int, int]], reach: int, device: torch.device
) -> tuple[Tensor | None, Tensor]:
    """The lowest and the highest key [N, 1] that each query of :func:`causal` sees, with all between. None: all before, too."""
    own = torch.arange(queries.start, queries.stop, device=device)[:, None]
    lowest, highest = own - window + 1 if window else None, own
    for start, stop in images:
        inside = (own >= start) & (own < stop)
        highest = torch.where(inside, (own + reach - 1).clamp(max=stop - 1), highest)
        if lowest is not None:
            lowest = torch.where(inside, lowest.minimum((own - reach + 1).clamp(min=start)), lowest)
    return lowest, highest


def _mask(keys: range, lowest: Tensor | None, highest: Tensor) -> Tensor:
    places = torch.arange(keys.start, keys.stop, device=highest.device)[None, :]
    seen = places <= highest
    return seen if lowest is None else seen & (places >= lowest)


def _fused(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attention that never holds all scores.

    On a CPU one kernel handles every case. On CUDA no fused kernel takes a mask, or heads of 512, together with shared heads.
    """
    if queries.is_cuda:
        return by_groups(queries, keys, values, mask)
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=1.0, enable_gqa=True)


def by_groups(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of heads that share keys, with kernels that do not support shared heads.

    Without a mask, the queries of a group are joined along N. A mask has one row per query, so with a mask each call takes one
    head of every group: first the first heads, then the second heads, and so on.
    """
    groups = queries.unflatten(1, (keys.shape[1], -1))  # [B, K, H / K, N, D]
    if mask is None:
        mixed = F.scaled_dot_product_attention(groups.flatten(2, 3), keys, values, scale=1.0)
        return mixed.unflatten(2, groups.shape[2:4]).flatten(1, 2)
    each = [F.scaled_dot_product_attention(one, keys, values, attn_mask=mask, scale=1.0) for one in groups.unbind(2)]
    return torch.stack(each, dim=2).flatten(1, 2)

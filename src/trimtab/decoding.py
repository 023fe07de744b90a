"""Attention of one query over keys that lie in pieces: the step of cached generation. Knows tensors; refuses to know
where the pieces come from.

A prefix stands in front of a cache that grows by a token a step. Joining the two would copy both at every step and
layer, and grouped heads would copy them again for each of their queries; here only the scores are joined.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

Piece = tuple[torch.Tensor, torch.Tensor]  # keys, values [B or 1, kv_heads, m, head_dim]
_UNKNOWN = ("position_bias", "softcap", "s_aux")
"""Arguments of attention functions that change the scores or their softmax."""


def decodes(query: torch.Tensor, mask: torch.Tensor | None, training: bool, kwargs: dict[str, Any]) -> bool:
    """Whether this is one query a row, with nothing that only the model's own function knows."""
    plain = all(kwargs.get(name) is None for name in _UNKNOWN) and (mask is None or mask.shape[1] == 1)
    return query.shape[2] == 1 and plain and not training and not torch.is_grad_enabled()


def decode(query: torch.Tensor, pieces: Sequence[Piece], mask: torch.Tensor | None, scaling: float) -> torch.Tensor:
    """softmax(scaling · q [k_1; k_2; …]ᵀ) [v_1; v_2; …] as [B, 1, heads, head_dim].

    Shapes: query [B, heads, 1, head_dim], mask [B, 1, 1, Σ m] (bool or additive) or None (everything visible).
    """
    batch, heads, _, width = query.shape
    kv_heads = pieces[0][0].shape[1]
    grouped = (query * scaling).view(batch, kv_heads, heads // kv_heads, width)
    scores = torch.cat([_product(grouped, keys.transpose(-1, -2)) for keys, _ in pieces], dim=-1)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    shares = scores.softmax(-1).to(query.dtype).split([keys.shape[-2] for keys, _ in pieces], dim=-1)
    found = [_product(share, values) for share, (_, values) in zip(shares, pieces, strict=True)]
    return torch.stack(found).sum(0).view(batch, 1, heads, width)


def _product(rows: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """[B, kv_heads, g, i] times [B or 1, kv_heads, i, j]; one matrix for all rows is not copied for each."""
    if matrices.shape[0] == rows.shape[0]:
        return rows @ matrices
    batch, kv_heads, group, inner = rows.shape
    merged = rows.transpose(0, 1).reshape(kv_heads, batch * group, inner) @ matrices[0]
    return merged.view(kv_heads, batch, group, -1).transpose(0, 1)

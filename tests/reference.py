"""An independent attention: written from the equation, head by head, in float64. Knows nothing of trimtab.

context_i = Σ_j softmax_j( cap(scale · q_i·k_j) + bias_ij  over the visible j and the prefix ) v_j
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

PREFIXES: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
"""id(attention module) -> keys, values [kv_heads, P, head_dim]"""
GATED: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
"""id(attention module) -> keys, values [kv_heads, P, head_dim], gates [heads]"""


def naive(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float = 1.0,
    softcap: float | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query [B, H, n, d], key and value [B, G, m, d], mask bool [B, 1, n, m] or None -> [B, n, H, d]"""
    groups = query.shape[1] // key.shape[1]
    bias = torch.zeros(query.shape[0], query.shape[1], query.shape[2], key.shape[2], dtype=query.dtype)
    if position_bias is not None:
        bias = bias + position_bias
    if attention_mask is not None:
        bias = bias.masked_fill(~attention_mask, float("-inf"))
    if id(module) in PREFIXES:
        k_p, v_p = (tensor.expand(key.shape[0], -1, -1, -1) for tensor in PREFIXES[id(module)])
        key, value = torch.cat([k_p, key], dim=2), torch.cat([v_p, value], dim=2)
        bias = torch.cat([torch.zeros(*bias.shape[:3], k_p.shape[2], dtype=bias.dtype), bias], dim=3)
    context = _attend(query, key, value, groups, bias, scaling, softcap)
    if id(module) in GATED:
        k_p, v_p, gate = GATED[id(module)]
        none = torch.zeros(*bias.shape[:3], k_p.shape[1], dtype=bias.dtype)
        added = _attend(query, k_p[None], v_p[None], groups, none, scaling)
        context = context + torch.tanh(gate)[None, :, None, None] * added
    return context.transpose(1, 2), None


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    groups: int,
    bias: torch.Tensor,
    scaling: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """[B, H, n, d], one head after the other; head h reads key-value head h // groups."""
    heads = []
    for h in range(q.shape[1]):
        scores = torch.einsum("bid,bjd->bij", q[:, h], k[:, h // groups].expand(q.shape[0], -1, -1)) * scaling
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores + bias[:, h]
        # a padded query may see nothing at all; its value is never read, but must not be NaN
        highest = scores.max(dim=-1, keepdim=True).values.clamp(min=-1e30).detach()
        weights = torch.exp(scores - highest)
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
        heads.append(torch.einsum("bij,bjd->bid", weights, v[:, h // groups].expand(q.shape[0], -1, -1)))
    return torch.stack(heads, dim=1)


def _mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


AttentionInterface.register("naive_reference", naive)
AttentionMaskInterface.register("naive_reference", _mask)

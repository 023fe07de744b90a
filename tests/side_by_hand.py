"""Side networks by hand: layers of llama and of bert in loops written from their equations, row by row, in float64.

Knows the names of an adapter's tensors; nothing else of trimtab.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import trimtab as tt
from tiny import inputs, tiny

HEADS, KV_HEADS = 4, 2
THETA, EPS = 10_000.0, 1e-6


def moved(family: str, method: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    """A tiny model and an adapter away from its start, so that gates and biases of zero hide nothing."""
    torch.manual_seed(5)
    model = tiny(family, dtype)
    adapter = tt.attach(model, method)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if not name.startswith("head_"):
                parameter.add_((0.1 if name.endswith("gates") else 0.3) * torch.randn_like(parameter))
    return model, adapter


def rows(matrix: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """W x + b for every position of x [n, in]."""
    return torch.stack([matrix @ one + (0 if bias is None else bias) for one in x])


def normed(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm, or RMSNorm where there is no bias."""
    out = []
    for one in x:
        if bias is None:
            out.append(one / torch.sqrt((one * one).mean() + eps) * weight)
        else:
            centred = one - one.mean()
            out.append(centred / torch.sqrt((centred * centred).mean() + eps) * weight + bias)
    return torch.stack(out)


def attended(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """[n, d], one query after the other"""
    out = []
    for i in range(len(q)):
        last = i + 1 if causal else len(k)
        scores = torch.stack([q[i] @ k[j] / math.sqrt(q.shape[1]) for j in range(last)])
        shares = torch.exp(scores) / torch.exp(scores).sum()
        out.append(sum((shares[j] * v[j] for j in range(last)), torch.zeros_like(v[0])))
    return torch.stack(out)


def rotated(x: Tensor, full: int) -> Tensor:
    """x [n, d] turned by the frequencies that every (full / d)-th pair of a head of width `full` has."""
    half = x.shape[1] // 2
    out = x.clone()
    for position in range(len(x)):
        for pair in range(half):
            angle = position * THETA ** (-2 * pair * (full // x.shape[1]) / full)
            a, b = x[position, pair], x[position, pair + half]
            out[position, pair] = a * math.cos(angle) - b * math.sin(angle)
            out[position, pair + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def llama_block(w: dict[str, Tensor], at: int, h: Tensor) -> Tensor:
    own = {name.removeprefix(f"states.side.blocks.{at}."): tensor for name, tensor in w.items()}
    x = normed(h, own["input_layernorm.weight"], None, EPS)
    q, k, v = (rows(own[f"self_attn.{name}_proj.weight"], x) for name in "qkv")
    size = q.shape[1] // HEADS
    heads = []
    for head in range(HEADS):
        group = head // (HEADS // KV_HEADS)
        one, other = slice(head * size, (head + 1) * size), slice(group * size, (group + 1) * size)
        heads.append(attended(rotated(q[:, one], 8), rotated(k[:, other], 8), v[:, other], causal=True))
    h = h + rows(own["self_attn.o_proj.weight"], torch.cat(heads, dim=1))
    x = normed(h, own["post_attention_layernorm.weight"], None, EPS)
    gate, up = (rows(own[f"mlp.{name}_proj.weight"], x) for name in ("gate", "up"))
    return h + rows(own["mlp.down_proj.weight"], gate / (1 + torch.exp(-gate)) * up)


def bert_block(w: dict[str, Tensor], at: int, h: Tensor) -> Tensor:
    own = {name.removeprefix(f"states.side.blocks.{at}."): tensor for name, tensor in w.items()}

    def linear(name: str, x: Tensor) -> Tensor:
        return rows(own[f"{name}.weight"], x, own[f"{name}.bias"])

    q, k, v = (linear(f"attention.self.{name}", h) for name in ("query", "key", "value"))
    size = q.shape[1] // HEADS
    parts = [slice(head * size, (head + 1) * size) for head in range(HEADS)]
    context = torch.cat([attended(q[:, one], k[:, one], v[:, one], causal=False) for one in parts], dim=1)
    norm = "attention.output.LayerNorm"
    h = normed(h + linear("attention.output.dense", context), own[f"{norm}.weight"], own[f"{norm}.bias"], 1e-12)
    inside = linear("intermediate.dense", h)
    inside = inside * 0.5 * (1 + torch.erf(inside / math.sqrt(2)))
    norm = "output.LayerNorm"
    return normed(h + linear("output.dense", inside), own[f"{norm}.weight"], own[f"{norm}.bias"], 1e-12)


HOW = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def padded(lengths: tuple[int, ...]) -> dict[str, Tensor]:
    """Rows padded on the left."""
    ids = inputs("llama", batch=len(lengths), length=max(lengths))["input_ids"]
    mask = torch.stack([(torch.arange(max(lengths)) >= max(lengths) - length).long() for length in lengths])
    return {"input_ids": ids * mask, "attention_mask": mask}

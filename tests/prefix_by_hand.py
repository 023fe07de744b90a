"""Prefixes by hand: a plain base on the naive attention, with keys and values cut out of an adapter's tensors.

Knows the names of an adapter's tensors and where a tiny model's attentions are; nothing else of trimtab.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import trimtab as tt
from reference import PREFIXES
from tiny import CAUSAL, inputs, tiny

P, D = 4, 8
"""Length of the prefixes; head width of all tiny models."""
SELF = {
    "llama": "model.layers.{}.self_attn",
    "gpt2": "transformer.h.{}.attn",
    "bert": "bert.encoder.layer.{}.attention.self",
    "roberta": "roberta.encoder.layer.{}.attention.self",
}
SETS = {
    "t5": {
        "encoder_layer{}_self": "encoder.block.{}.layer.0.SelfAttention",
        "decoder_layer{}_self": "decoder.block.{}.layer.0.SelfAttention",
        "decoder_layer{}_cross": "decoder.block.{}.layer.1.EncDecAttention",
    },
    "bart": {
        "encoder_layer{}_self": "model.encoder.layers.{}.self_attn",
        "decoder_layer{}_self": "model.decoder.layers.{}.self_attn",
        "decoder_layer{}_cross": "model.decoder.layers.{}.encoder_attn",
    },
}
FAMILIES = (*SELF, *SETS)


def sets(family: str) -> dict[str, str]:
    """A set's key of layer {} and where its attention is."""
    return SETS.get(family, {"layer{}_self": SELF.get(family, "")})


def attached(family: str, method: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    """A tiny model and an adapter whose tensors, the head's excepted, are away from their start."""
    torch.manual_seed(7)
    model = tiny(family, dtype)
    adapter = tt.attach(model, method)
    for name, parameter in adapter.named_parameters():
        if not name.startswith("head_"):
            parameter.data.add_(0.5 * torch.randn_like(parameter))
    return model, adapter


def by_hand(adapter: Any, key: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each layer keys and values [kv heads, P, D]: stored, or S + W_2 tanh(W_1 E + b_1) + b_2 cut up by hand."""
    parts = dict(adapter.named_parameters())
    if f"{key.format(0)}.keys" in parts:
        return [(parts[f"{key.format(layer)}.keys"], parts[f"{key.format(layer)}.values"]) for layer in range(3)]
    net = {name: parts[f"{key.format(0)}.generator.{name}"] for name in ("tokens", "first.weight", "first.bias")}
    net |= {name: parts[f"{key.format(0)}.generator.{name}"] for name in ("last.weight", "last.bias")}
    heads = net["last.weight"].shape[0] // (2 * 3 * D)
    rows = []  # [P, 3 layers, keys or values, kv heads, D]
    for token, start in zip(net["tokens"], adapter.state_dict()[f"{key.format(0)}.generator.start"], strict=True):
        inner = torch.tanh(net["first.weight"] @ token + net["first.bias"])
        rows.append((start + net["last.weight"] @ inner + net["last.bias"]).view(3, 2, heads, D))
    whole = torch.stack(rows)
    return [(whole[:, layer, 0].transpose(0, 1), whole[:, layer, 1].transpose(0, 1)) for layer in range(3)]


def reference(family: str, adapter: Any, keys: Sequence[str] = ()) -> Any:
    """A plain base on the naive attention, which knows the adapter's keys and values (of these sets, or of all)."""
    base = tiny(family, torch.float64)
    base.set_attn_implementation("naive_reference")
    for key in keys or sets(family):
        path = sets(family)[key]
        for layer, pair in enumerate(by_hand(adapter, key)):
            PREFIXES[id(base.get_submodule(path.format(layer)))] = pair
    return base


def rows(family: str, side: str = "right") -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Rows of 7, 5 and 2 tokens, and where their real positions are."""
    batch = inputs(family, length=7, dtype=torch.float64)
    mask = torch.ones(3, 7, dtype=torch.long)
    for row, missing in enumerate((0, 2, 5)):
        mask[row, slice(7 - missing, 7) if side == "right" else slice(0, missing)] = 0
    return {**batch, "input_ids": batch["input_ids"] * mask, "attention_mask": mask}, mask.bool()


def positions(family: str, real: torch.Tensor) -> dict[str, torch.Tensor]:
    """Where the text stands: behind the prefix for learned positions, where it was for rotary and relative ones."""
    counted = (real.long().cumsum(1) - 1).clamp(min=0)
    if family == "roberta":  # numbered from the padding index 0 on; padding itself stays there
        return {"position_ids": torch.where(real, counted + 1 + P, 0)}
    if family in ("gpt2", "opt"):
        return {"position_ids": counted + P}
    if family == "bert":  # counts padding as well
        return {"position_ids": torch.arange(P, P + 7)[None]}
    return {"position_ids": counted} if family in CAUSAL else {}

"""How the positions of a text are counted, and hooks that count them another way. Knows no method and no adapter."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from trimtab.hooks import Switch, named_arguments
from trimtab.sites import Module


def positions(kwargs: dict[str, Any]) -> torch.Tensor:
    """The call's position ids [B or 1, n], counted on from the cache where they are not given."""
    if kwargs.get("position_ids") is not None:
        return kwargs["position_ids"]
    given = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
    past = kwargs.get("past_key_values")
    start = 0 if past is None else seen(past)
    return (torch.arange(given.shape[1], device=given.device) + start)[None]


def seen(past: Any) -> int:
    """How many tokens a cache holds."""
    return int(past.get_seq_length())


def padded_positions(body: Module, kwargs: dict[str, Any], front: int = 0) -> torch.Tensor:
    """RoBERTa's numbering [B, front + n]: padding gets the padding index, the rest counts on from it.

    `front` tokens stand in front of the call's text [B, n].
    """
    padding: int = body.config.pad_token_id
    ids = kwargs.get("input_ids")
    text = torch.ones_like(kwargs["inputs_embeds"][..., 0]) if ids is None else ids != padding
    visible = nn.functional.pad(text.long(), (front, 0), value=1)
    return visible.cumsum(1) * visible + padding


class ShiftPositions:
    """Moves the text's positions up by the length of a prefix."""

    def __init__(self, length: int, counting: str, switch: Switch):
        self.length, self.counting, self.switch = length, counting, switch

    def __call__(self, body: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.switch.on:
            return None
        named = named_arguments(body, args, kwargs)
        return (), {**named, "position_ids": self._shifted(body, named)}

    def _shifted(self, body: Module, named: dict[str, Any]) -> torch.Tensor:
        if named.get("position_ids") is not None or self.counting != "padded":
            return positions(named) + self.length
        own = padded_positions(body, named)
        return torch.where(own == body.config.pad_token_id, own, own + self.length)


class PositionsFromMask:
    """Derives missing `position_ids` of a causal model from the padding mask, so that left padding changes nothing."""

    def __init__(self, switches: list[Switch]):
        self.switches = switches

    def __call__(self, body: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not any(switch.on for switch in self.switches):
            return None
        named = named_arguments(body, args, kwargs)
        mask = named.get("attention_mask")
        if named.get("position_ids") is not None or mask is None or mask.dim() != 2:
            return None
        given = named["input_ids"] if named.get("input_ids") is not None else named["inputs_embeds"]
        return (), {**named, "position_ids": positions_from(mask, given.shape[1])}


def positions_from(mask: torch.Tensor, length: int) -> torch.Tensor:
    """The positions [B, length] of the last tokens of texts whose padding a mask [B, m] hides."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]


def takes_positions(body: Module) -> bool:
    """Whether the module's forward has `position_ids`."""
    return "position_ids" in inspect.signature(body.forward).parameters

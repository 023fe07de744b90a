"""Rows of a causal model run as one long row, with what stands in front of all of them in it once. Knows tensors and
causal masks; refuses to know families, methods and where the tokens come from.

    [v_1 … v_P  s_1 … s_S  x_11 … x_1n  x_21 … x_2n  …]      one sequence [1, F + B·n], F = P + S

P virtual tokens and S tokens that all rows begin with are the front. Everything in a transformer but attention acts on
each position by itself, so one pass of large matrix products serves front and rows; passes of a few rows run at about
half the rate. Attention is taken apart: the front attends to itself, every row to the front and to its own tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.errors import UserError
from trimtab.hooks import named_arguments

Over = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Attention of queries over keys and values under a mask, [B, heads, n, head_dim] -> [B, n, heads, head_dim]."""


class Packing:
    """How one batch is packed; the hooks around the stack that pack and unpack it."""

    def __init__(self, shared: Tensor, ids: Tensor, visible: Tensor):
        self.shared, self.ids, self.visible = shared, ids, visible
        """Token ids in front of all rows [1, S], the rows' own [B, n], and which of these are no padding."""
        self.virtual = 0
        """Virtual tokens in the present forward, which whoever has them puts in front (`join`)."""
        self.masks: dict[tuple[int, int, int | None, torch.device], Tensor] = {}

    @property
    def front(self) -> int:
        """Positions that stand in front of all rows."""
        return self.virtual + self.shared.shape[1]

    def pack(self, body: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The pre-hook of the stack: its input as one row of token ids."""
        kwargs = named_arguments(body, args, kwargs)
        if kwargs.get("input_ids") is None or kwargs["input_ids"].shape != self.ids.shape:
            raise UserError("the model was given other inputs while a batch is packed; run them before or behind it")
        self.virtual = 0
        device, (rows, length) = kwargs["input_ids"].device, self.ids.shape
        places = torch.arange(self.front + length, device=device)
        places = torch.cat([places[: self.front], places[self.front :].repeat(rows)])
        kwargs["input_ids"] = torch.cat([self.shared.to(device), kwargs["input_ids"].reshape(1, -1)], dim=1)
        return (), {**kwargs, "position_ids": places[None], "attention_mask": torch.ones_like(kwargs["input_ids"])}

    def join(self, tokens: Tensor, kwargs: dict[str, Any], embedding: nn.Module, learned: bool) -> dict[str, Any]:
        """Virtual tokens [P, width] in front of a packed input, at positions 0…P-1 or, where none is learned, -P…-1."""
        ids, embeds, places = kwargs.pop("input_ids", None), kwargs.get("inputs_embeds"), kwargs["position_ids"]
        if embeds is None:
            embeds = embedding(ids)
        self.virtual = tokens.shape[0]
        own = torch.arange(-self.virtual, 0, device=places.device)[None]
        places = torch.cat([own, places], dim=1)
        kwargs["position_ids"] = places + self.virtual if learned else places
        mask = F.pad(kwargs["attention_mask"], (self.virtual, 0), value=1)
        return {**kwargs, "attention_mask": mask, "inputs_embeds": torch.cat([tokens[None].to(embeds), embeds], dim=1)}

    def unpack(self, body: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The hook behind the stack: its states of the rows alone, [B, n, width]."""
        if isinstance(output, tuple):
            return (self._own(output[0]), *output[1:])
        output.last_hidden_state = self._own(output.last_hidden_state)
        return output

    def _own(self, states: Tensor) -> Tensor:
        return states[:, self.front :].reshape(*self.ids.shape, -1)

    def attend(self, over: Over, query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
        """The attention of a packed input [1, heads, F + B·n, head_dim] as [1, F + B·n, heads, head_dim].

        `window` is how many tokens, itself included, a token sees at most.
        """
        front, (rows, length) = self.front, self.ids.shape
        q_front, k_front, v_front = (tensor[:, :, :front] for tensor in (query, key, value))
        q, k, v = (self._rows(tensor[0, :, front:]) for tensor in (query, key, value))
        keys = torch.cat([k_front.expand(rows, -1, -1, -1), k], dim=2)
        values = torch.cat([v_front.expand(rows, -1, -1, -1), v], dim=2)
        found = over(q, keys, values, self._mask(front, length, window, query.device))
        first = over(q_front, k_front, v_front, self._mask(0, front, window, query.device))
        return torch.cat([first, found.flatten(0, 1)[None]], dim=1)

    def _rows(self, packed: Tensor) -> Tensor:
        """[heads, B·n, head_dim] -> [B, heads, n, head_dim]"""
        return packed.unflatten(1, tuple(self.ids.shape)).transpose(0, 1)

    def _mask(self, start: int, count: int, window: int | None, device: torch.device) -> Tensor:
        """What `count` tokens behind `start` others see, bool [1, 1, count, start + count]; padding is on the right."""
        at = start, count, window, device
        if at not in self.masks:
            keys = torch.arange(start + count, device=device)
            distance = keys[start:, None] - keys
            seen = (distance >= 0) & (distance < (window or start + count))
            self.masks[at] = seen[None, None]
        return self.masks[at]

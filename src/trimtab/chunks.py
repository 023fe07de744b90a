"""Many labelled positions projected to a large vocabulary a chunk at a time. Knows causal models' last step, from
hidden states to logits; refuses to know families, methods and training loops.

Logits of N positions are N times the vocabulary's size, and so are their softmax and their gradient. In chunks that are
computed again for the backward pass, only one chunk's worth of them is there at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from trimtab.head import IGNORED, label_loss, select_positions, shifts_labels

MOST = 2**26
"""Logits that are held at once: a quarter of a gigabyte in float32."""


class Chunks:
    """What stands for the logits [N, V] of hidden states [N, width]."""

    def __init__(self, model: PreTrainedModel, hidden: Tensor, positions: int):
        self.model, self.hidden, self.positions = model, hidden, positions

    def whole(self) -> Tensor:
        """All of them [1, N, V]."""
        return _last_step(self.model, self.hidden)

    def loss(self, targets: Tensor, num_items: Tensor | int | None) -> Tensor:
        """label_loss of all of them."""
        count = (targets != IGNORED).sum().clamp(min=1) if num_items is None else num_items
        pieces = zip(self.hidden.split(self.positions), targets.split(self.positions), strict=True)
        losses = [checkpoint(self._piece, hidden, part, count, use_reentrant=False) for hidden, part in pieces]
        return torch.stack(losses).sum()

    def _piece(self, hidden: Tensor, targets: Tensor, count: Tensor | int) -> Tensor:
        return label_loss(_last_step(self.model, hidden), targets, count)


def chunk_size(model: PreTrainedModel, positions: int) -> int | None:
    """Positions of a chunk; None where all logits may be there at once, and for models that are no single causal stack.

    A masked model transforms its stack's output before the projection.
    """
    head: Any = model.get_output_embeddings()
    vocabulary: int = 0 if head is None else head.weight.shape[0]
    if positions * vocabulary <= MOST or not shifts_labels(model) or _stack(model) is None:
        return None
    return max(1, MOST // vocabulary)


@contextmanager
def hidden_only(model: PreTrainedModel, mask: Tensor) -> Iterator[list[Tensor]]:
    """Inside, a forward projects nothing, and leaves the hidden states [N, width] where `mask` [B, n] is true."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        found[:] = [args[0][0]]
        return (args[0][:, :0], *args[1:])

    with select_positions(model, mask):
        handle = model.get_output_embeddings().register_forward_pre_hook(keep)  # behind the selection
        try:
            yield found
        finally:
            handle.remove()


class _Given(nn.Module):
    """Stands for a model's stack and gives hidden states."""

    def __init__(self, hidden: Tensor):
        super().__init__()
        self.hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPastAndCrossAttentions:
        """[1, N, width]"""
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self.hidden[None])


def _last_step(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """What the model makes of its stack's output [N, width]: logits [1, N, V], scaled and capped as the family does."""
    holder, _, name = (_stack(model) or "").rpartition(".")
    parent = model.get_submodule(holder)
    stack = getattr(parent, name)
    setattr(parent, name, _Given(hidden))
    try:
        ids = torch.zeros(1, hidden.shape[0], dtype=torch.long, device=hidden.device)
        return model.forward(input_ids=ids, use_cache=False).logits
    finally:
        setattr(parent, name, stack)


def _stack(model: PreTrainedModel) -> str | None:
    """The name of the one stack of layers that reads the input of a model with adapters."""
    attachments: Any = getattr(model, "trimtab", None)
    found = [] if attachments is None else [site.body for site in attachments.sites.embeds]
    return next((name for name, module in model.named_modules() if name and [module] == found), None)

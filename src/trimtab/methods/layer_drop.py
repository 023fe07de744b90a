"""AdapterDrop: leaving out the adapters of the lowest layers. Rücklé et al. 2021, arXiv:2010.11918. Knows no method.

In training the number of left-out layers is drawn anew each forward, uniformly from 0 to `most`; in evaluation no
adapter is left out. (To leave them out for good, name the upper layers: `layers=5:`.)
"""

from __future__ import annotations

from typing import Protocol

import torch


class Dropped(Protocol):
    """What the draw needs to know of an adapter."""

    layer: int
    leads: bool
    """Whether it is the first one that a forward meets: it draws for all."""
    training: bool


class Drop:
    """One draw a forward, shared by all adapters of a model.

    The draw uses torch's generator, whose state checkpointing restores, so that a recomputed layer sees the same draw.
    """

    def __init__(self, most: int):
        self.most = most
        self.left_out = 0

    def leaves_out(self, adapter: Dropped) -> bool:
        """Whether this adapter is left out of the present forward."""
        if self.most == 0 or not adapter.training:
            return False
        if adapter.leads:
            self.left_out = int(torch.randint(self.most + 1, ()))
        return adapter.layer < self.left_out

"""The bottleneck that every adapter of the adapter family is made of. Knows no site and no paper.

B(h) = W_up g(W_down h + b_down) + b_up,     W_down [size, width], W_up [width, size]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from trimtab.errors import UserError
from trimtab.sites import ActivationSite

Activation = Literal["gelu", "relu", "swish"]
Start = Literal["near_identity", "normal", "zero"]


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"gelu": _gelu, "relu": F.relu, "swish": F.silu}


def near_identity(weight: torch.Tensor) -> None:
    """A normal distribution of standard deviation 1e-3, cut at two of them (Houlsby's code)."""
    nn.init.trunc_normal_(weight, std=1e-3, a=-2e-3, b=2e-3)


class Bottleneck(nn.Module):
    """Two projections with a nonlinearity between them."""

    def __init__(self, width: int, size: int, activation: Activation, start: Start):
        super().__init__()
        self.down, self.up = nn.Linear(width, size), nn.Linear(size, width)
        self.activation = ACTIVATIONS[activation]
        _start(self.down.weight, self.up.weight, start)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., width] -> [..., width], in the input's precision"""
        wide = hidden.to(self.down.weight.dtype)
        return self.up(self.activation(self.down(wide))).to(hidden.dtype)


def _start(down: torch.Tensor, up: torch.Tensor, start: Start) -> None:
    if start == "near_identity":
        near_identity(down)
        near_identity(up)
    elif start == "normal":
        nn.init.normal_(down, std=0.02)
        nn.init.normal_(up, std=0.02)
    else:
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        nn.init.zeros_(up)


def bottleneck_size(method: str, site: ActivationSite, size: int | None, reduction: float) -> int:
    """`size`, or the width over `reduction`. Raises UserError where the bottleneck is wider than the model."""
    chosen = max(1, int(site.width / reduction)) if size is None else size
    if chosen > site.width:
        raise UserError(f"{method}: a bottleneck of {chosen} is larger than the model's width of {site.width}")
    return chosen


def parameters_of(width: int, size: int) -> int:
    """2 · width · size + width + size."""
    return 2 * width * size + width + size


def check_size(method: str, size: int | None, reduction: float = 1.0) -> None:
    """Raises UserError for a size below 1 and a reduction below 1."""
    if size is not None and size < 1:
        raise UserError(f"{method}: size={size} must be at least 1")
    if reduction < 1:
        raise UserError(f"{method}: reduction={reduction:g} must be at least 1")

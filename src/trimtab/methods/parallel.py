"""Parallel adapters. He et al. 2022, Towards a Unified View of Parameter-Efficient Transfer Learning, arXiv:2110.04366.

    A = f + s · (W_up relu(W_down x + b_down) + b_up)

once a layer, beside feed-forward: x [batch, length, width] is what feed-forward reads, f what it gives; with
`reads=stream` x is the residual stream, which differs where a norm stands in front of feed-forward. The scale s is 4,
fixed or learned; W_up starts at zero, so that the start is exactly the base model. Trained parameters, L layers:
L · (2 · width · size + width + size), and L with a learned scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from trimtab.contract import Context, Parts
from trimtab.methods.bottleneck import Activation, Bottleneck, Start, bottleneck_size, check_size, parameters_of
from trimtab.sites import ActivationSite, Sites


@dataclass(frozen=True)
class Parallel:
    """One scaled bottleneck adapter a layer, beside feed-forward."""

    size: int | None = None
    """Width of the bottleneck; where not given, the model's width over `reduction`."""
    reduction: float = 2.0
    """The model's width over the bottleneck's."""
    scale: float = 4.0
    """The factor s."""
    learn_scale: bool = False
    """Whether s is trained."""
    activation: Activation = "relu"
    """Nonlinearity of the bottleneck: gelu, relu or swish."""
    reads: Literal["branch", "stream"] = "branch"
    """branch (what feed-forward reads) or stream (the residual stream in front of its norm, as adapters has it)."""
    layers: str | None = None
    """Layers to adapt, e.g. -10: or 0,2,5; all where not given."""
    start: Start = "zero"
    """zero (the upper projection at zero), near_identity (standard deviation 1e-3) or normal (0.02)."""

    name: ClassVar[str] = "parallel"
    kinds: ClassVar[frozenset[str]] = frozenset({"activation"})
    lr: ClassVar[float] = 1e-3
    mergeable: ClassVar[bool] = False
    formula: ClassVar[str] = "L·(2·width·size + width + size)"
    paper: ClassVar[str] = "He et al. 2022, arXiv:2110.04366"

    def __post_init__(self) -> None:
        check_size("parallel", self.size, self.reduction)

    def build(self, sites: Sites, context: Context) -> Parts:
        """An adapter a layer. Raises UserError for a bottleneck wider than the model."""
        return {site: Beside(site, self) for site in sites.activations(("feedforward",), self.layers)}

    def parameter_count(self, sites: Sites) -> int:
        """L · (2 · width · size + width + size), and L with a learned scale."""
        chosen = sites.activations(("feedforward",), self.layers)
        return sum(parameters_of(site.width, self.bottleneck(site)) + self.learn_scale for site in chosen)

    def bottleneck(self, site: ActivationSite) -> int:
        """The bottleneck's width at a site."""
        return bottleneck_size("parallel", site, self.size, self.reduction)


class Beside(nn.Module):
    """f + s · B(x), x the branch's input, or the stream, and f its output."""

    def __init__(self, site: ActivationSite, method: Parallel):
        super().__init__()
        self.adapter = Bottleneck(site.width, method.bottleneck(site), method.activation, method.start)
        self.reads = ("stream",) if method.reads == "stream" else ("input",)
        scale = torch.tensor(method.scale)
        self.scale: torch.Tensor | float = nn.Parameter(scale) if method.learn_scale else method.scale

    def forward(self, output: torch.Tensor, **read: torch.Tensor) -> torch.Tensor:
        """[batch, length, width] twice -> [batch, length, width]"""
        (x,) = read.values()
        return output + (self.scale * self.adapter(x)).to(output.dtype)

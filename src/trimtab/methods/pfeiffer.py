"""Pfeiffer adapters. Pfeiffer et al. 2020, AdapterFusion, arXiv:2005.00247.

    z = LN(f + x),     A = f + W_up relu(W_down z + b_down) + b_up,     out = LN(A + x)

once a layer, on the feed-forward output f [batch, length, width], x the residual stream. In post-norm models z passes
the frozen norm that follows, which is thus applied twice; where no norm follows the residual add, z = f + x. Trained
parameters, L layers: L · (2 · width · size + width + size).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from trimtab.contract import Context, Parts
from trimtab.methods.bottleneck import Activation, Bottleneck, Start, bottleneck_size, check_size, parameters_of
from trimtab.sites import ActivationSite, Sites


@dataclass(frozen=True)
class Pfeiffer:
    """One bottleneck adapter a layer, behind feed-forward."""

    size: int | None = None
    """Width of the bottleneck; where not given, the model's width over `reduction`."""
    reduction: float = 16.0
    """The model's width over the bottleneck's."""
    activation: Activation = "relu"
    """Nonlinearity of the bottleneck: gelu, relu or swish."""
    layers: str | None = None
    """Layers to adapt, e.g. -10: or 0,2,5; all where not given."""
    start: Start = "normal"
    """normal (standard deviation 0.02), near_identity (1e-3) or zero (the upper projection at zero)."""

    name: ClassVar[str] = "pfeiffer"
    kinds: ClassVar[frozenset[str]] = frozenset({"activation"})
    lr: ClassVar[float] = 1e-3
    mergeable: ClassVar[bool] = False
    formula: ClassVar[str] = "L·(2·width·size + width + size)"
    paper: ClassVar[str] = "Pfeiffer et al. 2020, arXiv:2005.00247"

    def __post_init__(self) -> None:
        check_size("pfeiffer", self.size, self.reduction)

    def build(self, sites: Sites, context: Context) -> Parts:
        """An adapter a layer. Raises UserError for a bottleneck wider than the model."""
        return {site: Pre(site, self) for site in sites.activations(("feedforward",), self.layers)}

    def parameter_count(self, sites: Sites) -> int:
        """L · (2 · width · size + width + size)."""
        chosen = sites.activations(("feedforward",), self.layers)
        return sum(parameters_of(site.width, self.bottleneck(site)) for site in chosen)

    def bottleneck(self, site: ActivationSite) -> int:
        """The bottleneck's width at a site."""
        return bottleneck_size("pfeiffer", site, self.size, self.reduction)


class Pre(nn.Module):
    """f + B(LN(f + x)) on a branch's output f."""

    reads = ("stream",)

    def __init__(self, site: ActivationSite, method: Pfeiffer):
        super().__init__()
        self.adapter = Bottleneck(site.width, method.bottleneck(site), method.activation, method.start)
        self.frozen = (site.after,)  # in a tuple: the base's norm is no part of the adapter

    def forward(self, output: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
        """[batch, length, width] twice -> [batch, length, width]"""
        z = output + stream
        (norm,) = self.frozen
        return output + self.adapter(z if norm is None else norm(z))

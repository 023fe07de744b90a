"""Houlsby adapters: Parameter-Efficient Transfer Learning for NLP. Houlsby et al. 2019, arXiv:1902.00751.

    A(h) = h + W_up g(W_down h + b_down) + b_up,     h [batch, length, width], W_down [size, width], g = GELU

twice a layer, on the output of attention and of feed-forward, after dropout and before the residual is added. The start
is near the identity (normal, standard deviation 1e-3, cut at two of them). Trained besides the adapters: every layer
norm, the embeddings' included, and the task head. Trained parameters, L layers: 2L · (2 · width · size + width + size)
and those of the norms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from trimtab.contract import Context, Parts
from trimtab.copies import NormCopy
from trimtab.errors import UserError
from trimtab.methods.bottleneck import Activation, Bottleneck, Start, bottleneck_size, check_size, parameters_of
from trimtab.methods.layer_drop import Drop
from trimtab.sites import ActivationSite, Site, Sites

BRANCHES = ("attention", "feedforward")


@dataclass(frozen=True)
class Houlsby:
    """Two bottleneck adapters a layer, trained with the layer norms."""

    size: int = 64
    """Width of the bottleneck."""
    activation: Activation = "gelu"
    """Nonlinearity of the bottleneck: gelu, relu or swish."""
    layers: str | None = None
    """Layers to adapt, e.g. -10: or 0,2,5; all where not given."""
    norms: bool = True
    """Whether every layer norm is trained as well."""
    cross: bool = False
    """Whether decoders get an adapter behind cross-attention, too."""
    start: Start = "near_identity"
    """near_identity (the paper's), normal (standard deviation 0.02) or zero (the upper projection at zero)."""
    drop: int = 0
    """AdapterDrop: in training the adapters of a random number of lowest layers, at most this many, are left out."""

    name: ClassVar[str] = "houlsby"
    kinds: ClassVar[frozenset[str]] = frozenset({"activation", "norm"})
    lr: ClassVar[float] = 1e-3
    mergeable: ClassVar[bool] = False
    formula: ClassVar[str] = "2L·(2·width·size + width + size) + norms"
    paper: ClassVar[str] = "Houlsby et al. 2019, arXiv:1902.00751"

    def __post_init__(self) -> None:
        check_size("houlsby", self.size)
        if self.drop < 0:
            raise UserError(f"houlsby: drop={self.drop} must not be negative")

    def build(self, sites: Sites, context: Context) -> Parts:
        """An adapter a branch, a copy of each norm. Raises UserError for a bottleneck wider than the model."""
        chosen, drop = self._chosen(sites), Drop(self.drop)
        parts: dict[Site, nn.Module] = {site: Serial(site, self, drop, site is chosen[0]) for site in chosen}
        return parts | {site: NormCopy(site) for site in (sites.norm if self.norms else ())}

    def parameter_count(self, sites: Sites) -> int:
        """2L · (2 · width · size + width + size), and the parameters of the norms."""
        adapters = sum(parameters_of(site.width, self.size) for site in self._chosen(sites))
        norms = sum(weight.numel() for site in sites.norm for weight in site.module.parameters())
        return adapters + (norms if self.norms else 0)

    def _chosen(self, sites: Sites) -> list[ActivationSite]:
        crossing = self.cross and any(site.branch == "cross" for site in sites.activation)
        return sites.activations((*BRANCHES, "cross") if crossing else BRANCHES, self.layers)


class Serial(nn.Module):
    """h + B(h) on a branch's output."""

    def __init__(self, site: ActivationSite, method: Houlsby, drop: Drop, leads: bool):
        super().__init__()
        size = bottleneck_size("houlsby", site, method.size, 1.0)
        self.adapter = Bottleneck(site.width, size, method.activation, method.start)
        self.drop, self.layer, self.leads = drop, site.layer, leads
        self.draws = drop.most > 0

    def forward(self, output: torch.Tensor) -> torch.Tensor:
        """[batch, length, width] -> [batch, length, width]"""
        if self.drop.leaves_out(self):
            return output
        return output + self.adapter(output)

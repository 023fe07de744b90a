"""BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models. Ben Zaken et al. 2022,
arXiv:2106.10199.

    y = W x + b + δ,     δ [out] trained, starts at zero

at every projection, the pooler's included, and at every normalisation that has a bias. A projection without a bias
(T5, LLaMA) gets one. The start is exactly the base model. Trained parameters: Σ out, and the widths of those norms;
BERT-base: 102,912.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from trimtab.contract import Context, Parts
from trimtab.sites import LinearSite, Module, NormSite, Site, Sites


@dataclass(frozen=True)
class BitFit:
    """Trains the biases; merges into the base weights."""

    layers: str | None = None
    """Layers whose biases are trained, e.g. -10:; all where not given."""

    name: ClassVar[str] = "bitfit"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "norm"})
    lr: ClassVar[float] = 1e-3
    mergeable: ClassVar[bool] = True
    formula: ClassVar[str] = "Σ out + norm biases"
    paper: ClassVar[str] = "Ben Zaken et al. 2022, arXiv:2106.10199"

    def build(self, sites: Sites, context: Context) -> Parts:
        """A bias a projection and a norm."""
        parts: dict[Site, nn.Module] = {site: Shift(site.out_features) for site in self._linears(sites)}
        return parts | {site: Shift(site.module.bias.numel()) for site in self._norms(sites)}

    def parameter_count(self, sites: Sites) -> int:
        """Σ out over the projections, and the widths of the norms that have a bias."""
        linear = sum(site.out_features for site in self._linears(sites))
        return linear + sum(site.module.bias.numel() for site in self._norms(sites))

    def _linears(self, sites: Sites) -> list[LinearSite]:
        inside = sites.linears(sorted({site.role for site in sites.linear}), self.layers)
        return inside + ([sites.pooler] if sites.pooler is not None and self.layers is None else [])

    def _norms(self, sites: Sites) -> list[NormSite]:
        layers = {(site.stack, site.layer) for site in self._linears(sites)}
        chosen = sites.norm if self.layers is None else [s for s in sites.norm if (s.stack, s.layer) in layers]
        return [site for site in chosen if getattr(site.module, "bias", None) is not None]


class Shift(nn.Module):
    """y + δ"""

    def __init__(self, width: int):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x [..., in], y [..., out] -> [..., out]"""
        return y + self.shift.to(y.dtype)

    def merged(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The weight as it is, and the bias with the shift; where there was none, the shift."""
        return weight, self.shift if bias is None else bias + self.shift

    def write_into(self, module: Module) -> None:
        """Add the shift to a norm's bias."""
        with torch.no_grad():
            module.bias.add_(self.shift.to(module.bias.dtype))

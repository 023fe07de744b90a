"""(IA)³: Few-Shot Parameter-Efficient Fine-Tuning Is Better and Cheaper than In-Context Learning. Liu et al. 2022,
arXiv:2205.05638.

    k' = l_k ⊙ (W_k x),     v' = l_v ⊙ (W_v x),     f = W_2 (l_f ⊙ a),     l [out] or [in] trained, starts at one

in self-attention and cross-attention, and on what the last feed-forward projection reads (a gated product where the
model has gates). The start is exactly the base model. Trained parameters, L layers: L · (2 · keys + feed-forward).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from trimtab.contract import Context, Parts
from trimtab.errors import UserError
from trimtab.sites import LinearSite, Sites


@dataclass(frozen=True)
class IA3:
    """Rescales keys, values and the feed-forward's inner activations; merges into the base weights."""

    targets: tuple[str, ...] = ("k", "v", "down")
    """Projections: of down the input is scaled, of the others (q, k, v, o, up, gate) the output."""
    layers: str | None = None
    """Layers to adapt, e.g. -10: or 0,2,5; all where not given."""
    inputs: tuple[str, ...] = ("down",)
    """Those of the targets whose input is scaled instead of their output (peft does it to o of BERT, too)."""

    name: ClassVar[str] = "ia3"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    lr: ClassVar[float] = 1e-2
    mergeable: ClassVar[bool] = True
    formula: ClassVar[str] = "L·(2·keys + feed-forward)"
    paper: ClassVar[str] = "Liu et al. 2022, arXiv:2205.05638"

    def build(self, sites: Sites, context: Context) -> Parts:
        """A vector a projection. Raises UserError for targets or layers that do not exist."""
        chosen = sites.linears(self.targets, self.layers)
        shared = next((site for site in chosen if site.role in self.inputs and site.span is not None), None)
        if shared is not None:
            raise UserError(f"ia3: the input of {shared.role} is that of other projections of {shared.path}, too")
        return {site: ScaleInput(site) if site.role in self.inputs else ScaleOutput(site) for site in chosen}

    def parameter_count(self, sites: Sites) -> int:
        """Σ of the scaled widths."""
        chosen = sites.linears(self.targets, self.layers)
        return sum(site.in_features if site.role in self.inputs else site.out_features for site in chosen)


class ScaleOutput(nn.Module):
    """l ⊙ (W x + b)"""

    def __init__(self, site: LinearSite):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(site.out_features))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x [..., in], y [..., out] -> [..., out]"""
        return (y * self.scale).to(y.dtype)

    def merged(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The rows of the weight [out, in], and the bias, scaled."""
        return weight * self.scale[:, None], None if bias is None else bias * self.scale


class ScaleInput(nn.Module):
    """W (l ⊙ x) + b"""

    def __init__(self, site: LinearSite):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(site.in_features))

    def before(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., in]"""
        return (x * self.scale).to(x.dtype)

    def merged(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The columns of the weight [out, in] scaled."""
        return weight * self.scale[None, :], bias

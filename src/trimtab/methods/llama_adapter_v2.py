"""LLaMA-Adapter V2: Parameter-Efficient Visual Instruction Model. Gao et al. 2023, arXiv:2304.15010.

    y = s ⊙ (W x + b_0 + b),     b, s [out] trained, start at 0 and 1

on every projection, every normalisation trained, and the gated adaption prompts of LLaMA-Adapter in the top layers,
which pass the key and value projections with their bias and scale. The start is exactly the base model. Trained
parameters: 2 · Σ out, those of the norms, and layers · (length · width + heads).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from trimtab.contract import Context, Parts
from trimtab.copies import NormCopy
from trimtab.methods.llama_adapter import LlamaAdapter
from trimtab.sites import LinearSite, Site, Sites


@dataclass(frozen=True)
class LlamaAdapterV2:
    """LLaMA-Adapter with a bias and a scale on every projection and trained norms."""

    length: int = 10
    """Number of prompts a layer."""
    layers: str | None = None
    """Layers that get prompts, e.g. -10:; by default all but the lowest sixteenth."""

    name: ClassVar[str] = "llama-adapter-v2"
    kinds: ClassVar[frozenset[str]] = frozenset({"kv", "linear", "norm"})
    lr: ClassVar[float] = 1e-3
    mergeable: ClassVar[bool] = False
    formula: ClassVar[str] = "layers·(length·width + heads) + 2·Σ out + norms"
    paper: ClassVar[str] = "Gao et al. 2023, arXiv:2304.15010"

    def __post_init__(self) -> None:
        self._prompts()

    def build(self, sites: Sites, context: Context) -> Parts:
        """Prompts a chosen layer, bias and scale a projection, a copy of each norm."""
        parts: dict[Site, nn.Module] = dict(self._prompts().build(sites, context))
        parts |= {site: ScaledShift(site) for site in sites.linear}
        return parts | {site: NormCopy(site) for site in sites.norm}

    def parameter_count(self, sites: Sites) -> int:
        """layers · (length · width + heads) + 2 · Σ out, and the parameters of the norms."""
        norms = sum(weight.numel() for site in sites.norm for weight in site.module.parameters())
        return self._prompts().parameter_count(sites) + 2 * sum(site.out_features for site in sites.linear) + norms

    def _prompts(self) -> LlamaAdapter:
        return LlamaAdapter(length=self.length, layers=self.layers)


class ScaledShift(nn.Module):
    """s ⊙ (y + b)"""

    def __init__(self, site: LinearSite):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(site.out_features))
        self.scale = nn.Parameter(torch.ones(site.out_features))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x [..., in], y [..., out] -> [..., out]"""
        return (self.scale * (y + self.shift)).to(y.dtype)

"""LLaMA-Adapter V2: Parameter-Efficient Visual Instruction Model. Gao et al. 2023, arXiv:2304.15010.

    y = s ⊙ (W x + b_0 + b),     b, s [out] trained, start at 0 and 1

on every projection, every normalisation trained, and the gated adaption prompts of LLaMA-Adapter in the top layers,
which pass the key and value projections with their bias and scale. The start is exactly the base model. Trained
parameters: 2 · Σ out, those of the norms, and layers · (length · width + heads). With image= what is made of a row's
picture is added to the prompts, as in LLaMA-Adapter (eye.py). With length=0 there are no prompts, and what is left
merges into the base weights: s ⊙ W and s ⊙ (b_0 + b).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from trimtab.contract import Context, Parts
from trimtab.copies import NormCopy
from trimtab.errors import UserError
from trimtab.methods.eye import OF_IMAGES, check_looking, whole_path
from trimtab.methods.llama_adapter import LlamaAdapter
from trimtab.sites import LinearSite, Site, Sites


@dataclass(frozen=True)
class LlamaAdapterV2:
    """LLaMA-Adapter with a bias and a scale on every projection and trained norms."""

    length: int = 10
    """Number of prompts a layer; 0 trains biases, scales and norms alone, which merges."""
    layers: str | None = None
    """Layers that get prompts, e.g. -10:; by default all but the lowest sixteenth."""
    image: str | None = None
    """A frozen vision encoder (a folder, hub id or pkg:NAME/path): what it sees is added to the prompts."""
    look: Literal["global", "queries"] = "queries"
    """global (the encoder's global features, v1) or queries (learned ones that attend to its tokens, v2)."""
    scales: str | None = None
    """Layers of the encoder whose global features are read, e.g. 5,11; by default four, evenly spaced."""
    image_layers: str | None = None
    """Layers whose prompts get the picture, e.g. 0:8 (early fusion); by default all that have prompts."""
    image_hidden: int = 128
    """Width of what is between the encoder's features and the prompts."""
    blocks: int = 2
    """Blocks of the query form."""

    name: ClassVar[str] = "llama-adapter-v2"
    kinds: ClassVar[frozenset[str]] = frozenset({"kv", "linear", "norm"})
    lr: ClassVar[float] = 1e-3
    mergeable: ClassVar[bool] = False
    formula: ClassVar[str] = "layers·(length·width + heads) + 2·Σ out + norms"
    paper: ClassVar[str] = "Gao et al. 2023, arXiv:2304.15010"

    def __post_init__(self) -> None:
        check_looking(self)
        if self.length != 0:
            self._prompts()
            return
        if self.layers is not None or self.image is not None:
            raise UserError("llama-adapter-v2: length=0 has no prompts, to which layers= and image= belong")
        object.__setattr__(self, "mergeable", True)  # the dataclass is frozen

    def build(self, sites: Sites, context: Context) -> Parts:
        """Prompts a chosen layer, bias and scale a projection, a copy of each norm."""
        parts: dict[Site, nn.Module] = dict(self._prompts().build(sites, context)) if self.length else {}
        parts |= {site: ScaledShift(site) for site in sites.linear}
        return parts | {site: NormCopy(site) for site in sites.norm}

    def parameter_count(self, sites: Sites) -> int:
        """layers · (length · width + heads) + 2 · Σ out, and the parameters of the norms."""
        norms = sum(weight.numel() for site in sites.norm for weight in site.module.parameters())
        prompts = self._prompts().parameter_count(sites) if self.length else 0
        return prompts + 2 * sum(site.out_features for site in sites.linear) + norms

    def _prompts(self) -> LlamaAdapter:
        looking = {} if self.image is None else {name: getattr(self, name) for name in OF_IMAGES}
        return LlamaAdapter(length=self.length, layers=self.layers, image=self.image, **looking)

    def folded(self) -> LlamaAdapterV2:
        """The same; a vision encoder in a folder by its whole path."""
        return whole_path(self)


class ScaledShift(nn.Module):
    """s ⊙ (y + b)"""

    def __init__(self, site: LinearSite):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(site.out_features))
        self.scale = nn.Parameter(torch.ones(site.out_features))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x [..., in], y [..., out] -> [..., out]"""
        return (self.scale * (y + self.shift)).to(y.dtype)

    def merged(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """weight [out, in] with its rows scaled, and the bias [out], shifted and scaled."""
        return self.scale[:, None] * weight, self.scale * (self.shift if bias is None else bias + self.shift)

"""Layer-norm tuning: only the normalisations' own weights are trained. Zhao et al. 2023, Tuning LayerNorm in Attention,
arXiv:2312.11420 (a baseline of Houlsby et al. 2019 already).

    y = γ ⊙ norm(x) + β,     γ, β [width] trained, from the base's values

Every normalisation of the model, the embeddings' included. Trained parameters: those of the norms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trimtab.arch import select_layers
from trimtab.contract import Context, Parts
from trimtab.copies import NormCopy
from trimtab.sites import NormSite, Sites


@dataclass(frozen=True)
class LayerNorm:
    """Trains the weights of the layer norms; merges into the base weights."""

    layers: str | None = None
    """Layers whose norms are trained, e.g. -10:; all, and the norms outside layers, where not given."""

    name: ClassVar[str] = "layernorm"
    kinds: ClassVar[frozenset[str]] = frozenset({"norm"})
    lr: ClassVar[float] = 1e-3
    mergeable: ClassVar[bool] = True
    formula: ClassVar[str] = "those of the norms"
    paper: ClassVar[str] = "Zhao et al. 2023, arXiv:2312.11420"

    def build(self, sites: Sites, context: Context) -> Parts:
        """A trained copy of each norm."""
        return {site: NormCopy(site) for site in self._chosen(sites)}

    def parameter_count(self, sites: Sites) -> int:
        """The parameters of the norms."""
        return sum(weight.numel() for site in self._chosen(sites) for weight in site.module.parameters())

    def _chosen(self, sites: Sites) -> list[NormSite]:
        if self.layers is None:
            return list(sites.norm)
        chosen = {name: set(select_layers(self.layers, len(found))) for name, found in sites.layer_modules.items()}
        return [site for site in sites.norm if site.layer in chosen.get(site.stack, ())]

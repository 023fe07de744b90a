"""P-tuning v2. Liu et al. 2022, P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally Across Scales
and Tasks, arXiv:2110.07602.

    context = attend(q, [K ; W_k x], [V ; W_v x]),     K, V [kv heads, length, head width] trained, in every layer

Deep prompts: keys and values in front of every self-attention's own, trained themselves (a network in front of them is
optional), with the linear task head. They start as noise of standard deviation 0.02. Trained parameters:
2 · length · Σ key widths.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from trimtab.contract import Context, Parts
from trimtab.methods.prefixes import (
    check_prefix,
    generated_parts,
    network_size,
    outputs,
    random_start,
    stored_parts,
)
from trimtab.sites import KVSite, Site, Sites


@dataclass(frozen=True)
class PTuningV2:
    """Trained keys and values in front of every self-attention's own, with the task head."""

    length: int = 20
    """Number of prefix positions."""
    dropout: float = 0.1
    """Dropout probability on the keys and values, while training."""
    network: bool = False
    """Whether a network makes them while training, as in prefix tuning."""
    hidden: int = 512
    """Width of the network."""
    layers: str | None = None
    """Layers to adapt, e.g. -10: or 0,2,5; all where not given."""

    name: ClassVar[str] = "p-tuning-v2"
    kinds: ClassVar[frozenset[str]] = frozenset({"kv"})
    lr: ClassVar[float] = 5e-3
    mergeable: ClassVar[bool] = False
    moves_text: ClassVar[bool] = True
    formula: ClassVar[str] = "2·length·Σ keys"
    paper: ClassVar[str] = "Liu et al. 2022, arXiv:2110.07602"

    def __post_init__(self) -> None:
        check_prefix(self.name, self.length, self.dropout, self.hidden)

    def build(self, sites: Sites, context: Context) -> Parts:
        """Keys and values a self-attention."""
        parts: dict[Site, nn.Module] = {}
        for group in self._stacks(sites):
            start = [random_start(site, self.length) for site in group]
            if self.network:
                parts |= generated_parts(group, start, self.dropout, self.hidden)
            else:
                parts |= stored_parts(group, start, self.dropout)
        return parts

    def parameter_count(self, sites: Sites) -> int:
        """2 · length · Σ key widths, or the network's own."""
        groups = self._stacks(sites)
        if self.network:
            return sum(network_size(group, self.length, self.hidden) for group in groups)
        return sum(self.length * outputs(group) for group in groups)

    def folded(self) -> PTuningV2:
        """The keys and values themselves."""
        return replace(self, network=False)

    def _stacks(self, sites: Sites) -> list[list[KVSite]]:
        chosen = [site for site in sites.kvs(self.layers) if not site.cross]
        return [[site for site in chosen if site.stack == stack] for stack in dict.fromkeys(s.stack for s in chosen)]

"""Ladder side-tuning. Sung, Cho and Bansal 2022, LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer
Learning, arXiv:2206.06522.

    h ← Down₀ x,     for each kept layer l:   h ← B_l(μ_l h + (1 − μ_l) Down_l b_l),     μ_l = σ(α_l / T)
    out = Up LN(h),     Down [width / r, width],  Up [width, width / r],  both with a bias,  α_l = 0 at the start

x [batch, length, width] is what the first layer reads, b_l the output of layer l, before the final norm. The side
blocks B_l are layers of the base's own kind with r times narrower stream, heads and feed-forward. The output takes the
place of what the final norm gives, in front of the frozen vocabulary projection or of the task head. In
encoder-decoders a side decoder attends to what a side encoder gives, LN(h). The base runs without gradients: nothing is
propagated back through it, and nothing of it is kept but the states b_l that the ladder reads.

The blocks start from structured pruning of the layers beside them (by magnitude), or at random; Down and Up as torch
starts them. Trained parameters, K kept layers: Σ those of the blocks + (K + 1) · Down + K gates + LN + Up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn

from trimtab.arch import select_layers
from trimtab.contract import Context, Parts
from trimtab.errors import UserError, unknown
from trimtab.methods.side_blocks import STARTS, SideBlocks, Start, pruned_units
from trimtab.narrow import Units, check_reduction, narrow_count
from trimtab.sites import Sites, StatesSite
from trimtab.states import Reading


@dataclass(frozen=True)
class Ladder:
    """A narrow side network that reads the frozen base's layers and gives the output in its place."""

    reduction: int = 8
    """The base's width over the side network's."""
    layers: str | None = None
    """Layers that have a side block, e.g. -10: or 0,2,5; all where not given."""
    dropped: str | None = None
    """Layers among them that have none, e.g. 0,4,8."""
    start: Start = "pruned"
    """pruned (the blocks start from the base's layers) or random."""
    temperature: float = 0.1
    """T: how steep the gates are."""
    merge_last: bool = False
    """Whether the base's own output is added; Up then starts at zero and the start is exactly the base model."""

    name: ClassVar[str] = "ladder"
    kinds: ClassVar[frozenset[str]] = frozenset({"states"})
    lr: ClassVar[float] = 3e-3
    mergeable: ClassVar[bool] = False
    formula: ClassVar[str] = "Σ blocks + (K + 1)·(width + 1)·width/r + K + LN + (width/r + 1)·width"
    paper: ClassVar[str] = "Sung et al. 2022, arXiv:2206.06522"

    def __post_init__(self) -> None:
        if self.start not in STARTS:
            raise unknown("ladder: start", self.start, STARTS)
        if self.temperature <= 0:
            raise UserError(f"ladder: temperature={self.temperature} must be above 0")

    def build(self, sites: Sites, context: Context) -> Parts:
        """A side network a stack. Raises UserError for a reduction that does not divide and for layers out of range."""
        chosen = {site: self.chosen(site) for site in sites.states}
        for site in sites.states:
            check_reduction("ladder", site, self.reduction)
        units = pruned_units(sites, chosen, self.reduction) if self.start == "pruned" else {}
        return {site: LadderNetwork(site, self, chosen[site], units.get(site)) for site in sites.states}

    def parameter_count(self, sites: Sites) -> int:
        """Σ blocks + (K + 1) · (width + 1) · width / r + K + LN + Up a stack; an encoder that is read has no Up."""
        return sum(self._count(site) for site in sites.states)

    def _count(self, site: StatesSite) -> int:
        layers, narrow = self.chosen(site), site.width // self.reduction
        blocks = sum(narrow_count(site, at, self.reduction) for at in layers)
        ladder = (len(layers) + 1) * (site.width + 1) * narrow + len(layers) + 2 * narrow
        return blocks + ladder + (0 if site.reader is not None else (narrow + 1) * site.width)

    def for_loading(self) -> Ladder:
        """The same shapes without the base's weights to start from: their values come from the file."""
        return replace(self, start="random")

    def chosen(self, site: StatesSite) -> list[int]:
        """The stack's layers that have a side block. Raises UserError where none is left."""
        count = len(site.layers)
        gone = [] if self.dropped is None else select_layers(self.dropped, count, "dropped")
        kept = [at for at in select_layers(self.layers, count) if at not in gone]
        if not kept:
            raise UserError(f"ladder: dropped={self.dropped!r} leaves no layer")
        return kept


class LadderNetwork(nn.Module):
    """Up LN(h) beside one stack; LN(h) beside an encoder that a decoder attends to."""

    undecayed = ("gates",)
    exclusive = True

    def __init__(self, site: StatesSite, method: Ladder, layers: list[int], units: Units | None):
        super().__init__()
        narrow = site.width // method.reduction
        self.reads_encoder = site.encoder is not None
        self.temperature, self.merge_last = method.temperature, method.merge_last
        self.first = nn.Linear(site.width, narrow)
        self.downs = nn.ModuleList(nn.Linear(site.width, narrow) for _ in layers)
        self.gates = nn.Parameter(torch.zeros(len(layers)))
        self.side = SideBlocks(site, layers, method.reduction, units)
        self.norm = nn.LayerNorm(narrow)
        self.up = None if site.reader is not None else nn.Linear(narrow, site.width)
        if self.up is not None and self.merge_last:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that the side blocks stand beside."""
        return self.side.layers

    @property
    def taps(self) -> tuple[int, ...]:
        """The layers whose outputs are read."""
        return self.layers

    def forward(self, reading: Reading, own: torch.Tensor) -> torch.Tensor:
        """The stack's states and its own output [batch, length, width] -> [batch, length, width], or width / r"""
        precision = self.gates.dtype
        self.side.begin()
        shares = torch.sigmoid(self.gates / self.temperature)
        assert reading.first is not None
        hidden = self.first(reading.first.to(precision))
        for number, (down, at) in enumerate(zip(self.downs, self.layers, strict=True)):
            tap = down(reading.taps[at].to(precision))
            hidden = self.side(number, shares[number] * hidden + (1 - shares[number]) * tap, reading)
        hidden = self.norm(hidden)
        if self.up is None:
            return hidden
        return self.up(hidden) + own.to(precision) if self.merge_last else self.up(hidden)

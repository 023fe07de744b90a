"""Side-tuning. Zhang, Sax, Zamir, Guibas and Malik 2020, Side-Tuning: A Baseline for Network Adaptation via Additive
Side Networks, arXiv:1912.13503.

    R(x) = σ(α) B(x) + (1 − σ(α)) S(x),     or B + S,     or B ⊙ S

B [batch, length, width] is what the frozen base gives behind its final norm, in front of the head, S what a small
network beside it makes of the first layer's input x; α is one number and 0 at the start, which is the mean of both. The
side network is made of the base's lowest layers, narrowed by r, is a perceptron at every position, or a given small
model M (model=…):

    S = Up LN(S_l(… S_0(Down x)))     with Down [width / r, width], Up [width, width / r]; without both where r = 1
    S = W_2 gelu(W_1 x + b_1) + b_2   with W_1 [width / r, width]
    S = Up M(tokens or pixels)        with Up [width, width of M]; without it where M is as wide as the base

M is a pretrained model of the base's kind without its head and starts from its weights, all of which are trained. As in
the paper it reads what the base reads, with its own embeddings: behind a projection of the base's embeddings its layers
would see what they have never seen. So it needs the base's tokenizer, or pictures cut as the base cuts them.

In encoder-decoders S is a side encoder, LN(h), and a side decoder that attends to it; the decoder's outputs are fused.
The base runs without gradients. The layers start from structured pruning of the base's (by magnitude; copies where
r = 1), or at random. With `distill` S first learns to be B: for that share of the training the output is B, which the
head learns on, and the loss has the term

    Σ (S - B)² / Σ B²                                     over all tokens that are no padding

of which trimtab's Trainer knows; another loop calls `adapter.progress(done)` before each optimizer step and adds
`adapter.extra_loss()` to the loss. Trained parameters: those of S, and α.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional as F

from trimtab.arch import select_layers
from trimtab.contract import Context, Parts
from trimtab.errors import UserError, unknown
from trimtab.methods.side_blocks import STARTS, SideBlocks, Start, pruned_units
from trimtab.methods.side_model import SideModel, check_inputs, check_small
from trimtab.narrow import Units, check_reduction, narrow_count
from trimtab.sites import Sites, StatesSite
from trimtab.states import Reading

Network = Literal["layers", "mlp"]
NETWORKS = ("layers", "mlp")
Fuse = Literal["alpha", "sum", "product"]
FUSES = ("alpha", "sum", "product")
OF_NETWORK = ("network", "layers", "reduction", "start")
"""The settings of a side network that is made of the base, or is a perceptron."""
SHARE = 4
"""One layer in so many, the lowest, is in the side network by default."""


@dataclass(frozen=True)
class Side:
    """A small network beside the frozen base, fused with it in front of the head."""

    network: Network = "layers"
    """layers (the base's lowest ones, narrowed) or mlp (a perceptron over the embeddings)."""
    layers: str | None = None
    """Which of the base's layers the side network is made of, e.g. 0:4; by default the lowest quarter."""
    reduction: int = 4
    """The base's width over the side network's; 1 copies the layers as they are."""
    start: Start = "pruned"
    """pruned (the layers start from the base's) or random."""
    fuse: Fuse = "alpha"
    """alpha (a learned mean), sum or product."""
    distill: float = 0.0
    """Share of the training in which the side network first learns to give what the base gives."""
    model: str | None = None
    """A small pretrained model (a folder, hub id or pkg:NAME/path) that is the side network."""

    name: ClassVar[str] = "side"
    kinds: ClassVar[frozenset[str]] = frozenset({"states"})
    lr: ClassVar[float] = 1e-3
    mergeable: ClassVar[bool] = False
    formula: ClassVar[str] = "Σ layers + (width + 1)·width/r + LN + (width/r + 1)·width + 1"
    paper: ClassVar[str] = "Zhang et al. 2020, arXiv:1912.13503"

    def __post_init__(self) -> None:
        for field, value, known in (
            ("network", self.network, NETWORKS),
            ("start", self.start, STARTS),
            ("fuse", self.fuse, FUSES),
        ):
            if value not in known:
                raise unknown(f"side: {field}", value, known)
        if not 0 <= self.distill < 1:
            raise UserError(f"side: distill={self.distill:g} must be in [0, 1)")
        defaults = {field.name: field.default for field in fields(self)}
        changed = [name for name in OF_NETWORK if getattr(self, name) != defaults[name]]
        if self.model is not None and changed:
            raise UserError(f"side: {changed[0]}= means nothing with model=, which is the side network as it is")
        if self.network == "mlp" and (self.layers is not None or self.start != "pruned"):
            raise UserError("side: network=mlp is made of no layers; leave out layers= and start=")

    def build(self, sites: Sites, context: Context) -> Parts:
        """A side network a stack.

        Raises UserError for a reduction that does not divide, for layers out of range, and for a small model that does
        not load or cannot stand beside the base.
        """
        if self.model is not None:
            return {sites.states[-1]: SideNetwork(sites.states[-1], self, self._small(sites, context))}
        for site in sites.states:
            self._check(site)
        if self.network == "mlp":
            site = sites.states[-1]
            return {site: SideNetwork(site, self, SideMLP(site.width, site.width // self.reduction))}
        chosen = {site: self.chosen(site) for site in sites.states}
        units = pruned_units(sites, chosen, self.reduction) if self.start == "pruned" else {}
        nets = {site: SideLayers(site, layers, self.reduction, units.get(site)) for site, layers in chosen.items()}
        return {site: net if site.reader is not None else SideNetwork(site, self, net) for site, net in nets.items()}

    def parameter_count(self, sites: Sites) -> int:
        """Those of S a stack and α; an encoder that is read has no Up."""
        own = 1 if self.fuse == "alpha" else 0
        if self.model is not None:
            return own + SideModel.count(self.model, sites.states[-1].width)
        if self.network == "mlp":
            return self._projections(sites.states[-1].width) + own
        return own + sum(self._count(site) for site in sites.states)

    @property
    def brings_model(self) -> bool:
        """Whether the adapter's folder describes a model of its own."""
        return self.model is not None

    @property
    def settles_at(self) -> float:
        """Checkpoints of a distilled network alone are no candidates for the best one."""
        return self.distill or -1.0

    def progress(self, parts: Sequence[Any], done: float) -> None:
        """Whether the side network is distilled now."""
        for part in self._own(parts):
            part.distills = done < self.distill

    def extra_loss(self, parts: Sequence[Any]) -> torch.Tensor | float:
        """Σ (S - B)² / Σ B² of the last forward, while the side network is distilled."""
        return sum((part.take_gap() for part in self._own(parts)), 0.0)

    def _own(self, parts: Sequence[Any]) -> list[SideNetwork]:
        return [part for part in parts if isinstance(part, SideNetwork) and part.method == self]

    def for_loading(self) -> Side:
        """The same shapes without the base's weights to start from: their values come from the file."""
        return self if self.network == "mlp" or self.model is not None else replace(self, start="random")

    def folded(self) -> Side:
        """The same; a small model in a folder by its whole path."""
        from trimtab.models import portable

        return self if self.model is None else replace(self, model=portable(self.model))

    def _small(self, sites: Sites, context: Context) -> SideModel:
        """The small model: of its source, or of what an adapter's folder says of it."""
        from trimtab.small import load_small, small_from  # which load models, and these need to know the methods

        assert self.model is not None
        small = load_small(self.model) if context.brought is None else small_from(context.brought, context.room)
        check_small(sites, small)
        if context.brought is None:
            check_inputs(sites, small, context.tokenizer)
        return SideModel(sites.states[-1], small)

    def chosen(self, site: StatesSite) -> list[int]:
        """The layers of a stack that the side network is made of."""
        count = len(site.layers)
        return list(range(max(1, count // SHARE))) if self.layers is None else select_layers(self.layers, count)

    def _check(self, site: StatesSite) -> None:
        if self.network == "layers":
            check_reduction("side", site, self.reduction)
        elif self.reduction < 1 or site.width % self.reduction:
            fitting = ", ".join(str(one) for one in range(1, site.width + 1) if site.width % one == 0)
            raise UserError(
                f"side: reduction={self.reduction} does not divide the model's width {site.width}; these do: {fitting}"
            )

    def _projections(self, width: int) -> int:
        narrow = width // self.reduction
        return (width + 1) * narrow + (narrow + 1) * width

    def _count(self, site: StatesSite) -> int:
        narrow = site.width // self.reduction
        total = sum(narrow_count(site, at, self.reduction) for at in self.chosen(site)) + 2 * narrow
        if self.reduction > 1:
            total += self._projections(site.width)
            total -= 0 if site.reader is None else (narrow + 1) * site.width
        return total


class SideLayers(nn.Module):
    """Up LN(S_l(… S_0(Down x))); without Up beside an encoder that a decoder attends to."""

    exclusive = True
    taps = ()

    def __init__(self, site: StatesSite, layers: list[int], reduction: int, units: Units | None):
        super().__init__()
        narrow, wide = site.width // reduction, reduction == 1
        self.down = None if wide else nn.Linear(site.width, narrow)
        self.side = SideBlocks(site, layers, reduction, units)
        self.norm = nn.LayerNorm(narrow)
        self.up = None if wide or site.reader is not None else nn.Linear(narrow, site.width)
        self.reads_encoder = site.encoder is not None

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that the side network's stand beside."""
        return self.side.layers

    def forward(self, reading: Reading, own: torch.Tensor) -> torch.Tensor:
        """The stack's states -> [batch, length, width], or width / r"""
        self.side.begin()
        assert reading.first is not None
        hidden = reading.first.to(self.norm.weight.dtype)
        hidden = hidden if self.down is None else self.down(hidden)
        for number in range(len(self.layers)):
            hidden = self.side(number, hidden, reading)
        hidden = self.norm(hidden)
        return hidden if self.up is None else self.up(hidden)


class SideMLP(nn.Module):
    """W_2 gelu(W_1 x + b_1) + b_2"""

    layers = taps = ()
    reads_encoder = False

    def __init__(self, width: int, inside: int):
        super().__init__()
        self.first, self.second = nn.Linear(width, inside), nn.Linear(inside, width)

    def forward(self, reading: Reading, own: torch.Tensor) -> torch.Tensor:
        """The stack's states -> [batch, length, width]"""
        assert reading.first is not None
        return self.second(F.gelu(self.first(reading.first.to(self.first.weight.dtype))))


class SideNetwork(nn.Module):
    """σ(α) B + (1 − σ(α)) S, or B + S, or B ⊙ S"""

    exclusive = True
    taps = ()

    def __init__(self, site: StatesSite, method: Side, network: SideLayers | SideMLP | SideModel):
        super().__init__()
        self.network, self.method = network, method
        self.distills = False
        self.gap: torch.Tensor | float = 0.0
        self.layers, self.reads_encoder = network.layers, network.reads_encoder
        self.keeps, self.brings = getattr(network, "keeps", None), getattr(network, "said", None)
        self.undecayed = ("alpha",) if method.fuse == "alpha" else ()
        if method.fuse == "alpha":
            self.alpha = nn.Parameter(torch.zeros(()))

    @property
    def whole(self) -> bool:
        """Whether every token has to be counted as often as it stands in a batch, or rows cannot be packed."""
        return self.distilling or getattr(self.network, "whole", False)

    @property
    def distilling(self) -> bool:
        """Whether the side network learns to give what the base gives, and the base's output is the output."""
        return self.training and self.distills

    def forward(self, reading: Reading, own: torch.Tensor) -> torch.Tensor:
        """The stack's states and its own output [batch, length, width] -> [batch, length, width]"""
        side = self.network(reading, own)
        base = own.to(side.dtype)
        if self.distilling:
            self.gap = _gap(side, base, reading.mask)
            return base
        if self.method.fuse == "sum":
            return base + side
        if self.method.fuse == "product":
            return base * side
        share = torch.sigmoid(self.alpha)
        return share * base + (1 - share) * side

    def take_gap(self) -> torch.Tensor | float:
        """How far the side network was from the base in the last forward; asked a second time it is 0."""
        gap, self.gap = self.gap, 0.0
        return gap


def _gap(side: torch.Tensor, base: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Σ (S - B)² / Σ B², [], of [batch, length, width] over the tokens that `mask` [batch, length] shows"""
    base = base.detach()
    off, size = (side - base).square().sum(-1), base.square().sum(-1)
    return off.sum() / size.sum() if mask is None else (off * mask).sum() / (size * mask).sum()

"""LoRA: Low-Rank Adaptation of Large Language Models. Hu et al. 2021, arXiv:2106.09685.

    y = W x + s · B A drop(x),     A [r, in], B [out, r],  s = alpha / r  (rank-stabilised: alpha / sqrt(r))

A starts Kaiming-uniform (a = sqrt 5), B at zero, so that the start is exactly the base model. Trained parameters:
Σ r · (in + out) over the chosen projections. Rank-stabilised scaling: Kalajdzievski 2023, arXiv:2312.03732.

DoRA (Liu et al. 2024, arXiv:2402.09353) trains a magnitude m [out] beside the direction:

    y = m ⊙ (W + s B A) x / ‖W + s B A‖ + b,     the norm of each row [out], without gradient

PiSSA (Meng et al. 2024, arXiv:2404.02948) starts s B A at the principal part of W and takes that part off the base:
y = W x + s (B A - B_0 A_0) x; folded it is an ordinary LoRA of rank 2r. LoRA+ (Hayou et al. 2024, arXiv:2402.12354)
trains B at `lr_ratio` times the learning rate of A.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional as F

from trimtab.contract import Context, Parts
from trimtab.errors import UserError
from trimtab.sites import LinearSite, Sites


@dataclass(frozen=True)
class LoRA:
    """Low-rank updates of chosen projections; merges into the base weights."""

    r: int = 8
    """Rank of the update."""
    alpha: float = 16.0
    """Numerator of the scale alpha / r."""
    dropout: float = 0.0
    """Dropout probability on the update's input, while training."""
    targets: tuple[str, ...] = ("q", "v")
    """Projections to adapt: q, k, v, o, up, gate, down."""
    layers: str | None = None
    """Layers to adapt, e.g. -10: or 0,2,5; all where not given."""
    rank_stabilised: bool = False
    """Scale by alpha / sqrt(r) instead of alpha / r."""
    dora: bool = False
    """DoRA: train the magnitude of each row beside its direction."""
    init: Literal["zero", "pissa"] = "zero"
    """zero (B = 0), or pissa: the principal singular vectors of the weight."""
    lr_ratio: float = 1.0
    """LoRA+: the learning rate of B over that of A."""

    name: ClassVar[str] = "lora"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    lr: ClassVar[float] = 1e-3  # measured: BERT-tiny on 2,000 sarcastic headlines, accuracy 0.43 to 0.75
    mergeable: ClassVar[bool] = True
    formula: ClassVar[str] = "Σ r·(in + out)"
    paper: ClassVar[str] = "Hu et al. 2021, arXiv:2106.09685"

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UserError(f"lora: r={self.r} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora: dropout={self.dropout} must be in [0, 1)")
        if self.lr_ratio <= 0:
            raise UserError(f"lora: lr_ratio={self.lr_ratio:g} must be above 0")
        if self.dora and self.init == "pissa":
            raise UserError("lora: dora and init=pissa exclude each other")

    def build(self, sites: Sites, context: Context) -> Parts:
        """One update a chosen projection. Raises UserError for targets or layers that do not exist."""
        part = Decomposed if self.dora else Principal if self.init == "pissa" else LowRank
        return {site: part(site, self) for site in sites.linears(self.targets, self.layers)}

    def parameter_count(self, sites: Sites) -> int:
        """Σ r · (in + out), with DoRA also Σ out."""
        chosen = sites.linears(self.targets, self.layers)
        return sum(self.r * (site.in_features + site.out_features) + self.dora * site.out_features for site in chosen)

    def folded(self) -> LoRA:
        """PiSSA's inference form: the difference to its start, as an ordinary LoRA of twice the rank."""
        if self.init != "pissa":
            return self
        return replace(self, r=2 * self.r, alpha=self.scale * 2 * self.r, rank_stabilised=False, init="zero")

    @property
    def scale(self) -> float:
        """s"""
        return self.alpha / (math.sqrt(self.r) if self.rank_stabilised else self.r)


class LowRank(nn.Module):
    """The update s · B A drop(x) of one projection."""

    def __init__(self, site: LinearSite, method: LoRA):
        super().__init__()
        self.A = nn.Parameter(torch.empty(method.r, site.in_features))
        self.B = nn.Parameter(torch.zeros(site.out_features, method.r))
        self.dropout, self.scale, self.lr_ratio = method.dropout, method.scale, method.lr_ratio
        self.draws = method.dropout > 0
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x [..., in], y = W x [..., out] -> y + s · B A drop(x)"""
        return y + self.update(F.dropout(x.to(self.A.dtype), self.dropout, self.training)).to(y.dtype)

    def update(self, x: torch.Tensor) -> torch.Tensor:
        """s · B A x [..., out] of x [..., in] in the precision of A"""
        return F.linear(F.linear(x, self.A), self.B) * self.scale

    def delta(self) -> torch.Tensor:
        """s · B A [out, in]"""
        return self.scale * self.B @ self.A

    def lr_scales(self) -> dict[str, float]:
        """LoRA+: B learns faster."""
        return {"B": self.lr_ratio}

    def merged(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """weight [out, in] and bias [out] of the projection with the update written in."""
        return weight + self.delta(), bias


class Decomposed(nn.Module):
    """DoRA: magnitude and direction of one projection."""

    exclusive = True  # the direction is that of the base's weight, not of what another part made of it

    def __init__(self, site: LinearSite, method: LoRA):
        super().__init__()
        self.low = LowRank(site, method)
        self.draws = self.low.draws
        self.magnitude = nn.Parameter(site.weight().detach().float().norm(dim=1))
        self.site = (site,)  # in a tuple: the base's weight is no part of the adapter

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x [..., in], y = W x + b [..., out] -> m ⊙ (W + s B A) x / ‖W + s B A‖ + b

        With dropout the change of the base's share sees the dropped input as well, as in the paper's code.
        """
        (site,) = self.site
        weight, bias = site.weight().to(self.magnitude.dtype), site.bias()
        ratio = self.magnitude / (weight + self.low.delta()).norm(dim=1).detach()  # [out]
        dropping = self.low.dropout > 0 and self.training
        x = F.dropout(x.to(self.magnitude.dtype), self.low.dropout, self.training)
        base = F.linear(x, weight) if dropping else y if bias is None else y - bias
        return y + ((ratio - 1) * base + ratio * self.low.update(x)).to(y.dtype)

    def lr_scales(self) -> dict[str, float]:
        """LoRA+: B learns faster."""
        return {"low.B": self.low.lr_ratio}

    def merged(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """weight [out, in] with the update, its rows brought to the trained magnitude."""
        moved = weight + self.low.delta()
        return moved * (self.magnitude / moved.norm(dim=1))[:, None], bias


class Principal(nn.Module):
    """PiSSA: a low-rank update that starts at the principal part of the weight, less that part."""

    A_0: torch.Tensor
    B_0: torch.Tensor

    def __init__(self, site: LinearSite, method: LoRA):
        super().__init__()
        self.low, self.method, self.site = LowRank(site, method), method, (site,)
        self.draws = self.low.draws
        u, sigma, v = torch.linalg.svd(site.weight().detach().float(), full_matrices=False)
        if method.r > sigma.numel():
            raise UserError(f"lora: init=pissa takes a rank of at most {sigma.numel()} here, not {method.r}")
        root = (sigma[: method.r] / method.scale).sqrt()
        with torch.no_grad():
            self.low.A.copy_(root[:, None] * v[: method.r])
            self.low.B.copy_(u[:, : method.r] * root)
        self.register_buffer("A_0", self.low.A.detach().clone())
        self.register_buffer("B_0", self.low.B.detach().clone())

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x [..., in], y = W x [..., out] -> y + s (B A - B_0 A_0) drop(x)"""
        x = F.dropout(x.to(self.A_0.dtype), self.low.dropout, self.training)
        start = F.linear(F.linear(x, self.A_0), self.B_0) * self.low.scale
        return y + (self.low.update(x) - start).to(y.dtype)

    def lr_scales(self) -> dict[str, float]:
        """LoRA+: B learns faster."""
        return {"low.B": self.low.lr_ratio}

    def merged(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """weight [out, in] and bias [out] with the difference to the start written in."""
        return weight + self.low.delta() - self.low.scale * self.B_0 @ self.A_0, bias

    @torch.no_grad()
    def fold(self) -> LowRank:
        """[A ; A_0] and [B, -B_0]: an ordinary LoRA of rank 2r."""
        twice = LowRank(self.site[0], self.method.folded())
        twice.A = nn.Parameter(torch.cat([self.low.A, self.A_0]))
        twice.B = nn.Parameter(torch.cat([self.low.B, -self.B_0], dim=1))
        return twice

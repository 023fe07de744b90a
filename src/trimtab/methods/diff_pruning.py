"""Diff pruning: Parameter-Efficient Transfer Learning with Diff Pruning. Guo et al. 2021, arXiv:2012.07463.

    y = (W + z ⊙ w) x + b,     W frozen, w and log α [out, in] trained, w starts at 0, log α at 5
    z = min(1, max(0, 3 s - 1.5)),     s = σ(log α + log u - log(1 - u)),     u ~ U(0, 1) [out, in], drawn each call
    loss + penalty · Σ P(z ≠ 0),     P(z ≠ 0) = σ(log α - log(1.5 / 1.5)) = σ(log α)

(hard-concrete gates, which can be exactly 0 and 1, and the L0 penalty). When a share `cut_at` of the training is done,
the `share` of all these weights with the largest |z w| is kept, and w becomes z w. The rest of the training moves these
differences alone: their gates are fixed at 1 (log α = ∞), all others at 0 (log α = -∞), so that a checkpoint says which
phase it is of. Few differences want longer steps than all did, as in the paper; `search_lr` says how much longer. In
evaluation z has no noise: s = σ(log α). The structured form multiplies z by a gate of the whole matrix, drawn likewise;
P(z ≠ 0) is then the product of both.

The start is exactly the base model. Changed are the weights of all projections and the pooler. Trained parameters:
2 · Σ out · in. Stored are the places and values of the differences that are not 0, `share` · Σ out · in behind the cut.
trimtab's Trainer makes the cut and adds the penalty; another loop calls `adapter.progress(done)` before each optimizer
step, and with 1 at the end, and adds `adapter.extra_loss()` to the loss.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from trimtab.contract import Context, Parts
from trimtab.errors import UserError
from trimtab.methods.weights import chosen_weights
from trimtab.sites import LinearSite, Sites

STRETCH = 1.5
"""Gates are stretched from (0, 1) to (-1.5, 1.5) before they are clipped."""
OPEN = 5.0
"""log α at the start."""
LEAST = 1e-4
"""u stays this far from 0 and 1."""


@dataclass(frozen=True)
class DiffPruning:
    """Sparse differences to the base's weights, found by gates; merges into the base weights."""

    share: float = 0.005
    """Share of the weights that differ from the base's in the end."""
    penalty: float = 1.25e-7
    """What an open gate costs in the loss."""
    cut_at: float = 0.5
    """Share of the training after which the places are fixed."""
    search_lr: float = 0.01
    """Learning rate of all differences before the cut over that of the kept ones behind it."""
    gate_lr: float = 3.0
    """Learning rate of the gates over that of the kept differences."""
    structured: bool = False
    """Give each matrix a gate of its own, too."""
    layers: str | None = None
    """Layers to change, e.g. -10: or 0,2,5; all where not given."""
    targets: tuple[str, ...] = ()
    """Projections to change: q, k, v, o, up, gate, down; all of them where not given."""
    form: Literal["gates", "sparse"] = "gates"
    """Gates and differences that are trained, or places and values, as they are saved."""

    name: ClassVar[str] = "diff-pruning"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    lr: ClassVar[float] = 3e-2  # measured: BERT-tiny on 1,000 sarcastic headlines, accuracy 0.77, full tuning 0.79
    mergeable: ClassVar[bool] = True
    formula: ClassVar[str] = "2·Σ out·in, deployed share·Σ out·in"
    paper: ClassVar[str] = "Guo et al. 2021, arXiv:2012.07463"

    def __post_init__(self) -> None:
        for name in ("share", "cut_at"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"diff-pruning: {name}={getattr(self, name):g} must be above 0 and at most 1")
        if self.penalty < 0:
            raise UserError(f"diff-pruning: penalty={self.penalty:g} must not be negative")
        for name in ("search_lr", "gate_lr"):
            if getattr(self, name) <= 0:
                raise UserError(f"diff-pruning: {name}={getattr(self, name):g} must be above 0")

    def build(self, sites: Sites, context: Context) -> Parts:
        """Differences a projection. Raises UserError for targets or layers that do not exist, and quantised weights."""
        shapes = {site: site.weight().shape for site in self._chosen(sites)}
        if self.form == "sparse":  # whose differences are to be loaded
            return {site: Sparse(torch.zeros(shape)) for site, shape in shapes.items()}
        return {site: Gated(shape, self) for site, shape in shapes.items()}

    @property
    def settles_at(self) -> float:
        """Checkpoints before the cut are no candidates for the best one."""
        return self.cut_at

    def parameter_count(self, sites: Sites) -> int:
        """2 · Σ out · in, and a gate a matrix in the structured form; places and values are not trained."""
        if self.form == "sparse":
            return 0
        return sum(2 * site.out_features * site.in_features + self.structured for site in self._chosen(sites))

    def folded(self) -> DiffPruning:
        """The same with places and values."""
        return dataclasses.replace(self, form="sparse")

    def progress(self, parts: Sequence[Any], done: float) -> None:
        """Make the cut when its time has come, once; a fixed gate is drawn no more."""
        own = self._own(parts)
        if not own:
            return
        if done >= self.cut_at and not own[0].fixed:
            _cut(own, self.share)
        fixed = own[0].fixed
        for part in own:
            part.draws = not fixed

    def extra_loss(self, parts: Sequence[Any]) -> torch.Tensor | float:
        """penalty · Σ P(z ≠ 0)"""
        own = self._own(parts)
        if not own:
            return 0.0
        place = own[0].log_alpha.device
        return self.penalty * torch.stack([part.expected().to(place) for part in own]).sum()

    def _own(self, parts: Sequence[Any]) -> list[Gated]:
        return [part for part in parts if isinstance(part, Gated) and part.method == self]

    def _chosen(self, sites: Sites) -> list[LinearSite]:
        return chosen_weights(sites, self.targets, self.layers)


class Gated(nn.Module):
    """W -> W + z ⊙ w"""

    unit: torch.Tensor

    def __init__(self, shape: torch.Size, method: DiffPruning):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(shape))
        self.log_alpha = nn.Parameter(torch.full(shape, OPEN))
        self.of_matrix = nn.Parameter(torch.tensor(OPEN)) if method.structured else None
        """log α of the whole matrix, []."""
        self.register_buffer("unit", torch.tensor(1.0))
        """What w is counted in, []: an optimizer's step is a larger one behind the cut."""
        self.method, self.draws = method, True
        self.undecayed = ("log_alpha", "of_matrix") if method.structured else ("log_alpha",)

    @property
    def fixed(self) -> bool:
        """Whether the cut has been made."""
        return bool(self.log_alpha.flatten()[0].isinf())

    def difference(self, drawn: bool = False) -> torch.Tensor:
        """z ⊙ w [out, in]"""
        gate = hard_concrete(self.log_alpha, drawn)
        return self._counted() * (gate if self.of_matrix is None else gate * hard_concrete(self.of_matrix, drawn))

    def _counted(self) -> torch.Tensor:
        """unit · w, with the gradient of w: an optimizer's moments go on across the cut."""
        return self.w + (self.unit - 1) * self.w.detach()

    def expected(self) -> torch.Tensor:
        """Σ P(z ≠ 0), []"""
        open_ = self.log_alpha.sigmoid().sum()
        return open_ if self.of_matrix is None else open_ * self.of_matrix.sigmoid()

    def effective(self, weight: torch.Tensor) -> torch.Tensor:
        """[out, in] -> [out, in]"""
        return (weight + self.difference(self.training and self.draws)).to(weight.dtype)

    def lr_scales(self) -> dict[str, float]:
        """Differences learn slowly, gates fast."""
        gates = ("log_alpha",) if self.of_matrix is None else ("log_alpha", "of_matrix")
        return {"w": self.method.search_lr, **dict.fromkeys(gates, self.method.gate_lr)}

    def fix(self, value: torch.Tensor, kept: torch.Tensor) -> None:
        """Go on from these differences [out, in], moving those that are kept (bool [out, in])."""
        self.unit.fill_(1 / self.method.search_lr)
        self.w.copy_(value / self.unit)
        self.log_alpha.copy_(torch.where(kept, math.inf, -math.inf))
        if self.of_matrix is not None:
            self.of_matrix.fill_(math.inf)

    @torch.no_grad()
    def fold(self) -> Sparse:
        """The differences that are not 0."""
        return Sparse(self.difference())


class Sparse(nn.Module):
    """W -> W with values added at some places, counted along the rows of W [out, in]."""

    index: torch.Tensor
    value: torch.Tensor

    def __init__(self, difference: torch.Tensor):
        super().__init__()
        self.shape, flat = tuple(difference.shape), difference.flatten()
        index = flat.nonzero().squeeze(1)
        small = flat.numel() <= torch.iinfo(torch.int32).max
        self.register_buffer("index", index.to(torch.int32) if small else index)
        self.register_buffer("value", flat[index])

    def fit(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Be as long as these. Raises UserError for what are no rising places of this matrix with a value each."""
        if set(tensors) != {"index", "value"}:
            return  # which loading refuses
        index, value = tensors["index"], tensors["value"]
        places = index.dim() == 1 and not index.is_floating_point() and index.shape == value.shape
        if not places or not _rising(index, math.prod(self.shape)):
            raise UserError(f"the sparse differences are no rising places of a matrix {list(self.shape)}, a value each")
        self.index, self.value = self.index.new_zeros(len(index)), self.value.new_zeros(len(value))

    def effective(self, weight: torch.Tensor) -> torch.Tensor:
        """[out, in] -> [out, in]"""
        flat, at = weight.flatten(), self.index.long()
        return flat.index_copy(0, at, (flat[at] + self.value).to(flat.dtype)).view(self.shape)

    def merged(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The weight [out, in] with the differences, and the bias as it is."""
        return self.effective(weight), bias


def hard_concrete(log_alpha: torch.Tensor, drawn: bool) -> torch.Tensor:
    """z = min(1, max(0, 3 s - 1.5)), s = σ(log α + log u - log(1 - u)), or σ(log α) where u is not drawn.

    Louizos et al. 2018, arXiv:1712.01312.
    """
    noise = torch.rand_like(log_alpha).clamp(LEAST, 1 - LEAST).logit() if drawn else 0.0
    return (2 * STRETCH * (log_alpha + noise).sigmoid() - STRETCH).clamp(0, 1)


def _rising(index: torch.Tensor, stop: int) -> bool:
    """Whether integers [n] rise within 0 … stop - 1."""
    inside = not len(index) or (int(index[0]) >= 0 and int(index[-1]) < stop)
    return inside and bool((index[1:] > index[:-1]).all())  # differences may overflow


@torch.no_grad()
def _cut(parts: Sequence[Gated], share: float) -> None:
    """Keep the largest of all parts' differences together."""
    values = [part.difference() for part in parts]
    sizes = torch.cat([value.abs().flatten().to(values[0].device) for value in values])
    kept = torch.zeros_like(sizes, dtype=torch.bool)
    kept[sizes.topk(max(1, round(share * sizes.numel())), sorted=False).indices] = True
    for part, value, own in zip(parts, values, kept.split([value.numel() for value in values]), strict=True):
        part.fix(value, own.view_as(value).to(value.device))

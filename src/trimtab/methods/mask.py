"""Masking: Masking as an Efficient Alternative to Finetuning for Pretrained Language Models. Zhao et al. 2020,
arXiv:2004.12406.

    y = (W ⊙ M) x + b,     M = 1[m > τ],     W frozen, m [out, in] trained, τ = 0.01
    ∂L/∂m := ∂L/∂M = ∂L/∂(W ⊙ M) ⊙ W                     straight through the threshold

Each of the base's own weights is kept or left out, which is one bit; biases stay. The scores m start uniform in
(-0.02, s) with s = (0.02 + τ) / sparsity - 0.02, so that a share `sparsity` of the weights is left out at first. With
`target_sparsity` the loss has the term

    pressure · (share left out - target_sparsity)²

whose gradient is taken as that of the number left out, in which every score counts 1: that of the share would vanish in
large models. (The paper's code raises the multiplier instead.) Radiya-Dixit & Wang 2020 (How fine can fine-tuning be?,
arXiv:2004.14129) learn such masks for chosen layers: `layers`, and `sparsity` for where they start.

Masked are all projections and the pooler, but those of the two lowest layers, which stay whole in stacks of three or
more. The task head is trained as with any method (in the paper a random one is masked as well). Trained parameters:
Σ out · in scores; stored is one bit for each, and merged the model is W ⊙ M.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from trimtab.bits import pack, unpack
from trimtab.contract import Context, Parts
from trimtab.errors import UserError
from trimtab.methods.weights import chosen_weights
from trimtab.sites import LinearSite, Sites

THRESHOLD = 0.01
LOWEST = -0.02
"""The smallest score at the start."""
WHOLE_LAYERS = 2
"""Layers at the bottom that are not masked unless they are named."""
UNMASKED = (2 * THRESHOLD, 0.58)
"""Scores at the start where none is to be under the threshold."""


@dataclass(frozen=True)
class Mask:
    """Leaves out some of the base's weights, a bit each; merges into them."""

    sparsity: float = 0.05
    """Share of the weights that is left out at the start."""
    layers: str | None = None
    """Layers to mask, e.g. -10: or 0,2,5; where not given, all but the two lowest (of fewer than three, all)."""
    targets: tuple[str, ...] = ()
    """Projections to mask: q, k, v, o, up, gate, down; all of them where not given."""
    init: Literal["uniform", "magnitude"] = "uniform"
    """Which weights are left out at the start: any, or the smallest of each projection."""
    target_sparsity: float | None = None
    """Share of the weights that training is to leave out; where not given, what helps."""
    pressure: float = 1e-3
    """Weight of the distance from `target_sparsity` in the loss."""
    form: Literal["scores", "bits"] = "scores"
    """Scores that are trained, or their bits, as they are saved."""

    name: ClassVar[str] = "mask"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    lr: ClassVar[float] = 1e-2  # measured: BERT-tiny on 1,000 sarcastic headlines, accuracy 0.79, full tuning 0.79
    mergeable: ClassVar[bool] = True
    formula: ClassVar[str] = "Σ out·in, deployed 1 bit each"
    paper: ClassVar[str] = "Zhao et al. 2020, arXiv:2004.12406"

    def __post_init__(self) -> None:
        for name in ("sparsity", "target_sparsity"):
            share = getattr(self, name)
            if share is not None and not 0 <= share < 1:
                raise UserError(f"mask: {name}={share:g} must be in [0, 1)")
        if self.pressure < 0:
            raise UserError(f"mask: pressure={self.pressure:g} must not be negative")

    def build(self, sites: Sites, context: Context) -> Parts:
        """A mask a projection. Raises UserError for targets or layers that do not exist, and quantised weights."""
        weights = {site: site.weight().detach() for site in self.chosen(sites)}
        if self.form == "bits":  # which are to be loaded
            return {site: Bits(torch.ones_like(weight, dtype=torch.bool)) for site, weight in weights.items()}
        return {site: Scores(weight, self) for site, weight in weights.items()}

    def parameter_count(self, sites: Sites) -> int:
        """Σ out · in; bits are not trained."""
        return sum(site.out_features * site.in_features for site in self.chosen(sites) if self.form == "scores")

    def folded(self) -> Mask:
        """The same with bits."""
        return dataclasses.replace(self, form="bits")

    def extra_loss(self, parts: Sequence[Any]) -> torch.Tensor | float:
        """pressure · (share left out - target_sparsity)² over all masked weights; the gradient of a score is
        -2 · pressure · (share left out - target_sparsity)."""
        own = [part for part in parts if isinstance(part, Scores) and part.method == self]
        if self.target_sparsity is None or not own:
            return 0.0
        place = own[0].scores.device
        left_out = torch.stack([(part.scores <= THRESHOLD).sum().to(place) for part in own]).sum()
        gap = left_out / sum(part.scores.numel() for part in own) - self.target_sparsity
        scores = torch.stack([part.scores.sum().to(place) for part in own]).sum()
        return self.pressure * (gap**2 - 2 * gap * (scores - scores.detach()))

    def chosen(self, sites: Sites) -> list[LinearSite]:
        """The masked projections."""
        found = chosen_weights(sites, self.targets, self.layers)
        if self.layers is not None:
            return found
        whole = {name: WHOLE_LAYERS if len(own) > WHOLE_LAYERS else 0 for name, own in sites.layer_modules.items()}
        return [site for site in found if site.layer >= whole.get(site.stack, 0)]


class Scores(nn.Module):
    """W -> W ⊙ 1[m > τ], the threshold straight through."""

    undecayed = ("scores",)  # 0 is under the threshold

    def __init__(self, weight: torch.Tensor, method: Mask):
        super().__init__()
        self.scores = nn.Parameter(_start(weight, method))
        self.method = method

    def effective(self, weight: torch.Tensor) -> torch.Tensor:
        """[out, in] -> [out, in]"""
        return _Threshold.apply(weight, self.scores)

    @torch.no_grad()
    def fold(self) -> Bits:
        """A bit a score."""
        return Bits(self.scores > THRESHOLD)


class Bits(nn.Module):
    """W -> W ⊙ M with packed bits."""

    bits: torch.Tensor

    def __init__(self, kept: torch.Tensor):
        super().__init__()
        self.shape, self.packed = tuple(kept.shape), kept.numel()
        self.register_buffer("bits", pack(kept))

    def effective(self, weight: torch.Tensor) -> torch.Tensor:
        """[out, in] -> [out, in]"""
        return torch.where(unpack(self.bits, self.shape), weight, 0)

    def merged(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The masked weight [out, in], and the bias as it is."""
        return self.effective(weight), bias


class _Threshold(torch.autograd.Function):
    """W ⊙ 1[m > τ] [out, in]; the gradient of m is that of the mask."""

    @staticmethod
    def forward(weight: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.where(scores > THRESHOLD, weight, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        weight, scores = ctx.saved_tensors
        of_weight = torch.where(scores > THRESHOLD, grad, 0) if ctx.needs_input_grad[0] else None
        return of_weight, grad.to(scores.dtype) * weight.to(scores.dtype)


def _start(weight: torch.Tensor, method: Mask) -> torch.Tensor:
    """Scores [out, in], about a share `sparsity` of them under the threshold."""
    share = method.sparsity
    low, high = (LOWEST, (THRESHOLD - LOWEST) / share + LOWEST) if share else UNMASKED
    scores = torch.empty(weight.shape, device=weight.device, dtype=torch.float32).uniform_(low, high)
    if method.init == "uniform":
        return scores
    ranks = weight.abs().flatten().argsort()  # the smallest weight gets the smallest score
    ordered = torch.empty_like(scores).flatten()
    ordered[ranks] = scores.flatten().sort().values
    return ordered.view(weight.shape)

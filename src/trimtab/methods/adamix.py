"""AdaMix: Mixture-of-Adaptations for Parameter-efficient Model Tuning. Wang et al. 2022, arXiv:2205.12410.

    E_ij(h) = h + W_up,j g(W_down,i h + b_i) + b_j,     h [batch, length, width], i, j drawn anew each forward

once a layer, on the feed-forward output. In training every module draws one expert of the lower and one of the upper
projection a forward, the same for all rows and tokens. The loss is taken on one forward; a second one with draws of its
own is pulled towards it, and it towards the second:

    loss = CE(p_1) + consistency · (KL(p_1 ‖ p_2) + KL(p_2 ‖ p_1)) / 2,     targets detached

Of a number, which has no distribution, the squared error and the squared difference of the two forwards stand there.

Afterwards the experts' parameters are averaged into one adapter, which is what evaluation uses all along. The LoRA form
does the same with A and B of LoRA on queries and values (averaged apart, then multiplied); its experts start equal.
Deployed parameters, L layers: L · (2 · width · size + width + size), or Σ size · (in + out) in the LoRA form; in
training the mixed half times the number of experts.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional as F

from trimtab.contract import Context, Parts
from trimtab.errors import UserError
from trimtab.methods.bottleneck import ACTIVATIONS, Activation, bottleneck_size, check_size
from trimtab.sites import ActivationSite, LinearSite, Sites


@dataclass(frozen=True)
class AdaMix:
    """Adapters drawn from experts while training, averaged into one afterwards."""

    size: int | None = None
    """Width of the bottleneck (the LoRA form's rank, then 4); where not given, the model's width over `reduction`."""
    reduction: float = 16.0
    """The model's width over the bottleneck's."""
    experts: int = 4
    """Experts of each mixed projection."""
    mix: Literal["down", "up", "both"] = "down"
    """Which projections are mixed; the other one is shared."""
    consistency: float = 1.0
    """Weight of the consistency between two draws; 0 saves the second forward."""
    form: Literal["adapter", "lora"] = "adapter"
    """A bottleneck behind feed-forward, or LoRA on queries and values."""
    activation: Activation = "gelu"
    """Nonlinearity of the bottleneck: gelu, relu or swish."""
    alpha: float = 32.0
    """Numerator of the LoRA form's scale alpha / size."""
    layers: str | None = None
    """Layers to adapt, e.g. -10: or 0,2,5; all where not given."""

    name: ClassVar[str] = "adamix"
    kinds: ClassVar[frozenset[str]] = frozenset({"activation", "linear"})
    lr: ClassVar[float] = 1e-3
    mergeable: ClassVar[bool] = False
    formula: ClassVar[str] = "deployed L·(2·width·size + width + size)"
    paper: ClassVar[str] = "Wang et al. 2022, arXiv:2205.12410"

    def __post_init__(self) -> None:
        check_size("adamix", self.size, self.reduction)
        if self.experts < 1:
            raise UserError(f"adamix: experts={self.experts} must be at least 1")
        if self.consistency < 0:
            raise UserError(f"adamix: consistency={self.consistency:g} must not be negative")

    def build(self, sites: Sites, context: Context) -> Parts:
        """Experts a layer. Raises UserError for a bottleneck wider than the model."""
        if self.form == "lora":
            return {site: MixedLowRank(site, self) for site in self._linears(sites)}
        return {site: MixedBottleneck(site, self) for site in self._activations(sites)}

    def parameter_count(self, sites: Sites) -> int:
        """Both projections, each times its number of experts."""
        downs, ups = self.counts
        if self.form == "lora":
            return sum(
                self.rank * (downs * site.in_features + ups * site.out_features) for site in self._linears(sites)
            )
        sizes = [(site.width, self.bottleneck(site)) for site in self._activations(sites)]
        return sum(downs * (width * size + size) + ups * (width * size + width) for width, size in sizes)

    def folded(self) -> AdaMix:
        """One expert: the average."""
        return replace(self, experts=1, consistency=0.0)

    @property
    def counts(self) -> tuple[int, int]:
        """Experts of the lower and of the upper projection."""
        return self.experts if self.mix != "up" else 1, self.experts if self.mix != "down" else 1

    @property
    def rank(self) -> int:
        """The LoRA form's rank."""
        return 4 if self.size is None else self.size

    def bottleneck(self, site: ActivationSite) -> int:
        """The bottleneck's width at a site."""
        return bottleneck_size("adamix", site, self.size, self.reduction)

    def _activations(self, sites: Sites) -> list[ActivationSite]:
        return sites.activations(("feedforward",), self.layers)

    def _linears(self, sites: Sites) -> list[LinearSite]:
        return sites.linears(("q", "v"), self.layers)


def _drawn(training: bool, *stacks: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of each [experts, …] the same drawn expert in training, else the average."""
    if not training or stacks[0].shape[0] == 1:
        return tuple(stack.mean(0) for stack in stacks)
    expert = torch.randint(stacks[0].shape[0], ())
    return tuple(stack[expert] for stack in stacks)


class MixedBottleneck(nn.Module):
    """f + W_up g(W_down f + b) + b' with drawn or averaged projections."""

    def __init__(self, site: ActivationSite, method: AdaMix):
        super().__init__()
        width, size = site.width, method.bottleneck(site)
        downs, ups = method.counts
        self.down = nn.Parameter(0.02 * torch.randn(downs, size, width))
        self.down_bias = nn.Parameter(torch.zeros(downs, size))
        self.up = nn.Parameter(0.02 * torch.randn(ups, width, size))
        self.up_bias = nn.Parameter(torch.zeros(ups, width))
        self.activation = ACTIVATIONS[method.activation]
        self.draws = method.experts > 1

    def forward(self, output: torch.Tensor) -> torch.Tensor:
        """[batch, length, width] -> [batch, length, width]"""
        hidden = output.to(self.down.dtype)
        down, down_bias = _drawn(self.training, self.down, self.down_bias)
        up, up_bias = _drawn(self.training, self.up, self.up_bias)
        return output + F.linear(self.activation(F.linear(hidden, down, down_bias)), up, up_bias).to(output.dtype)

    @torch.no_grad()
    def fold(self) -> MixedBottleneck:
        """The same with one expert, the average of the parameters."""
        return _averaged(self)


class MixedLowRank(nn.Module):
    """y + (alpha / r) · B A x with drawn or averaged factors."""

    def __init__(self, site: LinearSite, method: AdaMix):
        super().__init__()
        downs, ups = method.counts
        first = torch.empty(method.rank, site.in_features)
        nn.init.kaiming_uniform_(first, a=math.sqrt(5))
        self.A = nn.Parameter(first.repeat(downs, 1, 1))  # equal experts: the draws make them differ
        self.B = nn.Parameter(torch.zeros(ups, site.out_features, method.rank))
        self.scale = method.alpha / method.rank
        self.draws = method.experts > 1

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x [..., in], y [..., out] -> [..., out]"""
        (down,), (up,) = _drawn(self.training, self.A), _drawn(self.training, self.B)
        return y + (F.linear(F.linear(x.to(self.A.dtype), down), up) * self.scale).to(y.dtype)

    @torch.no_grad()
    def fold(self) -> MixedLowRank:
        """The same with one expert, the average of the parameters."""
        return _averaged(self)


def _averaged(part: Any) -> Any:
    single = copy.deepcopy(part)
    for name, experts in part.named_parameters():
        setattr(single, name, nn.Parameter(experts.mean(0, keepdim=True)))
    return single

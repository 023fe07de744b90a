"""The loss between two forwards of a randomly routed model. Knows distributions; refuses to know methods.

    classes:  (KL(p ‖ q) + KL(q ‖ p)) / 2,     numbers:  (a − b)²,     each target detached

A number has no distribution of its own: KL over a single logit is always zero. Its squared error is the negative log
likelihood of a normal distribution with the variance 1/2, and (a − b)² is the divergence of two of these.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def consistency_loss(
    first: torch.Tensor, second: torch.Tensor, count: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Symmetric divergence, in nats, of two logits [..., classes]; the mean over positions, or their sum over `count`.

    AdaMix, Wang et al. 2022, arXiv:2205.12410.
    """
    p = F.log_softmax(first.float().flatten(0, -2), dim=-1)
    q = F.log_softmax(second.float().flatten(0, -2), dim=-1)
    both = _divergence(p, q) + _divergence(q, p)
    return both / (2 * max(1, p.shape[0])) if count is None else both / (2 * count)


def squared_difference(
    first: torch.Tensor, second: torch.Tensor, count: torch.Tensor | int | None = None
) -> torch.Tensor:
    """The same for two predictions of numbers [B]."""
    a, b = first.float(), second.float()
    both = F.mse_loss(b, a.detach(), reduction="sum") + F.mse_loss(a, b.detach(), reduction="sum")
    return both / (2 * (max(1, a.numel()) if count is None else count))


def _divergence(target: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(target ‖ other) summed over positions; no gradient through the target."""
    return F.kl_div(other, target.detach(), log_target=True, reduction="sum")

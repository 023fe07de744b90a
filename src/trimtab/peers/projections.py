"""Projections by the modules that other libraries know, of which a fused one computes several. Knows names alone."""

from __future__ import annotations

from collections import defaultdict

from transformers.pytorch_utils import Conv1D

from trimtab.sites import LinearSite, Sites

ROLES = ("q", "k", "v", "o", "gate", "up", "down")


def linear_sites(sites: Sites) -> dict[str, list[LinearSite]]:
    """The projections by the module that computes them."""
    found: dict[str, list[LinearSite]] = defaultdict(list)
    for site in sites.linear:
        found[site.path].append(site)
    return found


def whole_width(site: LinearSite) -> int:
    """The outputs of the module that computes a projection, those of its other projections included."""
    return int(site.module.nf if isinstance(site.module, Conv1D) else site.module.out_features)

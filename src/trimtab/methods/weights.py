"""Which of the base's weights a method changes. Knows projections; refuses to know how they are changed."""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.sites import LinearSite, Sites


def chosen_weights(sites: Sites, targets: Sequence[str], layers: str | None) -> list[LinearSite]:
    """The projections with these roles in these layers; of all roles where none is named.

    Where nothing is said of either, the pooler is one of them, if the model has it. Raises UserError for targets and
    layers that do not exist.
    """
    roles = targets or sorted({site.role for site in sites.linear})
    found = sites.linears(roles, layers)
    whole = sites.pooler is not None and not targets and layers is None
    return [*found, sites.pooler] if whole and sites.pooler is not None else found

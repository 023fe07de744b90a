"""A union: several methods on one base model that train and save as one adapter, e.g. `lora[r=8]|prompt[length=10]`.

The parts of its members act side by side; two members that claim the same kind of tensor at the same site are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from trimtab.contract import Context, Method, Parts
from trimtab.errors import UserError
from trimtab.sites import Site, Sites


@dataclass(frozen=True)
class Union:
    """Several methods as one."""

    methods: tuple[Method, ...]
    """The members, in the order in which their parts act."""

    def __post_init__(self) -> None:
        if len(self.methods) < 2:
            raise UserError("a union needs at least two methods, e.g. lora[r=8]|prompt[length=10]")
        for method in self.methods:
            if isinstance(method, Union) or getattr(method, "whole_model", False):
                raise UserError(f"{method.name} cannot be part of a union")

    @property
    def name(self) -> str:
        """The members' names joined by |."""
        return "|".join(method.name for method in self.methods)

    @property
    def kinds(self) -> frozenset[str]:
        """Every member's site kinds."""
        return frozenset().union(*(method.kinds for method in self.methods))

    @property
    def lr(self) -> float:
        """The smallest of the members' defaults: the most sensitive member sets it."""
        return min(method.lr for method in self.methods)

    @property
    def mergeable(self) -> bool:
        """Only if every member merges."""
        return all(method.mergeable for method in self.methods)

    @property
    def formula(self) -> str:
        """The members' formulas added."""
        return " + ".join(method.formula for method in self.methods)

    @property
    def paper(self) -> str:
        """The members' papers."""
        return "; ".join(method.paper for method in self.methods)

    def build(self, sites: Sites, context: Context) -> Parts:
        """The members' parts. Raises UserError where two members claim the same site."""
        parts: dict[Site, nn.Module] = {}
        owner: dict[Site, str] = {}
        for method in self.methods:
            for site, part in method.build(sites, context).items():
                if site in parts:
                    raise UserError(
                        f"{owner[site]} and {method.name} both claim {site.key}; give them different layers"
                    )
                parts[site], owner[site] = part, method.name
        return parts

    def parameter_count(self, sites: Sites) -> int:
        """The members' counts added."""
        return sum(method.parameter_count(sites) for method in self.methods)

    def for_loading(self) -> Union:
        """The members without what only their start needs."""
        members: list[Any] = [getattr(method, "for_loading", lambda method=method: method)() for method in self.methods]
        return Union(tuple(members))

    def folded(self) -> Union:
        """The union of the members' inference forms."""
        members: list[Any] = [getattr(method, "folded", lambda method=method: method)() for method in self.methods]
        return Union(tuple(members))

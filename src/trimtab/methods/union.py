"""A union: several methods on one base model that train and save as one adapter, e.g. `lora[r=8]|prompt[length=10]`.

The parts of its members act side by side, and at a site that several claim one after the other, in the order of the
members. Refused are two parts that would train the same tensor: copies of one norm or head, two sets of virtual tokens,
the same method twice at one site; and what acts inside a base that another member has run without gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from trimtab.batches import ROWS
from trimtab.contract import Context, Method, Parts, Together
from trimtab.errors import UserError
from trimtab.sites import EmbedsSite, HeadSite, Site, Sites, StatesSite


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
    def consistency(self) -> float:
        """The weight of the consistency between two forwards, if a member is trained on two."""
        return max(getattr(method, "consistency", 0.0) for method in self.methods)

    @property
    def rows(self) -> int:
        """The most rows a batch that a member asks for."""
        return max(getattr(method, "rows", ROWS) for method in self.methods)

    @property
    def formula(self) -> str:
        """The members' formulas added."""
        return " + ".join(method.formula for method in self.methods)

    @property
    def paper(self) -> str:
        """The members' papers."""
        return "; ".join(method.paper for method in self.methods)

    def build(self, sites: Sites, context: Context) -> Parts:
        """The members' parts. Raises UserError where two members would train the same tensor."""
        claims: dict[Site, dict[str, nn.Module]] = {}
        for method in self.methods:
            for site, part in method.build(sites, context).items():
                _check_claim(site, claims.get(site, {}), method.name, part)
                claims.setdefault(site, {})[method.name] = part
        _check_gradients(claims)
        _check_pictures(claims)
        return {site: Together(own) if len(own) > 1 else next(iter(own.values())) for site, own in claims.items()}

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

    def found(self, parts: Sequence[Any]) -> Union:
        """The union of the members with what their parts found."""
        members: list[Any] = list(self.methods)
        return Union(tuple(one.found(parts) if hasattr(one, "found") else one for one in members))

    def progress(self, parts: Sequence[Any], done: float) -> None:
        """To the members that train in phases."""
        members: list[Any] = [method for method in self.methods if hasattr(method, "progress")]
        for method in members:
            method.progress(parts, done)

    @property
    def settles_at(self) -> float:
        """When the last member does."""
        return max(getattr(method, "settles_at", -1.0) for method in self.methods)

    def extra_loss(self, parts: Sequence[Any]) -> Any:
        """The members' own terms of the loss added."""
        members: list[Any] = [method for method in self.methods if hasattr(method, "extra_loss")]
        return sum(method.extra_loss(parts) for method in members)


def _check_gradients(claims: Mapping[Site, Mapping[str, nn.Module]]) -> None:
    """Raises UserError where a member acts inside a base that another one has run without gradients."""
    readers = {name for site, own in claims.items() if isinstance(site, StatesSite) for name in own}
    inside = [name for site, own in claims.items() if not isinstance(site, StatesSite | HeadSite) for name in own]
    if readers and inside:
        raise UserError(
            f"{min(readers)} runs the base without gradients, so {inside[0]} in it would learn nothing; leave one out"
        )


def _check_pictures(claims: Mapping[Site, Mapping[str, nn.Module]]) -> None:
    """Raises UserError where virtual tokens are run once for all rows and prompts depend on the row's picture."""
    looking = [name for own in claims.values() for name, part in own.items() if hasattr(part, "eye")]
    virtual = [
        name for site, own in claims.items() if isinstance(site, EmbedsSite) and site.insert == "shared" for name in own
    ]
    if looking and virtual:
        raise UserError(
            f"{looking[0]} with image= makes each row's attention its own, and {virtual[0]} has virtual tokens that "
            "are the same for all rows; leave one out"
        )


def _check_claim(site: Site, present: dict[str, nn.Module], name: str, part: nn.Module) -> None:
    for other, known in present.items():
        alone = isinstance(site, EmbedsSite) or getattr(known, "exclusive", False) or getattr(part, "exclusive", False)
        if alone or other == name:
            raise UserError(f"{other} and {name} both claim {site.key}; give them different layers, or leave one out")

"""The architectures that a search may try. Knows methods' fields and a model's sites; refuses to know how an
architecture is trained and who chooses the next one.

    architecture = which members are on × the size of each × which layers have them × the learning rate

after AutoPEFT (Zhou et al. 2024, arXiv:2301.12132), whose members are the serial and the parallel adapter and the
prefix, with sizes on a logarithmic grid with "off", and a switch a layer. An architecture is an ordinary method, a
union of its members, so what a search finds is trained again by `trimtab train --method`. All members stand in the same
layers. Every number of a point is always there, also the size of a member that is off: samplers want a space that
stays the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModel

from trimtab.arch import select_layers, supports
from trimtab.errors import UserError, unknown
from trimtab.lengths import fitting_length
from trimtab.methods import IA3, BitFit, Head, Houlsby, LoRA, Parallel, Pfeiffer, Prefix, Union
from trimtab.methods.spec import format_method, parse_method
from trimtab.models import quiet
from trimtab.sites import Sites

LOWEST, HIGHEST = 1e-4, 1e-1
"""Bounds of the learning rate."""
Point = dict[str, Any]
"""A value for every parameter of the space, as Optuna keeps them."""


@dataclass(frozen=True)
class Member:
    """A method that an architecture may have."""

    name: str
    method: Any
    """The method with everything set but its size and its layers."""
    lr: float
    """The learning rate that it is started with by itself."""
    size: int = 0
    """The size that it is started with; 0 for a method that has none."""
    most: int = 0
    """The largest size."""
    fields: Mapping[str, float] = field(default_factory=dict)
    """The fields that the size sets, each with a factor."""
    bounded: bool = True
    """Whether its size is a bottleneck's, at most half of the model's width; else that of a text."""

    def of(self, size: int, layers: str | None) -> Any:
        """The method of this size in these layers."""
        sized = {name: size if factor == 1 else factor * size for name, factor in self.fields.items()}
        return dataclasses.replace(self.method, layers=layers, **sized)


MEMBERS = (
    Member("houlsby", Houlsby(norms=False), Houlsby.lr, 64, 256, {"size": 1}),
    Member("pfeiffer", Pfeiffer(), Pfeiffer.lr, 64, 256, {"size": 1}),
    Member("parallel", Parallel(), Parallel.lr, 64, 256, {"size": 1}),
    Member("prefix", Prefix(form="flat"), 1e-2, 16, 64, {"length": 1}, bounded=False),
    Member("lora", LoRA(), LoRA.lr, 8, 64, {"r": 1, "alpha": 2.0}),
    Member("ia3", IA3(), IA3.lr),
    Member("bitfit", BitFit(), BitFit.lr),
)
"""Serial adapters behind both branches and behind feed-forward, the parallel one, the prefix, LoRA, (IA)³ and biases.
The prefix is trained itself, not through a network, and LoRA's scale alpha / r is 2, so that sizes are comparable."""


@dataclass(frozen=True)
class Space:
    """The architectures for one model."""

    members: tuple[Member, ...]
    sizes: Mapping[str, tuple[int, ...]]
    """The grid of each member that has a size, ascending powers of two."""
    layers: int
    sites: Sites
    head: bool
    """Whether there is a task head, which alone is an architecture as well."""

    # What Optuna is asked

    def suggest(self, trial: Any) -> Point:
        """A point that an Optuna trial chooses."""
        point: Point = {}
        for member in self.members:
            point[member.name] = trial.suggest_categorical(member.name, (False, True))
            if member.fields:
                key = _size(member)
                point[key] = trial.suggest_int(key, 0, len(self.sizes[member.name]) - 1)
        for layer in range(self.layers):
            point[_layer(layer)] = trial.suggest_categorical(_layer(layer), (False, True))
        point["lr"] = trial.suggest_float("lr", LOWEST, HIGHEST, log=True)
        return point

    def starts(self) -> dict[str, Point]:
        """The points to begin with, by name: each member alone, of its usual size, in all layers."""
        return {member.name: self._alone(member) for member in self.members}

    def _alone(self, only: Member) -> Point:
        point: Point = {}
        for member in self.members:
            point[member.name] = member is only
            if member.fields:
                grid = self.sizes[member.name]
                point[_size(member)] = min(range(len(grid)), key=lambda at: abs(grid[at] - member.size))
        point |= {_layer(layer): True for layer in range(self.layers)}
        return {**point, "lr": only.lr}

    # What a point means

    def method(self, point: Point) -> str | None:
        """The method string of a point; None where it has nothing to train.

        Without a member or without a layer that is the task head alone.
        """
        layers = [layer for layer in range(self.layers) if point[_layer(layer)]]
        on = [member for member in self.members if point[member.name]]
        if not layers or not on:
            return format_method(Head()) if self.head else None
        where = layers_text(layers, self.layers)
        methods = [member.of(self._size_at(member, point), where) for member in on]
        return format_method(methods[0] if len(methods) == 1 else Union(tuple(methods)))

    def _size_at(self, member: Member, point: Point) -> int:
        return self.sizes[member.name][point[_size(member)]] if member.fields else 0

    def rate(self, point: Point) -> float:
        """The learning rate of a point, two digits of it."""
        return float(f"{point['lr']:.2g}")

    # What there is to say

    def longest(self, config: Any, wanted: int | None) -> int:
        """The tokens a row may have so that it fits beside every architecture's prefix."""
        largest = [member.of(self.sizes[member.name][-1], None) for member in self.members if member.fields]
        return min(fitting_length(method, config, wanted) for method in (None, *largest))

    @property
    def architectures(self) -> int:
        """How many there are, learning rates aside: what differs in members that are off counts once."""
        settings = math.prod(1 + len(self.sizes.get(member.name, (0,))) for member in self.members)
        return (settings - 1) * (2**self.layers - 1) + self.head

    @property
    def smallest(self) -> int:
        """The trained parameters of the smallest architecture, the task head's left out."""
        if self.head:
            return 0
        least = [member.of(min(self.sizes.get(member.name, (0,))), str(layer)) for member, layer in self._single()]
        return min(method.parameter_count(self.sites) for method in least)

    @property
    def largest(self) -> int:
        """The trained parameters of the largest one, the task head's left out."""
        every = [member.of(max(self.sizes.get(member.name, (0,))), None) for member in self.members]
        return sum(method.parameter_count(self.sites) for method in every)

    def _single(self) -> list[tuple[Member, int]]:
        return [(member, layer) for member in self.members for layer in range(self.layers)]


def sites_of(config: Any) -> Sites:
    """The sites of a model of this configuration, without its weights; with the pooler if the family has one."""
    with torch.device("meta"), quiet():
        return Sites(AutoModel.from_config(config))


def space_of(config: Any, names: Sequence[str] | None, head: bool, max_length: int | None) -> Space:
    """The members of these names (all if None) that fit the model.

    A prefix is at most an eighth of a text's tokens, and of a size that leaves room for `max_length` of them. Raises
    UserError for a name that does not exist and where nothing is left.
    """
    sites = sites_of(config)
    known = {member.name: member for member in MEMBERS}
    for name in names or ():
        if name not in known:
            raise unknown("the search's method", name, known)
    if names is not None and not names:
        raise UserError(f"the space has no method in it; name some of {', '.join(known)}")
    asked = [member for member in MEMBERS if names is None or member.name in names]
    fitting = [member for member in asked if _fits(member, sites)]
    if not fitting:
        listed = ", ".join(member.name for member in asked)
        raise UserError(f"the space has nothing in it: none of {listed} fits a {sites.family.name} model")
    text = fitting_length(None, config, max_length)
    width = min((site.width for site in sites.activation), default=0)
    sizes = {}
    for member in fitting:
        if member.fields:
            grid = _grid(min(member.most, width // 2 if member.bounded else text // 8))
            sizes[member.name] = tuple(size for size in grid if _leaves_room(member.of(size, None), config, max_length))
    sizes = {name: grid for name, grid in sizes.items() if grid}
    members = tuple(member for member in fitting if not member.fields or member.name in sizes)
    layers = min(len(found) for found in sites.layer_modules.values())
    return Space(members, sizes, layers, sites, head)


def _leaves_room(method: Any, config: Any, max_length: int | None) -> bool:
    try:
        return fitting_length(method, config, max_length) > 0
    except UserError:
        return False


def _fits(member: Member, sites: Sites) -> bool:
    """Whether the family has the sites, and the model those of them that the method takes."""
    if not supports(member.method.kinds, sites.family):
        return False
    try:
        return bool(member.of(1, None).parameter_count(sites))
    except UserError:
        return False


def _grid(most: int) -> tuple[int, ...]:
    return tuple(2**power for power in range(max(1, most).bit_length()))


def _size(member: Member) -> str:
    return f"{member.name}.size"


def _layer(layer: int) -> str:
    return f"layer.{layer}"


def layers_text(layers: Sequence[int], count: int) -> str | None:
    """Layer numbers in ascending order as a method's `layers`: None (all of so many), '4:' or '0,2,5'."""
    if len(layers) == count:
        return None
    if len(layers) > 1 and list(layers) == list(range(layers[0], count)):
        return f"{layers[0]}:"
    return ",".join(map(str, layers))


def layer_map(method: str, count: int) -> list[dict[str, str]]:
    """For each of so many layers what a method has there: its members' names with their sizes, '' for those without."""
    read: Any = parse_method(method)
    rows: list[dict[str, str]] = [{} for _ in range(count)]
    for member in getattr(read, "methods", (read,)):
        if not hasattr(member, "layers"):
            continue
        size = next((str(getattr(member, name)) for name in ("size", "length", "r") if hasattr(member, name)), "")
        for layer in select_layers(member.layers, count):
            rows[layer][member.name] = size
    return rows

"""What a kind of adapter in another library is, and what a library is: tables that the formats' own files fill."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from trimtab.errors import UserError
from trimtab.sites import HeadSite, Sites

if TYPE_CHECKING:
    from trimtab.adapter import Adapter
    from trimtab.peers.folder import Folder


@dataclass(frozen=True)
class Found:
    """What a folder says in our words."""

    method: Any
    """The method that does the same."""
    state: dict[str, torch.Tensor]
    """Its tensors by our names; those that are not here stay at a start that changes nothing."""

    labels: tuple[str, ...] = ()
    """The names of the head's classes, where the folder says them."""

    def classes(self, adapter: Adapter) -> tuple[str, ...]:
        """Names for the classes of the folder's head: its own, or numbers if there are not as many as the model has."""
        last = [one for key, one in self.state.items() if key.startswith("head_") and key.endswith("weight")]
        own = adapter._entry.labels
        if last and len(self.labels) == last[-1].shape[0]:
            return self.labels
        if not last or len(own) == last[-1].shape[0]:
            return ()
        return tuple(f"LABEL_{index}" for index in range(last[-1].shape[0]))


@dataclass(frozen=True)
class Written:
    """What an adapter is in another library's words."""

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Acting:
    """An adapter in its inference form, for writing."""

    method: Any
    model: PreTrainedModel
    parts: Mapping[Any, nn.Module]
    """The parts by site, without those of heads."""

    def of(self, site_type: type) -> dict[Any, Any]:
        """The parts at one kind of sites."""
        return {site: part for site, part in self.parts.items() if isinstance(site, site_type)}


@dataclass(frozen=True)
class Kind:
    """One kind of adapter of another library."""

    name: str
    """What the library calls it."""
    methods: tuple[str, ...]
    """Our methods that are written as this kind, by name."""
    read: Callable[[Folder, Model], Found]
    write: Callable[[Acting], Written]
    prompt_learning: bool = False
    """Whether the library wraps the model for it differently (peft's prompt learning)."""


@dataclass(frozen=True)
class Model:
    """A base model and its sites."""

    model: PreTrainedModel
    sites: Sites = field(repr=False)


@dataclass(frozen=True)
class Described:
    """What a folder says of itself, by its configuration alone."""

    base: str
    """The base model's name or place; empty where it says none."""
    task: str
    """A task type or a class of transformers; empty where it says none."""
    kind: str
    """What its library calls this kind of adapter."""
    methods: tuple[str, ...] = ()
    """Our methods that may do the same; none for a kind that trimtab does not read."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """The kind's own settings, those that are set."""
    labels: tuple[str, ...] = ()
    family: str = ""
    name: str = ""


@dataclass(frozen=True)
class Library:
    """One library's way of writing adapters."""

    name: str
    config_file: str
    weight_files: tuple[str, ...]
    how_to_save: str
    """What to do there for safetensors."""
    wrote: Callable[[Mapping[str, Any]], bool]
    """Whether a configuration is one of this library's."""
    read: Callable[[Folder, PreTrainedModel], Found]
    write: Callable[[Adapter, Path], Path]
    describe: Callable[[Folder], Described]


def layer_spec(sites: Sites, layers: set[int]) -> str | None:
    """Our spelling of these layers: None where they are all, or where the stacks are too unequal to name them."""
    counts = [len(found) for found in sites.layer_modules.values()]
    if layers >= set(range(max(counts))) or max(layers) >= min(counts):
        return None
    return ",".join(map(str, sorted(layers)))


def acting(adapter: Adapter) -> Acting:
    """The adapter in its inference form, without heads."""
    from trimtab.adapter import folded_method
    from trimtab.contract import folded

    entry: Any = adapter._entry
    parts = {site: folded(entry.parts[site.key]) for site in entry.sites if not isinstance(site, HeadSite)}
    return Acting(folded_method(entry), adapter.model, parts)


def head_parts(adapter: Adapter) -> list[tuple[HeadSite, nn.Module]]:
    """The adapter's own heads: where they are, and the trained copies."""
    entry: Any = adapter._entry
    return [(site, entry.parts[site.key].copy) for site in entry.sites if isinstance(site, HeadSite)]


def only_method(method: Any, library: str) -> Any:
    """The method beside a trained head. Raises UserError for other unions."""
    members = list(getattr(method, "methods", (method,)))
    rest = [one for one in members if one.name != "head"]
    if len(rest) > 1:
        raise UserError(f"{library} has no adapter of several methods; this one is {method.name}")
    return rest[0] if rest else method


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a configuration that say something."""
    return {key: value for key, value in config.items() if value not in (None, False, "", [], {})}


def plain(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors as a file takes them: on the CPU, contiguous, each with memory of its own."""
    return {key: tensor.detach().to("cpu").contiguous().clone() for key, tensor in tensors.items()}


def shortest_names(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """The last parts of these modules' names, where they name these modules and no others; else the whole names."""
    wanted, names = set(paths), {path.rpartition(".")[2] for path in paths}
    matched = {path for path, _ in model.named_modules() if path.rpartition(".")[2] in names}
    own = {path for path in matched if not path.startswith("trimtab.")}
    return sorted(names if own == wanted else wanted)

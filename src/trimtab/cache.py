"""The trunk cache: what frozen layers below the lowest trained one give is computed once and replayed. Knows layers and
the model's inputs; refuses to know methods, tasks and training loops.

Below the lowest trained layer (in all layers, where a network stands beside them) a row's hidden states depend on its
own tokens alone: the base is frozen, its dropout is 0, and neither the padding nor the other rows of its batch reach
them. So they are kept from the first forward that computes them (there is no filling pass of its own) and every later
forward of the same row, in the next epoch or the next evaluation, begins at that layer: same loss, same gradients. Of
layers that a network beside them reads each one's output is kept. A row is known by a digest of its tokens, so the
text, its template, the tokenizer and the length it was cut to are all part of the key.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.adapter import Adapter
from trimtab.attention import packing_at
from trimtab.contract import members
from trimtab.hooks import named_arguments
from trimtab.packing import Packing
from trimtab.sites import EmbedsSite, HeadSite, KVSite, Module, StatesSite
from trimtab.store import Store

_ALONE = frozenset({"input_ids", "attention_mask", "token_type_ids", "pixel_values", "position_ids"})
"""Arguments of a stack that its rows are keyed by; a forward with others is not replayed."""
_HARMLESS = frozenset(
    {"use_cache", "return_dict", "output_hidden_states", "output_attentions", "labels", "cache_position"}
)
_ASKING = ("use_cache", "output_hidden_states", "output_attentions")
"""Arguments that ask, when true, for what replayed layers do not leave behind."""


def trunk_height(adapter: Adapter) -> int:
    """How many layers lie below everything that the adapter trains or moves; 0 where nothing can be replayed.

    Models of two stacks have 0: what their decoder reads is no state of its own row alone.
    """
    attachments: Any = adapter.model.trimtab
    entry: Any = attachments.entries[adapter.name]
    stacks = attachments.sites.layer_modules
    if getattr(entry.method, "whole_model", False) or len(stacks) != 1 or len(attachments.sites.embeds) != 1:
        return 0
    (layers,) = stacks.values()
    claimed = [site.layer for site in entry.sites if not isinstance(site, HeadSite)]
    return max(0, min([*claimed, len(layers)]))


def looks(adapter: Adapter) -> bool:
    """Whether the adapter looks at pictures through a frozen encoder."""
    entry: Any = adapter.model.trimtab.entries[adapter.name]  # type: ignore[union-attr, index]
    return bool(entry.eyes())


@contextmanager
def cached_pictures(adapter: Adapter, store: Store) -> Iterator[None]:
    """Inside, what the adapter's frozen encoder sees in a picture is kept, and computed once (sight.py)."""
    entry: Any = adapter.model.trimtab.entries[adapter.name]  # type: ignore[union-attr, index]
    before = [(eye.sight, eye.sight.store) for eye in entry.eyes()]
    for sight, _ in before:
        sight.store = store
    try:
        yield
    finally:
        for sight, kept in before:
            sight.store = kept
        store.commit()


def kept_layers(adapter: Adapter) -> tuple[int, ...]:
    """The layers whose outputs are kept: the last one below everything, and those that a part reads."""
    attachments: Any = adapter.model.trimtab
    entry: Any = attachments.entries[adapter.name]
    read = {at for part in entry.members() for at in getattr(part, "taps", ())}
    height = trunk_height(adapter)
    return tuple(sorted(read | {height - 1})) if height else ()


def trunk_facts(adapter: Adapter, fingerprint: str) -> dict[str, Any]:
    """What states depend on besides a row's tokens: a store made from other facts is not to be used."""
    return {
        "format": 3,
        "base": fingerprint,
        "config": _config_digest(adapter.model.config),
        "dtype": str(adapter.model.dtype),
        "attention": sorted({name for _, name in adapter.model.trimtab.attention.own()}),  # type: ignore[union-attr, operator]
        "layers": list(kept_layers(adapter)),
    }


@contextmanager
def cached_trunk(adapter: Adapter, store: Store) -> Iterator[None]:
    """Inside, forwards of rows that were run before begin at the adapter's lowest trained layer.

    The layers below are in the model's list under a replaying one each, and back in their places afterwards. Forwards
    that are no plain reading of rows (generation with a cache, inputs given as embeddings, positions of the caller's)
    run as always. Where the trunk has no height, nothing happens.
    """
    attachments: Any = adapter.model.trimtab
    height = trunk_height(adapter)
    if not height or store.full or attachments.replaying:
        yield
        return
    (site,) = attachments.sites.embeds
    trunk = Trunk(attachments, site, store, adapter.name, kept_layers(adapter))
    layers = _module_list(site.body, site.layers[0])
    attachments.replaying = True
    handles = [
        site.body.register_forward_pre_hook(trunk.begin, with_kwargs=True, prepend=True),
        site.body.register_forward_hook(trunk.end, always_call=True),
    ]
    for at in trunk.kept:
        handles.append(site.layers[at].register_forward_hook(Keep(trunk, at), prepend=True))
    for at in range(height):
        layers[at] = Replay(site.layers[at], trunk, at)
    try:
        yield
    finally:
        attachments.replaying = False
        for at in range(height):
            layers[at] = site.layers[at]
        for handle in handles:
            handle.remove()
        store.commit()


Place = tuple[str, int]
"""A row's key, and how many tokens stand in front of what is kept of it."""


class Frame:
    """One forward of the stack: its rows, and whether they are replayed."""

    def __init__(self, places: list[Place], sizes: list[int], mask: Tensor | None):
        self.places, self.sizes, self.mask = places, sizes, mask
        """Each row's place and number of states, which stand one row after the other where `mask` is true."""
        self.index = None if mask is None or mask.all() else mask.flatten().nonzero().squeeze(1)
        """Where they stand among all positions; None where they are all."""
        self.known: list[Tensor] | None = None
        """Each row's states of all kept layers, side by side [n, layers · width], where they are known."""
        self.made: list[Tensor] = []
        """What the kept layers gave in this forward, all rows one after the other [N, width], where they are not."""

    def padded(self, number: int, like: Tensor) -> Tensor:
        """The known states of the kept layer `number` as [B, n, width], 0 where there is padding."""
        assert self.known is not None
        width = like.shape[-1]
        states = torch.cat([row[:, number * width : (number + 1) * width] for row in self.known]).to(like)
        if self.index is None:
            return states.reshape(like.shape)
        return torch.zeros_like(like).flatten(0, 1).index_copy_(0, self.index.to(like.device), states).view(like.shape)

    def note(self, states: Tensor) -> None:
        """What the next kept layer gave [B, n, width]."""
        self.made.append(states.flatten(0, 1) if self.mask is None else states[self.mask])

    def rows(self) -> Iterator[tuple[Place, Tensor]]:
        """Each row's place and what the kept layers gave it, side by side [n, layers · width]."""
        layers = [own.split(self.sizes or own.shape[0] // len(self.places)) for own in self.made]
        for place, *row in zip(self.places, *layers, strict=True):
            yield place, torch.cat(row, dim=-1)


class Trunk:
    """The replayed layers of one stack, and the forwards of it that are going on."""

    def __init__(self, attachments: Any, site: EmbedsSite, store: Store, name: str, kept: tuple[int, ...]):
        self.attachments, self.site, self.store, self.name, self.kept = attachments, site, store, name, kept
        self.read = any(isinstance(one, StatesSite) for one in attachments.entries[name].sites)
        """Whether hooks on the layers read what they are given and give."""
        self.frames: list[Frame | None] = []
        self.tuples: bool | None = None
        """Whether the layers give tuples, as the first forward shows."""

    @property
    def frame(self) -> Frame | None:
        """That of the present forward, where it can be replayed."""
        return self.frames[-1] if self.frames else None

    def begin(self, body: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the rows of a forward of the stack, and look them up."""
        frame = self._frame(named_arguments(body, args, kwargs))
        if frame is not None and self.tuples is not None and self._skipped():
            known = [self.store.get(*place) for place in frame.places]
            if all(one is not None for one in known):
                frame.known = known  # type: ignore[assignment]
        self.frames.append(frame)

    def _skipped(self) -> bool:
        """Whether nothing needs the replayed layers' attentions: rows that are run need what shared tokens leave there.

        Shared tokens are run inside the forward of the rows.
        """
        return not self.frames or (self.frame is not None and self.frame.known is not None)

    def end(self, body: Module, args: tuple[Any, ...], output: Any) -> None:
        """The forward is over."""
        self.frames.pop()

    def keep(self, at: int, states: Tensor) -> None:
        """Keep the states [B, n, width] that a layer gave."""
        frame = self.frame
        if frame is None or frame.known is not None:
            return
        frame.note(states)
        if at == self.kept[-1]:
            for place, own in frame.rows():
                self.store.put(*place, own)
            frame.made.clear()

    def replayed(self, at: int, like: Tensor) -> Tensor | None:
        """What a layer gave the rows of the present forward [B, n, width]; nothing of use where no one reads it.

        None where it has to be run.
        """
        frame = self.frame
        if frame is None or frame.known is None:
            return None
        return frame.padded(self.kept.index(at), like) if at in self.kept else like

    def _frame(self, given: dict[str, Any]) -> Frame | None:
        if any(given.get(name) is True for name in _ASKING) or self.attachments.active not in (None, self.name):
            return None
        packing = packing_at(self.site.attentions[0]) if self.site.attentions else None
        if packing is not None:
            return self._packed(packing)
        given = {name: value for name, value in given.items() if value is not None and name not in _HARMLESS}
        inner = any(switch.inner for switch in self.attachments.switches)
        shared: Tensor | None = None if inner else self.attachments.shared
        mask = given.get("attention_mask")
        own_places = "position_ids" in given and not inner and shared is None
        if not given.keys() <= _ALONE or own_places or (mask is not None and mask.dim() != 2):
            return None
        if "pixel_values" in given:
            moved = self._circumstances()
            return Frame([(_digest(row) + moved, 0) for row in given["pixel_values"]], [], None)
        if "input_ids" not in given:
            return None
        ids = given["input_ids"]
        visible = torch.ones_like(ids).bool() if mask is None else mask.bool()
        before = [] if shared is None else shared.flatten().tolist()
        return Frame(self._places(before, ids, visible, given.get("token_type_ids")), visible.sum(1).tolist(), visible)

    def _packed(self, packing: Packing) -> Frame:
        """What all rows begin with, and then the rows, in one long row."""
        shared = packing.shared.flatten().tolist()
        places = self._places(shared, packing.ids, packing.visible, None)
        sizes, mask = packing.visible.sum(1).tolist(), packing.visible.reshape(1, -1)
        if shared:
            seen = torch.ones_like(packing.shared).bool()
            places = self._places([], packing.shared, seen, None) + places
            sizes, mask = [len(shared), *sizes], torch.cat([seen.to(mask.device), mask], dim=1)
        return Frame(places, sizes, mask)

    def _places(self, before: list[int], ids: Tensor, visible: Tensor, types: Tensor | None) -> list[Place]:
        """The rows' places: digests of the tokens [B, n] that are visible, behind those before them."""
        moved = self._circumstances()
        return [
            (
                _digest(
                    torch.tensor([*before, *row[seen].tolist()]),
                    None if types is None else types.expand_as(ids)[at][seen],
                )
                + moved,
                len(before),
            )
            for at, (row, seen) in enumerate(zip(ids.cpu(), visible.cpu(), strict=True))
        ]

    def _circumstances(self) -> str:
        """What else a row's states depend on: how far the adapter moves its positions, and autocast."""
        device = self.site.embedding.weight.device.type if self.site.embedding is not None else "cpu"
        cast = f"~{torch.get_autocast_dtype(device)}" if torch.is_autocast_enabled(device) else ""
        return self._moved() + cast

    def _moved(self) -> str:
        """How far the acting adapter moves the positions of the text."""
        active, kv = self.attachments.active, self.attachments.sites.kv
        if active is None or not any(site.shift for site in kv):
            return ""
        entry: Any = self.attachments.entries[active]
        prefixes = [part for site in entry.sites if isinstance(site, KVSite) for part in members(entry.parts[site.key])]
        moved = max((getattr(part, "shift", 0) for part in prefixes), default=0)
        return f"+{moved}" if moved else ""


class Replay(nn.Module):
    """A frozen layer, or in its place the states that it gave the same rows."""

    def __init__(self, layer: nn.Module, trunk: Trunk, at: int):
        super().__init__()
        for own in ("_parameters", "_buffers", "_modules"):
            setattr(self, own, getattr(layer, own))  # the model's tensors keep their names
        self.hidden, self.at = (layer, trunk), at  # in a tuple: they are no sub-modules of this one
        if hasattr(layer, "attention_type"):
            self.attention_type = layer.attention_type  # some models choose a layer's mask by it

    def train(self, mode: bool = True) -> Replay:
        """Also the layer itself, which is no sub-module."""
        self.hidden[0].training = mode
        return super().train(mode)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """[B, n, width] -> [B, n, width], in the form that the layer gives it"""
        layer, trunk = self.hidden
        states = trunk.replayed(self.at, hidden_states)
        if states is not None:
            found = (states,) if trunk.tuples else states
            return _read(layer, found, hidden_states, *args, **kwargs) if trunk.read else found
        with nullcontext() if trunk.read else torch.no_grad():  # what reads it has it run without gradients
            output = layer(hidden_states, *args, **kwargs)
        trunk.tuples = isinstance(output, tuple)
        return output


class Keep:
    """The hook behind a kept layer, before anything else changes its output."""

    def __init__(self, trunk: Trunk, at: int):
        self.trunk, self.at = trunk, at

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.trunk.keep(self.at, output[0] if isinstance(output, tuple) else output)


def _read(layer: Module, found: Any, *args: Any, **kwargs: Any) -> Any:
    """What a layer is known to give, with its hooks as in a call."""
    own = vars(layer).get("forward")
    layer.forward = functools.wraps(layer.forward)(lambda *args, **kwargs: found)  # hooks ask for its arguments' names
    try:
        return layer(*args, **kwargs)
    finally:
        del layer.forward
        if own is not None:
            layer.forward = own


def _module_list(body: nn.Module, first: nn.Module) -> nn.ModuleList:
    """The list of layers that begins with this one."""
    return next(
        module for module in body.modules() if isinstance(module, nn.ModuleList) and len(module) and module[0] is first
    )


def _digest(row: Tensor, types: Tensor | None = None) -> str:
    """Sixteen bytes of BLAKE2 over a row's own inputs."""
    made = hashlib.blake2b(row.detach().cpu().contiguous().numpy().tobytes(), digest_size=16)
    if types is not None:
        made.update(types.detach().cpu().contiguous().numpy().tobytes())
    return made.hexdigest()


_NAMES = ("_name_or_path", "transformers_version", "architectures", "id2label", "label2id", "dtype", "use_cache")
"""What a configuration says that changes no state."""


def _config_digest(config: Any) -> str:
    """Of what a configuration says about how states are computed."""
    said = {name: value for name, value in config.to_dict().items() if name not in _NAMES}
    return hashlib.blake2b(json.dumps(said, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()

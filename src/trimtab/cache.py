"""The trunk cache: what frozen layers below the lowest trained one give is computed once and replayed. Knows layers and
the model's inputs; refuses to know methods, tasks and training loops.

Below the lowest trained layer a row's hidden states depend on its own tokens alone: the base is frozen, its dropout is
0, and neither the padding nor the other rows of its batch reach them. So they are kept from the first forward that
computes them (there is no filling pass of its own) and every later forward of the same row, in the next epoch or the
next evaluation, begins at that layer: same loss, same gradients. A row is known by a digest of its tokens, so the text,
its template, the tokenizer and the length it was cut to are all part of the key.

A side network trains above all layers and reads some of their outputs. Then those are kept, side by side, and a later
forward runs no layer of the base at all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.adapter import Adapter
from trimtab.hooks import named_arguments
from trimtab.sites import EmbedsSite, HeadSite, Module
from trimtab.states import Reader, ReaderHandle, states_of
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


def tapped_layers(adapter: Adapter) -> list[int]:
    """The layers whose outputs are kept: the trunk's last one, and those that the adapter reads."""
    attachments: Any = adapter.model.trimtab
    entry: Any = attachments.entries[adapter.name]
    read = {at for part in entry.members() for at in getattr(part, "taps", ())}
    return sorted(read | {trunk_height(adapter) - 1})


def trunk_facts(adapter: Adapter, fingerprint: str) -> dict[str, Any]:
    """What states depend on besides a row's tokens: a store made from other facts is not to be used."""
    return {
        "format": 3,
        "base": fingerprint,
        "config": _config_digest(adapter.model.config),
        "dtype": str(adapter.model.dtype),
        "layers": tapped_layers(adapter),
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
    trunk = Trunk(attachments, site, store, adapter.name, tapped_layers(adapter))
    layers = _module_list(site.body, site.layers[0])
    attachments.replaying = True
    handles = [
        site.body.register_forward_pre_hook(trunk.begin, with_kwargs=True, prepend=True),
        site.body.register_forward_hook(trunk.end, always_call=True),
    ]
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


class Frame:
    """One forward of the stack: its rows, and whether they are replayed."""

    def __init__(self, keys: list[str], start: int, mask: Tensor | None):
        self.keys, self.start, self.mask = keys, start, mask
        self.known: list[Tensor] | None = None
        """Each row's kept states [n, taps · width], of all kept layers side by side."""
        self.run: list[Tensor] = []
        """What the kept layers gave [B, n, width] in a forward that runs them."""

    def padded(self, like: Tensor, number: int) -> Tensor:
        """The known states of the kept layer `number` as [B, n, width], 0 where there is padding."""
        assert self.known is not None
        width = like.shape[-1]
        states = torch.cat([row[:, number * width : (number + 1) * width] for row in self.known]).to(like)
        if self.mask is None:
            return states.view(like.shape)
        return torch.zeros_like(like).masked_scatter_(self.mask[..., None], states)


class Trunk:
    """The replayed layers of one stack, and the forwards of it that are going on."""

    def __init__(self, attachments: Any, site: EmbedsSite, store: Store, name: str, taps: list[int]):
        self.attachments, self.site, self.store, self.name = attachments, site, store, name
        self.taps = taps
        """The layers whose outputs are kept; the last one is the trunk's last."""
        handles = attachments.entries[name].handles
        self.reader: Reader | None = next((own.reader for own in handles if isinstance(own, ReaderHandle)), None)
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
            known = [self.store.get(key, frame.start) for key in frame.keys]
            frame.known = None if any(one is None for one in known) else known  # type: ignore[assignment]
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
        """Keep the states [B, n, width] that a layer gave, with those below it, once the trunk's last is there."""
        frame = self.frame
        if frame is None or at not in self.taps:
            return
        frame.run.append(states)
        if at != self.taps[-1]:
            return
        whole = torch.cat(frame.run, dim=-1)
        frame.run.clear()
        for row, key in enumerate(frame.keys):
            own = whole[row] if frame.mask is None else whole[row][frame.mask[row]]
            self.store.put(key, frame.start, own)

    def _frame(self, given: dict[str, Any]) -> Frame | None:
        if any(given.get(name) is True for name in _ASKING) or self.attachments.active not in (None, self.name):
            return None
        given = {name: value for name, value in given.items() if value is not None and name not in _HARMLESS}
        inner = any(switch.inner for switch in self.attachments.switches)
        shared: Tensor | None = None if inner else self.attachments.shared
        mask = given.get("attention_mask")
        own_places = "position_ids" in given and not inner and shared is None
        if not given.keys() <= _ALONE or own_places or (mask is not None and mask.dim() != 2):
            return None
        if "pixel_values" in given:
            return Frame([_digest(row) for row in given["pixel_values"]], 0, None)
        if "input_ids" not in given:
            return None
        ids = given["input_ids"]
        visible = torch.ones_like(ids).bool() if mask is None else mask.bool()
        before = [] if shared is None else shared.flatten().tolist()
        types, moved = given.get("token_type_ids"), self._moved()
        keys = [
            _digest(
                torch.tensor([*before, *row[seen].tolist()]),
                None if types is None else types.expand_as(ids)[at][seen],
            )
            + moved
            for at, (row, seen) in enumerate(zip(ids.cpu(), visible.cpu(), strict=True))
        ]
        return Frame(keys, len(before), visible)

    def _moved(self) -> str:
        """How far the acting adapter moves the positions of the text, which its rows' states depend on."""
        active, kv = self.attachments.active, self.attachments.sites.kv
        if active is None or not any(site.shift for site in kv):
            return ""
        entry: Any = self.attachments.entries[active]
        moved = max((getattr(part, "shift", 0) for part in entry.members()), default=0)
        return f"+{moved}" if moved else ""


class Replay(nn.Module):
    """A frozen layer, or in its place the states that it gave the same rows, where they are kept."""

    def __init__(self, layer: nn.Module, trunk: Trunk, at: int):
        super().__init__()
        for own in ("_parameters", "_buffers", "_modules"):
            setattr(self, own, getattr(layer, own))  # the model's tensors keep their names
        self.hidden, self.at = (layer, trunk), at  # in a tuple: they are no sub-modules of this one
        if hasattr(layer, "attention_type"):
            self.attention_type = layer.attention_type  # some models choose a layer's mask by it

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """[B, n, width] -> [B, n, width], in the form that the layer gives it"""
        _, trunk = self.hidden
        frame = trunk.frame
        if frame is not None and frame.known is not None:
            return self._replayed(frame, (hidden_states, *args), kwargs)
        return self._run((hidden_states, *args), kwargs)

    def _replayed(self, frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What is kept of the layer, else its input, which nobody reads; a reader hears of it as of a real call."""
        layer, trunk = self.hidden
        kept = self.at in trunk.taps
        states = frame.padded(args[0], trunk.taps.index(self.at)) if kept else args[0]
        output = (states,) if trunk.tuples else states
        if trunk.reader is None:
            return output
        trunk.reader.enter(layer, args, kwargs)
        trunk.reader.leave(layer, args, kwargs, output)
        replaced = trunk.reader.replace(layer, args, output) if trunk.reader.site.end is layer else None
        return output if replaced is None else replaced

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer, trunk = self.hidden
        reading = None if trunk.reader is None else trunk.reader.reading
        with nullcontext() if reading else torch.no_grad():  # a side network may begin at a layer's output
            output = layer(*args, **kwargs)
        trunk.tuples = isinstance(output, tuple)
        trunk.keep(self.at, states_of(output) if reading is None else reading.states[-1])
        return output


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

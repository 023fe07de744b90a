"""Virtual tokens in front of a stack's input: the installer of `embeds` sites. Knows no method.

Three ways to the front, chosen by the family (arch.Stack.insert):

- shared: in a causal model the virtual tokens do not depend on the text, so they are run through the base once a
  forward, and every row attends to their keys and values. Same result as concatenation, at 1/batch of its cost. Where
  the rows are packed (packing.py) they are the beginning of the one row.
- tokens: their embeddings are put in front of the text's and cut off again after the last layer (bidirectional models,
  and causal ones outside the attention interface); a decoder that reads an encoder attends to them. A part with
  `behind` = n has them stand behind the text's first n tokens; one with `at` = "states" has them stand in front of what
  the encoder makes of the embeddings with positions and norm.
- states: put in front of the first layer's input, for stacks that read pictures or sound.

And one inside: a template's pseudo tokens, ids from the part's `first` on, take the virtual tokens' embeddings.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from trimtab.attention import VIRTUAL, Recorded, install_kv, packing_at, recording
from trimtab.errors import UserError
from trimtab.hooks import Switch, named_arguments
from trimtab.positions import padded_positions, positions, seen
from trimtab.sites import EmbedsSite, Module


def install_embeds(site: EmbedsSite, part: nn.Module, switch: Switch) -> list[Any]:
    """Hooks the part's virtual tokens [P, width] to the front of the site's stack, or to their places in its input."""
    if not stands_in_front(part):
        return [site.body.register_forward_pre_hook(PlacedTokens(site, part, switch), with_kwargs=True)]
    if site.insert == "shared":
        return _install_shared(site, part, switch)
    if getattr(part, "at", "words") == "states":
        return _install_behind_embeddings(site, part, switch)
    if site.insert == "tokens":
        return _install_tokens(site, part, switch)
    return _install_states(site, part, switch)


def _install_shared(site: EmbedsSite, part: nn.Module, switch: Switch) -> list[Any]:
    shared = SharedTokens(site, part, switch)
    handles = [site.body.register_forward_pre_hook(shared, with_kwargs=True)]
    for attention in site.attentions:
        handles += install_kv(attention, RecordedPrefix(shared, attention.layer - len(site.layers)), switch, VIRTUAL)
    return handles


def _install_tokens(site: EmbedsSite, part: nn.Module, switch: Switch) -> list[Any]:
    front = FrontTokens(site, part, switch)
    handles: list[Any] = [site.body.register_forward_pre_hook(front, with_kwargs=True)]
    return handles + _install_end(site, front)


def _install_behind_embeddings(site: EmbedsSite, part: nn.Module, switch: Switch) -> list[Any]:
    front = FrontOfStates(part, switch)
    handles: list[Any] = [site.body.register_forward_pre_hook(front.widen, with_kwargs=True)]
    handles.append(site.states.register_forward_hook(front))
    return handles + _install_end(site, front)


def _install_states(site: EmbedsSite, part: nn.Module, switch: Switch) -> list[Any]:
    front = FrontStates(part, switch)
    handles: list[Any] = [site.layers[0].register_forward_pre_hook(front, with_kwargs=True)]
    return handles + _install_end(site, front)


def _install_end(site: EmbedsSite, front: Front) -> list[Any]:
    if site.reader is not None:
        return [site.reader.register_forward_pre_hook(ReaderMask(front), with_kwargs=True)]
    return [site.layers[-1].register_forward_hook(CutFront(front))]


def stands_in_front(part: nn.Module) -> bool:
    """Whether a part's virtual tokens stand in front of the input; those with a first id are inside it."""
    return not hasattr(part, "first")


def placed_embeddings(model: Any, ids: torch.Tensor) -> torch.Tensor | None:
    """The input embeddings [B, n, width] of token ids among which the acting adapter has pseudo tokens; None without.

    For what looks ids up in tables of the vocabulary's size, where a pseudo token has no row (penalties in `generate`).
    """
    attachments: Any = getattr(model, "trimtab", None)
    if attachments is None or attachments.active is None:
        return None
    entry = attachments.entries[attachments.active]
    own = [(site, entry.parts[site.key]) for site in entry.sites if isinstance(site, EmbedsSite)]
    placing = [(site, part) for site, part in own if not stands_in_front(part)]
    return _placed(*placing[0], ids) if placing else None


def _placed(site: EmbedsSite, part: Any, ids: torch.Tensor) -> torch.Tensor | None:
    """The embeddings of ids, with the virtual tokens for the ids first, first + 1, …; None where there are none."""
    if not bool((ids >= part.first).any()):
        return None
    tokens = part()
    placed = (ids >= part.first) & (ids < part.first + tokens.shape[0])  # a vocabulary may have unused rows behind
    if not bool(placed.any()):
        return None
    embeds = site.embedding(ids.masked_fill(placed, 0))
    rows = tokens[(ids - part.first)[placed]].to(embeds.dtype)
    return embeds.masked_scatter(placed[..., None], rows)


class PlacedTokens:
    """Gives the token ids first, first + 1, … the virtual tokens' embeddings."""

    def __init__(self, site: EmbedsSite, part: Any, switch: Switch):
        self.site, self.part, self.switch = site, part, switch

    def __call__(self, body: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.switch.on:
            return None
        kwargs = named_arguments(body, args, kwargs)
        ids = kwargs.get("input_ids")
        embeds = None if ids is None else _placed(self.site, self.part, ids)
        if embeds is None:
            return None
        text = dict(kwargs)
        kwargs |= {"input_ids": None, "inputs_embeds": embeds}
        if self.site.positions == "padded" and kwargs.get("position_ids") is None:
            kwargs["position_ids"] = padded_positions(body, text)
        return (), kwargs


class SharedTokens:
    """Runs the virtual tokens through the base once, before the text, and keeps each layer's keys and values."""

    def __init__(self, site: EmbedsSite, part: nn.Module, switch: Switch):
        self.site, self.part, self.switch = site, part, switch
        self.running = False
        self.record: list[Recorded] = []
        self.cache: weakref.ref[Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "record": [], "cache": None}  # a copy of the model records anew

    def __call__(self, body: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.switch.on or self.running:
            return None
        kwargs = named_arguments(body, args, kwargs)
        packing = packing_at(self.site.attentions[0])
        if packing is not None:
            return (), packing.join(self.part(), kwargs, self.site.embedding, self.site.positions == "learned")
        past = kwargs.get("past_key_values")
        if not (self.switch.inner or self._continues(past)):
            self.record = self.switch.once(self, lambda: self._run(body))
            self.cache = None if past is None or torch.is_grad_enabled() else weakref.ref(past)
        if self.site.positions == "learned":
            kwargs["position_ids"] = positions(kwargs) + self.record[0][0].shape[-2]
        return (), kwargs

    def _continues(self, past: Any) -> bool:
        """Whether this call goes on with a generation whose first step made the record."""
        known = None if self.cache is None else self.cache()
        return known is not None and known is past and not torch.is_grad_enabled() and seen(past) > 0

    def _run(self, body: Module) -> list[Recorded]:
        tokens = self.part()
        weight = self.site.embedding.weight
        start = -tokens.shape[0] if self.site.positions == "rotary" else 0
        places = torch.arange(start, start + tokens.shape[0], device=tokens.device)
        self.running = self.switch.inner = True
        try:
            modules = [site.module for site in self.site.attentions]
            with recording(modules, VIRTUAL) as record, without_checkpointing(self.site.layers):
                body(inputs_embeds=tokens[None].to(weight.dtype), position_ids=places[None], use_cache=False)
        finally:
            self.running = self.switch.inner = False
        return record


class Recording(Protocol):
    """What runs tokens by themselves and keeps the keys and values of each layer's attention."""

    record: list[Recorded]


class RecordedPrefix:
    """The keys and values that one attention gave tokens that were run before the text."""

    def __init__(self, shared: Recording, layer: int):
        self.shared, self.layer = shared, layer
        """The layer counts from the top, because layers at the bottom may be left out (cache.py)."""

    def prefix(self) -> Recorded:
        """keys, values [1, kv_heads, P, head_dim]"""
        return self.shared.record[self.layer]


class FrontTokens:
    """Puts the virtual tokens' embeddings in front of the text's."""

    def __init__(self, site: EmbedsSite, part: nn.Module, switch: Switch):
        self.site, self.part, self.switch = site, part, switch
        self.behind: int = getattr(part, "behind", 0)
        self.leads: bool = getattr(part, "leads", False)
        self.length = 0
        """How many virtual tokens there are in the present forward."""

    def __call__(self, body: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.length = 0
        if not self.switch.on:
            return None
        kwargs = named_arguments(body, args, kwargs)
        tokens = self.part()
        kwargs["attention_mask"] = _widen_mask(kwargs.get("attention_mask"), tokens.shape[0])
        past = kwargs.get("past_key_values")
        if past is not None and getattr(past, "is_compileable", False):
            raise UserError(
                "a static cache has no room for virtual tokens in this model; generate with the dynamic cache"
            )
        if past is None or seen(past) == 0:
            self.length = tokens.shape[0]
            self._insert(body, tokens, kwargs)
        elif kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"] + tokens.shape[0]
        return (), kwargs

    def _insert(self, body: Module, tokens: torch.Tensor, kwargs: dict[str, Any]) -> None:
        text = dict(kwargs)
        ids, embeds = kwargs.pop("input_ids", None), kwargs.get("inputs_embeds")
        if embeds is None:
            embeds = self.site.embedding(ids)
        batch, length = embeds.shape[0], tokens.shape[0]
        _check_unpadded(kwargs["attention_mask"], slice(length, length + self.behind))
        virtual = tokens.to(embeds.dtype).expand(batch, -1, -1)
        kwargs["inputs_embeds"] = torch.cat([embeds[:, : self.behind], virtual, embeds[:, self.behind :]], dim=1)
        if kwargs.get("token_type_ids") is not None:
            kwargs["token_type_ids"] = nn.functional.pad(kwargs["token_type_ids"], (length, 0))
        if kwargs.get("position_ids") is not None:
            front = torch.arange(length, device=embeds.device).expand(batch, -1)
            kwargs["position_ids"] = torch.cat([front, kwargs["position_ids"].expand(batch, -1) + length], dim=1)
        elif self.site.positions == "padded":
            kwargs["position_ids"] = padded_positions(body, text, front=length)


class FrontStates:
    """Puts the virtual tokens in front of the first layer's input."""

    behind = 0

    def __init__(self, part: nn.Module, switch: Switch):
        self.part, self.switch = part, switch
        self.leads: bool = getattr(part, "leads", False)
        self.length = 0

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.length = 0
        if not self.switch.on:
            return None
        tokens, states = self.part(), args[0]
        self.length = tokens.shape[0]
        return (torch.cat([tokens.to(states.dtype).expand(states.shape[0], -1, -1), states], dim=1), *args[1:]), kwargs


class FrontOfStates:
    """Puts the virtual tokens in front of what the encoder makes of the embeddings, and widens the padding mask."""

    behind = 0

    def __init__(self, part: nn.Module, switch: Switch):
        self.part, self.switch = part, switch
        self.leads: bool = getattr(part, "leads", False)
        self.length = 0

    def widen(self, body: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make the mask [B, n] one of [B, P + n]."""
        self.length = 0
        if not self.switch.on:
            return None
        kwargs = named_arguments(body, args, kwargs)
        self.length = self.part().shape[0]
        return (), {**kwargs, "attention_mask": _widen_mask(kwargs.get("attention_mask"), self.length)}

    def __call__(self, embeddings: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> Any:
        """[B, n, width] -> [B, P + n, width]"""
        if self.length == 0:
            return None
        return torch.cat([self.part().to(output.dtype).expand(output.shape[0], -1, -1), output], dim=1)


Front = FrontTokens | FrontStates | FrontOfStates


class CutFront:
    """Takes the virtual positions off the last layer's output, before any norm, pooler, head or loss."""

    def __init__(self, front: Front):
        self.front = front

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        length = self.front.length
        if length == 0:
            return None
        if isinstance(output, tuple):
            return (self._cut(output[0]), *output[1:])
        return self._cut(output)

    def _cut(self, states: torch.Tensor) -> torch.Tensor:
        """[B, P + n, width] -> [B, n, width]"""
        if self.front.leads:  # the first virtual token's state in place of the text's first
            return _without(states, 1, self.front.length)
        return _without(states, self.front.behind, self.front.length)


class ReaderMask:
    """Shows an encoder's virtual positions to the decoder that reads it."""

    def __init__(self, front: Front):
        self.front = front

    def __call__(self, reader: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kwargs = named_arguments(reader, args, kwargs)
        mask, states = kwargs.get("encoder_attention_mask"), kwargs.get("encoder_hidden_states")
        if not self.front.switch.on or mask is None or states is None or mask.shape[-1] == states.shape[1]:
            return None
        return (), {**kwargs, "encoder_attention_mask": _widen_mask(mask, states.shape[1] - mask.shape[-1])}


def _without(states: torch.Tensor, start: int, length: int) -> torch.Tensor:
    """[B, n, width] without the `length` positions from `start` on."""
    rest = states[:, start + length :]
    return torch.cat([states[:, :start], rest], dim=1) if start else rest


def _check_unpadded(mask: torch.Tensor | None, columns: slice) -> None:
    """Raises UserError where padding stands in these columns of the mask [B, P + n]."""
    if mask is not None and not mask[:, columns].all():
        raise UserError("these virtual tokens stand behind the text's first ones; pad on the right")


def _widen_mask(mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """[B, n] -> [B, length + n], the new columns visible. Raises UserError for a 4-D mask."""
    if mask is None:
        return None
    if mask.dim() != 2:
        raise UserError("virtual tokens cannot be put in front of a ready-made 4-D mask; pass the 2-D padding mask")
    return nn.functional.pad(mask, (length, 0), value=1)


@contextmanager
def without_checkpointing(layers: tuple[nn.Module, ...]) -> Iterator[None]:
    """Inside, the layers run without gradient checkpointing, which would record keys and values a second time."""
    training = [layer.training for layer in layers]
    for layer in layers:
        layer.training = False  # the flag of the layer alone; dropout inside is 0 as it is
    try:
        yield
    finally:
        for layer, flag in zip(layers, training, strict=True):
            layer.training = flag

"""Reading every layer's hidden states while a stack runs frozen: the installer of `states` sites. Knows layers' inputs
and outputs; refuses to know methods and what is made of the states.

While an adapter reads, the stack's layers run without gradients and in eval mode, so that no activation of theirs is
kept for a backward pass. What the part makes of the states then leaves the stack in place of the stack's own output,
behind the final norm where there is one. An encoder that a decoder attends to goes on giving its own output; what the
part makes of its states travels behind it, in the same tensor, so that beam search and cached generation take it along.
"""

from __future__ import annotations

import inspect
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from trimtab.errors import UserError
from trimtab.hooks import Switch, named_arguments
from trimtab.side_cache import make_room
from trimtab.sites import Module, StatesSite


@dataclass
class Reading:
    """One forward of a stack."""

    training: list[bool]
    """The layers' modes before it."""
    graded: bool
    """Whether gradients were on when the present layer was called."""
    memory: Tensor | None = None
    """What the part of the encoder made of its states [B, m, …], for a decoder; else None."""
    given: dict[str, Any] = field(default_factory=dict)
    """The arguments of the stack's call, by name."""
    cache: Cache | None = None
    """The cache that its layers were called with."""
    mask: Tensor | None = None
    """Which tokens are no padding [B, n], where the stack was told so."""
    first: Tensor | None = None
    """The first layer's input [B, n, width], once it is known."""
    taps: dict[int, Tensor] = field(default_factory=dict)
    """The outputs [B, n, width] of the layers that the part reads."""
    calls: list[dict[str, Any]] = field(default_factory=list)
    """The arguments of each layer's call but the hidden states, by name."""


class Reader:
    """The hooks of one part on one stack."""

    def __init__(self, site: StatesSite, part: Any, switch: Switch):
        self.site, self.part, self.switch = site, part, switch
        self.readings: list[Reading | None] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "readings": []}

    @property
    def reading(self) -> Reading | None:
        """That of the present forward; None while the adapter does not act."""
        return self.readings[-1] if self.readings else None

    def begin(self, body: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A forward of the stack begins: its layers are in eval mode until it ends."""
        self._recover()
        self.readings.append(None)
        if not self.switch.on:
            return None
        named = named_arguments(body, args, kwargs)
        reading = Reading([layer.training for layer in self.site.layers], torch.is_grad_enabled(), given=named)
        mask = named.get("attention_mask")
        reading.mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        if self.part.reads_encoder and named.get("encoder_hidden_states") is not None:
            named["encoder_hidden_states"], reading.memory = self._parted(named["encoder_hidden_states"])
        self.readings[-1] = reading
        for layer in self.site.layers:
            layer.training = False  # the flag of the layer alone; dropout inside is 0 as it is
        return (), named

    def _recover(self) -> None:
        """Undo what a forward left that was interrupted by hand, for which torch calls no hooks."""
        left = [reading for reading in self.readings if reading is not None]
        self.readings.clear()
        if left:
            torch.set_grad_enabled(left[0].graded)
            self._restore(left[0])

    def _restore(self, reading: Reading) -> None:
        for layer, training in zip(self.site.layers, reading.training, strict=True):
            layer.training = training

    def _parted(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's own output and what travels behind it."""
        width = self.site.width
        if states.shape[-1] <= width:
            raise UserError(
                "this encoder output was made without the adapter that acts now; run the encoder with it as well"
            )
        return states[..., :width].detach(), states[..., width:]

    def enter(self, layer: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A layer is called."""
        reading = self.reading
        if reading is None:
            return
        named = named_arguments(layer, args, kwargs)
        states = named.pop(next(iter(inspect.signature(layer.forward).parameters)))
        if reading.first is None:
            reading.first = states.detach()
            reading.cache = next((value for value in named.values() if isinstance(value, Cache)), None)
            if reading.cache is not None:
                keeps = getattr(self.part, "keeps", None)
                make_room(reading.cache, len(self.site.layers), self.part.layers, keeps)
        reading.calls.append(named)
        reading.graded = torch.is_grad_enabled()
        torch.set_grad_enabled(False)

    def leave(self, layer: Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A layer has been called, or has failed."""
        reading = self.reading
        if reading is None:
            return
        torch.set_grad_enabled(reading.graded)
        if output is not None and (at := len(reading.calls) - 1) in self.part.taps:
            reading.taps[at] = states_of(output)

    def replace(self, end: Module, args: tuple[Any, ...], output: Any) -> Any:
        """What leaves the stack, in the form in which `end` gives it."""
        reading = self.reading
        if reading is None:
            return None
        own = states_of(output)
        # in a context of its own: what transformers records of the base's layers is to have none of the part's among it
        made = Context().run(self.part, reading, own).to(own.dtype)
        if self.site.reader is not None:
            made = torch.cat([own, made], dim=-1)
        return (made, *output[1:]) if isinstance(output, tuple) else made

    def end(self, body: Module, args: tuple[Any, ...], output: Any) -> None:
        """The forward is over, or has failed."""
        reading = self.readings.pop()
        if reading is not None:
            self._restore(reading)


class ReaderHandle:
    """Takes a reader's hooks away; the trunk cache finds the reader by it."""

    def __init__(self, reader: Reader, handles: list[Any]):
        self.reader, self.handles = reader, handles

    def remove(self) -> None:
        """Remove all of its hooks."""
        for handle in self.handles:
            handle.remove()


def install_states(site: StatesSite, part: nn.Module, switch: Switch) -> list[Any]:
    """Hooks that read the stack's states and let what `part` makes of them leave it."""
    reader = Reader(site, part, switch)
    handles: list[Any] = [site.body.register_forward_pre_hook(reader.begin, with_kwargs=True)]
    for layer in site.layers:
        handles.append(layer.register_forward_pre_hook(reader.enter, with_kwargs=True))
        handles.append(layer.register_forward_hook(reader.leave, with_kwargs=True, always_call=True))
    handles.append(site.end.register_forward_hook(reader.replace))
    handles.append(site.body.register_forward_hook(reader.end, always_call=True))
    return [ReaderHandle(reader, handles)]


def states_of(output: Any) -> Tensor:
    """The hidden states in what a layer gives."""
    return output[0] if isinstance(output, tuple) else output

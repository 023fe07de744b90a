"""Tokens that all rows of a batch begin with, run once: a saving of the trainer and of scoring. Knows causal models'
inputs; refuses to know methods, tasks and training loops.

A chat template or an instruction in front of every row makes the same keys and values in every row, because a causal
model's tokens never see what follows them. So the longest common beginning [1, s] runs once, through the base and
whatever acts on it, and the rest [B, n - s] attends to its keys and values: the same logits, loss and gradients at a
B-th of its cost, in forward and backward. While training it runs in one pass with the rows and with virtual tokens
(packing.py); without gradients by itself, because what it leaves is kept for all batches of an evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimtab.adapter import Attachments
from trimtab.attention import TEXT, Recorded, install_kv, recording
from trimtab.hooks import Switch
from trimtab.packing import Packing
from trimtab.sites import EmbedsSite, Module, StatesSite
from trimtab.virtual import RecordedPrefix, without_checkpointing

_PACKED = ("input_ids", "attention_mask", "labels")
"""Inputs that packed rows may come with."""
LEAST = 32
"""Tokens that sharing must save: a second pass through the layers costs about as much as so many."""


@contextmanager
def shared_prefix(model: PreTrainedModel, inputs: dict[str, Any], needed: Tensor | None) -> Iterator[dict[str, Any]]:
    """Inside, the model takes the inputs that are given and answers for them as for the whole ones.

    `inputs` has input_ids and maybe attention_mask [B, n], padded on the right; `needed` is bool [B, n], true where the
    model's output is wanted (None: at each row's last token that is no padding token). What is given lacks the first s
    tokens of every row, of labels as well, so the outputs lack them too. Where nothing can be shared, `inputs` itself
    is given. The block has to last until after the backward pass if layers are checkpointed. Raises UserError where
    the model is given other inputs inside, while it takes packed ones.
    """
    site = _site(model)
    length = 0 if site is None else common_length(model, inputs, needed)
    attachments: Any = getattr(model, "trimtab", None)
    if site is not None and torch.is_grad_enabled() and _packs(model, inputs, length):
        with _packed(site, attachments, inputs, length) as rest:
            yield rest
        return
    if site is None or not length or _stands_beside(model):
        yield inputs
        return
    switch = Switch()
    shared = SharedText(site, inputs["input_ids"][:1, :length], attachments.switches)
    with attachments.attention.fronting():
        handles: list[Any] = [site.body.register_forward_pre_hook(shared)]
        for attention in site.attentions:
            handles += install_kv(attention, RecordedPrefix(shared, attention.layer - len(site.layers)), switch, TEXT)
        attachments.shared = shared.ids
        try:
            yield _rest(inputs, length)
        finally:
            attachments.shared = None
            for handle in handles:
                handle.remove()


def _packs(model: PreTrainedModel, inputs: dict[str, Any], length: int) -> bool:
    """Whether something stands in front of all rows of a batch that is packed as it should be: padded on the right."""
    config, mask = model.config, inputs.get("attention_mask")
    active = _active(model)
    virtual = active is not None and active.virtual
    others = [name for name, value in inputs.items() if isinstance(value, Tensor) and name not in _PACKED]
    if not (length or virtual) or others or draws(model) or config.output_hidden_states or config.output_attentions:
        return False
    return mask is None or (mask.dim() == 2 and bool((mask[:, 1:] <= mask[:, :-1]).all()))


def _stands_beside(model: PreTrainedModel) -> bool:
    """Whether the acting adapter has attentions of its own, to which nothing is handed from tokens run before."""
    active = _active(model)
    return active is not None and any(isinstance(site, StatesSite) for site in active.sites)


@contextmanager
def _packed(site: EmbedsSite, attachments: Any, inputs: dict[str, Any], length: int) -> Iterator[dict[str, Any]]:
    rest = _rest(inputs, length)
    ids, mask = rest["input_ids"], rest.get("attention_mask")
    packing = Packing(
        inputs["input_ids"][:1, :length], ids, torch.ones_like(ids).bool() if mask is None else mask.bool()
    )
    handles: list[Any] = [
        site.body.register_forward_pre_hook(packing.pack, with_kwargs=True, prepend=True),
        site.body.register_forward_hook(packing.unpack),
    ]
    try:
        with attachments.attention.packing(packing):
            yield rest
    finally:
        for handle in handles:
            handle.remove()


def common_length(model: PreTrainedModel, inputs: dict[str, Any], needed: Tensor | None) -> int:
    """How many tokens all rows begin with, as far as it is worth it and every row keeps what is needed of it."""
    ids, given = inputs["input_ids"], inputs.get("attention_mask")
    if draws(model) or (given is not None and given.dim() != 2):
        return 0
    mask = torch.ones_like(ids).bool() if given is None else given.bool()
    if needed is None:
        needed = _last(ids, mask, getattr(model.config, "pad_token_id", None))
    keep = needed.any(0).int().argmax()  # an output before it is not needed
    same = (ids == ids[:1]).all(0) & mask.all(0)
    length = int(torch.minimum(same.int().cumprod(0).sum(), keep))
    return length if (ids.shape[0] - 1) * length >= LEAST else 0


def _last(ids: Tensor, mask: Tensor, padding: int | None) -> Tensor:
    """Each row's last token that is no padding token, which transformers' heads read: bool [B, n]."""
    real = mask if padding is None else mask & (ids != padding)
    places = torch.arange(ids.shape[1], device=ids.device)
    return places == (places * real).argmax(1)[:, None]


def draws(model: PreTrainedModel) -> bool:
    """Whether what acts on the model draws anew at every call, or reads it whole: a forward has to stay one call."""
    why = ("draws", "whole") if model.training else ("whole",)
    active = _active(model)
    return active is not None and any(getattr(part, reason, False) for part in active.members() for reason in why)


def _active(model: PreTrainedModel) -> Any:
    """The entry of the acting adapter, or None."""
    attachments = getattr(model, "trimtab", None)
    if not isinstance(attachments, Attachments) or attachments.active is None:
        return None
    return attachments.entries[attachments.active]


class SharedText:
    """Runs the tokens that all rows begin with, once a forward, and keeps each layer's keys and values."""

    def __init__(self, site: EmbedsSite, ids: Tensor, switches: Sequence[Switch]):
        self.site, self.ids, self.switches = site, ids, switches
        self.running = False
        self.record: list[Recorded] = []

    def __call__(self, body: Module, args: tuple[Any, ...]) -> None:
        if self.running or any(switch.inner for switch in self.switches):
            return
        kept = self.switches[0].kept if self.switches and not torch.is_grad_enabled() else None
        place = tuple(self.ids[0].tolist())
        if kept is not None and place in kept:
            self.record = kept[place]
            return
        self.record = self._run(body)
        if kept is not None and len(self.record) == len(self.site.attentions):  # fewer where layers are replayed
            kept[place] = self.record

    def _run(self, body: Module) -> list[Recorded]:
        ids = self.ids.to(self.site.embedding.weight.device)
        places = torch.arange(ids.shape[1], device=ids.device)[None]
        modules = [attention.module for attention in self.site.attentions]
        with self._inside(), recording(modules, TEXT) as record, without_checkpointing(self.site.layers):
            body(input_ids=ids, position_ids=places, use_cache=False)
        return record

    @contextmanager
    def _inside(self) -> Iterator[None]:
        self.running = True
        for switch in self.switches:
            switch.inner = True
        try:
            yield
        finally:
            self.running = False
            for switch in self.switches:
                switch.inner = False


def _site(model: nn.Module) -> EmbedsSite | None:
    """The input of a causal model whose keys and values can be shared; None of any other model."""
    attachments = getattr(model, "trimtab", None)
    if not isinstance(attachments, Attachments):
        return None
    found = attachments.sites.embeds
    shared = len(found) == 1 and found[0].insert == "shared" and attachments.attention.possible
    return found[0] if shared else None


def _rest(inputs: dict[str, Any], length: int) -> dict[str, Any]:
    """The inputs without the first tokens of every row."""
    ids = inputs["input_ids"]
    places = torch.arange(length, ids.shape[1], device=ids.device).expand(ids.shape[0], -1)
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    cut = {name: value[:, length:] for name, value in tensors.items() if value.shape == ids.shape}
    return {**inputs, **cut, "position_ids": places}

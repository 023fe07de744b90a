"""A given small model as a side network: it reads what the base reads, in its own way. Knows the call of the base's
stack and the small model's; refuses to know where the small model comes from and how it is fused.

The small model is called as transformers calls it, with its own embeddings, positions, masks and attention, so every
family is exact that can read the base's token ids or pixels. Only three things of the base's call are translated: the
cache, of which it sees the layers behind the base's; packed rows; and masks that `generate` makes ahead.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trimtab.attention import Companion
from trimtab.errors import UserError
from trimtab.positions import positions_from, takes_positions
from trimtab.side_cache import behind
from trimtab.sites import Module, Sites, StatesSite, reads_both_ways
from trimtab.states import Reading

if TYPE_CHECKING:
    from trimtab.small import Small

_OF_PIXELS = ("image_size", "patch_size", "num_channels")
"""What vision models have to agree in, so that both make the same patches."""
_PLACES = ("position_embeddings", "wpe", "embed_positions")
"""What families call their table of learned positions."""


class SideModel(nn.Module):
    """Up S(x), S a small model beside the base; without Up where it is as wide as the base."""

    layers = taps = ()
    reads_encoder = False

    def __init__(self, site: StatesSite, small: Small):
        super().__init__()
        own = small.site
        self.source, self.said = small.source, dict(small.said)
        self.body = small.body
        self.up = None if own.width == site.width else nn.Linear(own.width, site.width)
        self.base = (site,)  # in a tuple: its modules are no sub-modules
        self.reads = frozenset(inspect.signature(self.body.forward).parameters)
        self.causal = _kind(own) == "causal"
        self.whole = self.causal and small.sites.embeds[0].insert != "shared"
        """Whether rows cannot be packed, because the model's attention cannot be taken apart."""
        self.keeps = self.body.config if self.causal else None
        """The configuration by which a cache gets layers for it."""
        self.companion = Companion(self.body.config, [found.module for found in own.attentions], site.attentions[0])
        self.limit = _longest(self.body)

    def forward(self, reading: Reading, own: Tensor) -> Tensor:
        """The call of the base's stack -> [batch, length, width]"""
        self.companion.begin()
        states = self.body(**self._call(reading)).last_hidden_state
        if states.shape[:2] != own.shape[:2]:
            raise UserError(
                f"side: {self.source!r} makes {states.shape[1]} states of what the base makes {own.shape[1]} of"
            )
        return states if self.up is None else self.up(states)

    def _call(self, reading: Reading) -> dict[str, Any]:
        """The small model's arguments."""
        given = reading.given
        if "pixel_values" in self.reads:
            names = ("pixel_values", "interpolate_pos_encoding")
            return {name: given[name] for name in names if name in self.reads and given.get(name) is not None}
        if given.get("input_ids") is None:
            raise UserError(f"side: {self.source!r} reads token ids with its own embeddings; give input_ids")
        call = {"input_ids": given["input_ids"], "attention_mask": self._shown(reading)}
        places = given.get("position_ids")
        if places is None and self.causal and takes_positions(self.body) and call["attention_mask"] is not None:
            places = positions_from(call["attention_mask"], call["input_ids"].shape[1])
        self._check_length(call["input_ids"], places)
        if places is not None and takes_positions(self.body):
            call["position_ids"] = places
        if self._tells_segments():
            call["token_type_ids"] = given.get("token_type_ids")
        if self.causal:
            cache = reading.cache
            call["past_key_values"] = None if cache is None else behind(cache, len(self.base[0].layers))
            call["use_cache"] = cache is not None
        return call

    def _tells_segments(self) -> bool:
        """Whether the small model has an embedding for each type of token that the base has one for."""
        own, base = (getattr(one.config, "type_vocab_size", 0) for one in (self.body, self.base[0].body))
        return "token_type_ids" in self.reads and own >= base > 0

    def _shown(self, reading: Reading) -> Tensor | None:
        """Which tokens are no padding [batch, m], also where `generate` made a mask ahead, as for static caches.

        Of such a causal mask [batch, 1, n, m] the last token's row shows it.
        """
        mask = reading.given.get("attention_mask")
        if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
            return mask
        ahead = reading.cache is not None and reading.cache.is_compileable and self.causal
        if isinstance(mask, Mapping) and ahead and "full_attention" in mask:
            mask = mask["full_attention"]
        elif isinstance(mask, Mapping) or not ahead or getattr(self.base[0].body.config, "sliding_window", None):
            raise UserError(
                f"side: {self.source!r} makes its own masks and needs one that says which tokens are padding, "
                "[batch, length]; with a static cache that is not known of a base with a sliding window"
            )
        if mask is None:
            return None
        last = mask[:, 0, -1]
        return last if last.dtype == torch.bool else last >= 0

    def _check_length(self, ids: Tensor, places: Tensor | None) -> None:
        """Raises UserError for texts that are longer than the small model's learned positions."""
        if self.limit is None:
            return
        length = ids.shape[1] if places is None else int(places.max()) + 1
        if length > self.limit:
            raise UserError(f"side: {self.source!r} reads at most {self.limit} tokens, and a text has {length}")

    @staticmethod
    def count(source: str, width: int) -> int:
        """The parameters of S, and (its width + 1) · width of Up where its width is another."""
        from trimtab.small import small_size

        size, own = small_size(source)
        return size + (0 if own == width else (own + 1) * width)


def check_small(sites: Sites, small: Small) -> None:
    """Raises UserError where a small model cannot stand beside the base: another kind of model, or two stacks."""
    from trimtab.models import KIND_NAMES

    if len(sites.states) != 1:
        raise UserError("side: model= stands beside encoders, decoders and vision models; this is an encoder-decoder")
    base, own = _kind(sites.states[0]), _kind(small.site)
    if base != own:
        raise UserError(
            f"side: {small.source!r} is {KIND_NAMES[own]} and the base {KIND_NAMES[base]}; model= takes one of its kind"
        )


def check_inputs(sites: Sites, small: Small, tokenizer: Any) -> None:
    """Raises UserError where a small model cannot read the base's pixels or token ids.

    Vocabularies are compared token by token where both have a tokenizer, and by their sizes where not.
    """
    if _kind(small.site) == "vision":
        _check_pixels(sites.states[0].body.config, small.body.config, small.source)
        return
    other = None if tokenizer is None else _tokenizer(small.source)
    if other is not None:
        _check_tokens(tokenizer.get_vocab(), other.get_vocab(), small.source)
        return
    base, own = (one.embeds[0].embedding.num_embeddings for one in (sites, small.sites))
    if base != own:
        raise UserError(
            f"side: {small.source!r} has a vocabulary of {own} tokens and the base one of {base}; "
            "model= takes a model with the base's tokenizer"
        )


def _kind(site: StatesSite) -> Any:
    from trimtab.models import usual_kind

    kind = usual_kind(site.body.config.model_type)
    return "encoder" if kind == "causal" and reads_both_ways(site.body) else kind


def _check_pixels(base: Any, own: Any, source: str) -> None:
    for name in _OF_PIXELS:
        if getattr(base, name) != getattr(own, name):
            raise UserError(
                f"side: {source!r} has {name}={getattr(own, name)} and the base {getattr(base, name)}; "
                f"model= takes a model that cuts pictures as the base does"
            )


def _check_tokens(base: Mapping[str, int], own: Mapping[str, int], source: str) -> None:
    others = sum(own.get(token) != at for token, at in base.items())
    if others:
        raise UserError(
            f"side: {source!r} has another vocabulary: {others} of the base's {len(base)} tokens have another id "
            "there or none; model= takes a model with the base's tokenizer"
        )


def _tokenizer(source: str) -> Any:
    """The small model's tokenizer; None where its files have none."""
    from trimtab.models import load_tokenizer

    try:
        return load_tokenizer(source)
    except UserError:  # then the sizes of the vocabularies decide
        return None


def _longest(body: Module) -> int | None:
    """How many learned positions a model has; None of a model without."""
    named = [(name.rpartition(".")[2], module) for name, module in body.named_modules()]
    table = next((one for name, one in named if name in _PLACES and isinstance(one, nn.Embedding)), None)
    if table is None:
        return None
    first = getattr(table, "offset", 0) if table.padding_idx is None else table.padding_idx + 1
    return int(table.num_embeddings - first)

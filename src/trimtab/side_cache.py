"""Keys and values of a side network's layers, kept in the base's own cache behind those of its layers. Knows
transformers' caches; refuses to know models.

So they are reordered, cropped, repeated and reset together with the base's. A cache whose layers are made from a
configuration has no room behind them: it gets layers there of the kinds that the side network's layers stand beside.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from transformers import Cache, EncoderDecoderCache

from trimtab.errors import UserError


def make_room(cache: Cache, own: int, beside: Sequence[int]) -> None:
    """Give a cache, before its `own` layers are called, a layer like each of those at `beside`.

    Raises UserError for a cache that was filled by the base without the side network.
    """
    for one in _parts(cache):
        _extend(one, own, beside)
    known = cache.get_seq_length()
    if beside and int(known) != int(cache.get_seq_length(own)):
        raise UserError(
            "these keys and values were cached without the adapter that acts now; begin with an empty cache"
        )


def _parts(cache: Cache) -> tuple[Cache, ...]:
    if isinstance(cache, EncoderDecoderCache):
        return cache.self_attention_cache, cache.cross_attention_cache
    return (cache,)


def _extend(cache: Cache, own: int, beside: Sequence[int]) -> None:
    if cache.layer_class_to_replicate is not None:  # it grows by itself
        return
    for at in beside[len(cache.layers) - own :]:
        cache.layers.append(_like(cache.layers[at]))


def _like(layer: Any) -> Any:
    """An empty cache layer of the same kind and length."""
    asked = inspect.signature(type(layer).__init__).parameters
    known = {name: getattr(layer, name) for name in asked if name in vars(layer)}
    if "sliding_window" in asked and "sliding_window" not in known:  # a static layer keeps it as its length
        known["sliding_window"] = layer.max_cache_len
    made = type(layer)(**known)
    if hasattr(layer, "record_past"):
        made.record_past = layer.record_past
    return made

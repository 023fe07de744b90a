"""Keys and values of a side network's layers, kept in the base's own cache behind those of its layers. Knows
transformers' caches; refuses to know models.

So they are reordered, cropped, repeated and reset together with the base's. A cache whose layers are made from a
configuration has no room behind them: it gets layers there of the kinds that the side network's layers stand beside, or
of those that a whole model beside the base has.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedConfig, StaticCache

from trimtab.errors import UserError


def make_room(cache: Cache, own: int, beside: Sequence[int], config: PreTrainedConfig | None = None) -> None:
    """Give a cache, before its `own` layers are called, a layer like each of those at `beside`, or those of a whole
    model of this configuration.

    Raises UserError for a cache that was filled by the base without the side network.
    """
    for one in _parts(cache):
        if config is None:
            _extend(one, own, beside)
        else:
            _extend_whole(one, own, config)
    known = cache.get_seq_length()
    if (beside or config is not None) and int(known) != int(cache.get_seq_length(own)):
        raise UserError(
            "these keys and values were cached without the adapter that acts now; begin with an empty cache"
        )


def behind(cache: Cache, own: int) -> Cache:
    """The layers behind the base's `own` as the cache of a whole model: the same layers, numbered from 0."""
    return Cache(layers=cache.layers[own:])


def _parts(cache: Cache) -> tuple[Cache, ...]:
    if isinstance(cache, EncoderDecoderCache):
        return cache.self_attention_cache, cache.cross_attention_cache
    return (cache,)


def _extend(cache: Cache, own: int, beside: Sequence[int]) -> None:
    if cache.layer_class_to_replicate is not None:  # it grows by itself
        return
    for at in beside[len(cache.layers) - own :]:
        cache.layers.append(_like(cache.layers[at]))


def _extend_whole(cache: Cache, own: int, config: PreTrainedConfig) -> None:
    if cache.layer_class_to_replicate is not None:  # it would grow by itself, but by layers of one kind
        while len(cache.layers) < own:
            cache.layers.append(cache.layer_class_to_replicate())
    if len(cache.layers) > own:
        return
    layers: list[Any] = list(cache.layers)
    static = [layer.max_cache_len for layer in layers if layer.is_compileable]
    made = StaticCache(config, max_cache_len=max(static)) if static else DynamicCache(config=config)
    if any(getattr(layer, "record_past", False) for layer in cache.layers):
        made.activate_past_recording()
    cache.layers.extend(made.layers)


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

"""T5's relative positions for keys that stand in front of a text. Knows T5's attention; refuses to know methods.

T5 adds to the score of a query and a key a number that depends on their distance, from a table that the first layer's
attention has. Keys in front have the positions -P … -1, the text those that it has without them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trimtab.sites import KVSite, Module


def has_relative_positions(site: KVSite) -> bool:
    """Whether this attention's scores depend on distances by a table; those of cross-attention never do."""
    return not site.cross and _table(site) is not None


def _table(site: KVSite) -> Module | None:
    return next((one for one in site.body.modules() if hasattr(one, "relative_attention_bias")), None)


class FrontBias:
    """The bias of keys in front at one attention; as a hook it sees how much text the cache has had before a call."""

    def __init__(self, site: KVSite):
        self.table: Module = _table(site)
        self.seen: int | torch.Tensor = 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        past, layer = kwargs.get("past_key_values"), getattr(module, "layer_idx", None)
        self.seen = 0 if past is None else past.get_seq_length(layer) + 0  # a static cache counts on in place

    def columns(self, length: int, like: torch.Tensor) -> torch.Tensor:
        """[1, heads, n, length] in front of the text's bias [1, heads, n, m]"""
        own, device = self.table, like.device
        queries = torch.arange(like.shape[-2], device=device)[:, None] + self.seen
        keys = torch.arange(-length, 0, device=device)[None]
        buckets = own._relative_position_bucket(
            keys - queries,
            bidirectional=not own.is_decoder,
            num_buckets=own.relative_attention_num_buckets,
            max_distance=own.relative_attention_max_distance,
        )
        return own.relative_attention_bias(buckets).permute(2, 0, 1)[None].to(like)

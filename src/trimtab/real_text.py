"""The keys and values that the frozen base gives a real text: where prefixes start. Knows no method."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from trimtab.attention import AttentionSetting, Recorded
from trimtab.errors import UserError
from trimtab.lengths import position_limit
from trimtab.sites import EmbedsSite, KVSite, Sites


@torch.no_grad()
def keys_and_values(sites: Sites, setting: AttentionSetting, ids: Sequence[int]) -> dict[KVSite, Recorded]:
    """keys, values [kv_heads, P, head_dim] of P token ids at every attention; none in a model that reads no text.

    In rotary models the text stands at the positions -P…-1, in front of whatever follows it. The decoder of an
    encoder-decoder reads the ids as well, and attends to what the encoder makes of them.

    Raises UserError for more ids than the model has positions.
    """
    reading = next((site for site in sites.embeds if site.embedding is not None), None)
    if reading is None:
        return {}
    limit = position_limit(reading.body.config)
    if limit is not None and len(ids) > limit:
        raise UserError(
            f"this model has {limit} positions, too few to read {len(ids)} tokens: "
            f"a prefix that starts from real tokens may have a length of at most {limit} here"
        )
    tokens = torch.tensor([list(ids)], device=reading.embedding.weight.device)
    modes = [(module, module.training) for module in reading.body.modules()]
    with setting.recording(sites.kv) as found:
        try:
            for module, _ in modes:
                module.training = False
            _run(reading, tokens)
        finally:
            for module, mode in modes:
                module.training = mode
    return {site: (keys[0], values[0]) for site, (keys, values) in found.items()}


def _run(site: EmbedsSite, tokens: torch.Tensor) -> None:
    places = {}
    if site.positions == "rotary":
        places["position_ids"] = torch.arange(-tokens.shape[1], 0, device=tokens.device)[None]
    if site.attentions[0].causal:
        site.body(input_ids=tokens, use_cache=False, **places)
        return
    states = site.body(input_ids=tokens, attention_mask=torch.ones_like(tokens), **places)[0]
    if isinstance(site.reader, nn.Module):
        site.reader(input_ids=tokens, encoder_hidden_states=states, use_cache=False)

"""peft's PREFIX_TUNING: `prompt_embeddings` [length, 2 · layers · key width], of each layer keys and then values.

Both lie in the cache in front of the text's keys, so a rotary model counts the text's positions from the length on;
ours leave the text where it is. A score depends on the difference of the angles, so the keys are turned back by the
length when they are read and forth when they are written.

In T5 peft's prefix takes part in the relative positions and ours does not: refused.
"""

from __future__ import annotations

from typing import Any

import torch

from trimtab.errors import UserError
from trimtab.methods import Prefix
from trimtab.peers.folder import Folder
from trimtab.peers.kinds import Acting, Found, Kind, Model, Written
from trimtab.peers.peft.tokens import EMBEDDINGS, token_config
from trimtab.sites import KVSite, Sites

CHANGING = ("dynamic", "longrope")
"""Kinds of rotary scaling whose angles depend on the text's length."""


def read(folder: Folder, place: Model) -> Found:
    """Raises UserError for encoder-decoders and widths other than the keys'."""
    sites = _attentions(place.sites, str(folder.path))
    table = folder.take(EMBEDDINGS)
    heads, width = sites[0].kv_heads, sites[0].head_dim
    if table.dim() != 2 or table.shape[1] != 2 * len(sites) * heads * width or table.shape[0] < 1:
        raise folder.misshapen(EMBEDDINGS, table, f"[length, {2 * len(sites) * heads * width}]")
    length = len(table)
    whole = table.float().view(length, len(sites), 2, heads, width).permute(1, 2, 3, 0, 4)
    state: dict[str, torch.Tensor] = {}
    for site, (keys, values) in zip(sites, whole, strict=True):
        state |= {f"{site.key}.keys": turned(site, keys, -length), f"{site.key}.values": values.contiguous()}
    return Found(Prefix(length, form="flat", init="random"), state)


def write(form: Acting) -> Written:
    """Raises UserError for encoder-decoders and a prefix that is not in every layer."""
    sites = _attentions(Sites(form.model), "this adapter")
    parts = {site.key: part for site, part in form.of(KVSite).items()}
    if [site.key for site in sites] != list(parts):
        raise UserError("peft's prefix is in every layer; this one is not")
    pairs = [(site, parts[site.key].keys.detach(), parts[site.key].values.detach()) for site in sites]
    length = pairs[0][1].shape[1]
    layers = [torch.stack([turned(site, keys, length), values]) for site, keys, values in pairs]
    table = torch.stack(layers).permute(3, 0, 1, 2, 4).reshape(length, -1)  # [length, layers, 2, heads, width]
    width = sites[0].kv_heads * sites[0].head_dim
    own = {"num_attention_heads": sites[0].kv_heads, "num_layers": len(sites), "encoder_hidden_size": width}
    return Written({**token_config(form, length, width), **own, "prefix_projection": False}, {EMBEDDINGS: table})


def turned(site: KVSite, keys: torch.Tensor, places: int) -> torch.Tensor:
    """keys [kv heads, P, head width] turned by the angle of so many positions; as they are without rotary positions."""
    rotary: Any = getattr(site.body, "rotary_emb", None)
    if rotary is None or site.positions != "rotary":
        return keys.contiguous()
    if getattr(rotary, "rope_type", "default") in CHANGING or isinstance(getattr(rotary, "rope_type", None), dict):
        raise UserError("a prefix of this model cannot be converted: its rotary angles depend on the layer or the text")
    with torch.no_grad():
        cos, sin = (one.float() / _size(rotary) for one in rotary(keys, position_ids=torch.tensor([[places]])))
    turning, rest = keys[..., : cos.shape[-1]], keys[..., cos.shape[-1] :]
    half = cos.shape[-1] // 2
    swapped = torch.cat([-turning[..., half:], turning[..., :half]], dim=-1)
    return torch.cat([turning * cos[0].to(keys.device) + swapped * sin[0].to(keys.device), rest], dim=-1)


def _size(rotary: Any) -> float:
    """What some kinds of scaling multiply cosine and sine by; it does not turn anything."""
    return float(getattr(rotary, "attention_scaling", 1.0))


def _attentions(sites: Sites, what: str) -> list[KVSite]:
    """Every layer's self-attention."""
    if len(sites.layer_modules) > 1:
        raise UserError(
            f"{what}: peft's prefix takes part in the relative positions of an encoder-decoder and trimtab's does not, "
            "so the one cannot be written as the other"
        )
    found = [site for site in sites.kv if not site.cross]
    if not found:
        raise UserError(f"{what}: trimtab has no prefix for {sites.family.name}")
    return found


KIND = Kind("PREFIX_TUNING", ("prefix", "p-tuning-v2"), read, write, prompt_learning=True)

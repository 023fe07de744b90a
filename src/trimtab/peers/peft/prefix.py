"""peft's PREFIX_TUNING: `prompt_embeddings` [length, 2 · layers · key width], of each layer keys and then values.

Both lie in the cache in front of the text's keys, so a rotary model counts the text's positions from the length on;
ours leave the text where it is. A score depends on the difference of the angles, so the keys are turned back by the
length when they are read and forth when they are written.

In T5 the prefix is in the decoder's self-attention alone and takes part in the relative positions, which is
prefix[encoder=false,cross=false,relative=true]. The table's pairs go round twice there, of which every second one is
taken (peft drops what was meant for cross-attention): layer i of L has pair 2 i mod L, so that with an even L two
layers share one.
"""

from __future__ import annotations

from typing import Any

import torch

from trimtab.errors import UserError
from trimtab.methods import Prefix
from trimtab.peers.folder import Folder
from trimtab.peers.kinds import Acting, Found, Kind, Model, Written
from trimtab.peers.peft.tokens import BOTH, EMBEDDINGS, token_config
from trimtab.relative import has_relative_positions
from trimtab.sites import KVSite, Sites

CHANGING = ("dynamic", "longrope")
"""Kinds of rotary scaling whose angles depend on the text's length."""


def read(folder: Folder, place: Model) -> Found:
    """Raises UserError for encoder-decoders other than T5 and widths other than the keys'."""
    sites = _attentions(place.sites, str(folder.path))
    table = folder.take(EMBEDDINGS)
    heads, width = sites[0].kv_heads, sites[0].head_dim
    if table.dim() != 2 or table.shape[1] != 2 * len(sites) * heads * width or table.shape[0] < 1:
        raise folder.misshapen(EMBEDDINGS, table, f"[length, {2 * len(sites) * heads * width}]")
    length = len(table)
    whole = table.float().view(length, len(sites), 2, heads, width).permute(1, 2, 3, 0, 4)
    state: dict[str, torch.Tensor] = {}
    for site, at in zip(sites, _pairs(place.sites), strict=True):
        keys, values = whole[at]
        state |= {f"{site.key}.keys": turned(site, keys, -length), f"{site.key}.values": values.contiguous()}
    if place.model.config.is_encoder_decoder and folder.number("num_transformer_submodules", BOTH) != BOTH:
        raise UserError(f"{folder.path} has a prefix of one half of an encoder-decoder, which peft runs otherwise")
    return Found(Prefix(length, form="flat", init="random", **_counted(place.sites)), state)


def write(form: Acting) -> Written:
    """Raises UserError for encoder-decoders other than T5 and a prefix that is not in every layer."""
    all_sites = Sites(form.model)
    sites = _attentions(all_sites, "this adapter")
    parts = {site.key: part for site, part in form.of(KVSite).items()}
    counted = _counted(all_sites)
    if any(getattr(form.method, name, None) != value for name, value in counted.items()):
        wanted = ",".join(f"{name}={str(value).lower()}" for name, value in counted.items())
        raise UserError(f"peft's prefix of this model is in the decoder alone; train with prefix[{wanted}] to write it")
    if [site.key for site in sites] != list(parts):
        raise UserError("peft's prefix is in every layer; this one is not")
    pairs = [(site, parts[site.key].keys.detach(), parts[site.key].values.detach()) for site in sites]
    length = pairs[0][1].shape[1]
    layers = _placed([torch.stack([turned(site, keys, length), values]) for site, keys, values in pairs], all_sites)
    table = torch.stack(layers).permute(3, 0, 1, 2, 4).reshape(length, -1)  # [length, layers, 2, heads, width]
    width = sites[0].kv_heads * sites[0].head_dim
    own = {"num_attention_heads": sites[0].kv_heads, "num_layers": len(sites), "encoder_hidden_size": width}
    if counted:
        own["num_transformer_submodules"] = BOTH
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


def _counted(sites: Sites) -> dict[str, Any]:
    """The options with which our prefix of an encoder-decoder does what peft's does; none for other models."""
    return {"encoder": False, "cross": False, "relative": True} if len(sites.layer_modules) > 1 else {}


def _pairs(sites: Sites) -> list[int]:
    """Which pair of peft's table each layer has."""
    count = len(_attentions(sites, "this folder"))
    return [2 * layer % count for layer in range(count)] if _counted(sites) else list(range(count))


def _placed(layers: list[torch.Tensor], sites: Sites) -> list[torch.Tensor]:
    """The layers' pairs in the table's order; pairs that no layer has are 0. Raises UserError where two layers would
    have one pair and are not equal."""
    table: dict[int, torch.Tensor] = {}
    for layer, at in zip(layers, _pairs(sites), strict=True):
        if at in table and not torch.equal(table[at], layer):
            raise UserError(
                f"peft gives layers {len(layers) // 2} apart of a decoder with {len(layers)} layers the same prefix, "
                "and this one has different ones there"
            )
        table[at] = layer
    return [table.get(at, torch.zeros_like(layers[0])) for at in range(len(layers))]


def _attentions(sites: Sites, what: str) -> list[KVSite]:
    """Every layer's self-attention; of T5 the decoder's. Raises UserError for other encoder-decoders."""
    if len(sites.layer_modules) > 1:
        found = [site for site in sites.kv if site.stack == "decoder" and not site.cross]
        if not all(has_relative_positions(site) for site in found) or len(found) != sites.model.config.num_layers:
            raise UserError(
                f"{what}: of encoder-decoders trimtab takes peft's prefix of T5 alone, with as many layers in either "
                "half"
            )
        return found
    found = [site for site in sites.kv if not site.cross]
    if not found:
        raise UserError(f"{what}: trimtab has no prefix for {sites.family.name}")
    return found


KIND = Kind("PREFIX_TUNING", ("prefix", "p-tuning-v2"), read, write, prompt_learning=True)

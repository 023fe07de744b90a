"""`prefix_tuning` of `adapters`, flat or as a network: `….prefix_tunings.NAME.self_prefix.control_trans`, flat numbers
in the order [length, layers · 2, heads, head width], of each layer keys and then values.

They stand in front of the text's keys, behind the rotation, as ours do; but the text's learned positions stay where
they are (`prefix[shift=false]`). In T5 theirs moves the text's own keys away from
their queries by the length: refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trimtab.errors import UserError
from trimtab.methods import Prefix
from trimtab.peers.adapters.bottleneck import left_out
from trimtab.peers.adapters.places import layer_numbers, places_of
from trimtab.peers.folder import Folder
from trimtab.peers.kinds import Acting, Found, Kind, Model, Written, layer_spec
from trimtab.sites import KVSite, Sites

FLAT = ("control_trans",)
NETWORK = ("wte.weight", *(f"control_trans.{index}.{name}" for index in (0, 2) for name in ("weight", "bias")))


def read(folder: Folder, place: Model) -> Found:
    """Raises UserError for encoder-decoders, gates and sizes other than the keys'."""
    folder.refuse_set(("use_gating",), "prefix")
    sites = _attentions(place.sites, str(folder.path))
    absent = set(folder.integers("leave_out"))
    numbers = layer_numbers(place.sites)
    sites = [site for site in sites if numbers[site.stack, site.layer] not in absent]
    flat = _numbers(folder, places_of(place.sites)[""].prefix)
    if not sites:
        raise UserError(f"{folder.path} has a prefix, but leave_out names every layer")
    heads, width = sites[0].kv_heads, sites[0].head_dim
    each = 2 * len(sites) * heads * width
    if flat.numel() % each or not flat.numel():
        raise folder.misshapen("control_trans", flat, f"a multiple of {each} numbers")
    length = flat.numel() // each
    said = folder.number("prefix_length", length)
    if said != length:
        raise UserError(f"{folder.path}: the configuration's prefix_length is {said:g}, its tensors have {length}")
    whole = flat.float().view(length, len(sites), 2, heads, width).permute(1, 2, 3, 0, 4)
    state: dict[str, torch.Tensor] = {}
    for site, (keys, values) in zip(sites, whole, strict=True):
        state |= {f"{site.key}.keys": keys.contiguous(), f"{site.key}.values": values.contiguous()}
    layers = layer_spec(place.sites, {site.layer for site in sites})
    return Found(Prefix(length, form="flat", init="random", layers=layers, shift=not _counts(sites)), state)


def _numbers(folder: Folder, name: str) -> torch.Tensor:
    """The flat numbers, or what the network makes of its tokens. Every layer may have a copy; all are the same."""
    wanted = FLAT if folder.flag("flat") else NETWORK
    found: dict[str, torch.Tensor] = {}
    for part in wanted:
        copies = [tensor for _, _, tensor in folder.take_ending(f"prefix_tunings.{name}.{part}")]
        if not copies:
            raise UserError(f"{folder.path} has no tensor prefix_tunings.{name}.{part}")
        if any(not torch.equal(copies[0], other) for other in copies[1:]):
            raise UserError(f"{folder.path}: the copies of prefix_tunings.{name}.{part} are not equal")
        found[part] = copies[0].float()
    return found["control_trans"] if folder.flag("flat") else _made(folder, found)


def _made(folder: Folder, own: dict[str, torch.Tensor]) -> torch.Tensor:
    if folder.text("non_linearity", "tanh") != "tanh":
        raise UserError(f"{folder.path}: the network of the prefix has another activation than tanh")
    (first, shift), (last, offset) = (
        (own[f"control_trans.{at}.weight"], own[f"control_trans.{at}.bias"]) for at in (0, 2)
    )
    tokens = own["wte.weight"]
    fits = all(one.dim() == 2 for one in (tokens, first, last)) and tokens.shape[1] == first.shape[1]
    if not fits or (first.shape[0],) != shift.shape or last.shape != (*offset.shape, first.shape[0]):
        raise UserError(f"{folder.path}: the tensors of the prefix's network do not fit each other")
    return torch.tanh(tokens @ first.T + shift) @ last.T + offset


def write(form: Acting) -> Written:
    """Raises UserError for encoder-decoders, and for a prefix that moves the text's positions up."""
    sites = Sites(form.model)
    _attentions(sites, "this adapter")
    parts: dict[KVSite, Any] = form.of(KVSite)
    if _counts(list(parts)) and any(part.shift for part in parts.values()):
        raise UserError(
            "adapters leaves the text's positions where they are, this prefix moves them up by its length; "
            "train with prefix[shift=false] to write it for adapters"
        )
    layers = [torch.stack([part.keys.detach(), part.values.detach()]) for part in parts.values()]
    table = torch.stack(layers).permute(3, 0, 1, 2, 4)  # [length, layers, 2, heads, width]
    config = {
        "architecture": "prefix_tuning",
        **{"flat": True, "prefix_length": table.shape[0], "dropout": form.method.dropout, "use_gating": False},
        **{"encoder_prefix": True, "cross_prefix": True, "non_linearity": "tanh", "bottleneck_size": 512},
        "leave_out": left_out(sites, {(site.stack, site.layer) for site in parts}),
    }
    start = f"{form.model.base_model_prefix}." if hasattr(form.model, form.model.base_model_prefix) else ""
    key = f"{start}prefix_tuning.prefix_tunings.{places_of(sites)[''].prefix}.control_trans"
    return Written(config, {key: table.reshape(-1)})


def _counts(sites: Sequence[KVSite]) -> bool:
    """Whether the text has learned positions that a prefix of ours may move."""
    return any(site.shift for site in sites)


def _attentions(sites: Sites, what: str) -> list[KVSite]:
    """Every layer's self-attention."""
    if len(sites.layer_modules) > 1:
        raise UserError(
            f"{what}: adapters' prefix moves an encoder-decoder's own keys away from their queries by its length, "
            "which trimtab's does not, so the one cannot be written as the other"
        )
    found = [site for site in sites.kv if not site.cross]
    if not found:
        raise UserError(f"{what}: trimtab has no prefix for {sites.family.name}")
    return found


KIND = Kind("prefix_tuning", ("prefix", "p-tuning-v2"), read, write)

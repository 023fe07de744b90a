"""`ia3` of `adapters`: `<module>.loras.NAME.lora_B` [out, 1] scales a projection's output, in the feed-forward too.

There the paper, and our `ia3`, scale what the activation function gives, which is the input of the last projection. In
gated feed-forwards that is the output of `up`, which the gate multiplies: written so. Without a gate it cannot be.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from trimtab.errors import UserError
from trimtab.methods import IA3
from trimtab.peers.adapters.lora import B, by_module, sites_of, split, where
from trimtab.peers.folder import Folder
from trimtab.peers.kinds import Acting, Found, Kind, Model, Written, layer_spec
from trimtab.peers.projections import ROLES, linear_sites
from trimtab.sites import LinearSite, Sites


def read(folder: Folder, place: Model) -> Found:
    """Raises UserError for modules that are no projection of ours, for shapes, and for a gate."""
    folder.refuse_set(("use_gating",), "ia3")
    by_path = linear_sites(place.sites)
    alpha = folder.number("alpha", 1)
    state: dict[str, torch.Tensor] = {}
    chosen: list[LinearSite] = []
    for name, _, tensor in folder.take_ending(B):
        sites = sites_of(folder, by_path, name, B)
        outer = sum(site.out_features for site in sites)
        if tensor.shape != (outer, 1):
            raise folder.misshapen(name + B, tensor, f"[{outer}, 1]")
        if alpha != 1 and sites[0].span is not None:
            raise UserError(
                f"{folder.path}: alpha={alpha:g} scales what {name} has no vector for as well; only 1 is read"
            )
        for site, own in zip(sites, split(tensor, sites), strict=True):
            state[f"{site.key}.scale"] = own[:, 0].float() * alpha
        chosen += sites
    if not chosen:
        raise UserError(f"{folder.path} has no tensor of IA3")
    targets = tuple(role for role in ROLES if any(site.role == role for site in chosen))
    layers = layer_spec(place.sites, {site.layer for site in chosen})
    return Found(IA3(targets, layers, inputs=()) if "down" in targets else IA3(targets, layers), state)


def write(form: Acting) -> Written:
    """Raises UserError where an input is scaled that is not a gated product."""
    scales: dict[LinearSite, list[torch.Tensor]] = defaultdict(list)
    order: dict[str, list[LinearSite]] = defaultdict(list)
    for own in by_module(form).values():
        for site, part in own:
            scales[_written_at(form, site) if hasattr(part, "before") else site].append(part.scale.detach())
    for site in sorted(scales, key=lambda site: ROLES.index(site.role)):
        order[site.path].append(site)
    tensors = {
        path + B: torch.cat([torch.stack(scales[site]).prod(dim=0) for site in sites])[:, None]
        for path, sites in order.items()
    }
    config: dict[str, Any] = {
        **where(form, list(scales), "ia3"),
        **{"r": 1, "alpha": 1, "dropout": 0.0, "composition_mode": "scale", "init_weights": "ia3"},
        **{"use_dora": False, "use_gating": False},
    }
    return Written(config, tensors)


def _written_at(form: Acting, site: LinearSite) -> LinearSite:
    """The projection whose output may be scaled instead of this one's input."""
    # a form's sites are those of the adapter; the parts may lack `up`, so it is looked for in the model
    own = [form_site for form_site in form.of(LinearSite) if _same_layer(form_site, site)]
    found = {one.role: one for one in Sites(form.model).linear if _same_layer(one, site)}
    if site.role != "down" or "gate" not in found or found["gate"].span is not None:
        raise UserError(
            f"adapters scales what the activation function reads, this ia3 what {site.role} reads, which is another "
            "function; train with ia3[targets=k,v,up] to write it for adapters"
        )
    return next((one for one in own if one.role == "up"), found["up"])


def _same_layer(one: LinearSite, other: LinearSite) -> bool:
    return (one.stack, one.layer) == (other.stack, other.layer)


KIND = Kind("ia3", ("ia3",), read, write)

"""peft's LN_TUNING: `<norm>.ln_tuning_layers.weight` and `.bias`, the norm's weights as trained."""

from __future__ import annotations

import torch

from trimtab.errors import UserError
from trimtab.methods import LayerNorm
from trimtab.peers.folder import Folder
from trimtab.peers.kinds import Acting, Found, Kind, Model, Written, shortest_names
from trimtab.peers.peft.lora import START
from trimtab.sites import NormSite

INSIDE = ".ln_tuning_layers."


def read(folder: Folder, place: Model) -> Found:
    """All norms are claimed; those that the file leaves out keep the base's weights. Raises UserError for others."""
    by_path = {site.path: site for site in place.sites.norm}
    state: dict[str, torch.Tensor] = {}
    for name in ("weight", "bias"):
        for module, ending, tensor in folder.take_ending(INSIDE + name):
            site = by_path.get(module.removeprefix(START))
            if site is None or not module.startswith(START) or getattr(site.module, name, None) is None:
                raise folder.homeless([module + ending])
            own = getattr(site.module, name)
            if tensor.shape != own.shape:
                raise folder.misshapen(module + ending, tensor, str(list(own.shape)))
            state[f"{site.key}.copy.{name}"] = tensor
    if not state:
        raise UserError(f"{folder.path} has no tensor of a norm")
    return Found(LayerNorm(), state)


def write(form: Acting) -> Written:
    """Every trained norm."""
    norms = form.of(NormSite)
    tensors = {
        f"{START}{site.path}{INSIDE}{name}": tensor.detach()
        for site, part in norms.items()
        for name, tensor in part.copy.named_parameters()
    }
    return Written({"target_modules": shortest_names(form.model, [site.path for site in norms])}, tensors)


KIND = Kind("LN_TUNING", ("layernorm",), read, write)

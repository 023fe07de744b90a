"""Task heads, and a trained vocabulary projection, in other libraries' files. Knows names of modules alone."""

from __future__ import annotations

import torch

from trimtab.adapter import Adapter
from trimtab.errors import UserError
from trimtab.peers.folder import Folder
from trimtab.peers.kinds import Written, head_parts
from trimtab.sites import Sites


def read_heads(folder: Folder, sites: Sites, start: str) -> dict[str, torch.Tensor]:
    """Our tensors of the heads that the folder has under `start` + the module's name.

    Raises UserError for shapes that fit no number of classes.
    """
    found: dict[str, torch.Tensor] = {}
    for site in sites.head:
        own = dict(site.module.named_parameters())
        given = {name: folder.take(key) for name in own if (key := f"{start}{site.path}.{name}") in folder.tensors}
        if given and given.keys() != own.keys():
            raise UserError(f"{folder.path} has only {', '.join(given)} of the head {site.path}")
        for name, tensor in given.items():
            if tensor.shape[1:] != own[name].shape[1:] or tensor.dim() != own[name].dim():
                raise folder.misshapen(f"{start}{site.path}.{name}", tensor, str(list(own[name].shape)))
            found[f"{site.key}.copy.{name}"] = tensor
    return found


def write_heads(adapter: Adapter, start: str) -> Written:
    """The adapter's heads under `start` + the module's name; `config` names their modules."""
    tensors: dict[str, torch.Tensor] = {}
    heads = head_parts(adapter)
    for site, module in heads:
        tensors |= {f"{start}{site.path}.{name}": one for name, one in module.state_dict().items()}
    return Written({"modules": [site.path for site, _ in heads]} if heads else {}, tensors)

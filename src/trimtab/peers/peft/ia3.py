"""peft's IA3: `<module>.ia3_l`, [out, 1] where the output is scaled, [1, in] where the input is (for the
feedforward_modules).
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from trimtab.errors import UserError
from trimtab.methods import IA3
from trimtab.peers.folder import Folder
from trimtab.peers.kinds import Acting, Found, Kind, Model, Written, layer_spec, shortest_names
from trimtab.peers.peft.lora import START
from trimtab.peers.projections import ROLES, linear_sites, whole_width
from trimtab.sites import LinearSite

VECTOR = ".ia3_l"


def read(folder: Folder, place: Model) -> Found:
    """Raises UserError for modules that are no projection of ours, and for a role scaled at both ends."""
    by_path = linear_sites(place.sites)
    state: dict[str, torch.Tensor] = {}
    chosen: list[LinearSite] = []
    at_input: dict[str, bool] = {}
    for name, _, tensor in folder.take_ending(VECTOR):
        path = name.removeprefix(START)
        if path not in by_path or path == name:
            raise folder.homeless([name + VECTOR])
        for site in by_path[path]:
            inputs = tensor.shape == (1, site.in_features) and _is_input(folder, path)
            if not inputs and tensor.shape != (whole_width(site), 1):
                raise folder.misshapen(path + VECTOR, tensor, f"[{whole_width(site)}, 1] or [1, {site.in_features}]")
            if at_input.setdefault(site.role, inputs) != inputs:
                raise UserError(f"{folder.path} scales the input of some {site.role} and the output of others")
            flat = tensor.flatten()
            state[f"{site.key}.scale"] = flat if inputs or site.span is None else site.span.take(flat)
            chosen.append(site)
    if not chosen:
        raise UserError(f"{folder.path} has no tensor of IA3")
    targets = tuple(role for role in ROLES if role in at_input)
    scaled = tuple(role for role in targets if at_input[role]) or ("down",)
    return Found(IA3(targets, layer_spec(place.sites, {site.layer for site in chosen}), scaled), state)


def _is_input(folder: Folder, path: str) -> bool:
    """Whether peft scales this module's input: its name ends with one of the feed-forward modules'."""
    names = folder.texts("feedforward_modules")
    return any(path == name or path.endswith(f".{name}") for name in names)


def write(form: Acting) -> Written:
    """One vector a module; projections of a shared module that are not scaled have ones."""
    modules: dict[str, list[tuple[LinearSite, Any]]] = defaultdict(list)
    for site, part in form.of(LinearSite).items():
        modules[site.path].append((site, part))
    tensors: dict[str, torch.Tensor] = {}
    inputs: list[str] = []
    for path, own in modules.items():
        site, part = own[0]
        if hasattr(part, "before"):
            inputs.append(path)
            tensors[f"{START}{path}{VECTOR}"] = part.scale.detach()[None]
            continue
        whole = part.scale.detach().new_ones(whole_width(site))
        for one, member in own:
            whole = member.scale.detach() if one.span is None else one.span.put(whole, member.scale.detach())
        tensors[f"{START}{path}{VECTOR}"] = whole[:, None]
    names = shortest_names(form.model, list(modules))
    short = set(names) != set(modules)
    site = next(iter(modules.values()))[0][0]
    return Written(
        {
            "target_modules": names,
            "feedforward_modules": sorted({path.rpartition(".")[2] for path in inputs} if short else inputs),
            "fan_in_fan_out": isinstance(site.module, Conv1D),
            "init_ia3_weights": True,
        },
        tensors,
    )


KIND = Kind("IA3", ("ia3",), read, write)

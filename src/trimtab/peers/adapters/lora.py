"""`lora` of `adapters`: `<module>.loras.NAME.lora_A` [r, in] and `.lora_B` [out, r], the scale is alpha / r.

A module that computes queries, keys and values at once (GPT-2's c_attn) has the chosen ones' A one under the other,
[n · r, in], and their B, [n · out / 3, r]. Their DoRA is refused: its norm leaves out the scale and its bias is scaled.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from trimtab.errors import UserError
from trimtab.methods import LoRA
from trimtab.peers.adapters.bottleneck import left_out
from trimtab.peers.adapters.places import places_of
from trimtab.peers.folder import Folder
from trimtab.peers.kinds import Acting, Found, Kind, Model, Written, layer_spec
from trimtab.peers.projections import ROLES, linear_sites
from trimtab.sites import LinearSite, Sites

A, B = ".loras.lora_A", ".loras.lora_B"
ATTENTION = ("q", "k", "v")
"""In the order in which a shared module has them."""
REFUSED = ("use_gating", "vera_d", "vera_b", "shared_parameters")


def read(folder: Folder, place: Model) -> Found:
    """Raises UserError for options that ours has not, for modules that are no projection, and for shapes."""
    folder.refuse_set(REFUSED, "lora")
    if folder.flag("use_dora"):
        raise UserError(
            f"{folder.path} is a DoRA of adapters, which scales the bias along with the weight and leaves the "
            "scale out of its norm; trimtab's is the paper's, so the one cannot be written as the other"
        )
    by_path = linear_sites(place.sites)
    state: dict[str, torch.Tensor] = {}
    chosen: list[LinearSite] = []
    ranks: set[int] = set()
    for name, _, down in folder.take_ending(A):
        up = folder.take(name + B)
        sites = sites_of(folder, by_path, name, A)
        rank = _rank(folder, name, down, up, sites)
        downs, ups = down.split(rank), split(up, sites)
        for site, low, high in zip(sites, downs, ups, strict=True):
            state |= {f"{site.key}.A": low, f"{site.key}.B": high}
        chosen += sites
        ranks.add(rank)
    if len(ranks) != 1:
        raise UserError(f"{folder.path} has {'LoRAs of several ranks' if ranks else 'no tensor of LoRA'}")
    rank = ranks.pop()
    if folder.number("r", rank) != rank:
        raise UserError(
            f"{folder.path}: the configuration's rank is {folder.number('r', rank):g}, its tensors have {rank}"
        )
    method = LoRA(
        r=rank,
        alpha=folder.number("alpha", 8),
        dropout=_dropout(folder),
        targets=tuple(role for role in ROLES if any(site.role == role for site in chosen)),
        layers=layer_spec(place.sites, {site.layer for site in chosen}),
    )
    return Found(method, state)


def sites_of(folder: Folder, by_path: Mapping[str, Sequence[LinearSite]], path: str, ending: str) -> list[LinearSite]:
    """The projections that a module's tensors are for; of a shared module those that the configuration names."""
    if path not in by_path:
        raise folder.homeless([path + ending])
    sites = list(by_path[path])
    if sites[0].span is None:
        return sites
    named = folder.texts("attn_matrices")
    return [site for role in ATTENTION for site in sites if site.role == role and role in named]


def _rank(folder: Folder, path: str, down: torch.Tensor, up: torch.Tensor, sites: Sequence[LinearSite]) -> int:
    """The rank of one projection. Raises UserError for other shapes than the model asks for."""
    inner, outer, count = _widths(folder, path, sites)
    if up.dim() != 2 or up.shape[0] != outer or up.shape[1] < 1:
        raise folder.misshapen(path + B, up, f"[{outer}, r]")
    rank = up.shape[1]
    if down.shape != (count * rank, inner):
        raise folder.misshapen(path + A, down, f"[{count * rank}, {inner}]")
    return rank


def _widths(folder: Folder, path: str, sites: Sequence[LinearSite]) -> tuple[int, int, int]:
    if not sites:
        raise UserError(f"{folder.path} has tensors of {path}, but attn_matrices names none of {', '.join(ATTENTION)}")
    return sites[0].in_features, sum(site.out_features for site in sites), len(sites)


def split(rows: torch.Tensor, sites: Sequence[LinearSite]) -> Sequence[torch.Tensor]:
    """Rows [all out, …] of a module as those of its projections."""
    return rows.split([site.out_features for site in sites])


def _dropout(folder: Folder) -> float:
    value = folder.number("dropout", 0.0)
    if not 0 <= value < 1:
        raise folder.wrong("dropout", value, "in [0, 1)")
    return value


# -- writing --------------------------------------------------------------------------------------------------------


def write(form: Acting) -> Written:
    """Raises UserError for DoRA, and for projections that `adapters` does not wrap."""
    method: Any = form.method
    if method.dora:
        raise UserError(
            "adapters' DoRA scales the bias along with the weight and leaves the scale out of its norm; "
            "trimtab's is the paper's, so the one cannot be written as the other"
        )
    tensors: dict[str, torch.Tensor] = {}
    for path, own in by_module(form).items():
        tensors[path + A] = torch.cat([part.A.detach() for _, part in own])
        tensors[path + B] = torch.cat([part.B.detach() for _, part in own])
    alpha = method.scale * method.r
    config = {
        **where(form, [site for site in form.of(LinearSite)], "lora"),
        **{"r": method.r, "alpha": int(alpha) if float(alpha).is_integer() else alpha, "dropout": method.dropout},
        **{"composition_mode": "add", "init_weights": "lora", "use_dora": False, "use_gating": False},
    }
    return Written(config, tensors)


def by_module(form: Acting) -> dict[str, list[tuple[LinearSite, Any]]]:
    """The parts by the module that computes their projections, queries before keys before values."""
    modules: dict[str, list[tuple[LinearSite, Any]]] = defaultdict(list)
    for site, part in sorted(form.of(LinearSite).items(), key=lambda pair: ROLES.index(pair[0].role)):
        modules[site.path].append((site, part))
    return modules


def where(form: Acting, chosen: Sequence[LinearSite], what: str) -> dict[str, Any]:
    """The fields that say which projections have one. Raises UserError for a projection that cannot."""
    sites = Sites(form.model)
    places = next(iter(places_of(sites).values()))
    able = {*ATTENTION, places.intermediate, places.output}
    wrong = sorted({site.role for site in chosen} - able)
    if wrong:
        raise UserError(
            f"adapters has no {what} on {', '.join(wrong)} of {sites.family.name}; it has them on "
            f"{', '.join(role for role in ROLES if role in able)}"
        )
    roles = {site.role for site in chosen}
    return {
        "architecture": "lora",
        "selfattn_lora": bool(roles & set(ATTENTION)),
        "attn_matrices": [role for role in ATTENTION if role in roles],
        "intermediate_lora": places.intermediate in roles,
        "output_lora": places.output in roles,
        "leave_out": left_out(sites, {(site.stack, site.layer) for site in chosen}),
    }


KIND = Kind("lora", ("lora",), read, write)

"""peft's LORA: `<module>.lora_A.weight` [r, in], `<module>.lora_B.weight` [out, r], DoRA's
`<module>.lora_magnitude_vector` [out]; the scale is lora_alpha / r, with use_rslora lora_alpha / sqrt(r), both
by module with patterns.

Ours has one rank and one scale. Lower ranks are filled up with zeros, other scales go into B, and projections that the
file leaves out keep B = 0: each of these changes no output. A module that holds several projections (GPT-2's c_attn) is
taken apart by rows of B; written, they become one update of the module, whose rank is the sum where their A differ.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from trimtab.errors import UserError
from trimtab.methods import LoRA
from trimtab.peers.folder import Folder
from trimtab.peers.kinds import Acting, Found, Kind, Model, Written, layer_spec, shortest_names
from trimtab.peers.projections import ROLES, linear_sites, whole_width
from trimtab.sites import LinearSite, Sites

START = "base_model.model."
A, B, M = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
OLD_M = ".lora_magnitude_vector.weight"
UNKNOWN = (
    *("lora_bias", "use_qalora", "layer_replication", "trainable_token_indices", "target_parameters"),
    *("alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "velora_config"),
)
"""Options that change what the file means."""
UNTOUCHED = (True, False, None, "true", "gaussian", "orthogonal", "eva", "mini_lora")
"""Starts that leave the base's weights as they are."""
PLAIN = re.compile(r"\^?[\w.\\]+\$?")
"""A module's name, as patterns have it; anything with repetitions could take for ever to match."""


@dataclass
class Update:
    """What the file has for one module."""

    tensors: dict[str, torch.Tensor]
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.tensors[A].shape[0]


def read(folder: Folder, place: Model) -> Found:
    """Raises UserError for options, starts and modules that ours has not."""
    _check_options(folder)
    by_path = linear_sites(place.sites)
    updates = _updates(folder, by_path)
    for path, update in updates.items():
        _check_shapes(folder, path, update, by_path[path])
        update.scale = _scale(folder, path, update.rank)
    method = _method(folder, place.sites, updates, by_path)
    state: dict[str, torch.Tensor] = {}
    for path, update in updates.items():
        for site in by_path[path]:
            state |= _tensors(site, update, method)
    return Found(method, state)


def _check_options(folder: Folder) -> None:
    folder.refuse_set(UNKNOWN, "lora")
    if folder.text("bias", "none") != "none":
        raise UserError(
            f"{folder.path} trains biases along with LoRA (bias={folder.text('bias')}), which ours does not"
        )
    start = folder.config.get("init_lora_weights", True)
    if not isinstance(start, str | bool | None) or start not in UNTOUCHED:
        raise UserError(
            f"{folder.path}: init_lora_weights={str(start)[:60]} changes the base's weights, so the file means nothing "
            "without them; save it in peft with path_initial_model_for_weight_conversion"
        )


def _updates(folder: Folder, by_path: Mapping[str, list[LinearSite]]) -> dict[str, Update]:
    """The tensors by module. Raises UserError for modules that are no projection of ours, and incomplete updates."""
    updates: dict[str, Update] = {}
    for name, ending, tensor in folder.take_ending(A, B, OLD_M, M):
        path = name.removeprefix(START)
        if path not in by_path or path == name:
            raise folder.homeless([name + ending])
        updates.setdefault(path, Update({})).tensors[M if ending == OLD_M else ending] = tensor
    if not updates:
        raise UserError(f"{folder.path} has no LoRA tensor")
    dora = folder.flag("use_dora")
    for path, update in updates.items():
        for ending in (A, B, *((M,) if dora else ())):
            if ending not in update.tensors:
                raise UserError(f"{folder.path} has no tensor {START}{path}{ending}")
        if not dora and M in update.tensors:
            raise UserError(f"{folder.path} has {path}{M}, but use_dora is not set")
    return updates


def _check_shapes(folder: Folder, path: str, update: Update, sites: list[LinearSite]) -> None:
    down, up, magnitude = (update.tensors.get(ending) for ending in (A, B, M))
    assert down is not None and up is not None
    inner, outer = sites[0].in_features, whole_width(sites[0])
    if down.dim() != 2 or down.shape[1] != inner or down.shape[0] < 1:
        raise folder.misshapen(path + A, down, f"[r, {inner}]")
    if up.shape != (outer, down.shape[0]):
        raise folder.misshapen(path + B, up, f"[{outer}, {down.shape[0]}]")
    if magnitude is not None and magnitude.shape != (outer,):
        raise folder.misshapen(path + M, magnitude, f"[{outer}]")


def _scale(folder: Folder, path: str, rank: int) -> float:
    """The scale of one module, from the configuration; the rank there has to be the tensors'."""
    ranks, alphas = folder.numbers("rank_pattern"), folder.numbers("alpha_pattern")
    said = _by_pattern(folder, ranks, path, folder.number("r", rank))
    if said != rank:
        raise UserError(f"{folder.path}: the configuration gives {path} the rank {said:g}, its tensors have {rank}")
    alpha = _by_pattern(folder, alphas, path, folder.number("lora_alpha", 8))
    return alpha / (math.sqrt(rank) if folder.flag("use_rslora") else rank)


def _by_pattern(folder: Folder, patterns: Mapping[str, float], path: str, default: float) -> float:
    """The value whose pattern matches the end of a module's name, as peft matches it."""
    for pattern, value in patterns.items():
        if not PLAIN.fullmatch(pattern) or len(pattern) > 200:
            raise UserError(f"{folder.path}: the pattern {pattern[:60]!r} is no module's name, which is all ours reads")
        try:
            matched = re.match(rf"(.*\.)?({pattern})$", path)
        except re.error as error:
            raise UserError(f"{folder.path}: the pattern {pattern[:60]!r} is broken: {error}") from None
        if matched:
            return value
    return default


def _method(
    folder: Folder, sites: Sites, updates: Mapping[str, Update], by_path: Mapping[str, list[LinearSite]]
) -> LoRA:
    chosen = [site for path in updates for site in by_path[path]]
    ranks, scales = {one.rank for one in updates.values()}, {one.scale for one in updates.values()}
    rank, scale = max(ranks), next(iter(updates.values())).scale
    same = len(ranks) == len(scales) == 1
    rslora = folder.flag("use_rslora") and same
    if not scale:
        raise UserError(f"{folder.path}: lora_alpha is 0, so the adapter does nothing")
    return LoRA(
        r=rank,
        alpha=scale * (math.sqrt(rank) if rslora else rank),
        dropout=_dropout(folder),
        targets=tuple(role for role in ROLES if any(site.role == role for site in chosen)),
        layers=layer_spec(sites, {site.layer for site in chosen}),
        rank_stabilised=rslora,
        dora=folder.flag("use_dora"),
    )


def _dropout(folder: Folder) -> float:
    value = folder.number("lora_dropout", 0.0)
    if not 0 <= value < 1:
        raise folder.wrong("lora_dropout", value, "in [0, 1)")
    return value


def _tensors(site: LinearSite, update: Update, method: LoRA) -> dict[str, torch.Tensor]:
    """Our tensors of one projection: its rows of B, filled up to the rank and brought to the scale."""
    down, up = update.tensors[A].float(), update.tensors[B].float() * (update.scale / method.scale)
    up = up if site.span is None else site.span.take(up.T).T
    more = method.r - update.rank
    down = torch.cat([down, down.new_zeros(more, down.shape[1])])
    up = torch.cat([up, up.new_zeros(up.shape[0], more)], dim=1)
    if not method.dora:
        return {f"{site.key}.A": down, f"{site.key}.B": up}
    magnitude = update.tensors[M].float()
    magnitude = magnitude if site.span is None else site.span.take(magnitude)
    return {f"{site.key}.low.A": down, f"{site.key}.low.B": up, f"{site.key}.magnitude": magnitude}


# -- writing --------------------------------------------------------------------------------------------------------


def write(form: Acting) -> Written:
    """One update a module."""
    method: Any = form.method
    method = next((one for one in getattr(method, "methods", (method,)) if one.name == "lora"), method)
    modules: dict[str, list[tuple[LinearSite, Any]]] = defaultdict(list)
    for site, part in form.of(LinearSite).items():
        modules[site.path].append((site, part))
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for path, own in modules.items():
        down, up = _together(own)
        ranks[path] = down.shape[0]
        tensors |= {f"{START}{path}{A}": down, f"{START}{path}{B}": up}
        if method.dora:
            tensors[f"{START}{path}{M}"] = _magnitudes(own)
    return Written(_config(form, method, ranks, next(iter(modules.values()))[0][0]), tensors)


def _config(form: Acting, method: Any, ranks: Mapping[str, int], one: LinearSite) -> dict[str, Any]:
    rank = max(ranks.values())
    other = {path: own for path, own in ranks.items() if own != rank}
    keep = rank == method.r and not other  # else the scale is spelled out a module
    return {
        "r": rank,
        "lora_alpha": method.alpha if keep else method.scale * rank,
        "lora_dropout": method.dropout,
        "target_modules": shortest_names(form.model, list(ranks)),
        "use_rslora": method.rank_stabilised and keep,
        "use_dora": method.dora,
        "rank_pattern": other,
        "alpha_pattern": {path: method.scale * own for path, own in other.items()},
        "bias": "none",
        "fan_in_fan_out": isinstance(one.module, Conv1D),
        "init_lora_weights": True,
    }


def _together(own: list[tuple[LinearSite, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, in] and B [all out, r] of a module from those of its projections."""
    lows = [(site, getattr(part, "low", part)) for site, part in own]
    site, first = lows[0]
    if site.span is None:
        return first.A.detach(), first.B.detach()
    shared = all(torch.equal(low.A, first.A) for _, low in lows)
    rank = first.A.shape[0]
    whole = first.B.new_zeros(rank if shared else rank * len(lows), whole_width(site))  # B, transposed
    for index, (one, low) in enumerate(lows):
        rows = slice(None) if shared else slice(index * rank, (index + 1) * rank)
        assert one.span is not None
        whole[rows] = one.span.put(whole[rows], low.B.detach().T)
    return (first.A if shared else torch.cat([low.A for _, low in lows])).detach(), whole.T.detach()


def _magnitudes(own: list[tuple[LinearSite, Any]]) -> torch.Tensor:
    """The magnitudes [all out] of a module; rows of projections without an update keep their own norm."""
    site, part = own[0]
    if site.span is None:
        return part.magnitude.detach()
    whole = site._in_out().detach().float().norm(dim=0)
    for one, member in own:
        assert one.span is not None
        whole = one.span.put(whole, member.magnitude.detach())
    return whole


KIND = Kind("LORA", ("lora",), read, write)

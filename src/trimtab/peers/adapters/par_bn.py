"""`par_bn` and `scaled_par_bn` of `adapters`: A = f + s · (W_up g(W_down x)), beside feed-forward; ours is `parallel`.

x is the residual stream there. In post-norm models that is what feed-forward reads; in pre-norm models a norm stands
between them, and ours reads in front of it with `reads=stream`.
"""

from __future__ import annotations

from typing import Any

import torch

from trimtab.errors import UserError
from trimtab.methods import Parallel
from trimtab.peers.adapters.bottleneck import SCALING, bottleneck_state, common_fields, take_bottlenecks
from trimtab.peers.adapters.bottleneck import write_bottlenecks as write_all
from trimtab.peers.adapters.places import bottleneck_holders
from trimtab.peers.folder import Folder
from trimtab.peers.kinds import Acting, Found, Kind, Model, Written
from trimtab.sites import ActivationSite, Sites


def read(folder: Folder, place: Model) -> Found:
    """Raises UserError for adapters beside attention."""
    taken = take_bottlenecks(folder, place, ("feedforward",), "parallel")
    own: dict[str, Any] = {"scale": float(taken[0].scale) if taken[0].scale.dim() == 0 else 1.0}
    if folder.config.get(SCALING) == "learned":
        own = {"learn_scale": True}
    elif folder.config.get(SCALING) == "channel":
        taken = [one.scaled() for one in taken]
    own["reads"] = "stream" if _pre_norm([one.site for one in taken]) else "branch"
    method = Parallel(**common_fields(folder, taken, place.sites), **own)
    state = bottleneck_state(taken, method.size or 0)
    if method.learn_scale:
        state |= {f"{one.site.key}.scale": one.scale for one in taken}
    return Found(method, state)


def write(form: Acting) -> Written:
    """Raises UserError where the bottlenecks read what theirs do not."""
    parts = form.of(ActivationSite)
    if form.method.reads != "stream" and _pre_norm(list(parts)):
        raise UserError(
            "adapters' parallel bottlenecks read the residual stream, these what feed-forward reads behind its norm; "
            "train with parallel[reads=stream] to write them for adapters"
        )
    learned = form.method.learn_scale
    own = {"original_ln_before": False, "is_parallel": True, "scaling": "learned" if learned else form.method.scale}
    written = write_all(form, form.method.activation, {**own, "init_weights": "mam_adapter"})
    return Written(written.config, {**written.tensors, **(_scales(form, parts) if learned else {})})


def _scales(form: Acting, parts: dict[ActivationSite, Any]) -> dict[str, torch.Tensor]:
    holders = {site.key: holder for holder, site in bottleneck_holders(form.model, Sites(form.model))}
    return {f"{holders[site.key]}.adapters.{SCALING}": part.scale.reshape(1) for site, part in parts.items()}


def _pre_norm(sites: list[ActivationSite]) -> bool:
    """Whether a norm stands between the stream and what the branch reads."""
    return any(site.stream is not site.reads for site in sites)


KIND = Kind("par_bn", ("parallel",), read, write)

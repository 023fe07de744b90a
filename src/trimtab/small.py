"""A small pretrained model that stands beside the base: where it comes from, which of its modules make its states, and
what an adapter's folder says of it. Knows transformers' loaders and configurations; refuses to know methods and what
becomes of the states.

A folder holds the small model's configuration beside its trained weights, so that nothing is read from where the small
model once came from when an adapter is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from trimtab.checkpoint import model_fingerprint
from trimtab.copies import dropouts
from trimtab.errors import UserError
from trimtab.models import config_of, empty_body, load_body, load_config, portable
from trimtab.sites import Module, Sites, StatesSite

_IDLE = {
    "pooler": None,
    "project_out": None,
    "post_layernorm": nn.Identity,
    "embeddings.mask_token": None,
}
"""What makes no part of a model's states, by its path from the stack, and what stands there instead: poolers, OPT's
projection behind the final norm, CLIP's norm of the pooled output, vision models' token for hidden patches."""


@dataclass(frozen=True)
class Small:
    """One small model."""

    source: str
    sites: Sites
    said: Mapping[str, Any]
    """What an adapter's folder says of it."""

    @property
    def site(self) -> StatesSite:
        """Its only stack."""
        return self.sites.states[0]

    @property
    def body(self) -> Module:
        """The module that makes its states."""
        return self.site.body


def load_small(source: str) -> Small:
    """The small model of a source, with its weights. Raises UserError where there is none or it cannot be used."""
    model = load_body(source)
    small = _small(source, model)
    said = {
        "path": portable(source),
        "class": type(small.body).__name__,
        "model_type": small.body.config.model_type,
        "fingerprint": model_fingerprint(model),
        "config": json.loads(small.body.config.to_json_string()),
    }
    return replace(small, said=said)


def small_from(said: Mapping[str, Any], room: int | None = None) -> Small:
    """The small model that an adapter's folder describes, its weights to be loaded.

    Raises UserError for a broken description, and for one of far more numbers than the folder has, before they are
    made.
    """
    source = str(said.get("path"))
    if room is not None and _size(source, config_of(said.get("config")))[0] > room:
        raise UserError(f"the small model {source!r} is described with far more numbers than the adapter has")
    return replace(_small(source, empty_body(config_of(said.get("config")))), said=said)


def small_size(source: str) -> tuple[int, int]:
    """The number of parameters that make the states of a source's model, and their width; no weight is read.

    Raises UserError where there is no such model.
    """
    return _size(source, load_config(source))


def _size(source: str, config: PreTrainedConfig) -> tuple[int, int]:
    small = _small(source, empty_body(config, "meta"))
    return sum(weight.numel() for weight in small.body.parameters()), small.site.width


def _small(source: str, model: PreTrainedModel) -> Small:
    """The model's stack without what makes no states and without dropout, all of it to be trained."""
    sites = Sites(model)
    if len(sites.states) != 1:
        raise UserError(f"{source!r} is an encoder-decoder; model= takes an encoder, a decoder or a vision model")
    small = Small(source, sites, {})
    for path, instead in _IDLE.items():
        owner, _, name = path.rpartition(".")
        holder = getattr(small.body, owner, None) if owner else small.body
        if getattr(holder, name, None) is not None:
            setattr(holder, name, None if instead is None else instead())
    if not all(weight.is_floating_point() for weight in small.body.parameters()):
        raise UserError(f"{source!r} is quantised, and a side network is trained; give the model in plain weights")
    for module, name, _ in dropouts(small.body):
        setattr(module, name, 0.0)
    small.body.requires_grad_(True)
    return small

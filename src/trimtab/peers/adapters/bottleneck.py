"""The bottlenecks of `adapters`: `<module>.adapters.NAME.adapter_down.0` [size, width] and `.adapter_up` [width, size],
and `.scaling` [1] or [width] where that is trained. Knows what its three kinds of them have in common.

Ours have one size: smaller ones are filled up with zeros, which changes nothing because every activation keeps zero at
zero. A scale of a sequential adapter goes into the upper projection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from trimtab.errors import UserError, unknown
from trimtab.methods.bottleneck import Bottleneck
from trimtab.peers.adapters.places import bottleneck_holders, layer_numbers
from trimtab.peers.folder import Folder
from trimtab.peers.kinds import Acting, Model, Written, layer_spec
from trimtab.sites import ActivationSite, NormSite, Sites

TENSORS = {
    "adapter_down.0.weight": "down.weight",
    "adapter_down.0.bias": "down.bias",
    "adapter_up.weight": "up.weight",
    "adapter_up.bias": "up.bias",
}
SCALING = "scaling"
READ = {"relu": "relu", "swish": "swish", "silu": "swish", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu"}
WRITTEN = {"relu": "relu", "swish": "swish", "gelu": "gelu_new"}
"""Ours is GELU's approximation by tanh; what they call gelu is not."""
REFUSED = ("ln_before", "ln_after", "use_gating", "phm_layer", "inv_adapter")
BRANCHES = {"attention": "mh_adapter", "feedforward": "output_adapter", "cross": "cross_adapter"}
"""Ours, and the flag that they have for it."""


@dataclass
class Taken:
    """The bottleneck of one branch."""

    site: ActivationSite
    tensors: dict[str, torch.Tensor]
    """By our names."""
    scale: torch.Tensor
    """[] or [width]"""

    @property
    def size(self) -> int:
        return self.tensors["down.weight"].shape[0]

    def filled(self, size: int) -> dict[str, torch.Tensor]:
        """The tensors at a larger size."""
        more = size - self.size
        return {
            "down.weight": F.pad(self.tensors["down.weight"], (0, 0, 0, more)),
            "down.bias": F.pad(self.tensors["down.bias"], (0, more)),
            "up.weight": F.pad(self.tensors["up.weight"], (0, more)),
            "up.bias": self.tensors["up.bias"],
        }

    def scaled(self) -> Taken:
        """The same with the scale in the upper projection."""
        scale = self.scale.expand(self.tensors["up.bias"].shape)
        up = {
            "up.weight": self.tensors["up.weight"].float() * scale[:, None],
            "up.bias": self.tensors["up.bias"].float() * scale,
        }
        return Taken(self.site, {**self.tensors, **up}, torch.ones(()))


def take_bottlenecks(folder: Folder, place: Model, branches: Sequence[str], method: str) -> list[Taken]:
    """The bottlenecks of a folder. Raises UserError for options and branches that the method has not, and shapes."""
    folder.refuse_set(REFUSED, method)
    if not folder.flag("original_ln_after", True):
        raise UserError(
            f"{folder.path} leaves out the residual connection (original_ln_after), which trimtab never does"
        )
    found: list[Taken] = []
    for holder, site in bottleneck_holders(place.model, place.sites):
        if any(f"{holder}.adapters.{name}" in folder.tensors for name in TENSORS):
            if site.branch not in branches:
                raise UserError(
                    f"{folder.path} has adapters on {site.branch}; trimtab's {method} has them on {', '.join(branches)}"
                )
            found.append(_take(folder, holder, site))
    if not found:
        raise UserError(f"{folder.path} has no tensor of a bottleneck adapter for {place.sites.family.name}")
    return found


def _take(folder: Folder, holder: str, site: ActivationSite) -> Taken:
    start = f"{holder}.adapters."
    tensors = {ours: folder.take(start + theirs) for theirs, ours in TENSORS.items()}
    down, width = tensors["down.weight"], site.width
    if down.dim() != 2 or down.shape[1] != width or down.shape[0] < 1:
        raise folder.misshapen(f"{start}adapter_down.0.weight", down, f"[size, {width}]")
    size = down.shape[0]
    shapes = {"down.bias": (size,), "up.weight": (width, size), "up.bias": (width,)}
    for theirs, ours in TENSORS.items():
        if ours in shapes and tensors[ours].shape != shapes[ours]:
            raise folder.misshapen(start + theirs, tensors[ours], str(list(shapes[ours])))
    return Taken(site, tensors, _scale(folder, start, width))


def _scale(folder: Folder, start: str, width: int) -> torch.Tensor:
    """[] or [width]; a trained one is a tensor, a fixed one is in the configuration."""
    said = folder.config.get(SCALING, 1.0)
    if said not in ("learned", "channel"):
        return torch.tensor(folder.number(SCALING, 1.0))
    tensor, wanted = folder.take(start + SCALING), (1,) if said == "learned" else (width,)
    if tensor.shape != wanted:
        raise folder.misshapen(start + SCALING, tensor, str(list(wanted)))
    return tensor[0] if said == "learned" else tensor


def common_fields(folder: Folder, taken: Sequence[Taken], sites: Sites) -> dict[str, Any]:
    """The fields that our three methods share; the start changes nothing where the folder has no tensors."""
    return {
        "size": max(one.size for one in taken),
        "activation": _activation(folder),
        "layers": layer_spec(sites, {one.site.layer for one in taken}),
        "start": "zero",
    }


def _activation(folder: Folder) -> str:
    said = folder.text("non_linearity").lower()
    if said == "gelu":
        raise UserError(
            f"{folder.path} computes GELU itself, trimtab's adapters its approximation by tanh (gelu_new): not the same"
        )
    if said not in READ:
        raise unknown(f"{folder.path}: the non_linearity", said[:60], sorted(READ))
    return READ[said]


def bottleneck_state(taken: Sequence[Taken], size: int) -> dict[str, torch.Tensor]:
    """Our tensors."""
    return {f"{one.site.key}.adapter.{name}": tensor for one in taken for name, tensor in one.filled(size).items()}


def write_bottlenecks(form: Acting, activation: str, own: Mapping[str, Any]) -> Written:
    """Every bottleneck, and the configuration with a kind's own fields. Raises UserError for trained norms."""
    _check_norms(form)
    parts = form.of(ActivationSite)
    sites = Sites(form.model)
    by_key = {site.key: holder for holder, site in bottleneck_holders(form.model, sites)}
    tensors: dict[str, torch.Tensor] = {}
    for site, part in parts.items():
        adapter: Bottleneck = part.adapter
        state = adapter.state_dict()
        tensors |= {f"{by_key[site.key]}.adapters.{theirs}": state[ours] for theirs, ours in TENSORS.items()}
    site, part = next(iter(parts.items()))
    config = {
        **{flag: any(one.branch == branch for one in parts) for branch, flag in BRANCHES.items()},
        "reduction_factor": _reduction(site.width, part.adapter.down.weight.shape[0]),
        "non_linearity": WRITTEN[activation],
        "original_ln_after": True,
        "residual_before_ln": True,
        "adapter_residual_before_ln": False,
        **{"ln_before": False, "ln_after": False, "use_gating": False, "phm_layer": False, "inv_adapter": None},
        "leave_out": left_out(sites, {(one.stack, one.layer) for one in parts}),
        **own,
    }
    return Written(config, tensors)


def left_out(sites: Sites, present: set[tuple[str, int]]) -> list[int]:
    """The numbers of the layers without an adapter."""
    return [number for layer, number in layer_numbers(sites).items() if layer not in present]


def _reduction(width: int, size: int) -> float:
    """What width is divided by, rounded down, to give the size; away from a rounding error where it does not divide."""
    return width / size if width % size == 0 else width / (size + 0.5)


def _check_norms(form: Acting) -> None:
    for site, part in form.of(NormSite).items():
        own = dict(site.module.named_parameters())
        if any(not torch.equal(own[name], tensor.to(own[name].dtype)) for name, tensor in part.copy.named_parameters()):
            raise UserError(
                "adapters trains no norms, and this adapter has trained ones; train with norms=false for it"
            )

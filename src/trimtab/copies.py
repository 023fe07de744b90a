"""A module of an adapter's own: a trained copy of a head or a norm of the base, and dropout switched off. Knows nothing
of tasks or labels.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from trimtab.sites import HeadSite, NormSite

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")


def plain_copy(module: nn.Module) -> nn.Module:
    """A copy of a module without any hooks; its weights are untied from the base's."""
    without_hooks: dict[int, Any] = {
        id(getattr(inner, name)): OrderedDict() for inner in module.modules() for name in _HOOKS
    }
    return copy.deepcopy(module, without_hooks)


def dropouts(model: nn.Module) -> Iterator[tuple[nn.Module, str, float]]:
    """Every dropout and layer-drop probability: modules' `p` and float attributes (functional dropout)."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            names_dropout = "drop" in name or (name == "p" and isinstance(module, nn.modules.dropout._DropoutNd))
            if names_dropout and isinstance(value, float):
                yield module, name, value


def write_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy trained weights into the base's module of the same shape; one tied to the embeddings is untied first."""
    for name, weight in source.named_parameters():
        owner = target.get_submodule(name.rpartition(".")[0])
        old = getattr(owner, name.rpartition(".")[2])
        new = nn.Parameter(weight.detach().to(old.dtype).clone(), requires_grad=old.requires_grad)
        setattr(owner, name.rpartition(".")[2], new)


def _in_precision(value: Any, precision: torch.dtype) -> Any:
    return value.to(precision) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


class ModuleCopy(nn.Module):
    """y = copy(x), where `copy` starts as the base's module and is trained."""

    exclusive = True

    def __init__(self, module: nn.Module):
        super().__init__()
        self.copy = module.requires_grad_(True)

    @classmethod
    def of(cls, site: HeadSite) -> ModuleCopy:
        """A copy of the site's module."""
        return cls(plain_copy(site.module))

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The module's own signature, computed in the precision of the trained weights."""
        precision = next(self.copy.parameters()).dtype
        named = {name: _in_precision(value, precision) for name, value in kwargs.items()}
        return self.copy(*(_in_precision(value, precision) for value in args), **named)

    def resize(self, before: int, after: int) -> None:
        """Give the last projection, if it has `before` outputs, `after` of them; their values are to be loaded."""
        linears = [module for module in self.copy.modules() if isinstance(module, nn.Linear)]
        if linears and linears[-1].out_features == before != after:
            last, weight = linears[-1], linears[-1].weight
            last.out_features, last.weight = after, nn.Parameter(weight.new_zeros(after, last.in_features))
            if last.bias is not None:
                last.bias = nn.Parameter(weight.new_zeros(after))

    def write_into(self, module: nn.Module) -> None:
        """Copy the trained weights into the base's module."""
        write_weights(self.copy, module)


class NormCopy(nn.Module):
    """A normalisation with trained weights: y' = copy(x), whatever its kind (LayerNorm, RMSNorm, Gemma's 1 + w)."""

    exclusive = True

    def __init__(self, site: NormSite):
        super().__init__()
        self.copy = plain_copy(site.module).requires_grad_(True)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x [..., width] -> the normalised x under the trained weights"""
        if isinstance(
            self.copy, nn.LayerNorm
        ):  # the GPU's kernel takes one precision only; RMSNorms widen by themselves
            x = x.to(self.copy.weight.dtype)
        return self.copy(x).to(y.dtype)

    def write_into(self, module: nn.Module) -> None:
        """Copy the trained weights into the base's norm."""
        write_weights(self.copy, module)

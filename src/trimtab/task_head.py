"""A head of an adapter's own: a trained copy of the base's head module. Knows nothing of tasks or labels."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from trimtab.sites import HeadSite

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")


class HeadCopy(nn.Module):
    """logits = copy(hidden), where `copy` starts as the base's head module and is trained."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.copy = module.requires_grad_(True)

    @classmethod
    def of(cls, site: HeadSite) -> HeadCopy:
        """A copy of the site's module without any hooks; its weights are untied from the base's."""
        without_hooks: dict[int, Any] = {
            id(getattr(module, name)): OrderedDict() for module in site.module.modules() for name in _HOOKS
        }
        return cls(copy.deepcopy(site.module, without_hooks))

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The head's own signature: hidden states in, logits out."""
        return self.copy(*args, **kwargs)

    def write_into(self, module: nn.Module) -> None:
        """Copy the trained weights into the base's head. A weight tied to the embeddings is untied first."""
        for name, weight in self.copy.named_parameters():
            owner = module.get_submodule(name.rpartition(".")[0])
            old = getattr(owner, name.rpartition(".")[2])
            new = nn.Parameter(weight.detach().to(old.dtype).clone(), requires_grad=old.requires_grad)
            setattr(owner, name.rpartition(".")[2], new)

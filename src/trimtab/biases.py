"""Biases that merging gave to projections which had none. Knows configurations' flags for them; refuses to know
methods.

A class of transformers makes a bias only where the configuration says so (LLaMA: `attention_bias`, `mlp_bias`), or
never.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import chain, combinations
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def declare_biases(model: PreTrainedModel) -> list[str]:
    """Let the configuration say which biases the model has, so that its class makes them when it is loaded again.

    A bias that comes with a flag and is not there yet is made, of zeros. Returns the names of those that no flag of the
    class makes; then nothing changed.
    """
    there = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    added = there - _parameters(model, ())
    flags = [key for key, value in model.config.to_dict().items() if key.endswith("bias") and value is False]
    if not added:
        return []
    if not added <= _parameters(model, flags):
        return sorted(added)
    for chosen in chain.from_iterable(combinations(flags, count) for count in range(1, len(flags) + 1)):
        made = _parameters(model, chosen)
        if added <= made and all(name.endswith(".bias") for name in made - there):
            _make(model, sorted(made - there))
            for flag in chosen:
                setattr(model.config, flag, True)
            return []
    return sorted(added)


def _parameters(model: PreTrainedModel, flags: Sequence[str]) -> set[str]:
    """The names of the parameters that the model's class makes with these flags on."""
    config = copy.deepcopy(model.config)
    for flag in flags:
        setattr(config, flag, True)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        made: Any = type(model)(config)
    return {name for name, _ in made.named_parameters(remove_duplicate=False)}


def _make(model: PreTrainedModel, names: Sequence[str]) -> None:
    for name in names:
        module: Any = model.get_submodule(name.removesuffix(".bias"))
        module.bias = nn.Parameter(module.weight.new_zeros(module.weight.shape[0]), requires_grad=False)

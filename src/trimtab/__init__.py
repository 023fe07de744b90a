"""trimtab: every parameter-efficient tuning method under one contract, on any transformers model.

Names are imported when they are first used, so that the command line can answer without loading torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.adapter import Adapter, adapters, attach
    from trimtab.checkpoint import load
    from trimtab.contract import Method
    from trimtab.errors import UserError
    from trimtab.methods import METHODS, Full, Head, LoRA, Prompt, Union
    from trimtab.train import Trainer

_HOME = {
    "Adapter": "adapter",
    "adapters": "adapter",
    "attach": "adapter",
    "load": "checkpoint",
    "Method": "contract",
    "UserError": "errors",
    "METHODS": "methods",
    "Full": "methods",
    "Head": "methods",
    "LoRA": "methods",
    "Prompt": "methods",
    "Union": "methods",
    "Trainer": "train",
}

__all__ = [
    "METHODS",
    "Adapter",
    "Full",
    "Head",
    "LoRA",
    "Method",
    "Prompt",
    "Trainer",
    "Union",
    "UserError",
    "adapters",
    "attach",
    "load",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'trimtab' has no attribute {name!r}")
    return getattr(import_module(f"trimtab.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])

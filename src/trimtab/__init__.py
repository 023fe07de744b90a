"""trimtab: every parameter-efficient tuning method under one contract, on any transformers model.

Names are imported when they are first used, so that the command line can answer without loading torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.adapter import Adapter, adapters, attach
    from trimtab.bank import Bank
    from trimtab.checkpoint import load
    from trimtab.combining import combine
    from trimtab.comparison.results import Comparison
    from trimtab.comparison.steps import compare
    from trimtab.contract import Method
    from trimtab.conversion import convert
    from trimtab.errors import UserError
    from trimtab.methods import (
        IA3,
        METHODS,
        AdaMix,
        AutoPrompt,
        BitFit,
        DiffPruning,
        Full,
        Head,
        Houlsby,
        Ladder,
        LayerNorm,
        LlamaAdapter,
        LlamaAdapterV2,
        LoRA,
        Mask,
        Parallel,
        Pfeiffer,
        Prefix,
        Prompt,
        PTuning,
        PTuningV2,
        Side,
        Union,
    )
    from trimtab.searching.results import SearchResult
    from trimtab.searching.steps import search
    from trimtab.settings import TrainSettings
    from trimtab.train import fine_tune
    from trimtab.trainer import Trainer
    from trimtab.tuned import evaluate_run, load_run

_HOME = {
    "Adapter": "adapter",
    "adapters": "adapter",
    "attach": "adapter",
    "combine": "combining",
    "convert": "conversion",
    "Bank": "bank",
    "Comparison": "comparison.results",
    "compare": "comparison.steps",
    "load": "checkpoint",
    "Method": "contract",
    "SearchResult": "searching.results",
    "search": "searching.steps",
    "UserError": "errors",
    "TrainSettings": "settings",
    "Trainer": "trainer",
    "evaluate_run": "tuned",
    "fine_tune": "train",
    "load_run": "tuned",
}

__all__ = [
    "IA3",
    "METHODS",
    "AdaMix",
    "Adapter",
    "AutoPrompt",
    "Bank",
    "BitFit",
    "Comparison",
    "DiffPruning",
    "Full",
    "Head",
    "Houlsby",
    "Ladder",
    "LayerNorm",
    "LlamaAdapter",
    "LlamaAdapterV2",
    "LoRA",
    "Mask",
    "Method",
    "PTuning",
    "PTuningV2",
    "Parallel",
    "Pfeiffer",
    "Prefix",
    "Prompt",
    "SearchResult",
    "Side",
    "TrainSettings",
    "Trainer",
    "Union",
    "UserError",
    "adapters",
    "attach",
    "combine",
    "compare",
    "convert",
    "evaluate_run",
    "fine_tune",
    "load",
    "load_run",
    "search",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME and not name[:1].isupper():
        raise AttributeError(f"module 'trimtab' has no attribute {name!r}")
    return getattr(import_module(f"trimtab.{_HOME.get(name, 'methods')}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])

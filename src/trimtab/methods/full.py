"""Full fine-tuning: the baseline that parameter-efficient methods are measured against.

    θ ← θ − η ∇L,     every parameter of the base is trained

The model that it is attached to changes (attach it to a copy to keep the base), and it is saved as a model folder, not
as an adapter.
Trained parameters: all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trimtab.contract import Context, Parts
from trimtab.sites import Sites


@dataclass(frozen=True)
class Full:
    """Trains every parameter of the model itself."""

    name: ClassVar[str] = "full"
    kinds: ClassVar[frozenset[str]] = frozenset()
    lr: ClassVar[float] = 5e-5
    mergeable: ClassVar[bool] = False
    whole_model: ClassVar[bool] = True
    formula: ClassVar[str] = "all"
    paper: ClassVar[str] = "baseline"

    def build(self, sites: Sites, context: Context) -> Parts:
        """No parts: the frame makes the base's own parameters trainable."""
        return {}

    def parameter_count(self, sites: Sites) -> int:
        """No parameters of its own."""
        return 0

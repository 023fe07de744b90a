"""Head only: a linear probe, the baseline that every other method must beat.

    logits = head(base(x)),     only the head is trained

On a classification model the head is its classifier; on a language model it is a copy of the vocabulary projection
(untied from the embeddings, which stay as they are). Trained parameters: those of the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trimtab.contract import Context, Parts
from trimtab.copies import ModuleCopy
from trimtab.errors import UserError
from trimtab.sites import Sites


@dataclass(frozen=True)
class Head:
    """Trains the task head alone, over the frozen base."""

    name: ClassVar[str] = "head"
    kinds: ClassVar[frozenset[str]] = frozenset({"head"})
    lr: ClassVar[float] = 1e-3
    mergeable: ClassVar[bool] = True
    formula: ClassVar[str] = "the head's own"
    paper: ClassVar[str] = "baseline"

    def build(self, sites: Sites, context: Context) -> Parts:
        """A copy of every head module. Raises UserError where the model has no head."""
        if not sites.head:
            raise UserError(f"head: this {sites.family.name} model has no head; load it as a model for classification")
        return {site: ModuleCopy.of(site) for site in sites.head}

    def parameter_count(self, sites: Sites) -> int:
        """The parameters of the head modules."""
        return sum(weight.numel() for site in sites.head for weight in site.module.parameters())

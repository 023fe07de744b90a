"""Many adapters on one base model, one of them acting. Knows adapters by name; refuses to know methods and tasks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedModel

from trimtab.adapter import Adapter, adapters, use_base
from trimtab.checkpoint import load
from trimtab.errors import unknown


class Bank:
    """The adapters of one model by name: `bank.add("topics", folder)`, `bank.use("topics")`, `bank.use(None)`.

    Each adapter keeps a task head of its own, with as many classes as it was trained for; while it acts, the model's
    `config.id2label` names them. The base's weights are shared and never change. What is attached to the model already
    belongs to the bank, too.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def __repr__(self) -> str:
        return f"Bank({', '.join(self.names) or 'empty'}; acting: {self.active})"

    def __len__(self) -> int:
        return len(adapters(self.model))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __contains__(self, name: object) -> bool:
        return name in adapters(self.model)

    def __getitem__(self, name: str) -> Adapter:
        """The adapter of this name. Raises UserError for one that is not there."""
        found = adapters(self.model)
        if name not in found:
            raise unknown("adapter", name, found)
        return found[name]

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names, in the order in which they came."""
        return tuple(adapters(self.model))

    @property
    def active(self) -> str | None:
        """The name of the adapter that acts; None for the frozen base."""
        return next((name for name, adapter in adapters(self.model).items() if adapter.active), None)

    def add(self, name: str, folder: str | Path, *, force: bool = False) -> Adapter:
        """Load an adapter folder under a name; which adapter acts stays as it was, the first one added acts.

        Raises UserError as `trimtab.load`, and for a name that is taken; then the bank is as it was.
        """
        before, first = self.active, len(self) == 0
        try:
            return load(self.model, folder, name, force=force)
        finally:
            if not first:
                self.use(before)

    def use(self, name: str | None) -> None:
        """Let this adapter act, or with None the frozen base. Raises UserError for a name that is not there."""
        if name is not None:
            self[name].activate()
        elif len(self):
            use_base(self.model)

    def remove(self, name: str) -> None:
        """Take an adapter off the model; the others stay. Raises UserError for a name that is not there."""
        self[name].detach()

"""What a model says of its classes: their names, their number, the kind of its loss. Knows configurations; refuses to
know heads, adapters and methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel


def label_names(model: PreTrainedModel) -> tuple[str, ...]:
    """The names of a model's classes, in order."""
    names: Any = model.config.id2label or {}
    return tuple(names[index] for index in sorted(names))


class LabelSetting:
    """Lets the model speak of an adapter's classes while that adapter acts, and of its own otherwise.

    transformers' losses and pipelines read them off the configuration, and some classes keep their number as well.
    """

    def __init__(self, model: PreTrainedModel):
        self.model: Any = model
        self.own = label_names(model)
        self.problem = model.config.problem_type

    def set(self, names: Sequence[str]) -> None:
        """Speak of these classes."""
        names, config = tuple(names), self.model.config
        if names == label_names(self.model):
            return
        config.id2label = dict(enumerate(names))
        config.label2id = {name: index for index, name in enumerate(names)}
        config.problem_type = self.problem if names == self.own else None  # transformers finds it by the labels
        if "num_labels" in vars(self.model):
            self.model.num_labels = len(names)

"""The task `classify` of vision models. Knows labels and metrics; refuses to know how pictures are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from trimtab.data import column
from trimtab.errors import UserError, unknown
from trimtab.examples import IGNORED, Asked, Reading, encode_one
from trimtab.forms import Row
from trimtab.metrics import classification_metrics
from trimtab.pictures import digest, value_in
from trimtab.scoring import Run, gold_loss, head_logits
from trimtab.tasks.rows import class_names, each, label_text, sort_labels
from trimtab.tasks.task import Wishes, config_of
from trimtab.templates import value_of

if TYPE_CHECKING:
    from trimtab.data import Rows
    from trimtab.processor import Shown


@dataclass(frozen=True)
class Labelled:
    """A picture as a vision model reads it, and its class."""

    shown: Shown
    labels: int
    target: int
    """The class again, as metrics read it; -100 where it is not known."""

    @property
    def pixel_values(self) -> Tensor:
        """[channels, height, width]"""
        return self.shown.pixel_values

    @property
    def patches(self) -> int:
        """How long the model's sequence is."""
        return self.shown.patches


@dataclass(frozen=True)
class ClassifyPictures:
    """Which of a few labels a picture has, by a vision model's task head."""

    labels: tuple[str, ...]
    """The classes in order; a class index is an index into this."""
    image_column: str = "image"
    """The column of the pictures."""
    label_column: str = "label"
    """The column of the labels, possibly nested."""
    numbered: bool = False
    """Whether rows hold class numbers, as hub datasets do that know the names."""

    name: ClassVar[str] = "classify"
    kinds: ClassVar[tuple[str, ...]] = ("vision",)
    head: ClassVar[str | None] = "pictures"
    takes: ClassVar[frozenset[str]] = frozenset({"image_column"})
    writes: ClassVar[bool] = False
    measures: ClassVar[tuple[str, ...]] = ("accuracy", "macro_f1", "mcc", "loss")

    @classmethod
    def prepare(cls, rows: Rows, kind: str, wishes: Wishes) -> ClassifyPictures:
        """Finds the labels. Raises UserError for a row without label, for fewer than two, and for a column of texts."""
        if wishes.text_column:
            raise UserError(
                f"text_column={wishes.text_column!r} names a column of texts, but a vision model reads pictures; "
                "give image_column"
            )
        image_column, label_column = wishes.image_column or "image", wishes.label_column or "label"
        values = column(rows, label_column)
        names = class_names(rows, label_column)
        labels = names or sort_labels(each(lambda value: label_text(value, label_column), values))
        value_in(rows[0], image_column)
        return cls(tuple(labels), image_column, label_column, numbered=names is not None)

    def __post_init__(self) -> None:
        if len(set(self.labels)) < 2:
            found = f"only {self.labels[0]!r}" if self.labels else "none"
            raise UserError(
                f"classification needs at least two different labels, column {self.label_column!r} has {found}"
            )

    def index(self, row: Row) -> int:
        """The class of a row. Raises UserError for a label outside the set."""
        label = label_text(value_of(row, self.label_column), self.label_column)
        if label in self.labels:
            return self.labels.index(label)
        if self.numbered and label.isdigit() and int(label) < len(self.labels):
            return int(label)
        raise unknown("label", label, self.labels)

    def inputs(self, row: Row) -> str:
        """A digest of the picture, to tell duplicates by."""
        return digest(value_in(row, self.image_column))

    def question(self, text: str) -> Row:
        """There is none of a text alone. Raises UserError."""
        raise UserError(f"this model reads pictures and no text ({text!r}); give one: --image FILE")

    def shown(self, image: Any) -> Row:
        """A row without a label for a picture alone."""
        return {self.image_column: image}

    def encode(self, row: Row | str, tokenizer: Any, max_length: int, kind: str) -> Labelled:
        """One example (see `encode_all`)."""
        return encode_one(self, row, tokenizer, max_length, kind)

    def examples(self, rows: Sequence[Asked], reading: Reading) -> list[Labelled]:
        """One a row. Raises UserError for a picture that cannot be read."""
        return [self._example(asked, reading) for asked in rows]

    def _example(self, asked: Asked, reading: Reading) -> Labelled:
        with asked.named():
            shown = reading.tokenizer.show(value_in(asked.row, self.image_column))
            index = IGNORED if asked.asking else self.index(asked.row)
        return Labelled(shown, index, index)

    def objective(self, tokenizer: Any, kind: str) -> None:
        """The labels say what is learned."""

    def score(self, run: Run, examples: Sequence[Labelled], max_new_tokens: int | None) -> dict[str, float]:
        """accuracy, macro_f1, mcc and the loss of the gold classes."""
        scores, loss = self.scores(run, examples)
        gold = [example.target for example in examples]
        return {**classification_metrics(scores.argmax(1).tolist(), gold, len(self.labels)), "loss": loss}

    def answers(self, run: Run, examples: Sequence[Labelled], max_new_tokens: int) -> list[str]:
        """The most likely label of each."""
        return [self.labels[index] for index in self.scores(run, examples)[0].argmax(1).tolist()]

    def scores(self, run: Run, examples: Sequence[Labelled]) -> tuple[Tensor, float]:
        """log p [examples, classes], and the mean loss of the gold classes (nan if none is known)."""
        scores = [F.log_softmax(row, dim=-1) for row in head_logits(run, examples)]
        sizes = [[1] * len(self.labels)] * len(examples)
        return torch.stack(scores), gold_loss(scores, [example.target for example in examples], sizes)

    def to_config(self) -> dict[str, Any]:
        """What `task_from_config` makes the same task from."""
        return config_of(self)

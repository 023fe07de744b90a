"""The task `regress`. Knows its numbers and its metrics; refuses to know how models are run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from trimtab.data import column
from trimtab.drafts import drafted
from trimtab.errors import UserError
from trimtab.examples import Asked, Example, Reading, encode_one
from trimtab.forms import Draft, Form, Row, Templated
from trimtab.metrics import regression_metrics
from trimtab.scoring import Run, head_logits
from trimtab.tasks.rows import each
from trimtab.tasks.task import Wishes, config_of
from trimtab.templates import check_template, fill, placeholders, value_of
from trimtab.tokens import Codec

if TYPE_CHECKING:
    from trimtab.data import Rows


@dataclass(frozen=True)
class Regress:
    """Which number a text has, by an encoder's head with one output; the loss is the squared error."""

    template: str = "{text}"
    """What the model reads, with columns in braces; `{text}` is the text column."""
    text_column: str = "text"
    """The column of the texts, possibly nested."""
    label_column: str = "label"
    """The column of the numbers, possibly nested."""

    name: ClassVar[str] = "regress"
    kinds: ClassVar[tuple[str, ...]] = ("encoder",)
    head: ClassVar[str | None] = "regression"
    takes: ClassVar[frozenset[str]] = frozenset({"template"})
    writes: ClassVar[bool] = False
    measures: ClassVar[tuple[str, ...]] = ("pearson", "spearman", "mse")
    in_chat: ClassVar[bool] = False

    def __post_init__(self) -> None:
        placeholders(self.template)

    @classmethod
    def prepare(cls, rows: Rows, kind: str, wishes: Wishes) -> Regress:
        """Checks every number. Raises UserError for a row without one, and where all are the same."""
        task = cls(wishes.template or cls.template, wishes.text_column or "text", wishes.label_column or "label")
        check_template(task.template, rows[0], task.text_column, task.label_column)
        numbers = set(each(lambda value: number_of(value, task.label_column), column(rows, task.label_column)))
        if len(numbers) < 2:
            found = f"column {task.label_column!r} has only {numbers.pop():g}"
            raise UserError(f"regression needs at least two different numbers, {found}")
        task.inputs(rows[0])
        return task

    def inputs(self, row: Row) -> str:
        """What the model may see of a row, to tell duplicates by."""
        return self._form.inputs(row)

    def question(self, text: str) -> Row:
        """A row without a number for a text alone."""
        return self._form.question(text)

    def draft(self, row: Row, codec: Codec, asking: bool) -> Draft:
        """The row as strings; its number is nan if `asking`."""
        number = math.nan if asking else number_of(value_of(row, self.label_column), self.label_column)
        return Draft(fill(self.template, row, self.text_column), [], number)

    def ends(self, codec: Codec) -> bool:
        """There is no answer to end."""
        return False

    def room(self, codec: Codec) -> int:
        """Nothing follows the text."""
        return 0

    def encode(self, row: Row | str, tokenizer: Any, max_length: int, kind: str) -> Example:
        """One example; of a text alone with nothing to learn in it (see `encode_all`)."""
        return encode_one(self, row, tokenizer, max_length, kind)

    def examples(self, rows: Sequence[Asked], reading: Reading) -> list[Example]:
        """One a row."""
        return drafted(self, rows, reading)

    def score(self, run: Run, examples: Sequence[Example], max_new_tokens: int | None) -> dict[str, float]:
        """pearson, spearman, mse, and the loss, which is the mse."""
        gold: list[Any] = [example.target for example in examples]
        found = regression_metrics(_numbers(run, examples), gold)
        return {**found, "loss": found["mse"]}

    def answers(self, run: Run, examples: Sequence[Example], max_new_tokens: int) -> list[str]:
        """The number of each, to six digits."""
        return [f"{number:.6g}" for number in _numbers(run, examples)]

    def objective(self, tokenizer: Any, kind: str) -> None:
        """The labels say what is learned."""

    def to_config(self) -> dict[str, Any]:
        """What `task_from_config` makes the same task from."""
        return config_of(self)

    @property
    def _form(self) -> Form:
        return Templated(self.template, self.text_column, self.label_column)


def _numbers(run: Run, examples: Sequence[Example]) -> list[float]:
    return [float(row) for row in head_logits(run, examples)]


def number_of(value: object, name: str) -> float:
    """A number, or a text that is one. Raises UserError, naming the column, for anything else and for nan and inf."""
    if value is None or value == "":
        raise UserError(f"column {name!r} has no number")
    if isinstance(value, (list, Mapping)):
        raise UserError(f"column {name!r} holds a {type(value).__name__}, not a number")
    try:
        found = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (ValueError, TypeError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise UserError(f"column {name!r} holds {value!r}, not a finite number")
    return found

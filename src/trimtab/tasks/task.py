"""What a task is: it formats an example and scores an answer. Knows no task, no model and no token."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from trimtab.errors import UserError
from trimtab.examples import Asked, Reading
from trimtab.forms import Row

if TYPE_CHECKING:
    from trimtab.data import Rows
    from trimtab.objectives import Objective
    from trimtab.scoring import Run


@dataclass(frozen=True)
class Wishes:
    """What a user may say of a task; None (and no chat) where the task chooses."""

    text_column: str | None = None
    context_column: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    choices_column: str | None = None
    template: str | None = None
    chat: bool = False
    label_words: Mapping[str, str] | None = None
    stage_column: str | None = None

    def check(self, name: str, takes: Mapping[str, frozenset[str]]) -> None:
        """Raises UserError for a wish that means nothing to the task called `name`; `takes` says to which it does."""
        for wish, said in _SAID.items():
            if getattr(self, wish) and wish not in takes[name]:
                others = [task for task, wishes in takes.items() if wish in wishes]
                raise UserError(f"{said} to the task{'s' * (len(others) > 1)} {', '.join(others)}, not to {name}")


_SAID = {
    "label_words": "label words belong",
    "template": "a template belongs",
    "chat": "chat belongs",
    "choices_column": "a column of choices belongs",
    "context_column": "a column of contexts belongs",
    "image_column": "a column of pictures belongs",
    "stage_column": "a column of stages belongs",
}


class Task(Protocol):
    """A frozen dataclass that says what rows are for."""

    name: ClassVar[str]
    """The task's name in settings."""
    kinds: ClassVar[tuple[str, ...]]
    """The kinds of models that can do it."""
    head: ClassVar[str | None]
    """What an encoder gets on top, as models.py names it; None where encoders cannot do it."""
    takes: ClassVar[frozenset[str]]
    """The wishes, besides both columns, that mean something to it."""
    writes: ClassVar[bool]
    """Whether answers are generated, so that a prompt must leave room for them."""

    @property
    def measures(self) -> tuple[str, ...]:
        """The names of the metrics that runs may be compared by, the usual one first."""

    @classmethod
    def prepare(cls, rows: Rows, kind: str, wishes: Wishes) -> Task:
        """The task that rows are for. Raises UserError for columns, templates and labels that cannot be used."""

    def inputs(self, row: Row) -> str:
        """What the model may see of a row, to tell duplicates by."""

    def question(self, text: str) -> Row:
        """A row without an answer for a text alone."""

    def examples(self, rows: Sequence[Asked], reading: Reading) -> list[Any]:
        """The rows' examples, in order."""

    def encode(self, row: Row | str, tokenizer: Any, max_length: int, kind: str) -> Any:
        """One example; of a text alone with nothing to learn in it (see `encode_all`)."""

    def score(self, run: Run, examples: Sequence[Any], max_new_tokens: int | None) -> dict[str, float]:
        """The metrics of labelled examples, the loss among them."""

    def answers(self, run: Run, examples: Sequence[Any], max_new_tokens: int) -> list[str]:
        """What the model answers to each example, labelled or not."""

    def objective(self, tokenizer: Any, kind: str) -> Objective | None:
        """What is learned where labels alone do not say it; None where they do."""

    def to_config(self) -> dict[str, Any]:
        """What `task_from_config` makes the same task from."""


def config_of(task: Any) -> dict[str, Any]:
    """The name and the fields of a task, as JSON has them."""
    fields = {
        key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(task).items()
    }
    return {"name": task.name, **fields}

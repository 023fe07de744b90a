"""The examples of a run: rows, task, both sides of the split. Knows data, tasks and tokenizers; refuses to know methods
and training."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from trimtab.bars import progress
from trimtab.beams import GREEDY, Search, check_search
from trimtab.data import hold_out, home, limit, load_rows
from trimtab.errors import UserError
from trimtab.evaluate import BATCH_TOKENS, evaluate
from trimtab.methods.spec import parse_method
from trimtab.models import Kind, kind_of, load_tokenizer
from trimtab.pictures import located
from trimtab.processor import load_processor
from trimtab.row_pictures import COLUMN
from trimtab.scoring import Run
from trimtab.settings import TrainSettings
from trimtab.tasks import Task, all_inputs, encode_all, prepare, task_class
from trimtab.templates import pseudo_tokens, without_pseudo


@dataclass(frozen=True)
class Data:
    """A run's examples and what reads them."""

    kind: Kind
    tokenizer: Any
    """Of a vision model its image processor."""
    task: Task
    train: list[Any]
    held_out: list[Any]
    plain: list[Any]
    """The held-out examples as the frozen base can read them: without the template's pseudo tokens."""
    search: Search = GREEDY
    max_new_tokens: int | None = None

    def evaluate(self, model: PreTrainedModel, show: bool | None) -> dict[str, float]:
        """The task's metrics on the held-out examples."""
        return self._evaluate(model, self.held_out, show)

    def evaluate_base(self, model: PreTrainedModel, show: bool | None) -> dict[str, float]:
        """The same of the frozen base."""
        return self._evaluate(model, self.plain, show)

    def marked(self, model: PreTrainedModel, show: bool | None) -> tuple[dict[str, float], list[float] | None]:
        """The metrics, and how right each held-out example's answer is, the mean being the accuracy.

        None where the task has no such number for a single example.
        """
        marked = getattr(self.task, "marked", None)  # of a task that has one
        if marked is None:
            return self.evaluate(model, show), None
        metrics, marks = marked(Run(model, self.tokenizer, self.kind, BATCH_TOKENS, show, self.search), self.held_out)
        return {**metrics, "examples": len(self.held_out)}, marks

    def _evaluate(self, model: PreTrainedModel, examples: list[Any], show: bool | None) -> dict[str, float]:
        how: Any = {"max_new_tokens": self.max_new_tokens, "search": self.search, "show": show}
        return evaluate(model, self.tokenizer, self.task, examples, self.kind, **how)


@dataclass(frozen=True)
class Source:
    """A run's rows and what they are for."""

    rows: Any
    kind: Kind
    task: Task

    @property
    def pseudo_tokens(self) -> int:
        """How many the task's template has."""
        return pseudo_tokens(getattr(self.task, "template", ""))


def find_task(settings: TrainSettings) -> Source:
    """The rows and the task of settings. Raises UserError for everything that is wrong with them."""
    kind = kind_of(settings.model, settings.task, settings.template)
    if kind == "vision":
        check_pictures(settings)
    pictures = image_column(settings, kind)
    rows = load_rows_of(settings.data, pictures)
    task = prepare(
        settings.task,
        rows,
        kind=kind,
        text_column=settings.text_column,
        context_column=settings.context_column,
        image_column=settings.image_column if kind == "vision" else pictures,
        stage_column=settings.stage_column,
        label_column=settings.label_column,
        choices_column=settings.choices_column,
        template=settings.template,
        chat=settings.chat,
        label_words=settings.label_words,
    )
    search = Search.of(settings)
    check_search(task, search, settings.max_new_tokens)
    return Source(rows, kind, task)


def image_column(settings: TrainSettings, kind: Kind) -> str | None:
    """The column of pictures; None where there is none.

    Raises UserError where one is named for a task that writes texts, and the method looks at no pictures.
    """
    method = parse_method(settings.method)
    looks = any(getattr(one, "image", None) is not None for one in getattr(method, "methods", (method,)))
    if settings.image_column is not None and not looks and task_class(settings.task).writes:
        raise UserError(
            f"{method.name} looks at no pictures; leave --image-column out, or train llama-adapter[image=ENCODER]"
        )
    return settings.image_column or (COLUMN if looks or kind == "vision" else None)


def check_pictures(settings: TrainSettings) -> None:
    """Raises UserError for settings that measure texts."""
    for name, instead in (("batch_tokens", "; give batch_size"), ("max_length", "")):
        value = getattr(settings, name)
        if value is not None:
            raise UserError(f"{name}={value} counts a text's tokens, but {settings.model!r} reads pictures{instead}")


def load_rows_of(source: str, image_column: str | None) -> Any:
    """The rows of a source; where they have a column of pictures, with their paths made absolute."""
    rows = load_rows(source)
    return rows if image_column is None else located(rows, image_column, home(source))


def load_reader(source: str, kind: Kind, settings: str | None = None) -> Any:
    """What makes a model's inputs: the tokenizer, or the image processor (of the folder `settings` if it has one)."""
    return load_processor(source, settings) if kind == "vision" else load_tokenizer(source)


def load_data(settings: TrainSettings, source: Source, show: bool | None = None) -> Data:
    """The examples of both sides, of settings that say how long a row may be. Raises UserError naming a row."""
    kind, task = source.kind, source.task
    assert settings.max_length is not None or kind == "vision"
    longest = settings.max_length or 0  # pictures have none
    tokenizer = load_reader(settings.model, kind)
    train, held_out = split_rows(settings, task, source.rows)
    learned = encode(task, train, tokenizer, longest, kind, show, learn=True)
    data = Data(kind, tokenizer, task, learned, [], [], Search.of(settings), settings.max_new_tokens)
    return holding(data, held_out, longest, show)


def holding(data: Data, rows: Any, max_length: int, show: bool | None = None) -> Data:
    """The same data with these rows held out. Raises UserError naming a row."""
    task, kind, tokenizer = data.task, data.kind, data.tokenizer
    asked = encode(task, rows, tokenizer, max_length, kind, show)
    plain = asked
    if pseudo_tokens(getattr(task, "template", "")):
        bare: Any = task
        bare = dataclasses.replace(bare, template=without_pseudo(bare.template))
        plain = encode(bare, rows, tokenizer, max_length, kind, show)
    return dataclasses.replace(data, held_out=asked, plain=plain)


def split_rows(settings: TrainSettings, task: Task, rows: Any) -> tuple[Any, Any]:
    """The rows to train on and those held out, each a seeded sample where there is a limit."""
    if settings.eval_data is not None:
        train, held_out = rows, load_rows_of(settings.eval_data, getattr(task, "image_column", None))
    else:
        sides = hold_out(rows, settings.eval_share, settings.seed, all_inputs(task, rows))
        train, held_out = (rows.select(side) for side in sides)
    return limit(train, settings.limit, settings.seed), limit(held_out, settings.eval_limit, settings.seed)


def encode(
    task: Task,
    rows: Any,
    tokenizer: Any,
    max_length: int,
    kind: str,
    show: bool | None = None,
    learn: bool = False,
) -> list[Any]:
    """The rows' examples; with `learn` one for each reference text, else one a row."""
    with progress("reading", len(rows), show) as bar:
        return encode_all(task, rows, tokenizer, max_length, kind, bar, every_reference=learn)

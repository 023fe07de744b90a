"""The examples of a run: rows, task, both sides of the split. Knows data, tasks and tokenizers; refuses to know methods
and training."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trimtab.bars import progress
from trimtab.data import hold_out, limit, load_rows
from trimtab.evaluate import BATCH_TOKENS, evaluate
from trimtab.models import Kind, kind_of, load_tokenizer
from trimtab.scoring import Run
from trimtab.search import GREEDY, Search, check_search
from trimtab.settings import TrainSettings
from trimtab.tasks import Task, all_inputs, encode_all, prepare
from trimtab.templates import pseudo_tokens, without_pseudo


@dataclass(frozen=True)
class Data:
    """A run's examples and what reads them."""

    kind: Kind
    tokenizer: PreTrainedTokenizerBase
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
    rows = load_rows(settings.data)
    kind = kind_of(settings.model, settings.task, settings.template)
    task = prepare(
        settings.task,
        rows,
        kind=kind,
        text_column=settings.text_column,
        label_column=settings.label_column,
        choices_column=settings.choices_column,
        template=settings.template,
        chat=settings.chat,
        label_words=settings.label_words,
    )
    search = Search.of(settings)
    check_search(task, search, settings.max_new_tokens)
    return Source(rows, kind, task)


def load_data(settings: TrainSettings, source: Source, show: bool | None = None) -> Data:
    """The examples of both sides, of settings that say how long a row may be. Raises UserError naming a row."""
    assert settings.max_length is not None
    kind, task, longest = source.kind, source.task, settings.max_length
    tokenizer = load_tokenizer(settings.model)
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
        train, held_out = rows, load_rows(settings.eval_data)
    else:
        sides = hold_out(rows, settings.eval_share, settings.seed, all_inputs(task, rows))
        train, held_out = (rows.select(side) for side in sides)
    return limit(train, settings.limit, settings.seed), limit(held_out, settings.eval_limit, settings.seed)


def encode(
    task: Task,
    rows: Any,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    kind: str,
    show: bool | None = None,
    learn: bool = False,
) -> list[Any]:
    """The rows' examples; with `learn` one for each reference text, else one a row."""
    with progress("reading", len(rows), show) as bar:
        return encode_all(task, rows, tokenizer, max_length, kind, bar, every_reference=learn)

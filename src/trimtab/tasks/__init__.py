"""The tasks, by name: one file each. Knows which there are; refuses to know what they do.

A task that is added costs its file, its line in TASKS and its name among the choices of config.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from trimtab.data import columns
from trimtab.errors import UserError, unknown
from trimtab.examples import IGNORED, KINDS, Example, encode_all, encode_one
from trimtab.forms import Row
from trimtab.tasks.choose import Choose
from trimtab.tasks.classify import Classify
from trimtab.tasks.generate import Generate
from trimtab.tasks.regress import Regress
from trimtab.tasks.rows import each, parse_label_words
from trimtab.tasks.tag import Tag
from trimtab.tasks.task import Task, Wishes
from trimtab.templates import has_mask, settled

if TYPE_CHECKING:
    from trimtab.data import Rows

__all__ = [
    "IGNORED",
    "KINDS",
    "TASKS",
    "Choose",
    "Classify",
    "Example",
    "Generate",
    "Regress",
    "Tag",
    "Task",
    "all_inputs",
    "encode_all",
    "encode_one",
    "parse_label_words",
    "prepare",
    "task_class",
    "task_from_config",
]

TASKS: dict[str, type[Task]] = {task.name: task for task in (Classify, Generate, Regress, Tag, Choose)}


def task_class(name: str) -> type[Task]:
    """The task of a name. Raises UserError for an unknown one."""
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    return TASKS[name]


def task_from_config(config: Mapping[str, Any]) -> Task:
    """The inverse of `to_config`. Raises UserError for an unknown task or field, and for values that fit none."""
    if not isinstance(config, Mapping):
        raise UserError(f"a task is a mapping with a name, not {config!r}")
    made: Any = task_class(str(config.get("name")))
    fields = {key: value for key, value in config.items() if key != "name"}
    known = [field.name for field in dataclasses.fields(made)]
    for key in fields:
        if key not in known:
            raise unknown(f"field of the task {config['name']!r}", key, known)
    try:
        if "labels" in fields:
            fields["labels"] = tuple(fields["labels"])
        return made(**fields)
    except (TypeError, AttributeError) as error:
        raise UserError(f"the fields of the task {config['name']!r} are broken: {error}") from error


def prepare(name: str, rows: Rows, *, kind: str = "causal", **wishes: Any) -> Task:
    """The task that rows are for: finds the labels, or the form of the rows, and checks columns and template.

    `wishes` are the fields of `Wishes`: text_column, label_column, choices_column, template, chat, label_words.
    Raises UserError for a missing column, an unknown placeholder, a row without label, fewer than two labels, for a
    wish that means nothing to the task, and for a mask where the model has none or none where it has one.
    """
    made = task_class(name)
    if kind not in KINDS:
        raise unknown("model kind", kind, KINDS)
    given = Wishes(**wishes)
    given.check(name, {other: task.takes for other, task in TASKS.items()})
    if has_mask(given.template) != (kind == "masked"):
        wants = "needs a template with {mask}" if kind == "masked" else "takes no {mask} in its template"
        raise UserError(f"a model of the kind {kind!r} {wants}")
    if given.template is not None:
        given = dataclasses.replace(given, template=settled(given.template, columns(rows)))
    return made.prepare(rows, kind, given)


def all_inputs(task: Task, rows: Iterable[Row]) -> list[str]:
    """`task.inputs` of every row, to tell duplicates by. Raises UserError naming the row."""
    return list(each(task.inputs, rows))

"""The tasks, by name: one file each. Knows which there are; refuses to know what they do.

A task that is added costs its file, its line in TASKS and its name among the choices of config.py; what a task is for
models that read pictures alone, its line in PICTURES.
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
from trimtab.tasks.classify_pictures import ClassifyPictures
from trimtab.tasks.generate import Generate
from trimtab.tasks.regress import Regress
from trimtab.tasks.rows import each, parse_label_words
from trimtab.tasks.span import Span
from trimtab.tasks.tag import Tag
from trimtab.tasks.task import Task, Wishes
from trimtab.templates import has_mask, settled

if TYPE_CHECKING:
    from trimtab.data import Rows

__all__ = [
    "IGNORED",
    "KINDS",
    "PICTURES",
    "TASKS",
    "Choose",
    "Classify",
    "ClassifyPictures",
    "Example",
    "Generate",
    "Regress",
    "Span",
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

TASKS: dict[str, type[Task]] = {task.name: task for task in (Classify, Generate, Regress, Tag, Choose, Span)}
PICTURES: dict[str, type[Task]] = {ClassifyPictures.name: ClassifyPictures}
"""What the tasks of these names are for a vision model."""


def task_class(name: str, kind: str | None = None) -> type[Task]:
    """The task of a name, for one kind of model. Raises UserError for an unknown one."""
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    return PICTURES.get(name, TASKS[name]) if kind == "vision" else TASKS[name]


def task_from_config(config: Mapping[str, Any]) -> Task:
    """The inverse of `to_config`. Raises UserError for an unknown task or field, and for values that fit none."""
    if not isinstance(config, Mapping):
        raise UserError(f"a task is a mapping with a name, not {config!r}")
    made: Any = task_class(str(config.get("name")), "vision" if "image_column" in config else None)
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

    `wishes` are the fields of `Wishes`: text_column, context_column, image_column, label_column, choices_column,
    template, chat, label_words.
    Raises UserError for a missing column, an unknown placeholder, a row without label, fewer than two labels, for a
    wish that means nothing to the task, and for a mask where the model has none or none where it has one.
    """
    if kind not in KINDS:
        raise unknown("model kind", kind, KINDS)
    made = task_class(name, kind)
    given = Wishes(**wishes)
    given.check(_called(made), {_called(task): task.takes for task in (*TASKS.values(), *PICTURES.values())})
    if has_mask(given.template) != (kind == "masked"):
        wants = "needs a template with {mask}" if kind == "masked" else "takes no {mask} in its template"
        raise UserError(f"a model of the kind {kind!r} {wants}")
    if given.template is not None:
        given = dataclasses.replace(given, template=settled(given.template, columns(rows)))
    return made.prepare(rows, kind, given)


def _called(task: type[Task]) -> str:
    """A task's name in a sentence."""
    return f"{task.name!r} of pictures" if task in PICTURES.values() else repr(task.name)


def all_inputs(task: Task, rows: Iterable[Row]) -> list[str]:
    """`task.inputs` of every row, to tell duplicates by. Raises UserError naming the row."""
    return list(each(task.inputs, rows))

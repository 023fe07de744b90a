"""Knows how a row becomes the prompt a model reads; refuses to know token ids and labels."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trimtab.data import cell, columns
from trimtab.errors import UserError, unknown

_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")  # {{ and }} stand for the braces themselves


@dataclass(frozen=True)
class Prompt:
    """What comes before the answer. `render(text)` is the whole prompt; only `text` may lose its end to shorten it.

    `shorter` are whole prompts to try before `text` is cut, each shorter than the one before (a conversation without
    its oldest turns); the last of them is the one that is cut.
    """

    text: str
    render: Callable[[str], str]
    shorter: tuple[Prompt, ...] = ()

    def full(self) -> str:
        """The prompt with all of its text."""
        return self.render(self.text)


def placeholders(template: str) -> list[str]:
    """The column names in braces, in order. Raises UserError if there is none."""
    names = [match[1] for match in _PLACEHOLDER.finditer(template) if match[1] is not None]
    if not names:
        raise UserError(
            f"the template {template!r} has no placeholder such as {{text}}, so all rows would look the same"
        )
    return names


def check_template(template: str, row: Mapping[str, Any], text_column: str, answer_column: str) -> None:
    """Raises UserError for a placeholder that is no column of the row, or that gives the answer away."""
    for name in placeholders(template):
        source = text_column if name == "text" else name
        if source == answer_column:
            raise UserError(f"the template shows the answer: {{{name}}} is the column {answer_column!r}")
        try:
            cell(row, source)
        except KeyError as error:
            known = columns([row])
            raise unknown("column" if name == "text" else "template placeholder", source, known) from error


def fill(template: str, row: Mapping[str, Any], text_column: str) -> Prompt:
    """The template with a row's values; `{text}` is the text column.

    What may be cut is `{text}`, or without it the row's longest value. Raises UserError for values that are not text.
    """
    names = dict.fromkeys(placeholders(template))
    values = {name: text_value(row, text_column if name == "text" else name) for name in names}
    cut = "text" if "text" in values else max(values, key=lambda name: len(values[name]))
    return Prompt(values[cut], lambda text: _substitute(template, {**values, cut: text}))


def values_of(template: str, row: Mapping[str, Any], text_column: str) -> list[str]:
    """The row's values that the template shows, without the template."""
    return [text_value(row, text_column if name == "text" else name) for name in placeholders(template)]


def value_of(row: Mapping[str, Any], name: str) -> Any:
    """A row's value at a column name. Raises UserError naming the nearest and all existing columns."""
    try:
        return cell(row, name)
    except KeyError as error:
        raise unknown("column", name, columns([row])) from error


def text_value(row: Mapping[str, Any], name: str) -> str:
    """A row's value as text. Raises UserError if there is none, or a list or dict."""
    value = value_of(row, name)
    if value is None:
        raise UserError(f"column {name!r} is empty")
    if isinstance(value, (Mapping, list)):
        parts = [known for known in columns([row]) if known.startswith(name + ".")]
        hint = f"; choose a part of it: {', '.join(parts)}" if parts else ""
        raise UserError(f"column {name!r} holds a {type(value).__name__}, not text{hint}")
    return str(value)


def lead(template: str) -> str:
    """What separates the filled template from the answer: one space, which belongs to the answer ("Label:" + " yes").

    Nothing after a line break, and nothing after Chinese, Japanese or Korean characters, which put no space there.
    """
    last = template[-1:]
    closed = (last.isspace() and last != " ") or unicodedata.east_asian_width(last or " ") in "WF"
    return "" if closed else " "


def _substitute(template: str, values: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        return match[0][0] if match[1] is None else values[match[1]]

    return _PLACEHOLDER.sub(value, template)


_ALONE = "Carry out the following instruction.\n\n### Instruction:\n{text}\n\n### Response:\n"
_WITH_INPUT = (
    "Carry out the following instruction on the input below it.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{text}\n\n### Response:\n"
)


def instruction(row: Mapping[str, Any], plain: bool) -> Prompt:
    """Columns `instruction` and, where a row has one, `input`: under headings, or `plain` one below the other.

    The input is what may be cut, or without one the instruction.
    """
    if str(row.get("input") or "").strip():
        return fill("{instruction}\n\n{text}" if plain else _WITH_INPUT, row, "input")
    return fill("{text}" if plain else _ALONE, row, "instruction")

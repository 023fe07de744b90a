"""Knows how a row becomes the prompt a model reads; refuses to know token ids and labels.

In a template `{{` and `}}` are braces, `{p*N}` is N pseudo tokens, `{p}` one (unless the rows have a column of that
name), `{mask}` the place of a masked language model's answer, and every other `{name}` a column.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from trimtab.data import cell, columns
from trimtab.errors import UserError, unknown

PSEUDO = "<|p{}|>"
"""How a pseudo token of a template is written; its id follows those of the vocabulary."""
MASK = "mask"
_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")  # {{ and }} stand for the braces themselves
_AND_SPACE = re.compile(_PLACEHOLDER.pattern + " ?")
_SEVERAL = re.compile(r"p *\*(.*)", re.DOTALL)
_SPACE_BEFORE = re.compile(r" +(?=\{p *\*)")
_MARK = re.compile(re.escape(PSEUDO).replace(re.escape("{}"), r"(\d+)"))


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
    """The column names in braces, in order.

    Raises UserError if there is none, for a wrong number of pseudo tokens and for a second mask.
    """
    names = _braced(template)
    if names.count(MASK) > 1:
        raise UserError(f"the template {template!r} has {names.count(MASK)} {{mask}}; it may have one")
    names = [name for name in names if name != MASK and not _count(name)]
    if not names:
        raise UserError(
            f"the template {template!r} has no placeholder such as {{text}}, so all rows would look the same"
        )
    return names


def pseudo_tokens(template: str) -> int:
    """How many pseudo tokens a template has. Raises UserError for a wrong number."""
    return sum(_count(name) for name in _braced(template))


def has_mask(template: str | None) -> bool:
    """Whether a template has the place of a masked language model's answer."""
    return template is not None and MASK in _braced(template)


def settled(template: str, names: Iterable[str]) -> str:
    """The template for rows with these columns: without a column `p`, `{p}` is one pseudo token, `{p*1}`."""
    if "p" in names:
        return template
    return _PLACEHOLDER.sub(lambda match: "{p*1}" if match[1] == "p" else match[0], template)


def without_pseudo(template: str) -> str:
    """The template without its pseudo tokens, each with a space behind it: what a base model can read."""
    return _AND_SPACE.sub(lambda match: "" if match[1] and _count(match[1]) else match[0], template)


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


def fill(template: str, row: Mapping[str, Any], text_column: str, mask: str = "") -> Prompt:
    """The template with a row's values; `{text}` is the text column, `{mask}` becomes `mask`.

    What may be cut is `{text}`, or without it the row's longest value. Raises UserError for values that are not text,
    and for one that has a pseudo token of the template.
    """
    names = dict.fromkeys(placeholders(template))
    values = {name: text_value(row, text_column if name == "text" else name) for name in names}
    refuse_marks(values.values(), pseudo_tokens(template))
    cut = "text" if "text" in values else max(values, key=lambda name: len(values[name]))
    return Prompt(values[cut], lambda text: _substitute(template, {**values, cut: text}, mask))


def refuse_marks(texts: Iterable[str], count: int) -> None:
    """Raises UserError for a text of a row that has one of a template's `count` pseudo tokens."""
    for found in (match for text in texts if count for match in _MARK.finditer(text)):
        if int(found[1]) < count:
            raise UserError(f"the row has {found[0]!r} itself, which stands for a pseudo token of the template")


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


def mask_lead(template: str) -> str:
    """What separates the mask from the text before it: a space, which belongs to the word there, or nothing."""
    template = _tight(template)
    start = next(match.start() for match in _PLACEHOLDER.finditer(template) if match[1] == MASK)
    return " " if template[:start].endswith(" ") else ""


def _substitute(template: str, values: Mapping[str, str], mask: str) -> str:
    numbers = itertools.count()

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name is None or name == MASK:
            return match[0][0] if name is None else mask
        return "".join(PSEUDO.format(next(numbers)) for _ in range(_count(name))) or values[name]

    return _PLACEHOLDER.sub(value, _tight(template))


def _tight(template: str) -> str:
    """Without spaces in front of pseudo tokens, which would become tokens of their own."""
    return _SPACE_BEFORE.sub("", template)


def _braced(template: str) -> list[str]:
    """Everything that stands in braces, in order."""
    return [match[1] for match in _PLACEHOLDER.finditer(template) if match[1] is not None]


def _count(name: str) -> int:
    """The number of pseudo tokens that `p*N` asks for; 0 for every other name. Raises UserError for a wrong N."""
    found = _SEVERAL.fullmatch(name)
    if found is None:
        return 0
    number = found[1].strip()
    if re.fullmatch("0*[1-9][0-9]{0,5}", number) is None:
        raise UserError(f"{{{name}}} in the template is no number of pseudo tokens; write {{p}}, {{p*2}}, {{p*3}}, …")
    return int(number)


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

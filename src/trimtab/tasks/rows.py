"""Knows how labels stand in rows; refuses to know tasks and models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from trimtab.data import columns
from trimtab.errors import UserError
from trimtab.forms import Row
from trimtab.templates import value_of

if TYPE_CHECKING:
    from trimtab.data import Rows

T = TypeVar("T")


def each(read: Callable[[Any], T], values: Iterable[Any]) -> Iterator[T]:
    """`read` of every value. Raises UserError naming the row (from 1)."""
    for number, value in enumerate(values, start=1):
        try:
            yield read(value)
        except UserError as error:
            raise UserError(f"row {number}: {error}") from error


def label_text(value: object, name: str) -> str:
    """A label as a string: 1, 1.0 and "1 " are "1". Raises UserError, naming the column, for no label or a list."""
    if isinstance(value, (list, Mapping)):
        raise UserError(f"column {name!r} holds a {type(value).__name__}, not a label")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = "" if value is None or value != value else str(value).strip()
    if not text:
        raise UserError(f"column {name!r} has no label")
    return text


def sort_labels(labels: Iterable[str]) -> list[str]:
    """Different labels in order: as numbers if all are numbers, else as strings."""
    found = sorted(set(labels))
    try:
        return sorted(found, key=float)
    except ValueError:
        return found


def class_names(rows: Rows, name: str) -> list[str] | None:
    """The names of a column of classes, or of lists of them, that hub datasets store as numbers."""
    feature = getattr(rows, "features", {}).get(name)
    return getattr(getattr(feature, "feature", feature), "names", None)


def list_of(row: Row, name: str, what: str) -> list[Any]:
    """A row's list at a column name. Raises UserError for anything else, naming the parts of a dict."""
    value = value_of(row, name)
    if isinstance(value, list):
        return value
    if isinstance(value, Mapping):
        parts = [known for known in columns([row]) if known.startswith(name + ".")]
        hint = f"; choose a part of it: {', '.join(parts)}" if parts else ""
        raise UserError(f"column {name!r} holds a dict, not a list of {what}{hint}")
    found = "nothing" if value is None else f"a {type(value).__name__}"
    raise UserError(f"column {name!r} holds {found}, not a list of {what}")


def parse_label_words(text: str) -> dict[str, str]:
    """`0=no,1=yes` -> {"0": "no", "1": "yes"}. Raises UserError for anything else."""
    words: dict[str, str] = {}
    for part in text.split(","):
        label, found, word = (piece.strip() for piece in part.partition("="))
        if not (label and found and word):
            raise UserError(f"label words look like 0=no,1=yes; {part.strip()!r} does not")
        if label in words:
            raise UserError(f"label words name {label!r} twice")
        words[label] = word
    return words

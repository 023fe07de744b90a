"""Knows how pictures stand beside texts in rows, of which some may have none; refuses to know models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.data import cell, load_rows, resolve
from trimtab.lazy_picture import Picture
from trimtab.pictures import located

if TYPE_CHECKING:
    from trimtab.data import Rows

COLUMN = "image"
"""The column of pictures where nothing else is said."""


def picture_of(row: Mapping[str, Any], name: str | None) -> Picture | None:
    """A row's picture; None where it has none. Raises UserError where there is one that cannot be read.

    So what cannot be read is found before anything is trained.
    """
    value = _value(row, name)
    if value is None:
        return None
    picture = Picture.of(value)
    picture.check()
    return picture


def picture_key(row: Mapping[str, Any], name: str | None) -> str | None:
    """What tells a row's picture from others; None where it has none. Raises UserError for what is no picture."""
    value = _value(row, name)
    return None if value is None else Picture.of(value).key


def load_pictured_rows(source: str, name: str | None) -> Rows:
    """`load_rows`; relative paths in the column of pictures, if one is named, start at the file that names them.

    Raises UserError for a column that does not exist.
    """
    rows = load_rows(source)
    if name is None:
        return rows
    path = Path(resolve(source)).expanduser()
    return located(rows, name, path.absolute().parent if path.is_file() else None)


def _value(row: Mapping[str, Any], name: str | None) -> Any:
    """A path, a PIL image, or what datasets make of a picture; None where there is nothing."""
    if name is None:
        return None
    try:
        value = cell(row, name)
    except KeyError:
        return None
    empty = not any(value.values()) if isinstance(value, Mapping) else isinstance(value, str) and not value.strip()
    return None if empty else value

"""Knows how pictures stand beside texts in rows, of which some may have none; refuses to know models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.data import cell
from trimtab.lazy_picture import Picture

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

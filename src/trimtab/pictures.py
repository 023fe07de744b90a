"""Knows how a picture stands in a row and what makes it unreadable; refuses to know models and tasks.

A picture is a path (relative to the file that names it, or absolute), the bytes of an image file, the mapping
`{"bytes": …, "path": …}` that `datasets` stores, or a PIL image. It is read as RGB: turned as its EXIF data say,
transparent parts laid on white, of an animation the first frame.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps

from trimtab.data import cell, columns
from trimtab.errors import UserError, unknown

if TYPE_CHECKING:
    from trimtab.data import Rows

LEAST_SIDE = 2
"""Pixels that a picture has at least on each side."""
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, OverflowError, NotImplementedError)
"""What Pillow's decoders raise for damaged files: OSError of most, SyntaxError of PNG, …"""
_TOO_LARGE = (Image.DecompressionBombWarning, Image.DecompressionBombError)


def value_in(row: Mapping[str, Any], column: str) -> Any:
    """What stands in a row's column of pictures. Raises UserError for no such column, and for nothing in it."""
    try:
        value = cell(row, column)
    except KeyError as error:
        raise unknown("image column", column, columns([row])) from error
    if value is None or value == "" or (isinstance(value, Mapping) and not _held(value)):
        raise UserError(f"column {column!r} has no picture")
    return value


def read_picture(value: Any, folder: Path | None = None) -> Image.Image:
    """A picture as RGB; relative paths start at `folder` (by default where the process runs).

    Raises UserError where there is none, it cannot be read or is cut off, it has fewer than LEAST_SIDE pixels on a
    side, or more pixels than Pillow takes for safe (`PIL.Image.MAX_IMAGE_PIXELS`, 89 million): it is not unpacked then.
    """
    source, name = _source(value, folder)
    if isinstance(source, Image.Image):
        return _rgb(source, name)
    limit = f"Pillow's limit of {Image.MAX_IMAGE_PIXELS or 0:,} pixels"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
                return _rgb(opened, name)
    except _TOO_LARGE as error:
        raise UserError(f"{name} is larger than {limit}; scale it down") from error
    except FileNotFoundError as error:
        raise UserError(f"{name} does not exist") from error
    except IsADirectoryError as error:
        raise UserError(f"{name} is a folder, not a picture") from error
    except UserError:
        raise
    except _BROKEN as error:
        reason = "" if isinstance(error, Image.UnidentifiedImageError) else f" ({_first_line(error)})"
        raise UserError(f"{name} cannot be read as a picture{reason}") from error


def digest(value: Any, folder: Path | None = None) -> str:
    """Of the picture's file, or of a PIL image's pixels: equal for the same picture under two names.

    Raises UserError for a file that cannot be read.
    """
    source, name = _source(value, folder)
    if isinstance(source, Image.Image):
        source = f"{source.mode}{source.size}".encode() + source.tobytes()
    elif isinstance(source, Path):
        try:
            source = source.read_bytes()
        except OSError as error:
            raise UserError(f"{name} cannot be read: {error.strerror or error}") from error
    return hashlib.blake2b(source, digest_size=16).hexdigest()


def located(rows: Rows, column: str, folder: Path | None) -> Rows:
    """The rows with the column's relative paths made absolute from `folder`, and its pictures not decoded.

    Raises UserError for a column that does not exist.
    """
    import datasets

    if isinstance(rows, datasets.Dataset):
        rows = _undecoded(rows, column, datasets)
        if getattr(rows.features.get(column), "dtype", "") in ("string", "large_string"):
            paths = [None if one is None else _absolute(one, folder) for one in rows[column]]
            return _replaced(rows, column, paths)
        return rows
    if not any(column in row for row in rows):
        raise unknown("image column", column, columns(rows))
    return [{**row, column: _absolute(row.get(column), folder)} for row in rows]


def _undecoded(rows: Any, column: str, datasets: Any) -> Any:
    if column not in rows.column_names:
        raise unknown("image column", column, columns(rows))
    if isinstance(rows.features[column], datasets.Image):  # errors of decoding would name no row
        return rows.cast_column(column, datasets.Image(decode=False))
    return rows


def _replaced(rows: Any, column: str, values: list[Any]) -> Any:
    order = rows.column_names
    return rows.remove_columns(column).add_column(column, values).select_columns(order)


def _absolute(value: Any, folder: Path | None) -> Any:
    return os.path.join(folder or "", value) if isinstance(value, str) and value else value


def _held(value: Mapping[str, Any]) -> Any:
    """What the mapping of `datasets` holds: bytes, or else a path."""
    return value.get("bytes") or value.get("path")


def _source(value: Any, folder: Path | None) -> tuple[Path | bytes | Image.Image, str]:
    """A path that can be opened, bytes or an image; and how an error calls it."""
    path = value.get("path") if isinstance(value, Mapping) else None
    if isinstance(value, Mapping):
        value = _held(value)
    if isinstance(value, Image.Image):
        return value, "the picture"
    if isinstance(value, (bytes, bytearray)):
        return bytes(value), f"the picture {path!r}" if path else f"the picture ({len(value)} bytes)"
    if isinstance(value, str) and value.startswith(("http://", "https://")):
        raise UserError(f"{value!r} is an address; pictures are read from files, download it first")
    if isinstance(value, (str, Path)) and "\0" not in str(value):
        return (folder or Path()) / Path(value), f"the picture {str(value)!r}"
    found = "nothing" if value is None else f"a value of type {type(value).__name__}"
    raise UserError(f"a picture is a path, the bytes of an image file, or an image, not {found}")


def _rgb(image: Image.Image, name: str) -> Image.Image:
    """[height, width] pixels as RGB."""
    if min(image.size) < LEAST_SIDE:
        width, height = image.size
        raise UserError(f"{name} has {width} × {height} pixels; it needs at least {LEAST_SIDE} on each side")
    if image.mode in ("F", "I"):
        raise UserError(f"{name} holds numbers (mode {image.mode!r}) and not colours; save it with 8 or 16 bits")
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        return _eight_bits(image).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, which Pillow would clip at 255."""
    import numpy as np

    return Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__

"""Files that may be damaged, or written by somebody else. Knows bytes, JSON and the operating system; refuses to know
what is in them.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError, safe_open

from trimtab.errors import UserError

LARGEST_CONFIG = 1 << 20
"""Bytes; a configuration is a few thousand."""
_NATIVE = ("PytorchStreamWriter", "iostream", "cannot be opened", "file write failed", "inline_container")
"""What torch's own writer says, as a RuntimeError, where the system refused its bytes."""
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises UserError where it is no such thing, is larger than any configuration, has a field twice, or NaN.
    """
    if path.stat().st_size > LARGEST_CONFIG:
        raise UserError(f"{path} has more than {LARGEST_CONFIG:,} bytes, which no configuration has")
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is broken: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is broken: it holds no JSON object")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {twice[:60]!r} is there twice")
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


@contextmanager
def safetensors(path: Path, framework: str = "pt") -> Iterator[Any]:
    """An open file of tensors. Raises UserError where it is missing or broken."""
    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}") from None


def count_floats(path: Path) -> int:
    """How many floating-point numbers a file of tensors holds, by its header."""
    with safetensors(path, "np") as file:
        found = [file.get_slice(key) for key in file.keys()]  # noqa: SIM118
        floats = [one for one in found if "F" in one.get_dtype()]  # F32, BF16, …: not the ids of a found text
        return sum(math.prod(one.get_shape()) for one in floats)


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    made = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            made.update(block)
    return made.hexdigest()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, what the system refuses to write (a full disk, a read-only folder) becomes a UserError about `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    except SafetensorError as error:
        raise UserError(f"{path} cannot be written: {error}") from error
    except RuntimeError as error:
        if not any(words in str(error) for words in _NATIVE):
            raise
        raise UserError(f"{path} cannot be written: the disk refused the bytes (is it full?)") from error


def exchanged(one: Path, other: Path) -> bool:
    """Let two names change places in one step; False where the system or its file system cannot, and nothing changed.

    With two renames one of the names is missing in between.
    """
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    return call is not None and call(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0

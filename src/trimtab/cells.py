"""Runs that are kept: a cell is one run, its settings are a frozen dataclass, its figures one JSON file. Knows files;
refuses to know what a cell does and when it is run.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from trimtab.checkpoint import atomic_write

Figures = dict[str, Any]


class Cell(Protocol):
    """A frozen dataclass of settings. Equal settings mean an equal result, so they are stored with it."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def name(self) -> str:
        """File name of the result, without suffix."""


C = TypeVar("C", bound=Cell)


def read(folder: Path, cell: Cell) -> Figures | None:
    """The figures of a cell, if it has run with these settings."""
    file = folder / f"{cell.name}.json"
    if not file.exists():
        return None
    result = json.loads(file.read_text(encoding="utf-8"))
    return result["figures"] if result["cell"] == _settings(cell) else None


def keep(folder: Path, cell: Cell, figures: Figures) -> None:
    """Write a cell's file, whole or not at all."""
    content = {"cell": _settings(cell), "figures": figures}
    write(folder / f"{cell.name}.json", json.dumps(content, indent=1) + "\n")


def write(file: Path, content: str) -> None:
    """Write a whole file or nothing."""
    atomic_write(file, lambda path: path.write_text(content, encoding="utf-8"))


def known(folder: Path, cells: Iterable[C]) -> dict[C, Figures]:
    """The cells that have a result, with their figures."""
    return {cell: figures for cell in cells if (figures := read(folder, cell)) is not None}


def _settings(cell: Any) -> Any:
    return json.loads(json.dumps(dataclasses.asdict(cell)))  # tuples as the file gives them back

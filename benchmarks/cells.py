"""Runs that are kept: a cell is one run, its settings are a frozen dataclass, its figures one JSON file. Knows files,
progress and time; refuses to know what a cell does.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
import traceback
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

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
    unfinished = file.with_name(f"{file.name}.{os.getpid()}.part")
    unfinished.write_text(content, encoding="utf-8")
    os.replace(unfinished, file)


def known(folder: Path, cells: Iterable[C]) -> dict[C, Figures]:
    """The cells that have a result, with their figures."""
    return {cell: figures for cell in cells if (figures := read(folder, cell)) is not None}


def _settings(cell: Any) -> Any:
    return json.loads(json.dumps(dataclasses.asdict(cell)))  # tuples as the file gives them back


class Clock:
    """Estimates what is left: guesses, corrected by how long the cells so far took."""

    def __init__(self, guess: Callable[[Any], float], left: float) -> None:
        self.guess, self.left = guess, left
        self.guessed = self.took = 0.0

    def done(self, cell: Cell, seconds: float) -> None:
        """Count a cell that took so long."""
        self.left -= self.guess(cell)
        self.guessed += self.guess(cell)
        self.took += seconds

    @property
    def rest(self) -> float:
        """Seconds that are probably left."""
        return max(0.0, self.left) * (self.took / self.guessed if self.guessed else 1.0)


def run_all(folder: Path, cells: Sequence[C], run: Callable[[C], Figures], clock: Clock) -> list[C]:
    """Run the cells that have no result, in order, in this process; returns those that crashed.

    A crash is printed and the next cell goes on. Ctrl-C loses the present cell only.
    """
    crashed = []
    for number, cell in enumerate(cells, start=1):
        if read(folder, cell) is not None:
            continue
        start = time.monotonic()
        try:
            keep(folder, cell, run(cell))
            outcome = "done"
        except Exception:
            traceback.print_exc()
            crashed.append(cell)
            outcome = "CRASHED"
        seconds = time.monotonic() - start
        clock.done(cell, seconds)
        print(
            f"{time.strftime('%H:%M:%S')} {number}/{len(cells)} {cell.name}: {outcome} in {seconds:.0f} s, "
            f"about {clock.rest / 60:.0f} min left",
            flush=True,
        )
    return crashed


def share_out(costs: dict[Hashable, float], shards: int) -> dict[Hashable, int]:
    """Which of so many processes does which job, so that all take about as long: the longest job first."""
    loads = [0.0] * shards
    chosen: dict[Hashable, int] = {}
    for job in sorted(costs, key=lambda job: -costs[job]):
        chosen[job] = loads.index(min(loads))
        loads[chosen[job]] += costs[job]
    return chosen

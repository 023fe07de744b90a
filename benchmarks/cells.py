"""The walk over cells (trimtab's cells.py keeps them). Knows progress and time; refuses to know what a cell does."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

from trimtab.cells import C, Cell, Figures, keep, read


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

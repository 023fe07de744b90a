"""What the quality benchmark's cells say together. Knows the plan and figures; refuses to know tables and pictures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.quality import Cell, Entry, Plan
from trimtab.cells import Figures

MARGIN = 0.10
"""How far full tuning has to be above the majority class for a task to count."""


@dataclass(frozen=True)
class Results:
    """The figures that are there, by what the report asks for."""

    plan: Plan
    cells: Mapping[Cell, Figures]

    def seeds(self, entry: Entry, task: str) -> dict[int, Figures]:
        """The runs of an entry on a task with the chosen learning rate, by seed."""
        lr = self.plan.chosen(entry, self.cells)
        if lr is None:
            return {}
        cells = self.plan.entry_cells(entry, lr, [task])
        return {cell.seed: self.cells[cell] for cell in cells if cell in self.cells}

    def tasks(self, model: str) -> list[str]:
        """All tasks of a model."""
        return list(self.plan.models[model].lengths)

    def entries(self, model: str) -> list[Entry]:
        """The methods of a model that have a result."""
        own = [entry for entry in self.plan.entries if entry.model == model]
        return [entry for entry in own if any(self.seeds(entry, task) for task in self.tasks(model))]

    def entry(self, model: str, name: str) -> Entry | None:
        """The entry of this name, if it has a result."""
        return next((entry for entry in self.entries(model) if entry.name == name), None)

    def fails(self, model: str, task: str) -> bool:
        """Whether full tuning is too close to the majority class, so that the task does not count."""
        full = self.entry(model, "full")
        runs = list(self.seeds(full, task).values()) if full else []
        return bool(runs) and mean(runs, "test_accuracy") < runs[0]["majority"] + MARGIN

    def counting(self, model: str) -> list[str]:
        """The tasks of a model that count."""
        return [task for task in self.tasks(model) if not self.fails(model, task)]

    def common_seeds(self, entries: Sequence[Entry], tasks: Sequence[str]) -> list[int]:
        """The seeds that all of these entries have on all of these tasks."""
        runs = [set(self.seeds(entry, task)) for entry in entries for task in tasks]
        return sorted(set.intersection(*runs)) if runs else []

    def means(self, entry: Entry) -> list[float]:
        """The accuracy's mean over the counting tasks, for each seed that all of them have."""
        tasks = self.counting(entry.model)
        return [
            statistics.fmean(self.seeds(entry, task)[seed]["test_accuracy"] for task in tasks)
            for seed in self.common_seeds([entry], tasks)
        ]


def size_of(run: Figures, when: str) -> int:
    """Parameters `trained` or `deployed`, the task head's left out."""
    return max(0, run[f"{when}_parameters"] - run["head_parameters"])


def mean(runs: Sequence[Figures], key: str) -> float:
    """The mean of a figure over runs."""
    return statistics.fmean(run[key] for run in runs)

"""What the search benchmark runs on: its sizes, and a model on a task with the runs that are kept. Knows rows and
benches; refuses to know what is compared.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality import MODELS
from benchmarks.rows import SOURCES, split
from trimtab.cells import Figures, keep, read, write
from trimtab.comparison.bench import Bench
from trimtab.comparison.plan import Cell, Plan, Scored
from trimtab.comparison.steps import source_of
from trimtab.data import load_rows
from trimtab.models import load_config
from trimtab.searching.space import space_of
from trimtab.settings import TrainSettings

OBJECTIVES = ("accuracy", "parameters")


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    model: str = "minilm"
    """What the search runs on."""
    sampler_model: str = "bert-tiny"
    """What samplers are compared on."""
    train: int = 400
    dev: int = 300
    test: int = 1000
    epochs: float = 3.0
    lengths: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"sarcasm": 64, "reviews": 64, "bbc": 32})
    defaults: tuple[str, ...] = ("houlsby", "pfeiffer", "parallel", "lora", "ia3", "bitfit")
    factors: tuple[float, ...] = (1 / 3, 1.0, 3.0)
    seeds: int = 3
    cost: float = 7.0
    """Houlsby trainings that the trials of the search may take together."""
    trials: int = 24
    """Trials of a sampler's repeat."""
    repeats: int = 3
    surrogate_repeats: int = 5
    search_repeats: int = 8
    """Repeats of whole searches, and of random points beside them."""


FULL = Sizes()
QUICK = Sizes(model="bert-tiny", train=200, dev=100, test=200, epochs=1.0, defaults=("houlsby", "lora"), seeds=2,
              cost=6.0, trials=10, repeats=2, surrogate_repeats=2, search_repeats=2)  # fmt: skip


class Arena:
    """A model on a task: its rows, one loaded base, and the runs that are kept."""

    def __init__(self, folder: Path, model: str, task: str, sizes: Sizes):
        self.folder, self.sizes = folder / f"{model}-{task}", sizes
        self._write_rows(task)
        rows = self.folder / "rows"
        settings = TrainSettings(
            MODELS[model].source, str(rows / "train.jsonl"), str(self.folder), eval_data=str(rows / "test.jsonl"),
            epochs=sizes.epochs, max_length=sizes.lengths[task], method="lora",
        )  # fmt: skip
        self.settings = settings
        self.bench = Bench(settings, source_of(self.folder, settings), self.folder, False)
        self.plan = Plan(settings, (), sizes.seeds, "accuracy", sizes.factors)
        self.test = load_rows(str(rows / "test.jsonl"))
        self.space = space_of(load_config(settings.model), None, True, settings.max_length)

    def _write_rows(self, task: str) -> None:
        if (self.folder / "rows" / "test.jsonl").is_file():
            return
        for side, rows in split(SOURCES[task](), self.sizes.train, self.sizes.dev, self.sizes.test).items():
            lines = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)
            write(self.folder / "rows" / f"{side}.jsonl", lines)

    def cell(self, method: str, lr: float, seed: int = 0) -> Cell:
        """A run of a method."""
        return self.plan.cell(method, lr, seed, self.sizes.epochs)

    def trained(self, cell: Cell, save: bool = False) -> Figures:
        """The figures of a run on the development rows; with `save` its adapter is there as well."""
        before = read(self.folder / "cells", cell)
        if before is not None and not (save and "bytes" not in before):
            return before
        figures = self.bench.train(cell) if save else self.bench.attempt(cell, _unwatched)
        if before is not None:  # seconds that are compared with others are those of the first run
            figures = {**figures, "train": before["train"]}
        keep(self.folder / "cells", cell, figures)
        return figures

    def tried(self, method: str, lr: float, point: Mapping[str, Any]) -> tuple[float, int]:
        """Accuracy on the development rows and trained parameters of a point."""
        figures = self.trained(self.cell(method, lr))
        return figures["dev"]["accuracy"], int(figures["parameters"]["trainable"])

    def scored(self, cell: Cell) -> Figures:
        """The figures of a run with those of the test rows."""
        trained, scored = self.trained(cell, save=True), read(self.folder / "cells", Scored(cell))
        if scored is None:
            scored = self.bench.score(cell, self.test)
            keep(self.folder / "cells", Scored(cell), scored)
        return {**trained, **scored}

    def best_rate(self, method: str, rates: Sequence[float]) -> float:
        """The learning rate that is best on the development rows, the lower one of equals."""
        found = {lr: self.trained(self.cell(method, lr))["dev"]["accuracy"] for lr in rates}
        return max(found, key=lambda lr: (found[lr], -lr))


def _unwatched(parameters: int, score: Callable[[], Figures]) -> Any:
    from transformers import TrainerCallback

    return TrainerCallback()


@contextmanager
def arena(folder: Path, model: str, task: str, sizes: Sizes) -> Iterator[Arena]:
    """An arena whose caches are given back."""
    made = Arena(folder, model, task, sizes)
    try:
        yield made
    finally:
        made.bench.close()

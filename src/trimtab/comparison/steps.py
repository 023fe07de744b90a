"""A comparison from settings to a folder of results. Knows the order of the steps and the folder's files; refuses to
know how a cell is run (bench.py), judged (results.py) and shown (report.py).

    DIR/compare.json    what was asked             DIR/cells/*.json   the figures of every run, kept as they come
    DIR/rows/*.jsonl    train, dev and test rows   DIR/adapters/*     the adapters whose test scores are shown
    DIR/report.html, results.json, results.csv, pareto.svg
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.bars import Bar, progress
from trimtab.cells import Figures, keep, read, write
from trimtab.checkpoint import write_json
from trimtab.comparison.bench import Bench
from trimtab.comparison.plan import (
    FACTORS,
    Cell,
    Plan,
    Scored,
    check_dev_rows,
    check_numbers,
    members_of,
    read_methods,
    slug,
)
from trimtab.comparison.report import write_report
from trimtab.comparison.results import Comparison, Outcome, conclude
from trimtab.data import hold_out, limit, load_rows
from trimtab.errors import UserError, unknown
from trimtab.lengths import fitting_length
from trimtab.methods.spec import parse_method
from trimtab.models import load_config
from trimtab.report import read_object
from trimtab.run_data import Source, find_task, split_rows
from trimtab.run_folder import settings_to_dict
from trimtab.settings import TrainSettings
from trimtab.tasks import Task, all_inputs

LOGGER = logging.getLogger("trimtab")
ABOUT = "compare.json"
SIDES = ("train", "dev", "test")
PROBE = 0.15
"""Share of a training's seconds that may go into finding out how long an epoch takes."""
SPARE = 0.85
"""Share of the time for training that is planned for: loading, attaching and writing take the rest."""


def compare(
    settings: TrainSettings,
    methods: Sequence[Any],
    *,
    seeds: int = 3,
    minutes: float | None = None,
    objective: str | None = None,
    dev_share: float = 0.1,
    factors: Sequence[float] = FACTORS,
    show: bool | None = None,
) -> Comparison:
    """Train methods alike on the same rows, and say which to take; writes `settings.output` and returns its content.

    Every method gets the learning rates `factors` × its default, chosen on `dev_share` of the training rows with the
    first of the seeds, then is trained with `seeds` seeds (from `settings.seed` on) and scored once on the test rows,
    which are `settings.eval_data` or `eval_share`. The budget is `settings.epochs`, and with `minutes` for everything
    together at most the epochs that fit into as many seconds for every run. `objective` is one of the task's metrics.
    `settings.method` and `settings.lr` are not used. What is finished in the folder is not run again; methods and seeds
    may be added. A method that fails is reported in its row. Raises UserError for mistakes in the settings or the data,
    before anything is written, and KeyboardInterrupt, after which the same call goes on.
    """
    check_numbers(seeds, minutes, dev_share, factors)
    texts = read_methods(methods)
    source = find_task(settings)
    check_rows(source, texts)
    objective = check_objective(source.task, objective)
    settings = dataclasses.replace(settings, lr=None, method="lora", max_length=_longest(settings, source, texts))
    plan = Plan(settings, texts, seeds, objective, tuple(factors), minutes)
    folder = Path(settings.output)
    about = _about(plan, dev_share)
    check_folder(folder, about, ABOUT)
    if not (folder / ABOUT).is_file():
        begin_folder(folder, settings, source, dev_share, "learning rates")
        write_json(folder / ABOUT, about)
    with closing(Bench(settings, source_of(folder, settings), folder, show)) as bench:
        walk = Walk(plan, bench, load_rows(str(folder / "rows" / "test.jsonl")))
        outcomes = walk.all(show)
        rows = {side: len(load_rows(str(folder / "rows" / f"{side}.jsonl"))) for side in SIDES}
        found = conclude(plan, outcomes, walk.base, rows, bench)
    write_report(found)
    return found


def check_rows(source: Source, methods: Sequence[str]) -> None:
    """Raises UserError for methods that read other rows than the rest, and for rows that are no text."""
    looking = [text for text in methods for one in members_of(text) if getattr(one, "image", None) is not None]
    if looking:
        raise UserError(
            f"a comparison is of methods on the same rows, and {looking[0]} looks at pictures; use trimtab train"
        )
    column = getattr(source.task, "image_column", None)
    if column is not None and not all(isinstance(row[column], str | None) for row in source.rows):
        raise UserError(
            f"a comparison needs pictures that are files, and column {column!r} holds the pictures; use a class folder"
        )


def check_objective(task: Task, objective: str | None) -> str:
    """The metric that decides. Raises UserError for one that the task does not have."""
    if objective is None:
        return str(task.measures[0])
    if objective not in task.measures:
        raise unknown("objective", objective, task.measures)
    return objective


# -- the folder ---------------------------------------------------------------------------------------------------


def check_folder(folder: Path, about: dict[str, Any], name: str) -> None:
    """Raises UserError where the folder holds anything but what began with the same settings, in the file `name`."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, --output must be a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / name).is_file():
        if {path.name for path in folder.iterdir()} == {"rows"}:  # stopped at its first step
            return
        raise UserError(f"{folder} holds something already, but no {name} of an earlier call; choose another")
    began = read_object(folder / name)
    for key in [*about, *began]:
        if began.get(key) != about.get(key):
            raise UserError(
                f"what is in {folder} began with {key}={began.get(key)!r}, not {about.get(key)!r}; go on with "
                "the same settings, or choose another folder"
            )


def _about(plan: Plan, dev_share: float) -> dict[str, Any]:
    """What may not change from one call to the next."""
    out = ("output", "method", "lr", "cache", "cache_memory")
    said = {key: value for key, value in settings_to_dict(plan.settings).items() if key not in out}
    return {
        **said,
        "objective": plan.objective,
        "dev_share": dev_share,
        "factors": list(plan.factors),
        "minutes": plan.minutes,
    }


def begin_folder(folder: Path, settings: TrainSettings, source: Source, dev_share: float, ranked: str) -> None:
    """Write the rows of each side. Raises UserError where the development rows are too few to rank what is ranked."""
    for side, rows in zip(SIDES, _split(settings, source, dev_share, ranked), strict=True):
        text = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        write(folder / "rows" / f"{side}.jsonl", text)


def _split(settings: TrainSettings, source: Source, dev_share: float, ranked: str) -> tuple[Any, Any, Any]:
    """Train, dev and test rows; equal inputs of training and development rows are on one side."""
    learned, test = split_rows(settings, source.task, source.rows)
    kept, held = hold_out(learned, dev_share, settings.seed, all_inputs(source.task, learned))
    held = limit(held, settings.eval_limit, settings.seed)
    check_dev_rows(len(held), len(kept), dev_share, ranked)
    return learned.select(kept), learned.select(held), test


def source_of(folder: Path, settings: TrainSettings) -> Source:
    """The training rows that the folder keeps, and their task."""
    return find_task(dataclasses.replace(settings, data=str(folder / "rows" / "train.jsonl")))


def _longest(settings: TrainSettings, source: Source, methods: Sequence[str]) -> int | None:
    """The tokens a row may have so that it fits beside every method's virtual tokens; None for pictures."""
    if source.kind == "vision":
        return None
    config, lengths = load_config(settings.model), []
    for method in methods:
        try:
            lengths.append(fitting_length(parse_method(method), config, settings.max_length))
        except UserError:
            continue  # it does not fit at all, which its row will say
    return min(lengths) if lengths else fitting_length(None, config, settings.max_length)


# -- running ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pace:
    """How many epochs a method gets in so many seconds."""

    method: str
    seconds: float
    epochs: float
    max_length: int | None

    @property
    def name(self) -> str:
        """File name of its figures, without suffix."""
        return f"{slug(self.method)}-pace"


@dataclass(frozen=True)
class Frozen:
    """The base as it is."""

    max_length: int | None
    name: str = "frozen-base"


class Walk:
    """Runs what has no result yet, method by method, and keeps every result as it comes."""

    def __init__(self, plan: Plan, bench: Bench, test: Any):
        self.plan, self.bench, self.test = plan, bench, test
        self.cells = bench.folder / "cells"
        self.base = self._kept(Frozen(plan.settings.max_length), lambda: bench.score_base(test))
        self.seconds = self._seconds() if plan.minutes else None

    def all(self, show: bool | None) -> list[Outcome]:
        """The outcome of every method, in the order given."""
        outcomes = []
        each = self.plan.trainings
        with progress("all runs", each * len(self.plan.methods), show) as bar:
            for number, method in enumerate(self.plan.methods, start=1):
                count = Counted(bar, method)
                outcomes.append(self._method(method, count))
                bar(each - count.steps, method)
                LOGGER.info("%s: %d of %d methods done", method, number, len(self.plan.methods))
        return outcomes

    def _method(self, method: str, count: Counted) -> Outcome:
        """One method's runs. What goes wrong in them is its outcome, and the other methods go on."""
        outcome = Outcome(method)
        try:
            epochs = self._epochs(method)
        except Exception as error:
            return dataclasses.replace(outcome, errors=(reason_of(method, error),))
        grid, errors = self.each(self.plan.grid(method, epochs), count)
        lr = self.plan.chosen(grid)
        outcome = Outcome(method, epochs, grid=grid, errors=tuple(errors))
        if lr is None:
            return outcome
        final, later = self.each(self.plan.final(method, lr, epochs), count, scored=True)
        self._drop(cell for cell in grid if cell not in final)
        return dataclasses.replace(outcome, lr=lr, final=final, errors=(*errors, *later))

    def each(
        self, cells: Sequence[Cell], count: Counted, scored: bool = False
    ) -> tuple[dict[Cell, Figures], list[str]]:
        """The figures of the cells that worked, and what went wrong with the others; run are those without a result."""
        found: dict[Cell, Figures] = {}
        errors = []
        for cell in cells:
            try:
                found[cell] = self._scored(cell) if scored else self._trained(cell)
            except Exception as error:
                errors.append(reason_of(cell.name, error))
            count(cell)
        return found, errors

    def _trained(self, cell: Cell) -> Figures:
        return self._kept(cell, lambda: self.bench.train(cell))

    def _scored(self, cell: Cell) -> Figures:
        unscored = read(self.cells, Scored(cell)) is None
        if unscored and not self.bench.adapter_folder(cell).is_dir():  # taken away when another rate was better
            keep(self.cells, cell, self.bench.train(cell))
        trained = self._trained(cell)
        return {**trained, **self._kept(Scored(cell), lambda: self.bench.score(cell, self.test))}

    def _kept(self, cell: Any, run: Callable[[], Figures]) -> Figures:
        figures = read(self.cells, cell)
        if figures is None:
            figures = run()
            keep(self.cells, cell, figures)
        return figures

    def _drop(self, cells: Any) -> None:
        """Take away the adapters of learning rates that were not chosen."""
        for cell in cells:
            shutil.rmtree(self.bench.adapter_folder(cell), ignore_errors=True)

    # The budget

    def _seconds(self) -> float:
        """Seconds that every training run gets. Raises UserError where scoring alone takes all the minutes."""
        file = self.bench.folder / "cells" / "budget.json"
        if file.is_file():
            return float(read_object(file)["seconds"])
        plan = self.plan
        assert plan.minutes is not None
        runs = plan.trainings * len(plan.methods)
        dev, test = (self.base[side]["examples"] for side in ("dev", "test"))
        per_row = self.base["seconds"] / test
        scoring = per_row * (runs * dev + plan.seeds * len(plan.methods) * test)
        left = SPARE * (60 * plan.minutes - scoring) / runs
        if left <= 0:
            raise UserError(
                f"{plan.minutes:g} minutes are too few: scoring {runs} runs alone takes about {scoring / 60:.1f}; give "
                "more minutes, fewer methods or seeds, or --eval-limit"
            )
        write_json(file, {"seconds": left})
        return left

    def _epochs(self, method: str) -> float:
        """The epochs of the settings, or as many of them as fit into the seconds."""
        plan = self.plan
        if self.seconds is None:
            return float(plan.settings.epochs)
        pace = Pace(method, self.seconds, plan.settings.epochs, plan.settings.max_length)
        return float(self._kept(pace, lambda: self._measure(method))["epochs"])

    def _measure(self, method: str) -> Figures:
        assert self.seconds is not None
        cell = self.plan.cell(method, parse_method(method).lr, self.plan.settings.seed, self.plan.settings.epochs)
        took = self.bench.seconds_per_epoch(cell, PROBE * self.seconds)
        fitting = math.floor(100 * (1 - PROBE) * self.seconds / took) / 100
        return {"seconds_per_epoch": round(took, 3), "epochs": min(float(cell.epochs), max(0.01, fitting))}


class Counted:
    """Counts the trainings of one method on the bar of all."""

    def __init__(self, bar: Bar, method: str):
        self.bar, self.method, self.steps = bar, method, 0
        self.seen: set[Cell] = set()

    def __call__(self, cell: Cell) -> None:
        """One more run is done; the first seed's is also one of the grid."""
        if cell not in self.seen:
            self.seen.add(cell)
            self.steps += 1
            self.bar(1, self.method)


def reason_of(what: str, error: Exception) -> str:
    """One sentence for a row; what is no mistake of the user's is logged whole."""
    if not isinstance(error, UserError):
        LOGGER.warning("%s failed", what, exc_info=error)
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return str(error).partition("\n")[0]

"""What a comparison says: a row a method, who is best, who is to be taken and how sure that is. Knows figures; refuses
to know how they were made and how they are drawn.

Two methods are compared by the paired bootstrap (bootstrap.py) over seeds and, where the objective is the accuracy of
single answers, over test rows; for any other objective over seeds alone. Intervals are for each pair by itself.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trimtab.bootstrap import Difference, paired
from trimtab.cells import Figures
from trimtab.comparison.bench import Bench
from trimtab.comparison.plan import Cell, Plan
from trimtab.config import command
from trimtab.report import number

BY_ROW = "accuracy"
"""The objective that is the mean of what single answers get."""


@dataclass(frozen=True)
class Outcome:
    """What the runs of one method gave."""

    method: str
    epochs: float = math.nan
    lr: float | None = None
    """The chosen learning rate; None where no run worked."""
    grid: Mapping[Cell, Figures] = field(default_factory=dict)
    final: Mapping[Cell, Figures] = field(default_factory=dict)
    errors: tuple[str, ...] = ()


@dataclass(frozen=True)
class SeedRun:
    """A run with the chosen learning rate."""

    seed: int
    dev: float
    score: float
    """The objective on the test rows."""
    metrics: Mapping[str, float]
    seconds: float
    command: str
    """What makes the same run again, and the same score."""
    adapter: str
    """Its folder."""


@dataclass(frozen=True)
class Row:
    """One method."""

    method: str
    lr: float | None
    epochs: float
    rates: Mapping[float, float]
    """The objective on the development rows for each learning rate that was tried."""
    runs: tuple[SeedRun, ...]
    parameters: int
    share: float
    bytes: int
    seconds: float
    """Training time, mean over seeds."""
    peak_memory_mb: float
    difference: Difference | None
    """Score minus the best method's, positive where it is better; None for the best, and where it cannot be told."""
    curve: tuple[tuple[float, float], ...]
    """(epoch, training loss) of the first seed."""
    errors: tuple[str, ...]

    @property
    def scores(self) -> list[float]:
        """The objective on the test rows, one a seed."""
        return [run.score for run in self.runs]

    @property
    def mean(self) -> float:
        """The mean of the scores; nan where no run worked."""
        return statistics.fmean(self.scores) if self.runs else math.nan

    @property
    def deviation(self) -> float:
        """The standard deviation over seeds; nan of fewer than two."""
        return statistics.stdev(self.scores) if len(self.runs) > 1 else math.nan

    @property
    def edge(self) -> bool:
        """Whether the chosen learning rate is the lowest or highest tried, so that a better one may lie beyond."""
        return len(self.rates) > 1 and self.lr in (min(self.rates), max(self.rates))


@dataclass(frozen=True)
class Comparison:
    """A finished comparison."""

    folder: str
    asked: Mapping[str, Any]
    """Model, data, task, objective, seeds, epochs, minutes and the number of rows of each side."""
    rows: tuple[Row, ...]
    """The best first, those without a score last."""
    base: float
    """The frozen base's objective on the test rows."""
    higher: bool
    by_row: bool
    """Whether differences are judged over test rows, too."""
    recommended: str | None
    recommendation: str

    @property
    def objective(self) -> str:
        """The metric that decides."""
        return str(self.asked["objective"])

    def row(self, method: str) -> Row:
        """The row of a method."""
        return next(row for row in self.rows if row.method == method)


def conclude(
    plan: Plan, outcomes: Sequence[Outcome], base: Figures, rows: Mapping[str, int], bench: Bench
) -> Comparison:
    """The comparison of what was run."""
    by_row = plan.objective == BY_ROW and all(
        figures["marks"] is not None for one in outcomes for figures in one.final.values()
    )
    found = [_row(plan, one, bench) for one in outcomes]
    found.sort(key=lambda row: -math.inf if math.isnan(row.mean) else plan.sign * row.mean, reverse=True)
    scored = [row for row in found if row.runs]
    if scored:
        of = {one.method: one for one in outcomes}
        best = of[scored[0].method]
        others = [row for row in found if row is not scored[0]]
        compared = [
            dataclasses.replace(row, difference=difference(plan, of[row.method], best, by_row)) for row in others
        ]
        found = [scored[0], *compared]
    asked = {
        "model": plan.settings.model,
        "data": plan.settings.data,
        "task": plan.settings.task,
        "objective": plan.objective,
        "methods": list(plan.methods),
        "seeds": plan.seeds,
        "epochs": plan.settings.epochs,
        "minutes": plan.minutes,
        "rows": dict(rows),
    }
    recommended = recommend(found)
    return Comparison(
        folder=str(bench.folder),
        asked=asked,
        rows=tuple(found),
        base=float(base["test"].get(plan.objective, math.nan)),
        higher=plan.higher,
        by_row=by_row,
        recommended=recommended.method if recommended else None,
        recommendation=sentence(found, recommended, plan, rows["test"], by_row),
    )


def _row(plan: Plan, outcome: Outcome, bench: Bench) -> Row:
    runs = tuple(_run(plan, cell, figures, bench) for cell, figures in outcome.final.items())
    kept = list(outcome.final.values()) or list(outcome.grid.values())
    first = kept[0] if kept else None
    return Row(
        method=outcome.method,
        lr=outcome.lr,
        epochs=outcome.epochs,
        rates={cell.lr: plan.dev(figures) for cell, figures in outcome.grid.items()},
        runs=runs,
        parameters=first["parameters"]["trainable"] if first else 0,
        share=first["parameters"]["share"] if first else math.nan,
        bytes=first["bytes"] if first else 0,
        seconds=statistics.fmean(one["train"]["seconds"] for one in kept) if kept else math.nan,
        peak_memory_mb=max((one["train"]["peak_memory_mb"] for one in kept), default=math.nan),
        difference=None,
        curve=tuple((epoch, loss) for epoch, loss in first["curve"]) if first else (),
        errors=outcome.errors,
    )


def _run(plan: Plan, cell: Cell, figures: Figures, bench: Bench) -> SeedRun:
    settings = bench.settings_of(cell)
    own = dataclasses.replace(settings, output=f"{settings.output}-again")
    return SeedRun(
        seed=cell.seed,
        dev=plan.dev(figures),
        score=figures["test"][plan.objective],
        metrics=figures["test"],
        seconds=figures["train"]["seconds"],
        command=command(own),
        adapter=str(bench.adapter_folder(cell)),
    )


# -- judging ------------------------------------------------------------------------------------------------------


def difference(plan: Plan, one: Outcome, best: Outcome, by_row: bool) -> Difference | None:
    """How much better a method is than the best one (mostly less than 0), on the seeds that both have.

    None where there is nothing to draw from: no common seed, or one seed and no single answers.
    """
    ours, theirs = ({cell.seed: figures for cell, figures in side.final.items()} for side in (one, best))
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds or (len(seeds) < 2 and not by_row):
        return None
    scores = [np.array([_scores(plan, side[seed], by_row) for seed in seeds]) for side in (ours, theirs)]
    return paired([plan.sign * scores[0]], [plan.sign * scores[1]])


def _scores(plan: Plan, figures: Figures, by_row: bool) -> list[float]:
    return list(figures["marks"]) if by_row else [figures["test"][plan.objective]]


def recommend(rows: Sequence[Row]) -> Row | None:
    """Of the best method and those that are not found to be worse, the one that trains the fewest parameters."""
    scored = [row for row in rows if row.runs]
    if not scored:
        return None
    equal = [scored[0], *(row for row in scored[1:] if row.difference is not None and not row.difference.found)]
    return min(equal, key=lambda row: row.parameters)


def sentence(rows: Sequence[Row], chosen: Row | None, plan: Plan, test_rows: int, by_row: bool) -> str:
    """The recommendation with its reason and its uncertainty."""
    if chosen is None:
        return "No method can be recommended: none of the runs worked."
    best, what = next(row for row in rows if row.runs), plan.objective.replace("_", " ")
    drawn = f"{len(chosen.runs)} seed{'s' * (len(chosen.runs) != 1)} on {test_rows:,} test rows"
    start = f"Take {chosen.method}: {what} {spread(chosen)} over {drawn}"
    if chosen is best:
        rest = [row for row in rows if row.runs and row is not best]
        if not rest:
            return f"{start}; there is no other method with a score to compare it with."
        return f"{start}; {_against(rest)}."
    assert chosen.difference is not None
    behind = -chosen.difference.mean
    interval = f"95 % interval {_signed(-chosen.difference.high)} to {_signed(-chosen.difference.low)}"
    fewer = f"{number(chosen.parameters)} instead of {number(best.parameters)} parameters"
    over = "rows and seeds" if by_row else "seeds"
    return (
        f"{start}; {best.method} came out better by {behind:.3g} ({interval} over {over}), which this comparison "
        f"cannot tell from no difference, and {chosen.method} trains {fewer}."
    )


def _against(rest: Sequence[Row]) -> str:
    """What is known of the methods behind the best one."""
    worse = [row for row in rest if row.difference is not None and row.difference.found]
    equal = [row for row in rest if row.difference is not None and not row.difference.found]
    if len(worse) == len(rest):
        near = rest[0]
        assert near.difference is not None
        return (
            f"every other method is worse beyond chance, the next one, {near.method}, by {-near.difference.mean:.3g} "
            f"(95 % interval {_signed(-near.difference.high)} to {_signed(-near.difference.low)})"
        )
    if not equal:
        return "it has the best mean, and more seeds would be needed to say how sure that is"
    names = ", ".join(row.method for row in equal)
    return f"it has the best mean, and of those not found to be worse ({names}) none trains fewer parameters"


def _signed(value: float) -> str:
    return f"{value + 0.0:+.3f}"


def spread(row: Row) -> str:
    """Mean ± standard deviation; one value alone."""
    if not row.runs:
        return "–"
    return f"{row.mean:.3f}" + ("" if math.isnan(row.deviation) else f" ± {row.deviation:.3f}")


# -- files --------------------------------------------------------------------------------------------------------


def as_json(found: Comparison) -> dict[str, Any]:
    """Everything as plain values; what is no number is null."""
    rows = []
    for row in found.rows:
        plain = dataclasses.asdict(row)
        plain["rates"] = {f"{lr:g}": dev for lr, dev in row.rates.items()}
        rows.append({**plain, "mean": row.mean, "deviation": row.deviation, "edge": row.edge})
    return _plain({**dataclasses.asdict(found), "rows": rows})


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


COLUMNS = (
    "method",
    "seed",
    "lr",
    "epochs",
    "parameters",
    "share",
    "bytes",
    "seconds",
    "dev",
    "test",
    "error",
    "command",
)


def as_csv(found: Comparison) -> str:
    """One line a run; a method without one has a line with its error."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in found.rows:
        own = [row.lr, row.epochs, row.parameters, row.share, row.bytes]
        for run in row.runs:
            writer.writerow([row.method, run.seed, *own, run.seconds, run.dev, run.score, "", run.command])
        for error in row.errors:
            writer.writerow([row.method, "", "", "", "", "", "", "", "", "", error, ""])
    return text.getvalue()

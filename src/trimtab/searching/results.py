"""What a search says: every trial, the architectures that were trained again, and which of them to take. Knows figures;
refuses to know how they were made and how they are drawn.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.bootstrap import Difference
from trimtab.comparison.results import Comparison, Row, as_json, spread
from trimtab.report import number
from trimtab.searching.space import layer_map
from trimtab.searching.trials import Trial


@dataclass(frozen=True)
class SearchResult:
    """A finished search."""

    folder: str
    trials: tuple[Trial, ...]
    """In the order in which they were begun."""
    front: tuple[Trial, ...]
    """Those that no other beats in all objectives, by the development rows; the best score first."""
    objectives: tuple[str, ...]
    comparison: Comparison
    """The architectures that were trained with several seeds and scored on the test rows."""
    method: str | None
    """The method to take; None where no run worked."""
    lr: float | None
    adapter: str | None
    """The folder of its adapter."""
    recommendation: str
    layers: tuple[Mapping[str, str], ...]
    """For each layer of the model what the method has there: names with sizes."""
    commands: Mapping[int, str]
    """For each trial's number what trains it again and scores the same development rows."""
    max_share: float | None = None

    @property
    def row(self) -> Row:
        """The chosen method's row. Raises StopIteration where there is none."""
        return next(row for row in self.comparison.rows if row.method == self.method)


def pick(
    front: Sequence[Trial], trials: Sequence[Trial], count: int, max_share: float | None, sign: int
) -> list[Trial]:
    """What is trained again: the best `count` of the front, each method once, and the best method that stands alone.

    With `max_share` the best of those that train no larger share; where there is none, the smallest one.
    """
    within = [trial for trial in front if max_share is None or trial.share <= max_share]
    within = within or sorted(front, key=lambda trial: trial.parameters)[:1]
    picked: dict[str, Trial] = {}
    for trial in within:
        if len(picked) < count:
            picked.setdefault(trial.method, trial)
    alone = [trial for trial in trials if trial.start is not None and trial.stopped_at is None]
    if alone:
        best = max(alone, key=lambda trial: (sign * trial.score, -trial.parameters))
        picked.setdefault(best.method, best)
    return list(picked.values())


def choose(rows: Sequence[Row], max_share: float | None, sign: int) -> Row | None:
    """The row with the best mean on the development rows, of those that train no larger share; the smaller of equals.

    The test rows have no say in it.
    """
    worked = [row for row in rows if row.runs and (max_share is None or row.share <= max_share)]
    return max(worked, key=lambda row: (sign * dev_mean(row), -row.parameters), default=None)


def dev_mean(row: Row) -> float:
    """The mean over seeds on the development rows."""
    return statistics.fmean(run.dev for run in row.runs)


def sentence(
    chosen: Row | None,
    found: Comparison,
    trials: int,
    rival: Row | None,
    difference: Difference | None,
    max_share: float | None,
) -> str:
    """The recommendation with its reason and its uncertainty."""
    limit = f" that trains at most {max_share:.3%} of the model" if max_share is not None else ""
    if chosen is None:
        if any(row.runs for row in found.rows):
            return f"No architecture can be recommended: none{limit} was found; try more trials or a larger share."
        return "No architecture can be recommended: none of the runs worked."
    what, seeds = found.objective.replace("_", " "), len(chosen.runs)
    again = sum(bool(row.runs) for row in found.rows)
    start = (
        f"Take {chosen.method} with the learning rate {chosen.lr:g}: {what} {spread(chosen)} over {seeds} "
        f"seed{'s' * (seeds != 1)} on {found.asked['rows']['test']:,} test rows with {number(chosen.parameters)} "
        f"trained parameters ({chosen.share:.3%}), on development rows the best{limit} of {again} trained again out of "
        f"{trials} trials"
    )
    if rival is None or rival is chosen:
        return f"{start}; there is no other single method with a score to compare it with."
    if difference is None:
        return f"{start}; more seeds would be needed to compare it with {rival.method}."
    interval = f"95 % interval {difference.low:+.3f} to {difference.high:+.3f}"
    verdict = "" if difference.found else ", which cannot be told from no difference"
    return (
        f"{start}; against {rival.method}, the best single method of usual size, it is {difference.mean:+.3f} "
        f"({interval}{verdict}) with {number(chosen.parameters)} instead of {number(rival.parameters)} parameters."
    )


def layers_of(method: str | None, count: int) -> tuple[Mapping[str, str], ...]:
    """The layer map of the chosen method."""
    return tuple(layer_map(method, count)) if method is not None else ()


# -- files --------------------------------------------------------------------------------------------------------


def to_json(found: SearchResult) -> dict[str, Any]:
    """Everything as plain values."""
    compared = as_json(found.comparison)
    trials = [
        {**dataclasses.asdict(trial), "command": found.commands[trial.number], "front": trial in found.front}
        for trial in found.trials
    ]
    return {
        **compared,
        "objectives": list(found.objectives),
        "max_share": found.max_share,
        "method": found.method,
        "lr": found.lr,
        "adapter": found.adapter,
        "layers": [dict(layer) for layer in found.layers],
        "trials": trials,
    }


COLUMNS = ("trial", "method", "lr", "start", "dev", "parameters", "share", "seconds", "stopped_at", "front", "command")


def trials_csv(found: SearchResult) -> str:
    """One line a trial."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for one in found.trials:
        own = [one.number, one.method, one.lr, one.start or "", one.score, one.parameters, one.share, one.seconds]
        stopped = "" if one.stopped_at is None else one.stopped_at
        writer.writerow([*own, stopped, int(one in found.front), found.commands[one.number]])
    return text.getvalue()

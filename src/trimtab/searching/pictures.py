"""The picture of a search: every trial by its parameters and its score. Knows matplotlib; refuses to know how trials
are judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trimtab.comparison.pictures import COLOURS, INK, blank, hover, name_points
from trimtab.searching.results import SearchResult
from trimtab.searching.trials import Trial

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOUND, START, TRIED = COLOURS[0], COLOURS[1], COLOURS[7]


def trials_picture(found: SearchResult) -> Figure:
    """The metric on the development rows against trained parameters; the line joins the front."""
    figure, axis = blank((7.2, 4.2))
    line = sorted(found.front, key=lambda trial: trial.parameters)
    axis.plot([_x(one) for one in line], [one.score for one in line], color=FOUND, alpha=0.5, linewidth=1.2, zorder=1)
    for trial in found.trials:
        marker, colour, size, filled = _look(trial, found.front)
        face = colour if filled else "none"
        (point,) = axis.plot(
            _x(trial), trial.score, marker, color=colour, markerfacecolor=face, markersize=size, zorder=2
        )
        point.set_gid(hover(_said(trial, found)))
    axis.set_xscale("log")
    axis.set_xlabel("trained parameters")
    axis.set_ylabel(f"{found.comparison.objective.replace('_', ' ')} on the development rows")
    axis.grid(alpha=0.15, color=INK)
    axis.margins(x=0.12, y=0.1)
    figure.draw_without_rendering()
    name_points(axis, [(str(one.start), _x(one), one.score) for one in _starts(found.trials)], INK)
    return figure


def _starts(trials: Sequence[Trial]) -> list[Trial]:
    """One trial a start: a repeated one has the same figures."""
    return list({one.start: one for one in trials if one.start is not None}.values())


def _x(trial: Trial) -> float:
    return max(1.0, float(trial.parameters))


def _look(trial: Trial, front: Sequence[Trial]) -> tuple[str, str, int, bool]:
    """Marker, colour, size, and whether it is filled."""
    if trial.start is not None:
        return "D", START, 6, trial.stopped_at is None
    if trial in front:
        return "o", FOUND, 8, True
    return "o", TRIED, 5, trial.stopped_at is None


def _said(trial: Trial, found: SearchResult) -> str:
    stopped = f", stopped after {trial.stopped_at:.0%}" if trial.stopped_at is not None else ""
    score = f"{found.comparison.objective} {trial.score:.3f}"
    return f"{trial.method}, lr {trial.lr:g}: {score}, {trial.parameters:,} parameters, {trial.seconds:.3g} s{stopped}"

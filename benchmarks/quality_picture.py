"""The quality benchmark's picture. Knows matplotlib; refuses to know how results are read and compared."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality_results import Results, size_of
from trimtab.comparison.pictures import name_points

REFERENCES = ("full", "head", "zero-shot")
"""Lines of the picture; the other methods are points."""


@dataclass(frozen=True)
class Point:
    """A method in the picture."""

    name: str
    trained: int
    mean: float
    deviation: float


def draw(results: Results, file: Path) -> bool:
    """Accuracy against trained parameters, one panel a model; False where there is nothing to draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = [model for model in results.plan.models if any(map(results.means, results.entries(model)))]
    if not models:
        return False
    figure, axes = pyplot.subplots(1, len(models), figsize=(5.2 * len(models), 5.4), squeeze=False)
    points = {model: _points(results, model) for model in models}
    for axis, model in zip(axes[0], models, strict=True):
        _panel(axis, results, model, points[model])
    axes[0][0].set_ylabel("accuracy, mean over tasks")
    figure.tight_layout()
    for axis, model in zip(axes[0], models, strict=True):
        name_points(
            axis, [(point.name, point.trained, point.mean) for point in points[model]]
        )  # after the layout, which moves the points
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)
    return True


def _points(results: Results, model: str) -> list[Point]:
    points = []
    for entry in results.entries(model):
        means = results.means(entry)
        if means and entry.name not in REFERENCES:
            run = next(iter(results.seeds(entry, results.counting(model)[0]).values()))
            points.append(Point(entry.name, size_of(run, "trained"), statistics.fmean(means), _deviation(means)))
    return points


def _panel(axis: Any, results: Results, model: str, points: Sequence[Point]) -> None:
    for entry in results.entries(model):
        means = results.means(entry)
        if means and entry.name in REFERENCES:
            _reference(axis, entry.name, means)
    for point in points:
        axis.errorbar(point.trained, point.mean, point.deviation or None, fmt="o", capsize=3, markersize=5, color="C0")
    axis.set_xscale("log")
    axis.set_xlabel("trained parameters without the head")
    axis.set_title(f"{model}: {', '.join(results.counting(model))}")
    axis.grid(alpha=0.3)
    axis.margins(x=0.22, y=0.12)


def _reference(axis: Any, name: str, means: Sequence[float]) -> None:
    mean, deviation = statistics.fmean(means), _deviation(means)
    style = "-" if name == "full" else "--"
    axis.axhline(mean, color="0.35", linewidth=1.2, linestyle=style)
    axis.axhspan(mean - deviation, mean + deviation, color="0.35", alpha=0.12, linewidth=0)
    axis.annotate(name, (0.01, mean), xycoords=("axes fraction", "data"), xytext=(0, 3),
                  textcoords="offset points", fontsize=9, color="0.25")  # fmt: skip


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0

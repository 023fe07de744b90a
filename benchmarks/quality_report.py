"""The quality benchmark's report. Knows cells' figures, tables and the picture; refuses to know how a cell is run.

Whatever is missing is said: a report of half the runs is a correct report of that half.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bootstrap import RESAMPLES, Answers, paired
from benchmarks.cells import Figures, known, write
from benchmarks.pages import fill, header, row, spread
from benchmarks.quality import CHOOSING_TASK, Cell, Entry, Plan

MARGIN = 0.10
"""How far full tuning has to be above the majority class for a task to count."""
PAIRS = (("houlsby", "full"), ("adamix", "full"), ("adamix", "single-6"), ("adamix", "single-3"))
REFERENCES = ("full", "head", "zero-shot")
"""Lines of the picture; the other methods are points."""


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
        return bool(runs) and _mean(runs, "test_accuracy") < runs[0]["majority"] + MARGIN

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


def report(plan: Plan, folder: Path, docs: Path | None) -> None:
    """Print the tables; write them, the figures and the picture into the documentation, or beside the results."""
    results = Results(plan, known(folder, plan.every_cell()))
    blocks = tables(results)
    for lines in blocks.values():
        print("\n".join(lines), end="\n\n")
    if docs is None:
        text = "\n\n".join(f"## {name}\n\n" + "\n".join(lines) for name, lines in blocks.items())
        write(folder / "report.md", f"# Quality, the quick run\n\n{text}\n")
        write(folder / "report.json", figures_text(results))
        draw(results, folder / "report.png")
        return
    page = docs / "quality.md"
    picture = draw(results, docs / "pictures/quality.png")
    blocks["picture"] = [ALTERNATIVE] if picture else ["No results yet."]
    write(page, fill(page.read_text(encoding="utf-8"), blocks, page.name))
    write(docs / "quality.json", figures_text(results))


def tables(results: Results) -> dict[str, list[str]]:
    """Every table of the page by the name of its place."""
    return {
        "missing": missing_lines(results),
        "tasks": task_table(results),
        **{model: accuracy_table(results, model) for model in results.plan.models},
        "differences": difference_lines(results),
        "costs": cost_table(results),
        "rates": rate_table(results),
    }


def figures_text(results: Results) -> str:
    """All cells' figures without the predictions, one line a cell."""
    lines = []
    for cell, figures in results.cells.items():
        short = {key: _rounded(value) for key, value in figures.items() if key not in ("predicted", "gold")}
        lines.append(json.dumps({"cell": asdict(cell), "figures": short}))
    return "[\n" + ",\n".join(lines) + "\n]\n"


def _rounded(value: Any) -> Any:
    return round(value, 5) if isinstance(value, float) else value


def _mean(runs: Sequence[Figures], key: str) -> float:
    return statistics.fmean(run[key] for run in runs)


# -- tables -------------------------------------------------------------------------------------------------------


def missing_lines(results: Results) -> list[str]:
    """What the plan has and the results have not."""
    lines = []
    for entry in results.plan.entries:
        grid = results.plan.grid(entry)
        tried = sum(cell in results.cells for cell in grid)
        if tried < len(grid):
            lines.append(f"- {entry.model}, {entry.name}: {tried} of {len(grid)} learning rates tried, none chosen yet")
            continue
        counts = {task: len(results.seeds(entry, task)) for task in results.tasks(entry.model)}
        short = [f"{count} of {entry.seeds} seeds on {task}" for task, count in counts.items() if count < entry.seeds]
        if short:
            lines.append(f"- {entry.model}, {entry.name}: {', '.join(short)}")
    if not lines:
        return ["All runs of the plan are there."]
    return ["Not all runs of the plan are there:", "", *lines]


def task_table(results: Results) -> list[str]:
    """What the tasks are, and whether they count."""
    lines = header(
        "model", "task", "tokens a row", "training rows", "dev", "test", "majority", "full tuning", "counts"
    )
    for model in results.plan.models:
        for task in results.tasks(model):
            lines += _task_row(results, model, task)
    return lines


def _task_row(results: Results, model: str, task: str) -> list[str]:
    entries = results.entries(model)
    runs = [run for entry in entries for run in results.seeds(entry, task).values()]
    if not runs:
        return []
    full = results.entry(model, "full")
    tuned = [run["test_accuracy"] for run in results.seeds(full, task).values()] if full else []
    counts = "**no**" if results.fails(model, task) else "yes" if tuned else "not known without full tuning"
    length = results.plan.models[model].lengths[task]
    numbers = (f"{runs[0]['train_rows']:,}", f"{runs[0].get('dev_rows', 0):,}", f"{runs[0]['test_rows']:,}")
    majority = f"{runs[0]['majority']:.3f}"
    return [row(model, task, f"≤ {length}", *numbers, majority, spread(tuned) if tuned else "–", counts)]


def accuracy_table(results: Results, model: str) -> list[str]:
    """One line a method: its size, and the accuracy on each task and over those that count."""
    tasks = results.tasks(model)
    counting = results.counting(model)
    over = "mean" if counting == tasks else f"mean of {', '.join(counting)}"
    lines = header("method", "", "epochs", "trained", "deployed", "share", "file", *tasks, *([over] * (len(tasks) > 1)))
    for entry in results.entries(model):
        runs = [run for task in tasks for run in results.seeds(entry, task).values()]
        scores = [_seeds_text([run["test_accuracy"] for run in results.seeds(entry, task).values()], entry.seeds)
                  for task in tasks]  # fmt: skip
        mean = [_seeds_text(results.means(entry), entry.seeds)] * (len(tasks) > 1)
        lines.append(row(entry.name, _method(entry), str(entry.epochs or "–"), *_sizes(runs[0]), *scores, *mean))
    return lines if len(lines) > 2 else ["No results yet."]


def _method(entry: Entry) -> str:
    return f"`{entry.method}`" if entry.method not in (None, entry.name) else ""


def _seeds_text(values: Sequence[float], planned: int) -> str:
    """Mean ± standard deviation, and how many seeds where some are missing."""
    if not values:
        return "–"
    return spread(values) + (f" ({len(values)} of {planned} seeds)" if len(values) < planned else "")


def size_of(run: Figures, when: str) -> int:
    """Parameters `trained` or `deployed`, the task head's left out."""
    return max(0, run[f"{when}_parameters"] - run["head_parameters"])


def _sizes(run: Figures) -> list[str]:
    deployed = size_of(run, "deployed")
    kilobytes = run["deployed_bytes"] / 1000
    file = f"{kilobytes / 1000:.1f} MB" if kilobytes >= 1000 else f"{kilobytes:.0f} kB"
    return [f"{size_of(run, 'trained'):,}", f"{deployed:,}", f"{100 * deployed / run['base_parameters']:.2f} %", file]


def difference_lines(results: Results) -> list[str]:
    """The bootstrap's lines."""
    lines = []
    for model in results.plan.models:
        for one, other in PAIRS:
            pair = [entry for name in (one, other) if (entry := results.entry(model, name))]
            if len(pair) == 2:
                lines += _difference(results, pair[0], pair[1])
    if not lines:
        return ["No two methods to compare yet."]
    title = header("model", "methods", "tasks", "seeds", "difference in points", "95 % interval")
    return [*title, *lines, "", f"{RESAMPLES:,} resamples."]


def _difference(results: Results, one: Entry, other: Entry) -> list[str]:
    tasks = [task for task in results.counting(one.model) if results.common_seeds([one, other], [task])]
    seeds = results.common_seeds([one, other], tasks)
    if not seeds:
        return []
    found = paired([_right(results, one, task, seeds) for task in tasks],
                   [_right(results, other, task, seeds) for task in tasks])  # fmt: skip
    planned = min(one.seeds, other.seeds)
    count = str(len(seeds)) if len(seeds) == planned else f"{len(seeds)} of {planned}"
    interval = f"{100 * found.low:+.2f} to {100 * found.high:+.2f}"
    return [row(one.model, f"{one.name} − {other.name}", ", ".join(tasks), count, f"{100 * found.mean:+.2f}", interval)]


def _right(results: Results, entry: Entry, task: str, seeds: Sequence[int]) -> Answers:
    runs = results.seeds(entry, task)
    return np.array([[a == b for a, b in zip(runs[seed]["predicted"], runs[seed]["gold"], strict=True)]
                     for seed in seeds])  # fmt: skip


def cost_table(results: Results) -> list[str]:
    """What a training run takes."""
    lines = header("model", "method", "task", "training", "tokens a second", "peak memory")
    for model in results.plan.models:
        for entry in results.entries(model):
            for task in results.tasks(model):
                runs = list(results.seeds(entry, task).values())
                if runs and entry.method is not None:
                    seconds, speed = _mean(runs, "train_seconds"), _mean(runs, "train_tokens_per_second")
                    memory = max(run["train_peak_memory_mb"] for run in runs)
                    lines.append(row(model, entry.name, task, f"{seconds:.0f} s", f"{speed:,.0f}", f"{memory:.0f} MB"))
    return lines


def rate_table(results: Results) -> list[str]:
    """Dev accuracy with every learning rate; the chosen one stands out."""
    lines = header("model", "method", "learning rates and dev accuracy", "chosen")
    edge = False
    for entry in results.plan.entries:
        grid = [cell for cell in results.plan.grid(entry) if cell in results.cells]
        if not grid:
            continue
        lr = results.plan.chosen(entry, results.cells)
        tried = ", ".join(f"{cell.lr:g}: {results.cells[cell]['dev_accuracy']:.3f}" for cell in grid)
        outer = lr in (entry.lrs[0], entry.lrs[-1])
        edge = edge or outer
        chosen = "not yet" if lr is None else f"{lr:g}{' (edge)' if outer else ''}"
        lines.append(row(entry.model, entry.name, tried, chosen))
    if len(lines) == 2:
        lrs = ", ".join(f"{entry.name} {entry.lrs[0]:g}" for entry in results.plan.entries if entry.method)
        return [f"No learning rate was chosen here; used were: {lrs}."]
    note = ["", "(edge): the best of those tried is the lowest or the highest, so a better one may lie beyond."]
    return [*lines, "", f"Chosen on the dev rows of {CHOOSING_TASK}, seed 0.", *(note if edge else [])]


# -- picture ------------------------------------------------------------------------------------------------------

ALTERNATIVE = "![Accuracy of each method against its trained parameters](pictures/quality.png)"


def draw(results: Results, file: Path) -> bool:
    """Accuracy against trained parameters, one panel a model; False where there is nothing to draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = [model for model in results.plan.models if any(map(results.means, results.entries(model)))]
    if not models:
        return False
    figure, axes = pyplot.subplots(1, len(models), figsize=(5.2 * len(models), 4.6), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        _panel(axis, results, model)
    axes[0][0].set_ylabel("accuracy, mean over tasks")
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)
    return True


def _panel(axis: Any, results: Results, model: str) -> None:
    points = []
    for entry in results.entries(model):
        means = results.means(entry)
        if not means:
            continue
        if entry.name in REFERENCES:
            _reference(axis, entry.name, means)
            continue
        run = next(iter(results.seeds(entry, results.tasks(model)[0]).values()))
        points.append((size_of(run, "trained"), statistics.fmean(means), _deviation(means), entry.name))
    for trained, mean, deviation, name in points:
        mixed = name in ("adamix", "houlsby")
        axis.errorbar(trained, mean, deviation or None, fmt="o", capsize=3, markersize=6, color="C3" if mixed else "C0")
    axis.set_xscale("log")
    axis.set_xlabel("trained parameters without the head")
    axis.set_title(f"{model}: {', '.join(results.counting(model))}")
    axis.grid(alpha=0.3)
    axis.margins(x=0.18, y=0.12)
    _name_points(axis, points)


def _reference(axis: Any, name: str, means: Sequence[float]) -> None:
    mean, deviation = statistics.fmean(means), _deviation(means)
    style = "-" if name == "full" else "--"
    axis.axhline(mean, color="0.35", linewidth=1.2, linestyle=style)
    axis.axhspan(mean - deviation, mean + deviation, color="0.35", alpha=0.12, linewidth=0)
    axis.annotate(name, (0.01, mean), xycoords=("axes fraction", "data"), xytext=(0, 3),
                  textcoords="offset points", fontsize=9, color="0.25")  # fmt: skip


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _name_points(axis: Any, points: Sequence[tuple[float, float, float, str]]) -> None:
    """Names beside the points, moved apart vertically where they would overlap."""
    axis.figure.canvas.draw()
    placed: list[tuple[float, float]] = []  # pixels of the names' left ends
    for trained, mean, _, name in sorted(points, key=lambda point: point[1]):
        x, y = axis.transData.transform((trained, mean))
        left, bottom = x + 8, y - 5
        while any(abs(left - x0) < 90 and abs(bottom - y0) < 13 for x0, y0 in placed):
            bottom += 3
        placed.append((left, bottom))
        axis.annotate(name, (trained, mean), xytext=(left, bottom), textcoords="figure pixels", fontsize=9)

"""The quality benchmark's report. Knows cells' figures, tables and the picture; refuses to know how a cell is run.

Whatever is missing is said: a report of half the runs is a correct report of that half.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.pages import fill, header, row, spread
from benchmarks.quality import CHOOSING_TASK, Cell, Entry, Plan
from benchmarks.quality_picture import draw
from benchmarks.quality_results import Results, mean, size_of
from trimtab.bootstrap import RESAMPLES, Answers, paired
from trimtab.cells import Figures, known, write

PAIRS = (
    ("houlsby", "full"), ("adamix", "full"), ("adamix", "single-6"), ("adamix", "single-3"),
    ("mask", "full"), ("diff-pruning", "full"), ("ladder", "lora"), ("side", "lora"),
)  # fmt: skip
ALTERNATIVE = "![Accuracy of each method against its trained parameters](pictures/quality.png)"
CAPTION = "Bars and the shades of the lines: the standard deviation over seeds of the mean over tasks."


def report(plan: Plan, folder: Path, docs: Path | None) -> None:
    """Print the tables; write them, the figures and the picture into the documentation, or beside the results."""
    cells = plan.every_cell()
    before = {} if docs is None else committed(docs / "quality.json", cells)
    results = Results(plan, before | known(folder, cells))
    former = [] if docs is None else former_lines((docs / "quality.md").read_text(encoding="utf-8"))
    blocks = tables(results, former)
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
    blocks["picture"] = [ALTERNATIVE, "", CAPTION] if picture else ["No results yet."]
    write(page, fill(page.read_text(encoding="utf-8"), blocks, page.name))
    write(docs / "quality.json", figures_text(results))


def committed(file: Path, cells: Sequence[Cell]) -> dict[Cell, Figures]:
    """The cells whose figures the documentation has, without predictions."""
    if not file.exists():
        return {}
    found = {json.dumps(one["cell"]): one["figures"] for one in json.loads(file.read_text(encoding="utf-8"))}
    names = {cell: json.dumps(json.loads(json.dumps(asdict(cell)))) for cell in cells}
    return {cell: found[name] for cell, name in names.items() if name in found}


def former_lines(page: str) -> list[str]:
    """The lines of the page's table of differences."""
    block = page.partition("<!-- differences -->")[2].partition("<!-- /differences -->")[0]
    return [line for line in block.splitlines() if line.startswith("| ") and not line.startswith("| model ")]


def _pair(line: str) -> tuple[str, ...]:
    return tuple(line.split(" | ")[:2])


def tables(results: Results, former: Sequence[str] = ()) -> dict[str, list[str]]:
    """Every table of the page by the name of its place."""
    return {
        "missing": missing_lines(results),
        "tasks": task_table(results),
        **{model: accuracy_table(results, model) for model in results.plan.models},
        "differences": difference_lines(results, former),
        "costs": cost_table(results),
        "rates": rate_table(results),
    }


def figures_text(results: Results) -> str:
    """All cells' figures without the predictions, one line a cell."""
    lines = []
    for cell, figures in results.cells.items():
        short = {key: _rounded(value) for key, value in figures.items() if key not in ("predicted", "gold")}
        lines.append(json.dumps({"cell": asdict(cell), "figures": short}))
    return "[" + ",".join("\n" + line for line in lines) + "\n]\n"


def _rounded(value: Any) -> Any:
    return round(value, 5) if isinstance(value, float) else value


# -- tables -------------------------------------------------------------------------------------------------------


def missing_lines(results: Results) -> list[str]:
    """What the plan has and the results have not."""
    lines = [line for model in results.plan.models for line in _missing(results, model)]
    if not lines:
        return ["All runs of the plan are there."]
    return ["Not all runs of the plan are there:", "", *lines]


def _missing(results: Results, model: str) -> list[str]:
    """The methods of a model without any run in one line, the unfinished ones in a line each."""
    lines, nothing = [], []
    for entry in (entry for entry in results.plan.entries if entry.model == model):
        grid = results.plan.grid(entry)
        tried = sum(cell in results.cells for cell in grid)
        counts = {task: len(results.seeds(entry, task)) for task in results.tasks(model)}
        short = [f"{count} of {entry.seeds} seeds on {task}" for task, count in counts.items() if count < entry.seeds]
        if not tried and not any(counts.values()):
            nothing.append(entry.name)
        elif tried < len(grid):
            lines.append(f"- {model}, {entry.name}: {tried} of {len(grid)} learning rates tried, none chosen yet")
        elif short:
            lines.append(f"- {model}, {entry.name}: {', '.join(short)}")
    return [*lines, *([f"- {model}, nothing yet: {', '.join(nothing)}"] if nothing else [])]


def task_table(results: Results) -> list[str]:
    """What the tasks are, and whether they count."""
    lines = header("model", "task", "tokens a row", "training rows", "dev", "test", "majority", "full tuning", "counts")
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
        over_tasks = [_seeds_text(results.means(entry), entry.seeds)] * (len(tasks) > 1)
        lines.append(row(entry.name, _method(entry), str(entry.epochs or "–"), *_sizes(runs[0]), *scores, *over_tasks))
    return lines if len(lines) > 2 else ["No results yet."]


def _method(entry: Entry) -> str:
    return f"`{entry.method}`" if entry.method not in (None, entry.name) else ""


def _seeds_text(values: Sequence[float], planned: int) -> str:
    """Mean ± standard deviation, and how many seeds where some are missing."""
    if not values:
        return "–"
    return spread(values) + (f" ({len(values)} of {planned} seeds)" if len(values) < planned else "")


def _sizes(run: Figures) -> list[str]:
    deployed = size_of(run, "deployed")
    kilobytes = run["deployed_bytes"] / 1000
    file = f"{kilobytes / 1000:.1f} MB" if kilobytes >= 1000 else f"{kilobytes:.0f} kB"
    return [f"{size_of(run, 'trained'):,}", f"{deployed:,}", f"{100 * deployed / run['base_parameters']:.2f} %", file]


def difference_lines(results: Results, former: Sequence[str] = ()) -> list[str]:
    """The bootstrap's lines, and the former ones of pairs whose predictions are not at hand."""
    lines = []
    for model in results.plan.models:
        for one, other in PAIRS:
            pair = [entry for name in (one, other) if (entry := results.entry(model, name))]
            if len(pair) == 2:
                lines += _difference(results, pair[0], pair[1])
    pairs = {_pair(line) for line in lines}
    lines = [*(line for line in former if _pair(line) not in pairs), *lines]
    if not lines:
        return ["No two methods to compare yet."]
    title = header("model", "methods", "tasks", "seeds", "difference in points", "95 % interval")
    return [*title, *lines, "", f"{RESAMPLES:,} resamples."]


def _difference(results: Results, one: Entry, other: Entry) -> list[str]:
    tasks = [task for task in results.counting(one.model) if results.common_seeds([one, other], [task])]
    seeds = results.common_seeds([one, other], tasks)
    runs = [results.seeds(entry, task)[seed] for entry in (one, other) for task in tasks for seed in seeds]
    if not runs or any("predicted" not in run for run in runs):
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
                    seconds, speed = mean(runs, "train_seconds"), mean(runs, "train_tokens_per_second")
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

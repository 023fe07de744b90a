"""What the search benchmark's results say: the tables of docs/search.md and its picture. Knows results; refuses to know
how they were made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.pages import fill, header, row, spread
from trimtab.bootstrap import Difference, paired
from trimtab.cells import write

PAGE, DATA, PICTURE = "search.md", "search.json", "search.png"
COLOURS = {"random": "#7F7F7F", "tpe": "#0072B2", "nsga2": "#D55E00", "gp": "#009E73"}
SEARCHES = {"alone": "random points, all trained to the end", "tpe": "`trimtab search`",
            "random": "`trimtab search --sampler random`"}  # fmt: skip
"""What the searches that are compared as a whole are called."""


def write_all(found: Mapping[str, Any], folder: Path) -> None:
    """Prints the tables, and writes them into the page where the folder has one, with the picture and the numbers."""
    blocks = {name: make(found[part], found["sizes"]) for name, part, make in BLOCKS if part in found}
    for name, lines in blocks.items():
        print(f"\n{name}", *lines, sep="\n")
    page = folder / PAGE
    if page.is_file():
        write(page, fill(page.read_text(encoding="utf-8"), blocks, PAGE))
    write(folder / DATA, json.dumps(without_answers(found), indent=1) + "\n")
    if "samplers" in found:
        pictures = folder / "pictures" if (folder / "pictures").is_dir() else folder
        draw(found["samplers"], found.get("searches", {}), pictures / PICTURE)


def without_answers(found: Mapping[str, Any]) -> dict[str, Any]:
    """The results without the test rows' single answers."""
    plain = json.loads(json.dumps(found))
    for task in plain.get("found", {}).get("tasks", {}).values():
        for one in task.values():
            del one["marks"]
    return plain


# -- samplers -----------------------------------------------------------------------------------------------------


def samplers_table(found: Mapping[str, Any], sizes: Mapping[str, Any]) -> list[str]:
    """The hypervolume behind the last trial, on real trials and on the surrogate."""
    lines = [
        f"{sizes['sampler_model']}, sarcasm, {sizes['train']} rows to train on and {sizes['dev']} to score by, "
        f"{sizes['epochs']:g} epochs, {sizes['trials']} trials a repeat, {sizes['repeats']} repeats of real trials and "
        f"{sizes['surrogate_repeats']} on the surrogate (a forest on {found['table']} real trials; rank correlation of "
        f"its cross-validated guesses with the truth {found['agreement']:.2f}). No halving and no "
        "named methods here.",
        "",
        *header("sampler", "real trials", "surrogate", "surrogate, against random"),
    ]
    random = np.array([one[-1] for one in found["surrogate"]["random"]])
    for name, runs in sorted(found["surrogate"].items(), key=lambda item: -np.mean([one[-1] for one in item[1]])):
        real = [one[-1] for one in found["real"].get(name, [])]
        guessed = np.array([one[-1] for one in runs])
        against = "–" if name == "random" else interval(paired([guessed[:, None]], [random[:, None]]))
        lines.append(row(name, spread(real) if real else "–", spread(list(guessed)), against))
    return [*lines, "", f"![Hypervolume by trials](pictures/{PICTURE})"]


def searches_table(found: Mapping[str, Any], sizes: Mapping[str, Any]) -> list[str]:
    """The hypervolume of whole searches, and of random search with as much training."""
    ends = {name: np.array([run[-1] for run in one["curves"]]) for name, one in found.items()}
    lines = [
        f"The same model and rows, {sizes['search_repeats']} repeats, each of which is given the steps of "
        f"{sizes['trials']} whole trainings. Differences: paired bootstrap over repeats.",
        "",
        *header("search", "hypervolume", "against random points", "trials a repeat", "stopped early"),
    ]
    for name, one in found.items():
        against = "–" if name == "alone" else interval(_over_repeats(ends[name], ends["alone"]))
        counts = (f"{np.mean(one[key]):.0f}" for key in ("trials", "stopped"))
        lines.append(row(SEARCHES[name], spread(list(ends[name])), against, *counts))
    against = interval(_over_repeats(ends["tpe"], ends["random"]))
    return [*lines, "", f"{SEARCHES['tpe']} against {SEARCHES['random']}: {against}."]


def _over_repeats(one: Any, other: Any) -> Difference:
    return paired([one[:, None]], [other[:, None]])


def interval(difference: Difference, digits: int = 3) -> str:
    """A difference with its 95 % interval."""
    return f"{difference.mean:+.{digits}f} [{difference.low:+.{digits}f}, {difference.high:+.{digits}f}]"


def draw(found: Mapping[str, Any], searches: Mapping[str, Any], file: Path) -> None:
    """Hypervolume by whole trainings, mean over repeats with every repeat behind it; whole searches are dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    real, surrogate = figure.subplots(1, 2)
    whole = {name: one["curves"] for name, one in searches.items()}
    alone = {**found["real"], "random": whole.pop("alone", found["real"]["random"])}
    for name, runs in alone.items():
        draw_runs(real, runs, name, "-", f"{name} alone ({len(runs)} repeats)")
    for name, runs in whole.items():
        draw_runs(real, runs, name, "--", f"search, {name} ({len(runs)})")
    for name, runs in found["surrogate"].items():
        draw_runs(surrogate, runs, name, "-", f"{name} alone ({len(runs)})")
    for axis, title in ((real, "real trials"), (surrogate, "surrogate")):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("whole trainings")
        axis.set_ylabel("hypervolume")
        axis.grid(alpha=0.2)
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=110)


def draw_runs(axis: Any, runs: Sequence[Sequence[float]], name: str, style: str, label: str) -> None:
    """The mean of some curves, and each of them faintly."""
    trainings = range(1, len(runs[0]) + 1)
    for one in runs:
        axis.plot(trainings, one, style, color=COLOURS[name], alpha=0.15, linewidth=0.8)
    axis.plot(trainings, np.mean(runs, axis=0), style, color=COLOURS[name], linewidth=2, label=label)


# -- what was found -----------------------------------------------------------------------------------------------


def found_table(found: Mapping[str, Any], sizes: Mapping[str, Any]) -> list[str]:
    """Both methods on the three tasks, and their differences."""
    methods, tasks = found["methods"], found["tasks"]
    lines = [
        f"{sizes['model']}, {sizes['train']} rows to train on, {sizes['dev']} to choose by, at most {sizes['test']:,} "
        f"to test on, {sizes['epochs']:g} epochs, {sizes['seeds']} seeds; searched on sarcasm alone.",
        "",
        f"Found: `{methods['found']}`. Best default on the development rows: `{methods['default']}`.",
        "",
        *header("task", "found", "best default", "difference, points", "parameters", "learning rates"),
    ]
    for name, task in tasks.items():
        rates = " / ".join(f"{task[side]['lr']:g}" for side in ("found", "default"))
        lines.append(row(name, *(spread(task[side]["accuracy"]) for side in ("found", "default")),
                         points(difference([task])), sizes_text(task), rates))  # fmt: skip
    means = [
        spread([float(np.mean(one)) for one in zip(*(task[side]["accuracy"] for task in tasks.values()), strict=True)])
        for side in ("found", "default")
    ]
    lines.append(row("mean of the tasks", *means, points(difference(list(tasks.values()))), "", ""))
    moved = [task for name, task in tasks.items() if name != "sarcasm"]
    lines.append(row("mean of the two it was moved to", "", "", points(difference(moved)), "", ""))
    return lines


def difference(tasks: Sequence[Mapping[str, Any]]) -> Difference:
    """Found minus default over test rows and seeds."""
    sides = [[np.array(task[side]["marks"]) for task in tasks] for side in ("found", "default")]
    return paired(*sides)


def points(found: Difference) -> str:
    """A difference of accuracies in points."""
    return f"{100 * found.mean:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def sizes_text(task: Mapping[str, Any]) -> str:
    """The trained parameters of both sides, and their ratio."""
    ours, theirs = task["found"]["parameters"], task["default"]["parameters"]
    return f"{ours:,} of {theirs:,} ({ours / theirs:.0%})"


def cost_table(found: Mapping[str, Any], sizes: Mapping[str, Any]) -> list[str]:
    """What the search cost, and the defaults that it is compared with."""
    trials = found["trials"]
    seconds = sum(one["seconds"] for one in trials)
    stopped = sum(one["stopped_at"] is not None for one in trials)
    lines = [
        f"{len(trials)} trials, {stopped} of them stopped early, took {seconds:.0f} training seconds, which is "
        f"{seconds / found['houlsby_seconds']:.1f} times one houlsby training on the same rows "
        f"({found['houlsby_seconds']:.0f} s).",
        "",
        *header("default", "best learning rate", "development rows", "parameters"),
    ]
    for name, one in sorted(found["defaults"].items(), key=lambda item: -item[1]["dev"]):
        lines.append(row(f"`{name}`", f"{one['lr']:g}", f"{one['dev']:.3f}", f"{one['parameters']:,}"))
    return lines


BLOCKS = (
    ("samplers", "samplers", samplers_table),
    ("searches", "searches", searches_table),
    ("found", "found", found_table),
    ("cost", "found", cost_table),
)

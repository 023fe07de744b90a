"""What a search shows: a comparison's report with the layer map and the trials. Knows finished searches; refuses to
know models and runs.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from trimtab.cells import write
from trimtab.comparison.pictures import alone, inline, pareto
from trimtab.comparison.report import PICTURE, REPORT, RESULTS, TABLE, Section, cost, page, share
from trimtab.comparison.results import as_csv
from trimtab.report import number
from trimtab.searching.pictures import trials_picture
from trimtab.searching.results import SearchResult, to_json, trials_csv
from trimtab.searching.trials import Trial

if TYPE_CHECKING:
    from rich.table import Table

TRIALS = "trials.csv"
HEAD = ("", "method", "learning rate", "development rows", "parameters", "share", "seconds", "ended")


def write_report(found: SearchResult) -> None:
    """Writes the files of a finished search into its folder, each in one step."""
    folder = Path(found.folder)
    write(folder / RESULTS, json.dumps(to_json(found), ensure_ascii=False, indent=1) + "\n")
    write(folder / TABLE, as_csv(found.comparison))
    write(folder / TRIALS, trials_csv(found))
    write(folder / REPORT, search_page(found))
    write(folder / PICTURE, alone(trials_picture(found)))


def search_page(found: SearchResult) -> str:
    """report.html"""
    limit = [("at most", f"{found.max_share:.3%} of the parameters")] if found.max_share is not None else []
    stopped = sum(trial.stopped_at is not None for trial in found.trials)
    more = [
        ("objectives", ", ".join(found.objectives)),
        ("trials", f"{len(found.trials)}, of which {stopped} were stopped early"),
        *limit,
    ]
    return page(found.comparison, pareto(found.comparison), "Which architecture?", more, sections(found))


def sections(found: SearchResult) -> list[Section]:
    """The layer map and the trials."""
    made = []
    if found.method is not None:
        note = f"{found.method}: what each layer has, with its size."
        made.append(Section("What was found", note, layer_table(found)))
    note = (
        "Every trial by its score on the development rows: filled marks ended by themselves, hollow ones were stopped "
        "early and show what they had then. Diamonds are the single methods that the search began with. The line joins "
        "what no other trial beats. One seed each, so the line is luckier than the table above."
    )
    made.append(Section("Trials", note, inline(trials_picture(found), "trials") + trials_table(found)))
    return made


def layer_table(found: SearchResult) -> str:
    """Layers down, members across; the highest layer is on top."""
    names = sorted({name for layer in found.layers for name in layer})
    if not names:
        return "<p>The task head alone.</p>"
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    rows = []
    for at in reversed(range(len(found.layers))):
        layer = found.layers[at]
        cells = "".join(
            f'<td class="on">{layer[name] or "on"}</td>' if name in layer else "<td>–</td>" for name in names
        )
        rows.append(f"<tr><td>layer {at}</td>{cells}</tr>")
    table = f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="wide"><table class="map">{table}</table></div>'


def trials_table(found: SearchResult) -> str:
    """Every trial with its command, closed at first."""
    head = "".join(f"<th>{name}</th>" for name in HEAD)
    rows = "".join(_trial_row(trial, found) for trial in found.trials)
    commands = "".join(
        f"<p>trial {one.number}</p><pre>{escape(found.commands[one.number])}</pre>" for one in found.trials
    )
    return (
        f'<details><summary>All {len(found.trials)} trials</summary><div class="wide"><table><thead><tr>{head}</tr>'
        f"</thead><tbody>{rows}</tbody></table></div></details><details><summary>The command of every trial</summary>"
        '<p class="small">Each trains to the end and scores the development rows; of a trial that was stopped early it '
        f"gives what the trial would have reached.</p>{commands}</details>"
    )


def _trial_row(trial: Trial, found: SearchResult) -> str:
    ended = "by itself" if trial.stopped_at is None else f"stopped after {trial.stopped_at:.0%}"
    method = escape(trial.method) + (f" (start: {escape(trial.start)})" if trial.start else "")
    values = [f"{trial.score:.3f}", number(trial.parameters), share(trial.share), cost(trial.seconds), ended]
    cells = "".join(f"<td>{value}</td>" for value in (f"{trial.lr:g}", *values))
    mark = ' class="chosen"' if trial in found.front else ""
    return f'<tr{mark}><td>{trial.number}</td><td class="text"><code>{method}</code></td>{cells}</tr>'


def front_table(found: SearchResult) -> Table:
    """The front for the console, by the development rows."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape as plain
    from rich.table import Table

    made = Table(box=SIMPLE_HEAD)
    made.add_column("the front, on development rows", overflow="fold")
    for heading in ("lr", "parameters", "share", found.comparison.objective.replace("_", " "), "seconds"):
        made.add_column(heading, justify="right")
    for one in found.front:
        cells = [
            one.method,
            f"{one.lr:g}",
            number(one.parameters),
            share(one.share),
            f"{one.score:.3f}",
            cost(one.seconds),
        ]
        made.add_row(*(plain(cell) for cell in cells))
    return made

"""What a comparison shows: report.html, results.json, results.csv and pareto.svg. Knows finished comparisons; refuses
to know models and runs.

The page is one file without scripts and without anything from a network; it is read in the browser's light or dark
colours and on a phone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trimtab.cells import write
from trimtab.comparison.pictures import alone, curves, inline, pareto
from trimtab.comparison.results import Comparison, Row, as_csv, as_json, spread
from trimtab.report import number, size

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

REPORT, RESULTS, TABLE, PICTURE = "report.html", "results.json", "results.csv", "pareto.svg"


def write_report(found: Comparison) -> None:
    """Writes the files of a finished comparison into its folder, each in one step."""
    folder = Path(found.folder)
    write(folder / RESULTS, json.dumps(as_json(found), ensure_ascii=False, indent=1) + "\n")
    write(folder / TABLE, as_csv(found))
    scatter = pareto(found)
    write(folder / REPORT, page(found, scatter))
    if scatter:
        write(folder / PICTURE, alone(scatter["parameters"]))


@dataclass(frozen=True)
class Section:
    """A part of the page that comes from elsewhere."""

    title: str
    note: str
    html: str
    """Whole elements, everything in them escaped."""


def page(
    found: Comparison,
    scatter: Mapping[str, Figure],
    title: str = "Which method?",
    more: Sequence[tuple[str, str]] = (),
    sections: Sequence[Section] = (),
) -> str:
    """report.html, with the scores against each cost; `more` is asked besides, `sections` follow the results."""
    import jinja2

    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=True
    )
    environment.filters.update(number=number, size=size, spread=spread, versus=versus, verdict=verdict, cost=cost)
    environment.filters.update(rates=rates, share=share)
    drawn = curves(found)
    return environment.from_string(_PAGE).render(
        found=found,
        asked=found.asked,
        facts=[*facts(found), *more],
        title=title,
        sections=sections,
        plots=[inline(figure, name) for name, figure in scatter.items()],
        curves=inline(drawn, "curves") if drawn else "",
        style=_STYLE,
    )


def facts(found: Comparison) -> list[tuple[str, str]]:
    """What was asked, line by line."""
    asked, rows = found.asked, found.asked["rows"]
    minutes = f", as many of them as fit into {asked['minutes']:g} minutes in all" if asked["minutes"] else ""
    return [
        ("model", str(asked["model"])),
        ("data", str(asked["data"])),
        ("task", str(asked["task"])),
        ("decided by", found.objective + (" (more is better)" if found.higher else " (less is better)")),
        ("rows", f"{rows['train']:,} to train on, {rows['dev']:,} to choose by, {rows['test']:,} to test on"),
        ("budget of a run", f"{asked['epochs']:g} epochs{minutes}"),
        ("seeds", str(asked["seeds"])),
        ("frozen base", "–" if math.isnan(found.base) else f"{found.base:.3f} on the test rows"),
    ]


def table(found: Comparison) -> Table:
    """The rows for the console."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    made = Table(box=SIMPLE_HEAD)
    made.add_column("method", overflow="fold")
    for heading in ("lr", "epochs", "parameters", found.objective.replace("_", " "), "against the best", "seconds"):
        made.add_column(heading, justify="right")
    for row in found.rows:
        lr = "–" if row.lr is None else f"{row.lr:g}{' (edge)' if row.edge else ''}"
        cells = [row.method, lr, cost(row.epochs), number(row.parameters), spread(row), versus(row), cost(row.seconds)]
        made.add_row(*(escape(cell) for cell in cells))
    return made


def failures(found: Comparison) -> list[str]:
    """A line for everything that went wrong."""
    return [f"{row.method}: {error}" for row in found.rows for error in row.errors]


def versus(row: Row) -> str:
    """The difference to the best with its interval."""
    if row.difference is None:
        return "–"
    low, high = row.difference.low, row.difference.high
    return f"{row.difference.mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def verdict(row: Row, rows: Sequence[Row]) -> str:
    """What the interval says, in words."""
    if not row.runs:
        return "failed"
    if row is rows[0]:
        return "best mean"
    if row.difference is None:
        return "cannot be told"
    return "worse" if row.difference.found else "no difference found"


def cost(value: float) -> str:
    """A cost with three digits; a dash where there is none."""
    return "–" if math.isnan(value) else f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"


def share(value: float) -> str:
    """A share in percent."""
    return "–" if math.isnan(value) else f"{value:.3%}"


def rates(row: Row) -> str:
    """Every learning rate that was tried with its score on the development rows."""
    return ", ".join(f"{lr:g}: {dev:.3f}" for lr, dev in sorted(row.rates.items())) or "none worked"


_STYLE = """
:root { color-scheme: light dark; --ink: #1d1f21; --paper: #ffffff; --soft: #5b6068; --line: #d9dce1; --card: #f5f6f8;
  --accent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --paper: #14171a; --soft: #a2a9b2; --line: #343a41;
  --card: #1d2126; --accent: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: var(--paper); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; margin: .5rem 0 1rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.take { border-left: 4px solid var(--accent); background: var(--card); padding: .8rem 1rem; font-size: 1.05rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1rem; }
.plot { width: 100%; height: auto; color: var(--ink); } .named:hover { stroke-width: 3; cursor: help; opacity: .75; }
main > .plot { display: block; max-width: 46rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .85rem; }
th, td { text-align: right; padding: .35rem .35rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child, td.text { text-align: left; } th { color: var(--soft); font-weight: 600;
  white-space: normal; vertical-align: bottom; }
td.text { white-space: normal; }
tr.chosen td { background: var(--card); font-weight: 600; }
code, pre { font: .8rem/1.45 ui-monospace, monospace; } pre { white-space: pre-wrap; overflow-wrap: anywhere;
  background: var(--card); padding: .6rem .8rem; margin: .3rem 0; } summary { cursor: pointer; padding: .25rem 0; }
.map td, .map th { text-align: center; }
.map td.on { background: var(--accent); color: var(--paper); font-weight: 600; }
.small { color: var(--soft); font-size: .9rem; }
"""

_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<title>{{ title }} {{ asked.model }}</title>
<style>{{ style | safe }}</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
<p class="take">{{ found.recommendation }}</p>

<h2>What was asked</h2>
<dl>
{% for name, value in facts %}
<dt>{{ name }}</dt><dd>{{ value }}</dd>
{% endfor %}
</dl>

<h2>Results</h2>
<div class="wide">
<table>
<thead><tr><th>method</th><th>{{ found.objective }}</th><th>against the best, 95 %</th><th></th><th>parameters</th>
<th>share</th><th>file</th><th>seconds</th><th>peak MB</th><th>epochs</th><th>learning rate</th></tr></thead>
<tbody>
{% for row in found.rows %}
<tr{% if row.method == found.recommended %} class="chosen"{% endif %}><td><code>{{ row.method }}</code></td>
<td>{{ row | spread }}</td><td>{{ row | versus }}</td><td class="text">{{ row | verdict(found.rows) }}</td>
<td>{{ row.parameters | number }}</td><td>{{ row.share | share }}</td><td>{{ row.bytes | size }}</td>
<td>{{ row.seconds | cost }}</td><td>{{ row.peak_memory_mb | cost }}</td><td>{{ row.epochs | cost }}</td>
<td>{{ "–" if row.lr is none else "%g" | format(row.lr) }}{{ "&nbsp;*" | safe if row.edge }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
<p class="small">Mean ± standard deviation over {{ asked.seeds }} seed{{ "s" if asked.seeds != 1 }} on the test rows,
which were scored once with the learning rate that the development rows chose. Differences: paired bootstrap over
{{ "test rows and seeds" if found.by_row else "seeds" }}, each pair by itself. *: the best learning rate is the lowest
or highest of those tried, so a better one may lie beyond. What frozen layers give is computed once for all runs
with the same trunk, so these may take fewer seconds than alone. The peak is that of the whole process.</p>
{% for row in found.rows if row.errors %}
<p><code>{{ row.method }}</code> failed: {{ row.errors | join("; ") }}</p>
{% endfor %}
{% for section in sections %}

<h2>{{ section.title }}</h2>
<p class="small">{{ section.note }}</p>
{{ section.html | safe }}
{% endfor %}
{% if plots %}

<h2>Score against cost</h2>
<p class="small">The line joins the methods that no other beats in both. Point at a mark for its numbers.</p>
<div class="plots">
{% for plot in plots %}
{{ plot | safe }}
{% endfor %}
</div>
{% endif %}
{% if curves %}

<h2>Learning curves</h2>
<p class="small">The first seed, with the chosen learning rate.</p>
{{ curves | safe }}
{% endif %}

<h2>Every number again</h2>
<p class="small">Each command trains on the very rows of this comparison and scores the same test rows: what it shows
after training are the run's numbers.</p>
{% for row in found.rows %}
<details>
<summary><code>{{ row.method }}</code>: {{ row | spread }}</summary>
<p class="small">Learning rates and {{ found.objective }} on the development rows: {{ row | rates }}.</p>
{% for run in row.runs %}
<p>seed {{ run.seed }}: {{ "%.4f" | format(run.score) }} on the test rows, {{ "%.4f" | format(run.dev) }} on the
development rows, {{ run.seconds | cost }} s</p>
<pre>{{ run.command }}</pre>
<p class="small">kept in <code>{{ run.adapter }}</code></p>
{% endfor %}
</details>
{% endfor %}
</main>
</body>
</html>
"""

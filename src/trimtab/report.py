"""What a run says about itself: the model card, the curves, the tables. Knows a folder's files; refuses to know models.

Everything is read back from the folder (metrics.json, run.yaml, log.jsonl, adapter_config.json), so that a report can
be written again at any time and says nothing that the files do not say.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from trimtab.config import read_yaml
from trimtab.errors import UserError
from trimtab.files import count_floats, safetensors

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

CARD = "README.md"
CURVES = "curves.svg"
METRICS = "metrics.json"
RUN = "run.yaml"
LOG = "log.jsonl"
ADAPTER = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
WHOLE = "trimtab_config.json"
"""What a fully tuned model has instead."""

_COLOURS = {
    "loss": "#0072B2",
    "lr": "#D55E00",
    "before": "#666666",
    "after": "#009E73",
}  # safe for colour-blind readers
_DEFAULT_FONT = "DejaVu Sans"  # comes with matplotlib
_TITLES = {
    "accuracy": "accuracy",
    "entity_f1": "entity F1",
    "exact_match": "exact match",
    "f1": "F1",
    "macro_f1": "macro F1",
    "mcc": "Matthews correlation",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
    "mse": "mean squared error",
    "loss": "loss",
    "perplexity": "perplexity",
    "bleu": "BLEU",
    "nist": "NIST",
    "rouge_l": "ROUGE-L",
    "meteor": "METEOR",
    "examples": "examples",
}


def write_report(folder: str | Path, called: str | None = None) -> None:
    """Writes README.md (the model card) and curves.svg into a finished run's folder, each in one step.

    `called` is what the card calls the folder, where that is not its own name (a hub id). Raises UserError where the
    folder is no output of trimtab.
    """
    from trimtab.checkpoint import atomic_write

    folder = Path(folder)
    facts = {**read_run(folder), **({"folder": called} if called else {})}
    figure = draw_curves(facts)
    if figure is not None:
        atomic_write(folder / CURVES, lambda path: save_figure(figure, path))
    text = model_card(facts, curves=figure is not None)
    atomic_write(folder / CARD, lambda path: _write(path, text))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


# -- reading ------------------------------------------------------------------------------------------------------


def read_run(folder: str | Path) -> dict[str, Any]:
    """The facts of a run: folder, metrics, run (settings), log (a list of steps), adapter (its configuration).

    Raises UserError where metrics.json or adapter_config.json is missing or broken; run.yaml and log.jsonl may be
    missing (an adapter saved from Python has none).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {str(folder)!r}")
    if not _is_run(folder):
        raise UserError(f"{str(folder)!r} is no output of trimtab: it has neither {ADAPTER} nor {METRICS}")
    return {
        "folder": folder.resolve().name,
        "metrics": read_object(folder / METRICS) or _stored(folder / WEIGHTS),
        "bits": _bits(folder / WEIGHTS),
        "run": read_yaml(folder / RUN, typed=True) if (folder / RUN).is_file() else {},
        "log": _read_lines(folder / LOG),
        "adapter": _read_adapter(folder),
    }


def _stored(weights: Path) -> dict[str, Any]:
    """What the file of an adapter saved from Python says of its size, in the form of metrics.json."""
    if not weights.is_file():
        return {}
    return {"parameters": {"trainable": count_floats(weights)}, "bytes": weights.stat().st_size}


def _bits(weights: Path) -> int:
    """How many bits, packed eight a byte, an adapter's file says it holds; 0 for most."""
    from trimtab.checkpoint import BITS

    if not weights.is_file():
        return 0
    with safetensors(weights, "np") as file:
        return int((file.metadata() or {}).get(BITS, 0))


def _read_adapter(folder: Path) -> dict[str, Any]:
    path = folder / (WHOLE if (folder / WHOLE).is_file() else ADAPTER)
    adapter = read_object(path)
    for key in ("method", "base", "task"):
        if not isinstance(adapter.get(key), dict | None):
            raise UserError(f"{str(path)!r} is broken: {key} must be a JSON object")
    return {**adapter, "base": adapter.get("base") or {}}


def read_object(path: Path) -> dict[str, Any]:
    """A file's JSON object; an empty one where there is no such file. Raises UserError where it is broken."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{str(path)!r} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{str(path)!r} must hold a JSON object")
    return value


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The log's whole lines; a last line cut short by a killed run is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise UserError(f"{str(path)!r}, line {number}, is not valid JSON: {error}") from error
    return rows


# -- the summary of a folder, and tables --------------------------------------------------------------------------


def summary(folder: str | Path) -> dict[str, Any]:
    """A run in one flat object: method, base, task, sizes, parameters, metrics before and after."""
    facts = read_run(folder)
    adapter, metrics, run = facts["adapter"], facts["metrics"], facts["run"]
    return {
        "folder": str(folder),
        "name": adapter.get("name"),
        "method": method_text(facts),
        "fields": adapter.get("method") or {},
        "base": base_path(facts),
        "family": adapter.get("base", {}).get("model_type"),
        "task": adapter.get("task") or {},
        "data": run.get("data"),
        "parameters": metrics.get("parameters") or {},
        "bytes": metrics.get("bytes"),
        "bits": facts["bits"],
        "train": metrics.get("train") or {},
        "before": metrics.get("before") or {},
        "after": metrics.get("after") or {},
    }


def run_folders(folder: str | Path) -> list[Path]:
    """The folder itself if it is a run, else the runs directly inside it, by name.

    Raises UserError where there is none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {str(folder)!r}")
    if _is_run(folder):
        return [folder]
    inside = sorted(path for path in folder.iterdir() if path.is_dir() and _is_run(path))
    if not inside:
        raise UserError(
            f"{str(folder)!r} is no output of trimtab and holds none: no {ADAPTER} there or one level below"
        )
    return inside


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (ADAPTER, WHOLE, METRICS))


def result_table(facts: dict[str, Any], title: str = "") -> Table:
    """The metrics before and after, for the console."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title) or None, title_justify="left", box=SIMPLE_HEAD)
    for heading, side in (("", "left"), ("before", "right"), ("after", "right"), ("change", "right")):
        table.add_column(heading, justify=side)  # type: ignore[arg-type]
    for row in metric_rows(facts["metrics"]):
        table.add_row(*(escape(cell) for cell in row))
    return table


def runs_table(summaries: Sequence[dict[str, Any]]) -> Table:
    """Many runs, one a row, for the console."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    names = [name for name in _metric_names(*(one["after"] for one in summaries)) if name not in ("loss", "examples")]
    table = Table(box=SIMPLE_HEAD)
    table.add_column("folder", overflow="fold")
    table.add_column("method", overflow="fold")
    table.add_column("task", overflow="fold")
    for heading in ("parameters", "bytes", *(_TITLES.get(name, name) for name in names)):
        table.add_column(heading, justify="right")
    for one in summaries:
        counted = [number(one["parameters"].get("trainable")), size(one["bytes"])]
        own = [Path(one["folder"]).name, one["method"], task_text(one["task"])]
        cells = [*own, *counted, *(number(one["after"].get(name)) for name in names)]
        table.add_row(*(escape(cell) for cell in cells))
    return table


def task_text(task: Mapping[str, Any]) -> str:
    """A task's name, with the number of its labels where it has some; a dash where a folder names none."""
    labels = task.get("labels")
    return f"{task.get('name') or '–'}{f' ({len(labels)} labels)' if labels else ''}"


def size_line(facts: dict[str, Any]) -> str:
    """How many parameters, bits and bytes the tuned part takes, in one line."""
    counted, stored = facts["metrics"].get("parameters") or {}, facts["metrics"].get("bytes")
    share = counted.get("share")
    of_base = f" ({share:.3%} of {number(counted.get('total'))})" if isinstance(share, (int, float)) else ""
    bits = f"{amount(facts['bits'])} bits, " if facts["bits"] else ""
    return f"{number(counted.get('trainable'))} trained parameters{of_base}, {bits}{size(stored)} on disk"


def metric_rows(metrics: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(title, before, after, change) for every metric that either side has."""
    before, after = metrics.get("before") or {}, metrics.get("after") or {}
    rows = []
    for name in _metric_names(after, before):
        old, new = before.get(name), after.get(name)
        change = f"{new - old:+.4g}" if _is_number(old) and _is_number(new) and name != "examples" else ""
        rows.append((_TITLES.get(name, name), number(old), number(new), change))
    return rows


def _metric_names(*sides: dict[str, Any]) -> list[str]:
    """Scalar metrics in the order of _TITLES, then the others."""
    seen = {name for side in sides for name, value in side.items() if _is_number(value)}
    return [name for name in _TITLES if name in seen] + sorted(seen - set(_TITLES))


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def number(value: Any) -> str:
    """1234567 -> '1,234,567', 0.71234 -> '0.7123', None -> '–'."""
    if not _is_number(value):
        return "–" if value is None else str(value)
    if isinstance(value, int) or (math.isfinite(value) and value == int(value) and abs(value) >= 1000):
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def amount(count: int) -> str:
    """A number for people: 71368704 -> '71.4 M', 1234 -> '1,234'."""
    return f"{count / 1e6:,.1f} M" if count >= 1e6 else f"{count:,}"


def size(count: Any) -> str:
    """Bytes for people: 1234 -> '1,234 bytes', 5000000 -> '5.0 MB'."""
    if not _is_number(count):
        return "–"
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 10 * factor or (unit == "MB" and count >= factor):
            return f"{count / factor:,.1f} {unit}"
    return f"{int(count):,} bytes"


# -- the model card -----------------------------------------------------------------------------------------------


def method_text(facts: dict[str, Any]) -> str:
    """The method's string, from the adapter's configuration."""
    described = facts["adapter"].get("method") or facts["run"].get("method")
    if not isinstance(described, dict):
        return str(described or "–")
    from trimtab.methods.spec import format_method, method_from_dict

    return format_method(method_from_dict(described))


def findings(facts: dict[str, Any]) -> list[str]:
    """What the methods of a run found by search, a sentence each; most methods train and find nothing."""
    found = (getattr(method, "finding", None) for method in _methods(facts["adapter"].get("method")))
    return [sentence for sentence in found if sentence]


def base_path(facts: dict[str, Any]) -> str:
    """Where the base model came from, as the user gave it."""
    return str(facts["adapter"].get("base", {}).get("path") or facts["run"].get("model") or "–")


def model_card(facts: dict[str, Any], curves: bool = True) -> str:
    """The README.md of a run, in the Hugging Face model card's form."""
    import jinja2

    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters.update(
        cell=_cell, number=number, size=size, json=lambda value: json.dumps(value, ensure_ascii=False)
    )
    return environment.from_string(_CARD).render(**_card_facts(facts), curves=curves)


def _card_facts(facts: dict[str, Any]) -> dict[str, Any]:
    adapter, metrics, run = facts["adapter"], facts["metrics"], facts["run"]
    methods = _methods(adapter.get("method"))
    base, task, counted = base_path(facts), adapter.get("task") or {}, metrics.get("parameters") or {}
    pictures = "image_column" in task and "text_column" not in task
    return {
        "title": facts["folder"],
        "front": _front_matter(facts),
        "base": base,
        "base_class": adapter.get("base", {}).get("class", "AutoModel"),
        "family": adapter.get("base", {}).get("model_type", "–"),
        "method": method_text(facts),
        "papers": [_describe(one) for one in methods],
        "citations": [*dict.fromkeys(_citation(one) for one in methods if _papers([one]))],
        "combined": adapter.get("combined") or {},
        "summands": [f"{number(one['weight'])} · `{_cell(one['folder'])}`" for one in _summands(adapter)],
        "findings": findings(facts),
        "whole_model": _is_whole(adapter.get("method")),
        "task": task,
        "data": run.get("data"),
        "eval_data": run.get("eval_data"),
        "rows": metric_rows(metrics),
        "train": metrics.get("train") or {},
        "trained": f"{number(counted.get('trainable'))} of {number(counted.get('total'))}",
        "bytes": metrics.get("bytes"),
        "size_line": size_line(facts),
        "settings": {key: value for key, value in run.items() if key in _SETTINGS and value is not None},
        "names": _NAMES | (_OF_PICTURES if pictures else {}),
        "pictures": pictures,
        "encoder": adapter.get("encoder") or {},
        "small": adapter.get("small_model") or {},
        "asked": " ".join(_asked(task, pictures)),
        "merges": bool(methods) and all(one.mergeable for one in methods),
        "versions": run.get("versions") or {},
    }


def _front_matter(facts: dict[str, Any]) -> str:
    """The YAML that the hub reads: library, base, tags (a paper by its arXiv id), data, metrics and results."""
    import yaml

    adapter, run = facts["adapter"], facts["run"]
    whole, base, task = _is_whole(adapter.get("method")), base_path(facts), adapter.get("task") or {}
    methods = _methods(adapter.get("method"))
    after = {name: value for name, value in (facts["metrics"].get("after") or {}).items() if _is_result(name, value)}
    data = [str(run[key]) for key in ("data", "eval_data") if run.get(key)]
    tags = ["trimtab", *([] if whole else ["parameter-efficient-fine-tuning"]), *(one.name for one in methods)]
    front = {
        "library_name": "transformers" if whole else "trimtab",
        "base_model": base if _is_hub_id(base) else None,
        "tags": [*dict.fromkeys([*tags, *(f"arxiv:{paper}" for paper in _papers(methods))])],
        "datasets": [name for name in data if _is_hub_id(name) and "/" in name],
        "metrics": sorted(set(after) - {"loss"}),
        "model-index": _results(facts["folder"], task, data, after),
    }
    return yaml.safe_dump({key: value for key, value in front.items() if value}, sort_keys=False, allow_unicode=True)


def _is_result(name: str, value: Any) -> bool:
    return name != "examples" and _is_number(value) and math.isfinite(value)


def _results(name: str, task: Mapping[str, Any], data: Sequence[str], after: Mapping[str, float]) -> list[Any]:
    """The hub's model-index; nothing where a folder was not evaluated."""
    if not after or not data:
        return []
    held_out = _short(data[-1])
    pictures = "image_column" in task and "text_column" not in task
    result = {
        "task": {"type": "image-classification" if pictures else _HUB_TASKS.get(str(task.get("name")), "other")},
        "dataset": {"name": held_out, "type": data[-1] if _is_hub_id(data[-1]) else held_out},
        "metrics": [{"type": key, "value": value, "name": _TITLES.get(key, key)} for key, value in after.items()],
    }
    return [{"name": name, "results": [result]}]


def _papers(methods: Sequence[Any]) -> list[str]:
    """The arXiv ids that methods name."""
    return [found for one in methods for found in re.findall(r"arXiv:(\d{4}\.\d{4,5})", one.paper)]


def _citation(method: Any) -> str:
    """The paper that a method's file begins with: title, authors, year and source."""
    first = (inspect.getdoc(inspect.getmodule(type(method))) or "").partition("\n\n")[0]
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", " ".join(first.split()))


def _summands(adapter: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The adapters that one is the sum of."""
    return list((adapter.get("combined") or {}).get("of") or ())


def _asked(task: dict[str, Any], pictures: bool) -> Iterator[str]:
    """What a run is asked with: a text, a picture, or both."""
    if task.get("image_column") or pictures:
        yield "--image FILE"
    if not pictures:
        yield '--prompt "…"'


_HUB_TASKS = {
    "classify": "text-classification",
    "regress": "text-classification",
    "tag": "token-classification",
    "span": "question-answering",
    "choose": "multiple-choice",
    "generate": "text-generation",
}
"""The hub's names for our tasks."""
_SETTINGS = ("lr", "batch_size", "batch_tokens", "max_length", "limit", "eval_share", "seed")
_NAMES = {
    "lr": "learning rate",
    "batch_size": "rows in a batch",
    "batch_tokens": "tokens in a batch",
    "max_length": "longest row, tokens",
    "limit": "rows used at most",
    "eval_share": "share held out",
    "tokens_per_second": "tokens a second",
    "peak_memory_mb": "peak memory, MB",
}
_OF_PICTURES = {"tokens": "pictures", "tokens_per_second": "pictures a second"}


def _methods(described: Any) -> list[Any]:
    """The method of a configuration, or the members of a union."""
    if not isinstance(described, dict):
        return []
    from trimtab.methods.spec import method_from_dict

    method = method_from_dict(described)
    return list(getattr(method, "methods", (method,)))


def _describe(method: Any) -> dict[str, Any]:
    from trimtab.methods.spec import method_to_dict

    fields = {key: value for key, value in method_to_dict(method).items() if key != "name" and value is not None}
    what = (type(method).__doc__ or "").strip().partition("\n")[0]
    return {"name": method.name, "what": what, "paper": method.paper, "fields": fields}


def _is_hub_id(base: str) -> bool:
    parts = base.split("/")
    named = len(parts) <= 2 and all(part and part[0].isalnum() for part in parts)
    return named and ":" not in base and base != "–" and not Path(base).exists()


def _is_whole(described: Any) -> bool:
    """Whether the method trains the whole model."""
    from trimtab.methods import METHODS

    return bool(getattr(METHODS.get(str((described or {}).get("name"))), "whole_model", False))


def _cell(value: Any) -> str:
    """Any value as the inside of a Markdown table's cell."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", "\\n").replace("<", "&lt;")


_CARD = """\
---
{{ front }}---

# {{ title }}

{% if whole_model %}
A fully tuned model: every parameter of `{{ base }}` was trained, {{ size_line }}.
{% else %}
A small set of trained tensors for the frozen base model `{{ base }}`: {{ size_line }}.
{% endif %}

| | |
|---|---|
| base model | `{{ base | cell }}` ({{ base_class }}, family {{ family }}) |
{% if encoder %}
| vision encoder | `{{ encoder.path | cell }}` ({{ encoder.class }}), frozen as well |
{% endif %}
{% if small %}
| small model | `{{ small.path | cell }}` ({{ small.class }}), from whose weights the side network starts |
{% endif %}
| method | `{{ method | cell }}` |
{% if combined %}
| sum ({{ combined.how }}) | {{ summands | join(" + ") }} |
{% endif %}
{% if task %}
| task | {{ task.name | cell }}{{ " (pictures)" if pictures }} |
{% if task.get("labels") %}
| labels | {{ task.labels | join(", ") | cell }} |
{% endif %}
{% if task.get("template") %}
| template | `{{ task.template | cell }}` |
{% endif %}
{% endif %}
{% if data %}
| data | `{{ data | cell }}` |
{% endif %}
{% if eval_data %}
| evaluation data | `{{ eval_data | cell }}` |
{% endif %}
| trained parameters | {{ trained }} |
| size on disk | {{ bytes | size }} |
{% if papers %}

## Method

{% for paper in papers %}
- **{{ paper.name }}**: {{ paper.what }} {{ paper.paper }}.
{% for key, value in paper.fields.items() %}
  - {{ key }}: `{{ value | cell }}`
{% endfor %}
{% endfor %}
{% endif %}
{% if findings %}

It found:

{% for finding in findings %}
    {{ finding }}
{% endfor %}
{% endif %}
{% if rows %}

## Results

On rows held out from training, with the frozen base model before and the tuned model after:

| | before | after | change |
|---|---:|---:|---:|
{% for title, before, after, change in rows %}
| {{ title | cell }} | {{ before }} | {{ after }} | {{ change }} |
{% endfor %}
{% endif %}
{% if curves %}

![Training loss and learning rate by step](curves.svg)
{% endif %}
{% if train or settings %}

## Training

| | |
|---|---|
{% for key, value in settings.items() %}
| {{ names.get(key, key) }} | `{{ value | cell }}` |
{% endfor %}
{% for key, value in train.items() %}
| {{ names.get(key, key) }} | {{ value | number }} |
{% endfor %}
{% endif %}
{% if versions %}

Versions: {% for key, value in versions.items() %}{{ key }} {{ value }}{{ ", " if not loop.last }}{% endfor %}.
{% endif %}

## Use

On the command line, from the folder that holds this one:

```bash
trimtab eval {{ title }} --data DATA
{% if task %}
trimtab generate {{ title }} {{ asked }}{{ ' --choice "…" --choice "…"' if task.get("choices_column") }}
{%- if task.get("context_column") %} --context "…"{% endif %}
{% endif %}
{% if merges %}
trimtab merge {{ title }} --output merged   # an ordinary model folder
{% endif %}
```

In Python:

```python
{% if whole_model %}
{% set reader = "AutoImageProcessor" if pictures else "AutoTokenizer" %}
from transformers import {{ reader }}, {{ base_class }}

model = {{ base_class }}.from_pretrained({{ title | json }})
{{ "processor" if pictures else "tokenizer" }} = {{ reader }}.from_pretrained({{ title | json }})
{% else %}
from trimtab.train import load_run

run = load_run({{ title | json }})   # run.model (the base with this adapter), run.tokenizer, run.task
```

or on a base model of yours:

```python
import trimtab as tt

adapter = tt.load(model, {{ title | json }})   # model: {{ base_class }}
{% endif %}
```
{% if citations %}

## Citation

{% for citation in citations %}
- {{ citation }}
{% endfor %}
{% endif %}

## Licence

This folder holds {{ "a model derived from" if whole_model else "what was trained, not" }} the base model.
The base model and the training data have their own licences and terms; both may also apply to what was derived from
them, so check them before sharing or selling.
"""


# -- the curves ---------------------------------------------------------------------------------------------------


def draw_curves(facts: dict[str, Any]) -> Figure | None:
    """Training loss with the evaluation's loss before and after, and the learning rate, by step; None without steps."""
    steps = [row for row in facts["log"] if _is_number(row.get("step")) and _is_number(row.get("loss"))]
    if not steps:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    _draw_losses(losses, steps, facts["metrics"])
    _draw_rates(rates, steps)
    title = _title(facts)
    figure.suptitle(title, fontsize=12, fontfamily=_fonts_for(title), parse_math=False)
    return figure


def _draw_losses(axes: Any, steps: Sequence[dict[str, Any]], metrics: dict[str, Any]) -> None:
    x, y = [row["step"] for row in steps], [row["loss"] for row in steps]
    smooth = len(y) >= 10
    axes.plot(x, y, color=_COLOURS["loss"], alpha=0.3 if smooth else 1.0, linewidth=1, label="each step")
    if smooth:
        axes.plot(x, smoothed(y), color=_COLOURS["loss"], linewidth=2, label="smoothed")
    places = {"before": 0, "after": x[-1]}
    for side, place in places.items():
        loss = (metrics.get(side) or {}).get("loss")
        if _is_number(loss) and math.isfinite(loss):
            axes.plot(place, loss, "o", color=_COLOURS[side], markersize=7, clip_on=False, label=f"held out, {side}")
    axes.set_ylabel("loss")
    axes.set_xlim(0, max(x[-1], 1))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)


def _draw_rates(axes: Any, steps: Sequence[dict[str, Any]]) -> None:
    rated = [row for row in steps if _is_number(row.get("lr"))]
    axes.plot([row["step"] for row in rated], [row["lr"] for row in rated], color=_COLOURS["lr"], linewidth=1.5)
    axes.set_ylabel("learning rate")
    axes.set_xlabel("step")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)


def smoothed(values: Sequence[float]) -> list[float]:
    """A centred moving average over about a tenth of the values."""
    half = max(1, len(values) // 20)
    windows = (values[max(0, place - half) : place + half + 1] for place in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _title(facts: dict[str, Any]) -> str:
    """The method, the base and the data, and what the first metric did; lines short enough for the picture."""
    first = f"{method_text(facts)} on {_short(base_path(facts))}"
    if facts["run"].get("data"):
        first += f", data {_short(str(facts['run']['data']))}"
    name, old, new, _ = next(iter(metric_rows(facts["metrics"])), ("", "–", "–", ""))
    result = [f"{name} {old} → {new} on held-out rows"] if name else []
    return "\n".join([*textwrap.wrap(first, 90), *result])


def _short(path: str) -> str:
    """The last two parts of a path, which is what tells one file from another."""
    return "/".join(path.replace("pkg:", "").rstrip("/").split("/")[-2:])


def save_figure(figure: Figure, path: Path) -> None:
    """Writes the SVG, the same bytes each time. Text that no installed font can draw stays text for the viewer's."""
    import matplotlib

    settings: Any = {"svg.hashsalt": "trimtab", "svg.fonttype": "path" if _drawable(figure.get_suptitle()) else "none"}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font")
        figure.savefig(path, format="svg", metadata={"Date": None})


def _fonts_for(text: str) -> list[str]:
    """The default font, then the installed fonts that have characters which it lacks."""
    installed = _installed_fonts()
    fonts, missing = [_DEFAULT_FONT], _missing(text, installed[_DEFAULT_FONT])
    for name, file in sorted(installed.items()):
        left = missing & _missing(text, file) if missing else missing
        if left < missing:
            fonts.append(name)
            missing = left
    return fonts


def _drawable(text: str) -> bool:
    installed = _installed_fonts()
    return not set.intersection(*(_missing(text, installed[name]) for name in _fonts_for(text)))


def _installed_fonts() -> dict[str, str]:
    """Upright fonts of normal weight: name to file; without the one that draws boxes for everything."""
    from matplotlib import font_manager

    return {
        entry.name: entry.fname
        for entry in font_manager.fontManager.ttflist
        if entry.style == "normal" and entry.weight in (400, "normal", "regular", "book")
        if not entry.name.startswith("Last Resort") and Path(entry.fname).is_file()
    }


def _missing(text: str, file: str) -> set[str]:
    """The visible characters of `text` that a font file cannot draw."""
    from matplotlib import font_manager

    glyphs = font_manager.get_font(file).get_charmap()
    return {char for char in text if not char.isspace() and ord(char) not in glyphs}

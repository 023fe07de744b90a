"""A finished run, ready for use again. Knows a run's folder and what it needs; refuses to know training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trimtab.checkpoint import load, read_adapter_config
from trimtab.data import limit, load_rows
from trimtab.errors import UserError
from trimtab.evaluate import evaluate
from trimtab.methods.spec import method_from_dict
from trimtab.models import Kind, kind_of, load_model, load_tokenizer
from trimtab.run_data import encode, split_rows
from trimtab.run_folder import RUN, read_run_settings
from trimtab.settings import TrainSettings
from trimtab.tasks import Task, task_from_config


@dataclass(frozen=True)
class Tuned:
    """A finished run, ready for use: a fresh base with the folder's adapter."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    kind: Kind
    max_length: int


def load_run(folder: str | Path, *, device: str | None = None) -> Tuned:
    """The base model with a run's adapter, and its task.

    Raises UserError where the folder is not the output of a run, or the base cannot be found.
    """
    folder = Path(folder).expanduser()
    config = read_adapter_config(folder)
    if not config.get("task"):
        raise UserError(f"{folder} does not say which task it is for; it was not written by `trimtab train`")
    task = task_from_config(config["task"])
    run = read_run_settings(folder)
    base = str(run.get("model") or config["base"]["path"])
    whole = bool(getattr(method_from_dict(config["method"]), "whole_model", False))
    kind = kind_of(base, task.name)
    labels = getattr(task, "labels", ())  # of a task that has some
    options = {key: run.get(key, getattr(TrainSettings, key)) for key in ("dtype", "seed")}
    model = load_model(str(folder) if whole else base, kind, labels=labels, device=device, **options)
    if not whole:
        load(model, folder)
    tokenizer = load_tokenizer(base)
    return Tuned(model, tokenizer, task, kind, int(run.get("max_length", TrainSettings.max_length)))


def evaluate_run(
    folder: str | Path, data: str | None = None, *, limit_rows: int | None = None, show: bool | None = None
) -> dict[str, float]:
    """The metrics of a run's adapter on a fresh base: on all rows of `data`, or on the rows the run held out.

    Without `data` the numbers are those in the run's metrics.json. Raises UserError as `load_run`, and for data that
    does not fit the task.
    """
    tuned = load_run(folder)
    rows = _held_out_rows(Path(folder).expanduser(), tuned.task) if data is None else load_rows(data)
    rows = limit(rows, limit_rows, 0)
    examples = encode(tuned.task, rows, tuned.tokenizer, tuned.max_length, tuned.kind, show)
    return evaluate(tuned.model, tuned.tokenizer, tuned.task, examples, tuned.kind, show=show)


def _held_out_rows(folder: Path, task: Task) -> Any:
    values = read_run_settings(folder)
    if "data" not in values:
        raise UserError(f"{folder} has no {RUN} that names its data; say which data to evaluate on")
    settings = TrainSettings(**{**values, "output": str(folder)})
    if settings.eval_data is not None:
        return limit(load_rows(settings.eval_data), settings.eval_limit, settings.seed)
    return split_rows(settings, task, load_rows(settings.data))[1]

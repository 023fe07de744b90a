"""A finished run, ready for use again. Knows a run's folder and what it needs; refuses to know training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from trimtab.adapter import adapters
from trimtab.beams import GREEDY, Search, check_search
from trimtab.checkpoint import load, read_adapter_config
from trimtab.data import limit, resolve
from trimtab.errors import UserError
from trimtab.evaluate import evaluate, predict
from trimtab.forms import Row
from trimtab.hub import at_hand
from trimtab.lengths import fitting_length, prompt_length
from trimtab.methods.spec import method_from_dict
from trimtab.models import Kind, kind_of, load_config, load_for, same_source
from trimtab.run_data import encode, load_reader, load_rows_of, split_rows
from trimtab.run_folder import RUN, begun
from trimtab.settings import TrainSettings
from trimtab.tasks import Task, encode_all, task_from_config


@dataclass(frozen=True)
class Tuned:
    """A finished run, ready for use: a fresh base with the folder's adapter."""

    model: PreTrainedModel
    tokenizer: Any
    """Of a vision model its image processor."""
    task: Task
    kind: Kind
    max_length: int
    search: Search = GREEDY
    """How texts are looked for, as the run evaluated itself."""
    max_new_tokens: int | None = None
    """Tokens that are generated at most, where the run says so."""

    def searching(
        self,
        *,
        num_beams: int | None = None,
        length_penalty: float | None = None,
        no_repeat_ngram_size: int | None = None,
        max_new_tokens: int | None = None,
    ) -> Tuned:
        """The same with another search; None keeps what the run has.

        Raises UserError for numbers that mean nothing, and for a task that writes no text.
        """
        search = self.search.changed(num_beams, length_penalty, no_repeat_ngram_size)
        check_search(self.task, search, max_new_tokens)
        longest = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        return dataclasses.replace(self, search=search, max_new_tokens=longest)


def load_run(folder: str | Path, *, device: str | None = None) -> Tuned:
    """The base model with a run's adapter, and its task; the folder may be on the hub (hub.py).

    Raises UserError where the folder is not the output of a run, or the base cannot be found.
    """
    folder = at_hand(folder)
    config = read_adapter_config(folder)
    if not config.get("task"):
        raise UserError(f"{folder} does not say which task it is for; it was not written by `trimtab train`")
    task = task_from_config(config["task"])
    method, run = method_from_dict(config["method"]), begun(folder)
    whole = bool(getattr(method, "whole_model", False))
    source = str(folder) if whole else _base(folder, config, run)
    kind = kind_of(source, task.name, getattr(task, "template", None))
    dtype, seed = (getattr(run or TrainSettings, key) for key in ("dtype", "seed"))
    model = load_for(task, source, kind, device=device, dtype=dtype, seed=seed)
    if not whole:
        load(model, folder)
    longest = fitting_length(method, load_config(source), run.max_length if run else None)
    said = run or TrainSettings
    search, new = Search.of(said), said.max_new_tokens
    return Tuned(model, load_reader(source, kind, str(folder)), task, kind, longest, search, new)


def ask(
    run: Tuned,
    prompt: str | None,
    max_new_tokens: int,
    choices: Sequence[str] = (),
    image: str | None = None,
    context: str | None = None,
) -> str:
    """What a run answers to a text or a picture.

    Of `choices` where its task is to choose, a piece of `context` where it is to find one, else the label, the number,
    the tags, or at most so many tokens; the text is cut to leave room for them.

    Raises UserError for choices, a picture or a context that the task does not take, and where it lacks what it takes.
    """
    longest = run.max_length
    if run.task.writes:
        method = next((adapter.method for adapter in adapters(run.model).values()), None)
        longest = prompt_length(method, run.model.config, longest, max_new_tokens)
    row = {**_asked(run.task, prompt, image), **_offered(run.task, choices), **_about(run.task, context)}
    examples = encode_all(run.task, [row], run.tokenizer, longest, run.kind, asking=True)
    how: Any = {"max_new_tokens": max_new_tokens, "search": run.search, "show": False}
    return predict(run.model, run.tokenizer, run.task, examples, run.kind, **how)[0]


def _asked(task: Task, prompt: str | None, image: str | None) -> Row:
    """A row of what is asked about."""
    shown: Any = getattr(task, "shown", None)  # of a task whose rows have pictures
    if prompt is None and task.writes:
        raise UserError("give a text: --prompt TEXT")
    if image is not None and shown is None:
        raise UserError(f"the task {task.name!r} of this run reads no pictures; leave --image out")
    if image is None:
        if prompt is None:
            raise UserError("give a text: --prompt TEXT" if shown is None else "give a picture: --image FILE")
        return task.question(prompt)
    return {**shown(image), **({} if prompt is None else task.question(prompt))}


def _offered(task: Task, choices: Sequence[str]) -> Row:
    """The part of a row that holds its choices."""
    offered = getattr(task, "offered", None)  # of a task whose rows have some
    if offered is not None:
        return offered(choices)
    if choices:
        raise UserError(f"the task {task.name!r} takes no choices")
    return {}


def _about(task: Task, context: str | None) -> Row:
    """The part of a row that holds its context."""
    about: Any = getattr(task, "about", None)  # of a task whose rows have one
    if about is not None:
        if context is None:
            raise UserError(f"the task {task.name!r} finds answers in a text: --context TEXT")
        return about(context)
    if context is not None:
        raise UserError(f"the task {task.name!r} takes no context")
    return {}


def _base(folder: Path, config: Mapping[str, Any], run: TrainSettings | None) -> str:
    base = run.model if run else config["base"].get("path")
    if not base or not isinstance(base, str):
        raise UserError(f"{folder} does not say which base model it was trained on")
    return base


def is_own_data(folder: str | Path, data: str) -> bool:
    """Whether a run held its evaluation rows out of this very data, however it is spelled."""
    run = begun(at_hand(folder))
    if run is None or run.eval_data is not None:
        return False
    try:
        resolve(run.data)
    except UserError:  # a package that is no longer installed: nothing that can be read is the same
        return False
    return same_source(data, run.data)


def evaluate_run(
    folder: str | Path,
    data: str | None = None,
    *,
    limit_rows: int | None = None,
    show: bool | None = None,
    **search: Any,
) -> dict[str, float]:
    """The metrics of a run's adapter on a fresh base: on all rows of `data`, or on the rows the run held out.

    Without `data` the numbers are those in the run's metrics.json. `search` are the arguments of `Tuned.searching`, for
    another search than the run's. Raises UserError as `load_run`, and for data that does not fit the task.
    """
    folder = at_hand(folder)
    tuned = load_run(folder).searching(**search)
    column = getattr(tuned.task, "image_column", None)
    rows = _held_out_rows(folder, tuned.task) if data is None else load_rows_of(data, column)
    rows = limit(rows, limit_rows, 0)
    examples = encode(tuned.task, rows, tuned.tokenizer, tuned.max_length, tuned.kind, show)
    how: Any = {"max_new_tokens": tuned.max_new_tokens, "search": tuned.search, "show": show}
    return evaluate(tuned.model, tuned.tokenizer, tuned.task, examples, tuned.kind, **how)


def _held_out_rows(folder: Path, task: Task) -> Any:
    settings, column = begun(folder), getattr(task, "image_column", None)
    if settings is None:
        raise UserError(f"{folder} has no {RUN} that names its data; say which data to evaluate on")
    if settings.eval_data is not None:
        return limit(load_rows_of(settings.eval_data, column), settings.eval_limit, settings.seed)
    return split_rows(settings, task, load_rows_of(settings.data, column))[1]

"""One search from settings to a report. Knows the order of the steps and the folder's files; refuses to know how a
trial is run (trials.py), judged (halving.py, results.py) and shown (report.py).

    space -> trials on the development rows -> the front, trained again with several seeds -> the test rows, once

    DIR/search.json   what was asked              DIR/study.journal   the trials, unless --storage says where
    DIR/rows/*.jsonl  train, dev and test rows    DIR/cells/*.json    the runs of the architectures trained again
    DIR/adapters/*    their adapters              DIR/best            the one to take
    DIR/report.html, results.json, results.csv, trials.csv, pareto.svg
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import shutil
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from trimtab.bars import progress
from trimtab.checkpoint import atomic_folder, model_fingerprint, write_json
from trimtab.comparison.bench import Bench
from trimtab.comparison.plan import Plan, check_numbers
from trimtab.comparison.results import Comparison, Outcome, Row, conclude, difference
from trimtab.comparison.steps import SIDES, Counted, Walk, begin_folder, check_folder, check_rows, source_of
from trimtab.config import command
from trimtab.data import load_rows
from trimtab.errors import UserError
from trimtab.models import load_config
from trimtab.report import number
from trimtab.run_data import Source, find_task
from trimtab.run_folder import settings_to_dict
from trimtab.searching import storage as storages
from trimtab.searching.report import write_report
from trimtab.searching.results import SearchResult, choose, dev_mean, layers_of, pick, sentence
from trimtab.searching.space import HIGHEST, LOWEST, Space, space_of
from trimtab.searching.trials import COSTS, Trial, Tries, finished, front, read_objectives
from trimtab.settings import TrainSettings

ABOUT, JOURNAL, BEST = "search.json", "study.journal", "best"
TRIALS = 40
"""Trials where neither their number nor a time is given."""
SEARCHED = 0.6
"""Share of the minutes in which trials are begun; the rest is for training the front again."""


def search(
    settings: TrainSettings,
    *,
    trials: int | None = None,
    minutes: float | None = None,
    objective: str | None = None,
    storage: str | None = None,
    seeds: int = 3,
    points: int = 4,
    max_share: float | None = None,
    methods: Sequence[str] | None = None,
    dev_share: float = 0.2,
    sampler: str = storages.DEFAULT_SAMPLER,
    worker: bool = False,
    show: bool | None = None,
) -> SearchResult | None:
    """Look for an architecture on development rows; writes `settings.output` and returns its content.

    The study gets `trials` trials in all, or as many as begin within three fifths of `minutes`. The best `points` of
    its front (with `max_share` of those that train at most this share of the parameters) are trained with `seeds`
    seeds, and the test rows, `settings.eval_data` or `eval_share`, are scored once with each. `objective` names one of
    the task's metrics and any of parameters and seconds, with commas. `storage` is the path of Optuna's journal file or
    a database's URL; with `worker` the call only adds trials to the study there and returns None. `methods` leaves the
    other members of the space out. `settings.method` and `settings.lr` are not used. The same call goes on where it was
    stopped. Raises UserError for mistakes, KeyboardInterrupt after a Ctrl-C has been answered.
    """
    begun = time.monotonic()
    check_numbers(seeds, minutes, dev_share, (1.0,))
    _check(trials, points, max_share, worker, storage)
    storages.sampler(sampler, 0)
    source = find_task(settings)
    check_rows(source, ())
    objectives = read_objectives(objective, source.task.measures)
    metric = next(name for name in objectives if name not in COSTS)
    config = load_config(settings.model)
    space = space_of(config, methods, has_head(source), settings.max_length)
    longest = None if source.kind == "vision" else space.longest(config, settings.max_length)
    settings = dataclasses.replace(settings, lr=None, method="lora", max_length=longest)
    plan = Plan(settings, (), seeds, metric, (1.0,))
    folder = Path(settings.output)
    named = [member.name for member in space.members]
    about = {**_own(settings), "objectives": list(objectives), "dev_share": dev_share, "space": named}
    check_folder(folder, about, ABOUT)
    reached = storages.reach(storage) if storage is not None else None
    if not (folder / ABOUT).is_file():
        begin_folder(folder, settings, source, dev_share, "architectures")
        write_json(folder / ABOUT, about)
    with closing(Bench(settings, source_of(folder, settings), folder, show)) as bench:
        shared = {key: value for key, value in about.items() if key not in ("model", "data", "eval_data")}
        shared |= {"base": model_fingerprint(bench.base.model), "rows": _digest(folder)}
        ways = [("minimize" if name in COSTS or not plan.higher else "maximize") for name in objectives]
        study = storages.open_study(
            reached or storages.reach(str(folder / JOURNAL)), ways, shared, sampler, settings.seed
        )
        tries = Tries(study, space, bench, plan, objectives, sampler, alone=storage is None)
        until = math.inf if minutes is None else begun + SEARCHED * 60 * minutes
        tries.all(trials if trials or minutes else TRIALS, until, show)
        if worker:
            return None
        left = None if minutes is None else begun + 60 * minutes - time.monotonic()
        found = _conclude(plan, bench, finished(study), space, objectives, points, max_share, left, show)
    write_report(found)
    return found


def describe(
    settings: TrainSettings,
    *,
    objective: str | None = None,
    methods: Sequence[str] | None = None,
    trials: int | None = None,
    minutes: float | None = None,
    seeds: int = 3,
    points: int = 4,
) -> list[str]:
    """The space and the size of the search, line by line; nothing is run and nothing is written.

    Raises UserError as `search`.
    """
    source = find_task(settings)
    check_rows(source, ())
    objectives = read_objectives(objective, source.task.measures)
    space = space_of(load_config(settings.model), methods, has_head(source), settings.max_length)
    lines = [f"{member.name:10} {_grid_text(space, member.name)}" for member in space.members]
    budget = f"{minutes:g} minutes" if minutes and not trials else f"{trials or TRIALS} trials"
    return [
        *lines,
        f"{'layers':10} any of {space.layers}, the same for all members",
        f"{'lr':10} {LOWEST:g} to {HIGHEST:g}",
        f"{space.architectures:,} architectures, {number(space.smallest)} to {number(space.largest)} trained parameters"
        + (" and those of the task head" if space.head else ""),
        f"objectives {', '.join(objectives)}; {budget}, {settings.epochs:g} epochs each at most, "
        f"then at most {points + 1} architectures with {seeds} seed{'s' * (seeds != 1)}",
    ]


def _grid_text(space: Space, name: str) -> str:
    sizes = space.sizes.get(name)
    return f"off, or size {', '.join(map(str, sizes))}" if sizes else "off or on"


def has_head(source: Source) -> bool:
    """Whether the model gets a task head, which every method trains beside itself."""
    return source.kind == "encoder"


def _check(trials: int | None, points: int, max_share: float | None, worker: bool, storage: str | None) -> None:
    if trials is not None and trials < 1:
        raise UserError(f"trials must be at least 1, not {trials}")
    if points < 1:
        raise UserError(f"points must be at least 1, not {points}")
    if max_share is not None and not 0 < max_share <= 1:
        raise UserError(f"max_share is a share of the parameters, above 0 and at most 1, not {max_share:g}")
    if worker and storage is None:
        raise UserError("a worker adds trials to a study that others know: give --storage as well")


def _own(settings: TrainSettings) -> dict[str, Any]:
    """The settings that may not change from one call to the next."""
    out = ("output", "method", "lr", "cache", "cache_memory")
    return {key: value for key, value in settings_to_dict(settings).items() if key not in out}


def _digest(folder: Path) -> str:
    """The same for the same rows to train on and to choose by, wherever they are."""
    content = b"".join((folder / "rows" / f"{side}.jsonl").read_bytes() for side in SIDES[:2])
    return hashlib.sha256(content).hexdigest()[:16]


# -- training again -----------------------------------------------------------------------------------------------


def _conclude(
    plan: Plan,
    bench: Bench,
    trials: Sequence[Trial],
    space: Space,
    objectives: tuple[str, ...],
    points: int,
    max_share: float | None,
    left: float | None,
    show: bool | None,
) -> SearchResult:
    best = front(trials, objectives, plan.sign)
    if not best:
        raise UserError("no trial has ended yet: give more trials or minutes")
    walk = Walk(plan, bench, load_rows(str(bench.folder / "rows" / "test.jsonl")))
    picked = pick(best, trials, _affordable(points, best, plan, walk, left), max_share, plan.sign)
    plan = walk.plan = dataclasses.replace(plan, methods=tuple(one.method for one in picked))
    outcomes = _again(walk, picked, show)
    rows = {side: len(load_rows(str(bench.folder / "rows" / f"{side}.jsonl"))) for side in SIDES}
    compared = conclude(plan, outcomes, walk.base, rows, bench)
    chosen = choose(compared.rows, max_share, plan.sign)
    said = _sentence(plan, compared, chosen, outcomes, picked, len(trials), max_share)
    own = chosen.method if chosen else None
    return SearchResult(
        folder=str(bench.folder),
        trials=tuple(trials),
        front=tuple(best),
        objectives=objectives,
        comparison=dataclasses.replace(compared, recommended=own, recommendation=said),
        method=own,
        lr=chosen.lr if chosen else None,
        adapter=_keep(bench.folder / BEST, chosen, plan) if chosen else None,
        recommendation=said,
        layers=layers_of(own, space.layers),
        commands={trial.number: _command(plan, bench, trial) for trial in trials},
        max_share=max_share,
    )


def _affordable(points: int, best: Sequence[Trial], plan: Plan, walk: Walk, left: float | None) -> int:
    """How many architectures can be trained again in the seconds that are left; at least one."""
    if left is None:
        return points
    longest = max(trial.whole_seconds for trial in best[:points])
    each = plan.seeds * (longest + walk.base["seconds"])
    return max(1, min(points, int(left / each) - 1))  # one is the single method that they are compared with


def _again(walk: Walk, picked: Sequence[Trial], show: bool | None) -> list[Outcome]:
    """The outcome of every architecture that is trained again."""
    outcomes, epochs = [], float(walk.plan.settings.epochs)
    with progress("training again", walk.plan.seeds * len(picked), show) as bar:
        for trial in picked:
            cells = walk.plan.final(trial.method, trial.lr, epochs)
            final, errors = walk.each(cells, Counted(bar, trial.method), scored=True)
            grid = {cell: figures for cell, figures in final.items() if cell.seed == walk.plan.settings.seed}
            outcomes.append(Outcome(trial.method, epochs, trial.lr, grid, final, tuple(errors)))
    return outcomes


def _sentence(
    plan: Plan,
    compared: Comparison,
    chosen: Row | None,
    outcomes: Sequence[Outcome],
    picked: Sequence[Trial],
    trials: int,
    max_share: float | None,
) -> str:
    of = {one.method: one for one in outcomes}
    alone = [row for row in compared.rows if row.runs and any(one.start and one.method == row.method for one in picked)]
    rival = max((row for row in alone if row is not chosen), key=lambda row: plan.sign * dev_mean(row), default=None)
    against = difference(plan, of[chosen.method], of[rival.method], compared.by_row) if chosen and rival else None
    return sentence(chosen, compared, trials, rival, against, max_share)


def _keep(target: Path, chosen: Row, plan: Plan) -> str:
    """The chosen method's adapter, of the seed that is best on the development rows, as a folder of its own."""
    run = max(chosen.runs, key=lambda run: (plan.sign * run.dev, -run.seed))
    source = run.adapter
    atomic_folder(target, lambda building: shutil.copytree(source, building, dirs_exist_ok=True), overwrite=True)
    return str(target)


def _command(plan: Plan, bench: Bench, trial: Trial) -> str:
    """What trains a trial again, to its end, and scores the same development rows."""
    cell = plan.cell(trial.method, trial.lr, plan.settings.seed, float(plan.settings.epochs))
    settings = bench.settings_of(cell)
    dev = str(bench.folder / "rows" / "dev.jsonl")
    return command(dataclasses.replace(settings, eval_data=dev, output=f"{settings.output}-trial"))

"""The search benchmark: what a search finds against tuned single methods, and which sampler finds most. Knows which
runs are made; refuses to know how their results are shown (search_report.py does).

    python -m benchmarks.search --estimate   what it would run, and about how long that takes on a quiet core
    python -m benchmarks.search              run what has no result yet, then write the report and docs/search.md
    python -m benchmarks.search --report     only write them from the results that are there
    python -m benchmarks.search --quick      everything small and on BERT-tiny, with a report of its own

Samplers are compared on BERT-tiny, where a trial takes seconds: on real trials, and with more repeats on a surrogate
that was fitted to them. There the search as a whole, which begins with named methods and stops bad trials early, is
compared with random search that is given as many steps of training. The search itself runs on MiniLM, on one task; what
it finds is then trained unchanged on the two others. Every run leaves one JSON file and is not made again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality import MODELS, TOKENS
from benchmarks.rows import SOURCES, split
from trimtab.cells import Figures, keep, read, write
from trimtab.comparison.bench import Bench
from trimtab.comparison.plan import Cell, Plan, Scored
from trimtab.comparison.steps import source_of
from trimtab.data import load_rows
from trimtab.models import load_config
from trimtab.searching import storage
from trimtab.searching.space import Space, space_of
from trimtab.searching.trials import Trial, Tries, finished, front
from trimtab.settings import TrainSettings

ROOT = Path(__file__).resolve().parent.parent
OBJECTIVES = ("accuracy", "parameters")


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    model: str = "minilm"
    """What the search runs on."""
    sampler_model: str = "bert-tiny"
    """What samplers are compared on."""
    train: int = 400
    dev: int = 300
    test: int = 1000
    epochs: float = 3.0
    lengths: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"sarcasm": 64, "reviews": 64, "bbc": 32})
    defaults: tuple[str, ...] = ("houlsby", "pfeiffer", "parallel", "lora", "ia3", "bitfit")
    factors: tuple[float, ...] = (1 / 3, 1.0, 3.0)
    seeds: int = 3
    cost: float = 7.0
    """Houlsby trainings that the trials of the search may take together."""
    trials: int = 24
    """Trials of a sampler's repeat."""
    repeats: int = 3
    surrogate_repeats: int = 5
    search_repeats: int = 8
    """Repeats of whole searches, and of random points beside them."""


FULL = Sizes()
QUICK = Sizes(model="bert-tiny", train=200, dev=100, test=200, epochs=1.0, defaults=("houlsby", "lora"), seeds=2,
              cost=6.0, trials=10, repeats=2, surrogate_repeats=2, search_repeats=2)  # fmt: skip
SEARCHED, OTHERS = "sarcasm", ("reviews", "bbc")
"""The task of the search, and those that what it finds is moved to."""


class Arena:
    """A model on a task: its rows, one loaded base, and the runs that are kept."""

    def __init__(self, folder: Path, model: str, task: str, sizes: Sizes):
        self.folder, self.sizes = folder / f"{model}-{task}", sizes
        self._write_rows(task)
        rows = self.folder / "rows"
        settings = TrainSettings(
            MODELS[model].source, str(rows / "train.jsonl"), str(self.folder), eval_data=str(rows / "test.jsonl"),
            epochs=sizes.epochs, max_length=sizes.lengths[task], method="lora",
        )  # fmt: skip
        self.settings = settings
        self.bench = Bench(settings, source_of(self.folder, settings), self.folder, False)
        self.plan = Plan(settings, (), sizes.seeds, "accuracy", sizes.factors)
        self.test = load_rows(str(rows / "test.jsonl"))
        self.space = space_of(load_config(settings.model), None, True, settings.max_length)

    def _write_rows(self, task: str) -> None:
        if (self.folder / "rows" / "test.jsonl").is_file():
            return
        for side, rows in split(SOURCES[task](), self.sizes.train, self.sizes.dev, self.sizes.test).items():
            lines = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)
            write(self.folder / "rows" / f"{side}.jsonl", lines)

    def cell(self, method: str, lr: float, seed: int = 0) -> Cell:
        """A run of a method."""
        return self.plan.cell(method, lr, seed, self.sizes.epochs)

    def trained(self, cell: Cell, save: bool = False) -> Figures:
        """The figures of a run on the development rows; with `save` its adapter is there as well."""
        before = read(self.folder / "cells", cell)
        if before is not None and not (save and "bytes" not in before):
            return before
        figures = self.bench.train(cell) if save else self.bench.attempt(cell, _unwatched)
        if before is not None:  # seconds that are compared with others are those of the first run
            figures = {**figures, "train": before["train"]}
        keep(self.folder / "cells", cell, figures)
        return figures

    def tried(self, method: str, lr: float, point: Mapping[str, Any]) -> tuple[float, int]:
        """Accuracy on the development rows and trained parameters of a point."""
        figures = self.trained(self.cell(method, lr))
        return figures["dev"]["accuracy"], int(figures["parameters"]["trainable"])

    def scored(self, cell: Cell) -> Figures:
        """The figures of a run with those of the test rows."""
        trained, scored = self.trained(cell, save=True), read(self.folder / "cells", Scored(cell))
        if scored is None:
            scored = self.bench.score(cell, self.test)
            keep(self.folder / "cells", Scored(cell), scored)
        return {**trained, **scored}

    def best_rate(self, method: str, rates: Sequence[float]) -> float:
        """The learning rate that is best on the development rows, the lower one of equals."""
        found = {lr: self.trained(self.cell(method, lr))["dev"]["accuracy"] for lr in rates}
        return max(found, key=lambda lr: (found[lr], -lr))


def _unwatched(parameters: int, score: Callable[[], Figures]) -> Any:
    from transformers import TrainerCallback

    return TrainerCallback()


@contextmanager
def arena(folder: Path, model: str, task: str, sizes: Sizes) -> Iterator[Arena]:
    """An arena whose caches are given back."""
    made = Arena(folder, model, task, sizes)
    try:
        yield made
    finally:
        made.bench.close()


# -- samplers -----------------------------------------------------------------------------------------------------

Evaluate = Callable[[str, float, dict[str, Any]], tuple[float, int]]
"""Method, learning rate and point -> accuracy and trained parameters."""


def sample(space: Space, name: str, repeat: int, trials: int, evaluate: Evaluate) -> list[tuple[float, int]]:
    """What one repeat of a sampler tries, in order; the same again for the same numbers."""
    library = storage.optuna()
    study = library.create_study(directions=["maximize", "minimize"])
    tried = []
    for number in range(trials):
        seed = int(np.random.SeedSequence((repeat, number)).generate_state(1)[0])
        study.sampler = storage.sampler(name, seed)
        trial = study.ask()
        point = space.suggest(trial)
        method = space.method(point)
        assert method is not None
        tried.append(evaluate(method, space.rate(point), point))
        study.tell(trial, list(tried[-1]))
    return tried


def hypervolume(tried: Sequence[tuple[float, int]], floor: float, least: int, most: int) -> float:
    """The area between the front and the worst corner: accuracy from `floor` to 1, log parameters from least to most,
    both as shares, so at most 1.
    """
    area, best = 0.0, floor
    for accuracy, parameters in sorted(tried, key=lambda one: (one[1], -one[0])):
        if accuracy > best:
            width = (math.log(most) - math.log(max(parameters, least))) / (math.log(most) - math.log(least))
            area += max(0.0, width) * (accuracy - best) / (1 - floor)
            best = accuracy
    return area


def curve(tried: Sequence[tuple[float, int]], floor: float, least: int, most: int) -> list[float]:
    """The hypervolume behind each trial."""
    return [hypervolume(tried[: at + 1], floor, least, most) for at in range(len(tried))]


def features(space: Space, point: Mapping[str, Any]) -> list[float]:
    """A point as numbers: log size of each member that is on, the layers, the logarithm of the learning rate."""
    sizes = [float(point[one.name]) * (1 + point.get(f"{one.name}.size", 0)) for one in space.members]
    layers = [float(point[f"layer.{at}"]) for at in range(space.layers)]
    return [*sizes, *layers, sum(layers), math.log10(point["lr"])]


def compare_samplers(arena: Arena) -> Figures:
    """Hypervolume curves of the samplers on real trials and on the surrogate."""
    space, sizes = arena.space, arena.sizes
    table: list[tuple[list[float], float]] = []

    def real(method: str, lr: float, point: dict[str, Any]) -> tuple[float, int]:
        accuracy, parameters = arena.tried(method, lr, point)
        table.append((features(space, point), accuracy))
        return accuracy, parameters

    tried = {
        name: [sample(space, name, repeat, sizes.trials, real) for repeat in range(sizes.repeats)]
        for name in ("random", storage.DEFAULT_SAMPLER)
    }
    bounds = bounds_of(arena)
    head = bounds[1]
    fitted, agreement = fit(table)

    def surrogate(method: str, lr: float, point: dict[str, Any]) -> tuple[float, int]:
        return float(fitted.predict([features(space, point)])[0]), parameters_of(space, method, head)

    guessed = {
        name: [sample(space, name, repeat, sizes.trials, surrogate) for repeat in range(sizes.surrogate_repeats)]
        for name in storage.SAMPLERS
    }
    return {
        "real": {name: [curve(one, *bounds) for one in runs] for name, runs in tried.items()},
        "surrogate": {name: [curve(one, *bounds) for one in runs] for name, runs in guessed.items()},
        "agreement": agreement,
        "table": len(table),
    }


def bounds_of(arena: Arena) -> tuple[float, int, int]:
    """What a hypervolume is measured from: the accuracy of always naming one label, least and most parameters."""
    head = int(arena.trained(arena.cell("head", 1e-3))["parameters"]["trainable"])
    return _majority(arena), head, head + arena.space.largest


def _majority(arena: Arena) -> float:
    """The accuracy on the development rows of always naming the more frequent label."""
    labels = [row["label"] for row in load_rows(str(arena.folder / "rows" / "dev.jsonl"))]
    return max(labels.count(label) for label in set(labels)) / len(labels)


def parameters_of(space: Space, method: str, head: int) -> int:
    """The trained parameters by the methods' formulas, the head's included."""
    from trimtab.methods.spec import parse_method

    return head if method == "head" else head + int(parse_method(method).parameter_count(space.sites))


def fit(table: Sequence[tuple[list[float], float]]) -> tuple[Any, float]:
    """A forest on the trials, and the rank correlation of its cross-validated guesses with the truth."""
    from scipy.stats import spearmanr
    from sklearn.ensemble import ExtraTreesRegressor
    from sklearn.model_selection import cross_val_predict

    known = {tuple(point): score for point, score in table}
    points, scores = np.array(list(known)), np.array(list(known.values()))
    forest = ExtraTreesRegressor(n_estimators=100, min_samples_leaf=2, random_state=0)
    guesses = cross_val_predict(forest, points, scores, cv=5)
    return forest.fit(points, scores), float(spearmanr(guesses, scores).statistic)


# -- the search as a whole ----------------------------------------------------------------------------------------


class OneSeed:
    """A bench whose runs all begin with seed 0, as those of the samplers do, whatever seed points are drawn by."""

    def __init__(self, bench: Bench):
        self.bench = bench

    def attempt(self, cell: Cell, watch: Any) -> Figures:
        """A run on the development rows."""
        return self.bench.attempt(dataclasses.replace(cell, seed=0), watch)


def whole_search(arena: Arena, sampler: str, repeat: int) -> list[Trial]:
    """The trials of one search, until they have taken as many steps as a sampler's repeat."""
    settings = dataclasses.replace(arena.settings, seed=repeat)
    plan = dataclasses.replace(arena.plan, settings=settings)
    journal = storage.reach(str(arena.folder / f"whole-{sampler}-{repeat}.journal"))
    about = {"rows": arena.sizes.train, "epochs": arena.sizes.epochs, "seed": repeat}
    study = storage.open_study(journal, ["maximize", "minimize"], about, sampler, repeat)
    tries = Tries(study, arena.space, OneSeed(arena.bench), plan, OBJECTIVES, sampler, alone=True)
    while sum(trainings(one) for one in finished(study)) < arena.sizes.trials:
        tries.all(tries.done + 1, math.inf, False)
    return finished(study)


def trainings(trial: Trial) -> float:
    """The share of a whole training that a trial took."""
    return trial.stopped_at or 1.0


def curve_of_search(trials: Sequence[Trial], budget: int, bounds: tuple[float, int, int]) -> list[float]:
    """The hypervolume of the trials that ended by themselves, behind as many whole trainings as each number says."""
    spent = np.cumsum([trainings(one) for one in trials])
    return [
        hypervolume(
            [
                (one.score, one.parameters)
                for one, by in zip(trials, spent, strict=True)
                if by <= at + 1e-9 and one.stopped_at is None
            ],
            *bounds,
        )
        for at in range(1, budget + 1)
    ]


def compare_searches(arena: Arena) -> Figures:
    """Hypervolume curves of whole searches, by the default sampler and by random points, and of random points alone."""
    bounds, sizes = bounds_of(arena), arena.sizes
    repeats = range(sizes.search_repeats)
    alone = [sample(arena.space, "random", repeat, sizes.trials, arena.tried) for repeat in repeats]
    found: Figures = {
        "alone": {
            "curves": [curve(one, *bounds) for one in alone],
            "trials": [sizes.trials for _ in repeats],
            "stopped": [0 for _ in repeats],
        }
    }
    for name in (storage.DEFAULT_SAMPLER, "random"):
        runs = [whole_search(arena, name, repeat) for repeat in repeats]
        found[name] = {
            "curves": [curve_of_search(run, sizes.trials, bounds) for run in runs],
            "trials": [len(run) for run in runs],
            "stopped": [sum(one.stopped_at is not None for one in run) for run in runs],
        }
    return found


# -- what is found ------------------------------------------------------------------------------------------------


def tune_defaults(arena: Arena) -> dict[str, float]:
    """The best learning rate of every default method."""
    return {method: arena.best_rate(method, arena.plan.rates(method)) for method in arena.sizes.defaults}


def run_search(arena: Arena, seconds: float) -> list[Trial]:
    """Trials until they have taken so many training seconds together."""
    about = {"rows": arena.sizes.train, "epochs": arena.sizes.epochs, "seconds": "by the cost of houlsby"}
    study = storage.open_study(
        storage.reach(str(arena.folder / "study.journal")), ["maximize", "minimize"], about, storage.DEFAULT_SAMPLER, 0
    )
    tries = Tries(study, arena.space, arena.bench, arena.plan, OBJECTIVES, storage.DEFAULT_SAMPLER, alone=True)
    while sum(trial.seconds for trial in finished(study)) < seconds:
        tries.all(tries.done + 1, math.inf, False)
    return finished(study)


def compare_found(folder: Path, sizes: Sizes) -> Figures:
    """The search on one task, and what it found and the best default on all three."""
    with arena(folder, sizes.model, SEARCHED, sizes) as home:
        rates = tune_defaults(home)
        tuned = {method: home.trained(home.cell(method, lr)) for method, lr in rates.items()}
        best = max(tuned, key=lambda method: tuned[method]["dev"]["accuracy"])
        most = int(tuned[best]["parameters"]["trainable"])
        houlsby = tuned["houlsby"]["train"]["seconds"]
        begun = time.perf_counter()
        trials = run_search(home, sizes.cost * houlsby)
        took = time.perf_counter() - begun
        print(f"{len(trials)} trials, {sum(one.seconds for one in trials):.0f} training seconds, {took:.0f} in all")
        line = front(trials, OBJECTIVES, 1)
        chosen = next((one for one in line if 2 * one.parameters <= most), line[-1])
        around = sorted({float(f"{chosen.lr * factor:.2g}") for factor in sizes.factors})
        methods = {"found": (chosen.method, around), "default": (best, home.plan.rates(best))}
    return {
        "methods": {name: method for name, (method, _) in methods.items()},
        "defaults": {
            method: {"lr": rates[method], "dev": one["dev"]["accuracy"], "parameters": one["parameters"]["trainable"]}
            for method, one in tuned.items()
        },
        "trials": [dataclasses.asdict(one) for one in trials],
        "front": [one.number for one in line],
        "chosen": chosen.number,
        "houlsby_seconds": houlsby,
        "tasks": {task: score_all(folder, task, methods, sizes) for task in (SEARCHED, *OTHERS)},
    }


def score_all(folder: Path, task: str, methods: Mapping[str, tuple[str, Sequence[float]]], sizes: Sizes) -> Figures:
    """The test rows' answers of both methods on one task, for every seed, with the rate its development rows choose."""
    with arena(folder, sizes.model, task, sizes) as home:
        found: Figures = {}
        for name, (method, rates) in methods.items():
            lr = home.best_rate(method, rates)
            runs = [home.scored(home.cell(method, lr, seed)) for seed in range(sizes.seeds)]
            found[name] = {
                "marks": [run["marks"] for run in runs],
                "accuracy": [run["test"]["accuracy"] for run in runs],
                "lr": lr,
                "parameters": int(runs[0]["parameters"]["trainable"]),
                "seconds": [run["train"]["seconds"] for run in runs],
            }
            print(f"{task} {method}: {np.mean(found[name]['accuracy']):.3f}", flush=True)
    return found


# -- the command --------------------------------------------------------------------------------------------------

SPEED = {"bert-tiny": 8_000, "minilm": 550}
"""Tokens a second that are trained on, with one quiet core."""


def estimate(sizes: Sizes) -> dict[str, float]:
    """About how many seconds each part takes on one quiet core."""

    def training(model: str, task: str) -> float:
        tokens = min(TOKENS[task], sizes.lengths[task])
        scored = 0.3 * sizes.dev / sizes.train / sizes.epochs
        return 1 + tokens * sizes.train * sizes.epochs * (1 + scored) / SPEED[model]

    one = training(sizes.model, SEARCHED)
    finals = sum(training(sizes.model, task) for task in (SEARCHED, *OTHERS)) * 2 * sizes.seeds
    return {
        "samplers": 2 * sizes.repeats * sizes.trials * training(sizes.sampler_model, SEARCHED) + 60,
        "searches": 3 * sizes.search_repeats * sizes.trials * training(sizes.sampler_model, SEARCHED),
        "defaults": len(sizes.defaults) * len(sizes.factors) * one,
        "search": sizes.cost * one * 1.3 + len(sizes.factors) * one,
        "finals": finals * 1.2 * (1 + (len(sizes.factors) - 1) / sizes.seeds),
    }


def on_samplers_model(compare: Callable[[Arena], Figures]) -> Callable[[Path, Sizes], Figures]:
    """A comparison that needs the samplers' model only."""

    def made(folder: Path, sizes: Sizes) -> Figures:
        with arena(folder, sizes.sampler_model, SEARCHED, sizes) as home:
            return compare(home)

    return made


PARTS: dict[str, Callable[[Path, Sizes], Figures]] = {
    "samplers": on_samplers_model(compare_samplers),
    "searches": on_samplers_model(compare_searches),
    "found": compare_found,
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="The search benchmark.")
    parser.add_argument("--estimate", action="store_true", help="only say how long it takes")
    parser.add_argument("--report", action="store_true", help="only write the report")
    parser.add_argument("--quick", action="store_true", help="everything small, on BERT-tiny")
    parser.add_argument("--only", choices=tuple(PARTS), help="run one part")
    parser.add_argument("--folder", type=Path, default=None, help="where results are kept")
    given = parser.parse_args()
    sizes = QUICK if given.quick else FULL
    folder = given.folder or ROOT / "out" / ("search-quick" if given.quick else "search")
    for name, seconds in estimate(sizes).items():
        print(f"{name:10} about {seconds / 60:.0f} min on one quiet core")
    if given.estimate:
        return
    from benchmarks.search_report import write_all

    results = folder / "results.json"
    found = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
    if not given.report:
        found["sizes"] = dataclasses.asdict(sizes)
        for name, make in PARTS.items():
            if given.only in (None, name):
                found[name] = make(folder, sizes)
                write(results, json.dumps(found))
    write_all(found, ROOT / "docs" if not given.quick else folder)


if __name__ == "__main__":
    main()

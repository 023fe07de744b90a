"""The search benchmark: what a search finds against tuned single methods, and which sampler finds most. Knows which
runs are made; refuses to know how their results are shown (search_report.py does).

    python -m benchmarks.search --estimate   what it would run, and about how long that takes on a quiet core
    python -m benchmarks.search              run what has no result yet, then write the report and docs/search.md
    python -m benchmarks.search --report     only write them from the results that are there
    python -m benchmarks.search --quick      everything small and on BERT-tiny, with a report of its own

Samplers are compared on BERT-tiny, where a trial takes seconds: on real trials, and with more repeats on a surrogate
that was fitted to them. There the search as a whole, which begins with named methods and stops bad trials early, is
compared with random search that is given as many steps of training. The search itself runs on MiniLM, on one task; the
architecture that it finds is then trained on the two others. Every run leaves one JSON file and is not made again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.quality import TOKENS
from benchmarks.search_arena import FULL, OBJECTIVES, QUICK, Arena, Sizes, arena
from benchmarks.search_samplers import compare_samplers
from benchmarks.search_whole import compare_searches
from trimtab.cells import Figures, write
from trimtab.searching import storage
from trimtab.searching.trials import Trial, Tries, finished, front

ROOT = Path(__file__).resolve().parent.parent
SEARCHED, OTHERS = "sarcasm", ("reviews", "bbc")
"""The task of the search, and those that what it finds is moved to."""


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

"""The search as a whole, which begins with named methods and stops bad trials early, against random points with as much
training. Knows trials and what they cost; refuses to know how a run is made.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.search_arena import OBJECTIVES, Arena
from benchmarks.search_samplers import bounds_of, curve, hypervolume, sample
from trimtab.cells import Figures
from trimtab.comparison.bench import Bench
from trimtab.comparison.plan import Cell
from trimtab.searching import storage
from trimtab.searching.trials import Trial, Tries, finished


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

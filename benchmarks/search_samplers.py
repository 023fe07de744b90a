"""Which sampler finds most: hypervolume curves on real trials, and on a surrogate that was fitted to them. Knows points
and their scores; refuses to know how a run is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.search_arena import Arena
from trimtab.cells import Figures
from trimtab.data import load_rows
from trimtab.searching import storage
from trimtab.searching.space import Space

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

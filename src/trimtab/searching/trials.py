"""Trials: points of a space that are trained and scored on the development rows. Knows a study and a bench; refuses to
know the test rows and what comes of the trials.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trimtab.bars import progress
from trimtab.cells import Figures
from trimtab.comparison.bench import Bench
from trimtab.comparison.plan import Plan
from trimtab.comparison.steps import reason_of
from trimtab.errors import UserError, unknown
from trimtab.searching import storage
from trimtab.searching.halving import Reached, Rungs, stops
from trimtab.searching.space import Space

LOGGER = logging.getLogger("trimtab")
COSTS = ("parameters", "seconds")
"""Objectives that every task has; less is better."""
FAILURES = 8
"""Trials that may fail one after the other before the search gives up."""
REPEATS = 50
"""Points one after the other that were tried already, before a search without a number of trials ends."""
PAUSE = 0.5
"""Seconds between two looks at other workers' trials."""
TRIED, ERROR = "tried", "error"
"""Attributes of a trial: its figures, or why it failed."""


@dataclass(frozen=True)
class Trial:
    """A finished trial."""

    number: int
    method: str
    lr: float
    start: str | None
    """The method by itself that it stands for, where the search began with it."""
    score: float
    """The metric on the development rows, at the end or at the rung where it was stopped."""
    parameters: int
    share: float
    seconds: float
    """Training seconds, up to where it was stopped."""
    rungs: tuple[float, ...]
    """The metric at the rungs."""
    stopped_at: float | None
    """The share of the training behind which it was stopped; None where it ended by itself."""

    @property
    def whole_seconds(self) -> float:
        """The seconds that its whole training takes."""
        return self.seconds / (self.stopped_at or 1.0)


def read_objectives(text: str | None, measures: Sequence[str]) -> tuple[str, ...]:
    """The objectives of a list with commas; by default the task's first metric and the parameters.

    Raises UserError for one that does not exist or is there twice, and unless exactly one is a metric.
    """
    names = [part.strip() for part in (text or f"{measures[0]},parameters").split(",")]
    for name in names:
        if name not in measures and name not in COSTS:
            raise unknown("objective", name, (*measures, *COSTS))
    if len(set(names)) < len(names):
        raise UserError(f"an objective is in {text!r} twice")
    if len([name for name in names if name in measures]) != 1:
        raise UserError(f"the objectives need exactly one metric, such as {measures[0]}; {text!r} names another number")
    return tuple(names)


def finished(study: Any) -> list[Trial]:
    """The trials that gave a score, in their order."""
    complete = storage.optuna().trial.TrialState.COMPLETE
    trials = study.get_trials(deepcopy=False, states=(complete,))
    return [_trial(one) for one in trials]


def _trial(one: Any) -> Trial:
    tried = dict(one.user_attrs[TRIED])
    tried["rungs"] = tuple(tried["rungs"])
    return Trial(number=one.number, start=one.user_attrs.get(storage.START), **tried)


class Tries:
    """Adds trials to a study, until there are enough or the time is up."""

    def __init__(
        self, study: Any, space: Space, bench: Bench, plan: Plan, objectives: Sequence[str], sampler: str, alone: bool
    ):
        self.study, self.space, self.bench, self.plan = study, space, bench, plan
        self.objectives, self.sampler, self.alone = tuple(objectives), sampler, alone
        self.failed = self.repeated = 0
        if not study.get_trials(deepcopy=False):
            for name, point in space.starts().items():
                study.enqueue_trial(point, user_attrs={storage.START: name}, skip_if_exists=True)

    def all(self, trials: int | None, until: float, show: bool | None) -> None:
        """Run until the study has so many trials, or the clock (time.monotonic) says `until`.

        Trials that other workers run count as well; if one of them is lost, another one is run. Raises UserError where
        one trial after the other fails.
        """
        total = trials if trials is not None else max(1, round(until - time.monotonic()))
        begun = time.monotonic()
        with progress("trials" if trials is not None else "seconds", total, show) as bar:
            shown = 0
            while time.monotonic() < until:
                done = self.done
                counted = done if trials is not None else round(time.monotonic() - begun)
                bar(min(counted, total) - shown, f"{done} trials")
                shown = min(counted, total)
                if (trials is not None and done >= trials) or (trials is None and self.repeated >= REPEATS):
                    return
                if trials is not None and done + storage.running(self.study) >= trials:
                    time.sleep(PAUSE)  # the last ones are run by others
                    continue
                self._one()

    @property
    def done(self) -> int:
        """The trials that ended, with a score or with an error."""
        states = storage.optuna().trial.TrialState
        trials = self.study.get_trials(deepcopy=False)
        return sum(one.state == states.COMPLETE or ERROR in one.user_attrs for one in trials)

    def _one(self) -> None:
        storage.running(self.study)  # puts the points of lost trials back in the queue first
        self.study.sampler = storage.sampler(self.sampler, self._draw())
        trial = self.study.ask()
        storage.claim(trial)
        try:
            tried = self._tried(self.space.suggest(trial))
        except KeyboardInterrupt:
            storage.give_up(self.study, self.study.get_trials(deepcopy=False)[trial.number])
            raise
        except Exception as error:
            self._lost(trial, error)
            return
        self.failed = 0
        trial.set_user_attr(TRIED, {key: value for key, value in tried.items() if key not in ("number", "start")})
        self.study.tell(trial, self.values(_tried_trial(trial.number, tried)))

    def _draw(self) -> int:
        """A seed that no other trial of any worker has had; of one worker alone always the same."""
        parts = [self.plan.settings.seed, len(self.study.get_trials(deepcopy=False)), 0 if self.alone else os.getpid()]
        return int(np.random.SeedSequence(parts).generate_state(1)[0])

    def _lost(self, trial: Any, error: Exception) -> None:
        reason = reason_of(f"trial {trial.number}", error)
        trial.set_user_attr(ERROR, reason)
        self.study.tell(trial, state=storage.optuna().trial.TrialState.FAIL)
        self.failed += 1
        if self.failed >= FAILURES:
            raise UserError(f"{FAILURES} trials failed one after the other, the last one because: {reason}") from error

    def values(self, trial: Trial) -> list[float]:
        """What the study is told, in the order of the objectives."""
        costs = {"parameters": float(trial.parameters), "seconds": trial.whole_seconds}
        return [costs.get(name, trial.score) for name in self.objectives]

    # One point

    def _tried(self, point: dict[str, Any]) -> Figures:
        """The figures of a point: trained, or those of an equal one that was trained to the end."""
        method, lr = self.space.method(point), self.space.rate(point)
        if method is None:
            raise UserError("this point has nothing to train")
        everyone = finished(self.study)
        for other in everyone:
            if (other.method, other.lr) == (method, lr) and other.stopped_at is None:
                self.repeated += 1
                return dataclasses.asdict(other)
        self.repeated = 0
        return self._trained(method, lr, everyone)

    def _trained(self, method: str, lr: float, others: Sequence[Trial]) -> Figures:
        metric, sign = self.plan.objective, self.plan.sign
        watched: list[Rungs] = []

        def watch(parameters: int, score: Callable[[], Figures]) -> Rungs:
            counted = parameters if "parameters" in self.objectives else 0
            rivals = [
                Reached(one.parameters if counted else 0, tuple(sign * score for score in one.rungs)) for one in others
            ]
            rungs = Rungs(lambda: sign * score()[metric], lambda scores: stops(counted, scores, rivals))
            watched.append(rungs)
            return rungs

        cell = self.plan.cell(method, lr, self.plan.settings.seed, float(self.plan.settings.epochs))
        figures = self.bench.attempt(cell, watch)
        (rungs,) = watched
        score = figures["dev"][metric] if "dev" in figures else sign * rungs.scores[-1]
        if not math.isfinite(score):
            raise UserError(f"{metric} is not a finite number")
        return {
            "method": method,
            "lr": lr,
            "score": score,
            "parameters": int(figures["parameters"]["trainable"]),
            "share": figures["parameters"]["share"],
            "seconds": figures["train"]["seconds"],
            "rungs": [sign * one for one in rungs.scores],
            "stopped_at": rungs.stopped_at,
        }


def _tried_trial(number: int, tried: Figures) -> Trial:
    return Trial(**{"start": None, **tried, "number": number, "rungs": tuple(tried["rungs"])})


def front(trials: Sequence[Trial], objectives: Sequence[str], sign: int) -> list[Trial]:
    """The trials that ended by themselves and that no other beats or equals in all objectives; the best score first."""
    whole = [trial for trial in trials if trial.stopped_at is None]

    def losses(trial: Trial) -> tuple[float, ...]:
        costs = {"parameters": float(trial.parameters), "seconds": trial.seconds}
        return tuple(costs.get(name, -sign * trial.score) for name in objectives)

    ordered = sorted(whole, key=lambda trial: (-sign * trial.score, trial.parameters, trial.number))
    kept: list[Trial] = []
    for at, trial in enumerate(ordered):
        own = losses(trial)
        beaten = any(
            all(ours >= theirs for ours, theirs in zip(own, losses(other), strict=True))
            and (losses(other) != own or before < at)
            for before, other in enumerate(ordered)
            if other is not trial
        )
        if not beaten:
            kept.append(trial)
    return kept

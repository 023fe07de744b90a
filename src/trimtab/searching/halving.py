"""When a trial is not worth its rest: successive halving. Knows scores and parameters; refuses to know training.

A trial is scored when a quarter and when half of its steps are done (the rungs). It is stopped there if it is in the
worse half of its rivals: the trials of the study that reached the same rung and train no more parameters. So whatever
is stopped was behind most of what is no larger, a small architecture is never stopped because of a large one, and the
study keeps looking along the whole front. (Asynchronous successive halving, Li et al. 2020, arXiv:1810.05934, with the
rivals restricted; Optuna's own pruners refuse studies of several objectives.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback

RUNGS = (0.25, 0.5)
"""Shares of the training behind which a trial is scored."""
LEAST = 4
"""Rivals that a decision needs."""


@dataclass(frozen=True)
class Reached:
    """What another trial had at the rungs it reached; more is better."""

    parameters: int
    scores: tuple[float, ...]


def stops(parameters: int, scores: Sequence[float], others: Sequence[Reached]) -> bool:
    """Whether a trial with these scores at its rungs so far is in the worse half of its rivals."""
    rung = len(scores) - 1
    rivals = [one.scores[rung] for one in others if len(one.scores) > rung and one.parameters <= parameters]
    if len(rivals) < LEAST:
        return False
    return 2 * sum(score > scores[rung] for score in rivals) > len(rivals)


class Rungs(TrainerCallback):
    """Has a training scored at its rungs, and stops it when it is judged not to be worth the rest."""

    def __init__(self, score: Callable[[], float], judge: Callable[[list[float]], bool]):
        self.score, self.judge = score, judge
        self.scores: list[float] = []
        self.stopped_at: float | None = None
        """The share of the steps that were done when it was stopped."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Score at a rung; the last step is none."""
        done = state.global_step / state.max_steps
        if len(self.scores) == len(RUNGS) or not RUNGS[len(self.scores)] <= done < 1:
            return
        self.scores.append(self.score())
        if self.judge(self.scores):
            self.stopped_at = done
            control.should_training_stop = True

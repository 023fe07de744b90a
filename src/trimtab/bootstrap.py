"""The paired bootstrap. Knows arrays of scores, such as right and wrong answers; refuses to know methods and tasks.

    d = mean over tasks of the mean over seeds and rows of (score of the one method − score of the other)

Every resample draws rows with replacement, each task's its own and the same for both methods, and seeds with
replacement, the same for both methods and all tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
Answers = NDArray[Any]
"""Whether each answer is right, or how good it is: [seeds, rows]. One column says how good a seed is on all rows."""


@dataclass(frozen=True)
class Difference:
    """How much better the one method is than the other."""

    mean: float
    low: float
    """Lower end of the 95 % interval."""
    high: float

    @property
    def found(self) -> bool:
        """Whether the interval leaves out no difference at all."""
        return self.low > 0 or self.high < 0


def paired(ones: Sequence[Answers], others: Sequence[Answers], resamples: int = RESAMPLES, seed: int = 0) -> Difference:
    """The difference of two methods' mean score (of right and wrong: accuracy) over tasks, with a percentile interval.

    `ones` and `others` hold one array [seeds, rows] a task; all have the same seeds in the same order.
    """
    random = np.random.default_rng(seed)
    seeds = ones[0].shape[0]
    drawn_seeds = random.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds  # [resamples, seeds]
    observed, total = 0.0, np.zeros(resamples)
    for one, other in zip(ones, others, strict=True):
        assert one.shape == other.shape and one.shape[0] == seeds
        difference = np.subtract(one, other, dtype=np.float64)
        patterns, counts = np.unique(difference, axis=1, return_counts=True)  # rows that are alike are drawn together
        rows = difference.shape[1]
        drawn = random.multinomial(rows, counts / rows, size=resamples) / rows  # [resamples, patterns]
        total += ((drawn @ patterns.T) * drawn_seeds).sum(1)
        observed += float(difference.mean())
    total /= len(ones)
    low, high = np.quantile(total, (0.025, 0.975))
    return Difference(observed / len(ones), float(low), float(high))

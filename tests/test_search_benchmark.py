"""What the benchmarks count: hypervolumes, what a search has spent, and as many steps as the peer takes."""

from __future__ import annotations

import math

import pytest

from benchmarks.search_samplers import curve, hypervolume
from benchmarks.search_whole import curve_of_search
from benchmarks.speed_side import budget_of
from trimtab.batches import TokenBatches
from trimtab.searching.trials import Trial

BOUNDS = (0.5, 10, 1000)


def trial(number: int, score: float, parameters: int, stopped_at: float | None = None) -> Trial:
    return Trial(number, "lora", 1e-3, None, score, parameters, 0.1, 1.0, (), stopped_at)


def test_the_area_of_two_steps_is_that_on_paper() -> None:
    # 0.6 from 10 parameters on, 0.9 from 100 on, which is half of the logarithmic axis
    assert hypervolume([(0.9, 100), (0.6, 10)], *BOUNDS) == pytest.approx(0.2 * 1 + 0.6 * 0.5)
    assert hypervolume([(0.4, 10)], *BOUNDS) == 0
    assert hypervolume([(0.9, 100), (0.8, 200)], *BOUNDS) == pytest.approx(0.8 * 0.5)
    assert curve([(0.6, 10), (0.9, 100)], *BOUNDS) == pytest.approx([0.2, 0.5])


def test_a_stopped_trial_costs_its_share_and_gives_nothing_and_one_beyond_the_budget_gives_nothing() -> None:
    trials = [trial(0, 0.6, 10), trial(1, 0.99, 10, 0.25), trial(2, 0.9, 100), trial(3, 1.0, 10)]
    # spent: 1, 1.25, 2.25, 3.25
    assert curve_of_search(trials, 3, BOUNDS) == pytest.approx([0.2, 0.2, 0.5])


@pytest.mark.parametrize("lengths", [[10] * 40, list(range(4, 39)) * 11, [68, 60, 55] * 16, [5]])
def test_a_budget_makes_as_many_steps_as_batches_of_rows(lengths: list[int]) -> None:
    budget = budget_of(lengths)
    assert len(TokenBatches(lengths, budget)) == math.ceil(len(lengths) / 16)
    assert budget <= 16 * max(lengths)

"""Metrics: known numbers, and CoNLL's own rules for where an entity begins and ends."""

from __future__ import annotations

import random

import numpy as np
import pytest

from trimtab.metrics import entities, entity_f1, is_bio, macro_f1, regression_metrics


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        (["O", "O"], []),
        (["B-PER", "I-PER", "O", "B-LOC"], [("PER", 0, 2), ("LOC", 3, 4)]),
        (["B-PER", "B-PER"], [("PER", 0, 1), ("PER", 1, 2)]),
        (["O", "I-PER", "I-PER"], [("PER", 1, 3)]),
        (["B-PER", "I-LOC", "I-LOC"], [("PER", 0, 1), ("LOC", 1, 3)]),
        (["B-A-B", "I-A-B"], [("A-B", 0, 2)]),
        (["B-PER", None, "I-PER"], [("PER", 0, 1), ("PER", 2, 3)]),
        (["B", "I", "O", "I"], [("", 0, 2), ("", 3, 4)]),
    ],
)
def test_entities_of_known_tags(tags, found):
    assert entities(tags) == found


def conlleval(tags: list[str]) -> list[tuple[str, int, int]]:
    """The rules of the shared task's script: startOfChunk and endOfChunk of each pair of neighbours."""
    found, start = [], 0
    before, kind_before = "O", ""
    for at, tag in enumerate([*tags, "O"]):
        now, _, kind = tag.partition("-")
        ends = before in "BI" and (now in "BO" or (now == "I" and kind != kind_before))
        starts = now == "B" or (now == "I" and (before == "O" or kind != kind_before))
        if ends:
            found.append((kind_before, start, at))
        if starts:
            start = at
        before, kind_before = now, kind
    return found


def test_entities_are_those_of_the_shared_tasks_script():
    chance = random.Random(0)
    names = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    for _ in range(500):
        tags = chance.choices(names, k=chance.randint(1, 9))
        assert entities(tags) == conlleval(tags)


def test_entity_f1_counts_whole_entities_over_all_rows():
    gold = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-LOC"]]
    predicted = [["B-PER", "O", "O", "B-LOC"], ["B-LOC", "B-LOC"]]
    assert entity_f1(gold, gold) == 1.0
    assert entity_f1(predicted, gold) == pytest.approx(2 * 2 / (4 + 3))
    assert entity_f1([["O"]], [["O"]]) == 0.0
    assert entity_f1([["B-PER"], ["O"]], [["O"], ["B-PER"]]) == 0.0  # the same place of another row


@pytest.mark.parametrize(
    ("tags", "yes"),
    [
        (["O", "B-PER", "I-PER"], True),
        (["B", "I", "O"], True),
        (["I-PER", "O"], True),
        (["NOUN", "VERB"], False),
        (["O", "S-PER"], False),
        (["O", "X"], False),
        (["O"], False),
        (["B-", "O"], False),
    ],
)
def test_which_tags_mark_entities(tags, yes):
    assert is_bio(tags) is yes


def test_macro_f1_counts_no_tag_as_a_miss():
    assert macro_f1([0, -1, 1], [0, 0, 1], 2) == pytest.approx((2 / 3 + 1) / 2)


def test_regression_metrics_on_known_numbers():
    predicted, gold = [1.0, 2.0, 4.0, 3.0], [2.0, 2.5, 9.0, 4.0]
    found = regression_metrics(predicted, gold)
    assert found["pearson"] == pytest.approx(np.corrcoef(predicted, gold)[0, 1])
    assert found["spearman"] == pytest.approx(1.0)
    assert found["mse"] == pytest.approx((1 + 0.25 + 25 + 1) / 4)
    assert regression_metrics([5.0, 5.0], [1.0, 2.0]) == {"pearson": 0.0, "spearman": 0.0, "mse": (16 + 9) / 2}
    ties = regression_metrics([1.0, 1.0, 2.0], [1.0, 2.0, 3.0])
    assert ties["spearman"] == pytest.approx(np.corrcoef([1.5, 1.5, 3], [1, 2, 3])[0, 1])

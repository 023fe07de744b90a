"""Batches: every example once, within the budget, the same for (seed, epoch), in the shape that loaders need."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import DataLoader

from trimtab.batches import Collator, TokenBatches, default_budget, length, pad

random.seed(0)
LENGTHS = [min(120, max(3, round(random.lognormvariate(3.2, 0.5)))) for _ in range(700)]


def epoch_of(batches: TokenBatches, epoch: int) -> list[list[int]]:
    batches.set_epoch(epoch)
    return list(batches)


def test_an_epoch_has_every_example_once_and_depends_on_seed_and_epoch_only() -> None:
    batches = TokenBatches(LENGTHS, 512, seed=3)
    first, second = epoch_of(batches, 0), epoch_of(batches, 1)
    for epoch in (first, second):
        assert len(epoch) == len(batches)
        assert sorted(i for batch in epoch for i in batch) == list(range(len(LENGTHS)))
    assert first == epoch_of(batches, 0)
    assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in second}


def test_another_seed_gives_other_batches() -> None:
    assert list(TokenBatches(LENGTHS, 512, seed=1)) != list(TokenBatches(LENGTHS, 512, seed=2))


def test_token_batches_keep_the_budget_and_hardly_pad() -> None:
    batches = TokenBatches(LENGTHS, 512)
    padded = [len(batch) * max(LENGTHS[i] for i in batch) for batch in batches]
    assert max(padded) <= 512
    assert sum(padded) <= 1.08 * sum(LENGTHS)
    plain = sum(20 * max(LENGTHS[start : start + 20]) for start in range(0, len(LENGTHS), 20))
    assert plain > 1.6 * sum(LENGTHS)  # what the buckets save on such lengths


def test_an_example_longer_than_the_budget_is_a_batch_of_its_own() -> None:
    assert sorted(TokenBatches([5, 900, 6], 20)) == [[0, 2], [1]]


def test_without_shuffling_the_order_is_by_length() -> None:
    assert list(TokenBatches([9, 2, 9, 4], 9, shuffle=False)) == [[1, 3], [0], [2]]


def test_default_budget_is_sixteen_rows_of_mean_length() -> None:
    assert default_budget([10, 20, 30]) == 320
    assert default_budget([10, 20, 30], 64) == 1280
    assert default_budget([]) == 1


def test_prepared_loaders_follow_the_epoch_and_skip_batches() -> None:
    batches = TokenBatches(LENGTHS, 256, seed=5)
    wanted = epoch_of(batches, 2)
    loader = Accelerator(cpu=True).prepare(
        DataLoader(list(range(len(LENGTHS))), batch_sampler=batches, collate_fn=lambda rows: torch.tensor(rows))
    )
    loader.set_epoch(2)
    assert [batch.tolist() for batch in loader] == wanted
    batches.set_epoch(2)
    resumed = skip_first_batches(loader, 7)
    assert [batch.tolist() for batch in resumed] == wanted[7:]


def test_two_processes_share_the_batches() -> None:
    batches = TokenBatches(LENGTHS, 256, seed=5)
    whole = list(batches)
    shards = [list(BatchSamplerShard(batches, 2, rank)) for rank in range(2)]
    assert len(shards[0]) == len(shards[1])
    assert {tuple(batch) for shard in shards for batch in shard} == {tuple(batch) for batch in whole}


@dataclass
class Row:
    input_ids: list[int]
    labels: list[int] | int | None


def test_collator_pads_each_side_and_keeps_labels_with_their_tokens() -> None:
    rows = [Row([5, 6, 7], [-100, 6, 7]), Row([8], [8])]
    right, left = Collator(0)(rows), Collator(0, "left")(rows)
    assert right["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert right["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert right["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert left["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]
    assert left["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert left["labels"].tolist() == [[-100, 6, 7], [-100, -100, 8]]


def test_collator_for_targets_classes_and_plain_dicts() -> None:
    targets = Collator(1)([Row([5, 6, 7], [3]), Row([8], [3, 4])])
    assert targets["labels"].tolist() == [[3, -100], [3, 4]]
    classes = Collator(1)([{"input_ids": [5, 6], "labels": 1}, {"input_ids": [7], "labels": 0}])
    assert classes["labels"].tolist() == [1, 0]
    assert "labels" not in Collator(1)([{"input_ids": [5, 6]}])


def test_length_counts_a_target_of_its_own() -> None:
    assert length(Row([1, 2, 3], [-100, 2, 3])) == 3
    assert length(Row([1, 2, 3], [4, 5])) == 5
    assert length(Row([1, 2, 3], 1)) == 3
    assert pad([[1], [2, 3]], 9).tolist() == [[1, 9], [2, 3]]

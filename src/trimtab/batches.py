"""Which examples go into which batch, and how a batch becomes tensors. Knows lengths and padding; refuses to know
texts, models and tasks.

An epoch's batches depend on (seed, epoch) alone, so that a resumed run sees the very batches it would have seen, and
their number is the same in every epoch, because trainers count steps before they start.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from trimtab.examples import IGNORED

ROWS = 16
"""Rows of mean length that a batch holds where nothing else is said."""


class TokenBatches(Sampler[list[int]]):
    """Batches of at most `budget` tokens, padding included, of examples of about equal length.

    Lengths are rounded up to an eighth of a power of two (22 -> 22, 45 -> 48, 90 -> 96). Within such a bucket the
    examples are shuffled anew each epoch, then the sorted buckets are cut into batches that fit the budget by rounded
    length, then the batches are shuffled. Rounded lengths come in the same order every epoch, so the cuts fall at the
    same places and only the members change. An example longer than the budget is a batch of its own.
    """

    def __init__(self, lengths: Sequence[int], budget: int, seed: int = 0, shuffle: bool = True) -> None:
        self.ceilings = np.array([_ceiling(length) for length in lengths], dtype=np.int64)
        self.budget, self.seed, self.shuffle, self.epoch = budget, seed, shuffle, 0
        self.cuts = _cuts(np.sort(self.ceilings), budget)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose batches the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.cuts)

    def __iter__(self) -> Iterator[list[int]]:
        count = len(self.ceilings)
        random = np.random.default_rng((self.seed, self.epoch))
        order = random.permutation(count) if self.shuffle else np.arange(count)
        by_length = order[np.argsort(self.ceilings[order], kind="stable")]
        turns = random.permutation(len(self.cuts)) if self.shuffle else np.arange(len(self.cuts))
        for turn in turns:
            start, end = self.cuts[turn]
            yield by_length[start:end].tolist()


def default_budget(lengths: Sequence[int], rows: int = ROWS) -> int:
    """Tokens that so many rows of mean length take."""
    return max(1, round(rows * float(np.mean(lengths)))) if len(lengths) else 1


@dataclass(frozen=True)
class Collator:
    """Turns examples into padded tensors: input_ids and attention_mask [B, n], labels [B, n], [B, m] or [B].

    An example is anything with `input_ids` (a text), `pixel_values` (a picture [channels, height, width], all of
    one size) or both, and `labels`, as attributes or keys. Labels that are a list as long as the input get its
    padding side; other lists (targets of an encoder-decoder) are padded on the right; ints are classes, floats are
    numbers. Where examples have token_type_ids, these are there as well. An example whose `input_ids` are lists
    offers choices: input_ids, attention_mask and token_type_ids are [B, choices, n], and the choices that a row
    lacks are all padding, the mask 0. Where examples have an `image` beside their text, `images` is the list of
    them, None for those without; likewise `stages` of a `stage`.
    """

    pad_id: int
    """The token that fills the padding; the mask hides it, so any will do."""
    side: Literal["left", "right"] = "right"
    """Where the padding goes: right for training and scoring, left for generation."""

    def __call__(self, examples: Sequence[Any]) -> dict[str, Any]:
        inputs = [[] if (ids := read(example, "input_ids")) is None else list(ids) for example in examples]
        tensors = {**self._read(examples, inputs), **_pictures(examples)}
        tensors |= _listed(examples, "image", "images") | _listed(examples, "stage", "stages")
        labels = [read(example, "labels") for example in examples]
        if any(label is None for label in labels):
            return tensors
        return {**tensors, "labels": self._labels(inputs, labels)}

    def _read(self, examples: Sequence[Any], inputs: list[Any]) -> dict[str, Any]:
        if read(examples[0], "input_ids") is None:
            return {}
        return self._choices(examples, inputs) if offers(inputs) else self._texts(examples, inputs)

    def _texts(self, examples: Sequence[Any], inputs: list[list[int]]) -> dict[str, Tensor]:
        tensors = {
            "input_ids": pad(inputs, self.pad_id, self.side),
            "attention_mask": pad([[1] * len(row) for row in inputs], 0, self.side),
        }
        types = [read(example, "token_type_ids") for example in examples]
        return tensors if any(one is None for one in types) else {**tensors, "token_type_ids": pad(types, 0, self.side)}

    def _choices(self, examples: Sequence[Any], inputs: list[list[list[int]]]) -> dict[str, Tensor]:
        most = max(map(len, inputs))

        def padded(values: Sequence[Sequence[Sequence[int]]], value: int = 0) -> Tensor:
            rows = [row for own in values for row in [*own, *([[]] * (most - len(own)))]]
            return pad(rows, value, self.side).view(len(values), most, -1)

        mask = [[[1] * len(row) for row in own] for own in inputs]
        tensors = {"input_ids": padded(inputs, self.pad_id), "attention_mask": padded(mask)}
        types = [read(example, "token_type_ids") for example in examples]
        return tensors if any(one is None for one in types) else {**tensors, "token_type_ids": padded(types)}

    def _labels(self, inputs: list[list[int]], labels: list[Any]) -> Tensor:
        if not isinstance(labels[0], Sequence | Tensor | np.ndarray):
            return torch.tensor(labels)
        rows = [list(label) for label in labels]
        together = all(len(row) == len(ids) for row, ids in zip(rows, inputs, strict=True))
        return pad(rows, IGNORED, self.side if together else "right")


def _pictures(examples: Sequence[Any]) -> dict[str, Tensor]:
    """pixel_values [B, channels, height, width], where the examples have some."""
    found = [read(example, "pixel_values") for example in examples]
    if any(one is None for one in found):
        return {}
    return {"pixel_values": torch.stack([torch.as_tensor(one) for one in found])}


def _listed(examples: Sequence[Any], field: str, name: str) -> dict[str, list[Any]]:
    """A field of all examples under a name, where any of them has it."""
    found = [read(example, field) for example in examples]
    return {name: found} if any(one is not None for one in found) else {}


def pad(rows: Sequence[Sequence[int]], value: int, side: Literal["left", "right"] = "right") -> Tensor:
    """Token lists of different lengths as one tensor [B, longest], filled up with `value` on one side."""
    longest = max(len(row) for row in rows)
    filled = torch.full((len(rows), longest), value, dtype=torch.long)
    for index, row in enumerate(rows):
        start = longest - len(row) if side == "left" else 0
        filled[index, start : start + len(row)] = torch.as_tensor(row, dtype=torch.long)
    return filled


def read(example: Any, field: str) -> Any:
    """A field of an example that is a mapping or has attributes; None where it has none."""
    return example.get(field) if isinstance(example, Mapping) else getattr(example, field, None)


def offers(inputs: Sequence[Any]) -> bool:
    """Whether the inputs of examples are choices: lists of token lists."""
    return len(inputs[0]) > 0 and isinstance(inputs[0][0], Sequence)


def unlabelled(example: Any) -> dict[str, Any]:
    """What a model reads of an example, without its labels."""
    found = {name: read(example, name) for name in ("input_ids", "token_type_ids", "pixel_values")}
    return {name: value for name, value in found.items() if value is not None}


def input_length(example: Any) -> int:
    """Tokens that an example's input takes in a batch; a picture is as long as its `patches` are many.

    One that offers choices takes as many times the longest; what other rows of its batch have more is not foreseen.
    """
    inputs, patches = read(example, "input_ids"), read(example, "patches")
    if inputs is None:
        return 1 if patches is None else int(patches)
    return len(inputs) * max(map(len, inputs)) if offers([inputs]) else len(inputs)


def length(example: Any) -> int:
    """`input_length`, and the target's tokens where that is a text of its own."""
    inputs, labels = read(example, "input_ids"), read(example, "labels")
    own = inputs is not None and not offers([inputs]) and isinstance(labels, Sequence) and len(labels) != len(inputs)
    return input_length(example) + (len(labels) if own else 0)


def _ceiling(length: int) -> int:
    """The length rounded up to three significant binary digits after the first."""
    step = 1 << max(0, length.bit_length() - 4)
    return -(-length // step) * step


def _cuts(ceilings: np.ndarray, budget: int) -> list[tuple[int, int]]:
    """Ranges (start, end) of ascending rounded lengths such that rows × longest fits the budget."""
    cuts, start = [], 0
    for end in range(1, len(ceilings) + 1):
        full = end == len(ceilings) or (end + 1 - start) * int(ceilings[end]) > budget
        if full:
            cuts.append((start, end))
            start = end
    return cuts

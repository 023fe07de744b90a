"""Knows the walk from rows to examples; refuses to know what a row holds and how it becomes token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from trimtab.errors import UserError, unknown
from trimtab.forms import Row
from trimtab.lazy_picture import Picture
from trimtab.pseudo import add_pseudo_tokens
from trimtab.templates import pseudo_tokens

KINDS = ("causal", "seq2seq", "encoder", "masked", "vision")
IGNORED = -100
"""A label that no loss counts; also the class of an example whose label is not known."""
CHUNK = 1000  # rows tokenised in one call


@dataclass(frozen=True)
class Example:
    """One example as a model of its kind reads it."""

    input_ids: list[int]
    """causal: prompt and answer; seq2seq, encoder and masked: the source text."""
    labels: list[int] | int | float
    """causal: as long as `input_ids`, -100 but for the answer; seq2seq: the answer's tokens; encoder: class, number;
    masked: class."""
    prompt_length: int
    """causal: how many of `input_ids` come before the answer; else all of them."""
    target: int | float | list[str]
    """classify: the class; regress: the number; generate: the reference texts."""
    others: list[list[int]] = field(default_factory=list)
    """The tokens of further reference texts, which the loss of an evaluation counts as well."""
    image: Picture | None = None
    """The picture that belongs to the text."""
    stage: str | None = None
    """Which part of the adapter it trains (stages.py); None for all."""


@dataclass(frozen=True)
class Reading:
    """How rows are read: by what, for which kind of model, how long, and what for."""

    tokenizer: Any
    """Of a vision model its image processor (processor.py)."""
    kind: str
    max_length: int
    """Tokens that a sequence may have; of no meaning for pictures."""
    every_reference: bool = False
    """Whether a row with several reference texts gives one example for each."""


@dataclass(frozen=True)
class Asked:
    """One row with its number, for errors."""

    number: int
    row: Row
    asking: bool
    """Whether its answer is to be predicted, so that it need not be there."""

    @contextmanager
    def named(self) -> Iterator[None]:
        """Inside, a UserError gets the row's number in front."""
        try:
            yield
        except UserError as error:
            raise UserError(f"row {self.number}: {error}") from error


class Encoding(Protocol):
    """What encoding needs of a task."""

    def question(self, text: str) -> Row:
        """A row without an answer for a text alone."""

    def examples(self, rows: Sequence[Asked], reading: Reading) -> list[Any]:
        """The rows' examples, in order."""


def encode_all(
    task: Encoding,
    rows: Iterable[Row | str],
    tokenizer: Any,
    max_length: int,
    kind: str,
    progress: Callable[[int], object] | None = None,
    *,
    every_reference: bool = False,
    asking: bool = False,
) -> list[Any]:
    """One example a row, in order; a row may be a text alone (then always `asking`).

    Sequences (causal: prompt and answer together; seq2seq: source and target each) have at most `max_length` tokens:
    the end of the text is cut, never the template around it or the answer. With `every_reference` a row with several
    reference texts gives one example for each (for training); else the first is the answer and the example keeps the
    others beside it. With `asking` the answer is left out, for prediction. `progress` is told how many more rows are
    done. The tokenizer learns the template's pseudo tokens, in memory.
    Raises UserError naming the row (from 1).
    """
    if kind not in KINDS:
        raise unknown("model kind", kind, KINDS)
    add_pseudo_tokens(tokenizer, pseudo_tokens(getattr(task, "template", "")))
    reading = Reading(tokenizer, kind, max_length, every_reference)
    examples: list[Any] = []
    done = 0
    for chunk in _chunks(rows):
        asked = [_asked(task, number, row, asking) for number, row in enumerate(chunk, start=done + 1)]
        examples += task.examples(asked, reading)
        done += len(chunk)
        if progress:
            progress(len(chunk))
    return examples


def encode_one(task: Encoding, row: Row | str, tokenizer: Any, max_length: int, kind: str) -> Any:
    """`encode_all` of a single row."""
    return encode_all(task, [row], tokenizer, max_length, kind)[0]


def _asked(task: Encoding, number: int, row: Row | str, asking: bool) -> Asked:
    if not isinstance(row, str):
        return Asked(number, row, asking)
    bare = Asked(number, {}, True)
    with bare.named():
        return Asked(number, task.question(row), True)


def _chunks(rows: Iterable[Row | str]) -> Iterator[list[Row | str]]:
    chunk: list[Row | str] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk

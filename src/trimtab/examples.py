"""Knows how drafts become token ids that fit, for each kind of model; refuses to know columns, templates and labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from trimtab.errors import UserError, unknown
from trimtab.forms import Draft, Row
from trimtab.tokens import Codec, Ids

KINDS = ("causal", "seq2seq", "encoder")
IGNORED = -100
"""A label that no loss counts; also the class of an example whose label is not known."""
CHUNK = 1000  # rows tokenised in one call


@dataclass(frozen=True)
class Example:
    """One example as a model of its kind reads it."""

    input_ids: list[int]
    """causal: prompt and answer; seq2seq and encoder: the source text."""
    labels: list[int] | int
    """causal: as long as `input_ids`, -100 but for the answer; seq2seq: the answer's tokens; encoder: the class."""
    prompt_length: int
    """causal: how many of `input_ids` come before the answer; else all of them."""
    target: int | list[str]
    """classify: the class; generate: the reference texts."""


class Drafting(Protocol):
    """What encoding needs of a task."""

    @property
    def in_chat(self) -> bool:
        """Whether the model's chat template is used."""

    def draft(self, row: Row, codec: Codec, asking: bool) -> Draft:
        """The row as strings; without its answer if `asking`."""

    def question(self, text: str) -> Row:
        """A row without an answer for a text alone."""

    def ends(self, codec: Codec) -> bool:
        """Whether an end token follows each answer."""

    def room(self, codec: Codec) -> int:
        """Tokens that a prompt must leave free, whatever the answer's length."""


def encode_all(
    task: Drafting,
    rows: Iterable[Row | str],
    tokenizer: Any,
    max_length: int,
    kind: str,
    progress: Callable[[int], object] | None = None,
    *,
    every_reference: bool = False,
    asking: bool = False,
) -> list[Example]:
    """One example a row, in order; a row may be a text alone (then always `asking`).

    Sequences (causal: prompt and answer together; seq2seq: source and target each) have at most `max_length` tokens:
    the end of the text is cut, never the template around it or the answer. With `every_reference` a row with several
    reference texts gives one example for each (for training); else the first is the answer. With `asking` the answer
    is left out, for prediction. `progress` is told how many more rows are done.
    Raises UserError naming the row (from 1).
    """
    if kind not in KINDS:
        raise unknown("model kind", kind, KINDS)
    codec = Codec.of(tokenizer, kind, task.in_chat)
    end, free = task.ends(codec), task.room(codec)
    examples: list[Example] = []
    done = 0
    for chunk in _chunks(rows):
        drafts = [_draft(task, row, codec, asking, number) for number, row in enumerate(chunk, start=done + 1)]
        prompts = codec.prompts([full for _, full in drafts])
        answers = _answers(codec, [draft for draft, _ in drafts], end, every_reference)
        for number, ((draft, _), ids, own) in enumerate(zip(drafts, prompts, answers, strict=True), start=done + 1):
            examples += _fitted(codec, draft, ids, own, free, max_length, number)
        done += len(chunk)
        if progress:
            progress(len(chunk))
    return examples


def encode_one(task: Drafting, row: Row | str, tokenizer: Any, max_length: int, kind: str) -> Example:
    """`encode_all` of a single row."""
    return encode_all(task, [row], tokenizer, max_length, kind)[0]


def _chunks(rows: Iterable[Row | str]) -> Iterator[list[Row | str]]:
    chunk: list[Row | str] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _draft(task: Drafting, row: Row | str, codec: Codec, asking: bool, number: int) -> tuple[Draft, str]:
    """A row's draft and its prompt with all of its text."""
    try:
        draft = task.draft(task.question(row) if isinstance(row, str) else row, codec, asking or isinstance(row, str))
        return draft, draft.prompt.full()
    except UserError as error:
        raise UserError(f"row {number}: {error}") from error


def _answers(codec: Codec, drafts: list[Draft], end: bool, every: bool) -> list[list[Ids]]:
    """Each draft's answers as token ids; each different answer is tokenised once."""
    chosen = [draft.answers if every else draft.answers[:1] for draft in drafts]
    texts = list(dict.fromkeys(text for own in chosen for text in own))
    ids = dict(zip(texts, codec.answers(texts, end), strict=True))
    return [[ids[text] for text in own] for own in chosen]


def _fitted(
    codec: Codec, draft: Draft, prompt: Ids, answers: list[Ids], free: int, max_length: int, number: int
) -> list[Example]:
    """The examples of one draft. All its answers follow the same prompt."""
    longest = max(map(len, answers), default=0)
    room = max_length - (max(free, longest) if codec.kind == "causal" else 0)
    try:
        if longest > max_length or room < 1:
            raise UserError(f"the answer takes {longest} tokens of at most {max_length}; raise --max-length")
        ids = codec.fit(draft.prompt, prompt, room)
    except UserError as error:
        raise UserError(f"row {number}: {error}") from error
    return [_example(codec.kind, ids, answer, draft.target) for answer in answers or [[]]]


def _example(kind: str, prompt: Ids, answer: Ids, target: int | list[str]) -> Example:
    if kind == "causal":
        return Example(prompt + answer, [IGNORED] * len(prompt) + answer, len(prompt), target)
    if kind == "seq2seq":
        return Example(prompt, answer, len(prompt), target)
    assert isinstance(target, int)
    return Example(prompt, target, len(prompt), target)

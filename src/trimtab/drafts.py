"""Knows how drafts become token ids that fit, for each kind of model; refuses to know columns, templates and labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from trimtab.errors import UserError
from trimtab.examples import IGNORED, Asked, Example, Reading
from trimtab.forms import Draft, Row
from trimtab.tokens import Codec, Ids


class Drafting(Protocol):
    """What a task needs whose rows are a prompt and at most one answer."""

    @property
    def in_chat(self) -> bool:
        """Whether the model's chat template is used."""

    def draft(self, row: Row, codec: Codec, asking: bool) -> Draft:
        """The row as strings; without its answer if `asking`."""

    def ends(self, codec: Codec) -> bool:
        """Whether an end token follows each answer."""

    def room(self, codec: Codec) -> int:
        """Tokens that a prompt must leave free, whatever the answer's length."""


def drafted(task: Drafting, rows: Sequence[Asked], reading: Reading) -> list[Example]:
    """The examples of rows, one for each answer that is read. Raises UserError naming the row."""
    codec = Codec.of(reading.tokenizer, reading.kind, task.in_chat)
    end, free = task.ends(codec), task.room(codec)
    drafts = [_draft(task, asked, codec) for asked in rows]
    prompts = codec.prompts([full for _, full in drafts])
    answers = _answers(codec, [draft for draft, _ in drafts], end)
    examples: list[Example] = []
    for asked, (draft, _), ids, own in zip(rows, drafts, prompts, answers, strict=True):
        with asked.named():
            found = _fitted(codec, draft, ids, own, free, reading)
            examples += [replace(one, image=draft.image, stage=draft.stage) for one in found]
    return examples


def _draft(task: Drafting, asked: Asked, codec: Codec) -> tuple[Draft, str]:
    """A row's draft and its prompt with all of its text."""
    with asked.named():
        draft = task.draft(asked.row, codec, asked.asking)
        return draft, draft.prompt.full()


def _answers(codec: Codec, drafts: list[Draft], end: bool) -> list[list[Ids]]:
    """Each draft's answers as token ids; each different answer is tokenised once."""
    texts = list(dict.fromkeys(text for draft in drafts for text in draft.answers))
    ids = dict(zip(texts, codec.answers(texts, end), strict=True))
    return [[ids[text] for text in draft.answers] for draft in drafts]


def _fitted(codec: Codec, draft: Draft, prompt: Ids, answers: list[Ids], free: int, reading: Reading) -> list[Example]:
    """The examples of one draft. All its answers follow the same prompt."""
    longest, max_length = max(map(len, answers), default=0), reading.max_length
    room = max_length - (max(free, longest) if codec.kind == "causal" else 0)
    if longest > max_length or room < 1:
        raise UserError(f"the answer takes {longest} tokens of at most {max_length}; raise --max-length")
    ids = codec.fit(draft.prompt, prompt, room)
    if reading.every_reference:
        return [_example(codec.kind, ids, answer, draft.target) for answer in answers or [[]]]
    first, *others = answers or [[]]
    return [replace(_example(codec.kind, ids, first, draft.target), others=others)]


def _example(kind: str, prompt: Ids, answer: Ids, target: int | float | list[str]) -> Example:
    if kind == "causal":
        return Example(prompt + answer, [IGNORED] * len(prompt) + answer, len(prompt), target)
    if kind == "seq2seq":
        return Example(prompt, answer, len(prompt), target)
    assert not isinstance(target, list)
    return Example(prompt, target, len(prompt), target)

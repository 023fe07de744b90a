"""Knows the shapes in which rows ask for a text, and what the answers are; refuses to know labels and token ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from trimtab.chats import as_turn, conversation, question_and_answer
from trimtab.errors import UserError
from trimtab.lazy_picture import Picture
from trimtab.templates import (
    Prompt,
    fill,
    instruction,
    lead,
    placeholders,
    pseudo_tokens,
    refuse_marks,
    text_value,
    value_of,
    values_of,
)
from trimtab.tokens import Codec

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Draft:
    """A row as strings, before it meets the room there is."""

    prompt: Prompt
    answers: list[str]
    """As they follow the prompt, their leading space included; the first is the one to learn."""
    target: int | float | list[str]
    image: Picture | None = None
    """The picture that belongs to the prompt."""
    stage: str | None = None
    """Which part of an adapter the row trains; None for all."""


class Form(Protocol):
    """One shape of rows."""

    def inputs(self, row: Row) -> str:
        """What the model may see of a row, to tell duplicates by."""

    def draft(self, row: Row, codec: Codec, asking: bool) -> Draft:
        """The row as strings; without its answer if `asking`."""

    def question(self, text: str) -> Row:
        """A row without an answer for a text alone."""


@dataclass(frozen=True)
class Templated:
    """A template over the columns, and a column of answers."""

    template: str
    text_column: str
    label_column: str

    def inputs(self, row: Row) -> str:
        return "\n".join(value.strip() for value in values_of(self.template, row, self.text_column))

    def draft(self, row: Row, codec: Codec, asking: bool) -> Draft:
        prompt = turn(fill(self.template, row, self.text_column), codec)
        found = [] if asking else references(row, self.label_column)
        refuse_marks(found, pseudo_tokens(self.template))
        return answered(prompt, space(codec, self.template), found)

    def question(self, text: str) -> Row:
        return text_row(text, self.template, self.text_column)


@dataclass(frozen=True)
class Joined:
    """A prompt and its completion, put together as they are; in a chat, and for seq2seq, as question and answer."""

    template: str
    text_column: str
    label_column: str

    def inputs(self, row: Row) -> str:
        return text_value(row, self.text_column).strip()

    def draft(self, row: Row, codec: Codec, asking: bool) -> Draft:
        prompt = fill("{text}", row, self.text_column)
        found = [] if asking else references(row, self.label_column)
        if codec.frame or codec.kind != "causal":
            return answered(turn(prompt, codec), space(codec, "{text}"), found)
        spaces = prompt.text[len(prompt.text.rstrip(" ")) :]  # the codec leaves them to the answer
        return Draft(prompt, [spaces + text for text in found], [text.strip() for text in found])

    def question(self, text: str) -> Row:
        return text_row(text, "{text}", self.text_column)


@dataclass(frozen=True)
class Alpaca:
    """Columns `instruction`, `input` (may be missing or empty) and the answers."""

    template: str
    text_column: str
    label_column: str

    def inputs(self, row: Row) -> str:
        return instruction(row, plain=True).full().strip()

    def draft(self, row: Row, codec: Codec, asking: bool) -> Draft:
        prompt = turn(instruction(row, plain=codec.frame is not None), codec)
        return answered(prompt, space(codec, "\n"), [] if asking else references(row, self.label_column))

    def question(self, text: str) -> Row:
        return {"instruction": text}


@dataclass(frozen=True)
class Messages:
    """A column of chat messages; the answer is the last turn of the assistant, later messages are not used."""

    template: str
    text_column: str
    label_column: str

    def inputs(self, row: Row) -> str:
        return "\n".join(str(message.get("content")).strip() for message in self._split(row, asking=False)[0])

    def draft(self, row: Row, codec: Codec, asking: bool) -> Draft:
        assert codec.frame is not None
        messages, answer = self._split(row, asking)
        prompt = conversation(messages, codec.tokenizer, codec.frame)
        return answered(prompt, space(codec, ""), [] if asking else [answer])

    def question(self, text: str) -> Row:
        return {self.text_column: [{"role": "user", "content": text}]}

    def _split(self, row: Row, asking: bool) -> tuple[list[dict[str, Any]], str]:
        return question_and_answer(value_of(row, self.text_column), self.text_column, asking)


FORMS: dict[str, type[Templated | Joined | Alpaca | Messages]] = {
    "template": Templated,
    "joined": Joined,
    "alpaca": Alpaca,
    "messages": Messages,
}


def answered(prompt: Prompt, before: str, found: list[str]) -> Draft:
    """A draft with answers that stand after `before`."""
    texts = [text.strip() for text in found]
    return Draft(prompt, [before + text for text in texts], list(texts))


def references(row: Row, name: str) -> list[str]:
    """The answers of a row, one or several. Raises UserError if there is none."""
    if not isinstance(value := value_of(row, name), list):
        return [text_value(row, name)]
    if not value or not all(isinstance(text, str) for text in value):
        raise UserError(f"column {name!r} must hold a text or a list of texts")
    return list(dict.fromkeys(value))


def turn(prompt: Prompt, codec: Codec) -> Prompt:
    """The prompt as the model reads it: the user's turn if there is a chat template."""
    return as_turn(prompt, codec.tokenizer, codec.frame) if codec.frame else prompt


def space(codec: Codec, template: str) -> str:
    """What stands between a prompt and its answer, and belongs to the answer."""
    if codec.kind != "causal":
        return ""
    return codec.frame.lead if codec.frame else lead(template)


def text_row(text: str, template: str, text_column: str) -> Row:
    """A row that has only the text column, or the only column of the template. Raises UserError if it needs more."""
    names = dict.fromkeys(placeholders(template))
    if more := [name for name in names if name not in ("text", text_column)]:
        if len(names) == 1:
            return {more[0]: text}
        raise UserError(f"the template also needs {', '.join(more)}; give a row instead of a text")
    return {text_column: text}

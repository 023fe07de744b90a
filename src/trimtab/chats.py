"""Knows how messages stand in a tokenizer's chat template; refuses to know token ids and tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from trimtab.errors import UserError
from trimtab.templates import Prompt

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ChatFrame:
    """What a chat template puts around an answer, beyond its generation prompt."""

    glue: str
    """What still belongs to the prompt, e.g. an empty thinking block."""
    lead: str
    """Spaces in front of the answer, part of the answer."""
    end: str
    """The mark that ends the turn; empty if the template has none."""


def chat_frame(tokenizer: Any) -> ChatFrame:
    """Found by rendering one question with and without its answer. Raises UserError without a chat template."""
    question = [{"role": "user", "content": "question"}]
    prompt = _render(tokenizer, question, ask=True)
    whole = _render(tokenizer, [*question, {"role": "assistant", "content": "ANSWER"}], ask=False)
    before, found, after = whole.removeprefix(prompt).partition("ANSWER")
    if not whole.startswith(prompt) or not found:  # a template that rewrites its past
        return ChatFrame("", "" if prompt[-1:].isspace() else " ", "")
    asked = prompt + before
    return ChatFrame(before.rstrip(" "), asked[len(asked.rstrip(" ")) :], after.rstrip())


def as_turn(prompt: Prompt, tokenizer: Any, frame: ChatFrame) -> Prompt:
    """The prompt as the user's turn of a chat."""
    return Prompt(prompt.text, lambda text: _ask(tokenizer, [{"role": "user", "content": prompt.render(text)}], frame))


def conversation(messages: Messages, tokenizer: Any, frame: ChatFrame) -> Prompt:
    """The turns before an answer.

    If they are too long the oldest turns go first, but never the system's; then the end of the last user turn.
    """
    opening = messages[:1] if messages[0]["role"] == "system" else []
    users = [at for at, message in enumerate(messages) if message["role"] == "user"]
    whole, *shorter = (_turns(tokenizer, [*opening, *messages[at:]], frame) for at in [len(opening), *users[1:]])
    return Prompt(whole.text, whole.render, tuple(shorter))


def _turns(tokenizer: Any, messages: Messages, frame: ChatFrame) -> Prompt:
    at = max(number for number, message in enumerate(messages) if message["role"] == "user")

    def render(text: str) -> str:
        return _ask(tokenizer, [*messages[:at], {**messages[at], "content": text}, *messages[at + 1 :]], frame)

    return Prompt(messages[at]["content"], render)


def question_and_answer(value: object, name: str, asking: bool) -> tuple[list[dict[str, Any]], str]:
    """The messages before the last assistant turn, and what that turn says; if `asking`, there need not be one.

    `name` is the column, for the errors: UserError if the value is no list of messages or lacks a turn.
    """
    if not is_messages(value):
        raise UserError(f"column {name!r} must hold a list of messages with role and content")
    messages = [_said(message) for message in value]
    if asking and messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    last = max((at for at, message in enumerate(messages) if message["role"] == "assistant"), default=0)
    asked = [message for message in messages[:last] if message["role"] == "user"]
    if not asked:
        raise UserError(f"column {name!r} needs a user's message and an assistant's after it")
    if not all(isinstance(message.get("content"), str) for message in (asked[-1], messages[last])):
        raise UserError(f"column {name!r}: the last messages of user and assistant need a content that is text")
    return messages[:last], messages[last]["content"]


def _said(message: Mapping[str, Any]) -> dict[str, Any]:
    """Tables fill keys that only some messages have with None; chat templates take a key that is there for meant."""
    return {key: value for key, value in message.items() if value is not None}


def is_messages(value: object) -> TypeGuard[list[Mapping[str, Any]]]:
    """Whether a value looks like chat messages: a list of dicts, each with a role."""
    return isinstance(value, list) and bool(value) and all(isinstance(m, Mapping) and m.get("role") for m in value)


def _ask(tokenizer: Any, messages: Messages, frame: ChatFrame) -> str:
    return _render(tokenizer, messages, ask=True) + frame.glue


def _render(tokenizer: Any, messages: Messages, ask: bool) -> str:
    """The messages in the chat template, up to the point where the assistant speaks if `ask`."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("this model's tokenizer has no chat template; leave --chat out and use --template")
    import jinja2

    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask)
    except jinja2.TemplateError as error:
        raise UserError(f"the model's chat template refuses this conversation: {error}") from error

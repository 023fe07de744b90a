"""The task `generate`. Knows the forms of its rows and its metrics; refuses to know how models are run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from trimtab.chats import is_messages
from trimtab.data import column, columns
from trimtab.drafts import drafted
from trimtab.errors import UserError, unknown
from trimtab.examples import IGNORED, Asked, Example, Reading, encode_one
from trimtab.forms import FORMS, Draft, Form, Row
from trimtab.scoring import LONGEST_ANSWER, Run, answer_loss, generated, prompt_of
from trimtab.tasks.task import Wishes, config_of
from trimtab.templates import check_template, placeholders
from trimtab.text_metrics import text_metrics
from trimtab.tokens import Codec

if TYPE_CHECKING:
    from trimtab.data import Rows


@dataclass(frozen=True)
class Generate:
    """Which text follows; the loss is on the answer and its end only."""

    template: str = "{text}\n"
    """The prompt with columns in braces, for the form "template"; `{text}` is the text column."""
    chat: bool = False
    """Whether the prompt becomes the user's turn of the model's chat template."""
    text_column: str = "text"
    """The column of the texts, or of the messages."""
    label_column: str = "label"
    """The column of the answers: a text, or a list of reference texts."""
    form: str = "template"
    """How a row is read: "template", "joined", "alpaca" or "messages"."""

    name: ClassVar[str] = "generate"
    kinds: ClassVar[tuple[str, ...]] = ("causal", "seq2seq")
    head: ClassVar[str | None] = None
    takes: ClassVar[frozenset[str]] = frozenset({"template", "chat"})
    writes: ClassVar[bool] = True
    measures: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "bleu", "nist")

    @classmethod
    def prepare(cls, rows: Rows, kind: str, wishes: Wishes) -> Generate:
        """Finds the form of the rows where neither template nor label column is given."""
        names, chat, given = columns(rows), wishes.chat, wishes.text_column
        if wishes.template is None and wishes.label_column is None:
            if is_messages(rows[0].get(given or "messages")):
                return cls("", True, given or "messages", "", "messages")
            if given is None and {"prompt", "completion"} <= set(names):
                return cls("{text}", chat, "prompt", "completion", "joined")
            if given is None and {"instruction", "output"} <= set(names):
                return cls("", chat, "instruction", "output", "alpaca")
        text_column = given or ("prompt" if "prompt" in names else "text")
        answers = (name for name in ("completion", "output") if name in names)
        label_column = wishes.label_column or next(answers, "label")
        template = wishes.template or ("{text}" if chat else cls.template)
        check_template(template, rows[0], text_column, label_column)
        column(rows, label_column)
        task = cls(template, chat, text_column, label_column)
        task.inputs(rows[0])
        return task

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise unknown("form", self.form, FORMS)
        if self.form == "template":
            placeholders(self.template)

    @property
    def in_chat(self) -> bool:
        """Whether the model's chat template is used."""
        return self.chat or self.form == "messages"

    def inputs(self, row: Row) -> str:
        """What the model may see of a row, to tell duplicates by."""
        return self._form.inputs(row)

    def question(self, text: str) -> Row:
        """A row without an answer for a text alone."""
        return self._form.question(text)

    def draft(self, row: Row, codec: Codec, asking: bool) -> Draft:
        """The row as strings; without its answer if `asking`."""
        return self._form.draft(row, codec, asking)

    def ends(self, codec: Codec) -> bool:
        """Answers always end, so that the model learns to stop."""
        if codec.kind == "encoder":
            raise UserError("an encoder cannot generate; use --task classify, or a causal or seq2seq model")
        return True

    def room(self, codec: Codec) -> int:
        """None beyond each row's own answer."""
        return 0

    def encode(self, row: Row | str, tokenizer: Any, max_length: int, kind: str) -> Example:
        """One example; of a text alone the prompt, with nothing to learn in it (see `encode_all`)."""
        return encode_one(self, row, tokenizer, max_length, kind)

    def examples(self, rows: Sequence[Asked], reading: Reading) -> list[Example]:
        """One a row, or one for each of its reference texts."""
        return drafted(self, rows, reading)

    def score(self, run: Run, examples: Sequence[Example], max_new_tokens: int | None) -> dict[str, float]:
        """loss and perplexity over all references; the metrics of one text for each different prompt."""
        pairs = [pair for example in examples for pair in with_each_answer(example, run.kind)]
        loss = answer_loss(run, pairs)
        asked, references = _prompts(examples)
        texts = generated(run, asked, max_new_tokens or _longest_answer(pairs))
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), **text_metrics(texts, references)}

    def answers(self, run: Run, examples: Sequence[Example], max_new_tokens: int) -> list[str]:
        """The text that follows each."""
        return generated(run, examples, max_new_tokens)

    def objective(self, tokenizer: Any, kind: str) -> None:
        """The labels say what is learned."""

    def to_config(self) -> dict[str, Any]:
        """What `task_from_config` makes the same task from."""
        return config_of(self)

    @property
    def _form(self) -> Form:
        return FORMS[self.form](self.template, self.text_column, self.label_column)


def with_each_answer(example: Example, kind: str) -> list[Example]:
    """An example for each of its reference texts."""
    prompt = prompt_of(example)
    shifted = [IGNORED] * len(prompt) if kind == "causal" else []
    return [
        example,
        *(
            Example(prompt + answer if kind == "causal" else prompt, shifted + answer, len(prompt), example.target)
            for answer in getattr(example, "others", ())
        ),
    ]


def _prompts(examples: Sequence[Example]) -> tuple[list[Example], list[list[str]]]:
    """One example for each different prompt, and its references: those of all rows that have it."""
    asked: dict[tuple[int, ...], Example] = {}
    references: dict[tuple[int, ...], dict[str, None]] = {}
    for example in examples:
        prompt = tuple(prompt_of(example))
        asked.setdefault(prompt, example)
        references.setdefault(prompt, {}).update(dict.fromkeys(example.target))  # type: ignore[arg-type]
    return list(asked.values()), [list(own) for own in references.values()]


def _longest_answer(examples: Sequence[Example]) -> int:
    answers = (sum(label != IGNORED for label in example.labels) for example in examples)  # type: ignore[union-attr]
    return min(LONGEST_ANSWER, max(answers, default=1)) or 1

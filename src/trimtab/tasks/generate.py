"""The task `generate`. Knows the forms of its rows and its metrics; refuses to know how models are run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from trimtab.chats import is_messages
from trimtab.data import column, columns
from trimtab.drafts import drafted
from trimtab.errors import UserError, unknown
from trimtab.examples import IGNORED, Asked, Example, Reading, encode_one
from trimtab.forms import FORMS, Draft, Form, Row
from trimtab.row_pictures import picture_key, picture_of
from trimtab.scoring import LONGEST_ANSWER, Run, answer_loss, generated, prompt_of
from trimtab.stages import stage_of
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
    image_column: str | None = None
    """The column of the pictures, which rows may lack; None where no row has one."""
    stage_column: str | None = None
    """The column of the tags of disjoint training, which rows may lack; None where no row has one."""

    name: ClassVar[str] = "generate"
    kinds: ClassVar[tuple[str, ...]] = ("causal", "seq2seq")
    head: ClassVar[str | None] = None
    takes: ClassVar[frozenset[str]] = frozenset({"template", "chat", "image_column", "stage_column"})
    writes: ClassVar[bool] = True
    measures: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "bleu", "nist")

    @classmethod
    def prepare(cls, rows: Rows, kind: str, wishes: Wishes) -> Generate:
        """Finds the form of the rows where neither template nor label column is given."""
        if wishes.stage_column is not None and wishes.stage_column not in (names := columns(rows)):
            raise unknown("stage column", wishes.stage_column, names)
        own: Any = {"image_column": wishes.image_column, "stage_column": wishes.stage_column}
        return dataclasses.replace(cls._of_texts(rows, wishes), **own)

    @classmethod
    def _of_texts(cls, rows: Rows, wishes: Wishes) -> Generate:
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
        """What the model may see of a row, to tell duplicates by; of a row with a picture that, whatever is asked.

        So all questions about a picture are held out, or none.
        """
        picture = picture_key(row, self.image_column)
        return self._form.inputs(row) if picture is None else picture

    def question(self, text: str) -> Row:
        """A row without an answer for a text alone."""
        return self._form.question(text)

    @property
    def shown(self) -> Callable[[str], Row] | None:
        """What makes the part of a row that holds a picture; None where rows have none."""
        name = self.image_column
        return None if name is None else lambda image: {name: image}

    def draft(self, row: Row, codec: Codec, asking: bool) -> Draft:
        """The row as strings; without its answer if `asking`."""
        made = self._form.draft(row, codec, asking)
        stage = None if asking or self.stage_column is None else stage_of(row.get(self.stage_column))
        return dataclasses.replace(made, image=picture_of(row, self.image_column), stage=stage)

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
            dataclasses.replace(
                example,
                input_ids=prompt + answer if kind == "causal" else prompt,
                labels=shifted + answer,
                others=[],
            )
            for answer in getattr(example, "others", ())
        ),
    ]


def _prompts(examples: Sequence[Example]) -> tuple[list[Example], list[list[str]]]:
    """One example for each different prompt and picture, and its references: those of all rows that have it."""
    asked: dict[Any, Example] = {}
    references: dict[Any, dict[str, None]] = {}
    for example in examples:
        picture = getattr(example, "image", None)
        prompt = (*prompt_of(example), None if picture is None else picture.key)
        asked.setdefault(prompt, example)
        references.setdefault(prompt, {}).update(dict.fromkeys(example.target))  # type: ignore[arg-type]
    return list(asked.values()), [list(own) for own in references.values()]


def _longest_answer(examples: Sequence[Example]) -> int:
    answers = (sum(label != IGNORED for label in example.labels) for example in examples)  # type: ignore[union-attr]
    return min(LONGEST_ANSWER, max(answers, default=1)) or 1

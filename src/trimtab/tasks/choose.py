"""The task `choose`. Knows questions, their choices and the metrics; refuses to know how models are run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from trimtab.errors import UserError, unknown
from trimtab.examples import IGNORED, Asked, Reading, encode_one
from trimtab.forms import Form, Row, Templated, space, turn
from trimtab.scoring import Run, answer_scores, gold_loss, head_logits, prompt_of
from trimtab.tasks.rows import each, label_text, list_of
from trimtab.tasks.task import Wishes, config_of
from trimtab.templates import Prompt, check_template, fill, placeholders, text_value, value_of
from trimtab.tokens import Codec, Ids, PairFrame

if TYPE_CHECKING:
    from trimtab.data import Rows

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Question:
    """A row as strings."""

    asked: Asked
    prompt: Prompt
    full: str
    """The prompt with all of its text."""
    texts: list[str]
    """The choices."""
    target: int


@dataclass(frozen=True)
class Offered:
    """A question with each of its choices, as an encoder reads them."""

    input_ids: list[Ids]
    token_type_ids: list[Ids] | None
    labels: int
    target: int
    texts: list[str]


@dataclass(frozen=True)
class Continued:
    """A question and what may follow it, as a language model reads them."""

    input_ids: Ids
    """causal: question and right choice; seq2seq: the question."""
    labels: Ids
    """causal: as long as `input_ids`, -100 but for the choice; seq2seq: the choice."""
    prompt_length: int
    target: int
    choices: list[Ids]
    texts: list[str]


@dataclass(frozen=True)
class Choose:
    """Which of a row's own choices is right: an encoder scores each, a language model says how likely each follows."""

    template: str = "{text}\nAnswer:"
    """The question with columns in braces; `{text}` is the text column."""
    chat: bool = False
    """Whether the question becomes the user's turn of the model's chat template."""
    text_column: str = "question"
    """The column of the questions, possibly nested."""
    choices_column: str = "choices"
    """The column of the lists of choices, possibly nested; or several columns of one choice each, with commas."""
    label_column: str = "label"
    """The column of the right choices, possibly nested."""
    label_form: str = "index"
    """How a row names the right choice: "index" (from 0), "letter" (from A) or "text"."""

    name: ClassVar[str] = "choose"
    kinds: ClassVar[tuple[str, ...]] = ("causal", "seq2seq", "encoder")
    head: ClassVar[str | None] = "choices"
    takes: ClassVar[frozenset[str]] = frozenset({"template", "chat", "choices_column"})
    writes: ClassVar[bool] = False
    measures: ClassVar[tuple[str, ...]] = ("accuracy", "loss")

    def __post_init__(self) -> None:
        if self.label_form not in LABEL_FORMS:
            raise unknown("label form", self.label_form, LABEL_FORMS)
        placeholders(self.template)

    @classmethod
    def prepare(cls, rows: Rows, kind: str, wishes: Wishes) -> Choose:
        """Finds how labels name choices. Raises UserError for fewer than two choices and a label that names none."""
        template = wishes.template
        if template is None:
            template = cls.template if kind != "encoder" and not wishes.chat else "{text}"
        task = cls(
            template,
            wishes.chat,
            wishes.text_column or "question",
            wishes.choices_column or "choices",
            wishes.label_column or "label",
        )
        check_template(template, rows[0], task.text_column, task.label_column)
        value_of(rows[0], task.label_column)
        task.inputs(rows[0])
        return dataclasses.replace(task, label_form=task._find_form(rows))

    @property
    def in_chat(self) -> bool:
        """Whether the model's chat template is used."""
        return self.chat

    def choices(self, row: Row) -> list[str]:
        """The texts to choose from. Raises UserError for fewer than two, and for one that is empty or no text."""
        if len(self._columns) > 1:
            texts = [text_value(row, name) for name in self._columns]
        else:
            texts = [_text(choice, self.choices_column) for choice in list_of(row, self.choices_column, "choices")]
        if len(texts) < 2:
            found = "only one choice" if texts else "no choices"
            raise UserError(f"column {self.choices_column!r} has {found}; choosing needs at least two")
        texts = [text.strip() for text in texts]
        if "" in texts:
            raise UserError(f"column {self.choices_column!r} has an empty choice")
        return texts

    def index(self, row: Row) -> int:
        """The right choice of a row. Raises UserError for a label that names none."""
        return LABEL_FORMS[self.label_form](value_of(row, self.label_column), self.label_column, self.choices(row))

    def inputs(self, row: Row) -> str:
        """The question and the choices, to tell duplicates by."""
        return "\n".join([self._form.inputs(row), *self.choices(row)])

    def question(self, text: str) -> Row:
        """A row without choices for a question alone."""
        return self._form.question(text)

    def offered(self, choices: Sequence[str]) -> Row:
        """The part of a row that holds its choices. Raises UserError for too few."""
        several = len(self._columns) > 1
        if len(choices) < 2 or (several and len(choices) != len(self._columns)):
            wanted = f"{len(self._columns)}" if several else "at least two"
            raise UserError(f"the task 'choose' needs {wanted} choices: --choice TEXT --choice TEXT")
        return dict(zip(self._columns, choices, strict=True)) if several else {self.choices_column: list(choices)}

    def encode(self, row: Row | str, tokenizer: Any, max_length: int, kind: str) -> Offered | Continued:
        """One example (see `encode_all`)."""
        return encode_one(self, row, tokenizer, max_length, kind)

    def examples(self, rows: Sequence[Asked], reading: Reading) -> list[Any]:
        """One a row; the end of a question is cut so that its longest choice fits, never a choice."""
        codec = Codec.of(reading.tokenizer, reading.kind, self.chat)
        read = [self._read(asked, codec) for asked in rows]
        if reading.kind == "encoder":
            return _offered(codec, read, reading.max_length)
        return _continued(codec, space(codec, self.template), read, reading.max_length)

    def score(self, run: Run, examples: Sequence[Any], max_new_tokens: int | None) -> dict[str, float]:
        """accuracy, and the loss: of an encoder over the choices, of a language model over the right one's tokens."""
        return self.marked(run, examples)[0]

    def marked(self, run: Run, examples: Sequence[Any]) -> tuple[dict[str, float], list[float]]:
        """The score, and 1 or 0 for each example that is right or wrong."""
        scores, gold = _scores(run, examples), [example.target for example in examples]
        marks = [float(int(row.argmax()) == target) for row, target in zip(scores, gold, strict=True)]
        loss = gold_loss(scores, gold, [_sizes(example) for example in examples])
        return {"accuracy": sum(marks) / len(gold), "loss": loss}, marks

    def answers(self, run: Run, examples: Sequence[Any], max_new_tokens: int) -> list[str]:
        """The most likely choice of each."""
        pairs = zip(_scores(run, examples), examples, strict=True)
        return [example.texts[int(row.argmax())] for row, example in pairs]

    def objective(self, tokenizer: Any, kind: str) -> None:
        """The labels say what is learned."""

    def to_config(self) -> dict[str, Any]:
        """What `task_from_config` makes the same task from."""
        return config_of(self)

    @property
    def _columns(self) -> list[str]:
        """The columns of the choices: one that holds them all, or one a choice."""
        return [name.strip() for name in self.choices_column.split(",")]

    @property
    def _form(self) -> Form:
        return Templated(self.template, self.text_column, self.label_column)

    def _read(self, asked: Asked, codec: Codec) -> Question:
        with asked.named():
            prompt = turn(fill(self.template, asked.row, self.text_column), codec)
            target = IGNORED if asked.asking else self.index(asked.row)
            return Question(asked, prompt, prompt.full(), self.choices(asked.row), target)

    def _find_form(self, rows: Rows) -> str:
        """The form in which all labels name a choice. Raises UserError for the first row that does not.

        Numbers are indices rather than texts, texts are texts rather than letters or the digits of an index.
        """
        name = self.label_column
        read = list(each(lambda row: (value_of(row, name), self.choices(row)), rows))
        forms = ("index", "text") if all(isinstance(value, int) for value, _ in read) else ("text", "letter", "index")
        form = min(forms, key=lambda form: sum(not _names(form, value, name, texts) for value, texts in read))
        list(each(lambda pair: LABEL_FORMS[form](pair[0], name, pair[1]), read))
        return form


# How labels name choices


def _by_index(value: object, name: str, texts: Sequence[str]) -> int:
    text = label_text(value, name)
    if not text.isdecimal() or int(text) >= len(texts):
        raise UserError(f"label {text!r} is no index of {len(texts)} choices, which are 0 to {len(texts) - 1}")
    return int(text)


def _by_letter(value: object, name: str, texts: Sequence[str]) -> int:
    text, letters = label_text(value, name), LETTERS[: len(texts)]
    if len(text) != 1 or text.upper() not in letters:
        raise UserError(f"label {text!r} is no letter of {len(texts)} choices, which are A to {letters[-1]}")
    return letters.index(text.upper())


def _by_text(value: object, name: str, texts: Sequence[str]) -> int:
    text = label_text(value, name)
    if texts.count(text) > 1:
        raise UserError(f"label {text!r} is the text of {texts.count(text)} choices")
    if text not in texts:
        raise unknown("choice", text, texts)
    return texts.index(text)


LABEL_FORMS: dict[str, Callable[[object, str, Sequence[str]], int]] = {
    "index": _by_index,
    "letter": _by_letter,
    "text": _by_text,
}


def _names(form: str, value: object, name: str, texts: Sequence[str]) -> bool:
    """Whether a label names a choice in this form."""
    try:
        LABEL_FORMS[form](value, name, texts)
    except UserError:
        return False
    return True


def _text(choice: object, name: str) -> str:
    """A choice as text. Raises UserError for what is neither a text nor a number."""
    if not isinstance(choice, (str, int, float)) or isinstance(choice, bool):
        raise UserError(f"column {name!r} holds {choice!r}, not the text of a choice")
    return str(choice)


# From questions to token ids


def _offered(codec: Codec, read: Sequence[Question], max_length: int) -> list[Offered]:
    """Each choice behind its question, as the tokenizer joins two texts."""
    frame = PairFrame.of(codec.tokenizer)
    front = dataclasses.replace(codec, ends=(frame.front, frame.middle))
    asked, behind = front.prompts([one.full for one in read]), _of_each(read, codec.plain)
    examples = []
    for one, ids, choices in zip(read, asked, behind, strict=True):
        question = _fitted(front, one, ids, choices, max_length - len(frame.back))
        rows = [[*question, *choice, *frame.back] for choice in choices]
        first, second = frame.segments or (0, 0)
        types = [[first] * len(question) + [second] * (len(row) - len(question)) for row in rows]
        examples.append(Offered(rows, types if frame.segments else None, one.target, one.target, one.texts))
    return examples


def _continued(codec: Codec, before: str, read: Sequence[Question], max_length: int) -> list[Continued]:
    """The question and the right choice behind it. All choices end, so that none is the beginning of another."""
    asked = codec.prompts([one.full for one in read])
    behind = _of_each(read, lambda texts: codec.answers([before + text for text in texts], end=True))
    examples = []
    for one, ids, choices in zip(read, asked, behind, strict=True):
        question = _fitted(codec, one, ids, choices, max_length)
        right = [] if one.target == IGNORED else choices[one.target]
        joined, labels = (question, right)
        if codec.kind == "causal":
            joined, labels = [*question, *right], [IGNORED] * len(question) + right
        examples.append(Continued(joined, labels, len(question), one.target, choices, one.texts))
    return examples


def _of_each(read: Sequence[Question], encode: Callable[[list[str]], list[Ids]]) -> list[list[Ids]]:
    """The token ids of each question's choices, all encoded in one call."""
    found = iter(encode([text for one in read for text in one.texts]))
    return [[next(found) for _ in one.texts] for one in read]


def _fitted(codec: Codec, one: Question, ids: Ids, choices: list[Ids], max_length: int) -> Ids:
    """The question's token ids, cut so that its longest choice fits behind (in an encoder-decoder: beside it)."""
    longest = max(map(len, choices))
    room = max_length - (0 if codec.kind == "seq2seq" else longest)
    with one.asked.named():
        if longest > max_length or room < 1:
            raise UserError(f"a choice takes {longest} tokens of at most {max_length}; raise --max-length")
        return codec.fit(one.prompt, ids, room)


# How choices are scored


def _scores(run: Run, examples: Sequence[Any]) -> list[Tensor]:
    """log p of each example's choices: of an encoder among them, of a language model after the question."""
    if run.kind == "encoder":
        return [F.log_softmax(row, dim=-1) for row in head_logits(run, examples)]
    prompts = [prompt_of(example) for example in examples]
    return answer_scores(run, prompts, [example.choices for example in examples])


def _sizes(example: Offered | Continued) -> list[int]:
    """By how many tokens each choice is scored."""
    return [1] * len(example.texts) if isinstance(example, Offered) else [len(choice) for choice in example.choices]

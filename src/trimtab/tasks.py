"""Knows the tasks, their labels and their columns; refuses to know models' insides and how answers are scored."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from trimtab.chats import is_messages
from trimtab.data import column, columns
from trimtab.errors import UserError, unknown
from trimtab.examples import IGNORED, KINDS, Example, encode_all, encode_one
from trimtab.forms import FORMS, Draft, Form, Row, Templated, space, turn
from trimtab.templates import check_template, fill, placeholders, value_of
from trimtab.tokens import Codec, Ids, prefix_free

if TYPE_CHECKING:
    from trimtab.data import Rows

__all__ = [
    "IGNORED",
    "KINDS",
    "Classify",
    "Example",
    "Generate",
    "Task",
    "all_inputs",
    "encode_all",
    "parse_label_words",
    "prepare",
    "task_from_config",
]


@dataclass(frozen=True)
class Classify:
    """Which of a few labels a text has: the task head of an encoder, or label words that continue the prompt."""

    labels: tuple[str, ...]
    """The classes in order; a class index is an index into this."""
    template: str = "{text}\nLabel:"
    """The prompt with columns in braces; `{text}` is the text column."""
    chat: bool = False
    """Whether the filled template becomes the user's turn of the model's chat template."""
    text_column: str = "text"
    """The column of the texts, possibly nested."""
    label_column: str = "label"
    """The column of the labels, possibly nested."""
    label_words: Mapping[str, str] | None = None
    """What the model says for each label; the labels themselves if None."""

    name: ClassVar[str] = "classify"

    def __post_init__(self) -> None:
        if len(set(self.labels)) < 2:
            found = f"only {self.labels[0]!r}" if self.labels else "none"
            raise UserError(
                f"classification needs at least two different labels, column {self.label_column!r} has {found}"
            )
        placeholders(self.template)
        words = self.label_words
        if words is None:
            return
        if missing := [label for label in self.labels if not words.get(label)]:
            raise UserError(f"no label word for {', '.join(missing)}; each label needs one: {', '.join(self.labels)}")
        if extra := [label for label in words if label not in self.labels]:
            raise unknown("label", extra[0], self.labels)

    @property
    def in_chat(self) -> bool:
        """Whether the model's chat template is used."""
        return self.chat

    @property
    def words(self) -> tuple[str, ...]:
        """What the model says for each label, in the order of the labels."""
        return tuple(self.label_words[label] if self.label_words else label for label in self.labels)

    def choices(self, tokenizer: Any, kind: str) -> list[Ids]:
        """Token ids of each label's word after a prompt (causal) or as a target (seq2seq), in the order of the labels.

        An end token is added to all where one label's tokens are the beginning of another's. Raises UserError for words
        that the tokenizer cannot tell apart.
        """
        codec = Codec.of(tokenizer, kind, self.chat)
        return codec.answers(self._answers(codec), self.ends(codec))

    def index(self, row: Row) -> int:
        """The class of a row. Raises UserError for a label outside the set."""
        label = label_text(value_of(row, self.label_column), self.label_column)
        if label not in self.labels:
            raise unknown("label", label, self.labels)
        return self.labels.index(label)

    def inputs(self, row: Row) -> str:
        """What the model may see of a row, to tell duplicates by."""
        return self._form.inputs(row)

    def question(self, text: str) -> Row:
        """A row without a label for a text alone."""
        return self._form.question(text)

    def draft(self, row: Row, codec: Codec, asking: bool) -> Draft:
        """The row as strings; without its label if `asking`."""
        prompt = turn(fill(self.template, row, self.text_column), codec)
        index = IGNORED if asking else self.index(row)
        return Draft(prompt, [] if asking or codec.kind == "encoder" else [self._answers(codec)[index]], index)

    def ends(self, codec: Codec) -> bool:
        """Whether answers need an end token. Raises UserError for words that the tokenizer cannot tell apart."""
        if codec.kind == "encoder":
            return False
        found = codec.answers(self._answers(codec), end=False)
        for at, ids in enumerate(found):
            if not ids:
                raise UserError(f"the label word {self.words[at]!r} has no tokens; choose others with --label-words")
            if ids in found[:at]:
                pair = f"{self.words[found.index(ids)]!r} and {self.words[at]!r}"
                raise UserError(f"the label words {pair} have the same tokens; choose others with --label-words")
        return not prefix_free(found)

    def room(self, codec: Codec) -> int:
        """The longest label's tokens, so that every label fits and where a prompt was cut does not tell its label."""
        return 0 if codec.kind == "encoder" else max(map(len, codec.answers(self._answers(codec), self.ends(codec))))

    def encode(self, row: Row | str, tokenizer: Any, max_length: int, kind: str) -> Example:
        """One example; of a text alone the prompt, with nothing to learn in it (see `encode_all`)."""
        return encode_one(self, row, tokenizer, max_length, kind)

    def to_config(self) -> dict[str, Any]:
        """What `task_from_config` makes the same task from."""
        return {"name": self.name, **dataclasses.asdict(self), "labels": list(self.labels)}

    @property
    def _form(self) -> Form:
        return Templated(self.template, self.text_column, self.label_column)

    def _answers(self, codec: Codec) -> list[str]:
        return [space(codec, self.template) + word for word in self.words]


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

    def to_config(self) -> dict[str, Any]:
        """What `task_from_config` makes the same task from."""
        return {"name": self.name, **dataclasses.asdict(self)}

    @property
    def _form(self) -> Form:
        return FORMS[self.form](self.template, self.text_column, self.label_column)


Task = Classify | Generate
TASKS: dict[str, type[Classify] | type[Generate]] = {"classify": Classify, "generate": Generate}


def task_from_config(config: Mapping[str, Any]) -> Task:
    """The inverse of `to_config`. Raises UserError for an unknown task or field, and for values that fit none."""
    if not isinstance(config, Mapping):
        raise UserError(f"a task is a mapping with a name, not {config!r}")
    if config.get("name") not in TASKS:
        raise unknown("task", config.get("name"), TASKS)
    made = TASKS[config["name"]]
    fields = {key: value for key, value in config.items() if key != "name"}
    known = [field.name for field in dataclasses.fields(made)]
    for key in fields:
        if key not in known:
            raise unknown(f"field of the task {config['name']!r}", key, known)
    try:
        if "labels" in fields:
            fields["labels"] = tuple(fields["labels"])
        return made(**fields)
    except (TypeError, AttributeError) as error:
        raise UserError(f"the fields of the task {config['name']!r} are broken: {error}") from error


# From rows to a task


def prepare(
    name: str,
    rows: Rows,
    *,
    kind: str = "causal",
    text_column: str | None = None,
    label_column: str | None = None,
    template: str | None = None,
    chat: bool = False,
    label_words: Mapping[str, str] | None = None,
) -> Task:
    """The task that rows are for: finds the labels, or the form of the rows, and checks columns and template.

    Raises UserError for a missing column, an unknown placeholder, a row without label, fewer than two labels.
    """
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    if kind not in KINDS:
        raise unknown("model kind", kind, KINDS)
    if name == "classify":
        return _classify(rows, kind, text_column or "text", label_column or "label", template, chat, label_words)
    if label_words:
        raise UserError("label words belong to the task 'classify', not to 'generate'")
    return _generate(rows, text_column, label_column, template, chat)


def _classify(
    rows: Rows,
    kind: str,
    text_column: str,
    label_column: str,
    template: str | None,
    chat: bool,
    label_words: Mapping[str, str] | None,
) -> Classify:
    if template is None:
        template = "{text}" if kind == "encoder" else Classify.template
    check_template(template, rows[0], text_column, label_column)
    values = column(rows, label_column)
    labels = sort_labels(_numbered(lambda value: label_text(value, label_column), values))
    words = label_words or _class_names(rows, label_column, labels)
    task = Classify(tuple(labels), template, chat, text_column, label_column, words)
    task.inputs(rows[0])
    return task


def all_inputs(task: Task, rows: Iterable[Row]) -> list[str]:
    """`task.inputs` of every row, to tell duplicates by. Raises UserError naming the row."""
    return list(_numbered(task.inputs, rows))


def _numbered(read: Callable[[Any], str], values: Iterable[Any]) -> Iterator[str]:
    for number, value in enumerate(values, start=1):
        try:
            yield read(value)
        except UserError as error:
            raise UserError(f"row {number}: {error}") from error


def label_text(value: object, name: str) -> str:
    """A label as a string: 1, 1.0 and "1 " are "1". Raises UserError, naming the column, for no label or a list."""
    if isinstance(value, (list, Mapping)):
        raise UserError(f"column {name!r} holds a {type(value).__name__}, not a label")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = "" if value is None or value != value else str(value).strip()
    if not text:
        raise UserError(f"column {name!r} has no label")
    return text


def sort_labels(labels: Iterable[str]) -> list[str]:
    """Different labels in order: as numbers if all are numbers, else as strings."""
    found = sorted(set(labels))
    try:
        return sorted(found, key=float)
    except ValueError:
        return found


def _class_names(rows: Rows, name: str, labels: list[str]) -> dict[str, str] | None:
    """Hub datasets store classes as numbers and know their names: those are the label words."""
    names = getattr(getattr(rows, "features", {}).get(name), "names", None)
    if not names or not all(label.isdigit() and int(label) < len(names) for label in labels):
        return None
    return {label: names[int(label)] for label in labels}


def parse_label_words(text: str) -> dict[str, str]:
    """`0=no,1=yes` -> {"0": "no", "1": "yes"}. Raises UserError for anything else."""
    words: dict[str, str] = {}
    for part in text.split(","):
        label, found, word = (piece.strip() for piece in part.partition("="))
        if not (label and found and word):
            raise UserError(f"label words look like 0=no,1=yes; {part.strip()!r} does not")
        if label in words:
            raise UserError(f"label words name {label!r} twice")
        words[label] = word
    return words


def _generate(
    rows: Rows, text_column: str | None, label_column: str | None, template: str | None, chat: bool
) -> Generate:
    names = columns(rows)
    if template is None and label_column is None:
        if is_messages(rows[0].get(text_column or "messages")):
            return Generate("", True, text_column or "messages", "", "messages")
        if text_column is None and {"prompt", "completion"} <= set(names):
            return Generate("{text}", chat, "prompt", "completion", "joined")
        if text_column is None and {"instruction", "output"} <= set(names):
            return Generate("", chat, "instruction", "output", "alpaca")
    text_column = text_column or ("prompt" if "prompt" in names else "text")
    label_column = label_column or next((name for name in ("completion", "output") if name in names), "label")
    template = template or ("{text}" if chat else Generate.template)
    check_template(template, rows[0], text_column, label_column)
    column(rows, label_column)
    task = Generate(template, chat, text_column, label_column)
    task.inputs(rows[0])
    return task

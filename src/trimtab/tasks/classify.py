"""The task `classify`. Knows its labels, its words and its metrics; refuses to know how models are run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from trimtab.data import column
from trimtab.drafts import drafted
from trimtab.errors import UserError, unknown
from trimtab.examples import IGNORED, Asked, Example, Reading, encode_one
from trimtab.forms import Draft, Form, Row, Templated, space, turn
from trimtab.metrics import classification_metrics
from trimtab.scoring import Run, answer_scores, gold_loss, head_logits, objective_logits, prompt_of
from trimtab.tasks.rows import class_names, each, label_text, sort_labels
from trimtab.tasks.task import Wishes, config_of
from trimtab.templates import (
    check_template,
    fill,
    mask_lead,
    placeholders,
    pseudo_tokens,
    refuse_marks,
    value_of,
)
from trimtab.tokens import Codec, Ids, prefix_free
from trimtab.verbaliser import Verbaliser

if TYPE_CHECKING:
    from trimtab.data import Rows


@dataclass(frozen=True)
class Classify:
    """Which of a few labels a text has: an encoder's task head, or label words behind the prompt or at its mask."""

    labels: tuple[str, ...]
    """The classes in order; a class index is an index into this."""
    template: str = "{text}\nLabel:"
    """The prompt with columns in braces; `{text}` is the text column, `{mask}` a masked language model's mask."""
    chat: bool = False
    """Whether the filled template becomes the user's turn of the model's chat template."""
    text_column: str = "text"
    """The column of the texts, possibly nested."""
    label_column: str = "label"
    """The column of the labels, possibly nested."""
    label_words: Mapping[str, str] | None = None
    """What the model says for each label; the labels themselves if None."""

    name: ClassVar[str] = "classify"
    kinds: ClassVar[tuple[str, ...]] = ("causal", "seq2seq", "encoder", "masked")
    head: ClassVar[str | None] = "classification"
    takes: ClassVar[frozenset[str]] = frozenset({"template", "chat", "label_words"})
    writes: ClassVar[bool] = False
    measures: ClassVar[tuple[str, ...]] = ("accuracy", "macro_f1", "mcc", "loss")

    @classmethod
    def prepare(cls, rows: Rows, kind: str, wishes: Wishes) -> Classify:
        """Finds the labels. Raises UserError for a row without label and for fewer than two labels."""
        text_column, label_column = wishes.text_column or "text", wishes.label_column or "label"
        template = wishes.template
        if template is None:
            template = "{text}" if kind == "encoder" else cls.template
        check_template(template, rows[0], text_column, label_column)
        values = column(rows, label_column)
        labels = sort_labels(each(lambda value: label_text(value, label_column), values))
        words = wishes.label_words or _words_of(labels, class_names(rows, label_column))
        task = cls(tuple(labels), template, wishes.chat, text_column, label_column, words)
        task.inputs(rows[0])
        return task

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
        refuse_marks(words.values(), pseudo_tokens(self.template))

    @property
    def in_chat(self) -> bool:
        """Whether the model's chat template is used."""
        return self.chat

    @property
    def words(self) -> tuple[str, ...]:
        """What the model says for each label, in the order of the labels."""
        return tuple(self.label_words[label] if self.label_words else label for label in self.labels)

    def choices(self, tokenizer: Any, kind: str) -> list[Ids]:
        """Token ids of each label's word after a prompt (causal), as a target (seq2seq) or at the mask (masked), in the
        order of the labels.

        An end token is added to all where one label's tokens are the beginning of another's, but for a mask. Raises
        UserError for words that the tokenizer cannot tell apart, or does not know.
        """
        codec = Codec.of(tokenizer, kind, self.chat)
        if kind == "masked":
            return self._at_mask(codec)
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
        mask = _mask_token(codec.tokenizer) if codec.kind == "masked" else ""
        prompt = turn(fill(self.template, row, self.text_column, mask), codec)
        index = IGNORED if asking else self.index(row)
        return Draft(prompt, [] if asking or not _answering(codec) else [self._answers(codec)[index]], index)

    def ends(self, codec: Codec) -> bool:
        """Whether answers need an end token. Raises UserError for words that the tokenizer cannot tell apart."""
        if not _answering(codec):
            return False
        found = codec.answers(self._answers(codec), end=False)
        self._check_apart(found)
        return not prefix_free(found)

    def room(self, codec: Codec) -> int:
        """The longest label's tokens, so that every label fits and where a prompt was cut does not tell its label."""
        return max(map(len, codec.answers(self._answers(codec), self.ends(codec)))) if _answering(codec) else 0

    def encode(self, row: Row | str, tokenizer: Any, max_length: int, kind: str) -> Example:
        """One example; of a text alone the prompt, with nothing to learn in it (see `encode_all`)."""
        return encode_one(self, row, tokenizer, max_length, kind)

    def examples(self, rows: Sequence[Asked], reading: Reading) -> list[Example]:
        """One a row. Raises UserError for a text that has the mask token itself."""
        found = drafted(self, rows, reading)
        if reading.kind == "masked":
            mask = reading.tokenizer.mask_token_id
            for asked, example in zip(rows, found, strict=True):
                with asked.named():
                    if example.input_ids.count(mask) != 1:
                        raise UserError(f"the row has the mask token {reading.tokenizer.mask_token!r} itself")
        return found

    def objective(self, tokenizer: Any, kind: str) -> Verbaliser | None:
        """The label words at the mask of a masked language model; else the labels say what is learned."""
        return Verbaliser(self.choices(tokenizer, kind), tokenizer.mask_token_id) if kind == "masked" else None

    def score(self, run: Run, examples: Sequence[Example], max_new_tokens: int | None) -> dict[str, float]:
        """accuracy, macro_f1, mcc and the loss of the gold classes."""
        return self.marked(run, examples)[0]

    def marked(self, run: Run, examples: Sequence[Example]) -> tuple[dict[str, float], list[float]]:
        """The score, and 1 or 0 for each example that is right or wrong."""
        scores, loss = self.scores(run, examples)
        predicted, gold = scores.argmax(1).tolist(), _gold(examples)
        found = classification_metrics(predicted, gold, len(self.labels))
        return {**found, "loss": loss}, [float(a == b) for a, b in zip(predicted, gold, strict=True)]

    def answers(self, run: Run, examples: Sequence[Example], max_new_tokens: int) -> list[str]:
        """The most likely label of each."""
        return [self.labels[index] for index in self.scores(run, examples)[0].argmax(1).tolist()]

    def scores(self, run: Run, examples: Sequence[Example]) -> tuple[Tensor, float]:
        """log p [examples, classes], and the mean loss of the gold classes (nan if none is known)."""
        if run.kind in ("encoder", "masked"):
            verbaliser = self.objective(run.tokenizer, run.kind)
            logits = objective_logits(run, examples, verbaliser) if verbaliser else head_logits(run, examples)
            scores, sizes = [F.log_softmax(row, dim=-1) for row in logits], [1] * len(self.labels)
        else:
            words = self.choices(run.tokenizer, run.kind)
            sizes = [len(word) for word in words]
            scores = answer_scores(run, [prompt_of(example) for example in examples], [words] * len(examples))
        return torch.stack(scores), gold_loss(scores, _gold(examples), [sizes] * len(examples))

    def to_config(self) -> dict[str, Any]:
        """What `task_from_config` makes the same task from."""
        return config_of(self)

    @property
    def _form(self) -> Form:
        return Templated(self.template, self.text_column, self.label_column)

    def _answers(self, codec: Codec) -> list[str]:
        return [space(codec, self.template) + word for word in self.words]

    def _at_mask(self, codec: Codec) -> list[Ids]:
        """The tokens of each label's word in the place of the mask; their order does not count."""
        lead = mask_lead(self.template)
        found = codec.at_mask([lead + word for word in self.words])
        for word, ids in zip(self.words, found, strict=True):
            if codec.tokenizer.unk_token_id in ids:
                raise UserError(f"the tokenizer does not know the label word {word!r}; choose another: --label-words")
        self._check_apart([sorted(ids) for ids in found])
        return found

    def _check_apart(self, found: list[Ids]) -> None:
        """Raises UserError for label words without tokens, and for two with the same."""
        for at, ids in enumerate(found):
            if not ids:
                raise UserError(f"the label word {self.words[at]!r} has no tokens; choose others with --label-words")
            if ids in found[:at]:
                pair = f"{self.words[found.index(ids)]!r} and {self.words[at]!r}"
                raise UserError(f"the label words {pair} have the same tokens; choose others with --label-words")


def _answering(codec: Codec) -> bool:
    """Whether label words are answers that follow a prompt."""
    return codec.kind in ("causal", "seq2seq")


def _mask_token(tokenizer: Any) -> str:
    if tokenizer.mask_token is None:
        raise UserError("this model's tokenizer has no mask token, so the template can have no {mask}")
    return tokenizer.mask_token


def _gold(examples: Sequence[Example]) -> list[int]:
    return [example.target for example in examples]  # type: ignore[misc]


def _words_of(labels: list[str], names: list[str] | None) -> dict[str, str] | None:
    """Hub datasets store classes as numbers and know their names: those are the label words."""
    if not names or not all(label.isdigit() and int(label) < len(names) for label in labels):
        return None
    return {label: names[int(label)] for label in labels}

"""The task `tag`. Knows words, their tags and the metrics of both; refuses to know how models are run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch.nn import functional as F

from trimtab.errors import UserError, unknown
from trimtab.examples import IGNORED, Asked, Reading, encode_one
from trimtab.forms import Row
from trimtab.metrics import entity_f1, is_bio, macro_f1
from trimtab.scoring import Run, place_logits
from trimtab.tasks.rows import class_names, each, label_text, list_of, sort_labels
from trimtab.tasks.task import Wishes, config_of
from trimtab.templates import value_of
from trimtab.tokens import special_ends

if TYPE_CHECKING:
    from trimtab.data import Rows

UNSEEN = -1
"""The place of a word that was cut off or has no token, and what stands for its tag: none."""


@dataclass(frozen=True)
class Tagged:
    """The words of one row as an encoder reads them."""

    input_ids: list[int]
    labels: list[int]
    """As long as `input_ids`: the tag at the first token of each word, -100 elsewhere."""
    places: list[int]
    """Where each word's first token stands, or UNSEEN."""
    target: list[int]
    """Each word's tag, of those that were cut off as well; empty where they are asked for."""
    words: list[str]


@dataclass(frozen=True)
class Tag:
    """Which tag each word has, by an encoder's head on the word's first token.

    Words that are cut off have no part in the loss; in the metrics they count as words without a tag: wrong, and in no
    entity.
    """

    labels: tuple[str, ...]
    """The tags in order; a tag's index is an index into this."""
    text_column: str = "tokens"
    """The column of the lists of words, possibly nested."""
    label_column: str = "tags"
    """The column of the lists of as many tags, possibly nested."""
    numbered: bool = False
    """Whether rows hold class numbers, as hub datasets do that know the names."""

    name: ClassVar[str] = "tag"
    kinds: ClassVar[tuple[str, ...]] = ("encoder",)
    head: ClassVar[str | None] = "tags"
    takes: ClassVar[frozenset[str]] = frozenset()
    writes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if len(set(self.labels)) < 2:
            found = f"only {self.labels[0]!r}" if self.labels else "none"
            raise UserError(f"tagging needs at least two different tags, column {self.label_column!r} has {found}")

    @classmethod
    def prepare(cls, rows: Rows, kind: str, wishes: Wishes) -> Tag:
        """Finds the tags. Raises UserError for rows whose words or tags are no lists, or not of one length."""
        text_column, label_column = wishes.text_column or "tokens", wishes.label_column or "tags"
        for name in (text_column, label_column):
            value_of(rows[0], name)
        names = class_names(rows, label_column)
        lists = list(each(lambda row: _both(row, text_column, label_column)[1], rows))
        if names is not None:
            return cls(tuple(names), text_column, label_column, numbered=True)
        texts = each(lambda tags: {label_text(tag, label_column) for tag in tags}, lists)
        return cls(tuple(sort_labels(set().union(*texts))), text_column, label_column)

    @property
    def measures(self) -> tuple[str, ...]:
        """What runs may be compared by, the usual one first."""
        return ("entity_f1", "accuracy", "loss") if self.bio else ("accuracy", "macro_f1", "loss")

    @property
    def bio(self) -> bool:
        """Whether the tags mark entities."""
        return is_bio(self.labels)

    def index(self, tag: object) -> int:
        """A tag's index. Raises UserError for one outside the set."""
        text = label_text(tag, self.label_column)
        if text in self.labels:
            return self.labels.index(text)
        if self.numbered and text.isdigit() and int(text) < len(self.labels):
            return int(text)
        raise unknown("tag", text, self.labels)

    def inputs(self, row: Row) -> str:
        """The words, to tell duplicates by."""
        return " ".join(_words(row, self.text_column))

    def question(self, text: str) -> Row:
        """A row without tags for a text whose words stand between spaces."""
        return {self.text_column: text.split()}

    def encode(self, row: Row | str, tokenizer: Any, max_length: int, kind: str) -> Tagged:
        """One example; of a text alone with nothing to learn in it (see `encode_all`)."""
        return encode_one(self, row, tokenizer, max_length, kind)

    def examples(self, rows: Sequence[Asked], reading: Reading) -> list[Tagged]:
        """One a row. Raises UserError for a tokenizer that does not say which characters a token stands for."""
        if not reading.tokenizer.is_fast:
            raise UserError("tagging needs a fast tokenizer, one that says which characters each token stands for")
        read = [self._read(asked) for asked in rows]
        texts = [" ".join(words) for words, _ in read]
        found = reading.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        front, back = special_ends(reading.tokenizer)
        room = reading.max_length - len(front) - len(back)
        if room < 1:
            raise UserError(f"max_length={reading.max_length} leaves no room for a word; raise --max-length")
        examples = []
        for (words, tags), ids, offsets in zip(read, found["input_ids"], found["offset_mapping"], strict=True):
            places = [at + len(front) if 0 <= at < room else UNSEEN for at in first_tokens(words, offsets)]
            examples.append(_tagged(words, tags, [*front, *ids[:room], *back], places))
        return examples

    def score(self, run: Run, examples: Sequence[Tagged], max_new_tokens: int | None) -> dict[str, float]:
        """accuracy of the words, entity_f1 or, where tags mark no entities, macro_f1, and the loss."""
        predicted, loss = self._predicted(run, examples)
        pairs = [
            pair
            for row, example in zip(predicted, examples, strict=True)
            for pair in zip(row, example.target, strict=True)
        ]
        accuracy = sum(guess == truth for guess, truth in pairs) / len(pairs)
        if not self.bio:
            guesses, truths = zip(*pairs, strict=True)
            return {"accuracy": accuracy, "macro_f1": macro_f1(guesses, truths, len(self.labels)), "loss": loss}
        sides = [self._names(row) for row in predicted], [self._names(example.target) for example in examples]
        return {"accuracy": accuracy, "entity_f1": entity_f1(*sides), "loss": loss}

    def answers(self, run: Run, examples: Sequence[Tagged], max_new_tokens: int) -> list[str]:
        """A line for each word: the word, a tab, its tag, or ? where the word was cut off."""
        predicted, _ = self._predicted(run, examples)
        return [
            "\n".join(f"{word}\t{tag or '?'}" for word, tag in zip(example.words, self._names(row), strict=True))
            for row, example in zip(predicted, examples, strict=True)
        ]

    def objective(self, tokenizer: Any, kind: str) -> None:
        """The labels say what is learned."""

    def to_config(self) -> dict[str, Any]:
        """What `task_from_config` makes the same task from."""
        return config_of(self)

    def _read(self, asked: Asked) -> tuple[list[str], list[int]]:
        with asked.named():
            if asked.asking:
                return _words(asked.row, self.text_column), []
            words, tags = _both(asked.row, self.text_column, self.label_column)
            return words, [self.index(tag) for tag in tags]

    def _names(self, tags: Sequence[int]) -> list[str | None]:
        return [None if tag == UNSEEN else self.labels[tag] for tag in tags]

    def _predicted(self, run: Run, examples: Sequence[Tagged]) -> tuple[list[list[int]], float]:
        """Each word's tag, and the mean loss of the true tags of the words that are seen (nan if none is known)."""
        seen = [[place for place in example.places if place != UNSEEN] for example in examples]
        predicted, total, count = [], 0.0, 0
        for example, logits in zip(examples, place_logits(run, examples, seen), strict=True):
            best = iter(logits.argmax(-1).tolist())
            predicted.append([UNSEEN if place == UNSEEN else next(best) for place in example.places])
            log_p = F.log_softmax(logits, dim=-1)
            truth = [example.labels[place] for place in example.places if place != UNSEEN]
            known = [at for at, tag in enumerate(truth) if tag != IGNORED]
            total -= sum(float(log_p[at, truth[at]]) for at in known)
            count += len(known)
        return predicted, total / count if count else math.nan


def _words(row: Row, name: str) -> list[str]:
    """The words of a row. Raises UserError where there is none, and for what is no text."""
    words = list_of(row, name, "words")
    if not words:
        raise UserError(f"column {name!r} has no words")
    for word in words:
        if not isinstance(word, str):
            raise UserError(f"column {name!r} holds {word!r}, not a word")
    return [word.strip() for word in words]


def _both(row: Row, text_column: str, label_column: str) -> tuple[list[str], list[Any]]:
    """Words and as many tags."""
    words, tags = _words(row, text_column), list_of(row, label_column, "tags")
    if len(words) != len(tags):
        raise UserError(
            f"column {text_column!r} has {len(words)} words and column {label_column!r} {len(tags)} tags; "
            "each word needs one"
        )
    return words, tags


def first_tokens(words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Of words that are joined by spaces the index of each one's first token; UNSEEN where a word has none.

    A token belongs to the word that its last character is in: some tokenizers count the space before a word to it.
    """
    owner: list[int] = []
    for at, word in enumerate(words):
        owner += [at] * len(word) + [UNSEEN]
    first = [UNSEEN] * len(words)
    for index, (start, stop) in enumerate(offsets):
        word_of = owner[stop - 1] if stop > start else UNSEEN
        if word_of != UNSEEN and first[word_of] == UNSEEN:
            first[word_of] = index
    return first


def _tagged(words: list[str], tags: list[int], ids: list[int], places: list[int]) -> Tagged:
    labels = [IGNORED] * len(ids)
    for place, tag in zip(places, tags, strict=False):  # there are none where they are asked for
        if place != UNSEEN:
            labels[place] = tag
    return Tagged(ids, labels, places, tags, words)

"""The task `span`. Knows questions, contexts, where answers stand in them and how they are cut into windows; refuses to
know how models are run and what metrics count.

Rajpurkar et al. 2016, SQuAD, arXiv:1606.05250; windows over long contexts as in Devlin et al. 2019, BERT,
arXiv:1810.04805.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from trimtab.data import columns
from trimtab.errors import UserError
from trimtab.examples import IGNORED, Asked, Reading, encode_one
from trimtab.forms import Row
from trimtab.metrics import span_metrics
from trimtab.scoring import Run, span_logits
from trimtab.tasks.rows import each
from trimtab.tasks.task import Wishes, config_of
from trimtab.templates import text_value, value_of
from trimtab.tokens import PairFrame

if TYPE_CHECKING:
    from trimtab.data import Rows

Offsets = Sequence[tuple[int, int]]
"""The first character of each token, and the one behind its last."""


@dataclass(frozen=True)
class Answer:
    """An answer and where in the context it stands, in characters."""

    text: str
    start: int

    @property
    def stop(self) -> int:
        """The character behind its last."""
        return self.start + len(self.text)


@dataclass(frozen=True)
class Window:
    """A question and a piece of its context as an encoder reads them."""

    input_ids: list[int]
    token_type_ids: list[int] | None
    place: int
    """Where the context's piece begins in `input_ids`."""
    first: int
    """Which token of the whole context the piece begins with."""
    size: int
    """How many tokens of the context it has."""


@dataclass(frozen=True)
class Asking:
    """One row as an encoder reads it."""

    input_ids: list[int]
    """The window that is learned from."""
    token_type_ids: list[int] | None
    labels: list[int]
    """The answer's first and last token in `input_ids`; -100 twice where it is asked for."""
    target: list[str]
    """The answers that count as right; empty where it is asked for."""
    windows: list[Window]
    """What together holds the whole context: the answer is looked for in all of them, wherever it stands."""
    context: str
    offsets: Offsets
    """The characters of each of the context's tokens."""


@dataclass(frozen=True)
class Span:
    """Which piece of a context answers a question, by an encoder's head for its first and its last token.

    A context that is too long is read in windows that overlap by half. One that has the answer whole is learned from;
    where none has, one is laid around the answer, which is never cut.
    """

    text_column: str = "question"
    """The column of the questions, possibly nested."""
    context_column: str = "context"
    """The column of the contexts, possibly nested."""
    label_column: str = "answer"
    """The column of the answers: a text, texts, or a mapping with `text` and `answer_start`, as SQuAD has it."""

    name: ClassVar[str] = "span"
    kinds: ClassVar[tuple[str, ...]] = ("encoder",)
    head: ClassVar[str | None] = "spans"
    takes: ClassVar[frozenset[str]] = frozenset({"context_column"})
    writes: ClassVar[bool] = False
    measures: ClassVar[tuple[str, ...]] = ("f1", "exact_match", "loss")

    @classmethod
    def prepare(cls, rows: Rows, kind: str, wishes: Wishes) -> Span:
        """Reads every row. Raises UserError, naming the row, for an answer that is not in its context."""
        known = columns(rows)
        usual = "answers" if "answer" not in known and "answers" in known else "answer"
        task = cls(wishes.text_column or "question", wishes.context_column or "context", wishes.label_column or usual)
        for name in (task.text_column, task.context_column, task.label_column):
            value_of(rows[0], name)
        list(each(lambda row: (task.inputs(row), task.found(row)), rows))
        return task

    def found(self, row: Row) -> list[Answer]:
        """A row's answers. Raises UserError for one that is empty or does not stand in the context."""
        context = _filled(row, self.context_column)
        value: Any = value_of(row, self.label_column)
        starts: Any = row.get("answer_start")
        if isinstance(value, Mapping):
            value, starts = value.get("text"), value.get("answer_start")
        texts = value if isinstance(value, list) else [value]
        places = starts if isinstance(starts, list) else [starts] * len(texts)
        if not texts:
            raise UserError(f"column {self.label_column!r} has no answer; each question needs one")
        if len(places) != len(texts):
            raise UserError(f"column {self.label_column!r} has {len(texts)} answers and {len(places)} answer starts")
        return [_standing(text, start, context, self.label_column) for text, start in zip(texts, places, strict=True)]

    def inputs(self, row: Row) -> str:
        """The question and the context, to tell duplicates by."""
        return "\n".join(_filled(row, name) for name in (self.text_column, self.context_column))

    def question(self, text: str) -> Row:
        """A row without a context and an answer."""
        return {self.text_column: text}

    def about(self, context: str) -> Row:
        """The part of a row that holds its context."""
        return {self.context_column: context}

    def encode(self, row: Row | str, tokenizer: Any, max_length: int, kind: str) -> Asking:
        """One example (see `encode_all`)."""
        return encode_one(self, row, tokenizer, max_length, kind)

    def examples(self, rows: Sequence[Asked], reading: Reading) -> list[Asking]:
        """One a row. Raises UserError for a question or an answer that does not fit into a window."""
        tokenizer = reading.tokenizer
        if not tokenizer.is_fast:
            raise UserError("spans need a fast tokenizer, one that says which characters each token stands for")
        frame, examples = PairFrame.of(tokenizer), []
        for asked in rows:
            with asked.named():
                question, context = _filled(asked.row, self.text_column), _filled(asked.row, self.context_column)
                answers = [] if asked.asking else self.found(asked.row)
                ids = tokenizer(question.strip(), add_special_tokens=False, verbose=False)["input_ids"]
                read = tokenizer(context, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
                cutter = Cutter(frame, ids, read["input_ids"], reading.max_length)
                examples.append(_example(cutter, context, read["offset_mapping"], answers))
        return examples

    def score(self, run: Run, examples: Sequence[Asking], max_new_tokens: int | None) -> dict[str, float]:
        """exact_match and f1 of the texts, and the loss of the answers' first and last tokens."""
        texts = self.answers(run, examples, 0)
        found = span_metrics(texts, [example.target for example in examples])
        return {**found, "loss": _loss(run, examples)}

    def answers(self, run: Run, examples: Sequence[Asking], max_new_tokens: int) -> list[str]:
        """The piece of each context whose first and last token have the largest sum of logits, in any window."""
        flat = [window for example in examples for window in example.windows]
        logits = iter(span_logits(run, flat))
        return [_best(example, [next(logits) for _ in example.windows]) for example in examples]

    def objective(self, tokenizer: Any, kind: str) -> None:
        """The labels say what is learned."""

    def to_config(self) -> dict[str, Any]:
        """What `task_from_config` makes the same task from."""
        return config_of(self)


# Where answers stand


def _filled(row: Row, name: str) -> str:
    text = text_value(row, name)
    if not text.strip():
        raise UserError(f"column {name!r} is empty")
    return text


def _standing(text: object, start: object, context: str, name: str) -> Answer:
    """An answer at its start, or where the context has it first."""
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"column {name!r} has no answer; each question needs one")
    if start is None:
        at = context.find(text := text.strip())
        if at < 0:
            raise UserError(f"the answer {text!r} is not in the context")
        return Answer(text, at)
    if not isinstance(start, int) or isinstance(start, bool) or start < 0:
        raise UserError(f"the answer start {start!r} is no place in the context, which are 0 to {len(context) - 1}")
    if (there := context[start : start + len(text)]) != text:
        raise UserError(f"the context has {there!r} at {start}, not the answer {text!r}")
    return Answer(text, start)


def answer_tokens(answer: Answer, offsets: Offsets) -> tuple[int, int]:
    """The first and the last token that have a character of the answer. Raises UserError where there is none."""
    inside = [at for at, (start, stop) in enumerate(offsets) if start < answer.stop and stop > max(start, answer.start)]
    if not inside:
        raise UserError(f"the tokenizer has no token for the answer {answer.text!r}")
    return inside[0], inside[-1]


# Windows


class Cutter:
    """Lays windows over one context."""

    def __init__(self, frame: PairFrame, question: list[int], context: list[int], max_length: int) -> None:
        self.front = [*frame.front, *question, *frame.middle]
        self.back, self.segments, self.context = frame.back, frame.segments, context
        self.room = max_length - len(self.front) - len(self.back)
        if not context:
            raise UserError("the tokenizer has no token for the context")
        if self.room < 1:
            raise UserError(
                f"the question takes {len(question)} tokens of at most {max_length}, which leaves no room for its "
                "context; raise --max-length"
            )

    def all(self) -> list[Window]:
        """Windows that overlap by half; one where the context fits."""
        last = max(0, len(self.context) - self.room)
        step = max(1, self.room // 2)
        return [self.at(min(first, last)) for first in range(0, last + step, step)]

    def around(self, first: int, last: int, windows: Sequence[Window]) -> Window:
        """The window with most tokens on the answer's narrower side; a new one where none has all of the answer."""
        size = last - first + 1
        if size > self.room:
            raise UserError(f"the answer takes {size} tokens, its window has {self.room}; raise --max-length")
        having = [one for one in windows if one.first <= first and last < one.first + one.size]
        if having:
            return max(having, key=lambda one: min(first - one.first, one.first + one.size - 1 - last))
        start = first - (self.room - size) // 2
        return self.at(min(max(0, start), len(self.context) - self.room))

    def at(self, first: int) -> Window:
        """The window that begins with one of the context's tokens."""
        piece = self.context[first : first + self.room]
        ids, types = [*self.front, *piece, *self.back], None
        if self.segments:
            types = [self.segments[0]] * len(self.front) + [self.segments[1]] * (len(ids) - len(self.front))
        return Window(ids, types, len(self.front), first, len(piece))


def _example(cutter: Cutter, context: str, offsets: Offsets, answers: Sequence[Answer]) -> Asking:
    """The first answer is learned, all count as right."""
    windows = cutter.all()
    learned, labels = windows[0], [IGNORED, IGNORED]
    if answers:
        ends = answer_tokens(answers[0], offsets)
        learned = cutter.around(*ends, windows)
        labels = [learned.place + end - learned.first for end in ends]
    texts = [answer.text for answer in answers]
    return Asking(learned.input_ids, learned.token_type_ids, labels, texts, windows, context, offsets)


# Answers and losses


def _best(example: Asking, logits: Sequence[Tensor]) -> str:
    """max over windows and i ≤ j of start_i + end_j, both in the context; logits [2, tokens] of each window."""
    best, chosen = -float("inf"), (0, 0)
    for window, both in zip(example.windows, logits, strict=True):
        start, end = both[:, window.place : window.place + window.size]
        sums = (start[:, None] + end[None, :]).masked_fill(~torch.ones(len(start), len(end)).triu().bool(), -torch.inf)
        value, at = float(sums.max()), int(sums.argmax())
        if value > best:
            best, chosen = value, (window.first + at // len(end), window.first + at % len(end))
    first, last = chosen
    return example.context[example.offsets[first][0] : example.offsets[last][1]].strip()


def _loss(run: Run, examples: Sequence[Asking]) -> float:
    """The mean over rows of −½ (log p(start) + log p(end)), p over all tokens of the window that is learned from."""
    parts = [
        float(F.cross_entropy(both, torch.tensor(example.labels)))
        for example, both in zip(examples, span_logits(run, examples), strict=True)
    ]
    return sum(parts) / len(parts)

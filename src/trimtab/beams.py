"""How the likeliest text is looked for. Knows the search's numbers and their bounds; refuses to know models, texts."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from trimtab.errors import UserError

NAMES = ("num_beams", "length_penalty", "no_repeat_ngram_size")


@dataclass(frozen=True)
class Search:
    """Greedy with one beam, beam search with several. Raises UserError for numbers that mean nothing."""

    num_beams: int = 1
    """Texts that are kept at each step."""
    length_penalty: float = 1.0
    """Beams are ranked by log p / length^this: more than 0 favours long texts, less short ones."""
    no_repeat_ngram_size: int = 0
    """Length of the n-grams that may not occur twice (0: all may)."""

    def __post_init__(self) -> None:
        if self.num_beams < 1:
            raise UserError(f"num_beams must be at least 1, not {self.num_beams}")
        if not math.isfinite(self.length_penalty):
            raise UserError(f"length_penalty must be a finite number, not {self.length_penalty}")
        if self.no_repeat_ngram_size < 0:
            raise UserError(f"no_repeat_ngram_size must be at least 0, not {self.no_repeat_ngram_size}")
        if self.num_beams == 1 and self.length_penalty != 1:
            raise UserError(f"length_penalty={self.length_penalty:g} ranks beams: it needs num_beams of at least 2")

    @classmethod
    def of(cls, settings: Any) -> Search:
        """The search that a run's settings say."""
        return cls(**{name: getattr(settings, name) for name in NAMES})

    def changed(
        self, num_beams: int | None = None, length_penalty: float | None = None, no_repeat_ngram_size: int | None = None
    ) -> Search:
        """With the numbers that are given (not None); where one beam is asked for, without the beams' penalty."""
        if num_beams == 1 and length_penalty is None:
            length_penalty = GREEDY.length_penalty
        given: dict[str, Any] = dict(zip(NAMES, (num_beams, length_penalty, no_repeat_ngram_size), strict=True))
        return dataclasses.replace(self, **{name: value for name, value in given.items() if value is not None})


GREEDY = Search()


def check_search(task: Any, search: Search, max_new_tokens: int | None) -> None:
    """Raises UserError for no new tokens, and where a search is asked for and the task writes no text."""
    if max_new_tokens is not None and max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if task.writes:
        return
    changed = [name for name in NAMES if getattr(search, name) != getattr(GREEDY, name)]
    if max_new_tokens is not None:
        changed.append("max_new_tokens")
    if changed:
        raise UserError(f"{changed[0]} belongs to the task 'generate', not to {task.name!r}")

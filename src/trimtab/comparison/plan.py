"""What a comparison consists of: methods, learning rates, seeds, and the cells they make. Knows settings and figures;
refuses to know how a cell is run.

    for each method:  learning rates × first seed  ->  dev split  ->  the best rate × all seeds  ->  test split, once
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.cells import Figures
from trimtab.errors import UserError
from trimtab.methods.spec import format_method, parse_method
from trimtab.settings import TrainSettings

FACTORS = (1 / 3, 1.0, 3.0)
"""The learning rates that are tried, as multiples of a method's default."""
DEV_ROWS = 50
"""Rows that a development split needs: the standard error of an accuracy is then at most 7 points (0.5 / √rows)."""
LOWER = frozenset({"loss", "mse", "perplexity"})
"""Metrics of which less is better."""


@dataclass(frozen=True)
class Cell:
    """One training run. Equal settings mean an equal result, so they are stored with it."""

    method: str
    lr: float
    seed: int
    epochs: float
    max_length: int | None
    """Tokens a row may have; None for pictures."""

    @property
    def name(self) -> str:
        """File name of its figures and folder name of its adapter, without suffix."""
        return f"{slug(self.method)}-lr{self.lr:g}-seed{self.seed}"


@dataclass(frozen=True)
class Scored:
    """The test split's answers of a trained cell."""

    cell: Cell

    @property
    def name(self) -> str:
        """File name of its figures, without suffix."""
        return f"{self.cell.name}-test"


@dataclass(frozen=True)
class Plan:
    """A comparison with every choice made but the learning rates."""

    settings: TrainSettings
    """What all methods share; `method`, `lr` and `seed` are each cell's own."""
    methods: tuple[str, ...]
    seeds: int
    objective: str
    factors: tuple[float, ...] = FACTORS
    minutes: float | None = None

    @property
    def higher(self) -> bool:
        """Whether more of the objective is better."""
        return self.objective not in LOWER

    @property
    def trainings(self) -> int:
        """Training runs of one method."""
        return len(self.factors) + self.seeds - 1

    def rates(self, method: str) -> list[float]:
        """The learning rates that are tried, two digits each, in ascending order."""
        default = parse_method(method).lr
        return sorted({float(f"{default * factor:.2g}") for factor in self.factors})

    def cell(self, method: str, lr: float, seed: int, epochs: float) -> Cell:
        """A cell of a method that gets so many epochs."""
        return Cell(method, lr, seed, epochs, self.settings.max_length)

    def grid(self, method: str, epochs: float) -> list[Cell]:
        """The cells that choose a method's learning rate."""
        return [self.cell(method, lr, self.settings.seed, epochs) for lr in self.rates(method)]

    def final(self, method: str, lr: float, epochs: float) -> list[Cell]:
        """The cells whose test scores are shown, once the learning rate is chosen."""
        seed = self.settings.seed
        return [self.cell(method, lr, one, epochs) for one in range(seed, seed + self.seeds)]

    def chosen(self, results: Mapping[Cell, Figures]) -> float | None:
        """The learning rate that is best on the development split, the lower one of equals; None if none worked."""
        worked = [cell for cell, figures in results.items() if math.isfinite(self.dev(figures))]
        if not worked:
            return None
        return max(worked, key=lambda cell: (self.sign * self.dev(results[cell]), -cell.lr)).lr

    @property
    def sign(self) -> int:
        """1 where more of the objective is better, else -1."""
        return 1 if self.higher else -1

    def dev(self, figures: Figures) -> float:
        """The objective on the development split; nan where the cell failed."""
        return figures["dev"][self.objective] if "dev" in figures else math.nan


def slug(method: str) -> str:
    """A method's string as a file name, with a mark that tells two apart: 'lora[r=8]' -> 'lora-r-8-1f3c'."""
    plain = re.sub(r"[^a-z0-9.]+", "-", method.lower()).strip("-")[:60]
    if plain == method:
        return plain
    return f"{plain}-{hashlib.blake2b(method.encode(), digest_size=2).hexdigest()}"


def read_methods(methods: Sequence[Any]) -> tuple[str, ...]:
    """The methods' shortest strings. Raises UserError with a line for every mistake, for none and for one twice."""
    if not methods:
        raise UserError("there is no method to compare; name some, for example --methods 'prompt,lora[r=8]'")
    texts: list[str] = []
    mistakes: list[str] = []
    for method in methods:
        try:
            texts.append(format_method(parse_method(method)))
        except UserError as error:
            mistakes.append(str(error))
    mistakes += [f"the method {text!r} is in the list twice" for text in sorted(set(texts)) if texts.count(text) > 1]
    if mistakes:
        raise UserError("\n".join(mistakes))
    return tuple(texts)


def members_of(text: str) -> tuple[Any, ...]:
    """The single methods of a method's string."""
    method: Any = parse_method(text)
    return tuple(getattr(method, "methods", (method,)))


def check_numbers(seeds: int, minutes: float | None, dev_share: float, factors: Sequence[float]) -> None:
    """Raises UserError for numbers that mean nothing."""
    if seeds < 1:
        raise UserError(f"seeds must be at least 1, not {seeds}")
    if minutes is not None and not (minutes > 0 and math.isfinite(minutes)):
        raise UserError(f"minutes must be more than 0, not {minutes:g}")
    if not 0 < dev_share < 1:
        raise UserError(f"dev_share must lie between 0 and 1, not {dev_share:g}")
    if not factors or any(not (factor > 0 and math.isfinite(factor)) for factor in factors):
        raise UserError("the learning rates' factors must be numbers above 0, for example 0.33,1,3")


def check_dev_rows(rows: int, learned: int, dev_share: float, ranked: str) -> None:
    """Raises UserError where the development split is too small to rank anything by."""
    if rows >= DEV_ROWS:
        return
    there = rows + learned
    wanted = math.ceil(DEV_ROWS / dev_share)
    share = f", or give --dev-share {math.ceil(100 * DEV_ROWS / there) / 100:g}" if there >= 2 * DEV_ROWS else ""
    raise UserError(
        f"the development split has {rows} rows, too few to rank {ranked} by; it needs {DEV_ROWS}, which are "
        f"{dev_share:g} of {wanted:,} training rows (there are {there:,}{share})"
    )


def cell_settings(settings: TrainSettings, cell: Cell, data: str, eval_data: str, output: str) -> TrainSettings:
    """The settings with which `trimtab train` makes the same run."""
    return dataclasses.replace(
        settings,
        method=parse_method(cell.method),
        lr=cell.lr,
        seed=cell.seed,
        epochs=cell.epochs,
        max_length=cell.max_length,
        data=data,
        eval_data=eval_data,
        output=output,
        limit=None,
        eval_share=TrainSettings.eval_share,
    )

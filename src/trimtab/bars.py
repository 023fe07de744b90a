"""A progress bar on the terminal. Knows whether there is one; refuses to know what is being counted."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Bar(Protocol):
    """What a counted loop calls."""

    def __call__(self, steps: int = 1, note: str = "") -> None:
        """Count `steps` more and show `note` behind the bar."""


@contextmanager
def progress(title: str, total: int, show: bool | None = None, done: int = 0) -> Iterator[Bar]:
    """A bar on stderr while the block runs; none if `show` is false, or by default where stderr is no terminal."""
    if not (sys.stderr.isatty() if show is None else show):
        yield lambda steps=1, note="": None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True)) as bar:
        task = bar.add_task(escape(title), total=total, completed=done, note="")
        yield lambda steps=1, note="": bar.update(task, advance=steps, note=escape(note))

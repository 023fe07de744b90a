"""Progress bars on the terminal. Knows whether there is one; refuses to know what is being counted.

A bar that opens while another one is open stands below it, so a loop of runs shows what is done in all and at present.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

_OPEN: ContextVar[Any] = ContextVar("open", default=None)
"""The display that is on the terminal at present."""


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
    display = _OPEN.get()
    if display is not None:
        with _row(display, title, total, done) as bar:
            yield bar
        return
    with _display() as display:
        before = _OPEN.set(display)
        try:
            with _row(display, title, total, done, kept=True) as bar:
                yield bar
        finally:
            _OPEN.reset(before)


def _display() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True))


@contextmanager
def _row(display: Any, title: str, total: int, done: int, kept: bool = False) -> Iterator[Bar]:
    """One bar of a display; it goes away with the block unless it is to be kept."""
    from rich.markup import escape

    task = display.add_task(escape(title), total=total, completed=done, note="")
    try:
        yield lambda steps=1, note="": display.update(task, advance=steps, note=escape(note))
    finally:
        if not kept:
            display.remove_task(task)

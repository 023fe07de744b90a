"""What makes small tests cheap. Knows pytest and the garbage collector; refuses to know what is tested."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

DRAWING = ("test_report", "test_cli", "test_heads", "test_real")
"""Tests that look at a run's picture of its curves."""


@pytest.fixture(scope="module", autouse=True)
def libraries_are_no_garbage() -> Iterator[None]:
    """A trainer collects garbage, which looks through every object of the libraries unless they are set aside."""
    gc.collect()
    gc.freeze()
    yield


@pytest.fixture(autouse=True)
def curves_are_not_drawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing a run's curves takes longer than a tiny run."""
    if request.module.__name__ in DRAWING:
        return
    monkeypatch.setattr("trimtab.report.save_figure", _empty)


def _empty(figure: Any, path: Path) -> None:
    path.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>", encoding="utf-8")

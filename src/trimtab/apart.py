"""Folders that must not be each other. Knows paths alone."""

from __future__ import annotations

from pathlib import Path

from trimtab.errors import UserError


def check_apart(output: Path, other: Path, what: str) -> None:
    """Raises UserError where writing one would replace or change the other."""
    if not other.exists():
        return
    one, two = output.resolve(), other.resolve()
    for relation, holds in (
        ("is", one == two),
        ("contains", two.is_relative_to(one)),
        ("is inside", one.is_relative_to(two)),
    ):
        if holds:
            raise UserError(f"{output} {relation} {what}; choose another")

"""The one exception for a user's mistake. Knows how to phrase it; refuses to know who prints it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST = 200
"""Characters of a wrong name that a sentence shows at most."""


class UserError(ValueError):
    """A mistake of the user's, told in one sentence; the command line prints it and exits 2."""


def unknown(what: str, given: object, allowed: Iterable[object]) -> UserError:
    """The error for a name outside a set: names the thing, the nearest match and what is allowed."""
    names = [str(name) for name in allowed]
    given = given[:LONGEST] if isinstance(given, str) else given
    near = difflib.get_close_matches(str(given), names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    listed = ", ".join(names) if names else "nothing"
    return UserError(f"{what} {given!r} does not exist; {hint}allowed: {listed}")

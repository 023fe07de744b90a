"""A template's pseudo tokens in a tokenizer and in a method. Refuses to know rows and embeddings."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import AddedToken

from trimtab.errors import UserError
from trimtab.templates import PSEUDO


def add_pseudo_tokens(tokenizer: Any, count: int) -> None:
    """Lets a tokenizer, in memory alone, read the pseudo tokens 0 … count − 1; their ids follow its vocabulary.

    Raises UserError for a tokenizer that has one of them as a token of its own.
    """
    names = [PSEUDO.format(at) for at in range(count)]
    if not count:
        return
    known = tokenizer.get_added_vocab()
    if missing := [name for name in names if name not in known]:
        tokenizer.add_tokens(
            [AddedToken(name, special=True, normalized=False) for name in missing], special_tokens=True
        )
    first_pseudo_token(tokenizer, count)


def first_pseudo_token(tokenizer: Any, count: int) -> int | None:
    """The id of pseudo token 0, where a tokenizer reads so many of them; their ids follow each other.

    Raises UserError where they do not.
    """
    known = tokenizer.get_added_vocab()
    ids = [known.get(PSEUDO.format(at)) for at in range(count)]
    if None in ids:
        return None
    if ids != list(range(ids[0], ids[0] + count)):
        raise UserError(
            f"the tokenizer has a token {PSEUDO.format(0)} of its own, so no template can have pseudo tokens"
        )
    return ids[0]


def for_template(method: Any, count: int) -> Any:
    """The method, or union of methods, as a template with so many pseudo tokens has it trained.

    Raises UserError for a method that has no use for them, or wants another number or place.
    """
    own = getattr(method, "methods", (method,))
    if count and not any(hasattr(member, "for_template") for member in own):
        from trimtab.methods import METHODS

        able = ", ".join(name for name, other in METHODS.items() if hasattr(other, "for_template"))
        raise UserError(
            f"the template has pseudo tokens ({{p*{count}}} in all), which {method.name} does not train; "
            f"methods that do: {able}"
        )
    fitted = [member.for_template(count) if hasattr(member, "for_template") else member for member in own]
    return dataclasses.replace(method, methods=tuple(fitted)) if hasattr(method, "methods") else fitted[0]

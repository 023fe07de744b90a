"""`prompt_tuning` of `adapters`: refused both ways. Its virtual tokens stand behind the embeddings' positions and norm,
ours in front of them, where they can take no value that would do the same."""

from __future__ import annotations

from typing import NoReturn

from trimtab.errors import UserError
from trimtab.peers.folder import Folder
from trimtab.peers.kinds import Acting, Kind, Model

WHY = (
    "adapters puts virtual tokens behind the embeddings' positions and norm, trimtab in front of them; "
    "the one cannot be written as the other"
)


def read(folder: Folder, place: Model) -> NoReturn:
    """Raises UserError."""
    raise UserError(f"{folder.path} is prompt tuning: {WHY}")


def write(form: Acting) -> NoReturn:
    """Raises UserError."""
    raise UserError(WHY)


KIND = Kind("prompt_tuning", ("prompt",), read, write)

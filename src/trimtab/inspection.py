"""What a folder holds, whichever library wrote it, told from its files alone. Knows summaries and what is wrong with a
folder; refuses to load a model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trimtab import peers
from trimtab.checkpoint import WHOLE_CONFIG, read_adapter_config, read_tensors
from trimtab.errors import UserError
from trimtab.files import count_floats
from trimtab.peers.folder import weight_files
from trimtab.peers.kinds import Described, Library
from trimtab.report import summary

OURS = "trimtab"
LONG = 80
"""Characters of a setting that a line shows at most."""


def look(folder: str | Path) -> dict[str, Any]:
    """A folder in one flat object: library, kind, method, fields, base, task, sizes, metrics, warnings.

    `kind` is what the library calls it; of another library's folder, `method` names ours that do the same. Raises
    UserError where there is no adapter, and for a broken configuration; broken tensors are a warning where the
    configuration alone says what the folder is.
    """
    path = Path(folder)
    library = peers.library_of(path)
    if library is None:
        found = summary(path)
        return {"library": OURS, "kind": found["method"], **found, "warnings": list(_own_warnings(path, found["base"]))}
    return _peers(path, library)


def settings_text(fields: dict[str, Any]) -> str:
    """Another library's settings in one line: `r=8, target_modules=[q_proj, v_proj]`."""
    return ", ".join(f"{key}={_short(value)}" for key, value in fields.items())


def _short(value: Any) -> str:
    text = f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)
    return text if len(text) <= LONG else f"{text[:LONG]}…"


def _peers(folder: Path, library: Library) -> dict[str, Any]:
    said = peers.describe(folder, library)
    numbers, size, problems = _sizes(folder, library)
    return {
        "library": library.name,
        "kind": said.kind,
        "folder": str(folder),
        "name": said.name or None,
        "method": " or ".join(said.methods) or "–",
        "fields": dict(said.fields),
        "base": said.base or "–",
        "family": said.family or None,
        "task": {"name": said.task or None, "labels": list(said.labels)},
        "data": None,
        "parameters": {"trainable": numbers},
        "bytes": size,
        "bits": 0,
        "train": {},
        "before": {},
        "after": {},
        "warnings": [*_unread(said, library), *_base_warnings(said.base), *problems],
    }


def _sizes(folder: Path, library: Library) -> tuple[int | None, int | None, list[str]]:
    """How many numbers and bytes the tensors' files have, and what is wrong with them."""
    try:
        files = weight_files(folder, library)
        return sum(map(count_floats, files)), sum(file.stat().st_size for file in files), []
    except UserError as error:
        return None, None, [str(error)]


def _unread(said: Described, library: Library) -> Iterator[str]:
    if not said.methods:
        yield f"trimtab does not read {library.name}'s {said.kind[:LONG]}"


def _own_warnings(folder: Path, base: str) -> Iterator[str]:
    if (folder / WHOLE_CONFIG).is_file():  # a whole model needs no base
        return
    yield from _base_warnings(base)
    try:
        read_tensors(folder, read_adapter_config(folder))
    except UserError as error:
        yield str(error)


def _base_warnings(base: str) -> Iterator[str]:
    if base in ("", "–"):
        yield "it does not say which base model it belongs to; give it with --model"
    elif os.path.isabs(base) and not os.path.exists(base):
        yield f"its base model {base} is not there; give it with --model"

"""Adapter folders of other libraries, read and written. One file a kind of adapter; a library is a table of kinds.

A folder is told by its configuration. What is in it is not trusted: pickles are refused, sizes come from the tensors
that are there and never from the configuration, and no name in it is taken for a path.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from trimtab.adapter import Adapter, attach
from trimtab.errors import unknown
from trimtab.files import read_json
from trimtab.peers.adapters import ADAPTERS
from trimtab.peers.folder import Folder
from trimtab.peers.kinds import Described, Library
from trimtab.peers.peft import PEFT

LIBRARIES: Mapping[str, Library] = {library.name: library for library in (PEFT, ADAPTERS)}


def library_of(folder: str | Path) -> Library | None:
    """The library that wrote a folder; None where none of them did. Raises UserError for a broken configuration."""
    for library in LIBRARIES.values():
        path = Path(folder) / library.config_file
        if path.is_file() and library.wrote(read_json(path)):
            return library
    return None


def load(model: PreTrainedModel, folder: str | Path, library: Library, name: str | None = None) -> Adapter:
    """Attach the adapter of another library's folder to a model.

    Tensors that the method has and the folder has not stay at their start, which changes nothing. Raises UserError for
    a broken folder, a kind or an option that trimtab has not, and tensors that do not fit; then the model is as it was.
    """
    opened = Folder.open(folder, library)
    found = library.read(opened, model)
    opened.check_used_up()
    method: Any = found.method
    adapter = attach(model, getattr(method, "for_loading", lambda: method)(), name or "default")
    try:
        labels = found.classes(adapter)
        if labels:
            adapter.fit_head(labels)
        adapter.load_state_dict({**adapter.state_dict(), **found.state})
    except BaseException:
        adapter.detach()
        raise
    adapter._entry.method = method
    return adapter


def export(adapter: Adapter, folder: str | Path, to: str) -> Path:
    """Write an adapter into `folder` as another library's files; returns the folder.

    Raises UserError for an unknown library and for what it cannot express; then nothing is written.
    """
    if to not in LIBRARIES:
        raise unknown("the format", to, LIBRARIES)
    return LIBRARIES[to].write(adapter, Path(folder))


def describe(folder: str | Path, library: Library) -> Described:
    """What the folder's configuration says. Raises UserError for a broken one, and a field of the wrong type."""
    path = Path(folder)
    return library.describe(Folder(path, read_json(path / library.config_file), {}))

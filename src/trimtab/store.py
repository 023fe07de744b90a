"""Where hidden states are kept between forwards: memory, then a file. Knows tensors, bytes and files; refuses to know
models and what the states are.

A row's states [n, width] are found by a digest of what they were made from. Rows go to memory until a budget is full,
then to a memory-mapped file; with a folder all go to a file there, which a later run may use. The folder's index is
written last and whole, so rows that an interrupted run wrote without it count for nothing, and each row carries a
checksum. A disk that is full, or a budget of nothing, ends the keeping and not the run.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import filelock
import numpy as np
import torch
from torch import Tensor

from trimtab.errors import UserError
from trimtab.files import writing

LOG = logging.getLogger("trimtab")
INDEX, ROWS, LOCK = "index.json", "states-{}.bin", "lock"
_DTYPES = {str(dtype): dtype for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}


@dataclass(frozen=True)
class Place:
    """One row's states in the file."""

    at: int
    """Its first byte."""
    shape: tuple[int, int]
    dtype: str
    check: int
    """CRC-32 of its bytes."""

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.at + self.shape[0] * self.shape[1] * _DTYPES[self.dtype].itemsize


def _check(index: Mapping[str, Any]) -> int:
    """CRC-32 of an index."""
    return zlib.crc32(json.dumps(index, sort_keys=True).encode())


class Store:
    """States by key, each from some position of its row on.

    `budget` is the memory in bytes; 0 keeps nothing unless there is a `folder`, whose content is used if it was made
    with the same `facts` (a JSON object) and is made anew otherwise.
    """

    def __init__(self, budget: int, folder: str | Path | None = None, facts: Mapping[str, Any] | None = None):
        self.budget, self.facts = budget, dict(facts or {})
        self.memory: dict[str, tuple[int, Tensor]] = {}
        self.places: dict[str, tuple[int, Place]] = {}
        self.used = 0
        self.full = budget <= 0 and folder is None
        self.hits = self.misses = 0
        self.folder = None if folder is None else self._opened(Path(folder).expanduser())
        self._file: BinaryIO | None = None
        self._path: Path | None = None
        self._end = 0
        self._map: np.memmap | None = None
        if self.folder is not None:
            self._read_index(self.folder)
        if self.full:
            LOG.warning("nothing below the lowest trained layer is kept: the cache's memory is 0")

    def get(self, key: str, start: int) -> Tensor | None:
        """The states of a row from position `start` on [n, width]; None where they are not known."""
        begin, states = self.memory.get(key) or (0, None)
        if states is None and key in self.places:
            begin, place = self.places[key]
            states = self._load(key, place) if begin <= start else None
        if states is None or begin > start:
            self.misses += 1
            return None
        self.hits += 1
        return states[start - begin :]

    def put(self, key: str, start: int, states: Tensor) -> None:
        """Keep the states [n, width] of a row from position `start` on; nobody may change them afterwards."""
        size = states.numel() * states.element_size()
        begin = (self.memory.get(key) or self.places.get(key) or (None,))[0]
        if self.full or (begin is not None and begin <= start):
            return
        if key in self.memory:
            before = self.memory.pop(key)[1]
            self.used -= before.numel() * before.element_size()
        if self.folder is None and self.used + size <= self.budget:
            alone = states.untyped_storage().nbytes() == size  # a part would keep the whole in memory
            self.memory[key] = (start, states.detach().to("cpu", copy=not alone))
            self.used += size
            return
        try:
            self.places[key] = (start, self._append(states.detach().cpu().contiguous()))
        except OSError as error:
            self.full = True
            LOG.warning("the cache is full, what does not fit is computed again: %s", error)

    def commit(self) -> None:
        """Write the folder's index, so that a later run finds what is kept by now."""
        if self.folder is None or self._file is None or self._path is None:
            return
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            rows = {
                key: [start, place.at, *place.shape, place.dtype, place.check]
                for key, (start, place) in self.places.items()
            }
            content = {"facts": self.facts, "file": self._path.name, "rows": rows}
            unfinished = self.folder / f"{INDEX}.part"
            with unfinished.open("w", encoding="utf-8") as file:
                file.write(json.dumps({**content, "check": _check(content)}))
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, self.folder / INDEX)
        except OSError as error:
            LOG.warning("the cache was not kept for a later run: %s", error)

    def close(self) -> None:
        """Commit, and give the folder or the temporary file back."""
        self.commit()
        self._map = None
        if self._file is not None:
            with suppress(OSError):  # of a full disk, which has been said
                self._file.close()
            if self.folder is None and self._path is not None:
                self._path.unlink(missing_ok=True)
        if self.folder is not None:
            self._lock.release()

    # Files

    def _opened(self, folder: Path) -> Path | None:
        """The folder, locked; None if another run has it. Raises UserError where no folder can be made."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = filelock.FileLock(folder / LOCK)
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            LOG.warning("another run uses the cache %s; this one keeps its own in memory", folder)
            return None
        except OSError as error:
            raise UserError(f"the cache {str(folder)!r} cannot be written: {error.strerror or error}") from error
        return folder

    def _read_index(self, folder: Path) -> None:
        """Take over what an earlier run left, if it was made from the same facts and is whole.

        Raises UserError where the folder cannot be written.
        """
        try:
            content = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            sound = content.pop("check") == _check(content)
            path = folder / Path(content["file"]).name
            places = {
                key: (start, Place(at, (rows, width), dtype, check))
                for key, (start, at, rows, width, dtype, check) in content["rows"].items()
            }
            size = path.stat().st_size
            whole = sound and all(
                place.dtype in _DTYPES and 0 <= place.at <= place.end <= size for _, place in places.values()
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            content, whole = {}, False
        if whole and content["facts"] == self.facts:
            self.places, self._path = places, path
            with writing(folder):
                self._file = open(path, "r+b")  # noqa: SIM115
                self._file.truncate(max((place.end for _, place in places.values()), default=0))
                self._end = self._file.seek(0, os.SEEK_END)
            return
        with writing(folder):
            for old in [folder / INDEX, *folder.glob(ROWS.format("*"))]:
                old.unlink(missing_ok=True)

    def _append(self, states: Tensor) -> Place:
        if self._file is None:
            self._create()
        assert self._file is not None
        data = states.view(torch.uint8).numpy().tobytes()
        self._file.seek(self._end)
        self._file.write(data)
        self._file.flush()
        place = Place(self._end, (states.shape[0], states.shape[1]), str(states.dtype), zlib.crc32(data))
        self._end = place.end
        return place

    def _create(self) -> None:
        if self.folder is None:
            handle, name = tempfile.mkstemp(prefix="trimtab-", suffix=".states")
            self._file, self._path = os.fdopen(handle, "r+b"), Path(name)
        else:
            self._path = self.folder / ROWS.format(os.getpid())
            self._file = open(self._path, "w+b")  # noqa: SIM115

    def _load(self, key: str, place: Place) -> Tensor | None:
        """A row from the file; None, and forgotten, if it is damaged."""
        if self._map is None or self._map.shape[0] < place.end:
            assert self._path is not None
            self._map = np.memmap(self._path, dtype=np.uint8, mode="r")
        data = np.array(self._map[place.at : place.end])
        if zlib.crc32(data.tobytes()) != place.check:
            del self.places[key]
            return None
        return torch.from_numpy(data).view(_DTYPES[place.dtype]).view(place.shape)

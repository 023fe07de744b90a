"""The checkpoint-N folders of a run: complete or absent. Knows files and steps; refuses to know what is trained.

A checkpoint is built in a hidden folder, synced, and renamed in one step, so a folder named checkpoint-N is whole
however the process ended; `last_checkpoint` still looks whether its files are there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trimtab.errors import UserError
from trimtab.files import digest, read_json, writing

WEIGHTS = "trained.safetensors"
ABOUT = "trained.json"
NEEDED = (WEIGHTS, ABOUT, "trainer_state.json", "optimizer.pt", "scheduler.pt")
SUMS = "checksums.json"
"""The SHA-256 of every other file; checkpoints of older versions have none."""
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoint_path(run: str | Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return Path(run) / f"checkpoint-{step}"


def last_checkpoint(run: str | Path) -> Path | None:
    """The newest whole checkpoint of a run, or None."""
    whole = [path for path in checkpoints(run) if not missing_files(path)]
    return whole[-1] if whole else None


def checkpoints(run: str | Path) -> list[Path]:
    """All checkpoint folders of a run, oldest first."""
    folder = Path(run)
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def missing_files(checkpoint: Path) -> list[str]:
    """What a checkpoint folder lacks of the files that every checkpoint has."""
    return [name for name in NEEDED if not (checkpoint / name).is_file()]


def read_about(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of itself. Raises UserError where it is not whole, damaged, or not one of ours."""
    missing = missing_files(checkpoint)
    if missing:
        raise UserError(f"{checkpoint} is not a whole checkpoint: it lacks {', '.join(missing)}")
    _check_sums(checkpoint)
    return read_json(checkpoint / ABOUT)


def _check_sums(checkpoint: Path) -> None:
    """Raises UserError for a file whose bytes are not those that were saved."""
    if not (checkpoint / SUMS).is_file():
        return
    for name, known in read_json(checkpoint / SUMS).items():
        path = checkpoint / Path(name).name
        if not path.is_file() or digest(path) != known:
            raise UserError(
                f"{path} is damaged: its bytes are not those that were saved; "
                f"delete {checkpoint.name} to go on without it"
            )


@contextmanager
def building(target: Path, main: bool = True) -> Iterator[Path]:
    """A hidden folder that becomes `target` when the block ends well; every process writes, only `main` renames."""
    hidden = target.parent / f".{target.name}"
    with writing(target):
        if main:
            shutil.rmtree(hidden, ignore_errors=True)
            hidden.mkdir(parents=True)
        yield hidden
        if main:
            sums = {path.name: digest(path) for path in sorted(hidden.iterdir())}
            (hidden / SUMS).write_text(json.dumps(sums, indent=2), encoding="utf-8")
            sync(hidden)
            remove(target)
            hidden.rename(target)
            _sync_entry(target.parent)


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint; it loses its name first, so that no half of it is ever taken for a whole.

    Raises UserError where the system does not let it be deleted.
    """
    if checkpoint.exists():
        doomed = checkpoint.with_name(f".gone-{checkpoint.name}")
        with writing(checkpoint):
            shutil.rmtree(doomed, ignore_errors=True)
            checkpoint.rename(doomed)
            shutil.rmtree(doomed)


def rotate(run: str | Path, keep: int | None, protected: Path | None = None) -> None:
    """Delete the oldest checkpoints beyond `keep` (None or 0: none), never the newest, the protected one, or another
    trainer's."""
    found = [path for path in checkpoints(run) if (path / ABOUT).is_file()]
    spare = [path for path in found[:-1] if protected is None or path != protected]
    for path in spare[: max(0, len(found) - keep)] if keep else []:
        remove(path)


def sweep(run: str | Path) -> None:
    """Delete what a killed process left half built or half deleted."""
    for path in Path(run).glob(".*checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)


def sync(folder: Path) -> None:
    """Have the operating system write a folder's files to the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    _sync_entry(folder)


def _sync_entry(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

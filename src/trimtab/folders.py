"""Knows the folders that hold rows: class folders of pictures, and what `datasets` saved; refuses to know tasks.

DATA/dog/1.png  DATA/cat/a/2.png          a row a picture: image (its path), label (dog, cat)
DATA/train/dog/1.png  DATA/test/…         the same of DATA/train; DATA/test is data of its own
DATA/dataset_info.json …                  a dataset, or several splits, that `save_to_disk` wrote
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".jp2", ".avif"}
)
"""Files of a class folder that are pictures; others are left alone."""
SPLITS = ("train", "validation", "valid", "val", "test", "dev")
"""Names of folders that are splits and no classes, where there is a `train` among them."""


def read_folder(source: str, folder: Path) -> Dataset | None:
    """The rows of a folder, in the order of the names; None where it is of neither kind.

    Raises UserError for a dataset that cannot be read, and for a class without pictures among others that have some.
    """
    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        return _saved(source, folder)
    if (folder / "train").is_dir() and all(name in SPLITS for name in _inside(folder)):
        folder = folder / "train"
    classes = {name: list(_pictures(folder / name)) for name in _inside(folder)}
    if not any(classes.values()):
        return None
    if empty := [name for name, found in classes.items() if not found]:
        raise UserError(f"the class folder {empty[0]!r} in {source!r} has no pictures ({', '.join(sorted(SUFFIXES))})")
    import datasets

    pairs = [(str(path), name) for name, found in classes.items() for path in found]
    paths, labels = zip(*pairs, strict=True)
    return datasets.Dataset.from_dict({"image": list(paths), "label": list(labels)})


def _inside(folder: Path) -> list[str]:
    """The names of the folders in a folder."""
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] not in "._")


def _pictures(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in SUFFIXES and not hidden and path.is_file():
            yield path.absolute()


def _saved(source: str, folder: Path) -> Dataset:
    import datasets

    try:
        found: Any = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"the dataset in {source!r} cannot be read: {reason}") from error
    if isinstance(found, dict):
        if "train" not in found:
            raise UserError(f"{source!r} has no split 'train'; give the folder of one: {', '.join(found)}")
        found = found["train"]
    if not len(found):
        raise UserError(f"{source!r} holds no rows")
    return found

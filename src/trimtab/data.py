"""Knows files, columns and splits; refuses to know tokenizers, tasks and models."""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from trimtab.errors import UserError, unknown
from trimtab.folders import read_folder
from trimtab.readers import READERS, read_rows

if TYPE_CHECKING:
    from datasets import Dataset

    Rows: TypeAlias = "Dataset | Sequence[Mapping[str, Any]]"


# Where things are


def resolve(source: str) -> str:
    """The path behind `pkg:NAME/path` (a file or folder inside the installed package NAME); anything else as it is.

    The package is found, never imported. Raises UserError if it is not installed, or if the path is not inside it.
    """
    if not source.startswith("pkg:"):
        return source
    package, _, inside = source.removeprefix("pkg:").partition("/")
    roots = _package_folders(package)
    found = [path for root in roots if (path := (root / inside).resolve()).exists()]
    for path in found:
        if any(path.is_relative_to(root) for root in roots):
            return str(path)
    if found or ".." in inside.split("/"):
        raise UserError(f"{source!r} leads out of the package {package!r}")
    raise UserError(f"package {package!r} has no {inside!r}; {_nearby(roots[0] / inside)}")


def _package_folders(package: str) -> list[Path]:
    """The folders of an installed top-level package."""
    if not package.isidentifier():
        raise UserError(f"{package!r} is not the name of a Python package{_import_names(package)}")
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise UserError(f"package {package!r} is not installed{_import_names(package)}")
    if not spec.submodule_search_locations:
        raise UserError(f"{package!r} is a single module, not a package with files inside")
    return [Path(folder).resolve() for folder in spec.submodule_search_locations]


def _import_names(distribution: str) -> str:
    """For someone who wrote the name that pip knows: the names that Python knows."""
    wanted = distribution.lower().replace("_", "-")
    owners = importlib.metadata.packages_distributions()
    names = [name for name, dists in owners.items() if wanted in {d.lower().replace("_", "-") for d in dists}]
    return f"; pip's {distribution!r} installs {', '.join(sorted(names))}" if names else ""


def _nearby(path: Path) -> str:
    """What exists next to a path that does not: the nearest names of the deepest folder that exists."""
    wanted = path.name
    folder = path.parent
    while not folder.is_dir():
        wanted, folder = folder.name, folder.parent
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir() if entry.name[0] not in "._")
    near = difflib.get_close_matches(wanted, names, n=8, cutoff=0.4)
    shown = near + [name for name in names if name not in near]
    rest = ", …" if len(shown) > 8 else ""
    return f"the folder {folder.name!r} has {', '.join(shown[:8]) or 'nothing'}{rest}"


# Rows


def load_rows(source: str, *, split: str | None = None) -> Dataset:
    """Rows of a .jsonl, .ndjson, .json, .csv, .tsv or .parquet file, a folder (folders.py), `pkg:NAME/path`, a hub id.

    Local files touch no network and leave no cache. A hub id may carry a configuration after a colon
    (`owner/name:config`), and `split` chooses its split (`train` if there is one). CSV and TSV values stay strings.
    Raises UserError for anything that cannot be read, with the file and, where there is one, the line.
    """
    path = Path(resolve(source)).expanduser()
    if path.is_dir():
        return _from_folder(source, path, split)
    if path.suffix.lower() not in READERS and not path.exists():
        return _from_hub(source, split)
    if split is not None:
        raise UserError(f"a split ({split!r}) can be chosen for hub datasets only, {source!r} is a file")
    if not path.exists():
        raise UserError(f"the file {source!r} does not exist; {_nearby(path.absolute())}")
    return read_rows(path)


def _from_folder(source: str, path: Path, split: str | None) -> Dataset:
    if split is not None:
        raise UserError(f"a split ({split!r}) can be chosen for hub datasets only, {source!r} is a folder")
    found = read_folder(source, path)
    if found is None:
        raise UserError(
            f"{source!r} is a folder; give one of class folders with pictures, a dataset that was saved, or a file "
            f"in it: {_nearby(path / '*')}"
        )
    return found


def home(source: str) -> Path | None:
    """Where the paths in a source's rows start: its folder, or the folder that it is; None for a hub id."""
    path = Path(resolve(source)).expanduser()
    return path.absolute() if path.is_dir() else path.absolute().parent if path.exists() else None


def _from_hub(source: str, split: str | None) -> Dataset:
    import datasets

    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(f"the file {source!r} does not exist; {_nearby(Path(source).expanduser().absolute())}")
    name, _, config = source.partition(":")
    try:
        found = datasets.load_dataset(name, config or None, split=split)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{source!r} is neither a file (allowed: {', '.join(READERS)}) nor a hub dataset that loads: {reason}"
        ) from error
    if isinstance(found, Mapping):
        found = _one_split(source, found)
    if not len(found):
        raise UserError(f"{source!r} holds no rows")
    return found


def _one_split(source: str, splits: Mapping[str, Dataset]) -> Dataset:
    if "train" in splits:
        return splits["train"]
    if len(splits) == 1:
        return next(iter(splits.values()))
    raise UserError(f"{source!r} has no split 'train'; choose one of: {', '.join(splits)}")


# Columns


def columns(rows: Rows) -> list[str]:
    """The names that `column` accepts, as the first row shows them: `ideal`, `input`, `input.-1.content`, …"""
    names = rows.column_names if hasattr(rows, "column_names") else list(dict.fromkeys(k for row in rows for k in row))
    first = rows[0] if len(rows) else {}
    nested = (f"{name}.{inner}" for name in names for inner in _inner_names(first.get(name)))
    return list(dict.fromkeys([*names, *nested]))


def _inner_names(value: object) -> list[str]:
    if isinstance(value, Mapping):
        return [name for key, inner in value.items() for name in (key, *(f"{key}.{n}" for n in _inner_names(inner)))]
    if isinstance(value, list) and value and isinstance(value[-1], (Mapping, list)):
        return [f"-1.{name}" for name in _inner_names(value[-1])]
    return []


def column(rows: Rows, name: str) -> list[Any]:
    """One value a row; `name` may reach into dicts and lists ("input.-1.content"), a column of that name comes first.

    Raises UserError naming the nearest and all existing columns, or the row (from 1) that has no such part.
    """
    values = []
    for number, row in enumerate(_only(rows, name), start=1):
        try:
            values.append(cell(row, name))
        except KeyError as error:
            if number == 1:
                raise unknown("column", name, columns(rows)) from error
            raise UserError(f"row {number} has no {name!r}") from error
    return values


def _only(rows: Rows, name: str) -> Rows:
    """Of a dataset just the column that `name` starts from: the others need not be decoded."""
    if isinstance(rows, Sequence):
        return rows
    root = next((root for root in _roots(name) if root in rows.column_names), None)
    return rows if root is None else rows.select_columns([root])


def cell(row: Mapping[str, Any], name: str) -> Any:
    """The value of one row at a column name, nested or not. Raises KeyError."""
    for root in _roots(name):
        if root in row:
            return _walk(row[root], name[len(root) + 1 :])
    raise KeyError(name)


def _roots(name: str) -> list[str]:
    """The columns that a dotted name may start from, longest first: "a.b.c" -> a.b.c, a.b, a."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(len(parts), 0, -1)]


def _walk(value: Any, path: str) -> Any:
    for part in path.split(".") if path else []:
        try:
            value = value[int(part)] if isinstance(value, Sequence) and not isinstance(value, str) else value[part]
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise KeyError(part) from error
    return value


# Splits


def hold_out(rows: Rows, share: float, seed: int, text: Sequence[str]) -> tuple[list[int], list[int]]:
    """Row indices (train, held-out), ascending; about `share` of the rows (between 0 and 1) are held out.

    Rows whose `text` (one string a row) is equal after strip() land on one side. The same seed gives the same split.
    Raises UserError if a side would be empty.
    """
    assert len(rows) == len(text)
    if not 0 < share < 1:
        raise UserError(f"the held-out share must lie between 0 and 1, not {share}")
    groups: dict[str, list[int]] = {}
    for index, value in enumerate(text):
        groups.setdefault(value.strip(), []).append(index)
    if len(groups) < 2:
        raise UserError(f"{len(text)} rows with {len(groups)} different text cannot be split into train and held-out")
    held = _fill(list(groups.values()), max(1, round(share * len(text))), seed)
    return sorted(set(range(len(text))) - held), sorted(held)


def _fill(groups: list[list[int]], wanted: int, seed: int) -> set[int]:
    """Whole groups in random order, at most `wanted` rows; never none and never all."""
    random.Random(seed).shuffle(groups)
    held: set[int] = set()
    taken = 0
    for group in groups:
        if len(held) + len(group) <= wanted and taken < len(groups) - 1:
            held.update(group)
            taken += 1
    smallest = min(groups, key=len)
    return held or set(smallest)


def limit(items: Any, n: int | None, seed: int) -> Any:
    """At most `n` of the indices (a list) or rows (a dataset): a sample by the seed, in the order they had."""
    if n is not None and n < 1:
        raise UserError(f"the limit must be at least 1, not {n}")
    if n is None or len(items) <= n:
        return items
    chosen = sorted(random.Random(seed).sample(range(len(items)), n))
    return items.select(chosen) if hasattr(items, "select") else [items[index] for index in chosen]

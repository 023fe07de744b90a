"""Knows how the rows of a local file are read and where a broken one stands; refuses to know what the rows mean."""

from __future__ import annotations

import bisect
import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset


def read_rows(path: Path) -> Dataset:
    """The rows of a local file, in memory, by the suffix of its name; raises UserError with the file and line."""
    if path.suffix.lower() not in READERS:
        raise UserError(f"{str(path)!r} is of no known kind; allowed: {', '.join(READERS)}")
    try:
        rows = READERS[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except RecursionError as error:
        raise UserError(f"{path}: its values are nested too deeply") from error
    if not len(rows):
        raise UserError(f"{path} holds no rows")
    return rows


def _read_json_lines(path: Path) -> Dataset:
    return _table(path, _parse_lines(path, _text(path)))


def _read_json(path: Path) -> Dataset:
    """A list of objects, or one object a line."""
    text = _text(path)
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("["):
            raise _broken(path, error.lineno, error) from error
        return _table(path, _parse_lines(path, text))
    rows = found if isinstance(found, list) else [found]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{path}: item {number} is not an object with columns but {_shown(row)}")
    return _table(path, rows)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8-sig")


def _parse_lines(path: Path, text: str) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines() would cut at U+2028 inside strings
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise _broken(path, number, error) from error
        except RecursionError as error:
            raise UserError(f"{path}, line {number}: its values are nested too deeply") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: not an object with columns but {_shown(row)}")
        rows.append(row)
    return rows


def _broken(path: Path, line: int, error: json.JSONDecodeError) -> UserError:
    return UserError(f"{path}, line {line}: broken JSON ({error.msg} at column {error.colno})")


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:39] + "…"


def _table(path: Path, rows: list[dict[str, Any]]) -> Dataset:
    """Rows as a dataset; a key that a row lacks is None there (`Dataset.from_list` sees the first row's keys only)."""
    import datasets
    import pyarrow

    names = list(dict.fromkeys(name for row in rows for name in row))
    try:
        return datasets.Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})
    except (pyarrow.ArrowException, UnicodeEncodeError, OverflowError) as error:
        raise _unfit(path, rows, names) from error


def _unfit(path: Path, rows: list[dict[str, Any]], names: list[str]) -> UserError:
    """Names the column whose values do not make one column, and the first row that does not go with those above it."""
    for name in names:
        values = [row.get(name) for row in rows]
        if reason := _misfit(values):
            number = bisect.bisect_left(range(len(values)), True, key=lambda count: bool(_misfit(values[:count])))
            return UserError(
                f"{path}: column {name!r} does not hold one kind of value in all rows; row {number}: {reason}"
            )
    return UserError(f"{path}: the rows do not make a table")


def _misfit(values: list[Any]) -> str:
    """Why values do not make one column; empty if they do."""
    import pyarrow

    try:
        pyarrow.array(values)
    except (pyarrow.ArrowException, UnicodeEncodeError, OverflowError) as error:
        return str(error).partition("\n")[0]
    return ""


def _read_separated(path: Path, delimiter: str) -> Dataset:
    """CSV with a header line; values stay strings, so that the label 01 or NA is not taken for something else."""
    before = csv.field_size_limit(sys.maxsize)  # the default refuses texts over 128 KiB
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            header = next(reader, [])
            if repeated := sorted({name for name in header if header.count(name) > 1}):
                raise UserError(f"{path}: the header names {repeated[0]!r} twice")
            return _table(path, [_row(path, reader.line_num, header, cells) for cells in reader if cells])
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: broken CSV ({error})") from error
    finally:
        csv.field_size_limit(before)


def _row(path: Path, line: int, header: list[str], cells: list[str]) -> dict[str, Any]:
    if len(cells) != len(header):
        raise UserError(f"{path}, line {line}: {len(cells)} values, but the header has {len(header)} columns")
    return dict(zip(header, cells, strict=True))


def _read_parquet(path: Path) -> Dataset:
    import datasets
    import pyarrow
    import pyarrow.parquet

    try:
        return datasets.Dataset(pyarrow.parquet.read_table(path))
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is not a readable Parquet file ({str(error).partition(chr(10))[0]})") from error


READERS: dict[str, Callable[[Path], Dataset]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": lambda path: _read_separated(path, ","),
    ".tsv": lambda path: _read_separated(path, "\t"),
    ".parquet": _read_parquet,
}

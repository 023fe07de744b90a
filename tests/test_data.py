"""Files, columns and splits: what is read, and one clear sentence for each thing that cannot be."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from trimtab.data import cell, column, columns, hold_out, limit, load_rows, resolve
from trimtab.errors import UserError

ROWS = [
    {"text": "好看的电影", "label": "正面"},
    {"text": 'say "no", twice', "label": "01"},
    {"text": "NA", "label": "NA"},
]
CHAT = [
    {"input": [{"role": "system", "content": "s"}, {"role": "user", "content": "eins"}], "ideal": "1"},
    {"input": [{"role": "user", "content": "zwei", "name": "n"}], "ideal": "0"},
]


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable package with a data file, whose import would fail; and a secret next to it."""
    root = tmp_path / "site" / "tt_parcel"
    (root / "data").mkdir(parents=True)
    (root / "__init__.py").write_text("raise RuntimeError('imported')")
    write(root / "data", "samples.jsonl", lines(ROWS))
    write(tmp_path / "site", "secret.jsonl", lines(ROWS))
    write(tmp_path / "site", "tt_single.py", "raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    return root


# resolve


def test_resolve_finds_files_and_folders_without_importing(package: Path) -> None:
    assert resolve("pkg:tt_parcel/data/samples.jsonl") == str((package / "data" / "samples.jsonl").resolve())
    assert resolve("pkg:tt_parcel/data") == str((package / "data").resolve())
    assert "tt_parcel" not in sys.modules
    assert resolve("owner/name") == "owner/name"
    assert resolve("./x.jsonl") == "./x.jsonl"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("pkg:tt_not_there/x", "'tt_not_there' is not installed"),
        ("pkg:tt_parcel/data/sample.jsonl", "the folder 'data' has samples.jsonl"),
        ("pkg:tt_parcel/dat/samples.jsonl", "the folder 'tt_parcel' has data/"),
        ("pkg:tt_parcel/../secret.jsonl", "leads out of the package"),
        ("pkg:tt_parcel/../nothing.jsonl", "leads out of the package"),
        ("pkg:tt_parcel/data/../../secret.jsonl", "leads out of the package"),
        ("pkg:tt_parcel//etc/hostname", "leads out of the package"),
        ("pkg:tt_single/x", "single module"),
        ("pkg:../x", "not the name of a Python package"),
    ],
)
def test_resolve_errors(package: Path, source: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(source)


def test_a_link_out_of_the_package_is_refused(package: Path) -> None:
    os.symlink(package.parent / "secret.jsonl", package / "data" / "link.jsonl")
    with pytest.raises(UserError, match="leads out of the package"):
        resolve("pkg:tt_parcel/data/link.jsonl")


def test_pips_name_leads_to_pythons_name() -> None:
    with pytest.raises(UserError, match=r"installs .*yaml"):
        resolve("pkg:PyYAML/x")
    with pytest.raises(UserError, match=r"installs .*huggingface_hub"):
        resolve("pkg:huggingface-hub/x")


# load_rows


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", lines(ROWS)),
        ("a.jsonl", "\ufeff" + lines(ROWS).replace("\n", "\r\n\r\n")),
        ("a.NDJSON", lines(ROWS).rstrip("\n")),
        ("a.json", json.dumps(ROWS, indent=2)),
        ("a.json", lines(ROWS)),
        ("a.csv", 'text,label\n好看的电影,正面\n"say ""no"", twice",01\nNA,NA\n'),
        ("a.tsv", '\ufefftext\tlabel\r\n好看的电影\t正面\r\n"say ""no"", twice"\t01\r\nNA\tNA\r\n'),
    ],
)
def test_each_text_format_gives_the_same_rows(tmp_path: Path, name: str, text: str) -> None:
    assert load_rows(write(tmp_path, name, text)).to_list() == ROWS


def test_parquet(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert load_rows(str(tmp_path / "a.parquet")).to_list() == ROWS
    with pytest.raises(UserError, match="not a readable Parquet file"):
        load_rows(write(tmp_path, "b.parquet", "text"))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS).slice(0, 0), tmp_path / "c.parquet")
    with pytest.raises(UserError, match="holds no rows"):
        load_rows(str(tmp_path / "c.parquet"))


def test_a_row_without_a_key_has_none_there(tmp_path: Path) -> None:
    rows = load_rows(write(tmp_path, "a.jsonl", '{"a": 1}\n{"b": "x"}\n'))
    assert rows.to_list() == [{"a": 1, "b": None}, {"a": None, "b": "x"}]


def test_line_separators_inside_strings_do_not_end_a_json_line(tmp_path: Path) -> None:
    text = "one\u2028two\u0085three"
    assert load_rows(write(tmp_path, "a.jsonl", lines([{"text": text}])))["text"][0] == text


def test_long_csv_values_and_values_with_line_breaks(tmp_path: Path) -> None:
    long = "x" * 200_000
    rows = load_rows(write(tmp_path, "a.csv", f'text,label\n"{long}\nmore",a\n'))
    assert rows[0] == {"text": long + "\nmore", "label": "a"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a": \n', r"a\.jsonl, line 3: broken JSON"),
        ("a.jsonl", '{"a": 1}\n[1, 2]\n', r"a\.jsonl, line 2: not an object with columns but \[1, 2\]"),
        ("a.jsonl", '{"a": 1}\n{"a": ' + "[" * 100_000, r"a\.jsonl, line 2: its values are nested too deeply"),
        ("a.jsonl", '{"a": ' + "[" * 400 + "]" * 400 + "}", r"a\.jsonl: its values are nested too deeply"),
        ("a.json", "[" * 100_000, r"a\.json: its values are nested too deeply"),
        ("a.json", '[\n{"a": 1},\n{"a" 2}\n]', r"a\.json, line 3: broken JSON"),
        ("a.json", '{"a": 1}\n{"a": \n', r"a\.json, line 2: broken JSON"),
        ("a.json", '[{"a": 1}, 7]', r"a\.json: item 2 is not an object"),
        ("a.jsonl", '{"n": 1, "a": 1}\n{"n": 2, "a": "x"}\n', r"a\.jsonl: column 'a' does not hold one kind of value"),
        ("a.jsonl", '{"a": "\\ud800"}\n', r"column 'a' does not hold"),
        ("a.csv", "a,b\n1,2\n3\n", r"a\.csv, line 3: 1 values, but the header has 2"),
        ("a.csv", 'a,b\n1,"2\n3,4\n', r"a\.csv, line 3: broken CSV"),
        ("a.csv", "a,a\n1,2\n", r"a\.csv: the header names 'a' twice"),
        ("a.txt", "text", r"no known kind; allowed: \.jsonl"),
        *((name, "", "holds no rows") for name in ("a.jsonl", "a.csv", "a.tsv")),
        *((name, text, "holds no rows") for name, text in (("a.json", "[]"), ("b.jsonl", "\n\n"), ("a.csv", "a,b\n"))),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_rows(write(tmp_path, name, text))


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("text,label\n电影,好\n".encode("gbk"))
    with pytest.raises(UserError, match="not UTF-8"):
        load_rows(str(tmp_path / "a.csv"))


def test_missing_files_name_their_neighbours(tmp_path: Path) -> None:
    write(tmp_path, "train.jsonl", lines(ROWS))
    with pytest.raises(UserError, match=r"does not exist; the folder .* has train\.jsonl"):
        load_rows(str(tmp_path / "trian.jsonl"))
    with pytest.raises(UserError, match=r"does not exist"):
        load_rows(str(tmp_path / "trian"))
    with pytest.raises(UserError, match=r"is a folder; .*train\.jsonl"):
        load_rows(str(tmp_path))
    with pytest.raises(UserError, match="hub datasets only"):
        load_rows(str(tmp_path / "train.jsonl"), split="test")


def test_local_files_touch_no_network_and_leave_nothing_behind(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    write(tmp_path, "a.csv", "text,label\na,b\n")
    before = sorted(tmp_path.rglob("*"))
    assert load_rows("pkg:tt_parcel/data/samples.jsonl").to_list() == ROWS
    rows = load_rows(str(tmp_path / "a.csv"))
    assert rows.select([0]).to_list() == [{"text": "a", "label": "b"}]
    assert rows.cache_files == []
    assert sorted(tmp_path.rglob("*")) == before


def test_hub_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    train, test = (datasets.Dataset.from_list([{"text": name}]) for name in ("train", "test"))

    def load(name: str, config: str | None, split: str | None) -> Any:
        calls.append((name, config, split))
        if name == "nobody/nothing":
            raise ConnectionError("cannot reach\nthe hub")
        both = datasets.DatasetDict({"train": train, "test": test})
        return both[split] if split else both if name == "o/two" else datasets.DatasetDict({"a": test, "b": test})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_rows("o/two")["text"][0] == "train"
    assert load_rows("o/two:conf", split="test")["text"][0] == "test"
    assert calls == [("o/two", None, None), ("o/two", "conf", "test")]
    with pytest.raises(UserError, match="no split 'train'; choose one of: a, b"):
        load_rows("o/odd")
    with pytest.raises(UserError, match=r"neither a file .* nor a hub dataset that loads: cannot reach$"):
        load_rows("nobody/nothing")


# column


@pytest.mark.parametrize("rows", [CHAT, datasets.Dataset.from_list(CHAT)], ids=["list", "dataset"])
def test_nested_columns(rows: Any) -> None:
    assert column(rows, "ideal") == ["1", "0"]
    assert column(rows, "input.-1.content") == ["eins", "zwei"]
    assert column(rows, "input.0.role") == ["system", "user"]
    with pytest.raises(UserError, match=r"'inputs' does not exist; did you mean 'input'"):
        column(rows, "inputs")
    with pytest.raises(UserError, match=r"did you mean 'input.-1.content'\? allowed: input, ideal, "):
        column(rows, "input.-1.contents")
    with pytest.raises(UserError, match=r"'ideal\.x' does not exist"):
        column(rows, "ideal.x")


def test_a_column_with_dots_in_its_name_comes_first() -> None:
    rows = [{"a.b": 1, "a": {"b": 2, "c": 3}, "a.d": {"e": 4}}]
    assert column(rows, "a.b") == [1]
    assert column(rows, "a.c") == [3]
    assert column(rows, "a.d.e") == [4]
    assert column(datasets.Dataset.from_list(rows), "a.b") == [1]
    assert columns(rows) == ["a.b", "a", "a.d", "a.c", "a.d.e"]


def test_the_row_that_lacks_a_part_is_named() -> None:
    rows = [{"m": [{"x": 1}, {"x": 2}]}, {"m": [{"x": 1}]}]
    assert column(rows, "m.-1.x") == [2, 1]
    with pytest.raises(UserError, match=r"row 2 has no 'm\.-2\.x'"):
        column(rows, "m.-2.x")
    with pytest.raises(UserError, match=r"row 2 has no 'm\.-1\.x'"):
        column([rows[0], {"m": []}], "m.-1.x")


def test_cell() -> None:
    assert cell({"a": None}, "a") is None
    for name in ("b", "a.b", "a.0"):
        with pytest.raises(KeyError):
            cell({"a": "text"}, name)


# hold_out and limit


def test_hold_out_keeps_duplicates_together_and_the_share() -> None:
    text = [f"text {number % 700}" + " " * (number % 3) for number in range(1000)]
    train, held = hold_out(text, 0.2, 1, text)
    assert sorted(train + held) == list(range(1000))
    assert not {text[index].strip() for index in train} & {text[index].strip() for index in held}
    assert 195 <= len(held) <= 200
    assert (train, held) == hold_out(text, 0.2, 1, text)
    assert held != hold_out(text, 0.2, 2, text)[1]


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("text", [["a", "b"], ["a"] * 9 + ["b"], ["a", "b", "b ", "c", "c", "c"]])
def test_both_sides_have_a_row(share: float, text: list[str]) -> None:
    for seed in range(5):
        train, held = hold_out(text, share, seed, text)
        assert train and held and sorted(train + held) == list(range(len(text)))
        assert not {text[index].strip() for index in train} & {text[index].strip() for index in held}


def test_hold_out_that_cannot_be() -> None:
    with pytest.raises(UserError, match="3 rows with 1 different text"):
        hold_out(["a", "a ", "a"], 0.5, 0, ["a", "a ", "a"])
    for share in (0, 1, -0.1, 2):
        with pytest.raises(UserError, match="between 0 and 1"):
            hold_out(["a", "b"], share, 0, ["a", "b"])


def test_limit() -> None:
    first = limit(list(range(100)), 10, 3)
    assert first == sorted(set(first)) and len(first) == 10
    assert first == limit(range(100), 10, 3) != limit(range(100), 10, 4)
    assert limit([5, 6], 2, 0) == [5, 6] and limit([5, 6], None, 0) == [5, 6]
    rows = datasets.Dataset.from_list([{"n": number} for number in range(100)])
    assert list(limit(rows, 10, 3)["n"]) == first
    with pytest.raises(UserError, match="at least 1"):
        limit([5, 6], 0, 0)

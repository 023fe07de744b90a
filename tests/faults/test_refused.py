"""A full disk, a limit on bytes, a read-only folder: one sentence, and the old state is as it was."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from faults.moments import LONG, SAID, At, changes, chosen, inside, refuse
from faults.test_killed import _adapter, _check, _state, _train
from trimtab.checkpoint import WEIGHTS


def test_a_full_disk_at_any_change_of_a_save(tmp_path: Path, record_property: Callable) -> None:
    old, new = _adapter(1), _adapter(2)
    clean = old.save(tmp_path / "clean")
    shutil.copytree(clean, tmp_path / "counted")
    count = changes(lambda: new.save(tmp_path / "counted"), tmp_path / "counted")
    seen = []
    for number in range(1, count + 1):
        folder = tmp_path / f"full{number}"
        shutil.copytree(clean, folder)
        code = inside(lambda folder=folder, n=number: (At(folder, n, refuse), new.save(folder)))
        seen.append((code, _state(folder)))
    assert all(code in (SAID, 0) for code, _ in seen)
    assert all(state == 2 for code, state in seen if code == 0) and SAID in {code for code, _ in seen}
    limits = random.Random(0).sample(range((clean / WEIGHTS).stat().st_size), 40 if LONG else 5)
    for limit in limits:  # which native writers meet as well
        folder = tmp_path / f"cut{limit}"
        shutil.copytree(clean, folder)
        assert inside(lambda folder=folder: new.save(folder), limit, die=False) == SAID
        assert _state(folder) == 1
    record_property("trials", count + len(limits))


def test_a_full_disk_in_a_run(tmp_path: Path, record_property: Callable) -> None:
    """The sentence, or (where only the cache was refused) a run that goes on; and no broken checkpoint."""
    (tmp_path / "counted" / "run").mkdir(parents=True)
    count = changes(lambda: _train(tmp_path / "counted"), tmp_path / "counted")
    numbers = chosen(count, 3) if not LONG else list(range(1, count + 1, 1 + count // 60))
    codes = []
    for number in numbers:
        folder = tmp_path / f"full{number}"
        (folder / "run").mkdir(parents=True)
        codes.append(inside(lambda folder=folder, n=number: (At(folder, n, refuse), _train(folder))))
        _check(folder)
    assert set(codes) <= {0, SAID} and SAID in codes, codes
    record_property("trials", len(numbers))


@pytest.mark.xfail(reason="open: with files of at most 2,000 bytes a run ends in another exception than a UserError")
def test_a_limit_on_bytes_in_a_run(tmp_path: Path, record_property: Callable) -> None:
    limits = (300, 2000, 6000, 9000, 14000) if LONG else (2000,)
    for limit in limits:
        folder = tmp_path / f"cut{limit}"
        (folder / "run").mkdir(parents=True)
        assert inside(lambda folder=folder: _train(folder), limit, die=False) == SAID
        _check(folder)
    record_property("trials", len(limits))


@pytest.mark.parametrize("what", ["adapter", "run"])
def test_a_read_only_folder(tmp_path: Path, what: str) -> None:
    (tmp_path / "run").mkdir()
    adapter = _adapter(1)
    for parent in [tmp_path, *tmp_path.parents]:  # for whom root becomes
        if parent.stat().st_uid == os.getuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    (tmp_path / "run").chmod(0o555)
    tmp_path.chmod(0o555)

    def work() -> None:
        if os.getuid() == 0:
            os.setuid(65534)
        if what == "adapter":
            adapter.save(tmp_path / "run")
        else:
            _train(tmp_path)

    try:
        assert inside(work) == SAID
    finally:
        tmp_path.chmod(0o755)
    assert not list((tmp_path / "run").iterdir())

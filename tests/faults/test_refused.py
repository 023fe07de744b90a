"""A full disk, a limit on bytes, a read-only folder: one sentence, and the old state is as it was."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

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


def test_a_limit_on_bytes_in_a_run(tmp_path: Path, record_property: Callable) -> None:
    limits = (300, 2000, 6000, 9000, 14000) if LONG else (2000,)
    for limit in limits:
        folder = tmp_path / f"cut{limit}"
        (folder / "run").mkdir(parents=True)
        assert inside(lambda folder=folder: _train(folder), limit, die=False) == SAID
        _check(folder)
    record_property("trials", len(limits))


def test_a_read_only_folder(tmp_path: Path) -> None:
    """An adapter and a run, one after the other: the parents' modes are changed for both."""
    (tmp_path / "run").mkdir()
    adapter = _adapter(1)
    own = [path for path in tmp_path.parents if path != Path("/") and path.stat().st_uid == os.getuid()]
    modes = {path: path.stat().st_mode for path in own}
    for path, mode in modes.items():  # for whom root becomes
        path.chmod(mode | 0o055)
    (tmp_path / "run").chmod(0o555)
    tmp_path.chmod(0o555)

    def without_rights(work: Callable[[], object]) -> None:
        if os.getuid() == 0:
            os.setuid(65534)
        assert (tmp_path / "run").is_dir()  # the folder is seen, and may not be written
        work()

    try:
        for work in (lambda: adapter.save(tmp_path / "run"), lambda: _train(tmp_path)):
            assert inside(lambda work=work: without_rights(work)) == SAID
    finally:
        for path, mode in modes.items():
            path.chmod(mode)
        tmp_path.chmod(0o755)
    assert not list((tmp_path / "run").iterdir())

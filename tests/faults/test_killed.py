"""kill -9 at every moment: the old state or the new one, never a mixture, and a resumed run ends at the same loss."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab as tt
from faults.moments import KILLED, LONG, OUT_OF_BYTES, At, changes, chosen, inside, kill, killed_after
from test_train import examples, losses, make
from tiny import attached, tiny
from trimtab.checkpoint import WEIGHTS, atomic_folder
from trimtab.snapshots import checkpoints, read_about, sweep
from trimtab.store import Store

RUN: dict[str, Any] = dict(save_strategy="steps", save_steps=4, save_total_limit=1, num_train_epochs=3)


def _adapter(value: float) -> tt.Adapter:
    """LoRA all of whose tensors hold one number."""
    adapter = tt.attach(tiny("llama"), f"lora[r=2,alpha={value:g}]")
    for parameter in adapter.parameters():
        parameter.data.fill_(value)
    return adapter


def _state(folder: Path) -> float:
    """The number that a folder's adapter holds, in its configuration and in every tensor."""
    adapter = tt.load(tiny("llama"), folder)
    (value,) = {float(one) for tensor in adapter.state_dict().values() for one in tensor.unique()}
    assert adapter.method.alpha == value  # type: ignore[attr-defined]
    return value


def test_a_save_over_another_is_the_old_or_the_new(tmp_path: Path, record_property: Callable) -> None:
    old, new = _adapter(1), _adapter(2)
    clean = old.save(tmp_path / "clean")
    shutil.copytree(clean, tmp_path / "counted")
    count = changes(lambda: new.save(tmp_path / "counted"), tmp_path / "counted")
    seen = []
    for number in chosen(count, 30):
        folder = tmp_path / f"killed{number}"
        shutil.copytree(clean, folder)
        assert inside(lambda folder=folder, n=number: (At(folder, n, kill), new.save(folder))) == KILLED
        seen.append(_state(folder))
        new.save(folder)  # what a killed save left is in nobody's way
        assert _state(folder) == 2
    assert seen == sorted(seen) and set(seen) == {1, 2}  # one step from the old to the new
    size = (clean / WEIGHTS).stat().st_size
    limits = random.Random(0).sample(range(size), 40 if LONG else 5)
    for limit in limits:
        folder = tmp_path / f"cut{limit}"
        shutil.copytree(clean, folder)
        assert inside(lambda folder=folder: new.save(folder), limit) == OUT_OF_BYTES
        assert _state(folder) == 1
    record_property("trials", len(seen) + len(limits))


def test_a_folder_over_another_is_the_old_or_the_new(tmp_path: Path, record_property: Callable) -> None:
    def fill(folder: Path, text: str) -> None:
        for name in "abc":
            (folder / name).write_text(text)

    def once(root: Path) -> None:
        atomic_folder(root / "model", lambda folder: fill(folder, "new"), overwrite=True)

    def begun(name: str) -> Path:
        (tmp_path / name / "model").mkdir(parents=True)
        fill(tmp_path / name / "model", "old")
        return tmp_path / name

    root = begun("counted")
    count = changes(lambda: once(root), root)
    seen = []
    for number in range(1, count + 1):
        root = begun(str(number))
        assert inside(lambda root=root, n=number: (At(root, n, kill), once(root))) == KILLED
        (state,) = {(root / "model" / name).read_text() for name in "abc"}
        seen.append(state)
    assert seen == sorted(seen, reverse=True) and set(seen) == {"old", "new"}
    record_property("trials", count)


def _train(folder: Path, resume: bool = False) -> float:
    """Trains with a cache folder; the last loss."""
    with_cache = Store(1 << 20, folder / "cache", {"of": "this test"})
    trainer = make(folder / "run", method="lora[layers=-1:]", log_file=folder / "run" / "log.jsonl", **RUN)
    trainer.store = with_cache
    try:
        trainer.train(resume_from_checkpoint=resume)
    finally:
        with_cache.close()
    return losses(trainer)[-1]


def _check(folder: Path) -> None:
    """Every checkpoint that has its name is whole."""
    for path in checkpoints(folder / "run"):
        read_about(path)
    log = folder / "run" / "log.jsonl"
    if log.is_file():
        for line in log.read_text().splitlines(keepends=True):
            assert not line.endswith("\n") or json.loads(line)["step"]


@pytest.fixture
def whole(tmp_path: Path) -> float:
    """The last loss of a run that nothing happens to."""
    torch.set_num_threads(1)
    assert examples()
    (tmp_path / "whole" / "run").mkdir(parents=True)
    return _train(tmp_path / "whole")


def _resumes(folder: Path, whole: float) -> None:
    _check(folder)
    sweep(folder / "run")
    assert abs(_train(folder, resume=True) - whole) <= 1e-5
    shutil.rmtree(folder)


def test_a_run_killed_at_a_change_of_the_disk_resumes(tmp_path: Path, whole: float, record_property: Callable) -> None:
    (tmp_path / "counted" / "run").mkdir(parents=True)
    count = changes(lambda: _train(tmp_path / "counted"), tmp_path / "counted")
    trials = chosen(count, 3) if not LONG else list(range(1, count + 1, 1 + count // 100))
    for number in trials:
        folder = tmp_path / f"killed{number}"
        (folder / "run").mkdir(parents=True)
        assert inside(lambda folder=folder, n=number: (At(folder, n, kill), _train(folder))) == KILLED
        _resumes(folder, whole)
    record_property("trials", len(trials))


def test_a_run_killed_at_any_time_resumes(tmp_path: Path, whole: float, record_property: Callable) -> None:
    chance, killed = random.Random(1), 0
    for trial in range(30 if LONG else 1):
        folder = tmp_path / f"killed{trial}"
        (folder / "run").mkdir(parents=True)
        killed += killed_after(lambda folder=folder: _train(folder), chance.uniform(0.05, 1.0)) == KILLED
        _resumes(folder, whole)
    assert killed
    record_property("trials", killed)


def test_a_cache_killed_while_it_fills_gives_right_rows_or_none(tmp_path: Path, record_property: Callable) -> None:
    rows = {f"row{at}": torch.full((at % 5 + 1, 6), float(at)) for at in range(40)}

    def fill(folder: Path) -> None:
        store = Store(1 << 20, folder, {})
        for at, (key, states) in enumerate(rows.items()):
            store.put(key, 0, states)
            if at % 8 == 7:
                store.commit()
        store.close()

    count = changes(lambda: fill(tmp_path / "counted"), tmp_path / "counted")
    works: list[tuple[Any, int | None]] = [(number, None) for number in chosen(count, 12)]
    works += [(0, limit) for limit in random.Random(2).sample(range(1, 2800), 60 if LONG else 6)]
    for number, limit in works:
        folder = tmp_path / f"{number}-{limit}"
        assert inside(lambda folder=folder, n=number: (At(folder, n, kill), fill(folder)), limit) < 0
        store = Store(1 << 20, folder, {})
        for key, states in rows.items():
            found = store.get(key, 0)
            assert found is None or torch.equal(found, states)
            store.put(key, 0, states)
            assert torch.equal(store.get(key, 0), states)  # type: ignore[arg-type]
        store.close()
    record_property("trials", len(works))


def test_the_helpers_see_a_difference() -> None:
    assert inside(lambda: None) == 0 and inside(kill) == KILLED
    assert attached("llama", "lora[r=2]").active

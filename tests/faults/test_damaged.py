"""Bytes cut off and bits flipped, anywhere in a file: noticed in one sentence, or without any effect."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import trimtab as tt
from faults.moments import LONG
from faults.test_killed import RUN, _adapter, make
from tiny import tiny
from trimtab.checkpoint import CONFIG, WEIGHTS
from trimtab.snapshots import checkpoints
from trimtab.store import Store

MUTATIONS = 400 if LONG else 25


def mutated(content: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """Copies of a file, each cut short, or with a bit of its first 1,000 bytes or of any byte the other way."""
    chance = random.Random(seed)
    for at in range(count):
        if at % 4 == 0:
            yield content[: chance.randrange(len(content))]
            continue
        copied = bytearray(content)
        copied[chance.randrange(min(1000, len(content)) if at % 4 == 1 else len(content))] ^= 1 << chance.randrange(8)
        yield bytes(copied)


def test_an_adapters_tensors(tmp_path: Path, record_property: Callable) -> None:
    folder = _adapter(1).save(tmp_path / "adapter")
    content = (folder / WEIGHTS).read_bytes()
    model = tiny("llama")
    for other in mutated(content, MUTATIONS):
        (folder / WEIGHTS).write_bytes(other)
        try:
            tt.load(model, folder).detach()
            raise AssertionError("the damage went unnoticed")
        except tt.UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
    record_property("trials", MUTATIONS)


def test_an_adapters_configuration(tmp_path: Path, record_property: Callable) -> None:
    folder = _adapter(1).save(tmp_path / "adapter")
    content = (folder / CONFIG).read_bytes()
    model, noticed = tiny("llama"), 0
    expected = {key: tensor.clone() for key, tensor in _adapter(1).state_dict().items()}
    for other in mutated(content, MUTATIONS):
        (folder / CONFIG).write_bytes(other)
        try:
            adapter = tt.load(model, folder)
        except tt.UserError:
            noticed += 1
        else:
            assert all(torch.equal(tensor, expected[key]) for key, tensor in adapter.state_dict().items())
            assert adapter.method == _adapter(1).method
            adapter.detach()
    assert noticed > MUTATIONS // 2
    record_property("trials", MUTATIONS)


def test_a_checkpoint(tmp_path: Path, record_property: Callable) -> None:
    trainer = make(tmp_path, **{**RUN, "num_train_epochs": 1})
    trainer.train()
    (clean,) = checkpoints(tmp_path)
    files = sorted(path.name for path in clean.iterdir() if path.name != "checksums.json")
    each = max(3, MUTATIONS // len(files))
    for at, name in enumerate(files):
        content = (clean / name).read_bytes()
        for other in mutated(content, each, at):
            (clean / name).write_bytes(other)
            try:
                trainer._load_from_checkpoint(str(clean))
                raise AssertionError(f"the damage of {name} went unnoticed")
            except tt.UserError as error:
                assert name in str(error)
        (clean / name).write_bytes(content)
    trainer._load_from_checkpoint(str(clean))
    record_property("trials", each * len(files))


def test_a_cache(tmp_path: Path, record_property: Callable) -> None:
    rows = {f"row{at}": torch.randn(at % 5 + 1, 6) for at in range(20)}
    store = Store(1 << 20, tmp_path / "clean", {})
    for key, states in rows.items():
        store.put(key, 1, states)
    store.close()
    names = [path.name for path in (tmp_path / "clean").iterdir() if path.suffix in (".bin", ".json")]
    assert len(names) == 2
    for name in names:
        content = (tmp_path / "clean" / name).read_bytes()
        for other in mutated(content, MUTATIONS // 2):
            shutil.copytree(tmp_path / "clean", tmp_path / "hurt")
            (tmp_path / "hurt" / name).write_bytes(other)
            again = Store(1 << 20, tmp_path / "hurt", {})
            for key, states in rows.items():
                found = again.get(key, 1)
                assert found is None or torch.equal(found, states)
            again.close()
            shutil.rmtree(tmp_path / "hurt")
    record_property("trials", 2 * (MUTATIONS // 2))

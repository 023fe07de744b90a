"""The vision benchmark: no digit on two sides, rates chosen by the dev digits alone, a page of what there is."""

from __future__ import annotations

import dataclasses
import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import benchmarks.vision as module
from benchmarks.fashion import idx
from benchmarks.pages import fill
from benchmarks.vision import ROOT, Cell, best_of, chosen, digits, goal_lines, planned, report, run_plan, sides
from trimtab.cells import keep, known
from trimtab.data import load_rows


def figures(dev: float, test: float, trained: int = 100, loss: float = 1.0) -> dict[str, Any]:
    return {
        "dev_accuracy": dev, "dev_loss": loss, "test_accuracy": test, "test_loss": 1.0, "trained": trained,
        "seconds": 2.0, "bytes": 9,
    }  # fmt: skip


def test_an_idx_file_is_read_as_it_is_defined(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    file = tmp_path / "a.gz"
    file.write_bytes(gzip.compress(struct.pack(">HBB3I", 0, 8, 3, 2, 3, 4) + values.tobytes()))
    assert np.array_equal(idx(file), values)
    file.write_bytes(gzip.compress(struct.pack(">HBB1I", 0, 9, 1, 2) + b"ab"))
    with pytest.raises(SystemExit, match="no bytes in MNIST's format"):
        idx(file)


def test_a_digit_is_on_one_side(tmp_path: Path) -> None:
    cell = Cell("", "", 0.0, 0, "", train=40, dev=10, test=20)
    found = sides(tmp_path, cell)
    pictures, classes = digits()
    assert [len(load_rows(found[side])) for side in ("train", "dev", "test")] == [40, 10, 20]
    rows = load_rows(found["dev"])
    names = {int(Path(path).stem): label for path, label in zip(rows["image"], rows["label"], strict=True)}
    assert names == {at: str(classes[40 + at]) for at in range(10)}
    assert pictures.max() == 255 and pictures.min() == 0
    assert sides(tmp_path, cell) == found


def test_the_rate_is_chosen_by_the_first_seed_and_the_dev_digits() -> None:
    cells = planned("base", quick=False)["lora"]
    results = {cell: figures(0.9, 0.99) for cell in cells}
    assert chosen(cells, dict(list(results.items())[1:])) is None
    results[cells[1]] = figures(0.95, 0.1)
    assert chosen(cells, results) == cells[1] and cells[1].lr == 1e-2
    results[cells[0]] = figures(0.95, 0.9, loss=0.5)
    assert chosen(cells, results) == cells[0]
    results[cells[3]] = figures(1.0, 1.0)  # another seed chooses nothing
    assert chosen(cells, results) == cells[0]


def test_only_the_chosen_rate_runs_with_the_other_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Cell] = []

    def pretend(folder: Path, cell: Cell) -> dict[str, Any]:
        made.append(cell)
        return figures(cell.lr, 0.5)

    monkeypatch.setattr(module, "run", pretend)
    plan = planned("base", quick=False)
    assert run_plan(tmp_path, plan) == 0
    assert len(made) == 2 * len(plan) + 2 * len(plan)
    assert all(cell.lr == max(one.lr for one in plan[cell.entry]) for cell in made if cell.seed)
    made.clear()
    assert run_plan(tmp_path, plan) == 0 and not made
    other = {name: [dataclasses.replace(cell, base="new") for cell in cells] for name, cells in plan.items()}
    run_plan(tmp_path, other)
    assert len(made) == 4 * len(plan)


def test_the_page_has_a_place_for_everything(tmp_path: Path) -> None:
    plan = planned("base", quick=False)
    for name, cells in plan.items():
        for cell in cells:
            full = name == "full"
            if cell.lr == cells[0].lr and not (name == "head" and cell.seed == 2):
                keep(tmp_path, cell, figures(0.99, 0.97 if full else 0.962, 1000 if full else 40))
            elif cell.seed == 0:
                keep(tmp_path, cell, figures(0.5, 1.0))
    results = known(tmp_path, [cell for cells in plan.values() for cell in cells])
    pretrained = {
        "accuracy": 0.9,
        "epochs": 4.0,
        "seconds": 120.0,
        "total": 460_000,
        "learned": 20_000,
        "tested": 2_000,
    }
    blocks = report(plan, results, pretrained)
    page = fill((ROOT / "docs/vision.md").read_text(encoding="utf-8"), blocks, "vision.md")
    assert "| `lora[r=4,targets=q,k,v,o]` | 40 | 40 | 4.0% | 0.003 | 99.0 ± 0.0 | 96.2 ± 0.0 | 2 |" in page
    assert "head has 2 of 3 seeds." in page and "90.0% of 2,000 of Fashion-MNIST" in page
    assert "- lora within a point of full with at most 5% of its parameters: **yes** (-0.8 points, 4.0%)" in page
    assert report(planned("other", quick=False), {}, None)["goal"] == ["Full fine-tuning has no result yet."]


@pytest.mark.parametrize(("accuracy", "trained", "said"), [(0.9595, 40, "no"), (0.9605, 40, "yes"), (0.97, 60, "no")])
def test_the_goal_is_a_point_and_a_twentieth(accuracy: float, trained: int, said: str) -> None:
    plan = {name: cells for name, cells in planned("base", quick=False).items() if name in ("full", "lora")}
    results = {cell: figures(0.9, 0.97, 1000) for cell in plan["full"] if cell.lr == plan["full"][0].lr}
    results |= {cell: figures(0.9, accuracy, trained) for cell in plan["lora"] if cell.lr == plan["lora"][0].lr}
    results |= {cell: figures(0.1, 1.0) for cells in plan.values() for cell in cells if cell not in results}
    (line,) = goal_lines(best_of(plan, results), results)
    assert f"**{said}**" in line

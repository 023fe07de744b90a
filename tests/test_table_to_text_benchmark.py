"""The table-to-text benchmark: no table on two sides, rates chosen by dev loss alone, a page of what there is."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import benchmarks.table_to_text as module
from benchmarks.pages import fill
from benchmarks.table_to_text import (
    ROOT,
    Cell,
    Entry,
    Texts,
    bleu_difference,
    cells_of,
    check_share,
    chosen,
    known_texts,
    longest_prefix,
    report,
    run_plan,
    sides,
)
from trimtab.cells import keep, known
from trimtab.text_metrics import corpus_bleu

ENTRIES = (
    Entry("full", "full", (1e-5, 3e-5)),
    Entry("prefix", "prefix[length=16]", (1e-4, 2e-4)),
    Entry("lora", "lora[r=8]", (5e-4, 1e-3)),
)
LIKE = Cell("", "", 0.0, "digest", train_tables=9, dev_tables=3, references=2)


@pytest.fixture
def path(tmp_path: Path) -> str:
    rows = [
        {"table": f"name: {i}", "references": [f"{i} is place {j} to eat" for j in range(1 + i % 4)]} for i in range(20)
    ]
    file = tmp_path / "tables.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def figures(loss: float) -> dict[str, Any]:
    return {
        "dev_loss": loss, "trained_parameters": 10, "deployed_parameters": 5, "base_parameters": 1000,
        "train_seconds": 1.0,
    }  # fmt: skip


def test_a_table_is_on_one_side_and_only_training_is_cut(path: str) -> None:
    found = sides(path, LIKE)
    names = {side: {row["table"] for row in rows} for side, rows in found.items()}
    assert [len(names[side]) for side in ("train", "dev", "test")] == [9, 3, 8]
    assert len(set.union(*names.values())) == 20
    assert max(len(row["references"]) for row in found["train"]) == 2
    assert max(len(row["references"]) for row in [*found["dev"], *found["test"]]) == 4
    assert sides(path, LIKE) == found
    assert sides(path, dataclasses.replace(LIKE, seed=1)) != found


def test_the_longest_prefix_of_one_percent() -> None:
    longest = longest_prefix(0.01, 134_515_008, 30, 3, 64)
    assert 2 * longest * 30 * 3 * 64 <= 1_345_150 < 2 * (longest + 1) * 30 * 3 * 64
    assert longest == 116

    class Config:
        num_key_value_heads, head_dim, num_hidden_layers = 3, 64, 30

    check_share(Config, {"deployed_parameters": 116 * 11_520, "base_parameters": 134_515_008})
    with pytest.raises(SystemExit, match="at most 116 positions are 1 %"):
        check_share(Config, {"deployed_parameters": 117 * 11_520, "base_parameters": 134_515_008})


def test_rates_are_chosen_by_dev_loss_and_the_page_says_what_is_missing(path: str, tmp_path: Path) -> None:
    plan = {entry.name: cells_of(entry, LIKE) for entry in ENTRIES}
    references = [row["references"] for row in sides(path, LIKE)["test"]]
    right, wrong = [own[0] for own in references], ["nothing of it" for _ in references]
    full, prefix = plan["full"], plan["prefix"]
    keep(tmp_path, full[0], figures(2.0))
    assert chosen(full, known(tmp_path, full)) is None
    keep(tmp_path, full[1], figures(1.0))
    keep(tmp_path, prefix[0], figures(1.5))
    keep(tmp_path, prefix[1], figures(1.6))
    runs = known(tmp_path, [cell for cells in plan.values() for cell in cells])
    assert chosen(full, runs) == full[1]
    assert chosen(prefix, runs) == prefix[0]
    assert known_texts(tmp_path, plan, runs) == {}
    keep(tmp_path, Texts(full[1]), {"bleu": 10.0, "nist": 2.0, "seconds": 3.0, "texts": right})
    keep(tmp_path, Texts(prefix[0]), {"bleu": 0.0, "nist": 0.0, "seconds": 3.0, "texts": wrong})
    keep(tmp_path, Texts(prefix[1]), {"bleu": 99.0, "nist": 9.0, "seconds": 3.0, "texts": right})
    blocks = report(path, plan, runs, known_texts(tmp_path, plan, runs))
    assert "lora has no result yet." in blocks["scores"]
    assert "| full | 10 | 5 (0.50%) | 3e-05 | 10.00 | 2.00 | – | 1 | 3 |" in blocks["scores"]
    (line,) = blocks["difference"]
    assert line.startswith("- prefix ≥ full − 1 BLEU: **no** (-")
    assert "| `lora[r=8]` | 0.0005 | not yet |" in blocks["rates"]
    page = (ROOT / "docs/table-to-text.md").read_text(encoding="utf-8")
    assert "lora has no result yet." in fill(page, blocks, "table-to-text.md")


def test_training_comes_first_then_the_texts_of_the_best(path: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Nothing is run twice, and what a crash left out is made up for."""
    ran: list[str] = []
    broken = {"prefix-lr0.0002-seed0"}

    def train(_: str, folder: Path, cell: Cell) -> dict[str, Any]:
        ran.append(cell.name)
        if cell.name in broken:
            raise RuntimeError("broken")
        return figures(cell.lr)

    def texts(_: str, folder: Path, cell: Texts) -> dict[str, Any]:
        ran.append(cell.name)
        return {"bleu": 1.0, "nist": 1.0, "seconds": 1.0, "texts": []}

    monkeypatch.setattr(module, "run", train)
    monkeypatch.setattr(module, "write_texts", texts)
    cells = [cell for entry in ENTRIES[:2] for cell in cells_of(entry, LIKE)]
    assert run_plan(path, tmp_path, cells) == 1
    assert ran == [cell.name for cell in cells] + ["full-lr1e-05-seed0-texts"]
    ran.clear()
    broken.clear()
    assert run_plan(path, tmp_path, cells) == 0
    assert ran == ["prefix-lr0.0002-seed0", "prefix-lr0.0001-seed0-texts"]
    ran.clear()
    assert run_plan(path, tmp_path, cells) == 0 and not ran


def test_the_difference_of_two_methods_bleu() -> None:
    references = [[f"the place {i} is near the river and cheap", f"{i} is cheap"] for i in range(6)]
    ones = [own[0] for own in references]
    others = [text.replace("cheap", "dear") for text in ones]
    mean, low, high = bleu_difference(ones, others, references, resamples=50)
    assert mean == pytest.approx(100 - corpus_bleu(others, references))
    assert 0 < low <= mean <= high
    assert bleu_difference(ones, ones, references, resamples=5) == (0, 0, 0)

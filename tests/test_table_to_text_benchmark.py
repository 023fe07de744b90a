"""The table-to-text benchmark: no table on two sides, rates chosen by dev loss alone, a page of what there is."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cells import keep, known
from benchmarks.pages import fill
from benchmarks.table_to_text import (
    ENTRIES,
    ROOT,
    Cell,
    bleu_difference,
    cells_of,
    check_share,
    chosen,
    longest_prefix,
    report,
    sides,
)
from trimtab.text_metrics import corpus_bleu

LIKE = Cell("", "", 0.0, "digest", train_tables=9, dev_tables=3, references=2)


@pytest.fixture
def path(tmp_path: Path) -> str:
    rows = [
        {"table": f"name: {i}", "references": [f"{i} is place {j} to eat" for j in range(1 + i % 4)]} for i in range(20)
    ]
    file = tmp_path / "tables.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def figures(loss: float, bleu: float, texts: list[str]) -> dict[str, Any]:
    return {
        "dev_loss": loss, "test_bleu": bleu, "test_nist": 2.0, "texts": texts, "trained_parameters": 10,
        "deployed_parameters": 5, "base_parameters": 1000, "train_seconds": 1.0, "test_seconds": 2.0,
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
    keep(tmp_path, full[0], figures(2.0, 90.0, wrong))
    assert chosen(full, known(tmp_path, full)) is None
    keep(tmp_path, full[1], figures(1.0, 10.0, right))
    keep(tmp_path, prefix[0], figures(1.5, 0.0, wrong))
    keep(tmp_path, prefix[1], figures(1.6, 99.0, right))
    results = known(tmp_path, [cell for cells in plan.values() for cell in cells])
    assert chosen(full, results) == full[1]
    assert chosen(prefix, results) == prefix[0]
    blocks = report(path, plan, results)
    assert "lora has no result yet." in blocks["scores"]
    assert any(line.startswith("| full | 10 | 5 (0.50%) | 3e-05 | 10.00 | 2.00 | – |") for line in blocks["scores"])
    (line,) = blocks["difference"]
    assert line.startswith("- prefix ≥ full − 1 BLEU: **no** (-")
    page = (ROOT / "docs/table-to-text.md").read_text(encoding="utf-8")
    assert "lora has no result yet." in fill(page, blocks, "table-to-text.md")


def test_the_difference_of_two_methods_bleu() -> None:
    references = [[f"the place {i} is near the river and cheap", f"{i} is cheap"] for i in range(6)]
    ones = [own[0] for own in references]
    others = [text.replace("cheap", "dear") for text in ones]
    mean, low, high = bleu_difference(ones, others, references, resamples=50)
    assert mean == pytest.approx(100 - corpus_bleu(others, references))
    assert 0 < low <= mean <= high
    assert bleu_difference(ones, ones, references, resamples=5) == (0, 0, 0)

"""The quality benchmark: splits without relatives on two sides, the bootstrap, cells that are kept, partial reports."""

from __future__ import annotations

import dataclasses
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.cells import Clock, run_all, share_out
from benchmarks.quality import PLAN, Cell, Chosen, Entry, Model, Plan, jobs_of, pending, quick_plan, stages
from benchmarks.quality_picture import draw
from benchmarks.quality_report import report, tables
from benchmarks.quality_results import Results
from benchmarks.rows import plain, related, split
from trimtab.bootstrap import paired
from trimtab.cells import keep, known, read

# -- rows ---------------------------------------------------------------------------------------------------------

WORDS = [f"word{number}" for number in range(500)]


def fabricated(count: int = 300) -> list[tuple[str, str]]:
    """Texts of twelve words; of every third one there is a copy in other clothes and a version with another end."""
    source = random.Random(1)
    rows = []
    for number in range(count):
        words = source.sample(WORDS, 12)
        rows.append((" ".join(words), str(number % 2)))
        if number % 3 == 0:
            rows.append((" ".join(words).upper().replace(" ", " ,  ") + "!", str(number % 2)))
            rows.append((" ".join([*words[:10], *source.sample(WORDS, 2)]), str(number % 2)))
    return rows


def shared_words(one: str, other: str) -> float:
    """Share of common words: not how the split tells relatives."""
    a, b = set(plain(one).split()), set(plain(other).split())
    return len(a & b) / len(a | b)


def test_no_related_rows_on_two_sides() -> None:
    sides = split(fabricated(), train=120, dev=60, test=1000)
    assert (len(sides["train"]), len(sides["dev"])) == (120, 60) and len(sides["test"]) > 100
    texts = {name: [text for text, _ in rows] for name, rows in sides.items()}
    for one, other in (("train", "dev"), ("train", "test"), ("dev", "test")):
        assert max(shared_words(a, b) for a in texts[one] for b in texts[other]) < 0.5
    together = [text for side in texts.values() for text in side]  # relatives may be on one
    assert any(shared_words(a, b) > 0.6 for at, a in enumerate(together) for b in together[:at])
    assert len({plain(text) for text in together}) == len(together)


def test_split_is_the_same_again_and_keeps_labels() -> None:
    rows = fabricated()
    assert split(rows, 50, 20, 30) == split(list(rows), 50, 20, 30)
    assert all(row in rows for side in split(rows, 50, 20, 30).values() for row in side)


def test_related_is_transitive_and_short_texts_are_themselves() -> None:
    words = WORDS[:20]
    chain = [" ".join(words[at : at + 14]) for at in (0, 3, 6)]  # the first and the last share 5 runs of 17
    groups = related([*chain, "good", "good phone", " ".join(WORDS[100:112])])
    assert groups[0] == groups[1] == groups[2]
    assert len(set(groups)) == 4


# -- bootstrap ----------------------------------------------------------------------------------------------------


def test_bootstrap_of_one_seed_is_the_binomial_interval() -> None:
    source = np.random.default_rng(3)
    other = np.zeros((1, 2000), dtype=bool)
    one = source.random((1, 2000)) < 0.3
    found = paired([one], [other])
    p = one.mean()
    half = 1.96 * np.sqrt(p * (1 - p) / 2000)
    assert found.mean == pytest.approx(p)
    assert found.low == pytest.approx(p - half, abs=0.002)
    assert found.high == pytest.approx(p + half, abs=0.002)


def test_bootstrap_agrees_with_a_naive_loop() -> None:
    source = np.random.default_rng(4)
    ones = [source.random((3, rows)) < 0.8 for rows in (40, 90)]
    others = [source.random((3, rows)) < 0.7 for rows in (40, 90)]
    naive = []
    for _ in range(4000):
        seeds = source.integers(0, 3, 3)
        tasks = []
        for one, other in zip(ones, others, strict=True):
            rows = source.integers(0, one.shape[1], one.shape[1])
            tasks.append(one[seeds][:, rows].mean() - other[seeds][:, rows].mean())
        naive.append(np.mean(tasks))
    found = paired(ones, others)
    assert found.mean == pytest.approx(np.mean([a.mean() - b.mean() for a, b in zip(ones, others, strict=True)]))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(naive, (0.025, 0.975))), abs=0.012)


def test_bootstrap_is_paired_by_row_and_by_seed() -> None:
    source = np.random.default_rng(5)
    answers = source.random((4, 500)) < source.random((4, 1))  # seeds and rows that differ much
    worse = answers.copy()
    worse[:, 0] = ~answers[:, 0]
    same = paired([answers], [answers])
    assert (same.mean, same.low, same.high) == (0, 0, 0)
    assert paired([answers], [worse]).high - paired([answers], [worse]).low < 0.01


def test_bootstrap_weighs_tasks_alike_and_counts_seeds() -> None:
    small, large = np.ones((5, 10), dtype=bool), np.zeros((5, 1000), dtype=bool)
    found = paired([small, large], [~small, large])
    assert (found.mean, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))
    lucky = np.zeros((5, 100), dtype=bool)
    lucky[0] = True  # one seed of five has all: 0 to 3 fifths
    spread = paired([lucky], [np.zeros_like(lucky)])
    assert (spread.mean, spread.low, spread.high) == pytest.approx((0.2, 0.0, 0.6))


# -- cells --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Small:
    number: int
    sizes: tuple[int, ...] = (1, 2)

    @property
    def name(self) -> str:
        return f"small-{self.number}"


def clock() -> Clock:
    return Clock(lambda cell: 1.0, 3.0)


def test_cells_run_once_and_again_with_other_settings(tmp_path: Path) -> None:
    ran: list[Small] = []

    def run(cell: Small) -> dict[str, Any]:
        ran.append(cell)
        return {"twice": 2 * cell.number}

    cells = [Small(1), Small(2)]
    assert run_all(tmp_path, cells, run, clock()) == []
    assert run_all(tmp_path, cells, run, clock()) == []
    assert ran == cells
    assert known(tmp_path, [*cells, Small(3)]) == {Small(1): {"twice": 2}, Small(2): {"twice": 4}}
    changed = Small(2, sizes=(3,))
    assert read(tmp_path, changed) is None
    run_all(tmp_path, [changed], run, clock())
    assert ran[-1] == changed


def test_a_crash_is_told_and_the_rest_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def run(cell: Small) -> dict[str, Any]:
        if cell.number == 1:
            raise ValueError("broken on purpose")
        return {}

    assert run_all(tmp_path, [Small(1), Small(2)], run, clock()) == [Small(1)]
    assert read(tmp_path, Small(1)) is None and read(tmp_path, Small(2)) == {}
    told = capsys.readouterr()
    assert "small-1: CRASHED" in told.out and "broken on purpose" in told.err


def test_ctrl_c_loses_the_present_cell_only(tmp_path: Path) -> None:
    def run(cell: Small) -> dict[str, Any]:
        if cell.number == 2:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        run_all(tmp_path, [Small(1), Small(2), Small(3)], run, clock())
    assert [path.name for path in tmp_path.iterdir()] == ["small-1.json"]


def test_the_clock_learns_from_what_cells_took() -> None:
    time = Clock(lambda cell: 10.0, 30.0)
    assert time.rest == 30
    time.done(Small(1), 20.0)
    assert time.rest == 40


def test_shares_take_about_as_long() -> None:
    chosen = share_out({"a": 5.0, "b": 4.0, "c": 3.0, "d": 3.0}, 2)
    assert {job for job, shard in chosen.items() if shard == chosen["a"]} == {"a", "d"}


# -- the plan -----------------------------------------------------------------------------------------------------


def test_names_of_cells_are_different() -> None:
    for plan in (PLAN, quick_plan()):
        cells = plan.every_cell()
        assert len({cell.name for cell in cells}) == len(cells)
    assert all(entry.model in PLAN.models for entry in PLAN.entries)


def test_methods_exist_and_sizes_fit() -> None:
    from trimtab.methods.spec import parse_method

    assert {parse_method(entry.method).name for entry in PLAN.entries if entry.method} >= {
        "full", "head", "houlsby", "adamix", "pfeiffer", "parallel", "lora", "ia3", "bitfit", "layernorm"
    }  # fmt: skip


def test_shards_are_the_whole_plan_once() -> None:
    folder = Path("there-is-no-such-folder")
    whole = pending(PLAN, Chosen(), folder)
    parts = [pending(PLAN, Chosen(shard=(number, 2)), folder) for number in range(2)]
    assert sorted(cell.name for part in parts for cell in part) == sorted(cell.name for cell in whole)
    first = {(cell.model, cell.entry) for cell in parts[0]}
    assert not first & {(cell.model, cell.entry) for cell in parts[1]}  # a rate is chosen where it is used
    assert len(set(jobs_of(PLAN, Chosen(shard=(0, 2))).values())) == 2


def test_filters_and_seeds() -> None:
    chosen = Chosen([{"model": "minilm", "method": "full"}, {"task": "bbc"}], seeds=1)
    cells = pending(PLAN, chosen, Path("there-is-no-such-folder"))
    assert cells and all(cell.seed == 0 for cell in cells)
    assert all((cell.model, cell.entry) == ("minilm", "full") or cell.task == "bbc" for cell in cells)


# -- the report ---------------------------------------------------------------------------------------------------

SMALL = Plan(
    {"bert-tiny": Model("nowhere", "encoder", {"sarcasm": 128, "reviews": 128, "bbc": 64}, 100, 200, 50)},
    [
        Entry("bert-tiny", "full", "full", (1e-4, 3e-4), seeds=3),
        Entry("bert-tiny", "head", "head", (1e-3,), seeds=3),
        Entry("bert-tiny", "houlsby", "houlsby[size=8]", (1e-3, 3e-3, 1e-2), seeds=3),
        Entry("bert-tiny", "adamix", "adamix[size=8]", (1e-3,), seeds=3),
        Entry("bert-tiny", "single-6", "adamix[experts=1,size=8]", (1e-3,), seeds=3),
    ],
)
LEVEL = {"full": 0.85, "head": 0.65, "houlsby": 0.8, "adamix": 0.82, "single-6": 0.78}


def fabricate(cell: Cell, level: float, majority: float = 0.5) -> dict[str, Any]:
    """Figures of a run that is right on `level` of the test rows, its predictions included."""
    right = round(level * cell.test_rows)
    whole = 10_000_000
    trained = {"full": whole + 100, "head": 100}.get(cell.entry, 100 + len(cell.entry) * 10_000)
    training = {"seconds": 5.0, "tokens_per_second": 1000.0, "peak_memory_mb": 600.0}
    return {
        "base_parameters": whole, "head_parameters": 100, "majority": majority, "train_rows": cell.train_rows,
        "trained_parameters": trained, "deployed_parameters": trained, "deployed_bytes": 4 * trained,
        **{f"train_{name}": value for name, value in training.items()},
        "dev_accuracy": level - abs(cell.lr - 3e-3), "dev_rows": cell.dev_rows,
        "test_accuracy": right / cell.test_rows, "test_macro_f1": level, "test_loss": 0.5, "test_rows": cell.test_rows,
        "predicted": "1" * cell.test_rows, "gold": "1" * right + "0" * (cell.test_rows - right),
    }  # fmt: skip


def fill(folder: Path, skip: Any = lambda cell: False, majority: Any = lambda cell: 0.5) -> None:
    for cell in SMALL.every_cell():
        if not skip(cell):
            keep(folder, cell, fabricate(cell, LEVEL[cell.entry] + 0.01 * cell.seed, majority(cell)))


def results(folder: Path) -> Results:
    return Results(SMALL, known(folder, SMALL.every_cell()))


def line(lines: list[str], start: str) -> str:
    (found,) = [one for one in lines if one.startswith(start)]
    return found


def test_a_whole_report(tmp_path: Path) -> None:
    fill(tmp_path)
    made = tables(results(tmp_path))
    assert made["missing"] == ["All runs of the plan are there."]
    full = line(made["bert-tiny"], "| full")
    assert full.count("0.860 ± 0.010") == 4 and "10,000,000" in full and "100.00 %" in full
    assert "70,000 | 70,000 | 0.70 %" in line(made["bert-tiny"], "| houlsby")
    assert line(made["rates"], "| bert-tiny | houlsby").endswith("| 0.003 |")
    assert line(made["rates"], "| bert-tiny | full").endswith("| 0.0003 (edge) |")
    difference = line(made["differences"], "| bert-tiny | houlsby − full")
    assert "| 3 | -5.00 |" in difference and "sarcasm, reviews, bbc" in difference
    assert "| 3 | +4.00 |" in line(made["differences"], "| bert-tiny | adamix − single-6")


def test_only_the_chosen_rate_is_shown(tmp_path: Path) -> None:
    fill(tmp_path)
    for cell in SMALL.every_cell():
        if cell.entry == "houlsby" and cell.lr != 3e-3:
            keep(tmp_path, cell, fabricate(cell, 0.1))
    assert line(tables(results(tmp_path))["bert-tiny"], "| houlsby").count("0.810 ± 0.010") == 4


def test_a_report_of_a_part_says_what_is_missing(tmp_path: Path) -> None:
    fill(tmp_path, skip=lambda cell: cell.entry == "houlsby" and cell.task == "reviews" and cell.seed == 2)
    made = tables(results(tmp_path))
    assert "- bert-tiny, houlsby: 2 of 3 seeds on reviews" in made["missing"]
    houlsby = line(made["bert-tiny"], "| houlsby")
    assert "0.805 ± 0.007 (2 of 3 seeds) | 0.810 ± 0.010 | 0.805 ± 0.007 (2 of 3 seeds) |" in houlsby
    assert "| 2 of 3 | -5.00 |" in line(made["differences"], "| bert-tiny | houlsby − full")


def test_without_a_chosen_rate_a_method_is_missing_altogether(tmp_path: Path) -> None:
    fill(tmp_path, skip=lambda cell: cell.entry == "houlsby" and cell.lr == 1e-2 and cell.task == "sarcasm")
    made = tables(results(tmp_path))
    assert "- bert-tiny, houlsby: 2 of 3 learning rates tried, none chosen yet" in made["missing"]
    assert not [one for one in made["bert-tiny"] if one.startswith("| houlsby")]
    assert "houlsby" not in "".join(made["differences"])


def test_a_task_near_the_majority_does_not_count(tmp_path: Path) -> None:
    fill(tmp_path, majority=lambda cell: 0.77 if cell.task == "bbc" else 0.5)
    made = tables(results(tmp_path))
    assert "| **no** |" in line(made["tasks"], "| bert-tiny | bbc")
    assert "mean of sarcasm, reviews" in made["bert-tiny"][0]
    assert "| sarcasm, reviews |" in line(made["differences"], "| bert-tiny | houlsby − full")


def test_files_of_the_report(tmp_path: Path) -> None:
    runs, docs = tmp_path / "runs", tmp_path / "docs"
    runs.mkdir()
    docs.mkdir()
    names = ("picture", "missing", "tasks", "bert-tiny", "differences", "costs", "rates")
    page = "# Quality\n\n" + "\n".join(f"<!-- {name} -->\nold\n<!-- /{name} -->\nkept {name}" for name in names)
    (docs / "quality.md").write_text(page, encoding="utf-8")
    fill(runs)
    report(SMALL, runs, docs)
    text = (docs / "quality.md").read_text(encoding="utf-8")
    assert "old" not in text and all(f"kept {name}" in text for name in names) and "pictures/quality.png" in text
    entries = json.loads((docs / "quality.json").read_text(encoding="utf-8"))
    assert len(entries) == len(SMALL.every_cell()) and not any("predicted" in one["figures"] for one in entries)
    assert (docs / "pictures/quality.png").stat().st_size > 10_000
    report(SMALL, runs, docs)
    assert (docs / "quality.md").read_text(encoding="utf-8") == text
    for file in runs.glob("*.json"):  # a clone has the figures but no predictions: nothing that was known is lost
        if "seed0" not in file.name or "reviews" in file.name:
            file.unlink()
    report(SMALL, runs, docs)
    assert (docs / "quality.md").read_text(encoding="utf-8") == text


def test_an_empty_report(tmp_path: Path) -> None:
    made = tables(results(tmp_path))
    assert made["bert-tiny"] == ["No results yet."] and "nothing yet: full, head" in "\n".join(made["missing"])
    assert not draw(results(tmp_path), tmp_path / "picture.png")


def test_rates_come_first_and_are_used(tmp_path: Path) -> None:
    plan = dataclasses.replace(SMALL, entries=[entry for entry in SMALL.entries if entry.name == "houlsby"])
    walk = stages(plan, Chosen(), tmp_path)
    grid = next(walk)
    assert [(cell.lr, cell.task, cell.seed) for cell in grid] == [(lr, "sarcasm", 0) for lr in (1e-3, 3e-3, 1e-2)]
    for cell in grid:
        keep(tmp_path, cell, fabricate(cell, 0.8))
    final = next(walk)
    assert len(final) == 9 and {cell.lr for cell in final} == {3e-3}
    assert final[0] in grid  # the run that chose the rate is not made again

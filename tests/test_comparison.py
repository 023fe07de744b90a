"""Comparing methods: the same runs as `trimtab train`, one base, resuming, failures, the judgement and the report."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import random
import re
import shlex
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import trimtab as tt
from browser import needs_browser, opened
from test_cli import byte_tokenizer, refused, run, write_rows
from trimtab.bootstrap import Difference
from trimtab.comparison import pictures, report, steps
from trimtab.comparison.bench import Base, Bench
from trimtab.comparison.plan import Cell, Plan, read_methods, slug
from trimtab.comparison.results import Comparison, Outcome, Row, SeedRun, difference, recommend, sentence
from trimtab.config import command
from trimtab.errors import UserError

METHODS = ["lora[r=2]", "head", "ia3"]


def rows(count: int = 240) -> list[dict[str, Any]]:
    source = random.Random(0)
    return [{"text": f"{'ab'[i % 2] * 3} {source.randrange(10**6)}", "label": "xy"[i % 2]} for i in range(count)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes = {"vocab_size": 259, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = tf.BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=64, pad_token_id=0)
    tf.BertForMaskedLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_rows(tmp_path_factory.mktemp("data") / "data.jsonl", rows())


def settings(model: str, data: str, folder: Path, **other: Any) -> tt.TrainSettings:
    own: dict[str, Any] = {"epochs": 1, "eval_share": 0.2, "max_length": 32}
    return tt.TrainSettings(model=model, data=data, output=str(folder), **{**own, **other})


def compare(asked: tt.TrainSettings, methods: Any = METHODS, **other: Any) -> Comparison:
    """A comparison whose pictures are not drawn, which takes longer than all the rest."""
    own: dict[str, Any] = {"seeds": 2, "dev_share": 0.3, "factors": (1, 3), "show": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "write_report", lambda found: None)
        return tt.compare(asked, methods, **{**own, **other})


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model, data) -> tuple[Path, Comparison]:
    folder = tmp_path_factory.mktemp("compare") / "out"
    return folder, compare(settings(model, data, folder))


# -- what is run --------------------------------------------------------------------------------------------------


def test_rows_of_all_methods_are_the_same_and_sides_share_nothing(finished) -> None:
    folder, found = finished
    sides = {
        side: [json.loads(line)["text"] for line in (folder / "rows" / f"{side}.jsonl").read_text().splitlines()]
        for side in ("train", "dev", "test")
    }
    assert found.asked["rows"] == {side: len(texts) for side, texts in sides.items()}
    assert [len(texts) for texts in sides.values()] == [134, 58, 48]
    assert len({text for texts in sides.values() for text in texts}) == 240
    assert {row.method for row in found.rows} == set(METHODS)
    assert all(len(row.runs) == 2 and set(row.rates) and not row.errors for row in found.rows)


def test_the_command_of_a_run_gives_the_same_numbers(finished, tmp_path) -> None:
    _, found = finished
    first = found.row("lora[r=2]").runs[1]
    words = shlex.split(first.command)
    words[words.index("--output") + 1] = str(tmp_path / "again")
    assert run(*words[1:]).exit_code == 0
    metrics = json.loads((tmp_path / "again" / "metrics.json").read_text())["after"]
    assert metrics["accuracy"] == pytest.approx(first.score, abs=1e-9)
    assert metrics["loss"] == pytest.approx(first.metrics["loss"], abs=1e-5)


def test_a_kept_adapter_gives_the_test_score(finished) -> None:
    folder, found = finished
    best = found.rows[0].runs[0]
    again = tt.evaluate_run(best.adapter, str(folder / "rows" / "test.jsonl"), show=False)
    assert again[found.objective] == pytest.approx(best.score, abs=1e-9)
    assert again["loss"] == pytest.approx(best.metrics["loss"], abs=1e-5)


def test_the_rate_is_the_one_that_is_best_on_the_dev_rows(finished) -> None:
    _, found = finished
    for row in found.rows:
        best = max(row.rates.values())
        assert row.lr == min(lr for lr, dev in row.rates.items() if dev == best)


def test_adapters_of_other_rates_are_gone(finished) -> None:
    folder, found = finished
    assert {path.name for path in (folder / "adapters").iterdir()} == {
        Path(one.adapter).name for row in found.rows for one in row.runs
    }


def test_test_rows_are_scored_once_a_run_and_only_with_the_chosen_rate(tmp_path, model, data, monkeypatch) -> None:
    scored: list[Cell] = []
    plain = Bench.score
    monkeypatch.setattr(Bench, "score", lambda self, cell, rows: scored.append(cell) or plain(self, cell, rows))
    found = compare(settings(model, data, tmp_path / "out"), ["head", "ia3"])
    assert sorted((cell.method, cell.lr, cell.seed) for cell in scored) == sorted(
        (row.method, row.lr, seed) for row in found.rows for seed in (0, 1)
    )


def test_one_base_serves_all_and_is_bit_for_bit_what_it_was(tmp_path, model, data, monkeypatch) -> None:
    bases: list[Base] = []
    before: list[dict[str, torch.Tensor]] = []
    plain = Base.__init__

    def noted(self: Base, load: Any, seed: int) -> None:
        plain(self, load, seed)
        bases.append(self)
        before.append({name: tensor.clone() for name, tensor in self.model.state_dict().items()})

    monkeypatch.setattr(Base, "__init__", noted)
    compare(settings(model, data, tmp_path / "out"), ["lora[r=2]", "prefix[length=2]", "full", "head"])
    (base,) = bases
    after = base.model.state_dict()
    assert after.keys() == before[0].keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before[0].items())
    assert any("classifier" in name for name in base.made[1])  # the second seed had a head of its own


def test_methods_with_the_same_trunk_share_its_states(tmp_path, model, data, monkeypatch) -> None:
    benches: list[Bench] = []
    plain = Bench.close
    monkeypatch.setattr(Bench, "close", lambda self: benches.append(self) or plain(self))
    compare(settings(model, data, tmp_path / "out"), ["lora[r=2,layers=1]", "pfeiffer[size=2,layers=1]"], seeds=1)
    (bench,) = benches
    (store,) = bench.stores.values()
    assert len(store.memory) == 134 + 58 + 48
    assert store.misses < 134  # those of the first training; the second method's first one has none
    assert store.hits > 3 * 100  # all but the first batch of the other three, which shows what form layers give


# -- going on -----------------------------------------------------------------------------------------------------


def test_a_second_call_runs_nothing_and_says_the_same(finished, model, data, monkeypatch) -> None:
    folder, found = finished
    monkeypatch.setattr(Bench, "train", None)
    monkeypatch.setattr(Bench, "score", None)
    assert compare(settings(model, data, folder)) == found


def test_methods_may_be_added(tmp_path, model, data, monkeypatch) -> None:
    first = compare(settings(model, data, tmp_path / "out"), ["head"])
    trained: list[str] = []
    plain = Bench.train
    monkeypatch.setattr(Bench, "train", lambda self, cell: trained.append(cell.method) or plain(self, cell))
    both = compare(settings(model, data, tmp_path / "out"), ["head", "bitfit"])
    assert set(trained) == {"bitfit"} and len(trained) == 3
    assert both.row("head").runs == first.rows[0].runs


def test_ctrl_c_loses_the_present_run_only(tmp_path, model, data, monkeypatch) -> None:
    plain = Bench.train
    calls: list[Cell] = []

    def stopped(self: Bench, cell: Cell) -> Any:
        calls.append(cell)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(self, cell)

    monkeypatch.setattr(Bench, "train", stopped)
    asked = settings(model, data, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        compare(asked, ["head"])
    found = compare(asked, ["head"])
    assert [cell.name for cell in calls[2:]] == [calls[2].name] * 2
    assert len(found.rows[0].runs) == 2


@pytest.mark.parametrize(("name", "value"), [("epochs", 2), ("seed", 5), ("max_length", 16)])
def test_another_comparison_does_not_go_into_the_same_folder(finished, model, data, name, value) -> None:
    with pytest.raises(UserError, match=f"began with {name}="):
        compare(settings(model, data, finished[0], **{name: value}))


def test_a_folder_of_something_else_is_left_alone(tmp_path, model, data) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds something already, but no compare\.json"):
        compare(settings(model, data, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


# -- what goes wrong ----------------------------------------------------------------------------------------------


def test_a_method_that_fails_is_told_in_its_row_and_the_rest_goes_on(tmp_path, model, data) -> None:
    found = compare(settings(model, data, tmp_path / "out"), ["lora[r=2,layers=7]", "head"], seeds=1)
    assert [row.method for row in found.rows] == ["head", "lora[r=2,layers=7]"]
    broken = found.rows[1]
    assert broken.runs == () and broken.lr is None and math.isnan(broken.mean)
    assert all("layers" in error for error in broken.errors) and broken.errors
    assert found.recommended == "head"
    assert "failed: layers" in page_of(found)


def test_a_fault_in_one_run_is_logged_and_the_rest_goes_on(tmp_path, model, data, monkeypatch, caplog) -> None:
    plain = Bench.train

    def broken(self: Bench, cell: Cell) -> Any:
        if cell.seed == 1:
            raise RuntimeError("out of memory\nand more")
        return plain(self, cell)

    monkeypatch.setattr(Bench, "train", broken)
    found = compare(settings(model, data, tmp_path / "out"), ["head"])
    assert found.rows[0].errors == ("RuntimeError: out of memory",)
    assert [one.seed for one in found.rows[0].runs] == [0]
    assert "Traceback" in caplog.text


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--methods", "", "there is no method to compare"),
        ("--methods", "lroa", "did you mean 'lora'?"),
        ("--methods", "head,lora,lora[r=8]", "twice"),
        ("--objective", "acuracy", "did you mean 'accuracy'? allowed: accuracy, macro_f1, mcc, loss"),
        ("--dev-share", "0.1", "has 19 rows, too few to rank learning rates by; it needs 50"),
        ("--dev-share", "1.5", "dev_share must lie between 0 and 1"),
        ("--seeds", "0", "seeds must be at least 1"),
        ("--minutes", "-1", "minutes must be more than 0"),
        ("--lr-factors", "1,two", "--lr-factors must be numbers"),
        ("--lr-factors", "0", "numbers above 0"),
        ("--label-column", "lable", "did you mean 'label'?"),
        (
            "--methods",
            "head,llama-adapter[image=eye]",
            "llama-adapter[image=eye] looks at pictures; use trimtab train",
        ),
    ],
)
def test_mistakes_are_one_sentence_and_write_nothing(tmp_path, model, data, option, value, said) -> None:
    given = {"--model": model, "--data": data, "--methods": "head", "--output": str(tmp_path / "out")}
    given |= {"--max-length": "32", "--eval-share": "0.2", option: value}
    assert said in refused("compare", *(word for pair in given.items() for word in pair))
    assert not (tmp_path / "out").exists()


def class_folder(folder: Path, count: int) -> Path:
    """Dark and light pictures, with some noise."""
    from PIL import Image

    draw = random.Random(0)
    for label, grey in (("dark", 60), ("light", 190)):
        (folder / label).mkdir(parents=True)
        for at in range(count):
            Image.new("L", (8, 8), grey + draw.randint(-50, 50)).convert("RGB").save(folder / label / f"{at}.png")
    return folder


def test_a_vision_model_is_compared_and_searched_on_a_class_folder(tmp_path) -> None:
    from pictures_by_hand import save_vit

    vit, pictures = save_vit(tmp_path / "vit"), str(class_folder(tmp_path / "data", 100))
    shared = {"epochs": 2, "eval_share": 0.3, "batch_size": 8}
    asked = tt.TrainSettings(vit, pictures, str(tmp_path / "out"), **shared)
    found = compare(asked, ["lora[r=2]", "head"], seeds=1, factors=(1, 3), dev_share=0.4)
    assert all(row.runs and not row.errors for row in found.rows) and len(found.rows) == 2
    (again,) = (row for row in found.rows if row.method == "head")
    command = shlex.split(again.runs[0].command)[1:]
    command[command.index("--output") + 1] = str(tmp_path / "again")
    assert run(*command).exit_code == 0
    after = json.loads((tmp_path / "again" / "metrics.json").read_text())["after"]
    assert after["accuracy"] == pytest.approx(again.runs[0].score)
    asked = tt.TrainSettings(vit, pictures, str(tmp_path / "searched"), **shared)
    searched = tt.search(asked, trials=3, seeds=1, points=1, methods=["lora", "prefix"], dev_share=0.4)
    assert searched is not None and searched.comparison.rows[0].runs


def test_a_method_of_pefts_is_compared_like_any_other(tmp_path, model, data) -> None:
    pytest.importorskip("peft")
    found = compare(settings(model, data, tmp_path / "out"), ["head", "peft:hra[r=2]"], seeds=1, factors=(1, 3))
    (row,) = (row for row in found.rows if row.method.startswith("peft:hra"))
    assert row.runs and not row.errors and row.parameters > 0 and row.lr in (0.001, 0.003)


def test_pictures_that_are_no_files_are_refused(tmp_path) -> None:
    import datasets

    from pictures_by_hand import save_vit

    vit = save_vit(tmp_path / "vit")
    rows = datasets.load_dataset("imagefolder", data_dir=str(class_folder(tmp_path / "data", 2)), split="train")
    rows.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(UserError, match="'image' holds the pictures; use a class folder"):
        compare(tt.TrainSettings(vit, str(tmp_path / "saved"), str(tmp_path / "out")), ["head"])
    with pytest.raises(UserError, match="looks at pictures; use trimtab train"):
        compare(tt.TrainSettings(vit, str(tmp_path / "data"), str(tmp_path / "out")), [f"llama-adapter[image={vit}]"])
    assert not (tmp_path / "out").exists()


def test_too_few_minutes_for_scoring(tmp_path, model, data) -> None:
    with pytest.raises(UserError, match="minutes are too few: scoring 3 runs alone takes about"):
        compare(settings(model, data, tmp_path / "out"), ["head"], minutes=1e-5)


# -- the budget ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_minutes_give_every_method_the_same_seconds(tmp_path, model, data) -> None:
    asked = settings(model, data, tmp_path / "out", epochs=1000)
    found = compare(asked, ["head", "houlsby[size=2]"], seeds=1, factors=(1,), minutes=0.12)
    seconds = json.loads((tmp_path / "out" / "cells" / "budget.json").read_text())["seconds"]
    assert 0.5 < seconds < 0.06 * 60
    for row in found.rows:
        assert 0 < row.epochs < 1000
        assert row.seconds < 2 * seconds
        assert f"--epochs {row.epochs:g}" in row.runs[0].command
    again = compare(asked, ["head", "houlsby[size=2]"], seeds=1, factors=(1,), minutes=0.12)
    assert again == found


# -- settings as a command ----------------------------------------------------------------------------------------


def test_a_command_reads_back_as_its_settings(tmp_path) -> None:
    from typer.testing import CliRunner

    import trimtab.__main__ as cli
    from trimtab.config import resolve

    asked = tt.TrainSettings(
        model="m", data="it's.jsonl", output="o p", method="lora[r=4]|prompt[text='a b']", lr=1.7e-5, epochs=0.37,
        template="A: {text}\nB:", label_words={"0": "no", "1": "yes"}, chat=True, num_beams=3, eval_data="t",
    )  # fmt: skip
    seen: list[tt.TrainSettings] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trimtab.train.fine_tune", seen.append)
        patch.setattr("trimtab.report.read_run", lambda folder: (_ for _ in ()).throw(UserError("stop here")))
        CliRunner().invoke(cli.app, shlex.split(command(asked))[1:])
    assert seen == [resolve(None, (), {**dataclasses.asdict(asked), "method": asked.method, "eval_share": None})]


def test_slugs_differ_and_are_file_names() -> None:
    texts = ["lora", "lora[r=8]", "lora[r=8.0]", "lora|ia3", "prompt[text='a/b ü']", "prompt[text='a b ü']"]
    names = [slug(text) for text in texts]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[a-z0-9.-]+", name) for name in names)
    assert read_methods(["lora[ r = 8 ]", tt.IA3()]) == ("lora", "ia3")


# -- judging ------------------------------------------------------------------------------------------------------


def plan(objective: str = "accuracy", methods: tuple[str, ...] = ("lora", "ia3")) -> Plan:
    return Plan(tt.TrainSettings("m", "d", "o", max_length=8), methods, 3, objective)


def outcome(method: str, marks: list[list[float]], loss: float = 1.0) -> Outcome:
    final = {
        Cell(method, 1e-3, seed, 1, 8): {"marks": own, "test": {"accuracy": sum(own) / len(own), "loss": loss + seed}}
        for seed, own in enumerate(marks)
    }
    return Outcome(method, 1.0, 1e-3, {}, final)


def test_differences_are_paired_by_row_and_signed_so_that_more_is_better() -> None:
    source = random.Random(1)
    best = [[float(source.random() < 0.8) for _ in range(200)] for _ in range(3)]
    worse = [[0.0 if at % 10 == 0 else mark for at, mark in enumerate(own)] for own in best]
    found = difference(plan(), outcome("ia3", worse), outcome("lora", best), by_row=True)
    assert found is not None and found.found and -0.13 < found.low < found.mean < found.high < 0
    lost = sum(own[at] for own in best for at in range(0, 200, 10)) / 600
    assert found.mean == pytest.approx(-lost)
    by_seed = difference(plan("loss"), outcome("ia3", worse, 3.0), outcome("lora", best, 1.0), by_row=False)
    assert by_seed == Difference(-2.0, -2.0, -2.0)


def test_one_seed_without_single_answers_tells_nothing() -> None:
    ones, others = (outcome(name, [[1.0, 0.0]]) for name in ("ia3", "lora"))
    assert difference(plan("loss"), ones, others, by_row=False) is None
    assert difference(plan(), ones, others, by_row=True) is not None


def fabricated(method: str, scores: list[float], parameters: int, against: Difference | None = None) -> Row:
    runs = tuple(
        SeedRun(seed, 0.7, score, {"accuracy": score}, 4.0, f"trimtab train --seed {seed} <{method}>", f"a/{method}")
        for seed, score in enumerate(scores)
    )
    curve = tuple((at / 10, 1 / (at + 1)) for at in range(30 if scores else 0))
    errors = () if scores else ("broken on <purpose>",)
    return Row(method, 1e-3, 3.0, {1e-3: 0.7, 3e-3: 0.6}, runs, parameters, 0.01, 4 * parameters,
               4.0 + parameters / 1e4, 700.0, against, curve, errors)  # fmt: skip


BEST = fabricated("houlsby", [0.80, 0.82], 50_000)
CLOSE = fabricated("lora[r=8]", [0.79, 0.81], 8_000, Difference(-0.01, -0.03, 0.01))
WORSE = fabricated("ia3", [0.60, 0.62], 900, Difference(-0.2, -0.23, -0.17))
BROKEN = fabricated("prompt[text='<b>$x$\"']", [], 0)


def test_the_smallest_of_those_not_found_worse_is_recommended() -> None:
    assert recommend([BEST, CLOSE, WORSE, BROKEN]) is CLOSE
    assert recommend([BEST, WORSE]) is BEST
    assert recommend([BROKEN]) is None


def test_the_recommendation_has_reason_and_uncertainty() -> None:
    said = sentence([BEST, CLOSE, WORSE, BROKEN], CLOSE, plan(), 400, True)
    assert said.startswith("Take lora[r=8]: accuracy 0.800 ± 0.014 over 2 seeds on 400 test rows; ")
    assert "houlsby came out better by 0.01 (95 % interval -0.010 to +0.030 over rows and seeds)" in said
    assert said.endswith("lora[r=8] trains 8,000 instead of 50,000 parameters.")
    alone = sentence([BEST, WORSE], BEST, plan(), 400, True)
    assert "the next one, ia3, by 0.2 (95 % interval +0.170 to +0.230)" in alone
    assert "none of the runs worked" in sentence([BROKEN], None, plan(), 400, True)
    assert said.count(". ") == alone.count(". ") == 0  # one sentence


def test_the_front_has_what_no_other_beats_in_both() -> None:
    front = pictures.front([BEST, CLOSE, WORSE, fabricated("adamix", [0.7], 9_000)], lambda row: row.parameters, 1)
    assert [row.method for row in front] == ["ia3", "lora[r=8]", "houlsby"]
    lower = pictures.front([BEST, CLOSE, WORSE], lambda row: row.parameters, -1)
    assert [row.method for row in lower] == ["ia3"]


# -- the report ---------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a page is made of; complains about elements that do not close."""

    EMPTY = frozenset({"meta"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def comparison(folder: Path, found: tuple[Row, ...] = (BEST, CLOSE, WORSE, BROKEN)) -> Comparison:
    asked = {"model": "pkg:some/model", "data": "a<b>.jsonl", "task": "classify", "objective": "accuracy", "seeds": 2,
             "methods": [row.method for row in found], "epochs": 3.0, "minutes": 5.0,
             "rows": {"train": 800, "dev": 100, "test": 400}}  # fmt: skip
    return Comparison(str(folder), asked, found, 0.5, True, True, "lora[r=8]", "Take lora[r=8]: <because>.")


def page_of(found: Comparison) -> str:
    return report.page(found, pictures.pareto(found))


def test_the_page_is_whole_and_needs_nothing_else(tmp_path) -> None:
    made = page_of(comparison(tmp_path))
    page = Page(made)
    assert "script" not in page.tags and "link" not in page.tags and "img" not in page.tags
    for name, value in page.attributes:
        assert name != "src"
        if name.endswith("href"):
            assert value and value.startswith("#")
    assert not re.search(r"url\((?!#)|@import", made)
    links = re.findall(r"https?://[^\s\"]+", made)
    assert {link for link in links if "www.w3.org" not in link} == set()  # names of XML namespaces only
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = {value[1:] for name, value in page.attributes if name.endswith("href") and value}
    used |= set(re.findall(r"url\(#([^)]+)\)", made))
    assert used <= set(ids)
    assert 'name="viewport"' in made and "prefers-color-scheme: dark" in made


def test_the_page_says_everything(tmp_path) -> None:
    text = " ".join(" ".join(Page(page_of(comparison(tmp_path))).text).split())
    for said in (
        "Take lora[r=8]: <because>.", "pkg:some/model", "a<b>.jsonl",
        "800 to train on, 100 to choose by, 400 to test on",
        "3 epochs, as many of them as fit into 5 minutes in all", "0.810 ± 0.014", "-0.010 [-0.030, +0.010]",
        "no difference found", "-0.200 [-0.230, -0.170]", "worse", "best mean", "8,000", "0.001 *",
        "broken on <purpose>", "0.001: 0.700, 0.003: 0.600", "trimtab train --seed 1 <houlsby>",
        "0.500 on the test rows",
        "houlsby: accuracy 0.810 ± 0.014, trained parameters 5e+04", "peak memory, MB", "training seconds",
    ):  # fmt: skip
        assert said in text, said


def test_plots_are_svg_with_a_name_for_every_method(tmp_path) -> None:
    plots = re.findall(r"<svg.*?</svg>", page_of(comparison(tmp_path)), re.DOTALL)
    assert len(plots) == 4
    space = "{http://www.w3.org/2000/svg}"
    for plot in plots:
        tree = ElementTree.fromstring(plot)
        assert tree.get("viewBox") and tree.get("width") is None
        titles = [one.text or "" for one in tree.iter(f"{space}title")]
        assert [title.partition(":")[0] for title in titles] == ["houlsby", "lora[r=8]", "ia3"]
        assert "currentColor" in plot and pictures.INK not in plot  # the page's own colour, light or dark
        drawn = [one for one in tree.iter(f"{space}g") if one.get("class") == "named"]
        assert all(len(list(one.iter())) > 2 for one in drawn)


def test_files_of_the_report(tmp_path) -> None:
    report.write_report(comparison(tmp_path))
    found = json.loads((tmp_path / "results.json").read_text())
    assert [row["method"] for row in found["rows"]] == [row.method for row in (BEST, CLOSE, WORSE, BROKEN)]
    assert found["rows"][1]["difference"] == {"mean": -0.01, "low": -0.03, "high": 0.01}
    assert found["rows"][3]["mean"] is None and "NaN" not in (tmp_path / "results.json").read_text()
    lines = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [(line["method"], line["test"]) for line in lines[:2]] == [("houlsby", "0.8"), ("houlsby", "0.82")]
    assert lines[-1]["error"] == "broken on <purpose>" and len(lines) == 7
    picture = (tmp_path / "pareto.svg").read_text()
    ElementTree.fromstring(picture)
    assert "currentColor" not in picture and pictures.INK not in picture


def test_a_report_without_any_score(tmp_path) -> None:
    lost = dataclasses.replace(comparison(tmp_path, (BROKEN,)), recommended=None)
    assert "<svg" not in page_of(lost) and "broken on &lt;purpose&gt;" in page_of(lost)
    report.write_report(lost)


@needs_browser
def test_the_page_opens_in_a_browser(tmp_path) -> None:
    report.write_report(comparison(tmp_path))
    assert opened(tmp_path / "report.html").count("<svg") == 4


# -- the command --------------------------------------------------------------------------------------------------


def test_the_command_shows_the_table_and_the_recommendation(tmp_path, model, data) -> None:
    out = tmp_path / "out"
    done = run("compare", "--model", model, "--data", data, "--methods", "head,lora[r=2,layers=9]", "--output", out,
               "--epochs", "1", "--eval-share", "0.2", "--dev-share", "0.3", "--max-length", "32", "--seeds", "1",
               "--lr-factors", "1")  # fmt: skip
    assert done.exit_code == 0, (done.output, done.exception)
    assert "against the best" in done.stdout and "failed  lora[r=2,layers=9]: " in done.stdout
    assert "Take head: accuracy" in done.stdout and str(out / "report.html") in done.stdout.replace("\n", "")
    assert {path.name for path in out.iterdir()} == {
        "compare.json", "rows", "cells", "adapters", "report.html", "results.json", "results.csv", "pareto.svg"
    }  # fmt: skip


def test_an_interrupted_command_says_how_to_go_on(tmp_path, model, data, monkeypatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(steps, "compare", interrupted)
    done = run("compare", "--model", model, "--data", data, "--methods", "head", "--output", tmp_path / "out")
    assert done.exit_code == 130 and "go on with the same command" in done.stderr

"""The model card, the curves and the tables of a run folder."""

from __future__ import annotations

import json
import math
import warnings
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import yaml

from trimtab.errors import UserError
from trimtab.report import draw_curves, model_card, number, read_run, run_folders, save_figure, size, smoothed, summary
from trimtab.report import write_report as write

CONFIG = {
    "format": 1,
    "name": "default",
    "method": {"name": "lora", "r": 4, "targets": ["q", "v"]},
    "base": {"path": "pkg:somewhere/model", "class": "LlamaForCausalLM", "model_type": "llama", "fingerprint": "0"},
    "task": {"name": "classify", "labels": ["no", "yes|maybe"], "template": "Headline: {text}\nSarcastic:"},
}
METRICS = {
    "before": {"accuracy": 0.5, "loss": 2.5, "examples": 40},
    "after": {"accuracy": 0.75, "loss": 0.5, "examples": 40},
    "train": {"seconds": 12.5, "tokens": 1234, "tokens_per_second": 98.7, "peak_memory_mb": 512.0, "epochs": 2.0},
    "parameters": {"trainable": 12345, "total": 1234500, "share": 0.01},
    "bytes": 56789,
}


def make_run(folder: Path, *, data: str = "data.jsonl", steps: int = 30, method: dict | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, "method": method or CONFIG["method"]}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "metrics.json").write_text(json.dumps(METRICS), encoding="utf-8")
    run = {"model": "m", "data": data, "lr": 0.001, "seed": 0, "versions": {"torch": "2.13.0"}}
    (folder / "run.yaml").write_text(yaml.safe_dump(run, allow_unicode=True), encoding="utf-8")
    log = [
        {"step": i, "epoch": i / 10, "loss": 1 + math.exp(-i), "lr": 1e-3 / i, "tokens": 9} for i in range(1, steps + 1)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log), encoding="utf-8")
    return folder


def test_the_card_says_what_the_files_say(tmp_path):
    write(make_run(tmp_path / "run"))
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "trimtab"
    assert "lora" in front["tags"]
    assert "base_model" not in front  # the base is no hub id
    for said in (
        "`lora[r=4]`",
        "Hu et al. 2021, arXiv:2106.09685",
        "  - r: `4`",
        '  - targets: `["q", "v"]`',
        "`pkg:somewhere/model` (LlamaForCausalLM, family llama)",
        "| accuracy | 0.5 | 0.75 | +0.25 |",
        "12,345 of 1,234,500",
        "yes\\|maybe",
        "`Headline: {text}\\nSarcastic:`",
        "`data.jsonl`",
        "trimtab eval run",
        "trimtab merge run",
        "## Licence",
        "torch 2.13.0",
    ):
        assert said in card
    assert "None" not in card
    assert card.endswith(".\n")


def test_the_card_names_a_hub_base(tmp_path, monkeypatch):
    facts = read_run(make_run(tmp_path))
    facts["adapter"]["base"]["path"] = "owner/model-1.5B"
    assert yaml.safe_load(model_card(facts).split("---")[1])["base_model"] == "owner/model-1.5B"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "base").mkdir(parents=True)
    for local in ("/somewhere/local", "models/base"):
        facts["adapter"]["base"]["path"] = local
        assert "base_model" not in yaml.safe_load(model_card(facts).split("---")[1])


def test_a_method_that_does_not_merge_has_no_merge_command(tmp_path):
    card = model_card(read_run(make_run(tmp_path, method={"name": "prompt", "length": 4})))
    assert "trimtab merge" not in card
    assert "`prompt[length=4]`" in card


def test_a_fully_tuned_model_is_told_by_its_own_file(tmp_path):
    folder = make_run(tmp_path / "run", method={"name": "full"})
    (folder / "adapter_config.json").rename(folder / "trimtab_config.json")
    (folder / "metrics.json").unlink()
    assert run_folders(tmp_path) == [folder]
    assert summary(folder)["method"] == "full"
    card = model_card(read_run(folder))
    for said in ("A fully tuned model", 'LlamaForCausalLM.from_pretrained("run")', "holds a model derived from"):
        assert said in card
    for other in ("frozen base", "load_run", "parameter-efficient", "tt.load", "trimtab merge"):
        assert other not in card


def test_a_union_cites_every_paper(tmp_path):
    members = [{"name": "prompt", "length": 4}, {"name": "lora", "r": 2}]
    card = model_card(read_run(make_run(tmp_path, method={"name": "union", "methods": members})))
    assert "arXiv:2104.08691" in card
    assert "arXiv:2106.09685" in card
    assert "`prompt[length=4]\\|lora[r=2]`" in card


def test_the_curves_show_every_step_and_both_evaluations(tmp_path):
    figure = draw_curves(read_run(make_run(tmp_path)))
    losses, rates = figure.axes
    lines = {line.get_label(): line for line in losses.get_lines()}
    assert len(lines["each step"].get_xdata()) == 30
    assert list(lines["held out, before"].get_ydata()) == [2.5]
    assert list(lines["held out, after"].get_xdata()) == [30]
    assert rates.get_lines()[0].get_ydata()[0] == pytest.approx(1e-3)
    assert "accuracy 0.5 → 0.75" in figure.get_suptitle()


def test_the_picture_is_an_svg_and_the_same_each_time(tmp_path):
    write(make_run(tmp_path))
    first = (tmp_path / "curves.svg").read_bytes()
    assert ElementTree.fromstring(first).tag == "{http://www.w3.org/2000/svg}svg"
    write(tmp_path)
    assert (tmp_path / "curves.svg").read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["README.md", "adapter_config.json", "curves.svg", "log.jsonl", "metrics.json", "run.yaml"]
    )


@pytest.mark.parametrize("data", ["数据/评论分类.csv", "données/$a_b$.csv", "\u13a0\u2a01.csv"])
def test_any_script_is_drawn_or_kept_as_text_without_a_warning(tmp_path, data):
    figure = draw_curves(read_run(make_run(tmp_path, data=data)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_figure(figure, tmp_path / "curves.svg")
    svg = (tmp_path / "curves.svg").read_text(encoding="utf-8")
    kept_as_text = "<text" in svg
    assert data in svg if kept_as_text else "<path" in svg


def test_a_run_without_steps_has_a_card_and_no_picture(tmp_path):
    write(make_run(tmp_path, steps=0))
    assert "curves.svg" not in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert not (tmp_path / "curves.svg").exists()


def test_a_line_cut_short_by_a_kill_is_left_out_and_a_broken_one_is_named(tmp_path):
    make_run(tmp_path, steps=3)
    log = tmp_path / "log.jsonl"
    whole = log.read_text(encoding="utf-8")
    log.write_text(whole + '{"step": 4, "lo', encoding="utf-8")
    assert [row["step"] for row in read_run(tmp_path)["log"]] == [1, 2, 3]
    log.write_text('{"step"\n' + whole, encoding="utf-8")
    with pytest.raises(UserError, match="line 1"):
        read_run(tmp_path)


def test_non_finite_numbers_do_not_stop_the_report(tmp_path):
    make_run(tmp_path, steps=3)
    metrics = {**METRICS, "after": {"accuracy": 0.5, "loss": math.nan, "perplexity": math.inf, "examples": 4}}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    write(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| loss | 2.5 | nan |" in card
    assert "| perplexity | – | inf |" in card


def test_the_summary_of_a_folder(tmp_path):
    found = summary(make_run(tmp_path))
    assert found["method"] == "lora[r=4]"
    assert found["base"] == "pkg:somewhere/model"
    assert found["after"]["accuracy"] == 0.75
    assert found["parameters"]["trainable"] == 12345


def test_runs_are_found_one_level_down(tmp_path):
    one, two = make_run(tmp_path / "b"), make_run(tmp_path / "a")
    (tmp_path / "other").mkdir()
    assert run_folders(tmp_path) == [two, one]
    assert run_folders(one) == [one]


def test_folders_that_are_no_runs_are_named(tmp_path):
    with pytest.raises(UserError, match="no output of trimtab"):
        run_folders(tmp_path)
    with pytest.raises(UserError, match="no output of trimtab"):
        write(tmp_path)
    with pytest.raises(UserError, match="there is no folder"):
        read_run(tmp_path / "missing")
    (tmp_path / "metrics.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="not valid JSON"):
        read_run(tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "metrics.json"]


def test_numbers_for_people():
    cases = [1234567, 0.71234, 0, 1.0, 1234.5, None, math.nan]
    assert [number(value) for value in cases] == ["1,234,567", "0.7123", "0", "1", "1,234", "–", "nan"]
    assert [size(value) for value in (999, 56789, 1850000, 93e9, None)] == [
        "999 bytes",
        "56.8 kB",
        "1.9 MB",
        "93.0 GB",
        "–",
    ]


def test_the_smoothed_curve_keeps_length_and_level():
    assert smoothed([3.0] * 40) == [3.0] * 40
    noisy = [(-1.0) ** i for i in range(100)]
    assert max(map(abs, smoothed(noisy))) < 0.6

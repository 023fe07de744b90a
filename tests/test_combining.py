"""Sums of LoRAs: against peft's `add_weighted_adapter`, and against changes computed by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import trimtab as tt
from tiny import inputs, output, tiny
from trimtab.__main__ import app
from trimtab.combining import WAYS, combine, dropped, elected, trimmed
from trimtab.errors import UserError

WEIGHTS = [0.5, -0.3]


def _save(folder: Path, seed: int, method: str = "lora[r=3,alpha=5]", family: str = "llama", **how: Any) -> Path:
    adapter = tt.attach(tiny(family), method)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    if "labels" in how:
        adapter.fit_head(how["labels"])
    if "base" in how:
        adapter.model.get_input_embeddings().weight.data.add_(1)
    adapter.save(folder)
    return folder


def _changes(folder: Path, family: str = "llama") -> dict[str, torch.Tensor]:
    """s B A of every projection, by the merge of a fresh model: what the adapter does to the weights."""
    model, base = tiny(family), dict(tiny(family).named_parameters())
    tt.load(model, folder).merge()
    return {name: (weight - base[name]).detach() for name, weight in model.named_parameters()}


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    return [_save(tmp_path / "a", 1), _save(tmp_path / "b", 2, "lora[r=3,alpha=7,rank_stabilised=true]")]


def _of_peft(folders: list[Path], tmp_path: Path, how: str, **options: Any) -> torch.Tensor:
    peft = pytest.importorskip("peft")
    model = None
    for folder in folders:
        tt.load(tiny("llama"), folder).export(tmp_path / f"peft-{folder.name}", "peft")
        where = str(tmp_path / f"peft-{folder.name}")
        if model is None:
            model = peft.PeftModel.from_pretrained(tiny("llama"), where, adapter_name=folder.name)
        else:
            model.load_adapter(where, adapter_name=folder.name)
    names = [folder.name for folder in folders]
    inject = model.base_model.inject_adapter  # which draws a start for the sum, too
    model.base_model.inject_adapter = lambda *args, **how: (inject(*args, **how), torch.manual_seed(11))
    model.add_weighted_adapter(names, WEIGHTS, "sum", combination_type=how, **options)
    model.set_adapter("sum")
    with torch.no_grad():
        return model(**inputs("llama")).logits


@pytest.mark.parametrize("how", WAYS)
def test_the_logits_are_pefts(how: str, tmp_path: Path) -> None:
    """One projection, so that dare draws in the order in which peft does."""
    place = "targets=k,layers=1"
    folders = [
        _save(tmp_path / "a", 1, f"lora[r=3,alpha=5,{place}]"),
        _save(tmp_path / "b", 2, f"lora[r=3,alpha=7,rank_stabilised=true,{place}]"),
    ]
    options: dict[str, Any] = {"density": 0.6} if how.startswith(("ties", "dare")) else {}
    expected = _of_peft(folders, tmp_path, how, **options, **({"svd_rank": 2} if "svd" in how else {}))
    given = {**options, **({"rank": 2} if "svd" in how else {})}
    tt.combine(folders, WEIGHTS, tmp_path / "sum", how=how, seed=11, **given)
    model = tiny("llama")
    tt.load(model, tmp_path / "sum")
    with torch.no_grad():
        found, base = model(**inputs("llama")).logits, tiny("llama")(**inputs("llama")).logits
    assert (found - expected).abs().max() <= 1e-5
    assert (found - base).abs().max() > 1e-3


@pytest.mark.parametrize("how", ["linear", "cat", "svd", "ties", "ties_svd"])
def test_all_projections_are_pefts(how: str, two: list[Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {"density": 0.6} if how.startswith("ties") else {}
    expected = _of_peft(two, tmp_path, how, **options)
    combine(two, WEIGHTS, tmp_path / "sum", how=how, **options)
    model = tiny("llama")
    tt.load(model, tmp_path / "sum")
    with torch.no_grad():
        assert (model(**inputs("llama")).logits - expected).abs().max() <= 1e-5


def test_cat_is_the_sum_of_the_changes(two: list[Path], tmp_path: Path) -> None:
    third = _save(tmp_path / "c", 3, "lora[r=2,targets=q,o]")  # another rank and other targets
    combine([*two, third], [0.5, -0.3, 2], tmp_path / "sum", how="cat")
    assert tt.load(tiny("llama"), tmp_path / "sum").method == tt.LoRA(r=8, alpha=8, targets=("q", "v", "o"))
    a, b, c, found = (_changes(folder) for folder in (*two, third, tmp_path / "sum"))
    for name in found:
        assert torch.allclose(found[name], 0.5 * a[name] - 0.3 * b[name] + 2 * c[name], atol=1e-5), name
    assert any(change.abs().max() > 0.1 for change in found.values())


def test_svd_is_the_nearest_of_its_rank(two: list[Path], tmp_path: Path) -> None:
    for rank in (2, 6, 40):
        combine(two, WEIGHTS, tmp_path / f"sum{rank}", how="svd", rank=rank)
    a, b = (_changes(folder) for folder in two)
    for rank in (2, 6, 40):
        found = _changes(tmp_path / f"sum{rank}")
        for name in [name for name in found if "q_proj.weight" in name]:
            wanted = (0.5 * a[name] - 0.3 * b[name]).double()
            sigma = torch.linalg.svdvals(wanted)
            error = (found[name].double() - wanted).norm()  # by Eckart and Young
            assert error == pytest.approx(float(sigma[rank:].norm()), abs=1e-5)


def test_linear_is_computed_by_hand(tmp_path: Path) -> None:
    folders = [_save(tmp_path / name, seed, "lora[r=2,alpha=4]") for name, seed in (("a", 1), ("b", 2))]
    combine(folders, [0.5, 0.125], tmp_path / "sum")
    a, b = (tt.load(tiny("llama"), folder).state_dict() for folder in folders)
    model = tiny("llama")
    found = tt.load(model, tmp_path / "sum").state_dict()
    for key, tensor in found.items():
        assert torch.allclose(tensor, a[key] * math.sqrt(0.5 * 2) + b[key] * math.sqrt(0.125 * 2), atol=1e-6)


def test_the_rules_by_hand() -> None:
    assert trimmed(torch.tensor([[1.0, -4.0], [3.0, 2.0]]), 0.5).tolist() == [[0.0, -4.0], [3.0, 0.0]]
    tasks = torch.tensor([[1.0, -2.0, 0.0, 1.0], [3.0, 1.0, 2.0, -1.0]])
    # signs + - + +(a sum of 0); means over those that agree
    assert elected(tasks, [0.5, 2.0]).tolist() == [(0.5 + 6.0) / 2, -1.0, 4.0, 0.5]


def test_dare_keeps_its_share_and_the_expectation() -> None:
    ones = torch.ones(100_000)
    kept = dropped(ones, 0.3, torch.Generator().manual_seed(0))
    assert kept.unique().tolist() == pytest.approx([0.0, 1 / 0.3])
    assert float(kept.mean()) == pytest.approx(1.0, abs=0.02)  # five standard deviations are 0.024
    assert torch.equal(kept, dropped(ones, 0.3, torch.Generator().manual_seed(0)))
    assert not torch.equal(kept, dropped(ones, 0.3, torch.Generator().manual_seed(1)))


def test_heads_become_their_weighted_mean(tmp_path: Path) -> None:
    folders = [_save(tmp_path / name, seed, "lora[r=2]", "bert") for name, seed in (("a", 1), ("b", 2))]
    combine(folders, [3, 1], tmp_path / "sum", how="cat")
    a, b, found = (tt.load(tiny("bert"), folder).state_dict() for folder in (*folders, tmp_path / "sum"))
    heads = [key for key in found if key.startswith("head_")]
    assert len(heads) == 2
    assert all(torch.allclose(found[key], 0.75 * a[key] + 0.25 * b[key]) for key in heads)
    with pytest.raises(UserError, match="add up to more than 0"):
        combine(folders, [1, -1], tmp_path / "none")


def test_one_adapter_of_weight_one_is_itself(two: list[Path], tmp_path: Path) -> None:
    for how in ("linear", "cat", "svd"):
        combine(two[:1], [1], tmp_path / how, how=how)
        expected, model = tiny("llama"), tiny("llama")
        tt.load(expected, two[0])
        tt.load(model, tmp_path / how)
        with torch.no_grad():
            assert torch.allclose(output(model, inputs("llama")), output(expected, inputs("llama")), atol=1e-5)


def test_pissa_is_summed_as_the_lora_that_it_is_saved_as(tmp_path: Path) -> None:
    folder = _save(tmp_path / "a", 1, "lora[r=2,init=pissa]")
    combine([folder], [0.5], tmp_path / "sum", how="cat")
    one, half = _changes(folder), _changes(tmp_path / "sum")
    assert all(torch.allclose(half[name], 0.5 * one[name], atol=1e-5) for name in one)


REFUSED = [
    ({"method": "lora[r=2]"}, {}, "have the ranks 3 and 2, and linear adds factors of one rank; use cat or svd"),
    ({"method": "lora[r=3,targets=q]"}, {}, "adapt different projections"),
    ({"method": "lora[r=3,layers=0]"}, {"how": "cat"}, "adapt different layers"),
    ({"method": "lora[dora=true]"}, {}, "is a DoRA"),
    ({"method": "ia3"}, {}, "is an adapter of ia3; only LoRAs"),
    ({"method": "lora|prompt[length=2]"}, {}, "is an adapter of lora|prompt; only LoRAs"),
    ({"base": True}, {}, "trained on different base models"),
    ({}, {"how": "lineal"}, "did you mean 'linear'"),
    ({}, {"rank": 2}, "rank belongs to svd"),
    ({}, {"how": "svd", "rank": 0}, "rank=0 must be at least 1"),
    ({}, {"density": 0.5}, "density belongs to ties and dare"),
    ({}, {"how": "ties"}, "needs a density above 0"),
    ({}, {"how": "dare_linear", "density": 1.5}, "needs a density above 0"),
    ({}, {"weights": [1]}, "2 adapters need as many weights, not 1"),
    ({}, {"weights": [1, 0]}, "finite numbers other than 0"),
    ({}, {"weights": [1, math.nan]}, "finite numbers other than 0"),
]


@pytest.mark.parametrize(("second", "options", "words"), REFUSED)
def test_refuses(second: dict[str, Any], options: dict[str, Any], words: str, tmp_path: Path) -> None:
    folders = [_save(tmp_path / "a", 1), _save(tmp_path / "b", 2, **second)]
    given: dict[str, Any] = {"weights": WEIGHTS, **options}
    with pytest.raises(UserError, match=r"^.*$") as refusal:
        combine(folders, given.pop("weights"), tmp_path / "sum", **given)
    assert words in str(refusal.value) and not (tmp_path / "sum").exists()


def test_refuses_other_labels(tmp_path: Path) -> None:
    folders = [
        _save(tmp_path / "a", 1, "lora", "bert", labels=["good", "bad"]),
        _save(tmp_path / "b", 2, "lora", "bert", labels=["yes", "no"]),
    ]
    with pytest.raises(UserError, match="heads with different labels"):
        combine(folders, [1, 1], tmp_path / "sum", how="cat")


def _run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["merge", *map(str, arguments)])


def test_on_the_command_line(two: list[Path], tmp_path: Path) -> None:
    options = ["--weights", "0.5,-0.3", "--combine", "dare_ties", "--density", "0.5", "--seed", "3"]
    done = _run(*two, *options, "--output", tmp_path / "sum")
    assert (done.exit_code, done.stdout.strip()) == (0, str(tmp_path / "sum")), done.output
    said = json.loads((tmp_path / "sum" / "adapter_config.json").read_text(encoding="utf-8"))["combined"]
    assert said["of"] == [{"folder": "a", "weight": 0.5}, {"folder": "b", "weight": -0.3}]
    assert (said["how"], said["density"], said["seed"]) == ("dare_ties", 0.5, 3)
    assert "| sum (dare_ties) | 0.5 · `a` + -0.3 · `b` |" in (tmp_path / "sum" / "README.md").read_text(
        encoding="utf-8"
    )
    one = load_file(tmp_path / "sum" / "adapter_model.safetensors")
    assert "--overwrite" in _run(*two, *options, "--output", tmp_path / "sum").stderr
    assert _run(*two, *options, "--output", tmp_path / "sum", "--overwrite").exit_code == 0
    again = load_file(tmp_path / "sum" / "adapter_model.safetensors")
    assert all(torch.equal(again[key], one[key]) for key in one)
    assert _run(*two, *options[:-1], "4", "--output", tmp_path / "sum", "--overwrite").exit_code == 0
    other = load_file(tmp_path / "sum" / "adapter_model.safetensors")
    assert any(not torch.equal(other[key], one[key]) for key in one)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--weights", "a,b"], "--weights must be numbers"),
        ([], "needs --weights"),
        (["--weights", "1,1", "--dtype", "float16"], "belong to a merged model"),
        (["--weights", "1,1", "--output", "{tmp}/a", "--overwrite"], "is the adapter folder"),
        (["--weights", "1,1", "--output", "{tmp}/notes", "--overwrite"], "no sum of adapters"),
    ],
)
def test_the_command_line_refuses(options: list[str], words: str, two: list[Path], tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine", encoding="utf-8")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    where = [] if "--output" in options else ["--output", tmp_path / "sum"]
    done = _run(*two, *where, *(option.format(tmp=tmp_path) for option in options))
    assert done.exit_code == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

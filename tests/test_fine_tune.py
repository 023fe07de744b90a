"""A run from settings to folder: the numbers reload, interruptions resume, mistakes write nothing."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from trimtab.errors import UserError
from trimtab.snapshots import checkpoints
from trimtab.train import TrainSettings, evaluate_run, fine_tune, load_run
from trimtab.trainer import Trainer

GOOD, BAD = "天气好晴朗喜欢高兴", "下雨冷难过讨厌糟糕"
LABELS = {"好评": GOOD, "差评": BAD}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny base models with a tokenizer that reads single characters, one folder a kind."""
    signs = sorted(set(GOOD + BAD + "好评差评文本标签：的了是 \n"))
    vocabulary = {sign: index for index, sign in enumerate(["<pad>", "<s>", "</s>", "<unk>", *signs])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    sizes = dict(vocab_size=len(vocabulary), pad_token_id=0, bos_token_id=1, eos_token_id=2)
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, **sizes)
    t5 = dict(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    made: dict[str, Any] = {
        "causal": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**small)),
        "seq2seq": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**t5, **sizes)),
        "encoder": lambda: hf.BertForMaskedLM(hf.BertConfig(**small)),  # no pooler, no classifier
    }
    folders = {}
    for kind, make in made.items():
        torch.manual_seed(0)
        folders[kind] = tmp_path_factory.mktemp(kind)
        make().save_pretrained(folders[kind])
        if kind == "encoder":
            inner.post_processor = processors.TemplateProcessing(
                single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
            )
        marks = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
        hf.PreTrainedTokenizerFast(tokenizer_object=inner, **marks).save_pretrained(folders[kind])
    return folders


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 Chinese sentences of signs that give their label away."""
    chance = random.Random(3)
    path = tmp_path_factory.mktemp("data") / "评论.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["文本", "标签"])
        for index in range(160):
            label = list(LABELS)[index % 2]
            writer.writerow(["".join(chance.choices(LABELS[label], k=chance.randint(4, 14))), label])
    return path


def settings(base: Path, data: Path, output: Path, **options: Any) -> TrainSettings:
    values: dict[str, Any] = dict(
        text_column="文本", label_column="标签", epochs=2, lr=2e-2, eval_share=0.25, max_length=64, batch_size=8
    )
    return TrainSettings(model=str(base), data=str(data), output=str(output), **{**values, **options})


@pytest.mark.parametrize("kind", ["causal", "seq2seq", "encoder"])
def test_a_run_learns_and_a_fresh_base_with_its_folder_gives_the_same_numbers(
    bases: dict[str, Path], data: Path, tmp_path: Path, kind: str
) -> None:
    output = tmp_path / "out"
    method = "lora[targets=q,v,up]|prompt[length=4]" if kind == "causal" else "lora[r=8]"
    template = None if kind == "encoder" else "文本：{text}\n标签："
    metrics = fine_tune(settings(bases[kind], data, output, method=method, template=template, epochs=4))
    assert metrics["after"]["accuracy"] >= 0.9 > metrics["before"]["accuracy"]
    assert metrics["after"]["examples"] == 40
    assert json.loads((output / "metrics.json").read_text()) == metrics
    assert evaluate_run(output) == metrics["after"]
    assert evaluate_run(output, str(data))["examples"] == 160
    run = yaml.safe_load((output / "run.yaml").read_text(encoding="utf-8"))
    assert run["lr"] == 2e-2 and run["seed"] == 0 and run["versions"]["torch"]
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [set(line) for line in log] == [{"step", "epoch", "loss", "lr", "tokens", "seconds"}] * metrics["train"][
        "steps"
    ]
    assert metrics["train"]["tokens"] == log[-1]["tokens"] and log[-1]["epoch"] == 4
    assert metrics["train"]["peak_memory_mb"] > 10
    tuned = load_run(output)
    assert tuned.task.labels == tuple(sorted(LABELS)) and not tuned.model.training
    assert (output / "README.md").is_file() and (output / "curves.svg").is_file()
    assert metrics["bytes"] == (output / "adapter_model.safetensors").stat().st_size


def test_full_fine_tuning_writes_a_model_folder(bases: dict[str, Path], data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    metrics = fine_tune(settings(bases["causal"], data, output, method="full", lr=1e-2))
    assert metrics["parameters"]["share"] == 1.0
    assert evaluate_run(output) == metrics["after"]
    hf.AutoTokenizer.from_pretrained(output)
    fine_tune(settings(bases["causal"], data, output, overwrite=True, epochs=1))
    assert not (output / "model.safetensors").exists() and (output / "adapter_model.safetensors").is_file()


def test_the_base_model_is_never_the_output(bases: dict[str, Path], data: Path) -> None:
    before = sorted(path.name for path in bases["causal"].iterdir())
    with pytest.raises(UserError, match="is the base model itself"):
        fine_tune(settings(bases["causal"], data, bases["causal"], method="full", overwrite=True))
    assert before == sorted(path.name for path in bases["causal"].iterdir())


def test_a_generating_task_reports_bleu_and_perplexity(bases: dict[str, Path], data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    rows = list(csv.DictReader(data.open(encoding="utf-8")))
    answers = tmp_path / "answers.jsonl"
    lines = [{"文本": row["文本"], "标签": LABELS[row["标签"]][:6]} for row in rows]
    answers.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    options = dict(task="generate", template="{text}：", method="lora|head", epochs=3)
    metrics = fine_tune(settings(bases["causal"], answers, output, **options))
    assert metrics["after"]["perplexity"] < metrics["before"]["perplexity"] / 2
    assert metrics["after"]["bleu"] > 50 > metrics["before"]["bleu"]
    assert evaluate_run(output) == metrics["after"]


RESUMED = dict(save_steps=5, batch_size=None, batch_tokens=80, method="lora[dropout=0.1]")


def _same(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert one["after"] == pytest.approx(two["after"], abs=1e-5)
    assert one["before"] == pytest.approx(two["before"], abs=1e-5)
    for key in ("tokens", "epochs", "steps"):
        assert one["train"][key] == two["train"][key]


@pytest.mark.slow  # processes that start, wait to be killed, and start again
def test_a_run_that_was_killed_or_interrupted_ends_with_the_same_numbers(
    bases: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    whole = fine_tune(settings(bases["causal"], data, tmp_path / "whole", **RESUMED))
    cut = settings(bases["causal"], data, tmp_path / "cut", **RESUMED)
    for sign in (signal.SIGKILL, signal.SIGINT):
        _start_and_send(cut, sign)
        assert checkpoints(cut.output) and not (tmp_path / "cut" / "metrics.json").exists()
        cut = dataclasses.replace(cut, resume=True)
    _same(fine_tune(cut), whole)
    left, right = ((tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "cut"))
    assert [json.loads(a)["loss"] for a in left] == pytest.approx([json.loads(b)["loss"] for b in right], abs=1e-5)


def _start_and_send(wanted: TrainSettings, sign: int) -> None:
    """Run the settings slowly in another process and send it a signal six steps after a checkpoint was there."""
    code = (
        "import json, sys, time; from trimtab.train import *; from trimtab.trainer import Trainer\n"
        "step = Trainer.training_step\n"
        "Trainer.training_step = lambda *a, **k: (time.sleep(0.1), step(*a, **k))[1]\n"
        "fine_tune(TrainSettings(**json.loads(sys.argv[1])))"
    )
    values = json.dumps(dataclasses.asdict(wanted))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", code, values], env=environment, stderr=subprocess.PIPE, text=True)
    log = Path(wanted.output) / "log.jsonl"
    began = max((int(path.name[11:]) for path in checkpoints(wanted.output)), default=0)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        steps = len(log.read_text().splitlines()) if log.exists() else 0
        if steps >= began + 7 and len(checkpoints(wanted.output)) and _newest(wanted.output) > began:
            break
        time.sleep(0.02)
    process.send_signal(sign)
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0
    if sign == signal.SIGINT:
        assert "KeyboardInterrupt: stopped after step" in said


def _newest(output: str) -> int:
    return int(checkpoints(output)[-1].name[11:])


def test_a_folder_with_results_is_refused_unless_asked(bases: dict[str, Path], data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    first = settings(bases["encoder"], data, output, epochs=1)
    fine_tune(first)
    (output / "mine.txt").write_text("kept")
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    with pytest.raises(UserError, match="holds something already"):
        fine_tune(first)
    with pytest.raises(UserError, match="'spam' does not exist"):
        fine_tune(dataclasses.replace(first, overwrite=True, text_column="spam"))
    with pytest.raises(UserError, match="'nothing' does not exist"):
        fine_tune(dataclasses.replace(first, overwrite=True, method="lora[targets=nothing]"))
    with pytest.raises(UserError, match=r"began with epochs=1, not 2"):
        fine_tune(dataclasses.replace(first, resume=True, epochs=2))
    with pytest.raises(UserError, match="resume and overwrite"):
        fine_tune(dataclasses.replace(first, resume=True, overwrite=True))
    assert before == {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    fine_tune(dataclasses.replace(first, overwrite=True, seed=1))
    assert (output / "mine.txt").read_text() == "kept"
    assert yaml.safe_load((output / "run.yaml").read_text(encoding="utf-8"))["seed"] == 1


def test_a_run_that_ended_can_be_resumed_without_change(bases: dict[str, Path], data: Path, tmp_path: Path) -> None:
    first = settings(bases["encoder"], data, tmp_path / "out", epochs=1)
    _same(fine_tune(first), fine_tune(dataclasses.replace(first, resume=True)))


def test_a_cache_folder_is_given_back_and_one_without_use_is_named(
    bases: dict[str, Path], data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from trimtab.store import Store

    first = settings(bases["encoder"], data, tmp_path / "out", epochs=1, cache=str(tmp_path / "states"))
    upper = dataclasses.replace(first, method="lora[r=2,layers=-1:]")
    _same(fine_tune(upper), fine_tune(dataclasses.replace(upper, overwrite=True)))
    assert not any("the cache" in message for message in caplog.messages)
    store = Store(0, tmp_path / "states" / "process-0")
    assert store.folder is not None  # not locked any more
    store.close()
    fine_tune(dataclasses.replace(first, overwrite=True, method="lora[r=2]"))
    assert any("stays unused: no layer lies below what lora trains" in message for message in caplog.messages)


def test_base_and_adapter_are_searched_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab import run_data
    from trimtab.beams import Search

    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(run_data, "evaluate", lambda *args, **how: asked.append(how) or {})
    unused: Any = None
    found = run_data.Data("causal", unused, unused, [], [], [], Search(num_beams=3), 7)
    found.evaluate_base(unused, False)
    found.evaluate(unused, False)
    assert asked[0] == asked[1] == {"max_new_tokens": 7, "search": Search(num_beams=3), "show": False}


def test_resume_of_nothing_starts_from_the_beginning(bases: dict[str, Path], data: Path, tmp_path: Path) -> None:
    metrics = fine_tune(settings(bases["encoder"], data, tmp_path / "out", resume=True, epochs=1))
    assert metrics["train"]["epochs"] == 1


def test_mistakes_leave_no_folder(bases: dict[str, Path], data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    for options, message in (
        ({"label_column": "labl"}, "labl"),
        ({"method": "lora[targets=nothing]"}, "nothing"),
        ({"model": "./nowhere"}, "nowhere"),
        ({"model": str(bases["encoder"]), "task": "generate"}, "cannot generate"),
        ({"batch_tokens": 5}, "batch_size and batch_tokens"),
        ({"dtype": "float3"}, "float32"),
    ):
        with pytest.raises(UserError, match=message):
            fine_tune(dataclasses.replace(settings(bases["causal"], data, output), **options))
    assert not output.exists()


def test_a_loss_that_is_not_finite_leaves_no_results(
    bases: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = Trainer.compute_loss
    monkeypatch.setattr(Trainer, "compute_loss", lambda *a, **k: compute(*a, **k) * float("inf"))
    with pytest.raises(UserError, match=r"the loss became inf at step 1 \(learning rate .*no good checkpoint yet"):
        fine_tune(settings(bases["encoder"], data, tmp_path / "out"))
    assert not (tmp_path / "out" / "metrics.json").exists()

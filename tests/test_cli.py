"""The command line: exit codes, streams, and that a mistake is one sentence and changes nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from typer.testing import CliRunner

import trimtab.__main__ as cli
from foreign import rewrite
from trimtab.methods import METHODS

WORDS = ["good", "bad"]
ROWS = [
    {"text": f"row {i} is {WORDS[i % 2]} {'and long ' * (i % 4)}", "label": WORDS[i % 2], "inner": [{"label": i % 2}]}
    for i in range(24)
]
TRAIN = ["--epochs", "1", "--eval-share", "0.25", "--max-length", "128"]


def byte_tokenizer() -> tf.PreTrainedTokenizerFast:
    """A token a byte, so that every script can be written."""
    vocabulary = {
        token: at for at, token in enumerate(["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return tf.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def save_model(folder: Path, kind: str, seed: int = 0) -> str:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 256, "pad_token_id": 0}
    if kind == "llama":
        model: Any = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, num_key_value_heads=2, bos_token_id=1, eos_token_id=2))
    elif kind == "gpt2":
        model = tf.GPT2LMHeadModel(
            tf.GPT2Config(
                vocab_size=259, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
            )
        )
    elif kind == "bert":
        model = tf.BertForMaskedLM(tf.BertConfig(**sizes))
    else:
        model = tf.MptForCausalLM(tf.MptConfig(vocab_size=259, d_model=32, n_heads=4, n_layers=1, max_seq_len=256))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def run(*args: str | Path) -> Any:
    return CliRunner().invoke(cli.app, [str(arg) for arg in args])


def refused(*args: str | Path) -> str:
    """The one sentence of a command that exits 2 without a traceback and without results."""
    result = run(*args)
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    return line


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_rows(tmp_path_factory.mktemp("data") / "data.jsonl", ROWS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, llama, data) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("trained") / "out"
    return folder, run("train", "--model", llama, "--data", data, "--method", "lora[r=2]", "--output", folder, *TRAIN)


@pytest.fixture
def out(tmp_path, trained) -> Path:
    """A copy of the trained folder, to spoil."""
    return Path(shutil.copytree(trained[0], tmp_path / "out"))


# What works


def test_train_writes_a_folder_and_tells_the_result(trained):
    folder, result = trained
    assert result.exit_code == 0, result.output
    written = {path.name for path in folder.iterdir() if not path.name.startswith("checkpoint")}
    assert written == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "run.yaml",
        "log.jsonl",
        "metrics.json",
        "curves.svg",
    }
    assert "accuracy" in result.stdout
    assert "trained parameters" in result.stdout
    assert result.stdout.strip().splitlines()[-1] == str(folder)
    assert "lora[r=2]" in (folder / "README.md").read_text(encoding="utf-8")


def test_eval_prints_one_json_object_with_the_numbers_of_the_run(trained, data):
    folder, _ = trained
    after = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["after"]
    for args in (["--json"], ["--json", "--data", data]):
        result = run("eval", folder, *args)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout) == after
    every = json.loads(run("eval", folder, "--data", data, "--every-row", "--json").stdout)
    assert (every["examples"], after["examples"]) == (24, 6)


def test_eval_for_people(trained):
    result = run("eval", trained[0], "--limit", "3")
    assert re.search(r"^accuracy +[\d.]+$", result.stdout, re.M)
    assert re.search(r"^examples +3$", result.stdout, re.M)


def test_generate_answers_with_a_label_for_a_classifier(trained):
    result = run("generate", trained[0], "--prompt", "row 3 is")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() in WORDS


def test_generate_continues_a_text(tmp_path, llama):
    rows = [{"prompt": f"count {i}:", "completion": f" {i} {i}"} for i in range(20)]
    data, folder = write_rows(tmp_path / "pairs.jsonl", rows), tmp_path / "out"
    result = run("train", "--task", "generate", "--model", llama, "--data", data, "--output", folder, *TRAIN)
    assert result.exit_code == 0, result.output
    assert "BLEU" in result.stdout
    result = run("generate", folder, "--prompt", "count 3:", "--max-new-tokens", "4")
    assert result.exit_code == 0, result.output


def test_table_to_text_with_beams(tmp_path, llama, monkeypatch):
    rows = [
        {"table": f"name: {i}", "references": [f"{i} is {word}" for word in ("here", "there", "nowhere")[: 1 + i % 3]]}
        for i in range(16)
    ]
    data, folder = write_rows(tmp_path / "tables.jsonl", rows), tmp_path / "out"
    flags = ["--task", "generate", "--model", llama, "--data", data, "--template", "{table}\\n", "--epochs", "1"]
    flags += ["--label-column", "references", "--eval-share", "0.25"]
    search = ["--beams", "3", "--length-penalty", "0.5", "--no-repeat-ngram-size", "2", "--max-new-tokens", "9"]
    result = run("train", *flags, *search, "--loss-per", "sentence", "--output", folder)
    assert result.exit_code == 0, (result.output, result.exception)
    kept = (folder / "run.yaml").read_text(encoding="utf-8")
    said = ("num_beams: 3", "length_penalty: 0.5", "no_repeat_ngram_size: 2", "max_new_tokens: 9", "loss_per: sentence")
    assert all(f"{line}\n" in kept for line in said)
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["after"]
    assert {"loss", "perplexity", "bleu", "nist"} <= set(metrics)
    assert json.loads(run("eval", folder, "--json").stdout) == metrics
    seen, search = [], ("num_beams", "length_penalty", "no_repeat_ngram_size", "max_new_tokens")
    made = tf.GenerationMixin.generate
    monkeypatch.setattr(
        tf.GenerationMixin, "generate", lambda *a, **k: (seen.append([k[name] for name in search]), made(*a, **k))[1]
    )
    other = run("eval", folder, "--json", "--beams", "1", "--max-new-tokens", "2")
    assert json.loads(other.stdout)["loss"] == metrics["loss"]
    run("eval", folder)
    run("generate", folder, "--prompt", "a", "--max-new-tokens", "3", "--beams", "2")
    assert seen == [[1, 1.0, 2, 2], [3, 0.5, 2, 9], [2, 0.5, 2, 3]]
    few, many = (run("generate", folder, "--prompt", "name: 3", *more) for more in ([], ["--max-new-tokens", "30"]))
    assert few.exit_code == many.exit_code == 0, (few.output, many.output)
    greedy = run("generate", folder, "--prompt", "name: 3", "--beams", "1", "--no-repeat-ngram-size", "0")
    assert greedy.exit_code == 0, greedy.output
    assert greedy.stdout != few.stdout
    assert "num_beams must be at least 1, not 0" in refused("generate", folder, "--prompt", "a", "--beams", "0")
    assert "no_repeat_ngram_size must be at least 0" in refused("eval", folder, "--no-repeat-ngram-size", "-2")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--beams", "0"], "num_beams='0' must be greater than 0"),
        (["--beams", "two"], "num_beams='two' must be a valid integer"),
        (["--length-penalty", "inf", "--beams", "2"], "length_penalty='inf' must be a finite number"),
        (["--length-penalty", "2"], "length_penalty=2 ranks beams: it needs num_beams of at least 2"),
        (["--no-repeat-ngram-size", "-1"], "no_repeat_ngram_size='-1' must be greater than or equal to 0"),
        (["--max-new-tokens", "0"], "max_new_tokens='0' must be greater than 0"),
        (["--loss-per", "sentense"], "did you mean sentence?"),
        (["--task", "classify", "--beams", "2"], "num_beams belongs to the task 'generate', not to 'classify'"),
        (["--task", "classify", "--max-new-tokens", "2"], "max_new_tokens belongs to the task 'generate'"),
    ],
)
def test_a_search_that_means_nothing(tmp_path, llama, data, flags, message):
    task = [] if "--task" in flags else ["--task", "generate"]
    assert message in refused("train", "--model", llama, "--data", data, "--output", tmp_path / "out", *task, *flags)
    assert not (tmp_path / "out").exists()


def test_a_classifier_has_no_beams(trained):
    assert "num_beams belongs to the task 'generate'" in refused("eval", trained[0], "--beams", "2")
    assert "num_beams belongs" in refused("generate", trained[0], "--prompt", "a", "--beams", "2")


def test_inspect_one_folder_and_a_folder_of_them(trained):
    folder, _ = trained
    assert "lora[r=2]" in run("inspect", folder).stdout
    alone = json.loads(run("inspect", folder, "--json").stdout)
    assert alone["method"] == "lora[r=2]"
    assert alone["task"]["labels"] == ["bad", "good"]
    many = json.loads(run("inspect", folder.parent, "--json").stdout)
    assert [one["folder"] for one in many] == [str(folder)]
    assert "lora[r=2]" in run("inspect", folder.parent).stdout


def test_merge_gives_an_ordinary_model_with_the_same_answers(tmp_path, trained, data):
    folder, _ = trained
    result = run("merge", folder, "--output", tmp_path / "merged")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(tmp_path / "merged")
    from trimtab.merging import probe_logits
    from trimtab.train import load_run

    tuned = load_run(folder)
    expected = probe_logits(tuned)
    merged = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not [name for name, _ in merged.named_parameters() if "trimtab" in name]
    tuned.model.trimtab  # noqa: B018 - the run's own model is still the attached one
    from dataclasses import replace

    torch.testing.assert_close(probe_logits(replace(tuned, model=merged)), expected, rtol=1e-4, atol=1e-5)
    base = tf.AutoModelForCausalLM.from_pretrained(
        json.loads((folder / "adapter_config.json").read_text())["base"]["path"]
    )
    assert not torch.equal(probe_logits(replace(tuned, model=base)), expected)
    assert len(tf.AutoTokenizer.from_pretrained(tmp_path / "merged")) == 259


def test_methods_are_listed_with_brackets_intact():
    result = run("methods")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in METHODS)
    listed = json.loads(run("methods", "--json").stdout)
    assert [one["name"] for one in listed] == list(METHODS)
    for one in listed:
        assert set(one) >= {"name", "summary", "paper", "formula", "kinds", "families", "mergeable", "lr", "fields"}
        assert one["families"]
        assert all(field["help"] for field in one["fields"])


def test_a_classification_head_and_a_prompt_together(tmp_path, data):
    model = save_model(tmp_path / "bert", "bert")
    folder = tmp_path / "out"
    result = run(
        "train", "--model", model, "--data", data, "--method", "prompt[length=2]|lora[r=2]", "--output", folder, *TRAIN
    )
    assert result.exit_code == 0, result.output
    after = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["after"]
    assert json.loads(run("eval", folder, "--json").stdout) == after
    assert "cannot be merged" in refused("merge", folder, "--output", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_chinese_text_labels_and_paths_end_to_end(tmp_path, llama):
    labels = {"0": "差", "1": "好"}
    rows = [{"正文": f"第{i}条评论：{'很好看' if i % 2 else '太差了'}", "标签": i % 2} for i in range(20)]
    data, folder = write_rows(tmp_path / "评论.jsonl", rows), tmp_path / "结果"
    columns = [
        "--text-column",
        "正文",
        "--label-column",
        "标签",
        "--label-words",
        ",".join("=".join(p) for p in labels.items()),
    ]
    template = ["--template", r"评论：{正文}\n评价："]
    result = run("train", "--model", llama, "--data", data, "--output", folder, *columns, *template, *TRAIN)
    assert result.exit_code == 0, result.output
    after = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["after"]
    assert json.loads(run("eval", folder, "--json").stdout) == after
    assert run("generate", folder, "--prompt", "很好看").stdout.strip() in labels
    assert "评论.jsonl" in (folder / "README.md").read_text(encoding="utf-8")
    assert (folder / "curves.svg").stat().st_size > 1000


def test_a_finished_runs_file_starts_the_same_run(tmp_path, trained):
    folder, _ = trained
    result = run("train", folder / "run.yaml", "--output", tmp_path / "again")
    assert result.exit_code == 0, result.output
    first, second = (
        json.loads((path / "metrics.json").read_text(encoding="utf-8")) for path in (folder, tmp_path / "again")
    )
    assert (first["before"], first["after"]) == (second["before"], second["after"])


def end_to_end(tmp_path: Path, task: str, rows: list[dict[str, Any]], *flags: str) -> Path:
    """Train, evaluate again and inspect with the command line; the folder."""
    model, data = save_model(tmp_path / "bert", "bert"), write_rows(tmp_path / "data.jsonl", rows)
    folder = tmp_path / "out"
    result = run("train", "--task", task, "--model", model, "--data", data, "--output", folder, *TRAIN, *flags)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip().splitlines()[-1] == str(folder)
    after = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["after"]
    assert json.loads(run("eval", folder, "--json").stdout) == after
    assert json.loads(run("eval", folder, "--json", "--data", data).stdout) == after
    assert re.search(rf"^task +{task}", run("inspect", folder).stdout, re.M)
    assert json.loads(run("inspect", folder, "--json").stdout)["task"]["name"] == task
    assert f"| task | {task} |" in (folder / "README.md").read_text(encoding="utf-8")
    return folder


def test_regress_end_to_end(tmp_path):
    rows = [{"正文": "好" * (i % 5), "id": i, "分": f"{i % 5}.5"} for i in range(1, 25)]
    rows = [{**row, "正文": f"{row['正文']}{row['id']}"} for row in rows]
    folder = end_to_end(tmp_path, "regress", rows, "--text-column", "正文", "--label-column", "分")
    assert "Pearson correlation" in (folder / "README.md").read_text(encoding="utf-8")
    result = run("generate", folder, "--prompt", "好好")
    assert result.exit_code == 0, result.output
    float(result.stdout)


def test_tag_end_to_end(tmp_path):
    rows = [{"tokens": ["小明", f"n{i}", "住", "北京"], "tags": ["B-人", "O", "O", "B-地"]} for i in range(20)]
    folder = end_to_end(tmp_path, "tag", rows)
    result = run("generate", folder, "--prompt", "小明 住 北京")
    assert result.exit_code == 0, result.output
    pairs = [line.split("\t") for line in result.stdout.splitlines()]
    assert [word for word, _ in pairs] == ["小明", "住", "北京"]
    assert {tag for _, tag in pairs} <= {"B-人", "B-地", "O"}


def test_choose_end_to_end(tmp_path):
    rows = [{"q": f"{i} or", "a": "yes", "b": f"no {i}", "right": "AB"[i % 2]} for i in range(20)]
    columns = ["--text-column", "q", "--choices-column", "a,b", "--label-column", "right"]
    folder = end_to_end(tmp_path, "choose", rows, *columns)
    result = run("generate", folder, "--prompt", "3 or", "--choice", "yes", "--choice", "no 3")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() in ("yes", "no 3")
    assert "needs 2 choices" in refused("generate", folder, "--prompt", "3 or")


# Mistakes: one sentence, exit 2, nothing changed


@pytest.mark.parametrize(
    ("task", "row", "flags", "words"),
    [
        ("regress", {"text": "a", "label": "good"}, [], "row 3: column 'label' holds 'good', not a finite number"),
        (
            "regress",
            {"text": "a", "label": [3]},
            [],
            "column 'label' does not hold one kind of value in all rows; row 3",
        ),
        ("regress", {"txt": "a", "label": "1"}, ["--text-column", "words"], "column 'words' does not exist"),
        ("regress", {"text": "a", "label": "1"}, ["--label-words", "a=b"], "label words belong to the task 'classify'"),
        (
            "tag",
            {"tokens": ["a", "b"], "tags": ["O"]},
            [],
            "row 3: column 'tokens' has 2 words and column 'tags' 1 tags",
        ),
        ("tag", {"tokens": ["a"], "tags": ["O"]}, ["--text-column", "tokns"], "did you mean 'tokens'"),
        ("tag", {"tokens": ["a"], "tags": ["O"]}, ["--template", "{text}"], "a template belongs"),
        ("choose", {"question": "?", "choices": ["a"], "label": 0}, [], "row 3: column 'choices' has only one choice"),
        (
            "choose",
            {"question": "?", "choices": ["a", "b"], "label": 2},
            [],
            "row 3: label '2' is no index of 2 choices",
        ),
        (
            "choose",
            {"question": "?", "choices": ["a", "b"], "label": 0},
            ["--choices-column", "c"],
            "column 'c' does not",
        ),
        ("tga", {"tokens": ["a"], "tags": ["O"]}, [], "did you mean tag?"),
    ],
)
def test_rows_that_a_task_cannot_use(tmp_path, task, row, flags, words):
    good = {
        "regress": [{"text": "a", "label": "1"}, {"text": "b", "label": "2"}],
        "choose": [{"question": "?", "choices": ["a", "b"], "label": at} for at in (0, 1)],
    }.get(task, [{"tokens": ["a", "b"], "tags": ["O", "X"]}] * 2)
    model, data = save_model(tmp_path / "bert", "bert"), write_rows(tmp_path / "data.jsonl", [*good, row])
    args = ["--task", task, "--model", model, "--data", data, "--output", tmp_path / "new", *flags]
    assert words in refused("train", *args)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("task", ["regress", "tag"])
def test_a_language_model_asked_for_an_encoders_task(tmp_path, llama, data, task):
    line = refused("train", "--task", task, "--model", llama, "--data", data, "--output", tmp_path / "new")
    assert f"(llama) is a causal language model and cannot {task}; models that can: encoders (bert, " in line
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--method", "lorra"], "did you mean 'lora'"),
        (["--method", "lora[rank=3]"], "field of lora 'rank'"),
        (["--method", "lora[targets=qq]"], "qq"),
        (["--method", "lora[layers=99]"], "99"),
        (["--text-column", "txet"], "did you mean 'text'"),
        (["--label-column", "lable"], "did you mean 'label'"),
        (["--template", "{txt}"], "txt"),
        (["--eval-data", "missing.jsonl"], "missing.jsonl"),
        (["--data", "missing.jsonl"], "missing.jsonl"),
        (["--model", "./missing"], "missing"),
        (["--model", "pkg:no_such_package/model"], "no_such_package"),
        (["--set", "epoch=3"], "did you mean epochs"),
        (["--lr", "quick"], "lr='quick'"),
        (["--chat"], "chat template"),
        (["missing.yaml"], "missing.yaml"),
    ],
)
def test_a_mistake_in_the_settings(tmp_path, llama, data, args, words):
    folder = tmp_path / "new"
    given = {"--model": llama, "--data": data, "--output": str(folder)}
    flags = [part for key, value in given.items() if key not in args for part in (key, value)]
    assert words in refused("train", *flags, *args)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no rows"),
        ('{"text": "a", "label": "x"}\n{"text": \n', "line 2"),
        ('{"text": "a", "label": "x"}\n{"text": "b", "label": "x"}\n', "at least two"),
    ],
)
def test_data_that_cannot_be_used(tmp_path, llama, text, words):
    path = tmp_path / "data.jsonl"
    path.write_text(text, encoding="utf-8")
    assert words in refused("train", "--model", llama, "--data", path, "--output", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_label_outside_the_set(tmp_path, llama, data, trained):
    other = write_rows(tmp_path / "other.jsonl", [{"text": "a", "label": "good"}, {"text": "b", "label": "middling"}])
    line = refused("eval", trained[0], "--data", other)
    assert "middling" in line
    assert "good" in line
    flags = ["--model", llama, "--data", data, "--eval-data", other, "--output", tmp_path / "new"]
    assert "middling" in refused("train", *flags)
    assert not (tmp_path / "new").exists()


def test_a_family_that_is_not_supported(tmp_path, data):
    model = save_model(tmp_path / "mpt", "mpt")
    assert "mpt" in refused("train", "--model", model, "--data", data, "--output", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_results_are_never_overwritten_unasked(llama, data, out):
    before = contents(out)
    line = refused("train", "--model", llama, "--data", data, "--method", "lora[r=2]", "--output", out, *TRAIN)
    assert "--overwrite" in line
    assert contents(out) == before


def test_resume_needs_only_the_folder(tmp_path, llama, data):
    folder = tmp_path / "out"
    run("train", "--model", llama, "--data", data, "--method", "lora[r=2]", "--output", folder, *TRAIN)
    first = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    for name in ("metrics.json", "adapter_model.safetensors"):
        (folder / name).unlink()
    result = run("train", "--resume", "--output", folder)
    assert result.exit_code == 0, result.output
    again = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert again["after"] == pytest.approx(first["after"], abs=1e-5)


def spoil_missing(tensors: dict[str, torch.Tensor]) -> None:
    tensors.pop(sorted(tensors)[0])


def spoil_extra(tensors: dict[str, torch.Tensor]) -> None:
    tensors["extra.tensor"] = torch.zeros(2)


def spoil_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors[sorted(tensors)[0]] = torch.zeros(1, 1)


@pytest.mark.parametrize("spoil", [spoil_missing, spoil_extra, spoil_shape])
@pytest.mark.parametrize("command", ["eval", "generate", "merge"])
def test_an_adapter_with_wrong_tensors(tmp_path, out, spoil, command):
    weights = out / "adapter_model.safetensors"
    tensors = load_file(weights)
    named = sorted(tensors)[0]
    spoil(tensors)
    rewrite(out, tensors)
    before = contents(out)
    extra = {"eval": [], "generate": ["--prompt", "a"], "merge": ["--output", tmp_path / "merged"]}[command]
    assert ("extra.tensor" if spoil is spoil_extra else named) in refused(command, out, *extra)
    assert contents(out) == before
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_another_base_model(tmp_path, out):
    other = save_model(tmp_path / "other", "llama", seed=1)
    text = (out / "run.yaml").read_text(encoding="utf-8")
    (out / "run.yaml").write_text(re.sub(r"^model: .*$", f"model: {other}", text, flags=re.M), encoding="utf-8")
    assert "another base model" in refused("eval", out)


def test_a_pickle_is_refused(out):
    weights = out / "adapter_model.safetensors"
    torch.save(load_file(weights), out / "adapter_model.bin")
    weights.unlink()
    assert "pickle" in refused("eval", out)
    torch.save({"a": torch.zeros(1)}, weights)
    assert "safetensors" in refused("eval", out)


@pytest.mark.parametrize("command", ["eval", "inspect", "generate", "merge"])
def test_a_folder_that_is_no_run(tmp_path, command):
    extra = {"generate": ["--prompt", "a"], "merge": ["--output", tmp_path / "merged"]}.get(command, [])
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "missing"):
        assert folder.name in refused(command, folder, *extra)


def test_merge_does_not_overwrite_unasked(tmp_path, trained):
    folder, _ = trained
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "kept.txt").write_text("kept", encoding="utf-8")
    before = contents(folder)
    assert "--overwrite" in refused("merge", folder, "--output", tmp_path / "merged")
    assert contents(tmp_path / "merged") == {"kept.txt": b"kept"}
    assert "own folder" in refused("merge", folder, "--output", folder, "--overwrite")
    assert contents(folder) == before


def test_every_mistake_has_its_line(tmp_path):
    result = run("train", "--epochs", "none at all", "--set", "sead=1", "--output", tmp_path / "new")
    assert result.exit_code == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 4  # --model and --data are missing, too
    assert all(line.startswith("error: ") for line in lines)


def test_an_unknown_option_or_command_exits_2():
    assert run("train", "--modle", "x").exit_code == 2
    assert run("trian").exit_code == 2


def test_an_interrupted_run_says_how_to_go_on(monkeypatch, tmp_path, llama, data):
    import trimtab.train

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt("stopped after step 3")

    monkeypatch.setattr(trimtab.train, "fine_tune", stop)
    result = run("train", "--model", llama, "--data", data, "--output", tmp_path / "new")
    assert result.exit_code == 130
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    assert "step 3" in line
    assert "--resume" in line


def test_a_fault_of_ours_is_not_hidden(monkeypatch):
    def fail() -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli, "describe_methods", fail)
    assert isinstance(run("methods").exception, RuntimeError)


# Folders that are not ours, and files that are broken


def test_merge_never_replaces_the_run_or_the_base(tmp_path, out, llama):
    base, outer = Path(llama), tmp_path / "outer"
    outer.mkdir()
    out = Path(shutil.move(out, outer / "out"))
    before = contents(outer) | contents(base)
    for target in (out, out / "inner", outer, base, base / "inner", base.parent):
        line = refused("merge", out, "--output", target, "--overwrite")
        assert "the run's own folder" in line or "the base model's folder" in line
        assert contents(outer) | contents(base) == before
        assert not (target / "inner").exists()


def test_merge_overwrites_a_model_folder_that_holds_nothing_else(tmp_path, trained):
    folder, merged = trained[0], tmp_path / "merged"
    assert run("merge", folder, "--output", merged).exit_code == 0
    first = contents(merged)
    (merged / "model.safetensors").write_bytes(b"old")
    assert run("merge", folder, "--output", merged, "--overwrite").exit_code == 0
    assert contents(merged) == first
    (merged / "thesis.txt").write_text("mine", encoding="utf-8")
    assert "thesis.txt" in refused("merge", folder, "--output", merged, "--overwrite")
    assert (merged / "thesis.txt").read_text(encoding="utf-8") == "mine"
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "vocab.txt").write_text("mine", encoding="utf-8")
    assert "no model folder" in refused("merge", folder, "--output", tmp_path / "words", "--overwrite")
    assert contents(tmp_path / "words") == {"vocab.txt": b"mine"}


@pytest.mark.parametrize("switch", ["--overwrite", "--resume"])
@pytest.mark.parametrize("name", ["README.md", "run.yaml", "adapter_config.json", "checkpoint-5/optimizer.pt"])
def test_a_folder_that_trimtab_did_not_write_is_left_alone(tmp_path, llama, data, switch, name):
    folder = tmp_path / "theirs"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text('{"peft_type": "LORA"}', encoding="utf-8")
    before = contents(folder)
    line = refused("train", "--model", llama, "--data", data, "--output", folder, switch, "--set", "epochs=1")
    words = "trimtab did not write" if switch == "--overwrite" else "no run.yaml of an earlier run"
    assert ("peft_type" if (switch, name) == ("--resume", "run.yaml") else words) in line
    assert contents(folder) == before


@pytest.mark.parametrize("switch", ["--overwrite", "--resume"])
def test_checkpoints_of_other_trainers_are_left_alone(out, llama, data, switch):
    (out / "checkpoint-7").mkdir()
    (out / "checkpoint-7" / "optimizer.pt").write_text("theirs", encoding="utf-8")
    before = contents(out)
    assert "no checkpoint of trimtab" in refused(
        "train", "--model", llama, "--data", data, "--method", "lora[r=2]", "--output", out, switch, *TRAIN
    )
    assert contents(out) == before


def test_resume_without_checkpoints_compares_the_settings_too(out, llama, data):
    for path in out.glob("checkpoint-*"):
        shutil.rmtree(path)
    before = contents(out)
    flags = ["--model", llama, "--data", data, "--method", "lora[r=2]", "--output", out, "--resume", *TRAIN]
    assert "seed=0, not 5" in refused("train", *flags, "--seed", "5")
    assert contents(out) == before


def test_resume_from_another_folder_and_under_another_name(tmp_path, monkeypatch, llama, data):
    monkeypatch.chdir(Path(data).parent)
    flags = ["--model", llama, "--data", Path(data).name, "--method", "lora[r=2]", *TRAIN]
    assert run("train", *flags, "--output", tmp_path / "first").exit_code == 0
    first = json.loads((tmp_path / "first" / "metrics.json").read_text(encoding="utf-8"))
    (tmp_path / "first").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert json.loads(run("eval", "moved", "--json").stdout) == first["after"]
    result = run("train", "--resume", "--output", "moved")
    assert result.exit_code == 0, result.output
    again = json.loads((tmp_path / "moved" / "metrics.json").read_text(encoding="utf-8"))
    assert again["after"] == pytest.approx(first["after"], abs=1e-5)


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch, llama, data):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copy(data, tmp_path / "data.jsonl")
    result = run("train", "--model", llama, "--data", "~/data.jsonl", "--output=~/out", "--method", "lora[r=2]", *TRAIN)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip().splitlines()[-1] == str(tmp_path / "out")
    assert (tmp_path / "out" / "metrics.json").is_file()
    assert not (tmp_path / "~").exists()


def test_the_runs_own_data_are_known_under_any_spelling(tmp_path, monkeypatch, out, data, trained):
    after = json.loads((out / "metrics.json").read_text(encoding="utf-8"))["after"]
    monkeypatch.chdir(Path(data).parent)
    (tmp_path / "link.jsonl").symlink_to(data)
    for spelling in (Path(data).name, f"./{Path(data).name}", tmp_path / "link.jsonl"):
        result = run("eval", out, "--data", spelling, "--json")
        assert json.loads(result.stdout) == after
        assert "the rows that it held out" in result.stderr


def test_a_run_with_data_of_its_own_to_evaluate_on(tmp_path, llama, data):
    held_out, folder = write_rows(tmp_path / "held_out.jsonl", ROWS[:4]), tmp_path / "out"
    flags = ["--model", llama, "--data", data, "--eval-data", held_out, "--method", "lora[r=2]", "--epochs", "1"]
    assert run("train", *flags, "--output", folder, "--max-length", "128").exit_code == 0
    examples = [
        json.loads(run("eval", folder, "--json", *more).stdout)["examples"]
        for more in ([], ["--data", data], ["--data", held_out])
    ]
    assert examples == [4, 24, 4]


def test_a_fully_tuned_model_from_card_to_answer(tmp_path, monkeypatch, llama, data):
    base = shutil.copytree(llama, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    result = run("train", "--model", "base", "--data", data, "--method", "full", "--output", "out", *TRAIN)
    assert result.exit_code == 0, result.output
    shutil.rmtree(base)  # a whole model needs no base
    after = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))["after"]
    assert json.loads(run("eval", "out", "--json").stdout) == after
    assert run("generate", "out", "--prompt", "a").stdout.strip() in WORDS
    found = json.loads(run("inspect", "out", "--json").stdout)
    assert (found["method"], found["family"]) == ("full", "llama")
    assert "method full" in run("inspect", "out").stdout
    assert "full" in run("inspect", ".").stdout
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    for words in ("A fully tuned model", 'LlamaForCausalLM.from_pretrained("out")', "library_name: transformers"):
        assert words in card
    assert "base_model" not in card
    tf.LlamaForCausalLM.from_pretrained(tmp_path / "out")


def test_a_text_longer_than_the_models_positions(tmp_path):
    model = save_model(tmp_path / "bert", "bert")  # 256 positions
    rows = [{"text": f"{WORDS[i % 2]} {'long ' * 120}", "label": WORDS[i % 2]} for i in range(12)]
    data, folder = write_rows(tmp_path / "long.jsonl", rows), tmp_path / "out"
    flags = ["--model", model, "--data", data, "--method", "prompt[length=6]", "--output", folder, "--epochs", "1"]
    line = refused("train", *flags, "--max-length", "251")
    assert "at most 250" in line
    assert not folder.exists()
    result = run("train", *flags)
    assert result.exit_code == 0, result.output
    assert "max_length: 250" in (folder / "run.yaml").read_text(encoding="utf-8")
    assert run("generate", folder, "--prompt", "long " * 120).stdout.strip() in WORDS


def test_answers_that_would_go_beyond_the_models_positions(tmp_path):
    model = save_model(tmp_path / "gpt2", "gpt2")  # 64 positions
    rows = [{"prompt": "count " * (i % 9 + 1), "completion": " 1" * (10 - i % 9)} for i in range(24)]
    data, folder = write_rows(tmp_path / "pairs.jsonl", rows), tmp_path / "out"
    flags = ["--task", "generate", "--model", model, "--data", data, "--method", "prompt[length=4]", "--epochs", "1"]
    result = run("train", *flags, "--output", folder, "--eval-share", "0.5")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "max_length: 60" in (folder / "run.yaml").read_text(encoding="utf-8")
    for wanted in ("4", "500"):
        result = run("generate", folder, "--prompt", "count " * 40, "--max-new-tokens", wanted)
        assert result.exit_code == 0, (result.output, result.exception)


@pytest.mark.parametrize("command", ["eval", "inspect", "generate", "merge", "train"])
@pytest.mark.parametrize(("text", "words"), [("a: [", "not valid YAML"), ("- a", "must hold settings")])
def test_a_broken_run_file(tmp_path, out, command, text, words):
    (out / "run.yaml").write_text(text, encoding="utf-8")
    more = {"generate": ["--prompt", "a"], "merge": ["--output", tmp_path / "merged"], "train": ["--resume"]}
    args = ["--output", out] if command == "train" else [out]
    assert words in refused(command, *args, *more.get(command, []))


@pytest.mark.parametrize("command", ["eval", "inspect"])
@pytest.mark.parametrize(
    "change",
    [{"task": ["classify"]}, {"task": "classify"}, {"base": "x"}, {"method": ["lora"]}, {"method": {"name": 3}}],
)
def test_a_configuration_with_values_of_another_type(out, command, change):
    path = out / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    refused(command, out)


@pytest.mark.parametrize("fields", [{"labels": 3}, {"labels": None}, {"template": 3}, {"labels": ["a", "b"], "x": 1}])
def test_a_task_with_values_of_another_type(out, fields):
    path = out / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "task": {**config["task"], **fields}}), encoding="utf-8")
    refused("eval", out)


def test_an_adapter_whose_base_is_not_named_or_gone(out):
    (out / "run.yaml").unlink()
    path = out / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for base, words in ((config["base"] | {"path": "/nowhere/model"}, "/nowhere/model"), ({}, "which base model")):
        path.write_text(json.dumps({**config, "base": base}), encoding="utf-8")
        assert words in refused("eval", out)


def test_a_base_whose_weights_are_cut_off(tmp_path, llama, data):
    model = Path(shutil.copytree(llama, tmp_path / "cut"))
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "does not load" in refused("train", "--model", model, "--data", data, "--output", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("name", "words"), [("tensorbord", "tensorboard"), ("clearml", "not installed")])
def test_a_place_to_log_to_that_is_not_there(tmp_path, llama, data, name, words):
    flags = ["--model", llama, "--data", data, "--output", tmp_path / "new", "--report-to", name]
    assert words in refused("train", *flags)
    assert not (tmp_path / "new").exists()


# The demonstration


def test_the_demonstration_on_a_tiny_model(monkeypatch, tmp_path, llama):
    import dataclasses

    from trimtab import demo

    rows = [{"input": [{"content": "x"}, {"content": f"{WORDS[i % 2]} {i}"}], "ideal": str(i % 2)} for i in range(60)]
    data = write_rows(tmp_path / "headlines.jsonl", rows)
    small = {"limit": 30, "eval_limit": 12, "eval_share": 0.3, "batch_tokens": 200}
    monkeypatch.setattr(demo, "SETTINGS", dataclasses.replace(demo.SETTINGS, model=llama, data=data, **small))
    monkeypatch.setattr(demo, "PACKAGES", {})
    folder = tmp_path / "demo-output"
    for _ in range(2):  # a second one may take the first one's place
        result = run("demo", "--output", folder)
        assert result.exit_code == 0, (result.output, result.exception)
    said = result.stdout
    for words in ("lora[r=8]", "zero-shot accuracy", "of 12 right, the same to the last example", "trained parameters"):
        assert words in said
    assert len(re.findall(r"^ +(?:yes|no) +(?:yes|no) +(?:yes|no) +(?:good|bad) \d+", said, re.M)) == 2 * demo.SHOWN
    assert (folder / "curves.svg").is_file()


@pytest.mark.slow
@pytest.mark.real
def test_the_demonstration_gains_fifteen_points(tmp_path):
    from trimtab.demo import run_demo

    found = run_demo(tmp_path / "demo-output", show=False)
    before, after = found["metrics"]["before"], found["metrics"]["after"]
    assert before["examples"] >= 400
    assert after["accuracy"] >= before["accuracy"] + 0.15
    assert found["reloaded"] == after


def test_the_demonstration_does_not_touch_another_folder(monkeypatch, out):
    from trimtab import demo

    monkeypatch.setattr(demo, "PACKAGES", {})
    before = contents(out)
    assert run("demo", "--output", out).exit_code == 2
    assert contents(out) == before


def test_the_demonstration_says_what_to_install(monkeypatch, tmp_path):
    from trimtab import demo

    monkeypatch.setattr(demo, "PACKAGES", {"no_such_package": "no-such-package==1"})
    line = refused("demo", "--output", tmp_path / "new")
    assert "pip install --no-deps no-such-package==1" in line
    assert not (tmp_path / "new").exists()


# The process itself


def start(*args: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "trimtab", *args], capture_output=True, text=True, env=environment, timeout=300
    )


@pytest.mark.parametrize("args", [["--help"], ["train", "--help"]])
def test_help_loads_little(args):
    # A machine's clock is no test: what takes the time is loading modules, and those are counted.
    code = f"""if True:
        import sys
        sys.argv = {["trimtab", *args]!r}
        import trimtab.__main__ as program
        try:
            program.main()
        except SystemExit as stop:
            assert not stop.code
        heavy = {{"torch", "transformers", "datasets", "rich", "matplotlib", "numpy", "yaml"}} & set(sys.modules)
        assert not heavy, heavy
        assert len(sys.modules) < 330, len(sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_the_version():
    import trimtab

    assert run("--version").stdout.strip() == trimtab.__version__


def test_help_names_every_command():
    said = run("--help").stdout
    assert all(name in said for name in ("train", "eval", "generate", "methods", "inspect", "merge", "demo"))


def test_streams_and_exit_code_of_the_process(trained):
    done = start("eval", str(trained[0]), "--json")
    assert done.returncode == 0, done.stderr
    assert "accuracy" in json.loads(done.stdout)
    assert done.stderr == ""
    failed = start("train", "--epochs", "many", "--model", "m", "--data", "d", "--output", "o")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.splitlines() == ["error: epochs='many' must be a valid number"]


@pytest.mark.parametrize("method", ["mask[sparsity=0.05]", "diff-pruning[share=0.005]"])
def test_methods_that_change_weights(method: str, llama: str, data: str, tmp_path: Path) -> None:
    """Train, evaluate what was saved, merge; the file is small and `inspect` says how small."""
    folder = tmp_path / "out"
    done = run("train", "--model", llama, "--data", data, "--method", method, "--output", folder, *TRAIN)
    assert done.exit_code == 0, done.output
    after = json.loads((folder / "metrics.json").read_text())["after"]
    again = json.loads(run("eval", folder, "--json").stdout)
    assert again["loss"] == pytest.approx(after["loss"], rel=1e-5)
    said, found = run("inspect", folder).stdout, json.loads(run("inspect", folder, "--json").stdout)
    assert (f"{found['bits']:,} bits, " in said) == method.startswith("mask") == (found["bits"] > 0)
    assert found["bytes"] == (folder / "adapter_model.safetensors").stat().st_size
    assert run("merge", folder, "--output", tmp_path / "merged").exit_code == 0
    folder = tmp_path / "other"
    for wrong in (method.replace("=0.", "=1."), method.replace("]", ",layers=9]")):
        line = refused("train", "--model", llama, "--data", data, "--method", wrong, "--output", folder, *TRAIN)
        assert "must be" in line or "layers 0 to 1" in line
    assert not folder.exists()


def test_inspect_of_an_adapter_saved_from_python(tmp_path: Path) -> None:
    import trimtab as tt
    from tiny import tiny

    adapter = tt.attach(tiny("llama"), "lora[r=2]")
    adapter.save(tmp_path / "saved")
    counted = sum(parameter.numel() for parameter in adapter.parameters())
    found = CliRunner().invoke(cli.app, ["inspect", str(tmp_path / "saved")])
    assert found.exit_code == 0 and f"{counted:,} trained parameters" in found.stdout
    assert "before" not in found.stdout

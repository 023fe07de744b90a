"""Regression: numbers as rows hold them, scores against a naive loop, and every mistake."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
import transformers as hf

from encoders import CONFIGS, wordpiece
from trimtab.errors import UserError
from trimtab.evaluate import evaluate, predict
from trimtab.tasks import Example, Regress, encode_all, prepare, task_from_config

ROWS: list[dict[str, Any]] = [{"text": "good film", "label": 4.5}, {"text": "bad", "label": "-1e0"}]


def tiny(family: str = "bert") -> Any:
    torch.manual_seed(0)
    config = CONFIGS[family]()
    config.num_labels = 1
    model = hf.AutoModelForSequenceClassification.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def test_numbers_and_texts_that_are_numbers():
    task = prepare("regress", ROWS, kind="encoder")
    assert task == Regress()
    first, second = encode_all(task, ROWS, wordpiece(), 64, "encoder")
    ids = wordpiece()("good film")["input_ids"]
    assert first == Example(ids, 4.5, len(ids), 4.5)
    assert second.labels == -1.0 and isinstance(second.labels, float)
    whole = task.encode({"text": "a", "label": 3}, wordpiece(), 9, "encoder")
    assert isinstance(whole.labels, float)  # a collator that saw an int would make a class of it
    alone = task.encode("good film", wordpiece(), 64, "encoder")
    assert alone.input_ids == ids and math.isnan(alone.target)
    assert task_from_config(json.loads(json.dumps(task.to_config()))) == task


def test_two_texts_by_a_template():
    row = {"a": "good", "b": "bad", "score": 1}
    task = prepare(
        "regress", [row, {**row, "score": 2}], kind="encoder", template="{a} [SEP] {b}", label_column="score"
    )
    example = task.encode(row, wordpiece(), 64, "encoder")
    assert example.input_ids == wordpiece()("good", "bad")["input_ids"]
    cut = task.encode({"a": "good", "b": "bad" * 20, "score": 1}, wordpiece(), 20, "encoder")
    assert len(cut.input_ids) == 20 and cut.input_ids[:7] == example.input_ids[:7]


@pytest.mark.parametrize("family", CONFIGS)
def test_scores_are_those_of_a_naive_loop_in_any_batch(family):
    rows = [{"text": "word " * (1 + 2 * i), "label": float(i)} for i in range(6)]
    task, model = prepare("regress", rows, kind="encoder"), tiny(family)
    texts = [torch.tensor([wordpiece()(row["text"])["input_ids"]]) for row in rows]
    with torch.no_grad():
        numbers = [float(model(input_ids=ids).logits) for ids in texts]
    examples = encode_all(task, rows, wordpiece(), 64, "encoder")
    for budget in (1, 2048):
        found = evaluate(model, wordpiece(), task, examples, "encoder", batch_tokens=budget)
        assert found["mse"] == pytest.approx(sum((n - i) ** 2 for i, n in enumerate(numbers)) / 6, rel=1e-4)
        assert found["loss"] == found["mse"] and found["examples"] == 6
        assert set(found) == {"pearson", "spearman", "mse", "loss", "examples"}
        said = predict(model, wordpiece(), task, examples, "encoder", batch_tokens=budget)
        assert [float(number) for number in said] == pytest.approx(numbers, rel=1e-4)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("good", "row 2: column 'label' holds 'good', not a finite number"),
        ("nan", "holds 'nan', not a finite number"),
        (math.inf, "holds inf, not a finite number"),
        (True, "holds True, not a finite number"),
        ("1,5", "holds '1,5', not a finite number"),
        (None, "row 2: column 'label' has no number"),
        ("", "row 2: column 'label' has no number"),
        ([1.0], "row 2: column 'label' holds a list, not a number"),
        (10**400, "not a finite number"),
    ],
)
def test_what_is_no_number(value, message):
    rows = [ROWS[0], {"text": "a", "label": value}]
    with pytest.raises(UserError, match=message):
        prepare("regress", rows, kind="encoder")
    with pytest.raises(UserError, match=message):
        encode_all(Regress(), rows, wordpiece(), 64, "encoder")


def test_other_mistakes():
    with pytest.raises(UserError, match="column 'lable' does not exist; did you mean 'label'"):
        prepare("regress", ROWS, kind="encoder", label_column="lable")
    with pytest.raises(UserError, match="column 'txt' does not exist; did you mean 'text'"):
        prepare("regress", ROWS, kind="encoder", text_column="txt")
    with pytest.raises(UserError, match="the template shows the answer"):
        prepare("regress", ROWS, kind="encoder", template="{text} {label}")
    with pytest.raises(UserError, match="at least two different numbers, column 'label' has only 3"):
        prepare("regress", [{"text": "a", "label": 3}, {"text": "b", "label": "3.0"}], kind="encoder")
    with pytest.raises(UserError, match=r"chat belongs to the tasks .*not to 'regress'"):
        prepare("regress", ROWS, kind="encoder", chat=True)

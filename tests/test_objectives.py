"""Losses of every kind of labels: the mean over an optimizer step's labels in any batches; the measure of two draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch.nn import functional as F
from transformers import TrainingArguments

import trimtab as tt
from encoders import CONFIGS, wordpiece
from trimtab.batches import Collator
from trimtab.consistency import squared_difference
from trimtab.errors import UserError
from trimtab.objectives import Classes, Numbers, Tags, Tokens, count, objective_of
from trimtab.tasks import encode_all, prepare
from trimtab.trainer import Trainer

WORDS = ["a", "bc", "def", "小明", "x"]


def _tag(count: int) -> tuple[Any, list[Any]]:
    rows = [{"tokens": [WORDS[(i + j) % 5] for j in range(1 + i * i % 7)]} for i in range(count)]
    rows = [{**row, "tags": [("O", "B-X", "I-X")[len(word) % 3] for word in row["tokens"]]} for row in rows]
    return prepare("tag", rows, kind="encoder"), rows


def _regress(count: int) -> tuple[Any, list[Any]]:
    rows = [{"text": " ".join(WORDS[: 1 + i % 5] * (1 + i % 3)), "label": i * 0.7 - 2} for i in range(count)]
    return prepare("regress", rows, kind="encoder"), rows


def _choose(count: int) -> tuple[Any, list[Any]]:
    rows = [
        {"question": WORDS[i % 5] * (1 + i % 4), "choices": WORDS[: 2 + i % 3], "label": i % 2} for i in range(count)
    ]
    return prepare("choose", rows, kind="encoder"), rows


CASES = {"tag": _tag, "regress": _regress, "choose": _choose}
LOADERS = {
    "tag": hf.AutoModelForTokenClassification,
    "regress": hf.AutoModelForSequenceClassification,
    "choose": hf.AutoModelForMultipleChoice,
}


def tiny(name: str) -> Any:
    torch.manual_seed(0)
    config = CONFIGS["bert"]()
    config.num_labels = {"tag": 3}.get(name, 1)
    model = LOADERS[name].from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def case(name: str, count: int = 16) -> list[Any]:
    task, rows = CASES[name](count)
    return encode_all(task, rows, wordpiece(), 64, "encoder")


def trainer(folder: Path, name: str, method: str = "lora", **options: Any) -> Trainer:
    model = tiny(name)
    torch.manual_seed(1)
    tt.attach(model, method)
    batch_tokens = options.pop("batch_tokens", None)
    values = {"output_dir": str(folder), "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    values |= {"num_train_epochs": 2, "learning_rate": 1e-2, "save_strategy": "no", "seed": 3}
    args = TrainingArguments(**{**values, **options})
    return Trainer(model, args, train_dataset=case(name), batch_tokens=batch_tokens)


def losses(made: Trainer) -> list[float]:
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


@torch.no_grad()
def naive(model: Any, name: str, examples: list[Any]) -> tuple[float, int]:
    """The sum of the loss over single rows' labels, and their number."""
    total, count = 0.0, 0
    for example in examples:
        inputs = Collator(0)([example])
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        if name == "regress":
            total, count = total + float((logits[0, 0] - labels[0]) ** 2), count + 1
        else:
            targets = labels.flatten()
            each = F.cross_entropy(logits.flatten(0, -2), targets, reduction="none", ignore_index=-100)
            total, count = total + float(each.sum()), count + int((targets != -100).sum())
    return total, count


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tokens", [None, 40])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_steps_loss_is_the_mean_over_all_of_its_labels(tmp_path: Path, name: str, tokens: Any, accumulation: int):
    """Batches of unequal numbers of rows and labels; nothing is learned, so that all steps see the same weights."""
    seen: list[Any] = []
    made = trainer(
        tmp_path,
        name,
        learning_rate=0.0,
        batch_tokens=tokens,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=accumulation,
    )
    collate = made.data_collator
    made.data_collator = lambda examples: (seen.append(examples), collate(examples))[1]
    made.train()
    per_epoch = len(seen) // 2
    steps = []
    for epoch in (seen[:per_epoch], seen[per_epoch:]):
        groups = [epoch[at : at + accumulation] for at in range(0, per_epoch, accumulation)]
        steps += [naive(made.model.eval(), name, [one for batch in group for one in batch]) for group in groups]
    assert len({len(batch) for batch in seen}) > 1
    assert losses(made) == pytest.approx([total / count for total, count in steps], rel=2e-4)


@pytest.mark.parametrize("name", CASES)
def test_accumulated_pieces_train_as_the_whole_batch(tmp_path: Path, name: str):
    whole = trainer(tmp_path / "a", name, per_device_train_batch_size=8)
    pieces = trainer(tmp_path / "b", name, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    whole.train()
    pieces.train()
    assert losses(whole) == pytest.approx(losses(pieces), abs=1e-4)
    for key, tensor in whole.adapter.state_dict().items():
        if name == "choose" and key == "head_classifier.copy.bias":  # the same for all choices: no gradient but noise
            continue
        torch.testing.assert_close(tensor, pieces.adapter.state_dict()[key], rtol=0, atol=1e-4)


def test_which_objective_labels_have():
    ids, mask = torch.ones(2, 5, dtype=torch.long), torch.ones(2, 5, dtype=torch.long)

    def found(model: Any, labels: Any, ids: Any = ids) -> Any:
        return objective_of(model, {"input_ids": ids, "attention_mask": mask, "labels": labels})

    classes = hf.BertForSequenceClassification(hf.BertConfig(**{**CONFIGS["bert"]().to_dict(), "num_labels": 3}))
    assert isinstance(found(classes, torch.tensor([0, 2])), Classes)
    assert isinstance(found(tiny("choose"), torch.tensor([0, 1]), ids[:, None]), Classes)
    assert isinstance(found(tiny("tag"), ids), Tags)
    assert isinstance(found(tiny("regress"), torch.tensor([0.5, 1])), Numbers)
    assert isinstance(found(hf.BertForMaskedLM(CONFIGS["bert"]()), ids), Tokens)
    for model, labels in (
        (classes, torch.rand(2, 3)),  # several labels a row
        (classes, torch.ones(2, 3, dtype=torch.long)),
        (classes, torch.tensor([0.5, 1])),
        (tiny("regress"), torch.tensor([0, 1])),
        (tiny("regress"), None),
    ):
        assert found(model, labels) is None


def test_a_number_of_minus_one_hundred_is_a_number():
    assert int(count(Numbers(), tiny("regress"), torch.tensor([-100.0, 1.0]), "token")) == 2
    loss = Numbers().loss(torch.tensor([0.0, 1.0]), torch.tensor([-100.0, 1.0]), None)
    assert float(loss) == pytest.approx(5000)


# Two forwards


@pytest.mark.parametrize("name", CASES)
def test_adamix_compares_two_draws_in_the_losss_own_measure(tmp_path: Path, name: str):
    """CE + w · (KL(p‖q) + KL(q‖p)) / 2 over labelled tags and real choices; (ŷ − y)² + w · (ŷ − ŷ')² for numbers."""
    made = trainer(tmp_path, name, "adamix[size=8,experts=6,consistency=2.5]")
    with torch.no_grad():
        for parameter in made.adapter.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    model = made.model.train()
    inputs = Collator(0)(case(name, 5))
    torch.manual_seed(7)
    found = made.compute_loss(model, dict(inputs))
    gradients = torch.autograd.grad(found, list(made.adapter.parameters()), allow_unused=True)

    labels = inputs.pop("labels")
    torch.manual_seed(7)
    one, two = model(**inputs).logits, model(**inputs).logits
    assert (one - two).abs().max() > 1e-3
    expected: Any = 0.0
    if name == "regress":
        for a, b, y in zip(one[:, 0], two[:, 0], labels, strict=True):
            expected += (a - y) ** 2 + 2.5 * ((a - b.detach()) ** 2 + (b - a.detach()) ** 2) / 2
        count = 5
    else:
        real = inputs["attention_mask"].any(-1)  # of choices
        places = (
            [(i, j) for i, row in enumerate(labels) for j, t in enumerate(row) if t != -100]
            if name == "tag"
            else range(5)
        )
        count = len(places)
        for place in places:
            kept = slice(None) if name == "tag" else real[place]
            p, q = F.log_softmax(one[place][kept], dim=-1), F.log_softmax(two[place][kept], dim=-1)
            forth = (p.exp().detach() * (p.detach() - q)).sum()
            back = (q.exp().detach() * (q.detach() - p)).sum()
            expected += -p[labels[place]] + 2.5 * (forth + back) / 2
    expected = expected / count
    assert found.item() == pytest.approx(float(expected.detach()), rel=1e-5)
    wanted = torch.autograd.grad(expected, list(made.adapter.parameters()), allow_unused=True)
    for ours, theirs in zip(gradients, wanted, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_the_squared_difference_pulls_both_sides():
    a, b = torch.tensor([1.0, 4.0], requires_grad=True), torch.tensor([3.0, 4.5], requires_grad=True)
    loss = squared_difference(a, b)
    assert loss.item() == pytest.approx((4 + 0.25) / 2)
    left, right = torch.autograd.grad(loss, [a, b])
    torch.testing.assert_close(left, (a - b).detach() / 2)
    torch.testing.assert_close(right, (b - a).detach() / 2)
    assert squared_difference(a, b, 10).item() == pytest.approx(4.25 / 10)


def test_a_loss_without_a_measure_is_refused_where_a_method_needs_one(tmp_path: Path):
    for method, refused in (("adamix[size=8]", True), ("adamix[size=8,consistency=0]", False)):
        made = trainer(tmp_path, "tag", method, label_smoothing_factor=0.1, num_train_epochs=1)
        if not refused:
            made.train()
            continue
        with pytest.raises(UserError, match=r"adamix compares two forwards.*set consistency=0"):
            made.train()

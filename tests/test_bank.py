"""Many adapters on one base: each with its own head and labels, none touched by another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertForTokenClassification, pipeline

import trimtab as tt
from tiny import inputs, output, tiny

METHODS = {"mood": "houlsby[size=4]", "topic": "lora[r=2]|bitfit", "stars": "prompt[length=3]"}
LABELS = {"mood": ["bad", "good"], "topic": ["art", "law", "sea", "war", "zoo"], "stars": ["1", "2", "3"]}


def _base(family: str, labels: list[str]) -> Any:
    """The same base with a head for these labels."""
    model = tiny(family)
    head = torch.nn.Linear(32, len(labels))
    if family == "roberta":
        model.classifier.out_proj = head
    else:
        model.classifier = head
    model.config.id2label = dict(enumerate(labels))
    model.num_labels = len(labels)
    return model


@pytest.fixture(params=["bert", "roberta", "distilbert"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folders(tmp_path: Path, family: str) -> dict[str, Path]:
    """Three adapters with heads of 2, 5 and 3 classes."""
    torch.manual_seed(0)
    saved = {}
    for name, method in METHODS.items():
        adapter = tt.attach(_base(family, LABELS[name]), method, name)
        for parameter in adapter.parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))
        saved[name] = adapter.save(tmp_path / name)
    return saved


def _alone(family: str, folder: Path, name: str) -> torch.Tensor:
    model = _base(family, LABELS[name])
    tt.load(model, folder)
    with torch.no_grad():
        return output(model, inputs(family))


def test_every_adapter_acts_as_it_would_alone(folders: dict[str, Path], family: str) -> None:
    model, batch = tiny(family), inputs(family)
    with torch.no_grad():
        base = output(model, batch)
        bank = tt.Bank(model)
        for name, folder in folders.items():
            bank.add(name, folder)
        assert bank.names == tuple(METHODS) and len(bank) == 3 and "topic" in bank and bank.active == "mood"
        for name in ("stars", "mood", "topic", "mood"):
            bank.use(name)
            assert bank.active == name
            assert torch.equal(output(model, batch), _alone(family, folders[name], name))
            assert list(model.config.id2label.values()) == LABELS[name]
        bank.use(None)
        assert torch.equal(output(model, batch), base) and bank.active is None
        assert model.config.num_labels == 2 and model.num_labels == 2
        bank.remove("topic")
        bank.use("stars")
        assert torch.equal(output(model, batch), _alone(family, folders["stars"], "stars"))
        for name in ("mood", "stars"):
            bank.remove(name)
        assert len(bank) == 0 and torch.equal(output(model, batch), base)
        assert model.config.id2label == {0: "LABEL_0", 1: "LABEL_1"} and model.num_labels == 2


def test_the_models_own_loss_follows_the_adapters_labels(folders: dict[str, Path], family: str) -> None:
    model, batch = tiny(family), inputs(family)
    bank = tt.Bank(model)
    for name, folder in folders.items():
        bank.add(name, folder)
    for name, labels in (("topic", [4, 0, 2]), ("mood", [1, 0, 1]), ("stars", [2, 2, 0])):
        bank.use(name)
        out = model(**batch, labels=torch.tensor(labels))
        assert torch.allclose(out.loss, torch.nn.functional.cross_entropy(out.logits, torch.tensor(labels)))


def test_saving_from_a_bank_gives_the_same_files(folders: dict[str, Path], family: str, tmp_path: Path) -> None:
    bank = tt.Bank(tiny(family))
    for name, folder in folders.items():
        bank.add(name, folder)
    for name, folder in folders.items():
        again = bank[name].save(tmp_path / "again" / name)
        assert _same(again, folder)
        assert json.loads((again / "adapter_config.json").read_text())["labels"] == LABELS[name]


def _same(one: Path, other: Path) -> bool:
    """Whether two folders hold the same tensors, bit for bit."""
    tensors, others = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    return tensors.keys() == others.keys() and all(torch.equal(tensors[key], others[key]) for key in tensors)


def test_training_a_second_task_leaves_the_first_alone(family: str, tmp_path: Path) -> None:
    model, batch = tiny(family), inputs(family)
    first = tt.attach(model, "houlsby[size=4]", "first")
    _train(model, first, torch.tensor([0, 1, 1]))
    with torch.no_grad():
        expected = output(model.eval(), batch)
    before = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    saved = first.save(tmp_path / "first")
    files = {path.name: path.read_bytes() for path in saved.iterdir()}
    second = tt.attach(model, "houlsby[size=8]", "second")
    _train(model, second, torch.tensor([1, 0, 0]))
    first.activate()
    with torch.no_grad():
        assert torch.equal(output(model.eval(), batch), expected)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert _same(first.save(tmp_path / "again"), saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == files


def _train(model: Any, adapter: tt.Adapter, labels: torch.Tensor) -> None:
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=0.05)
    model.train()
    start = model(**inputs("bert"), labels=labels).loss.item()
    for _ in range(8):
        optimiser.zero_grad()
        loss = model(**inputs("bert"), labels=labels).loss
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.9 * start


def test_a_failed_addition_leaves_the_bank_as_it_was(folders: dict[str, Path], family: str) -> None:
    bank = tt.Bank(tiny(family))
    bank.add("mood", folders["mood"])
    bank.add("stars", folders["stars"])
    bank.use("stars")
    with pytest.raises(tt.UserError, match="attached already"):
        bank.add("mood", folders["topic"])
    config = json.loads((folders["topic"] / "adapter_config.json").read_text())
    (folders["topic"] / "adapter_config.json").write_text(json.dumps(config | {"labels": ["a", "b", "c"]}))
    with pytest.raises(tt.UserError, match=r"instead of|no tensor in .* has as many rows"):
        bank.add("topic", folders["topic"])
    assert bank.names == ("mood", "stars") and bank.active == "stars"
    with pytest.raises(tt.UserError, match=r"did you mean.*stars"):
        bank.use("star")


def test_the_head_of_another_kind_of_model_is_refused(folders: dict[str, Path], family: str) -> None:
    if family != "bert":
        pytest.skip("one family is enough")
    tagger = BertForTokenClassification(tiny("bert").config)
    with pytest.raises(tt.UserError, match="load the base as BertForSequenceClassification"):
        tt.Bank(tagger).add("mood", folders["mood"])


@pytest.mark.real
def test_a_pipeline_names_the_labels_of_the_acting_adapter(tmp_path: Path) -> None:
    from trimtab.data import resolve
    from trimtab.models import load_model

    source = "pkg:cognition/model"
    names = {"two": ["no", "yes"], "four": ["n", "e", "s", "w"]}
    for name, labels in names.items():
        tt.attach(load_model(source, "encoder", labels=labels), "ia3", name).save(tmp_path / name)
    model = load_model(source, "encoder", labels=["a", "b", "c"])
    bank = tt.Bank(model)
    for name in names:
        bank.add(name, tmp_path / name)
    ask = pipeline("text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(resolve(source)))
    for name, labels in names.items():
        bank.use(name)
        assert {one["label"] for one in ask("hello", top_k=None)} == set(labels)

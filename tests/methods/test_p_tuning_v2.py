"""P-tuning v2 against keys and values put in front by hand, in float64; its start, its head, its counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import RobertaConfig, RobertaForSequenceClassification

import trimtab as tt
from prefix_by_hand import P, attached, by_hand, positions, reference, rows, sets
from reference import PREFIXES
from tiny import CAUSAL, inputs, output, tiny
from trimtab.methods import PTuningV2
from trimtab.sites import Sites


@pytest.fixture(autouse=True)
def _clean() -> Any:
    yield
    PREFIXES.clear()


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *((family, "") for family in ("bert", "roberta", "gpt2", "llama", "t5", "bart")),
        *((family, ",network=true,hidden=6") for family in ("bert", "t5")),
    ],
)
def test_equals_concatenation(family: str, options: str) -> None:
    """Every self-attention has keys and values of its own, cross-attention has none; gradients agree as well."""
    model, adapter = attached(family, f"p-tuning-v2[length={P},dropout=0{options}]")
    batch, real = rows(family)
    own = [key for key in sets(family) if "cross" not in key]
    expected = reference(family, adapter, own)(**batch, **positions(family, real)).logits
    found = model(**batch).logits
    if family in CAUSAL:
        found, expected = found[real], expected[real]
    assert torch.allclose(found, expected, rtol=0, atol=1e-9)
    trained = [parameter for name, parameter in adapter.named_parameters() if not name.startswith("head_")]
    wanted = torch.autograd.grad(expected.pow(2).mean(), trained)
    given = torch.autograd.grad(found.pow(2).mean(), trained)
    for a, b in zip(given, wanted, strict=True):
        assert b.any() and torch.allclose(a, b, rtol=1e-6, atol=1e-10)
    stored = {f"{key.format(layer)}.{what}" for key in own for layer in range(3) for what in ("keys", "values")}
    adapter.fold()
    assert {name for name, _ in adapter.named_parameters() if not name.startswith("head_")} == stored


def test_starts_as_small_noise() -> None:
    torch.manual_seed(0)
    adapter = tt.attach(tiny("bert"), "p-tuning-v2[length=50]")
    for keys, values in by_hand(adapter, "layer{}_self"):
        assert 0.018 < keys.std() < 0.022 and 0.018 < values.std() < 0.022
    torch.manual_seed(0)
    network = tt.attach(tiny("bert"), "p-tuning-v2[length=50,network=true,hidden=64]")
    for keys, values in by_hand(network, "layer{}_self"):
        assert 0.018 < keys.std() < 0.022 and 0.018 < values.std() < 0.022


def test_trains_the_head_and_leaves_the_pooler(tmp_path: Path) -> None:
    """The linear classifier learns along and is saved; everything else of the base stays as it is."""
    model = tiny("bert")
    adapter = tt.attach(model, "p-tuning-v2[length=2]")
    model.train()
    output(model, inputs("bert")).pow(2).mean().backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {f"trimtab.entries.default.parts.{name}" for name, _ in adapter.named_parameters()}
    assert {"head_classifier.copy.weight", "head_classifier.copy.bias"} < set(adapter.state_dict())
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        expected = output(model.eval(), inputs("bert"))
        adapter.save(tmp_path)
        fresh = tiny("bert")
        tt.load(fresh, tmp_path)
        assert torch.equal(output(fresh, inputs("bert")), expected)


def test_dropout_is_the_papers_and_acts_in_training_alone() -> None:
    model = tiny("bert")
    adapter = tt.attach(model, "p-tuning-v2")
    batch = inputs("bert")
    for parameter in adapter.parameters():
        parameter.data.normal_()
    assert adapter.method.dropout == 0.1
    assert torch.equal(output(model, batch), output(model, batch))
    model.train()
    assert not torch.equal(output(model, batch), output(model, batch))


def test_counts_are_the_papers() -> None:
    """RoBERTa-large: 2 · P · L · d."""
    shape = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    with torch.device("meta"):
        sites = Sites(RobertaForSequenceClassification(RobertaConfig(**shape)))
    assert PTuningV2(length=8).parameter_count(sites) == 393_216
    assert PTuningV2(length=128).parameter_count(sites) == 6_291_456
    assert PTuningV2(length=8, layers="-12:").parameter_count(sites) == 393_216 // 2

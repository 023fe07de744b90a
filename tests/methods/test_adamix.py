"""AdaMix: draws, averaging, the consistency loss by hand."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import TrainingArguments

import trimtab as tt
from tiny import inputs, output, tiny
from trimtab.consistency import consistency_loss


def _attached(family: str, method: str) -> tuple[Any, Any]:
    torch.manual_seed(4)
    model = tiny(family, torch.float64)
    adapter = tt.attach(model, method)
    for parameter in adapter.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model, adapter


def test_a_training_forward_is_one_of_the_experts_combinations() -> None:
    """One module, three experts of each projection drawn apart: each output is one of the nine by hand, all occur."""
    _, adapter = _attached("bert", "adamix[size=4,experts=3,mix=both,layers=0]")
    part = adapter._entry.parts["layer0_feedforward"].train()
    h = torch.randn(2, 5, 32, dtype=torch.float64)
    by_hand = {}
    for i in range(3):
        for j in range(3):
            inner = F.gelu(h @ part.down[i].T + part.down_bias[i], approximate="tanh")
            by_hand[i, j] = h + inner @ part.up[j].T + part.up_bias[j]
    seen: Counter[tuple[int, int]] = Counter()
    for _ in range(360):
        found = part(h)
        matches = [key for key, expected in by_hand.items() if torch.allclose(found, expected, atol=1e-12)]
        assert len(matches) == 1
        seen[matches[0]] += 1
    assert len(seen) == 9 and min(seen.values()) > 15  # 40 expected of each


@pytest.mark.parametrize("method", ["adamix[size=4,mix=both]", "adamix[form=lora,size=2,mix=both]"])
def test_folded_is_the_mean_of_the_parameters(method: str) -> None:
    model, adapter = _attached("llama", method)
    means = {name: value.mean(0) for name, value in adapter.named_parameters()}
    before = output(model.eval(), inputs("llama"))
    adapter.fold()
    for name, value in adapter.named_parameters():
        assert value.shape[0] == 1 and torch.allclose(value[0], means[name])
    assert torch.allclose(output(model, inputs("llama")), before, atol=1e-12)
    model.train()
    assert torch.allclose(output(model, inputs("llama")), before, atol=1e-12), "one expert leaves nothing to draw"
    assert adapter.method.experts == 1


def test_the_lora_form_starts_at_the_base_with_equal_experts() -> None:
    model, batch = tiny("llama"), inputs("llama")
    base = output(model, batch)
    adapter = tt.attach(model, "adamix[form=lora]")
    assert torch.equal(output(model.train(), batch), base)
    part = adapter._entry.parts["layer0_q"]
    assert part.A.shape[0] == 4 and all(torch.equal(part.A[0], expert) for expert in part.A)


def test_consistency_loss_by_hand() -> None:
    first, second = torch.randn(6, 3, requires_grad=True), torch.randn(6, 3, requires_grad=True)
    p, q = first.softmax(-1), second.softmax(-1)
    expected = 0.5 * ((p * (p / q).log()).sum(-1) + (q * (q / p).log()).sum(-1)).mean()
    loss = consistency_loss(first, second)
    assert torch.allclose(loss, expected, atol=1e-6)
    loss.backward()
    only_q = 0.5 * (p.detach() * (p.detach() / second.softmax(-1)).log()).sum(-1).mean()  # the target is detached
    (wanted,) = torch.autograd.grad(only_q, second)
    assert torch.allclose(second.grad, wanted, atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_trainer_takes_the_second_forward_only_where_it_counts(family: str, tmp_path: Path) -> None:
    """With one expert both draws agree and the consistency is zero; with several it adds to the loss."""
    rows = [{"input_ids": list(range(3, 11)), "labels": 1 if family == "bert" else list(range(3, 11))}] * 8

    def first_loss(method: str) -> tuple[float, int]:
        torch.manual_seed(0)
        model = tiny(family)
        adapter = tt.attach(model, method)
        for parameter in adapter.parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))
        calls = []
        model.register_forward_hook(lambda *_: calls.append(1))
        args = TrainingArguments(
            str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=8,
            report_to="none",
            use_cpu=True,
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        )
        trainer = tt.Trainer(model, args, train_dataset=rows)
        trainer.train()
        return trainer.state.log_history[0]["loss"], len(calls)

    assert first_loss("adamix[size=4,experts=1]")[0] == pytest.approx(
        first_loss("adamix[size=4,experts=1,consistency=0]")[0], abs=1e-6
    )
    plain, one = first_loss("adamix[size=4,consistency=0]")
    pulled, two = first_loss("adamix[size=4,consistency=500]")
    assert (one, two) == (1, 2) and pulled > plain + 1e-4


@pytest.mark.parametrize(
    ("method", "sentence"), [("adamix[experts=0]", "experts=0"), ("adamix[consistency=-1]", "consistency=-1")]
)
def test_mistakes(method: str, sentence: str) -> None:
    with pytest.raises(tt.UserError, match=sentence):
        tt.attach(tiny("bert"), method)

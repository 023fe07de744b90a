"""The vocabulary projection in chunks: the same loss and gradients, and never many logits at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BertForMaskedLM

import trimtab as tt
from tiny import VOCABULARY, attached, tiny
from trimtab import chunks
from trimtab.objectives import Tokens

CAUSAL = ["llama", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox", "opt", "bloom"]


def labelled() -> dict[str, torch.Tensor]:
    """Two rows, one of them padded, with labels behind the first tokens."""
    torch.manual_seed(3)
    ids = torch.randint(3, VOCABULARY, (2, 14))
    mask = torch.ones_like(ids)
    mask[1, 11:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :4] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def learned(adapter: Any, num_items: int | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss and the gradients."""
    objective, model = Tokens(), adapter.model
    adapter.model.zero_grad()
    _, logits, targets = objective.forward(model, model, labelled(), everywhere=False)
    loss = objective.loss(logits, targets, num_items)
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in adapter.parameters()]


@pytest.mark.parametrize("num_items", [None, 40])
@pytest.mark.parametrize("family", CAUSAL)
def test_loss_and_gradients_are_those_of_all_logits(
    family: str, num_items: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = attached(family, "full" if family == "bloom" else "lora[r=2]|prompt[length=3]")
    adapter.model.train()
    plain, gradients = learned(adapter, num_items)
    sizes: list[int] = []
    head = adapter.model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: sizes.append(output.shape[-2]))
    monkeypatch.setattr(chunks, "MOST", 5 * head.weight.shape[0])
    found, own = learned(adapter, num_items)
    torch.testing.assert_close(found, plain, rtol=1e-6, atol=1e-6)
    for one, other in zip(own, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert max(sizes) == 5 and sum(sizes) == 2 * 17  # all positions once forward, once more for the backward pass
    assert not any(isinstance(module, chunks._Given) for module in adapter.model.modules())


def test_few_logits_and_models_of_two_stacks_are_left_alone() -> None:
    llama, t5 = (tt.attach(tiny(family), "lora[r=2]").model for family in ("llama", "t5"))
    assert chunks.chunk_size(llama, 10) is None
    assert chunks.chunk_size(llama, 2 * chunks.MOST) == chunks.MOST // VOCABULARY
    assert chunks.chunk_size(t5, 2 * chunks.MOST) is None
    masked = tt.attach(BertForMaskedLM(tiny("bert").config), "lora[r=2]").model
    assert chunks.chunk_size(masked, 2 * chunks.MOST) is None


def test_two_forwards_are_compared_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """AdaMix's divergence needs all logits of both."""
    model, objective = tiny("llama"), Tokens()
    tt.attach(model, "lora[r=2]")
    first = objective.forward(model, model, labelled(), everywhere=False)[1]
    monkeypatch.setattr(chunks, "MOST", 5 * VOCABULARY)
    second = objective.forward(model, model, labelled(), everywhere=False)[1]
    assert isinstance(second, chunks.Chunks)
    torch.testing.assert_close(second.whole(), first, rtol=1e-6, atol=1e-6)
    assert float(objective.divergence(first, second, None).detach()) == pytest.approx(0, abs=1e-6)

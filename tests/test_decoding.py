"""One query over keys in pieces, against one softmax over all of them in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tiny import attached
from trimtab import attention
from trimtab.decoding import decode, decodes


def reference(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Head by head, row by row."""
    batch, heads, _, width = query.shape
    found = torch.empty(batch, 1, heads, width, dtype=torch.float64)
    for row in range(batch):
        for head in range(heads):
            own = head // (heads // keys.shape[1])
            scores = keys[row, own].double() @ query[row, head, 0].double() / width**0.5
            shares = scores.masked_fill(~seen[row], -torch.inf).softmax(0)
            found[row, 0, head] = shares @ values[row, own].double()
    return found


@pytest.mark.parametrize("additive", [False, True])
def test_pieces_give_what_joined_keys_give(additive: bool) -> None:
    torch.manual_seed(0)
    query = torch.randn(3, 6, 1, 4)
    pieces = [
        (torch.randn(size, 2, length, 4), torch.randn(size, 2, length, 4)) for size, length in ((1, 5), (3, 2), (3, 7))
    ]
    seen = torch.rand(3, 14) > 0.3
    mask: torch.Tensor = seen[:, None, None]
    if additive:
        mask = torch.zeros(()).where(mask, torch.finfo(torch.float32).min)
    keys, values = (torch.cat([piece[at].expand(3, -1, -1, -1) for piece in pieces], dim=2) for at in range(2))
    found = decode(query, pieces, mask, 0.5)
    torch.testing.assert_close(found.double(), reference(query, keys, values, seen), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["prefix[length=3,hidden=8]", "prompt[length=3]"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "qwen3"])
def test_generation_takes_it_at_every_step_and_says_the_same(
    family: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = attached(family, method).model.eval()
    ids = torch.randint(3, 50, (2, 6))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    calls: list[int] = []

    def counted(*args: Any) -> torch.Tensor:
        calls.append(1)
        return decode(*args)

    monkeypatch.setattr(attention, "decode", counted)
    asked = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    found = model.generate(
        input_ids=ids, attention_mask=mask, **asked, return_dict_in_generate=True, output_logits=True
    )
    assert len(calls) == 4 * len(model.trimtab.sites.embeds[0].attentions)
    monkeypatch.setattr(attention, "decodes", lambda *args: False)
    joined = model.generate(
        input_ids=ids, attention_mask=mask, **asked, return_dict_in_generate=True, output_logits=True
    )
    assert torch.equal(found.sequences, joined.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(joined.logits), rtol=1e-4, atol=1e-5)


def test_what_only_the_models_own_function_knows_is_left_to_it() -> None:
    query = torch.zeros(1, 2, 1, 4)
    with torch.no_grad():
        assert decodes(query, None, False, {})
        assert not decodes(query, None, True, {})
        assert not decodes(query, torch.zeros(1, 2, 1, 3), False, {})
        assert not decodes(query, None, False, {"softcap": 30.0})
        assert not decodes(torch.zeros(1, 2, 3, 4), None, False, {})
    assert not decodes(query, None, False, {})


@pytest.mark.parametrize("method", ["prompt[length=2]", "p-tuning[length=2]", "prefix[length=3,hidden=8]"])
def test_serving_runs_virtual_tokens_and_generators_once(method: str) -> None:
    adapter = attached("llama", method)
    model: Any = adapter.model.eval()
    ids = torch.tensor([[5, 9, 11, 4]])
    runs: list[int] = []
    part: Any = next(iter(adapter._entry.members()))
    owner, name = (part.generator, "compute") if hasattr(part, "generator") else (part, "forward")
    plain = getattr(owner, name)
    setattr(owner, name, lambda: runs.append(1) or plain())

    def generated() -> torch.Tensor:
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)

    first = generated()
    runs.clear()
    with adapter.serving():
        assert torch.equal(generated(), first)
        assert torch.equal(generated(), first)
    assert len(runs) == 1
    with torch.no_grad():
        before = model(ids).logits
        for parameter in adapter.parameters():
            parameter.data.mul_(-3)  # as fused optimizers write, uncounted
        assert not torch.allclose(model(ids).logits, before)

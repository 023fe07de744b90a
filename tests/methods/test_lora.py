"""LoRA against an explicit change of the weight, and against peft's outputs for the same tensors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import trimtab as tt
from tiny import FAMILIES, inputs, output, tiny
from trimtab.methods.lora import LoRA

ALL = ("q", "k", "v", "o", "up", "down")
FUSED = {  # family -> {role: rows of the fused weight [out, in]}, written down by hand for width 32, 4 heads of 8
    "gpt2": {"q": range(32), "k": range(32, 64), "v": range(64, 96)},
    "phi3": {"q": range(32), "k": range(32, 48), "v": range(48, 64), "up": range(48, 96)},
    "modernbert": {"q": range(32), "k": range(32, 64), "v": range(64, 96), "up": range(48)},
    "gpt_neox": {role: [24 * h + 8 * i + d for h in range(4) for d in range(8)] for i, role in enumerate("qkv")},
    "bloom": {role: [24 * h + 8 * i + d for h in range(4) for d in range(8)] for i, role in enumerate("qkv")},
}


def _attached(family: str, method: LoRA, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    torch.manual_seed(6)
    model = tiny(family, dtype)
    adapter = tt.attach(model, method)
    for name, parameter in adapter.named_parameters():
        if name.endswith(".B"):
            parameter.data.normal_()
    return model, adapter


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_explicit_weight_change(family: str) -> None:
    """W + (alpha / r) B A, written into the base's weights row by row."""
    method = LoRA(r=2, alpha=6.0, targets=ALL)
    model, adapter = _attached(family, method)
    base = tiny(family, torch.float64)
    for site in adapter._entry.sites:
        if not hasattr(site, "role"):
            continue
        part = adapter._entry.parts[site.key]
        delta = 3.0 * part.B.detach() @ part.A.detach()  # [out, in]
        module = base.get_submodule(site.path)
        rows = list(FUSED.get(family, {}).get(site.role, range(delta.shape[0])))
        assert len(rows) == delta.shape[0]
        whole = torch.zeros(_out_features(module), delta.shape[1], dtype=torch.float64)
        whole[rows] = delta
        module.weight.data += whole.T if isinstance(module, Conv1D) else whole
    batch = inputs(family, dtype=torch.float64)
    assert torch.allclose(output(model, batch), output(base, batch), rtol=1e-5, atol=1e-5)


def _out_features(module: nn.Module) -> int:
    return module.nf if isinstance(module, Conv1D) else module.out_features


def test_scale() -> None:
    model = tiny("llama")
    plain = tt.attach(model, LoRA(r=4, alpha=8.0), "plain")
    ranked = tt.attach(model, LoRA(r=4, alpha=8.0, rank_stabilised=True), "ranked")
    assert {part.scale for part in plain._entry.parts.values()} == {2.0}
    assert {part.scale for part in ranked._entry.parts.values()} == {8.0 / math.sqrt(4)}


def test_dropout_acts_on_the_update_only_while_training() -> None:
    model, _ = _attached("llama", LoRA(r=2, dropout=0.5))
    batch = inputs("llama")
    assert torch.equal(output(model, batch), output(model, batch))
    model.train()
    assert not torch.equal(output(model, batch), output(model, batch))


def test_layers_and_targets() -> None:
    model = tiny("llama")
    adapter = tt.attach(model, LoRA(r=2, targets=("q", "down"), layers="-2:"))
    assert sorted(adapter._entry.parts) == ["layer1_down", "layer1_q", "layer2_down", "layer2_q"]


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        ("lora[r=0]", "r=0"),
        ("lora[dropout=1.5]", "dropout=1.5"),
        ("lora[targets=query]", "query"),
        ("lora[layers=7]", "layers 0 to 2"),
        ("lora[layers=-4:]", "layers 0 to 2"),
        ("lora[layers=2:1]", "names no layer"),
    ],
)
def test_mistakes(method: str, sentence: str) -> None:
    model = tiny("llama")
    with pytest.raises(tt.UserError, match=sentence):
        tt.attach(model, method)
    assert not hasattr(model, "trimtab") and all(p.requires_grad for p in model.parameters())


def test_merge_of_half_precision_is_computed_in_float32() -> None:
    model, adapter = _attached("llama", LoRA(r=2), torch.float32)
    half = tiny("llama", torch.bfloat16)
    other = tt.attach(half, LoRA(r=2))
    other.load_state_dict(adapter.state_dict())
    assert {p.dtype for p in other.parameters()} == {torch.float32}
    part = adapter._entry.parts["layer0_q"]
    before = half.model.layers[0].self_attn.q_proj.weight.float()
    expected = (before + part.scale * part.B @ part.A).to(torch.bfloat16)
    assert torch.equal(other.merge().model.layers[0].self_attn.q_proj.weight, expected)
    assert model is adapter.model


PEFT_NAMES = {
    "llama": {"q": "q_proj", "v": "v_proj", "down": "down_proj"},
    "gpt2": {"o": "attn.c_proj", "up": "c_fc"},
    "bert": {"q": "query", "v": "value", "up": "intermediate.dense"},
    "t5": {"q": "q", "v": "v"},
}


@pytest.mark.parametrize("family", PEFT_NAMES)
def test_equals_peft(family: str) -> None:
    """The same A and B in peft's LoRA give the same logits."""
    peft = pytest.importorskip("peft")
    names = PEFT_NAMES[family]
    model, adapter = _attached(family, LoRA(r=3, alpha=5.0, targets=tuple(names)), torch.float32)
    config = peft.LoraConfig(r=3, lora_alpha=5.0, target_modules=list(names.values()), fan_in_fan_out=family == "gpt2")
    other = peft.get_peft_model(tiny(family), config)
    with torch.no_grad():
        for site in adapter._entry.sites:
            if not hasattr(site, "role"):
                continue
            part = adapter._entry.parts[site.key]
            layer = other.base_model.model.get_submodule(site.path)
            layer.lora_A["default"].weight.copy_(part.A)
            layer.lora_B["default"].weight.copy_(part.B)
        batch = inputs(family)
        assert torch.allclose(output(model, batch), other(**batch).logits, rtol=0, atol=1e-5)
        assert not torch.allclose(output(model, batch), output(tiny(family), batch), atol=1e-2)

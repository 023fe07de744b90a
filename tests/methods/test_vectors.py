"""IA3, BitFit, layer norms, DoRA, PiSSA and LoRA+: by hand, and against peft's outputs for the same tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

import trimtab as tt
from tiny import inputs, output, tiny
from trimtab.sites import LinearSite, NormSite


def _attached(family: str, method: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    torch.manual_seed(6)
    model = tiny(family, dtype)
    adapter = tt.attach(model, method)
    for parameter in adapter.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model, adapter


def _linear(adapter: Any) -> list[tuple[LinearSite, Any]]:
    return [(s, adapter._entry.parts[s.key]) for s in adapter._entry.sites if isinstance(s, LinearSite)]


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_ia3_scales_rows_and_columns(family: str) -> None:
    model, adapter = _attached(family, "ia3")
    base = tiny(family, torch.float64)
    for site, part in _linear(adapter):
        module = base.get_submodule(site.path)
        if site.role == "down":
            module.weight.data *= part.scale
        else:
            module.weight.data *= part.scale[:, None]
            if module.bias is not None:
                module.bias.data *= part.scale
    batch = inputs(family, dtype=torch.float64)
    if family == "bert":
        base.classifier = adapter._entry.parts["head_classifier"].copy
    assert torch.allclose(output(model, batch), output(base, batch), atol=1e-6)


def test_bitfit_adds_to_every_bias() -> None:
    model, adapter = _attached("bert", "bitfit")
    base = tiny("bert", torch.float64)
    touched = set()
    for site in adapter._entry.sites:
        if isinstance(site, (LinearSite, NormSite)):
            base.get_submodule(site.path).bias.data += adapter._entry.parts[site.key].shift
            touched.add(f"{site.path}.bias")
    base.classifier = adapter._entry.parts["head_classifier"].copy
    biases = {name for name, _ in base.bert.named_parameters(prefix="bert") if name.endswith("bias")}
    assert touched == biases, "every bias of the encoder, the pooler's included"
    batch = inputs("bert", dtype=torch.float64)
    assert torch.allclose(output(model, batch), output(base, batch), atol=1e-8)


def test_bitfit_gives_biases_to_models_without() -> None:
    model, adapter = _attached("llama", "bitfit")
    expected = output(model, inputs("llama", dtype=torch.float64))
    merged = adapter.merge()
    assert merged.model.layers[0].self_attn.q_proj.bias is not None
    assert torch.allclose(output(merged, inputs("llama", dtype=torch.float64)), expected, atol=1e-10)


def test_layernorm_of_chosen_layers() -> None:
    adapter = tt.attach(tiny("llama"), "layernorm[layers=-1]")
    assert {site.path for site in adapter._entry.sites} == {
        "model.layers.2.input_layernorm",
        "model.layers.2.post_attention_layernorm",
    }


def test_dora_by_hand() -> None:
    """m ⊙ (W + s B A) / ‖W + s B A‖, written into the weights."""
    model, adapter = _attached("gpt2", "lora[r=2,dora=true,alpha=6]")
    base = tiny("gpt2", torch.float64)
    for site, part in _linear(adapter):
        rows = {"q": slice(0, 32), "v": slice(64, 96)}[site.role]
        weight = base.get_submodule(site.path).weight.data  # [in, out]
        moved = weight[:, rows].T + 3 * part.low.B @ part.low.A
        weight[:, rows] = (part.magnitude[:, None] * moved / moved.norm(dim=1, keepdim=True)).T
    batch = inputs("gpt2", dtype=torch.float64)
    assert torch.allclose(output(model, batch), output(base, batch), atol=1e-8)


def test_dora_treats_its_norm_as_a_constant() -> None:
    _, adapter = _attached("llama", "lora[r=2,dora=true,targets=q,layers=0]")
    part = adapter._entry.parts["layer0_q"]
    x = torch.randn(3, 32, dtype=torch.float64)
    weight = adapter._entry.sites[0].weight()
    fixed = (weight + part.low.scale * part.low.B @ part.low.A).norm(dim=1).detach()
    expected = part.magnitude / fixed * (x @ (weight + part.low.scale * part.low.B @ part.low.A).T)
    found = part(x, x @ weight.T)
    assert torch.allclose(found, expected, atol=1e-10)
    for tensor in (part.low.A, part.low.B, part.magnitude):
        given, wanted = (torch.autograd.grad(y.pow(2).sum(), tensor, retain_graph=True)[0] for y in (found, expected))
        assert torch.allclose(given, wanted, atol=1e-8)


def test_pissa_starts_at_the_base_with_the_principal_part() -> None:
    model, batch = tiny("llama", torch.float64), inputs("llama")
    base = output(model, batch)
    adapter = tt.attach(model, "lora[r=3,init=pissa]")
    assert torch.allclose(output(model, batch), base, atol=1e-6)
    site, part = _linear(adapter)[0]
    u, sigma, v = torch.linalg.svd(site.weight())
    principal = u[:, :3] @ torch.diag(sigma[:3]) @ v[:3]
    assert torch.allclose(part.low.scale * part.low.B @ part.low.A, principal, atol=1e-5)
    with pytest.raises(tt.UserError, match="at most 16"):
        tt.attach(tiny("llama"), "lora[r=17,init=pissa,targets=v]")


def test_lora_plus_gives_b_its_own_rate(tmp_path: Path) -> None:
    model = tiny("llama")
    adapter = tt.attach(model, "lora[r=2,lr_ratio=16]")
    args = TrainingArguments(str(tmp_path), learning_rate=1e-3, report_to="none", use_cpu=True)
    optimizer = tt.Trainer(model, args, adapter=adapter, train_dataset=[]).create_optimizer()
    rates = {id(weight): group["lr"] for group in optimizer.param_groups for weight in group["params"]}
    named = dict(adapter.named_parameters())
    assert {rates[id(weight)] for name, weight in named.items() if name.endswith(".A")} == {1e-3}
    assert {rates[id(weight)] for name, weight in named.items() if name.endswith(".B")} == {16 * 1e-3}
    assert len(rates) == len(named)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_dora_equals_peft(family: str) -> None:
    peft = pytest.importorskip("peft")
    model, adapter = _attached(family, "lora[r=3,alpha=5,dora=true,targets=q,v]", torch.float32)
    names = [site.path for site, _ in _linear(adapter)]
    other = peft.get_peft_model(
        tiny(family), peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=names)
    ).eval()
    with torch.no_grad():
        for site, part in _linear(adapter):
            layer = other.base_model.model.get_submodule(site.path)
            layer.lora_A["default"].weight.copy_(part.low.A)
            layer.lora_B["default"].weight.copy_(part.low.B)
            layer.lora_magnitude_vector["default"].weight.copy_(part.magnitude)
    _same_logits(family, model, adapter, other)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_ia3_equals_peft(family: str) -> None:
    peft = pytest.importorskip("peft")
    model, adapter = _attached(family, "ia3", torch.float32)
    names = [site.path for site, _ in _linear(adapter)]
    feedforward = [site.path for site, _ in _linear(adapter) if site.role == "down"]
    assert len(names) == 3 * len(feedforward) == 9
    config = peft.IA3Config(target_modules=names, feedforward_modules=feedforward)
    other = peft.get_peft_model(tiny(family), config).eval()
    with torch.no_grad():
        for site, part in _linear(adapter):
            vector = other.base_model.model.get_submodule(site.path).ia3_l["default"]
            vector.copy_(part.scale.reshape(vector.shape))
    _same_logits(family, model, adapter, other)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_layernorm_equals_peft(family: str) -> None:
    peft = pytest.importorskip("peft")
    model, adapter = _attached(family, "layernorm", torch.float32)
    sites = [site for site in adapter._entry.sites if isinstance(site, NormSite)]
    other = peft.get_peft_model(tiny(family), peft.LNTuningConfig(target_modules=[site.path for site in sites])).eval()
    for site in sites:
        layer = other.base_model.model.get_submodule(site.path)
        layer.ln_tuning_layers["default"].load_state_dict(adapter._entry.parts[site.key].copy.state_dict())
    _same_logits(family, model, adapter, other)


@torch.no_grad()
def _same_logits(family: str, model: Any, adapter: Any, other: Any) -> None:
    """At most 1e-5 apart with our head, where there is one, on peft's side; and away from the base model's."""
    base, batch = tiny(family), inputs(family)
    if family == "bert":
        head = adapter._entry.parts["head_classifier"].copy.state_dict()
        other.base_model.model.classifier.load_state_dict(head)
        base.classifier.load_state_dict(head)
    found = output(model, batch)
    assert (found - other(**batch).logits).abs().max() <= 1e-5
    assert (found - output(base, batch)).abs().max() > 1e-3

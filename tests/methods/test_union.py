"""Unions: members at one site act one after the other, and nothing is trained twice."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import trimtab as tt
from tiny import inputs, output, tiny


def test_members_at_one_site_by_hand() -> None:
    """l ⊙ (W x + s B A x) + δ on the values, and the scale of the feed-forward's input in front of a LoRA there."""
    torch.manual_seed(0)
    model = tiny("llama", torch.float64)
    adapter = tt.attach(model, "ia3[targets=down,v]|lora[r=2,alpha=4,targets=v,down]|bitfit")
    for parameter in adapter.parameters():
        parameter.data.normal_()
    parts = dict(adapter.named_parameters())
    layer = model.model.layers[1]
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    low = 2 * F.linear(F.linear(x, parts["layer1_v.members.lora.A"]), parts["layer1_v.members.lora.B"])
    value = layer.self_attn.v_proj.weight @ x.mT
    expected = value.mT * parts["layer1_v.members.ia3.scale"] + low + parts["layer1_v.members.bitfit.shift"]
    assert torch.allclose(layer.self_attn.v_proj(x), expected, atol=1e-12)
    wide = torch.randn(2, 5, 48, dtype=torch.float64)
    scaled = wide * parts["layer1_down.members.ia3.scale"]
    low = 2 * F.linear(F.linear(scaled, parts["layer1_down.members.lora.A"]), parts["layer1_down.members.lora.B"])
    expected = scaled @ layer.mlp.down_proj.weight.T + low + parts["layer1_down.members.bitfit.shift"]
    assert torch.allclose(layer.mlp.down_proj(wide), expected, atol=1e-12)


def test_the_order_of_the_members_is_the_order_of_their_acts() -> None:
    outputs = []
    for method in ("ia3[targets=v]|bitfit", "bitfit|ia3[targets=v]"):
        model = tiny("llama")
        adapter = tt.attach(model, method)
        for name, parameter in adapter.named_parameters():
            parameter.data.fill_(2.0 if name.endswith("scale") else 0.5)
        with torch.no_grad():
            x = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
            outputs.append((model.model.layers[0].self_attn.v_proj(x), F.linear(x, _weight(model))))
    (first, plain), (second, _) = outputs
    assert torch.allclose(first, 2 * plain + 0.5, atol=1e-6)
    assert torch.allclose(second, 2 * (plain + 0.5), atol=1e-6)


def _weight(model: torch.nn.Module) -> torch.Tensor:
    return model.get_submodule("model.layers.0.self_attn.v_proj").weight


@pytest.mark.parametrize(
    "method",
    [
        "lora[r=2]|lora[r=4]",
        "lora[r=2,targets=q,v]|lora[r=2,targets=v]",
        "lora[dora=true]|ia3",
        "houlsby[size=4]|layernorm",
        "layernorm|bitfit",
        "prompt[length=2]|prompt[length=3]",
    ],
)
def test_two_that_train_the_same_tensor_are_refused(method: str) -> None:
    model, batch = tiny("bert"), inputs("bert")
    base = output(model, batch)
    with pytest.raises(tt.UserError, match="both claim"):
        tt.attach(model, method)
    assert torch.equal(output(model, batch), base) and not hasattr(model, "trimtab")


def test_the_same_method_at_different_sites() -> None:
    adapter = tt.attach(tiny("llama"), "lora[r=2,targets=q]|lora[r=4,targets=v]")
    assert {name.partition(".")[0][-1] for name, _ in adapter.named_parameters()} == {"q", "v"}


def test_a_union_keeps_the_consistency_of_its_members() -> None:
    assert tt.attach(tiny("bert"), "adamix[size=2,consistency=0.5]|bitfit").method.consistency == 0.5
    assert tt.attach(tiny("bert"), "ia3|bitfit").method.consistency == 0

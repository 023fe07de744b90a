"""Houlsby, Pfeiffer and parallel adapters against layers written out by hand, in float64; counts; AdapterDrop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, OPTConfig, OPTForCausalLM

import trimtab as tt
from tiny import inputs, output, tiny
from trimtab.sites import ActivationSite, NormSite, Sites

Branch = Callable[[torch.Tensor], torch.Tensor]


def _attached(family: str, method: str) -> tuple[Any, Any]:
    torch.manual_seed(4)
    model = tiny(family, torch.float64)
    adapter = tt.attach(model, method)
    for parameter in adapter.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model, adapter


def _weights(adapter: Any, key: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in adapter._entry.parts[key].named_parameters()}


def _bottleneck(weights: dict[str, torch.Tensor], h: torch.Tensor, g: Branch) -> torch.Tensor:
    """W_up g(W_down h + b_down) + b_up, as matrix products."""
    inner = g(h @ weights["adapter.down.weight"].T + weights["adapter.down.bias"])
    return inner @ weights["adapter.up.weight"].T + weights["adapter.up.bias"]


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


class Layers:
    """How one family's layer puts its branches together; `at(key)` gives what happens to a branch's output."""

    def __init__(self, model: Any):
        self.model, self.body = model, model.base_model

    def bert(self, x: torch.Tensor, at: Any, norm: Any) -> torch.Tensor:
        for i, layer in enumerate(self.body.encoder.layer):
            attended = layer.attention.output.dense(layer.attention.self(x)[0])
            x = norm(layer.attention.output.LayerNorm)(at(f"layer{i}_attention", attended, x, x) + x)
            forward = layer.output.dense(layer.intermediate(x))
            x = norm(layer.output.LayerNorm)(at(f"layer{i}_feedforward", forward, x, x) + x)
        return x

    def llama(self, x: torch.Tensor, at: Any, norm: Any) -> torch.Tensor:
        table = self.body.rotary_emb(x, position_ids=torch.arange(x.shape[1])[None])
        for i, layer in enumerate(self.body.layers):
            read = norm(layer.input_layernorm)(x)
            x = x + at(f"layer{i}_attention", layer.self_attn(read, position_embeddings=table)[0], read, x)
            read = norm(layer.post_attention_layernorm)(x)
            x = x + at(f"layer{i}_feedforward", layer.mlp(read), read, x)
        return norm(self.body.norm)(x)

    def gpt_neox(self, x: torch.Tensor, at: Any, norm: Any) -> torch.Tensor:
        """Attention and feed-forward side by side."""
        table = self.body.rotary_emb(x, position_ids=torch.arange(x.shape[1])[None])
        for i, layer in enumerate(self.body.layers):
            first, second = norm(layer.input_layernorm)(x), norm(layer.post_attention_layernorm)(x)
            attended = layer.attention(first, attention_mask=None, position_embeddings=table)[0]
            x = (
                x
                + at(f"layer{i}_attention", attended, first, x)
                + at(f"layer{i}_feedforward", layer.mlp(second), second, x)
            )
        return norm(self.body.final_layer_norm)(x)

    def dinov2(self, x: torch.Tensor, at: Any, norm: Any) -> torch.Tensor:
        for i, layer in enumerate(self.body.encoder.layer):
            read = norm(layer.norm1)(x)
            x = x + at(f"layer{i}_attention", layer.layer_scale1(layer.attention(read)[0]), read, x)
            read = norm(layer.norm2)(x)
            x = x + at(f"layer{i}_feedforward", layer.layer_scale2(layer.mlp(read)), read, x)
        return norm(self.body.layernorm)(x)


def _compare(family: str, method: str, branches: Any) -> None:
    """The hidden states of an attached model and of layers written out by hand over a plain one."""
    model, adapter = _attached(family, method)
    plain = tiny(family, torch.float64)
    trained = {
        site.path: adapter._entry.parts[site.key].copy for site in adapter._entry.sites if isinstance(site, NormSite)
    }
    names = {id(module): name for name, module in plain.named_modules()}

    def norm(module: nn.Module) -> nn.Module:
        return trained.get(names[id(module)], module)

    def at(key: str, branch: torch.Tensor, read: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
        return branches(plain, adapter, key, branch, read, stream) if key in adapter._entry.parts else branch

    batch = inputs(family, dtype=torch.float64)
    if family == "dinov2":
        start = plain.base_model.embeddings(batch["pixel_values"])
    elif family == "bert":
        embeddings = plain.bert.embeddings
        words, seats = embeddings.word_embeddings(batch["input_ids"]), embeddings.position_embeddings(torch.arange(9))
        start = norm(embeddings.LayerNorm)(words + seats + embeddings.token_type_embeddings.weight[0])
    else:
        start = plain.get_input_embeddings()(batch["input_ids"])
    expected = getattr(Layers(plain), family)(start, at, norm)
    found = model.base_model(**batch).last_hidden_state
    if family == "gpt_neox":
        found = model(**batch, output_hidden_states=True).hidden_states[-1]
    assert torch.allclose(found, expected, atol=1e-6)
    without = tiny(family, torch.float64).base_model(**batch).last_hidden_state
    assert (found - without).abs().max() > 1e-2


FAMILIES = ("bert", "llama", "gpt_neox", "dinov2")


@pytest.mark.parametrize("family", FAMILIES)
def test_houlsby(family: str) -> None:
    """h + W_up gelu(W_down h) at both branches, under trained norms."""

    def branches(plain: Any, adapter: Any, key: str, h: torch.Tensor, read: Any, stream: Any) -> torch.Tensor:
        return h + _bottleneck(_weights(adapter, key), h, _gelu)

    _compare(family, "houlsby[size=5]", branches)


@pytest.mark.parametrize("family", FAMILIES)
def test_pfeiffer(family: str) -> None:
    """f + W_up relu(W_down LN(f + x)), the frozen norm only where the model is post-norm."""

    def branches(plain: Any, adapter: Any, key: str, f: torch.Tensor, read: Any, stream: torch.Tensor) -> torch.Tensor:
        z = f + stream
        if family == "bert":
            z = plain.bert.encoder.layer[int(key[5])].output.LayerNorm(z)
        return f + _bottleneck(_weights(adapter, key), z, F.relu)

    _compare(family, "pfeiffer[size=5]", branches)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("learned", [False, True])
def test_parallel(family: str, learned: bool) -> None:
    """f + s W_up relu(W_down x), x what feed-forward reads."""

    def branches(plain: Any, adapter: Any, key: str, f: torch.Tensor, read: torch.Tensor, stream: Any) -> torch.Tensor:
        weights = _weights(adapter, key)
        return f + weights.get("scale", torch.tensor(3.0)) * _bottleneck(weights, read, F.relu)

    _compare(family, f"parallel[size=5,scale=3,learn_scale={str(learned).lower()}]", branches)


def test_houlsby_starts_near_the_identity() -> None:
    model = tiny("bert")
    base = output(model, inputs("bert"))
    adapter = tt.attach(model, "houlsby[size=16]")
    assert (output(model, inputs("bert")) - base).abs().max() < 1e-4
    part = adapter._entry.parts["layer0_attention"].adapter
    assert 5e-4 < part.down.weight.std() < 1.1e-3 and part.down.weight.abs().max() <= 2e-3


@pytest.fixture(scope="module")
def bert_base() -> Sites:
    with torch.device("meta"):
        return Sites(BertForSequenceClassification(BertConfig()))


def test_counts_on_bert_base(bert_base: Sites) -> None:
    """The figures of the papers' code."""
    assert tt.Houlsby(size=64).parameter_count(bert_base) == 2_379_264 + 38_400
    assert tt.BitFit().parameter_count(bert_base) == 102_912
    assert tt.AdaMix(size=48).folded().parameter_count(bert_base) == 894_528
    assert tt.LoRA(r=8, alpha=8).parameter_count(bert_base) == 294_912


def test_adapter_drop_leaves_out_lower_layers_while_training() -> None:
    """The draw is shared by all adapters, covers 0 to `drop`, and evaluation leaves nothing out."""
    model, adapter = _attached("bert", "houlsby[size=4,drop=2,norms=false]")
    seen = set()
    calls: list[str] = []
    for site in adapter._entry.sites:
        if isinstance(site, ActivationSite):
            inner = adapter._entry.parts[site.key].adapter
            inner.register_forward_hook(lambda *_, key=site.key: calls.append(key))
    batch = inputs("bert")
    model.train()
    for _ in range(30):
        calls.clear()
        output(model, batch)
        layers = {int(key[5]) for key in calls}
        assert calls == [f"layer{i}_{branch}" for i in sorted(layers) for branch in ("attention", "feedforward")]
        seen.add(min(layers))
    assert seen == {0, 1, 2}
    model.eval()
    calls.clear()
    output(model, batch)
    assert len(calls) == 6


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        ("houlsby[size=33]", "33 is larger than the model's width of 32"),
        ("houlsby[size=0]", "size=0"),
        ("houlsby[drop=-1]", "drop=-1"),
        ("pfeiffer[reduction=0.5]", "reduction=0.5"),
        ("pfeiffer[layers=9]", "layers 0 to 2"),
        ("parallel[size=99]", "99 is larger"),
        ("houlsby[activation=tanh]", "tanh"),
        ("houlsby[size=4]|layernorm", "both claim"),
    ],
)
def test_mistakes(method: str, sentence: str) -> None:
    model = tiny("bert")
    with pytest.raises(tt.UserError, match=sentence):
        tt.attach(model, method)
    assert not hasattr(model, "trimtab") and all(p.requires_grad for p in model.parameters())


def test_opt_with_norms_behind_the_branches() -> None:
    """OPT-350m's layers: LN(f + x) after each branch, which pfeiffer passes once more, by hand in float64."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=16,
        max_position_embeddings=64, do_layer_norm_before=False,
    )  # fmt: skip
    model = OPTForCausalLM(config).double().eval()
    adapter = tt.attach(model, "pfeiffer[size=4]")
    for parameter in adapter.parameters():
        parameter.data.normal_()
    layer = model.model.decoder.layers[1]
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    part = model.trimtab.entries["default"].parts["layer1_feedforward"]
    down, up = part.adapter.down, part.adapter.up
    with torch.no_grad():
        hidden = layer.self_attn_layer_norm(x + layer.self_attn(x)[0])
        f = torch.relu(hidden @ layer.fc1.weight.T + layer.fc1.bias) @ layer.fc2.weight.T + layer.fc2.bias
        z = layer.final_layer_norm(f + hidden)
        adapted = f + torch.relu(z @ down.weight.T + down.bias) @ up.weight.T + up.bias
        assert torch.allclose(layer(x), layer.final_layer_norm(adapted + hidden), atol=1e-10)

"""LLaMA-Adapter and V2 against attention in explicit loops, in float64, on every family; against peft; their starts.

The reference below knows nothing of trimtab: each family's key and value projections are cut out of the base's weights
by hand, and softmax is written out for every row, head, query and prompt.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.masking_utils import sdpa_mask

import trimtab as tt
from reference import naive
from tiny import CAUSAL, FAMILIES, SEQ2SEQ, VISION, inputs, output, tiny
from trimtab.methods import LlamaAdapter, LlamaAdapterV2
from trimtab.sites import Sites

INTERFACE = [family for family in FAMILIES if family != "bloom"]
TEXT = [family for family in INTERFACE if family not in (*VISION, "whisper")]
K, D = 3, 8
"""Prompts a layer; head width of all tiny models."""
ATTENTIONS = {
    "gpt2": "transformer.h.{}.attn",
    "gpt_neox": "gpt_neox.layers.{}.attention",
    "opt": "model.decoder.layers.{}.self_attn",
    "bert": "bert.encoder.layer.{}.attention.self",
    "roberta": "roberta.encoder.layer.{}.attention.self",
    "electra": "electra.encoder.layer.{}.attention.self",
    "distilbert": "distilbert.transformer.layer.{}.attention",
    "modernbert": "model.layers.{}.attn",
    "t5": "decoder.block.{}.layer.0.SelfAttention",
    "bart": "model.decoder.layers.{}.self_attn",
    "whisper": "model.decoder.layers.{}.self_attn",
    "vit": "vit.layers.{}.attention",
    "dinov2": "dinov2.encoder.layer.{}.attention",
    "clip": "vision_model.encoder.layers.{}.self_attn",
    "clip_vision_model": "encoder.layers.{}.self_attn",
}
"""Where a family's (decoder's) self-attention of layer {} is; the rest are `model.layers.{}.self_attn`."""

# ---------------------------------------------------------------------------------------------------- the reference


def _projections(module: Any) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """W_k and W_v [kv heads, D, width] with their biases [kv heads, D], cut out of the attention's own weights."""
    kind = type(module).__name__
    if kind == "GPT2Attention":  # [width, 3 · width]: queries, keys, values one behind the other
        width = module.c_attn.weight.shape[0]
        whole = [(module.c_attn.weight[:, at : at + width].T, module.c_attn.bias[at : at + width]) for at in (32, 64)]
    elif kind == "GPTNeoXAttention":  # rows: head after head, in each its queries, keys, values
        module = module.query_key_value
        rows = [[24 * head + D * part + i for head in range(4) for i in range(D)] for part in (1, 2)]
        whole = [(module.weight[row], module.bias[row]) for row in rows]
    elif kind == "Phi3Attention":  # rows: 4 heads of queries, 2 of keys, 2 of values
        whole = [(module.qkv_proj.weight[32:48], None), (module.qkv_proj.weight[48:64], None)]
    elif kind == "ModernBertAttention":
        whole = [(module.Wqkv.weight[32:64], None), (module.Wqkv.weight[64:96], None)]
    else:
        pairs = (("k_proj", "v_proj"), ("key", "value"), ("k_lin", "v_lin"), ("k", "v"))
        names = next(pair for pair in pairs if hasattr(module, pair[0]))
        whole = [(getattr(module, name).weight, getattr(module, name).bias) for name in names]
    return [
        (weight.unflatten(0, (-1, D)), None if bias is None else bias.unflatten(0, (-1, D))) for weight, bias in whole
    ]


def _keys_values(module: Any, prompts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """K_p and V_p [kv heads, K, D], not rotated; keys pass a norm where the family has one."""
    (w_k, b_k), (w_v, b_v) = _projections(module)
    keys, values = (
        torch.stack(
            [torch.stack([w[g] @ prompt + (0 if b is None else b[g]) for prompt in prompts]) for g in range(len(w))]
        )
        for w, b in ((w_k, b_k), (w_v, b_v))
    )
    if type(module).__name__ in ("Qwen3Attention", "Gemma3Attention"):
        weight, epsilon = module.k_norm.weight, module.config.rms_norm_eps
        gain = 1 + weight if type(module).__name__ == "Gemma3Attention" else weight
        keys = torch.stack([torch.stack([k / torch.sqrt((k * k).mean() + epsilon) * gain for k in g]) for g in keys])
    return keys, values


def _scale(module: Any) -> float:
    """1 / √d_h; 1 where the family's queries are scaled already (opt, whisper) or never (t5)."""
    kind = type(module).__name__
    return 1.0 if kind in ("OPTAttention", "WhisperAttention", "T5Attention") else 1 / math.sqrt(D)


def _softmax(scores: list[torch.Tensor]) -> list[torch.Tensor]:
    highest = max(score.item() for score in scores)
    powers = [torch.exp(score - highest) for score in scores]
    total = sum(powers)
    return [power / total for power in powers]


PROMPTS: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}
"""id(attention module) -> prompts [K, width], what each head's context is multiplied with [heads] (None: joint)"""


def _loops(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float = 1.0,
    softcap: float | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query [B, H, n, D], key and value [B, G, m, D], mask bool [B, 1, n, m] or None -> [B, n, H, D]"""
    if id(module) not in PROMPTS:
        return naive(module, query, key, value, attention_mask, scaling, softcap, position_bias)
    prompts, factors = PROMPTS[id(module)]
    k_p, v_p = _keys_values(module, prompts)
    batch, heads, length, _ = query.shape
    rows = []
    for b, h, i in itertools.product(range(batch), range(heads), range(length)):
        q, g = query[b, h, i], h // (heads // key.shape[1])
        seen = [j for j in range(key.shape[2]) if attention_mask is None or attention_mask[b, 0, i, j]]
        if not seen:  # a padded query, which nobody reads
            rows.append(torch.zeros_like(q))
            continue
        scores = [q @ key[b, g, j] * scaling for j in seen]
        if softcap is not None:
            scores = [torch.tanh(score / softcap) * softcap for score in scores]
        if position_bias is not None:
            scores = [score + position_bias[0, h, i, j] for score, j in zip(scores, seen, strict=True)]
        prompt_scores = [q @ k_p[g, p] * _scale(module) for p in range(K)]
        if factors is None:
            weights = _softmax(prompt_scores + scores)
            own, text = weights[:K], weights[K:]
        else:
            own, text = [factors[h] * weight for weight in _softmax(prompt_scores)], _softmax(scores)
        found = [weight * value[b, g, j] for weight, j in zip(text, seen, strict=True)]
        rows.append(sum(found) + sum(weight * v_p[g, p] for p, weight in enumerate(own)))
    return torch.stack(rows).view(batch, heads, length, D).transpose(1, 2), None


def _mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


AttentionInterface.register("loops", _loops)
AttentionMaskInterface.register("loops", _mask)


@pytest.fixture(autouse=True)
def _clean() -> Any:
    yield
    PROMPTS.clear()


def _attention(model: Any, family: str, layer: int) -> Any:
    return model.get_submodule(ATTENTIONS.get(family, "model.layers.{}.self_attn").format(layer))


def _reference(family: str, adapter: Any, base: Any = None, member: str = "") -> Any:
    """A plain base on the loops, which know the adapter's prompts and tanh(g_h) (or g, where the method says so)."""
    base = tiny(family, torch.float64) if base is None else base
    base.set_attn_implementation("loops")
    parts = dict(adapter.named_parameters())
    method = next(m for m in getattr(adapter.method, "methods", [adapter.method]) if "llama-adapter" in m.name)
    stack = "decoder_" if family in SEQ2SEQ else ""
    for layer in range(3):
        key = f"{stack}layer{layer}_self.{member}"
        if f"{key}prompts" not in parts:
            continue
        factors = None
        if f"{key}gate" in parts:
            gate = parts[f"{key}gate"]
            factors = (gate.tanh() if getattr(method, "tanh", True) else gate).expand(4)
        PROMPTS[id(_attention(base, family, layer))] = (parts[f"{key}prompts"], factors)
    return base


# -------------------------------------------------------------------------------------------------------- the tests


def _attached(family: str, method: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    """Random prompts, and gates, scales and everything else well away from zero."""
    torch.manual_seed(6)
    model = tiny(family, dtype)
    adapter = tt.attach(model, method)
    for name, parameter in adapter.named_parameters():
        if not name.startswith("head_"):
            parameter.data.add_((1.0 if name.endswith("gate") else 0.3) * torch.randn_like(parameter))
    return model, adapter


def _rows(family: str, dtype: torch.dtype = torch.float64) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """Two rows, the second one token shorter and padded on the right, and where the real positions of a decoder are.

    A text is longer than the window where the family has one.
    """
    length = 7 if family in ("mistral", "gemma2", "gemma3_text") else 4
    batch = inputs(family, batch=2, length=length, dtype=dtype)
    if "decoder_input_ids" in batch:
        batch["decoder_input_ids"] = batch["decoder_input_ids"][:, :4]
    if family not in TEXT:
        return batch, None
    batch["attention_mask"][1, length - 1] = 0
    batch["input_ids"] = batch["input_ids"] * batch["attention_mask"]
    return batch, batch["attention_mask"].bool() if family in CAUSAL else None


def _real(out: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    return out if real is None else out[real]


def _equal(family: str, model: Any, adapter: Any, reference: Any) -> None:
    """Outputs and the gradients of prompts and gates, to float64 rounding where the family itself computes in float64.

    gemma2's own eager attention takes its softmax in float32, and so is the norm of the keys in qwen3 and gemma3.
    """
    batch, real = _rows(family)
    found, expected = _real(output(model, batch), real), _real(output(reference, batch), real)
    loose = family in ("gemma2", "qwen3", "gemma3_text")
    assert torch.allclose(found, expected, rtol=0, atol=5e-6 if loose else 1e-9)
    base = _real(output(tiny(family, torch.float64), batch), real)
    assert (expected - base).abs().max() > 1e-3, "prompts must matter for the comparison to mean anything"
    trained = [p for name, p in adapter.named_parameters() if name.endswith(("prompts", "gate"))]
    wanted = torch.autograd.grad(expected.pow(2).mean(), trained)
    given = torch.autograd.grad(found.pow(2).mean(), trained)
    for a, b in zip(given, wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 if loose else 1e-9)


@pytest.mark.parametrize("family", INTERFACE)
def test_equals_loops_with_gates_open(family: str) -> None:
    model, adapter = _attached(family, f"llama-adapter[length={K}]")
    _equal(family, model, adapter, _reference(family, adapter))


@pytest.mark.parametrize(
    ("options", "family"),
    [
        *(("attention=joint", family) for family in ("llama", "gpt2", "bert", "t5", "mistral", "vit")),
        ("gates=layer", "llama"),
        ("tanh=false", "t5"),
        ("layers=1:", "bert"),
    ],
)
def test_equals_loops_in_other_forms(options: str, family: str) -> None:
    """Joint attention is one softmax over [prompts ; text]; prompts are seen from outside of a sliding window, too."""
    model, adapter = _attached(family, f"llama-adapter[length={K},{options}]")
    _equal(family, model, adapter, _reference(family, adapter))
    assert len(PROMPTS) == (2 if options == "layers=1:" else 3)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
def test_prompts_pass_a_lora_on_keys_and_values(family: str) -> None:
    """In a union whatever acts on the key and value projections acts on the prompts: W + s B A for both."""
    model, adapter = _attached(family, f"lora[r=2,alpha=6,targets=k,v]|llama-adapter[length={K}]")
    parts, base = dict(adapter.named_parameters()), tiny(family, torch.float64)
    with torch.no_grad():
        for layer in range(3):
            for at, (weight, _) in enumerate(_projections(_attention(base, family, layer))):
                key = f"layer{layer}_{'kv'[at]}"
                delta = 3 * parts[f"{key}.B"] @ parts[f"{key}.A"]
                _write(base, family, layer, at, weight.flatten(0, 1) + delta)
    _equal(family, model, adapter, _reference(family, adapter, base))
    prompts, _ = PROMPTS[id(_attention(base, family, 1))]
    plain = _keys_values(_attention(tiny(family, torch.float64), family, 1), prompts)
    assert (plain[0] - _keys_values(_attention(base, family, 1), prompts)[0]).abs().max() > 1e-2


def _write(base: Any, family: str, layer: int, at: int, weight: torch.Tensor) -> None:
    """Put a key (0) or value (1) weight [32 or 16, 32] into its place."""
    module = _attention(base, family, layer)
    if family == "gpt2":
        module.c_attn.weight[:, 32 + 32 * at : 64 + 32 * at] = weight.T
    elif family == "gpt_neox":
        module.query_key_value.weight.view(4, 3, D, 32)[:, 1 + at] = weight.view(4, D, 32)
    else:
        (module.k_proj, module.v_proj)[at].weight.copy_(weight)


LINEARS = {
    "llama": {
        **{role: f"model.layers.{{}}.self_attn.{role}_proj" for role in "qkvo"},
        **{role: f"model.layers.{{}}.mlp.{role}_proj" for role in ("gate", "up", "down")},
    },
    "bert": {
        "q": "bert.encoder.layer.{}.attention.self.query",
        "k": "bert.encoder.layer.{}.attention.self.key",
        "v": "bert.encoder.layer.{}.attention.self.value",
        "o": "bert.encoder.layer.{}.attention.output.dense",
        "up": "bert.encoder.layer.{}.intermediate.dense",
        "down": "bert.encoder.layer.{}.output.dense",
    },
    "gpt2": {
        "o": "transformer.h.{}.attn.c_proj",
        "up": "transformer.h.{}.mlp.c_fc",
        "down": "transformer.h.{}.mlp.c_proj",
    },
    "qwen3": {},
}
LINEARS["qwen3"] = LINEARS["llama"]


@pytest.mark.parametrize("family", LINEARS)
def test_v2_equals_loops_over_rescaled_weights(family: str) -> None:
    """s ⊙ (W x + b_0 + b) on every projection, the prompts' keys and values included, under trained norms."""
    model, adapter = _attached(family, f"llama-adapter-v2[length={K}]")
    parts, base = dict(adapter.named_parameters()), tiny(family, torch.float64)
    used = {name for name in parts if name.endswith(("prompts", "gate")) or name.startswith("head_")}
    with torch.no_grad():
        for layer in range(3):
            for role, path in LINEARS[family].items():
                module, key = base.get_submodule(path.format(layer)), f"layer{layer}_{role}"
                scale, shift = parts[f"{key}.scale"], parts[f"{key}.shift"]
                used |= {f"{key}.scale", f"{key}.shift"}
                module.weight.mul_(scale if family == "gpt2" else scale[:, None])
                module.bias = nn.Parameter(scale * (shift if module.bias is None else module.bias + shift))
            if family == "gpt2":
                names = [f"layer{layer}_{role}" for role in "qkv"]
                scale, shift = (torch.cat([parts[f"{name}.{of}"] for name in names]) for of in ("scale", "shift"))
                used |= {f"{name}.{of}" for name in names for of in ("scale", "shift")}
                module = base.transformer.h[layer].attn.c_attn
                module.weight.mul_(scale)
                module.bias.copy_(scale * (module.bias + shift))
        for path, module in base.base_model.named_modules():
            if type(module).__name__ in ("LayerNorm", "LlamaRMSNorm", "Qwen3RMSNorm"):
                for name, weight in module.named_parameters():
                    key = f"norm_{path.replace('.', '_')}.copy.{name}"
                    weight.copy_(parts[key])
                    used.add(key)
    assert used == set(parts), "every trained tensor has its place in the reference"
    _equal(family, model, adapter, _reference(family, adapter, base))


@pytest.mark.parametrize("family", INTERFACE)
@pytest.mark.parametrize("previous", ["eager", "sdpa"])
def test_starts_as_the_base_bit_for_bit(family: str, previous: str) -> None:
    """With gates at zero neither the prompts nor the way through our function change a bit.

    The gates get a gradient at once, the prompts exactly none until the gates have moved.
    """
    if (family, previous) == ("gemma2", "sdpa"):
        pytest.skip("transformers has no such gemma2")
    model, (batch, real) = tiny(family), _rows(family, torch.float32)
    model.set_attn_implementation(previous)
    with torch.no_grad():
        base = _real(output(model, batch), real)
    adapter = tt.attach(model, f"llama-adapter[length={K}]")
    out = _real(output(model, batch), real)
    assert torch.equal(out, base)
    out.pow(2).mean().backward()
    for name, parameter in adapter.named_parameters():
        if name.endswith("prompts"):
            assert parameter.std() > 0.5 and not parameter.grad.any()
        if name.endswith("gate"):
            assert not parameter.any() and parameter.grad.all()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit"])
def test_two_softmaxes(family: str) -> None:
    """What the text attends to in the text is what it was, to the bit, however loud the prompts are.

    In the first layer, whose input prompts do not change, the attention's context less the base's is, head by head,
    tanh(g_h) times a weighted mean of the prompts' values.
    """
    batch = {key: value[:1] for key, value in _rows(family)[0].items()}  # no padding
    model = tiny(family, torch.float64)
    model.set_attn_implementation("eager")
    attention, contexts = _attention(model, family, 0), []
    last = {"gpt2": "c_proj", "bert": None}.get(family, "o_proj")
    end = getattr(attention, last) if last else model.bert.encoder.layer[0].attention.output.dense
    end.register_forward_pre_hook(lambda module, args: contexts.append(args[0].detach()[0]))
    base = model(**batch, output_attentions=True).attentions[0]
    adapter = tt.attach(model, f"llama-adapter[length={K}]")
    parts = dict(adapter.named_parameters())
    for loudness in (1, 30):
        prompts, gate = parts["layer0_self.prompts"].data, parts["layer0_self.gate"].data
        prompts.normal_().mul_(loudness)
        gate.uniform_(0.5, 1.5)
        assert torch.equal(model(**batch, output_attentions=True).attentions[0], base)
        added = (contexts[-1] - contexts[0]).unflatten(-1, (4, D))  # [n, heads, D]
        values = _keys_values(attention, prompts)[1].detach()
        for h in range(4):
            means, own = added[:, h] / gate[h].tanh(), values[h // (4 // len(values))]  # [n, D], [K, D]
            weights = torch.linalg.lstsq(own.T, means.T).solution  # [K, n]
            assert torch.allclose(own.T @ weights, means.T, atol=1e-9 * loudness)
            assert torch.allclose(weights.sum(0), torch.ones_like(weights[0]), atol=1e-9) and weights.min() > -1e-9


def test_layers_by_default_are_the_papers() -> None:
    """30 of LLaMA-7B's 32 layers, without a weight in memory; 1.2 million parameters."""
    with torch.device("meta"):
        sites = Sites(LlamaForCausalLM(LlamaConfig()))
    assert [site.layer for site in LlamaAdapter().chosen(sites)] == list(range(2, 32))
    assert LlamaAdapter().parameter_count(sites) == 30 * 10 * 4096 + 30 * 32 == 1_229_760
    linears = 4 * 4096 + 2 * 11008 + 4096
    assert LlamaAdapterV2().parameter_count(sites) == 1_229_760 + 32 * 2 * linears + 65 * 4096
    assert [site.layer for site in LlamaAdapter().chosen(Sites(tiny("llama")))] == [0, 1, 2]


def test_layers_are_counted_in_the_decoder_alone() -> None:
    shape = {"vocab_size": 16, "d_model": 8, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "max_position_embeddings": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = BartForConditionalGeneration(BartConfig(**shape, **heads, encoder_layers=1, decoder_layers=4))
    sites = Sites(model)
    assert [site.key for site in LlamaAdapter(layers="-2:").chosen(sites)] == [
        "decoder_layer2_self",
        "decoder_layer3_self",
    ]
    with pytest.raises(tt.UserError, match="layers 0 to 3"):
        LlamaAdapter(layers="4").chosen(sites)


@pytest.mark.parametrize("layers", [1, 3])
def test_equals_peft(layers: int) -> None:
    """peft's adaption prompt has one gate a layer, without tanh; with its tensors ours gives its outputs."""
    peft = pytest.importorskip("peft")
    batch, real = _rows("llama", torch.float32)
    config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=K, adapter_layers=layers)
    other = peft.get_peft_model(tiny("llama"), config)
    model = tiny("llama")
    adapter = tt.attach(model, f"llama-adapter[length={K},gates=layer,tanh=false,layers=-{layers}:]")
    ours = dict(adapter.named_parameters())
    theirs = dict(other.named_parameters())
    with torch.no_grad():
        base = output(tiny("llama"), batch)
        for layer in range(3 - layers, 3):
            attention = f"base_model.model.model.layers.{layer}.self_attn"
            prompt, gate = theirs[f"{attention}.adaption_prompt"], theirs[f"{attention}.adaption_gate"]
            gate.fill_(0.4 + 0.3 * layer)
            ours[f"layer{layer}_self.prompts"].copy_(prompt[0])
            ours[f"layer{layer}_self.gate"].copy_(gate)
        expected = other(**batch).logits[real]
        found = model(**batch).logits[real]
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)
    assert (expected - base[real]).abs().max() > 1e-2

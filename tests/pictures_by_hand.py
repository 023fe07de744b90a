"""LLaMA-Adapter with a picture, row by row and layer by layer in float64, from the equations. Knows nothing of
trimtab's modules but the names of trained tensors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from reference import GATED
from tiny import tiny

SIZE = 8
VIT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}


def save_vit(folder: Path, *, seed: int = 0, **changes: int) -> str:
    """A tiny vision encoder of random weights in a folder, with an image processor that scales to 8 × 8 pixels."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    torch.manual_seed(seed)
    model = tf.ViTModel(
        tf.ViTConfig(**{**VIT, "image_size": SIZE, "patch_size": 4, **changes}), add_pooling_layer=False
    )
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    return str(folder)


def expected_logits(family: str, adapter: Any, encoder: str, ids: Tensor, picture: Tensor | None) -> Tensor:
    """The logits [1, n, V] of one row without padding."""
    base = tiny(family, torch.float64)
    base.set_attn_implementation("naive_reference")
    tensors = {name: tensor.detach() for name, tensor in adapter.state_dict().items()}
    seen = {key: value for key, value in tensors.items() if ".eye.net." in key}
    net = {key.partition(".eye.net.")[2]: value for key, value in seen.items()}
    entry = adapter.model.trimtab.entries[adapter.name]
    for site in entry.sites:
        prompts, gate = tensors[f"{site.key}.prompts"], tensors[f"{site.key}.gate"]
        if picture is not None and entry.parts[site.key].seen:
            prompts = prompts + _seen(net, encoder, picture, adapter.method)
        keys, values = _projected(family, base.get_submodule(site.path), prompts)
        GATED[id(base.get_submodule(site.path))] = (keys, values, gate)
    with torch.no_grad():
        return base(input_ids=ids[None]).logits


def _projected(family: str, module: Any, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """W_k P and W_v P as [kv_heads, P, head_dim]."""
    if family == "gpt2":
        both = prompts @ module.c_attn.weight + module.c_attn.bias
        width = prompts.shape[1]
        keys, values, heads = both[:, width : 2 * width], both[:, 2 * width :], 4
    else:
        keys, values, heads = prompts @ module.k_proj.weight.T, prompts @ module.v_proj.weight.T, 2
    shaped = [torch.stack(projected.chunk(heads, dim=1)) for projected in (keys, values)]
    return shaped[0], shaped[1]


def _seen(net: dict[str, Tensor], encoder: str, picture: Tensor, method: Any) -> Tensor:
    """I [1 or length, width] of one picture [3, 8, 8]."""
    vit = tf.ViTModel.from_pretrained(encoder, add_pooling_layer=False).eval()
    with torch.no_grad():
        found = vit(picture[None].float(), output_hidden_states=True)
    if method.look == "global":
        layers = [found.hidden_states[1], found.hidden_states[2], found.last_hidden_state]
        features = torch.cat([_norm(state[0, 0]) for state in layers])[None].double()
        inside = _linear(net, "first", _norm(features) * net["norm.weight"] + net["norm.bias"])
        return _last(net, _gelu(inside))
    tokens = _linear(net, "tokens", _norm(found.last_hidden_state[0]).double())
    states = torch.cat([net["queries"], tokens])
    for number in range(method.blocks):
        states = _block({key.removeprefix(f"blocks.{number}."): value for key, value in net.items()}, states)
    return _last(net, states[: method.length])


def _block(net: dict[str, Tensor], x: Tensor) -> Tensor:
    """One pre-norm block over [n, inner], a head and a query at a time."""
    width, heads = x.shape[1], 4
    each = width // heads
    qkv = _linear(net, "qkv", _norm(x) * net["before.weight"] + net["before.bias"])
    q, k, v = qkv[:, :width], qkv[:, width : 2 * width], qkv[:, 2 * width :]
    rows = []
    for at in range(x.shape[0]):
        parts = []
        for head in range(heads):
            own = slice(head * each, (head + 1) * each)
            scores = torch.stack([(q[at, own] * k[other, own]).sum() for other in range(x.shape[0])])
            shares = torch.softmax(scores / math.sqrt(each), dim=0)
            parts.append(sum(share * v[other, own] for other, share in enumerate(shares)))
        rows.append(torch.cat(parts))
    x = x + _linear(net, "out", torch.stack(rows))
    inside = _linear(net, "up", _norm(x) * net["between.weight"] + net["between.bias"])
    return x + _linear(net, "down", _gelu(inside))


def _last(net: dict[str, Tensor], inside: Tensor) -> Tensor:
    return _norm(_linear(net, "second", inside)) * net["last.weight"] + net["last.bias"]


def _linear(net: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ net[f"{name}.weight"].T + net[f"{name}.bias"]


def _norm(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()


def _gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

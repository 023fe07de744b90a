"""LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention. Zhang et al. 2024,
arXiv:2303.16199.

    context = softmax(q K_textᵀ · s) V_text + tanh(g_h) · softmax(q K_pᵀ · s) V_p
    K_p = W_k P,  V_p = W_v P,     P [length, width] and g_h (one a head) trained in each of the top layers

Two softmaxes: what the text attends to in the text does not depend on the prompts. The prompts pass the layer's own
key and value projections, not its input norm, and are not rotated (a norm on the keys, as in Qwen3, they do pass).
Gates start at zero, so that the start is exactly the base model; prompts start as standard normal noise. In encoders
and vision models the same without a causal mask. Trained parameters: layers · (length · width + heads).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from trimtab.arch import select_layers
from trimtab.contract import Context, Parts
from trimtab.errors import UserError
from trimtab.sites import KVSite, LinearSite, Sites

LEFT_OUT = 16
"""One layer in so many, the lowest, gets no prompts by default: 2 of LLaMA-7B's 32, as in the paper."""


@dataclass(frozen=True)
class LlamaAdapter:
    """Prompts in the top layers' attention behind gates that start at zero."""

    length: int = 10
    """Number of prompts a layer."""
    layers: str | None = None
    """Layers to adapt, e.g. -10: or 0,2,5; by default all but the lowest sixteenth."""
    gates: Literal["head", "layer"] = "head"
    """One gate a head (the paper's) or one a layer (peft's adaption prompt)."""
    tanh: bool = True
    """Whether gates pass tanh (the paper's) or not (peft's adaption prompt)."""
    attention: Literal["gated", "joint"] = "gated"
    """gated, or joint: no gates, prompts and text in one softmax (the paper's ablation, for comparison)."""

    name: ClassVar[str] = "llama-adapter"
    kinds: ClassVar[frozenset[str]] = frozenset({"kv"})
    lr: ClassVar[float] = 5e-3
    mergeable: ClassVar[bool] = False
    formula: ClassVar[str] = "layers·(length·width + heads)"
    paper: ClassVar[str] = "Zhang et al. 2024, arXiv:2303.16199"

    def __post_init__(self) -> None:
        if self.length < 1:
            raise UserError(f"llama-adapter: length={self.length} must be at least 1")
        if self.attention == "joint" and (self.gates != "head" or not self.tanh):
            raise UserError("llama-adapter: attention=joint has no gates; leave out gates= and tanh=")

    def build(self, sites: Sites, context: Context) -> Parts:
        """Prompts and gates a chosen layer."""
        part = GatedPrompts if self.attention == "gated" else JointPrompts
        return {site: part(site, self) for site in self.chosen(sites)}

    def parameter_count(self, sites: Sites) -> int:
        """layers · (length · width + heads)."""
        return sum(self.length * site.k.in_features + self.gate_count(site) for site in self.chosen(sites))

    def gate_count(self, site: KVSite) -> int:
        """Gates of one attention."""
        if self.attention == "joint":
            return 0
        return site.heads if self.gates == "head" else 1

    def chosen(self, sites: Sites) -> list[KVSite]:
        """The self-attentions of the chosen layers; in encoder-decoders those of the decoder.

        Raises UserError for layers out of range.
        """
        stack = list(sites.layer_modules)[-1]
        count = len(sites.layer_modules[stack])
        layers = range(count // LEFT_OUT, count) if self.layers is None else select_layers(self.layers, count)
        return [site for site in sites.kv if site.stack == stack and not site.cross and site.layer in layers]


class GatedPrompts(nn.Module):
    """tanh(g_h) · softmax(q K_pᵀ · s) V_p"""

    def __init__(self, site: KVSite, method: LlamaAdapter):
        super().__init__()
        self.prompts = nn.Parameter(torch.randn(method.length, site.k.in_features))
        self.gate = nn.Parameter(torch.zeros(method.gate_count(site)))
        self.site = (site,)  # in a tuple: the base's projections are no part of the adapter
        self.tanh = method.tanh

    def context(self, query: torch.Tensor, scaling: float | None) -> torch.Tensor:
        """query [batch, heads, n, head width] -> [batch, n, heads, head width]"""
        keys, values = projected(self.site[0], self.prompts)
        precision = torch.promote_types(query.dtype, torch.float32)
        own = query.to(precision).unflatten(1, (keys.shape[0], -1))  # [batch, kv heads, heads of each, n, head width]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        weights = torch.softmax(torch.einsum("bkgnd,kpd->bkgnp", own * scale, keys.to(precision)), dim=-1)
        seen = torch.einsum("bkgnp,kpd->bnkgd", weights, values.to(precision)).flatten(2, 3)
        gate = self.gate.tanh() if self.tanh else self.gate
        return (gate[:, None] * seen).to(query.dtype)


class JointPrompts(nn.Module):
    """K_p and V_p in front of the text's keys and values."""

    def __init__(self, site: KVSite, method: LlamaAdapter):
        super().__init__()
        self.prompts = nn.Parameter(torch.randn(method.length, site.k.in_features))
        self.site = (site,)

    def prefix(self) -> tuple[torch.Tensor, torch.Tensor]:
        """keys, values [kv heads, length, head width]"""
        return projected(self.site[0], self.prompts)


def projected(site: KVSite, prompts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer's keys and values [kv heads, length, head width] of prompts [length, width].

    The modules themselves are called: whatever else acts on them (bias and scale of v2, LoRA) acts on prompts, too.
    """
    weight = site.k.module.weight
    inputs = prompts.to(weight.dtype) if weight.is_floating_point() else prompts  # a quantised module takes any
    key_output = site.k.module(inputs)
    value_output = key_output if site.v.module is site.k.module else site.v.module(inputs)
    keys, values = (_share(one, out) for one, out in ((site.k, key_output), (site.v, value_output)))
    keys, values = (out.unflatten(1, (site.kv_heads, -1)) for out in (keys, values))  # [length, kv heads, head width]
    norm = getattr(site.module, "k_norm", None)
    return (keys if norm is None else norm(keys)).transpose(0, 1), values.transpose(0, 1)


def _share(site: LinearSite, output: torch.Tensor) -> torch.Tensor:
    return output if site.span is None else site.span.take(output)

"""LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention. Zhang et al. 2024,
arXiv:2303.16199.

    context = softmax(q K_textᵀ · s) V_text + tanh(g_h) · softmax(q K_pᵀ · s) V_p
    K_p = W_k P,  V_p = W_v P,     P [length, width] and g_h (one a head) trained in each of the top layers

Two softmaxes: what the text attends to in the text does not depend on the prompts. The prompts pass the layer's own
key and value projections, not its input norm, and are not rotated (a norm on the keys, as in Qwen3, they do pass).
Gates start at zero, so that the start is exactly the base model; prompts start as standard normal noise. In encoders
and vision models the same without a causal mask. Trained parameters: layers · (length · width + heads).

With a frozen vision encoder (image=…) what is made of a row's picture is added to the prompts, so that these are the
row's own: P' = P + I (eye.py). The picture comes as the argument `images` of the model's calls and of `generate`. Gates
of zero leave the base's answers as they are, and a row without a picture has I = 0. Trained besides: what makes I.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from trimtab.arch import select_layers
from trimtab.contract import Context, Parts
from trimtab.errors import UserError
from trimtab.methods.eye import Eye, Global, Queries, check_looking, sight_of, whole_path
from trimtab.sites import KVSite, LinearSite, Site, Sites

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
    image: str | None = None
    """A frozen vision encoder (a folder, hub id or pkg:NAME/path): what it sees is added to the prompts."""
    look: Literal["global", "queries"] = "global"
    """global (the encoder's global features, v1) or queries (learned ones that attend to its tokens, v2)."""
    scales: str | None = None
    """Layers of the encoder whose global features are read, e.g. 5,11; by default four, evenly spaced."""
    image_layers: str | None = None
    """Layers whose prompts get the picture, e.g. 0:8 (v2's early fusion); by default all that have prompts."""
    image_hidden: int = 128
    """Width of what is between the encoder's features and the prompts."""
    blocks: int = 2
    """Blocks of the query form."""

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
        check_looking(self)
        if self.image is not None and self.attention == "joint":
            raise UserError("llama-adapter: image= needs gates, and attention=joint has none")

    def build(self, sites: Sites, context: Context) -> Parts:
        """Prompts and gates a chosen layer; the lowest that gets the picture has what looks at it."""
        chosen, seeing = self.chosen(sites), self.seeing(sites)
        if self.attention == "joint":
            return {site: JointPrompts(site, self) for site in chosen}
        gated = {site: GatedPrompts(site, self) for site in chosen}
        if seeing:
            eye = Eye(self, seeing[0].k.in_features)
            for site in chosen:
                gated[site].look(eye, owner=site is seeing[0], sees=site in seeing)
        return dict[Site, nn.Module](gated.items())

    def parameter_count(self, sites: Sites) -> int:
        """layers · (length · width + heads), and with image= what makes I (eye.py)."""
        own = sum(self.length * site.k.in_features + self.gate_count(site) for site in self.chosen(sites))
        if not (seeing := self.seeing(sites)):
            return own
        width, inner = seeing[0].k.in_features, self.image_hidden
        features = sight_of(self).width
        if self.look == "queries":
            return own + Queries.count(features, inner, width, self.length, self.blocks)
        return own + Global.count(features, inner, width)

    def folded(self) -> LlamaAdapter:
        """The same; a vision encoder in a folder by its whole path."""
        return whole_path(self)

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

    def seeing(self, sites: Sites) -> list[KVSite]:
        """The chosen attentions whose prompts get the picture; none without image=.

        Raises UserError for layers out of range or without prompts, and for a model that is no causal language model.
        """
        if self.image is None:
            return []
        chosen = self.chosen(sites)
        if len(sites.layer_modules) != 1 or not all(site.causal for site in chosen):
            raise UserError("llama-adapter: image= shows pictures to causal language models, which this is not")
        if self.image_layers is None:
            return chosen
        wanted = select_layers(self.image_layers, len(next(iter(sites.layer_modules.values()))))
        found = [site for site in chosen if site.layer in wanted]
        if len(found) < len(set(wanted)):
            have = ", ".join(str(site.layer) for site in chosen)
            raise UserError(f"llama-adapter: image_layers={self.image_layers} has layers without prompts; with: {have}")
        return found


class GatedPrompts(nn.Module):
    """tanh(g_h) · softmax(q K_pᵀ · s) V_p"""

    def __init__(self, site: KVSite, method: LlamaAdapter):
        super().__init__()
        self.prompts = nn.Parameter(torch.randn(method.length, site.k.in_features))
        self.gate = nn.Parameter(torch.zeros(method.gate_count(site)))
        self.site = (site,)  # in a tuple: the base's projections are no part of the adapter
        self.tanh = method.tanh
        self.seen: tuple[Eye, ...] = ()
        self.whole, self.stage = False, "instruction"

    def look(self, eye: Eye, *, owner: bool, sees: bool) -> None:
        """Have prompts that depend on the row's picture; the owner has the eye's tensors among its own."""
        self.whole = True  # no token can be run for all rows at once: what it attends to is the row's own
        if owner:
            self.eye = eye
        self.seen = (eye,) if sees else ()  # in a tuple: its tensors are the owner's
        self.stage = "caption" if sees else "instruction"

    def context(self, query: torch.Tensor, scaling: float | None) -> torch.Tensor:
        """query [batch, heads, n, head width] -> [batch, n, heads, head width]"""
        keys, values = projected(self.site[0], self.shown())  # [kv heads, P, head width], of rows of their own
        row = "b" if keys.dim() == 4 else ""
        precision = torch.promote_types(query.dtype, torch.float32)
        own = query.to(precision).unflatten(1, (keys.shape[-3], -1))  # [batch, kv heads, heads of each, n, head width]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        weights = torch.softmax(torch.einsum(f"bkgnd,{row}kpd->bkgnp", own * scale, keys.to(precision)), dim=-1)
        seen = torch.einsum(f"bkgnp,{row}kpd->bnkgd", weights, values.to(precision)).flatten(2, 3)
        gate = self.gate.tanh() if self.tanh else self.gate
        return (gate[:, None] * seen).to(query.dtype)

    def shown(self) -> torch.Tensor:
        """The prompts [length, width], or with pictures in the batch those of each row [batch, length, width]."""
        pictures = [eye.current for eye in self.seen if eye.current is not None]
        return self.prompts + pictures[0] if pictures else self.prompts


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
    """The layer's keys and values [..., kv heads, length, head width] of prompts [..., length, width].

    The modules themselves are called: whatever else acts on them (bias and scale of v2, LoRA) acts on prompts, too.
    """
    weight = site.k.module.weight
    inputs = prompts.to(weight.dtype) if weight.is_floating_point() else prompts  # a quantised module takes any
    key_output = site.k.module(inputs)
    value_output = key_output if site.v.module is site.k.module else site.v.module(inputs)
    keys, values = (_share(one, out) for one, out in ((site.k, key_output), (site.v, value_output)))
    keys, values = (out.unflatten(-1, (site.kv_heads, -1)) for out in (keys, values))  # [..., length, kv heads, …]
    norm = getattr(site.module, "k_norm", None)
    return (keys if norm is None else norm(keys)).transpose(-3, -2), values.transpose(-3, -2)


def _share(site: LinearSite, output: torch.Tensor) -> torch.Tensor:
    return output if site.span is None else site.span.take(output)

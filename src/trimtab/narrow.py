"""Layers like the base's with widths divided by a factor, and their start from the base's weights. Knows
configurations, layer classes and projections; refuses to know methods.

A narrow layer is made by the base layer's own class from a configuration with smaller widths. Residual stream, heads
and the feed-forward's inside are narrower, the number of heads stays: masks, ALiBi and relative position biases, which
have a value for each head, fit as they are, and of rotary positions every so-many-th frequency.

Structured pruning keeps whole units of the base's weights, those of largest magnitude: W'[i, j] = W[rows_i, columns_j]
with one choice for the residual stream in all layers of a stack.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.copies import dropouts
from trimtab.errors import UserError
from trimtab.sites import KVSite, LinearSite, Module, StatesSite, layer_linears

WIDTHS = (
    "hidden_size",
    "d_model",
    "dim",
    "n_embd",
    "intermediate_size",
    "n_inner",
    "ffn_dim",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "hidden_dim",
    "d_ff",
    "d_kv",
    "head_dim",
    "query_pre_attn_scalar",
)
"""What configurations call the widths of residual stream, feed-forward and heads, and what follows from the last."""


def check_reduction(name: str, site: StatesSite, reduction: int) -> None:
    """Raises UserError, which names those that do, for a reduction that does not divide the stack's widths."""
    if reduction >= 1 and _divides(site, reduction):
        return
    fitting = [str(number) for number in range(1, site.width + 1) if _divides(site, number)]
    raise UserError(
        f"{name}: reduction={reduction} does not divide the model's width {site.width} and the width "
        f"{_head_dim(site)} of its heads; these do: {', '.join(fitting)}"
    )


def _divides(site: StatesSite, reduction: int) -> bool:
    head_dim, pairs = _head_dim(site), _pairs(site.body)
    if site.width % reduction or head_dim % reduction:
        return False
    narrow, kept = head_dim // reduction, max(1, pairs // reduction) if pairs else 0
    return 2 * kept == narrow if 2 * pairs == head_dim else 2 * kept <= narrow


def _head_dim(site: StatesSite) -> int:
    return site.attentions[0].head_dim


def _pairs(body: Module) -> int:
    """The number of rotary frequencies; 0 without rotary positions."""
    return next((found.shape[-1] for name, found in body.named_buffers() if name.endswith("inv_freq")), 0)


def narrow_config(config: Any, reduction: int) -> Any:
    """A copy of a model's configuration with its widths divided."""
    narrow = copy.deepcopy(config)
    sizes = {name: size for name in WIDTHS if isinstance(size := getattr(config, name, None), int | float) and size}
    for name, size in sizes.items():
        setattr(narrow, name, size // reduction if isinstance(size, int) else size / reduction)
    return narrow


def narrow_layer(site: StatesSite, at: int, config: Any) -> nn.Module:
    """A layer like the stack's at `at`, made from a (narrow) configuration: random, trained, without dropout."""
    base = site.layers[at]
    options: dict[str, Any] = {"layer_idx": at}
    asked = list(inspect.signature(type(base).__init__).parameters)[2:]  # behind self and config
    for name in asked:
        known = (getattr(module, name) for module in base.modules() if hasattr(module, name))
        options.setdefault(name, next(known, None))
    options = {name: value for name, value in options.items() if name in asked and value is not None}
    layer = type(base)(config, **options)
    for module, name, _ in dropouts(layer):
        setattr(module, name, 0.0)
    return layer


def put_at(layer: nn.Module, index: int) -> None:
    """Have a layer keep its keys and values in a cache's layer of this index."""
    module: Module
    for module in layer.modules():
        if getattr(module, "layer_idx", None) is not None:
            module.layer_idx = index


def narrow_rotation(factors: tuple[Tensor, Tensor], reduction: int) -> tuple[Tensor, Tensor]:
    """Rotary cosines and sines [..., 2 · pairs] of every so-many-th frequency [..., 2 · (pairs // reduction)]."""
    chosen = _rotated(factors[0].shape[-1] // 2, reduction, factors[0].device)
    return factors[0][..., chosen], factors[1][..., chosen]


def _rotated(pairs: int, reduction: int, device: Any = None) -> Tensor:
    """Which of 2 · pairs rotary dimensions a narrow head keeps: both halves of evenly spaced pairs."""
    kept = max(1, pairs // reduction)
    chosen = torch.arange(kept, device=device) * pairs // kept
    return torch.cat([chosen, chosen + pairs])


class Units:
    """Which units of one stack structured pruning keeps: the residual stream's, and each layer's own."""

    def __init__(self, site: StatesSite, layers: Sequence[int], reduction: int, encoder: Units | None):
        self.site, self.reduction, self.encoder = site, reduction, encoder
        self.stream = _largest(self._stream_weight(layers), site.width // reduction)

    def write(self, layer: nn.Module, at: int) -> None:
        """Start a narrow layer like the one at `at` from that one's weights. Raises UserError for quantised ones."""
        sources = self._linears(at)
        own = {site.key: site for site in layer_linears(self.site.structure, at, layer)}
        axes = self._axes(at, sources)
        for source in sources:
            rows, columns = axes[source.key]
            bias = source.bias()
            own[source.key].write(source.weight()[rows][:, columns], None if bias is None else bias[rows])
        heads = self._shared_heads(at, sources)
        for name, weight in _others(layer, own.values()):
            _copy(weight, self.site.layers[at].get_parameter(name), (self.stream, heads))

    def _linears(self, at: int) -> list[LinearSite]:
        return layer_linears(self.site.structure, at, self.site.layers[at])

    def _stream_weight(self, layers: Sequence[int]) -> Tensor:
        """Σ w² of all that reads or writes each of the residual stream's units [width]."""
        total = torch.zeros(self.site.width)
        for site in (site for at in layers for site in self._linears(at)):
            if site.role in ("o", "down"):
                total += _squares(site).sum(1)
            elif not (site.cross and site.role in "kv"):  # which read the encoder's
                total += _squares(site).sum(0)
        return total

    def _axes(self, at: int, sources: Sequence[LinearSite]) -> dict[str, tuple[Tensor, Tensor]]:
        """Each projection's kept rows and columns, by its key."""
        axes: dict[str, tuple[Tensor, Tensor]] = {}
        for attention in (found for found in self.site.attentions if found.layer == at):
            own = {site.role: site for site in sources if site.cross == attention.cross and site.role in "qkvo"}
            queries, values = self._heads(attention, own)
            reads = self.encoder.stream if attention.cross and self.encoder is not None else self.stream
            width = attention.head_dim
            axes[own["q"].key] = _rows(queries, attention.heads, width), self.stream
            axes[own["k"].key] = _rows(queries, attention.kv_heads, width), reads
            axes[own["v"].key] = _rows(values, attention.kv_heads, width), reads
            axes[own["o"].key] = self.stream, _rows(values, attention.heads, width)
        inside = self._inside(sources)
        axes |= {site.key: (inside, self.stream) for site in sources if site.role in ("up", "gate")}
        return axes | {site.key: (self.stream, inside) for site in sources if site.role == "down"}

    def _heads(self, attention: KVSite, own: Mapping[str, LinearSite]) -> tuple[Tensor, Tensor]:
        """The kept dimensions [kv_heads, narrow head_dim] of queries and keys, and of values."""
        width = attention.head_dim // self.reduction
        q, k, v, o = (_squares(own[role]) for role in "qkvo")
        shape = (attention.kv_heads, -1, attention.head_dim)
        matches = q.sum(1).view(shape).sum(1) * k.sum(1).view(shape).sum(1)
        carried = v.sum(1).view(shape).sum(1) * o.sum(0).view(shape).sum(1)
        pairs = _pairs(self.site.body)
        if not pairs:
            return _largest(matches, width), _largest(carried, width)
        rotated = _rotated(pairs, self.reduction)
        others = 2 * pairs + _largest(matches.sum(0)[2 * pairs :], width - len(rotated))
        return torch.cat([rotated, others]).expand(attention.kv_heads, -1), _largest(carried, width)

    def _shared_heads(self, at: int, sources: Sequence[LinearSite]) -> Tensor:
        """The kept dimensions [narrow head_dim] of the first head's queries, which norms of queries and keys share."""
        attention = next(found for found in self.site.attentions if found.layer == at and not found.cross)
        return self._heads(attention, {site.role: site for site in sources if not site.cross})[0][0]

    def _inside(self, sources: Sequence[LinearSite]) -> Tensor:
        """The kept units of the feed-forward's inside."""
        down = next(site for site in sources if site.role == "down")
        weight = _squares(down).sum(0)
        for site in sources:
            if site.role in ("up", "gate"):
                weight = weight * _squares(site).sum(1)
        return _largest(weight, down.in_features // self.reduction)


def narrow_count(site: StatesSite, at: int, reduction: int) -> int:
    """The number of parameters of a narrow layer like the stack's at `at`."""
    layer, linears = site.layers[at], layer_linears(site.structure, at, site.layers[at])
    total = 0
    for found in linears:
        outputs, inputs = found.out_features // reduction, found.in_features // reduction
        total += outputs * (inputs + (0 if found.bias() is None else 1))
    for _, weight in _others(layer, linears):
        narrowed = weight.dim() == 1 and weight.numel() in (site.width, _head_dim(site))
        total += weight.numel() // reduction if narrowed else weight.numel()
    return total


def _squares(site: LinearSite) -> Tensor:
    return site.weight().detach().float().cpu() ** 2


def _largest(weight: Tensor, count: int) -> Tensor:
    """The places of the `count` largest values along the last axis, in order."""
    return weight.topk(count, dim=-1).indices.sort(-1).values


def _rows(dimensions: Tensor, heads: int, width: int) -> Tensor:
    """Rows, of `heads` heads of a width, of the dimensions [groups, kept] that each group of heads keeps."""
    own = dimensions.repeat_interleave(heads // dimensions.shape[0], dim=0)
    return (torch.arange(heads)[:, None] * width + own).flatten()


def _others(layer: nn.Module, linears: Iterable[LinearSite]) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a layer that belong to none of its projections, by name."""
    known = {id(weight) for site in linears for weight in site.module.parameters()}
    return ((name, weight) for name, weight in layer.named_parameters() if id(weight) not in known)


@torch.no_grad()
def _copy(weight: nn.Parameter, source: Tensor, choices: Sequence[Tensor]) -> None:
    """Copy a weight, or the part of a vector [width or head_dim] that the choice for its length keeps."""
    if weight.shape != source.shape:
        source = next(source[choice] for choice in choices if len(choice) == len(weight))
    weight.copy_(source)

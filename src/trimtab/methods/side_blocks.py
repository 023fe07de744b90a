"""Narrow copies of a stack's layers that run beside it, each on what the base called its own layer with. Knows layers'
arguments; refuses to know what is fed to them and what becomes of their output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trimtab.attention import follow
from trimtab.errors import UserError
from trimtab.narrow import Units, narrow_config, narrow_layer, narrow_rotation, put_at
from trimtab.sites import Sites, StatesSite
from trimtab.states import Reading

Start = Literal["pruned", "random"]
STARTS = ("pruned", "random")


class SideBlocks(nn.Module):
    """Layers of width / reduction beside those of a stack that `layers` names."""

    def __init__(self, site: StatesSite, layers: Sequence[int], reduction: int, units: Units | None):
        """The layers start from the units that pruning keeps, or at random. Raises UserError for other attentions."""
        super().__init__()
        _check_attention(site.body.config)
        self.layers, self.reduction = tuple(layers), reduction
        self.config = narrow_config(site.body.config, reduction)
        self.blocks = nn.ModuleList(narrow_layer(site, at, self.config) for at in layers)
        for number, (block, at) in enumerate(zip(self.blocks, layers, strict=True)):
            put_at(block, len(site.layers) + number)
            if units is not None:
                units.write(block, at)
        self.base = (site.body.config,)  # in a tuple, as what belongs to the base is
        beside = [site.layers[at] for at in layers]
        paths = [path for path in (site.structure.attention, site.structure.cross) if path]
        self.attentions = [
            (block.get_submodule(path), base.get_submodule(path))
            for block, base in zip(self.blocks, beside, strict=True)
            for path in paths
        ]  # a list of tuples: they are no sub-modules

    def begin(self) -> None:
        """Call the blocks' attentions as the base's are called in the present forward. Raises UserError as above."""
        _check_attention(self.base[0])
        self.config._attn_implementation = self.base[0]._attn_implementation  # whose masks they are given
        for own, base in self.attentions:
            follow(own, base)

    def forward(self, number: int, hidden: Tensor, reading: Reading) -> Tensor:
        """[batch, length, width / reduction] twice: block `number`, called as the base's layer was"""
        call = reading.calls[self.layers[number]]
        given = {name: self._narrow(name, value, hidden.dtype, reading.memory) for name, value in call.items()}
        output = self.blocks[number](hidden, **given)
        return output[0] if isinstance(output, tuple) else output

    def _narrow(self, name: str, value: Any, precision: torch.dtype, memory: Tensor | None) -> Any:
        """An argument of the base's layer as the narrow one takes it."""
        if name == "position_embeddings" and value is not None:
            cosines, sines = (tensor.to(precision) for tensor in value)
            return narrow_rotation((cosines, sines), self.reduction)
        if name == "encoder_hidden_states" and value is not None:
            assert memory is not None
            return memory.to(precision)
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(precision).clamp(min=torch.finfo(precision).min) if floating else value  # a mask stays finite


def _check_attention(config: Any) -> None:
    """Raises UserError for attentions that take half precision or wide heads alone, which the blocks do not have."""
    name = config._attn_implementation or ""
    if "flash" in name or "flex" in name:
        raise UserError(
            f"layers beside the base are narrow and in float32, and {name} does not take them; "
            "load the model with sdpa or eager"
        )


def pruned_units(sites: Sites, chosen: dict[StatesSite, list[int]], reduction: int) -> dict[StatesSite, Units]:
    """What structured pruning keeps of each stack's chosen layers. Raises UserError for quantised weights."""
    units: dict[str, Units] = {}
    for site in sites.states:
        encoder = units.get("encoder") if site.encoder is not None else None
        units[site.stack] = Units(site, chosen[site], reduction, encoder)
    return {site: units[site.stack] for site in sites.states}

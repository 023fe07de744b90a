"""What prefix tuning and P-tuning v2 are made of: keys and values that are trained, and the network that makes them.
Knows attentions; refuses to know which of them a method takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from trimtab.contract import Context
from trimtab.errors import UserError
from trimtab.methods.starts import NOISE, fitted, sampled, start_at
from trimtab.sites import KVSite, Site, Sites

KeysValues = tuple[torch.Tensor, torch.Tensor]
"""keys, values [kv_heads, P, head_dim]"""


def check_prefix(name: str, length: int, dropout: float, hidden: int) -> None:
    """Raises UserError for a length or a network's width below 1 and for a dropout outside [0, 1)."""
    if length < 1:
        raise UserError(f"{name}: length={length} must be at least 1")
    if hidden < 1:
        raise UserError(f"{name}: hidden={hidden} must be at least 1")
    if not 0 <= dropout < 1:
        raise UserError(f"{name}: dropout={dropout} must be in [0, 1)")


def real_start(name: str, sites: Sites, context: Context, length: int, text: str | None) -> Mapping[KVSite, KeysValues]:
    """What the frozen base computes for a text, or without one for sampled tokens; nothing where it reads no text.

    Raises UserError for a text that such a model is to start from.
    """
    embedding = next((site.embedding for site in sites.embeds if site.embedding is not None), None)
    if embedding is None and text is not None:
        raise UserError(f"{name}: this model reads no text, so its prefix cannot start from one")
    if embedding is None:
        return {}
    if text is None:
        ids = sampled(embedding, length)
    else:
        ids = fitted(context.token_ids(text, f"{name}[text=…]"), length)
    return {site: (keys.float(), values.float()) for site, (keys, values) in context.record(ids).items()}


def random_start(site: KVSite, length: int) -> KeysValues:
    """Noise."""
    shape = (site.kv_heads, length, site.head_dim)
    return NOISE * torch.randn(shape), NOISE * torch.randn(shape)


def network_size(group: Sequence[KVSite], length: int, hidden: int) -> int:
    """Parameters of a Generator: E, W_1, b_1, W_2, b_2."""
    width = group[0].k.in_features
    return length * width + hidden * (width + 1) + outputs(group) * (hidden + 1)


def outputs(group: Sequence[KVSite]) -> int:
    """Numbers that a position's keys and values have, over all attentions of a set."""
    return sum(2 * site.kv_heads * site.head_dim for site in group)


class StoredPrefix(nn.Module):
    """Keys and values that are trained themselves; also the inference form of those that a network makes."""

    def __init__(self, start: KeysValues, dropout: float, shift: int, relative: bool = False):
        super().__init__()
        self.keys, self.values = (nn.Parameter(tensor.detach().clone()) for tensor in start)
        self.dropout, self.shift, self.draws = dropout, shift, dropout > 0
        self.relative = relative

    def prefix(self) -> KeysValues:
        """keys, values [kv_heads, P, head_dim]"""
        return _dropped((self.keys, self.values), self.dropout, self.training)


class Generator(nn.Module):
    """[K_1, V_1, …] = S + W_2 tanh(W_1 E + b_1) + b_2 for a set of attentions; S, where they start, is not trained."""

    start: torch.Tensor

    def __init__(
        self,
        group: Sequence[KVSite],
        length: int,
        hidden: int,
        dropout: float,
        shift: bool = True,
        relative: bool = False,
    ):
        super().__init__()
        width = group[0].k.in_features
        self.tokens = nn.Parameter(torch.randn(length, width))
        self.first, self.last = nn.Linear(width, hidden), nn.Linear(hidden, outputs(group))
        self.register_buffer("start", torch.zeros(length, outputs(group)))
        self.shapes = [(site.kv_heads, site.head_dim) for site in group]
        self.dropout, self.shift, self.relative = dropout, length if shift else 0, relative
        self.current: list[KeysValues] = []
        """What the present forward uses."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "current": []}  # a copy of the model makes its own

    def begin(self, start: Sequence[KeysValues]) -> None:
        """Start there: W_2 and b_2 are 0."""
        wanted = torch.cat([tensor.transpose(0, 1).flatten(1).cpu() for pair in start for tensor in pair], dim=1)
        start_at(self.start, self.last, wanted)

    def prepare(self) -> None:
        """Make the keys and values of the present forward."""
        self.current = self.compute()

    def compute(self) -> list[KeysValues]:
        """Of each attention keys and values [kv_heads, P, head_dim]."""
        flat = self.start + self.last(torch.tanh(self.first(self.tokens)))
        pieces = iter(flat.split([heads * width for heads, width in self.shapes for _ in range(2)], dim=1))
        return [(_headed(next(pieces), heads), _headed(next(pieces), heads)) for heads, _ in self.shapes]

    def at(self, index: int) -> KeysValues:
        """keys, values [kv_heads, P, head_dim] of one attention in the present forward.

        Dropout is drawn here, inside the layer: a checkpointed layer that is run again restores the random state and
        sees the same draw, even where another forward has come in between.
        """
        return _dropped(self.current[index], self.dropout, self.training)

    @torch.no_grad()
    def stored(self, index: int) -> StoredPrefix:
        """The inference form of one attention; the first of a set moves the text."""
        return StoredPrefix(self.compute()[index], self.dropout, 0 if index else self.shift, self.relative)


def _dropped(pair: KeysValues, dropout: float, training: bool) -> KeysValues:
    keys, values = pair
    return F.dropout(keys, dropout, training), F.dropout(values, dropout, training)


def _headed(flat: torch.Tensor, heads: int) -> torch.Tensor:
    """[P, heads · head_dim] -> [heads, P, head_dim]"""
    return flat.unflatten(1, (heads, -1)).transpose(0, 1)


class Leader(nn.Module):
    """The part at the first attention of a set: it owns the network."""

    def __init__(self, generator: Generator):
        super().__init__()
        self.generator, self.shift, self.draws = generator, generator.shift, generator.dropout > 0
        self.relative = generator.relative

    def prepare(self) -> None:
        """Run the network, once a forward."""
        self.generator.prepare()

    def prefix(self) -> KeysValues:
        """keys, values [kv_heads, P, head_dim]"""
        return self.generator.at(0)

    def fold(self) -> StoredPrefix:
        """The keys and values themselves; the network goes."""
        return self.generator.stored(0)


class Follower(nn.Module):
    """The part at another attention of a set."""

    def __init__(self, generator: Generator, index: int):
        super().__init__()
        self.generator = (generator,)  # in a tuple: its tensors are the leader's
        self.index, self.relative = index, generator.relative

    def prefix(self) -> KeysValues:
        """keys, values [kv_heads, P, head_dim]"""
        return self.generator[0].at(self.index)

    def fold(self) -> StoredPrefix:
        """The keys and values themselves."""
        return self.generator[0].stored(self.index)


def stored_parts(
    group: Sequence[KVSite],
    start: Sequence[KeysValues],
    dropout: float,
    shift: bool = True,
    relative: bool = False,
) -> dict[Site, nn.Module]:
    """Keys and values of a set that are trained themselves; the first one moves the text, unless `shift` is false."""
    return {
        site: StoredPrefix(pair, dropout, pair[0].shape[1] if shift and site is group[0] else 0, relative)
        for site, pair in zip(group, start, strict=True)
    }


def generated_parts(
    group: Sequence[KVSite],
    start: Sequence[KeysValues],
    dropout: float,
    hidden: int,
    shift: bool = True,
    relative: bool = False,
) -> dict[Site, nn.Module]:
    """A network that starts by making `start`, owned by the first of the set."""
    generator = Generator(group, start[0][0].shape[1], hidden, dropout, shift, relative)
    generator.begin(start)
    return {site: Follower(generator, at) if at else Leader(generator) for at, site in enumerate(group)}

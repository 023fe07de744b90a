"""Prefix tuning. Li and Liang 2021, Prefix-Tuning: Optimizing Continuous Prompts for Generation, arXiv:2101.00190.

    context = attend(q, [K ; W_k x], [V ; W_v x]),     K, V [kv heads, length, head width] of each attention

The keys and values are not trained themselves, which is unstable, but come out of a network that is thrown away after
training:

    [K_1, V_1, …, K_L, V_L] = S + W_2 tanh(W_1 E + b_1) + b_2,     E [length, width], W_1 [hidden, width]

run once a forward, for all rows together. Self-attention of encoders and of decoders and cross-attention each have a
set of their own. S are the keys and values that the frozen base gives real tokens (sampled ones, or a text), or noise;
it is not trained, and W_2 and b_2 start at 0, so the prefix starts there. Rotary models keep the text's positions (keys
are stored as after rotation), learned positions move up by the length unless `shift` is false. Deployed parameters:
2 · length · Σ key widths; in training those of the network.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import nn

from trimtab.contract import Context, Parts
from trimtab.errors import UserError
from trimtab.methods.prefixes import (
    check_prefix,
    generated_parts,
    network_size,
    outputs,
    random_start,
    real_start,
    stored_parts,
)
from trimtab.relative import has_relative_positions
from trimtab.sites import KVSite, Site, Sites


@dataclass(frozen=True)
class Prefix:
    """Trained keys and values in front of every attention's own."""

    length: int = 16
    """Number of prefix positions."""
    form: Literal["mlp", "flat"] = "mlp"
    """mlp (a network makes them while training) or flat (they are trained themselves)."""
    hidden: int = 512
    """Width of the network."""
    dropout: float = 0.0
    """Dropout probability on the keys and values, while training."""
    init: Literal["vocabulary", "text", "random"] = "vocabulary"
    """Start: keys and values of sampled tokens, of a text, or random."""
    text: str | None = None
    """Text that the prefix starts from (repeated or cut to `length`); sets init to text."""
    layers: str | None = None
    """Layers to adapt, e.g. -10: or 0,2,5; all where not given."""
    encoder: bool = True
    """Whether the encoder of an encoder-decoder gets a prefix."""
    cross: bool = True
    """Whether cross-attention gets a prefix."""
    shift: bool = True
    """Whether learned positions of the text move up by the length (the paper's code) or stay (the library adapters)."""
    relative: bool = False
    """Whether T5's relative positions count the prefix as tokens in front of the text (peft)."""

    name: ClassVar[str] = "prefix"
    kinds: ClassVar[frozenset[str]] = frozenset({"kv"})
    lr: ClassVar[float] = 5e-5  # the network's, as in the paper: SmolLM2 gets worse from 2e-4 on; flat wants 1e-2
    mergeable: ClassVar[bool] = False
    formula: ClassVar[str] = "deployed 2·length·Σ keys"
    paper: ClassVar[str] = "Li and Liang 2021, arXiv:2101.00190"

    def __post_init__(self) -> None:
        check_prefix(self.name, self.length, self.dropout, self.hidden)
        if self.text is not None and self.init == "random":
            raise UserError("prefix: text= goes with init=text, not with init=random")
        if self.init == "text" and self.text is None:
            raise UserError("prefix: init=text needs text='…'")

    def build(self, sites: Sites, context: Context) -> Parts:
        """One part an attention; the first of each set owns the network."""
        parts: dict[Site, nn.Module] = {}
        if self.relative and not any(has_relative_positions(site) for site in sites.kv):
            raise UserError(
                f"prefix: relative=true is for T5, whose scores depend on distances, not {sites.family.name}"
            )
        real = {} if self.init == "random" else real_start(self.name, sites, context, self.length, self.text)
        for group in self._sets(sites):
            start = [real.get(site) or random_start(site, self.length) for site in group]
            if self.form == "flat":
                parts |= stored_parts(group, start, self.dropout, self.shift, self.relative)
            else:
                parts |= generated_parts(group, start, self.dropout, self.hidden, self.shift, self.relative)
        return parts

    def parameter_count(self, sites: Sites) -> int:
        """Flat 2 · length · Σ key widths; as a network its own: E, W_1, b_1, W_2, b_2 of each set."""
        groups = self._sets(sites)
        if self.form == "flat":
            return sum(self.length * outputs(group) for group in groups)
        return sum(network_size(group, self.length, self.hidden) for group in groups)

    @property
    def moves_text(self) -> bool:
        """Whether the prefix takes positions of the text where the family counts learned ones."""
        return self.shift

    def folded(self) -> Prefix:
        """The keys and values themselves."""
        return replace(self, form="flat", init="random", text=None)

    def for_loading(self) -> Prefix:
        """The same shapes without the tokens that they started from: their values come from the file."""
        return replace(self, init="random", text=None)

    def _sets(self, sites: Sites) -> list[list[KVSite]]:
        """The attentions by stack and kind."""
        groups: dict[tuple[str, bool], list[KVSite]] = {}
        for site in sites.kvs(self.layers):
            if (self.cross or not site.cross) and (self.encoder or site.stack != "encoder"):
                groups.setdefault((site.stack, site.cross), []).append(site)
        if not groups:
            raise UserError("prefix: encoder=false leaves nothing to train in this model")
        return list(groups.values())

"""P-tuning. Liu et al. 2021, GPT Understands, Too, arXiv:2103.10385.

    P = P_0 + MLP(E)   or   P_0 + MLP(BiLSTM(E)),     E, P [length, width];  P are the pseudo tokens' input embeddings

The pseudo tokens stand in front of the input, or where a template has them (`{p*3} {text} {p*3} It was {mask}`), at
ordinary consecutive positions. A bidirectional LSTM of two layers with width / 2 units a direction (or nothing) reads
E, and an MLP of two layers (three without the LSTM) with ReLU makes the embeddings. P_0 are embeddings of real tokens
and stay what they are; the MLP's last projection starts at zero, so the pseudo tokens start there (init=random: P_0 is
0 and the network draws its own start, as in the paper). After training the network is thrown away and P is kept.
Deployed parameters: length · width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import nn

from trimtab.contract import Context, Parts
from trimtab.errors import UserError
from trimtab.methods.starts import sampled_embeddings, start_at
from trimtab.pseudo import first_pseudo_token
from trimtab.sites import EmbedsSite, Sites

_NO_PSEUDO = "p-tuning: place=template needs a template with pseudo tokens, e.g. '{p*3} {text} {p*3}'"


@dataclass(frozen=True)
class PTuning:
    """Pseudo tokens whose embeddings come out of a small network, in front of the input or inside a template."""

    length: int | None = None
    """Number of pseudo tokens: as many as the template has, or 20 in front."""
    encoder: Literal["lstm", "mlp", "none"] = "mlp"
    """The network while training: mlp, lstm (and an MLP), or none (the embeddings themselves are trained)."""
    place: Literal["front", "template"] | None = None
    """front (of the input) or template (where it has {p*N}); by default template if it has pseudo tokens."""
    init: Literal["vocabulary", "random"] = "vocabulary"
    """Start: embeddings of sampled tokens, or what the network makes of noise (the paper's)."""

    name: ClassVar[str] = "p-tuning"
    kinds: ClassVar[frozenset[str]] = frozenset({"embeds"})
    lr: ClassVar[float] = 1e-3
    mergeable: ClassVar[bool] = False
    formula: ClassVar[str] = "deployed length·width"
    paper: ClassVar[str] = "Liu et al. 2021, arXiv:2103.10385"

    def __post_init__(self) -> None:
        if self.length is not None and self.length < 1:
            raise UserError(f"p-tuning: length={self.length} must be at least 1")

    def build(self, sites: Sites, context: Context) -> Parts:
        """One block of pseudo tokens a stack that reads an input; in a template those of the text's stack.

        Raises UserError for a template's tokens where the model reads no text or the tokenizer does not have them.
        """
        first = torch.tensor(self._first(context)) if self.place == "template" else None
        return {site: PseudoTokens(_source(site, self.count, self), first) for site in self._sites(sites)}

    def parameter_count(self, sites: Sites) -> int:
        """length · width, or those of the network: E, the LSTM's and the MLP's."""
        return sum(self.count * site.width + self._network(site.width) for site in self._sites(sites))

    def folded(self) -> PTuning:
        """The embeddings themselves."""
        return replace(self, length=self.count, encoder="none", place=self.place or "front", init="vocabulary")

    def for_template(self, count: int) -> PTuning:
        """The method for a template with `count` pseudo tokens.

        Raises UserError where it has none although place=template, and where length or place say otherwise.
        """
        if not count:
            if self.place == "template":
                raise UserError(_NO_PSEUDO)
            return replace(self, length=self.count, place="front")
        if self.place == "front":
            raise UserError("p-tuning: the template has pseudo tokens, so place=front has none to train; leave it out")
        if self.length not in (None, count):
            raise UserError(f"p-tuning: length={self.length}, but the template has {count} pseudo tokens; leave it out")
        return replace(self, length=count, place="template")

    @property
    def count(self) -> int:
        """The number of pseudo tokens."""
        return 20 if self.length is None else self.length

    @property
    def in_front(self) -> int:
        """Tokens in front of the text."""
        return 0 if self.place == "template" else self.count

    @property
    def inside(self) -> int:
        """Tokens among those of the text."""
        return self.count - self.in_front

    def _first(self, context: Context) -> int:
        """The id of the first pseudo token; -1 without a tokenizer, when the file is to say it."""
        if context.tokenizer is None:
            return -1
        first = first_pseudo_token(context.tokenizer, self.count)
        if first is None:
            raise UserError(_NO_PSEUDO)
        return first

    def _sites(self, sites: Sites) -> list[EmbedsSite]:
        found = [site for site in sites.embeds if self.place != "template" or site.embedding is not None]
        if not found:
            raise UserError("p-tuning: this model reads no text, so no template can place the pseudo tokens")
        return found

    def _network(self, width: int) -> int:
        if self.encoder == "none":
            return 0
        layer = width * (width + 1)
        half = width // 2
        lstm = 2 * 2 * 4 * half * (width + half + 2)  # two layers, two directions, four gates
        return lstm + 2 * layer if self.encoder == "lstm" else 3 * layer


class Network(nn.Module):
    """P_0 + MLP(BiLSTM(E)), or P_0 + MLP(E)."""

    start: torch.Tensor

    def __init__(self, length: int, width: int, encoder: str):
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(length, width))
        self.lstm: nn.Module | None = None
        if encoder == "lstm":
            self.lstm = nn.LSTM(width, width // 2, num_layers=2, bidirectional=True)
        inner = [nn.Linear(width, width) for _ in range(1 if encoder == "lstm" else 2)]
        self.inner, self.last = nn.ModuleList(inner), nn.Linear(width, width)
        self.register_buffer("start", torch.zeros(length, width))

    def forward(self) -> torch.Tensor:
        """[length, width]"""
        states = self.tokens if self.lstm is None else self.lstm(self.tokens)[0]
        for layer in self.inner:
            states = torch.relu(layer(states))
        return self.start + self.last(states)


class Stored(nn.Module):
    """The embeddings themselves."""

    def __init__(self, tokens: torch.Tensor):
        super().__init__()
        self.tokens = nn.Parameter(tokens.detach().clone())

    def forward(self) -> torch.Tensor:
        """[length, width]"""
        return self.tokens


class PseudoTokens(nn.Module):
    """P in front of the input, or in place of the token ids first, first + 1, …"""

    def __init__(self, source: nn.Module, first: torch.Tensor | None):
        super().__init__()
        self.source = source
        if first is not None:
            self.register_buffer("first", first)

    def forward(self) -> torch.Tensor:
        """[length, width]"""
        return self.source()

    @torch.no_grad()
    def fold(self) -> PseudoTokens:
        """The embeddings themselves; the network goes."""
        return PseudoTokens(Stored(self.source()), getattr(self, "first", None))


def _source(site: EmbedsSite, count: int, method: PTuning) -> nn.Module:
    """What makes `count` embeddings, at its start."""
    start = sampled_embeddings(site, count)
    if method.encoder == "none":
        return Stored(start)
    network = Network(count, site.width, method.encoder)
    if method.init == "vocabulary":
        start_at(network.start, network.last, start)
    return network

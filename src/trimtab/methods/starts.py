"""Where virtual tokens and prefixes start: real tokens, and networks that begin there. Knows embeddings; refuses to
know methods.
"""

from __future__ import annotations

import torch
from torch import nn

from trimtab.sites import EmbedsSite, Module

COMMON_TOKENS = 5000
"""Prompt tuning samples from the 5,000 most common tokens; vocabularies are listed roughly by frequency."""
NOISE = 0.02
"""Standard deviation of what starts from no real token."""


def sampled(embedding: Module, count: int) -> list[int]:
    """`count` token ids out of the most common ones."""
    return torch.randint(min(COMMON_TOKENS, embedding.weight.shape[0]), (count,)).tolist()


def fitted(ids: list[int], length: int) -> list[int]:
    """The ids repeated or cut to `length`."""
    return (ids * (length // len(ids) + 1))[:length]


@torch.no_grad()
def embed(embedding: Module, ids: list[int]) -> torch.Tensor:
    """What the model's own embedding module gives for `ids` [len(ids), width] (some families scale inside it)."""
    return embedding(torch.tensor(ids, device=embedding.weight.device)).detach().float().clone()


def sampled_embeddings(site: EmbedsSite, count: int) -> torch.Tensor:
    """[count, width] of sampled tokens; noise where the input is no text."""
    if site.embedding is None:
        return NOISE * torch.randn(count, site.width)
    return embed(site.embedding, sampled(site.embedding, count))


@torch.no_grad()
def start_at(shift: torch.Tensor, last: nn.Linear, wanted: torch.Tensor) -> None:
    """Have shift + last(anything) be `wanted` [P, out], whatever the layers before make.

    A last layer that is fitted instead has to undo that their outputs hardly differ between positions, and its large
    weights then blow up every step of theirs.
    """
    shift.copy_(wanted)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)

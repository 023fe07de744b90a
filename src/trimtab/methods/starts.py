"""Token ids that virtual tokens and prefixes start from. Knows vocabularies; refuses to know sites and methods."""

from __future__ import annotations

import torch

COMMON_TOKENS = 5000
"""Prompt tuning samples from the 5,000 most common tokens; vocabularies are listed roughly by frequency."""


def sampled(vocabulary: int, count: int) -> list[int]:
    """`count` token ids out of the most common ones."""
    return torch.randint(min(COMMON_TOKENS, vocabulary), (count,)).tolist()


def fitted(ids: list[int], length: int) -> list[int]:
    """The ids repeated or cut to `length`."""
    return (ids * (length // len(ids) + 1))[:length]

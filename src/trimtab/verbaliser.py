"""Label words at the mask of a masked language model. Knows token ids and logits; refuses to know texts and families.

    s_y = 1/|w_y| Σ_{t ∈ w_y} z_t,     p(y | x) = softmax_y(s),     loss = −log p(gold | x)

z [vocabulary] are the logits at the mask and w_y the tokens of the word for label y: the mean over a word of several
tokens at one mask, as in P-tuning (Liu et al. 2021, arXiv:2103.10385), and the softmax over the label words alone, as
in PET (Schick and Schütze 2021, arXiv:2001.07676). The vocabulary is projected at the mask and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.consistency import consistency_loss
from trimtab.head import IGNORED, label_loss, select_positions
from trimtab.objectives import Found


class Verbaliser:
    """Which label's word stands at the mask; an objective of the Trainer for labels [B]."""

    loss = staticmethod(label_loss)
    divergence = staticmethod(consistency_loss)

    def __init__(self, words: Sequence[Sequence[int]], mask_id: int) -> None:
        self.words, self.mask_id = words, mask_id

    def labelled(self, base: PreTrainedModel, labels: Tensor) -> Tensor:
        """The rows with a label."""
        return labels != IGNORED

    def forward(self, model: Any, base: PreTrainedModel, inputs: dict[str, Any], everywhere: bool) -> Found:
        """Scores s [B, labels], targets [B]; each row of input_ids has one mask."""
        rest = {key: value for key, value in inputs.items() if key != "labels"}
        at_mask = rest["input_ids"] == self.mask_id
        if everywhere:
            outputs = model(**rest)
            return outputs, self.scores(outputs.logits[at_mask]), inputs["labels"]
        with select_positions(base, at_mask):
            outputs = model(**rest)
        return outputs, self.scores(outputs.logits[0]), inputs["labels"]

    def scores(self, logits: Tensor) -> Tensor:
        """z [B, vocabulary] -> s [B, labels]"""
        ids = torch.tensor([token for word in self.words for token in word], device=logits.device)
        parts = logits.index_select(-1, ids).split([len(word) for word in self.words], dim=-1)
        return torch.stack([part.mean(-1) for part in parts], dim=-1)

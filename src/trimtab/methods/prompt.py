"""Prompt tuning. Lester et al. 2021, The Power of Scale for Parameter-Efficient Prompt Tuning, arXiv:2104.08691.

    X' = [P ; X],     P [length, width] trained, X [batch, n, width] the text's embeddings

The virtual tokens stand in front of the text, in vision models in front of the patches (Visual Prompt Tuning, shallow
form, Jia et al. 2022, arXiv:2203.12119). Trained parameters: length · width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from trimtab.contract import Context, Parts
from trimtab.errors import UserError
from trimtab.methods.starts import NOISE, embed, fitted, sampled, sampled_embeddings
from trimtab.sites import EmbedsSite, Module, Sites


@dataclass(frozen=True)
class Prompt:
    """Trained virtual tokens in front of the input."""

    length: int = 20
    """Number of virtual tokens."""
    init: Literal["vocabulary", "text", "labels", "random"] = "vocabulary"
    """Where they start: vocabulary (sampled), text, labels (the task's words) or random (noise of the same scale)."""
    text: str | None = None
    """Text whose embeddings the virtual tokens start from (repeated or cut to `length`); sets init to text."""
    leads: bool = False
    """Whether a classifier that reads the first token reads the first virtual one (peft) instead of the text's."""
    at: Literal["words", "states"] = "words"
    """In front of the words' embeddings, or of what the encoder makes of them with positions and norm (AdapterHub)."""

    name: ClassVar[str] = "prompt"
    kinds: ClassVar[frozenset[str]] = frozenset({"embeds"})
    lr: ClassVar[float] = 3e-2  # the causal-LM prompt-tuning guide's AdamW rate; the paper's 0.3 is for Adafactor
    mergeable: ClassVar[bool] = False
    formula: ClassVar[str] = "length·width"
    paper: ClassVar[str] = "Lester et al. 2021, arXiv:2104.08691"

    def __post_init__(self) -> None:
        if self.length < 1:
            raise UserError(f"prompt: length={self.length} must be at least 1")
        if self.text is not None and self.init not in ("vocabulary", "text"):
            raise UserError(f"prompt: text= goes with init=text, not with init={self.init}")
        if self.init == "text" and self.text is None:
            raise UserError("prompt: init=text needs text='…'")

    def build(self, sites: Sites, context: Context) -> Parts:
        """One block of virtual tokens a stack that reads an input.

        Raises UserError for `leads` where the first token is not what a classifier reads.
        """
        if self.leads and any(site.insert == "shared" or site.reader is not None for site in sites.embeds):
            raise UserError(
                f"prompt: leads=true is for models that read a class off the first token, not {sites.family.name}"
            )
        if self.at == "states" and any(site.states is None for site in sites.embeds):
            raise UserError(
                "prompt: at=states is for encoders of texts that add learned positions to the words, not "
                f"{sites.family.name}"
            )
        made = {site: self._start(site, context) for site in sites.embeds}
        if self.at == "states":
            made = {site: _as_states(site, start) for site, start in made.items()}
        return {site: VirtualTokens(start, self.leads, self.at) for site, start in made.items()}

    def parameter_count(self, sites: Sites) -> int:
        """length · width."""
        return sum(self.length * site.width for site in sites.embeds)

    def for_loading(self) -> Prompt:
        """The same shapes without the text they started from: their values come from the file."""
        return Prompt(self.length, leads=self.leads, at=self.at)

    @property
    def in_front(self) -> int:
        """How many of the model's positions the virtual tokens take."""
        return self.length if self.at == "words" else 0

    def _start(self, site: EmbedsSite, context: Context) -> torch.Tensor:
        """[length, width]"""
        if site.embedding is None:  # pictures and sound have no vocabulary
            if self.text is not None or self.init == "labels":
                raise UserError("prompt: this model reads no text, so its virtual tokens cannot start from words")
            return NOISE * torch.randn(self.length, site.width)
        if self.text is not None:
            return embed(site.embedding, fitted(context.token_ids(self.text, "prompt[text=…]"), self.length))
        if self.init == "labels":
            return self._from_labels(site.embedding, context)
        start = sampled_embeddings(site, self.length)
        return torch.randn_like(start) * start.std() if self.init == "random" else start

    def _from_labels(self, embedding: Module, context: Context) -> torch.Tensor:
        """A row a label word (the mean over its tokens), the rest sampled from the vocabulary."""
        if not context.labels:
            raise UserError("prompt: init=labels needs the task's labels: attach(model, method, labels=[…])")
        words = [embed(embedding, context.token_ids(word, "prompt[init=labels]")).mean(0) for word in context.labels]
        rest = embed(embedding, sampled(embedding, self.length))
        return torch.cat([torch.stack(words), rest])[: self.length]


@torch.no_grad()
def _as_states(site: EmbedsSite, words: torch.Tensor) -> torch.Tensor:
    """What the encoder makes of words [length, width] at the first positions, with its norm."""
    training = site.states.training
    site.states.eval()
    try:
        states = site.states(input_ids=None, inputs_embeds=words[None].to(site.embedding.weight.dtype))
    finally:
        site.states.train(training)
    return states[0].to(words.dtype)


class VirtualTokens(nn.Module):
    """P [length, width] itself."""

    def __init__(self, start: torch.Tensor, leads: bool = False, at: str = "words"):
        super().__init__()
        self.tokens = nn.Parameter(start)
        self.leads, self.at = leads, at

    def forward(self) -> torch.Tensor:
        """[length, width]"""
        return self.tokens

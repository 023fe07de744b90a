"""AutoPrompt. Shin et al. 2020, AutoPrompt: Eliciting Knowledge from Language Models with Automatically Generated
Prompts, arXiv:2010.15980.

    X' = [E(t) ; X],     t [length] token ids, E the model's own embedding, X [batch, n, width] the text's embeddings
    gain(v) = (E(t_i) - E(v)) · ∂L/∂E(t_i)          what token v at position i takes off the loss, to first order

Nothing is trained but the choice of the trigger t: once an optimizer step, at one position i, some of the tokens with
the largest gain are tried, and the one with the smallest exact loss on that step's rows takes the place if its loss is
below that of the token there. A larger batch (or gradient accumulation) makes a better judge. A task head learns beside
it with the optimizer; the learning rate is the head's.

The trigger is a text: its tokens are printable and read back as the same ids, also with an input behind them. It needs
no trimtab: a plain model that reads the text in front of the input gives the same logits. The trigger's tokens stand in
front of all others (a BOS included, where the tokenizer puts one), in encoders behind the special tokens that begin an
input ([CLS]). Where a vocabulary ties spaces to words (byte-level BPE) the trigger's last token is a line break.
Trained parameters: none; the adapter is `length` token ids.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from trimtab.contract import Context, Parts
from trimtab.errors import UserError
from trimtab.methods.readable import Readable
from trimtab.sites import EmbedsSite, Sites
from trimtab.tokens import Codec

NEUTRAL = "the"
"""The word that the trigger starts from, as often as it fits."""


@dataclass(frozen=True)
class AutoPrompt:
    """Searches a readable text in front of the input; trains no parameter."""

    length: int = 5
    """Number of the trigger's tokens, the line break that ends it in byte-level vocabularies included."""
    candidates: int = 32
    """Tokens with the largest first-order gain that a step draws from."""
    evaluate: int = 8
    """How many of them it tries exactly, one forward of the batch each."""
    order: Literal["cycle", "random"] = "cycle"
    """Which position a step looks at: one after the other, or drawn."""
    text: str | None = None
    """Text to start from, of `length` tokens; else a neutral word. After a search, the trigger's text."""
    ids: tuple[int, ...] = ()
    """Token ids to start from, in place of a text; after a search, the trigger's."""
    behind: int | None = None
    """How many of the input's first tokens stand in front of the trigger; else its special tokens, in encoders."""

    name: ClassVar[str] = "autoprompt"
    kinds: ClassVar[frozenset[str]] = frozenset({"embeds", "vocabulary"})
    lr: ClassVar[float] = 1e-2  # the task head's, where there is one
    rows: ClassVar[int] = 64  # a smaller batch takes what fits its few rows for better
    mergeable: ClassVar[bool] = False
    formula: ClassVar[str] = "none: length token ids"
    paper: ClassVar[str] = "Shin et al. 2020, arXiv:2010.15980"

    def __post_init__(self) -> None:
        for key in ("length", "candidates", "evaluate"):
            if getattr(self, key) < 1:
                raise UserError(f"autoprompt: {key}={getattr(self, key)} must be at least 1")
        if self.ids and len(self.ids) != self.length:
            raise UserError(f"autoprompt: ids names {len(self.ids)} tokens; write length={len(self.ids)}")
        if min(self.ids, default=0) < 0 or (self.behind or 0) < 0:
            raise UserError("autoprompt: ids and behind cannot be negative")

    def build(self, sites: Sites, context: Context) -> Parts:
        """The trigger of the stack that reads the text. Raises UserError where a tokenizer is missing."""
        (site,) = (site for site in sites.embeds if site.embedding is not None)
        size, tokenizer = site.embedding.weight.shape[0], context.tokenizer
        if max(self.ids, default=0) >= size:
            raise UserError(f"autoprompt: ids names token {max(self.ids)}, this model has {size}")
        if tokenizer is None and not self.ids:
            raise UserError("autoprompt needs a tokenizer, which says what is text: attach(model, method, tokenizer=…)")
        readable = None if tokenizer is None else Readable(tokenizer, size)
        return {site: Trigger(site, self, self._start(readable), self._place(site, tokenizer), readable)}

    def parameter_count(self, sites: Sites) -> int:
        """None."""
        return 0

    def found(self, parts: Sequence[Any]) -> AutoPrompt:
        """The method with the trigger that its part holds."""
        (part,) = (part for part in parts if isinstance(part, Trigger))
        ids = part.ids.tolist()
        text = self.text if part.readable is None else part.readable.texts([ids])[0]
        return dataclasses.replace(self, ids=tuple(ids), text=text, behind=part.behind)

    @property
    def finding(self) -> str | None:
        """The trigger, for people; None before a search."""
        if not self.ids:
            return None
        special = f"{self.behind} special token{'s' if self.behind != 1 else ''}"
        where = f"behind the {special} at the start of an input" if self.behind else "in front of an input"
        return f"trigger {self.text!r}, token ids {', '.join(map(str, self.ids))}, {where}"

    def _start(self, readable: Readable | None) -> list[int]:
        """Token ids [length]. Raises UserError for a start that is not as long, or no readable text."""
        if readable is None:
            return list(self.ids)
        spare = self.length - len(readable.ending)
        if spare < 1:
            raise UserError(
                f"autoprompt: length={self.length} leaves no token beside the line break that ends the text"
            )
        given = self.text or " ".join([NEUTRAL] * spare)
        ids = list(self.ids) or readable.ids(given)
        if len(ids) != self.length:
            raise UserError(f"autoprompt: the text {given!r} has {len(ids)} tokens; write length={len(ids)}")
        if readable.texts([ids]) == [None]:
            raise UserError(f"autoprompt: the tokens {ids} do not read back from their text; start from another text")
        return ids

    def _place(self, site: EmbedsSite, tokenizer: Any) -> int:
        """How many of the input's tokens stand in front of the trigger."""
        encoder = site.insert == "tokens" and site.reader is None and not site.attentions[0].causal
        if self.behind and not encoder:
            raise UserError("autoprompt: behind= is for encoders; here the trigger stands in front of everything")
        if self.behind is not None or tokenizer is None or not encoder:
            return self.behind or 0
        return len(Codec.of(tokenizer, "encoder", chat=False).ends[0])


class Trigger(nn.Module):
    """E(t), and the search for a better t."""

    def __init__(self, site: EmbedsSite, method: AutoPrompt, ids: list[int], behind: int, readable: Readable | None):
        super().__init__()
        self.register_buffer("ids", torch.tensor(ids))
        self.ids: torch.Tensor
        self.site = (site,)  # in a tuple: the base's embedding is no part of the adapter
        self.method, self.behind, self.readable = method, behind, readable
        self.gradient: torch.Tensor | None = None
        """∂L/∂E(t) [length, width], the sum over the backward passes since the last search."""

    def forward(self) -> torch.Tensor:
        """[length, width], in autograd's eyes a leaf."""
        tokens = self._embedded(self.ids)
        if torch.is_grad_enabled():
            tokens.requires_grad_().register_hook(self._gather)
        return tokens

    def fold(self) -> Trigger:
        """The same ids, without the vocabulary to search in."""
        return Trigger(self.site[0], self.method, self.ids.tolist(), self.behind, None).to(self.ids.device)

    @torch.no_grad()
    def search(self, loss: Callable[[], float], step: int) -> None:
        """Try tokens at one position and keep the best; what is drawn depends on the step alone.

        Raises UserError without a tokenizer, and where no gradient has been gathered.
        """
        if self.readable is None:
            raise UserError("autoprompt can search only with a tokenizer: attach(model, method, tokenizer=…)")
        if self.gradient is None:
            raise UserError("autoprompt: a search needs the gradient of a backward pass; call it after one")
        draw = torch.Generator().manual_seed(step)
        spare = len(self.ids) - len(self.readable.ending)
        position = step % spare if self.method.order == "cycle" else int(torch.randint(spare, (), generator=draw))
        pool = self.candidates(position)
        chosen = torch.randperm(len(pool), generator=draw)[: self.method.evaluate].tolist()
        best, least = self.ids.clone(), loss()
        try:
            for trigger in (pool[at] for at in chosen):
                self.ids.copy_(torch.tensor(trigger))
                if (found := loss()) < least:
                    best, least = self.ids.clone(), found
        finally:
            self.ids.copy_(best)
            self.gradient = None

    @torch.no_grad()
    def candidates(self, position: int) -> list[list[int]]:
        """The readable triggers [length] with another token at this position, those of the largest gains first."""
        assert self.readable is not None
        count, found = self.method.candidates, list[list[int]]()
        for tokens in self._by_gain(position).split(count):
            triggers = [self._with(position, token) for token in tokens.tolist()]
            texts = self.readable.texts(triggers)
            found += [one for one, text in zip(triggers, texts, strict=True) if text is not None]
            if len(found) >= count:
                break
        return found[:count]

    def _by_gain(self, position: int) -> torch.Tensor:
        """The vocabulary's readable tokens but the one that is there, by falling gain."""
        assert self.readable is not None and self.gradient is not None
        known = torch.tensor(self.readable.tokens, device=self.ids.device)
        known = known[known != self.ids[position]]
        gains = [
            -self._embedded(some) @ self.gradient[position] for some in known.split(_CHUNK)
        ]  # E(t_i)·g is constant
        return known[torch.cat(gains).argsort(descending=True, stable=True)]

    def _with(self, position: int, token: int) -> list[int]:
        ids: list[int] = self.ids.tolist()
        return [*ids[:position], token, *ids[position + 1 :]]

    def _embedded(self, ids: torch.Tensor) -> torch.Tensor:
        """What the model's own embedding module gives (some families scale inside it), detached. [len(ids), width]"""
        with torch.no_grad():
            found = self.site[0].embedding(ids)
        return found.detach().to(torch.promote_types(found.dtype, torch.float32))

    def _gather(self, gradient: torch.Tensor) -> None:
        self.gradient = gradient.detach() if self.gradient is None else self.gradient + gradient.detach()


_CHUNK = 8192
"""Rows of the vocabulary that are embedded at once."""

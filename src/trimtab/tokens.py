"""Knows how prompts and answers become token ids that fit; refuses to know rows, columns and labels.

A prompt and its answer are tokenised apart and joined, so the tokens of the prompt alone are always the beginning of
the tokens of both, whatever the answer is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from trimtab.chats import ChatFrame, chat_frame
from trimtab.errors import UserError
from trimtab.templates import PSEUDO, Prompt

Ids = list[int]
ANCHOR = "\n"
"""What an answer is tokenised after: sentencepiece marks the first piece of a string, which an answer never is."""
_BEHIND = re.compile(re.escape(PSEUDO).replace(re.escape("{}"), r"\d+") + " ")
"""A pseudo token and a space."""


@dataclass(frozen=True)
class Codec:
    """A tokenizer in its part for one kind of model, with or without its chat template."""

    tokenizer: Any
    kind: str
    """One of "causal", "seq2seq", "encoder" and "masked"."""
    frame: ChatFrame | None
    """The chat template's frame, or None."""
    ends: tuple[Ids, Ids]
    """Special tokens before and after a prompt."""
    answer_ends: tuple[Ids, Ids]
    """Special tokens before and after an answer that ends."""

    @classmethod
    def of(cls, tokenizer: Any, kind: str, chat: bool) -> Codec:
        """Raises UserError for a chat without a chat template."""
        frame = chat_frame(tokenizer) if chat else None
        front, back = special_ends(tokenizer)
        if kind != "causal":
            return cls(tokenizer, kind, frame, (front, back), special_ends(tokenizer, "text_target"))
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        return cls(tokenizer, kind, frame, ([] if frame else front, []), ([], end))  # a chat template has its own bos

    def prompts(self, texts: list[str]) -> list[Ids]:
        """Token ids of whole prompts, with the special tokens that belong to them."""
        if self.kind == "causal":
            texts = [text.rstrip(" ") for text in texts]  # the space before an answer is the answer's
        if any(_BEHIND.search(text) for text in texts) and self._adds_spaces():
            texts = [_BEHIND.sub(lambda found: found[0][:-1], text) for text in texts]
        front, back = self.ends
        return [ids + back if ids[: len(front)] == front else front + ids + back for ids in self.plain(texts)]

    def answers(self, texts: list[str], end: bool) -> list[Ids]:
        """Token ids of answers, spaces in front included; with `end` also what ends them (eos or the chat's mark)."""
        mark = self.frame.end if self.frame and self.kind == "causal" and end else ""
        front, back = self.answer_ends
        if end and not mark and not back:
            raise UserError("this model's tokenizer has no end-of-sequence token, so no answer could ever end")
        plain = self._continued([text + mark for text in texts]) if self.kind == "causal" else self._target(texts)
        return [front + ids + (back if end and not mark else []) for ids in plain]

    def fit(self, prompt: Prompt, ids: Ids, room: int) -> Ids:
        """At most `room` of the prompt's token ids, by cutting its text. Raises UserError if no text would be left."""
        for shorter in prompt.shorter:
            if len(ids) <= room:
                break
            prompt, ids = shorter, self.prompts([shorter.full()])[0]
        if len(ids) <= room:
            return ids
        cuts = self._cuts(prompt.text)
        if not (kept := self._longest(prompt, cuts, room, keep=len(cuts) - (len(ids) - room))):
            bare = len(self.prompts([prompt.render("")])[0])
            raise UserError(
                f"the prompt takes {bare} tokens before any text and has room for {room}; raise --max-length"
            )
        return kept

    def _longest(self, prompt: Prompt, cuts: list[int], room: int, keep: int) -> Ids:
        """The prompt with most text that fits, cut at one of `cuts`; empty if none does. Starts looking at `keep`."""
        best: Ids = []
        fits, fails = 0, len(cuts)
        while fails - fits > 1:
            keep = min(max(keep, fits + 1), fails - 1)
            text = prompt.text[: cuts[keep - 1]].rstrip()
            ids = self.prompts([prompt.render(text)])[0]
            spare = room - len(ids)
            if spare < 0:
                fails = keep
            else:
                fits, best = keep, ids if text else best
            if spare == 0 and best:
                break
            keep += spare or 1
        return best

    def _cuts(self, text: str) -> list[int]:
        """Where the text may end: after each token, or after each character if the tokenizer knows no offsets."""
        if not self.tokenizer.is_fast:
            return list(range(1, len(text) + 1))
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [end for _, end in found["offset_mapping"] if end]

    def at_mask(self, texts: list[str]) -> list[Ids]:
        """Token ids of words in the place of a mask, the space in front included where there is one."""
        return self._continued(texts)

    def _adds_spaces(self) -> bool:
        """Whether the tokenizer puts a space in front of what follows a special token, one or not (legacy Llama)."""
        alone, inside, before = self.plain([" a", "a a", "a"])
        return alone != inside[len(before) :]

    def plain(self, texts: list[str]) -> list[Ids]:
        """Token ids of texts without any special tokens."""
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []

    def _target(self, texts: list[str]) -> list[Ids]:
        return self.tokenizer(text_target=texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []

    def _continued(self, texts: list[str]) -> list[Ids]:
        """Token ids of texts that continue another."""
        anchor = self.plain([ANCHOR])[0]
        joined = self.plain([ANCHOR + text for text in texts])
        alone = [ids[: len(anchor)] != anchor for ids in joined]  # merged with the anchor
        apart = iter(self.plain([text for text, merged in zip(texts, alone, strict=True) if merged]))
        return [next(apart) if merged else ids[len(anchor) :] for ids, merged in zip(joined, alone, strict=True)]


@dataclass(frozen=True)
class PairFrame:
    """What a tokenizer puts around two texts that are read together, and the segment that each is in."""

    front: Ids
    middle: Ids
    """Between the texts; in the first one's segment."""
    back: Ids
    segments: tuple[int, int] | None
    """Token types of the first text and of the second; None if the tokenizer gives none."""

    @classmethod
    def of(cls, tokenizer: Any) -> PairFrame:
        """Found by joining a text with itself."""
        probe, plain = _probe(tokenizer)
        whole = tokenizer(probe, probe)
        ids, types = whole["input_ids"], whole.get("token_type_ids")
        first = _find(plain, ids, 0)
        second = _find(plain, ids, first + len(plain))
        segments = None if types is None else (types[first], types[second])
        return cls(ids[:first], ids[first + len(plain) : second], ids[second + len(plain) :], segments)


def special_ends(tokenizer: Any, argument: str = "text") -> tuple[Ids, Ids]:
    """The special tokens that the tokenizer puts before and after a text."""
    probe, plain = _probe(tokenizer, argument)
    whole = tokenizer(**{argument: probe})["input_ids"]
    at = _find(plain, whole, 0)
    return whole[:at], whole[at + len(plain) :]


def _probe(tokenizer: Any, argument: str = "text") -> tuple[str, Ids]:
    """A text that has tokens, and what they are."""
    for probe in _probes(tokenizer):
        plain = tokenizer(**{argument: probe}, add_special_tokens=False)["input_ids"]
        if plain:
            break
    return probe, plain


def _find(part: Ids, whole: Ids, start: int) -> int:
    return next(at for at in range(start, len(whole)) if whole[at : at + len(part)] == part)


def _probes(tokenizer: Any) -> Iterator[str]:
    yield from "aA0"
    yield from tokenizer.get_vocab()


def prefix_free(choices: list[Ids]) -> bool:
    """Whether no choice is the beginning of another."""
    return not any(a is not b and b[: len(a)] == a for a in choices for b in choices)

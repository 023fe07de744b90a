"""Token ids that are a text: what a tokenizer writes for them, it reads as the same ids again. Knows vocabularies;
refuses to know sites and methods.

A text in front of an input keeps its tokens only where the input begins a word of its own. Vocabularies that mark words
(WordPiece, sentencepiece) get a space in between, which is no token; in byte-level ones, where a space belongs to the
word behind it, the text ends with a line break, whose token counts among the text's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trimtab.errors import UserError

_BEGINNINGS = ("A", "the", "1")
"""Inputs that the separator is tried on."""


class Readable:
    """The texts that a tokenizer can write and read back."""

    def __init__(self, tokenizer: Any, size: int):
        """`size` is the number of rows that the embedding has. Raises UserError for a tokenizer without a separator."""
        self.tokenizer = tokenizer
        self.separator, self.ending = self._separator()
        special = {at for at, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special = special.union(tokenizer.all_special_ids)
        plain = [at for at in range(min(len(tokenizer), size)) if at not in self.special]
        texts = self._write([[at] for at in plain])
        same = zip(plain, texts, self._read(texts), strict=True)
        self.tokens = [at for at, text, ids in same if ids == [at] and text.strip() and text.isprintable()]
        """The tokens that are a printable text by themselves."""

    def ids(self, text: str) -> list[int]:
        """The token ids of a text in front of an input, the ending included."""
        return self._read([text.rstrip()])[0] + self.ending

    def texts(self, many: Sequence[list[int]]) -> list[str | None]:
        """The text of each of many ids in front of an input; None where it would not be read as these ids, or
        has special tokens."""
        texts = [text.rstrip() + self.separator for text in self._write(many)]
        (first,) = self._read(_BEGINNINGS[:1])
        read = self._read([text + _BEGINNINGS[0] for text in texts])
        same = [ids == [*one, *first] and self.special.isdisjoint(one) for ids, one in zip(read, many, strict=True)]
        return [text if kept else None for text, kept in zip(texts, same, strict=True)]

    def _separator(self) -> tuple[str, list[int]]:
        """What stands between a text and the input behind it, and the text's token ids for it."""
        alone, *inputs = self._read(["the", *_BEGINNINGS])
        for separator in (" ", "\n"):
            ending = [] if separator == " " else self._read([separator])[0]
            together = self._read([f"the{separator}{input_}" for input_ in _BEGINNINGS])
            if together == [alone + ending + ids for ids in inputs]:
                return separator, ending
        raise UserError("this tokenizer joins words over spaces and line breaks, so no text keeps its tokens in front")

    def _write(self, many: Sequence[list[int]]) -> list[str]:
        return self.tokenizer.batch_decode(many, clean_up_tokenization_spaces=False)

    def _read(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]

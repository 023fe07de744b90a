"""Generation with what acts at the attentions: every cache and beam search give the tokens of recomputation."""

from __future__ import annotations

import itertools

import pytest
import torch

from prefix_by_hand import attached, rows
from tiny import CAUSAL, tiny

METHODS = ("prefix[length=4,hidden=6]", "llama-adapter[length=4]", "llama-adapter-v2[length=4]")


@pytest.mark.parametrize(
    ("method", "family"),
    [
        *itertools.product(METHODS[:2], ("llama", "gpt2", "mistral", "gemma3_text", "t5")),
        (METHODS[0], "bart"),
        (METHODS[2], "gpt2"),
        (METHODS[2], "llama"),
    ],
)
@pytest.mark.parametrize("beams", [1, 3])
def test_cached_generation(method: str, family: str, beams: int) -> None:
    """Left-padded rows of unequal length, with a dynamic and a static cache; and one row alone."""
    model, _ = attached(family, method)
    batch, real = rows(family, "left")
    batch = {key: batch[key] for key in ("input_ids", "attention_mask")}
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**batch, **how, use_cache=False)
    assert torch.equal(model.generate(**batch, **how), expected)
    if family in CAUSAL:
        static = model.generate(**batch, **how, cache_implementation="static", disable_compile=True)
        assert torch.equal(static, expected)
        alone = model.generate(input_ids=batch["input_ids"][2:][real[2:]][None], **how)
        assert torch.equal(alone[0, -5:], expected[2, -5:])
    base = tiny(family, torch.float64).generate(**batch, **how)
    assert not torch.equal(base, expected)

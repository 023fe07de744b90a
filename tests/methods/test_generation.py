"""Generation with what acts at the attentions: every cache and beam search give the tokens of recomputation."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import DynamicCache, StaticCache

from prefix_by_hand import attached, rows
from tiny import CAUSAL, output, tiny

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
    whole = rows(family, "left")[0]
    assert not torch.allclose(output(model, whole), output(tiny(family, torch.float64), whole))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS[:2])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_cached_logits(kind: str, method: str, family: str, side: str) -> None:
    """Four tokens, then one, then two, on either padding side, give the logits of all seven at once."""
    model, _ = attached(family, method)
    batch, real = rows(family, side)
    expected = model(**batch, use_cache=False).logits
    places = (real.long().cumsum(1) - 1).clamp(min=0)
    cache = (
        DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=9)
    )
    found = []
    with torch.no_grad():
        for start, stop in ((0, 4), (4, 5), (5, 7)):
            step = {"input_ids": batch["input_ids"][:, start:stop], "position_ids": places[:, start:stop]}
            out = model(**step, attention_mask=batch["attention_mask"][:, :stop], past_key_values=cache)
            found.append(out.logits)
    assert torch.allclose(torch.cat(found, dim=1)[real], expected[real], rtol=0, atol=1e-9)

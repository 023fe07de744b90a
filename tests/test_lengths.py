"""How long a row may be: the models' position tables, and virtual tokens beside the text."""

from __future__ import annotations

import pytest
import torch

import tiny
import trimtab as tt
from trimtab.errors import UserError
from trimtab.lengths import fitting_length, new_tokens, position_limit, prompt_length, virtual_tokens
from trimtab.methods import LoRA, Prompt, Union

TABLES = {"gpt2": 64, "opt": 64, "bert": 64, "electra": 64, "distilbert": 64, "bart": 64, "roberta": 63}
TEXT = [name for name in tiny.FAMILIES if name not in (*tiny.VISION, "whisper")]


@pytest.mark.parametrize("family", TEXT)
def test_a_text_of_the_limit_fits_and_one_token_more_does_not(family: str) -> None:
    model = tiny.tiny(family)
    limit = position_limit(model.config)
    assert limit == TABLES.get(family)
    if limit is None:
        tiny.output(model, tiny.inputs(family, batch=1, length=80))
        return
    tiny.output(model, tiny.inputs(family, batch=1, length=limit))
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        tiny.output(model, tiny.inputs(family, batch=1, length=limit + 1))


@pytest.mark.parametrize("family", TEXT)
def test_virtual_tokens_and_the_longest_text_fit_together(family: str) -> None:
    model, method = tiny.tiny(family), Union((Prompt(length=5), LoRA(r=2)))
    tt.attach(model, method)
    longest = fitting_length(method, model.config, None)
    assert longest == (TABLES[family] - 5 if family in TABLES else 512)
    with torch.no_grad():
        tiny.output(model, tiny.inputs(family, batch=1, length=longest))
    if family in TABLES:
        with pytest.raises(UserError, match=f"virtual tokens take 5; allowed is at most {longest}"):
            fitting_length(method, model.config, longest + 1)
        with pytest.raises(UserError, match="leaves none for the text"):
            fitting_length(Prompt(length=64), model.config, None)


def test_what_is_wanted_and_fits_is_kept() -> None:
    config = tiny.tiny("bert").config
    assert [fitting_length(LoRA(), config, wanted) for wanted in (8, 64)] == [8, 64]
    assert virtual_tokens(LoRA(), config) == virtual_tokens(None, config) == 0


def test_a_prompt_leaves_room_for_what_is_generated() -> None:
    table, endless, decoder = (tiny.tiny(name).config for name in ("gpt2", "llama", "bart"))
    assert prompt_length(Prompt(length=4), table, 60, 20) == 40
    assert prompt_length(None, table, 60, 500) == 32  # half of a table that is shorter than the answer may be
    assert prompt_length(None, endless, 60, 500) == prompt_length(None, decoder, 60, 500) == 60
    assert new_tokens(Prompt(length=4), table, 50, 500) == 10
    assert new_tokens(None, table, 64, 500) == 1
    assert new_tokens(None, endless, 64, 500) == 500
    assert new_tokens(None, decoder, 64, 500) == 63


def test_virtual_tokens_leave_positions_that_a_rotary_model_was_trained_with() -> None:
    config = tiny.tiny("llama").config
    known = config.max_position_embeddings
    assert fitting_length(Prompt(length=known - 1), config, None) == 512
    with pytest.raises(UserError, match=f"virtual tokens take {known} of the {known} positions .* at most {known - 1}"):
        fitting_length(Prompt(length=known), config, None)

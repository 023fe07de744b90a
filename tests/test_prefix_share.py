"""Tokens that all rows begin with, run once: the same logits, loss and gradients as without."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    PreTrainedModel,
    TrainingArguments,
)

import trimtab as tt
from test_contract import METHODS
from tiny import CAUSAL, tiny
from trimtab.adapter import supported
from trimtab.head import IGNORED, align_labels
from trimtab.methods import METHODS as REGISTRY
from trimtab.methods.spec import parse_method
from trimtab.prefix_share import common_length, draws, shared_prefix

SHARED = 12
"""Tokens that all rows of the test batch begin with."""
METHOD_STRINGS = [METHODS.get(name, name) for name in REGISTRY if name not in ("full", "head")]


def batch() -> dict[str, torch.Tensor]:
    """Five rows of up to 20 tokens, padded on the right, labels on the last few."""
    torch.manual_seed(1)
    ids = torch.randint(3, 50, (5, 20))
    ids[:, :SHARED] = ids[:1, :SHARED]
    ids[1, SHARED] = ids[0, SHARED] + 1
    mask = torch.ones_like(ids)
    mask[1, 18:] = mask[2, 17:] = 0
    labels = ids.masked_fill(mask == 0, IGNORED)
    labels[:, : SHARED + 2] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loss_and_gradients(model: PreTrainedModel, adapter: Any, share: bool) -> tuple[float, list[torch.Tensor], int]:
    """The loss, the gradients, and the tokens a row that the model was given."""
    whole = batch()
    needed = align_labels(model, whole["labels"]) != IGNORED if share else torch.ones(5, 20).bool()
    for parameter in adapter.parameters():
        parameter.grad = None
    for part in adapter.searching():
        part.gradient = None
    with shared_prefix(model, whole, needed) as inputs:
        loss = model(**inputs).loss
        loss.backward()
    found = [parameter.grad for parameter in adapter.parameters() if parameter.grad is not None]
    return float(loss.detach()), found + [part.gradient for part in adapter.searching()], inputs["input_ids"].shape[1]


def shaken(model: PreTrainedModel, method: str) -> Any:
    """The method attached, away from its start: gates are open, B is not 0."""
    adapter = tt.attach(model, method)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return adapter


def pairs() -> list[Any]:
    every = [("lora[r=2]", family) for family in CAUSAL]
    every += [("prefix[length=3,hidden=8]|prompt[length=2]|llama-adapter[length=3]", family) for family in CAUSAL]
    every += [(method, family) for method in METHOD_STRINGS for family in ("llama", "gpt2")]
    return [
        pytest.param(method, family, id=f"{family}-{method}")
        for method, family in dict.fromkeys(every)
        if family in supported(parse_method(method).kinds) and family != "bloom"
    ]


@pytest.mark.parametrize(("method", "family"), pairs())
def test_loss_and_gradients_are_those_of_whole_rows(method: str, family: str) -> None:
    model = tiny(family)
    adapter = shaken(model, method)
    model.train()
    if draws(model):
        pytest.skip("draws anew at every call")
    plain, expected, all_tokens = loss_and_gradients(model, adapter, share=False)
    shared, found, tokens = loss_and_gradients(model, adapter, share=True)
    assert (all_tokens, tokens) == (20, 20 - SHARED)
    assert shared == pytest.approx(plain, rel=1e-5)
    assert len(found) == len(expected)
    largest = max((one.abs().max() for one in expected), default=torch.tensor(0.0))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=float(1e-5 * largest))
    whole = batch()
    with torch.no_grad():
        with shared_prefix(model, whole, align_labels(model, whole["labels"]) != IGNORED) as inputs:
            rest = model(**inputs).loss
        torch.testing.assert_close(rest, model(**whole).loss)


@pytest.mark.parametrize("method", ["lora[r=2]", "prefix[length=3,hidden=8]", "prompt[length=2]"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_checkpointed_layers_see_the_shared_tokens_again(method: str, family: str) -> None:
    model = tiny(family)
    adapter = shaken(model, method)
    model.train()
    _, expected, _ = loss_and_gradients(model, adapter, share=False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _, found, tokens = loss_and_gradients(model, adapter, share=True)
    assert tokens == 20 - SHARED
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def positions_run(model: Any) -> list[tuple[int, ...]]:
    """Grows by the shape of what the first layer is given at every call."""
    seen: list[tuple[int, ...]] = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[:2])))
    return seen


def test_layers_run_the_shared_tokens_once() -> None:
    model = tiny("llama")
    tt.attach(model, "lora[r=2]")
    seen, whole = positions_run(model), batch()
    needed = align_labels(model, whole["labels"]) != IGNORED
    with shared_prefix(model, whole, needed) as inputs:
        model(**inputs)
    assert seen == [(1, SHARED + 5 * (20 - SHARED))]
    with torch.no_grad(), shared_prefix(model, whole, needed) as inputs:
        model(**inputs)
    assert seen[1:] == [(1, SHARED), (5, 20 - SHARED)]


@pytest.mark.parametrize("family", [family for family in CAUSAL if family != "bloom"])
def test_virtual_tokens_are_packed_with_rows_that_share_nothing(family: str) -> None:
    model = tiny(family)
    adapter = shaken(model, "prompt[length=4]|lora[r=2]")
    model.train()
    whole = batch()
    whole["input_ids"][1, 0] += 1
    found = []
    for packed in (False, True):
        for parameter in adapter.parameters():
            parameter.grad = None
        with shared_prefix(model, whole, None) if packed else nullcontext(whole) as inputs:
            output = model(**inputs)
            output.loss.backward()
        assert output.logits.shape[:2] == (5, 20)
        found.append([output.loss.detach(), *(parameter.grad for parameter in adapter.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_rows_padded_on_the_left_are_not_packed() -> None:
    model = tiny("llama")
    tt.attach(model, "prompt[length=4]")
    whole = batch()
    whole["attention_mask"][2, :3] = 0
    seen = positions_run(model)
    with shared_prefix(model, whole, None) as inputs:
        model(**inputs)
    assert seen == [(1, 4), (5, 20)]


def test_no_row_is_left_without_what_is_needed_of_it() -> None:
    model = tiny("llama")
    tt.attach(model, "lora[r=2]")
    ids = torch.full((40, 20), 7)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    needed = torch.zeros_like(ids).bool()
    needed[3, 9] = True
    assert common_length(model, inputs, needed) == 9
    assert common_length(model, inputs, None) == 19
    inputs["attention_mask"][5, 15:] = 0
    assert common_length(model, inputs, None) == 14
    inputs["attention_mask"][5, :2] = 0  # padded on the left
    assert common_length(model, inputs, None) == 0


def test_a_few_tokens_are_not_worth_a_second_pass() -> None:
    model = tiny("llama")
    tt.attach(model, "lora[r=2]")
    ids = torch.full((2, 20), 7)
    assert common_length(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, None) == 0


@pytest.mark.parametrize(
    "method",
    ["lora[r=2,dropout=0.1]", "adamix[size=4]", "houlsby[size=4,drop=2]", "prefix[length=3,hidden=8,dropout=0.1]"],
)
def test_what_draws_at_every_call_is_not_taken_apart(method: str) -> None:
    model = tiny("llama")
    tt.attach(model, method)
    model.train()
    assert draws(model)
    with shared_prefix(model, batch(), None) as inputs:
        assert inputs["input_ids"].shape == (5, 20)
    model.eval()
    assert not draws(model)


@pytest.mark.parametrize("family", ["bloom", "bert", "t5"])
def test_other_models_get_whole_rows(family: str) -> None:
    model = tiny(family)
    tt.attach(model, "lora[r=2]")
    with shared_prefix(model, batch(), None) as inputs:
        assert inputs["input_ids"].shape == (5, 20)


@pytest.mark.parametrize("method", ["lora[r=2]", "prompt[length=4]"])
@pytest.mark.parametrize("gradients", [True, False])
def test_the_frozen_base_inside_the_block(method: str, gradients: bool) -> None:
    model = tiny("llama")
    adapter = shaken(model, method)
    whole = batch()
    with torch.set_grad_enabled(gradients):
        with adapter.disabled():
            base = model(**whole).logits[:, SHARED:]
        own = model(**whole).logits[:, SHARED:]
        needed = torch.zeros(5, 20).bool()
        needed[:, SHARED:] = True
        with shared_prefix(model, whole, needed) as inputs:
            assert inputs["input_ids"].shape == (5, 20 - SHARED)
            with adapter.disabled():
                torch.testing.assert_close(_seen(model(**inputs).logits, whole), _seen(base, whole))
            torch.testing.assert_close(_seen(model(**inputs).logits, whole), _seen(own, whole))


def _seen(logits: torch.Tensor, whole: dict[str, torch.Tensor]) -> torch.Tensor:
    return logits[whole["attention_mask"][:, SHARED:].bool()]


def test_other_inputs_inside_the_block_are_refused() -> None:
    model = tiny("llama")
    tt.attach(model, "lora[r=2]")
    with (
        shared_prefix(model, batch(), None),
        pytest.raises(tt.UserError, match="other inputs while a batch is packed"),
    ):
        model(input_ids=torch.ones(2, 3).long())


def test_models_that_look_both_ways_get_whole_rows() -> None:
    config = copy.deepcopy(tiny("llama").config)
    config.is_causal = False
    model: Any = type(tiny("llama"))(config)
    tt.attach(model, "lora[r=2]|prompt[length=2]")
    assert model.trimtab.sites.embeds[0].insert == "tokens"
    with shared_prefix(model, batch(), None) as inputs:
        assert inputs["input_ids"].shape == (5, 20)


def test_a_head_that_reads_the_last_token_before_the_padding_keeps_it() -> None:
    """Where padding is the token that ends a text, that is the last token of its text."""
    config = copy.deepcopy(tiny("llama").config)
    config.pad_token_id = config.eos_token_id = 2
    model = LlamaForSequenceClassification(config)
    tt.attach(model, "lora[r=2]")
    whole = {name: tensor for name, tensor in batch().items() if name != "labels"}
    whole["input_ids"][2, SHARED:] = 2
    whole["attention_mask"][2, SHARED + 1 :] = 0
    whole["input_ids"].masked_fill_(whole["attention_mask"] == 0, 2)
    plain = model(**whole).logits
    with shared_prefix(model, whole, None) as inputs:
        assert inputs["input_ids"].shape[1] == 20 - SHARED + 1
        torch.testing.assert_close(model(**inputs).logits, plain)


def test_noise_on_the_embeddings_has_whole_rows(tmp_path: Path) -> None:
    model = tiny("llama")
    adapter = tt.attach(model, "lora[r=2]")
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, neftune_noise_alpha=5.0)
    with tt.Trainer(model, args, adapter=adapter)._sharing(batch()) as inputs:
        assert inputs["input_ids"].shape == (5, 20)


def test_a_later_choice_of_attention_stays() -> None:
    model = tiny("llama")
    tt.attach(model, "lora[r=2]")
    model.set_attn_implementation("eager")
    with shared_prefix(model, batch(), None) as inputs:
        assert inputs["input_ids"].shape[1] < 20
    assert model.config._attn_implementation == "eager"
    tt.attach(model, "lora[r=2]", "second")
    assert model.config._attn_implementation == "eager"


def test_positions_as_labels_keep_their_whole_rows(tmp_path: Path) -> None:
    """Question answering: labels count tokens from a row's beginning."""
    model: Any = LlamaForQuestionAnswering(tiny("llama").config)
    adapter = tt.attach(model, "lora[r=2]")
    asked = {**batch(), "start_positions": torch.full((5,), 15), "end_positions": torch.full((5,), 17)}
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    losses = []
    for share in (True, False):
        trainer: Any = tt.Trainer(model, args, adapter=adapter, share=share)
        trainer.current_gradient_accumulation_steps = 1
        losses.append(trainer.training_step(model, dict(asked)))
    torch.testing.assert_close(losses[0], losses[1])


def test_nothing_is_left_behind() -> None:
    model = tiny("llama")
    adapter = tt.attach(model, "lora[r=2]")
    before = model.config._attn_implementation
    with shared_prefix(model, batch(), None):
        assert model.config._attn_implementation != before
    assert model.config._attn_implementation == before
    assert model.trimtab.shared is None
    assert not model.model.layers[0].self_attn.__dict__.keys() & {"trimtab_slot"}
    adapter.detach()

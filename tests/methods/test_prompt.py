"""Prompt tuning against concatenation by hand, on every family, and against peft's outputs for the same tensor."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import Phi3Config, Phi3ForCausalLM

import trimtab as tt
from tiny import CAUSAL, ENCODERS, SEQ2SEQ, VISION, inputs, output, tiny
from trimtab.arch import FAMILIES
from trimtab.lengths import fitting_length
from trimtab.methods.prompt import Prompt

P = 4


def _attached(family: str, dtype: torch.dtype = torch.float64) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(5)
    model = tiny(family, dtype)
    adapter = tt.attach(model, Prompt(length=P))
    tokens = dict(adapter.named_parameters())
    tokens = next(value for name, value in tokens.items() if name.endswith("tokens"))
    tokens.data.copy_(torch.randn_like(tokens))
    return model, tokens


def _rows(family: str, side: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    batch = inputs(family, length=9, dtype=torch.float64)
    mask = torch.ones(3, 9, dtype=torch.long)
    for row, missing in enumerate((0, 3, 6)):
        mask[row, slice(9 - missing, 9) if side == "right" else slice(0, missing)] = 0
    return {**batch, "input_ids": batch["input_ids"] * mask, "attention_mask": mask}, mask.bool()


def _by_hand_row(base: Any, ids: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of one row without padding: embeddings concatenated, virtual positions cut off. [n, vocabulary]"""
    embeds = torch.cat([tokens[None], base.get_input_embeddings()(ids[None])], dim=1)
    known = {} if base.config.model_type == "bloom" else {"position_ids": torch.arange(embeds.shape[1])[None]}
    return base(inputs_embeds=embeds, use_cache=False, **known).logits[0, P:]


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("side", ["left", "right"])
def test_causal_equals_concatenation(family: str, side: str) -> None:
    """Loss and gradient of the shared form are those of [P ; X], row by row, on either padding side."""
    model, tokens = _attached(family)
    base = tiny(family, torch.float64)
    if family in ("opt", "gpt2"):
        assert base.config.max_position_embeddings >= P + 9
    batch, real = _rows(family, side)
    expected = torch.cat([_by_hand_row(base, batch["input_ids"][row][real[row]], tokens) for row in range(3)])
    found = model(**batch, use_cache=False).logits[real]
    tolerance = (
        5e-6 if family == "gemma2" else 1e-6
    )  # rotary tables are float32, and at other positions in the two forms
    assert torch.allclose(found, expected, rtol=0, atol=tolerance)
    (given,) = torch.autograd.grad(found.pow(2).mean(), tokens)
    (wanted,) = torch.autograd.grad(expected.pow(2).mean(), tokens)
    assert torch.allclose(given, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_longrope_equals_concatenation(side: str) -> None:
    """Its rotary factors depend on the text's length, so the tokens are inserted; generation with the cache agrees."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    config = Phi3Config(
        **{**tiny("phi3").config.to_dict(), "original_max_position_embeddings": 10, "max_position_embeddings": 64},
    )
    config.rope_parameters = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 1.0, **factors}
    torch.manual_seed(0)
    base = Phi3ForCausalLM(config).double().eval()
    model = copy.deepcopy(base)
    adapter = tt.attach(model, Prompt(length=P))
    tokens = next(adapter.parameters())
    batch, real = _rows("phi3", side)
    embeds = torch.cat([tokens.expand(3, -1, -1), base.get_input_embeddings()(batch["input_ids"])], dim=1)
    mask = F.pad(batch["attention_mask"], (P, 0), value=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = base(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, P:]
    assert torch.allclose(model(**batch, use_cache=False).logits[real], expected[real], atol=1e-6)


@pytest.mark.parametrize("family", CAUSAL)
def test_virtual_tokens_run_once(family: str) -> None:
    """In the shared form the text's rows never get longer, and the virtual tokens are one row."""
    model, _ = _attached(family)
    shapes = []
    first = next(iter(model.trimtab.sites.layer_modules.values()))[0]
    first.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(args[0].shape[:2])), with_kwargs=True
    )
    output(model, inputs(family, dtype=torch.float64))
    assert shapes == ([(3, P + 9)] if family == "bloom" else [(1, P), (3, 9)])


def _encoder_by_hand(base: Any, ids: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The classifier's logits of one row, from the family's own pieces. [1, labels]"""
    body = base.base_model
    embeds = torch.cat([tokens[None], base.get_input_embeddings()(ids[None])], dim=1)
    return _classified(base, body(inputs_embeds=embeds).last_hidden_state[:, P:])


def _classified(base: Any, states: torch.Tensor) -> torch.Tensor:
    """The classifier's logits of states [1, n, width]. [1, labels]"""
    body = base.base_model
    if base.config.model_type == "roberta":
        return base.classifier(states)
    if base.config.model_type == "bert":
        return base.classifier(body.pooler(states))
    if base.config.model_type == "electra":
        return base.classifier(states)
    if base.config.model_type == "distilbert":
        return base.classifier(F.relu(base.pre_classifier(states[:, 0])))
    pooled = states.mean(1) if base.config.classifier_pooling == "mean" else states[:, 0]
    return base.classifier(base.head(pooled))


@pytest.mark.parametrize("family", ENCODERS)
def test_encoders_equal_concatenation(family: str) -> None:
    model, tokens = _attached(family)
    base = tiny(family, torch.float64)
    batch, real = _rows(family, "right")
    expected = torch.cat([_encoder_by_hand(base, batch["input_ids"][row][real[row]], tokens) for row in range(3)])
    assert torch.allclose(output(model, batch), expected, atol=1e-8)


@pytest.mark.parametrize("leads", [False, True])
@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "distilbert"])
def test_behind_the_embeddings_positions_and_norm(family: str, leads: bool) -> None:
    """The layers one by one over [P ; embeddings], row by row without padding; no position is taken."""
    torch.manual_seed(5)
    model, base = tiny(family, torch.float64), tiny(family, torch.float64)
    adapter = tt.attach(model, Prompt(length=P, leads=leads, at="states"))
    (tokens,) = (value for name, value in adapter.named_parameters() if name.endswith("tokens"))
    tokens.data.copy_(torch.randn_like(tokens))
    batch, real = _rows(family, "right")
    body = base.base_model
    layers = body.transformer.layer if family == "distilbert" else body.encoder.layer
    expected = []
    for row in range(3):
        states = torch.cat([tokens[None], body.embeddings(batch["input_ids"][row][real[row]][None])], dim=1)
        states = body.embeddings_project(states) if hasattr(body, "embeddings_project") else states
        for layer in layers:
            states = layer(states)
        expected.append(_classified(base, states if leads else states[:, P:]))
    found = output(model, batch)
    assert torch.allclose(found, torch.cat(expected), atol=1e-8)
    found.sum().backward()
    assert tokens.grad is not None and tokens.grad.abs().sum() > 0
    alone = {key: value[:1] for key, value in batch.items() if key != "attention_mask"}
    with torch.no_grad():
        assert torch.allclose(output(model, alone), found[:1], atol=1e-8)
        adapter.detach()
        assert torch.equal(output(model, batch), output(base, batch))


def test_behind_the_embeddings_a_start_is_that_of_words_in_front() -> None:
    torch.manual_seed(0)
    model = tiny("bert").train()
    words = tt.attach(model, Prompt(length=P)).state_dict()["embeds.tokens"]
    torch.manual_seed(0)
    other = tiny("bert").train()
    states = tt.attach(other, Prompt(length=P, at="states")).state_dict()["embeds.tokens"]
    embeddings = copy.deepcopy(tiny("bert").bert.embeddings).eval()
    assert torch.allclose(states, embeddings(inputs_embeds=words[None])[0], atol=1e-6)
    assert other.bert.embeddings.training


def test_behind_the_embeddings_a_text_keeps_all_positions() -> None:
    config = tiny("bert").config
    assert fitting_length(Prompt(length=P, at="states"), config, None) == config.max_position_embeddings
    assert fitting_length(Prompt(length=P), config, None) == config.max_position_embeddings - P


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"bert", "roberta", "electra", "distilbert"}))
def test_behind_the_embeddings_is_for_encoders_with_positions(family: str) -> None:
    with pytest.raises(tt.UserError, match="at=states is for encoders of texts"):
        tt.attach(tiny(family), "prompt[at=states]")


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoder_decoders_equal_concatenation(family: str) -> None:
    """The decoder attends to the virtual tokens as to ordinary ones."""
    model, tokens = _attached(family)
    base = tiny(family, torch.float64)
    batch, real = _rows(family, "right")
    found = output(model, batch)
    for row in range(3):
        ids = batch["input_ids"][row][real[row]]
        embeds = torch.cat([tokens[None], base.get_input_embeddings()(ids[None])], dim=1)
        expected = base(inputs_embeds=embeds, decoder_input_ids=batch["decoder_input_ids"][row : row + 1]).logits
        assert torch.allclose(found[row : row + 1], expected, atol=1e-8)


@pytest.mark.parametrize("family", ["vit", "dinov2"])
def test_vision_equals_concatenation(family: str) -> None:
    """Virtual tokens behind the class token give the same as in front of it: nothing but position tells them apart."""
    model, tokens = _attached(family)
    base = tiny(family, torch.float64)
    batch = inputs(family, dtype=torch.float64)
    body = base.base_model
    states = body.embeddings(batch["pixel_values"])
    states = torch.cat([states[:, :1], tokens.expand(3, -1, -1), states[:, 1:]], dim=1)
    for layer in body.layers if family == "vit" else body.encoder.layer:
        states = layer(states)
    states = body.layernorm(states)
    states = torch.cat([states[:, :1], states[:, 1 + P :]], dim=1)
    pooled = states[:, 0]
    if family == "dinov2":
        pooled = torch.cat([pooled, states[:, 1:].mean(1)], dim=1)
    assert torch.allclose(output(model, batch), base.classifier(pooled), atol=1e-8)


@pytest.mark.parametrize("family", ["whisper", "clip_vision_model"])
def test_whisper_and_clip_read_the_virtual_tokens(family: str) -> None:
    model, _ = _attached(family)
    base = tiny(family, torch.float64)
    batch = inputs(family, dtype=torch.float64)
    found, expected = output(model, batch), output(base, batch)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() > 1e-3
    assert family in (*SEQ2SEQ, *VISION)


def test_starts() -> None:
    """Sampled vocabulary, text, labels and noise: each start is what its name says."""
    model = tiny("llama")
    table = model.get_input_embeddings().weight.detach()

    class Words:
        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            assert not add_special_tokens
            return {"input_ids": [ord(letter) % 60 for letter in text]}

    def start(method: Prompt) -> torch.Tensor:
        adapter = tt.attach(model, method, tokenizer=Words(), labels=["yes", "no"])
        tokens = next(adapter.parameters()).detach().clone()
        adapter.detach()
        return tokens

    torch.manual_seed(0)
    assert all(any(torch.equal(row, known) for known in table) for row in start(Prompt(length=6)))
    text = start(Prompt(length=5, text="abc"))
    assert torch.equal(text, table[[ord(letter) % 60 for letter in "abcab"]])
    labels = start(Prompt(length=6, init="labels"))
    assert torch.allclose(labels[0], table[[ord(letter) % 60 for letter in "yes"]].mean(0))
    assert torch.allclose(labels[1], table[[ord(letter) % 60 for letter in "no"]].mean(0))
    noise = start(Prompt(length=50, init="random"))
    assert 0.8 < noise.std() / table.std() < 1.25


def test_gemma_starts_from_scaled_embeddings() -> None:
    model = tiny("gemma2")
    tt.attach(model, Prompt(length=6))
    tokens = next(tt.adapters(model)["default"].parameters())
    scaled = model.get_input_embeddings()(torch.arange(64))
    assert all(any(torch.allclose(row, known, atol=1e-6) for known in scaled) for row in tokens)


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        ("prompt[length=0]", "length=0"),
        ("prompt[init=text]", "text="),
        ("prompt[text=hello]", "needs a tokenizer"),
        ("prompt[init=labels]", "labels"),
        ("prompt[text=hello,init=random]", "init=random"),
    ],
)
def test_mistakes(method: str, sentence: str) -> None:
    model = tiny("llama")
    with pytest.raises(tt.UserError, match=sentence):
        tt.attach(model, method)
    assert not hasattr(model, "trimtab") and all(p.requires_grad for p in model.parameters())


def test_pictures_have_no_words() -> None:
    with pytest.raises(tt.UserError, match="reads no text"):
        tt.attach(tiny("vit"), "prompt[text=hello]")


def test_output_hidden_states_of_the_shared_form_have_no_virtual_positions() -> None:
    model, _ = _attached("llama")
    out = model(**inputs("llama", dtype=torch.float64), output_hidden_states=True)
    assert {tuple(state.shape[:2]) for state in out.hidden_states} == {(3, 9)}


def test_a_static_cache_is_refused_where_tokens_are_inserted() -> None:
    model, _ = _attached("bloom")
    batch = {key: value for key, value in inputs("bloom").items()}
    with pytest.raises(tt.UserError, match=r"static cache|4-D mask"):
        model.generate(**batch, max_new_tokens=2, cache_implementation="static", disable_compile=True, pad_token_id=0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_equals_peft(family: str) -> None:
    """The same virtual tokens in peft's prompt tuning give the same logits at the text's positions."""
    peft = pytest.importorskip("peft")
    model, tokens = _attached(family, torch.float32)
    batch = inputs(family)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    other = peft.get_peft_model(tiny(family), config)
    with torch.no_grad():
        other.prompt_encoder["default"].embedding.weight.copy_(tokens)
        expected = other(**batch).logits
        found = model(**batch).logits
    assert torch.allclose(found, expected[:, -found.shape[1] :], atol=1e-5)

"""The label-only head must be the plain loss: same value, same gradients, for every family, in float32 and float64."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from trimtab.head import align_labels, decoder_inputs, label_loss, label_only, select_positions, shifts_labels

COMMON = dict(vocab_size=61, pad_token_id=0, bos_token_id=1, eos_token_id=2)
SMALL = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    **COMMON,
)
GROUPED = dict(num_key_value_heads=2, head_dim=8, **SMALL)
T5_SIZES = dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, dropout_rate=0.0)
BART_SIZES = dict(
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    dropout=0.0,
    decoder_start_token_id=2,
)


def _configs() -> dict[str, tuple[type[PreTrainedModel], hf.PreTrainedConfig]]:
    return {
        "llama": (hf.LlamaForCausalLM, hf.LlamaConfig(**GROUPED)),
        "gemma2": (hf.Gemma2ForCausalLM, hf.Gemma2Config(final_logit_softcapping=1.5, **GROUPED)),
        "gemma3": (hf.Gemma3ForCausalLM, hf.Gemma3TextConfig(final_logit_softcapping=1.5, **GROUPED)),
        "gpt2": (
            hf.GPT2LMHeadModel,
            hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **COMMON),
        ),
        "gpt_neox": (hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig(**SMALL)),
        "opt": (hf.OPTForCausalLM, hf.OPTConfig(ffn_dim=48, word_embed_proj_dim=32, dropout=0.0, **SMALL)),
        "bloom": (hf.BloomForCausalLM, hf.BloomConfig(n_layer=2, n_head=4, **{**COMMON, "hidden_size": 32})),
        "t5": (hf.T5ForConditionalGeneration, hf.T5Config(**T5_SIZES, **COMMON)),
        "bart": (hf.BartForConditionalGeneration, hf.BartConfig(**BART_SIZES, **COMMON)),
        "bert": (hf.BertForMaskedLM, hf.BertConfig(hidden_dropout_prob=0, attention_probs_dropout_prob=0, **SMALL)),
    }


FAMILIES = sorted(_configs())


def tiny(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    cls, config = _configs()[family]
    torch.manual_seed(0)
    model = cls(config)
    with torch.no_grad():  # larger weights than the default init, so that soft-capping and gradients are felt
        for parameter in model.parameters():
            parameter.mul_(3.0)
        for name, buffer in model.named_buffers():
            if name.endswith("final_logits_bias"):
                buffer.normal_()
    return model.to(dtype).train()


def batch(model: PreTrainedModel) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 61, (3, 9), generator=generator)
    attention = torch.ones_like(ids)
    attention[0, 6:] = 0
    labels = ids.clone()
    labels[:, :4] = -100
    labels[0, 5:] = -100
    if model.config.is_encoder_decoder:
        labels = torch.randint(3, 61, (3, 5), generator=generator)
        labels[1, 3:] = -100
    return {"input_ids": ids, "attention_mask": attention}, labels


def forward_inputs(model: PreTrainedModel, inputs: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
    if model.config.is_encoder_decoder:
        return {**inputs, "decoder_input_ids": decoder_inputs(model, labels)}
    return inputs


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def head_loss(model: PreTrainedModel, inputs: dict[str, Tensor], labels: Tensor, num_items=None) -> Tensor:
    with label_only(model, labels) as targets:
        logits = model(**forward_inputs(model, inputs, labels), use_cache=False).logits
    assert logits.shape[:2] == (1, targets.numel())
    return label_loss(logits, targets, num_items)


def assert_close(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float) -> None:
    assert left.keys() == right.keys()
    scale = max(float(g.abs().max()) for g in left.values())
    for name in left:
        worst = float((left[name] - right[name]).abs().max())
        assert worst <= tolerance * scale, f"{name}: {worst} against a largest gradient of {scale}"


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_the_models_own(family: str) -> None:
    model = tiny(family)
    inputs, labels = batch(model)
    plain = model(**inputs, labels=labels).loss
    plain_gradients = gradients(model, plain)
    ours = head_loss(model, inputs, labels)
    assert abs(ours.item() - plain.item()) <= 2e-6 * max(1.0, plain.item())
    assert_close(plain_gradients, gradients(model, ours), 5e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_in_double_precision(family: str) -> None:
    model = tiny(family, torch.float64)
    inputs, labels = batch(model)
    logits = model(**forward_inputs(model, inputs, labels)).logits.double()
    targets = align_labels(model, labels)
    plain = F.cross_entropy(logits.reshape(-1, 61), targets.reshape(-1))
    plain_gradients = gradients(model, plain)
    ours = head_loss(model, inputs, labels)
    # gemma's soft-capping and norms, bloom's alibi compute parts in float32 whatever the model's type
    tolerance = 1e-12 if ours.dtype == torch.float64 and family not in ("gemma2", "gemma3", "bloom") else 1e-6
    assert abs(ours.item() - plain.item()) <= tolerance * max(1.0, plain.item())
    assert_close(plain_gradients, gradients(model, ours), tolerance)


@pytest.mark.parametrize("family", ["llama", "gemma2", "t5"])
def test_gradient_checkpointing_changes_nothing(family: str) -> None:
    model = tiny(family)
    inputs, labels = batch(model)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    plain = gradients(model, model(**inputs, labels=labels, use_cache=False).loss)
    assert_close(plain, gradients(model, head_loss(model, inputs, labels)), 5e-6)


def test_a_batch_without_labels_has_loss_zero_and_a_graph() -> None:
    model = tiny("llama")
    inputs, labels = batch(model)
    loss = head_loss(model, inputs, torch.full_like(labels, -100))
    assert loss.item() == 0.0
    found = gradients(model, loss)
    assert found and all(bool((g == 0).all()) for g in found.values())


def test_pieces_of_a_batch_weighted_by_labels_add_up_to_the_whole() -> None:
    model = tiny("llama")
    inputs, labels = batch(model)
    whole = gradients(model, head_loss(model, inputs, labels))
    count = int((labels[:, 1:] != -100).sum())
    model.zero_grad(set_to_none=True)
    for row in range(3):
        piece = {name: value[row : row + 1] for name, value in inputs.items()}
        head_loss(model, piece, labels[row : row + 1], num_items=count).backward()
    pieces = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_close(whole, pieces, 5e-6)


def test_the_hook_is_gone_after_the_block_and_after_an_exception() -> None:
    model = tiny("gpt2")
    inputs, labels = batch(model)
    head_loss(model, inputs, labels)
    assert not model.lm_head._forward_pre_hooks
    with pytest.raises(RuntimeError, match="on purpose"), label_only(model, labels):
        raise RuntimeError("on purpose")
    assert not model.lm_head._forward_pre_hooks
    assert model(**inputs).logits.shape == (3, 9, 61)


def test_shapes_that_disagree_and_models_without_a_vocabulary_are_refused() -> None:
    model = tiny("llama")
    inputs, labels = batch(model)
    with pytest.raises(ValueError, match="labels have shape"), label_only(model, labels[:, :-1]):
        model(**inputs)
    classifier = hf.BertForSequenceClassification(hf.BertConfig(**SMALL))
    with pytest.raises(ValueError, match="no output embeddings"), select_positions(classifier, labels != -100):
        pass


def test_which_models_shift() -> None:
    assert {family for family in FAMILIES if not shifts_labels(tiny(family))} == {"t5", "bart", "bert"}


def test_half_precision_logits_are_widened_for_the_loss() -> None:
    logits = torch.randn(1, 4, 7, dtype=torch.bfloat16)
    loss = label_loss(logits, torch.tensor([1, 2, 3, 4]))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(logits[0].float(), torch.tensor([1, 2, 3, 4])))

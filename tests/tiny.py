"""Tiny random models of every family, made from configs; float64 where a test compares with a reference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers as tf
from transformers import PreTrainedModel

import trimtab as tt

VOCABULARY, WIDTH, LAYERS = 64, 32, 3
PAD = 0

_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ENCODER = {key: value for key, value in _DECODER.items() if key not in ("num_key_value_heads", "head_dim")}
_VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
}
_SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}

_MAKE: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_DECODER)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**_DECODER, sliding_window=5)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**_DECODER)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_DECODER)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(
        tf.Gemma2Config(
            **_DECODER,
            sliding_window=5,
            query_pre_attn_scalar=8,
            attn_logit_softcapping=2.0,
            attn_implementation="eager",  # the only one that caps, and the default of newer versions
        )
    ),
    "gemma3_text": lambda: tf.Gemma3ForCausalLM(
        tf.Gemma3TextConfig(
            **_DECODER,
            sliding_window=5,
            query_pre_attn_scalar=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
    ),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**_DECODER)),
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=64,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=4,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
    "gpt_neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**_ENCODER)),
    "opt": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            ffn_dim=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=16,
            pad_token_id=PAD,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
    "bloom": lambda: tf.BloomForCausalLM(
        tf.BloomConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, n_layer=LAYERS, n_head=4, pad_token_id=PAD)
    ),
    "bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**_ENCODER)),
    "roberta": lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**_ENCODER)),
    "distilbert": lambda: tf.DistilBertForSequenceClassification(
        tf.DistilBertConfig(
            vocab_size=VOCABULARY, dim=WIDTH, hidden_dim=48, n_layers=LAYERS, n_heads=4, max_position_embeddings=64
        )
    ),
    "electra": lambda: tf.ElectraForSequenceClassification(tf.ElectraConfig(**_ENCODER, embedding_size=16)),
    "modernbert": lambda: tf.ModernBertForSequenceClassification(
        tf.ModernBertConfig(**_ENCODER, cls_token_id=1, sep_token_id=2, local_attention=8)
    ),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(
            vocab_size=VOCABULARY,
            d_model=WIDTH,
            d_kv=8,
            d_ff=48,
            num_layers=LAYERS,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=PAD,
        )
    ),
    "bart": lambda: tf.BartForConditionalGeneration(tf.BartConfig(**_SEQ2SEQ, max_position_embeddings=64)),
    "whisper": lambda: tf.WhisperForConditionalGeneration(
        tf.WhisperConfig(**_SEQ2SEQ, max_source_positions=16, max_target_positions=64, num_mel_bins=8)
    ),
    "vit": lambda: tf.ViTForImageClassification(tf.ViTConfig(**_VISION)),
    "dinov2": lambda: tf.Dinov2ForImageClassification(
        tf.Dinov2Config(**{key: value for key, value in _VISION.items() if key != "intermediate_size"})
    ),
    "clip": lambda: tf.CLIPForImageClassification(tf.CLIPConfig(vision_config=_VISION, text_config=_ENCODER)),
    "clip_vision_model": lambda: tf.CLIPVisionModel(tf.CLIPVisionConfig(**_VISION)),
}

CAUSAL = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox", "opt", "bloom")
ENCODERS = ("bert", "roberta", "distilbert", "electra", "modernbert")
SEQ2SEQ = ("t5", "bart", "whisper")
VISION = ("vit", "dinov2", "clip", "clip_vision_model")
FAMILIES = tuple(_MAKE)


@cache
def _made(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = _MAKE[family]().eval()
    for parameter in model.parameters():  # away from the symmetric start: biases and norms get values too
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def tiny(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A fresh tiny model of a family in eval mode; the same weights every time."""
    return copy.deepcopy(_made(family)).to(dtype)


def attached(family: str, method: str) -> Any:
    """An adapter on a tiny model, away from its start."""
    adapter = tt.attach(tiny(family), method)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return adapter


def inputs(family: str, batch: int = 3, length: int = 9, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A batch without padding that the family's model takes."""
    generator = torch.Generator().manual_seed(1)
    if family in VISION:
        return {"pixel_values": torch.randn(batch, 3, 8, 8, generator=generator).to(dtype)}
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    decoder_ids = torch.randint(3, VOCABULARY, (batch, 5), generator=generator)
    if family == "whisper":
        features = torch.randn(batch, 8, 32, generator=generator).to(dtype)
        return {"input_features": features, "decoder_input_ids": decoder_ids}
    if family in SEQ2SEQ:
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": decoder_ids}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def output(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits, or the last hidden state of a model without a head."""
    out = model(**batch)
    return out.logits if "logits" in out else out.last_hidden_state

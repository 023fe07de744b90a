"""Tiny encoders of every family with a WordPiece tokenizer: a letter a token, `[CLS] a [SEP] b [SEP]` for pairs."""

from __future__ import annotations

import string
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

CHINESE = "我爱北京天安门小明住在上海他很高兴的这个好坏"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
LETTERS = [*string.ascii_lowercase, *string.digits, *"?.:,-"]
VOCABULARY = [*SPECIAL, *LETTERS, *(f"##{letter}" for letter in LETTERS), *sorted(set(CHINESE))]
SIZES: dict[str, Any] = dict(vocab_size=len(VOCABULARY), pad_token_id=0)
SMALL: dict[str, Any] = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    **SIZES,
)
CONFIGS = {
    "bert": lambda: hf.BertConfig(**SMALL),
    "roberta": lambda: hf.RobertaConfig(**SMALL, type_vocab_size=1),
    "electra": lambda: hf.ElectraConfig(**SMALL, embedding_size=16),
    "distilbert": lambda: hf.DistilBertConfig(
        dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=64, **SIZES
    ),
    "modernbert": lambda: hf.ModernBertConfig(
        **SMALL, cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3, local_attention=8
    ),
}


@cache
def wordpiece() -> Any:
    """A tokenizer that never says [UNK] of lower-case words."""
    inner = Tokenizer(models.WordPiece({token: at for at, token in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner, model_input_names=inputs, **names)


def saved_encoder(folder: Path, family: str = "bert") -> str:
    """A masked language model (without pooler and task head) and its tokenizer in a folder."""
    torch.manual_seed(0)
    model = hf.AutoModelForMaskedLM.from_config(CONFIGS[family]())
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    wordpiece().save_pretrained(folder)
    return str(folder)

"""Small models for the side method: folders with models of other width, depth and heads than the tiny ones.

Knows transformers' configurations; nothing of trimtab.
"""

from __future__ import annotations

import atexit
import copy
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers as tf

from tiny import tiny

SMALL_WIDTH, SMALL_LAYERS = 16, 2
_FOLDER = Path(tempfile.mkdtemp(prefix="trimtab-small-"))
atexit.register(shutil.rmtree, _FOLDER, ignore_errors=True)


@cache
def small_model(family: str, width: int = SMALL_WIDTH, **changes: Any) -> str:
    """The folder of a small model without a head; `changes` are of its configuration."""
    config = copy.deepcopy(tiny(family).config)
    config = getattr(config, "vision_config", config)
    own = {"hidden_size": width, "num_hidden_layers": SMALL_LAYERS, "num_attention_heads": 2, **changes}
    if family == "opt":
        own["word_embed_proj_dim"] = width // 2
    if getattr(config, "layer_types", None):
        own["layer_types"] = config.layer_types[:SMALL_LAYERS]
    if family == "dinov2":  # whose configuration names its layers
        own.pop("num_hidden_layers")
    for name, value in own.items():
        setattr(config, name, value)
    torch.manual_seed(7)
    model = tf.AutoModel.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    folder = _FOLDER / f"{family}-{len(list(_FOLDER.iterdir()))}"
    model.save_pretrained(folder)
    return str(folder)

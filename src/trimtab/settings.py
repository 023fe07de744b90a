"""What one training run is made of. Knows names, defaults and meanings; refuses to know how anything is done."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PLACES = ("model", "data", "eval_data", "output", "cache")
"""Settings that may be paths; a ~ at their beginning is the home folder."""


@dataclass(frozen=True)
class TrainSettings:
    """The settings of `trimtab train` and `fine_tune`; None means that the run chooses."""

    model: str
    """Base model: a hub id, a folder, a .gguf file, or pkg:NAME/path inside an installed package."""
    data: str
    """Training data: a .jsonl, .json, .csv, .tsv or .parquet file, a folder of pictures, pkg:NAME/path, or a hub id."""
    output: str
    """Folder to write the adapter and its report into."""
    method: Any = "lora"
    """What to train: a method string such as 'lora[r=8]', or a method object."""
    task: str = "classify"
    """classify, regress, tag, span, choose or generate."""
    text_column: str | None = None
    """Column that holds the text, the words or the question; nested keys as input.-1.content."""
    context_column: str | None = None
    """Column that holds the text in which a question's answer stands (task span)."""
    image_column: str | None = None
    """Column that holds the pictures: paths (from the data file's folder), bytes, or images of `datasets`."""
    label_column: str | None = None
    """Column that holds the label, the number, the tags or the answer."""
    choices_column: str | None = None
    """Column that holds a list of choices to choose from, or one column a choice: a,b,c."""
    stage_column: str | None = None
    """Column that tags a row caption or instruction, for disjoint training of a method that looks at pictures."""
    label_words: Mapping[str, str] | None = None
    """What a language model says for each label, e.g. 0=no,1=yes."""
    template: str | None = None
    """Text around a row's values: columns in braces, {p*N} for pseudo tokens, {mask} for a masked model's answer."""
    chat: bool = False
    """Put the filled template into the model's chat template as the user's turn."""
    epochs: float = 3.0
    """Passes over the training data."""
    lr: float | None = None
    """Learning rate; by default the method's own."""
    batch_size: int | None = None
    """Rows in a batch; instead of batch_tokens."""
    batch_tokens: int | None = None
    """Tokens in a batch of rows of like length, padding included; by default 16 rows (a search: 64) of mean length."""
    max_length: int | None = None
    """Tokens a row may have (longer texts are cut, never labels); by default 512, or fewer if the model has fewer."""
    limit: int | None = None
    """Train on a random sample of at most this many rows."""
    eval_data: str | None = None
    """Data to evaluate on; instead of eval_share."""
    eval_share: float = 0.1
    """Share of the data held out for evaluation."""
    eval_limit: int | None = 1000
    """Evaluate on a random sample of at most this many of the held-out rows."""
    max_new_tokens: int | None = None
    """Tokens that are generated at most; by default, in evaluation, as many as the longest answer has."""
    num_beams: int = 1
    """Beams of the search for a text; 1 is greedy."""
    length_penalty: float = 1.0
    """Beams are ranked by log p / length^this; more than 0 favours long texts."""
    no_repeat_ngram_size: int = 0
    """Length of the n-grams that no generated text may repeat; 0 allows all."""
    seed: int = 0
    """Seed of everything random."""
    name: str = "default"
    """The adapter's name."""
    resume: bool = False
    """Go on from the last checkpoint in the output folder."""
    overwrite: bool = False
    """Replace results that the output folder has."""
    gradient_accumulation: int = 1
    """Batches whose gradients make one optimizer step."""
    gradient_checkpointing: bool = False
    """Save memory by computing activations twice."""
    loss_per: str = "token"
    """What a step's loss is the mean over: token, or sentence (the sum over a row's target tokens)."""
    warmup: float = 0.06
    """Share of the steps over which the learning rate rises before it falls linearly."""
    weight_decay: float = 0.0
    """AdamW's weight decay; never on biases and norms."""
    dtype: str = "float32"
    """Type of the base's weights: float32, bfloat16, float16 or auto; trained tensors are float32."""
    save_steps: int | None = None
    """Optimizer steps between checkpoints; by default a tenth of the run (of a whole model: an epoch)."""
    cache: str | None = None
    """Folder that keeps what the frozen lower layers give, for later runs; by default it is kept in memory."""
    cache_memory: float = 2.0
    """Gigabytes of memory for it, a temporary file takes the rest; 0 keeps nothing."""
    report_to: str = "none"
    """Where else to log, as transformers names it: tensorboard, wandb, …"""

    def __post_init__(self) -> None:
        for name in PLACES:
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, os.path.expanduser(value))

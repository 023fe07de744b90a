"""How good a model is at a task, and what it answers. Knows whom to ask (tasks say how answers are scored, scoring.py
runs the model over them); refuses to know training, methods and files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trimtab.beams import GREEDY, Search
from trimtab.metrics import classification_metrics
from trimtab.scoring import LONGEST_ANSWER, Run
from trimtab.text_metrics import corpus_bleu

__all__ = ["BATCH_TOKENS", "LONGEST_ANSWER", "classification_metrics", "corpus_bleu", "evaluate", "predict"]

BATCH_TOKENS = 2048
"""Tokens a batch holds by default; no gradients are kept, so it may be larger than in training."""


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Any,
    examples: Sequence[Any],
    kind: str,
    *,
    batch_tokens: int = BATCH_TOKENS,
    max_new_tokens: int | None = None,
    search: Search = GREEDY,
    show: bool | None = None,
) -> dict[str, float]:
    """The task's metrics on labelled examples, and their number as `examples`.

    classify: accuracy, macro_f1, mcc, loss. regress: pearson, spearman, mse, loss. tag: accuracy, entity_f1 (or
    macro_f1), loss. span: exact_match, f1, loss. choose: accuracy, loss. generate: loss, perplexity, and the
    text_metrics (bleu, nist, …) of what `search` finds, at most `max_new_tokens` long, by default as long as the
    longest answer. Losses are nats per answer token, of all references (per example or tag for an encoder), of
    numbers the squared error. `show` turns the progress bar on or off. The model's training mode is put back.
    """
    run = Run(model, tokenizer, kind, batch_tokens, show, search)
    return {**task.score(run, examples, max_new_tokens), "examples": len(examples)}


def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Any,
    examples: Sequence[Any],
    kind: str,
    *,
    batch_tokens: int = BATCH_TOKENS,
    max_new_tokens: int = LONGEST_ANSWER,
    search: Search = GREEDY,
    show: bool | None = None,
) -> list[str]:
    """What the model answers to each example, labelled or not.

    The label (classify), the number (regress), a line with word and tag for each word (tag), the choice (choose),
    the piece of the context (span) or the text (generate).
    """
    return task.answers(Run(model, tokenizer, kind, batch_tokens, show, search), examples, max_new_tokens)

"""The vocabulary projection only where a label is. Knows hidden states and label positions; refuses to know
families, methods and training loops.

The projection to the vocabulary is a fifth of a small model's work, and most of it is thrown away: positions whose
next token carries no label add nothing to the loss. A hook in front of the output embeddings keeps the other positions
and nothing else, so whatever the model does to its logits afterwards (soft-capping, scaling, a bias) still happens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from trimtab.examples import IGNORED


@contextmanager
def select_positions(model: PreTrainedModel, mask: Tensor) -> Iterator[None]:
    """Inside the block the model's logits are [1, N, V]: those of the N positions where `mask` is true.

    `mask` is bool [B, n], n the length of the hidden states that reach the output embeddings; rows come out in
    row-major order. Raises ValueError for a model without output embeddings, or if the shapes disagree.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(
            f"{type(model).__name__} has no output embeddings, so there is no vocabulary projection to cut"
        )
    handle = head.register_forward_pre_hook(_Gather(mask))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def label_only(model: PreTrainedModel, labels: Tensor) -> Iterator[Tensor]:
    """Inside the block the model computes logits [1, N, V] for the N labelled positions; gives their targets [N].

    `labels` is [B, n] with -100 where there is none. A causal model predicts the next token, so position i is kept
    if labels[:, i + 1] is set; encoder-decoder and masked models are not shifted. Call the model without `labels`
    and hand its logits and the targets to `label_loss`. With no label at all the logits are [1, 0, V].
    """
    aligned = align_labels(model, labels)
    mask = aligned != IGNORED
    with select_positions(model, mask):
        yield aligned[mask]


def label_loss(logits: Tensor, targets: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """The cross-entropy of logits [..., V] and targets [N], in nats, at least float32; -100 targets count nothing.

    The mean over the labelled tokens, or with `num_items` their sum over it: the share of a batch that was cut into
    pieces for gradient accumulation. Without any label it is 0 with a graph, never NaN.
    """
    wide = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
    targets = targets.flatten().to(wide.device)
    total = F.cross_entropy(wide, targets, ignore_index=IGNORED, reduction="sum") if targets.numel() else wide.sum()
    count = (targets != IGNORED).sum() if num_items is None else torch.as_tensor(num_items, device=wide.device)
    return total / count.clamp(min=1)


def align_labels(model: PreTrainedModel, labels: Tensor) -> Tensor:
    """Labels [B, n] moved to the position that predicts them."""
    if not shifts_labels(model):
        return labels
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def shifts_labels(model: PreTrainedModel) -> bool:
    """Whether position i of this model predicts token i + 1 (transformers' own rule for its losses)."""
    loss_type = getattr(model, "loss_type", None) or "ForCausalLM"  # GPT2LMHeadModel and its like have no loss type
    return LOSS_MAPPING.get(loss_type) is ForCausalLMLoss and not model.config.is_encoder_decoder


def decoder_inputs(model: PreTrainedModel, labels: Tensor) -> Tensor:
    """The decoder's input tokens [B, n] for target tokens [B, n] of an encoder-decoder model: shifted right by one."""
    prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if prepare is not None:
        return prepare(labels=labels)
    config: Any = model.config
    shifted = F.pad(labels[:, :-1], (1, 0), value=config.decoder_start_token_id)
    return shifted.masked_fill(shifted == IGNORED, config.pad_token_id)


class _Gather:
    """The hook: hidden states [B, n, d] to the chosen [1, N, d]."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = args
        if hidden.shape[:-1] != self.mask.shape:
            raise ValueError(
                f"labels have shape {tuple(self.mask.shape)} but the hidden states are {tuple(hidden.shape)}"
            )
        rows = self.mask.flatten().nonzero().squeeze(1).to(hidden.device)  # [N]
        return (hidden.flatten(0, 1).index_select(0, rows).unsqueeze(0), *rest)

"""What a batch's labels ask of a model: of which logits, over how many labels, which loss. Knows the shapes of labels
and transformers' classes; refuses to know tasks, methods and the training loop.

    labels               logits                 loss
    [B] classes          [B, classes]           cross-entropy
    [B] choices          [B, choices]           cross-entropy; the choices that a row lacks have no probability
    [B, n] tags          [B, n, tags]           cross-entropy
    [B, n] tokens        [B, n, vocabulary]     cross-entropy, projected where a label is and nowhere else
    [B, 2] places        2 × [B, n]             cross-entropy of a span's first and last token
    [B] numbers          [B, 1]                 squared error

Each is the mean over the labels, or their sum over the number of labels that the whole optimizer step has, so batches
of any sizes weigh what their labels weigh. Per sentence it is their sum over the step's rows with a label.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from trimtab.chunks import Chunks, chunk_size, hidden_only
from trimtab.consistency import consistency_loss, squared_difference
from trimtab.head import IGNORED, align_labels, decoder_inputs, label_loss, label_only


class Objective(Protocol):
    """What is learned from one kind of labels."""

    def labelled(self, base: PreTrainedModel, labels: Tensor) -> Tensor:
        """Which labels enter the loss: bool, of the labels' shape."""

    def forward(self, model: Any, base: PreTrainedModel, inputs: dict[str, Any], everywhere: bool) -> Found:
        """The model's outputs for inputs without their labels. `everywhere` asks for all logits in the outputs."""

    def loss(self, logits: Any, targets: Tensor, num_items: Tensor | int | None) -> Tensor:
        """The loss of logits and targets as `forward` gives them."""

    def divergence(self, first: Any, second: Any, num_items: Tensor | int | None) -> Tensor:
        """How far two forwards' logits are apart, in the loss's own measure."""


Found = tuple[Any, Any, Tensor]
"""A model's outputs, the logits that have a target (or what stands for them), the targets."""


def objective_of(base: PreTrainedModel, inputs: dict[str, Any]) -> Objective | None:
    """What is learned from a batch; None for what is left to transformers (several labels a row, …)."""
    labels = inputs.get("labels")
    if labels is None or "start_positions" in inputs:
        return None
    numbers, classes = labels.is_floating_point(), getattr(base.config, "num_labels", 2)
    if labels.dim() == 1 and numbers:
        return Numbers() if classes == 1 else None
    if labels.dim() == 1:
        return Classes() if classes > 1 or chooses(inputs) else None
    if labels.dim() != 2 or numbers or "input_ids" not in inputs:
        return None
    if base.get_output_embeddings() is not None:
        return Tokens()
    known: dict[str, Objective] = {"ForTokenClassification": Tags(), "ForQuestionAnswering": Places()}
    return known.get(base.loss_type)


class Classes:
    """Which class a whole input has, or which of its choices is right."""

    loss = staticmethod(label_loss)
    divergence = staticmethod(consistency_loss)

    def labelled(self, base: PreTrainedModel, labels: Tensor) -> Tensor:
        """The rows with a label."""
        return labels != IGNORED

    def forward(self, model: Any, base: PreTrainedModel, inputs: dict[str, Any], everywhere: bool) -> Found:
        """Logits [B, classes], targets [B]."""
        outputs = whole_inputs(model, base, _without_labels(inputs))
        return outputs, outputs.logits, inputs["labels"]


class Tags:
    """Which tag each labelled token has."""

    loss = staticmethod(label_loss)
    divergence = staticmethod(consistency_loss)

    def labelled(self, base: PreTrainedModel, labels: Tensor) -> Tensor:
        """The labelled tokens."""
        return labels != IGNORED

    def forward(self, model: Any, base: PreTrainedModel, inputs: dict[str, Any], everywhere: bool) -> Found:
        """Logits [N, tags], targets [N]."""
        outputs = model(**_without_labels(inputs))
        labelled = inputs["labels"] != IGNORED
        return outputs, outputs.logits[labelled], inputs["labels"][labelled]


class Places:
    """Which token is the first and which the last of a span."""

    loss = staticmethod(label_loss)
    divergence = staticmethod(consistency_loss)

    def labelled(self, base: PreTrainedModel, labels: Tensor) -> Tensor:
        """Both ends of the rows that have them."""
        return labels != IGNORED

    def forward(self, model: Any, base: PreTrainedModel, inputs: dict[str, Any], everywhere: bool) -> Found:
        """Logits [2 B, n], targets [2 B]; padding has no probability."""
        outputs, logits = places(model, base, _without_labels(inputs))
        return outputs, logits.flatten(0, 1), inputs["labels"].flatten()


def places(model: Any, base: PreTrainedModel, inputs: dict[str, Any]) -> tuple[Any, Tensor]:
    """The outputs, and logits [B, 2, n] for a span's first and last token, the smallest there are at padding."""
    outputs = model(**_segments(base, inputs))
    logits = torch.stack([outputs.start_logits, outputs.end_logits], dim=1)
    return outputs, logits.masked_fill(inputs["attention_mask"][:, None] == 0, torch.finfo(logits.dtype).min)


class Tokens:
    """Which token of the vocabulary stands at each labelled position; many are projected in chunks (chunks.py)."""

    def labelled(self, base: PreTrainedModel, labels: Tensor) -> Tensor:
        """The labelled positions."""
        return align_labels(base, labels) != IGNORED

    def forward(self, model: Any, base: PreTrainedModel, inputs: dict[str, Any], everywhere: bool) -> Found:
        """Logits [1, N, V] or what stands for them, targets [N]; `everywhere` logits [B, n, V], targets [B, n]."""
        labels, rest = inputs["labels"], {**_without_labels(inputs), "use_cache": False}
        if base.config.is_encoder_decoder and "decoder_input_ids" not in rest:
            rest["decoder_input_ids"] = decoder_inputs(base, labels)
        if everywhere:
            outputs = model(**rest)
            return outputs, outputs.logits, align_labels(base, labels)
        mask = self.labelled(base, labels)
        size = chunk_size(base, int(mask.sum()))
        if size is None:
            with label_only(base, labels) as targets:
                outputs = model(**rest)
            return outputs, outputs.logits, targets
        with hidden_only(base, mask) as hidden:
            outputs = model(**rest)
        return outputs, Chunks(base, hidden[0], size), align_labels(base, labels)[mask]

    def loss(self, logits: Tensor | Chunks, targets: Tensor, num_items: Tensor | int | None) -> Tensor:
        """The cross-entropy."""
        return logits.loss(targets, num_items) if isinstance(logits, Chunks) else label_loss(logits, targets, num_items)

    def divergence(self, first: Tensor | Chunks, second: Tensor | Chunks, num_items: Tensor | int | None) -> Tensor:
        """The symmetric Kullback-Leibler divergence."""
        whole = [logits.whole() if isinstance(logits, Chunks) else logits for logits in (first, second)]
        return consistency_loss(whole[0], whole[1], num_items)


class Numbers:
    """Which number a whole input has: Σ (ŷ − y)² over the rows' number."""

    divergence = staticmethod(squared_difference)

    def labelled(self, base: PreTrainedModel, labels: Tensor) -> Tensor:
        """All rows."""
        return torch.ones_like(labels, dtype=torch.bool)

    def forward(self, model: Any, base: PreTrainedModel, inputs: dict[str, Any], everywhere: bool) -> Found:
        """Logits [B], targets [B]."""
        outputs = model(**_without_labels(inputs))
        return outputs, outputs.logits.squeeze(-1), inputs["labels"]

    def loss(self, logits: Tensor, targets: Tensor, num_items: Tensor | int | None) -> Tensor:
        """The squared error, at least float32."""
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total = F.mse_loss(wide, targets.to(wide), reduction="sum")
        return total / (max(1, targets.numel()) if num_items is None else num_items)


PER = ("token", "sentence")
"""What a step's loss is the mean over: its labels, or its rows with a label (of classes and numbers the same)."""


def count(objective: Objective, base: PreTrainedModel, labels: Tensor, per: str) -> Tensor:
    """How many labels, or rows with a label, a batch's loss is the mean over."""
    found = objective.labelled(base, labels)
    if per == "sentence":
        found = found.flatten(1).any(1) if found.dim() > 1 else found
    return found.sum()


def chooses(inputs: dict[str, Any]) -> bool:
    """Whether a batch offers choices: input_ids [B, choices, n]."""
    ids = inputs.get("input_ids")
    return ids is not None and ids.dim() == 3


def whole_inputs(model: Any, base: PreTrainedModel, inputs: dict[str, Any]) -> Any:
    """The outputs for whole inputs; of a batch of choices, logits [B, choices] that leave out what a row lacks.

    A choice that a row lacks is all padding. It reads one token all the same, because attention to nothing is no
    number on every device, and its logit becomes the smallest there is: its probability and its gradient are 0.
    """
    if not chooses(inputs):
        return model(**inputs)
    mask = inputs["attention_mask"]  # [B, choices, n]
    real = mask.any(-1)
    first = torch.zeros_like(mask)
    first[..., 0] = 1
    inputs = {**inputs, "attention_mask": torch.where(real[..., None], mask, first)}
    outputs = model(**_segments(base, inputs))
    outputs["logits"] = outputs.logits.masked_fill(~real, torch.finfo(outputs.logits.dtype).min)
    return outputs


def _segments(base: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs without token types where the model has none: its tokenizer may tell segments all the same."""
    if getattr(base.config, "type_vocab_size", 1) > 1:
        return inputs
    return {key: value for key, value in inputs.items() if key != "token_type_ids"}


def _without_labels(inputs: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in inputs.items() if key != "labels"}

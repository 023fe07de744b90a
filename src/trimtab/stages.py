"""Disjoint training: rows of a tag train some of an adapter's tensors and rows of another tag the others. Knows tags,
parts and batches; refuses to know methods and losses.

Gao et al. 2023, LLaMA-Adapter V2, arXiv:2304.15010: captions of pictures train what looks at pictures and the layers
that see it, instructions the other prompts and gates, norms, biases and scales, so that neither spoils the other. The
loss of an optimizer step stays the mean over all of its target tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.adapter import Adapter
from trimtab.errors import UserError, unknown

STAGES = ("caption", "instruction")
NAME = "stages"
"""The key of a batch's tags, one a row; None for a row that trains everything."""


def stage_of(value: object) -> str | None:
    """A row's tag; None where there is none. Raises UserError for another word."""
    text = "" if value is None else str(value).strip().lower()
    if text and text not in STAGES:
        raise unknown("stage", text, STAGES)
    return text or None


def check_stages(adapter: Adapter) -> None:
    """Raises UserError where one of the tags would train nothing."""
    for stage in STAGES:
        if not any(True for _ in _tensors(adapter, stage)):
            raise UserError(
                f"rows tagged {stage} would train nothing of {adapter.method.name}; disjoint training needs layers "
                "that see the picture and others that do not: llama-adapter[image=ENCODER,image_layers=0:4,…]"
            )


@contextmanager
def training_only(adapter: Adapter, stage: str | None) -> Iterator[None]:
    """Inside, only the tensors that rows of this tag train take part in gradients."""
    others = [one for other in STAGES if stage and other != stage for one in _tensors(adapter, other)]
    frozen = [tensor for tensor in others if tensor.requires_grad]
    for tensor in frozen:
        tensor.requires_grad_(False)
    try:
        yield
    finally:
        for tensor in frozen:
            tensor.requires_grad_(True)


def by_stage(inputs: dict[str, Any]) -> list[tuple[str | None, dict[str, Any]]]:
    """A batch taken apart by its rows' tags; without tags, the batch itself."""
    if NAME not in inputs:
        return [(None, inputs)]
    tags, rest = inputs[NAME], {name: value for name, value in inputs.items() if name != NAME}
    groups = {tag: [row for row, other in enumerate(tags) if other == tag] for tag in dict.fromkeys(tags)}
    return [
        (tag, {name: _rows(value, rows, len(tags)) for name, value in rest.items()}) for tag, rows in groups.items()
    ]


def _rows(value: Any, rows: Sequence[int], count: int) -> Any:
    if isinstance(value, Tensor) and value.dim() and value.shape[0] == count:
        return value[torch.tensor(rows, device=value.device)]
    return [value[row] for row in rows] if isinstance(value, list) else value


def _tensors(adapter: Adapter, stage: str) -> Iterator[nn.Parameter]:
    for part in adapter._entry.members():
        if getattr(part, "stage", STAGES[-1]) == stage:
            yield from part.parameters()

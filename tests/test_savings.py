"""Every saving of the trainer, alone and all together, against a plain forward and backward: the same loss, the same
gradients, for every method."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

import trimtab as tt
from test_contract import METHODS
from tiny import attached
from trimtab import chunks
from trimtab.adapter import supported
from trimtab.cache import cached_trunk
from trimtab.examples import IGNORED
from trimtab.methods import METHODS as REGISTRY
from trimtab.methods.spec import parse_method
from trimtab.store import Store

SAVINGS = ("share", "cache", "chunks", "labels")
TOP = {"lora": "lora[r=2,layers=-1:]", "llama-adapter": "llama-adapter[length=3,layers=-1:]"}
"""Forms that leave layers below them to the trunk cache."""
STRINGS = [*(METHODS.get(name, name) for name in REGISTRY if name not in ("full", "head")), *TOP.values()]


def batch() -> dict[str, torch.Tensor]:
    """Six rows of up to 20 tokens that begin alike, two of them padded."""
    torch.manual_seed(1)
    ids = torch.randint(3, 50, (6, 20))
    ids[:, :12] = ids[:1, :12]
    mask = torch.ones_like(ids)
    mask[1, 18:] = mask[2, 17:] = 0
    labels = ids.masked_fill(mask == 0, IGNORED)
    labels[:, :14] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def plain(adapter: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """transformers' own loss of whole rows."""
    loss = adapter.model(**batch()).loss
    loss.backward()
    return loss.detach(), gradients(adapter)


def gradients(adapter: Any) -> list[torch.Tensor]:
    """Those of the trained tensors, taken off them, and those that a search uses."""
    found = [parameter.grad for parameter in adapter.parameters() if parameter.grad is not None]
    found += [part.gradient for part in adapter.searching()]
    for parameter in adapter.parameters():
        parameter.grad = None
    for part in adapter.searching():
        part.gradient = None
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", STRINGS)
def test_alone_and_all_together(method: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if family not in supported(parse_method(method).kinds):
        pytest.skip("does not work there")
    adapter = attached(family, method)
    adapter.model.train()
    if any(getattr(part, "draws", False) for part in adapter._entry.members()):
        pytest.skip("draws anew at every call")
    expected, wanted = plain(adapter)
    extra = float(adapter.extra_loss())
    for used in ({"labels"}, {"share"}, {"cache"}, {"chunks"}, set(SAVINGS)):
        monkeypatch.setattr(chunks, "MOST", 64 * 3 if "chunks" in used else 2**26)
        args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True)
        trainer: Any = tt.Trainer(adapter.model, args, adapter=adapter, pad_id=0, show=False, share="share" in used)
        trainer.current_gradient_accumulation_steps = 1
        with ExitStack() as stack:
            if "cache" in used:
                stack.enter_context(cached_trunk(adapter, Store(2**28)))
            for _ in range(3 if "cache" in used else 1):  # filled, then replayed
                loss = trainer.training_step(adapter.model, batch())
                torch.testing.assert_close(loss - extra, expected, rtol=1e-5, atol=1e-6)
                found = gradients(adapter)
                assert len(found) == len(wanted)
                if not extra:
                    largest = max((one.abs().max() for one in wanted), default=torch.tensor(0.0))
                    for one, other in zip(found, wanted, strict=True):
                        torch.testing.assert_close(one, other, rtol=1e-4, atol=float(1e-5 * largest))

"""The contract of DESIGN §4: every method on every family it supports. A new method needs no test code here.

`TRIMTAB_TEST_ALL=1` runs the whole product; otherwise every method runs on llama, gpt2, bert and t5, and every family
with prompt and lora.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import trimtab as tt
from small_models import small_model
from tiny import CAUSAL, ENCODERS, FAMILIES, SEQ2SEQ, VISION, inputs, output, tiny
from trimtab.adapter import folded_method, supported
from trimtab.arch import FAMILIES as KNOWN

METHODS = {
    "prompt": "prompt[length=4]",
    "lora": "lora[r=2,targets=q,k,v,o,up,down]",
    "houlsby": "houlsby[size=4,cross=true]",
    "pfeiffer": "pfeiffer[size=4]",
    "parallel": "parallel[size=4,learn_scale=true]",
    "adamix": "adamix[size=4,mix=both]",
    "prefix": "prefix[length=4,hidden=8]",
    "p-tuning": "p-tuning[length=4]",
    "p-tuning-v2": "p-tuning-v2[length=4,dropout=0]",
    "llama-adapter": "llama-adapter[length=4]",
    "llama-adapter-v2": "llama-adapter-v2[length=4]",
    "autoprompt": "autoprompt[length=4,ids=5,9,11,3]",
    "ladder": "ladder[reduction=2]",
}
"""Strings to test a method with where its defaults are too large for a tiny model."""
ALWAYS = ("prompt", "lora", "houlsby", "prefix")
SHORT = ("llama", "gpt2", "bert", "t5")
EXACT_START = (
    *("lora", "head", "ia3", "bitfit", "layernorm", "parallel", "llama-adapter", "llama-adapter-v2"),
    "diff-pruning",
)
"""Methods whose paper starts exactly at the base model."""
IDLE = dict.fromkeys(
    ("clip", "clip_vision_model"), ("norm_post_layernorm.copy.weight", "norm_post_layernorm.copy.bias")
)
"""Tensors that no gradient reaches: CLIP's last norm acts on the pooled output only."""
VARIANTS = {
    "adamix[form=lora,size=2]": SHORT,
    "houlsby[size=4,drop=2,norms=false]": ("bert",),
    "lora[r=2,dora=true]": SHORT,
    "lora[r=2,init=pissa,lr_ratio=4]": SHORT,
    "ia3[targets=q,o,down]": SHORT,
    "prefix[length=4,form=flat]": SHORT,
    "p-tuning[length=4,encoder=mlp,init=random]": ("llama", "bert"),
    "p-tuning-v2[length=4,dropout=0,network=true,hidden=8]": ("bert", "roberta", "gpt2"),
    "llama-adapter[length=4,gates=layer,tanh=false,layers=-2:]": SHORT,
    "autoprompt[length=4,ids=5,9,11,3,behind=1]": ENCODERS,
    "mask[sparsity=0.4,layers=0:,init=magnitude]": (*SHORT, "gpt_neox", "phi3", "bloom"),
    "diff-pruning[structured=true,targets=q,v,down]": (*SHORT, "gpt_neox"),
    "ladder[reduction=4,dropped=1,start=random,merge_last=true]": SHORT,
    "side[network=mlp]": SHORT,
    "side[reduction=1,layers=0:2,fuse=product]": SHORT,
}
"""Forms of a method that its defaults do not show."""
UNIONS = (
    "houlsby[size=4]|prompt[length=3]",
    "lora[r=2,layers=0:1]|prompt[length=3]",
    "pfeiffer[size=4]|parallel[size=4]",
    "ia3|lora[r=2,targets=v,down]|bitfit",
    "parallel[size=4]|prefix[length=3,hidden=8]",
    "prefix[length=3,hidden=8]|prompt[length=2]|llama-adapter[length=3]",
    "lora[r=2]|autoprompt[length=2,ids=5,9]",
    "lora[r=2]|mask[layers=0:]|ia3",
    "mask[layers=0:]|diff-pruning[layers=1:]",
)


def _pairs() -> Iterator[Any]:
    for name, method in tt.METHODS.items():
        if getattr(method, "whole_model", False):
            continue
        for family in supported(method.kinds):
            if os.environ.get("TRIMTAB_TEST_ALL") or name in ALWAYS or family in SHORT:
                yield pytest.param(METHODS.get(name, name), family, id=f"{name}-{family}")
    for variant, families in VARIANTS.items():
        for family in families:
            yield pytest.param(variant, family, id=f"{variant}-{family}")
    for family in FAMILIES if os.environ.get("TRIMTAB_TEST_ALL") else ("llama", "bert", "vit"):
        if family not in SEQ2SEQ:
            yield pytest.param(f"side[model={small_model(family)}]", family, id=f"side[model=…]-{family}")
    for union in UNIONS:
        for family in SHORT:
            yield pytest.param(union, family, id=f"{union}-{family}")


every_pair = pytest.mark.parametrize(("method", "family"), list(_pairs()))


def attached(method: str, family: str, *, noise: float = 0.3, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A tiny model with an adapter whose tensors are away from their start, so that zero gates hide nothing."""
    torch.manual_seed(3)
    model = tiny(family, dtype)
    adapter = tt.attach(model, method)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return model, adapter


def loss(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return output(model, batch).pow(2).mean()


def test_every_known_family_has_a_tiny_model() -> None:
    assert set(KNOWN) == set(FAMILIES)


@every_pair
def test_1_parameter_count(method: str, family: str) -> None:
    model = tiny(family)
    adapter = tt.attach(model, method)
    heads = sum(p.numel() for name, p in adapter.named_parameters() if name.startswith("head_"))
    own_head = method == "head"
    expected = adapter.method.parameter_count(model.trimtab.sites)
    assert sum(p.numel() for p in adapter.parameters()) == expected + (0 if own_head else heads)


@every_pair
def test_2_start(method: str, family: str) -> None:
    model, batch = tiny(family), inputs(family)
    with torch.no_grad():
        base = output(model, batch)
        tt.attach(model, method)
        started = output(model, batch)
    if method.partition("[")[0] in EXACT_START and "|" not in method:
        assert torch.equal(started, base)
    assert torch.isfinite(started).all()


@every_pair
def test_3_and_4_only_the_adapter_learns(method: str, family: str) -> None:
    torch.manual_seed(1)  # under which no small adapter's ReLUs are all dead
    model = tiny(family)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    adapter = tt.attach(model, method)
    batch = inputs(family)
    model.eval()
    with torch.no_grad():
        output(model, batch)  # an evaluation first: a stale cache would freeze what follows
    start = {name: parameter.detach().clone() for name, parameter in adapter.named_parameters()}
    model.train()
    optimiser = torch.optim.AdamW([{"params": list(adapter.parameters())}], lr=0.05)  # may be none: what is searched
    moved: set[str] = set()
    for step in range(10):
        optimiser.zero_grad()
        loss(model, batch).backward()
        optimiser.step()
        if step < 3:
            moved |= {name for name, p in adapter.named_parameters() if not torch.equal(p, start[name])}
    assert moved == {name for name in start if name not in IDLE.get(family, ())}
    for name, parameter in model.named_parameters():
        if not name.startswith("trimtab."):
            assert parameter.grad is None and torch.equal(parameter, before[name]), name


@every_pair
def test_5_save_load_fold_merge(method: str, family: str, tmp_path: Path) -> None:
    model, adapter = attached(method, family, dtype=torch.float64)
    batch = inputs(family, dtype=torch.float64)
    with torch.no_grad():
        expected = output(model, batch)
        adapter.save(tmp_path)
        fresh = tiny(family, torch.float64)
        loaded = tt.load(fresh, tmp_path)
        assert loaded.method == folded_method(adapter._entry)
        assert torch.allclose(output(fresh, batch), expected, atol=1e-8)
        adapter.fold()
        assert torch.allclose(output(model, batch), expected, atol=1e-8)
        if not adapter.method.mergeable:
            with pytest.raises(tt.UserError, match="cannot be merged"):
                adapter.merge()
            return
        merged = adapter.merge()
        assert not hasattr(merged, "trimtab")
        assert torch.allclose(output(merged, batch), expected, atol=1e-6)  # gemma2's eager softmax is float32


@every_pair
def test_6_detach(method: str, family: str) -> None:
    model, batch = tiny(family).train(), inputs(family)
    pristine = copy.deepcopy(model)
    adapter = tt.attach(model, method)
    loss(model, batch).backward()
    adapter.detach()
    assert list(model.state_dict()) == list(pristine.state_dict())
    for (name, found), expected in zip(model.state_dict().items(), pristine.state_dict().values(), strict=True):
        assert torch.equal(found, expected), name
    for found, expected in zip(model.modules(), pristine.modules(), strict=True):
        assert _plain(found) == _plain(expected)
        assert not found._forward_hooks and not found._forward_pre_hooks
    for found, expected in zip(model.parameters(), pristine.parameters(), strict=True):
        assert found.requires_grad == expected.requires_grad
    with torch.no_grad():
        assert torch.equal(output(model.eval(), batch), output(pristine.eval(), batch))


def _plain(module: nn.Module) -> dict[str, Any]:
    """The numbers and strings that a module keeps as attributes: dropout rates, flags, attention settings."""
    return {key: value for key, value in vars(module).items() if isinstance(value, (int, float, str, bool))}


def _rows(family: str, lengths: tuple[int, ...], side: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    width = max(lengths)
    batch = inputs(family, batch=len(lengths), length=width)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    ids = torch.zeros_like(mask)
    for row, length in enumerate(lengths):
        at = slice(0, length) if side == "right" else slice(width - length, width)
        mask[row, at] = 1
        ids[row, at] = batch["input_ids"][row, :length]
    return {**batch, "input_ids": ids, "attention_mask": mask}, mask.bool()


@every_pair
def test_7_padding(method: str, family: str) -> None:
    """A row's logits do not depend on the other rows, nor, in causal models, on the padding side."""
    if family in VISION or family == "whisper":
        model, batch = attached(method, family)[0], inputs(family)
        with torch.no_grad():
            together = output(model, batch)
            alone = output(model, {key: value[1:2] for key, value in batch.items()})
        assert torch.allclose(together[1:2], alone, atol=2e-4, rtol=1e-4)
        return
    model, _ = attached(method, family)
    lengths = (9, 5, 2)
    with torch.no_grad():
        for side in ("right", "left") if family in CAUSAL else ("right",):
            batch, real = _rows(family, lengths, side)
            together = output(model, batch)
            for row, length in enumerate(lengths):
                alone = {key: value[row : row + 1] for key, value in batch.items()}
                alone["input_ids"] = alone["input_ids"][real[row : row + 1]][None]
                alone["attention_mask"] = torch.ones(1, length, dtype=torch.long)
                expected = output(model, alone)[0]
                found = together[row][real[row]] if family in CAUSAL else together[row]
                assert torch.allclose(found, expected, atol=1e-4), (side, row)


@every_pair
def test_8_generation(method: str, family: str) -> None:
    """Cached generation equals recomputation, and virtual positions show nowhere."""
    model, _ = attached(method, family, dtype=torch.float64)
    if family not in (*CAUSAL, "t5", "bart"):
        batch = inputs(family, dtype=torch.float64)
        assert output(model, batch).shape == output(tiny(family, torch.float64), batch).shape
        return
    batch, _ = _rows(family, (7, 4, 2), "left")
    batch = {key: batch[key] for key in ("input_ids", "attention_mask")}
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(**batch, **how)
    assert torch.equal(cached, model.generate(**batch, **how, use_cache=False))
    assert cached.shape == (3, 13 if family in CAUSAL else 7)
    if family in CAUSAL:
        assert torch.equal(cached[:, :7], batch["input_ids"])
        batch, real = _rows(family, (7, 4, 2), "right")
        model.float()  # eager attention in float64 gives NaN at padding that sees nothing, in the base as well
        out = model(**batch, labels=batch["input_ids"].masked_fill(~real, -100))
        assert out.logits.shape[:2] == (3, 7) and torch.isfinite(out.loss)


@every_pair
def test_9_gradient_checkpointing(method: str, family: str) -> None:
    """The same gradients, and only the layers from the lowest trained one on are run a second time."""
    if family == "clip":
        pytest.skip("transformers' CLIPForImageClassification has no gradient checkpointing switch")
    batch = inputs(family, dtype=torch.float64)
    expected = _gradients(*attached(method, family, dtype=torch.float64), batch)
    for when in ("before", "after"):
        _check_recomputing(method, family, when, batch, expected)


def _check_recomputing(
    method: str, family: str, when: str, batch: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> None:
    """With checkpointing enabled before or after the adapter is attached."""
    torch.manual_seed(3)
    model = tiny(family, torch.float64)
    if when == "before":
        _enable(model)
    adapter = tt.attach(model, method)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    if when == "after":
        _enable(model)
    calls = _count_calls(model)
    found = _gradients(model, adapter, batch)
    assert found.keys() == expected.keys() and found
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-5, atol=1e-6), (when, name)
    for site_layers, below in _below(model, adapter):
        for layer in site_layers[:below]:
            assert calls[id(layer)] == 1, f"{when}: a layer under the lowest trained one was recomputed"


def _enable(model: PreTrainedModel) -> None:
    model.gradient_checkpointing_enable()
    if not isinstance(model.get_input_embeddings(), nn.Conv2d) and "pixel_values" not in str(model.main_input_name):
        model.enable_input_require_grads()


def _gradients(model: PreTrainedModel, adapter: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.train()
    loss(model, batch).backward()
    found = {name: p.grad.clone() for name, p in adapter.named_parameters() if p.grad is not None}
    return found | {f"searched {at}": part.gradient.clone() for at, part in enumerate(adapter.searching())}


def _count_calls(model: PreTrainedModel) -> dict[int, int]:
    """How often each layer's attention output projection runs: hooks inside the layer see recomputation."""
    calls: dict[int, int] = {}
    sites = model.trimtab.sites
    for site in sites.linear:
        if site.role == "o" and not site.cross:
            layer = sites.layer_modules[site.stack][site.layer]
            calls[id(layer)] = 0

            def count(*_: Any, key: int = id(layer)) -> None:
                calls[key] += 1

            site.module.register_forward_hook(count)
    return calls


def _below(model: PreTrainedModel, adapter: Any) -> Iterator[tuple[tuple[nn.Module, ...], int]]:
    """Each stack's layers and how many of them lie under everything that is trained."""
    entry = adapter._entry
    for stack, layers in model.trimtab.sites.layer_modules.items():
        trained = [site.layer for site in entry.sites if site.stack == stack]
        reads_trained = stack == "decoder" and any(site.stack == "encoder" for site in entry.sites)
        if reads_trained or (trained and min(trained) < 0):
            continue
        yield layers, min([*trained, len(layers)])


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_9_counts_recomputed_layers(family: str) -> None:
    """LoRA in the last layer alone: that layer runs twice, the others once."""
    model = tiny(family)
    adapter = tt.attach(model, "lora[r=2,layers=-1]")
    for parameter in adapter.parameters():
        parameter.data.add_(0.1)
    _enable(model)
    calls = _count_calls(model)
    model.train()
    loss(model, inputs(family)).backward()
    layers = next(iter(model.trimtab.sites.layer_modules.values()))
    assert [calls[id(layer)] for layer in layers] == [1, 1, 2]


@every_pair
def test_deepcopy_carries_its_own_adapter(method: str, family: str) -> None:
    if family not in SHORT:
        pytest.skip("one family of each kind is enough")
    model, _ = attached(method, family)
    batch = inputs(family)
    loss(model, batch).backward()
    with torch.no_grad():
        expected = output(model, batch)
        twin = copy.deepcopy(model)
        for tensor in tt.adapters(model)["default"].state_dict().values():
            tensor.zero_()
        assert torch.equal(output(twin, batch), expected)
        assert not torch.equal(output(model, batch), expected)

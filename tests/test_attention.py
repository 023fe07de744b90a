"""The attention core: prefixes and gated context against explicit float64 attention, over every interface family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from transformers import DynamicCache, StaticCache

import trimtab as tt
from reference import GATED, PREFIXES
from tiny import CAUSAL, FAMILIES, SEQ2SEQ, VISION, inputs, output, tiny
from trimtab.attention import NAME
from trimtab.contract import Context, Parts
from trimtab.sites import KVSite, Sites

INTERFACE = [family for family in FAMILIES if family != "bloom"]
DECODERS = [family for family in CAUSAL if family != "bloom"]
P = 4


def _close(family: str, found: torch.Tensor, expected: torch.Tensor) -> bool:
    """To float64 rounding; gemma2's own eager attention takes its softmax in float32."""
    return torch.allclose(found, expected, rtol=0, atol=2e-6 if family == "gemma2" else 1e-9)


class FlatPrefix(nn.Module):
    def __init__(self, site: KVSite):
        super().__init__()
        self.kv = nn.Parameter(torch.randn(2, site.kv_heads, P, site.head_dim))

    def prefix(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.kv[0], self.kv[1]


class Gated(nn.Module):
    def __init__(self, site: KVSite):
        super().__init__()
        self.kv = nn.Parameter(torch.randn(2, site.kv_heads, P, site.head_dim))
        self.gate = nn.Parameter(torch.randn(site.heads))
        self.groups = site.heads // site.kv_heads

    def context(self, query: torch.Tensor, scaling: float) -> torch.Tensor:
        k, v = self.kv.repeat_interleave(self.groups, dim=1)  # [heads, P, head_dim]
        weights = (query @ k.transpose(-1, -2) * scaling).softmax(-1)
        return (weights @ v * self.gate.tanh()[:, None, None]).transpose(1, 2)


@dataclass(frozen=True)
class Toy:
    part: type[nn.Module] = FlatPrefix
    name: ClassVar[str] = "toy"
    kinds: ClassVar[frozenset[str]] = frozenset({"kv"})
    mergeable: ClassVar[bool] = False

    def build(self, sites: Sites, context: Context) -> Parts:
        return {site: self.part(site) for site in sites.kv}


def _attached(family: str, part: type[nn.Module] = FlatPrefix) -> tuple[Any, Any]:
    torch.manual_seed(2)
    model = tiny(family, torch.float64)
    adapter = tt.attach(model, Toy(part))
    for site in model.trimtab.sites.task_head:  # the adapter's head is a copy of the base's
        assert site.key in dict(adapter._entry.parts)
    return model, adapter


def _reference(family: str, model: Any) -> Any:
    """A fresh base whose naive attention knows the same prefixes or gates."""
    base = tiny(family, torch.float64)
    base.set_attn_implementation("naive_reference")
    for site in model.trimtab.entries["default"].sites:
        if not isinstance(site, KVSite):
            continue
        part = model.trimtab.entries["default"].parts[site.key]
        module = base.get_submodule(site.path)
        if isinstance(part, FlatPrefix):
            PREFIXES[id(module)] = (part.kv[0], part.kv[1])
        else:
            GATED[id(module)] = (part.kv[0], part.kv[1], part.gate)
    return base


@pytest.fixture(autouse=True)
def _clean() -> Any:
    yield
    PREFIXES.clear()
    GATED.clear()


def _padded(family: str, side: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A batch with rows of 9, 6 and 3 tokens, and where its real positions are."""
    batch = inputs(family, dtype=torch.float64)
    mask = torch.ones(3, 9, dtype=torch.long)
    for row, missing in enumerate((0, 3, 6)):
        mask[row, slice(9 - missing, 9) if side == "right" else slice(0, missing)] = 0
    batch |= {"input_ids": batch["input_ids"] * mask, "attention_mask": mask}
    return batch, mask.bool()


def _positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


@pytest.mark.parametrize("family", INTERFACE)
@pytest.mark.parametrize("part", [FlatPrefix, Gated])
def test_equals_explicit_attention(family: str, part: type[nn.Module]) -> None:
    model, _ = _attached(family, part)
    batch = inputs(family, dtype=torch.float64)
    expected = output(_reference(family, model), batch)
    assert _close(family, output(model, batch), expected)
    base = output(tiny(family, torch.float64), batch)
    assert (expected - base).abs().max() > 1e-3, "the prefix must matter for the comparison to mean anything"


@pytest.mark.parametrize("family", [family for family in INTERFACE if family not in VISION and family != "whisper"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_padding_and_checkpointing(family: str, side: str, checkpointing: bool) -> None:
    """Logits at real positions and the prefix's gradient, with rows of unequal length."""
    model, adapter = _attached(family)
    batch, real = _padded(family, side)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
    reference = _reference(family, model)
    known = {"position_ids": _positions(real)} if family in DECODERS else {}
    expected = reference(**batch, **known, use_cache=False).logits if family in CAUSAL else output(reference, batch)
    found = model(**batch, use_cache=False).logits if family in CAUSAL else output(model, batch)
    if family in CAUSAL:
        expected, found = expected[real], found[real]
    assert _close(family, found, expected)
    parameters = [parameter for name, parameter in adapter.named_parameters() if name.endswith("kv")]
    wanted = torch.autograd.grad(expected.pow(2).mean(), parameters)
    given = torch.autograd.grad(found.pow(2).mean(), parameters)
    for a, b in zip(given, wanted, strict=True):
        assert _close(family, a, b)


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_caches(family: str, side: str, kind: str, checkpointing: bool) -> None:
    """Seven columns, then two more through the cache: the logits of one pass without a cache."""
    model, _ = _attached(family)
    if checkpointing:
        model.gradient_checkpointing_enable()  # switched on, and without effect in eval mode
    batch, real = _padded(family, side)
    positions = _positions(real)
    with torch.no_grad():
        expected = _reference(family, model)(**batch, position_ids=positions, use_cache=False).logits
        cache: Any = DynamicCache(config=model.config)
        if kind == "static":
            cache = StaticCache(config=model.config, max_cache_len=12)
        pieces = []
        for start, stop in ((0, 7), (7, 8), (8, 9)):
            out = model(
                input_ids=batch["input_ids"][:, start:stop],
                attention_mask=batch["attention_mask"][:, :stop],
                position_ids=positions[:, start:stop],
                past_key_values=cache,
                use_cache=True,
            )
            pieces.append(out.logits)
    found = torch.cat(pieces, dim=1)
    assert _close(family, found[real], expected[real])


@pytest.mark.parametrize("family", [*DECODERS, "t5", "bart"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation(family: str, beams: int) -> None:
    """Left-padded generation with the cache gives the tokens of the naive attention without one."""
    model, _ = _attached(family)
    batch, _ = _padded(family, "left")
    batch = {key: batch[key] for key in ("input_ids", "attention_mask")}
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    expected = _reference(family, model).generate(**batch, **how, use_cache=False)
    assert torch.equal(model.generate(**batch, **how), expected)
    if family not in SEQ2SEQ:
        static = model.generate(**batch, **how, cache_implementation="static", disable_compile=True)
        assert torch.equal(static, expected)


@pytest.mark.parametrize("previous", ["eager", "sdpa"])
def test_delegates_to_what_the_model_had(previous: str) -> None:
    model = tiny("llama", torch.float64)
    model.set_attn_implementation(previous)
    adapter = tt.attach(model, Toy())
    assert model.config._attn_implementation == NAME
    batch = inputs("llama", dtype=torch.float64)
    expected = output(_reference("llama", model), batch)
    assert torch.allclose(output(model, batch), expected, rtol=0, atol=2e-6)  # eager takes its softmax in float32
    with adapter.disabled():
        assert model.config._attn_implementation == previous
    adapter.detach()
    assert model.config._attn_implementation == previous


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention"])
def test_refuses_attention_that_takes_no_prefix(name: str) -> None:
    model = tiny("llama")
    model.config._attn_implementation = name
    with pytest.raises(tt.UserError, match=name):
        tt.attach(model, Toy())
    assert not hasattr(model, "trimtab")
    assert not any(hasattr(module, "trimtab_slot") for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_text_probabilities_do_not_depend_on_gated_prompts() -> None:
    """Two softmaxes: with gates at zero the output is the base's, whatever the prompts are."""
    model, adapter = _attached("llama", Gated)
    batch = inputs("llama", dtype=torch.float64)
    for name, parameter in adapter.named_parameters():
        parameter.data.fill_(0.0) if name.endswith("gate") else parameter.data.mul_(10)
    assert torch.equal(output(model, batch), output(tiny("llama", torch.float64), batch))

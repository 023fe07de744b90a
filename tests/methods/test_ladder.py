"""Ladder side-tuning against loops written from its equation in float64; generation; what the base keeps; its errors.

The reference knows the names of the ladder's tensors and where a tiny model's layers are, and nothing else of trimtab.
"""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import trimtab as tt
from side_by_hand import HOW, bert_block, llama_block, moved, normed, padded, rows
from tiny import CAUSAL, FAMILIES, SEQ2SEQ, inputs, output, tiny
from trimtab.methods import Ladder
from trimtab.narrow import Units
from trimtab.sites import Sites

R = 2


def ladder(w: dict[str, Tensor], states: list[Tensor], layers: list[int], block: Any, temperature: float) -> Tensor:
    """Up LN(h) of one row: states [n, width], the first layer's input and what each layer gave."""
    h = rows(w["states.first.weight"], states[0], w["states.first.bias"])
    for number, at in enumerate(layers):
        share = 1 / (1 + math.exp(-float(w["states.gates"][number]) / temperature))
        tap = rows(w[f"states.downs.{number}.weight"], states[at + 1], w[f"states.downs.{number}.bias"])
        h = block(w, number, share * h + (1 - share) * tap)
    h = normed(h, w["states.norm.weight"], w["states.norm.bias"], 1e-5)
    return rows(w["states.up.weight"], h, w["states.up.bias"])


def base_states(model: Any, layers: list[nn.Module], batch: dict[str, Tensor]) -> list[Tensor]:
    """What the plain base's first layer reads and each layer gives [B, n, width]."""
    seen: list[Tensor] = []

    def first(layer: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(args[0])

    def note(layer: nn.Module, args: Any, result: Any) -> None:
        seen.append(result[0] if isinstance(result, tuple) else result)

    handles = [layers[0].register_forward_pre_hook(first, with_kwargs=True)]
    handles += [layer.register_forward_hook(note) for layer in layers]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(("layers", "text"), [([0, 1, 2], ""), ([0, 2], ",dropped=1"), ([1, 2], ",layers=-2:")])
def test_llama_by_hand(layers: list[int], text: str) -> None:
    model, adapter = moved("llama", f"ladder[reduction={R},temperature=0.3{text}]")
    batch = inputs("llama", batch=2, length=5)
    plain = tiny("llama", torch.float64)
    states = base_states(plain, list(plain.model.layers), batch)
    with torch.no_grad():
        found = output(model, batch)
        for row in range(2):
            own = [state[row] for state in states]
            hidden = ladder(adapter.state_dict(), own, layers, llama_block, 0.3)
            expected = rows(plain.lm_head.weight, hidden)
            assert torch.allclose(found[row], expected, atol=1e-5)  # the model's norms and rotations are float32


def test_bert_by_hand() -> None:
    model, adapter = moved("bert", f"ladder[reduction={R}]")
    batch = inputs("bert", batch=2, length=5)
    plain = tiny("bert", torch.float64)
    states = base_states(plain, list(plain.bert.encoder.layer), batch)
    with torch.no_grad():
        found = output(model, batch)
        for row in range(2):
            own = [state[row] for state in states]
            hidden = ladder(adapter.state_dict(), own, [0, 1, 2], bert_block, 0.1)
            pooled = torch.tanh(plain.bert.pooler.dense(hidden[0]))
            assert torch.allclose(found[row], plain.classifier(pooled), atol=1e-7)


def test_the_last_state_may_be_merged_and_the_start_is_the_base() -> None:
    for family in ("llama", "bert", "t5", "vit", "clip"):
        model, batch = tiny(family), inputs(family)
        with torch.no_grad():
            base = output(model, batch)
            tt.attach(model, "ladder[reduction=4,merge_last=true]")
            assert torch.equal(output(model, batch), base), family


# ---------------------------------------------------------------------------------------------------- a frozen base


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "bert", "modernbert", "t5", "vit"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_of_the_base_is_kept_but_the_states(family: str, checkpointing: bool) -> None:
    """Of all that the base's layers compute, autograd saves what the ladder reads and nothing else."""
    model, adapter = moved(family, "ladder[reduction=2,dropped=1]", torch.float32)
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    inside: set[int] = set()
    taps: set[int] = set()
    for site in model.trimtab.sites.states:
        part = adapter._entry.parts[site.key]
        part.register_forward_pre_hook(lambda _, args: taps.update(_read(args[0])))
        for layer in site.layers:
            for module in layer.modules():
                module.register_forward_hook(lambda _, __, result: inside.update(_places(result)))
    saved: set[int] = set()
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.add(tensor.untyped_storage().data_ptr())
        kept.append(tensor)  # so that no later tensor takes its place in memory
        return tensor

    alive: list[Any] = []
    for module in model.modules():
        module.register_forward_hook(lambda _, __, result: alive.append(result))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = output(model, inputs(family)).pow(2).mean()
    layers = [layer for site in model.trimtab.sites.states for layer in site.layers]
    weights = {weight.untyped_storage().data_ptr() for layer in layers for weight in layer.parameters()}
    assert saved & taps, "the projections of the states need them"
    assert not saved & (inside - taps)
    assert not saved & weights
    loss.backward()


def _read(reading: Any) -> list[int]:
    """What the ladder reads: the first layer's input, the taps, and what the layers' calls share."""
    shared = [value for call in reading.calls for value in call.values()]
    return [place for one in (reading.first, *reading.taps.values(), *shared) for place in _places(one)]


def _places(result: Any) -> list[int]:
    found = result if isinstance(result, tuple) else (result,)
    return [one.untyped_storage().data_ptr() for one in found if isinstance(one, Tensor)]


def test_the_base_keeps_its_mode_and_gradients_stay_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = moved("llama", "ladder[reduction=2]")
    model.train()
    layers = list(model.model.layers)
    modes: list[bool] = []
    for layer in layers:
        layer.register_forward_hook(lambda module, *_: modes.append(module.training))
    output(model, inputs("llama"))
    assert not any(modes) and all(layer.training for layer in layers) and torch.is_grad_enabled()
    monkeypatch.setattr(layers[1].mlp, "forward", lambda x: x[..., :3])
    with pytest.raises(RuntimeError):
        output(model, inputs("llama"))
    assert all(layer.training for layer in layers) and torch.is_grad_enabled()


PEAK = """
import sys, torch, transformers as tf, trimtab as tt
from trimtab.memory import peak_mb, reset_peak
torch.manual_seed(0)
torch.set_num_threads(1)
model = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=64, hidden_size=256, intermediate_size=704, num_hidden_layers=8,
    num_attention_heads=8, num_key_value_heads=8)).train()
tt.attach(model, sys.argv[1])
batch = torch.randint(3, 64, (8, 128))
with torch.no_grad():
    model(batch[:1, :8], use_cache=False)
reset_peak()
before = peak_mb()
model(batch, use_cache=False).logits[:, -1].pow(2).mean().backward()
print(peak_mb() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of a process is reset on Linux alone")
@pytest.mark.slow
def test_peak_memory_is_less_than_half_of_loras() -> None:
    """Each measured in a process of its own."""

    def peak(method: str) -> float:
        command = [sys.executable, "-c", PEAK, method]
        return float(subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout)

    assert peak("ladder[reduction=8]") < 0.5 * peak("lora[r=8]")


# ---------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("family", [*CAUSAL, "t5", "bart"])
def test_beams(family: str) -> None:
    """Beam search reorders the side blocks' keys and values with the base's."""
    model, _ = moved(family, "ladder[reduction=2]")
    batch, how = padded((7, 4, 2)), {**HOW, "num_beams": 3}
    assert torch.equal(model.generate(**batch, **how), model.generate(**batch, **how, use_cache=False))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt2"])
def test_static_cache(family: str) -> None:
    model, _ = moved(family, "ladder[reduction=2]")
    batch = padded((7, 4, 2))
    expected = model.generate(**batch, **HOW)
    assert torch.equal(model.generate(**batch, **HOW, cache_implementation="static", disable_compile=True), expected)


@pytest.mark.parametrize("configured", [True, False])
def test_caches_grow_and_are_cut_with_the_base(configured: bool) -> None:
    model, _ = moved("llama", "ladder[reduction=2,dropped=0]")
    ids = inputs("llama")["input_ids"]
    cache = DynamicCache(config=model.config) if configured else DynamicCache()
    with torch.no_grad():
        whole = output(model, {"input_ids": ids})
        model(input_ids=ids[:, :6], past_key_values=cache)
        assert len(cache.layers) == 5 and {layer.get_seq_length() for layer in cache.layers} == {6}
        cache.crop(-2)
        rest = model(input_ids=ids[:, 4:], past_key_values=cache).logits
    assert torch.allclose(rest, whole[:, 4:], atol=1e-9)


def test_a_cache_of_the_bare_base_is_refused() -> None:
    model, adapter = moved("llama", "ladder[reduction=2]")
    ids = inputs("llama")["input_ids"]
    for cache in (DynamicCache(config=model.config), DynamicCache()):
        with adapter.disabled():
            model(input_ids=ids, past_key_values=cache)
        with pytest.raises(tt.UserError, match="cached without the adapter"):
            model(input_ids=ids[:, :1], past_key_values=cache)
        assert torch.is_grad_enabled()


def test_an_encoder_run_by_the_bare_base_is_refused() -> None:
    model, adapter = moved("t5", "ladder[reduction=2]")
    batch = inputs("t5")
    with adapter.disabled():
        bare = model.get_encoder()(batch["input_ids"])
    with pytest.raises(tt.UserError, match="made without the adapter"):
        model(encoder_outputs=bare, decoder_input_ids=batch["decoder_input_ids"])
    output(model, batch)


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_the_side_decoder_reads_the_side_encoder(family: str) -> None:
    """A change of the side encoder alone changes the output; the base's part of the encoder's output stays."""
    model, adapter = moved(family, "ladder[reduction=2]")
    batch = inputs(family, dtype=torch.float64)
    asked = {name: value for name, value in batch.items() if not name.startswith("decoder")}
    with torch.no_grad():
        with adapter.disabled():
            bare = model.get_encoder()(**asked).last_hidden_state
        before, logits = model.get_encoder()(**asked).last_hidden_state, output(model, batch)
        adapter.state_dict()["encoder_states.norm.bias"].add_(1.0)
        after = model.get_encoder()(**asked).last_hidden_state
    assert before.shape[-1] == 32 + 16 and torch.equal(before[..., :32], bare) and torch.equal(after[..., :32], bare)
    assert torch.allclose(after[..., 32:], before[..., 32:] + 1.0)
    assert not torch.allclose(output(model, batch), logits)


# ---------------------------------------------------------------------------------------------------- pruning


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "clip_vision_model"])
def test_pruning_nothing_keeps_every_weight(family: str) -> None:
    model = tiny(family)
    adapter = tt.attach(model, "ladder[reduction=1]")
    for site in model.trimtab.sites.states:
        blocks = adapter._entry.parts[site.key].side.blocks
        for layer, block in zip(site.layers, blocks, strict=True):
            own = dict(block.named_parameters())
            assert own.keys() == dict(layer.named_parameters()).keys()
            assert all(torch.equal(own[name], weight) for name, weight in layer.named_parameters())


def test_pruning_keeps_the_largest_units() -> None:
    """One choice for the residual stream; rotary pairs evenly spaced; a unit that carries nothing is not kept."""
    model = tiny("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
                part.weight[1::2] *= 0.01
            for part in (*(getattr(layer.self_attn, f"{name}_proj") for name in "qkv"), layer.mlp.up_proj):
                part.weight[:, 1::2] *= 0.01
            layer.mlp.down_proj.weight[:, 24:] *= 0.01
    (site,) = Sites(model).states
    units = Units(site, range(3), 2, None)
    assert units.stream.tolist() == list(range(0, 32, 2))
    adapter = tt.attach(model, "ladder[reduction=2]")
    block = adapter._entry.parts["states"].side.blocks[1]
    layer = model.model.layers[1]
    assert torch.equal(block.mlp.down_proj.weight, layer.mlp.down_proj.weight[::2, :24])
    pairs = [0, 2, 4, 6]  # of a head's 8 rotary dimensions: the frequencies 0 and 2, both halves
    kept = [head * 8 + dimension for head in range(4) for dimension in pairs]
    assert torch.equal(block.self_attn.q_proj.weight, layer.self_attn.q_proj.weight[kept][:, ::2])
    assert torch.equal(block.input_layernorm.weight, layer.input_layernorm.weight[::2])


def test_random_starts_differ_and_loading_needs_no_base_weights(tmp_path: Path) -> None:
    model = tiny("llama")
    adapter = tt.attach(model, "ladder[reduction=2,start=random]")
    block = adapter._entry.parts["states"].side.blocks[0]
    assert not torch.equal(block.input_layernorm.weight, model.model.layers[0].input_layernorm.weight[:16])
    assert Ladder(2).for_loading().start == "random"
    expected = output(model, inputs("llama"))
    adapter.save(tmp_path)
    fresh = tiny("llama")
    tt.load(fresh, tmp_path)
    torch.testing.assert_close(output(fresh, inputs("llama")), expected)
    assert not any(module.p for module in block.modules() if isinstance(module, nn.Dropout))


# ---------------------------------------------------------------------------------------------------- the frame


def test_two_ladders_on_one_model() -> None:
    model, first = moved("llama", "ladder[reduction=2]")
    batch = inputs("llama")
    with torch.no_grad():
        one = output(model, batch)
        second = tt.attach(model, "ladder[reduction=4,layers=1]", name="second")
        two = output(model, batch)
        first.activate()
        assert torch.equal(output(model, batch), one) and not torch.allclose(one, two)
        second.detach()
        assert torch.equal(output(model, batch), one)


@torch.no_grad()
def test_disabled_is_the_base() -> None:
    for family in ("llama", "t5"):
        model, batch = tiny(family), inputs(family)
        with torch.no_grad():
            base = output(model, batch)
            adapter = tt.attach(model, "ladder[reduction=2]")
            with adapter.disabled():
                assert torch.equal(output(model, batch), base)
                twin = copy.deepcopy(model)
                assert torch.equal(output(twin, batch), base)


def test_the_bases_attention_may_be_changed_afterwards() -> None:
    model, _ = moved("llama", "ladder[reduction=2]", torch.float32)
    batch = padded((7, 4, 2))
    real = batch["attention_mask"].bool()
    expected = output(model, batch)[real]
    model.set_attn_implementation("eager")
    assert torch.allclose(output(model, batch)[real], expected, atol=1e-4)


def test_an_interrupt_by_hand_leaves_gradients_on() -> None:
    model, adapter = moved("llama", "ladder[reduction=2]")
    batch = inputs("llama")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[1].mlp.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model.train()(**batch)
    handle.remove()
    output(model, batch).square().mean().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    assert all(layer.training for layer in model.model.layers)


@pytest.mark.parametrize(
    ("family", "method", "message"),
    [
        (
            "llama",
            "ladder[reduction=3]",
            "reduction=3 does not divide .* width 32 .* width 8 of its heads; .*: 1, 2, 4$",
        ),
        ("llama", "ladder[reduction=8]", "these do: 1, 2, 4$"),  # a rotary head has pairs
        ("bert", "ladder[reduction=16]", "these do: 1, 2, 4, 8$"),
        ("llama", "ladder[reduction=0]", "reduction=0 does not divide"),
        ("llama", "ladder[reduction=2,dropped=3]", "dropped='3' is out of range; this model has layers 0 to 2"),
        ("llama", "ladder[reduction=2,layers=5]", "layers='5' is out of range"),
        ("llama", "ladder[reduction=2,dropped=0:3]", "leaves no layer"),
        ("llama", "ladder[temperature=0]", "must be above 0"),
        ("llama", "ladder[reduction=2,start=prunned]", "start.*pruned"),
        ("llama", "ladder[reduction=2]|lora[r=2]", "ladder runs the base without gradients, so lora in it"),
        ("llama", "ladder[reduction=2]|ladder[reduction=4]", "both claim states"),
    ],
)
def test_mistakes(family: str, method: str, message: str) -> None:
    model = tiny(family)
    with pytest.raises(tt.UserError, match=message):
        tt.attach(model, method)
    assert not hasattr(model, "trimtab")


def test_an_unknown_start_in_python() -> None:
    with pytest.raises(tt.UserError, match="did you mean 'pruned'"):
        Ladder(start="prunned")  # type: ignore[arg-type]


def test_merging_is_refused() -> None:
    _, adapter = moved("llama", "ladder[reduction=2]")
    with pytest.raises(tt.UserError, match="cannot be merged"):
        adapter.merge()

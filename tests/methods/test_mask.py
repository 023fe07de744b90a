"""Masks: by hand in float64, the gradient through the threshold, bits, phases of a call, sizes and mistakes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors import safe_open
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainingArguments
from typer.testing import CliRunner

import trimtab as tt
import trimtab.__main__ as cli
from tiny import inputs, output, tiny
from trimtab.bits import pack, unpack
from trimtab.hooks import WeightHook
from trimtab.report import amount
from trimtab.sites import LinearSite

TAU = 0.01
EVERY = "mask[sparsity=0.4,layers=0:]"


def attached(family: str, method: str = EVERY, dtype: torch.dtype = torch.float64, seed: int = 6) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    model = tiny(family, dtype)
    return model, tt.attach(model, method)


def parts(adapter: Any) -> dict[str, Any]:
    """The masks by path and, where a module is fused, which share of its outputs they are for."""
    entry = adapter._entry
    return {site: entry.parts[site.key] for site in entry.sites if isinstance(site, LinearSite)}


def masked_by_hand(family: str, adapter: Any) -> Any:
    """A plain model whose weights are multiplied with the masks, row by row."""
    base = tiny(family, torch.float64)
    for site, part in parts(adapter).items():
        mask = (part.scores > TAU).double()
        module = base.get_submodule(site.path)
        start = 0 if site.span is None else site.span.start
        with torch.no_grad():
            for row in range(mask.shape[0]):
                if isinstance(module, hf.pytorch_utils.Conv1D):
                    module.weight[:, start + row] *= mask[row]
                else:
                    module.weight[start + row] *= mask[row]
    for site in adapter._entry.sites:
        if site.key.startswith("head_"):
            setattr(base, site.path, adapter._entry.parts[site.key].copy)
    return base


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "bert", "t5", "vit"])
def test_forward_by_hand(family: str) -> None:
    model, adapter = attached(family)
    batch = inputs(family, dtype=torch.float64)
    left_out = torch.cat([(part.scores <= TAU).flatten() for part in parts(adapter).values()])
    assert 0.3 < left_out.double().mean() < 0.5
    with torch.no_grad():
        expected = output(masked_by_hand(family, adapter), batch)
        assert torch.allclose(output(model, batch), expected, atol=1e-12)
        assert not torch.allclose(expected, output(tiny(family, torch.float64), batch), atol=1e-2)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_gradient_straight_through_by_hand(family: str) -> None:
    """∂L/∂m = ∂L/∂Ŵ ⊙ W, the former from a plain model with Ŵ as its weight."""
    model, adapter = attached(family)
    batch = inputs(family, dtype=torch.float64)
    output(model, batch).square().mean().backward()
    plain, base = masked_by_hand(family, adapter), tiny(family, torch.float64)
    output(plain, batch).square().mean().backward()
    for site, part in parts(adapter).items():
        expected = plain.get_submodule(site.path).weight.grad * base.get_submodule(site.path).weight
        assert part.scores.grad.abs().max() > 0
        assert torch.allclose(part.scores.grad, expected, atol=1e-14), site.path


def test_a_score_on_the_threshold_leaves_out() -> None:
    _, adapter = attached("bert", dtype=torch.float32)
    for part in parts(adapter).values():
        part.scores.data.fill_(TAU)
    adapter.fold()
    assert not any(part.bits.any() for part in parts(adapter).values())


def test_start() -> None:
    """A share p0 under the threshold, uniform in (-0.02, (0.02 + τ) / p0 - 0.02)."""
    for share in (0.05, 0.3, 0.9):
        scores = torch.cat([p.scores.detach().flatten() for p in parts(attached("bert", f"mask[sparsity={share}]")[1])
                            .values()])  # fmt: skip
        assert (scores <= TAU).double().mean() == pytest.approx(share, abs=0.03)
        assert scores.min() >= -0.02 and scores.max() <= 0.03 / share - 0.02
    _, adapter = attached("bert", "mask[sparsity=0]")
    assert all((part.scores > TAU).all() for part in parts(adapter).values())
    _, adapter = attached("bert", "mask[sparsity=0.4,init=magnitude]")
    for site, part in parts(adapter).items():
        size, kept = site.weight().abs(), part.scores > TAU
        assert size[~kept].max() < size[kept].min()


def test_seeds() -> None:
    one, again, other = (
        next(iter(parts(attached("bert", seed=seed)[1]).values())).scores.detach() for seed in (1, 1, 2)
    )
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_the_two_lowest_layers_stay_whole_unless_they_are_named() -> None:
    layers = lambda method: sorted({site.layer for site in parts(attached("bert", method)[1])})  # noqa: E731
    assert layers("mask") == [2, 3]  # 3 is the pooler
    assert layers("mask[layers=0:]") == [0, 1, 2]
    assert layers("mask[targets=q]") == [2]
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, vocab_size=64)
    small = hf.BertForSequenceClassification(hf.BertConfig(num_hidden_layers=2, **sizes))
    assert sorted({site.layer for site in parts(tt.attach(small, "mask"))}) == [0, 1, 2]


@pytest.mark.parametrize("shape", [(1, 1), (2, 4), (3, 7), (5, 16), (13, 11)])
def test_bits(shape: tuple[int, int]) -> None:
    values = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.5
    packed = pack(values)
    assert packed.dtype == torch.uint8 and packed.shape == (-(-values.numel() // 8),)
    flat = values.flatten().tolist()
    for at, byte in enumerate(packed.tolist()):
        assert byte == sum(2**place for place, value in enumerate(flat[8 * at : 8 * at + 8]) if value)
    assert torch.equal(unpack(packed, shape), values)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_saved_bits_are_the_mask_bit_for_bit(family: str, tmp_path: Path) -> None:
    _, adapter = attached(family, dtype=torch.float32)
    expected = {site.key: part.scores.detach() > TAU for site, part in parts(adapter).items()}
    adapter.save(tmp_path)
    loaded = tt.load(tiny(family), tmp_path)
    for site, part in parts(loaded).items():
        assert torch.equal(unpack(part.bits, part.shape), expected[site.key])
    assert loaded.method == tt.Mask(sparsity=0.4, layers="0:", form="bits")
    again = tmp_path / "again"
    loaded.save(again)
    left, right = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, again))
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def wide_bert() -> Any:
    torch.manual_seed(0)
    sizes = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=2, vocab_size=64)
    return hf.BertForSequenceClassification(hf.BertConfig(**sizes))


def test_the_file_is_a_thirtieth_of_the_weights_and_inspect_says_so(tmp_path: Path) -> None:
    adapter = tt.attach(wide_bert(), "mask")
    count = sum(part.scores.numel() for part in parts(adapter).values())
    adapter.save(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    assert file.stat().st_size <= 4 * count / 30
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["bits"] == str(count)
    said = CliRunner().invoke(cli.app, ["inspect", str(tmp_path)]).stdout
    assert f"{count:,} bits, " in said
    assert json.loads(CliRunner().invoke(cli.app, ["inspect", str(tmp_path), "--json"]).stdout)["bits"] == count
    assert amount(71368704) == "71.4 M"


def test_half_precision_keeps_float32_scores(tmp_path: Path) -> None:
    model, adapter = attached("bert", dtype=torch.bfloat16)
    batch = inputs("bert")
    output(model, batch).float().square().mean().backward()
    for part in parts(adapter).values():
        assert part.scores.dtype == torch.float32 and part.scores.grad.dtype == torch.float32
    expected = output(model, batch)
    adapter.save(tmp_path)
    fresh = tiny("bert", torch.bfloat16)
    tt.load(fresh, tmp_path)
    assert torch.equal(output(fresh, batch), expected)


# The weight's place


def test_the_base_product_is_not_computed_beside_the_masked_one() -> None:
    batch, counted = inputs("gpt2"), []
    for method in (None, EVERY):
        model = tiny("gpt2")
        if method is not None:
            tt.attach(model, method)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            output(model, batch)
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1]


def test_several_adapters_and_none() -> None:
    batch = inputs("gpt2", dtype=torch.float64)
    model, first = attached("gpt2")
    with torch.no_grad():
        base = output(tiny("gpt2", torch.float64), batch)
        one = output(model, batch)
        second = tt.attach(model, "mask[sparsity=0.8,layers=1:]", "second")
        two = output(model, batch)
        assert not torch.equal(one, two)
        with second.disabled():
            assert torch.equal(output(model, batch), base)
        first.activate()
        assert torch.equal(output(model, batch), one)
        second.fold()
        second.activate()
        assert torch.equal(output(model, batch), two)
        first.detach()
        assert torch.equal(output(model, batch), two)
        second.detach()
        assert torch.equal(output(model, batch), base)
    assert list(model.state_dict()) == list(tiny("gpt2").state_dict())


class Boom(Exception):
    pass


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
def test_a_call_that_is_broken_off_leaves_the_base(error: type[BaseException]) -> None:
    """Exceptions are noticed at once; what cannot be (Ctrl-C) at the next call, and when the adapter is taken off."""
    batch = inputs("bert")
    model, adapter = attached("bert", dtype=torch.float32)
    base = output(tiny("bert"), batch)
    expected = output(model, batch)
    module = model.bert.encoder.layer[1].attention.self.query
    forward = module.forward

    def broken(x: torch.Tensor) -> torch.Tensor:
        raise error

    module.forward = broken
    for _ in range(2):
        with pytest.raises(error):
            output(model, batch)
        assert ("weight" in vars(module)) == (error is KeyboardInterrupt)
    module.forward = forward
    with adapter.disabled():
        assert torch.equal(output(model, batch), base)
    assert torch.equal(output(model, batch), expected)
    module.forward = broken
    with pytest.raises(error):
        output(model, batch)
    module.forward = forward
    adapter.detach()
    assert "weight" not in vars(module) and torch.equal(output(model, batch), base)


def test_checkpointing_stops_early_and_leaves_nothing_behind() -> None:
    model, _ = attached("bert", dtype=torch.float32)
    model.gradient_checkpointing_enable()
    model.train()
    output(model, inputs("bert")).square().mean().backward()
    assert not [name for name, module in model.named_modules() if isinstance(vars(module).get("weight"), torch.Tensor)]


def test_inference_forms_make_their_weight_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[WeightHook] = []
    make = WeightHook._make

    def counted(hook: WeightHook) -> torch.Tensor:
        made.append(hook)
        return make(hook)

    monkeypatch.setattr(WeightHook, "_make", counted)
    batch = inputs("gpt2")
    model, adapter = attached("gpt2", dtype=torch.float32)
    with torch.no_grad():
        expected = output(model, batch)
    adapter.fold()
    made.clear()
    with torch.inference_mode():
        first = output(model, batch)
    once = len(made)
    found = output(model, batch)  # outside inference mode: what is kept may take part in a graph
    found.sum().backward() if found.requires_grad else None
    assert once == 4 * 3 and len(made) == once, "c_attn, c_proj, c_fc, c_proj in three layers"
    assert torch.equal(first, expected) and torch.equal(found, expected)

    state = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    adapter.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in state.items()})
    assert not torch.equal(output(model, batch), expected), "what is kept does not outlive the bits"
    adapter.load_state_dict(state)
    assert torch.equal(output(model, batch), expected)
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight.mul_(0.5)
    assert not torch.equal(output(model, batch), expected), "nor the base's weight"
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight.mul_(2)
    assert torch.equal(output(model, batch), expected)
    twin = copy.deepcopy(model)
    assert torch.equal(output(twin, batch), expected)

    hooks = set(made)
    assert all(hook.kept is not None for hook in hooks if hook.module in set(model.modules()))
    with adapter.disabled():
        output(model, batch)
    assert all(hook.kept is None for hook in hooks if hook.module in set(model.modules()))


def test_dora_and_a_mask_refuse_each_other() -> None:
    with pytest.raises(tt.UserError, match="both claim"):
        tt.attach(tiny("bert"), "mask[layers=0:]|lora[dora=true]")


# Training


def train(folder: Path, model: Any, adapter: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    rows = [{"input_ids": torch.randint(3, 64, (7,)).tolist(), "labels": at % 2} for at in range(40)]
    settings: dict[str, Any] = dict(num_train_epochs=20, learning_rate=3e-3, per_device_train_batch_size=8)
    arguments = TrainingArguments(str(folder), report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no",
                                  **{**settings, **options})  # fmt: skip
    trainer = tt.Trainer(model, arguments, adapter=adapter, train_dataset=rows, pad_id=0)
    trainer.train()
    return trainer


def test_a_target_is_reached(tmp_path: Path) -> None:
    shares = {}
    for target in (None, 0.3):
        method = tt.Mask(sparsity=0.05, layers="0:", target_sparsity=target)
        model, adapter = attached("bert", method, torch.float32)  # type: ignore[arg-type]
        train(tmp_path, model, adapter, learning_rate=1e-2)
        scores = torch.cat([part.scores.flatten() for part in parts(adapter).values()])
        shares[target] = float((scores <= TAU).float().mean())
    assert shares[0.3] == pytest.approx(0.3, abs=0.02)
    assert shares[None] < 0.2


def test_the_target_in_the_loss_by_hand() -> None:
    _, adapter = attached("bert", "mask[sparsity=0.4,target_sparsity=0.1,pressure=0.5,layers=0:]")
    scores = torch.cat([part.scores.flatten() for part in parts(adapter).values()])
    gap = float((scores <= TAU).double().mean()) - 0.1
    loss = adapter.extra_loss()
    assert float(loss.detach()) == pytest.approx(0.5 * gap**2, rel=1e-6)
    loss.backward()
    for part in parts(adapter).values():
        assert torch.allclose(part.scores.grad, torch.full_like(part.scores, -2 * 0.5 * gap))


def test_the_loss_of_a_step_holds_the_term_once(tmp_path: Path) -> None:
    """Whatever the accumulation."""
    found = []
    for steps, rows in ((1, 8), (4, 2)):
        model, adapter = attached("bert", "mask[sparsity=0.4,target_sparsity=0.1,pressure=50,layers=0:]", torch.float32)
        trainer = train(tmp_path, model, adapter, max_steps=1, gradient_accumulation_steps=steps,
                        per_device_train_batch_size=rows)  # fmt: skip
        found.append((trainer.step_log.loss, adapter.state_dict()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5) and found[0][0] > 3
    for name, tensor in found[0][1].items():
        assert torch.allclose(tensor, found[1][1][name], atol=1e-5), name


# Mistakes


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("mask[sparsity=1]", r"sparsity=1 must be in \[0, 1\)"),
        ("mask[sparsity=-0.1]", r"sparsity=-0.1 must be in \[0, 1\)"),
        ("mask[target_sparsity=1.5]", r"target_sparsity=1.5 must be in \[0, 1\)"),
        ("mask[pressure=-1]", "pressure=-1 must not be negative"),
        ("mask[layers=7]", "out of range; this model has layers 0 to 2"),
        ("mask[targets=z]", "'z' does not exist"),
    ],
)
def test_mistakes(method: str, said: str) -> None:
    model = tiny("bert")
    with pytest.raises(tt.UserError, match=said):
        tt.attach(model, method)
    assert not hasattr(model, "trimtab")


def test_quantised_weights_are_refused() -> None:
    model = tiny("llama")
    module = model.model.layers[2].mlp.up_proj
    del module.weight
    module.weight = torch.nn.Parameter(torch.zeros(48, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(tt.UserError, match="quantised"):
        tt.attach(model, "mask")


@pytest.mark.parametrize("method", ["mask[form=bits]", "diff-pruning[form=sparse]"])
def test_the_saved_form_is_not_trained(method: str, tmp_path: Path) -> None:
    adapter = tt.attach(tiny("bert"), method)
    with pytest.raises(tt.UserError, match="in which nothing is trained"):
        tt.Trainer(adapter.model, TrainingArguments(str(tmp_path), use_cpu=True), adapter=adapter, train_dataset=[])

"""Side-tuning against its equation written out in float64; the fusions; alpha without decay; generation; its errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainingArguments

import trimtab as tt
from side_by_hand import HOW, bert_block, llama_block, moved, normed, padded, rows
from tiny import CAUSAL, inputs, output, tiny
from trimtab.methods import Side
from trimtab.trainer import Trainer


def plain_states(family: str, batch: dict[str, Tensor]) -> tuple[Any, Tensor, Tensor]:
    """A plain base, its first layer's input and its last hidden state behind the final norm."""
    model = tiny(family, torch.float64)
    with torch.no_grad():
        found = model.base_model(**batch, output_hidden_states=True)
    return model, found.hidden_states[0], found.last_hidden_state


def fused(how: str, alpha: float, base: Tensor, side: Tensor) -> Tensor:
    share = 1 / (1 + math.exp(-alpha))
    return {"alpha": share * base + (1 - share) * side, "sum": base + side, "product": base * side}[how]


def as_ladder(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names that the blocks' reference knows."""
    return {name.replace("states.network.side", "states.side"): tensor for name, tensor in weights.items()}


@pytest.mark.parametrize("how", ["alpha", "sum", "product"])
def test_llama_by_hand(how: str) -> None:
    model, adapter = moved("llama", f"side[reduction=2,layers=0:2,fuse={how}]")
    w, batch = adapter.state_dict(), inputs("llama", batch=2, length=5)
    plain, first, last = plain_states("llama", batch)
    alpha = float(w.get("states.alpha", torch.zeros(())))
    assert (alpha != 0) == (how == "alpha")
    with torch.no_grad():
        found = output(model, batch)
        for row in range(2):
            h = rows(w["states.network.down.weight"], first[row], w["states.network.down.bias"])
            for number in range(2):
                h = llama_block(as_ladder(w), number, h)
            h = normed(h, w["states.network.norm.weight"], w["states.network.norm.bias"], 1e-5)
            side = rows(w["states.network.up.weight"], h, w["states.network.up.bias"])
            expected = rows(plain.lm_head.weight, fused(how, alpha, last[row], side))
            assert torch.allclose(found[row], expected, atol=1e-5)  # the model's norms and rotations are float32


def test_bert_by_hand() -> None:
    model, adapter = moved("bert", "side[reduction=2,layers=1]")
    w, batch = adapter.state_dict(), inputs("bert", batch=2, length=5)
    plain, first, last = plain_states("bert", batch)
    with torch.no_grad():
        found = output(model, batch)
        for row in range(2):
            h = rows(w["states.network.down.weight"], first[row], w["states.network.down.bias"])
            h = bert_block(as_ladder(w), 0, h)
            h = normed(h, w["states.network.norm.weight"], w["states.network.norm.bias"], 1e-5)
            side = rows(w["states.network.up.weight"], h, w["states.network.up.bias"])
            mean = fused("alpha", float(w["states.alpha"]), last[row], side)
            assert torch.allclose(found[row], plain.classifier(torch.tanh(plain.bert.pooler.dense(mean[0]))), atol=1e-7)


@pytest.mark.parametrize("family", ["gpt2", "bert", "vit"])
def test_a_perceptron_by_hand(family: str) -> None:
    model, adapter = moved(family, "side[network=mlp,reduction=2]")
    w, batch = adapter.state_dict(), inputs(family, dtype=torch.float64)
    seen: list[Tensor] = []
    model.trimtab.sites.states[0].end.register_forward_hook(lambda _, __, result: seen.append(result))
    _, first, last = plain_states(family, batch)
    with torch.no_grad():
        output(model, batch)
        inside = first @ w["states.network.first.weight"].T + w["states.network.first.bias"]
        inside = inside * 0.5 * (1 + torch.erf(inside / math.sqrt(2)))
        side = inside @ w["states.network.second.weight"].T + w["states.network.second.bias"]
    assert torch.allclose(seen[0], fused("alpha", float(w["states.alpha"]), last, side), atol=1e-9)


def test_the_start_is_the_mean_of_both_and_full_width_layers_are_copies() -> None:
    model = tiny("bert")
    adapter = tt.attach(model, "side[reduction=1,layers=0:2]")
    part = adapter._entry.parts["states"]
    assert part.alpha.item() == 0 and part.network.down is None and part.network.up is None
    for layer, block in zip(model.bert.encoder.layer, part.network.side.blocks, strict=False):
        own = dict(block.named_parameters())
        assert all(torch.equal(own[name], weight) for name, weight in layer.named_parameters())


def test_the_lowest_quarter_by_default() -> None:
    sites = tiny("llama")
    tt.attach(sites, "side")
    assert Side().chosen(sites.trimtab.sites.states[0]) == [0]


@pytest.mark.parametrize("family", [*CAUSAL, "t5", "bart"])
def test_beams(family: str) -> None:
    model, _ = moved(family, "side[reduction=2,layers=1:]")
    batch, how = padded((7, 4, 2)), {**HOW, "num_beams": 3}
    assert torch.equal(model.generate(**batch, **how), model.generate(**batch, **how, use_cache=False))


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("mask[sparsity=0.4,layers=0:]", "scores"),
        ("diff-pruning", "log_alpha"),
        ("diff-pruning[structured=true]", "of_matrix"),
    ],
)
def test_scores_and_gates_of_masks_do_not_decay(method: str, name: str) -> None:
    adapter = tt.attach(tiny("bert"), method)
    kept = {id(weight) for weight in adapter.undecayed()}
    own = [weight for key, weight in adapter.named_parameters() if key.endswith(name)]
    assert own and all(id(weight) in kept for weight in own)


def test_alpha_and_gates_do_not_decay(tmp_path: Any) -> None:
    """The trainer's groups: alpha without decay, as biases and norms; a weight with it."""
    for method, name in (("side[reduction=2]", "states.alpha"), ("ladder[reduction=2]", "states.gates")):
        model = tiny("bert")
        adapter = tt.attach(model, method)
        arguments = TrainingArguments(output_dir=str(tmp_path), weight_decay=0.1, use_cpu=True, report_to=[])
        optimiser = Trainer(model, arguments, adapter=adapter, train_dataset=[]).create_optimizer()
        decay = {id(weight): group["weight_decay"] for group in optimiser.param_groups for weight in group["params"]}
        own = dict(adapter.named_parameters())
        assert decay[id(own[name])] == 0
        (up,) = (weight for key, weight in own.items() if key.endswith("up.weight"))
        assert decay[id(up)] == 0.1


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("side[reduction=3]", "reduction=3 does not divide .*: 1, 2, 4$"),
        ("side[network=mlp,reduction=5]", "reduction=5 does not divide the model's width 32; these do: 1, 2, 4, 8"),
        ("side[layers=3]", "layers='3' is out of range"),
        ("side[network=mlp,layers=0]", "leave out layers="),
        ("side[fuse=film]", "fuse"),
        ("side|lora", "side runs the base without gradients"),
    ],
)
def test_mistakes(method: str, message: str) -> None:
    with pytest.raises(tt.UserError, match=message):
        tt.attach(tiny("llama"), method)


def test_an_unknown_fusion_in_python() -> None:
    with pytest.raises(tt.UserError, match="did you mean 'sum'"):
        Side(fuse="sums")  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_distillation_by_hand(family: str) -> None:
    """While it lasts the model is the base, and the term counts the tokens that are no padding; then it is fused."""
    model, adapter = moved(family, "side[reduction=2,distill=0.5]")
    batch = padded((5, 3))
    batch = {name: tensor.flip(1) for name, tensor in batch.items()}
    real = batch["attention_mask"].bool()
    _, _, base = plain_states(family, batch)
    with torch.no_grad(), adapter.disabled():
        plain = output(model, batch)
    part: Any = model.trimtab.entries["default"].parts["states"]
    seen: list[Tensor] = []
    part.network.register_forward_hook(lambda _, __, result: seen.append(result))
    adapter.progress(0.4)
    model.train()
    there = real if family == "llama" else slice(None)
    torch.testing.assert_close(output(model, batch)[there], plain[there])
    side, places = seen[-1].detach(), real.nonzero().tolist()
    off = sum(float((side[row, at] - base[row, at]).square().sum()) for row, at in places)
    size = sum(float(base[row, at].square().sum()) for row, at in places)
    loss: Any = adapter.extra_loss()
    assert float(loss.detach()) == pytest.approx(off / size, rel=1e-5)
    loss.backward()
    learning = {name for name, weight in adapter.named_parameters() if weight.grad is not None and weight.grad.any()}
    assert learning == {name for name, _ in adapter.named_parameters() if ".network." in name}
    assert adapter.extra_loss() == 0
    adapter.progress(0.5)
    assert not torch.allclose(output(model, batch), plain)
    assert adapter.extra_loss() == 0


def test_training_distills_first(tmp_path: Any) -> None:
    """The side network gets closer to the base than one that is not distilled."""
    gaps = {}
    for share in (0.0, 0.9):
        model = tiny("llama")
        torch.manual_seed(1)
        adapter = tt.attach(model, f"side[reduction=2,start=random,distill={share}]")
        args = TrainingArguments(str(tmp_path / str(share)), use_cpu=True, report_to="none", max_steps=30)
        args.learning_rate = 1e-2
        batch = inputs("llama", batch=8, length=6)["input_ids"].tolist()
        Trainer(
            model, args, adapter=adapter, train_dataset=[{"input_ids": ids, "labels": ids} for ids in batch], pad_id=0
        ).train()
        adapter.progress(0.0)
        part: Any = model.trimtab.entries["default"].parts["states"]
        part.train()
        part.distills = True
        with torch.no_grad():
            output(model, inputs("llama"))
        gaps[share] = float(part.take_gap())
    assert gaps[0.9] < 0.5 * gaps[0.0]

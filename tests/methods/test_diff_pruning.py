"""Diff pruning: gates, penalty and cut by hand; the phases in the training loop; sparse files; mistakes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments

import trimtab as tt
from foreign import rewrite
from tiny import inputs, output, tiny
from trimtab.methods.diff_pruning import Gated, Sparse, hard_concrete
from trimtab.sites import LinearSite

FILE = "adapter_model.safetensors"


def attached(family: str, method: str = "diff-pruning", dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    """With gates that are open, half open and shut."""
    torch.manual_seed(4)
    model = tiny(family, dtype)
    adapter = tt.attach(model, method)
    with torch.no_grad():
        for part in parts(adapter).values():
            part.w.normal_(std=0.2)
            part.log_alpha.normal_(std=1.5)
            if part.of_matrix is not None:
                part.of_matrix.fill_(0.4)
    return model, adapter


def parts(adapter: Any) -> dict[Any, Any]:
    entry = adapter._entry
    return {site: entry.parts[site.key] for site in entry.sites if isinstance(site, LinearSite)}


def gate_by_hand(log_alpha: float, u: float = 0.5) -> float:
    """z, one number at a time."""
    s = 1 / (1 + math.exp(-(log_alpha + math.log(u) - math.log(1 - u))))
    return min(1.0, max(0.0, s * (1.5 - -1.5) + -1.5))


def test_gates_by_hand() -> None:
    torch.manual_seed(0)
    log_alpha = 2 * torch.randn(200, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    drawn = hard_concrete(log_alpha, True)
    torch.manual_seed(1)
    u = torch.rand(200, dtype=torch.float64)
    by_hand = [gate_by_hand(*pair) for pair in zip(log_alpha.tolist(), u.tolist(), strict=True)]
    assert drawn.tolist() == pytest.approx(by_hand, abs=1e-12)
    assert (drawn == 0).any() and (drawn == 1).any() and ((drawn > 0) & (drawn < 1)).any()
    still = hard_concrete(log_alpha, False)
    assert still.tolist() == pytest.approx([gate_by_hand(one) for one in log_alpha.tolist()])
    (found,) = torch.autograd.grad(still.sum(), log_alpha)
    s = log_alpha.detach().sigmoid()
    inside = (3 * s - 1.5 > 0) & (3 * s - 1.5 < 1)
    assert torch.allclose(found, torch.where(inside, 3 * s * (1 - s), 0.0))


def test_a_gate_is_open_as_often_as_the_penalty_says() -> None:
    """P(z ≠ 0) = σ(log α - log(1.5 / 1.5))."""
    torch.manual_seed(0)
    for log_alpha in (-2.0, 0.0, 1.0):
        drawn = hard_concrete(torch.full((40_000,), log_alpha), True)
        assert float((drawn != 0).float().mean()) == pytest.approx(1 / (1 + math.exp(-log_alpha)), abs=0.01)


@pytest.mark.parametrize("method", ["diff-pruning", "diff-pruning[structured=true]"])
def test_penalty_by_hand(method: str) -> None:
    _, adapter = attached("bert", method)
    expected = 0.0
    for part in parts(adapter).values():
        whole = 1.0 if part.of_matrix is None else 1 / (1 + math.exp(-0.4))
        expected += sum(whole / (1 + math.exp(-one)) for one in part.log_alpha.flatten().tolist())
    assert float(adapter.extra_loss().detach()) == pytest.approx(1.25e-7 * expected)
    assert adapter.extra_loss().requires_grad


@pytest.mark.parametrize("method", ["diff-pruning", "diff-pruning[structured=true]"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_forward_by_hand(family: str, method: str) -> None:
    """W + z ⊙ w written into a plain model."""
    model, adapter = attached(family, method)
    base = tiny(family, torch.float64)
    shares = []
    for site, part in parts(adapter).items():
        whole = 1.0 if part.of_matrix is None else gate_by_hand(0.4)
        gates = torch.tensor([[gate_by_hand(one) for one in row] for row in part.log_alpha.tolist()])
        shares.append(float((gates == 0).float().mean()))
        module = base.get_submodule(site.path)
        start = 0 if site.span is None else site.span.start
        change = (whole * gates.double() * part.w).detach()
        with torch.no_grad():
            if family == "gpt2":
                module.weight[:, start : start + change.shape[0]] += change.T
            else:
                module.weight += change
    assert min(shares) > 0.3
    for site in adapter._entry.sites:
        if site.key.startswith("head_"):
            setattr(base, site.path, adapter._entry.parts[site.key].copy)
    batch = inputs(family, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(output(model, batch), output(base, batch), atol=1e-6)  # gates are float32 here


def test_gates_are_drawn_in_training_and_nowhere_else() -> None:
    model, adapter = attached("bert", dtype=torch.float32)
    batch = inputs("bert")
    assert torch.equal(output(model, batch), output(model, batch))
    model.train()
    assert not torch.equal(output(model, batch), output(model, batch))
    torch.manual_seed(3)
    one = output(model, batch)
    torch.manual_seed(3)
    assert torch.equal(output(model, batch), one)
    adapter.progress(1.0)
    assert torch.equal(output(model, batch), output(model, batch))


@pytest.mark.parametrize("method", ["diff-pruning[share=0.1]", "diff-pruning[share=0.1,structured=true]"])
def test_the_cut_keeps_the_largest_of_all(method: str) -> None:
    model, adapter = attached("bert", method)
    before = {site: part.difference().detach() for site, part in parts(adapter).items()}
    sizes = torch.cat([one.abs().flatten() for one in before.values()])
    count = round(0.1 * sizes.numel())
    least = sizes.sort(descending=True).values[count - 1]
    adapter.progress(0.49)
    assert not any(part.fixed for part in parts(adapter).values())
    adapter.progress(0.5)
    kept = 0
    for site, part in parts(adapter).items():
        expected = torch.where(before[site].abs() >= least, before[site], 0)
        assert torch.allclose(part.difference(), expected, atol=1e-12) and part.fixed and not part.draws
        assert torch.equal(part.difference() != 0, expected != 0)
        kept += int((expected != 0).sum())
    assert kept == count
    state = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    for done in (0.6, 1.0):
        adapter.progress(done)
    assert all(torch.equal(tensor, state[name]) for name, tensor in adapter.state_dict().items()), "it is made once"

    model.train()
    output(model, inputs("bert", dtype=torch.float64)).square().mean().backward()
    for part in parts(adapter).values():
        shut = part.log_alpha < 0
        assert part.w.grad[shut].abs().max() == 0 and part.w.grad[~shut].abs().max() > 0
        assert part.log_alpha.grad.abs().max() == 0
    with torch.no_grad():
        for part in parts(adapter).values():
            assert torch.isfinite(part.difference()).all()


# In the training loop


class Stop(TrainerCallback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.at:
            raise RuntimeError("on purpose")


METHOD = "diff-pruning[share=0.02,cut_at=0.5,search_lr=0.5,gate_lr=50]"


def make(folder: Path, *callbacks: TrainerCallback, method: str = METHOD, **options: Any) -> tt.Trainer:
    torch.manual_seed(5)
    model = tiny("bert")
    adapter = tt.attach(model, method)
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(3, 64, (5 + at % 5,), generator=generator).tolist(), "labels": at % 2}
            for at in range(32)]  # fmt: skip
    settings: dict[str, Any] = dict(max_steps=8, learning_rate=2e-3, per_device_train_batch_size=8, save_steps=2)
    arguments = TrainingArguments(str(folder), report_to="none", disable_tqdm=True, use_cpu=True, seed=3,
                                  **{**settings, **options})  # fmt: skip
    return tt.Trainer(model, arguments, adapter=adapter, train_dataset=rows, eval_dataset=rows, pad_id=0,
                      callbacks=callbacks)  # fmt: skip


def test_two_phases(tmp_path: Path) -> None:
    trainer = make(tmp_path, save_strategy="steps")
    trainer.train()
    adapter = trainer.adapter
    states = {step: load_file(tmp_path / f"checkpoint-{step}" / "trained.safetensors") for step in (4, 6, 8)}
    names = [name for name in states[4] if name.endswith("log_alpha")]
    assert not any(states[4][name].isinf().any() for name in names), "the cut comes before the fifth step"
    moved = 0
    for name in names:
        w = name.replace("log_alpha", "w")
        assert states[6][name].isinf().all() and torch.equal(states[6][name], states[8][name])
        kept = states[6][name] > 0
        moved += int((states[6][w] != states[8][w])[kept].sum())
    total = sum(states[4][name].numel() for name in names)
    assert moved == round(0.02 * total)
    adapter.fold()
    stored = [part for part in parts(adapter).values()]
    assert all(isinstance(part, Sparse) and part.index.dtype == torch.int32 for part in stored)
    assert sum(len(part.index) for part in stored) == round(0.02 * total)


def test_learning_rates(tmp_path: Path) -> None:
    """Of differences and gates; behind the cut a step of the differences is as long as the learning rate says."""
    trainer = make(tmp_path, save_strategy="steps", save_steps=1, lr_scheduler_type="constant")
    trainer.train()
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {2e-3, 2e-3 * 0.5, 2e-3 * 50}
    states = [load_file(tmp_path / f"checkpoint-{step}" / "trained.safetensors") for step in (1, 7, 8)]
    name = "layer1_up.w"
    assert float(states[0][name].abs().max()) == pytest.approx(2e-3 * 0.5, rel=0.01)
    unit = states[1]["layer1_up.unit"]
    assert unit == 2
    step = (unit * (states[2][name] - states[1][name])).abs().max()
    assert 0.2 * 2e-3 < float(step) < 4 * 2e-3


@pytest.mark.parametrize("at", [3, 5, 7])
def test_resume_before_and_behind_the_cut(tmp_path: Path, at: int) -> None:
    """From checkpoint-2, checkpoint-4 (where the cut is next) and checkpoint-6."""
    whole = make(tmp_path / "whole", save_strategy="steps")
    whole.train()
    with pytest.raises(RuntimeError, match="on purpose"):
        make(tmp_path / "cut", Stop(at), save_strategy="steps").train()
    again = make(tmp_path / "cut", save_strategy="steps")
    again.train(resume_from_checkpoint=True)
    for name, tensor in whole.adapter.state_dict().items():
        assert torch.equal(tensor, again.adapter.state_dict()[name]), name


def test_a_trainer_that_was_stopped_goes_on_from_before_the_cut(tmp_path: Path) -> None:
    """In the same process, where what ended training has made the cut."""
    whole = make(tmp_path / "whole", save_strategy="steps")
    whole.train()
    trainer = make(tmp_path / "again", save_strategy="steps")
    trainer.train()
    trainer.train(resume_from_checkpoint=str(tmp_path / "again" / "checkpoint-2"))
    for name, tensor in whole.adapter.state_dict().items():
        assert torch.equal(tensor, trainer.adapter.state_dict()[name]), name


def test_no_checkpoint_up_to_the_cut_is_the_best(tmp_path: Path) -> None:
    """Though all of them look better: they hold differences everywhere."""
    best = dict(eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, metric_for_best_model="loss")
    trainer = make(tmp_path, save_strategy="steps", save_steps=1, **best)
    losses = iter(range(100))
    trainer.scorer = lambda: {"loss": float(next(losses))}
    trainer.train()
    assert trainer.state.best_global_step == 5, "the first one behind the cut"
    trainer.adapter.fold()
    kept = sum(len(part.index) for part in parts(trainer.adapter).values())
    assert kept <= round(0.02 * sum(math.prod(part.shape) for part in parts(trainer.adapter).values()))


def test_the_cut_is_made_at_the_end_at_the_latest(tmp_path: Path) -> None:
    trainer = make(tmp_path, method="diff-pruning[share=0.02,cut_at=1]", save_strategy="no")
    trainer.train()
    assert all(part.fixed for part in parts(trainer.adapter).values())


def test_the_penalty_shuts_gates(tmp_path: Path) -> None:
    found = {}
    for penalty in (0.0, 1.0):
        trainer = make(tmp_path, method=f"diff-pruning[cut_at=1,gate_lr=50,penalty={penalty}]", save_strategy="steps")
        trainer.train()
        state = load_file(tmp_path / "checkpoint-8" / "trained.safetensors")
        found[penalty] = min(float(state[name].median()) for name in state if name.endswith("log_alpha"))
    assert found[1.0] < found[0.0] - 0.2


def test_phases_of_a_union(tmp_path: Path) -> None:
    trainer = make(tmp_path, method=f"mask[layers=0:,target_sparsity=0.5]|{METHOD}|lora[r=2]", save_strategy="no")
    trainer.train()
    gated = [part for part in trainer.adapter._entry.members() if isinstance(part, Gated)]
    assert gated and all(part.fixed for part in gated)
    assert float(trainer.adapter.extra_loss().detach()) > 0
    expected = output(trainer.model.eval(), inputs("bert")).detach()
    trainer.adapter.merge()
    assert torch.allclose(output(trainer.model, inputs("bert")), expected, atol=1e-5)


# Files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_sparse_files_round_trip(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, adapter = attached(family, "diff-pruning[share=0.005]", dtype)
    adapter.progress(1.0)
    batch = inputs(family)
    expected = output(model, batch).detach()
    differences = {site.key: part.difference().detach() for site, part in parts(adapter).items()}
    assert all(one.dtype == torch.float32 for one in differences.values())
    adapter.save(tmp_path)
    fresh = tiny(family, dtype)
    loaded = tt.load(fresh, tmp_path)
    assert torch.equal(output(fresh, batch), expected)
    for site, part in parts(loaded).items():
        dense = torch.zeros_like(differences[site.key]).flatten()
        dense[part.index.long()] = part.value
        assert torch.equal(dense.view_as(differences[site.key]), differences[site.key])
    stored = load_file(tmp_path / FILE)
    index = [tensor for name, tensor in stored.items() if name.endswith(".index")]
    total = sum(one.numel() for one in differences.values())
    assert sum(map(len, index)) == round(0.005 * total)
    data = sum(tensor.nbytes for name, tensor in stored.items() if not name.startswith("head_"))
    assert data == 8 * round(0.005 * total) <= 4 * total / 30


@pytest.mark.parametrize(
    "spoil",
    [
        lambda index, value: (index, value[:-1]),
        lambda index, value: (index + 10**6, value),
        lambda index, value: (index - 10**6, value),
        lambda index, value: (index.flip(0), value),
        lambda index, value: (index * 0, value),
        lambda index, value: (index.float(), value),
        lambda index, value: (index[None], value[None]),
    ],
)
def test_broken_files_are_refused(spoil: Any, tmp_path: Path) -> None:
    _, adapter = attached("bert", dtype=torch.float32)
    adapter.save(tmp_path)
    from safetensors import safe_open

    tensors = load_file(tmp_path / FILE)
    with safe_open(tmp_path / FILE, "pt") as file:
        metadata = file.metadata()
    keys = "layer1_up.index", "layer1_up.value"
    tensors |= dict(zip(keys, (one.contiguous() for one in spoil(*(tensors[key] for key in keys))), strict=True))
    rewrite(tmp_path, tensors, metadata)
    model = tiny("bert")
    with pytest.raises(tt.UserError, match=r"no rising places of a matrix \[48, 32\]"):
        tt.load(model, tmp_path)
    assert not hasattr(model, "trimtab")


def test_missing_tensors_are_listed(tmp_path: Path) -> None:
    _, adapter = attached("bert", dtype=torch.float32)
    adapter.save(tmp_path)
    tensors = load_file(tmp_path / FILE)
    del tensors["layer1_up.index"]
    rewrite(tmp_path, tensors)
    with pytest.raises(tt.UserError, match=r"missing layer1_up\.index"):
        tt.load(tiny("bert"), tmp_path)


# Mistakes


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("diff-pruning[share=0]", "share=0 must be above 0 and at most 1"),
        ("diff-pruning[share=1.5]", "share=1.5 must be above 0 and at most 1"),
        ("diff-pruning[cut_at=0]", "cut_at=0 must be above 0 and at most 1"),
        ("diff-pruning[penalty=-1]", "penalty=-1 must not be negative"),
        ("diff-pruning[gate_lr=0]", "gate_lr=0 must be above 0"),
        ("diff-pruning[layers=9]", "out of range; this model has layers 0 to 2"),
    ],
)
def test_mistakes(method: str, said: str) -> None:
    model = tiny("bert")
    with pytest.raises(tt.UserError, match=said):
        tt.attach(model, method)
    assert not hasattr(model, "trimtab")

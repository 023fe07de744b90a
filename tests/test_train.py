"""The training loop: the plain Trainer's losses, exact resume after any kind of stop, checkpoints without the base."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments

import trimtab as tt
from trimtab.batches import Collator, length
from trimtab.errors import UserError
from trimtab.snapshots import WEIGHTS, checkpoints, last_checkpoint
from trimtab.trainer import Trainer

COMMON = dict(vocab_size=97, pad_token_id=0, bos_token_id=1, eos_token_id=2)
LLAMA = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    **COMMON,
)


def tiny_llama() -> hf.PreTrainedModel:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA))


def tiny_t5() -> hf.PreTrainedModel:
    torch.manual_seed(0)
    sizes = dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, **COMMON))


def tiny_bert() -> hf.PreTrainedModel:
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return hf.BertForSequenceClassification(hf.BertConfig(num_labels=3, **sizes, **COMMON))


def examples(kind: str = "causal", count: int = 40) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(7)
    rows = []
    for _ in range(count):
        size = int(torch.randint(4, 20, (1,), generator=generator))
        ids = torch.randint(3, 97, (size,), generator=generator).tolist()
        answer = torch.randint(3, 97, (1 + size % 3,), generator=generator).tolist()
        labels: Any = {"causal": [-100] * size + answer, "seq2seq": answer, "encoder": size % 3}[kind]
        rows.append({"input_ids": ids + answer if kind == "causal" else ids, "labels": labels})
    return rows


MODELS = {"causal": tiny_llama, "seq2seq": tiny_t5, "encoder": tiny_bert}


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    settings: dict[str, Any] = dict(
        output_dir=str(folder),
        num_train_epochs=3,
        learning_rate=1e-2,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
        warmup_steps=0.06,
    )
    return TrainingArguments(**{**settings, **options})


def make(folder: Path, kind: str = "causal", method: str = "lora[dropout=0.2]", **options: Any) -> Trainer:
    model = MODELS[kind]()
    torch.manual_seed(1)
    adapter = tt.attach(model, method)
    ours = {name: options.pop(name) for name in ("batch_tokens", "log_file", "scorer", "callbacks") if name in options}
    rows = examples(kind)
    return Trainer(
        model, arguments(folder, **options), adapter=adapter, train_dataset=rows[:30], eval_dataset=rows[30:], **ours
    )


def losses(trainer: hf.Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def tensors(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.adapter.state_dict().items()}


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=tolerance)


# The boundary to transformers' own Trainer


@pytest.mark.parametrize("method", ["lora", "prompt[length=4]"])
@pytest.mark.parametrize("kind", ["causal", "seq2seq", "encoder"])
def test_losses_are_those_of_the_plain_trainer(tmp_path: Path, kind: str, method: str) -> None:
    ours = make(tmp_path / "ours", kind, method)
    ours.train()
    model = MODELS[kind]()
    torch.manual_seed(1)
    tt.attach(model, method)
    rows = examples(kind)
    plain = hf.Trainer(
        model,
        arguments(tmp_path / "plain", save_strategy="no"),
        data_collator=Collator(0),
        train_dataset=rows[:30],
        eval_dataset=rows[30:],
    )
    plain.train()
    assert len(losses(ours)) == 12
    assert losses(ours) == pytest.approx(losses(plain), abs=1e-5)
    assert ours.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], abs=1e-5)


def _vision() -> tuple[hf.PreTrainedModel, list[dict[str, Any]], dict[str, Any]]:
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    rows = [{"pixel_values": torch.randn(3, 8, 8), "labels": i % 2} for i in range(16)]
    return hf.ViTForImageClassification(hf.ViTConfig(image_size=8, patch_size=4, **sizes)), rows, {}


def _tokens_of_a_kind() -> tuple[hf.PreTrainedModel, list[dict[str, Any]], dict[str, Any]]:
    config = hf.BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, **COMMON)
    rows = [{"input_ids": torch.arange(3, 11), "labels": torch.arange(8) % 2} for _ in range(16)]
    return hf.BertForTokenClassification(config), rows, {}


def _regression() -> tuple[hf.PreTrainedModel, list[dict[str, Any]], dict[str, Any]]:
    config = tiny_bert().config
    config.num_labels = 1
    rows = [{"input_ids": torch.arange(3, 11), "labels": float(i)} for i in range(16)]
    return hf.BertForSequenceClassification(config), rows, {}


def _smoothing() -> tuple[hf.PreTrainedModel, list[dict[str, Any]], dict[str, Any]]:
    rows = [{"input_ids": torch.arange(3, 11), "labels": torch.arange(3, 11)} for _ in range(16)]
    return tiny_llama(), rows, {"label_smoothing_factor": 0.1}


@pytest.mark.parametrize("make_case", [_vision, _tokens_of_a_kind, _regression, _smoothing])
def test_other_losses_are_left_to_transformers(tmp_path: Path, make_case: Any) -> None:
    """Pictures, token classification, regression, label smoothing: the plain Trainer's losses."""
    found = []
    for trainer_class in (hf.Trainer, Trainer):
        torch.manual_seed(0)
        model, rows, options = make_case()
        torch.manual_seed(1)
        tt.attach(model, "lora[r=2]")
        args = arguments(tmp_path / trainer_class.__module__, num_train_epochs=1, **{"save_strategy": "no", **options})
        trainer = trainer_class(model=model, args=args, train_dataset=rows, data_collator=hf.default_data_collator)
        trainer.train()
        found.append(losses(trainer))
    assert len(found[0]) >= 1 and found[0] == pytest.approx(found[1], abs=1e-5)


def test_an_adapter_that_is_not_the_active_one_is_trained_all_the_same(tmp_path: Path) -> None:
    model = tiny_llama()
    first, second = tt.attach(model, "lora[r=2]", "first"), tt.attach(model, "lora[r=2]", "second")
    before = [{name: value.clone() for name, value in one.state_dict().items()} for one in (first, second)]
    rows = examples()
    Trainer(model, arguments(tmp_path, save_strategy="no"), adapter=first, train_dataset=rows).train()
    assert first.active
    assert any(not torch.equal(value, before[0][name]) for name, value in first.state_dict().items())
    assert_equal(second.state_dict(), before[1])


def test_evaluation_with_metrics_sees_the_plain_trainers_logits(tmp_path: Path) -> None:
    def metrics(prediction: Any) -> dict[str, float]:
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        hits = (logits[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]) & (prediction.label_ids[:, 1:] != -100)
        return {"hits": float(hits.sum()), "mean": float(logits[:, 0].mean())}

    ours = make(tmp_path / "ours")
    ours.compute_metrics = metrics
    model = tiny_llama()
    torch.manual_seed(1)
    tt.attach(model, "lora[dropout=0.2]")
    plain = hf.Trainer(
        model,
        arguments(tmp_path / "plain"),
        data_collator=Collator(0),
        eval_dataset=examples()[30:],
        compute_metrics=metrics,
    )
    one, two = ours.evaluate(), plain.evaluate()
    for name in ("eval_loss", "eval_hits", "eval_mean"):
        assert one[name] == pytest.approx(two[name], abs=1e-5)


@pytest.mark.parametrize("kind", ["causal", "seq2seq", "encoder"])
def test_accumulated_pieces_equal_the_big_batch(tmp_path: Path, kind: str) -> None:
    whole = make(tmp_path / "a", kind, "lora", per_device_train_batch_size=8)
    pieces = make(tmp_path / "b", kind, "lora", per_device_train_batch_size=2, gradient_accumulation_steps=4)
    whole.train()
    pieces.train()
    assert losses(pieces) == pytest.approx(losses(whole), abs=1e-5)
    assert_equal(tensors(whole), tensors(pieces), 2e-4)  # Adam divides rounding by small gradients


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    plain = make(tmp_path / "a", method="lora")
    checkpointed = make(tmp_path / "b", method="lora", activation_checkpointing=True)
    plain.train()
    checkpointed.train()
    assert losses(checkpointed) == pytest.approx(losses(plain), abs=1e-5)


def test_only_the_adapter_trains_and_the_base_stays_bit_for_bit(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "trimtab" not in name}
    start = tensors(trainer)
    trainer.train()
    for name, p in trainer.model.named_parameters():
        if "trimtab" not in name:
            assert torch.equal(p, before[name]) and p.grad is None
    assert any(not torch.equal(value, start[name]) for name, value in tensors(trainer).items())
    optimized = sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"])
    assert optimized == sum(p.numel() for p in trainer.adapter.parameters())


def test_the_optimizer_leaves_other_adapters_alone(tmp_path: Path) -> None:
    model = tiny_llama()
    other = tt.attach(model, "lora", name="other")
    mine = tt.attach(model, "prompt[length=3]", name="mine")
    with pytest.raises(UserError, match="other, mine"):
        Trainer(model, arguments(tmp_path))
    before = {name: value.clone() for name, value in other.state_dict().items()}
    trainer = Trainer(model, arguments(tmp_path, weight_decay=0.1), adapter=mine, train_dataset=examples())
    trainer.train()
    assert_equal(before, dict(other.state_dict()))
    assert all(p.requires_grad for p in other.parameters())


def test_the_models_configuration_is_left_as_it_was(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    assert trainer.model.config.use_cache is True


# Batches by token budget


def test_token_batches_cover_every_epoch_and_stay_within_the_budget(tmp_path: Path) -> None:
    seen: list[list[tuple[int, ...]]] = []

    class Spy(Trainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
            assert inputs["input_ids"].numel() <= 64
            seen.append([tuple(row[row != 0].tolist()) for row in inputs["input_ids"]])
            return super().training_step(model, inputs, num_items_in_batch)

    model = tiny_llama()
    tt.attach(model, "lora")
    rows = examples()
    trainer = Spy(model, arguments(tmp_path, num_train_epochs=2), train_dataset=rows, batch_tokens=64)
    trainer.train()
    steps = len(seen) // 2
    everything = sorted(tuple(row["input_ids"]) for row in rows)
    for epoch in (seen[:steps], seen[steps:]):
        assert sorted(row for batch in epoch for row in batch) == everything
    assert seen[:steps] != seen[steps:]
    assert trainer.step_log.tokens == 2 * sum(map(length, rows))


# Checkpoints and resume


class Kill(TrainerCallback):
    """Ends the training after a step as `how` says."""

    def __init__(self, step: int, how: str) -> None:
        self.step, self.how = step, how

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            if self.how == "exit":
                os._exit(9)
            if self.how == "interrupt":
                os.kill(os.getpid(), signal.SIGINT)
            else:
                raise RuntimeError("on purpose")


RUN = dict(save_strategy="steps", save_steps=5, batch_tokens=64, gradient_accumulation_steps=2)


def test_a_run_that_raised_resumes_to_the_same_numbers(tmp_path: Path) -> None:
    whole = make(tmp_path / "whole", log_file=tmp_path / "whole.jsonl", **RUN)
    whole.train()
    cut = make(tmp_path / "cut", log_file=tmp_path / "cut.jsonl", callbacks=[Kill(8, "raise")], **RUN)
    with pytest.raises(RuntimeError, match="on purpose"):
        cut.train()
    assert last_checkpoint(tmp_path / "cut") == tmp_path / "cut" / "checkpoint-5"
    again = make(tmp_path / "cut", log_file=tmp_path / "cut.jsonl", **RUN)
    again.train(resume_from_checkpoint=True)
    assert_equal(tensors(whole), tensors(again))
    left, right = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("whole.jsonl", "cut.jsonl")
    )
    assert [row["step"] for row in right] == list(range(1, whole.state.max_steps + 1))
    for key in ("step", "loss", "lr", "tokens", "epoch"):
        assert [row[key] for row in left] == [row[key] for row in right]
    assert all(a["seconds"] <= b["seconds"] for a, b in itertools.pairwise(right))


@pytest.mark.parametrize("epochs_end", [False, True])
def test_resume_in_the_middle_and_at_the_end_of_an_epoch(tmp_path: Path, epochs_end: bool) -> None:
    options: dict[str, Any] = dict(save_strategy="epoch") if epochs_end else dict(save_strategy="steps", save_steps=3)
    whole = make(tmp_path / "whole", **options)
    whole.train()
    cut = make(tmp_path / "cut", callbacks=[Kill(7, "raise")], **options)
    with pytest.raises(RuntimeError):
        cut.train()
    again = make(tmp_path / "cut", **options)
    again.train(resume_from_checkpoint=True)
    assert_equal(tensors(whole), tensors(again))


def test_ctrl_c_saves_a_checkpoint_and_resumes(tmp_path: Path) -> None:
    whole = make(tmp_path / "whole", **RUN)
    whole.train()
    cut = make(tmp_path / "cut", callbacks=[Kill(3, "interrupt")], **RUN)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="step 3"):
        cut.train()
    assert signal.getsignal(signal.SIGINT) is handler
    assert last_checkpoint(tmp_path / "cut") == tmp_path / "cut" / "checkpoint-3"
    again = make(tmp_path / "cut", **RUN)
    again.train(resume_from_checkpoint=True)
    assert_equal(tensors(whole), tensors(again))


def test_a_killed_process_resumes_to_the_same_numbers(tmp_path: Path) -> None:
    script = textwrap.dedent(
        f"""
        import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        import test_train as t
        t.make(Path({str(tmp_path / "cut")!r}), callbacks=[t.Kill(8, "exit")], **t.RUN).train()
        """
    )
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == 9
    again = make(tmp_path / "cut", **RUN)
    again.train(resume_from_checkpoint=True)
    whole = make(tmp_path / "whole", **RUN)
    whole.train()
    assert_equal(tensors(whole), tensors(again), 1e-6)


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(tmp_path, **RUN)
    save = Trainer._save_rng_state

    def broken(self: Trainer, folder: str) -> None:
        if self.state.global_step == 10:
            raise OSError("disk full")
        save(self, folder)

    monkeypatch.setattr(Trainer, "_save_rng_state", broken)
    with pytest.raises(UserError, match="disk full"):
        trainer.train()
    assert (tmp_path / ".checkpoint-10").is_dir()
    assert checkpoints(tmp_path) == [tmp_path / "checkpoint-5"]
    monkeypatch.undo()
    again = make(tmp_path, **RUN)
    again.train(resume_from_checkpoint=True)
    assert not (tmp_path / ".checkpoint-10").exists()


def test_checkpoints_hold_the_adapter_and_no_base_weight(tmp_path: Path) -> None:
    trainer = make(tmp_path, **RUN, save_total_limit=1)
    trainer.train()
    (only,) = checkpoints(tmp_path)
    assert_equal(tensors(trainer), load_file(only / WEIGHTS))
    trained = sum(p.numel() for p in trainer.adapter.parameters())
    assert sum(path.stat().st_size for path in only.iterdir()) < 20 * trained + 60_000


def test_load_best(tmp_path: Path) -> None:
    scores = iter([0.5, 0.9, 0.4])
    kept: dict[int, dict[str, torch.Tensor]] = {}
    trainer = make(
        tmp_path,
        scorer=lambda: (kept.update({trainer.state.global_step: tensors(trainer)}), {"accuracy": next(scores)})[1],
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        greater_is_better=True,
        save_total_limit=1,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-8")
    assert_equal(tensors(trainer), kept[8])
    assert [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry] == [
        0.5,
        0.9,
        0.4,
    ]


def test_full_fine_tuning_resumes_too(tmp_path: Path) -> None:
    whole = make(tmp_path / "whole", method="full", learning_rate=1e-3, **RUN)
    whole.train()
    cut = make(tmp_path / "cut", method="full", learning_rate=1e-3, callbacks=[Kill(7, "raise")], **RUN)
    with pytest.raises(RuntimeError):
        cut.train()
    again = make(tmp_path / "cut", method="full", learning_rate=1e-3, **RUN)
    again.train(resume_from_checkpoint=True)
    assert_equal(tensors(whole), tensors(again))


def test_a_checkpoint_of_another_method_or_with_a_file_missing_is_refused(tmp_path: Path) -> None:
    make(tmp_path, **RUN).train()
    folder = last_checkpoint(tmp_path)
    assert folder is not None
    with pytest.raises(UserError, match=r"checkpoint of .*lora.*, not of prompt"):
        make(tmp_path, method="prompt[length=4]", **RUN).train(resume_from_checkpoint=str(folder))
    (folder / "optimizer.pt").unlink()
    with pytest.raises(UserError, match=r"lacks optimizer\.pt"):
        make(tmp_path, **RUN).train(resume_from_checkpoint=str(folder))
    assert last_checkpoint(tmp_path) != folder


# What goes wrong


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_number_that_is_not_finite_stops_the_run_before_the_weights_change(tmp_path: Path, broken: str) -> None:
    class Explodes(Trainer):
        def compute_loss(self, *args: Any, **options: Any) -> Any:
            loss = super().compute_loss(*args, **options)
            if self.state.global_step < 6:
                return loss
            if broken == "loss":
                return loss * float("nan")
            first = next(iter(self.adapter.parameters()))
            return loss + (first.sum() - first.detach().sum()).abs().sqrt()  # finite, its gradient is not

    model = tiny_llama()
    adapter = tt.attach(model, "lora")
    trainer = Explodes(
        model, arguments(tmp_path, save_strategy="steps", save_steps=5), adapter=adapter, train_dataset=examples()
    )
    with pytest.raises(UserError, match=r"at step 7 \(learning rate .*last good checkpoint is .*checkpoint-5"):
        trainer.train()
    assert all(torch.isfinite(p).all() for p in adapter.parameters())


@pytest.mark.parametrize(("rate", "broken", "kept"), [(1e30, False, 1), (0.01, True, 3)])
def test_numbers_that_explode_leave_a_checkpoint_to_go_on_from(
    tmp_path: Path, rate: float, broken: bool, kept: int
) -> None:
    """A real explosion and an injected NaN: the checkpoint that gives such a loss is not kept, the one before is."""

    class Explodes(Trainer):
        broken = False

        def compute_loss(self, *args: Any, **options: Any) -> Any:
            loss = super().compute_loss(*args, **options)
            return loss * float("nan") if self.broken and self.state.global_step == kept + 1 else loss

    def trainer(rate: float) -> Explodes:
        torch.manual_seed(0)
        model = tiny_llama()
        how = arguments(tmp_path, save_strategy="steps", save_steps=1, save_total_limit=1, learning_rate=rate)
        how.warmup_steps = 1  # the first step's rate is 0
        return Explodes(model, how, adapter=tt.attach(model, "lora"), train_dataset=examples())

    first = trainer(rate)
    first.broken = broken
    said = rf"the (loss became nan|gradient became non-finite.*) at step {kept + 2} .*checkpoint-{kept}; go on"
    with pytest.raises(UserError, match=said):
        first.train()
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{kept}"]
    again = trainer(0.001)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == again.state.max_steps
    after = [line["learning_rate"] for line in again.state.log_history if kept < line["step"] < again.state.max_steps]
    assert len(after) > 5 and all(0 < one <= 0.001 for one in after)
    assert all(torch.isfinite(p).all() for p in again.adapter.parameters())
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{again.state.max_steps}"]


def test_a_batch_without_any_label_is_no_nan(tmp_path: Path) -> None:
    model = tiny_llama()
    tt.attach(model, "lora")
    rows = [{"input_ids": [4, 5, 6], "labels": [-100, -100, -100]}] * 4
    trainer = Trainer(model, arguments(tmp_path, num_train_epochs=1), train_dataset=rows)
    trainer.train()
    assert losses(trainer) == [0.0]

"""One attached model under three training loops: transformers.Trainer, TRL's SFTTrainer and trimtab's own.

    python -m benchmarks.trainer_boundary

makes an environment of its own in the cache folder (TRL brings its own wishes), trains the same tiny model on the
same batches under each loop (evaluate with metrics, checkpoint, kill, resume, load the best), and fails where a loss
differs by more than 1e-5 or a resumed run ends elsewhere than an uninterrupted one. Nothing is downloaded but packages.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.environments import ROOT, TORCH, environment, run

PINS = ("-c", str(ROOT / "constraints.txt"))
INSTALLS = ((*PINS, TORCH), (*PINS, "trl", "-e", str(ROOT)))
LOOPS = ("plain", "trl", "trimtab")
METHODS = ("lora[r=4,dropout=0.1]", "prompt[length=4]")
TOLERANCE = 1e-5
KILLED_AFTER = 8  # steps; the last checkpoint is of step 5


def train(loop: str, method: str, folder: Path, resume: bool, kill: bool) -> None:
    """One run inside the environment; writes its numbers to result.json."""
    import torch
    import transformers as hf

    import trimtab as tt

    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(_config())
    torch.manual_seed(1)
    adapter = tt.attach(model, method)
    trainer = _trainer(loop, model, folder, _rows())
    if kill:
        trainer.add_callback(_killer())
    trainer.train(resume_from_checkpoint=True if resume else None)
    history = trainer.state.log_history
    best = Path(trainer.state.best_model_checkpoint)
    result = {
        "losses": {entry["step"]: entry["loss"] for entry in history if "loss" in entry},
        "evals": {entry["step"]: [entry["eval_loss"], entry["eval_hits"]] for entry in history if "eval_loss" in entry},
        "best": best.name,
        "trained": {name: weight.tolist() for name, weight in adapter.state_dict().items()},
    }
    (folder / "result.json").write_text(json.dumps(result))


def _config() -> Any:
    import transformers as hf

    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return hf.LlamaConfig(vocab_size=97, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes)


def _rows() -> list[dict[str, list[int]]]:
    import torch

    generator = torch.Generator().manual_seed(7)
    rows = []
    for size in torch.randint(4, 20, (40,), generator=generator).tolist():
        prompt = torch.randint(3, 97, (size,), generator=generator).tolist()
        answer = torch.randint(3, 97, (3,), generator=generator).tolist()
        rows.append({"input_ids": prompt + answer, "labels": [-100] * size + answer})
    return rows


def _trainer(loop: str, model: Any, folder: Path, rows: list[dict[str, list[int]]]) -> Any:
    import datasets
    import transformers as hf

    from trimtab.batches import Collator
    from trimtab.trainer import Trainer

    options: dict[str, Any] = dict(
        output_dir=str(folder),
        num_train_epochs=4,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=10,
        gradient_accumulation_steps=2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=5,
        save_strategy="steps",
        save_steps=5,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        seed=3,
    )
    train, held_out = (datasets.Dataset.from_list(part) for part in (rows[:30], rows[30:]))
    data: dict[str, Any] = dict(train_dataset=train, eval_dataset=held_out, data_collator=Collator(0))
    data["compute_metrics"] = _hits
    if loop == "plain":
        return hf.Trainer(model, hf.TrainingArguments(**options), **data)
    if loop == "trimtab":
        return Trainer(model, hf.TrainingArguments(**options), **data)
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(dataset_kwargs={"skip_prepare_dataset": True}, **options)
    return SFTTrainer(model, args, processing_class=_tokenizer(), **data)


def _tokenizer() -> Any:
    import transformers as hf
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{index}": index for index in range(3, 97)}}
    inner = Tokenizer(WordLevel(words, unk_token="<pad>"))
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def _hits(prediction: Any) -> dict[str, float]:
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    targets = prediction.label_ids[:, 1:]
    return {"hits": float(((logits[:, :-1].argmax(-1) == targets) & (targets != -100)).sum())}


def _killer() -> Any:
    from transformers import TrainerCallback

    class Killer(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == KILLED_AFTER:
                os._exit(9)

    return Killer()


def compare(python: Path) -> bool:
    """Runs every loop with every method, whole and killed; prints a table; whether everything agrees."""
    print(f"{'method':28} {'loop':8} {'steps':>5} {'loss':>9} {'eval':>9} {'resumed':>9}  best")
    fine = True
    for method in METHODS:
        with TemporaryDirectory() as folder:
            results = {loop: _both(python, loop, method, Path(folder) / loop) for loop in LOOPS}
        reference = results["plain"][0]
        for loop, (whole, resumed) in results.items():
            loss = max(abs(whole["losses"][step] - value) for step, value in reference["losses"].items())
            evals = [
                abs(a - b)
                for step, row in reference["evals"].items()
                for a, b in zip(row, whole["evals"][step], strict=True)
            ]
            again = max(_distance(whole["losses"], resumed["losses"]), _distance(whole["trained"], resumed["trained"]))
            steps = len(whole["losses"])
            best = f"{whole['best']} / {resumed['best']}"
            print(f"{method:28} {loop:8} {steps:5} {loss:9.1e} {max(evals):9.1e} {again:9.1e}  {best}", flush=True)
            fine &= max(loss, *evals, again) <= TOLERANCE and {whole["best"], resumed["best"]} == {reference["best"]}
    return fine


def _both(python: Path, loop: str, method: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    whole = _run(python, loop, method, folder / "whole")
    _run(python, loop, method, folder / "cut", "--kill")
    return whole, _run(python, loop, method, folder / "cut", "--resume")


def _run(python: Path, loop: str, method: str, folder: Path, *flags: str) -> dict[str, Any]:
    options = ("--loop", loop, "--method", method, "--folder", folder, *flags)
    done = run(python, "benchmarks.trainer_boundary", *options)
    if done.returncode != (9 if "--kill" in flags else 0):
        raise SystemExit(f"{loop} with {method} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return {} if "--kill" in flags else json.loads((folder / "result.json").read_text())


def _distance(one: dict[str, Any], two: dict[str, Any]) -> float:
    """The largest difference of numbers in two dicts of numbers or nested lists."""

    def flat(value: Any) -> list[float]:
        return [number for part in value for number in flat(part)] if isinstance(value, list) else [value]

    return max(abs(a - b) for key in one for a, b in zip(flat(one[key]), flat(two[key]), strict=True))


def main() -> None:
    """The command line: without arguments the comparison, with them one run inside the environment."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--loop", choices=LOOPS, help=argparse.SUPPRESS)
    parser.add_argument("--method", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--kill", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.loop:
        return train(given.loop, given.method, given.folder, given.resume, given.kill)
    sys.exit(0 if compare(environment("trainer-boundary", *INSTALLS)) else 1)


if __name__ == "__main__":
    main()

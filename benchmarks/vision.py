"""Pictures: a small ViT trained here on Fashion-MNIST, tuned to handwritten digits by small methods and by full
fine-tuning. Knows which runs are made and how one is made and shown; refuses to know how methods train.

    python -m benchmarks.vision              trains the ViT if there is none, then what has no result; writes the page
    python -m benchmarks.vision --report     only write the page from the results that are there
    python -m benchmarks.vision --quick      a few pictures and epochs, with a page of its own
    python -m benchmarks.vision --dinov2     the head and llama-adapter of DINOv2-S as well (benchmarks/dinov2.py)

Fashion-MNIST comes from Debian's package `dataset-fashion-mnist`, the digits from scikit-learn. Every run is one of
`trimtab train`: folders of pictures in, a run's folder out, evaluated on a fresh base. A cell is one run (method,
learning rate, seed); it leaves one JSON file and is not run again with the same settings and base. A method's learning
rate is the one with the highest accuracy on the dev digits (of equal ones the lower loss) with the first seed, and only
that rate runs with the other seeds: the test digits choose nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import io
import shutil
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.cells import Clock, run_all
from benchmarks.fashion import read as read_fashion
from benchmarks.pages import fill, header, row
from trimtab.cells import Figures, known, write

ROOT = Path(__file__).resolve().parent.parent
SIZE = 28
SHAPE: dict[str, Any] = dict(
    hidden_size=96, intermediate_size=192, num_hidden_layers=6, num_attention_heads=4, image_size=SIZE, patch_size=7
)
"""The small ViT: 16 patches and a class token, 0.46 million parameters."""
DINOV2_SIZE = 22_056_576 + 7_690
"""Parameters of DINOv2-S and of a head for ten classes on its class token and its patches' mean."""
SHARE = 0.05
"""What a small method may keep of full fine-tuning's parameters."""
POINT = 0.01
"""How far below full fine-tuning's accuracy the best of them may stay."""
Pictures = NDArray[np.uint8]
"""[pictures, height, width], grey"""


# -- the plan -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One line of the table: a method and the learning rates that are tried."""

    name: str
    method: str
    lrs: tuple[float, ...]


ENTRIES = (
    Entry("full", "full", (1e-3, 3e-3)),
    Entry("llama-adapter", "llama-adapter[length=20,layers=0:]", (1e-2, 3e-2)),
    Entry("prefix", "prefix[length=16,form=flat]", (1e-2, 3e-2)),
    Entry("houlsby", "houlsby[size=6]", (3e-3, 1e-2)),
    Entry("lora", "lora[r=4,targets=q,k,v,o]", (3e-3, 1e-2)),
    Entry("diff-pruning", "diff-pruning[share=0.045,layers=0:]", (1e-2, 3e-2)),
    Entry("head", "head", (1e-2, 3e-2)),
)
DINOV2 = (
    Entry("dinov2-llama-adapter", "llama-adapter[length=20,layers=-3:]", (3e-3, 1e-2)),
    Entry("dinov2-head", "head", (3e-3, 1e-2)),
)
SEEDS = (0, 1, 2)
EPOCHS = {"vit": 6, "dinov2": 4}
"""Passes over the digits, the same for every method of a model."""


@dataclass(frozen=True)
class Cell:
    """One run. Equal settings and an equal base mean an equal result, so they are stored with it."""

    entry: str
    method: str
    lr: float
    seed: int
    base: str
    """The beginning of the SHA-256 of the base's weights."""
    model: str = "vit"
    """Which base it is: vit or dinov2."""
    train: int = 1000
    dev: int = 297
    test: int = 500
    epochs: int = 6
    batch_size: int = 32

    @property
    def name(self) -> str:
        """File name of the result, without suffix."""
        longer = "" if self.epochs == EPOCHS[self.model] else f"-epochs{self.epochs}"
        return f"{self.entry}-lr{self.lr:g}-seed{self.seed}{longer}"


@dataclass(frozen=True)
class Pretraining:
    """How the small ViT learns Fashion-MNIST."""

    train: int = 20_000
    """The first of 60,000."""
    test: int = 2_000
    epochs: int = 4
    lr: float = 1e-3
    batch_size: int = 64
    name: str = "pretraining"


# -- pictures -----------------------------------------------------------------------------------------------------


def digits() -> tuple[Pictures, NDArray[np.uint8]]:
    """scikit-learn's handwritten digits [1797, 8, 8], light on dark like Fashion-MNIST, shuffled once."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    pictures = np.rint(found.images * 255 / 16).astype(np.uint8)
    return pictures[order], found.target[order].astype(np.uint8)


def save_table(file: Path, pictures: Pictures, classes: NDArray[np.uint8]) -> str:
    """A Parquet file with a column of images, as hub datasets have them."""
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    rows = {"image": [{"bytes": png(one), "path": None} for one in pictures], "label": [str(one) for one in classes]}
    datasets.Dataset.from_dict(rows, features).to_parquet(str(file))
    return str(file)


def save_folders(folder: Path, pictures: Pictures, classes: NDArray[np.uint8]) -> str:
    """A folder of class folders."""
    for at, (picture, label) in enumerate(zip(pictures, classes, strict=True)):
        file = folder / str(label) / f"{at:04}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(picture))
    return str(folder)


def png(picture: NDArray[np.uint8]) -> bytes:
    """A picture's file."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def sides(folder: Path, cell: Cell) -> dict[str, str]:
    """The digits by side, written once."""
    made = folder / f"digits-{cell.train}-{cell.dev}-{cell.test}"
    if not made.exists():
        pictures, classes = digits()
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:
            start = 0
            for side in ("train", "dev", "test"):
                end = start + getattr(cell, side)
                save_folders(Path(unfinished, "all", side), pictures[start:end], classes[start:end])
                start = end
            try:
                Path(unfinished, "all").rename(made)
            except OSError:
                if not made.is_dir():  # otherwise another process was first, and its copy is as good
                    raise
    return {side: str(made / side) for side in ("train", "dev", "test")}


# -- the base -----------------------------------------------------------------------------------------------------


def pretrain(folder: Path, plan: Pretraining) -> Figures:
    """Train the small ViT from nothing and keep it, without its head, in `folder`/vit."""
    import torch
    import transformers

    import trimtab as tt
    from trimtab.models import quiet

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=folder) as work, quiet():
        start, learned = str(Path(work, "start")), Path(work, "learned")
        transformers.ViTModel(transformers.ViTConfig(**SHAPE), add_pooling_layer=False).save_pretrained(start)
        tables = {}
        for side, part, most in (("train", "train", plan.train), ("test", "t10k", plan.test)):
            pictures, classes = read_fashion(part)
            tables[side] = save_table(Path(work, f"{side}.parquet"), pictures[:most], classes[:most])
        settings = tt.TrainSettings(
            start, tables["train"], str(learned), method="full", task="classify", epochs=plan.epochs, lr=plan.lr,
            batch_size=plan.batch_size, eval_data=tables["test"], eval_limit=plan.test,
        )  # fmt: skip
        metrics = tt.fine_tune(settings, show=False)
        model = transformers.ViTForImageClassification.from_pretrained(learned)
        model.base_model.save_pretrained(folder / "vit")
        shutil.copy(learned / "preprocessor_config.json", folder / "vit")
    figures = {"accuracy": metrics["after"]["accuracy"], "learned": plan.train, "tested": plan.test}
    return {**figures, **metrics["train"], **metrics["parameters"]}


def base_of(folder: Path, model: str) -> Path:
    """The folder of a base model."""
    if model == "vit":
        return folder / "vit"
    from benchmarks import dinov2

    return dinov2.folder()


def digest(base: Path) -> str:
    """Of a base's weights."""
    return hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()[:12]


# -- one cell -----------------------------------------------------------------------------------------------------


def run(folder: Path, cell: Cell) -> Figures:
    """Tune the base as the cell says; the figures of the dev and the test digits."""
    import trimtab as tt
    from trimtab.checkpoint import WEIGHTS
    from trimtab.models import quiet

    data = sides(folder, cell)
    with tempfile.TemporaryDirectory() as work, quiet():
        output = Path(work, "out")
        base = str(base_of(folder, cell.model))
        settings = tt.TrainSettings(
            base, data["train"], str(output), method=cell.method, task="classify", epochs=cell.epochs, lr=cell.lr,
            batch_size=cell.batch_size, eval_data=data["dev"], seed=cell.seed, save_steps=10**6,
        )  # fmt: skip
        metrics = tt.fine_tune(settings, show=False)
        tested = tt.evaluate_run(output, data["test"], show=False)
        kept = metrics["parameters"]["trainable"] if cell.method == "full" else stored(output / WEIGHTS)
    return {
        "dev_accuracy": metrics["after"]["accuracy"], "dev_loss": metrics["after"]["loss"],
        "test_accuracy": tested["accuracy"], "test_loss": tested["loss"], "seconds": metrics["train"]["seconds"],
        "trained": metrics["parameters"]["trainable"], "bytes": metrics["bytes"],
        "kept": kept,
    }  # fmt: skip


def stored(file: Path) -> int:
    """How many numbers an adapter's file holds, positions of sparse ones left out."""
    from safetensors.torch import load_file

    return sum(tensor.numel() for tensor in load_file(file).values() if tensor.is_floating_point())


def estimate(cell: Cell) -> float:
    """About how many seconds a cell takes with one thread."""
    if cell.model == "dinov2":
        return 40 + cell.epochs * cell.train * (0.0 if cell.method == "head" else 8e-3)
    return 5 + cell.epochs * cell.train * (1.4e-3 if cell.entry == "full" else 1e-3)


# -- the report ---------------------------------------------------------------------------------------------------


def chosen(cells: Sequence[Cell], results: Mapping[Cell, Figures]) -> Cell | None:
    """The first seed's cell with the highest dev accuracy, of equal ones the lowest dev loss; None while one is due."""
    first = [cell for cell in cells if cell.seed == SEEDS[0]]
    if any(cell not in results for cell in first):
        return None
    return max(first, key=lambda cell: (results[cell]["dev_accuracy"], -results[cell]["dev_loss"]))


def best_of(plan: Mapping[str, list[Cell]], results: Mapping[Cell, Figures]) -> dict[str, list[Cell]]:
    """Of each entry the cells of its learning rate, one a seed, that have a result."""
    found = {}
    for name, cells in plan.items():
        best = chosen(cells, results)
        found[name] = [one for one in cells if best and one.lr == best.lr and one in results]
    return found


def report(
    plan: Mapping[str, list[Cell]], results: Mapping[Cell, Figures], pretrained: Figures | None
) -> dict[str, list[str]]:
    """The page's blocks."""
    small = {name: cells for name, cells in plan.items() if cells[0].model == "vit"}
    large = {name: cells for name, cells in plan.items() if cells[0].model == "dinov2"}
    best = best_of(small, results)
    whole = results[best["full"][0]]["trained"] if best.get("full") else None
    return {
        "setup": setup_lines(small, pretrained),
        "scores": score_lines(best, results, whole),
        "goal": goal_lines(best, results),
        "dinov2": score_lines(best_of(large, results), results, DINOV2_SIZE),
        "rates": rate_lines(plan, results),
    }


def score_lines(best: Mapping[str, list[Cell]], results: Mapping[Cell, Figures], whole: int | None) -> list[str]:
    """The table of the chosen rates, and what it lacks; `whole` is what full fine-tuning trains."""
    if not any(best.values()):
        return ["No results yet."]
    lines = header(
        "method", "trained", "kept", "share of full", "learning rate", "dev accuracy", "test accuracy", "seconds"
    )
    for cells in best.values():
        if not cells:
            continue
        own = [results[cell] for cell in cells]
        share = f"{kept(own[0]) / whole:.1%}" if whole else "–"
        dev, test = (points([one[f"{side}_accuracy"] for one in own]) for side in ("dev", "test"))
        seconds = f"{statistics.fmean(one['seconds'] for one in own):.0f}"
        lines.append(
            row(
                f"`{cells[0].method}`", f"{own[0]['trained']:,}", f"{kept(own[0]):,}", share, f"{cells[0].lr:g}", dev,
                test, seconds,
            )
        )  # fmt: skip
    return [*lines, "", *missing_lines(best)]


def kept(figures: Figures) -> int:
    """The parameters that are stored; as many as are trained where the run did not say otherwise."""
    return int(figures.get("kept", figures["trained"]))


def points(values: Sequence[float]) -> str:
    """Mean ± standard deviation in per cent."""
    mean = f"{100 * statistics.fmean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.1f}"


def missing_lines(best: Mapping[str, list[Cell]]) -> list[str]:
    return [
        f"{name} has {len(cells)} of {len(SEEDS)} seeds." for name, cells in best.items() if len(cells) < len(SEEDS)
    ]


def setup_lines(plan: Mapping[str, list[Cell]], pretrained: Figures | None) -> list[str]:
    cell = next(iter(plan.values()))[0]
    if pretrained is None:
        return ["The ViT is not trained yet."]
    return [
        f"The ViT ({SHAPE['num_hidden_layers']} layers, width {SHAPE['hidden_size']}, patches of "
        f"{SHAPE['patch_size']} × {SHAPE['patch_size']}; {pretrained['total']:,} parameters with its head) names "
        f"{pretrained['accuracy']:.1%} of {pretrained['tested']:,} of Fashion-MNIST's test pictures after "
        f"{pretrained['epochs']:g} epochs on {pretrained['learned']:,} of its training pictures "
        f"({pretrained['seconds'] / 60:.1f} minutes). Digits: {cell.train} to learn from ({cell.epochs} epochs, "
        f"{cell.batch_size} a batch), {cell.dev} to choose the learning rate by, {cell.test} to test on; "
        f"{len(SEEDS)} seeds. The head is trained with every method and counted."
    ]


def goal_lines(best: Mapping[str, list[Cell]], results: Mapping[Cell, Figures]) -> list[str]:
    """Which small methods come within a point of full fine-tuning."""
    if not best.get("full"):
        return ["Full fine-tuning has no result yet."]
    whole = statistics.fmean(results[cell]["test_accuracy"] for cell in best["full"])
    size = results[best["full"][0]]["trained"]
    lines = []
    for name, cells in best.items():
        if name == "full" or not cells:
            continue
        mean = statistics.fmean(results[cell]["test_accuracy"] for cell in cells)
        share = kept(results[cells[0]]) / size
        verdict = "yes" if mean >= whole - POINT and share <= SHARE else "no"
        lines.append(
            f"- {name} within a point of full with at most {SHARE:.0%} of its parameters: **{verdict}** "
            f"({100 * (mean - whole):+.1f} points, {share:.1%})"
        )
    return lines


def rate_lines(plan: Mapping[str, list[Cell]], results: Mapping[Cell, Figures]) -> list[str]:
    lines = header("method", "learning rate", "dev accuracy", "dev loss")
    for cells in plan.values():
        for cell in cells:
            if cell.seed == SEEDS[0] and cell in results:
                own = results[cell]
                accuracy, loss = f"{100 * own['dev_accuracy']:.1f}", f"{own['dev_loss']:.3f}"
                lines.append(row(f"`{cell.method}`", f"{cell.lr:g}", accuracy, loss))
    return lines


# -- command line -------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        "python -m benchmarks.vision", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--quick", action="store_true", help="a few pictures and epochs, a page of its own")
    made.add_argument("--report", action="store_true", help="write the page from the results that are there")
    made.add_argument(
        "--method", choices=[entry.name for entry in (*ENTRIES, *DINOV2)], action="append", help="run this only"
    )
    made.add_argument("--dinov2", action="store_true", help="DINOv2-S as well; fetches and converts it on first use")
    made.add_argument("--threads", type=int, default=1, metavar="N", help="threads (1)")
    made.add_argument("--output", type=Path, metavar="DIR", help="folder of the results (benchmarks/out/vision)")
    return made


def planned(base: str, quick: bool, model: str = "vit") -> dict[str, list[Cell]]:
    """The cells of each method: every rate with every seed."""
    like = Cell("", "", 0.0, 0, base, model, epochs=EPOCHS[model])
    entries: Sequence[Entry] = ENTRIES if model == "vit" else DINOV2
    if quick:
        like = dataclasses.replace(like, train=100, dev=50, test=50, epochs=2)
        entries = [dataclasses.replace(entry, lrs=entry.lrs[:2]) for entry in entries]
    return {
        entry.name: [
            dataclasses.replace(like, entry=entry.name, method=entry.method, lr=lr, seed=seed)
            for seed in SEEDS
            for lr in entry.lrs
        ]
        for entry in entries
    }


def whole_plan(folder: Path, arguments: argparse.Namespace) -> dict[str, list[Cell]]:
    """The cells of all models that are asked for."""
    models = ("vit", "dinov2") if arguments.dinov2 else ("vit",)
    parts = [planned(digest(base_of(folder, model)), arguments.quick, model) for model in models]
    return {name: cells for part in parts for name, cells in part.items()}


def run_plan(folder: Path, plan: Mapping[str, list[Cell]]) -> int:
    """Run what has no result: the first seed of every rate, then the other seeds of the best; returns the crashes."""
    work = functools.partial(run, folder)
    first = [cell for cells in plan.values() for cell in cells if cell.seed == SEEDS[0]]
    others = [cell for cells in plan.values() for cell in cells if cell.lr == cells[0].lr and cell.seed != SEEDS[0]]
    done = known(folder, [*first, *others])
    clock = Clock(estimate, sum(estimate(cell) for cell in [*first, *others] if cell not in done))
    print(f"about {clock.rest / 60:.0f} minutes with one thread", flush=True)
    crashed = len(run_all(folder, first, work, clock))
    results = known(folder, first)
    best = [chosen(cells, results) for cells in plan.values()]
    again = [dataclasses.replace(cell, seed=seed) for cell in best if cell for seed in SEEDS[1:]]
    return crashed + len(run_all(folder, again, work, clock))


def main() -> int:
    import torch

    arguments = parser().parse_args()
    torch.set_num_threads(arguments.threads)
    folder = arguments.output or ROOT / "benchmarks/out" / ("vision-quick" if arguments.quick else "vision")
    folder.mkdir(parents=True, exist_ok=True)
    pretraining = Pretraining(train=512, test=200, epochs=1) if arguments.quick else Pretraining()
    crashed = 0
    if not arguments.report:
        try:
            crashed = len(
                run_all(folder, [pretraining], lambda plan: pretrain(folder, plan), Clock(lambda _: 240, 240))
            )
            if crashed:
                return 1
            plan = whole_plan(folder, arguments)
            wanted = {name: cells for name, cells in plan.items() if not arguments.method or name in arguments.method}
            crashed = run_plan(folder, wanted)
        except KeyboardInterrupt:
            print("stopped; the same command goes on from here", flush=True)
            return 130
    plan = whole_plan(folder, arguments)
    results = known(folder, [cell for cells in plan.values() for cell in cells])
    blocks = report(plan, results, known(folder, [pretraining]).get(pretraining))
    print("\n\n".join("\n".join(lines) for lines in blocks.values()))
    page = (ROOT / "docs/vision.md").read_text(encoding="utf-8")
    target = folder / "vision.md" if arguments.quick else ROOT / "docs/vision.md"
    write(target, fill(page, blocks, target.name))
    return 1 if crashed else 0


if __name__ == "__main__":
    raise SystemExit(main())

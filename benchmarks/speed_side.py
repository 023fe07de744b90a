"""One run of one side of the speed benchmark, in a process of its own: trimtab, a peer, or the bare base. Knows how
each trains and evaluates; refuses to know what is compared.

    python -m benchmarks.speed_side SIDE WORKLOAD --model DIR --rows FILE --output FILE [--check] [--state FILE]

SIDE is ours, peer, base (the frozen base alone, forward, as a control of library versions) or floor (the frozen base
over exactly the tokens and layers that the workload needs). The file of rows has {"input_ids", "labels"} lists. With
`--check` the batches are those of the file in order and the output has a loss a step; the peer writes what it starts
from to `--state`, and ours starts there; the floor counts its operations.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.speed_rows import BATCH, BY_NAME, CHECKED, Workload

Rows = list[dict[str, Any]]
IGNORED = -100
SEED = 0


# -- memory and time ----------------------------------------------------------------------------------------------


def reset_peak() -> None:
    """Begin to measure the largest resident memory."""
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak_mb() -> float:
    """The largest resident memory since then."""
    return _memory("VmHWM")


def loaded_mb() -> float:
    """The present resident memory."""
    return _memory("VmRSS")


def _memory(name: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+)", status)[1]) * 1024 / 1e6  # type: ignore[index]


class InOrder(hf.Trainer):
    """transformers' Trainer with the rows in the order in which they are given."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.step_losses: list[torch.Tensor] = []
        """Of each step; some releases round those they log."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def training_step(self, *args: Any, **options: Any) -> torch.Tensor:
        """One step, whose loss is kept."""
        loss = super().training_step(*args, **options)
        self.step_losses.append(loss.detach())
        return loss


def by_length(rows: Rows) -> Rows:
    """The longest first, as transformers' own grouping by length does within some hundred rows."""
    return sorted(rows, key=lambda row: -len(row["input_ids"]))


class Clock(hf.TrainerCallback):
    """Seconds of each epoch."""

    def __init__(self) -> None:
        self.begun, self.seconds = 0.0, list[float]()

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self.begun = time.perf_counter()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.begun)


def arguments(workload: Workload, folder: str, check: bool) -> hf.TrainingArguments:
    """What both sides' Trainers are given."""
    names = hf.TrainingArguments.__dataclass_fields__
    options: dict[str, Any] = {"max_steps": CHECKED} if check else {"num_train_epochs": workload.epochs}
    if "use_cpu" in names:
        options["use_cpu"] = not torch.cuda.is_available()
    return hf.TrainingArguments(
        output_dir=folder, learning_rate=workload.lr, lr_scheduler_type="constant", weight_decay=0.0, seed=SEED,
        per_device_train_batch_size=BATCH, save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=1,
        dataloader_pin_memory=False, **options,
    )  # fmt: skip


def pad(batch: Rows) -> dict[str, torch.Tensor]:
    """Rows as tensors, padded on the right to the longest of them."""
    longest = max(len(row["input_ids"]) for row in batch)

    def filled(name: str, value: int) -> torch.Tensor:
        return torch.tensor([[*row[name], *[value] * (longest - len(row["input_ids"]))] for row in batch])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in batch])
    single = isinstance(batch[0]["labels"], int)
    labels = torch.tensor([row["labels"] for row in batch]) if single else filled("labels", IGNORED)
    return {"input_ids": filled("input_ids", 0), "attention_mask": mask, "labels": labels}


def base(workload: Workload, folder: str) -> Any:
    """The base model in float32, without dropout: attention reads the configuration's, not a module's."""
    torch.manual_seed(SEED)
    causal = workload.model == "smollm2"
    loader = hf.AutoModelForCausalLM if causal else hf.AutoModelForSequenceClassification
    without = {} if causal else {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return loader.from_pretrained(folder, dtype=torch.float32, local_files_only=True, **without)


def finished(trainer: Any, clock: Clock) -> dict[str, Any]:
    """Train, and say how it went."""
    reset_peak()
    loaded = loaded_mb()
    trainer.train()
    if isinstance(trainer, InOrder):
        losses = [float(loss) for loss in trainer.step_losses]
    else:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "epochs": clock.seconds, "peak_mb": peak_mb(), "loaded_mb": loaded}


# -- trimtab ------------------------------------------------------------------------------------------------------


def ours(workload: Workload, folder: str, rows: Rows, check: bool, state: Path | None) -> dict[str, Any]:
    """tt.Trainer: batches by token budget, shared tokens, label-only head, trunk cache."""
    import trimtab as tt
    from trimtab.cache import trunk_height
    from trimtab.store import Store

    adapter = tt.attach(base(workload, folder), workload.ours)
    if state is not None:
        start_from(adapter, load_file(state), workload)
    clock = Clock()
    store = Store(2**31) if trunk_height(adapter) and workload.epochs > 1 else None
    with tempfile.TemporaryDirectory() as out:
        args = arguments(workload, out, check)
        if check:
            args.train_sampling_strategy = "sequential"  # which tt.Trainer follows where it has no budget
        budget = None if check else budget_of([len(row["input_ids"]) for row in rows])
        trainer = tt.Trainer(
            adapter.model, args, adapter=adapter, train_dataset=rows, batch_tokens=budget, pad_id=0, show=False,
            store=store, callbacks=[clock],
        )  # fmt: skip
        return finished(trainer, clock)


def budget_of(lengths: list[int]) -> int:
    """Tokens of the peer's largest batch, or what makes as many steps an epoch as the peer takes, if that is less."""
    from trimtab.batches import TokenBatches

    budget = BATCH * max(lengths)
    while len(TokenBatches(lengths, budget)) < math.ceil(len(lengths) / BATCH):
        budget -= 1
    return budget


def start_from(adapter: Any, theirs: dict[str, torch.Tensor], workload: Workload) -> None:
    """Copy what the peer starts from; every tensor has to be used, and every one of ours to be set."""
    renamed = {}
    for name, tensor in theirs.items():
        hits = [re.sub(old, new, name) for old, new in workload.renames if re.fullmatch(old, name)]
        if len(hits) != 1:
            raise SystemExit(f"{workload.name}: the peer's {name} is {len(hits)} of our tensors")
        renamed[hits[0]] = tensor
    own = adapter.state_dict()
    renamed |= {name: zeros for name, zeros in own.items() if name.endswith(".start") and not zeros.any()}
    adapter.load_state_dict({name: tensor.reshape(own[name].shape) for name, tensor in renamed.items()})


def ours_evaluating(workload: Workload, folder: str, rows: Rows) -> dict[str, Any]:
    """Label scoring: both label words' likelihood, one forward a batch."""
    import trimtab as tt
    from trimtab.scoring import Run, answer_scores, prompt_of

    adapter = tt.attach(base(workload, folder), workload.ours)
    prompts = [prompt_of(_Row(row)) for row in rows]
    run = Run(adapter.model, _Padding(), "causal", BATCH * max(map(len, prompts)), False)
    words = [row["words"] for row in rows]
    reset_peak()
    begun = time.perf_counter()
    scores = answer_scores(run, prompts, words)
    seconds = time.perf_counter() - begun
    return {"epochs": [seconds], "peak_mb": peak_mb(), "answers": [int(one.argmax()) for one in scores], "losses": []}


class _Padding:
    """As much of a tokenizer as scoring asks for."""

    pad_token_id = 0


class _Row:
    """A row with the attributes of an example."""

    def __init__(self, row: dict[str, Any]) -> None:
        self.input_ids, self.prompt_length = row["input_ids"], row["prompt_length"]


# -- peers --------------------------------------------------------------------------------------------------------


def peft_model(workload: Workload, folder: str) -> Any:
    """The base with peft's method."""
    import peft

    theirs = dict(workload.theirs) or dict(BY_NAME["lora-8"].theirs)
    config = getattr(peft, theirs.pop("class"))(**theirs)
    model = base(workload, folder)
    model.config.use_cache = False
    return peft.get_peft_model(model, config)


def adapters_model(workload: Workload, folder: str) -> Any:
    """The base with an adapter of the library `adapters`."""
    import adapters

    model = base(workload, folder)
    adapters.init(model)
    model.add_adapter("peer", config=workload.theirs["config"])
    model.train_adapter("peer")
    return model


def peer(workload: Workload, folder: str, rows: Rows, check: bool, state: Path | None) -> dict[str, Any]:
    """transformers.Trainer with dynamic padding and batches of like length; the base's dropout is off.

    The order is given, because grouping by length draws batches at random where there are few rows.
    """
    model = {"adapters": adapters_model, "peft": peft_model, "full": base}[workload.peer](workload, folder)
    model.config.use_cache = False
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if state is not None:
        trained = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
        save_file(trained, state)
    clock = Clock()
    with tempfile.TemporaryDirectory() as out:
        args = arguments(workload, out, check)
        args.remove_unused_columns = False
        given = _dataset(rows if check else by_length(rows))
        trainer = InOrder(model, args, train_dataset=given, data_collator=pad, callbacks=[clock])
        trainer.remove_callback(hf.PrinterCallback)
        return finished(trainer, clock)


def _dataset(rows: Rows) -> Any:
    import datasets

    return datasets.Dataset.from_list([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows])


@torch.no_grad()
def peer_evaluating(workload: Workload, folder: str, rows: Rows) -> dict[str, Any]:
    """As peft's guide does, by generating the answer; or by the logits of the last position of whole rows.

    Batches are of rows of like length.
    """
    model = peft_model(workload, folder).eval()
    order = sorted(range(len(rows)), key=lambda at: rows[at]["prompt_length"])
    answers: list[int] = []
    reset_peak()
    begun = time.perf_counter()
    for start in range(0, len(rows), BATCH):
        batch = [rows[at] for at in order[start : start + BATCH]]
        prompts = [row["input_ids"][: row["prompt_length"]] for row in batch]
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        if workload.peer == "generate":
            found = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=10, do_sample=False, pad_token_id=0, use_cache=True
            )
            first = found[:, longest]
            answers += [next((n for n, word in enumerate(row["words"]) if word[0] == token), -1)
                        for row, token in zip(batch, first.tolist(), strict=True)]  # fmt: skip
        else:
            logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=1).logits[:, -1]
            answers += [int(logits[n, [word[0] for word in row["words"]]].argmax()) for n, row in enumerate(batch)]
    seconds, peak = time.perf_counter() - begun, peak_mb()
    answered = [answer for _, answer in sorted(zip(order, answers, strict=True))]
    return {"epochs": [seconds], "peak_mb": peak, "answers": answered, "losses": []}


# -- controls -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def bare(workload: Workload, folder: str, rows: Rows) -> dict[str, Any]:
    """The frozen base, forward over plain batches: the same work in every environment."""
    model = base(workload, folder).eval()
    begun = time.perf_counter()
    for at in range(0, len(rows), BATCH):
        batch = pad(rows[at : at + BATCH])
        model.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return {"epochs": [time.perf_counter() - begun], "losses": [], "peak_mb": peak_mb()}


def floor(workload: Workload, folder: str, rows: Rows, count: bool) -> dict[str, Any]:
    """The bare base, forward and backward, over the tokens and layers that the workload needs, epoch by epoch.

    Tokens that a batch shares count once, virtual ones too, and all of a batch run in one block; layers below the
    lowest trained one run in the first epoch only, forward; the vocabulary is projected where a label is. With `count`
    the operations are counted, too.
    """
    model = base(workload, folder)
    model.requires_grad_(False)
    seconds, operations = [], 0
    for epoch in range(workload.epochs):
        begun = time.perf_counter()
        _floor_epoch(model, workload, rows, epoch == 0)
        seconds.append(time.perf_counter() - begun)
    for fill, times in ((True, 1), (False, workload.epochs - 1)) if count else ():
        with FlopCounterMode(display=False) as counter:
            if times:
                _floor_epoch(model, workload, rows, fill)
        operations += times * counter.get_total_flops()
    return {"epochs": seconds, "losses": [], "peak_mb": peak_mb(), "operations": operations}


def _floor_epoch(model: Any, workload: Workload, rows: Rows, fill: bool) -> None:
    layers = list(model.model.layers)
    virtual = int(workload.theirs.get("num_virtual_tokens", 0)) if "prefix" not in workload.name else 0
    for batch, shared, labelled in _needed(rows):
        length = max(len(row["input_ids"]) for row in batch) - shared
        count = len(batch) + math.ceil((shared + virtual) / length)  # the front as further rows
        _block(model, layers, _height(workload, len(layers)), fill, count, length, labelled)


def _height(workload: Workload, layers: int) -> int:
    found = re.search(r"layers=-(\d+):", workload.ours)
    return layers - int(found[1]) if found else 0


def _needed(rows: Rows) -> Iterator[tuple[Rows, int, int]]:
    """Batches of like length, the tokens that all their rows begin with, and the labelled tokens."""
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    for at in range(0, len(ordered), BATCH):
        batch = ordered[at : at + BATCH]
        columns = zip(*(row["input_ids"] for row in batch), strict=False)
        shared = next((n for n, column in enumerate(columns) if len(set(column)) > 1), 0)
        yield batch, shared, sum(label != IGNORED for row in batch for label in row["labels"])


def _block(model: Any, layers: list[Any], height: int, fill: bool, count: int, length: int, labelled: int) -> None:
    states = torch.randn(count, length, model.config.hidden_size)
    places = {"position_ids": torch.arange(length)[None]}
    if fill and height:
        with torch.no_grad():
            _run(model, layers[:height], states, places)
    found = _run(model, layers[height:], states.requires_grad_(), places)
    loss = found.mean()
    if labelled:
        loss = loss + model.lm_head(found.flatten(0, 1)[:labelled]).logsumexp(-1).mean()
    loss.backward()


def _run(model: Any, layers: list[Any], states: torch.Tensor, places: dict[str, Any]) -> torch.Tensor:
    body = copy.copy(model.model)
    body._modules = {**model.model._modules, "layers": torch.nn.ModuleList(layers)}
    body.config = copy.copy(model.config)
    body.config.num_hidden_layers = len(layers)
    return body(inputs_embeds=states, use_cache=False, **places).last_hidden_state


# -- command line -------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.speed_side")
    parser.add_argument("side", choices=["ours", "peer", "base", "floor"])
    parser.add_argument("workload", choices=list(BY_NAME))
    for name in ("model", "rows", "output"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--state", type=Path)
    given = parser.parse_args()
    workload = BY_NAME[given.workload]
    rows = json.loads(Path(given.rows).read_text())
    training: dict[str, Callable[..., dict[str, Any]]] = {"ours": ours, "peer": peer}
    evaluating = {"ours": ours_evaluating, "peer": peer_evaluating, "base": bare}
    if given.side in training and workload.peer in ("peft", "adapters", "full"):
        result = training[given.side](workload, given.model, rows, given.check, given.state)
    elif given.side == "floor":
        result = floor(workload, given.model, rows, given.check)
    else:
        result = evaluating[given.side](workload, given.model, rows)
    result["threads"] = torch.get_num_threads()
    result["versions"] = {name: version for name in ("torch", "transformers", "peft", "adapters", "trimtab")
                          if (version := _version(name))}  # fmt: skip
    Path(given.output).write_text(json.dumps(result))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()

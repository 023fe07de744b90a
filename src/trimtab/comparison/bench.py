"""One loaded base on which every cell of a comparison is run. Knows models, adapters and trunk caches; refuses to know
which cells there are and what comes of them.

A cell is attached, trained, scored and detached, and the base is then what it was, bit for bit. What the base's files
do not have (a task head, BERT's pooler) is made anew for each seed, as `trimtab train` would make it, and put back.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, set_seed

from trimtab.adapter import Adapter, attach
from trimtab.cache import cached_trunk, trunk_facts, trunk_height
from trimtab.cells import Figures
from trimtab.checkpoint import load, model_fingerprint
from trimtab.comparison.plan import Cell, cell_settings
from trimtab.memory import reset_peak
from trimtab.methods.spec import parse_method
from trimtab.models import load_for, quiet
from trimtab.run_data import Data, Source, holding, load_data
from trimtab.run_folder import LOG, begin
from trimtab.settings import TrainSettings
from trimtab.store import Store
from trimtab.train import count_parameters, make_trainer, measure, resolved, with_length, with_method

CURVE_POINTS = 200
"""Steps of a learning curve that are kept at most."""


class Bench:
    """The base, the examples and the trunk caches of a comparison; `folder` holds rows and adapters."""

    def __init__(self, settings: TrainSettings, source: Source, folder: Path, show: bool | None):
        self.settings, self.source, self.folder, self.show = settings, source, folder, show
        own = self._own(settings)
        self.dev = load_data(own, source, show)
        self.base = Base(self._load, settings.seed)
        self.stores: dict[str, Store] = {}
        self._test: Data | None = None

    # What `trimtab train` would be given

    def settings_of(self, cell: Cell) -> TrainSettings:
        """The settings with which `trimtab train` makes the same run, and scores the same test rows."""
        data, test = (str(self.folder / "rows" / f"{side}.jsonl") for side in ("train", "test"))
        return cell_settings(self.settings, cell, data, test, str(self.adapter_folder(cell)))

    def adapter_folder(self, cell: Cell) -> Path:
        """Where a cell's adapter is kept."""
        return self.folder / "adapters" / cell.name

    def _own(self, settings: TrainSettings) -> TrainSettings:
        rows = self.folder / "rows"
        return dataclasses.replace(settings, data=str(rows / "train.jsonl"), eval_data=str(rows / "dev.jsonl"))

    def _load(self, seed: int) -> PreTrainedModel:
        with quiet():
            return load_for(self.dev.task, self.settings.model, self.dev.kind, dtype=self.settings.dtype, seed=seed)

    def test(self, rows: Any) -> Data:
        """The data with the test rows held out, read once."""
        if self._test is None:
            self._test = holding(self.dev, rows, self.settings.max_length or 0, self.show)  # pictures have none
        return self._test

    # Running

    def train(self, cell: Cell) -> Figures:
        """Train a cell, score the development rows, and keep its adapter as an ordinary folder.

        Raises UserError for a method that does not fit the model, and for a loss that becomes non-finite.
        """
        settings = self._resolved(cell)
        with self._attached(settings) as adapter:
            figures = self._run(settings, adapter)
            stored = self._save(cell, adapter)
        return {**figures, "bytes": stored}

    def attempt(self, cell: Cell, watch: Callable[[int, Callable[[], Figures]], TrainerCallback]) -> Figures:
        """Train a cell under a watch and keep nothing; without `dev` where the watch stopped it.

        `watch` is given the number of trained parameters and what scores the development rows at any time.
        """
        settings = self._resolved(cell)
        with self._attached(settings) as adapter:
            parameters = int(count_parameters(adapter)["trainable"])
            return self._run(settings, adapter, watch(parameters, lambda: self.dev.evaluate(adapter.model, False)))

    def _run(self, settings: TrainSettings, adapter: Adapter, *callbacks: TrainerCallback) -> Figures:
        """Train, and score the development rows unless a callback stopped it."""
        parameters, store = count_parameters(adapter), self._store(adapter)
        with tempfile.TemporaryDirectory() as scratch:
            trainer = self._trainer(settings, Path(scratch), adapter, store, list(callbacks))
            reset_peak()
            trainer.train()
            figures = {
                "train": measure(trainer),
                "parameters": parameters,
                "curve": _curve(_lines(Path(scratch) / LOG)),
            }
        adapter.fold()
        if trainer.state.global_step < trainer.state.max_steps:
            return figures
        with cached_trunk(adapter, store) if store else nullcontext():
            return {**figures, "dev": self.dev.evaluate(adapter.model, self.show)}

    def score(self, cell: Cell, rows: Any) -> Figures:
        """The test rows' metrics of a cell's kept adapter on the base, and how right each answer is."""
        with self._reloaded(cell) as (model, adapter):
            store = self._store(adapter) if adapter else None
            with cached_trunk(adapter, store) if adapter and store else nullcontext():
                metrics, marks = self.test(rows).marked(model, self.show)
        return {"test": metrics, "marks": marks}

    def score_base(self, rows: Any) -> Figures:
        """The metrics of the frozen base on development and test rows, and the seconds that the latter took."""
        model, test = self.base.model, self.test(rows)
        dev = self.dev.evaluate_base(model, self.show)
        start = time.perf_counter()
        figures = {"dev": dev, "test": test.evaluate_base(model, self.show)}
        return {**figures, "seconds": round(time.perf_counter() - start, 4)}

    def seconds_per_epoch(self, cell: Cell, at_most: float) -> float:
        """How long an epoch of a cell takes, from the first steps of one: at least four, then until the time is up."""
        settings = self._resolved(cell)
        probe = Probe(at_most)
        with self._attached(settings) as adapter, tempfile.TemporaryDirectory() as scratch:
            store = self._store(adapter)
            self._trainer(settings, Path(scratch), adapter, store, [probe]).train()
            lines = _lines(Path(scratch) / LOG)
        first, last = lines[min(1, len(lines) - 1)], lines[-1]
        if len(lines) < 3:  # so few steps that the first one has to count
            return last["seconds"] / last["epoch"]
        return (last["seconds"] - first["seconds"]) / (last["epoch"] - first["epoch"])

    def close(self) -> None:
        """Give the trunk caches back."""
        for store in self.stores.values():
            store.close()

    def _resolved(self, cell: Cell) -> TrainSettings:
        settings = with_method(self.settings_of(cell), self.source)
        return resolved(settings if self.source.kind == "vision" else with_length(settings), self.dev)

    def _trainer(
        self,
        settings: TrainSettings,
        scratch: Path,
        adapter: Adapter,
        store: Store | None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> Any:
        how: Any = {"store": store, "checkpoints": False, "callbacks": callbacks or ()}
        return make_trainer(settings, scratch, self.dev, adapter, self.show, **how)

    @contextmanager
    def _attached(self, settings: TrainSettings) -> Iterator[Adapter]:
        """The method on the base of its seed; full fine-tuning on a copy."""
        words = getattr(self.dev.task, "words", ())
        with self.base.of_seed(settings.seed) as model:
            if getattr(settings.method, "whole_model", False):
                model = copy.deepcopy(model)
            set_seed(settings.seed)
            adapter = attach(model, settings.method, settings.name, tokenizer=self.dev.tokenizer, labels=words)
            try:
                yield adapter
            finally:
                adapter.detach()

    @contextmanager
    def _reloaded(self, cell: Cell) -> Iterator[tuple[PreTrainedModel, Adapter | None]]:
        """The base with a kept adapter; a model that was tuned as a whole is loaded as one."""
        folder = self.adapter_folder(cell)
        if getattr(parse_method(cell.method), "whole_model", False):
            with quiet():
                yield load_for(self.dev.task, str(folder), self.dev.kind, dtype=self.settings.dtype), None
            return
        with self.base.of_seed(cell.seed) as model:
            adapter = load(model, folder)
            try:
                yield model, adapter
            finally:
                adapter.detach()

    def _save(self, cell: Cell, adapter: Adapter) -> int:
        """Write the adapter's folder; the bytes of its weights."""
        folder = self.adapter_folder(cell)
        begin(folder, dataclasses.replace(self._resolved(cell), output=str(folder)))
        adapter.save(folder, task=self.dev.task.to_config())
        if getattr(adapter.method, "whole_model", False):
            self.dev.tokenizer.save_pretrained(folder)
        return sum(path.stat().st_size for path in folder.glob("*.safetensors"))

    def _store(self, adapter: Adapter) -> Store | None:
        """The states of the layers below this adapter, shared by all cells with the same trunk."""
        if not trunk_height(adapter):
            return None
        key = json.dumps(trunk_facts(adapter, model_fingerprint(adapter.model)), sort_keys=True)
        if key not in self.stores:
            budget = round(self.settings.cache_memory * 2**30)
            left = budget - sum(store.used for store in self.stores.values())
            self.stores[key] = Store(max(1, left) if budget else 0)
        return self.stores[key]


class Base:
    """A base model that is loaded once, and what its files do not have for any seed."""

    def __init__(self, load: Callable[[int], PreTrainedModel], seed: int):
        self.load, self.seed = load, seed
        self.model = load(seed)
        self.made: dict[int, dict[str, Tensor]] = {seed: {}}

    @contextmanager
    def of_seed(self, seed: int) -> Iterator[PreTrainedModel]:
        """Inside, the model is as it is loaded with this seed; no adapter may be attached before and after."""
        state = self.model.state_dict()
        made = self._made(seed, state)
        before = {name: state[name].clone() for name in made}
        try:
            _copy(made, state)
            yield self.model
        finally:
            _copy(before, state)

    def _made(self, seed: int, state: dict[str, Tensor]) -> dict[str, Tensor]:
        if seed not in self.made:
            other = self.load(seed).state_dict()
            self.made[seed] = {name: other[name].clone() for name in state if not torch.equal(state[name], other[name])}
        return self.made[seed]


def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in source.items():
            target[name].copy_(tensor)


class Probe(TrainerCallback):
    """Ends a training when its time is up, after at least four steps."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.began: float | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop if enough was seen."""
        now = time.perf_counter()
        self.began = now if self.began is None else self.began
        if state.global_step >= 4 and now - self.began > self.seconds:
            control.should_training_stop = True


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _curve(lines: list[dict[str, Any]]) -> list[list[float]]:
    """[epoch, loss] of the steps, thinned."""
    step = max(1, -(-len(lines) // CURVE_POINTS))
    return [[line["epoch"], round(line["loss"], 5)] for line in lines[::step]]

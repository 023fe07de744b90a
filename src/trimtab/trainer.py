"""The training loop: transformers' Trainer, taught to train an adapter. Knows losses, batches and checkpoints of one
attached model; refuses to know where models, data and settings come from (train.py does).

What differs from the plain Trainer: the vocabulary is projected where a label is and nowhere else, batches may follow a
token budget, the optimizer and the checkpoints hold the adapter's tensors only, every step is logged, and a non-finite
number stops the run. Parts that improve by search take a step of it before each step of the optimizer, on the same
batches. The losses are the plain Trainer's.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from trimtab.adapter import Adapter, adapters
from trimtab.batches import Collator, TokenBatches, length
from trimtab.cache import cached_pictures, cached_trunk
from trimtab.errors import UserError, unknown
from trimtab.examples import IGNORED
from trimtab.head import align_labels
from trimtab.methods.spec import format_method
from trimtab.objectives import PER, Objective, count, objective_of
from trimtab.prefix_share import shared_prefix
from trimtab.sites import HeadSite
from trimtab.snapshots import ABOUT, WEIGHTS, building, checkpoint_path, last_checkpoint, read_about, rotate, sweep
from trimtab.stages import NAME as STAGES
from trimtab.stages import by_stage, training_only
from trimtab.store import Store
from trimtab.watch import Guard, Interrupt, Meter, StepBar, StepLog

NOT_IN_FORWARD = ("image", "stage")
"""Fields of an example that reach the model by another name, or not at all."""


class Trainer(transformers.Trainer):
    """Trains one adapter of an attached model; takes what transformers.Trainer takes, and the arguments below.

    `adapter` may be left out where exactly one is attached. Datasets are sequences of examples with `input_ids` and
    `labels` (attributes or keys); the collator pads them. `objective` says what is learned where the labels alone do
    not (objectives.py: label words at a mask). With `batch_tokens` batches hold at most that many tokens, padding
    included; without it `args.per_device_train_batch_size` rows. `log_file` gets one JSON object a step. A step's loss
    is the mean over its target tokens, with `loss_per="sentence"` their sum over the rows that have any.
    `scorer`, called without arguments, gives the metrics of an evaluation during training. `show` turns the progress
    bar on or off (default: only on a terminal). Tokens that all rows of a batch begin with are run once unless `share`
    is off; with a `store` the layers below the lowest trained one are run once a row (cache.py). Ctrl-C stops after the
    step with a checkpoint, then raises.
    """

    loss_is_scaled_for_ga = True  # by the number of labels of the whole accumulated batch

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments | None = None,
        *,
        adapter: Adapter | None = None,
        objective: Objective | None = None,
        batch_tokens: int | None = None,
        pad_id: int | None = None,
        log_file: str | Path | None = None,
        scorer: Callable[[], dict[str, float]] | None = None,
        loss_per: str = "token",
        show: bool | None = None,
        share: bool = True,
        store: Store | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        **options: Any,
    ) -> None:
        self.adapter = adapter or _only_adapter(model)
        _check_trains(self.adapter)
        if loss_per not in PER:
            raise unknown("loss_per", loss_per, PER)
        self.batch_tokens, self.scorer, self.loss_per = batch_tokens, scorer, loss_per
        self.share, self.store = share, store
        self.taken_apart = 1
        """Pieces of the present batch that are run by themselves (stages.py)."""
        self.objective: Objective | None = objective
        self.meter, self.pieces = Meter(), list[tuple[dict[str, Any], Any]]()
        self.step_log = StepLog(self.meter, Path(log_file) if log_file else None)
        self.bar = StepBar(self.step_log, show)
        self.interrupt = Interrupt()
        self.unproven = False
        """Whether the newest checkpoint's tensors have given no loss yet; older ones are kept until then."""
        options.setdefault("data_collator", Collator(_pad_id(model, options) if pad_id is None else pad_id))
        with _config_kept(model):
            super().__init__(model=model, args=args, callbacks=list(callbacks), **options)
        if self.args.n_gpu > 1:
            raise UserError(
                "one process on several devices (nn.DataParallel) copies hooks wrongly; start with torchrun"
            )
        self.model_accepts_loss_kwargs = True  # whatever the model's forward says: the loss is computed here
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        scaled = getattr(self.accelerator, "scaler", None) is not None
        guard = Guard(self.meter, self._gradients, self._drop_old_checkpoints, scaled)
        search = _Search(self._search)
        for callback in (guard, search, _Progress(self.adapter), self.step_log, self.bar, self.interrupt):
            self.add_callback(callback)

    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None, *arguments: Any, **options: Any) -> Any:
        """Train, from a checkpoint if one is given (True: the newest whole one, from the start if there is none).

        Raises UserError for a non-finite loss or gradient and for a checkpoint that does not fit, KeyboardInterrupt
        after a Ctrl-C has been answered with a checkpoint.
        """
        self.adapter.activate()
        if self.args.should_save and self.args.output_dir:
            sweep(self.args.output_dir)
        if resume_from_checkpoint is True:
            found = last_checkpoint(self.args.output_dir or ".")
            resume_from_checkpoint = str(found) if found else None
        self.meter.clear()
        self._forget()
        try:
            with self.interrupt.listening(), self.caching():
                result = super().train(resume_from_checkpoint, *arguments, **options)
        finally:
            self.bar.close()
        if self.interrupt.asked:
            raise KeyboardInterrupt(f"stopped after step {self.state.global_step}")
        return result

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One forward and backward; notes the loss and the tokens, of all processes together."""
        model.train()  # what can be shared depends on whether anything draws
        tokens = _tokens(inputs)
        losses, pieces = [], by_stage(inputs)
        if len(pieces) > 1 and self.args.world_size > 1:
            raise UserError("disjoint training runs in one process; leave --stage-column out, or start one")
        self.taken_apart = len(pieces)
        for stage, piece in pieces:
            self.pieces.append((piece, num_items_in_batch))
            with training_only(self.adapter, stage), self._sharing(piece) as rest:
                losses.append(super().training_step(model, rest, num_items_in_batch))
        loss = torch.stack(losses).sum()
        if self.args.world_size > 1:  # every process sees the same numbers, so that all stop where one must
            tokens = self.accelerator.reduce(tokens.to(loss.device))
            self.meter.add(self.accelerator.reduce(loss, reduction="mean"), tokens)
        else:
            self.meter.add(loss, tokens)
        return loss

    def _search(self, step: int) -> None:
        """Let the adapter search on the batches of this optimizer step; all processes see the same losses."""
        if parts := self.adapter.searching():
            self.model_wrapped.eval()
            for part in parts:
                if self.args.world_size > 1:
                    part.gradient = self.accelerator.reduce(part.gradient, reduction="mean")
                part.search(self._loss_of_step, step)
            self.model_wrapped.train()
        self._forget()

    def _loss_of_step(self) -> float:
        """The loss of this optimizer step's batches, without dropout."""
        with torch.no_grad(), self.compute_loss_context_manager():
            losses = [self._loss_of(inputs, count) for inputs, count in self.pieces]
        loss = torch.stack(losses).sum()
        return float(self.accelerator.reduce(loss, reduction="mean") if self.args.world_size > 1 else loss)

    def _loss_of(self, inputs: dict[str, Any], count: Any) -> Tensor:
        with self._sharing(inputs) as rest:
            return self.compute_loss(self.model_wrapped, self._prepare_inputs(rest), num_items_in_batch=count)

    def _forget(self) -> None:
        """Nothing of an optimizer step is left for the next."""
        self.pieces.clear()
        for part in self.adapter.searching():
            part.gradient = None

    def _gradients(self) -> list[Tensor]:
        """Those that the optimizer will use, and those that a search will."""
        found = [weight.grad for weight in self.adapter.parameters()]
        return [grad for grad in [*found, *(part.gradient for part in self.adapter.searching())] if grad is not None]

    @contextmanager
    def caching(self) -> Iterator[None]:
        """Inside, what the store knows of the layers below the lowest trained one, and of pictures, is not computed
        again."""
        if self.store is None:
            yield
            return
        with cached_trunk(self.adapter, self.store), cached_pictures(self.adapter, self.store):
            yield

    def _sharing(self, inputs: dict[str, Any]) -> AbstractContextManager[dict[str, Any]]:
        """The inputs without what all rows begin with, which is run once inside (prefix_share.py)."""
        base = self.accelerator.unwrap_model(self.model)
        ids = inputs.get("input_ids")
        if not self.share or ids is None or ids.dim() != 2 or "position_ids" in inputs:
            return nullcontext(inputs)
        if self.args.neftune_noise_alpha is not None:  # noise whose size follows the length of a row
            return nullcontext(inputs)
        if self._objective(base, inputs) is None:  # whose labels may be positions in the whole row
            return nullcontext(inputs)
        labels, needed = inputs.get("labels"), None
        if labels is not None and labels.shape == ids.shape:
            needed = align_labels(base, labels) != IGNORED
        return shared_prefix(base, inputs, needed)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of what the labels ask for (objectives.py), projected to the vocabulary where a label is alone.

        With `return_outputs` everywhere. What has no objective here (several labels a row, a loss function of the
        user's, label smoothing) is left to transformers; UserError for a method that needs a second forward there.
        """
        inputs = {name: value for name, value in inputs.items() if name != STAGES}  # of no meaning to a loss
        base = self.accelerator.unwrap_model(model)
        weight = getattr(self.adapter.method, "consistency", 0.0) if model.training else 0.0
        objective = self._objective(base, inputs)
        if objective is None:
            if weight > 0:
                raise UserError(
                    f"{self.adapter.method.name} compares two forwards, which this loss has no measure for; "
                    "set consistency=0"
                )
            if self.loss_per != "token":
                raise UserError(
                    f"this loss is transformers' own, which has no mean per {self.loss_per}; use loss_per=token"
                )
            found: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            if return_outputs or not model.training:
                return found
            return found / self.current_gradient_accumulation_steps + self._extra_loss(model)
        over = num_items_in_batch
        if over is None and self.loss_per != "token":
            over = count(objective, base, inputs["labels"], self.loss_per).clamp(min=1)
        outputs, logits, targets = objective.forward(model, base, inputs, everywhere=return_outputs)
        loss = objective.loss(logits, targets, over)
        if weight > 0:
            _, again, _ = objective.forward(model, base, inputs, everywhere=return_outputs)
            loss = loss + weight * objective.divergence(logits, again, over)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # which then average their gradients
        loss = loss + self._extra_loss(model)
        return (loss, outputs) if return_outputs else loss

    def _extra_loss(self, model: nn.Module) -> Tensor | float:
        """This batch's share of the method's own term, which counts once an optimizer step; 0 in evaluation."""
        if not model.training:
            return 0.0
        return self.adapter.extra_loss() / getattr(self, "current_gradient_accumulation_steps", 1) / self.taken_apart

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """transformers' estimate, which walks through the whole model at every step; here its size is asked once."""
        tokens = inputs.get(getattr(self.model, "main_input_name", "input_ids"))
        return 0 if tokens is None else 6 * tokens.numel() * self._size

    @functools.cached_property
    def _size(self) -> int:
        base: Any = self.accelerator.unwrap_model(self.model)
        return base.num_parameters(exclude_embeddings=True)

    def _objective(self, base: PreTrainedModel, inputs: dict[str, Any]) -> Objective | None:
        """What is learned, unless the user asked for another loss."""
        if self.compute_loss_func is not None or self.label_smoother is not None:
            return None
        return self.objective or objective_of(base, inputs)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The next batches of an optimizer step and what their loss is the mean over, counted over all processes."""
        batches = list(islice(epoch_iterator, num_batches))
        if not batches:
            return batches, None
        base = self.accelerator.unwrap_model(self.model)
        counts: list[Tensor] = []
        for batch in batches:
            objective = self._objective(base, batch)
            if objective is None:
                return batches, None
            counts.append(count(objective, base, batch["labels"], self.loss_per))
        total = torch.stack(counts).sum().to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            total = self.accelerator.gather(total).sum()
        return batches, total

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As transformers makes it (no weight decay on biases and norms), over the adapter's tensors."""
        trained = {id(parameter) for parameter in self.adapter.parameters()}
        base = self.adapter.model
        others = [weight for weight in base.parameters() if weight.requires_grad and id(weight) not in trained]
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            optimizer = super().create_optimizer(model)
        finally:
            for parameter in others:
                parameter.requires_grad_(True)
        _scale_rates(optimizer, self.adapter.lr_scales())
        return optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As transformers has it, without what the adapter keeps from decay."""
        kept = {id(weight) for weight in self.adapter.undecayed()}
        undecayed = {name for name, weight in model.named_parameters() if id(weight) in kept}
        return [name for name in super().get_decay_parameter_names(model) if name not in undecayed]

    # Batches

    def _set_signature_columns_if_needed(self) -> None:
        """What the collator reads of an example and the model's forward does not name is no unused column."""
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        columns += [name for name in NOT_IN_FORWARD if name not in columns]

    def get_train_dataloader(self) -> DataLoader:
        """Batches by token budget if one is set, else transformers' own."""
        if self.batch_tokens is None:
            return super().get_train_dataloader()
        return self._token_loader(self.train_dataset, shuffle=True)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As for training, in a fixed order."""
        if self.batch_tokens is None:
            return super().get_eval_dataloader(eval_dataset)
        known: Any = self.eval_dataset
        chosen = known[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset
        return self._token_loader(known if chosen is None else chosen, shuffle=False)

    def _token_loader(self, dataset: Any, shuffle: bool) -> DataLoader:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        assert self.batch_tokens is not None
        batches = TokenBatches([length(example) for example in dataset], self.batch_tokens, seed, shuffle)
        if shuffle:
            self.add_callback(_EpochSetter(batches))
        loader = DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    # Evaluation

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict:
        """The scorer's metrics if there is one, else the loss (and compute_metrics) on the evaluation set."""
        if self.scorer is None or eval_dataset is not None:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.scorer().items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """Loss, logits and labels of one batch; where the loss is enough, it is label-only as in training."""
        if not prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    # Checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter (not the base model) as `adapter.save` does."""
        if self.args.should_save:
            self.adapter.save(output_dir or self.args.output_dir or ".")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run, step = Path(self._get_output_dir(trial)), self.state.global_step
        target = checkpoint_path(run, step)
        self.store_flos()
        if best := self.state.best_global_step:
            path = checkpoint_path(run, best)
            if best == step or path.exists():
                self.state.best_model_checkpoint = str(path)
        with building(target, main=self.args.should_save) as folder:
            self.accelerator.wait_for_everyone()
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
            if self.args.should_save:
                self._save_trained(folder)
                self._note_callbacks()
                self.state.save_to_json(str(folder / "trainer_state.json"))
            self.accelerator.wait_for_everyone()
        self.unproven = True
        if step >= self.state.max_steps:
            self._drop_old_checkpoints()

    def _drop_old_checkpoints(self) -> None:
        """Delete checkpoints beyond the limit, now that the newest one is known to be good."""
        if self.unproven and self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate(self._get_output_dir(None), self.args.save_total_limit, Path(best) if best else None)
        self.unproven = False

    def _save_trained(self, folder: Path) -> None:
        if _whole(self.adapter):
            save_model(self.adapter.model, str(folder / WEIGHTS))
        else:
            state = {key: value.detach().cpu().contiguous() for key, value in self.adapter.state_dict().items()}
            save_file(state, folder / WEIGHTS)
        about: dict[str, Any] = {"name": self.adapter.name, "method": format_method(self.adapter.method)}
        about["lr"] = self.args.learning_rate
        (folder / ABOUT).write_text(json.dumps(about, ensure_ascii=False), encoding="utf-8")

    def _note_callbacks(self) -> None:
        """Put the state of callbacks that have one (early stopping) into the trainer's, as transformers does."""
        for callback in [*self.callback_handler.callbacks, self.control]:
            if not isinstance(callback, ExportableState):
                continue
            noted: Any = self.state.stateful_callbacks
            name, state = type(callback).__name__, callback.state()
            noted[name] = [*noted[name], state] if isinstance(noted[name], list) else state

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        about, method = read_about(folder), format_method(self.adapter.method)
        if about.get("method") != method:
            raise UserError(f"{folder} is a checkpoint of {about.get('method')}, not of {method}")
        try:
            if _whole(self.adapter):
                load_model(self.adapter.model, str(folder / WEIGHTS))
            else:
                self.adapter.load_state_dict(load_file(folder / WEIGHTS))
        except (SafetensorError, RuntimeError, OSError) as error:
            raise UserError(f"{folder / WEIGHTS} cannot be loaded: {error}") from error

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The optimizer and the schedule of a checkpoint, at the learning rate that is asked for now."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        known = read_about(Path(checkpoint)).get("lr")
        if not known or known == self.args.learning_rate:  # checkpoints of older versions do not say it
            return
        ratio = self.args.learning_rate / known
        schedule: Any = self.lr_scheduler
        schedule = getattr(schedule, "scheduler", schedule)  # inside accelerate's
        for name in ("base_lrs", "_last_lr"):
            setattr(schedule, name, [rate * ratio for rate in getattr(schedule, name)])
        for group in cast(Any, self.optimizer).param_groups:
            group["lr"] *= ratio
            group["initial_lr"] *= ratio

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether these are the best so far; what is no part of the last phase of training counts for nothing."""
        done = self.state.global_step / max(1, self.state.max_steps)
        if done <= getattr(self.adapter.method, "settles_at", -1.0):
            return False
        return super()._determine_best_metric(metrics, trial)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def _check_trains(adapter: Adapter) -> None:
    """Raises UserError for a form that is only saved and loaded, as a mask's bits."""
    method, entry = cast(Any, adapter.method), adapter._entry
    saved = hasattr(method, "folded") and method.folded() == method
    own = [entry.parts[site.key] for site in entry.sites if not isinstance(site, HeadSite)]
    if saved and not any(True for part in own for _ in part.parameters()):
        raise UserError(f"{format_method(method)} is the form that is saved, in which nothing is trained")


class _Search(TrainerCallback):
    """Has the search take its step, while the gradients are those of the tensors as they are."""

    def __init__(self, search: Callable[[int], None]) -> None:
        self.search = search

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One step of the search for each of the optimizer."""
        self.search(state.global_step)


class _Progress(TrainerCallback):
    """Tells the method how far training is."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The share of the optimizer's steps that is done."""
        self.adapter.progress(state.global_step / max(1, state.max_steps))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """All there will be, however training ended."""
        self.adapter.progress(1.0)


class _EpochSetter(TrainerCallback):
    """Tells the batches which epoch it is, through whatever wrappers the loader has by then."""

    def __init__(self, batches: TokenBatches) -> None:
        self.batches = batches

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Epochs count from 0; a resumed one has begun already."""
        self.batches.set_epoch(int(state.epoch or 0))


@contextmanager
def _config_kept(model: PreTrainedModel) -> Iterator[None]:
    """transformers' Trainer switches the model's cache off for good; here that lasts for each forward only."""
    before = model.config.use_cache if hasattr(model.config, "use_cache") else None
    yield
    if before is None:
        model.config.__dict__.pop("use_cache", None)
    else:
        model.config.use_cache = before


def _only_adapter(model: PreTrainedModel) -> Adapter:
    found = adapters(model)
    if len(found) != 1:
        names = ", ".join(found) or "none"
        raise UserError(f"Trainer needs one attached adapter, there are: {names}; attach a method or pass adapter=")
    return next(iter(found.values()))


def _pad_id(model: PreTrainedModel, options: dict[str, Any]) -> int:
    tokenizer = options.get("processing_class")
    found = getattr(tokenizer, "pad_token_id", None)
    return next((pad for pad in (found, getattr(model.config, "pad_token_id", None)) if isinstance(pad, int)), 0)


def _scale_rates(optimizer: torch.optim.Optimizer, scales: dict[nn.Parameter, float]) -> None:
    """Give parameters that learn at a multiple of the rate groups of their own (LoRA+)."""
    for group in list(optimizer.param_groups):
        for factor in sorted({scales[weight] for weight in group["params"] if weight in scales}):
            faster = [weight for weight in group["params"] if scales.get(weight) == factor]
            group["params"] = [weight for weight in group["params"] if scales.get(weight) != factor]
            optimizer.add_param_group({**group, "params": faster, "lr": group["lr"] * factor})
    used = [group for group in optimizer.param_groups if group["params"]]
    optimizer.param_groups[:] = used or optimizer.param_groups[:1]  # one where nothing but a search moves anything


def _tokens(inputs: dict[str, Any]) -> Tensor:
    """The batch's tokens without padding; its rows, where the model reads no tokens."""
    mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
    if mask is not None:
        return mask.sum()
    return torch.tensor(next(iter(inputs.values())).shape[0] if ids is None else ids.numel())


def _whole(adapter: Adapter) -> bool:
    return bool(getattr(adapter.method, "whole_model", False))

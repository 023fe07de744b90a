"""One training run from settings to a folder of results. Knows the order of the steps and the run's files; refuses to
know how any step is done.

    rows -> task -> examples -> model -> adapter -> evaluation -> training -> evaluation -> folder

The numbers in metrics.json are those that a fresh base with the saved folder gives (`evaluate_run`): the adapter is
folded before the second evaluation, and both go through `trimtab.evaluate`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import transformers
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from trimtab.adapter import Adapter, attach
from trimtab.batches import ROWS, default_budget, length
from trimtab.cache import looks, trunk_facts, trunk_height
from trimtab.checkpoint import model_fingerprint
from trimtab.errors import UserError, unknown
from trimtab.lengths import fitting_length
from trimtab.memory import peak_mb, reset_peak
from trimtab.methods.spec import parse_method
from trimtab.models import load_config, load_for
from trimtab.pseudo import for_template
from trimtab.run_data import Data, Source, find_task, load_data
from trimtab.run_folder import LOG, begin, check_output, check_resume, finish
from trimtab.settings import TrainSettings
from trimtab.stages import check_stages
from trimtab.store import Store
from trimtab.trainer import Trainer
from trimtab.tuned import Tuned, evaluate_run, load_run

__all__ = ["TrainSettings", "Trainer", "Tuned", "evaluate_run", "fine_tune", "load_run"]


def fine_tune(settings: TrainSettings, *, show: bool | None = None) -> dict[str, Any]:
    """Run the settings; writes the output folder and returns the content of its metrics.json.

    `show` turns progress bars on or off (default: only on a terminal). Raises UserError for every mistake in the
    settings or the data, before anything is written, and for a loss that becomes non-finite; KeyboardInterrupt after
    a Ctrl-C during training has been answered with a checkpoint.
    """
    folder = Path(settings.output)
    check_output(folder, settings)
    check_report_to(settings.report_to)
    source = find_task(settings)
    settings = with_method(settings, source)
    settings = settings if source.kind == "vision" else with_length(settings)
    data = load_data(settings, source, show)
    settings = resolved(settings, data)
    check_resume(folder, settings)
    set_seed(settings.seed)
    words = getattr(data.task, "words", ())  # of a task that has some
    model = load_for(data.task, settings.model, data.kind, dtype=settings.dtype, seed=settings.seed)
    tokenizer = None if data.kind == "vision" else data.tokenizer
    adapter = attach(model, settings.method, settings.name, tokenizer=tokenizer, labels=words)
    if settings.stage_column is not None:
        check_stages(adapter)
    trainer = make_trainer(settings, folder, data, adapter, show)
    main = trainer.is_world_process_zero()
    if main:
        begin(folder, settings)
    with closing(trainer.store) if trainer.store else nullcontext(), trainer.caching():
        with adapter.disabled():
            before = data.evaluate_base(model, show)
        parameters = count_parameters(adapter)
        reset_peak()
        trainer.train(resume_from_checkpoint=settings.resume)
        trained = measure(trainer)
        adapter.fold()
        metrics = {"before": before, "after": data.evaluate(model, show), "train": trained, "parameters": parameters}
    if main:
        adapter.save(folder, task=data.task.to_config())
        if _whole(adapter) or data.kind == "vision":  # a base need not have an image processor
            data.tokenizer.save_pretrained(folder)
        finish(folder, metrics)
    return metrics


def check_report_to(name: str) -> None:
    """Raises UserError for a place to log to that transformers does not know or that is not installed."""
    if name in ("none", "all"):
        return
    if name not in INTEGRATION_TO_CALLBACK:
        raise unknown("report_to", name, ("none", "all", *INTEGRATION_TO_CALLBACK))
    if name not in get_available_reporting_integrations():
        raise UserError(f"report_to={name}: the package for {name} is not installed")


def with_method(settings: TrainSettings, source: Source) -> TrainSettings:
    """The settings with the method as the task's template has it trained. Raises UserError where they do not fit."""
    method = for_template(parse_method(settings.method), source.pseudo_tokens)
    if source.kind == "masked" and "head" in method.name.split("|"):
        raise UserError("head trains a task head, and a template with {mask} has none; leave {mask} out")
    return dataclasses.replace(settings, method=method)


def with_length(settings: TrainSettings) -> TrainSettings:
    """The settings with the longest row that the model has positions for, the method's virtual tokens beside it."""
    longest = fitting_length(parse_method(settings.method), load_config(settings.model), settings.max_length)
    return dataclasses.replace(settings, max_length=longest)


def resolved(settings: TrainSettings, data: Data) -> TrainSettings:
    """The settings with every choice made."""
    method = parse_method(settings.method)
    rows, tokens, most = settings.batch_size, settings.batch_tokens, getattr(method, "rows", ROWS)
    if rows is None and tokens is None:
        if data.kind == "vision":  # all are as long
            rows = most
        else:
            tokens = default_budget([length(example) for example in data.train], most)
    lr = settings.lr or method.lr
    return dataclasses.replace(settings, method=method, lr=lr, batch_size=rows, batch_tokens=tokens)


def make_trainer(
    settings: TrainSettings,
    folder: Path,
    data: Data,
    adapter: Adapter,
    show: bool | None,
    *,
    store: Store | None = None,
    checkpoints: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trainer:
    """The Trainer for resolved settings, with a store of its own where none is given."""
    assert settings.lr is not None
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": settings.save_steps or 0.1}
    if settings.save_steps is None and _whole(adapter):
        saving = {"save_strategy": "epoch"}
    if not checkpoints:
        saving = {"save_strategy": "no"}
    args = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        learning_rate=settings.lr,
        per_device_train_batch_size=settings.batch_size or 1,
        gradient_accumulation_steps=settings.gradient_accumulation,
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        seed=settings.seed,
        report_to=settings.report_to,
        logging_steps=1,
        disable_tqdm=True,
        save_total_limit=1,
        dataloader_pin_memory=transformers.utils.is_torch_cuda_available(),
        **saving,
        **_checkpointing(settings),
    )
    return Trainer(
        adapter.model,
        args,
        adapter=adapter,
        objective=data.task.objective(data.tokenizer, data.kind),
        train_dataset=data.train,
        batch_tokens=settings.batch_tokens,
        pad_id=getattr(data.tokenizer, "pad_token_id", 0),
        log_file=folder / LOG,
        store=make_store(settings, adapter, args.process_index) if store is None else store,
        loss_per=settings.loss_per,
        show=show,
        callbacks=callbacks,
    )


def make_store(settings: TrainSettings, adapter: Adapter, process: int) -> Store | None:
    """Where the trunk's states and what is seen in pictures are kept; None where there is neither.

    Each process has its own.
    """
    if not trunk_height(adapter) and not looks(adapter):
        if settings.cache is not None:
            said = "the cache %s stays unused: no layer lies below what %s trains"
            logging.getLogger("trimtab").warning(said, settings.cache, adapter.method.name)
        return None
    folder = None if settings.cache is None else Path(settings.cache) / f"process-{process}"
    facts = trunk_facts(adapter, model_fingerprint(adapter.model)) if folder else {}
    return Store(round(settings.cache_memory * 2**30), folder, facts)


def _checkpointing(settings: TrainSettings) -> dict[str, Any]:
    if not settings.gradient_checkpointing:
        return {}
    new = "activation_checkpointing" in TrainingArguments.__dataclass_fields__  # the older name is deprecated
    name = "activation_checkpointing" if new else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def measure(trainer: Trainer) -> dict[str, float]:
    """What the training took: seconds, tokens (without padding), their ratio, peak memory, epochs."""
    log = trainer.step_log
    return {
        "seconds": round(log.seconds, 3),
        "tokens": log.tokens,
        "tokens_per_second": round(log.tokens / log.seconds, 1) if log.seconds else 0.0,
        "peak_memory_mb": peak_mb(),
        "epochs": round(trainer.state.epoch or 0.0, 6),
        "steps": trainer.state.global_step,
    }


def count_parameters(adapter: Adapter) -> dict[str, float]:
    """Trained parameters, all parameters (the trained ones included), and the share of the former."""
    trainable = sum(parameter.numel() for parameter in adapter.parameters())
    total = sum(parameter.numel() for parameter in adapter.model.parameters())
    return {"trainable": trainable, "total": total, "share": trainable / total}


def _whole(adapter: Adapter) -> bool:
    return bool(getattr(adapter.method, "whole_model", False))

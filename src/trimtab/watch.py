"""What is noted at every training step: log.jsonl, the progress bar, non-finite numbers, Ctrl-C. Knows steps; refuses
to know models and batches."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trimtab.bars import Bar, progress
from trimtab.checkpoint import atomic_write
from trimtab.errors import UserError
from trimtab.files import writing
from trimtab.snapshots import checkpoint_path, last_checkpoint, remove


class Meter:
    """What the current optimizer step has gathered so far."""

    def __init__(self) -> None:
        self.lr = 0.0
        self.clear()

    def clear(self) -> None:
        """Begin the next step."""
        self.loss: Tensor | float = 0.0
        self.tokens: Tensor | int = 0

    def add(self, loss: Tensor, tokens: Tensor | int) -> None:
        """Note one piece of the step's batch: its share of the loss, and its tokens."""
        self.loss = self.loss + loss
        self.tokens = self.tokens + tokens


@dataclass
class StepLog(TrainerCallback):
    """Writes one JSON object a step: step, epoch, loss, lr, and tokens and seconds since the run began.

    A resumed run cuts off what came after its checkpoint and counts on from there.
    """

    meter: Meter
    path: Path | None = None
    """The file; None counts only."""
    tokens: int = 0
    seconds: float = 0.0
    loss: float = math.nan
    """The last step's loss."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take up the log where the run stands."""
        kept = _lines_until(self.path, state.global_step) if self.path else []
        self.tokens = kept[-1]["tokens"] if kept else 0
        self.seconds = kept[-1]["seconds"] if kept else 0.0
        self.started = time.perf_counter() - self.seconds
        if self.path and state.is_world_process_zero:
            text = "".join(json.dumps(line) + "\n" for line in kept)
            atomic_write(self.path, lambda path: _write(path, text))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the step's line."""
        self.tokens += int(self.meter.tokens)
        self.seconds = time.perf_counter() - self.started
        self.loss = float(self.meter.loss)
        line = {
            "step": state.global_step,
            "epoch": round(state.epoch or 0.0, 6),
            "loss": self.loss,
            "lr": self.meter.lr,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
        }
        self.meter.clear()
        if self.path and state.is_world_process_zero:
            with writing(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _lines_until(path: Path, step: int) -> list[dict[str, Any]]:
    """The log's lines up to a step; a last line that a killed run cut short is left out."""
    if not path.is_file() or step == 0:
        return []
    whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    try:
        return [row for row in map(json.loads, whole) if row["step"] <= step]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged, the run cannot be resumed with it: {error}") from None


@dataclass
class Guard(TrainerCallback):
    """Stops before a non-finite loss or gradient reaches the weights.

    A checkpoint is good once a step's loss and gradient with its tensors were finite. One that gives others is deleted,
    so that a run goes on from the one before.
    """

    meter: Meter
    gradients: Callable[[], Iterable[Tensor]]
    proven: Callable[[], object]
    """Called when the tensors as they are have given finite numbers."""
    scaled: bool = False
    """Whether a gradient scaler is at work (float16), which skips such steps by itself."""

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        """Raises UserError with the step, the learning rate and the last good checkpoint."""
        self.meter.lr = float(optimizer.param_groups[0]["lr"])
        if self.scaled:
            return
        loss = float(self.meter.loss)
        if not math.isfinite(loss):
            self._stop(f"the loss became {loss}", args, state)
        norm = float(torch.nn.utils.get_total_norm(self.gradients()))
        if not math.isfinite(norm):
            self._stop(f"the gradient became non-finite (loss {loss:.4g})", args, state)
        self.proven()

    def _stop(self, what: str, args: TrainingArguments, state: TrainerState) -> None:
        if args.output_dir and state.is_world_process_zero:
            remove(checkpoint_path(args.output_dir, state.global_step))
        good = last_checkpoint(args.output_dir) if args.output_dir else None
        kept = f"the last good checkpoint is {good}" if good else "there is no good checkpoint yet"
        step, lr = state.global_step + 1, self.meter.lr
        again = "go on from it with --resume and a smaller --lr" if good else "a smaller learning rate may help"
        raise UserError(f"{what} at step {step} (learning rate {lr:.3g}); {kept}; {again}")


@dataclass
class StepBar(TrainerCallback):
    """Shows steps, loss and learning rate on the terminal."""

    log: StepLog
    show: bool | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Open the bar."""
        shown = self.show if state.is_world_process_zero else False
        self.block: AbstractContextManager[Bar] = progress("training", state.max_steps, shown, state.global_step)
        self.advance = self.block.__enter__()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Count a step."""
        self.advance(1, f"loss {self.log.loss:.4f}  lr {self.log.meter.lr:.2g}")

    def close(self) -> None:
        """Take the bar away, however the training ended."""
        block = self.__dict__.pop("block", None)
        if block is not None:
            block.__exit__(None, None, None)


@dataclass
class Interrupt(TrainerCallback):
    """The first Ctrl-C stops after the current step and saves a checkpoint; the second stops at once."""

    asked: bool = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop the training if asked to."""
        if self.asked:
            control.should_training_stop = True
            control.should_save = args.save_strategy != "no"

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, Ctrl-C is noted instead of raised. Only the main thread can listen; elsewhere nothing changes."""
        self.asked = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

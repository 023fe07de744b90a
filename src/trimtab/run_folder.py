"""The files of a run's folder. Knows their names and when they may be written; refuses to know models and data."""

from __future__ import annotations

import dataclasses
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from trimtab.checkpoint import CONFIG, WEIGHTS, WHOLE_CONFIG, atomic_write, write_json
from trimtab.errors import UserError
from trimtab.methods.spec import format_method, parse_method
from trimtab.models import portable
from trimtab.settings import TrainSettings
from trimtab.snapshots import checkpoints, last_checkpoint, remove

RUN, LOG, METRICS = "run.yaml", "log.jsonl", "metrics.json"
WRITTEN = (RUN, LOG, METRICS, "README.md", "curves.svg", CONFIG, WEIGHTS)
"""What a run writes besides checkpoint-N; `overwrite` deletes these and nothing else."""
WHOLE = (WHOLE_CONFIG, "config.json", "generation_config.json", "model*.safetensors*", "token*", "*.jinja", "special*")
"""What full fine-tuning writes more; deleted only where trimtab wrote a whole model before."""
_SWITCHES = ("resume", "overwrite")
_PACKAGES = ("trimtab", "torch", "transformers", "accelerate", "datasets", "safetensors")


def settings_to_dict(settings: TrainSettings) -> dict[str, Any]:
    """The settings as plain values for run.yaml; what the run was only started with (resume, overwrite) is left out."""
    values = {key: value for key, value in dataclasses.asdict(settings).items() if key not in _SWITCHES}
    values["method"] = format_method(parse_method(settings.method))
    if settings.label_words is not None:
        values["label_words"] = dict(settings.label_words)
    if settings.eval_data is not None:
        del values["eval_share"]
    return {key: value for key, value in values.items() if value is not None}


def check_output(folder: Path, settings: TrainSettings) -> None:
    """Raises UserError where the folder holds something and neither resume nor overwrite was asked for.

    Settings that contradict each other are refused as well.
    """
    for one, other in (("resume", "overwrite"), ("batch_size", "batch_tokens")):
        if getattr(settings, one) and getattr(settings, other):
            raise UserError(f"{one} and {other} cannot both be given")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, --output must be a folder")
    if folder.resolve() == Path(portable(settings.model)):
        raise UserError(f"{folder} is the base model itself; choose another folder for --output")
    if folder.is_dir() and any(folder.iterdir()) and not (settings.resume or settings.overwrite):
        raise UserError(f"{folder} holds something already; choose another folder, or give --overwrite or --resume")


def check_resume(folder: Path, settings: TrainSettings) -> None:
    """Raises UserError where a run is to be resumed with other settings than it began with."""
    path = folder / RUN
    if not settings.resume or last_checkpoint(folder) is None:
        return
    if not path.is_file():
        raise UserError(f"{folder} has checkpoints but no {RUN}, so it cannot be resumed")
    began, now = read_run_settings(folder), settings_to_dict(settings)
    for key in [*now, *began]:
        if began.get(key) != now.get(key):
            raise UserError(
                f"the run in {folder} began with {key}={began.get(key)!r}, not {now.get(key)!r}; "
                "resume it with the same settings"
            )


def read_run_settings(folder: Path) -> dict[str, Any]:
    """The settings in a run's run.yaml; none where there is no such file."""
    path = folder / RUN
    if not path.is_file():
        return {}
    values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    return {key: value for key, value in values.items() if key != "versions"}


def begin(folder: Path, settings: TrainSettings) -> None:
    """Clear the folder of an earlier run if asked to, and write run.yaml."""
    folder.mkdir(parents=True, exist_ok=True)
    if settings.overwrite:
        _clear(folder)
    values = {**settings_to_dict(settings), "versions": {name: version(name) for name in _PACKAGES}}
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    atomic_write(folder / RUN, lambda path: _write(path, text))


def _clear(folder: Path) -> None:
    patterns = (*WRITTEN, *WHOLE) if (folder / WHOLE_CONFIG).is_file() else WRITTEN
    for pattern in patterns:
        for path in folder.glob(pattern):
            path.unlink()
    for path in checkpoints(folder):
        remove(path)


def finish(folder: Path, metrics: dict[str, Any]) -> None:
    """Write metrics.json (with the size on disk, added to `metrics`) and the report."""
    from trimtab.report import write_report

    metrics["bytes"] = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    write_json(folder / METRICS, metrics)
    write_report(folder)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")

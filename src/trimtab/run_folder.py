"""The files of a run's folder. Knows their names and when they may be written; refuses to know models and data."""

from __future__ import annotations

import dataclasses
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from trimtab import config
from trimtab.checkpoint import COMBINED, CONFIG, NEXT, WEIGHTS, WHOLE_CONFIG, atomic_write, write_json
from trimtab.errors import UserError
from trimtab.files import writing
from trimtab.methods.spec import method_to_dict, parse_method
from trimtab.models import portable, same_source
from trimtab.report import read_object, write_report
from trimtab.settings import PLACES, TrainSettings
from trimtab.snapshots import ABOUT, checkpoints, remove

RUN, LOG, METRICS = "run.yaml", "log.jsonl", "metrics.json"
WRITTEN = (RUN, LOG, METRICS, "README.md", "curves.svg", CONFIG, NEXT, WEIGHTS, "preprocessor_config.json")
"""What a run writes besides checkpoint-N; `overwrite` replaces these and nothing else."""
WHOLE = (WHOLE_CONFIG, "config.json", "generation_config.json", "model*.safetensors*", "token*", "*.jinja", "special*")
"""What full fine-tuning writes more; deleted only where trimtab wrote a whole model before."""
_SWITCHES = ("resume", "overwrite")
_PACKAGES = ("trimtab", "torch", "transformers", "accelerate", "datasets", "safetensors")


def settings_to_dict(settings: TrainSettings) -> dict[str, Any]:
    """The settings as plain values for run.yaml, which start the same run from any folder.

    What the run was only started with (resume, overwrite) is left out.
    """
    values = {key: value for key, value in dataclasses.asdict(settings).items() if key not in _SWITCHES}
    values["method"] = method_to_dict(parse_method(settings.method))  # every field: defaults may change one day
    if settings.label_words is not None:
        values["label_words"] = dict(settings.label_words)
    if settings.eval_data is not None:
        del values["eval_share"]
    values |= {name: portable(values[name]) for name in PLACES if values[name] is not None}
    return {key: value for key, value in values.items() if value is not None or config.default(key) is not None}


def check_output(folder: Path, settings: TrainSettings) -> None:
    """Raises UserError where the folder holds something and neither resume nor overwrite was asked for.

    With either of them, where trimtab did not write what the folder holds. Settings that contradict each other are
    refused as well.
    """
    changed = {key: value for key, value in dataclasses.asdict(settings).items() if value != config.default(key)}
    for mistake in config.both_given(changed):
        raise UserError(mistake)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, --output must be a folder")
    if same_source(str(folder), settings.model):
        raise UserError(f"{folder} is the base model itself; choose another folder for --output")
    if folder.is_dir() and any(folder.iterdir()):
        _check_content(folder, settings)


def _check_content(folder: Path, settings: TrainSettings) -> None:
    if not (settings.resume or settings.overwrite):
        raise UserError(f"{folder} holds something already; choose another folder, or give --overwrite or --resume")
    if settings.resume and not _is_run_file(folder / RUN):
        raise UserError(f"{folder} has no {RUN} of an earlier run, so it cannot be resumed")
    if settings.resume and COMBINED in read_object(folder / CONFIG):
        raise UserError(f"{folder} is a sum of adapters, no run that could be resumed; choose another folder")
    if not is_ours(folder):
        raise UserError(f"{folder} holds files that trimtab did not write; choose another folder")
    for path in checkpoints(folder):
        if not (path / ABOUT).is_file():
            raise UserError(f"{path} is no checkpoint of trimtab (it lacks {ABOUT}); move it to another folder")


def is_ours(folder: Path) -> bool:
    """Whether a folder is the output of a run, or an adapter that was saved from Python."""
    return _is_run_file(folder / RUN) or any(_is_adapter_file(folder / name) for name in (CONFIG, WHOLE_CONFIG))


def _is_run_file(path: Path) -> bool:
    return path.is_file() and "trimtab" in (config.read_yaml(path, typed=True).get("versions") or ())


def _is_adapter_file(path: Path) -> bool:
    return path.is_file() and {"format", "method", "base"} <= set(read_object(path))


def check_resume(folder: Path, settings: TrainSettings) -> None:
    """Raises UserError where a run is to be resumed with other settings than it began with.

    The learning rate may change: one that made numbers explode is of no use any more.
    """
    if not settings.resume or not (folder / RUN).is_file():
        return
    began, now = read_run_settings(folder), settings_to_dict(settings)
    for key in [*now, *began]:
        if key not in ("output", "cache", "cache_memory", "lr") and began.get(key) != now.get(key):
            raise UserError(
                f"the run in {folder} began with {key}={began.get(key)!r}, not {now.get(key)!r}; "
                "resume it with the same settings"
            )


def read_run_settings(folder: Path) -> dict[str, Any]:
    """The settings in a run's run.yaml; none where there is no such file."""
    path = folder / RUN
    if not path.is_file():
        return {}
    return {key: value for key, value in config.read_yaml(path, typed=True).items() if key not in config.WRITTEN}


def begun(folder: Path) -> TrainSettings | None:
    """The settings that a run began with, checked; None where there is no run.yaml. Raises UserError for mistakes."""
    path = folder / RUN
    return config.resolve(path, flags={"output": str(folder)}) if path.is_file() else None


def begin(folder: Path, settings: TrainSettings) -> None:
    """Clear the folder of an earlier run if asked to, and write run.yaml."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if settings.overwrite:
            _clear(folder)
    values = {**settings_to_dict(settings), "versions": {name: version(name) for name in _PACKAGES}}
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    atomic_write(folder / RUN, lambda path: _write(path, text))


def _clear(folder: Path) -> None:
    patterns = (*WRITTEN, *WHOLE) if (folder / WHOLE_CONFIG).is_file() else WRITTEN
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    for path in found - {folder / RUN}:  # run.yaml says whose folder this is until the new one takes its place
        path.unlink()
    for path in checkpoints(folder):
        remove(path)


def finish(folder: Path, metrics: dict[str, Any]) -> None:
    """Write metrics.json (with the size on disk, added to `metrics`) and the report."""
    metrics["bytes"] = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    write_json(folder / METRICS, metrics)
    write_report(folder)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")

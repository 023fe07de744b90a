"""From one library's adapter folder to another's. Knows folders and base models; refuses to know what is in either.

The base model is needed on the way: names of modules, shapes and frozen weights decide what a file means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from trimtab import peers
from trimtab.adapter import Adapter
from trimtab.apart import check_apart
from trimtab.checkpoint import atomic_folder, load, read_adapter_config
from trimtab.errors import UserError, unknown
from trimtab.hub import at_hand
from trimtab.models import Kind, load_config, load_model, model_kind

OURS = "trimtab"
FORMATS = (OURS, *peers.LIBRARIES)
ADAPTER_FILES = ("*.safetensors", "*config.json", "README.md", ".gitattributes")
"""What an adapter folder consists of; `overwrite` replaces a folder of these and no other."""
_LOADED: dict[str, tuple[Kind, str]] = {
    # by peft's task types and by the endings of transformers' class names: the kind, and an encoder's head
    "CAUSAL_LM": ("causal", ""),
    "ForCausalLM": ("causal", ""),
    "LMHeadModel": ("causal", ""),
    "SEQ_2_SEQ_LM": ("seq2seq", ""),
    "ForConditionalGeneration": ("seq2seq", ""),
    "SEQ_CLS": ("encoder", "classification"),
    "ForSequenceClassification": ("encoder", "classification"),
    "TOKEN_CLS": ("encoder", "tags"),
    "ForTokenClassification": ("encoder", "tags"),
    "QUESTION_ANS": ("encoder", "spans"),
    "ForQuestionAnswering": ("encoder", "spans"),
    "ForMultipleChoice": ("encoder", "choices"),
    "ForMaskedLM": ("masked", ""),
}


@dataclass(frozen=True)
class Source:
    """What a folder says of its base model."""

    format: str
    base: str
    task: str
    """A task type or a class of transformers; empty where it says nothing."""
    labels: Sequence[str] = ()


def convert(
    folder: str | Path, output: str | Path, *, to: str = OURS, model: str | None = None, overwrite: bool = False
) -> Path:
    """Write the adapter of `folder` as the files of `to` (trimtab, peft, adapters) into `output`; returns it.

    `model` is the base where the folder does not say it or says a place that is no more. Raises UserError for what one
    side has and the other has not, a base that does not fit, and an output folder that holds something; the output
    appears whole or not at all.
    """
    folder, output = at_hand(folder), Path(output).expanduser()
    if to not in FORMATS:
        raise unknown("the format", to, FORMATS)
    source = _source(folder)
    if source.format == to:
        raise UserError(f"{folder} is an adapter of {to} already; --to {' or '.join(_others(to))} converts it")
    _check_output(folder, output, overwrite)
    adapter = load(_base(source, folder, model), folder)
    atomic_folder(output, lambda path: _write(adapter, path, to), overwrite=overwrite)
    return output


def _others(name: str) -> list[str]:
    return [one for one in FORMATS if one != name]


def _source(folder: Path) -> Source:
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder")
    library = peers.library_of(folder)
    if library is not None:
        said = peers.describe(folder, library)
        return Source(library.name, said.base, said.task)
    config: dict[str, Any] = read_adapter_config(folder)
    base = config["base"]
    return Source(OURS, str(base.get("path") or ""), str(base.get("class") or ""), config.get("labels") or ())


def _base(source: Source, folder: Path, model: str | None) -> PreTrainedModel:
    """The base model as the adapter wants it. Raises UserError where nothing says which it is."""
    where = model or source.base
    if not where:
        raise UserError(f"{folder} does not say which model it belongs to; give it with --model")
    found = next((one for ending, one in _LOADED.items() if source.task.endswith(ending)), None)
    kind, head = found or (model_kind(load_config(where)), "classification")
    return load_model(where, kind, head=head or "classification", labels=source.labels, dtype="auto")


def _write(adapter: Adapter, folder: Path, to: str) -> None:
    if to == OURS:
        adapter.save(folder)
    else:
        peers.export(adapter, folder, to)


def _check_output(folder: Path, output: Path, overwrite: bool) -> None:
    """Everything that can be refused before the model is loaded."""
    if output.is_file():
        raise UserError(f"{output} is a file; --output must be a folder")
    check_apart(output, folder, "the adapter's own folder")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{output} holds something already; choose another folder or give --overwrite")
    other = sorted(path.name for path in output.iterdir() if not _is_adapter_file(path))
    if other:
        raise UserError(f"{output} holds {other[0]}, which is no file of an adapter; choose another folder")


def _is_adapter_file(path: Path) -> bool:
    return path.is_file() and any(fnmatch(path.name, pattern) for pattern in ADAPTER_FILES)

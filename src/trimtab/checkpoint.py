"""Adapter folders on disk: strict, atomic, safetensors only. Knows nothing of training.

A folder holds `adapter_config.json` (format, method, base and its fingerprint, the head's labels, task) and
`adapter_model.safetensors`. The configuration has the checksum of the tensors' file, so the two are one state: a save
puts the next configuration beside the old one first, and whichever names the tensors that are there is the one that
is read. A crash between two files leaves the old adapter or the new one, never a mixture.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from trimtab.adapter import Adapter, Entry, attach_in, folded_method, folded_parts
from trimtab.contract import Context, folded
from trimtab.errors import UserError
from trimtab.files import digest, exchanged, read_json, safetensors, writing
from trimtab.methods.spec import method_from_dict, method_to_dict
from trimtab.sites import HeadSite, Sites, task_heads
from trimtab.snapshots import sync

CONFIG = "adapter_config.json"
WHOLE_CONFIG = "trimtab_config.json"
"""The configuration beside a whole model: transformers would take an `adapter_config.json` there for peft's."""
WEIGHTS = "adapter_model.safetensors"
NEXT = ".adapter_config.json.next"
"""The configuration of a save that is on its way: the valid one as soon as the tensors are those that it names."""
CHECKSUM = "checksum"
"""The key under which the configuration has the SHA-256 of the tensors' file; older folders have none."""
FORMAT = 1
BITS = "bits"
"""The key under which the safetensors file says how many packed bits it holds."""
ENCODER = "encoder"
"""The key under which the configuration says which vision encoder an adapter looks at pictures through."""
SMALL = "small_model"
"""The key under which the configuration says which small model an adapter brings, and how it is made."""
COMBINED = "combined"
"""The key under which the configuration says which adapters it is the sum of (combining.py)."""
ROOM, ROOM_AT_LEAST = 4, 1 << 20
"""A configuration may ask for so many times the numbers in its file, and so many more."""
_METHOD = "method"
"""The key under which the safetensors file says whose tensors it holds."""
_SAMPLES = 1024  # elements of each tensor that enter the fingerprint


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place in one step.

    A crash or a full disk leaves the old file as it was. Raises UserError where it cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
        finally:
            _forgotten(temporary)


def _forgotten(temporary: Path) -> None:
    """Delete a temporary file, if the disk lets us: what went wrong before is what there is to say."""
    with suppress(OSError):
        temporary.unlink(missing_ok=True)


def atomic_folder(target: Path, fill: Callable[[Path], object], *, overwrite: bool = False) -> None:
    """Let `fill` write into a temporary folder beside `target`, then put it in place in one step.

    Raises UserError where `target` holds something and `overwrite` is not given, and where it cannot be written.
    """
    if target.exists() and not overwrite and any(target.iterdir()):
        raise UserError(f"{target} holds something already; choose another folder or give --overwrite")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        try:
            fill(temporary)
            sync(temporary)
            temporary.chmod(0o755)
            _swap(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _swap(new: Path, target: Path) -> None:
    if not target.exists():
        new.rename(target)
        return
    if exchanged(new, target):
        return  # the old one has the temporary name, and goes with it
    old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    target.rename(old / "old")
    try:
        new.rename(target)
    except OSError:
        (old / "old").rename(target)
        raise
    finally:
        with suppress(OSError):
            shutil.rmtree(old)


def model_fingerprint(model: PreTrainedModel) -> str:
    """A hash of the base's weights (without task heads and adapters), equal for float32 and bfloat16 of one model.

    Of every tensor the name, the shape and up to 1,024 evenly spaced elements enter, rounded to bfloat16.
    """
    digest = hashlib.sha256()
    base = model.base_model
    heads = tuple(f"{path}." for path, _ in task_heads(model)) if base is model else ()  # clip has no base of its own
    tensors = [(name, tensor) for name, tensor in _base_tensors(base) if not name.startswith(heads)]
    for name, tensor in sorted(tensors):
        digest.update(f"{name}{list(tensor.shape)}".encode())
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLES)
        digest.update(flat[::step][:_SAMPLES].to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:32]


def _base_tensors(base: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [
        (name, parameter)
        for name, parameter in base.named_parameters()
        if not name.startswith("trimtab.") and parameter.is_floating_point()
    ]


def save_adapter(adapter: Adapter, folder: Path, *, task: Mapping[str, Any] | None = None) -> Path:
    """Write an adapter's folded tensors and configuration into `folder`; returns the folder.

    An earlier save is replaced in one step. Full fine-tuning is written as a transformers model folder with a
    `trimtab_config.json` in it. Raises UserError where the folder cannot be written; then the earlier save is as it
    was, except that of a whole model, whose config.json goes first and comes last.
    """
    entry = adapter._entry
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    method = folded_method(entry)
    config = {
        "format": FORMAT,
        "trimtab": version("trimtab"),
        "name": adapter.name,
        "method": method_to_dict(method),
        "base": describe_base(adapter.model),
        **describe_encoders(entry),
        **describe_small(entry),
        "labels": list(entry.labels) if any(_is_task_head(site) for site in entry.sites) else None,
        "task": dict(task) if task is not None else None,
    }
    if getattr(method, "whole_model", False):
        _save_whole(adapter.model, folder)
        write_json(folder / WHOLE_CONFIG, config)
    else:
        tensors = folded_state(adapter)
        metadata = {"format": "pt", _METHOD: json.dumps(config["method"], sort_keys=True), **packed(entry)}
        _save_pair(folder, config, lambda path: save_file(tensors, path, metadata=metadata))
        if hasattr(method, "write_beside"):
            method.write_beside(adapter, folder)
    return folder


def _save_pair(folder: Path, config: dict[str, Any], write: Callable[[Path], object]) -> None:
    """Put tensors and configuration in place as one: the tensors' rename is the step from the old to the new."""

    def with_config(path: Path) -> None:
        write(path)
        write_json(folder / NEXT, {**config, CHECKSUM: digest(path)})

    atomic_write(folder / WEIGHTS, with_config)
    with writing(folder / CONFIG):
        (folder / NEXT).replace(folder / CONFIG)


def folded_state(adapter: Adapter) -> dict[str, torch.Tensor]:
    """The adapter's tensors in their inference form, contiguous and on the CPU; the adapter itself stays as it is."""
    parts = folded_parts(adapter._entry.parts)
    return {key: tensor.detach().to("cpu").contiguous() for key, tensor in parts.state_dict().items()}


def packed(entry: Entry) -> dict[str, str]:
    """What a file says of tensors that hold bits, eight a byte: how many bits they are."""
    count = sum(getattr(folded(part), "packed", 0) for part in entry.members())
    return {BITS: str(count)} if count else {}


def describe_base(model: PreTrainedModel) -> dict[str, Any]:
    """What the configuration says of the base model."""
    return {
        "path": model.config._name_or_path or model.name_or_path,
        "class": type(model).__name__,
        "model_type": model.config.model_type,
        "fingerprint": model_fingerprint(model),
    }


def describe_encoders(entry: Entry) -> dict[str, Any]:
    """What the configuration says of the frozen encoder that the adapter looks at pictures through, if it does."""
    eyes: list[Any] = entry.eyes()
    return {ENCODER: eyes[0].sight.describe()} if eyes else {}


def describe_small(entry: Entry) -> dict[str, Any]:
    """What the configuration says of the small model that the adapter brings, if it does."""
    found = [part.brings for part in entry.members() if getattr(part, "brings", None) is not None]
    return {SMALL: found[0]} if found else {}


def _save_whole(model: PreTrainedModel, folder: Path) -> None:
    state = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith("trimtab.")}
    with writing(folder):
        hidden = Path(tempfile.mkdtemp(dir=folder, prefix=".model."))
        try:
            model.save_pretrained(hidden, state_dict=state)
            sync(hidden)
            (folder / "config.json").unlink(missing_ok=True)  # without it no half of two saves can be loaded
            for file in sorted(hidden.iterdir(), key=lambda file: file.name == "config.json"):
                file.replace(folder / file.name)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write a value as readable JSON, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def config_path(folder: Path) -> Path:
    """The file that holds the configuration; where a save was cut short, the one that names the tensors there."""
    following, weights = folder / NEXT, folder / WEIGHTS
    if following.is_file() and weights.is_file() and _names(following, weights):
        return following
    return folder / (WHOLE_CONFIG if not (folder / CONFIG).is_file() and (folder / WHOLE_CONFIG).is_file() else CONFIG)


def _names(config: Path, weights: Path) -> bool:
    try:
        return read_json(config).get(CHECKSUM) == digest(weights)
    except UserError:  # cut short itself
        return False


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    """The configuration of an adapter folder.

    Raises UserError where there is none, where it is no JSON object, lacks a field, or is of a newer format.
    """
    path = config_path(Path(folder))
    if not path.is_file():
        raise UserError(f"{folder} is no adapter folder: it has no {CONFIG}")
    config = read_json(path)
    if "peft_type" in config:
        raise UserError(f"{folder} is a peft adapter; make it one of trimtab: trimtab convert {folder} --output DIR")
    missing = [key for key in ("format", "method", "base") if key not in config]
    if missing:
        raise UserError(f"{path} is broken: it lacks {', '.join(missing)}")
    if config["format"] != FORMAT:
        raise UserError(f"{path} has format {str(config['format'])[:60]}; this version of trimtab reads {FORMAT}")
    if not isinstance(config["method"], dict) or not isinstance(config["base"], dict):
        raise UserError(f"{path} is broken: method and base must be JSON objects")
    labels = config.get("labels") or []
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise UserError(f"{path} is broken: labels must be a list of texts")
    return config


def read_tensors(folder: str | Path, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of an adapter folder with this configuration.

    Raises UserError where the file is missing, damaged, a pickle, or says that it belongs to another method.
    """
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        pickles = [file.name for file in Path(folder).iterdir() if file.suffix in (".bin", ".pt", ".pth", ".pkl")]
        if pickles:
            raise UserError(
                f"{folder} offers {pickles[0]}, a pickle file, which can run code when read; save it as safetensors"
            )
        raise UserError(f"{folder} has no {WEIGHTS}")
    with safetensors(path) as file:
        whose = (file.metadata() or {}).get(_METHOD)
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if whose is not None and whose != json.dumps(config["method"], sort_keys=True):
        said = whose[:200]
        raise UserError(f"{path} holds the tensors of {said}, {CONFIG} names another method; the save was cut short")
    if CHECKSUM in config and config[CHECKSUM] != digest(path):
        raise UserError(
            f"{path} is damaged: its bytes are not those that were saved (take {CHECKSUM} out of {CONFIG} if you "
            "changed it on purpose)"
        )
    return tensors


def load(
    model: PreTrainedModel,
    folder: str | Path,
    name: str | None = None,
    *,
    force: bool = False,
) -> Adapter:
    """Attach the adapter of a folder to a model: one of trimtab's, or another library's (peers/).

    `folder` may be on the hub: "owner/name", or "owner/name@revision"; a local one touches no network.
    `force` accepts a base model other than the one it was trained on; other libraries' folders do not say which it was.
    Raises UserError for a broken folder, another base model, and missing, unexpected or mis-shaped tensors; then the
    model is as it was.
    """
    from trimtab import peers  # which builds on this module
    from trimtab.hub import at_hand

    folder = at_hand(folder)
    library = peers.library_of(folder)
    if library is not None:
        return peers.load(model, folder, library, name)
    config = read_adapter_config(folder)
    method = method_from_dict(config["method"])
    if getattr(method, "whole_model", False):
        raise UserError(f"{folder} holds a whole model, not an adapter; load it with from_pretrained")
    tensors, labels = read_tensors(folder, config), config.get("labels")
    if not force:
        _check_base(model, config, folder)
    shapes = getattr(method, "for_loading", lambda: method)()  # without what only the start needs: text, labels
    room, context = ROOM * sum(tensor.numel() for tensor in tensors.values()) + ROOM_AT_LEAST, Context()
    for one in getattr(shapes, "methods", (shapes,)):
        if getattr(one, "brings_model", False):  # what the folder does not describe is not looked for elsewhere
            context = Context(brought=config.get(SMALL, {}), room=room)
        else:
            _check_room(one, Sites(model), room, folder)
    adapter = attach_in(context, model, shapes, name or str(config.get("name") or "default"))
    try:
        _check_encoder(adapter, config, folder, force)
        if labels:
            _check_labels(adapter, labels, tensors, folder)
            adapter.fit_head(labels)
        adapter.fit_tensors(tensors)
        adapter.load_state_dict(tensors)
    except BaseException:
        adapter.detach()
        raise
    adapter._entry.method = method
    return adapter


def _check_room(method: Any, sites: Sites, room: int, folder: str | Path) -> None:
    """Raises UserError where a configuration asks for far more numbers than its tensors have, before they are made.

    Some more are let through: the error that lists missing and mis-shaped tensors says more.
    """
    if hasattr(method, "check_room"):  # where counting would make them
        method.check_room(sites, room)
        return
    try:
        wanted = method.parameter_count(sites)
    except ArithmeticError as error:
        raise UserError(f"{folder}: the sizes of {method.name} mean nothing: {error}") from None
    if wanted > room:
        raise UserError(f"{folder}: the configuration asks for far more numbers than {WEIGHTS} has")


def _check_labels(
    adapter: Adapter, labels: Sequence[str], tensors: Mapping[str, torch.Tensor], folder: str | Path
) -> None:
    """Raises UserError where no tensor has a row a label, before a head is made for more of them than the base has."""
    if len(labels) > len(adapter._entry.labels) and not any(
        tensor.dim() and tensor.shape[0] == len(labels) for tensor in tensors.values()
    ):
        raise UserError(f"{folder} has {len(labels):,} labels, and no tensor in {WEIGHTS} has as many rows")


def _check_encoder(adapter: Adapter, config: Mapping[str, Any], folder: str | Path, force: bool) -> None:
    """Raises UserError where the adapter was trained with another vision encoder than it looks through now."""
    known = config.get(ENCODER) or {}
    for eye in adapter._entry.eyes():
        now: dict[str, Any] = eye.sight.describe()  # type: ignore[attr-defined]
        if known.get("width") != now["width"]:
            raise UserError(
                f"{folder} was trained with a vision encoder that gives {known.get('width')} numbers a picture, "
                f"{now['path']} gives {now['width']}"
            )
        if known.get("fingerprint") != now["fingerprint"] and not force:
            raise UserError(
                f"{folder} was trained with another vision encoder than {now['path']} holds now: the weights differ; "
                "force=True loads it all the same"
            )


def _is_task_head(site: Any) -> bool:
    return isinstance(site, HeadSite) and not site.generative


def _check_base(model: PreTrainedModel, config: Mapping[str, Any], folder: str | Path) -> None:
    base = config["base"]
    if base.get("model_type") != model.config.model_type:
        raise UserError(
            f"{folder} was trained on a {base.get('model_type')} model ({base.get('path')}), "
            f"this is a {model.config.model_type}"
        )
    if config.get("labels") and base.get("class") != type(model).__name__:
        raise UserError(
            f"{folder} has the task head of a {base.get('class')}, this model is a {type(model).__name__}; "
            f"load the base as {base.get('class')}"
        )
    if base.get("fingerprint") != model_fingerprint(model):
        raise UserError(
            f"{folder} was trained on another base model ({base.get('path') or 'of no name'}): the weights differ; "
            "force=True loads it all the same"
        )

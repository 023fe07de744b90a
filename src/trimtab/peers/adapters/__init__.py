"""Folders of the library `adapters` (AdapterHub): `adapter_config.json` with a `config`, `adapter.safetensors`, and a
head in files of its own. Knows what all kinds share; each kind is a file of its own.

Tensors are named after the adapter (`….adapters.NAME.…`) and, of a model without a head, lack the base's prefix: kinds
see them without the one and with the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from trimtab.adapter import Adapter
from trimtab.errors import UserError
from trimtab.methods import Head, Union
from trimtab.peers.adapters import double_seq_bn, heads, ia3, lora, par_bn, prefix, prompt, seq_bn
from trimtab.peers.adapters.places import in_model, with_name, without_name
from trimtab.peers.folder import Folder
from trimtab.peers.heads import read_heads
from trimtab.peers.kinds import Described, Found, Kind, Library, Model, acting, only_method, plain, settings
from trimtab.sites import Sites

KINDS: Mapping[str, Kind] = {
    module.KIND.name: module.KIND for module in (seq_bn, double_seq_bn, par_bn, lora, ia3, prefix, prompt)
}
CONFIG, WEIGHTS = "adapter_config.json", "adapter.safetensors"
VERSION = "adapters.1.3.0"
"""The library whose files these are."""
SCALED_OTHERWISE = (1, 1)
"""Before this version LoRA's scale was 1, whatever its alpha was."""


def wrote(config: Mapping[str, Any]) -> bool:
    """Whether adapters wrote this configuration."""
    return "config" in config and "hidden_size" in config and "format" not in config


def read(folder: Folder, model: PreTrainedModel) -> Found:
    """A folder in our words. Raises UserError for a kind, an option or a module that trimtab has not."""
    place = Model(model, Sites(model))
    heads.refuse_pickle(folder.path)
    head = heads.head_config(folder.path)
    _name_tensors(folder, model)
    heads.name_flexible(folder, place, head)
    heads.drop_frozen(folder, place)
    own = read_heads(folder, place.sites, "")
    inner = Folder(folder.path, _inner(folder), folder.tensors)
    found = kind_of(inner).read(inner, place)
    generative = any(site.generative and any(key.startswith(site.key) for key in own) for site in place.sites.head)
    method = Union((found.method, Head())) if generative else found.method
    return Found(method, {**own, **found.state}, heads.labels_of(head))


def _name_tensors(folder: Folder, model: PreTrainedModel) -> None:
    """Take the adapter's name out of the keys, and put the base's prefix in or out."""
    name = folder.text("name")
    for key in list(folder.tensors):
        short = without_name(key, name)
        if short is not None:
            folder.tensors[in_model(short, model)] = folder.take(key)


def _inner(folder: Folder) -> dict[str, Any]:
    """The adapter's own configuration, with the scale that older versions meant."""
    config = folder.config.get("config")
    if not isinstance(config, dict):
        raise folder.wrong("config", config, "an object")
    older = _version(folder.text("version")) < SCALED_OTHERWISE
    return {**config, "alpha": config.get("r", 8)} if older and config.get("architecture") == "lora" else dict(config)


def _version(text: str) -> tuple[int, ...]:
    """The numbers of a version of adapters; of another library's, or none, this one's."""
    parts = text.removeprefix("adapters.").split(".")[:2]
    known = text.startswith("adapters.") and all(part.isdigit() and len(part) < 6 for part in parts)
    return tuple(int(part) for part in parts) if known else SCALED_OTHERWISE


def kind_of(config: Folder) -> Kind:
    """The kind of an adapter's own configuration. Raises UserError for one that trimtab has not."""
    kind = _find_kind(config)
    if kind is None:
        raise UserError(
            f"{config.path} is an adapter of the kind {str(config.config.get('architecture'))[:60]}, which trimtab "
            f"does not read; it reads {', '.join(KINDS)}"
        )
    return kind


def _find_kind(config: Folder) -> Kind | None:
    said: Any = config.config.get("architecture")
    if said is None and "non_linearity" in config.config:
        if config.flag("is_parallel"):
            return par_bn.KIND
        return seq_bn.KIND if config.flag("original_ln_before") else double_seq_bn.KIND
    if said == "lora":
        return ia3.KIND if config.text("composition_mode", "add") == "scale" else lora.KIND
    return KINDS.get(said) if isinstance(said, str) else None


def write(adapter: Adapter, folder: Path) -> Path:
    """An adapter in adapters' files. Raises UserError for what adapters cannot express; then nothing is written."""
    from trimtab.checkpoint import write_json

    form = acting(adapter)
    method = only_method(form.method, "adapters")
    kind = next((one for one in KINDS.values() if method.name in one.methods), None)
    if kind is None:
        able = sorted(name for one in KINDS.values() for name in one.methods)
        raise UserError(f"adapters has no {method.name}; trimtab writes {', '.join(able)} for it")
    written = kind.write(replace(form, method=method))
    name = adapter.name.replace(".", "_")  # a module's name there
    about = _about(adapter.model)
    head, head_tensors = heads.write_head(adapter, about)
    tensors = {with_name(key, name): tensor for key, tensor in written.tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    _save(tensors, folder / WEIGHTS)
    if head:
        _save(head_tensors, folder / heads.WEIGHTS)
        write_json(folder / heads.CONFIG, head)
    write_json(folder / CONFIG, {**about, "config": written.config, "name": name})
    return folder


def _save(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    from trimtab.checkpoint import atomic_write

    atomic_write(path, lambda part: save_file(plain(tensors), part, metadata={"format": "pt"}))


def _about(model: PreTrainedModel) -> dict[str, Any]:
    """What both configurations say of the base."""
    config: Any = model.config
    return {
        "hidden_size": getattr(config, "hidden_size", None),
        "model_class": type(model).__name__,
        "model_name": config._name_or_path or model.name_or_path or "",
        "model_type": config.model_type,
        "version": VERSION,
    }


def describe(folder: Folder) -> Described:
    """What the configurations say. Raises UserError for a field of the wrong type."""
    head = heads.head_config(folder.path)
    inner = Folder(folder.path, _inner(folder), {})
    kind = _find_kind(inner)
    return Described(
        base=folder.text("model_name"),
        task=heads.class_of(head) or folder.text("model_class"),
        kind=kind.name if kind else str(inner.config.get("architecture"))[:60],
        methods=kind.methods if kind else (),
        fields=settings({key: value for key, value in inner.config.items() if key != "architecture"}),
        labels=heads.labels_of(head),
        family=folder.text("model_type"),
        name=folder.text("name"),
    )


ADAPTERS = Library(
    name="adapters",
    config_file=CONFIG,
    weight_files=(WEIGHTS, heads.WEIGHTS),
    how_to_save=(
        "load it once in adapters and call model.save_adapter(folder, name, use_safetensors=True); of a prefix that "
        "call fails, because its tensors share memory: there safetensors.torch.save_file({key: tensor.clone() for key, "
        "tensor in torch.load(file, weights_only=True).items()}, 'adapter.safetensors')"
    ),
    wrote=wrote,
    read=read,
    write=write,
    describe=describe,
)

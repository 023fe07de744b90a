"""Heads of `adapters`: `head_config.json` and `model_head.safetensors`, of transformers' own classes by the names of
their modules, of the library's flexible models as `heads.NAME.<place in the row of modules>`.

A model's vocabulary projection is in the file even where it was not trained; equal to the base's it is left out here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trimtab.adapter import Adapter
from trimtab.errors import UserError
from trimtab.files import read_json
from trimtab.peers.folder import PICKLES, Folder
from trimtab.peers.kinds import Model, head_parts

CONFIG, WEIGHTS = "head_config.json", "model_head.safetensors"
CLASSES = {  # a flexible head's type -> the ending of transformers' class for the same task
    "classification": "ForSequenceClassification",
    "tagging": "ForTokenClassification",
    "multiple_choice": "ForMultipleChoice",
    "causal_lm": "ForCausalLM",
    "masked_lm": "ForMaskedLM",
    "seq2seq_lm": "ForConditionalGeneration",
}
ALONE = ("classification", "tagging", "multiple_choice")
"""Those that are one projection, of the pooled output or of every token's."""
TWO = {"RobertaClassificationHead": "tanh", "ElectraClassificationHead": "gelu"}
"""transformers' heads of two projections of the first token's state, and what is between them."""


def head_config(path: Path) -> dict[str, Any]:
    """What a folder says of its head; empty where it has none."""
    return read_json(path / CONFIG) if (path / CONFIG).is_file() else {}


def refuse_pickle(path: Path) -> None:
    """Raises UserError for a head whose tensors are a pickle."""
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLES and "head" in file.name)
    if pickles and (path / CONFIG).is_file() and not (path / WEIGHTS).is_file():
        raise UserError(
            f"{path} offers {pickles[0]}, a pickle file, which can run code when read; save it as safetensors: load it "
            "once in adapters and call model.save_head(folder, name, use_safetensors=True)"
        )


def flexible(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a flexible head; empty for one of transformers' own."""
    inner = config.get("config")
    return inner if isinstance(inner, dict) else {}


def labels_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The classes' names in their order; none where the file does not say one for each."""
    numbers = flexible(config).get("label2id") or config.get("label2id")
    if not isinstance(numbers, dict) or not all(type(one) is int for one in numbers.values()):
        return ()
    names = {number: str(name) for name, number in numbers.items()}
    return tuple(names[index] for index in sorted(names)) if sorted(names) == list(range(len(numbers))) else ()


def class_of(config: Mapping[str, Any]) -> str:
    """The ending of transformers' class for a head's task; empty where it says none."""
    kind = flexible(config).get("head_type")
    said = CLASSES.get(kind, "") if isinstance(kind, str) else config.get("model_class")
    return said if isinstance(said, str) else ""


def name_flexible(folder: Folder, place: Model, config: Mapping[str, Any]) -> None:
    """Give a flexible head's tensors the names that they have in the model.

    Raises UserError for one that is no head of the model's class.
    """
    own, name = flexible(config), config.get("name")
    if not own:
        return
    names = _names(own, place)
    if not names:
        raise UserError(
            f"{folder.path}: its {str(own.get('head_type'))[:40]} head of {str(own.get('layers'))[:10]} layers is not "
            f"the one that {type(place.model).__name__} has; read is one layer, behind the pooler for a text's class, "
            "and in roberta and electra two layers of the first token"
        )
    for number, path in names.items():
        start = f"heads.{name}.{number}."
        for key in [key for key in folder.tensors if key.startswith(start)]:
            folder.tensors[f"{path}.{key.removeprefix(start)}"] = folder.take(key)


def _names(own: Mapping[str, Any], place: Model) -> dict[int, str]:
    """The place in a flexible head's row of modules -> the module of the model's head; empty where they differ."""
    kind, layers, sites = own.get("head_type"), own.get("layers"), place.sites.task_head
    if kind not in ALONE or len(sites) != 1 or not type(place.model).__name__.endswith(CLASSES[kind]):
        return {}
    pooled = bool(own.get("use_pooler"))
    between = TWO.get(type(sites[0].module).__name__)
    if between is not None and kind == "classification":
        two = layers == 2 and not pooled and own.get("activation_function") == between
        return {1: f"{sites[0].path}.dense", 4: f"{sites[0].path}.out_proj"} if two else {}
    fits = layers == 1 and (kind == "tagging" or (pooled and place.sites.pooler is not None))
    return {1: sites[0].path} if fits else {}


def drop_frozen(folder: Folder, place: Model) -> None:
    """Leave out what a language model's head file repeats of the base."""
    if place.model.get_output_embeddings() is None:
        return
    own = place.model.state_dict()
    for key in [key for key in folder.tensors if key in own]:
        tensor = folder.tensors[key]
        if tensor.shape == own[key].shape and torch.equal(tensor.to(own[key].dtype), own[key].to(tensor.device)):
            folder.take(key)


def write_head(adapter: Adapter, about: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The head's configuration and tensors, both empty where there is none."""
    tensors = {
        f"{site.path}.{name}": one for site, copy in head_parts(adapter) for name, one in copy.state_dict().items()
    }
    if not tensors:
        return {}, {}
    labels = adapter._entry.labels
    numbers = {label: index for index, label in enumerate(labels)}
    return {**about, "config": None, "name": None, "num_labels": len(labels), "label2id": numbers}, tensors

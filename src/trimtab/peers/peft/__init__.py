"""peft's folders: `adapter_config.json` with a `peft_type`, and `adapter_model.safetensors`. Knows what all kinds
share; each kind is a file of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from trimtab import bridge
from trimtab.adapter import Adapter
from trimtab.errors import UserError
from trimtab.methods import Head, Union
from trimtab.peers.folder import Folder
from trimtab.peers.heads import read_heads, write_heads
from trimtab.peers.kinds import Described, Found, Kind, Library, Model, acting, only_method, plain, settings
from trimtab.peers.peft import adaption, ia3, layernorm, lora, p_tuning, prefix, prompt
from trimtab.sites import Sites

KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (lora.KIND, ia3.KIND, layernorm.KIND, adaption.KIND, prompt.KIND, p_tuning.KIND, prefix.KIND)
}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NO_SETTINGS = frozenset(
    ["peft_type", "peft_version", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping"]
)
"""Fields of every kind, which are none of its own."""
TASKS = {  # in peft's words, by the endings of transformers' class names
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


def wrote(config: Mapping[str, Any]) -> bool:
    """Whether peft wrote this configuration."""
    return "peft_type" in config


def read(folder: Folder, model: PreTrainedModel) -> Found:
    """A folder in our words. Raises UserError for a kind, an option or a module that trimtab has not."""
    kind = KINDS[folder.choice("the peft_type", "peft_type", KINDS)]
    place = Model(model, Sites(model))
    start = "base_model." if kind.prompt_learning else "base_model.model."
    heads = read_heads(folder, place.sites, start)
    found = kind.read(folder, place)
    generative = any(key.startswith("lm_head.") for key in heads)
    method = Union((found.method, Head())) if generative else found.method
    return Found(method, {**heads, **found.state})


def write(adapter: Adapter, folder: Path) -> Path:
    """An adapter in peft's files. Raises UserError for what peft cannot express; then nothing is written."""
    from safetensors.torch import save_file

    from trimtab.checkpoint import atomic_write, write_json

    form = acting(adapter)
    method = only_method(form.method, "peft")
    if hasattr(method, "write_beside"):
        return bridge.write(adapter, folder)
    kind = next((one for one in KINDS.values() if method.name in one.methods), None)
    if kind is None:
        able = sorted(name for one in KINDS.values() for name in one.methods)
        raise UserError(f"peft has no {method.name}; trimtab writes {', '.join(able)} for it")
    written = kind.write(form)
    start = "base_model." if kind.prompt_learning else "base_model.model."
    heads = write_heads(adapter, start)
    task = task_of(type(adapter.model).__name__, kind.prompt_learning)
    config: dict[str, Any] = {
        "peft_type": kind.name,
        "task_type": task,
        "base_model_name_or_path": adapter.model.config._name_or_path or adapter.model.name_or_path or None,
        "inference_mode": True,
        **written.config,
    }
    if heads.config:
        config["modules_to_save"] = heads.config["modules"]
    folder.mkdir(parents=True, exist_ok=True)
    tensors = plain({**written.tensors, **heads.tensors})
    atomic_write(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    write_json(folder / CONFIG, config)
    return folder


def task_of(class_name: str, prompt_learning: bool = False) -> str | None:
    """peft's task type. An encoder-decoder is only named where its virtual tokens need the name: peft 0.21's class for
    it asks for a method that transformers 5 has no more, and the others do without that class."""
    task = next((task for ending, task in TASKS.items() if class_name.endswith(ending)), None)
    return None if task == "SEQ_2_SEQ_LM" and not prompt_learning else task


def describe(folder: Folder) -> Described:
    """What the configuration says. Raises UserError for a field of the wrong type."""
    kind = folder.text("peft_type")
    return Described(
        base=folder.text("base_model_name_or_path"),
        task=folder.text("task_type"),
        kind=kind,
        methods=KINDS[kind].methods if kind in KINDS else (),
        fields=settings({key: value for key, value in folder.config.items() if key not in NO_SETTINGS}),
    )


PEFT = Library(
    name="peft",
    config_file=CONFIG,
    weight_files=(WEIGHTS,),
    how_to_save="load it once in peft where it was trained and call model.save_pretrained(folder)",
    wrote=wrote,
    read=read,
    write=write,
    describe=describe,
)

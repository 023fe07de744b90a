"""The methods, one file each. A new method is one file and one import here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trimtab.contract import Method
from trimtab.methods.adamix import AdaMix
from trimtab.methods.autoprompt import AutoPrompt
from trimtab.methods.bitfit import BitFit
from trimtab.methods.borrowed import peft_method
from trimtab.methods.diff_pruning import DiffPruning
from trimtab.methods.full import Full
from trimtab.methods.head import Head
from trimtab.methods.houlsby import Houlsby
from trimtab.methods.ia3 import IA3
from trimtab.methods.ladder import Ladder
from trimtab.methods.layernorm import LayerNorm
from trimtab.methods.llama_adapter import LlamaAdapter
from trimtab.methods.llama_adapter_v2 import LlamaAdapterV2
from trimtab.methods.lora import LoRA
from trimtab.methods.mask import Mask
from trimtab.methods.p_tuning import PTuning
from trimtab.methods.p_tuning_v2 import PTuningV2
from trimtab.methods.parallel import Parallel
from trimtab.methods.pfeiffer import Pfeiffer
from trimtab.methods.prefix import Prefix
from trimtab.methods.prompt import Prompt
from trimtab.methods.side import Side
from trimtab.methods.union import Union

_CLASSES: list[Any] = [thing for thing in list(globals().values()) if isinstance(thing, type)]
_METHODS = [thing for thing in _CLASSES if isinstance(getattr(thing, "name", None), str)]
METHODS: dict[str, type[Method]] = {
    method.name: method for method in sorted(_METHODS, key=lambda method: method.paper == "baseline")
}
"""The imported classes with a method's name, by that name; baselines last."""
BORROWED: dict[str, Callable[[str], type]] = {"peft": peft_method}
"""What makes a class of another library's method, by the library's name: `peft:boft` is peft_method("boft")."""

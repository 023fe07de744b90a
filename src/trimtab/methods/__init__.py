"""The methods, one file each. A new method is one file and one line here."""

from __future__ import annotations

from trimtab.contract import Method
from trimtab.methods.full import Full
from trimtab.methods.head import Head
from trimtab.methods.lora import LoRA
from trimtab.methods.prompt import Prompt
from trimtab.methods.union import Union

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Prompt,
        LoRA,
        Head,
        Full,
    )
}

__all__ = ["METHODS", "Full", "Head", "LoRA", "Method", "Prompt", "Union"]

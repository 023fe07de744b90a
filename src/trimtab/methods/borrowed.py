"""peft's methods as ours: `peft:boft[boft_block_size=4]`. Knows peft's configuration classes; refuses to know what they
do (bridge.py puts them on a model).

    y = layer(x)     in place of y = W x + b, at every module that peft chooses; the equations are peft's

The name is peft's own in lower case, the fields are those of its configuration class with their types. What is left
out: what belongs to the run (task_type, inference_mode, …), the modules to save (the task head is trained with every
method here) and fields that are dictionaries. Trained parameters: those of the layers.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.errors import UserError, unknown

NATIVE = {
    "adaption_prompt": "llama-adapter",
    "multitask_prompt_tuning": "prompt",
    "p_tuning": "p-tuning",
    "prefix_tuning": "prefix",
    "prompt_tuning": "prompt",
    "cpt": "prompt",
}
"""Methods of peft's that wrap the model's forward, and ours that do the same or come nearest."""
LR = 1e-3
"""The learning rate where none is given: no method's own, found for none of them."""
FACTS = Path(__file__).parent.parent / "peft_facts.json"
"""What was found out about each method, and with which peft (benchmarks/bridge.py writes it)."""
INSTALL = "is not installed: pip install 'trimtab[peft]'"


@functools.cache
def peft_method(kind: str) -> type:
    """The method class for one of peft's methods.

    Raises UserError where peft is not installed, for an unknown name (with the nearest one) and for methods that are no
    layers.
    """
    configs = peft_configs()
    if kind not in configs:
        raise unknown("peft's method", kind, sorted(configs))
    if kind in NATIVE:
        raise UserError(f"peft:{kind} wraps the model's forward, which the bridge leaves alone; use {NATIVE[kind]}")
    config = configs[kind]
    if _prompts(config):
        raise UserError(f"peft:{kind} is prompt learning, which wraps the model's forward; use prompt or prefix")
    name = f"peft:{kind}"
    spaces = {
        "name": name,
        "kinds": frozenset({"linear"}),
        "lr": LR,
        "mergeable": bool(facts()["methods"].get(kind, {}).get("merges")),
        "formula": "those of peft's layers",
        "paper": f"peft, {config.__name__}",
        "__post_init__": _check_values,
        "build": _build,
        "parameter_count": _parameter_count,
        "check_room": _check_room,
        "write_beside": _write_beside,
        "peft_config": _config,
    }
    made = dataclasses.make_dataclass(f"Peft{config.__name__}", _fields(config), frozen=True, namespace=spaces)
    made.__doc__ = f"What peft trains with {config.__name__}."
    return made


def peft_configs() -> dict[str, type]:
    """peft's configuration classes by the method's name in lower case. Raises UserError where peft is not installed."""
    try:
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    except ImportError:
        raise UserError(f"a method peft:… needs peft, which {INSTALL}") from None
    return {str(kind.value).lower(): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


@functools.cache
def facts() -> Mapping[str, Any]:
    """What was found out: `peft`, the version that it was found with, and by name of `methods` works, merges, why."""
    return json.loads(FACTS.read_text(encoding="utf-8")) if FACTS.is_file() else {"peft": None, "methods": {}}


def listed() -> tuple[list[dict[str, Any]], str]:
    """Every method that the installed peft offers, whether it works and why not; and which peft says so."""
    from importlib.metadata import version

    configs, known = peft_configs(), facts()
    blank = {"works": None, "merges": None, "why": "not tried yet: this peft is newer than the facts"}
    rows = [{"name": f"peft:{kind}", **{**blank, **known["methods"].get(kind, {})}} for kind in sorted(configs)]
    here, found = version("peft"), known["peft"]
    note = f"found out with peft {found}"
    return rows, note if here == found else f"{note}; installed is {here}, where it may be different"


def _prompts(config: Any) -> bool:
    from peft import PromptLearningConfig

    return issubclass(config, PromptLearningConfig)


def _fields(config: Any) -> list[tuple[str, Any, Any]]:
    """Name, type and default of what can be given of a configuration class."""
    from peft import PeftConfig

    left_out = {field.name for field in dataclasses.fields(PeftConfig)} | {"modules_to_save"}
    hints, found = typing.get_type_hints(config), []
    for field in dataclasses.fields(config):
        hint = _hint(hints[field.name])
        if field.name in left_out or not field.init or hint is None:
            continue
        default = _plain(_default(field))
        if default is not None and not isinstance(default, (str, int, float, bool, tuple)):
            continue
        found.append((field.name, hint if default is not None else hint | None, dataclasses.field(default=default)))
    return found


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _plain(value: Any) -> Any:
    return tuple(sorted(value) if isinstance(value, set) else value) if isinstance(value, (list, set, tuple)) else value


def _hint(hint: Any) -> Any:
    """A configuration's annotation in the words of method strings; None for what these cannot say."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = [one for one in typing.get_args(hint) if one is not type(None)]
        lists = [one for one in members if typing.get_origin(one) in (list, set, tuple)]
        if lists:
            hint = lists[0]
        else:
            known = [one for member in members if (one := _hint(member)) is not None]
            if not known:
                return None
            joined = functools.reduce(lambda left, right: typing.Union[left, right], known)  # noqa: UP007
            return typing.Optional[joined] if len(members) < len(typing.get_args(hint)) else joined  # noqa: UP045
    if typing.get_origin(hint) in (list, set, tuple):
        item = (typing.get_args(hint) or (str,))[0]
        return tuple[item, ...] | None if item in (str, int, float) else None  # type: ignore[valid-type]
    if typing.get_origin(hint) is typing.Literal:
        return hint
    return hint if hint in (int, float, bool, str) else None


# -- what the classes can do --------------------------------------------------------------------------------------


def _config(self: Any) -> Any:
    """A configuration of peft's with the fields that are not at their defaults."""
    given = {}
    for field in dataclasses.fields(self):
        value = getattr(self, field.name)
        if value != field.default:
            given[field.name] = list(value) if isinstance(value, tuple) else value
    if given.get("target_modules") == ["all-linear"]:
        given["target_modules"] = "all-linear"
    return peft_configs()[self.name.partition(":")[2]](**given)


def _check_values(self: Any) -> None:
    try:
        self.peft_config()
    except (TypeError, ValueError) as error:
        raise UserError(f"{self.name}: {' '.join(str(error).split())}") from error


def _build(self: Any, sites: Any, context: Any) -> Any:
    """A layer of peft's at each module that it chooses. Raises UserError as bridge.build."""
    from trimtab.bridge import build

    return build(self.name, self.peft_config(), sites)


def _check_room(self: Any, sites: Any, room: int) -> None:
    """Raises UserError where a file with `room` cannot be of this configuration."""
    from trimtab.bridge import check_room

    check_room(self.name, self.peft_config(), sites, room)


def _parameter_count(self: Any, sites: Any) -> int:
    """The trained parameters of the layers, made for counting."""
    parts = self.build(sites, None).values()
    return sum(weight.numel() for part in parts for weight in part.parameters() if weight.requires_grad)


def _write_beside(self: Any, adapter: Any, folder: Path) -> None:
    """The adapter once more as peft's files, in a folder inside its own."""
    from trimtab.bridge import FOLDER, write

    write(adapter, folder / FOLDER)

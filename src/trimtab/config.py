"""The settings of a run: what may be set, where from, and every mistake at once. Knows no model, no data, no training.

Values come from run.yaml, then `--set key=value`, then flags; the later one wins. What there is to set stands in
settings.py; the command line's help is made from the texts there.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import shlex
import textwrap
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from trimtab.errors import UserError
from trimtab.settings import TrainSettings

_POSITIVE: dict[str, Any] = {"gt": 0}
_BOUNDS: dict[str, dict[str, Any]] = {
    "epochs": _POSITIVE,
    "lr": _POSITIVE,
    "batch_size": _POSITIVE,
    "batch_tokens": _POSITIVE,
    "max_length": _POSITIVE,
    "limit": _POSITIVE,
    "eval_limit": _POSITIVE,
    "eval_share": {"gt": 0, "lt": 1},
    "max_new_tokens": _POSITIVE,
    "num_beams": _POSITIVE,
    "no_repeat_ngram_size": {"ge": 0},
    "seed": {"ge": 0, "lt": 2**32},
    "gradient_accumulation": _POSITIVE,
    "warmup": {"ge": 0, "lt": 1},
    "weight_decay": {"ge": 0},
    "save_steps": _POSITIVE,
    "cache_memory": {"ge": 0},
}
_CHOICES: dict[str, Any] = {
    "task": Literal["classify", "regress", "tag", "span", "choose", "generate"],
    "dtype": Literal["float32", "bfloat16", "float16", "auto"],
    "loss_per": Literal["token", "sentence"],
}
_FLAGS = {"num_beams": "--beams"}
_SIGNS = {"model": "MODEL", "data": "DATA", "eval_data": "DATA", "output": "DIR", "method": "METHOD", "task": "TASK"}
WRITTEN = ("versions",)
"""Keys of a finished run's run.yaml that are no settings; a run may be started from that file again."""
RIVALS = (("batch_size", "batch_tokens"), ("eval_data", "eval_share"), ("resume", "overwrite"))
"""Settings of which only one may be given; one that is given later sets its rival aside."""


# -- documentation under fields -----------------------------------------------------------------------------------


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """The texts that stand under a dataclass's fields, by field name."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for line, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and _is_text(after):
            docs[line.target.id] = inspect.cleandoc(after.value.value)  # type: ignore[attr-defined]
    return docs


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def names() -> list[str]:
    """Every setting."""
    return [field.name for field in dataclasses.fields(TrainSettings)]


def default(name: str) -> Any:
    """A setting's default; None where it has none."""
    found = next(field.default for field in dataclasses.fields(TrainSettings) if field.name == name)
    return None if found is dataclasses.MISSING else found


def is_flag(name: str) -> bool:
    """Whether a setting is a yes-or-no flag on the command line."""
    return isinstance(default(name), bool)


def flag(name: str) -> str:
    """'batch_size' -> '--batch-size'."""
    return _FLAGS.get(name, "--" + name.replace("_", "-"))


def command(settings: TrainSettings) -> str:
    """The command line that runs these settings: what differs from the defaults, quoted for a shell."""
    from trimtab.methods.spec import format_method, parse_method

    words = ["trimtab", "train"]
    for name in names():
        value = getattr(settings, name)
        if name == "method":
            value = format_method(parse_method(value))
        if value == default(name) or value is None:
            continue
        if is_flag(name):
            words.append(flag(name))
        else:
            words += [flag(name), _as_text(value)]
    return shlex.join(words)


def _as_text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ",".join(f"{key}={one}" for key, one in value.items())
    if isinstance(value, float):
        return f"{value:.12g}"
    return str(value).replace("\n", "\\n").replace("\t", "\\t")


def metavar(name: str) -> str:
    """What a setting's value looks like, in one word for the help."""
    hint = str(TrainSettings.__annotations__[name])
    signs = {"int": "N", "float": "X", "Mapping": "LABEL=WORD,…"}
    return _SIGNS.get(name) or next((sign for word, sign in signs.items() if word in hint), "TEXT")


# -- merging and checking -----------------------------------------------------------------------------------------


def resolve(
    file: str | Path | None = None, assignments: Sequence[str] = (), flags: Mapping[str, Any] | None = None
) -> TrainSettings:
    """The settings of a run from run.yaml, `key=value` assignments and flags (later ones win; None is not given).

    Raises one UserError that has a line for every mistake: key, value, what is allowed, the nearest match.
    """
    mistakes: list[str] = []
    sources = [
        (Path(file).name if file else "", read_yaml(file) if file else {}),
        ("--set", _read_assignments(assignments, mistakes)),
        ("", {key: value for key, value in (flags or {}).items() if value is not None}),
    ]
    values, origins = _merge(sources, mistakes)
    mistakes += [f"{flag(key)} is missing" for key in _required() if values.get(key) is None]
    checked = _validate(values, origins, mistakes)
    if mistakes:
        raise UserError("\n".join(mistakes))
    return TrainSettings(**checked)


def _required() -> list[str]:
    return [field.name for field in dataclasses.fields(TrainSettings) if field.default is dataclasses.MISSING]


def read_yaml(path: str | Path, *, typed: bool = False) -> dict[str, Any]:
    """The mapping of a YAML file. Scalars stay text (no, 1e-3 and 010 are not guessed at); null is None.

    With `typed`, for files that trimtab wrote, scalars are what YAML takes them for.

    Raises UserError where the file is missing, broken, or holds no mapping.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Guesses at nothing but null."""

    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in pairs if tag.endswith(":null")]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    try:
        text = Path(path).read_text(encoding="utf-8")
        value = yaml.load(text, Loader=yaml.SafeLoader if typed else Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{str(path)!r} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: such as a date of month 13
        raise UserError(f"{str(path)!r} is not valid YAML: {' '.join(str(error).split())}") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{str(path)!r} must hold settings as key: value, not a {type(value).__name__}")
    return {str(key).replace("-", "_"): item for key, item in value.items()}


def _read_assignments(assignments: Sequence[str], mistakes: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            mistakes.append(f"--set {text!r} must have the form key=value")
            continue
        values[key.strip().replace("-", "_")] = None if value.strip().lower() in ("", "none", "null") else value
    return values


def _merge(
    sources: Sequence[tuple[str, Mapping[str, Any]]], mistakes: list[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """All values, later sources over earlier ones, and where each came from."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, given in sources:
        for key, value in given.items():
            if key in names():
                values[key], origins[key] = value, origin
            elif key not in WRITTEN:
                mistakes.append(_unknown(key, value, origin))
        _set_rivals_aside(given, values, mistakes)
    return values, origins


def _unknown(key: str, value: Any, origin: str) -> str:
    near = difflib.get_close_matches(key, names(), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"allowed: {', '.join(names())}"
    return f"{_shown(key, value, origin)} is no setting; {hint}"


def _set_rivals_aside(given: Mapping[str, Any], values: dict[str, Any], mistakes: list[str]) -> None:
    mistakes += both_given(given)
    for one, other in RIVALS:
        here = [key for key in (one, other) if _is_given(given.get(key))]
        if len(here) == 1:
            values.pop(other if here[0] == one else one, None)


def both_given(given: Mapping[str, Any]) -> list[str]:
    """A sentence for each pair of rivals that are both given."""
    return [
        f"{one} and {other} cannot both be given"
        for one, other in RIVALS
        if _is_given(given.get(one)) and _is_given(given.get(other))
    ]


def _is_given(value: Any) -> bool:
    return value not in (None, False, "false")


def _validate(values: dict[str, Any], origins: Mapping[str, str], mistakes: list[str]) -> dict[str, Any]:
    from pydantic import ValidationError

    values = {key: value for key, value in values.items() if value is not None or default(key) is not None}
    _read("label_words", values, origins, mistakes, _label_words)
    _read("method", values, origins, mistakes, _method)
    _read("template", values, origins, mistakes, _line_breaks)
    values = {key: value for key, value in values.items() if value is not None or _may_be_none(key)}
    try:
        checked = _model()(**values)
    except ValidationError as error:
        mistakes += [_mistake(one, values, origins) for one in error.errors()]
        return {}
    return {key: getattr(checked, key) for key in values}


@functools.cache
def _model() -> Any:
    """The settings as a pydantic model: their types, with bounds and choices."""
    from pydantic import ConfigDict, create_model

    hints = typing.get_type_hints(TrainSettings)
    fields: dict[str, Any] = {name: (_bounded(name, hints[name]), default(name)) for name in names()}
    return create_model("Settings", __config__=ConfigDict(allow_inf_nan=False, coerce_numbers_to_str=True), **fields)


def _bounded(name: str, hint: Any) -> Any:
    """The type of a setting with its bounds inside an optional: (float | None) -> (float with bounds) | None."""
    from pydantic import Field

    kind = _CHOICES.get(name, next((one for one in typing.get_args(hint) if one is not type(None)), hint))
    if name in ("label_words", "method"):
        return Any  # read by their own parsers
    if name in _BOUNDS:
        kind = Annotated[kind, Field(**_BOUNDS[name])]
    return kind | None if _may_be_none(name) else kind


def _may_be_none(name: str) -> bool:
    return type(None) in typing.get_args(typing.get_type_hints(TrainSettings)[name])


def _read(
    key: str, values: dict[str, Any], origins: Mapping[str, str], mistakes: list[str], parse: Callable[[Any], Any]
) -> None:
    """Parses one value in place; its mistakes go with the others, and the value goes away."""
    if values.get(key) is None:
        return
    try:
        values[key] = parse(values[key])
    except UserError as error:
        where = f" ({origins[key]})" if origins[key] else ""
        mistakes += [f"{key}: {line}{where}" for line in str(error).splitlines()]
        del values[key]


def _method(value: Any) -> Any:
    from trimtab.methods.spec import parse_method

    return parse_method(value)


def _label_words(value: Any) -> dict[str, str]:
    if isinstance(value, Mapping):
        return {str(label): str(word) for label, word in value.items()}
    from trimtab.tasks import parse_label_words

    return parse_label_words(str(value))


def _line_breaks(value: Any) -> str:
    r"""A shell passes \n on as two characters; a template means the line break."""
    return str(value).replace("\\n", "\n").replace("\\t", "\t")


def _shown(key: str, value: Any, origin: str) -> str:
    text = f"{value!r}" if isinstance(value, str) else f"{value}"
    return f"{key}={text if len(text) <= 60 else text[:57] + '...'}{f' ({origin})' if origin else ''}"


def _mistake(error: Mapping[str, Any], values: Mapping[str, Any], origins: Mapping[str, str]) -> str:
    """Pydantic's message as one of our sentences."""
    key = str(error["loc"][0])
    allowed = str(error["msg"]).replace("Input should be", "must be")
    if key not in _CHOICES:
        allowed = allowed.partition(",")[0]
    near: list[str] = []
    if key in _CHOICES and isinstance(values[key], str):
        near = difflib.get_close_matches(values[key], typing.get_args(_CHOICES[key]), n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{_shown(key, values[key], origins[key])} {allowed}{hint}"

"""Methods as text: `lora[r=8,layers=-10:]`. Knows dataclass fields; refuses to know what a method does.

    spec    = method *( "|" method )            more than one method is a union
    method  = name [ "[" [ field *( "," field ) ] "]" ]
    field   = key "=" value                     a segment without "=" continues the value before it
    value   = 'quoted' | "quoted" | bare        quoted values may hold , | [ ] = and the escapes \\\\ \\' \\" \\n \\t

The same in YAML and JSON: `{"name": "lora", "r": 8}`, `{"name": "union", "methods": [...]}`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trimtab.errors import UserError, unknown

UNION = "union"
_ESCAPES = {"n": "\n", "t": "\t"}
_BRACKETS = {"[": 1, "]": -1}
_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")
_NOTHING = object()
_BARE = re.compile(r"[\w.:/+-]+([ ,][\w.:/+-]+)*")
_BARE_ITEM = re.compile(r"[\w.:/+-]+( [\w.:/+-]+)*")

Registry = Mapping[str, type]


# -- parsing ------------------------------------------------------------------------------------------------------


def parse_method(spec: Any, registry: Registry | None = None) -> Any:
    """The method that a string, a mapping or a method stands for.

    Raises UserError with one line per mistake: unknown method or field (with the nearest one), a value of the wrong
    type (with what is allowed), brackets or quotes that do not close.
    """
    registry = _registry(registry)
    if isinstance(spec, str):
        built = _each(_split(spec, "|"), lambda part: _parse_one(part, registry))
        return built[0] if len(built) == 1 else _union(built)
    if isinstance(spec, Mapping):
        return method_from_dict(spec, registry)
    if dataclasses.is_dataclass(spec) and not isinstance(spec, type):
        return spec
    raise UserError(f"a method is a string such as 'lora[r=8]' or a mapping with a name, not {spec!r}")


def split_methods(text: str) -> list[str]:
    """A list of methods apart, at the commas outside brackets: 'prompt,lora[r=8,alpha=16]' has two."""
    parts = [part.strip() for part in _split(text, ",")]
    if not all(parts):
        raise UserError(f"the list of methods {text!r} has an empty place")
    return parts


def _each(parts: Sequence[Any], parse: Callable[[Any], Any]) -> list[Any]:
    """All parts parsed; the mistakes of all of them in one UserError."""
    built, mistakes = [], []
    for part in parts:
        try:
            built.append(parse(part))
        except UserError as error:
            mistakes.append(str(error))
    if mistakes:
        raise UserError("\n".join(mistakes))
    return built


def _parse_one(text: str, registry: Registry) -> Any:
    name, fields = _name_and_fields(text)
    cls = _class_of(name, registry)
    values: dict[str, list[_Piece]] = {}
    mistakes: list[str] = []
    key = ""
    for segment in fields:
        head, found, tail = _key_and_value(segment)
        if not found:
            if not key:
                raise UserError(
                    f"{segment.strip()!r} in {text.strip()!r} has no field in front of it; write field=value"
                )
            values[key].append(_piece(segment))
            continue
        key = head.strip()
        if key in values:
            mistakes.append(f"field {key!r} of {name} is given twice")
        values[key] = [_piece(tail)]
    return _build(cls, values, mistakes)


def _name_and_fields(text: str) -> tuple[str, list[str]]:
    """'lora[r=8,alpha=16]' -> 'lora', ['r=8', 'alpha=16']."""
    name, bracket, rest = text.partition("[")
    name = name.strip().lower()
    if not name:
        raise UserError(f"a method's name is missing in {text.strip()!r}; write for example 'lora[r=8]'")
    if not bracket:
        if "]" in name:
            raise UserError(f"the bracket in {text.strip()!r} closes but was never opened")
        return name, []
    inside, after = _closing(rest, text)
    if after.strip():
        raise UserError(f"{after.strip()!r} follows the closing bracket of {text.strip()!r}")
    return name, _split(inside, ",") if inside.strip() else []


def _closing(rest: str, text: str) -> tuple[str, str]:
    for index, char, depth in _scan(rest, text):
        if char == "]" and depth < 0:
            return rest[:index], rest[index + 1 :]
    raise UserError(f"the bracket in {text.strip()!r} is never closed")


def _split(text: str, separator: str) -> list[str]:
    """The parts of `text` between separators outside brackets and quotes."""
    cuts = [index for index, char, depth in _scan(text, text) if char == separator and depth == 0]
    edges = [-1, *cuts, len(text)]
    return [text[start + 1 : end] for start, end in itertools.pairwise(edges)]


def _scan(text: str, whole: str) -> typing.Iterator[tuple[int, str, int]]:
    """Every character outside quotes, with its place and the depth of brackets after it.

    A quote opens only where a value begins, so that "don't" needs no quotes around it.
    """
    depth, quote, index, begins = 0, "", 0, True
    while index < len(text):
        char = text[index]
        if quote:
            if char == "\\":
                index += 1
            elif char == quote:
                quote = ""
        elif begins and char in "'\"":
            quote = char
        else:
            depth += _BRACKETS.get(char, 0)
            yield index, char, depth
        begins = char in "=,[|" or (begins and char.isspace())
        index += 1
    if quote:
        raise UserError(f"the quote in {whole.strip()!r} is never closed")


def _key_and_value(segment: str) -> tuple[str, bool, str]:
    """'r=8' -> 'r', True, '8'; a segment without '=' outside quotes -> '', False, ''."""
    for index, char, _ in _scan(segment, segment):
        if char == "=":
            return segment[:index], True, segment[index + 1 :]
    return "", False, ""


@dataclasses.dataclass(frozen=True)
class _Piece:
    """A value as it was written between two commas: its raw text, and the quoted text if it was quoted."""

    raw: str
    quoted: str | None = None

    @property
    def text(self) -> str:
        return self.raw.strip() if self.quoted is None else self.quoted


def _piece(raw: str) -> _Piece:
    text = raw.strip()
    if text[:1] not in ("'", '"'):
        return _Piece(raw)
    outside = "".join(char for _, char, _ in _scan(text, text)).strip()
    if outside:
        raise UserError(f"{outside!r} follows the closing quote in {text}")
    return _Piece(raw, _unescape(text[1:-1]))


def _unescape(text: str) -> str:
    out, index = [], 0
    while index < len(text):
        if text[index] == "\\" and index + 1 < len(text):
            index += 1
            out.append(_ESCAPES.get(text[index], text[index]))
        else:
            out.append(text[index])
        index += 1
    return "".join(out)


# -- from and to mappings -----------------------------------------------------------------------------------------


def method_from_dict(data: Mapping[str, Any], registry: Registry | None = None) -> Any:
    """The method of a mapping, as YAML and adapter_config.json hold it; the inverse of `method_to_dict`."""
    registry = _registry(registry)
    name = data.get("name")
    if not isinstance(name, str):
        raise UserError(
            f"a method's mapping needs a name, for example {{name: lora, r: 8}}; this one is {dict(data)!r}"
        )
    fields = {key: value for key, value in data.items() if key != "name"}
    if name == UNION:
        members = fields.pop("methods", None)
        if fields or not isinstance(members, Sequence) or isinstance(members, str) or not members:
            raise UserError("a union's mapping has a list of methods and nothing else: {name: union, methods: [...]}")
        return _union(_each(members, lambda member: parse_method(member, registry)))
    return _build(_class_of(name, registry), {str(key): value for key, value in fields.items()}, [])


def method_to_dict(method: Any) -> dict[str, Any]:
    """A mapping of plain values (JSON, YAML) with the method's name and all of its fields."""
    if _is_union(method):
        return {"name": UNION, "methods": [method_to_dict(member) for member in method.methods]}
    values = {field.name: _plain(getattr(method, field.name)) for field in _fields(type(method))}
    return {"name": method.name, **values}


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


# -- text ---------------------------------------------------------------------------------------------------------


def format_method(method: Any) -> str:
    """The shortest string that `parse_method` turns back into `method`: fields at their default are left out."""
    if _is_union(method):
        return "|".join(format_method(member) for member in method.methods)
    hints, pairs = _hints(type(method)), []
    for field in _fields(type(method)):
        value, default = getattr(method, field.name), _default(field)
        if default is _NOTHING or value != default or type(value) is not type(default):
            pairs.append(f"{field.name}={_format_value(value, hints[field.name])}")
    return f"{method.name}[{','.join(pairs)}]" if pairs else str(method.name)


def _format_value(value: Any, hint: Any, bare: re.Pattern[str] = _BARE) -> str:
    if isinstance(value, (tuple, list)):
        return ",".join(_format_value(item, _item_of_tuple(hint), _BARE_ITEM) for item in value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "none"
    return _format_text(value, hint, bare) if isinstance(value, str) else repr(value)


def _format_text(text: str, hint: Any, bare: re.Pattern[str]) -> str:
    """Bare where that reads back as the same text, quoted otherwise."""
    if bare.fullmatch(text) and _reads_back(text, hint):
        return text
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\t", "\\t")
    return f"'{escaped}'"


def _reads_back(text: str, hint: Any) -> bool:
    if text.lower() == "none":
        return False
    read = _coerce_value(text, hint)
    return type(read) is str and read == text


# -- building a method from values --------------------------------------------------------------------------------


def _build(cls: type, values: Mapping[str, Any], mistakes: list[str]) -> Any:
    fields = {field.name: field for field in _fields(cls)}
    hints = _hints(cls)
    built: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            mistakes.append(str(unknown(f"field of {_name(cls)}", key, fields)))
            continue
        try:
            built[key] = _coerce(value, hints[key])
        except _WrongType:
            mistakes.append(f"field {key!r} of {_name(cls)} must be {_describe(hints[key])}, not {_shown(value)}")
    missing = [name for name, field in fields.items() if _default(field) is _NOTHING and name not in values]
    if missing:
        mistakes.append(f"{_name(cls)} needs {' and '.join(missing)}, for example {_name(cls)}[{missing[0]}=...]")
    if mistakes:
        raise UserError("\n".join(mistakes))
    try:
        return cls(**built)
    except UserError:
        raise
    except (ValueError, ArithmeticError) as error:
        raise UserError(f"{_name(cls)}: {error}") from error


class _WrongType(Exception):
    """A value that an annotation does not allow; raised with the annotation."""


def _coerce(value: Any, hint: Any) -> Any:
    """`value` (pieces of text, or what YAML and JSON make of it) as the annotation `hint` wants it."""
    if isinstance(value, list) and value and isinstance(value[0], _Piece):
        return _coerce_pieces(value, hint)
    return _coerce_value(value, hint, quoted=isinstance(value, str))


def _coerce_pieces(pieces: list[_Piece], hint: Any) -> Any:
    item = _item_of_tuple(hint)
    if item is not None:
        if len(pieces) == 1 and pieces[0].quoted is None and pieces[0].text.lower() in ("", "none"):
            return None if pieces[0].text and _allows_none(hint) else ()
        if any(not piece.text and piece.quoted is None for piece in pieces):
            raise _WrongType(hint)
        return tuple(_coerce_value(piece.text, item, piece.quoted is not None) for piece in pieces)
    if len(pieces) == 1:
        return _coerce_value(pieces[0].text, hint, pieces[0].quoted is not None)
    if any(piece.quoted is not None for piece in pieces):
        raise _WrongType(hint)
    return _coerce_value(",".join(piece.raw for piece in pieces).strip(), hint)


def _coerce_value(value: Any, hint: Any, quoted: bool = False) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return _coerce_choice(value, hint, quoted)
    if origin is typing.Literal:
        for allowed in typing.get_args(hint):
            if value == allowed and isinstance(value, bool) == isinstance(allowed, bool):
                return allowed
            if isinstance(value, str) and str(allowed).lower() == value.lower():
                return allowed
        raise _WrongType(hint)
    item = _item_of_tuple(hint)
    if item is not None:
        if isinstance(value, str):
            return tuple(_coerce_value(part.strip(), item) for part in value.split(",") if part.strip())
        if isinstance(value, (list, tuple)):
            return tuple(_coerce_value(part, item) for part in value)
        raise _WrongType(hint)
    return _coerce_scalar(value, hint)


def _coerce_choice(value: Any, hint: Any, quoted: bool) -> Any:
    members = typing.get_args(hint)
    if quoted and str in members:
        return value
    if type(None) in members and (value is None or (isinstance(value, str) and value.lower() in ("none", "null"))):
        return None
    for member in sorted((one for one in members if one is not type(None)), key=lambda one: one is str):
        try:
            return _coerce_value(value, member, quoted)
        except _WrongType:
            continue  # the next member of the union may take it; the error names them all
    raise _WrongType(hint)


def _coerce_scalar(value: Any, hint: Any) -> Any:
    if hint is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    if hint is bool:
        return _to_bool(value, hint)
    if hint in (int, float) and not isinstance(value, bool):
        return _to_number(value, hint)
    if isinstance(hint, type) and isinstance(value, hint) and hint not in (str, int, float):
        return value
    raise _WrongType(hint)


def _to_bool(value: Any, hint: Any) -> bool:
    text = str(value).lower()
    if isinstance(value, (bool, str)) and text in _TRUE + _FALSE:
        return text in _TRUE
    raise _WrongType(hint)


def _to_number(value: Any, hint: Any) -> Any:
    if isinstance(value, float) and hint is int and not value.is_integer():
        raise _WrongType(hint)
    try:
        number = hint(value)
    except (TypeError, ValueError, OverflowError):
        raise _WrongType(hint) from None
    if isinstance(number, float) and not math.isfinite(number):
        raise _WrongType(hint)
    return number


def _item_of_tuple(hint: Any) -> Any:
    """`str` for tuple[str, ...], also inside a union with None; None for annotations that hold no tuple."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = [one for one in typing.get_args(hint) if one is not type(None)]
        return _item_of_tuple(members[0]) if len(members) == 1 else None
    if hint is tuple:
        return str
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0]
    return None


def _allows_none(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


def _describe(hint: Any) -> str:
    """What an annotation allows, in words."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_describe(one) for one in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(str(one) for one in typing.get_args(hint))
    item = _item_of_tuple(hint)
    if item is not None:
        return f"a list ({_describe(item)}, separated by commas)"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "none"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))


def _shown(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], _Piece):
        value = ",".join(piece.raw for piece in value).strip()
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# -- what a method class says about itself ------------------------------------------------------------------------


def _registry(registry: Registry | None) -> Registry:
    if registry is not None:
        return registry
    from trimtab.methods import METHODS

    return METHODS


def _class_of(name: str, registry: Registry) -> type:
    from trimtab.methods import BORROWED

    name = name.strip().lower()
    library, found, kind = name.partition(":")
    if found and name not in registry and library in BORROWED:
        return BORROWED[library](kind)
    if name not in registry:
        raise unknown("method", name, sorted(registry))
    return registry[name]


def _union(members: Sequence[Any]) -> Any:
    from trimtab.methods import Union

    try:
        return Union(methods=tuple(members))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


def _is_union(method: Any) -> bool:
    from trimtab.methods import Union

    return isinstance(method, Union)


def _name(cls: type) -> str:
    return str(getattr(cls, "name", cls.__name__))


def _fields(cls: type) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(cls) if field.init]


def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return _NOTHING

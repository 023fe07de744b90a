"""The weights in an ONNX file and how its nodes use them. Knows the wire format of protocol buffers and the few fields
that this takes (onnx.proto3); refuses to know what a model computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_TYPES: dict[int, Any] = {1: np.dtype("<f4"), 6: np.dtype("<i4"), 7: np.dtype("<i8"), 10: np.dtype("<f2")}
"""TensorProto.DataType of those that can be read."""


@dataclass(frozen=True)
class Node:
    """One operation."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Graph:
    """The nodes in order and the weights by name."""

    nodes: list[Node] = field(default_factory=list)
    weights: dict[str, NDArray[Any]] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)


def read(file: Path) -> Graph:
    """The graph of a model whose weights are in the file itself."""
    graph = Graph()
    for number, value in _fields(memoryview(file.read_bytes())):
        if number == 7:  # ModelProto.graph
            for inner, part in _fields(value):
                _add(graph, inner, part)
    return graph


def _add(graph: Graph, number: int, value: Any) -> None:
    if number == 1:  # GraphProto.node
        texts: dict[int, list[str]] = {1: [], 2: [], 4: []}
        for inner, part in _fields(value):
            if inner in texts:
                texts[inner].append(bytes(part).decode())
        graph.nodes.append(Node(texts[4][0], tuple(texts[1]), tuple(texts[2])))
    elif number == 5:  # GraphProto.initializer
        name, tensor = _tensor(value)
        graph.weights[name] = tensor
    elif number in (11, 12):  # GraphProto.input, output: ValueInfoProto.name
        name = next(bytes(part).decode() for inner, part in _fields(value) if inner == 1)
        (graph.inputs if number == 11 else graph.outputs).append(name)


def _tensor(buffer: memoryview) -> tuple[str, NDArray[Any]]:
    shape: list[int] = []
    name, kind, raw, floats, integers = "", 0, b"", b"", b""
    for number, value in _fields(buffer):
        if number == 1:  # dims, packed or one by one
            shape += [value] if isinstance(value, int) else list(_varints(value))
        elif number == 2:
            kind = value
        elif number == 4:
            floats = bytes(value)
        elif number == 7:
            integers = bytes(value)
        elif number == 8:
            name = bytes(value).decode()
        elif number == 9:
            raw = bytes(value)
    if kind not in _TYPES:
        return name, np.zeros(0, dtype=np.float32)  # booleans and the like: no weights
    if integers and not raw:
        return name, np.array(list(_varints(memoryview(integers))), dtype=_TYPES[kind]).reshape(shape)
    return name, np.frombuffer(raw or floats, _TYPES[kind]).reshape(shape)


def _fields(buffer: memoryview) -> Iterator[tuple[int, Any]]:
    """Each field's number and value: an int (varint) or its bytes."""
    at = 0
    while at < len(buffer):
        key, at = _varint(buffer, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(buffer, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(buffer, at)
        else:
            size = {1: 8, 5: 4}[wire]
        yield number, buffer[at : at + size]
        at += size


def _varint(buffer: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = buffer[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _varints(buffer: memoryview) -> Iterator[int]:
    at = 0
    while at < len(buffer):
        value, at = _varint(buffer, at)
        yield value

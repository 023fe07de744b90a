"""Configurations that somebody made to do harm: they load rightly or end in a sentence, within a bound of memory."""

from __future__ import annotations

import dataclasses
import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import trimtab as tt
from faults.moments import LONG
from faults.test_killed import _adapter
from tiny import tiny
from trimtab.checkpoint import CONFIG, read_adapter_config
from trimtab.methods import METHODS
from trimtab.tasks import task_from_config

BOUND = 128 << 20
"""Bytes of address space that reading a folder of a few thousand bytes on the tiny model may ask for."""
CASES = 600 if LONG else 60
NUMBERS = st.one_of(
    st.integers(-3, 70), st.sampled_from([10**6, 10**9, 2**31, 2**63, 10**30, 1e308, 1e-300, -1.0, 0.5, 1.5])
)
TEXTS = st.sampled_from(
    [
        "",
        "../../../etc/passwd",
        "/etc/passwd",
        "a/../..",
        "q",
        "x" * 5000,
        "\x00",
        "__class__",
        "{0.__class__}",
        "是",
        "-1:",
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
NETWORK = ("image",)
"""Fields that name a model, which is looked for where the user's other models are."""


@st.composite
def methods(draw: Any) -> dict[str, Any]:
    """A method with some of its fields set to anything."""
    name = draw(st.sampled_from(sorted(METHODS)))
    fields = [field.name for field in dataclasses.fields(METHODS[name]) if field.name not in NETWORK]
    picked = draw(st.lists(st.sampled_from(fields), max_size=3, unique=True)) if fields else []
    return {"name": name, **{field: draw(VALUES) for field in picked}}


CHANGES = st.one_of(
    st.fixed_dictionaries({"method": methods() | VALUES}),
    st.fixed_dictionaries({"labels": st.lists(TEXTS, max_size=5) | VALUES}),
    st.dictionaries(st.sampled_from(["format", "name", "base", "task", "labels", "encoder", "checksum"]), VALUES),
)
PEFT_FIELDS = (
    *("peft_type", "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_dora", "use_rslora"),
    *("init_lora_weights", "lora_dropout", "modules_to_save", "bias", "task_type", "layers_to_transform"),
)


@contextmanager
def bounded(more: int) -> Iterator[None]:
    """Inside, the process may map at most so many bytes more than it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _listed(root: Path) -> list[Path]:
    return sorted(root.rglob("*"))


def _loads_or_says(folder: Path, text: str) -> None:
    (folder / CONFIG).write_text(text, encoding="utf-8", errors="surrogatepass")
    model, before = tiny("llama"), _listed(folder.parent)
    with bounded(BOUND):
        try:
            tt.load(model, folder)
        except tt.UserError as error:
            assert len(str(error)) < 20_000
            assert not hasattr(model, "trimtab")
    assert _listed(folder.parent) == before


SETTINGS = settings(
    max_examples=CASES,
    deadline=None,
    derandomize=not LONG,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def test_configurations_of_ours(tmp_path: Path, record_property: Callable) -> None:
    folder = _adapter(1).save(tmp_path / "adapter")
    clean = json.loads((folder / CONFIG).read_text())

    @SETTINGS
    @given(CHANGES)
    def case(changes: dict[str, Any]) -> None:
        _loads_or_says(folder, json.dumps({**clean, **changes}))

    case()
    record_property("trials", CASES)


def test_configurations_of_peft(tmp_path: Path, record_property: Callable) -> None:
    folder = _adapter(1).export(tmp_path / "adapter", "peft")
    clean = json.loads((folder / CONFIG).read_text())

    @SETTINGS
    @given(st.dictionaries(st.sampled_from(PEFT_FIELDS), VALUES, min_size=1, max_size=3))
    def case(changes: dict[str, Any]) -> None:
        _loads_or_says(folder, json.dumps({**clean, **changes}))

    case()
    record_property("trials", CASES)


def test_configurations_of_adapters(tmp_path: Path, record_property: Callable) -> None:
    folder = _adapter(1).export(tmp_path / "adapter", "adapters")
    clean = json.loads((folder / CONFIG).read_text())
    inner = st.dictionaries(st.sampled_from(sorted(clean["config"])), VALUES, max_size=3)
    outer = st.dictionaries(st.sampled_from(sorted(clean)), VALUES, max_size=2)

    @SETTINGS
    @given(inner, outer)
    def case(changes: dict[str, Any], others: dict[str, Any]) -> None:
        _loads_or_says(folder, json.dumps({**clean, "config": {**clean["config"], **changes}, **others}))

    case()
    record_property("trials", CASES)


def test_tasks(record_property: Callable) -> None:
    names = st.sampled_from(["classify", "generate", "regress", "tag", "choose", "x"])
    fields = st.sampled_from(["text_column", "label_column", "labels", "template", "chat", "image_column", "words"])

    @SETTINGS
    @given(st.fixed_dictionaries({"name": names | VALUES}), st.dictionaries(fields, VALUES, max_size=3))
    def case(name: dict[str, Any], changes: dict[str, Any]) -> None:
        with bounded(BOUND):
            with suppress(tt.UserError):
                task_from_config({**name, **changes})

    case()
    record_property("trials", CASES)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"format": 1, "format": 1, "method": {}, "base": {}}',
        '{"format": NaN, "method": {}, "base": {}}',
        '{"format": ' + "9" * 5000 + ', "method": {}, "base": {}}',
        '{"format": 1, "method": {"name": "lora", "r": 1000000000000}, "base": {}}',
        '{"x": "' + "x" * (1 << 20) + '"}',
        "\ufeff{}",
        "",
        "null",
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, text: str) -> None:
    (tmp_path / CONFIG).write_text(text, encoding="utf-8")
    with bounded(BOUND), pytest.raises(tt.UserError):
        tt.load(tiny("llama"), tmp_path)
    if "lora" not in text:
        with pytest.raises(tt.UserError):
            read_adapter_config(tmp_path)


@pytest.mark.parametrize(
    "method",
    [
        *("lora[r=100000000]", "prompt[length=1000000000]", "prefix[length=100000000]", "houlsby[size=1000000000]"),
        *(
            "peft:loha[r=100000000]",
            "peft:vera[r=900000]",
            "peft:hra[r=900000]",
            "peft:unilora[theta_d_length=100000000]",
        ),
    ],
)
def test_sizes_are_refused_before_anything_is_made(tmp_path: Path, method: str) -> None:
    folder = _adapter(1).save(tmp_path / "adapter")
    config = json.loads((folder / CONFIG).read_text())
    from trimtab.methods.spec import method_to_dict, parse_method

    config["method"] = method_to_dict(parse_method(method))
    content = (folder / "adapter_model.safetensors").read_bytes()
    import struct

    (length,) = struct.unpack("<Q", content[:8])  # the file says that it holds the same method, and matches
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"]["method"] = json.dumps(config["method"], sort_keys=True)
    text = json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    del config["checksum"]
    (folder / CONFIG).write_text(json.dumps(config))
    with bounded(BOUND), pytest.raises(tt.UserError, match="far more numbers"):
        tt.load(tiny("llama"), folder)

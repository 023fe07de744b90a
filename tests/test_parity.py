"""What the library `adapters` said for the same weights, kept in a file that `python -m benchmarks.parity` writes."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from benchmarks.environments import ROOT
from benchmarks.parity import (
    CASES,
    FIXTURE,
    LAYERS,
    PEER,
    TOLERANCE,
    Case,
    Written,
    adapted,
    compared,
    difference,
    outputs,
)


@pytest.fixture(scope="module")
def written() -> Written:
    return Written(FIXTURE)


def _name(case: Case | None) -> str:
    return f"{case.config} as {case.method}" if case else "no adapter"


@pytest.mark.parametrize("case", [None, *(case for case in CASES if case.equal)], ids=_name)
def test_equals_adapters(case: Case | None, written: Written) -> None:
    """Logits and last hidden states, in float32; every tensor of the adapter is non-zero and acts."""
    found = compared(case, written)
    by = f"the file was written by {written.about['versions']}"
    assert max(found.logits, found.hidden) <= TOLERANCE, by
    assert case is None or found.effect > 100 * TOLERANCE, by
    assert case is None or all(tensor.count_nonzero() for tensor in written.under(f"{case.config}/weights").values())


@pytest.mark.parametrize("case", [case for case in CASES if not case.equal], ids=_name)
def test_differs_where_adapters_departs_from_the_paper(case: Case, written: Written) -> None:
    assert compared(case, written).logits > 100 * TOLERANCE


def test_dora_departs_by_the_bias_alone(written: Written) -> None:
    """adapters multiplies the bias by m / ‖W + B A‖ as well; done by hand to our base, the outputs are equal."""
    (case,) = (case for case in CASES if case.config == "dora")
    model, weights = adapted(case, written), written.under("dora/weights")
    for layer, role in product(range(LAYERS), ("query", "value")):
        path = f"bert.encoder.layer.{layer}.attention.self.{role}"
        low_a, low_b, m = (weights[f"{path}.loras.{PEER}.{name}"] for name in ("lora_A", "lora_B", "m.weight"))
        module = model.get_submodule(path)
        module.bias.data *= m[:, 0] / (module.weight + low_b @ low_a).norm(dim=1).detach()
    with torch.no_grad():
        found = outputs(model, written.under("inputs"))
    theirs = written.under("dora")
    assert max(difference(found[name], theirs[name]) for name in found) <= TOLERANCE


def test_another_scale_is_noticed(written: Written) -> None:
    """The comparison can fail."""
    (case,) = (case for case in CASES if case.config == "par_bn")
    found = compared(replace(case, method="parallel[scale=3.99]"), written)
    assert found.logits > TOLERANCE and not found.fine


def test_the_page_names_the_versions_of_the_file(written: Written) -> None:
    page = (ROOT / "docs" / "parity.md").read_text(encoding="utf-8")
    assert all(f"{name} {number}" in page for name, number in written.about["versions"].items())
    assert all(f"`{case.config}` | `{case.method}`" in page for case in CASES)

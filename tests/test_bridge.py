"""Methods of peft's on models that are not wrapped: equal to peft itself, trained, saved in both forms, or refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import trimtab as tt
from benchmarks.bridge import batch, logits, losses, shake, spec, tiny, try_on
from trimtab.__main__ import app
from trimtab.batches import Collator
from trimtab.errors import UserError
from trimtab.methods import borrowed
from trimtab.methods.borrowed import NATIVE, facts, listed, peft_configs
from trimtab.methods.spec import format_method, method_from_dict, method_to_dict, parse_method
from trimtab.prefix_share import shared_prefix

peft = pytest.importorskip("peft")

WORKING = sorted(name for name, one in facts()["methods"].items() if one["works"])
QUICK = (
    "boft",
    "c3a",
    "vera",
    "fourierft",
    "hra",
    "loha",
    "lokr",
    "miss",
    "oft",
    "randlora",
    "road",
    "vblora",
    "shira",
)
"""Rotations, sums, products, shared and random tensors."""


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("kind", QUICK)
def test_a_method_is_trained_saved_and_loaded_by_us_and_by_peft(kind: str, family: str, tmp_path: Path) -> None:
    assert try_on(kind, family, tmp_path / "adapter") or not facts()["methods"][kind]["merges"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("kind", [name for name in WORKING if name not in QUICK])
def test_every_other_method_that_works(kind: str, family: str, tmp_path: Path) -> None:
    try_on(kind, family, tmp_path / "adapter")


@pytest.mark.parametrize("kind", ["boft", "oft", "c3a", "vera"])
def test_steps_are_those_of_plain_peft(kind: str) -> None:
    """The same weights in a model that peft wraps: equal logits and, after training both, equal losses."""
    adapter = tt.attach(tiny("llama"), spec(kind, "llama"))
    shake(adapter)
    method: Any = adapter.method
    theirs = peft.get_peft_model(tiny("llama"), method.peft_config())
    paths = {site.key: site.path for site in adapter._entry.sites}
    given = dict(theirs.state_dict())
    with torch.no_grad():
        for name, value in adapter.state_dict().items():
            key, _, rest = name.partition(".layer.")
            given[f"base_model.model.{paths[key]}.{rest}"].copy_(value)
    assert torch.allclose(logits(adapter.model, "llama"), logits(theirs.eval(), "llama"), atol=1e-5)
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    found = []
    for _ in range(8):
        loss = theirs(**batch("llama")).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert losses(adapter, "llama") == pytest.approx(found, rel=1e-4)


@pytest.mark.parametrize("kind", ["boft", "oft", "vera", "road"])
def test_the_shared_prefix_is_exact(kind: str) -> None:
    adapter = tt.attach(tiny("llama"), spec(kind, "llama"))
    shake(adapter)
    given = {name: value.repeat(3, 1) for name, value in batch("llama").items() if name != "labels"}
    given["input_ids"][:, :5] = given["input_ids"][0, :5]
    trained = [weight for weight in adapter.parameters() if weight.requires_grad]

    def run(shared: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        needed = torch.zeros_like(given["input_ids"], dtype=torch.bool)
        needed[:, 5:] = True
        if shared:
            with shared_prefix(adapter.model, given, needed) as rest:
                assert rest["input_ids"].shape[1] == 4
                out = adapter.model(**rest).logits
                return out, list(torch.autograd.grad(out[0].square().sum(), trained))
        out = adapter.model(**given).logits[:, 5:]
        return out, list(torch.autograd.grad(out[0].square().sum(), trained))

    (plain, wanted), (apart, found) = run(False), run(True)
    assert torch.allclose(plain[0], apart[0], atol=1e-5)
    for one, other in zip(wanted, found, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-4 * float(one.abs().max() + 1))


@pytest.mark.parametrize("drawn", [False, True])
def test_what_draws_is_found_out_by_the_generator(drawn: bool) -> None:
    adapter = tt.attach(tiny("llama"), "peft:vera[r=4,vera_dropout=0.1]" if drawn else "peft:vera[r=4]")
    parts = list(adapter._entry.members())
    assert parts and all(part.draws == drawn for part in parts)


def test_the_trainer_trains_it(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    ids = batch("llama")["input_ids"].tolist()
    rows = [{"input_ids": row, "labels": [-100] * 4 + row[4:]} for row in ids]
    adapter = tt.attach(tiny("llama"), "peft:c3a[block_size=16]")
    arguments = TrainingArguments(
        str(tmp_path), num_train_epochs=6, learning_rate=1e-2, report_to="none", save_strategy="no", logging_steps=1
    )
    trainer = tt.Trainer(
        adapter.model, arguments, train_dataset=rows, batch_tokens=36, data_collator=Collator(0), show=False
    )
    trainer.train()
    steps = [one["loss"] for one in trainer.state.log_history if "loss" in one]
    assert steps[-1] < steps[0]


def test_the_model_stays_what_it_is_and_a_bank_holds_it() -> None:
    model = tiny("bert")
    names, kind = list(dict(model.named_modules())), type(model)
    plain = logits(model, "bert")
    first = tt.attach(model, "peft:boft[boft_block_size=4]", "rotated")
    second = tt.attach(model, "lora[r=2]", "added")
    for adapter in (first, second):
        shake(adapter)
    assert type(model) is kind
    assert [name for name in dict(model.named_modules()) if not name.startswith("trimtab")] == names
    bank = tt.Bank(model)
    bank.use("rotated")
    rotated = logits(model, "bert")
    bank.use("added")
    assert not torch.allclose(rotated, logits(model, "bert"))
    twin = copy.deepcopy(model)
    bank.use("rotated")
    tt.Bank(twin).use("rotated")
    assert torch.equal(rotated, logits(model, "bert"))
    assert torch.equal(rotated, logits(twin, "bert"))
    with torch.no_grad():  # the copy's layers stand on the copy's weights
        next(twin.bert.encoder.layer[0].attention.self.query.parameters()).zero_()
    assert torch.equal(rotated, logits(model, "bert"))
    assert not torch.equal(rotated, logits(twin, "bert"))
    bank.use(None)
    assert torch.equal(plain, logits(model, "bert"))


def test_it_merges_and_generates(tmp_path: Path) -> None:
    adapter = tt.attach(tiny("llama"), "peft:boft[boft_block_size=4]")
    shake(adapter)
    ids = batch("llama")["input_ids"][:1]
    wanted, said = logits(adapter.model, "llama"), adapter.model.generate(ids, max_new_tokens=5, do_sample=False)
    found = adapter.export(tmp_path / "theirs", "peft")
    assert json.loads((found / "adapter_config.json").read_text())["peft_type"] == "BOFT"
    merged = adapter.merge()
    assert torch.allclose(wanted, logits(merged, "llama"), atol=1e-5)
    assert torch.equal(said, merged.generate(ids, max_new_tokens=5, do_sample=False))


def test_a_method_string_comes_back() -> None:
    method = parse_method("peft:boft[boft_block_size=8,target_modules=q_proj,v_proj,boft_dropout=0.1]")
    assert method.target_modules == ("q_proj", "v_proj")
    assert parse_method(format_method(method)) == method
    assert method_from_dict(json.loads(json.dumps(method_to_dict(method)))) == method
    assert method.peft_config().boft_block_size == 8


@pytest.mark.parametrize(
    "text, said",
    [
        ("peft:bofd", "did you mean 'boft'"),
        ("peft:boft[boft_blok_size=4]", "did you mean 'boft_block_size'"),
        ("peft:boft[boft_block_size=x]", "must be a whole number"),
        ("peft:boft[boft_block_size=4,boft_block_num=4]", "peft:boft"),
        ("peft:prefix_tuning", "use prefix"),
        ("peft:p_tuning", "use p-tuning"),
    ],
)
def test_a_mistake_is_told_in_a_sentence(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_method(text)


@pytest.mark.parametrize(
    "method, said",
    [
        ("peft:lora[bias=all]", "weights of the base itself"),
        ("peft:lora[init_lora_weights=pissa]", "changes the weights"),
        ("peft:lora[target_modules=nothing]", "does not fit this model"),
        ("peft:lora[target_modules=classifier]", "task head"),
        ("peft:adalora[total_step=10]", "call of the whole model"),
        ("peft:lily[r=4]", "more than a token"),
        ("peft:lora|lora[targets=q]", "two methods act on"),
    ],
)
def test_what_the_bridge_cannot_carry_is_refused_and_the_model_stays(method: str, said: str) -> None:
    model = tiny("bert")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=said):
        tt.attach(model, method)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(weight.requires_grad for weight in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_without_peft_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "peft.mapping", None)
    borrowed.peft_method.cache_clear()
    with pytest.raises(UserError, match=r"pip install 'trimtab\[peft\]'"):
        parse_method("peft:boft")


def test_all_methods_of_peft_are_listed_with_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, note = listed()
    assert {row["name"] for row in rows} == {f"peft:{kind}" for kind in peft_configs()}
    assert len(WORKING) >= 12
    assert all(row["why"] for row in rows if row["works"] is not True)
    assert not set(WORKING) & set(NATIVE)
    shown = CliRunner().invoke(app, ["methods", "--all", "--json"])
    names = {one["name"] for one in json.loads(shown.stdout)}
    assert {"lora", "peft:boft", "peft:xlora"} <= names
    monkeypatch.setattr(borrowed, "facts", lambda: {"peft": "0.1", "methods": {}})
    rows, note = listed()
    assert "installed is" in note
    assert all(row["works"] is None for row in rows)

"""The trunk cache: the same loss and gradients as without, lower layers run once a row, and a store that is trusted
only where it may be."""

from __future__ import annotations

import functools
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import trimtab as tt
from test_train import MODELS, arguments, assert_equal, examples, losses
from tiny import FAMILIES, attached, inputs, output, tiny
from trimtab.adapter import supported
from trimtab.cache import cached_trunk, trunk_facts, trunk_height
from trimtab.checkpoint import model_fingerprint
from trimtab.methods.spec import parse_method
from trimtab.prefix_share import shared_prefix
from trimtab.store import INDEX, Store
from trimtab.trainer import Trainer

ENOUGH = 2**30
METHODS = (
    "lora[r=2,layers=-1:]",
    "llama-adapter[length=3,layers=-1:]",
    "prefix[length=3,hidden=8,layers=-1:]",
    "head",
    "ladder[reduction=2]",
    "ladder[reduction=2,layers=0:2]",
    "ladder[reduction=4,layers=0,merge_last=true]",
    "side",
    "side[network=mlp]",
)
ONE_STACK = [family for family in FAMILIES if family not in ("t5", "bart", "whisper")]


def gradients(adapter: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The model's output and the gradients of its mean square."""
    adapter.model.train()
    for parameter in adapter.parameters():
        parameter.grad = None
    found = output(adapter.model, batch)
    if found.requires_grad:
        found.float().square().mean().backward()
    return found.detach(), [parameter.grad for parameter in adapter.parameters() if parameter.grad is not None]


def calls_of_first_layer(adapter: Any) -> list[int]:
    """Grows by one at every call of the first layer's attention."""
    calls: list[int] = []
    site = next(site for site in adapter.model.trimtab.sites.activation if site.layer == 0)
    site.module.register_forward_hook(lambda *_: calls.append(1) and None)
    return calls


@pytest.mark.parametrize("family", ONE_STACK)
@pytest.mark.parametrize("method", METHODS)
def test_replayed_rows_give_the_same_outputs_and_gradients(method: str, family: str) -> None:
    if family not in supported(parse_method(method).kinds) or (method == "head" and family == "clip_vision_model"):
        pytest.skip("does not work there")
    adapter = attached(family, method)
    batch = inputs(family)
    plain, expected = gradients(adapter, batch)
    calls, names, store = calls_of_first_layer(adapter), list(adapter.model.state_dict()), Store(ENOUGH)
    with cached_trunk(adapter, store):
        assert list(adapter.model.state_dict()) == names
        runs = [gradients(adapter, batch) for _ in range(3)]
    assert len(calls) == 1
    for found, own in runs:
        torch.testing.assert_close(found, plain, rtol=0, atol=1e-6)
        for one, other in zip(own, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    gradients(adapter, batch)
    assert len(calls) == 2  # outside, everything is as it was


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_together_with_shared_tokens(family: str) -> None:
    adapter = attached(family, "lora[r=2,layers=-1:]")
    torch.manual_seed(3)
    ids = torch.randint(3, 50, (5, 20))
    ids[:, :12] = ids[:1, :12]
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    plain = output(adapter.model, whole)[:, 12:]
    needed = torch.zeros_like(ids).bool()
    needed[:, 12:] = True
    calls = calls_of_first_layer(adapter)
    with cached_trunk(adapter, Store(ENOUGH)):
        for order in (range(5), range(5), [3, 1, 4, 0, 2]):
            mixed = {name: value[list(order)] for name, value in whole.items()}
            with shared_prefix(adapter.model, mixed, needed) as rest:
                assert rest["input_ids"].shape == (5, 8)
                torch.testing.assert_close(output(adapter.model, rest), plain[list(order)], rtol=0, atol=1e-5)
        torch.testing.assert_close(output(adapter.model, whole)[:, 12:], plain, rtol=0, atol=1e-5)  # not shared
    assert len(calls) == 2  # the shared tokens with the rest, and the whole rows: their beginnings were not kept


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "bert", "modernbert", "vit"])
@pytest.mark.parametrize("method", ["ladder[reduction=2,dropped=1]", "side"])
def test_a_side_network_runs_no_layer_of_the_base_again(method: str, family: str) -> None:
    """Nor with other rows beside it, nor when it is disabled: the base's own output is kept as well."""
    adapter = attached(family, method)
    batch = inputs(family)
    turned = {name: value.flip(0) for name, value in batch.items()}
    plain, _ = gradients(adapter, batch)
    with adapter.disabled():
        base = output(adapter.model, batch)
    calls: list[int] = []
    for site in adapter.model.trimtab.sites.linear:
        if site.role in ("o", "down"):
            site.module.register_forward_hook(lambda *_: calls.append(1) and None)
    with cached_trunk(adapter, Store(ENOUGH)):
        gradients(adapter, batch)
        ran = len(calls)
        assert ran == 6
        found, _ = gradients(adapter, turned)
        torch.testing.assert_close(found, plain.flip(0), rtol=0, atol=1e-5)
        with adapter.disabled():
            torch.testing.assert_close(output(adapter.model, batch), base, rtol=0, atol=1e-5)
        assert len(calls) == ran


@pytest.mark.parametrize("kind", ["causal", "encoder"])
@pytest.mark.parametrize("method", ["ladder[reduction=2]", "side[reduction=2]"])
def test_training_a_side_network_gives_the_same_losses_and_tensors(tmp_path: Path, method: str, kind: str) -> None:
    """Three epochs; in the second and third the base's layers are not run."""
    runs: list[tuple[list[float], dict[str, torch.Tensor], list[int]]] = []
    for store in (None, Store(ENOUGH)):
        torch.manual_seed(1)
        adapter = tt.attach(MODELS[kind](), method)
        calls, epochs = calls_of_first_layer(adapter), EpochCalls()
        epochs.calls = calls
        trainer = Trainer(
            adapter.model,
            arguments(tmp_path, save_strategy="no"),
            adapter=adapter,
            train_dataset=examples(kind)[:30],
            store=store,
            callbacks=[epochs],
        )
        trainer.train()
        runs.append((losses(trainer), dict(adapter.state_dict()), epochs.found))
    (plain, expected, all_run), (found, own, once) = runs
    assert found == pytest.approx(plain, abs=1e-5)
    assert_equal(own, expected, tolerance=1e-3)
    assert all_run == [4, 8, 12] and once == [4, 4, 4]


class EpochCalls(TrainerCallback):
    """How many calls there were by the end of each epoch."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.found: list[int] = []

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.found.append(len(self.calls))


def test_padded_rows_of_a_ladder_are_known_elsewhere() -> None:
    from trimtab.batches import Collator

    adapter = attached("llama", "ladder[reduction=2]")
    adapter.model.eval()
    torch.manual_seed(3)
    rows = [torch.randint(3, 50, (length,)).tolist() for length in (9, 4, 7)]

    def padded(chosen: list[int]) -> dict[str, Any]:
        return Collator(0)([{"input_ids": rows[at]} for at in chosen])  # type: ignore[arg-type]

    plain = [output(adapter.model, padded([at]))[0] for at in range(3)]
    calls = calls_of_first_layer(adapter)
    with cached_trunk(adapter, Store(ENOUGH)):
        output(adapter.model, padded([0, 1, 2]))
        for chosen in ([2, 1], [1], [1, 0]):
            batch = padded(chosen)
            found = output(adapter.model, batch)
            for row, at in enumerate(chosen):
                own = found[row][batch["attention_mask"][row].bool()]
                torch.testing.assert_close(own, plain[at], rtol=0, atol=1e-5)
        assert len(calls) == 1
        generated = adapter.model.generate(**padded([1]), max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert len(calls) == 5  # generation with a cache of keys and values runs as always
    assert torch.equal(
        generated, adapter.model.generate(**padded([1]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    )


def test_rows_are_known_in_other_batches_and_paddings() -> None:
    adapter = attached("llama", "lora[r=2,layers=-1:]")
    torch.manual_seed(3)
    rows = [torch.randint(3, 50, (length,)).tolist() for length in (9, 4, 7)]

    def padded(chosen: list[int], side: str) -> dict[str, torch.Tensor]:
        from trimtab.batches import Collator

        return Collator(0, side)([{"input_ids": rows[at]} for at in chosen])  # type: ignore[arg-type]

    plain = [output(adapter.model, padded([at], "right"))[0] for at in range(3)]
    calls = calls_of_first_layer(adapter)
    with cached_trunk(adapter, Store(ENOUGH)):
        output(adapter.model, padded([0, 1, 2], "right"))
        for chosen, side in (([2, 1], "right"), ([1, 0], "left"), ([0], "right")):
            batch = padded(chosen, side)
            found = output(adapter.model, batch)
            for row, at in enumerate(chosen):
                own = found[row][batch["attention_mask"][row].bool()]
                torch.testing.assert_close(own, plain[at], rtol=0, atol=1e-6)
        assert len(calls) == 1
        output(adapter.model, {"input_ids": torch.tensor([rows[0][:-1]]), "attention_mask": torch.ones(1, 8).long()})
    assert len(calls) == 2  # a shorter row is another row


def test_heights() -> None:
    expected = {
        "lora[r=2]": 0, "lora[r=2,layers=-1:]": 2, "prompt[length=2]": 0, "head": 3, "bitfit": 0, "layernorm": 0,
        "llama-adapter[length=2,layers=-2:]": 1, "houlsby[size=4,layers=-1:]": 0, "pfeiffer[size=4,layers=-1:]": 2,
        "ladder[reduction=2]": 3, "side": 3,
    }  # fmt: skip
    assert {method: trunk_height(attached("bert", method)) for method in expected} == expected
    for method in ("lora[r=2,layers=-1:]", "ladder[reduction=2]", "side"):
        assert trunk_height(attached("t5", method)) == 0
    assert trunk_height(tt.attach(tiny("llama"), "full")) == 0


def test_generation_and_embeddings_are_run_as_always() -> None:
    adapter = attached("llama", "lora[r=2,layers=-1:]")
    model = adapter.model.eval()
    ids = torch.tensor([[5, 9, 11, 4]])
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    embeds = model.get_input_embeddings()(ids)
    with torch.no_grad(), cached_trunk(adapter, Store(ENOUGH)):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        assert torch.equal(
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False), plain
        )
        moved = model(inputs_embeds=embeds, use_cache=False).logits
        shifted = model(input_ids=ids, position_ids=torch.arange(3, 7)[None] * 2, use_cache=False).logits
    with torch.no_grad():
        torch.testing.assert_close(moved, model(inputs_embeds=embeds, use_cache=False).logits)
        other = model(input_ids=ids, position_ids=torch.arange(3, 7)[None] * 2, use_cache=False).logits
    torch.testing.assert_close(shifted, other)
    assert not torch.allclose(shifted, moved)


# The store


def filled(store: Store) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    rows = {f"row{at}": torch.randn(at + 1, 6) for at in range(5)}
    for key, states in rows.items():
        store.put(key, 2, states)
    return rows


def test_rows_come_back_from_where_they_are_asked_for() -> None:
    store = Store(ENOUGH)
    rows = filled(store)
    assert torch.equal(store.get("row4", 2), rows["row4"])  # type: ignore[arg-type]
    assert torch.equal(store.get("row4", 4), rows["row4"][2:])  # type: ignore[arg-type]
    assert store.get("row4", 1) is None and store.get("unknown", 2) is None


def test_beyond_the_memory_a_file_takes_over_and_goes_with_the_store() -> None:
    store = Store(100)
    rows = filled(store)
    assert len(store.memory) == 2 and len(store.places) == 3
    for key, states in rows.items():
        assert torch.equal(store.get(key, 2), states)  # type: ignore[arg-type]
    path = store._path
    assert path is not None and path.exists()
    store.close()
    assert not path.exists()


def test_no_memory_keeps_nothing_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    adapter = attached("llama", "lora[r=2,layers=-1:]")
    batch = inputs("llama")
    with caplog.at_level(logging.WARNING, "trimtab"):
        store = Store(0)
        with cached_trunk(adapter, store):
            first, second = (output(adapter.model, batch) for _ in range(2))
    assert torch.equal(first, second) and not store.memory and not store.places
    assert len(caplog.records) == 1


def test_a_full_disk_ends_the_keeping_not_the_run(caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    store = Store(100)

    def full(states: torch.Tensor) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "_append", full)
    with caplog.at_level(logging.WARNING, "trimtab"):
        rows = filled(store)
    assert len(caplog.records) == 1 and store.full
    assert torch.equal(store.get("row0", 2), rows["row0"])  # type: ignore[arg-type]
    assert store.get("row4", 2) is None


def test_a_folder_serves_a_later_run_with_the_same_facts_only(tmp_path: Path) -> None:
    store = Store(ENOUGH, tmp_path, {"base": "one"})
    rows = filled(store)
    store.close()
    again = Store(ENOUGH, tmp_path, {"base": "one"})
    for key, states in rows.items():
        assert torch.equal(again.get(key, 2), states)  # type: ignore[arg-type]
    again.close()
    other = Store(ENOUGH, tmp_path, {"base": "another"})
    assert other.get("row0", 2) is None and not list(tmp_path.glob("*.bin"))
    other.close()


def test_an_interrupted_run_leaves_nothing_that_is_trusted(tmp_path: Path) -> None:
    store = Store(ENOUGH, tmp_path, {})
    filled(store)
    store.commit()
    store.put("late", 0, torch.randn(4, 6))  # written, but not in the index
    store._lock.release()
    again = Store(ENOUGH, tmp_path, {})
    assert again.get("row1", 2) is not None and again.get("late", 0) is None
    again.put("new", 0, torch.ones(2, 6))
    assert torch.equal(again.get("new", 0), torch.ones(2, 6))  # type: ignore[arg-type]
    again.close()


@pytest.mark.parametrize("damage", ["short", "flipped", "index", "foreign"])
def test_damage_is_refilled(tmp_path: Path, damage: str) -> None:
    store = Store(ENOUGH, tmp_path, {})
    rows = filled(store)
    store.close()
    (data,) = tmp_path.glob("*.bin")
    content = bytearray(data.read_bytes())
    if damage == "short":
        data.write_bytes(content[:-1])
    elif damage == "flipped":
        content[0] ^= 1
        data.write_bytes(content)
    elif damage == "index":
        (tmp_path / INDEX).write_text("{")
    else:
        index = json.loads((tmp_path / INDEX).read_text())
        index["file"] = "../../etc/passwd"
        (tmp_path / INDEX).write_text(json.dumps(index))
    again = Store(ENOUGH, tmp_path, {})
    assert again.get("row0", 2) is None
    if damage == "flipped":
        assert torch.equal(again.get("row4", 2), rows["row4"])  # type: ignore[arg-type]
    again.put("row0", 2, rows["row0"])
    assert torch.equal(again.get("row0", 2), rows["row0"])  # type: ignore[arg-type]
    again.close()


def test_a_folder_in_use_is_left_to_the_other_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = Store(ENOUGH, tmp_path, {})
    with caplog.at_level(logging.WARNING, "trimtab"):
        second = Store(ENOUGH, tmp_path, {})
    rows = filled(second)
    assert torch.equal(second.get("row3", 2), rows["row3"])  # type: ignore[arg-type]
    assert len(caplog.records) == 1
    second.close()
    first.close()


def test_facts_tell_bases_and_boundaries_apart() -> None:
    def facts(family: str, method: str) -> dict[str, Any]:
        adapter = attached(family, method)
        return trunk_facts(adapter, model_fingerprint(adapter.model))

    one = facts("gpt2", "lora[r=2,layers=-1:]")
    assert one == facts("gpt2", "pfeiffer[size=4,layers=-1:]")
    others = [
        facts("gpt2", "lora[r=2,layers=-2:]"),
        facts("llama", "lora[r=2,layers=-1:]"),
    ]
    assert all(one != other for other in others)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_new_rows_behind_a_known_beginning(family: str) -> None:
    """Rows that were never run need the beginning's keys and values in the lower layers as well."""
    adapter = attached(family, "lora[r=2,layers=-1:]")
    torch.manual_seed(3)
    ids = torch.randint(3, 50, (10, 20))
    ids[:, :12] = ids[:1, :12]
    needed = torch.zeros(5, 20).bool()
    needed[:, 12:] = True
    with cached_trunk(adapter, Store(ENOUGH)):
        for rows in (ids[:5], ids[5:], ids[3:8], ids[5:]):
            whole = {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
            with shared_prefix(adapter.model, whole, needed) as rest:
                found = output(adapter.model, rest)
            plain = output(adapter.model, whole)[:, 12:]
            torch.testing.assert_close(found, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "opt", "bert", "roberta"])
def test_the_base_and_a_prefix_that_moves_the_text_know_their_own_rows(family: str) -> None:
    adapter = attached(family, "prefix[length=3,hidden=8,layers=-1:]")
    batch = inputs(family)
    with adapter.disabled():
        base = output(adapter.model, batch)
    moved = output(adapter.model, batch)
    with cached_trunk(adapter, Store(ENOUGH)):
        for _ in range(2):
            with adapter.disabled():
                torch.testing.assert_close(output(adapter.model, batch), base, rtol=0, atol=1e-6)
            torch.testing.assert_close(output(adapter.model, batch), moved, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_answers_of_several_tokens_go_on_from_whole_caches(family: str) -> None:
    from trimtab.scoring import Run, answer_scores

    class Padding:
        pad_token_id = 0

    adapter = attached(family, "lora[r=2,layers=-1:]")
    run = Run(adapter.model, Padding(), "causal", 200, False)  # type: ignore[arg-type]
    torch.manual_seed(3)
    prompts = torch.randint(3, 50, (3, 6)).tolist()
    answers = [[[4, 5], [6, 7, 8]]] * 3
    plain = answer_scores(run, prompts, answers)
    with cached_trunk(adapter, Store(ENOUGH)):
        for _ in range(2):
            for one, other in zip(answer_scores(run, prompts, answers), plain, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_rows_that_come_again_are_not_kept_twice() -> None:
    store, states = Store(ENOUGH), torch.randn(5, 4)
    store.put("row", 2, states[2:])
    store.put("row", 3, states[3:])
    assert store.used == 3 * 4 * 4
    store.put("row", 0, states)
    assert store.used == 5 * 4 * 4
    found = store.get("row", 1)
    assert found is not None and torch.equal(found, states[1:])


def test_the_frozen_base_runs_its_own_layers_beside_a_ladder() -> None:
    adapter = attached("llama", "ladder[reduction=2,layers=0:1]")
    batch = inputs("llama")
    with torch.no_grad(), adapter.disabled():
        base = output(adapter.model, batch)
    with torch.no_grad(), cached_trunk(adapter, Store(ENOUGH)):
        output(adapter.model, batch), output(adapter.model, batch)
        with adapter.disabled():
            torch.testing.assert_close(output(adapter.model, batch), base)


def test_replayed_layers_follow_the_mode_of_the_model() -> None:
    adapter = attached("llama", "lora[r=2,layers=-1:]")
    layer = adapter.model.trimtab.sites.embeds[0].layers[0]
    adapter.model.train()
    with cached_trunk(adapter, Store(ENOUGH)):
        adapter.model.eval()
        assert not layer.training
        adapter.model.train()
        assert layer.training


def test_a_layers_own_forward_is_put_back() -> None:
    adapter = attached("llama", "ladder[reduction=2]")
    layer = adapter.model.trimtab.sites.embeds[0].layers[0]
    given = layer.forward = functools.wraps(layer.forward)(functools.partial(layer.forward))
    with torch.no_grad(), cached_trunk(adapter, Store(ENOUGH)):
        output(adapter.model, inputs("llama")), output(adapter.model, inputs("llama"))
    assert layer.forward is given


def test_states_under_autocast_are_others() -> None:
    adapter = attached("llama", "lora[r=2,layers=-1:]")
    batch = inputs("llama")
    plain = output(adapter.model, batch)
    with torch.no_grad(), cached_trunk(adapter, Store(ENOUGH)):
        with torch.autocast("cpu", torch.bfloat16):
            output(adapter.model, batch)
        torch.testing.assert_close(output(adapter.model, batch), plain, rtol=0, atol=1e-6)

"""LLaMA-Adapter with pictures: the mathematics against a reference by hand, generation, batches, savings, folders."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from PIL import Image

import trimtab as tt
from pictures_by_hand import SIZE, expected_logits, save_vit
from reference import GATED
from tiny import inputs, tiny
from trimtab.cache import cached_pictures, cached_trunk
from trimtab.sight import Sight
from trimtab.store import Store

FORMS = ("global", "queries")
FAMILIES = ("llama", "gpt2")


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_vit(tmp_path_factory.mktemp("vit"))


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    GATED.clear()


def method(vit: str, look: str = "global", more: str = "") -> str:
    return f"llama-adapter[length=4,image='{vit}',look={look},image_hidden=8{more}]"


def attached(family: str, spec: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    """A tiny model with an adapter whose gates are open."""
    model = tiny(family, dtype)  # whose making seeds torch the first time
    torch.manual_seed(3)
    adapter = tt.attach(model, spec)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model, adapter


def pictures(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))


# The mathematics


@pytest.mark.parametrize("look", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_equations(family: str, look: str, vit: str) -> None:
    model, adapter = attached(family, method(vit, look))
    batch, shown = inputs(family), pictures()
    with torch.no_grad():
        found = model(**batch, images=[shown[0], None, shown[2]]).logits
        unseen = model(**batch).logits
    for row, picture in enumerate((shown[0], None, shown[2])):
        expected = expected_logits(family, adapter, vit, batch["input_ids"][row], picture)
        assert torch.allclose(found[row], expected[0], atol=1e-6), (row, (found[row] - expected[0]).abs().max())
    assert (found[0] - unseen[0]).abs().max() > 0.01


@pytest.mark.parametrize("look", FORMS)
def test_the_picture_reaches_the_layers_that_are_to_see_it(look: str, vit: str) -> None:
    model, adapter = attached("llama", method(vit, look, ",image_layers=1"))
    batch, shown = inputs("llama"), pictures()
    with torch.no_grad():
        found = model(**batch, images=shown).logits
    expected = expected_logits("llama", adapter, vit, batch["input_ids"][0], shown[0])
    assert torch.allclose(found[0], expected[0], atol=1e-6)
    everywhere = expected_logits("llama", attached("llama", method(vit, look))[1], vit, batch["input_ids"][0], shown[0])
    assert not torch.allclose(found[0], everywhere[0], atol=1e-3)


@pytest.mark.parametrize("look", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_zero_gates_leave_every_bit(family: str, look: str, vit: str) -> None:
    model, batch = tiny(family), inputs(family)
    with torch.no_grad():
        base = model(**batch).logits
        adapter = tt.attach(model, method(vit, look))
        assert torch.equal(model(**batch, images=pictures()).logits, base)
        assert torch.equal(model(**batch, images=[None, pictures()[0], None]).logits, base)
        with adapter.disabled():
            assert torch.equal(model(**batch, images=pictures()).logits, base)


@pytest.mark.parametrize("look", FORMS)
def test_mixed_batches_equal_single_rows(look: str, vit: str) -> None:
    model, _ = attached("llama", method(vit, look))
    batch, shown = inputs("llama"), [pictures()[0], None, pictures()[2]]
    mask = batch["attention_mask"].clone()
    mask[0, :3] = 0  # padding on the left
    with torch.no_grad():
        together = model(input_ids=batch["input_ids"], attention_mask=mask, images=shown).logits
        for row in range(3):
            ids, own = batch["input_ids"][row : row + 1], mask[row : row + 1]
            alone = model(input_ids=ids[:, own[0].bool()], images=[shown[row]]).logits
            assert torch.allclose(together[row][own[0].bool()], alone[0], atol=1e-6)
        ids = batch["input_ids"][1:2]
        assert torch.equal(model(input_ids=ids, images=[None]).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("look", FORMS)
@pytest.mark.parametrize("method_name", ["llama-adapter", "llama-adapter-v2"])
def test_parameters_are_counted_and_learn(method_name: str, look: str, vit: str) -> None:
    model = tiny("llama")
    adapter = tt.attach(model, f"{method_name}[length=4,image='{vit}',look={look},image_hidden=8]")
    count = sum(parameter.numel() for parameter in adapter.parameters())
    assert count == adapter.method.parameter_count(model.trimtab.sites)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if name.endswith("gate"):
                parameter.fill_(0.2)
    model.train()
    model(**inputs("llama"), images=[pictures()[0], None, pictures()[1]]).logits.pow(2).mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
    (sight,) = (eye.sight for eye in adapter._entry.eyes())
    assert not any(p.requires_grad for p in sight.model.parameters())
    assert not any("sight" in name for name in model.state_dict())


def test_gradient_checkpointing_changes_nothing(vit: str) -> None:
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model, adapter = attached("llama", method(vit))
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**inputs("llama"), images=pictures()).logits.pow(2).mean().backward()
        return {name: parameter.grad for name, parameter in adapter.named_parameters()}  # type: ignore[misc]

    plain, again = gradients(False), gradients(True)
    assert all(torch.allclose(plain[name], again[name], atol=1e-12) for name in plain)


def test_a_call_of_the_stack_alone_has_no_picture(vit: str) -> None:
    model, _ = attached("llama", method(vit))
    batch = inputs("llama")
    alone = model.model(**batch).last_hidden_state.detach()
    model(**batch, images=pictures())  # with gradients, so that what is seen stays for the backward pass
    assert torch.equal(model.model(**batch).last_hidden_state, alone)


def test_copies_and_other_adapters_see_for_themselves(vit: str) -> None:
    model, _ = attached("llama", method(vit))
    batch, shown = inputs("llama"), pictures()
    with torch.no_grad():
        expected = model(**batch, images=shown).logits
        double = copy.deepcopy(model)
        assert torch.equal(double(**batch, images=shown).logits, expected)
        other = tt.attach(model, "lora[r=2]", "other")
        with pytest.raises(tt.UserError, match="lora looks at no pictures"):
            model(**batch, images=shown)
        other.detach()
        model.trimtab.use("default")
        assert torch.equal(model(**batch, images=shown).logits, expected)


# Generation


@pytest.mark.parametrize("look", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_recomputation(family: str, look: str, vit: str) -> None:
    model, _ = attached(family, method(vit, look), torch.float32)
    batch, shown = inputs(family), pictures()
    ids = batch["input_ids"]
    found = model.generate(**batch, images=shown, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    with torch.no_grad():
        for _ in range(6):
            ids = torch.cat([ids, model(ids, images=shown).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(found, ids)
    blind = model.generate(**batch, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert not torch.equal(found, blind)


def test_generation_with_beams_from_a_list_and_from_files(vit: str, tmp_path: Path) -> None:
    model, _ = attached("llama", method(vit), torch.float32)
    batch = inputs("llama")
    Image.new("RGB", (20, 11), (200, 30, 0)).save(tmp_path / "a.png")
    shown: list[Any] = [str(tmp_path / "a.png"), None, Image.new("RGB", (9, 30), (0, 90, 200))]
    how: Any = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(**batch, images=shown, **how)
    for row in range(3):
        own = {name: value[row : row + 1] for name, value in batch.items()}
        assert torch.equal(model.generate(**own, images=[shown[row]], **how), found[row : row + 1])


def test_the_class_stays_and_detaching_leaves_no_trace(vit: str) -> None:
    model = tiny("llama")
    kind, before = type(model), set(vars(model))
    adapter = tt.attach(model, method(vit))
    assert type(model) is kind
    second = tt.attach(model, method(vit), "second")
    adapter.detach()
    model.generate(**inputs("llama"), images=pictures(), max_new_tokens=2, pad_token_id=0)
    second.detach()
    assert set(vars(model)) == before
    with pytest.raises(ValueError, match="images"):
        model.generate(**inputs("llama"), images=pictures(), max_new_tokens=2, pad_token_id=0)


# Savings


class Counting:
    """Counts the pictures that an encoder is run over."""

    def __init__(self, sight: Sight):
        self.count = 0
        sight.model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.count += len(kwargs["pixel_values"])


@pytest.mark.parametrize("look", FORMS)
@pytest.mark.parametrize("budget", [1 << 20, 64])
def test_what_is_seen_is_computed_once(look: str, budget: int, vit: str) -> None:
    model, adapter = attached("llama", method(vit, look))
    batch, shown = inputs("llama"), pictures()
    (sight,) = (eye.sight for eye in adapter._entry.eyes())
    store = Store(budget)
    with torch.no_grad():
        plain = model(**batch, images=shown).logits
        counting = Counting(sight)
        with cached_pictures(adapter, store):
            first = model(**batch, images=shown.clone()).logits
            assert counting.count == 3
            again = model(**batch, images=[shown[2], None, shown[2]]).logits  # in another order, one of them twice
        assert counting.count == 3
        assert sight.store is None
        swapped = model(**batch, images=[shown[2], None, shown[2]]).logits
        assert counting.count == 4  # each different picture once
    store.close()
    assert torch.allclose(first, plain, atol=1e-6) and torch.allclose(again, swapped, atol=1e-6)


def test_a_store_tells_encoders_apart(vit: str, tmp_path: Path) -> None:
    other = save_vit(tmp_path / "other", seed=1)
    store, shown = Store(1 << 20), pictures()
    seen = []
    for source in (vit, other, vit):
        sight = Sight(source)
        sight.store = store
        seen.append(sight.look(shown)[0])
    assert torch.equal(seen[0], seen[2]) and not torch.allclose(seen[0], seen[1], atol=1e-3)
    store.close()


def test_the_trunk_below_is_replayed(vit: str) -> None:
    model, adapter = attached("llama", method(vit, more=",layers=-1:"))
    batch, store = inputs("llama"), Store(1 << 20)
    with torch.no_grad():
        expected = [model(**batch, images=shown).logits for shown in (pictures(), pictures().flip(0))]
        with cached_trunk(adapter, store):
            found = [model(**batch, images=shown).logits for shown in (pictures(), pictures().flip(0))]
    assert store.hits == 3
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(found, expected, strict=True))


def test_a_changed_tensor_is_looked_at_again(vit: str) -> None:
    model, _ = attached("llama", method(vit))
    batch, shown = inputs("llama"), pictures()
    with torch.no_grad():
        before = model(**batch, images=shown).logits
        shown.neg_()
        assert not torch.allclose(model(**batch, images=shown).logits, before, atol=1e-3)


# Folders


@pytest.mark.parametrize("look", FORMS)
@pytest.mark.parametrize("name", ["llama-adapter", "llama-adapter-v2"])
def test_save_and_load(name: str, look: str, vit: str, tmp_path: Path) -> None:
    model, adapter = attached("llama", f"{name}[length=4,image='{vit}',look={look},image_hidden=8]")
    batch, shown = inputs("llama"), pictures()
    adapter.save(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["encoder"]["fingerprint"] and config["encoder"]["path"] == vit
    fresh = tiny("llama", torch.float64)
    tt.load(fresh, tmp_path / "out")
    with torch.no_grad():
        assert torch.allclose(fresh(**batch, images=shown).logits, model(**batch, images=shown).logits, atol=1e-8)
        assert torch.allclose(fresh(**batch).logits, model(**batch).logits, atol=1e-8)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"seed": 1}, "another vision encoder"), ({"hidden_size": 32}, r"gives 48 numbers a picture, .* gives 96")],
)
def test_another_encoder_is_refused(change: dict[str, int], said: str, tmp_path: Path) -> None:
    source = save_vit(tmp_path / "vit")
    _, adapter = attached("llama", method(source))
    adapter.save(tmp_path / "out")
    shutil.rmtree(source)
    save_vit(Path(source), **change)  # type: ignore[arg-type]
    model = tiny("llama", torch.float64)
    with pytest.raises(tt.UserError, match=said):
        tt.load(model, tmp_path / "out")
    assert not hasattr(model, "trimtab")


def test_a_missing_encoder_is_one_sentence(tmp_path: Path) -> None:
    source = save_vit(tmp_path / "vit")
    attached("llama", method(source))[1].save(tmp_path / "out")
    shutil.rmtree(source)
    with pytest.raises(tt.UserError, match="does not exist"):
        tt.load(tiny("llama", torch.float64), tmp_path / "out")


# Mistakes


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ("look=queries", "look means nothing without image="),
        ("image_layers=1", "image_layers means nothing without image="),
        ("image=nowhere/at/all/,attention=joint", "needs gates"),
        ("image=x,look=queries,scales=1", "scales= belongs to look=global"),
        ("image=x,look=queries,image_hidden=10", "multiple of 4"),
        ("image=x,image_hidden=0", "at least 1"),
    ],
)
def test_settings_that_mean_nothing(fields: str, said: str) -> None:
    with pytest.raises(tt.UserError, match=said):
        tt.attach(tiny("llama"), f"llama-adapter[{fields}]")


@pytest.mark.parametrize(
    ("family", "more", "said"),
    [
        ("llama", ",scales=1,7", "7"),
        ("llama", ",image_layers=0:2,layers=1:", "has layers without prompts; with: 1, 2"),
        ("bert", "", "causal language models"),
        ("t5", "", "causal language models"),
        ("vit", "", "causal language models"),
    ],
)
def test_what_cannot_look(family: str, more: str, said: str, vit: str) -> None:
    model = tiny(family)
    with pytest.raises(tt.UserError, match=said):
        tt.attach(model, method(vit, more=more))
    assert not hasattr(model, "trimtab")


def test_an_encoder_that_reads_no_pictures_is_refused(tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path)
    with pytest.raises(tt.UserError, match="reads no pictures"):
        tt.attach(tiny("llama"), method(str(tmp_path)))


def test_virtual_tokens_and_pictures_are_refused(vit: str) -> None:
    with pytest.raises(tt.UserError, match="the same for all rows"):
        tt.attach(tiny("llama"), f"prompt[length=2]|{method(vit)}")
    tt.attach(tiny("llama"), f"lora[r=2]|{method(vit)}")


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (torch.randn(2, 3, SIZE, SIZE), "2 pictures for 3 rows"),
        (torch.randn(3, 3, 9, 9), r"row 1: the picture has the shape \[3, 9, 9\]"),
        ([None, "nowhere.png", None], "row 2: the picture 'nowhere.png' cannot be read"),
        ([None, None, 7], "row 3: a picture is a path"),
    ],
)
def test_pictures_that_do_not_fit(images: Any, said: str, vit: str) -> None:
    model = tiny("llama")
    tt.attach(model, method(vit))
    with pytest.raises(tt.UserError, match=said):
        model(**inputs("llama"), images=images)
    model(**inputs("llama"), images=pictures())  # nothing is left of the mistake


# Other encoders


def _encoders() -> dict[str, Any]:
    sizes: dict[str, Any] = {"image_size": SIZE, "num_attention_heads": 2, "num_hidden_layers": 3, "hidden_size": 16}
    wide = {**sizes, "intermediate_size": 24, "patch_size": 4}
    return {
        "dinov2": lambda: tf.Dinov2Model(tf.Dinov2Config(**sizes, patch_size=4)),
        "clip": lambda: tf.CLIPModel(tf.CLIPConfig(vision_config=wide, text_config=TEXT)),
        "clip_vision_model": lambda: tf.CLIPVisionModel(tf.CLIPVisionConfig(**wide)),
        "siglip_vision_model": lambda: tf.SiglipVisionModel(tf.SiglipVisionConfig(**wide)),
        "vit, with a head and in grey": lambda: tf.ViTForImageClassification(tf.ViTConfig(**wide, num_channels=1)),
    }


TEXT: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip


@pytest.mark.parametrize("look", FORMS)
@pytest.mark.parametrize("name", list(_encoders()))
def test_other_encoders(name: str, look: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    _encoders()[name]().save_pretrained(tmp_path / "encoder")
    model, adapter = attached("llama", method(str(tmp_path / "encoder"), look))
    adapter.save(tmp_path / "out")
    fresh, batch = tiny("llama", torch.float64), inputs("llama")
    tt.load(fresh, tmp_path / "out")
    shown = [Image.new("RGB", (12, 9), colour) for colour in ("red", "blue", "white")]
    with torch.no_grad():
        found = model(**batch, images=shown).logits
        assert torch.allclose(fresh(**batch, images=shown).logits, found, atol=1e-8)
        assert (model(**batch, images=shown[::-1]).logits[0] - found[0]).abs().max() > 1e-4


def test_a_trainer_does_not_load_the_encoder_again(vit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import trimtab.sight as module

    model, adapter = attached("llama", method(vit), torch.float32)
    monkeypatch.setattr(module, "load_vision_encoder", lambda source: pytest.fail("loaded a second time"))
    arguments = tf.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    tt.Trainer(model, arguments, adapter=adapter, train_dataset=[], pad_id=0)

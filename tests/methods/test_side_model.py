"""A given small model beside the base: against the small model run by itself and fused by hand, and for llama and bert
against loops written from the equations; generation, savings, folders; its errors.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor
from transformers import DynamicCache

import trimtab as tt
from encoders import saved_encoder, wordpiece
from side_by_hand import HOW, bert_block, llama_block, normed, padded, rows
from small_models import SMALL_LAYERS, small_model
from tiny import CAUSAL, FAMILIES, SEQ2SEQ, inputs, output, tiny
from trimtab.cache import cached_trunk
from trimtab.checkpoint import CONFIG
from trimtab.prefix_share import shared_prefix
from trimtab.store import Store

ALL = tuple(family for family in FAMILIES if family not in SEQ2SEQ)
ALPHA = 0.7


def families(known: tuple[str, ...]) -> list[Any]:
    """One of each kind of layers, positions and masks; the others take their turn among the long tests."""
    short = ("llama", "gpt2", "gemma3_text", "bloom", "bert", "roberta", "vit")
    return [one if one in short else pytest.param(one, marks=pytest.mark.slow) for one in known]


def long(base: str, small: str) -> Any:
    """A pair for the long tests."""
    return pytest.param(base, small, marks=pytest.mark.slow)


def beside(family: str, more: str = "", dtype: torch.dtype = torch.float64, small: str | None = None) -> Any:
    """An adapter with a small model on a tiny one, away from its start, and α away from 0."""
    torch.manual_seed(5)
    adapter = tt.attach(tiny(family, dtype), f"side[model={small or small_model(family)}{more}]")
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if not name.startswith("head_"):
                parameter.add_(0.1 * torch.randn_like(parameter))
        if "states.alpha" in adapter.state_dict():
            adapter.state_dict()["states.alpha"].fill_(ALPHA)
    return adapter


def alone(adapter: Any, family: str) -> Any:
    """The small model by itself, as transformers loads it, with the adapter's weights."""
    model: Any = tf.AutoModel.from_pretrained(small_model(family), dtype=torch.float64).eval()
    body = getattr(model, "decoder", model)
    prefix = "states.network.body."
    own = {name[len(prefix) :]: tensor for name, tensor in adapter.state_dict().items() if name.startswith(prefix)}
    missing = body.load_state_dict(own, strict=False)
    assert not missing.unexpected_keys
    if family == "opt":
        body.project_out = None
    return body


def by_itself(adapter: Any, family: str, batch: dict[str, Tensor]) -> Tensor:
    """The logits of the plain base whose last state is fused by hand with what the small model gives by itself."""
    w, small, plain = adapter.state_dict(), alone(adapter, family), tiny(family, torch.float64)
    side = small(**{name: value for name, value in batch.items() if name != "labels"}).last_hidden_state
    side = side @ w["states.network.up.weight"].T + w["states.network.up.bias"]
    share = 1 / (1 + math.exp(-ALPHA))

    def fuse(_: Any, __: Any, result: Any) -> Any:
        own = result[0] if isinstance(result, tuple) else result
        mean = share * own + (1 - share) * side
        return (mean, *result[1:]) if isinstance(result, tuple) else mean

    path = next(name for name, module in adapter.model.named_modules() if module is _end(adapter))
    plain.get_submodule(path).register_forward_hook(fuse)
    return output(plain, batch)


def _end(adapter: Any) -> Any:
    return adapter.model.trimtab.sites.states[0].end


@pytest.mark.parametrize("family", families(ALL))
@torch.no_grad()
def test_the_small_model_by_itself_fused_by_hand(family: str) -> None:
    adapter, batch = beside(family), inputs(family, dtype=torch.float64)
    found = output(adapter.model, batch)
    torch.testing.assert_close(found, by_itself(adapter, family, batch), rtol=0, atol=1e-5)
    with adapter.disabled():
        assert not torch.allclose(output(adapter.model, batch), found, atol=1e-3)


@torch.no_grad()
def test_llama_by_hand() -> None:
    small = small_model("llama", num_attention_heads=4)
    adapter, batch = beside("llama", small=small), inputs("llama", batch=2, length=5)
    w, plain = adapter.state_dict(), tiny("llama", torch.float64)
    blocks = {name.replace("states.network.body.layers", "states.side.blocks"): one for name, one in w.items()}
    last = plain.base_model(**batch).last_hidden_state
    found, share = output(adapter.model, batch), 1 / (1 + math.exp(-ALPHA))
    for row in range(2):
        h = w["states.network.body.embed_tokens.weight"][batch["input_ids"][row]]
        for number in range(SMALL_LAYERS):
            h = llama_block(blocks, number, h)
        h = normed(h, w["states.network.body.norm.weight"], None, 1e-6)
        side = rows(w["states.network.up.weight"], h, w["states.network.up.bias"])
        expected = rows(plain.lm_head.weight, share * last[row] + (1 - share) * side)
        torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_bert_by_hand() -> None:
    small = small_model("bert", num_attention_heads=4)
    adapter, batch = beside("bert", small=small), inputs("bert", batch=2, length=5)
    w, plain = adapter.state_dict(), tiny("bert", torch.float64)
    blocks = {name.replace("states.network.body.encoder.layer", "states.side.blocks"): one for name, one in w.items()}
    last = plain.base_model(**batch).last_hidden_state
    own = {name.removeprefix("states.network.body.embeddings."): one for name, one in w.items()}
    found, share = output(adapter.model, batch), 1 / (1 + math.exp(-ALPHA))
    for row in range(2):
        h = own["word_embeddings.weight"][batch["input_ids"][row]] + own["position_embeddings.weight"][:5]
        h = normed(h + own["token_type_embeddings.weight"][0], own["LayerNorm.weight"], own["LayerNorm.bias"], 1e-12)
        for number in range(SMALL_LAYERS):
            h = bert_block(blocks, number, h)
        side = rows(w["states.network.up.weight"], h, w["states.network.up.bias"])
        mean = share * last[row] + (1 - share) * side
        expected = plain.classifier(torch.tanh(plain.bert.pooler.dense(mean[0])))
        torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-7)


def test_the_start_is_the_small_models_own_weights_without_a_projection_of_equal_widths() -> None:
    folder = small_model("bert", 32)
    adapter = tt.attach(tiny("bert"), f"side[model={folder}]")
    part: Any = adapter._entry.parts["states"]
    assert part.network.up is None and float(part.alpha.detach()) == 0
    saved = tf.AutoModel.from_pretrained(folder).state_dict()
    for name, tensor in part.network.body.state_dict().items():
        assert torch.equal(tensor, saved[name]), name
    batch = inputs("bert")
    with torch.no_grad():
        plain = tiny("bert").base_model(**batch).last_hidden_state
        side = tf.AutoModel.from_pretrained(folder).eval()(**batch).last_hidden_state
        found = adapter.model.base_model(**batch).last_hidden_state
    torch.testing.assert_close(found, (plain + side) / 2)


def test_the_count_by_hand() -> None:
    """BERT without its pooler: embeddings and their norm, then layers of four squares and a feed-forward."""
    adapter = tt.attach(tiny("bert"), f"side[model={small_model('bert')}]")
    d, f = 16, 48
    embeddings = (64 + 64 + 2) * d + 2 * d
    layer = 4 * (d + 1) * d + 2 * d + (d + 1) * f + (f + 1) * d + 2 * d
    head = sum(one.numel() for name, one in adapter.named_parameters() if name.startswith("head_"))
    expected = embeddings + SMALL_LAYERS * layer + (d + 1) * 32 + 1
    assert adapter.method.parameter_count(adapter.model.trimtab.sites) == expected  # type: ignore[union-attr, arg-type]
    assert sum(one.numel() for one in adapter.parameters()) == expected + head


@pytest.mark.parametrize("family", families(ALL))
def test_all_of_it_is_trained_and_nothing_of_the_base(family: str) -> None:
    adapter, batch = beside(family, dtype=torch.float32), inputs(family)
    base = {weight for name, weight in adapter.model.named_parameters() if not name.startswith("trimtab.")}
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    adapter.model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = output(adapter.model, batch).pow(2).mean()
    loss.backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in adapter.parameters())
    assert all(weight.grad is None for weight in base)
    sites = adapter.model.trimtab.sites
    inside = {w.untyped_storage().data_ptr() for layer in sites.states[0].layers for w in layer.parameters()}
    assert not inside & {tensor.untyped_storage().data_ptr() for tensor in saved}


# ---------------------------------------------------------------------------------------------------- decoders


def precision(*families: str) -> torch.dtype:
    """float64; float32 for bloom, whose eager attention gives NaN in float64 where padding sees nothing."""
    return torch.float32 if "bloom" in families else torch.float64


def generated(adapter: Any, batch: dict[str, Tensor], **how: Any) -> tuple[Tensor, Tensor]:
    """The tokens, and each step's logits [steps, rows, V]."""
    found = adapter.model.generate(**batch, **HOW, **how, return_dict_in_generate=True, output_logits=True)
    return found.sequences, torch.stack(found.logits)


@pytest.mark.parametrize("family", families(CAUSAL))
def test_cached_generation_is_recomputed_generation(family: str) -> None:
    adapter, batch = beside(family, dtype=precision(family)), padded((7, 4, 2))
    for how in ({}, {"num_beams": 3}):
        tokens, logits = generated(adapter, batch, **how)
        again, expected = generated(adapter, batch, **how, use_cache=False)
        assert torch.equal(tokens, again)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 if family == "bloom" else 1e-5)
    with adapter.disabled():
        bare = generated(adapter, batch)[1]
    assert not torch.allclose(bare[0], generated(adapter, batch)[1][0], atol=1e-3)


@pytest.mark.parametrize(
    ("base", "small"), [("bloom", "gpt2"), ("llama", "gpt2"), long("gpt2", "llama"), long("opt", "bloom")]
)
@torch.no_grad()
def test_another_family_beside_the_base_and_left_padding(base: str, small: str) -> None:
    """Positions and masks are the small model's own: a row's logits are those that it has without padding."""
    adapter, bloom = beside(base, small=small_model(small), dtype=precision(base, small)), "bloom" in (base, small)
    batch = padded((7, 4, 2))
    tokens, logits = generated(adapter, batch)
    again, expected = generated(adapter, batch, use_cache=False)
    assert torch.equal(tokens, again)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    found = output(adapter.model, batch)
    for row, length in enumerate((7, 4, 2)):
        ids = batch["input_ids"][row : row + 1, -length:]
        single = output(adapter.model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        torch.testing.assert_close(found[row : row + 1, -length:], single, rtol=0, atol=1e-4 if bloom else 1e-5)


@pytest.mark.parametrize("family", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_static_cache(family: str) -> None:
    for small in (family, "mistral"):
        adapter, batch = beside(family, small=small_model(small)), padded((7, 4, 2))
        expected = adapter.model.generate(**batch, **HOW)
        how = {**HOW, "cache_implementation": "static", "disable_compile": True}
        assert torch.equal(adapter.model.generate(**batch, **how), expected)


def test_a_static_cache_of_a_base_with_a_window_is_refused() -> None:
    adapter = beside("mistral")
    with pytest.raises(tt.UserError, match="static cache"):
        adapter.model.generate(**padded((4, 2)), **HOW, cache_implementation="static", disable_compile=True)


@pytest.mark.parametrize("configured", [True, False])
@torch.no_grad()
def test_caches_grow_and_are_cut_with_the_base(configured: bool) -> None:
    adapter, ids = beside("llama", small=small_model("mistral", sliding_window=64)), inputs("llama")["input_ids"]
    cache = DynamicCache(config=adapter.model.config) if configured else DynamicCache()
    whole = output(adapter.model, {"input_ids": ids})
    adapter.model(input_ids=ids[:, :6], past_key_values=cache)
    assert len(cache.layers) == 3 + SMALL_LAYERS and {layer.get_seq_length() for layer in cache.layers} == {6}
    cache.crop(-2)
    rest = adapter.model(input_ids=ids[:, 4:], past_key_values=cache).logits
    torch.testing.assert_close(rest, whole[:, 4:], rtol=0, atol=1e-6)
    for bare in (DynamicCache(config=adapter.model.config), DynamicCache()):
        with adapter.disabled():
            adapter.model(input_ids=ids, past_key_values=bare)
        with pytest.raises(tt.UserError, match="cached without the adapter"):
            adapter.model(input_ids=ids[:, :1], past_key_values=bare)


# ---------------------------------------------------------------------------------------------------- savings


@pytest.mark.parametrize("family", ["llama", "bloom", "bert", "vit"])
def test_with_the_trunk_cache_the_same_and_no_layer_of_the_base_is_run(family: str) -> None:
    adapter, batch = beside(family, dtype=torch.float32), inputs(family)
    run: list[int] = []
    for site in adapter.model.trimtab.sites.linear:
        if site.role == "o":
            site.module.register_forward_hook(lambda *_: run.append(1))
    expected, gradients = _step(adapter, batch)
    with cached_trunk(adapter, Store(1 << 20)):
        _step(adapter, batch)
        run.clear()
        found, again = _step(adapter, batch)
    assert not run
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    for one, other in zip(again, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def _step(adapter: Any, batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    adapter.model.zero_grad()
    more = {"use_cache": False} if "input_ids" in batch and adapter.model.config.model_type in CAUSAL else {}
    logits = output(adapter.model, {**batch, **more})
    logits.pow(2).mean().backward()
    return logits.detach(), [weight.grad.clone() for weight in adapter.parameters()]


@pytest.mark.parametrize(
    ("base", "small"),
    [("gpt2", "gpt2"), ("llama", "mistral"), ("opt", "bloom"), long("llama", "llama"), long("gpt2", "gemma2")],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_rows_and_a_shared_beginning(base: str, small: str, checkpointing: bool) -> None:
    """The same logits and gradients as row by row; a model whose attention is its own business is not packed."""
    adapter = beside(base, dtype=torch.float64, small=small_model(small))
    torch.manual_seed(3)
    ids = torch.randint(3, 50, (4, 18))
    ids[:, :11] = ids[:1, :11]
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    needed = torch.zeros(4, 18).bool()
    needed[:, 11:] = True
    batch = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    adapter.model.train()
    real = mask[:, 11:].bool()
    plain = output(adapter.model, batch)[:, 11:][real]
    expected = torch.autograd.grad(plain.pow(2).mean(), list(adapter.parameters()))
    if checkpointing:
        adapter.model.gradient_checkpointing_enable()
    with shared_prefix(adapter.model, batch, needed) as rest:
        assert (rest["input_ids"].shape[1] == 7) == (small != "bloom")
        packed = output(adapter.model, rest)[:, -7:][real]
        found = torch.autograd.grad(packed.pow(2).mean(), list(adapter.parameters()))
    torch.testing.assert_close(packed, plain, rtol=0, atol=1e-6)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(output(adapter.model.eval(), batch)[:, 11:][real], plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "bert", "vit"])
def test_distillation_learns_the_base(family: str) -> None:
    adapter, batch = beside(family, ",distill=0.5"), inputs(family, dtype=torch.float64)
    with torch.no_grad(), adapter.disabled():
        plain = output(adapter.model, batch)
    adapter.model.train()
    adapter.progress(0.1)
    torch.testing.assert_close(output(adapter.model, batch), plain, rtol=0, atol=1e-9)
    adapter.extra_loss().backward()
    part: Any = adapter._entry.parts["states"]
    assert all(weight.grad is not None for weight in part.network.parameters()) and part.alpha.grad is None
    adapter.progress(0.6)
    assert not torch.allclose(output(adapter.model, batch), plain)


@pytest.mark.parametrize("how", ["sum", "product"])
@torch.no_grad()
def test_the_other_fusions(how: str) -> None:
    adapter, batch = beside("gpt2", f",fuse={how}"), inputs("gpt2")
    w, small, plain = adapter.state_dict(), alone(adapter, "gpt2"), tiny("gpt2", torch.float64)
    side = small(**batch).last_hidden_state @ w["states.network.up.weight"].T + w["states.network.up.bias"]
    last = plain.base_model(**batch).last_hidden_state
    expected = plain.lm_head(last + side if how == "sum" else last * side)
    torch.testing.assert_close(output(adapter.model, batch), expected, rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("family", families(ALL))
@torch.no_grad()
def test_a_folder_needs_the_small_models_source_no_more(family: str, tmp_path: Path) -> None:
    small = shutil.copytree(small_model(family), tmp_path / "small")
    adapter, batch = beside(family, small=str(small)), inputs(family, dtype=torch.float64)
    expected = output(adapter.model, batch)
    adapter.save(tmp_path / "adapter")
    shutil.rmtree(small)
    fresh = tiny(family, torch.float64)
    loaded = tt.load(fresh, tmp_path / "adapter")
    torch.testing.assert_close(output(fresh, batch), expected, rtol=0, atol=1e-9)
    loaded.save(tmp_path / "again")
    first, second = (json.loads((tmp_path / name / CONFIG).read_text()) for name in ("adapter", "again"))
    assert first.pop("checksum") and second.pop("checksum")  # of files whose headers may be in another order
    assert first == second and first["small_model"]["path"] == first["method"]["model"] == str(small)
    assert len(first["small_model"]["fingerprint"]) == 32 and first["base"]["fingerprint"]


def test_a_broken_description_is_one_sentence_and_nothing_is_attached(tmp_path: Path) -> None:
    beside("bert", dtype=torch.float32).save(tmp_path)
    good = json.loads((tmp_path / CONFIG).read_text())
    for damage, message in (
        ({"config": {}}, "configuration is broken"),
        ({"config": None}, "configuration is broken"),
        ({"config": {**good["small_model"]["config"], "model_type": "nonsense"}}, "configuration is broken"),
        ({"config": {**good["small_model"]["config"], "hidden_size": 24}}, "do not fit the adapter"),
        ({"config": {**good["small_model"]["config"], "intermediate_size": 10**9}}, "far more numbers"),
    ):
        changed = {**good, "small_model": {**good["small_model"], **damage}}
        (tmp_path / CONFIG).write_text(json.dumps(changed))
        model = tiny("bert")
        with pytest.raises(tt.UserError, match=message):
            tt.load(model, tmp_path)
        assert not hasattr(model, "trimtab")


# ---------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("base", "small", "message"),
    [
        ("llama", "bert", "is an encoder and the base a causal language model"),
        ("bert", "gpt2", "is a causal language model and the base an encoder"),
        ("bert", "vit", "is a vision model and the base an encoder"),
        ("t5", "bert", "this is an encoder-decoder"),
    ],
)
def test_another_kind_of_model(base: str, small: str, message: str) -> None:
    model = tiny(base)
    with pytest.raises(tt.UserError, match=message):
        tt.attach(model, f"side[model={small_model(small)}]")
    assert not hasattr(model, "trimtab")


def test_a_small_encoder_decoder(tmp_path: Path) -> None:
    tf.T5Model(tiny("t5").config).save_pretrained(tmp_path)
    with pytest.raises(tt.UserError, match="is an encoder-decoder; model= takes"):
        tt.attach(tiny("bert"), f"side[model={tmp_path}]")


def test_a_small_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(tt.UserError, match="does not exist"):
        tt.attach(tiny("bert"), f"side[model={tmp_path / 'nothing'}]")


def test_pictures_that_are_cut_in_another_way() -> None:
    with pytest.raises(tt.UserError, match="patch_size=2 and the base 4"):
        tt.attach(tiny("vit"), f"side[model={small_model('vit', patch_size=2)}]")


def test_vocabularies(tmp_path: Path) -> None:
    """By their sizes without a tokenizer; with one token by token, so that a padded table is no hindrance."""
    with pytest.raises(tt.UserError, match="has a vocabulary of 70 tokens and the base one of 64"):
        tt.attach(tiny("bert"), f"side[model={small_model('bert', vocab_size=70)}]")
    source = saved_encoder(tmp_path / "small")
    model = tf.AutoModelForSequenceClassification.from_pretrained(saved_encoder(tmp_path / "base"))
    model.resize_token_embeddings(model.config.vocab_size + 6)
    with pytest.raises(tt.UserError, match="has a vocabulary of"):
        tt.attach(model, f"side[model={source}]")
    own = wordpiece()
    adapter = tt.attach(model, f"side[model={source}]", tokenizer=own)
    adapter.save(tmp_path / "adapter")
    adapter.detach()
    tt.load(model, tmp_path / "adapter").detach()
    other = tf.PreTrainedTokenizerFast.from_pretrained(source)
    other.add_tokens(["trimtab"])
    with pytest.raises(tt.UserError, match=r"1 of the base's .* tokens have another id"):
        tt.attach(model, f"side[model={source}]", tokenizer=other)


def test_settings_of_other_networks() -> None:
    for field in ("network=mlp", "layers=0", "reduction=2", "start=random"):
        with pytest.raises(tt.UserError, match=f"side: {field.partition('=')[0]}= means nothing with model="):
            tt.attach(tiny("bert"), f"side[model={small_model('bert')},{field}]")


@pytest.mark.parametrize("family", ["gpt2", "roberta", "opt"])
@torch.no_grad()
def test_texts_longer_than_the_small_model_reads(family: str) -> None:
    limit = 8 + (1 if family == "roberta" else 0)  # roberta's table has the padding's position in front
    adapter = beside(family, small=small_model(family, max_position_embeddings=limit))
    output(adapter.model, inputs(family, length=8))
    with pytest.raises(tt.UserError, match="reads at most 8 tokens, and a text has 9"):
        output(adapter.model, inputs(family, length=9))


def test_embeddings_in_place_of_ids() -> None:
    adapter = beside("gpt2")
    with pytest.raises(tt.UserError, match="give input_ids"):
        adapter.model(inputs_embeds=torch.zeros(1, 3, 32, dtype=torch.float64))


# ---------------------------------------------------------------------------------------------------- other calls


@pytest.mark.parametrize("method", ["side[reduction=2]", "ladder[reduction=2]", "side[model={small}]"])
@pytest.mark.parametrize(
    "family", families(("llama", "mistral", "phi3", "bert", "distilbert", "vit", "clip_vision_model"))
)
@torch.no_grad()
def test_hidden_states_are_the_bases_and_the_last_is_what_leaves(method: str, family: str) -> None:
    """Of a bare model: what transformers records has none of the layers beside the base among it."""
    batch, asked = inputs(family), {"output_hidden_states": True, "output_attentions": family == "distilbert"}
    plain, bare = (_bare(family)(**batch, **asked), _bare(family))
    tt.attach(bare, method.format(small=small_model(family)))  # before it is first asked: then its layers get hooks
    found = bare(**batch, **asked)
    assert len(found.hidden_states) == len(plain.hidden_states)
    assert len(found.attentions or ()) == len(plain.attentions or ())
    for one, other in zip(found.hidden_states[:-1], plain.hidden_states[:-1], strict=True):
        assert torch.equal(one, other)
    assert not torch.allclose(found.last_hidden_state, plain.last_hidden_state)
    assert torch.equal(found.last_hidden_state, bare(**batch).last_hidden_state)
    ends = (found.last_hidden_state, plain.hidden_states[-1])  # vision models give the last layer's, before the norm
    assert any(torch.equal(found.hidden_states[-1], one) for one in ends)


def _bare(family: str) -> Any:
    model: Any = tiny(family)
    model = model if family == "clip_vision_model" else model.base_model
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_layers_beside_a_base_under_another_attention(attention: str) -> None:
    """Refused when attached and when it is set afterwards; a small model has an attention of its own."""
    for method in ("side[reduction=2]", "ladder[reduction=2]"):
        model = tiny("llama")
        tt.attach(model, method)
        model.config._attn_implementation = attention
        with pytest.raises(tt.UserError, match=f"{attention} does not take them"):
            tt.adapters(model)["default"]._entry.parts["states"].get_submodule(_blocks(method)).begin()
        other = tiny("llama")
        other.config._attn_implementation = attention
        with pytest.raises(tt.UserError, match=f"{attention} does not take them"):
            tt.attach(other, method)
    model = tiny("llama")
    model.config._attn_implementation = attention
    part: Any = tt.attach(model, f"side[model={small_model('llama')}]")._entry.parts["states"]
    assert part.network.body.config._attn_implementation == "sdpa"


def _blocks(method: str) -> str:
    return "network.side" if method.startswith("side") else "side"

"""Prefix tuning against keys and values put in front by hand, in float64; its network, its start, its limits; peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5EncoderModel

import trimtab as tt
from prefix_by_hand import FAMILIES, SETS, D, P, attached, by_hand, positions, reference, rows, sets
from reference import PREFIXES
from tiny import CAUSAL, inputs, output, tiny
from trimtab.lengths import fitting_length, virtual_tokens
from trimtab.methods import LlamaAdapter, LoRA, Prefix, Prompt, PTuningV2, Union
from trimtab.relative import FrontBias
from trimtab.sites import Sites


@pytest.fixture(autouse=True)
def _clean() -> Any:
    yield
    PREFIXES.clear()


FORMS = [f"prefix[length={P},form=flat]", f"prefix[length={P},hidden=6]"]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", FORMS)
def test_equals_concatenation(method: str, family: str, side: str) -> None:
    """Each stack's self-attention and the cross-attention have keys and values of their own; gradients agree."""
    model, adapter = attached(family, method)
    assert len(by_hand(adapter, next(iter(sets(family))))[0][0]) == (2 if family == "llama" else 4)
    batch, real = rows(family, side)
    expected = reference(family, adapter)(**batch, **positions(family, real)).logits
    found = model(**batch).logits
    base = tiny(family, torch.float64)(**batch).logits
    if family in CAUSAL:
        found, expected, base = found[real], expected[real], base[real]
    assert torch.allclose(found, expected, rtol=0, atol=1e-9)
    assert (found - base).abs().max() > 1e-2
    trained = [parameter for name, parameter in adapter.named_parameters() if not name.startswith("head_")]
    given = torch.autograd.grad(found.pow(2).mean(), trained)
    wanted = torch.autograd.grad(expected.pow(2).mean(), trained)
    for a, b in zip(given, wanted, strict=True):
        assert b.any() and torch.allclose(a, b, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_the_network_folds_into_what_it_made(family: str, tmp_path: Path) -> None:
    """Same outputs before and after; the file holds keys and values only, of 2 · length · Σ key widths numbers."""
    model, adapter = attached(family, FORMS[1])
    batch, _ = rows(family)
    with torch.no_grad():
        before = output(model, batch)
        made = {key: by_hand(adapter, key) for key in sets(family)}
        adapter.save(tmp_path)
        adapter.fold()
        assert torch.allclose(output(model, batch), before, rtol=0, atol=1e-12)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys() if not name.startswith("head_")}  # noqa: SIM118
    names = {key.format(layer) for key in sets(family) for layer in range(3)}
    assert set(stored) == {f"{name}.{what}" for name in names for what in ("keys", "values")}
    for key, layers in made.items():
        for layer, (keys, values) in enumerate(layers):
            assert torch.allclose(stored[f"{key.format(layer)}.keys"], keys, atol=1e-12)
            assert torch.allclose(stored[f"{key.format(layer)}.values"], values, atol=1e-12)
    assert adapter.method.form == "flat"
    widths = {"bert": 3 * 32, "llama": 3 * 16, "t5": 9 * 32}[family]
    assert sum(tensor.numel() for tensor in stored.values()) == 2 * P * widths


@pytest.mark.parametrize(("family", "networks"), [("llama", 1), ("bert", 1), ("t5", 3)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_network_runs_once_a_step(family: str, networks: int, checkpointing: bool) -> None:
    """For all rows, layers and recomputed layers together, each set its own; on `length` vectors."""
    model, adapter = attached(family, FORMS[1], torch.float32)
    shapes: list[torch.Size] = []
    generators = [part.generator for part in adapter._entry.parts.values() if type(part).__name__ == "Leader"]
    for generator in generators:
        generator.last.register_forward_hook(lambda module, args, out: shapes.append(args[0].shape))
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    model(**{key: value for key, value in inputs(family, batch=5).items()}).logits.pow(2).mean().backward()
    assert len(generators) == networks and shapes == [torch.Size([P, 6])] * networks
    assert all(parameter.grad.any() for generator in generators for parameter in generator.parameters())


def test_dropout_acts_in_training_alone() -> None:
    model, adapter = attached("llama", f"prefix[length={P},hidden=6,dropout=0.25]")
    batch = inputs("llama", dtype=torch.float64)
    plain = by_hand(adapter, "layer{}_self")
    assert torch.equal(output(model, batch), output(model, batch))
    part = adapter._entry.parts["layer1_self"]
    assert torch.allclose(part.prefix()[0], plain[1][0])
    model.train()
    assert not torch.equal(output(model, batch), output(model, batch))
    drawn = torch.stack([torch.stack(part.prefix()) for _ in range(200)])
    kept = drawn != 0
    assert 0.72 < kept.double().mean() < 0.78
    wanted = torch.stack(plain[1]).expand_as(drawn) / 0.75
    assert torch.allclose(drawn[kept], wanted[kept])
    adapter.fold()
    model.train()
    assert not torch.equal(output(model, batch), output(model, batch)), "training goes on as before when folded"


@pytest.mark.parametrize("form", ["form=flat", "hidden=6"])
def test_dropout_under_checkpointing(form: str) -> None:
    """A layer that is run again sees the draw of its own forward, though another forward came in between."""
    gradients = []
    for checkpointing in (False, True):
        model, adapter = attached("llama", f"prefix[length={P},{form},dropout=0.5]")
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        batch = inputs("llama", dtype=torch.float64)
        torch.manual_seed(1)
        (output(model, batch).pow(2).mean() + 2 * output(model, batch).pow(2).mean()).backward()
        gradients.append([parameter.grad for parameter in adapter.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-10)


class Words:
    """A tokenizer of letters."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) - 90 for letter in text]}


TEXT, IDS = "abcab", [7, 8, 9, 7, 8]


@pytest.mark.parametrize("options", ["form=flat", "hidden=8"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3", "gpt2", "gpt_neox", "opt"])
def test_starts_from_a_text_as_if_it_stood_there(family: str, options: str) -> None:
    """A prefix that starts from the text T gives for X what the frozen base gives for [T ; X], the network included."""
    model, base = tiny(family, torch.float64), tiny(family, torch.float64)
    torch.manual_seed(8)
    tt.attach(model, f"prefix[length=5,text=abc,{options}]", tokenizer=Words())
    batch, real = rows(family, "left")
    found = model(**batch).logits
    for row in range(3):
        ids = batch["input_ids"][row][real[row]]
        expected = base(input_ids=torch.cat([torch.tensor(IDS), ids])[None]).logits[0, 5:]
        assert torch.allclose(found[row][real[row]], expected, rtol=0, atol=1e-4)
        alone = base(input_ids=ids[None]).logits[0]
        assert (expected - alone).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["bert", "t5", "bart"])
def test_starts_from_what_the_base_computes_for_a_text(family: str) -> None:
    """Where [T ; X] is no test, because T sees X: the outputs of the base's own key and value projections on T.

    A decoder reads T as well, and attends to what the encoder makes of it.
    """
    base, model, seen = tiny(family), tiny(family), {}
    for path in sets(family).values():
        for layer in range(3):
            attention = base.get_submodule(path.format(layer))
            for module in (getattr(attention, n) for n in dir(attention) if n in ("k", "v", "key", "value")):
                module.register_forward_hook(lambda m, args, out: seen.update({id(m): out[0]}))
            for name in ("k_proj", "v_proj"):
                if hasattr(attention, name):
                    getattr(attention, name).register_forward_hook(lambda m, args, out: seen.update({id(m): out[0]}))
    ids = torch.tensor([IDS])
    with torch.no_grad():
        base(input_ids=ids) if family == "bert" else base(input_ids=ids, decoder_input_ids=ids)
    adapter = tt.attach(model, "prefix[length=5,form=flat,text=abc]", tokenizer=Words())
    names = next(pair for pair in (("k", "v"), ("k_proj", "v_proj"), ("key", "value")) if _has(base, family, pair[0]))
    for key, path in sets(family).items():
        for layer, pair in enumerate(by_hand(adapter, key)):
            attention = base.get_submodule(path.format(layer))
            for found, name in zip(pair, names, strict=True):
                expected = seen[id(getattr(attention, name))].view(5, 4, D).transpose(0, 1)
                assert torch.allclose(found, expected, atol=1e-6)


def test_a_rotary_encoder_starts_in_front_of_the_text() -> None:
    """ModernBERT's keys of the first layer stand at the positions -5 to -1, rotated by hand."""
    base = tiny("modernbert").model
    adapter = tt.attach(tiny("modernbert"), "prefix[length=5,form=flat,text=abc]", tokenizer=Words())
    layer, seen = base.layers[0], []
    layer.attn.Wqkv.register_forward_hook(lambda module, args, out: seen.append(out))
    base(input_ids=torch.tensor([IDS]))
    keys = seen[0][0, :, 32:64].view(5, 4, D).transpose(0, 1)
    places = torch.arange(-5, 0)[None]
    cos, sin = base.rotary_emb(keys, places, base.config.layer_types[0])  # [1, 5, D]
    expected = keys * cos + torch.cat([-keys[..., D // 2 :], keys[..., : D // 2]], dim=-1) * sin
    assert torch.allclose(by_hand(adapter, "layer{}_self")[0][0], expected, atol=1e-6)


def _has(base: Any, family: str, name: str) -> bool:
    return hasattr(base.get_submodule(next(iter(sets(family).values())).format(0)), name)


def test_starts_from_sampled_tokens() -> None:
    """Values of the first layer, which are not rotated: each is what some token of the vocabulary gives."""
    model, base = tiny("llama"), tiny("llama")
    torch.manual_seed(0)
    adapter = tt.attach(model, "prefix[length=6,form=flat]")
    layer = base.model.layers[0]
    table = layer.self_attn.v_proj(layer.input_layernorm(base.model.embed_tokens.weight))  # [vocabulary, 16]
    rows = dict(adapter.named_parameters())["layer0_self.values"].transpose(0, 1).flatten(1)
    assert all((table - row).abs().amax(1).min() < 1e-6 for row in rows)
    assert len({int((table - row).abs().amax(1).argmin()) for row in rows}) > 1


@pytest.mark.parametrize(("length", "hidden"), [(5, 64), (9, 4)])
def test_the_network_starts_at_the_texts_keys_and_values(length: int, hidden: int) -> None:
    text = "abcdefghi"[:length]
    torch.manual_seed(9)
    wanted = tt.attach(tiny("llama"), f"prefix[length={length},form=flat,text={text}]", tokenizer=Words())
    made = tt.attach(tiny("llama"), f"prefix[length={length},hidden={hidden},text={text}]", tokenizer=Words())
    for pair in zip(by_hand(wanted, "layer{}_self"), by_hand(made, "layer{}_self"), strict=True):
        for one, other in zip(*pair, strict=True):
            assert torch.equal(one, other)


def test_encoder_cross_and_layers_choose() -> None:
    def keys(method: str) -> set[str]:
        adapter = tt.attach(tiny("t5"), method)
        return {name.partition(".")[0] for name, _ in adapter.named_parameters()}

    names = {key.format(layer) for key in SETS["t5"] for layer in range(3)}
    flat = "prefix[length=2,form=flat"
    assert keys(f"{flat}]") == names
    assert keys(f"{flat},encoder=false]") == {name for name in names if "encoder" not in name}
    assert keys(f"{flat},cross=false]") == {name for name in names if "cross" not in name}
    assert keys(f"{flat},layers=-1:]") == {name for name in names if "2" in name}
    assert keys("prefix[length=2,hidden=4,layers=1:]") == {key.format(1) for key in SETS["t5"]}, "the leaders own it"


@pytest.mark.parametrize("family", ["gpt2", "bert", "roberta"])
def test_the_text_moves_once_whatever_layers_are_chosen(family: str) -> None:
    """A prefix in the upper layers alone moves the text's positions by its length, as one in all layers."""
    moved = []
    for layers in ("0:", "2"):
        model = tiny(family)
        tt.attach(model, f"prefix[length={P},form=flat,layers={layers}]")
        table = next(m for n, m in model.named_modules() if n.endswith(("wpe", "position_embeddings")))
        table.register_forward_pre_hook(lambda module, args: moved.append(args[0].clone()))
        output(model, inputs(family, length=7))
    assert torch.equal(moved[0], moved[1]) and moved[0].min() == P + (family == "roberta")


@pytest.mark.parametrize(
    ("family", "method", "taken"),
    [
        ("bert", Prefix(length=16), 16),
        ("roberta", PTuningV2(length=16), 16),
        ("gpt2", Union((Prefix(length=10), Prompt(length=6), LoRA(r=2))), 16),
        ("bart", Prefix(length=16), 0),
        ("llama", Prefix(length=16), 0),
        ("modernbert", Prefix(length=16), 0),
        ("vit", Prefix(length=16), 0),
        ("bert", LlamaAdapter(length=16), 0),
    ],
)
def test_positions_left_for_the_text(family: str, method: Any, taken: int) -> None:
    """On BERT with 64 positions a prefix of 16 leaves 48, and a text of 48 tokens runs."""
    model = tiny(family)
    assert virtual_tokens(method, model.config) == taken
    if taken:
        longest = fitting_length(method, model.config, None)
        assert longest == (63 if family == "roberta" else 64) - 16
        tt.attach(model, method)
        with torch.no_grad():
            output(model, inputs(family, batch=1, length=longest))
        with pytest.raises(tt.UserError, match=f"virtual tokens take 16; allowed is at most {longest}"):
            fitting_length(method, model.config, longest + 1)


@pytest.mark.parametrize(
    ("family", "method", "sentence"),
    [
        ("bloom", "prefix", "prefix does not work on bloom; methods that do: .*lora.*prompt"),
        ("bloom", "p-tuning-v2", "does not work on bloom"),
        ("bloom", "llama-adapter", "does not work on bloom"),
        ("bert", "prefix[length=65]", "64 positions, too few to read 65 tokens"),
        ("roberta", "prefix[length=64,form=flat]", "63 positions, too few to read 64 tokens"),
        ("bart", "prefix[length=65]", "64 positions"),
        ("llama", "prefix[length=0]", "length=0"),
        ("llama", "prefix[hidden=0]", "hidden=0"),
        ("llama", "prefix[dropout=1]", "dropout=1"),
        ("llama", "prefix[text=abc]", "needs a tokenizer"),
        ("llama", "prefix[init=text]", "needs text="),
        ("llama", "prefix[text=abc,init=random]", "init=random"),
        ("llama", "prefix[layers=3]", "layers 0 to 2"),
        ("llama", "prefix[form=deep]", "deep"),
        ("vit", "prefix[text=abc]", "reads no text"),
        ("llama", "llama-adapter[length=0]", "length=0"),
        ("llama", "llama-adapter-v2[length=-1]", "length=-1"),
        ("llama", "llama-adapter-v2[length=0,layers=1:]", "length=0 has no prompts"),
        ("llama", "llama-adapter[layers=3]", "layers 0 to 2"),
        ("llama", "llama-adapter[attention=joint,gates=layer]", "attention=joint has no gates"),
        ("llama", "p-tuning-v2[length=0]", "length=0"),
    ],
)
def test_mistakes(family: str, method: str, sentence: str) -> None:
    model = tiny(family)
    with pytest.raises(tt.UserError, match=sentence):
        tt.attach(model, method)
    assert not hasattr(model, "trimtab") and all(p.requires_grad for p in model.parameters())
    assert not any(hasattr(module, "trimtab_slot") for module in model.modules())


def test_more_virtual_tokens_than_positions_is_one_sentence() -> None:
    config = tiny("bert").config
    for method in (Prefix(length=64), PTuningV2(length=100), Union((Prefix(length=40), Prompt(length=30)))):
        with pytest.raises(tt.UserError, match=r"64 positions and the method's virtual tokens take .* leaves none"):
            fitting_length(method, config, None)


def test_nothing_is_left_without_the_encoder() -> None:
    shape = {"vocab_size": 16, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    with pytest.raises(tt.UserError, match="encoder=false leaves nothing"):
        tt.attach(T5EncoderModel(T5Config(**shape)), "prefix[encoder=false]")


def test_counts_are_the_papers() -> None:
    """GPT-2 medium: 2 · P · L · d deployed; in training the network's 25.7 million."""
    with torch.device("meta"):
        sites = Sites(GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16)))
    assert Prefix(length=5).folded().parameter_count(sites) == 245_760
    assert Prefix(length=10, form="flat").parameter_count(sites) == 491_520
    network = 5 * 1024 + (1024 + 1) * 512 + (512 + 1) * 24 * 2 * 1024
    assert Prefix(length=5).parameter_count(sites) == network == 25_744_896


def _rotated_back(model: Any, keys: torch.Tensor) -> torch.Tensor:
    """keys [kv heads, P, D] turned by the angle of position -P, with the model's own rotary table."""
    cos, sin = model.model.rotary_emb(keys, position_ids=torch.tensor([[-P]]))  # [1, 1, D]
    half = torch.cat([-keys[..., D // 2 :], keys[..., : D // 2]], dim=-1)
    return keys * cos + half * sin


def _from_peft(model: Any, adapter: Any, embeddings: torch.Tensor) -> None:
    """Import peft's `prompt_embeddings` [P, 2 · L · key width].

    peft counts the text's positions from P on and leaves the prefix' keys as they are; ours leave a rotary model's text
    where it is. A score depends on the difference of the angles, so the keys are turned back by P.
    """
    parts = dict(adapter.named_parameters())
    whole = embeddings.view(P, 3, 2, -1, D)
    for layer in range(3):
        keys, values = whole[:, layer, 0].transpose(0, 1), whole[:, layer, 1].transpose(0, 1)
        if hasattr(model.base_model, "rotary_emb"):
            keys = _rotated_back(model, keys)
        parts[f"layer{layer}_self.keys"].data.copy_(keys)
        parts[f"layer{layer}_self.values"].data.copy_(values)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "bert", "roberta"])
def test_equals_peft(family: str) -> None:
    """peft's flat prefix, imported, gives peft's outputs: as prefix tuning and as P-tuning v2."""
    peft = pytest.importorskip("peft")
    task = "CAUSAL_LM" if family in CAUSAL else "SEQ_CLS"
    torch.manual_seed(10)
    other = peft.get_peft_model(tiny(family), peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=P)).eval()
    embeddings = other.get_prompt_embedding_to_save("default")
    batch = inputs(family)
    expected = other(**batch).logits
    for method in (FORMS[0], f"p-tuning-v2[length={P}]"):
        model = tiny(family)
        _from_peft(model, tt.attach(model, method), embeddings)
        assert torch.allclose(model(**batch).logits, expected, rtol=0, atol=1e-5)
    assert (expected - output(tiny(family), batch)).abs().max() > 1e-2


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_relative_positions_of_a_prefix_are_those_of_tokens_in_front(stack: str) -> None:
    """Against T5's own table for P + n tokens, whose text among itself is as far apart as without them."""
    sites = Sites(tiny("t5"))
    site = next(one for one in sites.kv if one.stack == stack and not one.cross and one.layer == 1)
    first = next(one for one in sites.kv if one.stack == stack and not one.cross and one.layer == 0).module
    bias, whole = FrontBias(site), first.compute_bias(P + 7, P + 7)
    text = first.compute_bias(7, 7)
    assert torch.equal(whole[:, :, P:, P:], text)
    assert torch.equal(bias.columns(P, text), whole[:, :, P:, :P])
    step = first.compute_bias(1, 7, past_seen_tokens=6)
    bias.seen = 6
    assert torch.equal(bias.columns(P, step), first.compute_bias(1, P + 7, past_seen_tokens=P + 6)[..., :P])


@pytest.mark.parametrize("method", ["prefix[length=4,relative=true]", "prefix[length=4,relative=true,hidden=6]"])
def test_relative_prefixes_of_t5(method: str, tmp_path: Path) -> None:
    """They matter, are the same folded and loaded again, and steps with a cache (dynamic, static) give the whole."""
    torch.manual_seed(0)
    model, batch = tiny("t5"), inputs("t5")
    adapter = tt.attach(model, method)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        expected = output(model, batch)
        adapter.save(tmp_path)
        plain = tiny("t5")
        other = tt.attach(plain, "prefix[length=4,form=flat,init=random]")
        other.load_state_dict(tt.load(tiny("t5"), tmp_path).state_dict())
        assert not torch.allclose(output(plain, batch), expected, atol=1e-4)
        again = tiny("t5")
        tt.load(again, tmp_path)
        assert torch.allclose(output(again, batch), expected, atol=1e-6)
        made = {
            name: again.generate(batch["input_ids"], max_new_tokens=6, do_sample=False, **options).tolist()
            for name, options in (
                ("none", {"use_cache": False}),
                ("dynamic", {}),
                ("static", {"cache_implementation": "static"}),
            )
        }
    assert made["none"] == made["dynamic"] == made["static"]
    adapter.detach()
    with torch.no_grad():
        assert torch.equal(output(model, batch), output(tiny("t5"), batch))


def test_relative_prefixes_are_for_t5() -> None:
    with pytest.raises(tt.UserError, match="relative=true is for T5"):
        tt.attach(tiny("bart"), "prefix[relative=true]")

"""Several adapters on one model, switching, errors, and how an attached model behaves as an ordinary one."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, pipeline

import trimtab as tt
from tiny import FAMILIES, attached, inputs, output, tiny
from trimtab.adapter import Attachments

THREE = ("prompt[length=3]", "lora[r=2]", "lora[r=3,targets=o,down]")


def _noisy(adapter: tt.Adapter) -> tt.Adapter:
    for parameter in adapter.parameters():
        parameter.data.normal_()
    return adapter


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_any_order_of_adding_and_removing(family: str, order: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, batch = tiny(family), inputs(family)
    pristine = copy.deepcopy(model)
    alone = []
    for number, method in enumerate(THREE):
        adapter = _noisy(tt.attach(model, method, f"a{number}"))
        with torch.no_grad():
            alone.append(output(model, batch))
        assert [other.active for other in tt.adapters(model).values()] == [False] * number + [True]
        assert all(parameter.requires_grad for parameter in adapter.parameters())
    for number in range(3):
        tt.adapters(model)[f"a{number}"].activate()
        with torch.no_grad():
            assert torch.allclose(output(model, batch), alone[number], atol=1e-6)
    for removed in order:
        tt.adapters(model)[f"a{removed}"].detach()
        for number, adapter in tt.adapters(model).items():
            adapter.activate()
            with torch.no_grad():
                assert torch.allclose(output(model, batch), alone[int(number[1])], atol=1e-6)
    for (name, found), expected in zip(model.state_dict().items(), pristine.state_dict().values(), strict=True):
        assert torch.equal(found, expected), name
    with torch.no_grad():
        assert torch.equal(output(model, batch), output(pristine, batch))


def test_disabled_is_the_frozen_model_and_nests() -> None:
    model, batch = tiny("llama"), inputs("llama")
    base = output(model, batch)
    adapter = _noisy(tt.attach(model, "prompt[length=3]"))
    changed = output(model, batch)
    with adapter.disabled():
        assert torch.equal(output(model, batch), base)
        with adapter.disabled():
            assert torch.equal(output(model, batch), base)
        assert torch.equal(output(model, batch), base)
    assert torch.equal(output(model, batch), changed)
    with pytest.raises(RuntimeError, match="inside"), adapter.disabled():
        raise RuntimeError("inside")
    assert torch.equal(output(model, batch), changed)


def test_two_models_of_one_config_do_not_share_attention() -> None:
    first = tiny("llama")
    second = LlamaForCausalLM(first.config)
    assert first.config is second.config
    tt.attach(first, "prompt[length=3]")
    assert second.config._attn_implementation == "sdpa"
    output(second, inputs("llama"))


@pytest.mark.parametrize("family", FAMILIES)
def test_base_dropout_is_zero_while_attached(family: str) -> None:
    model = tiny(family).train()
    adapter = tt.attach(model, "lora[r=2,targets=q]")
    batch = inputs(family)
    assert torch.equal(output(model, batch), output(model, batch))
    adapter.detach()


def test_functional_dropout_comes_back() -> None:
    model = tiny("opt")
    model.model.decoder.layerdrop = 0.25
    adapter = tt.attach(model, "lora[r=2]")
    assert model.model.decoder.layerdrop == 0.0 and model.model.decoder.dropout == 0.0
    adapter.detach()
    assert model.model.decoder.layerdrop == 0.25 and model.model.decoder.dropout == 0.1


def test_requires_grad_is_restored_as_it_was() -> None:
    model = tiny("llama")
    model.lm_head.weight.requires_grad_(False)
    adapter = tt.attach(model, "lora[r=2]")
    assert not any(p.requires_grad for name, p in model.named_parameters() if not name.startswith("trimtab"))
    adapter.detach()
    assert not model.lm_head.weight.requires_grad and model.model.embed_tokens.weight.requires_grad


def test_head_is_the_adapters_own() -> None:
    model, batch = tiny("bert"), inputs("bert")
    before = copy.deepcopy(model.classifier.state_dict())
    first = _noisy(tt.attach(model, "lora[r=2]", "first"))
    expected = output(model, batch)
    _noisy(tt.attach(model, "lora[r=2]", "second"))
    assert not torch.equal(output(model, batch), expected)
    first.activate()
    assert torch.equal(output(model, batch), expected)
    assert all(torch.equal(value, before[key]) for key, value in model.classifier.state_dict().items())


def test_merge_writes_the_head_too() -> None:
    model, batch = tiny("bert"), inputs("bert")
    adapter = _noisy(tt.attach(model, "lora[r=2]"))
    expected = output(model, batch)
    merged = adapter.merge()
    assert merged is model and torch.allclose(output(model, batch), expected, atol=1e-5)


def test_merging_a_tied_head_leaves_the_embeddings() -> None:
    model = tiny("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    embeddings = model.transformer.wte.weight.detach().clone()
    adapter = _noisy(tt.attach(model, "head"))
    expected = output(model, inputs("gpt2"))
    adapter.merge()
    assert torch.equal(model.transformer.wte.weight, embeddings)
    assert torch.allclose(output(model, inputs("gpt2")), expected, atol=1e-6)


def test_generate_and_pipeline_work_with_an_attached_prompt() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(61))])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", bos_token="<s>")
    model = tiny("llama")
    plain = pipeline("text-generation", model=model, tokenizer=tokenizer)
    before = plain("w1 w2 w3", max_new_tokens=8, do_sample=False)[0]["generated_text"]
    _noisy(tt.attach(model, "prompt[length=3]"))
    after = plain("w1 w2 w3", max_new_tokens=8, do_sample=False)[0]["generated_text"]
    assert after.startswith("w1 w2 w3") and after != before


def test_save_pretrained_writes_base_and_adapter_and_detach_gives_a_clean_base(tmp_path: Path) -> None:
    from safetensors import safe_open

    model = tiny("llama")
    keys = set(model.state_dict())
    adapter = tt.attach(model, "lora[r=2]")
    model.save_pretrained(tmp_path / "both")
    with safe_open(tmp_path / "both" / "model.safetensors", "pt") as file:
        written = set(file.keys())
    assert keys <= written and any(key.startswith("trimtab.") for key in written)
    adapter.detach()
    model.save_pretrained(tmp_path / "clean")
    clean = AutoModelForCausalLM.from_pretrained(tmp_path / "clean")
    assert torch.allclose(output(clean, inputs("llama")), output(model, inputs("llama")), atol=1e-6)


def test_to_moves_the_adapter() -> None:
    model = tiny("llama")
    adapter = tt.attach(model, "lora[r=2]")
    model.to(torch.bfloat16)
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.bfloat16}
    assert isinstance(model.trimtab, Attachments)


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "bert", "roberta", "distilbert", "modernbert", "t5", "vit", "clip"]
)
@pytest.mark.parametrize("method", ["head", "llama-adapter-v2"])
def test_a_base_in_half_precision(family: str, method: str) -> None:
    """Heads and adapters train in float32 on it; the outputs keep its precision and start where they were."""
    model, batch = tiny(family, torch.bfloat16), inputs(family, dtype=torch.bfloat16)
    with torch.no_grad():
        base = output(model, batch)
        adapter = tt.attach(model, method)
        started = output(model, batch)
    if family in ("llama", "gpt2", "bert", "vit"):  # the others' heads and norms round in between
        assert torch.allclose(started, base, rtol=0.01, atol=0.01)
    out = output(model, batch)
    out.float().pow(2).mean().backward()
    assert out.dtype == torch.bfloat16
    assert all(parameter.dtype == torch.float32 for parameter in adapter.parameters())
    assert any(parameter.grad.any() for parameter in adapter.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_full_is_plain_full_tuning(family: str) -> None:
    """The gradients of every parameter, and the losses of three steps, of the same model without trimtab."""
    model, plain, batch = tiny(family).train(), tiny(family).eval(), inputs(family)
    adapter = tt.attach(model, "full")
    assert {id(p) for p in adapter.parameters()} == {id(p) for p in model.parameters()}
    optimisers = [torch.optim.SGD(one.parameters(), lr=0.1) for one in (model, plain)]
    for _ in range(3):
        losses = [output(one, batch).pow(2).mean() for one in (model, plain)]
        assert torch.allclose(*losses, rtol=1e-6)
        for optimiser, loss in zip(optimisers, losses, strict=True):
            optimiser.zero_grad()
            loss.backward()
        for (name, found), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert (found.grad is None) == (expected.grad is None), name
            assert found.grad is None or torch.allclose(found.grad, expected.grad, atol=1e-6), name
        for optimiser in optimisers:
            optimiser.step()
    with pytest.raises(tt.UserError, match="default"):
        tt.attach(model, "full")


def test_full_refuses_company() -> None:
    model = tiny("llama")
    tt.attach(model, "lora[r=2]", "first")
    with pytest.raises(tt.UserError, match="detach the other adapters"):
        tt.attach(model, "full", "second")


def test_several_forwards_before_one_backward_under_checkpointing() -> None:
    """The recomputation of an earlier forward must not read what a later one left behind."""
    batches = [inputs("mistral", length=length, dtype=torch.float64) for length in (9, 6)]

    def gradient(checkpointing: bool) -> torch.Tensor:
        model = tiny("mistral", torch.float64).train()
        torch.manual_seed(1)
        if checkpointing:
            model.gradient_checkpointing_enable()
        adapter = _noisy(tt.attach(model, "prompt[length=4]"))
        sum(output(model, batch).pow(2).mean() for batch in batches).backward()  # type: ignore[union-attr]
        return next(adapter.parameters()).grad

    assert torch.allclose(gradient(True), gradient(False), atol=1e-9)


@pytest.mark.parametrize("name", ["a.b", "", "a b", "keys", "é"])
def test_names(name: str) -> None:
    with pytest.raises(tt.UserError, match="name"):
        tt.attach(tiny("llama"), "lora[r=2]", name)


def test_mistakes() -> None:
    model = tiny("llama")
    with pytest.raises(tt.UserError, match=r"'lora'"):
        tt.attach(model, "lore")
    with pytest.raises(tt.UserError, match="transformers model"):
        tt.attach(nn.Linear(2, 2), "lora")  # type: ignore[arg-type]
    with pytest.raises(tt.UserError, match="DataParallel"):
        tt.attach(nn.DataParallel(model), "lora")  # type: ignore[arg-type]
    adapter = tt.attach(model, "lora[r=2]")
    with pytest.raises(tt.UserError, match="attached already"):
        tt.attach(model, "lora[r=2]")
    adapter.detach()
    with pytest.raises(tt.UserError, match="nothing is attached"):
        adapter.activate()


def test_unknown_family_is_named() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(tt.UserError, match="mamba"):
        tt.attach(model, "lora")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_reentrant_checkpointing_is_refused() -> None:
    model = tiny("llama").train()
    tt.attach(model, "lora[r=2]")
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(tt.UserError, match="use_reentrant"):
        output(model, inputs("llama"))


def test_attention_chosen_after_attaching_is_refused() -> None:
    """Silently losing the virtual tokens would be worse."""
    model = tiny("llama")
    adapter = tt.attach(model, "prompt[length=3]")
    model.set_attn_implementation("eager")
    with pytest.raises(tt.UserError, match="eager"):
        output(model, inputs("llama"))
    adapter.detach()
    output(model, inputs("llama"))


def test_public_names() -> None:
    assert all(getattr(tt, method.__name__) is method for method in tt.METHODS.values())
    for name in tt.__all__:
        assert getattr(tt, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        tt.nonsense  # noqa: B018


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_is_reached_through_the_lowest_layers_of_the_decoder(family: str) -> None:
    """Nothing is trained in the decoder's first layers, but they attend to what is."""
    found = []
    for cut in (True, False):
        torch.manual_seed(0)
        adapter = attached(family, "lora[r=2,layers=1:]")
        if not cut:
            adapter._entry.uninstall()
            adapter._entry.cuts = []
            adapter._entry.install()
        output(adapter.model, inputs(family)).square().mean().backward()
        found.append([parameter.grad for parameter in adapter.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)

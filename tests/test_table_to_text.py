"""Texts with several references: what is learned and scored, the sides of a split, the search, loss per sentence."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from torch.nn import functional as F
from transformers import TrainerCallback, TrainingArguments

import trimtab as tt
import trimtab.tasks.generate as generate_task
from test_evaluate import naive_score, prompts, tokenizer
from test_evaluate import tiny as scored
from tiny import tiny
from trimtab.batches import Collator
from trimtab.beams import Search
from trimtab.errors import UserError
from trimtab.evaluate import evaluate, predict
from trimtab.run_data import split_rows
from trimtab.settings import TrainSettings
from trimtab.tasks import Generate, encode_all
from trimtab.trainer import Trainer

TASK = Generate("{table}\n", text_column="table", label_column="references")


def table(number: int) -> str:
    return " ".join(f"w{3 + (number * 7 + at) % 80}" for at in range(2 + number % 4))


def tables(count: int = 7) -> list[dict[str, Any]]:
    return [
        {"table": table(i), "references": [f"w{9 + i + j} w{40 + j} w{50 + i}"[: 6 + 3 * j] for j in range(1 + i % 3)]}
        for i in range(count)
    ]


def flat(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each reference, as in E2E's own files."""
    return [{"table": row["table"], "references": ref} for row in rows for ref in row["references"]]


def read(rows: list[dict[str, Any]], kind: str, **options: Any) -> list[Any]:
    names = tokenizer()
    if kind == "seq2seq":  # whose answers end as the tokenizer ends texts
        end = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
        names.backend_tokenizer.post_processor = end
    return encode_all(TASK, rows, names, 64, kind, **options)


# Rows


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_the_loss_of_an_evaluation_is_per_token_of_all_references(kind: str) -> None:
    """Σ −log p over all pairs of table and reference / their tokens, each pair alone."""
    model = scored(kind, sharpen=2.0).eval()
    pairs = read(tables(), kind, every_reference=True)
    assert len(pairs) == 1 + 2 + 3 + 1 + 2 + 3 + 1
    total, tokens = 0.0, 0
    for pair in pairs:
        answer = pair.input_ids[pair.prompt_length :] if kind == "causal" else pair.labels
        total -= naive_score(model, kind, pair.input_ids[: pair.prompt_length], answer)
        tokens += len(answer)
    once = read(tables(), kind)
    assert len(once) == 7
    for budget in (30, 2048):
        found = evaluate(model, tokenizer(), TASK, once, kind, batch_tokens=budget)
        assert found["loss"] == pytest.approx(total / tokens, abs=1e-4)
        assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))


def test_a_table_is_asked_once_with_the_references_of_all_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = scored("causal", sharpen=2.0).eval(), []
    generated = generate_task.generated

    def counted(run: Any, examples: Any, *rest: Any) -> list[str]:
        asked.append(len(examples))
        return generated(run, examples, *rest)

    monkeypatch.setattr(generate_task, "generated", counted)
    monkeypatch.setattr(
        generate_task, "text_metrics", lambda texts, references: {"seen": list(zip(texts, references, strict=True))}
    )
    one = evaluate(model, tokenizer(), TASK, read(tables(), "causal"), "causal")
    many = evaluate(model, tokenizer(), TASK, read(flat(tables()), "causal"), "causal")
    assert asked == [7, 7]
    assert one["seen"] == many["seen"]
    assert [references for _, references in one["seen"]] == [row["references"] for row in tables()]
    assert one["loss"] == pytest.approx(many["loss"], rel=1e-5)


def test_a_long_reference_cuts_the_table_as_in_training() -> None:
    rows = [{"table": " ".join(["w5"] * 40), "references": ["w9", " ".join(["w8"] * 30)]}]
    (once,) = read(rows, "causal")
    every = read(rows, "causal", every_reference=True)
    assert once.input_ids == every[0].input_ids
    assert once.others == [every[1].input_ids[every[1].prompt_length :]]
    assert max(len(pair.input_ids) for pair in every) == 64
    with pytest.raises(UserError, match=r"row 1: the answer takes \d+ tokens of at most 64"):
        read([{"table": "w3", "references": ["w9", " ".join(["w8"] * 70)]}], "causal")


@pytest.mark.parametrize("make", [tables, lambda count: flat(tables(count))], ids=["lists", "a row a reference"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_table_is_on_both_sides(make: Any, seed: int) -> None:
    from datasets import Dataset

    rows = make(40)
    settings = TrainSettings(model="m", data="d", output="o", task="generate", eval_share=0.3, seed=seed)
    train, held_out = split_rows(settings, TASK, Dataset.from_list(rows))
    known, asked = ({row["table"] for row in side} for side in (train, held_out))
    assert known and asked and not known & asked
    assert len(train) + len(held_out) == len(rows)


# The search


@torch.no_grad()
def best_of_all(model: Any, prompt: list[int], power: float) -> list[int]:
    """The best of every text of at most two tokens, where the end (2) may be the first: log p / length^power."""
    first = F.log_softmax(model(torch.tensor([prompt])).logits[0, -1].double(), -1)
    whole = torch.tensor([[*prompt, token] for token in range(97)])
    second = F.log_softmax(model(whole).logits[:, -1].double(), -1)
    scores = {(2,): float(first[2])}
    pairs = (first[:, None] + second) / 2**power
    scores |= {(a, b): float(pairs[a, b]) for a in range(97) for b in range(97) if a != 2}
    return list(max(scores, key=scores.__getitem__))


@pytest.mark.parametrize("power", [0.0, 1.0, 2.5])
def test_as_many_beams_as_tokens_find_the_best_text_of_all(power: float) -> None:
    model, names = scored("causal", sharpen=2.0).eval(), tokenizer()
    with torch.no_grad():
        model.lm_head.weight[2] *= 3  # texts that end early are among the best
    rows = [Example(prompt) for prompt in prompts(8)]
    search = Search(num_beams=97, length_penalty=power)
    texts = predict(model, names, Generate(), rows, "causal", max_new_tokens=2, search=search)
    best = [best_of_all(model, row.input_ids, power) for row in rows]
    assert texts == [names.decode(tokens, skip_special_tokens=True).strip() for tokens in best]
    lengths = {len(tokens) for tokens in best}
    assert lengths == {0.0: {1}, 1.0: {1, 2}, 2.5: {2}}[power]


class Example:
    def __init__(self, prompt: list[int]) -> None:
        self.input_ids, self.labels, self.prompt_length, self.target = prompt, [], len(prompt), []


METHODS = ("lora", "prompt[length=3]", "prefix[length=3,hidden=6]", "llama-adapter[length=3]", "p-tuning[length=3]")


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
@pytest.mark.parametrize("method", METHODS)
def test_beams_of_a_batch_with_an_adapter_are_those_of_single_rows_without_a_cache(method: str, kind: str) -> None:
    model, names = scored(kind, sharpen=2.0), tokenizer()
    rows = [Example(prompt) for prompt in prompts(6)]
    search = Search(num_beams=3, length_penalty=0.5, no_repeat_ngram_size=2)
    how: Any = {"max_new_tokens": 7, "search": search, "batch_tokens": 200}
    plain = predict(model, names, Generate(), rows, kind, **how)
    torch.manual_seed(3)
    adapter = tt.attach(model, method)
    for parameter in adapter.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    found = predict(model, names, Generate(), rows, kind, **how)
    assert found != plain
    model.eval()
    for row, text in zip(rows, found, strict=True):
        ids = torch.tensor([row.input_ids])
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), num_beams=3, length_penalty=0.5, no_repeat_ngram_size=2,
            max_new_tokens=7, do_sample=False, pad_token_id=0, use_cache=False,
        )[0]  # fmt: skip
        made = made[len(row.input_ids) :] if kind == "causal" else made[1:]
        assert text == names.decode(made, skip_special_tokens=True).strip()
    with adapter.disabled():
        assert predict(model, names, Generate(), rows, kind, **how) == plain


def test_no_ngram_is_repeated() -> None:
    model, names = scored("causal", sharpen=2.0), tokenizer()
    with torch.no_grad():
        model.lm_head.weight[5] *= 4
    rows = [Example([4, 4, 4])]
    (greedy,) = predict(model, names, Generate(), rows, "causal", max_new_tokens=8)
    (changed,) = predict(
        model, names, Generate(), rows, "causal", max_new_tokens=8, search=Search(no_repeat_ngram_size=1)
    )
    words = changed.replace("w", " w").split()
    assert len(set(words)) == len(words) == 8
    assert len(set(greedy.replace("w", " w").split())) < 8


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_beams": 0}, "num_beams must be at least 1, not 0"),
        ({"num_beams": 2, "length_penalty": math.inf}, "length_penalty must be a finite number, not inf"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size must be at least 0, not -1"),
        ({"length_penalty": 2.0}, "length_penalty=2 ranks beams: it needs num_beams of at least 2"),
    ],
)
def test_numbers_that_no_search_has(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Search(**values)


def test_a_single_beam_has_no_penalty() -> None:
    search = Search(num_beams=4, length_penalty=2.0, no_repeat_ngram_size=3)
    assert search.changed(num_beams=1) == Search(no_repeat_ngram_size=3)
    assert search.changed(no_repeat_ngram_size=0) == Search(4, 2.0)
    assert search.changed() == search


# Loss per sentence


ROWS = [
    {"input_ids": [5 + i, 9, 11 + i, *([7] * (i % 3)), 20, 21 + i][: 4 + i % 4], "from": 1 + i % 2} for i in range(13)
]


def examples() -> list[dict[str, Any]]:
    """Rows of different numbers of labels; one has none."""
    made = []
    for number, row in enumerate(ROWS):
        ids, start = row["input_ids"], len(row["input_ids"]) if number == 4 else row["from"]
        made.append({"input_ids": ids, "labels": [-100] * start + ids[start:]})
    return made


class Gradients(TrainerCallback):
    """Keeps the gradients of each optimizer step."""

    def __init__(self) -> None:
        self.kept: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        named = model.named_parameters()
        self.kept.append({name: weight.grad.clone() for name, weight in named if weight.grad is not None})


def steps_of(folder: Path, family: str, loss_per: str, **options: Any) -> tuple[Trainer, Gradients, list[list[Any]]]:
    """One epoch at rate 0: the trainer, the gradients of its steps, and the rows of each step's batches."""
    model = tiny(family)
    torch.manual_seed(1)
    tt.attach(model, "lora[r=2]")
    with torch.no_grad():
        for parameter in tt.adapters(model)["default"].parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    keeper, seen = Gradients(), []
    tokens = options.pop("batch_tokens", None)
    args = TrainingArguments(
        output_dir=str(folder), logging_steps=1, report_to="none", disable_tqdm=True, use_cpu=True, max_grad_norm=0.0,
        num_train_epochs=1, learning_rate=0.0, save_strategy="no", seed=3, **options,
    )  # fmt: skip
    made = Trainer(
        model, args, train_dataset=examples(), batch_tokens=tokens, loss_per=loss_per, callbacks=[keeper], show=False
    )
    collate = made.data_collator
    made.data_collator = lambda rows: (seen.append(rows), collate(rows))[1]
    made.train()
    size = args.gradient_accumulation_steps
    return made, keeper, [[row for batch in seen[at : at + size] for row in batch] for at in range(0, len(seen), size)]


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize(
    ("loss_per", "tokens", "accumulation"),
    [("token", None, 1), ("token", 22, 3), ("sentence", None, 3), ("sentence", 22, 1)],
)
def test_a_steps_gradients_are_those_of_a_loop_over_its_rows(
    tmp_path: Path, loss_per: str, tokens: int | None, accumulation: int, family: str
) -> None:
    """Σ −log p of all target tokens / rows that have any; per token / target tokens. However the step was cut."""
    made, keeper, steps = steps_of(
        tmp_path, family, loss_per, batch_tokens=tokens, per_device_train_batch_size=3,
        gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    logged = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    model, weights = made.adapter.model, dict(made.adapter.model.named_parameters())
    assert len(steps) == len(keeper.kept) == len(logged) > 1
    for rows, kept, loss in zip(steps, keeper.kept, logged, strict=True):
        total: Any = 0.0
        targets = sentences = 0
        for row in rows:
            inputs = Collator(0)([row])
            labels = inputs["labels"][0]
            if family == "t5":
                logits = model(**inputs).logits[0]
            else:
                logits, labels = model(input_ids=inputs["input_ids"]).logits[0, :-1], labels[1:]
            own = [-F.log_softmax(logits[at], -1)[token] for at, token in enumerate(labels) if token != -100]
            total, targets, sentences = total + sum(own), targets + len(own), sentences + bool(own)
        wanted = total / (sentences if loss_per == "sentence" else targets)
        assert loss == pytest.approx(wanted.item(), rel=1e-3)
        names = list(kept)
        for name, gradient in zip(names, torch.autograd.grad(wanted, [weights[name] for name in names]), strict=True):
            torch.testing.assert_close(kept[name], gradient, rtol=1e-3, atol=1e-5)


def test_two_draws_are_compared_per_sentence_too(tmp_path: Path) -> None:
    """AdaMix: the cross-entropy and the divergence both lose the mean over tokens for that over sentences."""
    losses = {}
    for per in ("token", "sentence"):
        model = tiny("llama")
        torch.manual_seed(1)
        adapter = tt.attach(model, "adamix[size=4]")
        for parameter in adapter.parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))
        args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
        made = Trainer(model.train(), args, loss_per=per)
        inputs = Collator(0)(examples())
        torch.manual_seed(5)
        losses[per] = float(made.compute_loss(model, dict(inputs)).detach())
    tokens = sum(label != -100 for row in examples() for label in row["labels"])
    assert losses["sentence"] == pytest.approx(losses["token"] * tokens / (len(ROWS) - 1), rel=1e-5)


def test_a_loss_of_transformers_own_has_no_sentences(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no mean per sentence; use loss_per=token"):
        steps_of(tmp_path, "llama", "sentence", label_smoothing_factor=0.1)
    with pytest.raises(UserError, match="loss_per 'sentense' does not exist; did you mean 'sentence'"):
        steps_of(tmp_path, "llama", "sentense")

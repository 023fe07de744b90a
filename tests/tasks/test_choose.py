"""Choosing: how labels name choices, pairs as the tokenizer joins them, padding that changes nothing, every mistake."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn import functional as F

from encoders import CONFIGS, wordpiece
from trimtab.batches import Collator, length
from trimtab.errors import UserError
from trimtab.evaluate import evaluate, predict
from trimtab.objectives import whole_inputs
from trimtab.tasks import IGNORED, Choose, encode_all, prepare, task_from_config

ROWS: list[dict[str, Any]] = [
    {"question": "which one?", "choices": ["cat", "dog"], "label": 1},
    {"question": "and here?", "choices": ["a", "longer", "c", "d"], "label": 0},
    {"question": "a question that is long", "choices": ["x", "y", "z"], "label": 2},
]


def tiny(family: str = "bert") -> Any:
    torch.manual_seed(0)
    model = hf.AutoModelForMultipleChoice.from_config(CONFIGS[family]()).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def bytewise(kind: str = "causal") -> Any:
    words = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE({word: at for at, word in enumerate(words)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if kind == "seq2seq":
        inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def language_model(kind: str) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(vocab_size=259, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    if kind == "seq2seq":
        widths = dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
        model: Any = hf.T5ForConditionalGeneration(hf.T5Config(**widths, decoder_start_token_id=0, **sizes))
    else:
        widths = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**widths, **sizes))
    for parameter in model.parameters():
        parameter.data *= 3
    return model.eval()


# How labels name choices


@pytest.mark.parametrize(
    ("choices", "labels", "form", "indices"),
    [
        (["cat", "dog"], [1, 0], "index", [1, 0]),
        (["cat", "dog"], [1.0, 0.0], "index", [1, 0]),
        (["cat", "dog"], ["1", "0"], "index", [1, 0]),
        (["cat", "dog"], ["B", "a"], "letter", [1, 0]),
        (["cat", "dog"], ["dog", " cat "], "text", [1, 0]),
        (["2", "1"], ["1", "2"], "text", [1, 0]),
        (["2", "1"], [1, 0], "index", [1, 0]),
        ([5, 7], [7, 5], "text", [1, 0]),
        (["B", "A"], ["A", "B"], "text", [1, 0]),
        (["猫", "狗"], ["狗", "猫"], "text", [1, 0]),
    ],
)
def test_labels_are_indices_letters_or_texts(choices, labels, form, indices):
    rows = [{"question": f"q{label}", "choices": choices, "label": label} for label in labels]
    task = prepare("choose", rows, kind="encoder")
    assert task == Choose("{text}", label_form=form)
    assert [task.index(row) for row in rows] == indices
    assert task_from_config(json.loads(json.dumps(task.to_config()))) == task


def test_one_row_whose_choices_are_letters_does_not_change_how_the_others_are_read():
    rows = [{**ROWS[0], "label": "B"}, {"question": "?", "choices": ["B", "A"], "label": "A"}]
    task = prepare("choose", rows, kind="encoder")
    assert task.label_form == "letter" and [task.index(row) for row in rows] == [1, 0]


def test_choices_in_columns_of_their_own_and_nested_ones():
    row = {"s1": "he sat", "s2": "then he", "e0": "slept", "e1": "ran", "e2": 3, "label": "1"}
    task = prepare("choose", [row], kind="encoder", template="{s1} {s2}", choices_column="e0, e1,e2")
    assert task.choices(row) == ["slept", "ran", "3"] and task.index(row) == 1
    assert task.inputs(row).split("\n") == ["he sat", "then he", "slept", "ran", "3"]
    nested = {"question": "?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}
    columns = {"choices_column": "choices.text", "label_column": "answerKey"}
    assert prepare("choose", [nested], kind="encoder", **columns).index(nested) == 1


# What an encoder reads


def test_each_choice_stands_behind_the_question_as_the_tokenizer_joins_them():
    task = prepare("choose", ROWS, kind="encoder")
    for row, example in zip(ROWS, encode_all(task, ROWS, wordpiece(), 64, "encoder"), strict=True):
        whole = wordpiece()([row["question"]] * len(row["choices"]), row["choices"])
        assert example.input_ids == whole["input_ids"]
        assert example.token_type_ids == whole["token_type_ids"] and 1 in example.token_type_ids[0]
        assert example.labels == example.target == row["label"]
        assert length(example) == len(row["choices"]) * max(map(len, whole["input_ids"]))


@pytest.mark.parametrize("most", range(12, 30))
def test_truncation_cuts_the_question_alone_and_at_one_place_for_all_choices(most):
    row = {"question": "one two three", "choices": ["cat", "elephant"], "label": 0}
    task = prepare("choose", [row], kind="encoder")
    first, second = task.encode(row, wordpiece(), most, "encoder").input_ids
    assert len(second) == min(most, 11 + 8 + 3)
    names = ["".join(wordpiece().convert_ids_to_tokens(ids)).replace("##", "") for ids in (first, second)]
    fronts = [name.split("[SEP]")[0] for name in names]
    assert fronts[0] == fronts[1] and "[CLS]onetwothree".startswith(fronts[0])
    assert [name.split("[SEP]")[1] for name in names] == row["choices"]


def test_a_choice_is_never_cut():
    row = {"question": "one", "choices": ["cat", "elephant"], "label": 0}
    with pytest.raises(UserError, match=r"row 1: a choice takes 8 tokens of at most 8; raise --max-length"):
        Choose("{text}").encode(row, wordpiece(), 9, "encoder")
    with pytest.raises(UserError, match=r"row 1: the prompt takes 2 tokens before any text and has room for 2"):
        Choose("{text}").encode(row, wordpiece(), 11, "encoder")


def test_a_batch_says_which_choices_a_row_lacks():
    examples = encode_all(Choose("{text}"), ROWS, wordpiece(), 64, "encoder")
    batch = Collator(0)(examples)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["token_type_ids"].shape
    assert batch["input_ids"].shape[:2] == (3, 4) and batch["labels"].tolist() == [1, 0, 2]
    assert batch["attention_mask"].any(-1).sum(-1).tolist() == [2, 4, 3]
    assert int(batch["attention_mask"].sum()) == sum(len(ids) for one in examples for ids in one.input_ids)


@pytest.mark.parametrize("family", CONFIGS)
def test_rows_with_fewer_choices_are_exactly_what_they_are_alone(family):
    """Logits, and the loss's gradient, of a batch of rows with 2, 4 and 3 choices; a missing one has no part in it."""
    model = tiny(family).double()
    examples = encode_all(Choose("{text}"), ROWS, wordpiece(), 64, "encoder")
    batch = Collator(0)(examples)
    labels = batch.pop("labels")
    logits = whole_inputs(model, model, batch).logits
    F.cross_entropy(logits, labels, reduction="sum").backward()
    weights = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    for at, example in enumerate(examples):
        alone = Collator(0)([example])
        label = alone.pop("labels")
        if family in ("roberta", "distilbert", "modernbert"):  # know no segments
            del alone["token_type_ids"]
        own = model(**alone).logits
        count = len(example.input_ids)
        torch.testing.assert_close(logits[at : at + 1, :count], own)
        assert (F.softmax(logits[at], dim=-1)[count:] == 0).all()
        F.cross_entropy(own, label, reduction="sum").backward()
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            torch.testing.assert_close(weights[name], weight.grad)


@pytest.mark.parametrize("family", CONFIGS)
def test_scores_are_those_of_single_rows_in_any_batch(family):
    model, task = tiny(family), prepare("choose", ROWS, kind="encoder")
    examples = encode_all(task, ROWS, wordpiece(), 64, "encoder")
    logits = []
    for row in ROWS:
        found = wordpiece()([row["question"]] * len(row["choices"]), row["choices"], padding=True, return_tensors="pt")
        names = ("input_ids", "attention_mask", *(("token_type_ids",) if family in ("bert", "electra") else ()))
        with torch.no_grad():
            logits.append(model(**{name: found[name][None] for name in names}).logits[0])
    losses = [float(F.cross_entropy(row, torch.tensor(ROWS[at]["label"]))) for at, row in enumerate(logits)]
    best = [int(row.argmax()) for row in logits]
    for budget in (1, 2048):
        found = evaluate(model, wordpiece(), task, examples, "encoder", batch_tokens=budget)
        assert found == {
            "accuracy": pytest.approx(sum(b == row["label"] for b, row in zip(best, ROWS, strict=True)) / 3),
            "loss": pytest.approx(sum(losses) / 3, abs=1e-5),
            "examples": 3,
        }
        said = predict(model, wordpiece(), task, examples, "encoder", batch_tokens=budget)
        assert said == [row["choices"][b] for b, row in zip(best, ROWS, strict=True)]


# What a language model reads


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_language_models_say_how_likely_each_choice_follows(kind):
    """Σ log p of " choice" and its end after the question, by a naive loop; the loss is per token of the right one."""
    tokenizer, model = bytewise(kind), language_model(kind)
    task = prepare("choose", ROWS, kind=kind)
    assert task.template == "{text}\nAnswer:"
    total, count, best = 0.0, 0, []
    for row in ROWS:
        prompt = tokenizer(f"{row['question']}\nAnswer:")["input_ids"]
        scores = []
        for choice in row["choices"]:
            answer = tokenizer(choice)["input_ids"] if kind == "seq2seq" else [*tokenizer(f" {choice}")["input_ids"], 2]
            with torch.no_grad():
                if kind == "seq2seq":
                    start = torch.tensor([[0, *answer[:-1]]])
                    logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=start).logits[0]
                else:
                    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            log_p = F.log_softmax(logits, dim=-1)
            scores.append((sum(float(log_p[at, token]) for at, token in enumerate(answer)), len(answer)))
        best.append(max(range(len(scores)), key=lambda at: scores[at][0]))
        total, count = total - scores[row["label"]][0], count + scores[row["label"]][1]
    examples = encode_all(task, ROWS, tokenizer, 64, kind)
    for budget in (1, 2048):
        found = evaluate(model, tokenizer, task, examples, kind, batch_tokens=budget)
        assert found["loss"] == pytest.approx(total / count, abs=1e-4)
        assert found["accuracy"] == sum(b == row["label"] for b, row in zip(best, ROWS, strict=True)) / 3
        said = predict(model, tokenizer, task, examples, kind, batch_tokens=budget)
        assert said == [row["choices"][b] for b, row in zip(best, ROWS, strict=True)]


def test_a_language_model_learns_the_right_choice_and_its_end():
    tokenizer = bytewise()
    task = prepare("choose", ROWS, kind="causal")
    example = task.encode(ROWS[0], tokenizer, 64, "causal")
    learned = [token for token in example.labels if token != IGNORED]
    assert tokenizer.decode(learned) == " dog</s>" and tokenizer.decode(example.input_ids).endswith("Answer: dog</s>")
    assert example.labels[example.prompt_length :] == learned
    cuts = [task.encode({**ROWS[2], "label": at}, tokenizer, 24, "causal") for at in range(3)]
    assert len({tuple(one.input_ids[: one.prompt_length]) for one in cuts}) == 1  # where it is cut does not tell
    asked = encode_all(task, [{"question": "?", "choices": ["a", "b"]}], tokenizer, 64, "causal", asking=True)[0]
    assert set(asked.labels) == {IGNORED} and asked.target == IGNORED
    assert predict(language_model("causal"), tokenizer, task, [asked], "causal")[0] in ("a", "b")


# Mistakes


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"choices": ["b"]}, "column 'choices' has only one choice; choosing needs at least two"),
        ({"choices": []}, "column 'choices' has no choices"),
        ({"choices": "a, b"}, "column 'choices' holds a str, not a list of choices"),
        ({"choices": None}, "column 'choices' holds nothing, not a list of choices"),
        ({"choices": {"text": ["a"]}}, r"holds a dict, not a list of choices; choose a part of it: choices\.text"),
        ({"choices": ["a", None]}, "holds None, not the text of a choice"),
        ({"choices": ["a", " "]}, "column 'choices' has an empty choice"),
        ({"label": 2}, "row 2: label '2' is no index of 2 choices, which are 0 to 1"),
        ({"label": -1}, "row 2: label '-1' is no index of 2 choices"),
        ({"label": None}, "row 2: column 'label' has no label"),
        ({"question": None}, "row 2: column 'question' is empty"),
    ],
)
def test_rows_that_cannot_be_chosen_from(row, message):
    rows = [ROWS[0], {"question": "?", "choices": ["a", "b"], "label": 0, **row}]
    with pytest.raises(UserError, match=message):
        encode_all(prepare("choose", rows, kind="encoder"), rows, wordpiece(), 64, "encoder")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["A", "C", "B"], "row 2: label 'C' is no letter of 2 choices, which are A to B"),
        (["cat", "cow", "dog"], "row 2: choice 'cow' does not exist; allowed: cat, dog"),
        (["0", "1", "7"], "row 3: label '7' is no index of 2 choices"),
        (["A", "B", "1"], "row 3: label '1' is no letter"),
    ],
)
def test_one_label_that_names_no_choice(labels, message):
    with pytest.raises(UserError, match=message):
        prepare("choose", [{**ROWS[0], "label": label} for label in labels], kind="encoder")


def test_other_mistakes():
    with pytest.raises(UserError, match="column 'question' does not exist; allowed: text, choices, label"):
        prepare("choose", [{"text": "?", "choices": ["a", "b"], "label": 0}], kind="encoder")
    with pytest.raises(UserError, match="column 'choices' does not exist; did you mean 'choice'"):
        prepare("choose", [{"question": "?", "choice": ["a", "b"], "label": 0}], kind="encoder")
    with pytest.raises(UserError, match="column 'label' does not exist"):
        prepare("choose", [{"question": "?", "choices": ["a", "b"]}], kind="encoder")
    with pytest.raises(UserError, match="label 'a' is the text of 2 choices"):
        Choose(label_form="text").index({"question": "?", "choices": ["a", "a"], "label": "a"})
    with pytest.raises(UserError, match="label form 'number' does not exist; allowed: index, letter, text"):
        Choose(label_form="number")
    with pytest.raises(UserError, match="needs at least two choices"):
        Choose().offered(["a"])
    with pytest.raises(UserError, match="needs 3 choices"):
        Choose(choices_column="a,b,c").offered(["a", "b"])

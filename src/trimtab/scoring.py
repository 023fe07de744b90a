"""How a model is run over examples: logits of a task head, likelihoods of answers, generation. Knows batches and
models; refuses to know tasks and metrics.

A language model is asked for the likelihood of answers after the prompt, in one forward a batch, with the vocabulary
projection at the answers' positions only. Results come in the order of the examples and depend on the examples and
`batch_tokens` alone.
"""

from __future__ import annotations

import dataclasses
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
from trimtab.batches import Collator, TokenBatches, input_length, length, pad, read, unlabelled
from trimtab.beams import GREEDY, Search
from trimtab.head import IGNORED, decoder_inputs, select_positions
from trimtab.hooks import unchanging
from trimtab.lengths import new_tokens
from trimtab.objectives import Objective, Tokens, places, whole_inputs
from trimtab.prefix_share import shared_prefix
from trimtab.stages import NAME as STAGES
from trimtab.virtual import placed_embeddings

Ids = Sequence[int]
LONGEST_ANSWER = 256
"""Tokens that are generated at most where nothing else is said."""


class Run:
    """A model, how its inputs are made, and the walk over examples in batches of similar length."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | Any,
        kind: str,
        batch_tokens: int,
        show: bool | None,
        search: Search = GREEDY,
    ) -> None:
        self.model, self.tokenizer, self.kind = model, tokenizer, kind
        self.batch_tokens, self.show, self.search = batch_tokens, show, search
        self.pad_id: int = getattr(tokenizer, "pad_token_id", None) or 0

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

    def tensors(self, examples: Sequence[Any], side: Any = "right") -> dict[str, Any]:
        """Padded tensors on the model's device, and the pictures if there are any."""
        made = Collator(self.pad_id, side)(examples)
        made.pop(STAGES, None)  # which matter in training alone
        return {key: value.to(self.model.device) if isinstance(value, Tensor) else value for key, value in made.items()}

    def answer_log_probabilities(self, prompts: Sequence[Ids], answers: Sequence[Ids]) -> Tensor:
        """log p of every token of the vocabulary at each answer's positions: [N, V], N all answers' tokens, in order.

        The last token of an answer is predicted but never read, so it is not put into a causal model.
        """
        if self.kind == "seq2seq":
            inputs = self.tensors([{"input_ids": prompt} for prompt in prompts])
            targets = pad(answers, IGNORED).to(self.model.device)
            inputs["decoder_input_ids"] = decoder_inputs(self.model, targets)
            mask = targets != IGNORED
        else:
            rows = [[*prompt, *answer[:-1]] for prompt, answer in zip(prompts, answers, strict=True)]
            inputs = self.tensors([{"input_ids": row} for row in rows])
            sizes = [(len(prompt), len(answer)) for prompt, answer in zip(prompts, answers, strict=True)]
            marks = [[0] * (before - 1) + [1] * count for before, count in sizes]
            mask = pad(marks, 0).to(self.model.device).bool()
        with self.sharing(inputs, mask) as (rest, mask), select_positions(self.model, mask):
            logits = self.model(**rest, use_cache=False).logits  # [1, N, V]
        return F.log_softmax(logits[0].float(), dim=-1)

    @contextmanager
    def sharing(self, inputs: dict[str, Tensor], mask: Tensor) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """Inside, what all rows of a causal model's inputs begin with is run once: the rest of inputs and of mask.

        `mask` is true where the model's output is wanted, bool [B, n].
        """
        if self.kind != "causal":
            yield inputs, mask
            return
        with shared_prefix(self.model, inputs, mask) as rest:
            yield rest, mask[:, -rest["input_ids"].shape[1] :]


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model is in eval mode without gradients; afterwards every module has the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    attachments: Any = getattr(model, "trimtab", None)
    model.eval()
    try:
        with torch.no_grad(), unchanging(attachments.switches if attachments else ()):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


# What a task head says


def head_logits(run: Run, examples: Sequence[Any]) -> list[Tensor]:
    """The encoder's head on whole inputs: [classes] of each example, of one that offers choices [choices]."""
    sizes = [len(choices) if (choices := _choices(example)) else None for example in examples]

    def step(batch: list[int]) -> list[Tensor]:
        inputs = run.tensors([unlabelled(examples[index]) for index in batch])
        logits = whole_inputs(run.model, run.model, inputs).logits
        return [row[: sizes[index]] for index, row in zip(batch, logits.float().cpu(), strict=True)]

    return run.over("evaluating", [input_length(example) for example in examples], step)


def objective_logits(run: Run, examples: Sequence[Any], objective: Objective) -> list[Tensor]:
    """The logits [classes] that an objective learns of each example."""

    def step(batch: list[int]) -> Iterable[Tensor]:
        inputs = run.tensors([{"input_ids": examples[index].input_ids, "labels": IGNORED} for index in batch])
        return objective.forward(run.model, run.model, inputs, everywhere=False)[1].float().cpu()

    return run.over("evaluating", [len(example.input_ids) for example in examples], step)


def place_logits(run: Run, examples: Sequence[Any], at: Sequence[Sequence[int]]) -> list[Tensor]:
    """The encoder's head on single tokens: [places, classes] of each example at its own positions."""

    def step(batch: list[int]) -> list[Tensor]:
        logits = run.model(**run.tensors([unlabelled(examples[index]) for index in batch])).logits.float().cpu()
        return [row[list(at[index])] for index, row in zip(batch, logits, strict=True)]

    return run.over("evaluating", [len(example.input_ids) for example in examples], step)


def span_logits(run: Run, examples: Sequence[Any]) -> list[Tensor]:
    """The encoder's head for a span's first and last token: [2, tokens] of each example."""

    def step(batch: list[int]) -> list[Tensor]:
        _, logits = places(run.model, run.model, run.tensors([unlabelled(examples[index]) for index in batch]))
        rows = logits.float().cpu()
        return [row[:, : len(examples[index].input_ids)] for index, row in zip(batch, rows, strict=True)]

    return run.over("evaluating", [len(example.input_ids) for example in examples], step)


def _choices(example: Any) -> Sequence[Ids] | None:
    ids = read(example, "input_ids")
    return ids if ids is not None and len(ids) and isinstance(ids[0], Sequence) else None


# How likely answers are


def answer_scores(run: Run, prompts: Sequence[Ids], answers: Sequence[Sequence[Ids]]) -> list[Tensor]:
    """log p of each example's possible answers after its prompt: [answers] of each example."""
    if all(len(answer) == 1 for own in answers for answer in own):
        return _one_token_scores(run, prompts, answers)
    if run.kind == "causal" and _fits_window(run.model.config, prompts, answers):
        return _continued_scores(run, prompts, answers)
    return _word_scores(run, prompts, answers)


def gold_loss(scores: Sequence[Tensor], gold: Sequence[int], sizes: Sequence[Sequence[int]]) -> float:
    """Nats per token of the right answers, whose number of tokens `sizes` tells; nan if none is known."""
    known = [row for row, target in enumerate(gold) if target != IGNORED]
    tokens = sum(sizes[row][gold[row]] for row in known)
    return -sum(float(scores[row][gold[row]]) for row in known) / tokens if known else math.nan


def _one_token_scores(run: Run, prompts: Sequence[Ids], answers: Sequence[Sequence[Ids]]) -> list[Tensor]:
    """Every answer is one token: one row an example, all answers read off the same position."""

    def step(batch: list[int]) -> list[Tensor]:
        found = run.answer_log_probabilities([prompts[index] for index in batch], [answers[0][0]] * len(batch)).cpu()
        return [row[[answer[0] for answer in answers[index]]] for index, row in zip(batch, found, strict=True)]

    return run.over("evaluating", [len(prompt) for prompt in prompts], step)


def _fits_window(config: Any, prompts: Sequence[Ids], answers: Sequence[Sequence[Ids]]) -> bool:
    """Whether no token falls out of a sliding window, which would count the padding before a continuation."""
    window = getattr(config, "sliding_window", None)
    longest = max((len(prompt) for prompt in prompts), default=0) + max(
        (len(one) for own in answers for one in own), default=0
    )
    return window is None or longest < window


def _continued_scores(run: Run, prompts: Sequence[Ids], answers: Sequence[Sequence[Ids]]) -> list[Tensor]:
    """The sum of log p over each answer's tokens: a prompt is run once, its answers go on from its keys and values."""

    def step(batch: list[int]) -> Iterable[Tensor]:
        own = [answers[index] for index in batch]
        inputs = run.tensors([{"input_ids": prompts[index]} for index in batch])
        mask = inputs["attention_mask"]
        lengths = mask.sum(1)
        last = torch.arange(mask.shape[1], device=mask.device) == lengths[:, None] - 1
        with run.sharing(inputs, last) as (rest, last):
            with select_positions(run.model, last):
                found = run.model(**rest, use_cache=True)
            first = F.log_softmax(found.logits[0].float(), dim=-1)  # [B, V]
            rows = torch.tensor([row for row, some in enumerate(own) for _ in some], device=mask.device)
            flat = [answer for some in own for answer in some]
            scores = first[rows, torch.tensor([answer[0] for answer in flat], device=mask.device)]
            scores = scores + _rest_scores(run, flat, rows, rest["attention_mask"], lengths, found.past_key_values)
        return scores.cpu().split([len(some) for some in own])

    sizes = [len(prompt) + sum(map(len, own)) for prompt, own in zip(prompts, answers, strict=True)]
    return run.over("evaluating", sizes, step)


def _rest_scores(run: Run, answers: Sequence[Ids], rows: Tensor, mask: Tensor, lengths: Tensor, cache: Any) -> Tensor:
    """The sum of log p over each answer's tokens from its second on [answers], behind the cached row that it has."""
    read = [answer[:-1] for answer in answers]
    if not any(read):
        return torch.zeros(len(answers), device=mask.device)
    ids, seen = (made.to(mask.device) for made in (pad(read, run.pad_id), pad([[1] * len(one) for one in read], 0)))
    cache.reorder_cache(rows)
    places = lengths[rows, None] + torch.arange(ids.shape[1], device=mask.device)
    with select_positions(run.model, seen.bool()):
        logits = run.model(
            input_ids=ids, attention_mask=torch.cat([mask[rows], seen], dim=1), position_ids=places,
            past_key_values=cache, use_cache=True,
        ).logits  # fmt: skip
    targets = torch.tensor([token for answer in answers for token in answer[1:]], device=mask.device)
    each = F.log_softmax(logits[0].float(), dim=-1).gather(1, targets[:, None]).squeeze(1)
    return torch.stack([part.sum() for part in each.split([len(one) for one in read])])


def _word_scores(run: Run, prompts: Sequence[Ids], answers: Sequence[Sequence[Ids]]) -> list[Tensor]:
    """The sum of log p over each answer's tokens: one row for each pair of example and answer."""
    pairs = [(prompt, answer) for prompt, own in zip(prompts, answers, strict=True) for answer in own]

    def step(batch: list[int]) -> list[float]:
        rows, chosen = zip(*(pairs[index] for index in batch), strict=True)
        found = run.answer_log_probabilities(list(rows), list(chosen)).cpu()  # [N, V]
        tokens = torch.tensor([token for answer in chosen for token in answer])
        each = found.gather(1, tokens[:, None]).squeeze(1).split([len(answer) for answer in chosen])
        return [float(part.sum()) for part in each]

    scores = run.over("evaluating", [len(prompt) + len(answer) for prompt, answer in pairs], step)
    return list(torch.tensor(scores).split([len(own) for own in answers]))


def prompt_of(example: Any) -> list[int]:
    """What comes before an example's answer."""
    return list(example.input_ids[: example.prompt_length])


# Generation


def answer_loss(run: Run, examples: Sequence[Any]) -> float:
    """Nats per answer token."""
    counts: list[int] = []
    objective = Tokens()

    def step(batch: list[int]) -> list[float]:
        inputs = run.tensors([examples[index] for index in batch])
        with run.sharing(inputs, objective.labelled(run.model, inputs["labels"])) as (rest, _):
            _, logits, targets = objective.forward(run.model, run.model, rest, everywhere=False)
            total = float(objective.loss(logits, targets, num_items=1))
        counts.append(targets.numel())
        return [total] + [0.0] * (len(batch) - 1)

    return sum(run.over("loss", [length(example) for example in examples], step)) / max(1, sum(counts))


def generated(run: Run, examples: Sequence[Any], max_new_tokens: int) -> list[str]:
    """The continuations that the run's search finds, without special tokens and outer white space."""
    prompts = [prompt_of(example) for example in examples]
    model: Any = run.model
    ends = _end_tokens(model, run.tokenizer)
    method = next((adapter.method for adapter in adapters(model).values()), None)
    side = "left" if run.kind == "causal" else "right"  # an encoder's padding must not part virtual tokens from a text

    def step(batch: list[int]) -> list[str]:
        asking = [{"input_ids": prompts[index], "image": read(examples[index], "image")} for index in batch]
        inputs = run.tensors(asking, side)
        length = inputs["input_ids"].shape[1]
        embeds = placed_embeddings(model, inputs["input_ids"])
        if embeds is not None:  # penalties look up the prompt's ids, and pseudo tokens have no row there
            inputs = {**inputs, "inputs_embeds": embeds}
            del inputs["input_ids"]
        found = model.generate(
            **inputs,
            max_new_tokens=new_tokens(method, model.config, length, max_new_tokens),
            do_sample=False,
            **dataclasses.asdict(run.search),
            pad_token_id=run.pad_id,
            eos_token_id=ends or None,
        )
        asked = length if embeds is None else 0
        start = asked if run.kind == "causal" else 1  # a decoder's first token starts it
        texts = run.tokenizer.batch_decode(found[:, start:], skip_special_tokens=True)
        return [text.strip() for text in texts]

    beams = run.search.num_beams  # each is a row of its own
    return run.over("generating", [beams * (len(prompt) + max_new_tokens) for prompt in prompts], step)


def _end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What ends an answer: the tokenizer's end token, which training appends, and the model's own."""
    own = getattr(model.generation_config, "eos_token_id", None)
    found = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return sorted({token for token in found if token is not None})

"""Likelihoods of answers: those of each whole row alone, whatever is shared between rows and answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tiny import attached
from trimtab.adapter import supported
from trimtab.methods.spec import parse_method
from trimtab.scoring import Run, answer_scores

CAUSAL = ["llama", "mistral", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox", "opt", "bloom"]
METHODS = (
    "lora[r=2]", "prompt[length=3]", "p-tuning[length=3]", "prefix[length=3,hidden=8]", "llama-adapter[length=3]",
    "lora[r=2]|prompt[length=3]", "pfeiffer[size=4]",
)  # fmt: skip


class Padding:
    """As much of a tokenizer as scoring asks for."""

    pad_token_id = 0


def alone(model: Any, prompt: list[int], answer: list[int]) -> float:
    """log p of the answer after the prompt: one plain forward of one row."""
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
    each = logits.float().log_softmax(-1)[len(prompt) - 1 : -1]
    return float(each.gather(1, torch.tensor(answer)[:, None]).sum())


def rows(common: int) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Prompts of unequal length with a common beginning, each with answers of unequal number and length."""
    torch.manual_seed(3)
    begin = torch.randint(3, 50, (common,)).tolist()
    prompts = [begin + torch.randint(3, 50, (length,)).tolist() for length in (7, 2, 5, 4)]
    sizes = ((1, 3), (2, 1, 2), (4, 2), (1, 1))
    return prompts, [[torch.randint(3, 50, (size,)).tolist() for size in own] for own in sizes]


@pytest.mark.parametrize("common", [0, 14])
@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("method", METHODS)
def test_answers_have_the_likelihood_of_their_rows_alone(method: str, family: str, common: int) -> None:
    if family not in supported(parse_method(method).kinds):
        pytest.skip("does not work there")
    model = attached(family, method).model.eval()
    prompts, answers = rows(common)
    expected = [[alone(model, prompt, one) for one in own] for prompt, own in zip(prompts, answers, strict=True)]
    found = answer_scores(Run(model, Padding(), "causal", 200, False), prompts, answers)  # type: ignore[arg-type]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, torch.tensor(other), rtol=1e-5, atol=2e-5)


def test_a_prompt_is_run_once_for_all_its_answers() -> None:
    model = attached("llama", "lora[r=2]").model.eval()
    seen: list[int] = []
    model.model.layers[0].register_forward_hook(lambda module, args, output: seen.append(args[0].shape[:2].numel()))
    prompts, answers = rows(0)
    answer_scores(Run(model, Padding(), "causal", 10**6, False), prompts, answers)  # type: ignore[arg-type]
    assert seen == [4 * 7, 9 * 3]  # all prompts; all answers but their last tokens, which are never read


def test_prompt_tokens_are_run_once_an_evaluation() -> None:
    model = attached("llama", "prompt[length=3]").model.eval()
    seen: list[int] = []
    model.model.layers[0].register_forward_hook(lambda module, args, output: seen.append(args[0].shape[:2].numel()))
    prompts = rows(0)[0]
    run = Run(model, Padding(), "causal", 8, False)  # type: ignore[arg-type]
    answer_scores(run, prompts, [[[4], [5]]] * 4)
    assert seen.count(3) == 1 and len(seen) > 3
    with torch.no_grad():
        model.trimtab.entries["default"].parts["embeds"].tokens.add_(1.0)
    found = answer_scores(run, prompts, [[[4], [5]]] * 4)
    expected = [alone(model, prompts[0], [4]), alone(model, prompts[0], [5])]
    torch.testing.assert_close(found[0], torch.tensor(expected), rtol=1e-5, atol=2e-5)


def test_a_sliding_window_counts_no_padding() -> None:
    """Prompts longer than a window, padded to the longest."""
    model = attached("gemma3_text", "lora[r=2]").model.eval()
    window = model.config.sliding_window
    torch.manual_seed(4)
    prompts = [torch.randint(3, 50, (length,)).tolist() for length in (window + 9, window - 2)]
    answers = [[[4, 5], [6]]] * 2
    found = answer_scores(Run(model, Padding(), "causal", 200, False), prompts, answers)  # type: ignore[arg-type]
    for row, prompt in enumerate(prompts):
        expected = [alone(model, prompt, one) for one in answers[row]]
        torch.testing.assert_close(found[row], torch.tensor(expected), rtol=1e-5, atol=2e-5)

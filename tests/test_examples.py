"""The examples run as they are, on tiny random models."""

from __future__ import annotations

import csv
import random
import runpy
from pathlib import Path

import pytest
import torch
import transformers as hf

import trimtab as tt
from test_cli import byte_tokenizer

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def bloom(tmp_path: Path) -> Path:
    """The family of the well-known guide's model, tiny and random."""
    torch.manual_seed(0)
    config = hf.BloomConfig(vocab_size=259, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0)
    model = hf.BloomForCausalLM(config)
    for parameter in model.parameters():  # weights so small that nothing in front of a text could change its logits
        parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "bloom")
    byte_tokenizer().save_pretrained(tmp_path / "bloom")
    return tmp_path / "bloom"


def test_tweet_complaints_on_bloom(bloom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chance = random.Random(0)
    data = tmp_path / "tweets.csv"
    with data.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Tweet text", "text_label"])
        for index in range(120):
            label = ("complaint", "no complaint")[index % 2]
            signs = "!?#" if label == "complaint" else "abc"
            writer.writerow(["".join(chance.choices(signs, k=chance.randint(3, 12))), label])
    output = tmp_path / "out"
    main = runpy.run_path(str(EXAMPLES / "tweet_complaints.py"))["main"]
    options = {
        "--model": bloom,
        "--data": data,
        "--text-column": "Tweet text",
        "--label-column": "text_label",
        "--label-words": "complaint=complaint,no complaint=no complaint",
        "--instruction": "Classify if the tweet is a complaint or not:",
        "--length": 8,
        "--epochs": 6,
        "--output": output,
        "--ask": "!!?#",
    }
    metrics = main([str(word) for option in options.items() for word in option])
    assert metrics["after"]["loss"] < 0.8 * metrics["before"]["loss"]  # a random model has no more to give
    printed = capsys.readouterr().out
    assert f"reloaded into a fresh model: accuracy {metrics['after']['accuracy']:.3f}" in printed
    assert printed.splitlines()[-1].endswith("!!?#")
    assert metrics["parameters"]["trainable"] == 8 * 32
    prompt = tt.load_run(output).model.trimtab.entries["default"].parts["embeds"].tokens
    assert prompt.shape == (8, 32)

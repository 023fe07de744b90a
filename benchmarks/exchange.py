"""Adapter folders of the library `adapters`, both ways: the logits there and here, and the largest difference.

    python -m benchmarks.exchange        makes an environment of its own on first use; exits 1 above 1e-5

The other library makes tiny random models, gives each kind of adapter noise in every tensor, saves it and writes down
its logits (step 1). trimtab loads these folders, writes them back, and writes adapters of its own with noise (step 2).
The other library loads what trimtab wrote (step 3). Nothing is downloaded but packages.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from benchmarks.environments import ROOT, TORCH, environment, run

WORK = ROOT / "benchmarks" / "out" / "exchange"
INSTALLS = ((TORCH,), ("adapters==1.3.*", "datasets", "accelerate"))
TOLERANCE = 1e-5
EFFECT = 1e-3  # what an adapter has to change of the logits at least
NOISE = 0.1  # standard deviation
PEER = "peer"
LOGITS, BASE = "logits.safetensors", "base.safetensors"

_SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
_ENCODER = {**_SIZES, "max_position_embeddings": 64, "num_labels": 3}
_DECODER = {**_SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64}
_T5 = dict(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, decoder_start_token_id=0)
MODELS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {  # name -> class, its configuration's, settings
    "bert": ("BertForSequenceClassification", "BertConfig", _ENCODER),
    "bert, tags": ("BertForTokenClassification", "BertConfig", _ENCODER),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", {**_ENCODER, "max_position_embeddings": 66}),
    "electra": ("ElectraForSequenceClassification", "ElectraConfig", {**_ENCODER, "embedding_size": 16}),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        dict(vocab_size=64, dim=32, hidden_dim=48, n_layers=3, n_heads=4, max_position_embeddings=64, num_labels=3),
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", dict(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=64)),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _DECODER),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_DECODER, "sliding_window": None}),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5),
    "t5, gated": ("T5ForConditionalGeneration", "T5Config", {**_T5, "feed_forward_proj": "gated-gelu"}),
}


@dataclass(frozen=True)
class Case:
    """A kind of adapter there, and methods of ours that are written as it."""

    name: str
    config: Any
    """What adapters makes it from: its string, or a class and its settings."""
    ours: str
    """Our method, whose tensors get noise; empty where none is written."""
    attention: str | None = None
    """Which attention adapters runs, if not transformers' choice: with sdpa it masks the prefix of a decoder out."""


CASES = (
    Case("seq_bn", "seq_bn[reduction_factor=3]", "pfeiffer[size=5]"),
    Case("seq_bn, sizes by layer", ("SeqBnConfig", dict(reduction_factor={"1": 8, "default": 2}, leave_out=[2])), ""),
    Case("double_seq_bn", "double_seq_bn", "houlsby[size=5,norms=false]"),
    Case("par_bn", "par_bn", "parallel[size=5,reads=stream]"),
    Case("scaled_par_bn", "scaled_par_bn", "parallel[size=5,learn_scale=true,reads=stream]"),
    Case("lora", "lora[r=3,alpha=5]", "lora[r=3,alpha=5]"),
    Case(
        "lora, all places",
        "lora[r=3,alpha=5,attn_matrices=['q','k','v'],intermediate_lora=True,output_lora=True]",
        "lora[r=3,targets=q,v,up,down,layers=0,2]",
    ),
    Case("ia3", "ia3", "ia3[targets=k,v,up]"),
    Case("ia3, gated", "ia3[intermediate_lora=False,output_lora=True]", "ia3"),
    Case(
        "prefix_flat", ("PrefixTuningConfig", dict(flat=True, prefix_length=4)), "prefix[length=4,shift=false]", "eager"
    ),
    Case("prefix", ("PrefixTuningConfig", dict(prefix_length=4, bottleneck_size=6)), "", "eager"),
    Case("prompt", ("PromptTuningConfig", dict(prompt_length=4)), "prompt[length=4,at=states,leads=true]", "eager"),
    Case(
        "prompt, behind [CLS]",
        ("PromptTuningConfig", dict(prompt_length=4, combine="prefix_after_bos")),
        "prompt[length=4,at=states]",
        "eager",
    ),
)
OURS_REFUSED = {("ia3, gated", name) for name in MODELS if name not in ("llama", "mistral", "t5, gated")}
"""Ours scales what the activation gives; without a gate that cannot be written."""
REFUSED = {(kind, name) for kind in ("prefix_flat", "prefix") for name in ("t5", "t5, gated")} | {
    (kind, name)
    for kind in ("prompt", "prompt, behind [CLS]")
    for name in ("bert, tags", "distilbert", "gpt2", "llama", "mistral", "t5", "t5, gated")
}
"""Their prefix moves T5's own keys away from their queries; their prompt is for encoders, and has tags of its own. In
DistilBERT it runs with sdpa alone, which gives padded rows other logits (equal without padding, tried by hand)."""


def pairs() -> Iterator[tuple[Case, str]]:
    """Every kind on every model, without those that are refused."""
    yield from ((case, name) for name in MODELS for case in CASES if (case.name, name) not in REFUSED)


def folder(case: Case, name: str, step: str) -> Path:
    """Where a step keeps its folder of a case."""
    return WORK / name.replace(", ", "-") / case.name.replace(", ", "-").replace(" ", "-") / step


def built(name: str, attention: str | None = None) -> Any:
    """A tiny random model; the same weights on both sides."""
    class_name, config, settings = MODELS[name]
    more = {} if attention is None else {"attn_implementation": attention}
    model = getattr(hf, class_name)(getattr(hf, config)(**settings, pad_token_id=0, **more)).eval()
    path = WORK / name.replace(", ", "-") / BASE
    if path.is_file():
        _, unexpected = model.load_state_dict(load_file(path), strict=False)
        assert not unexpected, unexpected
        model.tie_weights()
    return model


@torch.no_grad()
def logits(model: Any, name: str) -> torch.Tensor:
    """Of two rows of unequal lengths, those positions that are no padding."""
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    more = {"decoder_input_ids": ids[:, :4]} if name.startswith("t5") else {}
    found = model(input_ids=ids * mask, attention_mask=mask, **more).logits
    return found[mask.bool()] if found.dim() == 3 and not more else found


@torch.no_grad()
def noise(tensors: Iterator[torch.Tensor], size: float = NOISE) -> None:
    """Away from every start."""
    for tensor in tensors:
        tensor.add_(size * torch.randn_like(tensor))


# -- the other side ---------------------------------------------------------------------------------------------------


def make_base(name: str) -> None:
    """The weights of a model, biases and norms away from their start."""
    torch.manual_seed(0)
    model = built(name)
    noise(model.parameters())
    path = WORK / name.replace(", ", "-") / BASE
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.clone().contiguous() for key, tensor in model.state_dict().items()}, path)
    save_file({"logits": logits(model, name)}, path.parent / LOGITS)


def write_theirs() -> None:
    """Step 1."""
    import adapters

    for name in MODELS:
        make_base(name)
    for case, name in pairs():
        model, target = built(name, case.attention), folder(case, name, "theirs")
        adapters.init(model)
        config = case.config if isinstance(case.config, str) else getattr(adapters, case.config[0])(**case.config[1])
        model.add_adapter(PEER, config=config)
        model.set_active_adapters(PEER)
        torch.manual_seed(2)
        noise(one for key, one in model.named_parameters() if PEER in key.split("."))
        model.eval()
        target.mkdir(parents=True)
        _save(model, target)
        save_file({"logits": logits(model, name)}, target / LOGITS)


def _save(model: Any, target: Path) -> None:
    """As safetensors; of a prefix, where the library cannot, by the sentence that trimtab gives for it."""
    try:
        model.save_adapter(str(target), PEER, use_safetensors=True)
    except RuntimeError:
        model.save_adapter(str(target), PEER)
        tensors = torch.load(target / "pytorch_adapter.bin", weights_only=True)
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, target / "adapter.safetensors")
        (target / "pytorch_adapter.bin").unlink()
        (target / "pytorch_model_head.bin").unlink(missing_ok=True)
        model.save_head(str(target), None, use_safetensors=True)


def read_ours() -> None:
    """Step 3: the logits of what trimtab wrote."""
    import adapters

    for case, name in pairs():
        for step in ("back", "ours"):
            source = folder(case, name, step)
            if not (source / "adapter_config.json").is_file():
                continue
            model = built(name, case.attention)
            adapters.init(model)
            model.load_adapter(str(source), use_safetensors=True, set_active=True)
            save_file({"logits": logits(model.eval(), name)}, source / "there.safetensors")


# -- our side ---------------------------------------------------------------------------------------------------------


def convert_all() -> dict[tuple[str, str], dict[str, float]]:
    """Step 2: the differences of what was read, by kind and model; -1 where ours is refused."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for case, name in pairs():
        base = load_file(WORK / name.replace(", ", "-") / LOGITS)["logits"]
        found[case.name, name] = {**_read(case, name, base), **_own(case, name, base)}
    return found


def _read(case: Case, name: str, base: torch.Tensor) -> dict[str, float]:
    import trimtab as tt

    source, model = folder(case, name, "theirs"), built(name)
    adapter = tt.load(model, source)
    wanted = load_file(source / LOGITS)["logits"]
    adapter.export(folder(case, name, "back"), "adapters")
    return {"effect": difference(wanted, base), "read": difference(logits(model, name), wanted)}


def _own(case: Case, name: str, base: torch.Tensor) -> dict[str, float]:
    import trimtab as tt

    if not case.ours or (case.name, name) in OURS_REFUSED:
        return {}
    model, target = built(name), folder(case, name, "ours")
    torch.manual_seed(3)
    adapter = tt.attach(model, case.ours)
    noise(adapter.parameters())
    wanted = logits(model, name)
    adapter.export(target, "adapters")
    save_file({"logits": wanted}, target / LOGITS)
    return {"own effect": difference(wanted, base)}


def difference(one: torch.Tensor, two: torch.Tensor) -> float:
    """The largest absolute difference."""
    return float((one - two).abs().max())


def written(case: Case, name: str) -> dict[str, float]:
    """The differences of what the other library made of our folders."""
    theirs = load_file(folder(case, name, "theirs") / LOGITS)["logits"]
    found = {"back": difference(load_file(folder(case, name, "back") / "there.safetensors")["logits"], theirs)}
    own = folder(case, name, "ours")
    if (own / LOGITS).is_file():
        found["own"] = difference(load_file(own / "there.safetensors")["logits"], load_file(own / LOGITS)["logits"])
    return found


def table(found: Mapping[tuple[str, str], Mapping[str, float]]) -> str:
    """Kinds down, models across: read there -> here / back there / our own there."""
    rows = ["| kind | " + " | ".join(MODELS) + " |", "|---" * (len(MODELS) + 1) + "|"]
    for case in CASES:
        cells = [_cell(found.get((case.name, name))) for name in MODELS]
        rows.append(f"| {case.name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _cell(one: Mapping[str, float] | None) -> str:
    if one is None:
        return "refused"
    return " / ".join(f"{one[key]:.0e}" if key in one else "–" for key in ("read", "back", "own"))


def fine(one: Mapping[str, float]) -> bool:
    """Equal wherever it was compared, and no adapter without an effect."""
    effects = [value for key, value in one.items() if key.endswith("effect")]
    return min(effects) > EFFECT and max(one[key] for key in ("read", "back", "own") if key in one) <= TOLERANCE


def other_side(python: Path, step: str, kind: str) -> None:
    """One of the other library's steps, in its environment."""
    done = run(python, "benchmarks.exchange", "--step", step, "--kind", kind)
    if done.returncode:
        raise SystemExit(f"the other side ended with {done.returncode}:\n{done.stderr[-3000:]}")


def main() -> None:
    """The command line: all steps, or with --step one of the other side's inside its environment."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kind", help="only the kinds whose names start so")
    parser.add_argument("--step", choices=("write", "read"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    global CASES
    CASES = tuple(case for case in CASES if case.name.startswith(given.kind or ""))
    if given.step:
        return write_theirs() if given.step == "write" else read_ours()
    shutil.rmtree(WORK, ignore_errors=True)
    python = environment("speed-adapters", *INSTALLS)
    other_side(python, "write", given.kind or "")
    found = convert_all()
    other_side(python, "read", given.kind or "")
    both = {
        key: {**one, **written(case, key[1])} for key, one in found.items() for case in CASES if case.name == key[0]
    }
    print(table(both))
    bad = {key: one for key, one in both.items() if not fine(one)}
    for key, one in bad.items():
        print("not equal:", *key, json.dumps(one))
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()

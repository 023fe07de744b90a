"""Which of peft's methods the bridge carries. Every one that the installed peft offers is tried on a tiny BERT
classifier and a tiny Llama, and what came out is written to src/trimtab/peft_facts.json (`trimtab methods --all` reads
it).

    python -m benchmarks.bridge            # a minute or two

Works means: trained through the bridge the loss falls; away from its start the logits are equal when it is loaded again
and when peft loads what was written; detached the base is what it was, bit for bit. Merges means: the merged model
gives these logits, too.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor
from transformers import PreTrainedModel

import trimtab as tt
from trimtab.errors import UserError
from trimtab.methods.borrowed import FACTS, NATIVE, peft_configs

SETTINGS = {
    "adalora": "total_step=20",
    "adamss": "r=8,num_subspaces=2,subspace_rank=1",
    "boft": "boft_block_size=4",
    "c3a": "block_size=16",
    "fourierft": "n_frequency=40",
    "gralora": "r=4,gralora_k=2",
    "ln_tuning": "target_modules={norms}",
    "loha": "r=4",
    "lokr": "r=4",
    "miss": "r=4",
    "oft": "oft_block_size=4",
    "osf": "target_modules={projections}",
    "psoft": "r=4",
    "randlora": "r=4",
    "road": "group_size=8",
    "shira": "r=2",
    "tinylora": "u=8",
    "trainable_tokens": "token_indices=3,4,5,6",
    "unilora": "r=2,theta_d_length=64",
    "vblora": "num_vectors=16,vector_length=8",
    "vera": "r=8",
    "pvera": "r=8,d_initial=1.0",
    "waveft": "n_frequency=40",
}
"""What a method needs on a model of 32 numbers a token, whose defaults are for large ones."""
NAMES = {
    "bert": {"norms": "LayerNorm", "projections": "query,value"},
    "llama": {"norms": "input_layernorm", "projections": "q_proj,v_proj"},
}
"""What stands in settings for modules where peft has no default of its own, or the task head is one."""
TOLERANCE = 1e-5
STEPS = 8
MODELS = ("bert", "llama")


def tiny(family: str) -> PreTrainedModel:
    """A random model of two layers, the same weights every time: a BERT classifier, or a Llama."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    if family == "bert":
        return tf.BertForSequenceClassification(tf.BertConfig(**sizes, num_labels=3)).eval()
    return tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, num_key_value_heads=4, eos_token_id=2)).eval()


def batch(family: str) -> dict[str, Tensor]:
    """Four rows of nine tokens, of which one is padded, with labels."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 64, (4, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = torch.tensor([0, 2, 1, 0]) if family == "bert" else torch.where(mask > 0, ids, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def spec(kind: str, family: str) -> str:
    """The method string that is tried."""
    return f"peft:{kind}[{SETTINGS[kind].format(**NAMES[family])}]" if kind in SETTINGS else f"peft:{kind}"


def shake(adapter: tt.Adapter) -> None:
    """Take the trained tensors away from their start, where most methods change nothing."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in adapter.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))


def losses(adapter: tt.Adapter, family: str, lr: float = 1e-2) -> list[float]:
    """The loss of a plain training loop, step by step."""
    model, found = adapter.model.train(), []
    trained = [weight for weight in adapter.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    for _ in range(STEPS):
        loss = model(**batch(family)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    model.eval()
    return found


def logits(model: Any, family: str) -> Tensor:
    """What the model gives for the batch, where there is a token."""
    given = {name: value for name, value in batch(family).items() if name != "labels"}
    with torch.no_grad():
        out = model(**given).logits
    return out if family == "bert" else out[given["attention_mask"].bool()]


def apart(one: Tensor, other: Tensor) -> float:
    """How far logits are apart, as a share of the largest where that is above 1."""
    return ((one - other).abs().max() / other.abs().max().clamp(min=1)).item()


def try_on(kind: str, family: str, folder: Path) -> bool:
    """Trained, saved, loaded by us and by peft, detached; returns whether it merges.

    Raises UserError for what the bridge refuses, AssertionError for what went wrong.
    """
    from peft import PeftModel

    torch.manual_seed(3)
    model = tiny(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = logits(model, family)
    adapter = tt.attach(model, spec(kind, family))
    kept = {name: value.clone() for name, value in adapter.state_dict().items()}
    found = losses(adapter, family)
    assert found[-1] < found[0], f"the loss does not fall: {found[0]:.4f}, {found[-1]:.4f}"
    moved = [name for name, value in adapter.state_dict().items() if not torch.equal(value, kept[name])]
    assert any(not name.startswith("head_") for name in moved), "nothing of it moves in training"
    shake(adapter)
    own = logits(model, family)
    assert not torch.equal(own, plain), "it changes nothing"
    adapter.save(folder)
    fresh = tiny(family)
    theirs = logits(PeftModel.from_pretrained(fresh, folder / "peft").eval(), family)
    gap = apart(own, theirs)
    assert gap < TOLERANCE, f"loaded by peft the logits differ by {gap:.1e}"
    gap = apart(own, logits(tt.load(tiny(family), folder).model.eval(), family))
    assert gap < TOLERANCE, f"loaded again the logits differ by {gap:.1e}"
    with adapter.disabled():
        assert torch.equal(logits(model, family), plain), "switched off the base is another"
    merges = merged_equals(tt.load(tiny(family), folder), family, own)
    adapter.detach()
    after = model.state_dict()
    assert list(after) == list(before), "detached the base has other tensors"
    assert all(torch.equal(after[name], value) for name, value in before.items()), "the base has changed"
    return merges


def merged_equals(adapter: tt.Adapter, family: str, own: Tensor) -> bool:
    """Whether the parts write themselves into the base's weights with the same logits."""
    from trimtab.sites import ModuleSite

    model, entry = adapter.model, adapter._entry
    parts = [(site.module, entry.parts[site.key]) for site in entry.sites if isinstance(site, ModuleSite)]
    heads = [(site.module, entry.parts[site.key]) for site in entry.sites if not isinstance(site, ModuleSite)]
    adapter.detach()
    try:
        for module, part in [*parts, *heads]:
            part.write_into(module)
    except Exception:  # whatever a peft layer raises, it does not merge here
        return False
    return apart(logits(model, family), own) < TOLERANCE


def find_out(kind: str) -> Mapping[str, Any]:
    """What `try_on` says of one method, on both models."""
    merges, torn = [], []
    for family in MODELS:
        try:
            with tempfile.TemporaryDirectory() as place:
                merges.append(try_on(kind, family, Path(place) / "adapter"))
        except Exception as error:  # recorded as why it does not work
            name = "" if isinstance(error, (UserError, AssertionError)) else f"{type(error).__name__}: "
            torn.append(f"{name}{' '.join(str(error).split())}".removeprefix(f"peft:{kind} "))
    if torn:
        return {"works": False, "merges": False, "why": torn[0]}
    return {"works": True, "merges": all(merges), "why": ""}


def main(only: Sequence[str] = ()) -> None:
    """Try them all and write what came out; those that are named are only tried."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    tf.logging.set_verbosity_error()
    found = {}
    for kind in sorted(peft_configs()):
        if only and kind not in only:
            continue
        found[kind] = find_out(kind)
        print(kind, found[kind], flush=True)
    if only:
        return
    text = json.dumps({"peft": version("peft"), "methods": found}, indent=1, ensure_ascii=False) + "\n"
    FACTS.write_text(text, encoding="utf-8")
    print(f"{sum(one['works'] for one in found.values())} of {len(found)} work, {len(NATIVE)} have methods of our own")


if __name__ == "__main__":
    main(sys.argv[1:])

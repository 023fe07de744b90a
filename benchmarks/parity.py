"""The same weights in trimtab and in the library `adapters`: their outputs side by side, and the largest difference.

    python -m benchmarks.parity                    makes an environment of its own on first use; exits 1 above 1e-5
    python -m benchmarks.parity --write-fixture    as well writes what the other library said to tests/data

The other library builds a tiny random BERT, perturbs every tensor of each adapter by normal noise, and writes inputs,
weights and outputs to a file of its own names. Here they are loaded into trimtab's methods by the names below, each
spelled out. Nothing is downloaded but packages.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.environments import ROOT, TORCH, environment, run

Tensors = Mapping[str, torch.Tensor]
FIXTURE = ROOT / "tests" / "data" / "adapters_parity.safetensors"
WRITTEN = ROOT / "benchmarks" / "out" / "parity" / FIXTURE.name
INSTALLS = ((TORCH,), ("adapters==1.3.*",))  # torch first: adapters brings the transformers that it pins
TOLERANCE = 1e-5  # absolute, on every logit and every entry of the last hidden state
DEPARTS = 1e-3  # what counts as a difference: an adapter's effect on the logits, and what another equation changes
NOISE = 0.3  # standard deviation
LAYERS = 3
SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4)
CONFIG = {**SIZES, "max_position_embeddings": 64, "num_labels": 2, "pad_token_id": 0}
PEER = "peer"  # the adapter's name in the other library


# -- names: of a place in a layer and of a tensor at it, theirs -> ours ---------------------------------------------

BRANCHES = {"attention.output": "attention", "output": "feedforward"}
BOTTLENECK = {
    "adapter_down.0.weight": "adapter.down.weight",
    "adapter_down.0.bias": "adapter.down.bias",
    "adapter_up.weight": "adapter.up.weight",
    "adapter_up.bias": "adapter.up.bias",
    "scaling": "scale",  # [1] there, [] here
}
PROJECTIONS = {
    "attention.self.query": "q",
    "attention.self.key": "k",
    "attention.self.value": "v",
    "intermediate.dense": "up",
    "output.dense": "down",
}
LOW_RANK = {"lora_A": "A", "lora_B": "B"}
DECOMPOSED = {"lora_A": "low.A", "lora_B": "low.B", "m.weight": "magnitude"}  # [out, 1] there, [out] here
VECTOR = {"lora_B": "scale"}  # [out, 1] there, [out] here
BEHIND_ACTIVATION = {**PROJECTIONS, "intermediate.dense": "down"}
HEAD = {"classifier.weight": "head_classifier.copy.weight", "classifier.bias": "head_classifier.copy.bias"}


@dataclass(frozen=True)
class Case:
    """One adapter of the other library and the method of ours that is to give the same outputs."""

    config: str
    """The other library's configuration string; cases with the same one share weights and outputs."""
    method: str
    """Our method string."""
    modules: str
    """What holds the tensors at a place there: adapters or loras."""
    places: Mapping[str, str]
    tensors: Mapping[str, str]
    equal: bool = True
    """Whether the outputs are to be equal; or to differ, because the other library departs from the paper."""

    def names(self) -> dict[str, str]:
        """Every name that the case may have there -> the name here."""
        return {
            f"bert.encoder.layer.{layer}.{place}.{self.modules}.{PEER}.{tensor}": f"layer{layer}_{ours}.{named}"
            for layer in range(LAYERS)
            for place, ours in self.places.items()
            for tensor, named in self.tensors.items()
        }


DOUBLE = "houlsby[size=2,activation=swish,norms=false,start=normal]"
EVERY = "lora[r=4,alpha=12,attn_matrices=['q','k','v'],intermediate_lora=True,output_lora=True]"
CASES = (
    Case("seq_bn", "pfeiffer", "adapters", BRANCHES, BOTTLENECK),
    Case("double_seq_bn", DOUBLE, "adapters", BRANCHES, BOTTLENECK),
    Case("par_bn", "parallel", "adapters", BRANCHES, BOTTLENECK),
    Case("scaled_par_bn", "parallel[learn_scale=true]", "adapters", BRANCHES, BOTTLENECK),
    Case("lora", "lora[r=8,alpha=8,targets=q,v]", "loras", PROJECTIONS, LOW_RANK),
    Case(EVERY, "lora[r=4,alpha=12,targets=q,k,v,up,down]", "loras", PROJECTIONS, LOW_RANK),
    Case("ia3", "ia3[targets=k,v,up]", "loras", PROJECTIONS, VECTOR),
    # The paper scales what the activation function gives, W_2 (l ⊙ g(·)); there it is what it reads, W_2 g(l ⊙ (·)).
    Case("ia3", "ia3", "loras", BEHIND_ACTIVATION, VECTOR, equal=False),
    # The paper's magnitude belongs to the weight; there the bias is multiplied, too: m / ‖·‖ ⊙ ((W + B A) x + b).
    Case("dora", "lora[r=8,alpha=8,dora=true,targets=q,v]", "loras", PROJECTIONS, DECOMPOSED, equal=False),
)


# -- their side: runs in the environment of its own -----------------------------------------------------------------


@torch.no_grad()
def write(path: Path) -> None:
    """Inputs, and weights and outputs of the base and of each configuration, by the other library's own names."""
    base = _random_bert()
    inputs = _inputs()
    tensors: dict[str, torch.Tensor] = {f"inputs/{name}": value for name, value in inputs.items()}
    tensors |= {f"base/weights/{name}": value for name, value in base.state_dict().items()}
    tensors |= {f"base/{name}": value for name, value in outputs(base, inputs).items()}
    for config in dict.fromkeys(case.config for case in CASES):
        tensors |= {f"{config}/{name}": value for name, value in _adapted(base, config, inputs)}
    about = {"config": json.dumps(CONFIG), "versions": json.dumps(_versions("adapters"))}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata=about)


def _random_bert() -> hf.PreTrainedModel:
    torch.manual_seed(0)
    model = hf.BertForSequenceClassification(hf.BertConfig(**CONFIG)).eval()
    for parameter in model.parameters():  # away from the symmetric start: biases and norms get values too
        parameter += 0.1 * torch.randn_like(parameter)
    return model


def _inputs() -> dict[str, torch.Tensor]:
    """Four rows of unequal lengths, padded on the right."""
    ids = torch.randint(3, CONFIG["vocab_size"], (4, 11), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(11)[None] < torch.tensor([11, 7, 4, 9])[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def _adapted(base: hf.PreTrainedModel, config: str, inputs: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights and outputs of one configuration."""
    import adapters

    torch.manual_seed(2)
    model = hf.BertForSequenceClassification(hf.BertConfig(**CONFIG))
    model.load_state_dict(base.state_dict())
    adapters.init(model)
    model.add_adapter(PEER, config=config)
    model.set_active_adapters(PEER)
    model.eval()
    for name, parameter in model.named_parameters():
        if PEER in name.split("."):
            parameter += NOISE * torch.randn_like(parameter)
            yield f"weights/{name}", parameter.detach()
    yield from outputs(model, inputs).items()


def outputs(model: Any, inputs: Tensors) -> dict[str, torch.Tensor]:
    """Logits [batch, labels] and the last hidden state [batch, length, width]."""
    out = model(**inputs, output_hidden_states=True)
    return {"logits": out.logits, "hidden": out.hidden_states[-1]}


def _versions(library: str) -> dict[str, str]:
    return {name: version(name) for name in (library, "transformers", "torch")}


# -- our side -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What came out for one case; differences are the largest absolute ones."""

    case: Case | None
    """None for the two base models without an adapter."""
    logits: float
    hidden: float
    effect: float
    """How much the adapter changes the logits."""

    @property
    def fine(self) -> bool:
        """Equal where they are to be equal, different where they are to differ, and no adapter without effect."""
        if self.case is None:
            return max(self.logits, self.hidden) <= TOLERANCE
        if self.effect <= DEPARTS:
            return False
        return max(self.logits, self.hidden) <= TOLERANCE if self.case.equal else self.logits > DEPARTS


class Written:
    """A file of the other side: `about` it, and its tensors."""

    def __init__(self, path: Path):
        with safe_open(path, "pt") as file:
            self.about: dict[str, Any] = {key: json.loads(value) for key, value in file.metadata().items()}
            self._tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors below a prefix, by the rest of their names."""
        start = f"{prefix}/"
        return {name[len(start) :]: value for name, value in self._tensors.items() if name.startswith(start)}


def compared(case: Case | None, written: Written) -> Result:
    """One case, or the two base models."""
    model = adapted(case, written) if case else _base(written)
    with torch.no_grad():
        ours = outputs(model, written.under("inputs"))
    theirs, bare = written.under(case.config if case else "base"), written.under("base")
    logits, hidden = (difference(ours[name], theirs[name]) for name in ("logits", "hidden"))
    return Result(case, logits, hidden, effect=difference(theirs["logits"], bare["logits"]))


def difference(one: torch.Tensor, two: torch.Tensor) -> float:
    """The largest absolute difference."""
    return float((one - two).abs().max())


def adapted(case: Case, written: Written) -> hf.PreTrainedModel:
    """Our method on the same base, its tensors those of the file."""
    import trimtab as tt

    model = _base(written)
    adapter = tt.attach(model, case.method)
    own, names, base = adapter.state_dict(), case.names(), written.under("base/weights")
    state = {ours: base[theirs] for theirs, ours in HEAD.items()}
    for name, tensor in written.under(f"{case.config}/weights").items():
        state[names[name]] = tensor.reshape(own[names[name]].shape)
    adapter.load_state_dict(state)  # refuses missing and unexpected tensors
    return model


def _base(written: Written) -> hf.PreTrainedModel:
    model = hf.BertForSequenceClassification(hf.BertConfig(**written.about["config"])).eval()
    model.load_state_dict(written.under("base/weights"))
    return model


def table(found: list[Result]) -> str:
    """One row a case, in Markdown."""
    rows = ["| adapters | trimtab | logits | hidden states | effect |", "|---|---|---|---|---|"]
    for result in found:
        theirs = f"`{result.case.config}`" if result.case else "no adapter"
        ours = f"`{result.case.method}`" if result.case else "no adapter"
        wanted = "" if result.case is None or result.case.equal else " (departs)"
        effect = f"{result.effect:.2f}" if result.case else "–"
        rows.append(f"| {theirs} | {ours} | {result.logits:.1e}{wanted} | {result.hidden:.1e}{wanted} | {effect} |")
    return "\n".join(rows)


def compare() -> list[Result]:
    """Runs the other side, prints the table and the versions."""
    done = run(environment("adapters", *INSTALLS), "benchmarks.parity", "--write", WRITTEN)
    if done.returncode:
        raise SystemExit(f"the other side ended with {done.returncode}:\n{done.stderr[-3000:]}")
    written = Written(WRITTEN)
    found = [compared(case, written) for case in (None, *CASES)]
    print(table(found))
    for side, versions in (("there", written.about["versions"]), ("here", _versions("trimtab"))):
        print(f"{side}:", ", ".join(f"{name} {number}" for name, number in versions.items()))
    return found


def main() -> None:
    """The command line: the comparison, or with --write one side of it inside the environment."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write-fixture", action="store_true", help="keep the other side's file for the tests")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.write:
        return write(given.write)
    fine = all(result.fine for result in compare())
    if fine and given.write_fixture:
        FIXTURE.parent.mkdir(exist_ok=True)
        FIXTURE.write_bytes(WRITTEN.read_bytes())
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()

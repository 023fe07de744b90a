"""Folders of the library `adapters`: built by hand from its tensors, with the logits that it had for them.

The tensors and logits are those that `python -m benchmarks.parity` wrote down in the library's own environment;
`python -m benchmarks.exchange` compares whole folders with the library beside it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import trimtab as tt
from benchmarks.parity import FIXTURE, TOLERANCE, Written, _base, outputs
from tiny import inputs, output, tiny
from trimtab.peers.kinds import head_parts

BOTTLENECK: dict[str, Any] = dict(
    adapter_residual_before_ln=False, cross_adapter=False, dropout=0.0, inv_adapter=None, is_parallel=False,
    leave_out=[], ln_after=False, ln_before=False, mh_adapter=False, non_linearity="relu", original_ln_after=True,
    original_ln_before=True, output_adapter=True, phm_layer=False, reduction_factor=16, residual_before_ln=True,
    scaling=1.0, stochastic_depth=0.0, use_gating=False,
)  # fmt: skip
PARALLEL = BOTTLENECK | dict(is_parallel=True, original_ln_before=False, reduction_factor=2, scaling=4.0)
LORA: dict[str, Any] = dict(
    alpha=8, architecture="lora", attn_matrices=["q", "v"], composition_mode="add", dropout=0.0,
    intermediate_lora=False, leave_out=[], output_lora=False, r=8, selfattn_lora=True, use_dora=False, use_gating=False,
)  # fmt: skip
CONFIGS = {
    "seq_bn": BOTTLENECK,
    "double_seq_bn": BOTTLENECK | dict(mh_adapter=True, non_linearity="swish", original_ln_before=False),
    "par_bn": PARALLEL,
    "scaled_par_bn": PARALLEL | dict(scaling="learned"),
    "lora": LORA,
    "ia3": LORA | dict(alpha=1, r=1, attn_matrices=["k", "v"], composition_mode="scale", intermediate_lora=True),
}
"""What the library writes of its kinds, as far as it says how something is computed."""


@pytest.fixture(scope="module")
def written() -> Written:
    return Written(FIXTURE)


def folder(path: Path, kind: str, tensors: dict[str, torch.Tensor], **changes: Any) -> Path:
    """A folder as `save_adapter` of the library makes it."""
    path.mkdir()
    config = {
        "config": CONFIGS[kind] | changes, "hidden_size": 32, "model_class": "BertForSequenceClassification",
        "model_name": "", "model_type": "bert", "name": "peer", "version": "adapters.1.3.0",
    }  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, path / "adapter.safetensors")
    return path


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_folder_gives_the_librarys_logits(kind: str, written: Written, tmp_path: Path) -> None:
    """Read, and written back: the same tensors under the same names."""
    tensors = written.under(f"{kind}/weights")
    made = folder(tmp_path / "theirs", kind, tensors)
    model = _base(written)
    adapter = tt.load(model, made)
    with torch.no_grad():
        found = outputs(model, written.under("inputs"))["logits"]
        bare = written.under("base")["logits"]
    expected = written.under(kind)["logits"]
    assert float((found - expected).abs().max()) <= TOLERANCE < float((expected - bare).abs().max())
    adapter.export(tmp_path / "back", "adapters")
    back = load_file(tmp_path / "back" / "adapter.safetensors")
    name = next(iter(back)).split(".adapters." if "bn" in kind else ".loras.")[1].split(".")[0]
    renamed = {key.replace(f".{name}.", ".peer."): value for key, value in back.items()}
    assert renamed.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert torch.equal(renamed[key].reshape(tensor.shape), tensor), key


@pytest.mark.parametrize(
    ("method", "family"),
    [
        ("pfeiffer[size=5]", "llama"),
        ("lora[r=3,targets=q,v]", "gpt2"),
        ("ia3[targets=k,v,up]", "roberta"),
        ("prefix[length=4,form=flat,shift=false]", "llama"),
        ("prompt[length=4,at=states]", "electra"),
        ("prompt[length=4,at=states,leads=true]", "bert"),
    ],
)
def test_what_is_written_is_read_again(method: str, family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny(family)
    adapter = tt.attach(model, method)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        expected = output(model, inputs(family))
        adapter.export(tmp_path / "out", "adapters")
        fresh = tiny(family)
        bare = output(fresh, inputs(family))
        tt.load(fresh, tmp_path / "out")
        found = output(fresh, inputs(family))
    assert torch.allclose(found, expected, atol=1e-6) and not torch.allclose(bare, expected, atol=1e-3)


def prompt_folder(path: Path, tokens: torch.Tensor, **changes: Any) -> Path:
    """What the library writes of prompt tuning (seen with adapters 1.3.0)."""
    made = folder(path, "seq_bn", {"bert.prompt_tuning.prompt_tunings.peer.prompt_embedding.weight": tokens})
    config = json.loads((made / "adapter_config.json").read_text(encoding="utf-8"))
    config["config"] = {
        "architecture": "prompt_tuning", "combine": "prefix", "init_weights_seed": None,
        "prompt_init": "random_uniform", "prompt_init_text": None, "prompt_length": 4, **changes,
    }  # fmt: skip
    (made / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return made


@pytest.mark.parametrize(("combine", "leads"), [("prefix", True), ("prefix_after_bos", False)])
def test_prompt_tuning_of_an_encoder(combine: str, leads: bool, tmp_path: Path) -> None:
    tokens = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    adapter = tt.load(tiny("bert"), prompt_folder(tmp_path / "theirs", tokens, combine=combine))
    assert adapter.method == tt.Prompt(4, init="random", leads=leads, at="states")
    adapter.export(tmp_path / "back", "adapters")
    (back,) = load_file(tmp_path / "back" / "adapter.safetensors").values()
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text(encoding="utf-8"))["config"]
    assert torch.equal(back, tokens) and (config["combine"], config["prompt_length"]) == (combine, 4)


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("bert", {"combine": "behind"}, "combine 'behind'"),
        ("bert", {"prompt_length": 5}, "prompt_length is 5, its tensors have 4"),
        ("llama", {}, "for encoders of texts alone"),
        ("gpt2", {}, "for encoders of texts alone"),
    ],
)
def test_prompt_tuning_that_is_refused(family: str, changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(tt.UserError, match=said):
        tt.load(tiny(family), prompt_folder(tmp_path / "theirs", torch.zeros(4, 32), **changes))


@pytest.mark.parametrize(("to", "method"), [("adapters", "prompt[length=4]"), ("peft", "prompt[length=4,at=states]")])
def test_prompts_that_the_other_library_has_elsewhere(to: str, method: str, tmp_path: Path) -> None:
    with pytest.raises(tt.UserError, match="at=states"):
        tt.attach(tiny("bert"), method).export(tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


def test_convert_both_ways(written: Written, tmp_path: Path) -> None:
    base = _base(written)
    base.save_pretrained(tmp_path / "base")
    made = folder(tmp_path / "theirs", "seq_bn", written.under("seq_bn/weights"))
    tt.convert(made, tmp_path / "ours", model=str(tmp_path / "base"))
    tt.convert(tmp_path / "ours", tmp_path / "back", to="adapters", model=str(tmp_path / "base"))
    back = load_file(tmp_path / "back" / "adapter.safetensors")
    assert sum(tensor.numel() for tensor in back.values()) == sum(
        tensor.numel() for tensor in written.under("seq_bn/weights").values()
    )


def test_refusals(written: Written, tmp_path: Path) -> None:
    tensors = written.under("seq_bn/weights")
    model = _base(written)
    pickled = folder(tmp_path / "pickled", "seq_bn", tensors)
    (pickled / "adapter.safetensors").rename(pickled / "pytorch_adapter.bin")
    with pytest.raises(tt.UserError, match=r"safetensors"):
        tt.load(model, pickled)
    odd = folder(tmp_path / "odd", "seq_bn", tensors, phm_layer=True)
    with pytest.raises(tt.UserError, match="phm"):
        tt.load(model, odd)
    unknown = folder(tmp_path / "unknown", "lora", tensors, architecture="reft")
    with pytest.raises(tt.UserError, match="reft"):
        tt.load(model, unknown)
    lacking = folder(tmp_path / "lacking", "seq_bn", dict(list(tensors.items())[1:]))
    with pytest.raises(tt.UserError):
        tt.load(model, lacking)
    broken = folder(tmp_path / "broken", "seq_bn", tensors)
    (broken / "adapter.safetensors").write_bytes((broken / "adapter.safetensors").read_bytes()[:100])
    with pytest.raises(tt.UserError):
        tt.load(model, broken)
    bare = folder(tmp_path / "bare", "seq_bn", tensors)
    (bare / "adapter.safetensors").unlink()
    with pytest.raises(tt.UserError, match=r"has no adapter\.safetensors"):
        tt.load(model, bare)
    outside = folder(tmp_path / "outside", "seq_bn", {f"../../{key}": tensor for key, tensor in tensors.items()})
    with pytest.raises(tt.UserError):
        tt.load(model, outside)
    huge = folder(tmp_path / "huge", "lora", written.under("lora/weights"), r=10**9)
    with pytest.raises(tt.UserError, match="rank is 1e\\+09, its tensors have 8"):
        tt.load(model, huge)
    assert not tt.adapters(model)


def flexible_folder(
    path: Path, family: str, layers: int, kind: str = "classification", **head: Any
) -> tuple[Path, Any]:
    """A bottleneck and a head of one of the library's flexible models; gives the head's tensors."""
    width, places = 32, (1, 4)[:layers]
    tt.attach(tiny(family), "pfeiffer[size=4]").export(path, "adapters")
    for file in path.glob("*head*"):
        file.unlink()
    draw = torch.Generator().manual_seed(1)
    tensors = {}
    for place in places:
        out = 3 if place == places[-1] else width
        tensors[f"heads.peer.{place}.weight"] = torch.randn(out, width, generator=draw)
        tensors[f"heads.peer.{place}.bias"] = torch.randn(out, generator=draw)
    save_file(tensors, path / "model_head.safetensors")
    config = {
        "activation_function": "tanh", "bias": True, "head_type": kind, "layers": layers, "num_labels": 3,
        "label2id": {"a": 0, "b": 1, "c": 2}, "use_pooler": False, **head,
    }  # fmt: skip
    about = {"model_class": "BertAdapterModel", "name": "peer", "config": config}
    (path / "head_config.json").write_text(json.dumps(about), encoding="utf-8")
    return path, tensors


@pytest.mark.parametrize(
    ("family", "layers", "head", "names"),
    [
        ("bert", 1, {"use_pooler": True}, {1: "classifier"}),
        ("roberta", 2, {}, {1: "classifier.dense", 4: "classifier.out_proj"}),
        ("electra", 2, {"activation_function": "gelu"}, {1: "classifier.dense", 4: "classifier.out_proj"}),
    ],
)
def test_heads_of_flexible_models(family: str, layers: int, head: Any, names: dict[int, str], tmp_path: Path) -> None:
    made, tensors = flexible_folder(tmp_path / "theirs", family, layers, **head)
    model = tiny(family)
    adapter = tt.load(model, made)
    (own,) = (copy for _, copy in head_parts(adapter))
    state = {f"classifier.{key}": value for key, value in own.state_dict().items()}
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"} and output(model, inputs(family)).shape[-1] == 3
    for number, path in names.items():
        assert torch.equal(state[f"{path}.weight"], tensors[f"heads.peer.{number}.weight"])
        assert torch.equal(state[f"{path}.bias"], tensors[f"heads.peer.{number}.bias"])


@pytest.mark.parametrize(
    ("family", "layers", "head"),
    [
        ("bert", 2, {}),
        ("bert", 1, {}),
        ("bert", 1, {"kind": "tagging"}),
        ("roberta", 1, {"use_pooler": True}),
        ("roberta", 2, {"activation_function": "relu"}),
        ("electra", 2, {"activation_function": "tanh"}),
    ],
)
def test_heads_that_the_class_has_not(family: str, layers: int, head: Any, tmp_path: Path) -> None:
    made, _ = flexible_folder(tmp_path / "theirs", family, layers, **head)
    with pytest.raises(tt.UserError, match="layers is not the one that"):
        tt.load(tiny(family), made)

"""peft's folders, written by peft itself: read, written back and read by peft, with the same logits each way."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

import trimtab as tt
from tiny import inputs, tiny
from trimtab.errors import UserError

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

TOLERANCE = 1e-5
TASK = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": None}
NORMS = {"llama": None, "gpt2": ["ln_1", "ln_2", "ln_f"], "bert": ["LayerNorm"], "t5": None}
QV = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"], "bert": ["query", "value"], "t5": ["q", "v"]}
DOWN = {"llama": ["down_proj"], "gpt2": ["mlp.c_proj"], "bert": ["intermediate.dense"], "t5": ["wo"]}


def _lora(family: str, **options: Any) -> Any:
    given = {"r": 3, "lora_alpha": 5, "target_modules": QV[family], "task_type": TASK[family], **options}
    return peft.LoraConfig(**given)


def _patterns(family: str) -> Any:
    """Another rank and another scale for one of the modules."""
    (name,) = DOWN[family]
    targets = [*QV[family], name]
    return _lora(family, target_modules=targets, rank_pattern={name: 2}, alpha_pattern={name: 7})


KINDS = {
    "lora": _lora,
    "rslora": lambda family: _lora(family, use_rslora=True),
    "dora": lambda family: _lora(family, use_dora=True),
    "patterns": _patterns,
    "dora-patterns": lambda family: _lora(
        family, use_dora=True, target_modules=[*QV[family], *DOWN[family]], rank_pattern={DOWN[family][0]: 5}
    ),
    "some-layers": lambda family: _lora(family, layers_to_transform=[0, 2]),
    "ia3": lambda family: peft.IA3Config(task_type=TASK[family]),
    "layernorm": lambda family: peft.LNTuningConfig(task_type=TASK[family], target_modules=NORMS[family]),
    "adaption": lambda family: peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type=TASK[family]),
    "prompt": lambda family: peft.PromptTuningConfig(
        num_virtual_tokens=4, task_type=TASK[family] or "SEQ_2_SEQ_LM", num_transformer_submodules=1
    ),
    "prefix": lambda family: peft.PrefixTuningConfig(num_virtual_tokens=4, task_type=TASK[family] or "SEQ_2_SEQ_LM"),
    "prefix-network": lambda family: peft.PrefixTuningConfig(
        num_virtual_tokens=4,
        task_type=TASK[family] or "SEQ_2_SEQ_LM",
        prefix_projection=True,
        encoder_hidden_size=6,
    ),
    "p-tuning": lambda family: peft.PromptEncoderConfig(
        num_virtual_tokens=4,
        task_type=TASK[family] or "SEQ_2_SEQ_LM",
        num_transformer_submodules=1,
        encoder_hidden_size=16,
    ),
}
NOT_OURS = {("gpt2", "adaption")}  # refused, see below
NOT_PEFTS = {("bert", "adaption"), ("t5", "adaption")}
CASES = [(family, kind) for family in TASK for kind in KINDS if (family, kind) not in NOT_OURS | NOT_PEFTS]


def base(family: str) -> PreTrainedModel:
    """A tiny model that peft's class for encoder-decoders takes: it asks for a method that transformers 5 has no more,
    and never calls it in a forward."""
    model = tiny(family)
    if family == "t5":
        model._prepare_encoder_decoder_kwargs_for_generation = None  # type: ignore[attr-defined]
    return model


def written_by_peft(family: str, config: Any, folder: Path) -> torch.Tensor:
    """A folder with a non-zero adapter, as peft saves it; gives peft's logits."""
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base(family), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                size = 0.02 if "transform" in name or "mlp_head" in name else 0.1
                parameter.add_(size * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return peft_logits(family, folder)


def peft_logits(family: str, folder: Path) -> torch.Tensor:
    """What peft makes of a folder, at the text's positions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(base(family), folder).eval()
    logits = logits_of(model, family)
    plain = logits_of(tiny(family), family)
    return logits[:, -plain.shape[1] :] if logits.dim() == 3 else logits


def logits_of(model: Any, family: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(family)).logits


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_there_and_back(family: str, kind: str, tmp_path: Path) -> None:
    """peft's folder here, our folder of it, and peft on what we write of that."""
    expected = written_by_peft(family, KINDS[kind](family), tmp_path / "peft")
    assert (expected - logits_of(tiny(family), family)).abs().max() > 1e-2
    model = tiny(family)
    adapter = tt.load(model, tmp_path / "peft")
    assert (logits_of(model, family) - expected).abs().max() <= TOLERANCE
    adapter.save(tmp_path / "ours")
    again = tiny(family)
    reloaded = tt.load(again, tmp_path / "ours")
    assert torch.equal(logits_of(again, family), logits_of(model, family))
    reloaded.export(tmp_path / "back", "peft")
    assert (peft_logits(family, tmp_path / "back") - expected).abs().max() <= TOLERANCE


# -- what is trained here ---------------------------------------------------------------------------------------------

OURS = [
    ("llama", "lora[r=3,targets=q,v,down]"),
    ("llama", "lora[r=3,init=pissa]"),
    ("llama", "lora|head"),
    ("gpt2", "lora[r=3,targets=q,v]"),  # one module there, two updates here
    ("gpt2", "lora[r=2,targets=q,k,up,dora=true]"),
    ("gpt2", "lora[r=2,targets=q,v,rank_stabilised=true]"),
    ("gpt2", "ia3"),
    ("bert", "lora[r=3,layers=-2:]"),
    ("bert", "ia3"),
    ("bert", "prompt[length=4,leads=true]"),
    ("t5", "lora[r=3]"),
    ("t5", "layernorm"),
    ("t5", "prefix[length=4,hidden=8,encoder=false,cross=false,relative=true]"),
    ("llama", "prefix[length=4,hidden=8]"),
    ("gpt2", "p-tuning-v2[length=4,network=true,hidden=8,dropout=0]"),
    ("llama", "p-tuning[length=4]"),
    ("llama", "llama-adapter[length=4,gates=layer,layers=-2:]"),  # with tanh
]


@pytest.mark.parametrize(("family", "method"), OURS)
def test_peft_says_the_same_of_ours(family: str, method: str, tmp_path: Path) -> None:
    """Adapters of ours that peft would have made otherwise: shared modules, networks, gates under tanh."""
    model = tiny(family)
    torch.manual_seed(4)
    adapter = tt.attach(model, method)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    expected = logits_of(model, family)
    adapter.export(tmp_path, "peft")
    assert (peft_logits(family, tmp_path) - expected).abs().max() <= TOLERANCE
    assert (expected - logits_of(tiny(family), family)).abs().max() > 1e-3


def test_lora_has_the_layout_that_servers_read(tmp_path: Path) -> None:
    """One A and one B a projection, under names and with fields that vLLM and llama.cpp's converter look for."""
    tt.attach(tiny("llama"), "lora[r=4,alpha=6,targets=q,v,down]").export(tmp_path, "peft")
    tensors, config = load_file(tmp_path / "adapter_model.safetensors"), _config(tmp_path)
    names = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    wanted = {
        f"base_model.model.model.layers.{layer}.{name}.lora_{part}.weight"
        for layer in range(3)
        for name in names
        for part in "AB"
    }
    assert tensors.keys() == wanted
    assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 6, "LORA")
    assert (config["task_type"], config["use_rslora"], config["bias"]) == ("CAUSAL_LM", False, "none")


def test_another_number_of_classes(tmp_path: Path) -> None:
    """The head of the folder decides, whatever the base's is."""
    config = tiny("bert").config
    config.num_labels = 5
    other = type(tiny("bert"))(config)
    other.bert.load_state_dict(tiny("bert").bert.state_dict())
    model = peft.get_peft_model(other, _lora("bert")).eval()
    model.save_pretrained(tmp_path)
    ours = tiny("bert")
    tt.load(ours, tmp_path)
    assert (logits_of(ours, "bert") - logits_of(model, "bert")).abs().max() <= TOLERANCE
    assert ours.config.num_labels == 5


# -- what is refused --------------------------------------------------------------------------------------------------


def _config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))


def _change(folder: Path, **fields: Any) -> None:
    changed = {**_config(folder), **fields}
    (folder / "adapter_config.json").write_text(json.dumps(changed), encoding="utf-8")


@pytest.fixture(scope="module")
def lora_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    written_by_peft("llama", _lora("llama"), folder)
    return folder


@pytest.fixture
def folder(lora_folder: Path, tmp_path: Path) -> Path:
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / file).write_bytes((lora_folder / file).read_bytes())
    return tmp_path


def _refused(folder: Path, *words: str, family: str = "llama") -> None:
    """One sentence with these words, and a model as it was."""
    model = tiny(family)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(UserError) as error:
        tt.load(model, folder)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)
    assert not hasattr(model, "trimtab") and model.state_dict().keys() == before.keys()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"peft_type": "VERA"}, ("VERA", "LORA")),
        ({"peft_type": 3}, ("peft_type", "a text")),
        ({"bias": "all"}, ("bias=all",)),
        ({"init_lora_weights": "pissa_niter_4"}, ("pissa", "path_initial_model_for_weight_conversion")),
        ({"trainable_token_indices": [1]}, ("trainable_token_indices",)),
        ({"layer_replication": [[0, 2]]}, ("layer_replication",)),
        ({"r": 10**9}, ("rank 1e+09", "have 3")),
        ({"r": "eight"}, ("r must be a number",)),
        ({"lora_alpha": 10**400}, ("finite",)),
        ({"lora_alpha": 0}, ("lora_alpha is 0",)),
        ({"alpha_pattern": {"(a+)+$": 4}}, ("(a+)+$",)),
        ({"alpha_pattern": {"a\\": 4}}, ("broken",)),
        ({"rank_pattern": [3]}, ("rank_pattern", "object")),
        ({"use_dora": True}, ("lora_magnitude_vector",)),
        ({"use_dora": "yes"}, ("true or false",)),
        ({"lora_dropout": 1.5}, ("[0, 1)",)),
    ],
)
def test_refuses_what_a_configuration_may_not_say(folder: Path, fields: dict[str, Any], words: tuple[str, ...]) -> None:
    _change(folder, **fields)
    _refused(folder, *words)


def test_refuses_a_pickle_and_says_what_to_do(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    _refused(folder, "adapter_model.bin", "pickle", "model.save_pretrained(folder)")


def test_refuses_tensors_without_a_place(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "base_model.model.model.embed_tokens.weight": torch.zeros(2)}, file)
    _refused(folder, "no place", "embed_tokens")
    first = next(iter(tensors))
    save_file({**tensors, first: torch.zeros(3, 7)}, file)
    _refused(folder, "[3, 7]")
    save_file({key: tensor for key, tensor in tensors.items() if key != first}, file)
    _refused(folder, "has no tensor", first)
    save_file({**tensors, first: torch.zeros(3, 32, dtype=torch.int64)}, file)
    _refused(folder, "int64")


def test_refuses_another_model(folder: Path) -> None:
    _refused(folder, "no place", family="gpt2")


@pytest.mark.parametrize("content", ["[" * 100_000, "{", "[1]", '{"peft_type": ' + '{"a":' * 5000 + "1" + "}" * 5001])
def test_refuses_a_broken_configuration(folder: Path, content: str) -> None:
    (folder / "adapter_config.json").write_text(content, encoding="utf-8")
    _refused(folder, "adapter_config.json" if not content.startswith('{"p') else "")


def test_refuses_a_configuration_of_megabytes(folder: Path) -> None:
    _change(folder, revision="x" * 2_000_000)
    _refused(folder, "1,048,576 bytes")


@pytest.mark.parametrize(("family", "kind"), sorted(NOT_OURS))
def test_refuses_what_peft_does_otherwise(family: str, kind: str, tmp_path: Path) -> None:
    config = KINDS[kind](family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(base(family), config).save_pretrained(tmp_path)
    _refused(tmp_path, "output projection", "gpt2", family=family)


@pytest.mark.parametrize("layers", [2, 4])
def test_an_even_decoder_shares_prefixes_in_peft(layers: int, tmp_path: Path) -> None:
    """Read, written back when it is unchanged, and refused once layers that share one differ."""
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "decoder_start_token_id": 0}
    torch.manual_seed(0)
    made = T5ForConditionalGeneration(T5Config(**sizes, num_layers=layers, num_decoder_layers=layers)).eval()
    made._prepare_encoder_decoder_kwargs_for_generation = None  # type: ignore[attr-defined]
    bare = copy.deepcopy(made)
    wrapped = peft.get_peft_model(copy.deepcopy(made), KINDS["prefix"]("t5")).eval()
    expected = logits_of(wrapped, "t5")
    wrapped.save_pretrained(tmp_path / "theirs")
    adapter = tt.load(made, tmp_path / "theirs")
    assert (logits_of(made, "t5") - expected).abs().max() <= TOLERANCE < (logits_of(bare, "t5") - expected).abs().max()
    adapter.export(tmp_path / "back", "peft")
    back = peft.PeftModel.from_pretrained(bare, tmp_path / "back").eval()
    assert (logits_of(back, "t5") - expected).abs().max() <= TOLERANCE
    with torch.no_grad():
        next(adapter.parameters()).add_(1)
    with pytest.raises(UserError, match=f"{layers // 2} apart of a decoder with {layers} layers"):
        adapter.export(tmp_path / "refused", "peft")
    assert not (tmp_path / "refused").exists()


def test_refuses_virtual_tokens_of_a_decoder_behind_an_encoder(tmp_path: Path) -> None:
    config = peft.PromptTuningConfig(num_virtual_tokens=4, task_type="SEQ_2_SEQ_LM")
    peft.get_peft_model(base("t5"), config).save_pretrained(tmp_path)
    _refused(tmp_path, "num_transformer_submodules=1", family="t5")


@pytest.mark.parametrize(
    ("family", "method", "words"),
    [
        ("llama", "pfeiffer", ("pfeiffer", "lora")),
        ("llama", "llama-adapter", ("gates=layer",)),
        ("llama", "llama-adapter[gates=layer,layers=0]", ("top layers",)),
        ("gpt2", "llama-adapter[gates=layer]", ("gpt2",)),
        ("bert", "prompt", ("leads=true",)),
        ("t5", "prefix", ("encoder=false,cross=false,relative=true",)),
        ("t5", "p-tuning-v2", ("encoder=false,cross=false,relative=true",)),
        ("bart", "prefix", ("of T5 alone",)),
        ("llama", "prefix[layers=0]", ("every layer",)),
        ("llama", "lora|ia3[targets=k]", ("several methods",)),
    ],
)
def test_refuses_to_write(family: str, method: str, words: tuple[str, ...], tmp_path: Path) -> None:
    adapter = tt.attach(tiny(family), method)
    with pytest.raises(UserError) as error:
        adapter.export(tmp_path / "peft", "peft")
    assert all(word in str(error.value) for word in words) and not (tmp_path / "peft").exists()


def test_an_unknown_format_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'peft'"):
        tt.attach(tiny("llama"), "lora").export(tmp_path, "pefd")


def test_leads_is_for_encoders() -> None:
    with pytest.raises(UserError, match="leads=true"):
        tt.attach(tiny("llama"), "prompt[leads=true]")


def test_ia3_does_not_scale_an_input_that_others_read() -> None:
    with pytest.raises(UserError, match=r"attn\.c_attn"):
        tt.attach(tiny("gpt2"), "ia3[targets=k,inputs=k]")

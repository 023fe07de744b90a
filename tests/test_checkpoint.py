"""Adapter folders: strict, atomic, safetensors only, bound to their base."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import trimtab as tt
from foreign import rewrite
from tiny import inputs, output, tiny
from trimtab.checkpoint import CONFIG, WEIGHTS, atomic_folder, atomic_write, model_fingerprint, read_adapter_config


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    adapter = tt.attach(tiny("llama"), "lora[r=2]", "mine")
    for parameter in adapter.parameters():
        parameter.data.normal_()
    return adapter.save(tmp_path / "adapter", task={"name": "classify", "labels": ["是", "否"]})


def test_folder_contents(saved: Path) -> None:
    assert sorted(file.name for file in saved.iterdir()) == [CONFIG, WEIGHTS]
    config = read_adapter_config(saved)
    assert config["method"]["name"] == "lora" and config["method"]["r"] == 2
    assert config["name"] == "mine" and config["base"]["model_type"] == "llama"
    assert "是" in (saved / CONFIG).read_text(encoding="utf-8")
    assert tt.load(tiny("llama"), saved).name == "mine"
    assert tt.load(tiny("llama"), saved, "other").name == "other"


def test_fingerprint_knows_the_weights_and_not_the_precision() -> None:
    model = tiny("llama")
    plain = model_fingerprint(model)
    assert model_fingerprint(tiny("llama", torch.bfloat16)) == plain
    tt.attach(model, "lora[r=2]")
    assert model_fingerprint(model) == plain
    other = tiny("llama")
    other.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
    assert model_fingerprint(other) != plain


def _config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def _tensors(folder: Path, change: Any) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    rewrite(folder, tensors)  # without the note of its method


def _missing(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["layer0_q.A"]


def _extra(tensors: dict[str, torch.Tensor]) -> None:
    tensors["layer9_q.A"] = torch.zeros(1)


def _shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["layer0_q.A"] = torch.zeros(3, 3)


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (lambda folder: _tensors(folder, _missing), "missing layer0_q.A"),
        (lambda folder: _tensors(folder, _extra), "unexpected layer9_q.A"),
        (lambda folder: _tensors(folder, _shape), r"layer0_q.A has shape \[3, 3\]"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"not safetensors"), "safetensors"),
        (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9]), "safetensors"),
        (lambda folder: (folder / WEIGHTS).unlink(), f"no {WEIGHTS}"),
        (lambda folder: (folder / CONFIG).write_text("{"), "broken"),
        (lambda folder: (folder / CONFIG).write_text("[1]"), "no JSON object"),
        (lambda folder: (folder / CONFIG).write_text("{}"), "lacks format"),
        (lambda folder: (folder / CONFIG).unlink(), "no adapter folder"),
        (lambda folder: _config(folder, method={"name": "lora", "r": 3}), "cut short"),
        (lambda folder: _config(folder, format=99), "format 99"),
        (lambda folder: _config(folder, method={"name": "lore"}), "'lora'"),
        (lambda folder: _config(folder, method={"name": "lora", "rank": 2}), "rank"),
        (lambda folder: _config(folder, method={"name": "lora", "r": "many"}), "many"),
        (lambda folder: _config(folder, base={"model_type": "bert"}), "bert"),
        (lambda folder: _config(folder, peft_type="LORA"), "no LoRA tensor"),
    ],
)
def test_broken_folders_are_refused_and_leave_the_model_alone(saved: Path, break_it: Any, sentence: str) -> None:
    break_it(saved)
    model = tiny("llama")
    with pytest.raises(tt.UserError, match=sentence):
        tt.load(model, saved)
    assert not hasattr(model, "trimtab") and all(p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_pickle_is_never_read(saved: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(saved / "owned"),)

    (saved / WEIGHTS).unlink()
    (saved / "adapter_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(tt.UserError, match="pickle"):
        tt.load(tiny("llama"), saved)
    assert not (saved / "owned").exists()


def test_a_pickle_under_the_safetensors_name_is_refused(saved: Path) -> None:
    (saved / WEIGHTS).write_bytes(pickle.dumps({"layer0_q.A": 1}))
    with pytest.raises(tt.UserError, match="safetensors"):
        tt.load(tiny("llama"), saved)


def test_another_base_is_refused_unless_forced(saved: Path) -> None:
    model = tiny("llama")
    model.model.norm.weight.data += 1
    with pytest.raises(tt.UserError, match="another base model"):
        tt.load(model, saved)
    assert tt.load(model, saved, force=True).active


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")

    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(tt.UserError, match="space"):
        atomic_write(target, fail)
    assert target.read_text() == "old" and [file.name for file in tmp_path.iterdir()] == ["file"]


def test_atomic_folder(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    atomic_folder(target, lambda folder: (folder / "a").write_text("1"))
    assert (target / "a").read_text() == "1"
    with pytest.raises(tt.UserError, match="overwrite"):
        atomic_folder(target, lambda folder: None)

    def fail(folder: Path) -> None:
        (folder / "a").write_text("2")
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError):
        atomic_folder(target, fail, overwrite=True)
    assert (target / "a").read_text() == "1"
    atomic_folder(target, lambda folder: (folder / "b").write_text("3") and None, overwrite=True)
    assert [file.name for file in target.iterdir()] == ["b"] and list(tmp_path.iterdir()) == [target]


def test_full_is_a_model_folder(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny("llama")
    adapter = tt.attach(model, "full")
    model.model.norm.weight.data += 1
    adapter.save(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.allclose(output(again, inputs("llama")), output(model, inputs("llama")), atol=1e-6)
    with pytest.raises(tt.UserError, match="whole model"):
        tt.load(tiny("llama"), tmp_path)


def test_saving_and_loading_touch_no_network(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    adapter = tt.load(tiny("llama"), saved)
    adapter.save(saved.parent / "again")

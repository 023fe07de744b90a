"""What `trimtab inspect` says of a folder, whichever library wrote it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import trimtab as tt
from tiny import tiny
from trimtab import __main__ as cli
from trimtab.inspection import look

CONFIG = "adapter_config.json"


def saved(
    path: Path, method: str = "lora[r=2,targets=q]", library: str = "", family: str = "llama"
) -> tuple[Path, int]:
    """A folder of one library's, and how many numbers its adapter has."""
    adapter = tt.attach(tiny(family), method)
    if library:
        adapter.export(path, library)
    else:
        adapter.save(path)
    return path, sum(parameter.numel() for parameter in adapter.parameters())


def change(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    (folder / CONFIG).write_text(json.dumps({**config, **fields}), encoding="utf-8")


def run(*arguments: object) -> str:
    result = CliRunner().invoke(cli.app, ["inspect", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_folder_of_peft(tmp_path: Path) -> None:
    folder, count = saved(tmp_path / "a", library="peft")
    change(folder, base_model_name_or_path="owner/model")
    found = look(folder)
    assert (found["library"], found["kind"], found["method"]) == ("peft", "LORA", "lora")
    assert found["fields"]["r"] == 2 and found["fields"]["target_modules"] == ["q_proj"]
    assert (found["base"], found["task"]["name"]) == ("owner/model", "CAUSAL_LM")
    assert found["parameters"] == {"trainable": count}
    assert found["bytes"] == (folder / "adapter_model.safetensors").stat().st_size
    assert found["warnings"] == []
    said = run(folder)
    assert "LORA of peft; here lora" in said and "r=2" in said and f"{count:,} trained parameters" in said
    assert json.loads(run(folder, "--json")) == found


def test_a_folder_of_adapters_with_its_head(tmp_path: Path) -> None:
    folder, count = saved(tmp_path / "a", "pfeiffer[size=4]", "adapters", "bert")
    change(folder, model_name="owner/model")
    found = look(folder)
    assert (found["library"], found["kind"], found["method"]) == ("adapters", "seq_bn", "pfeiffer")
    assert (found["base"], found["family"]) == ("owner/model", "bert")
    assert found["task"]["name"] == "BertForSequenceClassification" and len(found["task"]["labels"]) == 2
    assert found["parameters"] == {"trainable": count} and found["warnings"] == []


@pytest.mark.parametrize("kind", ["VERA", 3])
def test_a_kind_that_is_not_read(kind: Any, tmp_path: Path) -> None:
    folder, _ = saved(tmp_path / "a", library="peft")
    change(folder, peft_type=kind)
    if isinstance(kind, str):
        found = look(folder)
        assert found["method"] == "–" and any("VERA" in sentence for sentence in found["warnings"])
        return
    result = CliRunner().invoke(cli.app, ["inspect", str(folder)])
    assert result.exit_code == 2 and "peft_type must be a text" in result.stderr


@pytest.mark.parametrize("library", ["peft", "adapters"])
def test_pickles_and_damage_and_a_base_that_is_gone_are_warnings(library: str, tmp_path: Path) -> None:
    folder, _ = saved(tmp_path / "a", library=library)
    gone = str(tmp_path / "gone")
    change(folder, **{"base_model_name_or_path" if library == "peft" else "model_name": gone})
    (weights,) = folder.glob("*.safetensors")
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    damaged = look(folder)
    assert any(gone in sentence for sentence in damaged["warnings"])
    assert any("cannot be read as safetensors" in sentence for sentence in damaged["warnings"])
    assert damaged["parameters"] == {"trainable": None}
    weights.rename(folder / "pytorch.bin")
    assert any("pickle" in sentence for sentence in look(folder)["warnings"])
    assert "warn" in run(folder)


def test_our_own_folder_without_its_base_and_with_a_flipped_bit(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path / "a")
    change(folder, base={**json.loads((folder / CONFIG).read_text())["base"], "path": str(tmp_path / "gone")})
    assert [str(tmp_path / "gone") in sentence for sentence in look(folder)["warnings"]] == [True]
    weights = folder / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "damaged" in look(folder)["warnings"][1] and "damaged" in run(folder)


def test_a_folder_of_folders_of_three_libraries(tmp_path: Path) -> None:
    for library in ("", "peft", "adapters"):
        saved(tmp_path / (library or "own"), library=library)
    found = json.loads(run(tmp_path, "--json"))
    assert [one["library"] for one in found] == ["adapters", "trimtab", "peft"]
    assert run(tmp_path).count("lora") >= 3

"""`trimtab convert`, on folders as they are on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import trimtab as tt
from tiny import inputs, tiny
from trimtab.__main__ import app


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for family in ("llama", "bert", "t5"):
        tiny(family).save_pretrained(folder / family)
    return folder


def _adapter(family: str, method: str, base: Path, folder: Path) -> torch.Tensor:
    """A folder of ours that names its base; gives its logits."""
    model = tiny(family)
    model.config._name_or_path = str(base)
    adapter = tt.attach(model, method)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        adapter.save(folder)
        return model(**inputs(family)).logits


def _run(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["convert", *map(str, arguments)])
    return done.exit_code, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("family", "method"),
    [("llama", "lora[r=2]"), ("bert", "ia3"), ("t5", "lora[r=2]"), ("llama", "prompt[length=3]")],
)
def test_there_and_back(family: str, method: str, bases: Path, tmp_path: Path) -> None:
    expected = _adapter(family, method, bases / family, tmp_path / "ours")
    code, printed, _ = _run(tmp_path / "ours", "--to", "peft", "--output", tmp_path / "peft")
    assert code == 0 and printed.strip() == str(tmp_path / "peft")
    assert sorted(file.name for file in (tmp_path / "peft").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert _run(tmp_path / "peft", "--output", tmp_path / "back")[0] == 0
    model = tiny(family)
    tt.load(model, tmp_path / "back")
    with torch.no_grad():
        assert (model(**inputs(family)).logits - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("family", "method"), [("llama", "lora[r=2]"), ("bert", "pfeiffer[size=4]"), ("t5", "houlsby[size=4,norms=false]")]
)
def test_there_and_back_through_adapters(family: str, method: str, bases: Path, tmp_path: Path) -> None:
    expected = _adapter(family, method, bases / family, tmp_path / "ours")
    code, printed, said = _run(tmp_path / "ours", "--to", "adapters", "--output", tmp_path / "theirs")
    assert code == 0 and printed.strip() == str(tmp_path / "theirs"), said
    assert {"adapter_config.json", "adapter.safetensors"} <= {file.name for file in (tmp_path / "theirs").iterdir()}
    assert _run(tmp_path / "theirs", "--output", tmp_path / "back")[0] == 0
    model = tiny(family)
    tt.load(model, tmp_path / "back")
    with torch.no_grad():
        assert (model(**inputs(family)).logits - expected).abs().max() <= 1e-5


def test_from_one_of_the_others_to_the_other(bases: Path, tmp_path: Path) -> None:
    expected = _adapter("llama", "lora[r=2]", bases / "llama", tmp_path / "ours")
    for source, to in (("ours", "peft"), ("peft", "adapters"), ("adapters", "peft")):
        goal = tmp_path / (to if source != "adapters" else "last")
        assert _run(tmp_path / source, "--to", to, "--output", goal)[0] == 0
    model = tiny("llama")
    tt.load(model, tmp_path / "last")
    with torch.no_grad():
        assert (model(**inputs("llama")).logits - expected).abs().max() <= 1e-5


def test_the_base_may_be_named(bases: Path, tmp_path: Path) -> None:
    _adapter("llama", "lora[r=2]", tmp_path / "nowhere", tmp_path / "ours")
    code, _, said = _run(tmp_path / "ours", "--to", "peft", "--output", tmp_path / "peft")
    assert code == 2 and "nowhere" in said and not (tmp_path / "peft").exists()
    given = ("--model", bases / "llama")
    assert _run(tmp_path / "ours", "--to", "peft", "--output", tmp_path / "peft", *given)[0] == 0


@pytest.fixture
def ours(bases: Path, tmp_path: Path) -> Path:
    _adapter("llama", "lora[r=2]", bases / "llama", tmp_path / "ours")
    return tmp_path / "ours"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--to", "peftt", "--output", "{tmp}/new"], "did you mean 'peft'"),
        (["--output", "{tmp}/new"], "an adapter of trimtab already"),
        (["--to", "peft", "--output", "{tmp}/ours"], "is the adapter's own folder"),
        (["--to", "peft", "--output", "{tmp}/full"], "give --overwrite"),
        (["--to", "peft", "--output", "{tmp}/full", "--overwrite"], "notes.txt, which is no file of an adapter"),
        (["--to", "peft", "--output", "{tmp}/full/notes.txt"], "is a file"),
    ],
)
def test_refuses(options: list[str], words: str, ours: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine", encoding="utf-8")
    code, printed, said = _run(ours, *(option.format(tmp=tmp_path) for option in options))
    assert (code, printed) == (2, "") and words in said and len(said.splitlines()) == 1
    assert (tmp_path / "full" / "notes.txt").read_text(encoding="utf-8") == "mine" and not (tmp_path / "new").exists()


def test_overwrites_an_adapter(ours: Path, tmp_path: Path) -> None:
    for options in ([], ["--overwrite"]):
        assert _run(ours, "--to", "peft", "--output", tmp_path / "peft", *options)[0] == 0


def test_refuses_what_is_no_adapter(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    code, _, said = _run(tmp_path / "empty", "--output", tmp_path / "new")
    assert code == 2 and "no adapter folder" in said
    assert _run(tmp_path / "none", "--output", tmp_path / "new")[0] == 2


def test_says_when_no_base_is_known(ours: Path, tmp_path: Path) -> None:
    assert _run(ours, "--to", "peft", "--output", tmp_path / "peft")[0] == 0
    path = tmp_path / "peft" / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "base_model_name_or_path": None}), encoding="utf-8")
    code, _, said = _run(tmp_path / "peft", "--output", tmp_path / "new")
    assert code == 2 and "--model" in said

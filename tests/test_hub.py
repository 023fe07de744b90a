"""Adapters on the hub, against a server of our own: what is asked for, what is written, what is said when it fails."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import constants

import fake_hub
import trimtab as tt
from fake_hub import TOKEN, Hub
from test_cli import ROWS, TRAIN, contents, refused, run, save_model, write_rows
from tiny import inputs, tiny
from trimtab.errors import UserError
from trimtab.report import model_card, read_run


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with fake_hub.running() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.address)
        template = found.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("hub")
    base, data = save_model(place / "base", "llama"), write_rows(place / "secret.jsonl", ROWS)
    done = run("train", "--model", base, "--data", data, "--method", "lora[r=2]", "--output", place / "out", *TRAIN)
    assert done.exit_code == 0, done.output
    return place / "out"


def _adapter(folder: Path, seed: int = 1) -> torch.Tensor:
    model = tiny("llama")
    adapter = tt.attach(model, "lora[r=2]")
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        adapter.save(folder)
        return model(**inputs("llama")).logits


def _logits(source: str) -> torch.Tensor:
    model = tiny("llama")
    tt.load(model, source)
    with torch.no_grad():
        return model(**inputs("llama")).logits


def test_loads_by_id_and_revision_and_takes_no_pickle_or_code(hub: Hub, tmp_path: Path) -> None:
    old, new = _adapter(tmp_path / "old", 1), _adapter(tmp_path / "new", 2)
    more = {"adapter_model.bin": b"pickle", "code.py": b"import os", "README.md": b"text"}
    hub.put("user/name", contents(tmp_path / "old"), "v1")
    hub.put("user/name", {**contents(tmp_path / "new"), **more})
    assert torch.equal(_logits("user/name"), new) and torch.equal(_logits("user/name@v1"), old)
    fetched = {path.rpartition("/")[2] for path in hub.asked if "/resolve/" in path}
    assert fetched == {"adapter_config.json", "adapter_model.safetensors"}


def test_the_cache_serves_without_a_network(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _adapter(tmp_path / "a")
    hub.put("user/name", contents(tmp_path / "a"))
    _logits("user/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(_logits("user/name"), expected)
    with pytest.raises(UserError, match=r"^there is no folder user/other, and the hub cannot be reached$"):
        _logits("user/other")


def test_what_exists_here_asks_nobody(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _adapter(tmp_path / "user" / "name")
    monkeypatch.chdir(tmp_path)
    assert torch.equal(_logits("user/name"), expected) and not hub.asked


def test_what_is_not_there(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _adapter(tmp_path / "a")
    hub.put("user/name", contents(tmp_path / "a"))
    said = refused("eval", "user/none")
    assert "there is no folder user/none and no user/none on the hub, or it is private" in said and TOKEN not in said
    assert "has no revision 'v9'" in refused("inspect", "user/name@v9")
    hub.put("user/empty", {"README.md": b""})
    assert "no adapter folder" in refused("generate", "user/empty", "--prompt", "a")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "the hub cannot be reached" in refused("merge", "user/far", "--output", tmp_path / "merged")


def test_push_and_evaluate_what_was_pushed(hub: Hub, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(trained)
    done = run("push", trained, "user/name", "--base", "someone/base")
    assert done.exit_code == 0, (done.output, done.exception)
    assert done.stdout.strip() == f"{hub.address}/user/name" and TOKEN not in done.output
    assert contents(trained) == before
    files = hub.repos["user/name"]["main"]
    assert set(files) == {
        *("adapter_config.json", "adapter_model.safetensors", "README.md", "run.yaml", "metrics.json", "curves.svg")
    }
    assert files["adapter_model.safetensors"] == before["adapter_model.safetensors"]
    assert files["metrics.json"] == before["metrics.json"]
    machine = str(trained.parent).encode()
    assert not [name for name, data in files.items() if machine in data or TOKEN.encode() in data]
    card = files["README.md"].decode()
    assert "# user/name" in card and 'tt.load(model, "user/name")' in card and "trimtab eval user/name" in card
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == "someone/base" and front["library_name"] == "trimtab"
    monkeypatch.setattr("trimtab.tuned._base", lambda *_: str(trained.parent / "base"))  # which is on no hub
    here, there = (
        run("eval", place, "--data", trained.parent / "secret.jsonl", "--every-row", "--json")
        for place in (trained, "user/name")
    )
    assert there.exit_code == 0, (there.output, there.exception)
    assert json.loads(there.stdout) == json.loads(here.stdout)


def test_train_pushes_what_it_made(hub: Hub, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, data = str(trained.parent / "base"), str(trained.parent / "secret.jsonl")
    flags = ["train", "--data", data, "--method", "lora[r=2]", *TRAIN, "--push"]
    said = refused(*flags, "user/new", "--model", base, "--output", tmp_path / "none")
    assert "which nobody else has" in said and not (tmp_path / "none").exists() and not hub.asked
    monkeypatch.setattr("trimtab.hub._is_here", lambda base: False)
    assert "no name on the hub" in refused(*flags, "new", "--model", base, "--output", tmp_path / "none")
    done = run(*flags, "user/new", "--model", base, "--output", tmp_path / "out")
    assert done.exit_code == 0, (done.output, done.exception)
    assert done.stdout.strip().splitlines()[-1] == f"{hub.address}/user/new"
    assert "adapter_model.safetensors" in hub.repos["user/new"]["main"]


@pytest.mark.parametrize(
    ("repo", "options", "broken", "words"),
    [
        ("name", ["--base", "a/b"], 0, "no name on the hub"),
        ("user/name", [], 0, "which nobody else has"),
        ("other/name", ["--base", "a/b"], 0, "the hub answered 403 for other/name: log in"),
        ("user/name", ["--base", "a/b"], 418, "the hub answered 418 for user/name"),
    ],
)
def test_push_refuses(repo: str, options: list[str], broken: int, words: str, hub: Hub, trained: Path) -> None:
    hub.broken = broken
    said = refused("push", trained, repo, *options)
    assert words in said and TOKEN not in said


def test_push_needs_a_login(hub: Hub, trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "log in" in refused("push", trained, "user/name", "--base", "a/b")
    assert "no adapter folder" in refused("push", tmp_path, "user/name")


def test_the_cards_front_matter(trained: Path) -> None:
    facts = read_run(trained)
    facts["run"] = {**facts["run"], "data": "owner/set"}
    front = yaml.safe_load(model_card(facts).split("---\n")[1])
    after = facts["metrics"]["after"]
    assert front["datasets"] == ["owner/set"] and "accuracy" in front["metrics"]
    assert {"trimtab", "lora", "arxiv:2106.09685"} <= set(front["tags"])
    (result,) = front["model-index"][0]["results"]
    assert result["dataset"] == {"name": "owner/set", "type": "owner/set"}
    assert {one["type"]: one["value"] for one in result["metrics"]} == {
        key: value for key, value in after.items() if key != "examples"
    }
    assert "https://arxiv.org/abs/2106.09685" in model_card(facts)
    facts["folder"], facts["run"]["data"] = "a: b # c", "x/y: z"
    odd = yaml.safe_load(model_card(facts).split("---\n")[1])
    assert odd["model-index"][0]["name"] == "a: b # c" and "datasets" not in odd


def test_the_card_is_one_that_huggingface_hub_reads(trained: Path) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard.load(trained / "README.md")
    read: Any = card.data.eval_results
    assert {one.metric_type for one in read} >= {"accuracy", "loss"} and card.data.library_name == "trimtab"

"""Disjoint training: which tensors move, and that each tag's gradients are those of its rows alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

import trimtab as tt
from pictures_by_hand import SIZE, save_vit
from test_cli import refused, run, save_model, write_rows
from test_multimodal_cli import rows_of
from tiny import tiny
from trimtab.stages import by_stage, check_stages, stage_of


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_vit(tmp_path_factory.mktemp("vit"))


def attached(vit: str, name: str = "llama-adapter") -> Any:
    model = tiny("llama")  # whose making seeds torch the first time
    torch.manual_seed(3)
    spec = f"{name}[length=3,layers=0:,image='{vit}',look=global,image_layers=0,image_hidden=8]"
    adapter = tt.attach(model, spec)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return adapter


def examples(stages: list[str | None]) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(4)
    rows = []
    for at, stage in enumerate(stages):
        ids = torch.randint(3, 60, (5 + at,), generator=generator).tolist()
        picture = torch.randn(3, SIZE, SIZE, generator=generator) if at != 1 else None
        rows.append({"input_ids": ids, "labels": [-100] * 2 + ids[2:], "image": picture, "stage": stage})
    return rows


def gradients(
    vit: str, rows: list[dict[str, Any]], folder: Path, name: str = "llama-adapter"
) -> dict[str, torch.Tensor]:
    """What one step of plain gradient descent at rate 1 takes off each tensor."""
    adapter = attached(vit, name)
    before = {key: value.clone() for key, value in adapter.state_dict().items()}
    args = TrainingArguments(
        str(folder), max_steps=1, per_device_train_batch_size=len(rows), learning_rate=1.0, optim="sgd",
        lr_scheduler_type="constant", max_grad_norm=0.0, save_strategy="no", report_to="none", use_cpu=True,
    )  # fmt: skip
    tt.Trainer(adapter.model, args, train_dataset=rows, show=False).train()
    return {key: before[key] - value for key, value in adapter.state_dict().items()}


def targets(rows: list[dict[str, Any]]) -> int:
    return sum(label != -100 for row in rows for label in row["labels"][1:])


@pytest.mark.parametrize("name", ["llama-adapter", "llama-adapter-v2"])
def test_each_tag_gives_the_gradients_of_its_rows(name: str, vit: str, tmp_path: Path) -> None:
    rows = examples(["caption", "instruction", "instruction", "caption"])
    found = gradients(vit, rows, tmp_path, name)
    for stage in ("caption", "instruction"):
        own = [row for row in rows if row["stage"] == stage]
        untagged = gradients(vit, [row | {"stage": None} for row in own], tmp_path, name)
        share = targets(own) / targets(rows)
        for key, value in found.items():
            if key.startswith("layer0_self") == (stage == "caption"):
                assert torch.allclose(value, share * untagged[key], atol=1e-6), key
    assert all(value.abs().sum() > 0 for value in found.values())


@pytest.mark.parametrize("stage", ["caption", "instruction"])
def test_rows_of_one_tag_move_their_tensors_alone(stage: str, vit: str, tmp_path: Path) -> None:
    found = gradients(vit, examples([stage] * 3), tmp_path, "llama-adapter-v2")
    moved = {key for key, value in found.items() if value.abs().sum() > 0}
    assert moved == {key for key in found if key.startswith("layer0_self") == (stage == "caption")}


def test_rows_without_a_tag_train_everything(vit: str, tmp_path: Path) -> None:
    plain = gradients(vit, [row | {"stage": None} for row in examples([None] * 3)], tmp_path)
    assert all(value.abs().sum() > 0 for value in plain.values())


def test_a_batch_comes_apart() -> None:
    batch = {
        "input_ids": torch.arange(6).view(3, 2),
        "images": ["a", None, "b"],
        "stages": ["caption", None, "caption"],
    }
    (first, own), (second, rest) = by_stage(batch)
    assert (first, second) == ("caption", None)
    assert own["input_ids"].tolist() == [[0, 1], [4, 5]] and own["images"] == ["a", "b"]
    assert rest["input_ids"].tolist() == [[2, 3]] and rest["images"] == [None]


def test_a_tag_that_trains_nothing_is_refused(vit: str) -> None:
    adapter = tt.attach(tiny("llama"), f"llama-adapter[length=3,image='{vit}']")
    with pytest.raises(tt.UserError, match="tagged instruction would train nothing"):
        check_stages(adapter)
    with pytest.raises(tt.UserError, match="tagged caption would train nothing"):
        check_stages(tt.attach(tiny("llama"), "lora[r=2]"))
    check_stages(attached(vit))


def test_tags_are_read() -> None:
    assert [stage_of(value) for value in (" Caption", None, "", "instruction")] == [
        "caption",
        None,
        None,
        "instruction",
    ]
    with pytest.raises(tt.UserError, match="did you mean 'caption'"):
        stage_of("captions")


def test_the_command(vit: str, tmp_path: Path) -> None:
    base = save_model(tmp_path / "llama", "llama")
    rows = [row | {"stage": "caption" if row["image"] else "instruction"} for row in rows_of(tmp_path)]
    data, method = write_rows(tmp_path / "rows.jsonl", rows), f"llama-adapter[length=3,layers=0:,image={vit}"
    flags = ["--model", base, "--data", data, "--task", "generate", "--epochs", "1", "--max-length", "64"]
    result = run(
        "train",
        *flags,
        "--method",
        f"{method},image_layers=0]",
        "--stage-column",
        "stage",
        "--output",
        tmp_path / "out",
    )
    assert result.exit_code == 0, (result.output, result.exception)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["task"]["stage_column"] == "stage"
    assert run("eval", tmp_path / "out").exit_code == 0
    wrong = ["train", *flags, "--output", tmp_path / "no"]
    assert "would train nothing" in refused(*wrong, "--method", f"{method}]", "--stage-column", "stage")
    assert "stage column 'stages'" in refused(
        *wrong, "--method", f"{method},image_layers=0]", "--stage-column", "stages"
    )
    spoiled = write_rows(tmp_path / "spoiled.jsonl", [*rows, rows[0] | {"stage": "picture"}])
    wrong[4] = spoiled
    said = refused(*wrong, "--method", f"{method},image_layers=0]", "--stage-column", "stage")
    assert "row " in said and "'picture'" in said
    assert not (tmp_path / "no").exists()

"""Commands with pictures: one trains from a JSONL with `image`, `prompt`, `completion`, one answers, and every
mistake is one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import trimtab as tt
from pictures_by_hand import save_vit
from test_cli import contents, refused, run, save_model, write_rows
from trimtab.evaluate import predict
from trimtab.examples import encode_all
from trimtab.run_data import Source, find_task, load_data
from trimtab.tasks import prepare
from trimtab.train import TrainSettings, with_length, with_method
from trimtab.tuned import evaluate_run

COLOURS = {"red": (220, 20, 20), "blue": (20, 20, 220)}
TASK = ["--task", "generate", "--epochs", "2", "--eval-share", "0.25", "--max-length", "64", "--batch-size", "4"]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Sixteen pictures with a question each, in `pictures/`, and four rows without one."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    rows = []
    for at in range(16):
        name = list(COLOURS)[at % 2]
        Image.new("RGB", (8 + at, 10), COLOURS[name]).save(folder / "pictures" / f"{at}.png")
        rows.append({"image": f"pictures/{at}.png", "prompt": "What colour?", "completion": f" {name}"})
    return rows + [{"image": None, "prompt": f"Say {at}.", "completion": f" {at}"} for at in range(4)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> str:
    return save_vit(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("data")
    return write_rows(folder / "rows.jsonl", rows_of(folder))


def method(vit: str, more: str = "") -> str:
    return f"llama-adapter[length=3,image={vit},image_hidden=8{more}]"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, llama, vit, data) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "out"
    result = run("train", "--model", llama, "--data", data, "--method", method(vit), "--output", folder, *TASK)
    assert result.exit_code == 0, (result.output, result.exception)
    return folder


# What works


def test_one_command_trains_and_another_answers(trained: Path, data: str) -> None:
    picture = Path(data).parent / "pictures" / "3.png"
    ask = ["generate", trained, "--prompt", "What colour?", "--max-new-tokens", "8"]
    shown, again, blind = run(*ask, "--image", picture), run(*ask, "--image", picture), run(*ask)
    assert shown.exit_code == again.exit_code == blind.exit_code == 0, shown.output
    assert shown.stdout == again.stdout


def test_the_model_card_names_both_models(trained: Path, llama: str, vit: str) -> None:
    card = (trained / "README.md").read_text(encoding="utf-8")
    assert llama in card and vit in card and "--image FILE --prompt" in card


def test_the_folder_gives_its_own_numbers_again(trained: Path) -> None:
    after = json.loads((trained / "metrics.json").read_text())["after"]
    found = json.loads(run("eval", trained, "--json").stdout)
    assert found == pytest.approx(after, abs=1e-6)


def test_evaluation_sees_the_pictures(trained: Path, data: str, tmp_path: Path) -> None:
    swapped = [row | {"image": row["image"] and f"pictures/{15 - at}.png"} for at, row in enumerate(rows_of(tmp_path))]
    blind = [row | {"image": None} for row in rows_of(tmp_path)]
    losses = [
        evaluate_run(trained, write_rows(tmp_path / f"{name}.jsonl", rows))["loss"]
        for name, rows in (("own", rows_of(tmp_path)), ("swapped", swapped), ("blind", blind))
    ]
    assert len({round(loss, 7) for loss in losses}) == 3


def test_a_question_is_asked_of_every_picture(trained: Path, data: str) -> None:
    """Examples that differ in their picture alone are different prompts to the text metrics."""
    run_ = tt.load_run(trained)
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()][:2]
    rows = [row | {"image": str(Path(data).parent / row["image"])} for row in rows]
    examples = encode_all(run_.task, rows, run_.tokenizer, 64, "causal")
    assert examples[0].input_ids[: examples[0].prompt_length] == examples[1].input_ids[: examples[1].prompt_length]
    answered = predict(run_.model, run_.tokenizer, run_.task, examples, "causal", max_new_tokens=4)
    assert len(answered) == 2
    from trimtab.tasks.generate import _prompts

    assert len(_prompts(examples)[0]) == 2


@pytest.mark.parametrize("form", ["alpaca", "chat"])
def test_alpaca_and_chat_rows(form: str, llama: str, vit: str, data: str, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in Path(data).read_text().splitlines()]
    for row in lines:
        row["image"] = row["image"] and str(Path(data).parent / row["image"])
        question, answer = row.pop("prompt"), row.pop("completion").strip()
        if form == "alpaca":
            row |= {"instruction": question, "output": answer}
        else:
            row["messages"] = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    base = Path(shutil.copytree(llama, tmp_path / "base"))
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings["chat_template"] = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    out = tmp_path / "out"
    result = run(
        "train", "--model", base, "--data", write_rows(tmp_path / "rows.jsonl", lines),
        "--method", method(vit), "--output", out, *TASK, "--max-length", "128",
    )  # fmt: skip
    assert result.exit_code == 0, (result.output, result.exception)
    task = json.loads((out / "adapter_config.json").read_text())["task"]
    assert task["image_column"] == "image" and task["form"] == ("alpaca" if form == "alpaca" else "messages")


def test_all_questions_about_a_picture_are_on_one_side(llama: str, vit: str, tmp_path: Path) -> None:
    rows = [row | {"prompt": f"{ask} {row['prompt']}"} for row in rows_of(tmp_path)[:16] for ask in ("Now:", "And:")]
    settings = TrainSettings(
        llama, write_rows(tmp_path / "rows.jsonl", rows), str(tmp_path / "out"), method(vit), "generate", eval_share=0.3
    )
    source: Source = find_task(settings)
    held = load_data(with_length(with_method(settings, source)), source, False)
    sides = [{example.image.key for example in side} for side in (held.train, held.held_out)]
    assert sides[0] and sides[1] and not sides[0] & sides[1]


def test_training_gives_the_cached_and_the_uncached_losses(llama, vit, data, tmp_path, monkeypatch) -> None:
    out = {}
    for memory in ("0", "1"):
        folder = tmp_path / memory
        result = run(
            "train", "--model", llama, "--data", data, "--method", method(vit, ",layers=-1:"),
            "--output", folder, *TASK, "--set", f"cache_memory={memory}",
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        out[memory] = [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert out["0"] == pytest.approx(out["1"], abs=1e-5) and len(out["0"]) > 4


def test_a_cache_folder_serves_the_next_run(llama, vit, data, tmp_path) -> None:
    out = []
    for name in ("first", "second"):
        result = run(
            "train", "--model", llama, "--data", data, "--method", method(vit), "--output", tmp_path / name, *TASK,
            "--cache", tmp_path / "cache",
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        out.append(json.loads((tmp_path / name / "metrics.json").read_text())["after"])
    index = json.loads((tmp_path / "cache" / "process-0" / "index.json").read_text())
    assert sum(key.startswith("picture-") for key in index["rows"]) == len(COLOURS) * 8
    assert out[0] == pytest.approx(out[1], abs=1e-6)


# Mistakes


@pytest.fixture
def training(llama, vit, data, tmp_path) -> Any:
    """Flags of a training run that are changed one at a time; nothing may be written."""

    def refuse(**changes: Any) -> str:
        flags = {"model": llama, "data": data, "method": method(vit), "output": tmp_path / "out", **changes}
        said = refused("train", *(part for key, value in flags.items() for part in (f"--{key}", value)), *TASK)
        assert not (tmp_path / "out").exists()
        return said

    return refuse


def broken_rows(folder: Path, image: str) -> str:
    rows = rows_of(folder)
    rows[2]["image"] = image
    return write_rows(folder / "rows.jsonl", rows)


def test_a_missing_column_of_pictures(training, tmp_path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"img": "a.png", "prompt": "?", "completion": "!"}] * 8)
    said = training(data=rows)
    assert "image column 'image'" in said and "img" in said


def test_a_picture_that_is_not_there(training, tmp_path) -> None:
    said = training(data=broken_rows(tmp_path, "pictures/none.png"))
    assert "row 3: " in said and "none.png" in said


def test_a_picture_that_cannot_be_read(training, tmp_path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    said = training(data=broken_rows(tmp_path, "bad.png"))
    assert "bad.png" in said and "cannot be read as a picture" in said and "row " in said


def test_a_text_only_method_given_pictures(training) -> None:
    assert "looks at no pictures; leave --image-column out" in training(
        method="llama-adapter", **{"image-column": "image"}
    )


def test_a_task_that_takes_no_pictures() -> None:
    said = str(prepare_error(tt.UserError))
    assert "a column of pictures belongs" in said and "choose" in said


def prepare_error(kind: type[Exception]) -> Exception:
    with pytest.raises(kind) as caught:
        prepare("choose", [{"text": "?", "label": "a"}], image_column="image")
    return caught.value


def test_a_picture_for_a_run_without(llama, data, tmp_path) -> None:
    out = tmp_path / "out"
    assert (
        run("train", "--model", llama, "--data", data, "--method", "llama-adapter", "--output", out, *TASK).exit_code
        == 0
    )
    before = contents(out)
    picture = Path(data).parent / "pictures" / "0.png"
    assert "reads no pictures; leave --image out" in refused("generate", out, "--prompt", "What?", "--image", picture)
    assert contents(out) == before


def test_a_picture_that_cannot_be_read_is_refused_when_asked(trained, tmp_path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    assert "cannot be read as a picture" in refused(
        "generate", trained, "--prompt", "?", "--image", tmp_path / "bad.png"
    )
    assert "none.png" in refused("generate", trained, "--prompt", "?", "--image", tmp_path / "none.png")
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    assert "1 × 1" in refused("generate", trained, "--prompt", "?", "--image", tmp_path / "dot.png")


def test_an_encoder_of_another_width(llama, data, tmp_path) -> None:
    source = save_vit(tmp_path / "vit")
    out = tmp_path / "out"
    result = run("train", "--model", llama, "--data", data, "--method", method(source), "--output", out, *TASK)
    assert result.exit_code == 0, result.output
    before = contents(out)
    shutil.rmtree(source)
    save_vit(Path(source), hidden_size=32)
    assert "gives 48 numbers a picture" in refused("generate", out, "--prompt", "What?")
    assert contents(out) == before


def test_data_without_pictures_for_a_run_with(trained, tmp_path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "?", "completion": " red"}] * 4)
    assert "image column 'image'" in refused("eval", trained, "--data", rows)

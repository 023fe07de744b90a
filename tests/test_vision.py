"""Vision models from pictures to a run's folder: data, every method, the commands, and what cannot be."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

import trimtab as tt
from test_cli import refused, run, write_rows
from test_pictures import png
from trimtab.data import load_rows
from trimtab.errors import UserError
from trimtab.models import kind_of, load_for
from trimtab.processor import load_processor
from trimtab.run_data import encode, load_rows_of
from trimtab.tasks import ClassifyPictures, prepare, task_from_config
from trimtab.tuned import ask

SIZES: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4
)
CONFIGS = {
    "vit": lambda: hf.ViTConfig(**SIZES),
    "dinov2": lambda: hf.Dinov2Config(**SIZES),
    "clip": lambda: hf.CLIPConfig(vision_config=SIZES),
    "clip_vision_model": lambda: hf.CLIPVisionConfig(**SIZES),
}
BARE = {"vit": hf.ViTModel, "dinov2": hf.Dinov2Model, "clip_vision_model": hf.CLIPVisionModel}
CLASSES = ("dark", "light")
METHODS = (
    "llama-adapter[length=3,layers=-1:]",
    "prefix[length=3]",
    "prompt[length=3]",
    "houlsby[size=4]",
    "pfeiffer[size=4]",
    "parallel[size=4]",
    "adamix[size=4]",
    "lora[r=2]",
    "bitfit",
    "layernorm",
    "ia3",
    "ladder",
    "side",
    "mask",
    "diff-pruning",
    "llama-adapter-v2[length=3]",
    "p-tuning[length=3]",
    "p-tuning-v2[length=3]",
    "head",
    "full",
)


def shade(name: str, seed: int) -> Image.Image:
    """A noisy picture that is darker or lighter."""
    noise = np.random.default_rng(seed).integers(0, 110, (10, 9, 3), dtype=np.uint8)
    return Image.fromarray(noise + np.uint8(145 * (name == "light")))


def saved_model(folder: Path, family: str = "vit") -> str:
    """A tiny random vision model without a head."""
    torch.manual_seed(0)
    model = BARE[family](CONFIGS[family]()) if family in BARE else hf.CLIPForImageClassification(CONFIGS[family]())
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return str(folder)


def class_folders(folder: Path, count: int = 16) -> str:
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for at in range(count):
            shade(name, at + 100 * (name == "light")).save(folder / name / f"{at:02}.png")
    return str(folder)


def jsonl(folder: Path, count: int = 16) -> str:
    """Relative paths in a file beside the pictures."""
    class_folders(folder / "files", count)
    rows = [{"image": f"files/{name}/{at:02}.png", "label": name} for at in range(count) for name in CLASSES]
    return write_rows(folder / "rows.jsonl", rows)


def stored(count: int = 16) -> datasets.Dataset:
    """A column of images and one of class numbers, as hub datasets are."""
    pairs = [(name, at) for at in range(count) for name in CLASSES]
    pictures = [{"bytes": png(shade(name, at)), "path": None} for name, at in pairs]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    return datasets.Dataset.from_dict(
        {"image": pictures, "label": [CLASSES.index(name) for name, _ in pairs]}, features
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return class_folders(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return saved_model(tmp_path_factory.mktemp("base") / "vit")


# Rows


def test_class_folders_are_rows(tmp_path: Path) -> None:
    folder = Path(class_folders(tmp_path / "a", 2))
    (folder / "dark" / "more").mkdir()
    shade("dark", 7).save(folder / "dark" / "more" / "x.JPG")
    for other in ("notes.txt", ".hidden.png"):
        (folder / "dark" / other).write_text("no picture")
    rows = load_rows(str(folder))
    assert rows["label"][:] == ["dark"] * 3 + ["light"] * 2
    assert [Path(path).name for path in rows["image"]] == ["00.png", "01.png", "x.JPG", "00.png", "01.png"]
    shutil.move(folder, tmp_path / "b" / "train")
    class_folders(tmp_path / "b" / "test", 1)
    assert len(load_rows(str(tmp_path / "b"))) == 5 and len(load_rows(str(tmp_path / "b" / "test"))) == 2


def test_a_class_named_train_is_a_class(tmp_path: Path) -> None:
    for name in ("train", "bus"):
        (tmp_path / name).mkdir()
        shade("dark", 1).save(tmp_path / name / "1.png")
    assert load_rows(str(tmp_path))["label"][:] == ["bus", "train"]


def test_folders_that_are_no_rows_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    with pytest.raises(UserError, match="is a folder; give one of class folders with pictures"):
        load_rows(str(tmp_path))
    class_folders(tmp_path / "a", 1)
    (tmp_path / "a" / "empty").mkdir()
    with pytest.raises(UserError, match=r"class folder 'empty' in '.*' has no pictures"):
        load_rows(str(tmp_path / "a"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match=r"the dataset in '.*' cannot be read"):
        load_rows(str(tmp_path / "b"))
    with pytest.raises(UserError, match=r"a split .* can be chosen for hub datasets only"):
        load_rows(str(tmp_path / "a"), split="test")


@pytest.mark.parametrize("form", ["folder", "jsonl", "saved", "splits", "parquet"])
def test_every_form_of_data_gives_the_same_examples(tmp_path: Path, base: str, form: str) -> None:
    if form in ("folder", "jsonl"):
        source = class_folders(tmp_path / "d", 3) if form == "folder" else jsonl(tmp_path, 3)
    else:
        source = str(tmp_path / ("rows.parquet" if form == "parquet" else "rows"))
        rows: Any = stored(3)
        rows = datasets.DatasetDict(train=rows, test=rows) if form == "splits" else rows
        rows.to_parquet(source) if form == "parquet" else rows.save_to_disk(source)
    rows = load_rows_of(source, "image")
    task = prepare("classify", rows, kind="vision")
    assert task.labels == CLASSES and task_from_config(json.loads(json.dumps(task.to_config()))) == task
    processor = load_processor(base)
    found = encode(task, rows, processor, 0, "vision")
    by_hand = {}
    for name in CLASSES:
        for at in range(3):
            seed = at + 100 * (name == "light" and form in ("folder", "jsonl"))
            pixels = np.asarray(shade(name, seed).resize((8, 8), Image.Resampling.BILINEAR))
            by_hand[name, at] = torch.tensor(pixels).permute(2, 0, 1) / 127.5 - 1
    order = sorted(by_hand) if form == "folder" else [(name, at) for at in range(3) for name in CLASSES]
    for example, (name, at) in zip(found, order, strict=True):
        assert CLASSES[example.labels] == name and example.patches == 5
        assert torch.allclose(example.pixel_values, by_hand[name, at], atol=1e-6)


def test_pictures_beyond_the_memory_are_read_again(base: str, data: str) -> None:
    processor = load_processor(base)
    processor.memory = 2 * 3 * 8 * 8 * 4
    rows = load_rows_of(data, "image")
    some = encode(prepare("classify", rows, kind="vision"), rows, processor, 0, "vision")
    assert [one.shown.kept is None for one in some] == [False] * 2 + [True] * 30
    processor.memory = 10**9
    all_ = encode(prepare("classify", rows, kind="vision"), rows, processor, 0, "vision")
    assert all(torch.equal(one.pixel_values, two.pixel_values) for one, two in zip(some, all_, strict=True))


def test_the_same_picture_is_on_one_side(tmp_path: Path) -> None:
    folder = Path(class_folders(tmp_path / "a", 4))
    shutil.copy(folder / "dark" / "00.png", folder / "dark" / "copy.png")
    rows = load_rows_of(str(folder), "image")
    task = prepare("classify", rows, kind="vision")
    keys = [task.inputs(row) for row in rows]
    assert keys[0] == keys[4] and len(set(keys)) == len(keys) - 1


# Models


@pytest.mark.parametrize("family", CONFIGS)
def test_every_vision_model_loads_with_a_head(tmp_path: Path, family: str) -> None:
    source = saved_model(tmp_path, family)
    task = ClassifyPictures(("a", "b", "c"))
    assert kind_of(source, "classify") == "vision"
    model, again = (load_for(task, source, "vision", seed=seed) for seed in (3, 3))
    pixels = torch.randn(2, 3, 8, 8)
    assert model(pixel_values=pixels).logits.shape == (2, 3) and not model.training
    assert torch.equal(model(pixel_values=pixels).logits, again(pixel_values=pixels).logits)
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    if family in BARE:  # the base's weights are the files'
        bare = BARE[family].from_pretrained(source).eval()
        inner = model.vision_model if family == "clip_vision_model" else model.base_model
        states = (one(pixel_values=pixels).last_hidden_state for one in (bare, inner))
        assert torch.equal(*states)


def test_a_head_that_is_made_anew_does_not_make_another_base(data: str, tmp_path: Path) -> None:
    """CLIP's class for pictures is its own base model, head and all."""
    source, output = saved_model(tmp_path / "base", "clip"), tmp_path / "out"
    fine_tune(source, data, output, "lora[r=2]")
    torch.manual_seed(99)
    other = hf.CLIPForImageClassification.from_pretrained(source, num_labels=2, ignore_mismatched_sizes=True).eval()
    torch.nn.init.normal_(other.classifier.weight)
    tt.load(other, output)
    pixels = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(other(pixels).logits, tt.load_run(output).model(pixels).logits, atol=1e-6)
    with torch.no_grad():
        other = hf.CLIPForImageClassification.from_pretrained(source, num_labels=2, ignore_mismatched_sizes=True)
        other.vision_model.post_layernorm.weight += 1
    with pytest.raises(UserError, match="was trained on another base model"):
        tt.load(other, output)


@pytest.mark.parametrize("task", ["regress", "tag", "choose", "generate"])
def test_tasks_that_vision_models_cannot_do(base: str, task: str) -> None:
    with pytest.raises(UserError, match=rf"\(vit\) is a vision model and cannot {task}; models that can: "):
        kind_of(base, task)


# Runs


def fine_tune(base: str, data: str, output: Path, method: str, **options: Any) -> dict[str, Any]:
    options = {"epochs": 2, "lr": 1e-2, "eval_share": 0.25, "batch_size": 8, **options}
    return tt.fine_tune(tt.TrainSettings(base, data, str(output), method=method, **options), show=False)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_comes_back(base: str, data: str, tmp_path: Path, method: str) -> None:
    output = tmp_path / "out"
    metrics = fine_tune(base, data, output, method)
    assert np.isfinite(metrics["after"]["loss"]) and metrics["after"] != metrics["before"]
    assert tt.evaluate_run(output) == metrics["after"]
    assert (output / "preprocessor_config.json").is_file()
    assert metrics["train"]["tokens"] == 2 * 24


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("dinov2", "llama-adapter[length=3]|head"),
        ("clip_vision_model", "full"),
        ("clip", "llama-adapter[length=3]|head"),
        ("clip", "lora[r=2]"),
        ("clip_vision_model", "llama-adapter[length=3]|head"),
    ],
)
def test_other_families_train_and_come_back(data: str, tmp_path: Path, family: str, method: str) -> None:
    metrics = fine_tune(saved_model(tmp_path / "base", family), data, tmp_path / "out", method)
    assert tt.evaluate_run(tmp_path / "out") == metrics["after"] != metrics["before"]


@pytest.mark.parametrize("method", ["llama-adapter[length=4]|head", "prefix[length=4]|head", "houlsby[size=8]|head"])
def test_a_model_learns_what_is_light(base: str, data: str, tmp_path: Path, method: str) -> None:
    metrics = fine_tune(base, data, tmp_path / "out", method, epochs=8)
    assert metrics["after"]["accuracy"] == 1.0
    tuned = tt.load_run(tmp_path / "out")
    for name in CLASSES:
        shade(name, 999).save(tmp_path / f"{name}.png")
        assert ask(tuned, None, 1, image=str(tmp_path / f"{name}.png")) == name


def test_the_trunk_of_a_vision_model_is_run_once(base: str, data: str, tmp_path: Path) -> None:
    """The same numbers with the cache and without."""
    with_cache, without = (
        fine_tune(base, data, tmp_path / f"{memory}", "lora[r=2,layers=1]", cache_memory=memory)
        for memory in (2.0, 0.0)
    )
    assert with_cache["after"]["loss"] == pytest.approx(without["after"]["loss"], rel=1e-5)


def test_a_killed_run_goes_on_to_the_same_numbers(
    base: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = dict(epochs=4, save_steps=3)
    whole = fine_tune(base, data, tmp_path / "whole", "lora[r=2]", **options)
    step, steps = tt.Trainer.training_step, iter(range(100))

    def killed(*arguments: Any, **named: Any) -> torch.Tensor:
        if next(steps) == 7:
            raise RuntimeError("killed")
        return step(*arguments, **named)

    monkeypatch.setattr(tt.Trainer, "training_step", killed)
    with pytest.raises(RuntimeError, match="killed"):
        fine_tune(base, data, tmp_path / "cut", "lora[r=2]", **options)
    assert not (tmp_path / "cut" / "metrics.json").exists()
    assert fine_tune(base, data, tmp_path / "cut", "lora[r=2]", resume=True, **options)["after"] == whole["after"]


# The commands


@pytest.fixture(scope="module")
def trained(base: str, data: str, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "out"
    options = ["--epochs", "1", "--lr", "1e-2", "--eval-share", "0.25", "--method", "lora[r=2]|head"]
    done = run("train", "--model", base, "--data", data, "--output", output, "--task", "classify", *options)
    assert done.exit_code == 0, (done.output, done.exception)
    return output


def test_the_commands(trained: Path, data: str) -> None:
    card = (trained / "README.md").read_text(encoding="utf-8")
    assert "| task | classify (pictures) |" in card and "--image FILE" in card and "| pictures a second |" in card
    assert "| rows in a batch | `16` |" in card and "tokens" not in card
    measured = json.loads((trained / "metrics.json").read_text())["after"]
    evaluated = run("eval", trained, "--json")
    assert json.loads(evaluated.stdout) == measured
    assert json.loads(run("eval", trained, "--data", data, "--every-row", "--json").stdout)["examples"] == 32
    said = run("generate", trained, "--image", f"{data}/dark/00.png")
    assert said.exit_code == 0 and said.stdout.strip() in CLASSES
    shown = run("inspect", trained)
    assert shown.exit_code == 0 and "classify  dark, light" in shown.stdout


def test_a_merged_model_is_an_ordinary_vision_model(base: str, data: str, tmp_path: Path) -> None:
    fine_tune(base, data, tmp_path / "out", "lora[r=2]")
    assert run("merge", tmp_path / "out", "--output", tmp_path / "merged").exit_code == 0
    model = hf.AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    pixels = load_processor(str(tmp_path / "merged"))(shade("dark", 5))[None]
    tuned = tt.load_run(tmp_path / "out").model
    with torch.no_grad():
        assert torch.allclose(model.eval()(pixels).logits, tuned(pixels).logits, atol=1e-5)


def test_a_run_keeps_the_processor_it_was_trained_with(trained: Path, base: str) -> None:
    own = json.loads((trained / "preprocessor_config.json").read_text())
    assert own["size"] == {"height": 8, "width": 8} and own["image_mean"] == [0.5, 0.5, 0.5]
    assert not (Path(base) / "preprocessor_config.json").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--image-column", "img"], "image column 'img' does not exist; did you mean 'image'"),
        (["--text-column", "image"], "text_column='image' names a column of texts, but a vision model reads pictures"),
        (["--label-column", "class"], "column 'class' does not exist; allowed: image, label"),
        (["--batch-tokens", "64"], "batch_tokens=64 counts a text's tokens, but .* reads pictures; give batch_size"),
        (["--max-length", "64"], "max_length=64 counts a text's tokens"),
        (["--template", "{text}"], "a template belongs to .*, not to 'classify' of pictures"),
        (["--task", "generate"], r"\(vit\) is a vision model and cannot generate"),
        (["--method", "autoprompt"], "autoprompt"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(base: str, data: str, tmp_path: Path, options: list[str], said: str) -> None:
    output = tmp_path / "out"
    line = refused("train", "--model", base, "--data", data, "--output", output, *options)
    assert re.search(said, line), line
    assert not output.exists()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.write_bytes(b"no picture"), "cannot be read as a picture"),
        (lambda path: path.write_bytes(path.read_bytes()[:120]), "as a picture (image file is truncated)"),
        (lambda path: Image.new("RGB", (1, 1)).save(path), "has 1 × 1 pixels; it needs at least 2 on each side"),
        (lambda path: Image.new("1", (9_500, 9_500)).save(path), "larger than Pillow's limit of 89,478,485 pixels"),
        (lambda path: path.unlink(), "does not exist"),
    ],
    ids=["text", "cut", "one pixel", "huge", "missing"],
)  # fmt: skip
def test_a_broken_picture_is_named_with_its_row(base: str, tmp_path: Path, spoil: Any, said: str) -> None:
    source = jsonl(tmp_path, 4)
    spoil(tmp_path / "files" / "light" / "01.png")
    output = tmp_path / "out"
    line = refused("train", "--model", base, "--data", source, "--output", output, "--eval-data", source)
    assert line.startswith("error: row 4: the picture ") and "files/light/01.png" in line
    assert said in line
    assert not output.exists()
    split = refused("train", "--model", base, "--data", source, "--output", output)
    assert "row " in split and not output.exists()


def test_a_broken_picture_loses_nothing_of_a_run(trained: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in trained.iterdir() if path.is_file()}
    source = jsonl(tmp_path, 2)
    (tmp_path / "files" / "dark" / "01.png").write_bytes(b"")
    assert refused("eval", trained, "--data", source).startswith("error: row 3: the picture")
    assert "does not exist" in refused("generate", trained, "--image", tmp_path / "none.png")
    assert "reads pictures and no text" in refused("generate", trained, "--prompt", "What is this?")
    assert refused("generate", trained) == "error: give a picture: --image FILE"
    assert {path.name: path.read_bytes() for path in trained.iterdir() if path.is_file()} == before


def test_pictures_are_not_for_models_of_text(data: str, tmp_path: Path) -> None:
    from encoders import saved_encoder

    text = saved_encoder(tmp_path / "bert")
    line = refused("train", "--model", text, "--data", data, "--output", tmp_path / "out", "--image-column", "image")
    assert "a column of pictures belongs to the tasks 'generate', 'classify' of pictures, not to 'classify'" in line

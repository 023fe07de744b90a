"""Pictures of rows: every form they come in, and every way in which they cannot be read."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

from trimtab.errors import UserError
from trimtab.pictures import digest, located, read_picture, value_in
from trimtab.processor import default_processor, load_processor

SIZES: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=7
)


def noise(height: int = 20, width: int = 12, channels: int = 3) -> Image.Image:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8))


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_every_form_of_a_picture_is_the_same_picture(tmp_path: Path) -> None:
    image = noise()
    image.save(tmp_path / "a.png")
    stored = (tmp_path / "a.png").read_bytes()
    forms = ["a.png", str(tmp_path / "a.png"), Path("a.png"), stored, {"bytes": stored, "path": None}]
    forms += [{"bytes": None, "path": "a.png"}, image]
    for form in forms:
        read = read_picture(form, tmp_path)
        assert read.mode == "RGB" and np.array_equal(np.asarray(read), np.asarray(image))
    assert len({digest(form, tmp_path) for form in forms[:-1]}) == 1
    assert digest(image) == digest(image.copy()) != digest(noise(12, 20))


def test_colours_are_read_as_they_look(tmp_path: Path) -> None:
    grey = read_picture(png(noise(channels=1)))
    assert grey.mode == "RGB" and np.array_equal(np.asarray(grey)[..., 0], np.asarray(noise(channels=1)))
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half.putpixel((0, 0), (255, 0, 0, 255))
    read = read_picture(png(half))
    assert read.getpixel((0, 0)) == (255, 0, 0) and read.getpixel((1, 1)) == (255, 255, 255)
    deep = Image.fromarray(np.array([[0, 257], [25700, 65535]], dtype=np.uint16))
    assert np.asarray(read_picture(png(deep)))[..., 0].tolist() == [[0, 1], [100, 255]]
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera that was held upright
    noise(20, 12).save(turned, "JPEG", exif=exif)
    assert read_picture(turned.getvalue()).size == (20, 12)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("one.png", "'one.png' has 1 × 1 pixels; it needs at least 2 on each side"),
        ("line.png", "'line.png' has 9 × 1 pixels"),
        ("huge.png", "'huge.png' is larger than Pillow's limit of 89,478,485 pixels"),
        ("bomb.png", "'bomb.png' is larger than Pillow's limit of 89,478,485 pixels"),
        ("text.png", "'text.png' cannot be read as a picture$"),
        ("cut.png", r"'cut.png' cannot be read as a picture \(image file is truncated\)"),
        ("empty.png", "'empty.png' cannot be read as a picture$"),
        ("none.png", "'none.png' does not exist"),
        ("folder", "'folder' is a folder, not a picture"),
        ("numbers.tiff", r"'numbers.tiff' holds numbers \(mode 'F'\)"),
        ("https://example.org/a.png", "is an address; pictures are read from files"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path: Path, name: str, said: str) -> None:
    Image.new("RGB", (1, 1)).save(tmp_path / "one.png")
    Image.new("RGB", (9, 1)).save(tmp_path / "line.png")
    if name == "huge.png":
        Image.new("1", (9_500, 9_500)).save(tmp_path / name)
    if name == "bomb.png":
        Image.new("1", (20_000, 10_000)).save(tmp_path / name)
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").touch()
    (tmp_path / "cut.png").write_bytes(png(noise())[:200])
    (tmp_path / "folder").mkdir()
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "numbers.tiff")
    with pytest.raises(UserError, match=said) as caught:
        read_picture(name, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"img": "a.png"}, "image column 'image' does not exist; did you mean 'img'"),
        ({"image": None}, "column 'image' has no picture"),
        ({"image": ""}, "column 'image' has no picture"),
        ({"image": {"bytes": None, "path": None}}, "column 'image' has no picture"),
        ({"image": 3}, "not a value of type int"),
    ],
)
def test_a_row_without_a_picture_is_one_sentence(row: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_picture(value_in(row, "image"))


def test_relative_paths_start_at_the_file_that_names_them(tmp_path: Path) -> None:
    noise().save(tmp_path / "a.png")
    rows = datasets.Dataset.from_dict({"image": ["a.png", str(tmp_path / "a.png"), None], "label": ["x", "y", "z"]})
    found = located(rows, "image", tmp_path)
    assert found.column_names == ["image", "label"] and rows[0]["image"] == "a.png"
    assert found["image"][:] == [str(tmp_path / "a.png")] * 2 + [None]
    assert located([{"image": "a.png"}], "image", tmp_path) == [{"image": str(tmp_path / "a.png")}]
    with pytest.raises(UserError, match="image column 'img' does not exist; did you mean 'image'"):
        located(rows, "img", tmp_path)


def test_a_column_of_images_is_not_decoded_before_its_row_is_known(tmp_path: Path) -> None:
    pictures = [{"bytes": png(noise()), "path": None}, {"bytes": b"broken", "path": None}]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    rows = located(datasets.Dataset.from_dict({"image": pictures, "label": ["x", "y"]}, features), "image", None)
    assert read_picture(value_in(rows[0], "image")).size == (12, 20)
    with pytest.raises(UserError, match="cannot be read as a picture"):
        read_picture(value_in(rows[1], "image"))


# How a model sees them


def saved(folder: Path, config: hf.PreTrainedConfig, processor: Any = None) -> str:
    config.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return str(folder)


def test_the_models_own_processor_is_used_and_saved(tmp_path: Path) -> None:
    kind = type(default_processor(hf.ViTConfig()))
    own = kind(size={"height": 28, "width": 28}, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7], resample=0)
    processor = load_processor(saved(tmp_path, hf.ViTConfig(**SIZES), own))
    seen = processor(noise(28, 28))
    by_hand = torch.tensor(np.asarray(noise(28, 28))).permute(2, 0, 1) / 255
    by_hand = (by_hand - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([0.5, 0.6, 0.7])[:, None, None]
    assert seen.dtype == torch.float32 and torch.allclose(seen, by_hand, atol=1e-6)
    assert processor.patches == 17
    (tmp_path / "run").mkdir()
    processor.save_pretrained(tmp_path / "run")
    (tmp_path / "preprocessor_config.json").unlink()
    assert torch.equal(load_processor(str(tmp_path), tmp_path / "run")(noise(28, 28)), seen)


def test_a_picture_of_three_rows_is_not_taken_for_one_of_three_channels(tmp_path: Path) -> None:
    processor = load_processor(saved(tmp_path, hf.ViTConfig(**SIZES)))
    tall = Image.new("RGB", (40, 3), (255, 0, 0))
    assert processor(tall)[0].min() == 1 and processor(tall)[1].max() == -1


@pytest.mark.parametrize(
    ("config", "mean"),
    [
        (hf.ViTConfig(**SIZES), [0.5, 0.5, 0.5]),
        (hf.Dinov2Config(**SIZES), [0.485, 0.456, 0.406]),
        (hf.CLIPConfig(vision_config=SIZES), [0.48145466, 0.4578275, 0.40821073]),
        (hf.ViTConfig(**SIZES, num_channels=1), [0.5]),
    ],
)
def test_a_model_without_one_gets_what_its_configuration_says(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, config: Any, mean: list[float]
) -> None:
    processor = load_processor(saved(tmp_path, config))
    assert list(processor.inner.image_mean) == mean
    assert processor(noise()).shape == (len(mean), 28, 28)
    assert "has no preprocessor_config.json: pictures are scaled to 28 × 28" in caplog.text


def test_models_that_cannot_see_rows_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\(bert\) reads no pictures"):
        load_processor(saved(tmp_path / "a", hf.BertConfig()))
    wrong = default_processor(hf.ViTConfig(image_size=32))
    with pytest.raises(UserError, match="gives pictures of 32 × 32 pixels, but the model reads 28 × 28"):
        load_processor(saved(tmp_path / "b", hf.ViTConfig(**SIZES), wrong))
    assert load_processor(saved(tmp_path / "c", hf.Dinov2Config(**SIZES), wrong)).patches == 17
    with pytest.raises(UserError, match="reads pictures of 4 channels"):
        load_processor(saved(tmp_path / "d", hf.ViTConfig(**SIZES, num_channels=4)))

"""How a model sees a picture: its own image processor, or one made from its configuration. Knows transformers' image
processors; refuses to know rows and tasks.

Pillow does the scaling (transformers' `pil` backend), so torchvision is not needed and results do not depend on it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, PreTrainedConfig
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from trimtab.errors import UserError
from trimtab.models import Place, load_config, load_from, locate, quiet
from trimtab.pictures import read_picture

FILE = "preprocessor_config.json"
_FILES = (FILE, "processor_config.json")
_IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
_CLIP = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
_HALVES = ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
_NORMALISED = {"dinov2": _IMAGENET, "clip": _CLIP, "clip_vision_model": _CLIP}
"""Mean and standard deviation of red, green and blue (of 1) in a family's pretraining; halves elsewhere."""


KEPT = 2 * 2**30
"""Bytes of pictures, as models read them, that a processor keeps in memory; others are read again when asked for."""


@dataclass
class Processor:
    """A picture as the tensor that a model reads."""

    inner: Any
    """transformers' image processor."""
    channels: int
    """3, or 1 for a model of grey pictures."""
    patches: int
    """What a model makes of a picture: its patches, and a class token."""
    memory: int = KEPT
    """Bytes that are left for pictures to be kept in."""

    def __call__(self, picture: Image.Image) -> Tensor:
        """RGB -> pixel_values [channels, height, width], float32."""
        seen = picture.convert("L") if self.channels == 1 else picture
        return self.inner(images=[seen], return_tensors="pt")["pixel_values"][0].to(torch.float32)

    def show(self, value: Any) -> Shown:
        """A picture of a row (pictures.py), read once now. Raises UserError where it cannot be."""
        pixels = self(read_picture(value))
        size = pixels.numel() * pixels.element_size()
        if size > self.memory:
            return Shown(self, value, None)
        self.memory -= size
        return Shown(self, None, pixels)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes FILE, from which `load_processor` makes the same."""
        self.inner.save_pretrained(folder)


@dataclass(frozen=True)
class Shown:
    """A row's picture, as a model reads it."""

    processor: Processor
    value: Any
    """As it stands in the row, where the tensor is not kept."""
    kept: Tensor | None
    """The tensor, where there was memory for it."""

    @property
    def pixel_values(self) -> Tensor:
        """[channels, height, width], float32"""
        return self.processor(read_picture(self.value)) if self.kept is None else self.kept

    @property
    def patches(self) -> int:
        """How long the model's sequence is."""
        return self.processor.patches


def load_processor(source: str, settings: str | Path | None = None) -> Processor:
    """The image processor of the model at `source`; of the folder `settings` where that has one.

    A model without one gets `default_processor`, which a warning says. Raises UserError where there is no such model,
    for one that reads no pictures, and where pictures would not have the size that the model has positions for.
    """
    config = vision_config(source)
    place = _with_processor(source, settings)
    if place is not None:
        with quiet():
            inner = load_from(AutoImageProcessor, place, source, backend="pil")
    else:
        inner = default_processor(config)
        said = "%s has no %s: pictures are scaled to %d × %d and normalised with mean %s and standard deviation %s"
        size, mean, deviation = inner.size, inner.image_mean, inner.image_std
        logging.getLogger("trimtab").warning(said, source, FILE, size["height"], size["width"], mean, deviation)
    return _checked(source, inner, config)


def vision_config(source: str) -> PreTrainedConfig:
    """The configuration of a model's vision part. Raises UserError for a model that reads no pictures."""
    config = load_config(source)
    config = getattr(config, "vision_config", config)
    if not hasattr(config, "patch_size"):
        raise UserError(f"{source!r} ({config.model_type}) reads no pictures")
    return config


def _with_processor(source: str, settings: str | Path | None) -> Place | None:
    """The first of both that says how pictures are seen."""
    places = [] if settings is None else [Place(str(settings), local=True)]
    return next((place for place in [*places, locate(source)] if _has_processor(place)), None)


def _has_processor(place: Place) -> bool:
    if place.local:
        return any((Path(place.path) / name).is_file() for name in _FILES)
    from transformers.utils import cached_file

    return any(cached_file(place.path, name, _raise_exceptions_for_missing_entries=False) for name in _FILES)


def default_processor(config: PreTrainedConfig) -> ViTImageProcessorPil:
    """The whole picture at the model's size (bilinear), normalised as its family's pretraining did."""
    height, width = _pair(config.image_size)
    channels = getattr(config, "num_channels", 3)
    mean, deviation = _NORMALISED.get(config.model_type, _HALVES) if channels == 3 else ([0.5], [0.5])
    size = {"height": height, "width": width}
    return ViTImageProcessorPil(size=size, image_mean=list(mean), image_std=list(deviation))


def _checked(source: str, inner: Any, config: PreTrainedConfig) -> Processor:
    channels = getattr(config, "num_channels", 3)
    if channels not in (1, 3):
        raise UserError(f"{source!r} reads pictures of {channels} channels; those of rows have 3 (or 1, grey)")
    height, width = Processor(inner, channels, 0)(Image.new("RGB", (48, 32))).shape[-2:]
    patch = _pair(config.patch_size)
    wanted = _pair(config.image_size)
    if config.model_type != "dinov2" and (height, width) != wanted:  # which interpolates its positions
        raise UserError(
            f"the image processor of {source!r} gives pictures of {height} × {width} pixels, but the model reads "
            f"{wanted[0]} × {wanted[1]}; correct its {FILE}"
        )
    return Processor(inner, channels, 1 + (height // patch[0]) * (width // patch[1]))


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))

"""A picture that is read when it is needed. Knows files and PIL images; refuses to know models.

A run holds thousands of pictures; what stays of each is where it comes from and a digest of what it shows, by which
what an encoder saw in it is found again without reading it.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import UserError


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture: a file's path, bytes, a PIL image, or a tensor of pixel values [channels, height, width]."""

    source: Any

    @classmethod
    def of(cls, value: Any) -> Picture:
        """A picture of whatever stands in a row or is given from Python."""
        return value if isinstance(value, Picture) else cls(value)

    @functools.cached_property
    def key(self) -> str:
        """A digest of what it shows. Raises UserError where it cannot be read."""
        shown = self.source if isinstance(self.source, Tensor) else self.image()
        made = hashlib.blake2b(digest_size=16)
        if isinstance(shown, Tensor):
            made.update(f"{list(shown.shape)}{shown.dtype}".encode())
            made.update(shown.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        else:
            made.update(f"{shown.size}".encode())
            made.update(shown.tobytes())
        return made.hexdigest()

    def image(self) -> Any:
        """The RGB PIL image. Raises UserError, in one sentence, where it cannot be read."""
        return read_picture(self.source)

    def pixels(self, processor: Any) -> Tensor:
        """Pixel values [channels, height, width] as a model's own image processor makes them."""
        if isinstance(self.source, Tensor):
            return self.source
        return pixel_values(self.image(), processor)


def read_picture(source: Any) -> Any:
    """The RGB PIL image of a path, bytes or PIL image. Raises UserError where it cannot be read."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(source, Mapping):  # as the datasets library stores a picture that is not decoded
        source = source.get("bytes") or source.get("path")
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    if not isinstance(source, (str, Path, bytes)):
        raise UserError(f"a picture is a file's path, bytes or a PIL image, not a {type(source).__name__}")
    try:
        return Image.open(BytesIO(source) if isinstance(source, bytes) else source).convert("RGB")
    except FileNotFoundError:
        raise UserError(f"the picture {str(source)!r} does not exist") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        said = "bytes" if isinstance(source, bytes) else repr(str(source))
        raise UserError(f"the picture {said} cannot be read: {error}") from None


def pixel_values(image: Any, processor: Any) -> Tensor:
    """Pixel values [channels, height, width] of a PIL image as a model's own image processor makes them."""
    return processor(images=image, return_tensors="pt")["pixel_values"][0]

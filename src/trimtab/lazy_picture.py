"""A picture that is read when it is needed. Knows files and PIL images; refuses to know models and rows.

A run holds thousands of pictures; what stays of each is where it comes from and a digest, by which what an encoder saw
in it is found again without unpacking it.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.pictures import digest, read_picture

if TYPE_CHECKING:
    from trimtab.processor import Processor


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
        """A digest of it. Raises UserError where there is no picture."""
        if not isinstance(self.source, Tensor):
            return digest(self.source)
        values = self.source.detach().cpu().contiguous()
        made = hashlib.blake2b(f"{list(values.shape)}{values.dtype}".encode(), digest_size=16)
        made.update(values.view(torch.uint8).numpy().tobytes())
        return made.hexdigest()

    def check(self) -> None:
        """Raises UserError, in one sentence, where it cannot be read."""
        if not isinstance(self.source, Tensor):
            read_picture(self.source)

    def pixels(self, processor: Processor) -> Tensor:
        """Pixel values [channels, height, width] as a model's own image processor makes them."""
        return self.source if isinstance(self.source, Tensor) else processor(read_picture(self.source))

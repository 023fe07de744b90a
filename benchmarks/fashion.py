"""Fashion-MNIST, and a small vision transformer trained on it. Knows idx files and one model; refuses to know adapters.

The pictures (Xiao, Rasul and Vollgraf 2017, arXiv:1708.07747; MIT licence) install with `apt-get install
dataset-fashion-mnist`.
"""

from __future__ import annotations

import gzip
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

HOME = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
CLASSES = (
    *("T-shirt", "trousers", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
"""In the order of the labels."""


@dataclass(frozen=True)
class ViT:
    """A cell: how the encoder is made and trained."""

    width: int = 64
    layers: int = 4
    patch: int = 7
    epochs: int = 1
    batch: int = 128
    lr: float = 1e-3
    seed: int = 0

    @property
    def name(self) -> str:
        """File name of the result."""
        return "encoder"


def read(part: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The pictures [N, 28, 28] and labels [N] of `train` or `t10k`."""
    if not HOME.is_dir():
        raise SystemExit(f"there is no folder {HOME}; apt-get install dataset-fashion-mnist, or set FASHION_MNIST")
    return idx(HOME / f"{part}-images-idx3-ubyte.gz"), idx(HOME / f"{part}-labels-idx1-ubyte.gz")


def idx(file: Path) -> NDArray[np.uint8]:
    """An array in MNIST's format: two zeros, the type (8: bytes), the number of axes, their lengths, the values."""
    content = gzip.decompress(file.read_bytes())
    if content[:3] != b"\0\0\x08":
        raise SystemExit(f"{file} holds no bytes in MNIST's format")
    axes = content[3]
    shape = np.frombuffer(content, ">u4", axes, 4)
    return np.frombuffer(content, np.uint8, -1, 4 + 4 * axes).reshape(tuple(int(one) for one in shape))


def train_vit(cell: ViT, folder: Path) -> dict[str, Any]:
    """Trains the encoder on all 60,000 training pictures and saves it with its image processor; its test accuracy."""
    import torch
    import transformers as tf
    from torch.nn import functional as F
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    torch.manual_seed(cell.seed)
    sizes = {"hidden_size": cell.width, "intermediate_size": 4 * cell.width, "num_hidden_layers": cell.layers}
    config = tf.ViTConfig(
        **sizes, num_attention_heads=4, image_size=28, patch_size=cell.patch, num_channels=1, num_labels=len(CLASSES),
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model: Any = tf.ViTForImageClassification(config)
    pictures, labels = (torch.from_numpy(array.copy()) for array in read("train"))
    steps = cell.epochs * len(pictures) // cell.batch
    optimiser = torch.optim.AdamW(model.parameters(), lr=cell.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, cell.lr, total_steps=steps, pct_start=0.1)
    generator, start = torch.Generator().manual_seed(cell.seed), time.monotonic()
    model.train()
    for step in range(steps):
        rows = torch.randint(len(pictures), (cell.batch,), generator=generator)
        found = model(pixel_values=_values(pictures[rows])).logits
        optimiser.zero_grad()
        F.cross_entropy(found, labels[rows].long()).backward()
        optimiser.step()
        schedule.step()
        if step % 200 == 0:
            print(f"encoder: step {step}/{steps}, {time.monotonic() - start:.0f} s", flush=True)
    model.eval().save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 28, "width": 28}, image_mean=[0.5], image_std=[0.5]).save_pretrained(folder)
    return {"accuracy": _accuracy(model), "seconds": time.monotonic() - start, "parameters": model.num_parameters()}


def _values(pictures: Any) -> Any:
    """[N, 28, 28] bytes -> pixel values [N, 1, 28, 28], as the image processor makes them."""
    return (pictures[:, None].float() / 255 - 0.5) / 0.5


def _accuracy(model: Any) -> float:
    import torch

    pictures, labels = (torch.from_numpy(array.copy()) for array in read("t10k"))
    with torch.no_grad():
        found = [model(pixel_values=_values(part)).logits.argmax(-1) for part in pictures.split(1000)]
    return float((torch.cat(found) == labels).float().mean())

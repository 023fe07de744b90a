"""Adapter files changed on purpose, as another tool would write them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file


def rewrite(folder: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Put other tensors into an adapter folder of ours, whose configuration then knows no checksum."""
    save_file(tensors, folder / "adapter_model.safetensors", metadata=metadata)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    config.pop("checksum", None)
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")

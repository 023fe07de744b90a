"""From a run's folder to an ordinary model folder. Knows runs and folders; refuses to know how a method merges."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel

from trimtab.adapter import adapters
from trimtab.apart import check_apart
from trimtab.checkpoint import atomic_folder, read_adapter_config
from trimtab.data import resolve
from trimtab.errors import UserError
from trimtab.methods.spec import method_from_dict
from trimtab.run_folder import begun
from trimtab.tuned import Tuned, load_run

PROBE = "The quick brown fox jumps over the lazy dog. 敏捷的棕色狐狸跳过了懒狗。"
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
"""How far logits may move, as a share of the largest; half precision may lose more."""
HALF_TOLERANCE = 5e-2
MODEL_FILES = (
    *("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.jinja"),
    "preprocessor_config.json",
)
"""What a merged model consists of; `overwrite` replaces a folder of these and no other."""


def merge_run(folder: str | Path, output: str | Path, *, overwrite: bool = False) -> float:
    """Writes the base model with the run's adapter in its weights, and the tokenizer, into a model folder.

    Returns how far the logits moved, as a share of the largest. Raises UserError for a method that does not merge and
    for an output folder that holds something; the folder appears whole or not at all.
    """
    output = Path(output).expanduser()
    _check(Path(folder).expanduser(), output, overwrite)
    run = load_run(folder)
    before = probe_logits(run)
    (adapter,) = adapters(run.model).values()
    model = adapter.merge()
    moved = float((probe_logits(run) - before).abs().max() / before.abs().max())
    if not moved <= TOLERANCE.get(model.dtype, HALF_TOLERANCE):
        raise RuntimeError(f"the merged model's logits differ by {moved:.1e} of the largest; nothing was written")
    atomic_folder(output, lambda path: _save(model, run.tokenizer, path), overwrite=overwrite)
    return moved


def probe_logits(run: Tuned) -> torch.Tensor:
    """The model's logits on a fixed text or picture."""
    run.model.eval()
    with torch.no_grad():
        return run.model(**_probe(run)).logits.float()


def _probe(run: Tuned) -> dict[str, torch.Tensor]:
    if run.kind == "vision":
        pixels = run.tokenizer(Image.effect_mandelbrot((64, 48), (-2.0, -1.5, 1.0, 1.5), 100).convert("RGB"))
        return {"pixel_values": pixels[None].to(run.model.device, run.model.dtype)}
    ids = run.tokenizer(PROBE, return_tensors="pt", truncation=True, max_length=32)["input_ids"].to(run.model.device)
    if run.kind == "encoder" and run.task.head == "choices":
        ids = ids[:, None]  # [B, choices, n]
    return {"input_ids": ids, **({"decoder_input_ids": ids} if run.kind == "seq2seq" else {})}


def _check(folder: Path, output: Path, overwrite: bool) -> None:
    """Everything that can be refused before the model is loaded."""
    config = read_adapter_config(folder)
    method = method_from_dict(config["method"])
    if getattr(method, "whole_model", False):
        raise UserError(f"{folder} is a whole model already; there is nothing to merge")
    if not method.mergeable:
        raise UserError(f"{method.name} cannot be merged: it is no change of the base's weights")
    if output.is_file():
        raise UserError(f"{output} is a file; --output must be a folder")
    run = begun(folder)
    bases = [run.model if run else "", str(config["base"].get("path") or "")]
    check_apart(output, folder, "the run's own folder")
    for base in filter(None, bases):
        check_apart(output, Path(resolve(base)).expanduser(), "the base model's folder")
    if output.is_dir() and any(output.iterdir()):
        _check_replaceable(output, overwrite)


def _check_replaceable(output: Path, overwrite: bool) -> None:
    """Raises UserError unless the folder may be replaced: asked for, and a model folder that holds nothing else."""
    if not overwrite:
        raise UserError(f"{output} holds something already; choose another folder or give --overwrite")
    other = sorted(path.name for path in output.iterdir() if not _is_model_file(path))
    if other:
        raise UserError(f"{output} holds {other[0]}, which is no file of a model; choose another folder")
    if not (output / "config.json").is_file():
        raise UserError(f"{output} is no model folder (it has no config.json); choose another folder")


def _is_model_file(path: Path) -> bool:
    return path.is_file() and any(fnmatch(path.name, pattern) for pattern in MODEL_FILES)


def _save(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

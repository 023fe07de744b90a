"""From a run's folder to an ordinary model folder. Knows runs and folders; refuses to know how a method merges.

What is declared done is what was written: the folder's own files are loaded again, by transformers alone, and their
logits compared with the adapter's.
"""

from __future__ import annotations

import dataclasses
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel

from trimtab.adapter import adapters
from trimtab.apart import check_apart
from trimtab.biases import declare_biases
from trimtab.checkpoint import atomic_folder, read_adapter_config
from trimtab.data import resolve
from trimtab.errors import UserError, unknown
from trimtab.hub import at_hand
from trimtab.methods.spec import method_from_dict
from trimtab.models import quiet
from trimtab.run_folder import begun
from trimtab.tuned import Tuned, load_run

PROBE = "The quick brown fox jumps over the lazy dog. 敏捷的棕色狐狸跳过了懒狗。"
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far logits may move, as a share of the largest, with weights of a type: they have 24, 11 and 8 bits."""
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCE}
SHARD = "50GB"
"""The largest file where nothing else is said, as in transformers."""
_SIZE = re.compile(r"(\d+(\.\d+)?)\s*[KMGT]B", re.IGNORECASE)
MODEL_FILES = (
    *("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.jinja"),
    "preprocessor_config.json",
)
"""What a merged model consists of; `overwrite` replaces a folder of these and no other."""


def merge_run(
    folder: str | Path,
    output: str | Path,
    *,
    dtype: str | None = None,
    max_shard_size: str = SHARD,
    overwrite: bool = False,
) -> float:
    """Writes the base model with the run's adapter in its weights, and the tokenizer, into a model folder.

    The weights are of `dtype` (float32, float16, bfloat16; default: that of the run's base), computed in the wider of
    the two and rounded once, in safetensors files of at most `max_shard_size` (such as 5GB). Returns how far the logits
    of what was written are from the adapter's, as a share of the largest. Raises UserError for a method that does not
    merge, for a type in which the model gives other logits (TOLERANCE), and for an output folder that holds something;
    the folder appears whole or not at all.
    """
    output = Path(output).expanduser()
    if dtype is not None and dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    if not _SIZE.fullmatch(max_shard_size) or float(max_shard_size[:-2]) <= 0:
        raise UserError(f"max_shard_size={max_shard_size!r} must be a size such as 500MB or 5GB")
    folder = at_hand(folder)
    _check(folder, output, overwrite)
    run = load_run(folder)
    before = probe_logits(run)
    model, was = run.model, run.model.dtype
    wanted = DTYPES[dtype] if dtype else was
    if wanted != was and torch.promote_types(wanted, was) != was:
        model.to(torch.promote_types(wanted, was))  # type: ignore[arg-type]
    (adapter,) = adapters(model).values()
    adapter.merge()
    _check_biases(model)
    own = _moved(before, probe_logits(run))
    if not own <= _tolerance(was):
        raise RuntimeError(f"the merged model's logits differ by {own:.1e} of the largest; nothing was written")
    model.to(wanted)  # type: ignore[arg-type]
    limit = max(_tolerance(was), _tolerance(wanted))
    moved = 0.0

    def fill(path: Path) -> None:
        nonlocal moved
        model.save_pretrained(path, max_shard_size=max_shard_size)
        run.tokenizer.save_pretrained(path)
        moved = _moved(before, probe_logits(dataclasses.replace(run, model=_plain(run, path, wanted))))
        if not moved <= limit:
            name = str(wanted).removeprefix("torch.")
            raise UserError(
                f"in {name} the merged model's logits differ from the adapter's by {moved:.1e} of the largest, more "
                f"than {limit:g}; nothing was written, try --dtype float32"
            )

    atomic_folder(output, fill, overwrite=overwrite)
    return moved


def _check_biases(model: PreTrainedModel) -> None:
    """Raises UserError for biases that the model's class would not read again."""
    homeless = declare_biases(model)
    if homeless:
        raise UserError(
            f"{type(model).__name__} has no {homeless[0]} ({len(homeless)} such biases in all), so a plain folder "
            "cannot hold what the adapter adds there; it works as an adapter"
        )


def _plain(run: Tuned, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """What transformers makes of the folder, without trimtab."""
    with quiet():
        model: Any = type(run.model).from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model.to(run.model.device)


def _moved(before: torch.Tensor, after: torch.Tensor) -> float:
    return float((after - before).abs().max() / before.abs().max())


def _tolerance(dtype: torch.dtype) -> float:
    return TOLERANCE.get(dtype, TOLERANCE[torch.float32])


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

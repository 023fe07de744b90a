"""Merged models: plain transformers folders, of every method that merges, in every type, in pieces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import trimtab as tt
from test_cli import contents, refused, run, save_model
from test_contract import METHODS as STRINGS
from test_real import BERT, SARCASM, _absent
from trimtab.merging import PROBE, TOLERANCE, merge_run
from trimtab.models import load_model, load_tokenizer
from trimtab.tasks.generate import Generate
from trimtab.train import TrainSettings, fine_tune
from trimtab.tuned import _held_out_rows, load_run


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = save_model(tmp_path_factory.mktemp("base"), "llama")
    said = hf.GenerationConfig(bos_token_id=1, eos_token_id=[2, 7], repetition_penalty=1.25)
    said.save_pretrained(folder)
    return folder


def _adapter(base: str, method: str, folder: Path, size: float = 0.1) -> torch.Tensor:
    """An adapter folder with a task, away from its start; gives the logits on the text that merging looks at."""
    model, tokenizer = load_model(base, "causal"), load_tokenizer(base)
    adapter = tt.attach(model, method, tokenizer=tokenizer, labels=["a", "b"])
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    adapter.save(folder, task=Generate().to_config())
    return _logits(model, tokenizer)


def _logits(model: Any, tokenizer: Any) -> torch.Tensor:
    ids = tokenizer(PROBE, return_tensors="pt", truncation=True, max_length=32)["input_ids"]
    with torch.no_grad():
        return model.eval()(ids).logits.float()


def _plain(folder: Path) -> torch.Tensor:
    model, found = hf.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return _logits(model, hf.AutoTokenizer.from_pretrained(folder))


MERGING = [
    *(STRINGS.get(name, name) for name, method in tt.METHODS.items() if method.mergeable and name != "head"),
    "llama-adapter-v2[length=0]",
]
SMALL = {
    "houlsby": "houlsby[size=4]",
    "autoprompt": "autoprompt[length=5,text=abcd]",
    "ladder": "ladder[reduction=2]",
}
OTHERS = [SMALL.get(name, name) for name, method in tt.METHODS.items() if not method.mergeable and name != "full"]


@pytest.mark.parametrize("method", MERGING)
def test_every_method_that_merges(method: str, base: str, tmp_path: Path) -> None:
    expected = _adapter(base, method, tmp_path / "out")
    moved = merge_run(tmp_path / "out", tmp_path / "merged")
    found = _plain(tmp_path / "merged")
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max() and moved <= 1e-4
    assert (found - _plain(Path(base))).abs().max() > 1e-3
    kept = hf.GenerationConfig.from_pretrained(tmp_path / "merged")
    assert (kept.eos_token_id, kept.repetition_penalty) == ([2, 7], 1.25)


@pytest.mark.parametrize("method", OTHERS)
def test_every_other_method_is_refused(method: str, base: str, tmp_path: Path) -> None:
    _adapter(base, method, tmp_path / "out")
    said = refused("merge", tmp_path / "out", "--output", tmp_path / "merged")
    assert "cannot be merged: it is no change of the base's weights" in said and not (tmp_path / "merged").exists()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_in_another_type(dtype: str, base: str, tmp_path: Path) -> None:
    expected = _adapter(base, "lora[r=2]", tmp_path / "out")
    done = run("merge", tmp_path / "out", "--output", tmp_path / "merged", "--dtype", dtype)
    assert done.exit_code == 0, done.output
    wanted = getattr(torch, dtype)
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert {weight.dtype for weight in model.parameters()} == {wanted}
    found = _plain(tmp_path / "merged")
    assert (found - expected).abs().max() <= TOLERANCE[wanted] * expected.abs().max()
    exact = merge_run(tmp_path / "out", tmp_path / "exact") is not None
    whole = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "exact").state_dict()
    assert exact and all(torch.equal(model.state_dict()[key], one.to(wanted)) for key, one in whole.items())


def test_a_type_that_is_too_narrow_writes_nothing(base: str, tmp_path: Path) -> None:
    _adapter(base, "lora[r=2]", tmp_path / "out", size=300)  # weights beyond 65504
    said = refused("merge", tmp_path / "out", "--output", tmp_path / "merged", "--dtype", "float16")
    assert "in float16 the merged model's logits differ" in said and "--dtype float32" in said
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_in_pieces(base: str, tmp_path: Path) -> None:
    expected = _adapter(base, "lora[r=2]", tmp_path / "out")
    flags = ["merge", tmp_path / "out", "--output", tmp_path / "merged"]
    done = run(*flags, "--max-shard-size", "20KB")
    assert done.exit_code == 0, done.output
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    files = sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors"))
    assert len(files) > 3 and set(index["weight_map"].values()) == set(files)
    biggest = max(weight.numel() for weight in load_model(base, "causal").parameters()) * 4
    assert max((tmp_path / "merged" / name).stat().st_size for name in files) < max(20_000, biggest) + 5_000
    assert torch.allclose(_plain(tmp_path / "merged"), expected, atol=1e-5)
    assert run(*flags, "--overwrite").exit_code == 0  # and the pieces are gone
    assert [path.name for path in (tmp_path / "merged").glob("model*")] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dtype", "float8"], "did you mean 'float"),
        (["--max-shard-size", "5"], "must be a size such as 500MB or 5GB"),
        (["--max-shard-size", "0GB"], "must be a size such as"),
    ],
)
def test_refuses(flags: list[str], words: str, base: str, tmp_path: Path) -> None:
    _adapter(base, "lora[r=2]", tmp_path / "out")
    before = contents(tmp_path)
    assert words in refused("merge", tmp_path / "out", "--output", tmp_path / "merged", *flags)
    assert contents(tmp_path) == before


@pytest.mark.slow
@pytest.mark.real
@_absent(BERT, "evals")
def test_bert_tiny_merged_is_as_accurate_as_the_adapter(tmp_path: Path) -> None:
    out, columns = tmp_path / "out", {"text_column": "input.-1.content", "label_column": "ideal"}
    sizes: dict[str, Any] = {"limit": 400, "eval_limit": 200, "eval_share": 0.5, "epochs": 1, "max_length": 64}
    given: Any = {**columns, **sizes, "model": "pkg:cognition/model", "data": SARCASM}
    accuracy = fine_tune(TrainSettings(**given, output=str(out)), show=False)["after"]["accuracy"]
    rows = _held_out_rows(out, load_run(out).task)
    for dtype in (None, "bfloat16"):
        merged = tmp_path / str(dtype)
        merge_run(out, merged, dtype=dtype)
        model = hf.AutoModelForSequenceClassification.from_pretrained(merged, dtype="float32")
        tokenizer, right = hf.AutoTokenizer.from_pretrained(merged), 0
        for row in rows:
            batch = tokenizer(row["input"][-1]["content"], return_tensors="pt", truncation=True, max_length=64)
            with torch.no_grad():
                right += model.config.id2label[int(model(**batch).logits.argmax())] == str(row["ideal"])
        assert right / len(rows) == pytest.approx(accuracy, abs=0.02 if dtype else 1e-9)

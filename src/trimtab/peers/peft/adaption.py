"""peft's ADAPTION_PROMPT, its LLaMA-Adapter: in the top layers `<attention>.adaption_prompt` [1, length, width] and
`.adaption_gate` [1], one gate a layer, without tanh.

For GPT-2 peft adds what the prompts give behind the output projection, where the paper has it in front: refused.
"""

from __future__ import annotations

import torch

from trimtab.errors import UserError
from trimtab.methods import LlamaAdapter
from trimtab.peers.folder import Folder
from trimtab.peers.kinds import Acting, Found, Kind, Model, Written
from trimtab.peers.peft.lora import START
from trimtab.sites import KVSite

PROMPT, GATE = ".adaption_prompt", ".adaption_gate"
FAMILIES = ("llama", "mistral")
"""Families for which peft does what the paper says."""


def read(folder: Folder, place: Model) -> Found:
    """Raises UserError for families that peft does otherwise, incomplete layers and prompts of unequal lengths."""
    _check_family(place.model.config.model_type, str(folder.path))
    by_path = {site.path: site for site in place.sites.kv}
    state: dict[str, torch.Tensor] = {}
    layers, lengths = set(), set()
    for name, _, prompts in folder.take_ending(PROMPT):
        site, gate = by_path.get(name.removeprefix(START)), folder.take(name + GATE)
        if site is None or not name.startswith(START):
            raise folder.homeless([name + PROMPT])
        width = site.k.in_features
        if prompts.dim() != 3 or prompts.shape[0] != 1 or prompts.shape[2] != width or prompts.shape[1] < 1:
            raise folder.misshapen(name + PROMPT, prompts, f"[1, length, {width}]")
        if gate.shape != (1,):
            raise folder.misshapen(name + GATE, gate, "[1]")
        state |= {f"{site.key}.prompts": prompts[0], f"{site.key}.gate": gate}
        layers.add(site.layer)
        lengths.add(prompts.shape[1])
    if len(lengths) != 1:
        raise UserError(f"{folder.path} has prompts of {len(lengths)} lengths; llama-adapter has one")
    chosen = ",".join(map(str, sorted(layers)))
    return Found(LlamaAdapter(lengths.pop(), chosen, gates="layer", tanh=False), state)


def write(form: Acting) -> Written:
    """Raises UserError for gates a head, prompts without gates, and layers that are not the top ones."""
    method = form.method
    _check_family(form.model.config.model_type, "this adapter")
    if method.attention != "gated" or method.gates != "layer":
        raise UserError("peft has one gate a layer; train with llama-adapter[gates=layer,tanh=false] to write it")
    parts = form.of(KVSite)
    layers = sorted(site.layer for site in parts)
    count = form.model.config.num_hidden_layers
    if layers != list(range(count - len(layers), count)):
        raise UserError(
            f"peft's adaption prompt is in the top layers; this adapter is in {', '.join(map(str, layers))}"
        )
    tensors: dict[str, torch.Tensor] = {}
    for site, part in parts.items():
        gate = part.gate.detach()
        tensors[f"{START}{site.path}{PROMPT}"] = part.prompts.detach()[None]
        tensors[f"{START}{site.path}{GATE}"] = gate.tanh() if part.tanh else gate
    target = next(iter(parts)).path.rpartition(".")[2]
    return Written(
        {"target_modules": target, "adapter_len": method.length, "adapter_layers": len(layers)},
        tensors,
    )


def _check_family(model_type: str, what: str) -> None:
    if model_type not in FAMILIES:
        raise UserError(
            f"{what}: peft's adaption prompt is LLaMA-Adapter for {' and '.join(FAMILIES)} alone "
            f"(for gpt2 it stands behind the output projection), and this is a {model_type} model"
        )


KIND = Kind("ADAPTION_PROMPT", ("llama-adapter",), read, write)

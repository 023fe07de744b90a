"""What the speed benchmark compares: workloads, and how each side names them. Knows no torch, runs nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Workload:
    """One line of the table."""

    name: str
    peer: str
    """peft, adapters, full (transformers' Trainer on all weights), or peft's two ways to evaluate: generate, logits."""
    ours: str
    """Method string."""
    theirs: Mapping[str, Any] = field(default_factory=dict)
    """What the peer's configuration is given; `class` names it."""
    epochs: int = 1
    lr: float = 1e-3
    ratio: float = 1.0
    """What is asked for: the peer's time over ours."""
    memory: float | None = None
    """What is asked for: our peak over the peer's."""
    renames: tuple[tuple[str, str], ...] = ()
    """Patterns that turn the peer's names of trained tensors into ours; none where the two networks differ."""
    why: str = ""
    """Why losses are not compared."""
    model: str = "smollm2"


_TASK = {"task_type": "CAUSAL_LM"}
_LORA = (
    (r".*layers\.(\d+)\.self_attn\.([qv])_proj\.lora_A\.default\.weight", r"layer\1_\2.A"),
    (r".*layers\.(\d+)\.self_attn\.([qv])_proj\.lora_B\.default\.weight", r"layer\1_\2.B"),
)
_PROMPT = ((r"prompt_encoder\.default\.embedding\.weight", "embeds.tokens"),)
_P_TUNING = (
    (r"prompt_encoder\.default\.embedding\.weight", "embeds.source.tokens"),
    (r"prompt_encoder\.default\.mlp_head\.0\.(.*)", r"embeds.source.inner.0.\1"),
    (r"prompt_encoder\.default\.mlp_head\.2\.(.*)", r"embeds.source.inner.1.\1"),
    (r"prompt_encoder\.default\.mlp_head\.4\.(.*)", r"embeds.source.last.\1"),
)
_ADAPTION = (
    (r".*layers\.(\d+)\.self_attn\.adaption_prompt", r"layer\1_self.prompts"),
    (r".*layers\.(\d+)\.self_attn\.adaption_gate", r"layer\1_self.gate"),
)
_BOTTLENECKS = (
    (r".*layer\.(\d+)\.attention\.output\.adapters\.peer\.adapter_down\.0\.(.*)", r"layer\1_attention.adapter.down.\2"),
    (r".*layer\.(\d+)\.attention\.output\.adapters\.peer\.adapter_up\.(.*)", r"layer\1_attention.adapter.up.\2"),
    (r".*layer\.(\d+)\.output\.adapters\.peer\.adapter_down\.0\.(.*)", r"layer\1_feedforward.adapter.down.\2"),
    (r".*layer\.(\d+)\.output\.adapters\.peer\.adapter_up\.(.*)", r"layer\1_feedforward.adapter.up.\2"),
    (r"classifier\.(.*)", r"head_classifier.copy.\1"),
)


def _prompt(length: int, ratio: float, memory: float) -> Workload:
    theirs = {"class": "PromptTuningConfig", "num_virtual_tokens": length, **_TASK}
    method = f"prompt[length={length},init=random]"
    return Workload(f"prompt-{length}", "peft", method, theirs, 1, 1e-2, ratio, memory, _PROMPT)


def _adaption(layers: int, ratio: float) -> Workload:
    theirs = {"class": "AdaptionPromptConfig", "adapter_len": 10, "adapter_layers": layers, **_TASK}
    method = f"llama-adapter[length=10,gates=layer,tanh=false,layers=-{layers}:]"
    return Workload(f"llama-adapter-{layers}", "peft", method, theirs, 5, 1e-3, ratio, 0.8, _ADAPTION)


WORKLOADS = (
    _prompt(20, 3.0, 0.8),
    _prompt(100, 5.0, 0.6),
    Workload(
        "p-tuning-20", "peft", "p-tuning[length=20,init=random]",
        {"class": "PromptEncoderConfig", "num_virtual_tokens": 20, "encoder_reparameterization_type": "MLP",
         "encoder_hidden_size": 576, "encoder_dropout": 0.0, **_TASK},
        1, 1e-4, 3.0, 0.8, _P_TUNING,
    ),
    Workload(
        "prefix-20", "peft", "prefix[length=20,init=random]",
        {"class": "PrefixTuningConfig", "num_virtual_tokens": 20, "prefix_projection": True,
         "encoder_hidden_size": 512, **_TASK},
        1, 1e-4, 2.5, 0.8,
        why="peft's network has embeddings as wide as the keys and counts the text's positions from the prefix's end",
    ),
    _adaption(10, 4.5),
    _adaption(4, 7.0),
    Workload(
        "lora-8", "peft", "lora[r=8,alpha=16,targets=q,v]",
        {"class": "LoraConfig", "r": 8, "lora_alpha": 16, "lora_dropout": 0.0,
         "target_modules": ["q_proj", "v_proj"], **_TASK},
        1, 1e-3, 2.5, 0.8, _LORA,
    ),
    Workload(
        "ladder-8", "full", "ladder[reduction=8]", epochs=5, lr=1e-4, ratio=15.0, memory=0.4,
        why="a side network against full fine-tuning",
    ),
    Workload(
        "houlsby-minilm", "adapters", "houlsby[size=24,norms=false,activation=swish,start=normal]",
        {"config": "double_seq_bn"}, 1, 1e-3, 1.0, 1.0, _BOTTLENECKS, model="minilm",
    ),
    Workload(
        "pfeiffer-minilm", "adapters", "pfeiffer[size=24]", {"config": "seq_bn"}, 1, 1e-3, 1.0, 1.0, _BOTTLENECKS,
        model="minilm",
    ),
    Workload("evaluate-generate", "generate", "lora[r=8,alpha=16,targets=q,v]", ratio=5.0, why="no training"),
    Workload("evaluate-logits", "logits", "lora[r=8,alpha=16,targets=q,v]", ratio=2.0, why="no training"),
)  # fmt: skip
BY_NAME = {workload.name: workload for workload in WORKLOADS}
BATCH = 16
CHECKED = 4
"""Steps whose losses are compared."""

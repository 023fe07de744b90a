"""Where a model's sites are: module names, one small dataclass a family. Knows nothing of methods or tensors' values.

A family is found by `config.model_type`. Its module names are checked against the real module tree when a method is
attached, so a renamed module is one clear error and not a silent no-op.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from trimtab.errors import UserError, unknown

KINDS = ("linear", "activation", "norm", "kv", "embeds", "vocabulary", "states", "head")


@dataclass(frozen=True)
class Fused:
    """One of several projections that share a module, e.g. the keys of GPT-2's `c_attn`."""

    path: str
    """Module path inside the layer."""
    parts: tuple[str, ...]
    """What the module computes, in order, e.g. ("q", "k", "v")."""
    part: str
    """Which of them this is."""
    interleaved: bool = False
    """True where the parts alternate head by head (gpt_neox, bloom) instead of lying one after the other."""


@dataclass(frozen=True)
class Sublayer:
    """One of the residual branches of a layer: attention, cross-attention, feed-forward."""

    output: str
    """Module whose output is added to the residual stream."""
    input: str
    """Module whose input is what the branch reads (after the norm in front of it, if there is one)."""
    before: str | None = None
    """The norm in front of the branch; its input is the residual stream. None in post-norm layers."""
    after: str | None = None
    """The norm behind the residual add, in post-norm layers."""


@dataclass(frozen=True)
class Stack:
    """One run of equal layers: a decoder, an encoder, a vision tower."""

    layers: str
    """Path of the ModuleList of layers, from the family's root."""
    attention: str
    """Path of the self-attention module (the one that calls the attention interface) inside a layer."""
    linears: Mapping[str, str | Fused]
    """Role (q, k, v, o, up, gate, down) -> module path inside a layer; `a|b` names alternatives."""
    sublayers: Mapping[str, Sublayer]
    """Branch (attention, cross, feedforward) -> where it starts and ends inside a layer; `a|b` names alternatives."""
    final_norm: str | None = None
    """Path of the norm behind the last layer, from the family's root; norms outside layers stand in front otherwise."""
    pooled_norm: bool = False
    """Whether that norm sees the pooled output alone and not the whole stream (CLIP)."""
    name: str = ""
    """Empty for the only stack of a model, else "encoder" or "decoder"."""
    body: str = ""
    """Path of the module whose `forward` receives `input_ids` for this stack, from the family's root."""
    embeds: str | None = None
    """Path of the token embedding, from the body; None where the input is no text."""
    insert: str | None = None
    """How virtual tokens get in: "shared" (keys and values, run once), "tokens" (embeddings put in front), "states"
    (hidden states put in front of the first layer: vision, audio) or None (this stack takes none)."""
    positions: str = "rotary"
    """"rotary" (relative: virtual tokens sit at -P…-1), "learned" (text is shifted by P), "padded" (learned, and
    numbered from the padding index as RoBERTa does) or "implicit" (the model counts positions by itself)."""
    shift: bool = False
    """Whether a prefix of P keys moves the text's learned positions up by P, as the papers' code does."""
    cross: str | None = None
    """Path of the cross-attention module inside a layer."""
    cross_linears: Mapping[str, str] = field(default_factory=dict)
    """Role -> module path of the cross-attention's projections."""
    head_dim: str = "head_dim"
    """Attribute of the attention module that holds the head width."""


@dataclass(frozen=True)
class Family:
    """Everything trimtab knows about one model family."""

    name: str
    stacks: tuple[Stack, ...]
    roots: tuple[str, ...] = ("",)
    """Paths, from `model.base_model`, at which the stacks' names start; the first that exists counts."""
    pooler: str | None = None
    """Path, from the root, of a projection between the last layer and the heads; frozen by all methods but BitFit."""
    head: bool = True
    """Whether any of its classes has a head; a bare vision tower has none."""
    interface: bool = True
    """Whether its attention goes through transformers' AttentionInterface (sites of kind `kv` need it)."""
    post_norm: tuple[Stack, ...] = ()
    """The stacks of its models whose configuration has `do_layer_norm_before=False` (OPT-350m)."""

    @property
    def kinds(self) -> frozenset[str]:
        """The site kinds that this family has."""
        present = {
            "kv": self.interface,
            "embeds": any(stack.insert for stack in self.stacks),
            "vocabulary": any(stack.insert and stack.embeds for stack in self.stacks),
            "head": self.head,
        }
        return frozenset(kind for kind in KINDS if present.get(kind, True))

    def of(self, config: object) -> Family:
        """The family as one model's configuration makes it."""
        post = bool(self.post_norm) and not getattr(config, "do_layer_norm_before", True)
        return replace(self, stacks=self.post_norm) if post else self


def _fused(path: str, *parts: str, interleaved: bool = False) -> dict[str, Fused]:
    return {part: Fused(path, parts, part, interleaved) for part in parts}


def _attention(path: str, names: str) -> dict[str, str]:
    """`_attention("self_attn", "q_proj k_proj v_proj o_proj")` -> role to path."""
    return {role: f"{path}.{name}" for role, name in zip("qkvo", names.split(), strict=True)}


_LLAMA_LINEARS = _attention("self_attn", "q_proj k_proj v_proj o_proj") | {
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_LLAMA = Stack(
    layers="layers",
    attention="self_attn",
    linears=_LLAMA_LINEARS,
    sublayers={
        "attention": Sublayer("self_attn.o_proj", "self_attn.q_proj", before="input_layernorm"),
        "feedforward": Sublayer("mlp.down_proj", "mlp.up_proj", before="post_attention_layernorm"),
    },
    final_norm="norm",
    embeds="embed_tokens",
    insert="shared",
)
_GEMMA = replace(
    _LLAMA,
    sublayers={  # a norm of its own stands between the branch's last projection and the residual add
        "attention": Sublayer("post_attention_layernorm", "self_attn.q_proj", before="input_layernorm"),
        "feedforward": Sublayer("post_feedforward_layernorm", "mlp.up_proj", before="pre_feedforward_layernorm"),
    },
)
_PHI3 = Stack(
    layers="layers",
    attention="self_attn",
    linears={
        **_fused("self_attn.qkv_proj", "q", "k", "v"),
        "o": "self_attn.o_proj",
        **_fused("mlp.gate_up_proj", "gate", "up"),
        "down": "mlp.down_proj",
    },
    sublayers={
        "attention": Sublayer("self_attn.o_proj", "self_attn.qkv_proj", before="input_layernorm"),
        "feedforward": Sublayer("mlp.down_proj", "mlp.gate_up_proj", before="post_attention_layernorm"),
    },
    final_norm="norm",
    embeds="embed_tokens",
    insert="shared",
)
_GPT2 = Stack(
    layers="h",
    attention="attn",
    linears={
        **_fused("attn.c_attn", "q", "k", "v"),
        "o": "attn.c_proj",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
    },
    sublayers={
        "attention": Sublayer("attn.c_proj", "attn.c_attn", before="ln_1"),
        "feedforward": Sublayer("mlp.c_proj", "mlp.c_fc", before="ln_2"),
    },
    final_norm="ln_f",
    embeds="wte",
    insert="shared",
    positions="learned",
    shift=True,
)
_NEOX = Stack(
    layers="layers",
    attention="attention",
    linears={
        **_fused("attention.query_key_value", "q", "k", "v", interleaved=True),
        "o": "attention.dense",
        "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
    },
    sublayers={
        "attention": Sublayer("attention.dense", "attention.query_key_value", before="input_layernorm"),
        "feedforward": Sublayer("mlp.dense_4h_to_h", "mlp.dense_h_to_4h", before="post_attention_layernorm"),
    },
    final_norm="final_layer_norm",
    embeds="embed_in",
    insert="shared",
    head_dim="head_size",
)
_OPT = Stack(
    layers="layers",
    attention="self_attn",
    linears=_attention("self_attn", "q_proj k_proj v_proj out_proj") | {"up": "fc1", "down": "fc2"},
    sublayers={
        "attention": Sublayer("self_attn.out_proj", "self_attn.q_proj", before="self_attn_layer_norm"),
        "feedforward": Sublayer("fc2", "fc1", before="final_layer_norm"),
    },
    final_norm="final_layer_norm",
    embeds="embed_tokens",
    insert="shared",
    positions="learned",
    shift=True,
)
_OPT_POST_NORM = replace(
    _OPT,
    sublayers={
        "attention": Sublayer("self_attn.out_proj", "self_attn.q_proj", after="self_attn_layer_norm"),
        "feedforward": Sublayer("fc2", "fc1", after="final_layer_norm"),
    },
    final_norm=None,
)
_BLOOM = Stack(
    layers="h",
    attention="self_attention",
    linears={
        **_fused("self_attention.query_key_value", "q", "k", "v", interleaved=True),
        "o": "self_attention.dense",
        "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
    },
    sublayers={
        "attention": Sublayer("self_attention.dense", "self_attention.query_key_value", before="input_layernorm"),
        "feedforward": Sublayer("mlp.dense_4h_to_h", "mlp.dense_h_to_4h", before="post_attention_layernorm"),
    },
    final_norm="ln_f",
    embeds="word_embeddings",
    insert="tokens",
    positions="implicit",
)


def _bert(positions: str = "implicit") -> Stack:
    return Stack(
        layers="encoder.layer",
        attention="attention.self",
        linears={
            "q": "attention.self.query",
            "k": "attention.self.key",
            "v": "attention.self.value",
            "o": "attention.output.dense",
            "up": "intermediate.dense",
            "down": "output.dense",
        },
        sublayers={
            "attention": Sublayer("attention.output.dense", "attention.self.query", after="attention.output.LayerNorm"),
            "feedforward": Sublayer("output.dense", "intermediate.dense", after="output.LayerNorm"),
        },
        embeds="embeddings.word_embeddings",
        insert="tokens",
        positions=positions,
        shift=True,
        head_dim="attention_head_size",
    )


_DISTILBERT = Stack(
    layers="transformer.layer",
    attention="attention",
    linears=_attention("attention", "q_lin k_lin v_lin out_lin") | {"up": "ffn.lin1", "down": "ffn.lin2"},
    sublayers={
        "attention": Sublayer("attention.out_lin", "attention.q_lin", after="sa_layer_norm"),
        "feedforward": Sublayer("ffn.lin2", "ffn.lin1", after="output_layer_norm"),
    },
    embeds="embeddings.word_embeddings",
    insert="tokens",
    positions="implicit",
    shift=True,
    head_dim="attention_head_size",
)
_MODERNBERT = Stack(
    layers="layers",
    attention="attn",
    linears={
        **_fused("attn.Wqkv", "q", "k", "v"),
        "o": "attn.Wo",
        **_fused("mlp.Wi", "up", "gate"),
        "down": "mlp.Wo",
    },
    sublayers={
        "attention": Sublayer("attn.Wo", "attn.Wqkv", before="attn_norm"),
        "feedforward": Sublayer("mlp.Wo", "mlp.Wi", before="mlp_norm"),
    },
    final_norm="final_norm",
    embeds="embeddings.tok_embeddings",
    insert="tokens",
)


def _t5(name: str, feed_forward: int, cross: str | None, insert: str | None) -> Stack:
    return Stack(
        name=name,
        layers=f"{name}.block",
        attention="layer.0.SelfAttention",
        linears=_attention("layer.0.SelfAttention", "q k v o")
        | {
            "gate": f"layer.{feed_forward}.DenseReluDense.wi_0",
            "up": f"layer.{feed_forward}.DenseReluDense.wi_1|layer.{feed_forward}.DenseReluDense.wi",
            "down": f"layer.{feed_forward}.DenseReluDense.wo",
        },
        sublayers={
            "attention": Sublayer("layer.0.SelfAttention.o", "layer.0.SelfAttention.q", before="layer.0.layer_norm"),
            **({"cross": Sublayer(f"{cross}.o", f"{cross}.q", before="layer.1.layer_norm")} if cross else {}),
            "feedforward": Sublayer(
                f"layer.{feed_forward}.DenseReluDense.wo",
                f"layer.{feed_forward}.DenseReluDense.wi_0|layer.{feed_forward}.DenseReluDense.wi",
                before=f"layer.{feed_forward}.layer_norm",
            ),
        },
        final_norm=f"{name}.final_layer_norm",
        body=name,
        embeds="embed_tokens",
        insert=insert,
        positions="implicit",
        cross=cross,
        cross_linears=_attention(cross, "q k v o") if cross else {},
        head_dim="key_value_proj_dim",
    )


def _bart(name: str, insert: str | None, pre_norm: bool = False) -> Stack:
    """BART's layers; Whisper's have the same names with the norms in front of the branches."""
    cross = "encoder_attn" if name == "decoder" else None
    side = "before" if pre_norm else "after"
    branches = {
        "attention": ("self_attn.out_proj", "self_attn.q_proj", "self_attn_layer_norm"),
        **({"cross": ("encoder_attn.out_proj", "encoder_attn.q_proj", "encoder_attn_layer_norm")} if cross else {}),
        "feedforward": ("fc2", "fc1", "final_layer_norm"),
    }
    return Stack(
        name=name,
        layers=f"{name}.layers",
        attention="self_attn",
        linears=_attention("self_attn", "q_proj k_proj v_proj out_proj") | {"up": "fc1", "down": "fc2"},
        sublayers={key: Sublayer(output, read, **{side: norm}) for key, (output, read, norm) in branches.items()},
        final_norm=f"{name}.layer_norm" if pre_norm else None,
        body=name,
        embeds=None if insert == "states" else "embed_tokens",
        insert=insert,
        positions="implicit",
        cross=cross,
        cross_linears=_attention(cross, "q_proj k_proj v_proj out_proj") if cross else {},
    )


def _vision(layers: str, attention: str, out: str, norms: str, final_norm: str, scales: str = "") -> Stack:
    """`norms` and `scales` name those of attention and feed-forward; a layer scale ends a branch where there is one."""
    ends = scales.split() or [f"{attention}.{out}", "mlp.fc2"]
    first, second = norms.split()
    return Stack(
        layers=layers,
        attention=attention,
        linears=_attention(attention, f"q_proj k_proj v_proj {out}") | {"up": "mlp.fc1", "down": "mlp.fc2"},
        sublayers={
            "attention": Sublayer(ends[0], f"{attention}.q_proj", before=first),
            "feedforward": Sublayer(ends[1], "mlp.fc1", before=second),
        },
        final_norm=final_norm,
        insert="states",
        positions="implicit",
    )


def _families() -> Iterator[Family]:
    for name in ("llama", "mistral", "qwen2", "qwen3"):
        yield Family(name, (_LLAMA,))
    for name in ("gemma2", "gemma3_text"):
        yield Family(name, (_GEMMA,))
    yield Family("phi3", (_PHI3,))
    yield Family("gpt2", (_GPT2,))
    yield Family("gpt_neox", (_NEOX,))
    yield Family("opt", (_OPT,), roots=("decoder",), post_norm=(_OPT_POST_NORM,))
    yield Family("bloom", (_BLOOM,), interface=False)
    yield Family("bert", (_bert(),), pooler="pooler.dense")
    yield Family("roberta", (_bert("padded"),), pooler="pooler.dense")
    yield Family("electra", (_bert(),))
    yield Family("distilbert", (_DISTILBERT,))
    yield Family("modernbert", (_MODERNBERT,))
    yield Family("t5", (_t5("encoder", 1, None, "tokens"), _t5("decoder", 2, "layer.1.EncDecAttention", None)))
    yield Family("bart", (_bart("encoder", "tokens"), _bart("decoder", None)))
    yield Family("whisper", (_bart("encoder", "states", True), _bart("decoder", None, True)))
    vit = _vision("layers", "attention", "o_proj", "layernorm_before layernorm_after", "layernorm")
    dino = _vision("encoder.layer", "attention", "o_proj", "norm1 norm2", "layernorm", "layer_scale1 layer_scale2")
    clip = _vision("encoder.layers", "self_attn", "out_proj", "layer_norm1 layer_norm2", "post_layernorm")
    clip = replace(clip, pooled_norm=True)
    yield Family("vit", (vit,))
    yield Family("dinov2", (dino,))
    yield Family("clip", (clip,), roots=("vision_model", ""))
    yield Family("clip_vision_model", (clip,), roots=("vision_model", ""), head=False)


FAMILIES: dict[str, Family] = {family.name: family for family in _families()}


def family_of(model_type: str) -> Family:
    """The family of a `config.model_type`. Raises UserError where trimtab has none."""
    if model_type not in FAMILIES:
        raise unknown("the model family", model_type, FAMILIES)
    return FAMILIES[model_type]


def supports(kinds: frozenset[str], family: Family) -> bool:
    """Whether a method that needs these site kinds works on this family."""
    return kinds <= family.kinds


def select_layers(spec: str | None, count: int, field: str = "layers") -> list[int]:
    """Layer numbers that `spec` names out of `count`: None (all), "3", "-10:", "0:4", "0,2,-1"; `field` is its name.

    Raises UserError for a layer that does not exist and for a selection that names none.
    """
    if spec is None:
        return list(range(count))
    chosen: set[int] = set()
    for piece in str(spec).split(","):
        chosen.update(_piece(piece.strip(), spec, count, field))
    if not chosen:
        raise UserError(f"{field}={spec!r} names no layer; this model has layers 0 to {count - 1}")
    return sorted(chosen)


def _piece(piece: str, spec: str, count: int, name: str) -> range | list[int]:
    start, colon, stop = piece.partition(":")
    try:
        low = int(start) if start else None
        high = int(stop) if stop else None
    except ValueError:
        raise UserError(f"{name}={spec!r} is no layer selection; write for example 3, -10:, 0:4 or 0,2,5") from None
    for number in (low, high):
        if number is not None and not -count <= number <= count - (0 if colon else 1):
            raise UserError(f"{name}={spec!r} is out of range; this model has layers 0 to {count - 1}")
    if colon:
        return range(count)[low:high]
    if low is None:
        raise UserError(f"{name}={spec!r} is no layer selection; write for example 3, -10:, 0:4 or 0,2,5")
    return [low % count]

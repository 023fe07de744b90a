"""Sites: the places in one real model where a method can act. Knows modules and shapes; refuses to know methods.

Sites are found by the names that arch.py gives for the family and checked against the module tree, so that a name that
does not exist is an error at attach time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trimtab.arch import Family, Fused, Stack, family_of, select_layers
from trimtab.errors import UserError, unknown

Module: TypeAlias = Any
"""An nn.Module. torch types a module's attributes as "tensor or module", which fits none of their uses here."""


@dataclass(frozen=True)
class Span:
    """A contiguous slice of a fused projection's output."""

    start: int
    length: int

    def take(self, y: torch.Tensor) -> torch.Tensor:
        """[..., all] -> [..., length]"""
        return y[..., self.start : self.start + self.length]

    def put(self, y: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """`y` with this slice replaced by `new`; `y` itself stays as it was."""
        return torch.cat([y[..., : self.start], new, y[..., self.start + self.length :]], dim=-1)


@dataclass(frozen=True)
class Interleaved:
    """One of `parts` projections that alternate head by head: [..., heads, parts, head_dim]."""

    heads: int
    parts: int
    index: int

    def take(self, y: torch.Tensor) -> torch.Tensor:
        """[..., all] -> [..., heads * head_dim]"""
        return y.unflatten(-1, (self.heads, self.parts, -1))[..., self.index, :].flatten(-2)

    def put(self, y: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """`y` with this part replaced by `new`; `y` itself stays as it was."""
        pieces = list(y.unflatten(-1, (self.heads, self.parts, -1)).unbind(-2))
        pieces[self.index] = new.unflatten(-1, (self.heads, -1))
        return torch.stack(pieces, dim=-2).flatten(-3)


@dataclass(frozen=True, eq=False)
class LinearSite:
    """y = W x of one projection; `span` picks it out of a fused module's output."""

    key: str
    stack: str
    layer: int
    role: str
    cross: bool
    module: Module
    path: str
    in_features: int
    out_features: int
    span: Span | Interleaved | None

    def weight(self) -> torch.Tensor:
        """The projection's weight [out, in], whatever the module's own orientation.

        Raises UserError where the weight is quantised.
        """
        weight = self._in_out()
        return (weight if self.span is None else self.span.take(weight)).T

    def bias(self) -> torch.Tensor | None:
        """The projection's bias [out], or None."""
        bias = self.module.bias
        return bias if bias is None or self.span is None else self.span.take(bias)

    def write(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Write a weight [out, in] and a bias [out] into the module, into its share of a fused one."""
        self.module.__dict__.pop("weight", None)  # one that was lent to a call that was broken off
        with torch.no_grad():
            whole = self._in_out()
            whole.copy_(weight.T if self.span is None else self.span.put(whole, weight.T.to(whole.dtype)))
            if bias is not None:
                if self.module.bias is None:
                    self.module.bias = nn.Parameter(torch.zeros_like(whole[0]), requires_grad=False)
                own = self.module.bias
                own.copy_(bias if self.span is None else self.span.put(own, bias.to(own.dtype)))

    def lend(self, weight: torch.Tensor) -> None:
        """Have the module compute with a weight [out, in], in its share of a fused one; its own is hidden, not changed.

        Until the lent weight is taken out of the module's `__dict__`, `module.weight` and `self.weight()` are it.
        """
        whole = self._in_out()
        lent = weight.T if self.span is None else self.span.put(whole, weight.T)
        self.module.__dict__["weight"] = lent if isinstance(self.module, Conv1D) else lent.T

    def _in_out(self) -> torch.Tensor:
        """A view of the module's whole weight [in, all out]."""
        weight = self.module.weight
        if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
            raise UserError(f"{self.path} holds a quantised weight; this needs the plain weight")
        return weight if isinstance(self.module, Conv1D) else weight.T


@dataclass(frozen=True, eq=False)
class KVSite:
    """The keys and values of one attention and the context it returns."""

    key: str
    stack: str
    layer: int
    cross: bool
    causal: bool
    module: Module
    path: str
    heads: int
    kv_heads: int
    head_dim: int
    k: LinearSite
    v: LinearSite
    body: Module
    """The module that runs the stack: what has to be ready before a forward is made ready in front of it."""
    positions: str
    """How the stack counts positions (arch.Stack)."""
    shift: bool
    """Whether a prefix moves the text's positions up."""


@dataclass(frozen=True, eq=False)
class EmbedsSite:
    """The input of one stack: virtual tokens are put in front of it."""

    key: str
    stack: str
    body: Module
    embedding: Module
    layers: tuple[nn.Module, ...]
    attentions: tuple[KVSite, ...]
    width: int
    insert: str
    positions: str
    reader: nn.Module | None
    """The decoder that attends to this stack's output; None where the output goes to a head."""
    states: Module = None
    """What adds positions to the embeddings and norms them, in encoders of texts; its output is the stack's input."""
    layer: int = -1


@dataclass(frozen=True, eq=False)
class ActivationSite:
    """What a branch of a layer adds to the residual stream, and what the branch reads."""

    key: str
    stack: str
    layer: int
    branch: str
    """attention, cross or feedforward."""
    module: Module
    """Its output [batch, length, width] is added to the stream."""
    path: str
    reads: Module
    """Its input is what the branch reads: the stream, or the norm of it."""
    stream: Module
    """Its input is the residual stream."""
    after: Module
    """The frozen norm behind the residual add, in post-norm layers; else None."""
    width: int


@dataclass(frozen=True, eq=False)
class NormSite:
    """One normalisation: in a layer, behind the last layer, or at the embeddings (layer -1)."""

    key: str
    stack: str
    layer: int
    module: Module
    path: str


@dataclass(frozen=True, eq=False)
class HeadSite:
    """A task head (classifier, score) or the language-model head."""

    key: str
    module: Module
    path: str
    generative: bool
    layer: int = 1_000_000
    stack: str = ""


@dataclass(frozen=True, eq=False)
class StatesSite:
    """What one stack's layers give, read only, and the place where something else may leave the stack instead."""

    key: str
    stack: str
    structure: Stack
    """The names of the stack's modules."""
    layers: tuple[Module, ...]
    attentions: tuple[KVSite, ...]
    body: Module
    end: Module
    """What its output leaves the stack: the norm behind the last layer, or that layer."""
    width: int
    encoder: Module
    """The first layer of the stack that this one attends to, or None."""
    reader: Module
    """The decoder that attends to this stack's output; None where the output goes to a head."""
    layer: int
    """Above all layers: nothing below is trained."""


@dataclass(frozen=True, eq=False)
class ModuleSite:
    """Any module that has a layer of another library's beside it (bridge.py); outside the layers it is in layer -1."""

    key: str
    stack: str
    layer: int
    module: Module
    path: str


Site = LinearSite | KVSite | EmbedsSite | ActivationSite | NormSite | HeadSite | StatesSite | ModuleSite


class Sites:
    """All sites of one model.

    `linear`, `activation`, `norm`, `kv`, `embeds`, `states` and `head` are tuples of sites; `pooler` is a linear site
    or None; `layer_modules` maps a stack's name to its layers; `model` is the model itself.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.family: Family = family_of(model.config.model_type).of(model.config)
        root = _root(model, self.family)
        names = {id(module): path for path, module in model.named_modules()}
        self.layer_modules: dict[str, tuple[nn.Module, ...]] = {}
        linear: list[LinearSite] = []
        kv: list[KVSite] = []
        embeds: list[EmbedsSite] = []
        activation: list[ActivationSite] = []
        states: list[StatesSite] = []
        for stack in self.family.stacks:
            if stack.name == "decoder" and not _has(root, stack.layers):
                continue  # an encoder-only class of an encoder-decoder family
            layers = tuple(_module(root, stack.layers, model).children())
            self.layer_modules[stack.name] = layers
            stack_linear = [site for i, layer in enumerate(layers) for site in _linears(stack, i, layer, names)]
            body = _module(root, stack.body, model)
            stack_kv = [
                site for i, layer in enumerate(layers) for site in _kvs(stack, i, layer, names, stack_linear, body)
            ]
            linear += stack_linear
            kv += stack_kv
            for i, layer in enumerate(layers):
                activation += _activations(stack, i, layer, names)
            if stack.insert:
                embeds.append(_embeds(stack, root, layers, stack_linear, stack_kv, body, model))
            states.append(_states(stack, root, self.layer_modules, stack_linear, stack_kv, body))
        self.pooler = _pooler(self.family, root, len(self.layer_modules[self.family.stacks[0].name]), names)
        self.linear = tuple(linear)
        self.activation = tuple(activation)
        self.norm = tuple(_norms(self.family, root, self.layer_modules, names))
        self.kv = tuple(kv) if self.family.interface else ()
        self.embeds = tuple(embeds)
        self.states = tuple(states)
        self.head = tuple(_heads(model, names))

    def linears(self, targets: Sequence[str], layers: str | None) -> list[LinearSite]:
        """The linear sites with these roles in these layers of every stack.

        Raises UserError for a role the model does not have and for layers out of range.
        """
        roles = {site.role for site in self.linear}
        for target in targets:
            if target not in roles:
                raise unknown(f"the target of {self.family.name}", target, sorted(roles))
        if not targets:
            raise UserError(f"targets names no projection; {self.family.name} has {', '.join(sorted(roles))}")
        chosen = self._chosen(layers)
        return [site for site in self.linear if site.role in targets and site.layer in chosen[site.stack]]

    def activations(self, branches: Sequence[str], layers: str | None) -> list[ActivationSite]:
        """The activation sites of these branches in these layers of every stack. Raises UserError as `linears`."""
        known = {site.branch for site in self.activation}
        for branch in branches:
            if branch not in known:
                raise unknown(f"the branch of {self.family.name}", branch, sorted(known))
        chosen = self._chosen(layers)
        return [site for site in self.activation if site.branch in branches and site.layer in chosen[site.stack]]

    def kvs(self, layers: str | None) -> list[KVSite]:
        """The attentions in these layers of every stack, cross-attention included.

        Raises UserError for layers out of range.
        """
        chosen = self._chosen(layers)
        return [site for site in self.kv if site.layer in chosen[site.stack]]

    def _chosen(self, layers: str | None) -> dict[str, set[int]]:
        return {name: set(select_layers(layers, len(found))) for name, found in self.layer_modules.items()}

    @property
    def task_head(self) -> list[HeadSite]:
        """The modules of the task head (classifier, score); empty for a language model or a bare encoder."""
        return [site for site in self.head if not site.generative]


def _root(model: PreTrainedModel, family: Family) -> nn.Module:
    base = model.base_model
    for path in family.roots:
        if _has(base, path):
            return base.get_submodule(path)
    raise UserError(
        f"{type(model).__name__} has none of the modules {', '.join(map(repr, family.roots))} of {family.name}"
    )


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def _module(module: nn.Module, path: str, owner: object) -> nn.Module:
    if not _has(module, path):
        raise UserError(
            f"{type(owner).__name__} has no module {path!r} in {type(module).__name__}; "
            "this version of transformers names its modules differently from what trimtab knows"
        )
    return module.get_submodule(path)


def _prefix(stack: str, layer: int) -> str:
    return f"{stack}_layer{layer}" if stack else f"layer{layer}"


def _linears(stack: Stack, index: int, layer: nn.Module, names: dict[int, str]) -> Iterator[LinearSite]:
    for cross, roles in ((False, stack.linears), (True, stack.cross_linears)):
        for role, where in roles.items():
            module = _first(layer, where.path if isinstance(where, Fused) else where)
            if module is None:
                if role == "gate":  # only gated feed-forward layers have one
                    continue
                raise UserError(f"{type(layer).__name__} has no module {where!r}, which trimtab expects there")
            key = f"{_prefix(stack.name, index)}_{'cross_' if cross else ''}{role}"
            yield _linear(key, stack, index, layer, role, cross, module, where, names)


def _first(layer: nn.Module, alternatives: str) -> nn.Module | None:
    found = (path for path in alternatives.split("|") if _has(layer, path))
    path = next(found, None)
    return None if path is None else layer.get_submodule(path)


def _linear(
    key: str,
    stack: Stack,
    index: int,
    layer: nn.Module,
    role: str,
    cross: bool,
    module: nn.Module,
    where: str | Fused,
    names: dict[int, str],
) -> LinearSite:
    in_features, out_features = _features(module)
    span: Span | Interleaved | None = None
    if isinstance(where, Fused):
        span, out_features = _span(where, stack, layer, out_features)
    return LinearSite(key, stack.name, index, role, cross, module, names[id(module)], in_features, out_features, span)


def _features(module: Module) -> tuple[int, int]:
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return module.in_features, module.out_features


def _span(where: Fused, stack: Stack, layer: nn.Module, total: int) -> tuple[Span | Interleaved, int]:
    index = where.parts.index(where.part)
    if where.interleaved:
        head_dim = getattr(layer.get_submodule(stack.attention), stack.head_dim)
        parts = len(where.parts)
        return Interleaved(total // (parts * head_dim), parts, index), total // parts
    sizes = [total // len(where.parts)] * len(where.parts)
    if where.parts == ("q", "k", "v"):  # grouped-query attention has fewer keys and values than queries
        output = layer.get_submodule(str(stack.linears["o"]))
        queries = _features(output)[0]
        sizes = [queries, (total - queries) // 2, (total - queries) // 2]
    return Span(sum(sizes[:index]), sizes[index]), sizes[index]


def _activations(stack: Stack, index: int, layer: nn.Module, names: dict[int, str]) -> Iterator[ActivationSite]:
    for branch, sub in stack.sublayers.items():
        reads = _expected(layer, sub.input)
        output = _expected(layer, sub.output)
        last = _expected(layer, _path_of(stack.cross_linears if branch == "cross" else stack.linears, branch))
        yield ActivationSite(
            key=f"{_prefix(stack.name, index)}_{branch}",
            stack=stack.name,
            layer=index,
            branch=branch,
            module=output,
            path=names[id(output)],
            reads=reads,
            stream=reads if sub.before is None else _expected(layer, sub.before),
            after=None if sub.after is None else _expected(layer, sub.after),
            width=_features(last)[1],
        )


def _path_of(linears: Mapping[str, str | Fused], branch: str) -> str:
    """The path of the projection that ends a branch."""
    where = linears["down" if branch == "feedforward" else "o"]
    assert isinstance(where, str)
    return where


def _expected(layer: nn.Module, alternatives: str) -> Module:
    module = _first(layer, alternatives)
    if module is None:
        raise UserError(f"{type(layer).__name__} has no module {alternatives!r}, which trimtab expects there")
    return module


def _pooler(family: Family, root: Any, layers: int, names: dict[int, str]) -> LinearSite | None:
    """The pooler's projection, where the model has one (a class may leave it out)."""
    if family.pooler is None or getattr(root, family.pooler.partition(".")[0], None) is None:
        return None
    module = root.get_submodule(family.pooler)
    return LinearSite("pooler", "", layers, "pooler", False, module, names[id(module)], *_features(module), None)


def _norms(
    family: Family, root: nn.Module, layers: Mapping[str, Sequence[nn.Module]], names: dict[int, str]
) -> Iterator[NormSite]:
    """Every normalisation with a weight under the family's root.

    One outside the layers counts as standing in front of them unless the family names it as the final norm: that
    never cuts a gradient that is needed.
    """
    where = {
        id(inner): (stack, i)
        for stack, found in layers.items()
        for i, layer in enumerate(found)
        for inner in layer.modules()
    }
    final = {
        id(root.get_submodule(s.final_norm)): s.name for s in family.stacks if s.final_norm and _has(root, s.final_norm)
    }
    for path, module in root.named_modules():
        if not type(module).__name__.endswith("Norm") or getattr(module, "weight", None) is None:
            continue
        if id(module) in where:
            stack, layer = where[id(module)]
        elif id(module) in final:
            stack, layer = final[id(module)], len(layers[final[id(module)]])
        else:
            stack, layer = path.partition(".")[0] if len(layers) > 1 else "", -1
        yield NormSite(f"norm_{path.replace('.', '_')}", stack, layer, module, names[id(module)])


def _kvs(
    stack: Stack, index: int, layer: nn.Module, names: dict[int, str], linears: list[LinearSite], body: Module
) -> Iterator[KVSite]:
    for cross, path in ((False, stack.attention), (True, stack.cross)):
        if path is None:
            continue
        module = _module(layer, path, layer)
        own = {site.role: site for site in linears if site.layer == index and site.cross == cross}
        head_dim = getattr(module, stack.head_dim)
        yield KVSite(
            key=f"{_prefix(stack.name, index)}_{'cross' if cross else 'self'}",
            stack=stack.name,
            layer=index,
            cross=cross,
            causal=stack.insert == "shared" or (stack.name == "decoder" and not cross),
            module=module,
            path=names[id(module)],
            heads=own["q"].out_features // head_dim,
            kv_heads=own["k"].out_features // head_dim,
            head_dim=head_dim,
            k=own["k"],
            v=own["v"],
            body=body,
            positions=stack.positions,
            shift=stack.shift,
        )


def _embeds(
    stack: Stack,
    root: nn.Module,
    layers: tuple[nn.Module, ...],
    linears: list[LinearSite],
    kvs: list[KVSite],
    body: Module,
    model: PreTrainedModel,
) -> EmbedsSite:
    embedding: Module = None if stack.embeds is None else _module(body, stack.embeds, model)
    states_width = next(site.out_features for site in linears if site.role == "o")
    return EmbedsSite(
        key=f"{stack.name}_embeds" if stack.name else "embeds",
        stack=stack.name,
        body=body,
        embedding=embedding,
        layers=layers,
        attentions=tuple(kvs),
        width=states_width if embedding is None else embedding.embedding_dim,
        insert="tokens" if stack.insert == "shared" and not _tokens_stand_alone(body) else str(stack.insert),
        positions=stack.positions,
        reader=_reader(stack, root),
        states=_states_of(stack, body, model),
    )


def _states_of(stack: Stack, body: Module, model: PreTrainedModel) -> Module:
    """The module around the words' embeddings, in encoders that add learned positions there; else None."""
    around = (stack.embeds or "").rpartition(".")[0]
    return _module(body, around, model) if around and stack.shift and stack.insert == "tokens" else None


def _reader(stack: Stack, root: nn.Module) -> Module:
    """The decoder that attends to this stack's output, if there is one."""
    return root.get_submodule("decoder") if stack.name == "encoder" and _has(root, "decoder") else None


def _states(
    stack: Stack,
    root: nn.Module,
    layers: Mapping[str, tuple[nn.Module, ...]],
    linears: list[LinearSite],
    kvs: list[KVSite],
    body: Module,
) -> StatesSite:
    own = layers[stack.name]
    path = None if stack.pooled_norm else stack.final_norm
    norm = root.get_submodule(path) if path and _has(root, path) else None  # old OPT models have none
    return StatesSite(
        key=f"{stack.name}_states" if stack.name else "states",
        stack=stack.name,
        structure=stack,
        layers=own,
        attentions=tuple(kvs),
        body=body,
        end=own[-1] if norm is None else norm,
        width=next(site.out_features for site in linears if site.role == "o"),
        encoder=layers["encoder"][0] if stack.cross else None,
        reader=_reader(stack, root),
        layer=len(own),
    )


def layer_linears(stack: Stack, index: int, layer: nn.Module) -> list[LinearSite]:
    """The projections of one layer of a stack, or of one built like it."""
    return list(_linears(stack, index, layer, {id(module): path for path, module in layer.named_modules()}))


def _tokens_stand_alone(body: Module) -> bool:
    """Whether what the model makes of a text's first tokens does not depend on what follows them."""
    return not reads_both_ways(body) and _rope_type(body) != "longrope"


def reads_both_ways(body: Module) -> bool:
    """Whether a model's configuration takes the causal mask away from a family that has one."""
    config = getattr(body, "config", None)
    return getattr(config, "is_causal", True) is False or bool(getattr(config, "use_bidirectional_attention", False))


def _rope_type(body: Module) -> str | None:
    """The kind of rotary scaling: longrope's factors depend on the text's length, so shared keys would not fit it."""
    config = getattr(body, "config", None)
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return parameters.get("rope_type") or parameters.get("type")


def _heads(model: PreTrainedModel, names: dict[int, str]) -> Iterator[HeadSite]:
    language = model.get_output_embeddings()
    if language is not None:
        yield HeadSite("lm_head", language, names[id(language)], generative=True)
        return
    for path, module in task_heads(model):
        yield HeadSite(f"head_{path}", module, path, generative=False)


def task_heads(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a task head, by name: those of a model for a task that are no part of its base."""
    if "For" not in type(model).__name__:  # a bare encoder or decoder: LlamaModel, BertModel
        return
    for path, module in model.named_children():
        if module is model.base_model or path == "trimtab" or next(module.parameters(), None) is None:
            continue
        if any(inner is model.base_model or isinstance(inner, PreTrainedModel) for inner in module.modules()):
            continue
        yield path, module

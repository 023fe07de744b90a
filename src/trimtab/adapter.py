"""Attaching a method to a base model, and everything an attached adapter can do. Knows no method and no model class.

The model stays the object it was. All trained tensors live in one registered sub-module, `model.trimtab`; what acts on
the forward pass are hooks and the registered attention function, and detaching takes them away again.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from trimtab.arch import FAMILIES, supports
from trimtab.attention import AttentionSetting, RefuseOtherAttention, install_kv, puts_in_front
from trimtab.biases import declare_biases
from trimtab.contract import Context, Method, Parts, folded, members
from trimtab.copies import ModuleCopy, dropouts
from trimtab.errors import UserError
from trimtab.hooks import (
    DetachInput,
    DetachOutput,
    RefuseReentrant,
    Switch,
    install_activation,
    install_head,
    install_linear,
    install_module,
    install_norm,
    unchanging,
)
from trimtab.image_argument import Eye, ImageArgument
from trimtab.labels import LabelSetting
from trimtab.methods import METHODS
from trimtab.methods.spec import parse_method
from trimtab.positions import PositionsFromMask, takes_positions
from trimtab.real_text import keys_and_values
from trimtab.sites import (
    ActivationSite,
    EmbedsSite,
    HeadSite,
    KVSite,
    LinearSite,
    ModuleSite,
    NormSite,
    Site,
    Sites,
    StatesSite,
)
from trimtab.states import install_states
from trimtab.virtual import install_embeds, stands_in_front

INSTALLERS: dict[type, Callable[[Any, Any, Switch], list[Any]]] = {
    LinearSite: install_linear,
    ActivationSite: install_activation,
    NormSite: install_norm,
    KVSite: install_kv,
    EmbedsSite: install_embeds,
    StatesSite: install_states,
    HeadSite: install_head,
    ModuleSite: install_module,
}


_COPIED = HeadSite | NormSite | ModuleSite
"""Sites whose parts write themselves into the base's module when they are merged."""


class Adapter:
    """One method attached to one base model under one name: a handle on what `model.trimtab` holds.

    Attributes: `model`, `name`, `method`.
    """

    def __init__(self, model: PreTrainedModel, name: str):
        self.model, self.name = model, name

    def __repr__(self) -> str:
        return f"Adapter({self.name!r}, {self.method!r})"

    @property
    def _entry(self) -> Entry:
        attachments = _attachments(self.model)
        if self.name not in attachments.entries:
            raise UserError(f"the adapter {self.name!r} is no longer attached")
        return attachments.entries[self.name]  # type: ignore[return-value]

    @property
    def method(self) -> Method:
        """The method that this adapter trains."""
        return self._entry.method

    @property
    def active(self) -> bool:
        """Whether this is the adapter that acts on the model at present."""
        return self._entry.switch.on

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trained tensors, the task head's included."""
        return (parameter for _, parameter in self.named_parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trained tensors by name; of full fine-tuning the base model's."""
        return self._trained().named_parameters()

    def lr_scales(self) -> dict[nn.Parameter, float]:
        """The trained tensors that learn at a multiple of the learning rate, with the factor."""
        parts: list[Any] = [part for part in self._entry.members() if hasattr(part, "lr_scales")]
        scales = [(part.get_parameter(name), factor) for part in parts for name, factor in part.lr_scales().items()]
        return {weight: factor for weight, factor in scales if factor != 1.0}

    def undecayed(self) -> list[nn.Parameter]:
        """The trained tensors that weight decay has to leave alone, besides biases and norms."""
        parts: list[Any] = list(self._entry.members())
        return [part.get_parameter(name) for part in parts for name in getattr(part, "undecayed", ())]

    def searching(self) -> list[Any]:
        """The parts that improve by search instead of by an optimizer; a loop calls `search` on each (contract.py)."""
        return [part for part in self._entry.members() if hasattr(part, "search")]

    def progress(self, done: float) -> None:
        """Tell the method which share of the optimizer's steps is done: a loop does so before each, with 1 at the end.

        Methods that train in phases need it (contract.py); for the others it does nothing.
        """
        entry: Any = self._entry
        if hasattr(entry.method, "progress"):
            entry.method.progress(list(entry.members()), done)

    def extra_loss(self) -> torch.Tensor | float:
        """The method's own term of the loss, 0 for most; a loop adds it once an optimizer step."""
        entry: Any = self._entry
        return entry.method.extra_loss(list(entry.members())) if hasattr(entry.method, "extra_loss") else 0.0

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The trained tensors (not folded), detached, by name."""
        return dict(self._trained().state_dict())

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copy tensors in. Raises UserError, nothing changed, that lists missing, unexpected and mis-shaped ones."""
        own = self.state_dict()
        check_tensors(own, state)
        with torch.no_grad():
            for key, tensor in state.items():
                own[key].copy_(tensor)

    def activate(self) -> None:
        """Make this the adapter that acts; the others stay attached, their `requires_grad` as it was."""
        _attachments(self.model).use(self._entry.name)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model is the frozen base; hooks stay in place. Full fine-tuning has no frozen base left."""
        attachments = _attachments(self.model)
        before = attachments.active
        attachments.use(None)
        try:
            yield
        finally:
            attachments.use(before)

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Inside, no tensor of the model or of an adapter on it changes: what depends on no text is computed once.

        Keys and values of virtual tokens and what generators make are kept for all forwards without gradients.
        """
        with unchanging(_attachments(self.model).switches):
            yield

    def fold(self) -> None:
        """Turn the trained form into the inference form: generators discarded, mixtures averaged. Same outputs."""
        entry = self._entry
        if not any(hasattr(part, "fold") for part in entry.parts.values()):
            return
        entry.uninstall()
        entry.method = folded_method(entry)
        entry.parts = folded_parts(entry.parts).train(entry.training)
        entry.install()

    def merge(self) -> PreTrainedModel:
        """Write the adapter into the base weights and detach it; returns the model.

        New biases are named in the model's configuration, where its class has a flag for them (biases.py). Raises
        UserError for methods that cannot be merged and for quantised weights; then nothing changed.
        """
        entry = self._entry
        if not entry.method.mergeable:
            raise UserError(f"{entry.method.name} cannot be merged: it is no change of the base's weights")
        self.fold()
        updates = [_merged(site, entry.parts[site.key]) for site in entry.sites if isinstance(site, LinearSite)]
        copies = [(site, entry.parts[site.key]) for site in entry.sites if isinstance(site, _COPIED)]
        self.detach()
        before = len(list(self.model.parameters()))
        for write in updates:
            write()
        for site, parts in copies:
            for part in members(parts):
                part.write_into(site.module)
        if len(list(self.model.parameters())) > before:  # biases where there were none
            declare_biases(self.model)
        return self.model

    def detach(self) -> PreTrainedModel:
        """Take the adapter off; after the last one the base model is what it was, bit for bit. Returns the model.

        Full fine-tuning trains the given model itself: what it learned stays.
        """
        attachments = _attachments(self.model)
        attachments.remove(self._entry)
        if not attachments.entries:
            attachments.restore()
            del self.model.trimtab
        return self.model

    def fit_head(self, labels: Sequence[str]) -> None:
        """Give the task head as many classes as there are labels, and their names; new ones are to be loaded."""
        entry = self._entry
        for site in entry.sites:
            if isinstance(site, HeadSite) and not site.generative:
                for part in members(entry.parts[site.key]):
                    part.resize(len(entry.labels), len(labels))
        entry.labels = tuple(labels)
        if self.active:
            self.activate()

    def fit_tensors(self, state: Mapping[str, torch.Tensor]) -> None:
        """Give tensors that are as long as training makes them these lengths; their values are to be loaded."""
        for path, part in self._entry.parts.named_modules():
            if hasattr(part, "fit"):
                part.fit({name: state[f"{path}.{name}"] for name in part.state_dict() if f"{path}.{name}" in state})

    def save(self, folder: str | Path, *, task: Mapping[str, Any] | None = None) -> Path:
        """Write `adapter_config.json` and `adapter_model.safetensors` (folded) into `folder`, atomically."""
        from trimtab.checkpoint import save_adapter

        return save_adapter(self, Path(folder), task=task)

    def export(self, folder: str | Path, to: str) -> Path:
        """Write the adapter into `folder` as another library's files (peft).

        Raises UserError for what that library cannot express; then nothing is written.
        """
        from trimtab import peers

        return peers.export(self, folder, to)

    def _trained(self) -> nn.Module:
        return self.model if getattr(self.method, "whole_model", False) else self._entry.parts


class Entry(nn.Module):
    """One adapter's parts, hooks and switch."""

    def __init__(self, name: str, method: Method, parts: Mapping[Site, nn.Module], attachments: Attachments):
        super().__init__()
        self.name, self.method = name, method
        self.sites = tuple(parts)
        self.parts = nn.ModuleDict({site.key: _placed(site, part) for site, part in parts.items()})
        self.labels = attachments.labels.own
        self.switch = Switch()
        self.handles: list[Any] = []
        whole = getattr(method, "whole_model", False)
        self.cuts = [] if whole else list(_cuts(self.sites, attachments.sites))
        self.virtual = any(_is_shared(site, part) for site, part in parts.items())
        """Whether it has virtual tokens that are run once and reach the text through its attention."""
        own = [part for site, part in parts.items() if isinstance(site, KVSite)]
        self.uses_attention = self.virtual or bool(own)
        self.needs_front = self.virtual or any(puts_in_front(part) for one in own for part in members(one))

    def members(self) -> Iterator[Any]:
        """The parts of single methods at all sites."""
        return (part for parts in self.parts.values() for part in members(parts))

    def eyes(self) -> list[Eye]:
        """What looks at the pictures of a batch."""
        return [part.eye for part in self.members() if hasattr(part, "eye")]

    def install(self) -> None:
        """Put the hooks in place."""
        for site in sorted(self.sites, key=_order):
            for part in members(self.parts[site.key]):
                self.handles += INSTALLERS[type(site)](site, part, self.switch)
        for layer, at_output in self.cuts:
            if at_output:
                self.handles.append(layer.register_forward_hook(DetachOutput(self.switch)))
            else:
                self.handles.append(layer.register_forward_pre_hook(DetachInput(self.switch), with_kwargs=True))

    def uninstall(self) -> None:
        """Take the hooks away."""
        for handle in self.handles:
            handle.remove()
        self.handles = []


class Attachments(nn.Module):
    """Everything trimtab keeps on one model; registered as `model.trimtab`."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.entries = nn.ModuleDict()
        self.active: str | None = None
        _own_configs(model)
        self.sites = Sites(model)
        self.attention = AttentionSetting(self.sites.kv)
        self.labels = LabelSetting(model)
        self.images = ImageArgument(model)
        self.switches: list[Switch] = []
        self.shared: torch.Tensor | None = None
        """The tokens [1, s] in front of all rows that are run by themselves at present (prefix_share.py)."""
        self.replaying = False
        """Whether a trunk cache stands in for the lower layers at present (cache.py)."""
        self.trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.dropouts = list(dropouts(model))
        first_layers = [layers[0] for layers in self.sites.layer_modules.values()]
        self.handles: list[Any] = [model.register_forward_pre_hook(RefuseReentrant(first_layers))]
        self.handles.append(model.register_forward_pre_hook(RefuseOtherAttention(self.attention)))
        self.handles.append(model.register_forward_pre_hook(self.images.begin, with_kwargs=True))
        self.handles.append(model.register_forward_hook(self.images.end, always_call=True))
        for site in self.sites.embeds:
            self.handles.append(site.body.register_forward_pre_hook(self.images.begin_body))
        self.handles += _position_hooks(self.sites, self.switches)
        for parameter in self.trainable:
            parameter.requires_grad_(False)
        for module, name, _ in self.dropouts:
            setattr(module, name, 0.0)

    def add(self, entry: Entry) -> None:
        """Install an adapter and make it the active one."""
        if entry.uses_attention:
            self.attention.acquire()
        try:
            entry.install()
        except BaseException:
            entry.uninstall()
            if entry.uses_attention:
                self.attention.release()
            raise
        if entry.eyes():
            self.images.acquire()
        self.entries[entry.name] = entry
        self.switches.append(entry.switch)
        self.use(entry.name)

    def remove(self, entry: Entry) -> None:
        """Uninstall an adapter; if it was the active one, none is."""
        entry.uninstall()
        self.switches.remove(entry.switch)
        del self.entries[entry.name]
        if self.active == entry.name:
            self.use(None)
        if entry.uses_attention:
            self.attention.release()
        if entry.eyes():
            self.images.release()

    def use(self, name: str | None) -> None:
        """Switch to the adapter of this name, or to the frozen base; takes the same time however many there are."""
        if self.active is not None and self.active in self.entries:
            self.entries[self.active].switch.on = False  # type: ignore[union-attr]
        self.active = name
        entry: Any = None if name is None else self.entries[name]
        if entry is not None:
            entry.switch.on = True
        self.attention.set(entry is not None and entry.uses_attention, entry is None or entry.needs_front)
        self.images.use(*((None, ()) if entry is None else (entry.method.name, entry.eyes())))
        self.labels.set(self.labels.own if entry is None else entry.labels)

    def restore(self) -> None:
        """Give the base model back its hooks, dropout and `requires_grad`."""
        for handle in self.handles:
            handle.remove()
        for module, name, value in self.dropouts:
            setattr(module, name, value)
        for parameter in self.trainable:
            parameter.requires_grad_(True)


def attach(
    model: PreTrainedModel,
    method: Method | str,
    name: str = "default",
    *,
    tokenizer: Any = None,
    labels: Sequence[str] = (),
) -> Adapter:
    """Attach a method to a model: freezes the base, adds the method's trained tensors, makes the adapter active.

    `method` is a method dataclass or a method string such as "lora[r=8]". A task head (classifier, score) is trained
    along with any method, as a copy of the adapter's own. `tokenizer` and `labels` serve methods that start from text.

    Raises UserError for an unsupported family or pair, a target that matches nothing, a name that is taken, and a
    model wrapped in nn.DataParallel; then the model is as it was.
    """
    return attach_in(Context(tokenizer, labels), model, method, name)


def attach_in(context: Context, model: PreTrainedModel, method: Method | str, name: str) -> Adapter:
    """`attach` with all that a method may ask for."""
    _check_model(model, name)
    chosen: Method = parse_method(method)
    first = not isinstance(getattr(model, "trimtab", None), Attachments)
    attachments = Attachments(model) if first else _attachments(model)
    try:
        _check_pair(attachments, chosen, name)
        if getattr(chosen, "whole_model", False):
            return _attach_whole(model, attachments, chosen, name)
        parts = dict(_build(attachments, chosen, context))
        if not getattr(chosen, "own_head", False):
            parts |= {site: ModuleCopy.of(site) for site in attachments.sites.task_head if site not in parts}
        attachments.add(Entry(name, chosen, parts, attachments).train(model.training))
    except BaseException:
        if first:
            attachments.restore()
        raise
    model.trimtab = attachments
    return Adapter(model, name)


def adapters(model: PreTrainedModel) -> dict[str, Adapter]:
    """The adapters attached to a model, by name."""
    attachments = getattr(model, "trimtab", None)
    return {name: Adapter(model, name) for name in attachments.entries} if isinstance(attachments, Attachments) else {}


def use_base(model: PreTrainedModel) -> None:
    """Let no adapter act: the model is the frozen base, the adapters stay attached."""
    _attachments(model).use(None)


def supported(kinds: frozenset[str]) -> list[str]:
    """The families that have all of these site kinds."""
    return [family.name for family in FAMILIES.values() if supports(kinds, family)]


def folded_parts(parts: nn.ModuleDict) -> nn.ModuleDict:
    """The parts in their inference form; a part that has none stays what it is."""
    return nn.ModuleDict({key: folded(part) for key, part in parts.items()})


def folded_method(entry: Entry) -> Method:
    """The method that describes the parts in their inference form, with what a search has found."""
    method: Any = getattr(entry.method, "folded", lambda: entry.method)()
    return method.found(list(entry.members())) if hasattr(method, "found") else method


def check_tensors(own: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> None:
    """Raises UserError that lists every missing, unexpected and mis-shaped tensor."""
    faults = [f"missing {key}" for key in own if key not in given]
    faults += [f"unexpected {key}" for key in given if key not in own]
    faults += [
        f"{key} has shape {list(given[key].shape)} instead of {list(own[key].shape)}"
        for key in own
        if key in given and given[key].shape != own[key].shape
    ]
    if faults:
        raise UserError("the tensors do not fit the adapter: " + "; ".join(faults))


def _build(attachments: Attachments, method: Method, context: Context) -> Parts:
    """The method's parts; what it asks of the base comes from the frozen base, whatever acts at present."""
    record = functools.partial(keys_and_values, attachments.sites, attachments.attention)
    before = attachments.active
    attachments.use(None)
    try:
        return method.build(attachments.sites, replace(context, record=record))
    finally:
        attachments.use(before)


def _check_model(model: Any, name: str) -> None:
    if isinstance(model, nn.DataParallel):
        raise UserError("nn.DataParallel copies hooks wrongly; use DistributedDataParallel (torchrun) or one device")
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"attach needs a transformers model, not a {type(model).__name__}")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise UserError(f"the adapter name {name!r} may only have letters, digits, - and _")
    if hasattr(nn.ModuleDict, name):
        raise UserError(f"the adapter name {name!r} is a word that torch keeps for itself; choose another name")


def _check_pair(attachments: Attachments, method: Method, name: str) -> None:
    if name in attachments.entries:
        raise UserError(f"an adapter named {name!r} is attached already; detach it or choose another name")
    family = attachments.sites.family
    if not supports(method.kinds, family):
        working = [other.name for other in METHODS.values() if supports(other.kinds, family)]
        raise UserError(f"{method.name} does not work on {family.name}; methods that do: {', '.join(working)}")


def _attach_whole(model: PreTrainedModel, attachments: Attachments, method: Method, name: str) -> Adapter:
    if attachments.entries:
        raise UserError(f"{method.name} changes the base model; detach the other adapters first")
    attachments.add(Entry(name, method, {}, attachments))
    for parameter in attachments.trainable:
        parameter.requires_grad_(True)
    model.trimtab = attachments
    return Adapter(model, name)


def _attachments(model: PreTrainedModel) -> Attachments:
    attachments = getattr(model, "trimtab", None)
    if not isinstance(attachments, Attachments):
        raise UserError("nothing is attached to this model")
    return attachments


def _placed(site: Site, part: nn.Module) -> nn.Module:
    """The part on its site's device, in the base's precision but at least float32."""
    module = site.body if isinstance(site, EmbedsSite | StatesSite) else site.module
    reference = next(module.parameters())
    precision = torch.promote_types(reference.dtype, torch.float32) if reference.is_floating_point() else torch.float32
    return part.to(device=reference.device, dtype=precision)


def _is_shared(site: Site, part: nn.Module) -> bool:
    """Whether a part's virtual tokens are run once and reach the text through its attention."""
    return isinstance(site, EmbedsSite) and site.insert == "shared" and stands_in_front(part)


def _order(site: Site) -> int:
    """A change of a projection comes before what acts on the branch's output, which may be that projection's.

    A layer of another library's reads what the projection gives with all that acts on it. A prefix moves the positions
    of all that stands behind it, virtual tokens included.
    """
    if isinstance(site, ModuleSite):
        return 1
    return 2 if isinstance(site, ActivationSite | KVSite) else 0


def _cuts(claimed: Sequence[Site], sites: Sites) -> Iterator[tuple[nn.Module, bool]]:
    """Layers at which the graph is cut because nothing is trained below: (layer, at its output).

    The first layer's input is cut, so that no graph is built below the lowest trained layer, and that layer's too,
    because a layer may bring tensors that require grad of its own (T5's position bias under checkpointing).
    """
    for stack, layers in sites.layer_modules.items():
        trained = [site.layer for site in claimed if site.stack == stack and not isinstance(site, HeadSite)]
        if any(isinstance(site, StatesSite) and site.stack == stack for site in claimed):
            continue  # whose layers run without gradients
        if trained and min(trained) < 0:
            continue
        yield layers[0], False
        if trained and min(trained) > 0 and not _reads_trained(stack, claimed):
            yield layers[min(trained)], False
        if not trained and not _reads_trained(stack, claimed):
            yield layers[-1], True


def _reads_trained(stack: str, claimed: Sequence[Site]) -> bool:
    """Whether this stack attends to another one that is trained."""
    return stack == "decoder" and any(site.stack == "encoder" for site in claimed)


def _merged(site: LinearSite, part: nn.Module) -> Callable[[], None]:
    """Computes the merged weight now, so that a refusal comes before any change; the call writes it.

    What makes the weight itself comes first, and what acts on the projection's input last: the others read that, too.
    """
    bias = site.bias()
    new = _at_least_float32(site.weight()), None if bias is None else _at_least_float32(bias)
    with torch.no_grad():
        for member in sorted(members(part), key=lambda one: (not hasattr(one, "effective"), hasattr(one, "before"))):
            new = member.merged(*new)
    return lambda: site.write(*new)


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _own_configs(model: PreTrainedModel) -> None:
    """Give the model config objects that no other model shares, keeping what is shared inside it."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, PreTrainedConfig):
                setattr(module, name, copy.deepcopy(value, memo))


def _position_hooks(sites: Sites, switches: list[Switch]) -> Iterator[Any]:
    for site in sites.embeds:
        if site.attentions and site.attentions[0].causal and takes_positions(site.body):
            hook = PositionsFromMask(switches)
            yield site.body.register_forward_pre_hook(hook, with_kwargs=True)

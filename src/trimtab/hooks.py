"""The hooks that parts act through at `linear` and `head` sites. Knows no method and no model class.

Hooks are callable objects, not closures, so that a deep copy of the model carries hooks on the copy's own parts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from trimtab.copies import ModuleCopy
from trimtab.errors import UserError
from trimtab.sites import ActivationSite, HeadSite, Interleaved, LinearSite, Module, ModuleSite, NormSite, Span


class Switch:
    """Whether an adapter acts at present; shared by all of its hooks."""

    def __init__(self) -> None:
        self.on = True
        self.inner = False
        """Whether the present forward of a stack is inside another, which has made what is made once a forward."""
        self.kept: dict[object, Any] | None = None
        """What depends on no row, by who made it, as long as no tensor of the model changes (unchanging)."""

    def once(self, maker: object, make: Callable[[], Any]) -> Any:
        """What `make` gives, or gave this maker before while nothing changes."""
        if self.kept is None or torch.is_grad_enabled():
            return make()
        if maker not in self.kept:
            self.kept[maker] = make()
        return self.kept[maker]


@contextmanager
def unchanging(switches: Sequence[Switch]) -> Iterator[None]:
    """Inside, no tensor of the model or of its adapters changes: what depends on no row is made once, not per forward.

    For evaluation, without gradients. Blocks may stand in each other.
    """
    begun = [switch for switch in switches if switch.kept is None]
    for switch in begun:
        switch.kept = {}
    try:
        yield
    finally:
        for switch in begun:
            switch.kept = None


class LinearHook:
    """y -> part(x, y) on a projection, or on its share of a fused one."""

    def __init__(self, part: nn.Module, switch: Switch, span: Span | Interleaved | None):
        self.part, self.switch, self.span = part, switch, span

    def __call__(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
        if not self.switch.on:
            return None
        if self.span is None:
            return self.part(args[0], output)
        return self.span.put(output, self.part(args[0], self.span.take(output)))


class ActivationHook:
    """output -> part(output, input=…, stream=…) at the end of a branch, with what the part reads."""

    def __init__(self, part: nn.Module, switch: Switch):
        self.part, self.switch = part, switch
        self.seen: dict[str, torch.Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "seen": {}}

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        if not self.switch.on:
            return None
        seen, self.seen = self.seen, {}
        return self.part(output, **seen)


class Note:
    """Notes a module's input under a name, for the hook at the end of the branch."""

    def __init__(self, hook: ActivationHook, name: str):
        self.hook, self.name = hook, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.hook.switch.on:
            self.hook.seen[self.name] = args[0] if args else kwargs["hidden_states"]


class HeadHook:
    """The adapter's own head in place of the base's."""

    def __init__(self, part: nn.Module, switch: Switch):
        self.part, self.switch = part, switch

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return self.part(*args, **kwargs).to(output.dtype) if self.switch.on else None


class DetachInput:
    """Cuts the graph at the input of a layer: nothing is trained below it.

    Without it `enable_input_require_grads`, which gradient checkpointing recipes switch on, would send the backward
    pass through every frozen layer down to the embeddings.
    """

    def __init__(self, switch: Switch):
        self.switch = switch

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.switch.on:
            return None
        if args:
            return (args[0].detach(), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach()}


class DetachOutput:
    """Cuts the graph at the output of a stack's last layer: nothing is trained in the stack."""

    def __init__(self, switch: Switch):
        self.switch = switch

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self.switch.on:
            return None
        return (output[0].detach(), *output[1:]) if isinstance(output, tuple) else output.detach()


class RefuseReentrant:
    """Reentrant checkpointing sees no gradient in the tensors that hooks bring in, and would train nothing."""

    def __init__(self, layers: list[nn.Module]):
        self.layers = layers

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        for layer in self.layers:
            function = getattr(layer, "_gradient_checkpointing_func", None)
            on = layer.training and getattr(layer, "gradient_checkpointing", False)
            if on and getattr(function, "keywords", {}).get("use_reentrant", False):
                raise UserError("reentrant checkpointing trains no adapter; pass use_reentrant=False")


class InputHook:
    """x -> part.before(x) in front of a projection."""

    def __init__(self, part: Any, switch: Switch):
        self.part, self.switch = part, switch

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        return (self.part.before(args[0]), *args[1:]) if self.switch.on else None


class WeightHook:
    """W -> part.effective(W) for one call of a projection: the base's parameter is hidden meanwhile, not changed.

    One hook does it for all parts that an adapter has at a module, of which a fused one may have several. What parts in
    their inference form make is kept until one of the tensors changes or another adapter acts: it costs nothing then.
    """

    def __init__(self, module: Module, switch: Switch):
        self.module, self.switch = module, switch
        self.members: list[tuple[LinearSite, Any]] = []
        self.lent: torch.Tensor | None = None
        self.kept: tuple[list[torch.Tensor], list[Any], torch.Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "lent": None, "kept": None}

    def begin(self, module: Module, args: tuple[Any, ...]) -> None:
        """Put the effective weight in place, in front of the call."""
        self.remove()  # what a call that was broken off has left
        if self.switch.on:
            module.__dict__.pop("weight", None)  # and what one of another adapter has left
            self.lent = module.__dict__["weight"] = self._weight()
        else:
            self.kept = None

    def end(self, module: Module, args: tuple[Any, ...], output: Any) -> None:
        """Behind the call, also one that raised."""
        self.remove()

    def remove(self) -> None:
        """Give the module its own weight back."""
        if self.lent is not None and self.module.__dict__.get("weight") is self.lent:
            del self.module.__dict__["weight"]
        self.lent = None

    def _weight(self) -> torch.Tensor:
        if any(True for _, part in self.members for _ in part.parameters()):
            return self.switch.once(self, self._make)
        tensors = [self.module.weight, *(buffer for _, part in self.members for buffer in part.buffers())]
        if any(tensor.is_inference() for tensor in tensors):  # these do not tell when they change
            return self._make()
        states = [(tensor._version, tensor.data_ptr(), tensor.dtype, tensor.device) for tensor in tensors]
        if self.kept is None or not _same(self.kept[0], tensors) or self.kept[1] != states:
            with torch.inference_mode(False), torch.no_grad():
                self.kept = tensors, states, self._make()
        return self.kept[2]

    def _make(self) -> torch.Tensor:
        """The effective weight in the module's own orientation."""
        for site, part in self.members:
            site.lend(part.effective(site.weight()))
        return self.module.__dict__.pop("weight")


def _same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(one is other for one, other in zip(left, right, strict=True))


def _install_weight(site: LinearSite, part: Any, switch: Switch) -> list[Any]:
    hooks = [getattr(begin, "__self__", None) for begin in site.module._forward_pre_hooks.values()]
    known = next((hook for hook in hooks if isinstance(hook, WeightHook) and hook.switch is switch), None)
    hook = known or WeightHook(site.module, switch)
    hook.members.append((site, part))
    if known is not None:
        return []
    begin = site.module.register_forward_pre_hook(hook.begin)
    return [begin, site.module.register_forward_hook(hook.end, always_call=True), hook]


def install_linear(site: LinearSite, part: Any, switch: Switch) -> list[Any]:
    """Hooks `part` to the projection's output, to its input (`before`) or to its weight (`effective`)."""
    if hasattr(part, "effective"):
        return _install_weight(site, part, switch)
    if hasattr(part, "before"):
        return [site.module.register_forward_pre_hook(InputHook(part, switch))]
    return [site.module.register_forward_hook(LinearHook(part, switch, site.span))]


def install_norm(site: NormSite, part: nn.Module, switch: Switch) -> list[Any]:
    """Hooks `part` to the norm's output."""
    return [site.module.register_forward_hook(LinearHook(part, switch, None))]


def install_module(site: ModuleSite, part: nn.Module, switch: Switch) -> list[Any]:
    """Hooks `part` to the module's output.

    Raises UserError where another part acts there: what the layer computes anew would not have it.
    """
    known = [*site.module._forward_hooks.values(), *site.module._forward_pre_hooks.values()]
    if any(getattr(getattr(hook, "__self__", hook), "switch", None) is switch for hook in known):
        raise UserError(f"two methods act on {site.path}, one of them a layer of another library; leave one out")
    return [site.module.register_forward_hook(LinearHook(part, switch, None))]


def install_activation(site: ActivationSite, part: nn.Module, switch: Switch) -> list[Any]:
    """Hooks `part` to the branch's output, and to what it reads (`part.reads`, of "input" and "stream")."""
    hook = ActivationHook(part, switch)
    sources = {"input": site.reads, "stream": site.stream}
    wanted = getattr(part, "reads", ())
    notes = [sources[name].register_forward_pre_hook(Note(hook, name), with_kwargs=True) for name in wanted]
    return [*notes, site.module.register_forward_hook(hook)]


def install_head(site: HeadSite, part: ModuleCopy, switch: Switch) -> list[Any]:
    """Hooks `part` in place of the head."""
    return [site.module.register_forward_hook(HeadHook(part, switch), with_kwargs=True)]


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The call's arguments by name, positional ones included."""
    names = inspect.signature(module.forward).parameters
    return {**dict(zip(names, args, strict=False)), **kwargs}

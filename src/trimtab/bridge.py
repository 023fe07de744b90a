"""Layers of peft's on an unwrapped model: the only file that knows how peft builds, runs and writes them. Refuses to
know single methods of peft's.

peft puts its layers in place of the base's modules. Here it does so in a shadow of the model: the same tree with the
same weights, which never runs. The layers are taken out of it, and each one acts through a hook on the module that it
was made for, y -> layer(x). What such a layer asks its base for, the module has computed already: it is handed over,
and only another input is computed anew (methods that rotate the input). So the model, its names, its hooks and its
weights stay.
"""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from trimtab.errors import UserError
from trimtab.sites import ModuleSite, Sites

ADAPTER = "default"
"""peft's name for what it trains; ours is the adapter's own and stands elsewhere."""
_SEED = re.compile("seed|prng_key")
FOLDER = "peft"
"""The folder, inside an adapter's, that holds it as peft's files."""


def build(name: str, config: Any, sites: Sites) -> dict[ModuleSite, TunedModule]:
    """A part for each module that peft has a layer for.

    Raises UserError for what peft refuses, and for methods that are more than layers in place of modules.
    """
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

    model, kind = sites.model, PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    if kind is None or not issubclass(kind, BaseTuner):
        raise UserError(f"{name} has no layers that stand in place of the model's: the bridge cannot carry it")
    if kind.forward is not BaseTuner.forward:
        raise UserError(f"{name} changes the call of the whole model, which the bridge leaves as it is")
    if hasattr(kind, "update_and_allocate") and getattr(config, "use_asa", True):  # which adamss may do without
        raise UserError(f"{name} decides in the training loop what it trains, which the bridge has no place for")
    shadow = shadow_of(model)
    try:
        tuner = kind(shadow, config, adapter_name=ADAPTER)
    except (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError) as error:
        raise UserError(f"{name} does not fit this model: {type(error).__name__}: {error}") from error
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{name} does not fit this model: {_sentence(error)}") from error
    layers = dict(_outermost(shadow, BaseTunerLayer))
    _check(name, model, shadow, tuner, layers, sites)
    for layer in layers.values():
        layer.set_adapter(ADAPTER)
    del tuner._modules["model"]
    seen: set[int] = set()
    parts: dict[ModuleSite, TunedModule] = {}
    for path, layer in layers.items():
        site = _site(sites, path)
        parts[site] = TunedModule(layer, site.module, tuner, seen)
    kinds = {(type(part.layer), type(site.module)): (part, site.module) for site, part in parts.items()}
    if not all(_by_token(part, module) for part, module in kinds.values()):
        raise UserError(f"{name} reads more than a token at a time, so that its padding would change what a row gives")
    return parts


def check_room(name: str, config: Any, sites: Sites, room: int) -> None:
    """Raises UserError where peft would make far more numbers for a configuration than a file of `room` can be of.

    The layers are made without memory (on `meta`) and counted; what peft freezes may be as large as the base. The few
    methods whose start needs values cannot be counted; of every method no whole number that is not a seed may be beyond
    `room`.
    """
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    sizes = {key: value for key, value in vars(config).items() if type(value) is int and not _SEED.search(key)}
    large = [key for key, value in sizes.items() if abs(value) > room]
    if large:
        raise UserError(f"{name}: {large[0]}={sizes[large[0]]} asks for far more numbers than the file has")
    shadow = shadow_of(sites.model)
    own = _on_meta(shadow)
    try:
        with torch.device("meta"):
            PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](shadow, config, adapter_name=ADAPTER)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return  # needs values, or does not fit: which building it will say
    made = _numbers(shadow) - own
    if made > room + own:
        raise UserError(f"{name} asks for {made:,} numbers, far more numbers than the model and the file have")


def _on_meta(module: nn.Module) -> int:
    """Take a shadow's tensors out of memory; how many numbers they are."""
    for one in module.modules():
        for name, weight in one._parameters.items():
            if weight is not None:
                one._parameters[name] = nn.Parameter(weight.data.to("meta"), requires_grad=False)
        for name, buffer in one._buffers.items():
            if buffer is not None:
                one._buffers[name] = buffer.to("meta")
    return _numbers(module)


def _numbers(module: nn.Module) -> int:
    return sum(one.numel() for one in (*module.parameters(), *module.buffers()))


class TunedModule(nn.Module):
    """One layer of peft's beside the module that it was made for.

    Tensors that several layers share are in the state of the first of them alone, so that a folder holds them once.
    """

    def __init__(self, layer: Any, module: nn.Module, tuner: Any, seen: set[int]):
        super().__init__()
        base = stand_in(module)
        del layer._modules["base_layer"]
        layer.__dict__["base_layer"] = base
        self.layer = layer
        self.__dict__["tuner"] = tuner  # which holds what is shared, and belongs to no layer
        tensors = layer.state_dict(keep_vars=True)
        self.elsewhere = [name for name, tensor in tensors.items() if id(tensor) in seen]
        seen.update(id(tensor) for tensor in tensors.values())
        self.register_state_dict_post_hook(_leave_out)
        self.draws = _draws(layer, module)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """[..., in], [..., out] -> [..., out]"""
        base = self.layer.base_layer.forward
        base.x, base.y = x, y
        try:
            return self.layer(x).to(y.dtype)
        finally:
            base.x = base.y = None

    @torch.no_grad()
    def write_into(self, module: nn.Module) -> None:
        """Merge into the module's own weights, as peft does. Raises UserError where it does not."""
        own = copy.deepcopy(self.layer.base_layer)
        del own.__dict__["forward"]
        layer = copy.copy(self.layer)
        layer.__dict__["base_layer"], layer.__dict__["merged_adapters"] = own, []
        layer.merge(safe_merge=True)
        for name, weight in module.named_parameters():
            weight.copy_(own.get_parameter(name))

    @contextmanager
    def as_peft(self) -> Iterator[nn.Module]:
        """Inside, the layer as peft knows it: with its base registered."""
        base = self.layer._modules["base_layer"] = self.layer.__dict__.pop("base_layer")
        try:
            yield self.layer
        finally:
            del self.layer._modules["base_layer"]
            self.layer.__dict__["base_layer"] = base


class Known:
    """A module's forward that gives what is known already where it is asked for the same input again."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.x: torch.Tensor | None = None
        self.y: torch.Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "x": None, "y": None}

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return (
            self.y if x is self.x and self.y is not None else type(self.module).forward(self.module, x, *args, **kwargs)
        )


def stand_in(module: nn.Module) -> nn.Module:
    """A module with the same weights (the same dictionary of them, wherever they move) and none of the hooks."""
    twin = _without_hooks(module)
    twin.__dict__["forward"] = Known(twin)
    return twin


def shadow_of(model: nn.Module) -> nn.Module:
    """The model's tree with modules of its own, and parameters of its own over the same memory; no adapter in it."""
    modules: dict[int, nn.Module] = {}
    weights: dict[int, nn.Parameter] = {}

    def follow(module: nn.Module) -> nn.Module:
        if id(module) in modules:
            return modules[id(module)]
        twin = modules[id(module)] = _without_hooks(module)
        twin._modules = {name: child and follow(child) for name, child in module._modules.items() if name != "trimtab"}
        twin._buffers = dict(module._buffers)
        twin._parameters = {name: weight_of(weight) for name, weight in module._parameters.items()}
        return twin

    def weight_of(weight: nn.Parameter | None) -> nn.Parameter | None:
        if weight is None or type(weight) is not nn.Parameter:  # quantised ones carry what a plain one has not
            return weight
        return weights.setdefault(id(weight), nn.Parameter(weight.data, requires_grad=False))

    return follow(model)


def write(adapter: Any, folder: Path) -> Path:
    """The adapter as peft's files, its task head as a module to save; returns the folder."""
    from safetensors.torch import save_file

    from trimtab.checkpoint import WEIGHTS, atomic_folder
    from trimtab.peers.heads import write_heads
    from trimtab.peers.kinds import plain
    from trimtab.peers.peft import task_of

    start = "base_model.model."
    parts = {site.path: adapter._entry.parts[site.key] for site in adapter._entry.sites if isinstance(site, ModuleSite)}
    config = copy.deepcopy(next(iter(parts.values())).tuner.peft_config[ADAPTER])
    heads = write_heads(adapter, start)
    config.task_type = task_of(type(adapter.model).__name__)
    config.base_model_name_or_path = adapter.model.config._name_or_path or adapter.model.name_or_path or None
    config.modules_to_save = heads.config.get("modules")
    config.inference_mode = True
    tensors = plain({**peft_state(adapter.model, parts), **heads.tensors})

    def fill(target: Path) -> None:
        config.save_pretrained(str(target))
        save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})

    atomic_folder(folder, fill, overwrite=True)
    return folder


def peft_state(model: nn.Module, parts: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of these parts by path, under peft's names."""
    from contextlib import ExitStack

    from peft import get_peft_model_state_dict

    shadow, shell = shadow_of(model), nn.Module()
    tuner = next(iter(parts.values())).tuner
    with ExitStack() as stack:
        for path, part in parts.items():
            parent, _, name = path.rpartition(".")
            shadow.get_submodule(parent)._modules[name] = stack.enter_context(part.as_peft())
        tuner._modules["model"] = shadow
        stack.callback(tuner._modules.pop, "model")
        shell.base_model, shell.peft_config = tuner, tuner.peft_config
        state = shell.state_dict()
        return dict(get_peft_model_state_dict(shell, state, ADAPTER, save_embedding_layers=False))


def _without_hooks(module: nn.Module) -> nn.Module:
    twin = copy.copy(module)
    for name in [name for name in twin.__dict__ if re.fullmatch(r"_\w*hooks\w*", name)]:
        if isinstance(twin.__dict__[name], dict):
            twin.__dict__[name] = OrderedDict()
    return twin


def _outermost(module: nn.Module, kind: type, path: str = "") -> Iterator[tuple[str, Any]]:
    """The modules of a kind that stand in no other of it, by path."""
    for name, child in module.named_children():
        where = f"{path}.{name}" if path else name
        if isinstance(child, kind):
            yield where, child
        else:
            yield from _outermost(child, kind, where)


def _check(name: str, model: Any, shadow: nn.Module, tuner: Any, layers: Mapping[str, Any], sites: Sites) -> None:
    """Raises UserError where peft did more than to put layers in place of modules."""
    heads = tuple(f"{site.path}." for site in sites.task_head)
    if caught := [path for path in layers if f"{path}.".startswith(heads)]:
        raise UserError(
            f"{name} would act in the task head ({caught[0]}), which is trained whole; choose target_modules"
        )
    if not layers:
        raise UserError(f"{name} found no module of this model that it can act on; choose target_modules")
    inner = {id(weight) for layer in layers.values() for weight in layer.parameters()}
    if any(weight.requires_grad for weight in shadow.parameters() if id(weight) not in inner):
        raise UserError(f"{name} would train weights of the base itself, which stays as it is; leave bias=none")
    bases = {id(weight) for layer in layers.values() for weight in layer.get_base_layer().parameters()}
    if any(weight.requires_grad for layer in layers.values() for weight in layer.parameters() if id(weight) in bases):
        raise UserError(f"{name} would train weights of the base itself, which stays as it is; leave bias=none")
    if any(weight.requires_grad and id(weight) not in inner for weight in tuner.parameters()):
        raise UserError(f"{name} trains tensors outside its layers, which the bridge has no place for")
    for path, module in shadow.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise UserError(f"{name} needs hooks on {path or 'the whole model'}, which the bridge has no place for")
    for path, layer in layers.items():
        base, own = layer._modules.get("base_layer"), dict(model.get_submodule(path).named_parameters())
        if base is None or {key: one.data_ptr() for key, one in base.named_parameters()} != {
            key: one.data_ptr() for key, one in own.items()
        }:
            raise UserError(f"{name} changes the weights of {path} before it trains; the base has to stay as it is")


def _site(sites: Sites, path: str) -> ModuleSite:
    """The place of a module; what stands in no layer counts as below them all, which is never wrong."""
    module = sites.model.get_submodule(path)
    stack, layer = next(iter(sites.layer_modules)), -1
    for name, layers in sites.layer_modules.items():
        for index, one in enumerate(layers):
            if any(inner is module for inner in one.modules()):
                stack, layer = name, index
    return ModuleSite(f"module_{path.replace('.', '_')}", stack, layer, module, path)


def _leave_out(part: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Another part's tensors are no tensors of this one's."""
    for name in part.elsewhere:
        del state[f"{prefix}layer.{name}"]


def _draws(layer: Any, module: nn.Module) -> bool:
    """Whether the layer draws random numbers while training: the generator tells, whatever the layer calls it."""
    given = _example(module)
    if given is None:
        return True  # which is never wrong
    place, training = given.device, layer.training
    with _own_random_numbers(place):
        before = _random_state(place)
        layer.train()(given)
        drawn = not torch.equal(before, _random_state(place))
    layer.train(training)
    return drawn


def _by_token(part: TunedModule, module: nn.Module) -> bool:
    """Whether, away from its start, a layer gives for a token the same whatever stands beside it."""
    given = _example(module)
    if given is None:
        return True
    layer = copy.deepcopy(part.layer).eval()
    with _own_random_numbers(given.device):
        for weight in layer.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn_like(weight))
        whole, alone = layer(given)[:, 2:].float(), layer(given[:, 2:]).float()
    return bool((whole - alone).abs().max() <= 1e-3 * alone.abs().max())


def _example(module: nn.Module) -> torch.Tensor | None:
    """Something that the module takes, one row of four tokens; None of modules that this does not know."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point() or weight.is_meta:
        return None
    if isinstance(module, nn.Embedding):
        return torch.arange(4, device=weight.device)[None] % weight.shape[0]
    width = weight.shape[0] if isinstance(module, Conv1D) else weight.shape[-1]
    return torch.linspace(-1, 1, 4 * width, device=weight.device, dtype=weight.dtype).sin().view(1, 4, width)


@contextmanager
def _own_random_numbers(place: torch.device) -> Iterator[None]:
    """Inside, random numbers are drawn that the run does not miss, and no graph is built."""
    with torch.random.fork_rng([place] if place.type == "cuda" else []), torch.no_grad():
        yield


def _random_state(place: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(place) if place.type == "cuda" else torch.get_rng_state()


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())

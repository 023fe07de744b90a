"""Where `adapters` has its modules in a family, and what it calls the projections. Knows names; no tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from trimtab.errors import UserError
from trimtab.sites import ActivationSite, Sites

HOLDERS = ("adapters", "loras", "prefix_tunings", "prompt_tunings")
"""The containers whose members are adapters, by the adapters' names."""


@dataclass(frozen=True)
class Places:
    """The modules of one stack's layers."""

    attention: str
    """What holds the bottleneck behind attention, from the layer."""
    feedforward: str
    cross: str = ""
    intermediate: str = "up"
    """Which projection `intermediate_lora` means; in Llama and Mistral the one that `output_lora` means elsewhere."""
    output: str = "down"
    prefix: str = "self_prefix"
    """What a prefix of self-attention is called."""

    def of(self, branch: str) -> str:
        """What holds the bottleneck of a branch."""
        return {"attention": self.attention, "feedforward": self.feedforward, "cross": self.cross}[branch]


_IN_OUTPUT = Places("attention.output", "output")
_IN_LAYER = Places("attention_adapters", "output_adapters")
_SWAPPED = replace(_IN_LAYER, intermediate="down", output="up")
FAMILIES: Mapping[str, Mapping[str, Places]] = {  # by family, then by stack
    "bert": {"": _IN_OUTPUT},
    "roberta": {"": _IN_OUTPUT},
    "electra": {"": _IN_OUTPUT},
    "distilbert": {"": replace(_IN_LAYER, prefix="self")},
    "gpt2": {"": _IN_LAYER},
    "llama": {"": _SWAPPED},
    "mistral": {"": _SWAPPED},
    "t5": {"encoder": Places("layer.0", "layer.1"), "decoder": Places("layer.0", "layer.2", "layer.1")},
}


def places_of(sites: Sites) -> Mapping[str, Places]:
    """The places by stack. Raises UserError for a family whose names are not known here."""
    if sites.family.name not in FAMILIES:
        raise UserError(
            f"where adapters has its modules in {sites.family.name} is not known here; it is for {', '.join(FAMILIES)}"
        )
    return FAMILIES[sites.family.name]


def layer_numbers(sites: Sites) -> dict[tuple[str, int], int]:
    """Stack and layer -> the number that adapters gives the layer: an encoder's layers count before the decoder's."""
    layers = [(stack, index) for stack, found in sites.layer_modules.items() for index in range(len(found))]
    return {layer: number for number, layer in enumerate(layers)}


def bottleneck_holders(model: PreTrainedModel, sites: Sites) -> Iterator[tuple[str, ActivationSite]]:
    """The module that holds a branch's bottlenecks, and the branch."""
    places = places_of(sites)
    names = {id(module): path for path, module in model.named_modules()}
    for site in sites.activation:
        layer = names[id(sites.layer_modules[site.stack][site.layer])]
        yield f"{layer}.{places[site.stack].of(site.branch)}", site


def without_name(key: str, name: str) -> str | None:
    """A tensor's key without the adapter's name; None for what is no adapter's."""
    for holder in HOLDERS:
        place, found, rest = key.partition(f".{holder}.{name}.")
        if found:
            return f"{place}.{holder}.{rest}"
    return None


def with_name(key: str, name: str) -> str:
    """The reverse."""
    holder = next(one for one in HOLDERS if f".{one}." in key)
    return key.replace(f".{holder}.", f".{holder}.{name}.", 1)


def in_model(key: str, model: PreTrainedModel) -> str:
    """A key of a bare base (`encoder.…`) as one of a model with a head (`bert.encoder.…`), or the other way round."""
    prefix = f"{model.base_model_prefix}."
    inside = hasattr(model, model.base_model_prefix)
    if inside:
        return key if key.startswith(prefix) else prefix + key
    return key.removeprefix(prefix)

"""The registered attention function: prefixes and gated context at `kv` sites. Knows no method and no model class.

transformers hands every attention-interface model's q, k, v (after rotary positions, after the cache was updated) to a
registered function. Ours puts prefix keys and values in front, delegates to the implementation that the model had, and
adds gated context to what comes back. Where there is a prefix the text's mask is always made in full, because a mask
that was skipped as "plain causal" would crop the keys to the query's length once a prefix stands in front of them.
Where context is only added the mask is what it was, so that a zero gate leaves every bit of the output alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trimtab.decoding import Piece, decode, decodes
from trimtab.errors import UserError
from trimtab.hooks import Switch
from trimtab.packing import Packing
from trimtab.positions import ShiftPositions
from trimtab.relative import FrontBias
from trimtab.sites import KVSite, Module

NAME = "trimtab"  # names that contain "sdpa" or "flash" are treated specially by transformers
BESIDE = {"sdpa": "trimtab_beside", "eager": "trimtab_beside_additive"}
"""What the function is called where no prefix stands in front, by the implementation that the model had."""
PACKED = "trimtab_packed"
"""What the function is called where the rows of a batch are packed; no mask of transformers' is made then."""
_SLOT = "trimtab_slot"
VIRTUAL, TEXT = 0, 1
"""The order of tokens that are run by themselves before the text: virtual ones, then what all rows begin with."""

Recorded = tuple[torch.Tensor, torch.Tensor]  # keys, values [1, kv_heads, P, head_dim]


class Source:
    """Where one adapter's prefix or context at one attention comes from."""

    def __init__(self, part: Any, switch: Switch, order: int | None = None):
        self.part, self.switch = part, switch
        self.order = order
        """Of tokens that are run before the text, which come first (VIRTUAL, TEXT); a prefix has none.

        Such tokens do not see those that come later, and fall out of a sliding window as any token does; a prefix is
        always visible.
        """
        self.bias: FrontBias | None = None
        """What T5's relative positions give its keys; None for keys that have no position."""

    def before(self, running: int | None) -> bool:
        """Whether the tokens that are run at present see this source."""
        return self.order is None or running is None or self.order < running


class Slot:
    """What trimtab keeps at one attention module."""

    def __init__(self, previous: str):
        self.previous = previous
        self.sources: list[Source] = []
        self.recorder: list[Recorded] | None = None
        self.running: int | None = None
        """The order of the tokens that are run at present; None for the text."""
        self.packing: Packing | None = None
        """How the rows of the present batch are packed; None where they are not."""

    def active(self, what: str) -> Iterator[Source]:
        """The switched-on sources that have a method of this name."""
        return (source for source in self.sources if source.switch.on and hasattr(source.part, what))

    def delegate(self, module: nn.Module) -> Callable[..., tuple[torch.Tensor, Any]]:
        """The attention function that the model had."""
        if self.previous == "eager":
            return sys.modules[type(module).__module__].eager_attention_forward
        return ALL_ATTENTION_FUNCTIONS[self.previous]


class AttentionSetting:
    """Turns the registered function on and off for the attention modules of one model."""

    def __init__(self, kv: Iterable[KVSite]):
        self.modules: list[Module] = [site.module for site in kv]
        self.configs = list({id(module.config): module.config for module in self.modules}.values())
        self.previous = self._chosen()
        self.users = self.fronts = 0
        self.on = self.front = False
        self.packed = False

    @property
    def possible(self) -> bool:
        """Whether keys and values can be added to the attention that the model had."""
        return not any("flash" in name or "flex" in name for _, name in self.own())

    def acquire(self) -> None:
        """Make room at every attention module; the first user creates the slots."""
        self.users += 1
        if self.users > 1:
            return
        self.previous = self._chosen()  # it may be another one than at the last time
        if not self.possible:
            self.users = 0
            names = ", ".join(name for _, name in self.previous)
            raise UserError(
                f"keys and values cannot be added under {names} attention; load the model with sdpa or eager"
            )
        for module in self.modules:
            setattr(module, _SLOT, Slot(module.config._attn_implementation))

    def own(self) -> list[tuple[Any, str]]:
        """The implementation that each configuration of the model has without us."""
        return self.previous if self.users else self._chosen()

    def _chosen(self) -> list[tuple[Any, str]]:
        return [(config, config._attn_implementation) for config in self.configs]

    def release(self) -> None:
        """The last user takes the slots away."""
        if self.users == 1:
            self.set(False)
            for module in self.modules:
                delattr(module, _SLOT)
        self.users -= 1

    @contextmanager
    def recording(self, sites: Sequence[KVSite]) -> Iterator[dict[KVSite, Recorded]]:
        """Inside, every attention writes down the keys and values that it computes; the last ones of each stay."""
        self.acquire()
        before = self.on, self.front
        found: dict[KVSite, Recorded] = {}
        records: dict[KVSite, list[Recorded]] = {site: [] for site in sites}
        try:
            self.set(True)
            for site, record in records.items():
                _record(slot_of(site.module), record, VIRTUAL)
            yield found
            found.update({site: record[-1] for site, record in records.items() if record})
        finally:
            for site in sites:
                _record(slot_of(site.module), None, None)
            self.set(*before)
            self.release()

    @contextmanager
    def fronting(self) -> Iterator[None]:
        """Inside, whichever adapter acts, the registered function is used with room for tokens in front of the text."""
        self.acquire()
        self.fronts += 1
        self._name()
        try:
            yield
        finally:
            self.fronts -= 1
            self._name()
            self.release()

    @contextmanager
    def packing(self, packing: Packing) -> Iterator[None]:
        """Inside, attention is that of packed rows, whichever adapter acts."""
        with self.fronting():
            self._pack(packing)
            try:
                yield
            finally:
                self._pack(None)

    def _pack(self, packing: Packing | None) -> None:
        for module in self.modules:
            slot_of(module).packing = packing
        self.packed = packing is not None
        self._name()

    def set(self, on: bool, front: bool = True) -> None:
        """Use the registered function, with room for a prefix in `front` or without, or use what the model had."""
        self.on, self.front = on, front
        self._name()

    def _name(self) -> None:
        """Put the name of the function into the configurations; without users they are the model's own business."""
        for config, previous in self.previous if self.users else ():
            ours = NAME if self.front or self.fronts else BESIDE.get(previous, NAME)
            name = ours if self.on or self.fronts else previous
            config._attn_implementation = PACKED if self.packed else name


class RefuseOtherAttention:
    """Keys and values are added by the registered function; a model switched to another one would lose them."""

    def __init__(self, setting: AttentionSetting):
        self.setting = setting

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        for config, _ in self.setting.previous:
            if (self.setting.on or self.setting.fronts) and config._attn_implementation not in (
                NAME,
                PACKED,
                *BESIDE.values(),
            ):
                raise UserError(
                    f"the attention was set to {config._attn_implementation!r} after an adapter was attached that acts "
                    "through it; choose the attention first, then attach"
                )


class KVHandle:
    """Takes one source away again."""

    def __init__(self, module: nn.Module, source: Source):
        self.module, self.source = module, source

    def remove(self) -> None:
        """Remove the source from its slot."""
        slot_of(self.module).sources.remove(self.source)


def packing_at(site: KVSite) -> Packing | None:
    """How the rows that this attention is given are packed at present; None where they are not."""
    slot: Slot | None = getattr(site.module, _SLOT, None)
    return None if slot is None else slot.packing


def follow(module: Module, base: Module) -> None:
    """Have an attention of a layer beside the base's be called as that is: on packed rows where they are packed.

    Prefixes and tokens that stand in front of the base's text do not reach it.
    """
    slot: Slot | None = getattr(base, _SLOT, None)
    if slot is None:
        module.__dict__.pop(_SLOT, None)
        return
    own = Slot(slot.previous)
    own.packing = slot.packing
    setattr(module, _SLOT, own)


class Companion:
    """The attentions of a whole model that runs beside the base: on packed rows while the base's are, else as its own.

    Its own implementation, masks and positions stay; nothing that acts at the base's attentions reaches it.
    """

    def __init__(self, config: Any, modules: Sequence[Module], base: KVSite):
        self.config, self.modules, self.base = config, tuple(modules), base
        self.previous: str = config._attn_implementation

    def begin(self) -> None:
        """A forward begins. What is set stays behind it: checkpointed layers are run again for the backward pass."""
        if self.config._attn_implementation != PACKED:
            self.previous = self.config._attn_implementation  # it may have been changed by hand
        packing = packing_at(self.base)
        for module in self.modules:
            module.__dict__.pop(_SLOT, None)
            if packing is not None:
                slot = Slot(self.previous)
                slot.packing = packing
                setattr(module, _SLOT, slot)
        self.config._attn_implementation = self.previous if packing is None else PACKED


def slot_of(module: nn.Module) -> Slot:
    """The slot of an attention module."""
    return getattr(module, _SLOT)


def install_kv(site: KVSite, part: Any, switch: Switch, order: int | None = None) -> list[Any]:
    """Give an attention a source of prefix keys and values, or of context; with an `order` they are tokens' own."""
    source = Source(part, switch, order)
    slot_of(site.module).sources.append(source)
    handles: list[Any] = [KVHandle(site.module, source)]
    if getattr(part, "relative", False) and not site.cross:
        source.bias = FrontBias(site)
        handles.append(site.module.register_forward_pre_hook(source.bias, with_kwargs=True))
    if hasattr(part, "prepare"):
        handles.append(
            site.body.register_forward_pre_hook(Prepare(part, switch), prepend=True)
        )  # virtual tokens see it
    moved: int | None = getattr(part, "shift", None)
    if site.shift and moved:
        hook = ShiftPositions(moved, site.positions, switch)
        handles.append(site.body.register_forward_pre_hook(hook, with_kwargs=True))
    return handles


class Prepare:
    """Has a part make ready what its attentions share, once a forward of the stack."""

    def __init__(self, part: Any, switch: Switch):
        self.part, self.switch = part, switch

    def __call__(self, body: nn.Module, args: tuple[Any, ...]) -> None:
        if self.switch.on and not self.switch.inner:
            self.switch.once(self, self.part.prepare)


@contextmanager
def recording(modules: Iterable[nn.Module], order: int) -> Iterator[list[Recorded]]:
    """Inside, the keys and values of each attention are written down in call order, before any prefix.

    It is tokens of this order that are being run: they see those before them, not themselves or later ones.
    """
    record: list[Recorded] = []
    slots = [slot_of(module) for module in modules]
    for slot in slots:
        _record(slot, record, order)
    try:
        yield record
    finally:
        for slot in slots:
            _record(slot, None, None)


def _record(slot: Slot, record: list[Recorded] | None, order: int | None) -> None:
    slot.recorder, slot.running = record, order


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, Any]:
    """context = attend(q, [k_p ; k], [v_p ; v]) + Σ gated context.

    Shapes: query [B, heads, n, head_dim], key and value [B, kv_heads, m, head_dim], mask [B, 1, n, m] or None
    (everything visible); returns the context [B, n, heads, head_dim].
    """
    slot = slot_of(module)
    if slot.recorder is not None:
        slot.recorder.append((key, value))
    if slot.packing is None:
        sources = [source for source in slot.active("prefix") if source.before(slot.running)]
        context, weights = _behind(sources, slot, module, query, key, value, attention_mask, kwargs)
    else:
        context, weights = _packed(slot.packing, slot, module, query, key, value, kwargs), None
    for source in slot.active("context"):
        context = context + source.part.context(query, kwargs.get("scaling"))
    return context, weights


def puts_in_front(part: Any) -> bool:
    """Whether a part at an attention puts keys in front of the text's."""
    return hasattr(part, "prefix")


def no_mask(*args: Any, **kwargs: Any) -> None:
    """None: packed rows know their masks (packing.py)."""


def full_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """The boolean mask [B, 1, n, m], never skipped, so that a None that is left means bidirectional."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


def _behind(
    sources: Sequence[Source],
    slot: Slot,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, Any]:
    """The attention over the text's keys behind those of the sources."""
    pieces = [(key, value)]
    for source in sources:
        k, v = (tensor.to(key) if tensor.dim() == 4 else tensor.to(key)[None] for tensor in source.part.prefix())
        mask = _extend(mask, _visible(source, query, k.shape[-2], kwargs), k.shape[-2])
        if kwargs.get("position_bias") is not None:
            kwargs["position_bias"] = _extend_bias(kwargs["position_bias"], source, k.shape[-2])
        pieces.insert(0, (k, v))
    return _attend(slot, module, query, pieces, mask, kwargs)


def _extend_bias(bias: torch.Tensor, source: Source, length: int) -> torch.Tensor:
    """T5's bias [1, heads, n, m] with `length` columns in front: of relative positions, or 0."""
    if source.bias is None:
        return F.pad(bias, (length, 0))
    return torch.cat([source.bias.columns(length, bias), bias], dim=-1)


def _packed(
    packing: Packing,
    slot: Slot,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """The attention of packed rows; tokens that are run before the text are among them, prefixes in front of them."""
    sources = [source for source in slot.active("prefix") if source.order is None]

    def over(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return _behind(sources, slot, module, q, k, v, mask, kwargs)[0]

    return packing.attend(over, query, key, value, kwargs.get("sliding_window"))


def _attend(
    slot: Slot,
    module: nn.Module,
    query: torch.Tensor,
    pieces: list[Piece],
    mask: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, Any]:
    """The attention over all pieces' keys; the text's are the last piece."""
    front = sum(keys.shape[-2] for keys, _ in pieces[:-1])
    if front and slot.previous == "sdpa" and decodes(query, mask, module.training, kwargs):
        scaling = kwargs.get("scaling")
        return decode(query, pieces, mask, query.shape[-1] ** -0.5 if scaling is None else scaling), None
    key, value = (_joined(tensors) for tensors in zip(*pieces, strict=True))
    return _call(slot, module, query, key, value, mask, kwargs)


def _call(
    slot: Slot,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, Any]:
    if mask is None and _ours(module) == NAME:
        kwargs = {**kwargs, "is_causal": False}
    elif mask is not None and slot.previous == "eager" and mask.dtype == torch.bool:
        mask = torch.zeros((), dtype=query.dtype, device=query.device).where(mask, torch.finfo(query.dtype).min)
    return slot.delegate(module)(module, query, key, value, mask, **kwargs)


def _ours(module: Module) -> str:
    """The name under which the registered function was called."""
    return module.config._attn_implementation


def _joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """[B or 1, kv_heads, P, head_dim] in front of [B, kv_heads, m, head_dim]"""
    if len(tensors) == 1:
        return tensors[0]
    batch = tensors[-1].shape[0]
    return torch.cat([tensor.expand(batch, -1, -1, -1) for tensor in tensors], dim=-2)


def _visible(source: Source, query: torch.Tensor, length: int, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """Which of P tokens in front each query sees [B or 1, 1, n, P]; None where all do."""
    window = kwargs.get("sliding_window")
    if source.order is None or window is None:
        return None
    positions = kwargs["position_ids"]  # [B or 1, n]
    own = torch.arange(length, device=query.device) - (length if source.order == VIRTUAL else 0)  # -P…-1, or 0…P-1
    return (positions[:, None, :, None] - own) < window


def _extend(mask: torch.Tensor | None, visible: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """The mask [B, heads or 1, n, m] with P columns in front; a mask of None already shows everything."""
    if mask is None:
        assert visible is None, "a sliding window always comes with a mask"
        return None
    batch = max(mask.shape[0], 1 if visible is None else visible.shape[0])
    mask = mask.expand(batch, -1, -1, -1)
    shape = (*mask.shape[:3], length)
    columns = torch.ones(shape, dtype=torch.bool, device=mask.device) if visible is None else visible.expand(shape)
    if mask.dtype != torch.bool:  # additive
        columns = torch.zeros((), dtype=mask.dtype, device=mask.device).where(columns, torch.finfo(mask.dtype).min)
    return torch.cat([columns, mask], dim=-1)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, full_mask)
AttentionInterface.register(PACKED, attention)
AttentionMaskInterface.register(PACKED, no_mask)
_MASKS: dict[str, Any] = {"sdpa": sdpa_mask, "eager": eager_mask}
for _previous, _name in BESIDE.items():
    AttentionInterface.register(_name, attention)
    AttentionMaskInterface.register(_name, _MASKS[_previous])

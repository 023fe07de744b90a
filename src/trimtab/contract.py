"""What a method is: the contract between methods and the frame. Knows neither models nor how parts are installed.

A method is a frozen dataclass. `build` gives each site that it claims one part, an nn.Module whose parameters are the
trained tensors there. What the frame calls on a part depends on the site's kind:

    linear   forward(x [..., in], y [..., out]) -> y', or before(x) -> x' in front of the projection, or
             effective(weight [out, in]) -> weight', which the projection computes with in place of its own;
             merged(weight, bias) -> (weight, bias), if the method merges
    activation   forward(output, input=…, stream=…) -> output'; `reads` names what it wants of input and stream
    norm     forward(x, y) -> y'                           write_into(module), if the method merges
    kv       prefix() -> keys, values [kv_heads, P, head_dim], put in front of the text's, or
             context(query [B, heads, n, head_dim], scaling) -> [B, n, heads, head_dim], added to what attention gives;
             a part with prepare() has it called once a forward of the stack, one with `shift` = P moves the text's
             positions up by P where the family does so (one part a stack has it)
             a part with `eye` owns what looks at the pictures of a batch, `eye.see(images, rows)`, before each forward
             of the model (image_argument.py), and the frozen encoder that it looks through, `eye.sight`
    embeds   forward() -> virtual tokens [P, width], in front of the input; `behind` = n puts them behind its first n
             tokens, in models where they are inserted; one with `leads` = True has what becomes of its first token
             stand for the text's first behind the last layer, where poolers read; a part with `first` (a buffer) has
             them in place of the ids first, first + 1, … instead
    states   forward(reading, own) -> [B, n, width], in place of what leaves the stack; `reading` (states.Reading) has
             what its layers read and gave, which run without gradients; `taps` are the layers whose outputs are read
             (cache.py), besides the last; `layers` those that the part's own layers stand beside, in order, for room
             in caches, or `keeps`, the configuration of a whole model of the part's own; beside an encoder that a
             decoder attends to, what it gives reaches the decoder's part, if that has `reads_encoder`, as
             `reading.memory`; a part with a model of its own has `brings`, what an adapter's folder says of it, and
             its method `brings_model`
    head     forward(hidden) -> logits, in place of the base's head

    module   forward(x, y) -> y' at any module, for layers of other libraries (bridge.py); write_into(module), if the
             method merges

Optional: a method whose adapters other libraries read has `write_beside(adapter, folder)`, called when one is saved;
a part may have `fold() -> part`, its inference form, and the method then has `folded() -> method`, which
describes it; a part with `lr_scales() -> {name: factor}` trains those tensors at a multiple of the learning rate; a
method whose start needs text has `for_loading() -> method` with the same shapes and without that need; one with
`consistency` > 0 is trained on two forwards a batch (consistency.py); `whole_model = True` marks full fine-tuning;
`moves_text = True` one whose prefix takes positions of the text where the family counts learned ones;
a part that improves by search instead of by an optimizer has `search(loss, step)`, called once an optimizer step with
what measures the loss of the step's batches, and `gradient`, what backward passes have left for it since (or None), and
its method then has `found(parts) -> method`, the method with what the parts found; `finding` is that in a sentence;
a part may have `stage`, the tag of the rows that train it in disjoint training (stages.py);
`rows` is how many rows of mean length a batch holds where nothing else is said;
one that trains a template's pseudo tokens has `for_template(count) -> method` (pseudo.py) and `inside`, their number;
`own_head = True` says that the method deals with the task head itself; `exclusive = True` on a part says that it takes
the place of what the base has there, so that no other part may act at its site; `draws = True` on a part that it draws
anew at every call while training, so that a forward cannot be taken apart (prefix_share.py), and `whole = True` that
it reads all tokens of a forward, so that none may be run by itself; `undecayed` names its tensors that weight
decay would pull to a value with a meaning of its own;
`packed` on a part is how many bits its tensors hold, eight a byte; one whose tensors are as long as training makes them
has `fit(tensors)`, called before they are loaded. A method that trains in phases has `progress(parts, done)`, called
before each optimizer step with the share of them that is done, and with 1 behind the last; what it does there follows
from `done` and the trained tensors, so that a resumed run does the same. One with a term of its own in the loss has
`extra_loss(parts) -> tensor`, added once an optimizer step. `settles_at` is the share of the training behind which what
is evaluated is of the kind that is kept; no checkpoint up to there is the best.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeAlias, runtime_checkable

import torch
from torch import nn

from trimtab.sites import KVSite, Site, Sites

Parts: TypeAlias = "Mapping[Site, nn.Module]"


class Together(nn.Module):
    """The parts of several methods at one site; they act one after the other, each on what the one before gives."""

    def __init__(self, members: Mapping[str, nn.Module]):
        super().__init__()
        self.members = nn.ModuleDict(members)

    def fold(self) -> Together:
        """The members in their inference forms."""
        return Together({name: folded(part) for name, part in self.members.items()})


def members(part: nn.Module) -> Iterator[Any]:
    """The parts of single methods that a site's part consists of, in the order in which they act."""
    yield from part.members.values() if isinstance(part, Together) else (part,)


def folded(part: Any) -> nn.Module:
    """A part in its inference form; one that has none stays what it is."""
    return part.fold() if hasattr(part, "fold") else part


@dataclass(frozen=True)
class Context:
    """What a method may ask for besides the sites."""

    tokenizer: Any = None
    """The base model's tokenizer, for methods that start from text."""
    labels: Sequence[str] = ()
    """The task's label words, for methods that start from them."""
    brought: Mapping[str, Any] | None = None
    """What an adapter's folder says of a model that the adapter brings, whose weights are loaded afterwards."""
    room: int | None = None
    """The numbers that such a model may have at most."""
    record: Callable[[Sequence[int]], Mapping[KVSite, tuple[torch.Tensor, torch.Tensor]]] = lambda ids: {}
    """Keys and values [kv_heads, P, head_dim] that the frozen base gives P token ids, by kv site."""

    def token_ids(self, text: str, wanted_by: str) -> list[int]:
        """Token ids of `text` without special tokens. Raises UserError where there is no tokenizer or no token."""
        from trimtab.errors import UserError

        if self.tokenizer is None:
            raise UserError(f"{wanted_by} starts from text and needs a tokenizer: attach(model, method, tokenizer=…)")
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise UserError(f"{wanted_by}: the text {text!r} has no token")
        return ids


@runtime_checkable
class Method(Protocol):
    """A frozen dataclass that says what to train."""

    name: ClassVar[str]
    """The method's name in method strings."""
    kinds: ClassVar[frozenset[str]]
    """The site kinds that it needs."""
    lr: ClassVar[float]
    """The learning rate used where the user gives none."""
    mergeable: ClassVar[bool]
    """Whether it can be written into the base weights."""
    formula: ClassVar[str]
    """Its number of trained parameters, for people."""
    paper: ClassVar[str]
    """Authors, year, arXiv id."""

    def build(self, sites: Sites, context: Context) -> Parts:
        """The parts, one a claimed site."""
        ...

    def parameter_count(self, sites: Sites) -> int:
        """The number of trained parameters on these sites, from the formula."""
        ...

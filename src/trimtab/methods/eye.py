"""What LLaMA-Adapter makes of pictures. Zhang et al. 2024, arXiv:2303.16199 (global) and Gao et al. 2023,
arXiv:2304.15010 (queries).

    P_l' = P_l + I,     P_l [length, width] the prompts of a layer, I what is made of the row's picture:

    global    I = LN(W_2 gelu(W_1 LN(g) + b_1) + b_2)   [1, width], the same for all prompts; g [F] from several layers
    queries   I = LN(W h_0…h_{Q−1} + b)                 [Q, width], Q = length; h = blocks([q_1 … q_Q ; W_t t + b_t])

of a frozen encoder (sight.py) whose global features are g and whose tokens are t. Queries q [Q, inner] start as
standard normal noise. A row without a picture has I = 0: its prompts are the text-only ones, bit for bit.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.errors import UserError, unknown

if TYPE_CHECKING:
    from trimtab.sight import Sight

HEADS = 4
"""Heads of the query form's blocks."""


class Looking(Protocol):
    """The settings of a method that looks at pictures."""

    @property
    def length(self) -> int: ...
    @property
    def image(self) -> str | None: ...
    @property
    def look(self) -> str: ...
    @property
    def scales(self) -> str | None: ...
    @property
    def image_hidden(self) -> int: ...
    @property
    def blocks(self) -> int: ...


OF_IMAGES = ("look", "scales", "image_layers", "image_hidden", "blocks")
"""The settings that mean something where there is an encoder."""


def check_looking(method: Any) -> None:
    """Raises UserError for settings of pictures without an encoder, or that mean nothing."""
    known = {field.name: field.default for field in dataclasses.fields(method)}
    changed = [name for name in OF_IMAGES if getattr(method, name) != known.get(name, getattr(method, name))]
    if method.image is None and changed:
        raise UserError(f"{method.name}: {changed[0]} means nothing without image=ENCODER")
    if method.look not in (looks := ("global", "queries")):
        raise unknown(f"{method.name}: look", method.look, looks)
    if method.look == "queries" and method.scales is not None:
        raise UserError(f"{method.name}: scales= belongs to look=global; queries read the encoder's last layer")
    if method.look == "queries" and method.image_hidden % HEADS:
        raise UserError(f"{method.name}: image_hidden={method.image_hidden} must be a multiple of {HEADS}")
    if method.image_hidden < 1 or method.blocks < 1:
        raise UserError(f"{method.name}: image_hidden and blocks must be at least 1")


def sight_of(method: Looking) -> Sight:
    """The frozen encoder that a method looks through."""
    from trimtab.sight import Sight  # which loads models, and these need to know the methods

    assert method.image is not None
    return Sight(method.image, layers=method.scales, tokens=method.look == "queries")


def whole_path(method: Any) -> Any:
    """The method with an encoder in a folder by its whole path, as it may be noted down."""
    from trimtab.models import portable

    return method if method.image is None else dataclasses.replace(method, image=portable(method.image))


class Eye(nn.Module):
    """I of each row of the present batch; it owns the trained tensors, and knows the frozen encoder."""

    def __init__(self, method: Looking, width: int):
        super().__init__()
        queries = method.look == "queries"
        self.sight = sight_of(method)
        features, inner = self.sight.width, method.image_hidden
        self.net: nn.Module = (
            Queries(features, inner, width, method.length, method.blocks) if queries else Global(features, inner, width)
        )
        self.length = method.length if queries else 1
        self.current: Tensor | None = None
        """I [batch, 1 or length, width] of the present forward; None where no row has a picture."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "current": None}  # a copy of the model looks for itself

    def see(self, images: Any, rows: int) -> None:
        """Look at the pictures of a batch. Raises UserError for as many pictures as there are no rows."""
        self.current = None
        if images is None:
            return
        if len(images) != rows:
            raise UserError(f"{len(images)} pictures for {rows} rows; give one a row, None where a row has none")
        weight = next(self.net.parameters())
        features, which = self.sight.look(images, weight.device)
        if len(features):
            made = self.net(features.to(weight.dtype))
            at = which.nonzero().squeeze(1).to(weight.device)
            self.current = made.new_zeros(rows, *made.shape[1:]).index_copy(0, at, made)

    def forget(self) -> None:
        """No picture is seen."""
        self.current = None


class Global(nn.Module):
    """LN(W_2 gelu(W_1 LN(g) + b_1) + b_2)"""

    def __init__(self, features: int, inner: int, width: int):
        super().__init__()
        self.norm, self.first = nn.LayerNorm(features), nn.Linear(features, inner)
        self.second, self.last = nn.Linear(inner, width), nn.LayerNorm(width)

    def forward(self, features: Tensor) -> Tensor:
        """[N, 1, F] -> [N, 1, width]"""
        return self.last(self.second(F.gelu(self.first(self.norm(features)))))

    @staticmethod
    def count(features: int, inner: int, width: int) -> int:
        """2F + (F + 1)·inner + (inner + 1)·width + 2·width"""
        return 2 * features + (features + 1) * inner + (inner + 1) * width + 2 * width


class Queries(nn.Module):
    """LN(W h + b) of learned queries that attend to the picture's tokens in a few blocks."""

    def __init__(self, features: int, inner: int, width: int, length: int, blocks: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(length, inner))
        self.tokens = nn.Linear(features, inner)
        self.blocks = nn.ModuleList(Block(inner) for _ in range(blocks))
        self.second, self.last = nn.Linear(inner, width), nn.LayerNorm(width)

    def forward(self, features: Tensor) -> Tensor:
        """[N, n, F] -> [N, length, width]"""
        queries = self.queries.expand(features.shape[0], -1, -1)
        states = torch.cat([queries, self.tokens(features)], dim=1)
        for block in self.blocks:
            states = block(states)
        return self.last(self.second(states[:, : self.queries.shape[0]]))

    @staticmethod
    def count(features: int, inner: int, width: int, length: int, blocks: int) -> int:
        """length·inner + (F + 1)·inner + blocks·(12·inner² + 13·inner) + (inner + 1)·width + 2·width"""
        block = 12 * inner * inner + 13 * inner
        return length * inner + (features + 1) * inner + blocks * block + (inner + 1) * width + 2 * width


class Block(nn.Module):
    """A pre-norm transformer block, as in vision transformers: x + attention(LN x), then x + MLP(LN x)."""

    def __init__(self, width: int):
        super().__init__()
        self.before, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.between, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[N, n, inner] -> [N, n, inner]"""
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(seen)
        return x + self.down(F.gelu(self.up(self.between(x))))

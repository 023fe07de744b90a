"""A frozen vision encoder and what it sees in pictures. Knows transformers' vision models; refuses to know adapters and
language models.

    global   g = [LN s_1 ; … ; LN s_K]  [F]       s_k: the class token behind layer k, or the mean where there is none
    tokens   t = LN of the last layer's tokens  [n, width]

Of a picture this is a pure function of its pixels, so with a store it is computed once, however many questions there
are about it and however many epochs. LN has no weights here: it brings the layers to one scale.
"""

from __future__ import annotations

import functools
import hashlib
import json
import weakref
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.arch import select_layers
from trimtab.checkpoint import model_fingerprint
from trimtab.errors import UserError
from trimtab.lazy_picture import Picture
from trimtab.models import load_vision_encoder, portable
from trimtab.processor import load_processor
from trimtab.store import Store

SCALES = 4
"""Layers whose global features are read where nothing else is said, evenly spaced, the last among them."""
AT_ONCE = 32
"""Pictures that are run through the encoder in one call."""


class Sight:
    """What a frozen encoder sees: `look(images)`; it is no module, so that no state_dict and no optimizer has it.

    `tokens` asks for the last layer's tokens instead of the global features; `layers` says of which layers these are.
    Raises UserError for a source that is no vision model and for layers out of range.
    """

    def __init__(self, source: str, *, layers: str | None = None, tokens: bool = False):
        self.source = source
        self.model = load_vision_encoder(source)
        self.processor = load_processor(source)
        self.shape = tuple(self.processor(Image.new("RGB", (48, 32))).shape)
        """Channels, height and width of a picture as the encoder reads it."""
        self.tokens, self.layers = tokens, layers
        self.store: Store | None = None
        """Where what was seen is kept; None keeps nothing but the last call's."""
        self._last: tuple[Rows, Tensor, Tensor] | None = None
        with torch.no_grad():
            states = self._states(torch.zeros(1, *self.shape))
        self.count = len(states)
        self.chosen = _spaced(self.count) if layers is None else select_layers(layers, self.count)
        self.width = self._read(states).shape[-1]
        """Numbers of one feature, F or width."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "store": None, "_last": None}  # a copy of the model keeps its own

    @functools.cached_property
    def fingerprint(self) -> str:
        """That of the encoder's weights."""
        return model_fingerprint(self.model)

    @functools.cached_property
    def facts(self) -> str:
        """What features depend on besides the picture, in short: weights, how pixels are made, what is read."""
        how = json.dumps(self.processor.inner.to_dict(), sort_keys=True, default=str)
        said = f"{self.fingerprint} {how} {'tokens' if self.tokens else self.chosen}"
        return hashlib.blake2b(said.encode(), digest_size=8).hexdigest()

    def describe(self) -> dict[str, Any]:
        """What an adapter's configuration says of the encoder."""
        kind = type(self.model).__name__
        path = portable(self.source)
        known = {"path": path, "class": kind, "model_type": self.model.config.model_type}
        return {**known, "width": self.width, "fingerprint": self.fingerprint}

    def look(self, images: Any, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """What is seen in the pictures of a batch: features [N, n, F] of the rows that have one, and which, bool [B].

        `images` is a tensor of pixel values [B, channels, height, width], or a list with a picture (a file's path, a
        PIL image, a tensor of pixel values) or None a row. Raises UserError, naming the row, for what is no picture.
        """
        rows = Rows(images)
        if self._last is not None and self._last[0].same(rows):
            return self._last[1].to(device), self._last[2]  # a step of generation, which brings what the last one did
        if self.model.device != torch.device(device):
            nn.Module.to(self.model, device)  # it is no part of the language model, which may have moved
        pictures = [None if one is None else Picture.of(one) for one in images]
        seen = torch.tensor([one is not None for one in pictures], dtype=torch.bool)
        found = self._known([(row, one) for row, one in enumerate(pictures, start=1) if one is not None])
        made = torch.stack(found).to(device) if found else torch.zeros(0, 1, self.width, device=device)
        self._last = rows, made, seen
        return made, seen

    def _known(self, pictures: list[tuple[int, Picture]]) -> list[Tensor]:
        """The features [n, F] of pictures; each different one is computed once."""
        keys = [f"picture-{self.facts}-{_named(row, picture)}" for row, picture in pictures]
        found = {key: None if self.store is None else self.store.get(key, 0) for key in dict.fromkeys(keys)}
        missing = {key: one for key, one in zip(keys, pictures, strict=True) if found[key] is None}
        names = list(missing)
        for start in range(0, len(names), AT_ONCE):
            part = names[start : start + AT_ONCE]
            for key, features in zip(part, self._compute([missing[key] for key in part]), strict=True):
                found[key] = features
                if self.store is not None:
                    self.store.put(key, 0, features)
        return [found[key] for key in keys]  # type: ignore[misc]

    @torch.no_grad()
    def _compute(self, pictures: list[tuple[int, Picture]]) -> Tensor:
        """[N, n, F] on the CPU."""
        pixels = torch.stack([self._pixels(*one) for one in pictures])
        return self._read(self._states(pixels.to(self.model.device, self.model.dtype))).float().cpu()

    def _pixels(self, row: int, picture: Picture) -> Tensor:
        try:
            made = picture.pixels(self.processor)
        except UserError as error:
            raise UserError(f"row {row}: {error}") from error
        if made.shape != self.shape:
            raise UserError(
                f"row {row}: the picture has the shape {list(made.shape)}, {self.source!r} reads {list(self.shape)}"
            )
        return made

    def _states(self, pixels: Tensor) -> list[Tensor]:
        """What each layer gives, the last one's behind the encoder's norm."""
        output = self.model(pixel_values=pixels, output_hidden_states=True)
        if not getattr(output, "hidden_states", None):
            raise UserError(f"{self.source!r} does not give what its layers see; image= needs a model that does")
        return [*output.hidden_states[1:-1], output.last_hidden_state]

    def _read(self, states: list[Tensor]) -> Tensor:
        """[N, n, F]"""
        if self.tokens:
            own = states[-1]
            return _scaled(own.flatten(2).transpose(1, 2) if own.dim() == 4 else own)
        return torch.cat([_scaled(self._pooled(states[at])) for at in self.chosen], dim=-1)[:, None]

    def _pooled(self, state: Tensor) -> Tensor:
        """[N, width] of tokens [N, n, width] or of a map [N, width, height, width]"""
        if state.dim() == 4:
            return state.mean((2, 3))
        return state[:, 0] if self._has_class_token else state.mean(1)

    @functools.cached_property
    def _has_class_token(self) -> bool:
        names = ("cls_token", "class_embedding")
        return any(name.rpartition(".")[2] in names for name, _ in self.model.named_parameters())


def _scaled(state: Tensor) -> Tensor:
    return F.layer_norm(state, state.shape[-1:])


def _spaced(count: int) -> list[int]:
    return sorted({max(0, round((number + 1) * count / SCALES) - 1) for number in range(SCALES)})


def _named(row: int, picture: Picture) -> str:
    try:
        return picture.key
    except UserError as error:
        raise UserError(f"row {row}: {error}") from error


class Rows:
    """The pictures that a call was given, to tell whether the next call is given the same."""

    def __init__(self, images: Any):
        if isinstance(images, Tensor):
            self.known: list[Any] = [] if images.is_inference() else [weakref.ref(images), images._version]
        else:  # a list that may change, of pictures that do not; of anything else it cannot be told
            fixed = all(one is None or isinstance(one, Picture) for one in images)
            self.known = [list(images)] if fixed else []

    def same(self, other: Rows) -> bool:
        """Whether both calls were surely given the same pictures."""
        if len(self.known) != len(other.known) or not self.known:
            return False
        if len(self.known) == 2:
            return self.known[0]() is other.known[0]() is not None and self.known[1] == other.known[1]
        mine, others = self.known[0], other.known[0]
        return len(mine) == len(others) and all(one is two for one, two in zip(mine, others, strict=True))

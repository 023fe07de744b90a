"""How a batch's pictures reach an adapter: the argument `images` of a language model's calls and of `generate`. Knows
calls; refuses to know methods, encoders and what a picture is.

A pre-hook takes `images` out of a call, so that the base, which knows no such argument, never sees it, and hands it to
what looks at pictures in the acting adapter. `generate` asks the model which arguments it takes; while an adapter that
looks is attached, the model's own `prepare_inputs_for_generation` stands behind one that names `images` as well.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from trimtab.errors import UserError
from trimtab.lazy_picture import Picture
from trimtab.positions import seen
from trimtab.sites import Module

NAME = "images"


class Eye(Protocol):
    """What looks at a batch's pictures, for all the parts of an adapter."""

    def see(self, images: Any, rows: int) -> None:
        """A call of the model begins, with these pictures of its rows; None where it was given none."""

    def forget(self) -> None:
        """Nothing is seen from here on."""


class ImageArgument:
    """The argument `images` of one model."""

    def __init__(self, model: Module):
        self.model = model
        self.eyes: Sequence[Eye] = ()
        """Those of the acting adapter."""
        self.acting: str | None = None
        """The method that acts; None where the frozen base does."""
        self.inside = False
        """Whether a call of the model is going on."""
        self.users = 0

    def use(self, method: str | None, eyes: Sequence[Eye]) -> None:
        """Another adapter acts."""
        for eye in self.eyes:
            eye.forget()
        self.acting, self.eyes = method, eyes

    def acquire(self) -> None:
        """An adapter that looks at pictures is attached: `generate` is to take them."""
        self.users += 1
        if self.users == 1:
            self.model.prepare_inputs_for_generation = Preparing(self.model.prepare_inputs_for_generation)

    def release(self) -> None:
        """One is detached; behind the last one the model is what it was."""
        self.users -= 1
        if self.users == 0:
            del self.model.prepare_inputs_for_generation

    def begin(self, model: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the model. Raises UserError for pictures that no one looks at, and for too few or too many."""
        self.inside = True
        images = kwargs.get(NAME)
        if images is not None and self.acting is not None and not self.eyes:
            raise UserError(
                f"{self.acting} looks at no pictures; leave the picture out, or train llama-adapter[image=ENCODER]"
            )
        for eye in self.eyes:
            eye.see(images, _rows(model, args, kwargs))
        return (args, {name: value for name, value in kwargs.items() if name != NAME}) if NAME in kwargs else None

    def end(self, model: Module, args: tuple[Any, ...], output: Any) -> None:
        """A call of the model is over; what was seen stays where layers may be run again for the backward pass."""
        self.inside = False
        if not torch.is_grad_enabled():
            for eye in self.eyes:
                eye.forget()

    def begin_body(self, body: Module, args: tuple[Any, ...]) -> None:
        """A call of the stack; one that is none of the model's has no pictures."""
        if not self.inside:
            for eye in self.eyes:
                eye.forget()


class Preparing:
    """A model's `prepare_inputs_for_generation` that takes `images` and hands them on at every step."""

    def __init__(self, own: Any):
        self.own = own
        self.pictures: tuple[list[Any], int, list[Picture | None]] | None = None

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(self.own)
        parameters = [one for one in signature.parameters.values() if one.name != NAME]
        at = next((at for at, one in enumerate(parameters) if one.kind is one.VAR_KEYWORD), len(parameters))
        parameters.insert(at, inspect.Parameter(NAME, inspect.Parameter.KEYWORD_ONLY, default=None))
        return signature.replace(parameters=parameters)

    def __call__(self, input_ids: Any, *args: Any, images: Any = None, **kwargs: Any) -> Any:
        made = self.own(input_ids, *args, **kwargs)
        if images is not None:
            made[NAME] = self._each_row(images, input_ids.shape[0], kwargs.get("past_key_values"))
        return made

    def _each_row(self, images: Any, rows: int, past: Any) -> Any:
        """A picture for each beam: tensors have been repeated by `generate`, lists have not."""
        if isinstance(images, torch.Tensor):
            return images
        given, known = list(images), self.pictures
        goes_on = past is not None and seen(past) > 0 and known is not None and known[1] == rows
        if not (goes_on and known is not None and _same(given, known[0])):
            pictures = [None if one is None else Picture.of(one) for one in given]
            each = rows // len(given) if given and rows % len(given) == 0 else 1
            known = self.pictures = given, rows, [one for one in pictures for _ in range(each)]
        return known[2]


def _same(left: list[Any], right: list[Any]) -> bool:
    return len(left) == len(right) and all(one is other for one, other in zip(left, right, strict=True))


def _rows(model: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The rows of a call's texts."""
    given = args[0] if args else kwargs.get("input_ids")
    given = kwargs.get("inputs_embeds") if given is None else given
    return 0 if given is None else int(given.shape[0])

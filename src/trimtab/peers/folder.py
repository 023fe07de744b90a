"""A folder that somebody else wrote: its configuration with checked types, its tensors from safetensors alone. Knows
files; refuses to know what they mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from trimtab.errors import UserError, unknown
from trimtab.files import read_json, safetensors
from trimtab.peers.kinds import Library

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
SHOWN = 3
"""Names of tensors that an error lists at most."""


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file. Raises UserError where it is missing, damaged, or holds other numbers than floats."""
    with safetensors(path) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise UserError(f"{path}: {key} holds {tensor.dtype}, not floating-point numbers")
    return tensors


class Folder:
    """One adapter folder of another library. Every tensor is taken once; what is left over is an error."""

    def __init__(self, path: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]):
        self.path, self.config, self.tensors = path, config, tensors

    @classmethod
    def open(cls, folder: str | Path, library: Library) -> Folder:
        """Read the configuration and the tensors. Raises UserError for a pickle, with how to do without."""
        path = Path(folder)
        config = read_json(path / library.config_file)
        tensors: dict[str, torch.Tensor] = {}
        for file in weight_files(path, library):
            tensors |= read_safetensors(file)
        if not tensors:
            raise UserError(f"{path}: {library.weight_files[0]} holds no tensors")
        return cls(path, config, tensors)

    def take(self, key: str) -> torch.Tensor:
        """A tensor, which is then used up. Raises UserError where there is none."""
        if key not in self.tensors:
            raise UserError(f"{self.path} has no tensor {key}")
        return self.tensors.pop(key)

    def take_ending(self, *endings: str) -> Iterator[tuple[str, str, torch.Tensor]]:
        """The tensors whose names end so: the name without the ending, the ending, the tensor."""
        for key in list(self.tensors):
            ending = next((one for one in endings if key.endswith(one)), None)
            if ending is not None:
                yield key[: -len(ending)], ending, self.take(key)

    def check_used_up(self) -> None:
        """Raises UserError for tensors that nothing has asked for."""
        if self.tensors:
            raise self.homeless(sorted(self.tensors))

    def homeless(self, keys: list[str]) -> UserError:
        """The error for tensors that there is no place for."""
        more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
        return UserError(f"{self.path}: trimtab has no place in this model for {', '.join(keys[:SHOWN])}{more}")

    def misshapen(self, key: str, tensor: torch.Tensor, wanted: str) -> UserError:
        """The error for a tensor of another shape than the model asks for."""
        return UserError(f"{self.path}: {key} has shape {list(tensor.shape)}, this model needs {wanted}")

    # -- the configuration's fields ---------------------------------------------------------------------------------

    def wrong(self, key: str, value: object, wanted: str) -> UserError:
        """The error for a field of the wrong type."""
        shown = repr(value)
        shown = shown if len(shown) <= 60 else f"{shown[:60]}…"
        return UserError(f"{self.path}: the configuration's {key} must be {wanted}, not {shown}")

    def number(self, key: str, default: float) -> float:
        """A finite number."""
        value = self.config.get(key)
        return default if value is None else self.finite(key, value)

    def finite(self, key: str, value: Any) -> float:
        """`value` as a float. Raises UserError where it is no finite number."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(key, value, "a number")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise self.wrong(key, value, "a finite number")
        return number

    def flag(self, key: str, default: bool = False) -> bool:
        """true or false."""
        value = self.config.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(key, value, "true or false")
        return default if value is None else value

    def text(self, key: str, default: str = "") -> str:
        """A text."""
        value = self.config.get(key)
        if value is not None and not isinstance(value, str):
            raise self.wrong(key, value, "a text")
        return default if value is None else value

    def numbers(self, key: str) -> dict[str, float]:
        """An object of finite numbers."""
        value = self.config.get(key) or {}
        if not isinstance(value, dict):
            raise self.wrong(key, value, "an object of numbers")
        return {name: self.finite(f"{key}[{name[:60]!r}]", one) for name, one in value.items()}

    def texts(self, key: str) -> list[str]:
        """A list of texts; a single one is a list of one."""
        value = self.config.get(key) or []
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise self.wrong(key, value, "a list of texts")
        return value

    def integers(self, key: str) -> list[int]:
        """A list of whole numbers."""
        value = self.config.get(key) or []
        if not isinstance(value, list) or not all(type(one) is int for one in value):
            raise self.wrong(key, value, "a list of whole numbers")
        return value

    def choice(self, what: str, key: str, allowed: Any) -> str:
        """A text that is one of those allowed."""
        value = self.text(key)
        if value not in allowed:
            raise unknown(f"{self.path}: {what}", value[:60], sorted(allowed))
        return value

    def refuse_set(self, keys: tuple[str, ...], what: str) -> None:
        """Raises UserError where one of these fields is set: an option that trimtab has not."""
        for key in keys:
            if self.config.get(key) not in (None, False, [], {}, "", 0):
                raise UserError(f"{self.path} uses {key}, which trimtab's {what} has not")


def weight_files(path: Path, library: Library) -> list[Path]:
    """The files of a folder's tensors. Raises UserError where the adapter's own is missing, with how to do without a
    pickle."""
    if not (path / library.weight_files[0]).is_file():
        raise UserError(_without_weights(path, library))
    return [path / name for name in library.weight_files if (path / name).is_file()]


def _without_weights(path: Path, library: Library) -> str:
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLES)
    if pickles:
        return (
            f"{path} offers {pickles[0]}, a pickle file, which can run code when read; "
            f"save it as safetensors: {library.how_to_save}"
        )
    return f"{path} has no {library.weight_files[0]}"

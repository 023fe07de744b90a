"""Truth values as bits, eight a byte. Knows bytes; refuses to know what the values mean.

Bit i of byte j, the lowest being 0, is value 8 j + i in row order; the last byte is filled with zeros.
"""

from __future__ import annotations

import torch


def byte_count(bits: int) -> int:
    """Bytes that so many bits take."""
    return -(-bits // 8)


def pack(values: torch.Tensor) -> torch.Tensor:
    """bool [...] of n values -> uint8 [ceil(n / 8)]"""
    flat = values.flatten()
    whole = torch.zeros(8 * byte_count(flat.numel()), dtype=torch.uint8, device=flat.device)
    whole[: flat.numel()] = flat
    return (whole.view(-1, 8) << _places(flat.device)).sum(1, dtype=torch.uint8)


def unpack(packed: torch.Tensor, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
    """uint8 [ceil(n / 8)] -> bool of a shape with n values"""
    bits = (packed[:, None] >> _places(packed.device)) & 1
    return bits.flatten()[: torch.Size(shape).numel()].view(shape).bool()


def _places(device: torch.device) -> torch.Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)

"""Philox4x32-10, random numbers by counter, in plain torch: the oracle of linf_start_'s kernel.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", and Random123.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def philox4x32(counters: Tensor, key: tuple[int, int]) -> Tensor:
    """Return four random words for each counter.

    Args:
        counters: (..., 4) int64, words from 0 to 2**32 - 1, the lowest first.
        key: two words.

    Returns:
        (..., 4) int64, words from 0 to 2**32 - 1.
    """
    c0, c1, c2, c3 = counters.unbind(-1)
    key0, key1 = key
    for _ in range(ROUNDS):
        high0, low0 = _product(MULTIPLIERS[0], c0)
        high1, low1 = _product(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + KEY_INCREMENTS[0]) & MASK, (key1 + KEY_INCREMENTS[1]) & MASK
    return torch.stack([c0, c1, c2, c3], dim=-1)


def uniform(count: int, seed: int, device: torch.device, *, first: int = 0) -> Tensor:
    """Return `count` float32 numbers, uniform in [-1, 1): multiples of 2**-23.

    Number i, counted from `first`, is the upper 24 bits of word i % 4 for the counter i // 4, with
    the key `seed`.
    """
    index = torch.arange(first // 4, (first + count + 3) // 4, device=device)
    zero = torch.zeros_like(index)
    counters = torch.stack([index & MASK, index >> 32, zero, zero], dim=-1)
    words = philox4x32(counters, (seed & MASK, seed >> 32)).flatten()[first % 4 :][:count]
    return (words >> 8).float() * 2.0**-23 - 1


def _product(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """Return the upper and lower word of a product, in steps that fit int64."""
    upper, lower = word * (multiplier >> 16), word * (multiplier & 0xFFFF)
    return (upper + (lower >> 16)) >> 16, (((upper & 0xFFFF) << 16) + lower) & MASK

"""Masks of the bounds: a padded batch is its valid rows, and nothing of the padding leaks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from gpu_on_cpu import every_impl
from oracle import (
    EAGER_IMPLS,
    VARIANTS,
    Result,
    all_stats,
    bound,
    check_result,
    value_and_grads,
)
from strategies import features
from torch import Tensor

all_variants = pytest.mark.parametrize("variant", VARIANTS)
INF, NAN = float("inf"), float("nan")

MASKS = {
    "padded batch": [True] * 5 + [False] * 4,
    "padding first": [False] * 3 + [True] * 6,
    "scattered": [True, False, False, True, True, False, True, False, True],
    "two": [False, True] + [False] * 6 + [True],
    "all": [True] * 9,
}
all_masks = pytest.mark.parametrize("rows", MASKS.values(), ids=MASKS.keys())


def padded_features(mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """z and h whose padding holds what must not leak."""
    z, h = features(len(mask), 3, 5, dtype)
    z[~mask], h[~mask] = NAN, INF
    return z, h


def padded_scores(mask: Tensor, dtype: torch.dtype) -> tuple[Tensor]:
    T = torch.randn(len(mask), len(mask), 3).to(dtype)
    T[~mask] = NAN
    T[:, ~mask] = INF
    return (T,)


def unpadded(mask: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(x[mask][:, mask] if len(inputs) == 1 else x[mask] for x in inputs)


def valid_part(result: Result, mask: Tensor) -> Result:
    """The result without the gradients of padding, which must be 0."""
    for grad in result.grads:
        assert (grad[~mask] == 0).all()
        if len(result.grads) == 1:
            assert (grad[:, ~mask] == 0).all()
    return Result(result.value, unpadded(mask, *result.grads))


def assert_same(ours: Result, wanted: Result) -> None:
    assert torch.equal(ours.value, wanted.value)
    for got, exact in zip(ours.grads, wanted.grads, strict=True):
        assert torch.equal(got, exact)


@all_masks
@all_variants
@pytest.mark.parametrize("padded", [padded_features, padded_scores])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_mask_gives_what_the_valid_rows_alone_do(
    dtype: torch.dtype, padded: Callable[..., tuple[Tensor, ...]], variant: str, rows: list[bool]
) -> None:
    mask = torch.tensor(rows)
    inputs = padded(mask, dtype)
    for impl in EAGER_IMPLS:
        masked = value_and_grads(
            lambda *x, impl=impl: bound(variant, *x, mask=mask, impl=impl), *inputs
        )
        ours = valid_part(masked, mask)
        short = unpadded(mask, *inputs)
        if impl == "reference":
            wanted = value_and_grads(lambda *x: bound(variant, *x, impl="reference"), *short)
            assert_same(ours, wanted)
        check_result(ours, variant, *short)


@all_variants
def test_every_mask_of_five_rows(variant: str) -> None:
    for rows in product((False, True), repeat=5):
        if sum(rows) < 2:
            continue
        mask = torch.tensor(rows)
        z, h = padded_features(mask, torch.float32)
        short = unpadded(mask, z, h)
        for impl in EAGER_IMPLS:
            value = bound(variant, z, h, mask=mask, impl=impl)
            assert torch.equal(value, bound(variant, *short, impl=impl))


@every_impl
@all_masks
def test_a_mask_in_one_sweep(rows: list[bool], impl: str) -> None:
    mask = torch.tensor(rows)
    z, h = padded_features(mask, torch.float32)
    short = unpadded(mask, z, h)
    assert all_stats(z, h, mask=mask, impl=impl).positives.shape == (sum(rows), 3)
    for variant in VARIANTS:
        ours = value_and_grads(
            lambda a, b, name=variant: bound(name, stats=all_stats(a, b, mask=mask, impl=impl)),
            z,
            h,
        )
        check_result(valid_part(ours, mask), variant, *short)
